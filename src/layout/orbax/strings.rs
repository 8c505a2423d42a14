//! `_strings.json`: the text of every string leaf.
//!
//! One JSON object for a tree. TensorStore's `json` driver looks a leaf up by the JSON pointer `/<param name>`, and Orbax
//! escapes nothing: a `/` in a key descends into a nested object, `~0` and `~1` stand for `~` and `/`
//! (`orbax/checkpoint/_src/serialization/type_handlers.py`, `StringHandler`). Orbax 0.3 wrote `<name>/_strings.json` for
//! each leaf, with the leaf's name as its only member.

use serde_json::Value;

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
}
