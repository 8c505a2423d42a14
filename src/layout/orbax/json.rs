//! JSON as Python writes and reads it.
//!
//! `json.dumps` emits bare `NaN`, `Infinity` and `-Infinity`, which are no JSON; `{"loss": NaN}` is a real metrics file.
//! Here each of them becomes the string of the same spelling. Of duplicate keys the last one wins, as in Python; nesting
//! is bounded by `serde_json` (128 levels); integers beyond 64 bits become floats. A program that loads and saves such values
//! saves what they became; a conversion carries their text.

use serde::de::DeserializeOwned;
use serde_json::Value;

use super::python::Doc;

/// Why a JSON document cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("JSON that does not fit: {message}")]
pub struct JsonError {
    /// What the parser says, with line and column.
    pub message: String,
    /// The byte at which it stopped.
    pub offset: u64,
}

/// Parses a document of any form.
///
/// # Errors
/// What is not JSON even after the bare tokens are quoted.
pub fn parse(bytes: &[u8]) -> Result<Value, JsonError> {
    from_slice(bytes)
}

/// Parses a document into a type.
///
/// # Errors
/// What is not JSON even after the bare tokens are quoted, or does not fit the type.
pub fn from_slice<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, JsonError> {
    // Nearly every file is strict JSON, so the quoting pass runs only where the strict parser stopped.
    match serde_json::from_slice(bytes) {
        Ok(value) => Ok(value),
        Err(error) => {
            let strict = describe(&error, bytes);
            let quoted = if is_at_bare_token(bytes, strict.offset) { quote_bare_tokens(bytes) } else { None };
            match quoted {
                Some(quoted) => serde_json::from_slice(&quoted).map_err(|error| describe(&error, &quoted)),
                None => Err(strict),
            }
        }
    }
}

/// Whether what a strict parser stopped at, at the byte before this offset or a sign before it, is a bare token. Everything
/// else is wrong with quotes, too, and a file that is hostile is not gone through again.
fn is_at_bare_token(bytes: &[u8], offset: u64) -> bool {
    let at = usize::try_from(offset).unwrap_or(usize::MAX);
    let starts = (0..=2).filter_map(|back| bytes.get(at.checked_sub(back)?..));
    starts.into_iter().any(|rest| BARE_TOKENS.iter().any(|token| rest.starts_with(token)))
}

/// The text of a member of a document that [`parse`] reads, where it has numbers that a [`Value`] does not hold: those that are
/// not finite, and integers beyond 64 bits.
pub fn inexact_member(bytes: &[u8], name: &str) -> Option<String> {
    let text = members(bytes).into_iter().rev().find(|(key, _)| key == name)?.1;
    is_inexact(text).then(|| String::from_utf8(text.to_vec()).ok()).flatten()
}

/// Whether a document has numbers that a [`Value`] does not hold.
pub fn is_inexact(bytes: &[u8]) -> bool {
    tokens(bytes).any(|token| match token {
        [b'"', ..] => false,
        token if BARE_TOKENS.contains(&token) => true,
        // What has a point or an exponent is a float for Python, too.
        [b'-' | b'0'..=b'9', ..] if token.iter().all(|byte| matches!(byte, b'-' | b'0'..=b'9')) => {
            let number = std::str::from_utf8(token).unwrap_or_default();
            number.parse::<i64>().is_err() && number.parse::<u64>().is_err()
        }
        _ => false,
    })
}

/// The members of an object and their texts, of a document that is one.
fn members(bytes: &[u8]) -> Vec<(String, &[u8])> {
    let (mut found, mut depth, mut key, mut start) = (Vec::new(), 0_u64, None, None);
    let at = |token: &[u8]| token.as_ptr() as usize - bytes.as_ptr() as usize;
    for token in tokens(bytes) {
        match token {
            [b'}' | b']'] => depth = depth.saturating_sub(1),
            [b'{' | b'['] => depth += 1,
            _ => {}
        }
        match (token, depth) {
            ([b':'], 1) => start = Some(at(token) + 1),
            ([b','], 1) | ([b'}'], 0) => {
                if let (Some(key), Some(start)) = (key.take(), start.take()) {
                    found.push((key, bytes[start..at(token)].trim_ascii()));
                }
            }
            ([b'"', ..], 1) if start.is_none() => key = serde_json::from_slice(token).ok(),
            _ => {}
        }
    }
    found
}

/// Strings, marks, and what stands between them.
fn tokens(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        rest = rest.trim_ascii_start();
        let len = match rest.first()? {
            b'"' => {
                let mut escaped = false;
                let end = rest.iter().skip(1).position(|&byte| {
                    let ends = byte == b'"' && !escaped;
                    escaped = byte == b'\\' && !escaped;
                    ends
                });
                end.map_or(rest.len(), |end| end + 2)
            }
            b'{' | b'}' | b'[' | b']' | b',' | b':' => 1,
            _ => {
                let ends = |byte: &u8| byte.is_ascii_whitespace() || b"{}[],:\"".contains(byte);
                rest.iter().position(ends).unwrap_or(rest.len())
            }
        };
        let (token, after) = rest.split_at(len);
        rest = after;
        Some(token)
    })
}

/// Whether a value is nested no deeper than this many levels; [`parse`] reads [`JSON_DEPTH_MAX`](crate::limits::JSON_DEPTH_MAX)
/// of them in a document.
pub fn nests_within(value: &Value, levels: usize) -> bool {
    match (value, levels.checked_sub(1)) {
        (Value::Array(items), Some(below)) => items.iter().all(|item| nests_within(item, below)),
        (Value::Object(members), Some(below)) => members.values().all(|item| nests_within(item, below)),
        (Value::Array(_) | Value::Object(_), None) => false,
        _ => true,
    }
}

/// A value as `json.dumps` writes it: what a JSON item holds in `data.json`.
pub fn to_bytes(value: &Value) -> Vec<u8> {
    Doc::Value(value).dumps().into_bytes()
}

/// Metrics as Python writes them: [`to_bytes`], with the quoted forms of numbers that are not finite as bare tokens, so that
/// what [`parse`] makes of a file makes the same file again.
pub fn metrics_to_bytes(value: &Value) -> Vec<u8> {
    fn doc(value: &Value) -> Doc<'_> {
        match value {
            Value::String(text) => match ["NaN", "Infinity", "-Infinity"].iter().find(|token| *token == text) {
                Some(token) => Doc::Bare(token),
                None => Doc::text(text),
            },
            Value::Array(items) => Doc::List(items.iter().map(doc).collect()),
            Value::Object(members) => Doc::object(members.iter().map(|(name, value)| (name.as_str(), doc(value)))),
            plain => Doc::Value(plain),
        }
    }
    doc(value).dumps().into_bytes()
}

/// The number in a value, with the quoted forms of the non-finite ones.
pub fn number(value: &Value) -> Option<f64> {
    match value {
        Value::Number(number) => number.as_f64(),
        Value::String(text) => match text.as_str() {
            "NaN" => Some(f64::NAN),
            "Infinity" => Some(f64::INFINITY),
            "-Infinity" => Some(f64::NEG_INFINITY),
            _ => None,
        },
        _ => None,
    }
}

/// The document with every bare token in quotes; `None` if it has none.
fn quote_bare_tokens(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut quoted = Vec::new();
    let mut found = false;
    let mut in_string = false;
    let mut rest = bytes;
    while let Some((&byte, tail)) = rest.split_first() {
        if in_string {
            let taken = if byte == b'\\' { rest.len().min(2) } else { 1 };
            in_string = byte != b'"';
            let (escape, tail) = rest.split_at(taken);
            quoted.extend_from_slice(escape);
            rest = tail;
            continue;
        }
        if let Some(token) = BARE_TOKENS.iter().find(|token| rest.starts_with(token)) {
            quoted.push(b'"');
            quoted.extend_from_slice(token);
            quoted.push(b'"');
            found = true;
            rest = rest.split_at(token.len()).1;
            continue;
        }
        in_string = byte == b'"';
        quoted.push(byte);
        rest = tail;
    }
    found.then_some(quoted)
}

fn describe(error: &serde_json::Error, bytes: &[u8]) -> JsonError {
    let before: usize =
        bytes.split(|&byte| byte == b'\n').take(error.line().saturating_sub(1)).map(|line| line.len() + 1).sum();
    JsonError { message: error.to_string(), offset: (before + error.column()) as u64 }
}

const BARE_TOKENS: [&[u8]; 3] = [b"NaN", b"Infinity", b"-Infinity"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bare_tokens_become_strings_and_strings_stay() {
        let value = parse(br#"{"loss": NaN, "a": [Infinity, -Infinity, -1], "s": "NaN \" Infinity \\"}"#).unwrap();
        assert_eq!(value["loss"], "NaN");
        assert_eq!(value["a"], serde_json::json!(["Infinity", "-Infinity", -1]));
        assert_eq!(value["s"], "NaN \" Infinity \\");
        assert!(number(&value["loss"]).unwrap().is_nan());
        assert_eq!(number(&value["a"][1]), Some(f64::NEG_INFINITY));
    }

    #[test]
    fn metrics_come_back_as_they_were_written() {
        let real = br#"{"loss": NaN, "acc": 0.5, "more": [Infinity, -Infinity, "text"], "n": null}"#;
        let value = parse(real).unwrap();
        assert_eq!(parse(&metrics_to_bytes(&value)).unwrap(), value);
        assert_eq!(metrics_to_bytes(&serde_json::json!({"loss": "NaN"})), br#"{"loss": NaN}"#);
    }

    #[test]
    fn the_last_of_duplicate_keys_wins() {
        assert_eq!(parse(br#"{"a": 1, "a": 2}"#).unwrap()["a"], 2);
    }

    #[test]
    fn big_integers_are_kept_up_to_64_bits() {
        let value = parse(b"[18446744073709551615, -9223372036854775808, 36893488147419103232]").unwrap();
        assert_eq!(value[0].as_u64(), Some(u64::MAX));
        assert_eq!(value[1].as_i64(), Some(i64::MIN));
        assert_eq!(value[2].as_f64(), Some(36_893_488_147_419_103_232.0));
    }

    #[test]
    fn deep_nesting_is_an_error_not_a_stack_overflow() {
        assert!(parse(&vec![b'['; 1_000_000]).is_err());
    }

    #[test]
    fn members_with_numbers_that_no_value_holds_are_given_as_text() {
        let file = br#"{"a": {"x": [1, -2.5e4]}, "c": {"loss": NaN, "s": "}\\\"]", "big": 36893488147419103232}, "c\u0061": [-Infinity], "n": "NaN, 99999999999999999999"}"#;
        let text = r#"{"loss": NaN, "s": "}\\\"]", "big": 36893488147419103232}"#;
        assert_eq!(inexact_member(file, "c").as_deref(), Some(text));
        assert_eq!(inexact_member(file, "ca").as_deref(), Some("[-Infinity]"));
        for exact in ["a", "n", "none", "x"] {
            assert_eq!(inexact_member(file, exact), None, "{exact}");
        }
        for (document, inexact) in
            [("18446744073709551615", false), ("18446744073709551616", true), ("-9223372036854775809", true)]
        {
            assert_eq!(is_inexact(document.as_bytes()), inexact, "{document}");
        }
        // The last of duplicate members is the one that counts.
        assert_eq!(inexact_member(br#"{"c": NaN, "c": 1}"#, "c"), None);
    }

    #[test]
    fn what_nests_within_the_bound_is_read_again_and_nothing_else() {
        let nested = |levels| (0..levels).fold(serde_json::json!(1), |value, _| serde_json::json!({"a": [0, value]}));
        for levels in [0, 1, 60, 63, 64, 65, 200] {
            let value = nested(levels);
            let read = parse(&to_bytes(&value)).is_ok();
            assert_eq!(nests_within(&value, crate::limits::JSON_DEPTH_MAX), read, "{levels}");
        }
        assert!(nests_within(&nested(1), 2) && !nests_within(&nested(1), 1));
    }

    #[test]
    fn the_error_says_where() {
        assert_eq!(parse(b"{\n\"a\": x}").unwrap_err().offset, 8);
        assert!(parse(b"").is_err());
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_return(bytes: Vec<u8>) {
            let _ = parse(&bytes);
        }

        #[test]
        fn any_bytes_have_members(bytes: Vec<u8>, text in "[{}:,\"\\\\a\\[\\] 1N]{0,30}") {
            let _ = (inexact_member(&bytes, "a"), inexact_member(text.as_bytes(), "a"));
        }

        #[test]
        fn quoting_never_changes_strict_json(text in "[ -~]{0,20}") {
            let json = serde_json::to_vec(&text).unwrap();
            proptest::prop_assert_eq!(quote_bare_tokens(&json), None);
        }
    }
}
