//! `_strings.json`: the text of every string leaf.
//!
//! One JSON object for a tree. TensorStore's `json` driver looks a leaf up by the JSON pointer `/<param name>`, and Orbax
//! escapes nothing: a `/` in a key descends into a nested object, `~0` and `~1` stand for `~` and `/`
//! (`orbax/checkpoint/_src/serialization/type_handlers.py`, `StringHandler`). Orbax 0.3 wrote `<name>/_strings.json` for
//! each leaf, with the leaf's name as its only member.

use std::collections::HashMap;

use serde_json::{Map, Value};

use crate::limits::JSON_DEPTH_MAX;

/// The text of the leaf with this parameter name.
///
/// # Errors
/// No such member, or one that is no string.
pub fn lookup<'a>(strings: &'a Value, name: &str) -> Result<&'a str, StringError> {
    let by_pointer = name.split('/').try_fold(strings, |node, token| node.as_object()?.get(&unescape(token)));
    // A foreign writer may have stored a name that contains `/` or `~` as it is.
    let node = by_pointer.or_else(|| strings.as_object()?.get(name)).ok_or(StringError::Missing)?;
    node.as_str().ok_or_else(|| StringError::NotText(kind(node)))
}

/// Why a string leaf has no text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StringError {
    /// The file has no such member.
    #[error("_strings.json has no text for it")]
    Missing,
    /// The member is something else.
    #[error("_strings.json has {0} in its place")]
    NotText(&'static str),
}

/// The bytes of the file that holds these texts, by parameter name: compact, sorted, UTF-8, as TensorStore writes it.
///
/// # Errors
/// The names for which there is no place, all of them.
pub fn to_bytes<'a>(texts: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<Vec<u8>, Vec<NoPlace>> {
    let (file, problems) = nest(texts);
    if problems.is_empty() { Ok(file.to_string().into_bytes()) } else { Err(problems) }
}

/// Why a text cannot be in the file under its leaf's name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoPlace {
    /// A `~` that is followed by neither `0` nor `1`: Orbax fails on it.
    #[error("the name `{name}` has a `~` that JSON pointers do not allow")]
    Tilde {
        /// The name.
        name: String,
    },
    /// Another text lies where this one's object would: `p` and `p/q`.
    #[error("the names `{other}` and `{name}` need the same place in _strings.json")]
    Conflict {
        /// The name.
        name: String,
        /// The other name.
        other: String,
    },
    /// A name with more slashes than JSON may be deep.
    #[error("the name `{name}` has more than {JSON_DEPTH_MAX} slashes")]
    Deep {
        /// The name.
        name: String,
    },
}

impl NoPlace {
    /// The name of the leaf.
    pub fn name(&self) -> &str {
        match self {
            Self::Tilde { name } | Self::Conflict { name, .. } | Self::Deep { name } => name,
        }
    }
}

/// The file of these texts, and the names that have no place in it.
pub(super) fn nest<'a>(texts: impl IntoIterator<Item = (&'a str, &'a str)>) -> (Value, Vec<NoPlace>) {
    let mut texts: Vec<(&str, &str)> = texts.into_iter().collect();
    // Sorted, a name comes before those that lie below it, and equal names are neighbours.
    texts.sort();
    let mut root = Map::new();
    let mut owners: HashMap<Vec<String>, &str> = HashMap::new();
    let mut problems = Vec::new();
    'names: for (name, text) in texts {
        let problem = |problem: fn(String) -> NoPlace| problem(name.to_owned());
        if name.split('~').skip(1).any(|rest| !rest.starts_with(['0', '1'])) {
            problems.push(problem(|name| NoPlace::Tilde { name }));
            continue;
        }
        let tokens: Vec<String> = name.split('/').map(unescape).collect();
        if tokens.len() > JSON_DEPTH_MAX {
            problems.push(problem(|name| NoPlace::Deep { name }));
            continue;
        }
        for end in 1..=tokens.len() {
            if let Some(other) = tokens.get(..end).and_then(|above| owners.get(above)) {
                problems.push(NoPlace::Conflict { name: name.to_owned(), other: (*other).to_owned() });
                continue 'names;
            }
        }
        let mut node = &mut root;
        let (last, above) = match tokens.split_last() {
            Some((last, above)) => (last.clone(), above),
            None => (String::new(), tokens.as_slice()),
        };
        for token in above {
            let below = node.entry(token.clone()).or_insert_with(|| Value::Object(Map::new()));
            // What is no object has an owner, which was looked for.
            let Value::Object(below) = below else { continue 'names };
            node = below;
        }
        node.insert(last, Value::String(text.to_owned()));
        owners.insert(tokens, name);
    }
    (Value::Object(root), problems)
}

fn unescape(token: &str) -> String {
    token.replace("~1", "/").replace("~0", "~")
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slashes_descend_and_tildes_are_unescaped() {
        let strings =
            serde_json::json!({"p": {"q": "one"}, "p.q": "two", "": "bare", "a~b": "tilde", "a/c": "slash", "~1": "x"});
        let cases =
            [("p/q", "one"), ("p.q", "two"), ("", "bare"), ("a~0b", "tilde"), ("a~1c", "slash"), ("a~b", "tilde")];
        for (name, text) in cases {
            assert_eq!(lookup(&strings, name), Ok(text), "{name}");
        }
        assert_eq!(lookup(&strings, "a/c"), Ok("slash"));
        assert_eq!(lookup(&strings, "~01"), Ok("x"));
    }

    #[test]
    fn what_is_no_text_says_so() {
        let strings = serde_json::json!({"p": {"q": 1}});
        assert_eq!(lookup(&strings, "p"), Err(StringError::NotText("an object")));
        assert_eq!(lookup(&strings, "p/q"), Err(StringError::NotText("a number")));
        assert_eq!(lookup(&strings, "p/q/r"), Err(StringError::Missing));
        assert_eq!(lookup(&Value::Null, ""), Err(StringError::Missing));
    }

    #[test]
    fn names_nest_at_their_slashes() {
        let file = to_bytes([("s", "hé\n"), ("p.q", "two"), ("p/q", "one"), ("", "bare"), ("a~1c", "slash")]).unwrap();
        assert_eq!(
            String::from_utf8(file).unwrap(),
            r#"{"":"bare","a/c":"slash","p":{"q":"one"},"p.q":"two","s":"hé\n"}"#
        );
    }

    #[test]
    fn every_name_without_a_place_is_told() {
        let deep = "/".repeat(JSON_DEPTH_MAX);
        let names = ["p/q", "ok", "p", "p!", "a~", "a~2b", "a~01", "twice", "twice", &deep];
        let mut problems: Vec<_> =
            to_bytes(names.map(|name| (name, ""))).unwrap_err().iter().map(ToString::to_string).collect();
        problems.sort();
        let expected = [
            format!("the name `{deep}` has more than {JSON_DEPTH_MAX} slashes"),
            "the name `a~2b` has a `~` that JSON pointers do not allow".to_owned(),
            "the name `a~` has a `~` that JSON pointers do not allow".to_owned(),
            "the names `p` and `p/q` need the same place in _strings.json".to_owned(),
            "the names `twice` and `twice` need the same place in _strings.json".to_owned(),
        ];
        assert_eq!(problems, expected);
    }

    proptest::proptest! {
        /// What is accepted is found again under its name.
        #[test]
        fn what_is_written_is_found(texts in proptest::collection::hash_map("[ab/~01é]{0,5}", ".{0,3}", 0..8)) {
            let pairs = || texts.iter().map(|(name, text)| (name.as_str(), text.as_str()));
            let (_, problems) = nest(pairs());
            let placed = |name: &str| problems.iter().all(|problem| problem.name() != name);
            let file = to_bytes(pairs().filter(|(name, _)| placed(name))).unwrap();
            let file = serde_json::from_slice(&file).unwrap();
            for (name, text) in pairs().filter(|(name, _)| placed(name)) {
                proptest::prop_assert_eq!(lookup(&file, name), Ok(text));
            }
        }
    }
}
