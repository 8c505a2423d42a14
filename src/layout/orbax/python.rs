//! Text as Python writes it: `json.dumps` with its defaults, and the `repr` of strings.
//!
//! Orbax writes its metadata by `json.dumps`: `", "` and `": "` between things, everything but printable ASCII escaped,
//! members in the order in which they were put in. Must not know: what the documents say.

use std::borrow::Cow;
use std::fmt::Write;

use serde_json::Value;

/// A JSON document whose members keep their order, which [`Value`] would lose.
#[derive(Clone, Debug)]
pub(super) enum Doc<'a> {
    Null,
    Bool(bool),
    Int(i64),
    Size(u64),
    Text(Cow<'a, str>),
    /// Text as it stands: the token `NaN`, or JSON that somebody else wrote.
    Bare(&'a str),
    List(Vec<Self>),
    Object(Vec<(Cow<'a, str>, Self)>),
    /// A user's own value.
    Value(&'a Value),
}

impl<'a> Doc<'a> {
    /// Borrowed text.
    pub(super) fn text(text: &'a str) -> Self {
        Self::Text(text.into())
    }

    /// A shape.
    pub(super) fn sizes(sizes: &[u64]) -> Self {
        Self::List(sizes.iter().map(|&size| Self::Size(size)).collect())
    }

    /// An object with these members.
    pub(super) fn object(members: impl IntoIterator<Item = (&'a str, Self)>) -> Self {
        Self::Object(members.into_iter().map(|(name, value)| (name.into(), value)).collect())
    }

    /// The value, or null.
    pub(super) fn or_null(value: Option<Self>) -> Self {
        value.unwrap_or(Self::Null)
    }

    /// The text of `json.dumps` of an object whose first member is an object of very many: one of them is in memory at a time.
    pub(super) fn dumps_many(
        (name, many): (&str, impl Iterator<Item = (String, Self)>),
        rest: &[(&str, Self)],
    ) -> String {
        let mut out = String::from("{");
        member(name, &mut out);
        sequence(&mut out, ['{', '}'], many, |(name, value), out| {
            member(&name, out);
            value.write(out);
        });
        for (name, value) in rest {
            out.push_str(", ");
            member(name, &mut out);
            value.write(&mut out);
        }
        out.push('}');
        out
    }

    /// The text of `json.dumps`: ASCII.
    pub(super) fn dumps(&self) -> String {
        let mut out = String::new();
        self.write(&mut out);
        out
    }

    fn write(&self, out: &mut String) {
        match self {
            Self::Null => out.push_str("null"),
            Self::Bool(value) => show(out, value),
            Self::Int(value) => show(out, value),
            Self::Size(value) => show(out, value),
            Self::Text(text) => string(text, out),
            Self::Bare(token) => out.push_str(token),
            Self::List(items) => sequence(out, ['[', ']'], items, |item, out| item.write(out)),
            Self::Object(members) => sequence(out, ['{', '}'], members, |(name, value), out| {
                member(name, out);
                value.write(out);
            }),
            Self::Value(value) => write_value(value, out),
        }
    }
}

/// The `repr` of a tuple of strings: `('a', '0')`, `('a',)`, `()`.
pub(super) fn repr_tuple<S: AsRef<str>>(elements: impl ExactSizeIterator<Item = S>) -> String {
    let mut out = String::from("(");
    let count = elements.len();
    for (index, element) in elements.enumerate() {
        if index > 0 {
            out.push_str(", ");
        }
        repr(element.as_ref(), &mut out);
    }
    out.push_str(if count == 1 { ",)" } else { ")" });
    out
}

/// The `repr` of a string: single quotes unless it has one and no double quote; what is not printable is escaped.
fn repr(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for char in text.chars() {
        match char {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            char if char == quote => out.extend(['\\', quote]),
            char if is_printable(char) => out.push(char),
            char => {
                let code = u32::from(char);
                // Writing to a string cannot fail.
                let _ = match code {
                    0..=0xff => write!(out, "\\x{code:02x}"),
                    0x100..=0xffff => write!(out, "\\u{code:04x}"),
                    _ => write!(out, "\\U{code:08x}"),
                };
            }
        }
    }
    out.push(quote);
}

/// Python's `str.isprintable`: no control, format, private, unassigned or separator character but the space.
///
/// The standard library's `escape_debug` escapes the same categories. It would also escape a combining character at the
/// start of a text, hence the `a`. Only characters that one of the two does not know yet can differ.
fn is_printable(char: char) -> bool {
    match char {
        ' '..='~' => true,
        '\0'..='\x7f' => false,
        _ => {
            let mut buffer = [b'a', 0, 0, 0, 0];
            let (_, rest) = buffer.split_at_mut(1);
            let len = 1 + char.encode_utf8(rest).len();
            let text = buffer.get(..len).and_then(|bytes| std::str::from_utf8(bytes).ok());
            text.is_some_and(|text| text.escape_debug().count() == 2)
        }
    }
}

fn write_value(value: &Value, out: &mut String) {
    match value {
        Value::Null => out.push_str("null"),
        Value::Bool(value) => show(out, value),
        Value::Number(number) => show(out, number),
        Value::String(text) => string(text, out),
        Value::Array(items) => sequence(out, ['[', ']'], items, write_value),
        Value::Object(members) => sequence(out, ['{', '}'], members, |(name, value), out| {
            member(name, out);
            write_value(value, out);
        }),
    }
}

fn sequence<T>(
    out: &mut String,
    [open, close]: [char; 2],
    items: impl IntoIterator<Item = T>,
    each: impl Fn(T, &mut String),
) {
    out.push(open);
    for (index, item) in items.into_iter().enumerate() {
        if index > 0 {
            out.push_str(", ");
        }
        each(item, out);
    }
    out.push(close);
}

fn member(name: &str, out: &mut String) {
    string(name, out);
    out.push_str(": ");
}

fn string(text: &str, out: &mut String) {
    out.push('"');
    for char in text.chars() {
        match char {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\x08' => out.push_str("\\b"),
            '\x0c' => out.push_str("\\f"),
            ' '..='~' => out.push(char),
            // Beyond the first plane: two escapes, a surrogate pair.
            char => char.encode_utf16(&mut [0; 2]).iter().for_each(|unit| {
                let _ = write!(out, "\\u{unit:04x}");
            }),
        }
    }
    out.push('"');
}

fn show(out: &mut String, value: impl std::fmt::Display) {
    // Writing to a string cannot fail.
    let _ = write!(out, "{value}");
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What Python 3.11 prints.
    #[test]
    fn reprs_are_those_of_python() {
        let cases: [(&[&str], &str); 12] = [
            (&[], "()"),
            (&["a"], "('a',)"),
            (&["a", "0"], "('a', '0')"),
            (&["it's"], r#"("it's",)"#),
            (&["q\""], r#"('q"',)"#),
            (&["b'\""], r#"('b\'"',)"#),
            (&["back\\slash"], r"('back\\slash',)"),
            (&["\t\n\r\0\x7f"], r"('\t\n\r\x00\x7f',)"),
            (&["\u{a0}\u{ad}ü"], "('\\xa0\\xadü',)"),
            (&["\u{200b}\u{2028}\u{3000}\u{e000}日"], r"('\u200b\u2028\u3000\ue000日',)"),
            (&["😀\u{e0001}\u{10ffff}"], r"('😀\U000e0001\U0010ffff',)"),
            (&["\u{301}", "e\u{301}"], "('\u{301}', 'e\u{301}')"),
        ];
        for (elements, expected) in cases {
            assert_eq!(repr_tuple(elements.iter()), expected);
        }
    }

    #[test]
    fn json_is_that_of_python() {
        let user = serde_json::json!({"b": [1, -2.5, true, null], "a": "é😀\u{7f}\u{8}/"});
        let doc = Doc::object([("z", Doc::Value(&user)), ("a", Doc::sizes(&[2, 3])), ("e", Doc::List(vec![]))]);
        let expected =
            r#"{"z": {"a": "\u00e9\ud83d\ude00\u007f\b/", "b": [1, -2.5, true, null]}, "a": [2, 3], "e": []}"#;
        assert_eq!(doc.dumps(), expected);
    }

    proptest::proptest! {
        #[test]
        fn what_is_written_is_read(text: String, float: f64, int: i64) {
            let value = serde_json::json!({text.clone(): [text, float, int]});
            let written = Doc::Value(&value).dumps();
            proptest::prop_assert!(written.is_ascii());
            proptest::prop_assert_eq!(serde_json::from_str::<Value>(&written).unwrap(), value);
        }
    }
}
