//! Key paths: where a leaf lies in a tree.

use std::fmt;

/// One step of a key path.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Key {
    /// A position in a list or tuple.
    Index(u64),
    /// A dict key or an attribute name.
    Name(String),
}

/// Where a leaf lies in a tree, from the root; the bare leaf's path is empty.
///
/// The string form joins the elements by `/`, with positions in decimal; inside an element `\`, `/`, `*` and `?` are
/// escaped by `\`. It prints as `params/layer_0/kernel`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KeyPath(pub Vec<Key>);

impl KeyPath {
    /// The path of a bare leaf.
    pub const ROOT: Self = Self(Vec::new());

    /// A path of dict keys.
    pub fn names<'a>(names: impl IntoIterator<Item = &'a str>) -> Self {
        Self(names.into_iter().map(|name| Key::Name(name.to_owned())).collect())
    }

    /// Parses the string form. Every element becomes a name: the string form does not tell `0` from `"0"`.
    pub fn from_escaped(text: &str) -> Self {
        if text.is_empty() {
            return Self::ROOT;
        }
        let mut elements = vec![String::new()];
        let mut chars = text.chars();
        while let Some(char) = chars.next() {
            let last = elements.len() - 1;
            match char {
                '/' => elements.push(String::new()),
                '\\' => elements[last].push(chars.next().unwrap_or('\\')),
                other => elements[last].push(other),
            }
        }
        Self(elements.into_iter().map(Key::Name).collect())
    }

    /// The elements as plain, unescaped text.
    pub fn elements(&self) -> impl ExactSizeIterator<Item = std::borrow::Cow<'_, str>> {
        self.0.iter().map(|key| match key {
            Key::Index(index) => index.to_string().into(),
            Key::Name(name) => name.as_str().into(),
        })
    }

    /// This path with one more element.
    #[must_use]
    pub fn child(&self, key: Key) -> Self {
        let mut path = self.clone();
        path.0.push(key);
        path
    }
}

impl From<&str> for KeyPath {
    /// Parses the string form; see [`from_escaped`](Self::from_escaped).
    fn from(text: &str) -> Self {
        Self::from_escaped(text)
    }
}

impl From<Vec<Key>> for KeyPath {
    fn from(keys: Vec<Key>) -> Self {
        Self(keys)
    }
}

impl fmt::Display for KeyPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, element) in self.elements().enumerate() {
            if index > 0 {
                f.write_str("/")?;
            }
            for char in element.chars() {
                if matches!(char, '\\' | '/' | '*' | '?') {
                    f.write_str("\\")?;
                }
                write!(f, "{char}")?;
            }
        }
        Ok(())
    }
}

impl serde::Serialize for KeyPath {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.iter())
    }
}

impl serde::Serialize for Key {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Index(index) => serializer.serialize_u64(*index),
            Self::Name(name) => serializer.serialize_str(name),
        }
    }
}

impl<'de> serde::Deserialize<'de> for KeyPath {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(serde::Deserialize)]
        #[serde(untagged)]
        enum Element {
            Index(u64),
            Name(String),
        }
        let elements = Vec::<Element>::deserialize(deserializer)?;
        let key = |element| match element {
            Element::Index(index) => Key::Index(index),
            Element::Name(name) => Key::Name(name),
        };
        Ok(Self(elements.into_iter().map(key).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_names_are_escaped_and_come_back() {
        let path = KeyPath(vec![Key::Name("a/b*".into()), Key::Index(3), Key::Name("c\\?".into())]);
        assert_eq!(path.to_string(), r"a\/b\*/3/c\\\?");
        assert_eq!(KeyPath::from_escaped(&path.to_string()).to_string(), path.to_string());
        assert_eq!(KeyPath::ROOT.to_string(), "");
    }
}
