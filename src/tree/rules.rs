//! Patterns over key paths, and rules made of them.

use std::collections::BTreeMap;
use std::fmt;

use regex::Regex;

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::keypath::KeyPath;
use crate::layout::nearest;
use crate::limits::NEAREST_NAMES_MAX;

/// Which leaves are meant.
///
/// A **glob** matches the whole path, element by element: `*` any run inside one element, `?` one character, `**` as a whole
/// element zero or more elements (`**/kernel` matches `kernel`, `params/**` matches `params`); `\` escapes. A **regex** is
/// searched for in the path's string form; anchor it with `^` and `$` to match all of it.
#[derive(Clone, Debug)]
pub struct Pattern {
    text: String,
    matcher: Matcher,
    filter: Filter,
}

#[derive(Clone, Debug)]
enum Matcher {
    Glob(Vec<Element>),
    Regex(Regex),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Element {
    /// `**`
    Any,
    One(Vec<Token>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token {
    Char(char),
    /// `?`
    AnyChar,
    /// `*`
    AnyRun,
}

/// Restricts a pattern to arrays of a family of types.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Filter {
    /// No restriction.
    #[default]
    All,
    /// Floating-point arrays.
    Float,
    /// Integer arrays.
    Int,
}

impl Pattern {
    /// A glob.
    pub fn glob(text: &str) -> Self {
        let mut elements = Vec::new();
        if !text.is_empty() {
            let mut tokens = Vec::new();
            let mut chars = text.chars();
            let close = |tokens: &mut Vec<Token>| match tokens.as_slice() {
                [Token::AnyRun, Token::AnyRun] => {
                    tokens.clear();
                    Element::Any
                }
                _ => Element::One(std::mem::take(tokens)),
            };
            while let Some(char) = chars.next() {
                match char {
                    '/' => elements.push(close(&mut tokens)),
                    '*' => tokens.push(Token::AnyRun),
                    '?' => tokens.push(Token::AnyChar),
                    '\\' => tokens.push(Token::Char(chars.next().unwrap_or('\\'))),
                    other => tokens.push(Token::Char(other)),
                }
            }
            elements.push(close(&mut tokens));
        }
        Self { text: text.to_owned(), matcher: Matcher::Glob(elements), filter: Filter::All }
    }

    /// A regular expression over the path's string form.
    ///
    /// # Errors
    /// A text that is no regular expression.
    pub fn regex(text: &str) -> Result<Self> {
        Ok(Self { text: text.to_owned(), matcher: Matcher::Regex(regex(text)?), filter: Filter::All })
    }

    /// The same pattern, for arrays of a family of types only.
    #[must_use]
    pub fn only(mut self, filter: Filter) -> Self {
        self.filter = filter;
        self
    }

    /// Whether a path matches, whatever its type.
    pub fn matches(&self, path: &KeyPath) -> bool {
        match &self.matcher {
            Matcher::Regex(regex) => regex.is_match(&path.to_string()),
            Matcher::Glob(pattern) => {
                let elements: Vec<_> = path.elements().collect();
                // The root and a single empty name print alike, and no glob could tell them apart.
                let unnamed = pattern.is_empty() && elements.len() == 1 && elements[0].is_empty();
                unnamed || matches_elements(pattern, &elements)
            }
        }
    }

    /// Whether the type passes the pattern's filter.
    pub fn admits(&self, dtype: DType) -> bool {
        match self.filter {
            Filter::All => true,
            Filter::Float => dtype.is_float(),
            Filter::Int => dtype.is_int(),
        }
    }

    /// Whether a leaf passes the pattern's filter; one without a type (a string, `None`) is of no family.
    fn admits_leaf(&self, dtype: Option<DType>) -> bool {
        dtype.map_or(self.filter == Filter::All, |dtype| self.admits(dtype))
    }

    /// Whether it names one path literally: a glob without wildcards.
    pub fn is_literal(&self) -> bool {
        let plain = |element: &Element| match element {
            Element::Any => false,
            Element::One(tokens) => tokens.iter().all(|token| matches!(token, Token::Char(_))),
        };
        matches!(&self.matcher, Matcher::Glob(elements) if elements.iter().all(plain))
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)?;
        f.write_str(match self.filter {
            Filter::All => "",
            Filter::Float => "@float",
            Filter::Int => "@int",
        })
    }
}

impl From<&str> for Pattern {
    fn from(glob: &str) -> Self {
        Self::glob(glob)
    }
}

impl From<String> for Pattern {
    fn from(glob: String) -> Self {
        Self::glob(&glob)
    }
}

/// Compiles a regular expression.
pub(super) fn regex(text: &str) -> Result<Regex> {
    Regex::new(text).map_err(|error| Error::invalid(format!("`{text}` is no regular expression")).caused_by(error))
}

/// Rules in order, and which of them have matched anything.
#[derive(Debug)]
pub(super) struct Rules<V> {
    option: &'static str,
    rules: Vec<(Pattern, V, bool)>,
}

impl<V> Rules<V> {
    pub(super) fn new<P: Into<Pattern>>(option: &'static str, rules: impl IntoIterator<Item = (P, V)>) -> Self {
        Self { option, rules: rules.into_iter().map(|(pattern, value)| (pattern.into(), value, false)).collect() }
    }

    /// The first rule that matches this leaf; every rule that does is remembered as used.
    pub(super) fn first(&mut self, path: &KeyPath, dtype: Option<DType>) -> Option<(&Pattern, &V)> {
        let mut first = None;
        for (index, (pattern, _, used)) in self.rules.iter_mut().enumerate() {
            if pattern.matches(path) && pattern.admits_leaf(dtype) {
                *used = true;
                first = first.or(Some(index));
            }
        }
        first.map(|index| (&self.rules[index].0, &self.rules[index].1))
    }

    /// Whether every rule has matched something.
    pub(super) fn all_used(&self) -> bool {
        self.rules.iter().all(|(.., used)| *used)
    }

    /// Refuses rules that matched nothing, all in one error.
    pub(super) fn check<'a>(&self, paths: impl Iterator<Item = &'a KeyPath> + Clone) -> Result<()> {
        let unused: Vec<&Pattern> = self.rules.iter().filter(|(.., used)| !used).map(|(pattern, ..)| pattern).collect();
        if unused.is_empty() {
            return Ok(());
        }
        let names: Vec<String> = paths.map(KeyPath::to_string).collect();
        if let [only] = unused.as_slice() {
            return Err(no_such(self.option, &only.to_string(), names.into_iter()));
        }
        let line = |pattern: &&Pattern| match near(&pattern.text, &names).as_slice() {
            [] => format!("`{pattern}`"),
            near => format!("`{pattern}`: nearest {}", near.join(", ")),
        };
        Err(Error::invalid(format!("{} {} rules match no leaf", unused.len(), self.option))
            .lines(unused.iter().map(line))
            .hint("`touchdown ls` lists the paths"))
    }
}

/// The error for a leaf that is not there, with the nearest ones.
pub(crate) fn no_leaf(wanted: &str, names: impl Iterator<Item = String>) -> Error {
    let names: Vec<String> = names.collect();
    let error = Error::invalid(format!("there is no leaf `{wanted}`"));
    let near = nearest(wanted, names.iter().map(String::as_str));
    let error = if near.is_empty() { error } else { error.found(format_args!("nearest names: {}", near.join(", "))) };
    error.hint("`touchdown ls` lists the paths")
}

/// The error for a rule that matches nothing, with the nearest names.
pub(super) fn no_such(what: &str, wanted: &str, names: impl Iterator<Item = String>) -> Error {
    let names: Vec<String> = names.collect();
    let near = near(wanted, &names);
    let error = Error::invalid(format!("no leaf matches the {what} rule `{wanted}`"));
    let error = if near.is_empty() { error } else { error.found(format_args!("nearest names: {}", near.join(", "))) };
    error.hint(match wanted.rsplit_once('@') {
        Some((_, filter)) if filter != "float" && filter != "int" => "the filters are @float and @int",
        Some((name, _)) if near.contains(&name) => {
            "there is such a leaf, but of another kind of type: see `touchdown ls`"
        }
        _ => "`touchdown ls` lists the paths; `*` stays inside one element, `**` spans elements",
    })
}

/// The names nearest to a pattern: by the whole text, or for a glob by its last element without wildcards.
fn near<'n>(wanted: &str, names: &'n [String]) -> Vec<&'n str> {
    let wanted = wanted.strip_suffix("@float").or_else(|| wanted.strip_suffix("@int")).unwrap_or(wanted);
    if !wanted.contains(['*', '?']) {
        return nearest(wanted, names.iter().map(String::as_str));
    }
    let is_literal = |element: &&str| !element.is_empty() && !element.contains(['*', '?']);
    let Some(literal) = wanted.rsplit('/').find(is_literal) else {
        return names.iter().take(NEAREST_NAMES_MAX).map(String::as_str).collect();
    };
    // The first name that has each element; a misspelt element is the usual reason.
    let mut first: BTreeMap<&str, &str> = BTreeMap::new();
    for name in names {
        for element in name.split('/') {
            first.entry(element).or_insert(name);
        }
    }
    nearest(literal, first.keys().copied()).into_iter().filter_map(|element| first.get(element).copied()).collect()
}

fn matches_elements<S: AsRef<str>>(pattern: &[Element], elements: &[S]) -> bool {
    match (pattern.split_first(), elements.split_first()) {
        (None, None) => true,
        (None, Some(_)) => false,
        (Some((Element::Any, rest)), _) => {
            // Adjacent `**` mean the same as one; without this a hostile pattern would cost exponential time.
            if rest.first() == Some(&Element::Any) {
                return matches_elements(rest, elements);
            }
            (0..=elements.len()).any(|skip| matches_elements(rest, &elements[skip..]))
        }
        (Some((Element::One(_), _)), None) => false,
        (Some((Element::One(tokens), rest)), Some((element, others))) => {
            matches_text(tokens, element.as_ref()) && matches_elements(rest, others)
        }
    }
}

/// Wildcards inside one element, by remembering the last `*`: time is at most tokens times characters.
fn matches_text(tokens: &[Token], text: &str) -> bool {
    let chars: Vec<char> = text.chars().collect();
    let (mut token, mut at) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while at < chars.len() {
        match tokens.get(token) {
            Some(Token::AnyRun) => {
                star = Some((token, at));
                token += 1;
            }
            Some(Token::AnyChar) => (token, at) = (token + 1, at + 1),
            Some(Token::Char(char)) if *char == chars[at] => (token, at) = (token + 1, at + 1),
            _ => match star {
                Some((star_token, star_at)) => {
                    star = Some((star_token, star_at + 1));
                    (token, at) = (star_token + 1, star_at + 1);
                }
                None => return false,
            },
        }
    }
    tokens[token..].iter().all(|token| *token == Token::AnyRun)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keypath::Key;

    fn path(elements: &[&str]) -> KeyPath {
        KeyPath::names(elements.iter().copied())
    }

    #[test]
    fn globs_match_as_the_contract_says() {
        let yes = |glob: &str, elements: &[&str]| {
            assert!(Pattern::glob(glob).matches(&path(elements)), "{glob} {elements:?}")
        };
        let no = |glob: &str, elements: &[&str]| {
            assert!(!Pattern::glob(glob).matches(&path(elements)), "{glob} {elements:?}")
        };
        yes("**/kernel", &["kernel"]);
        yes("**/kernel", &["a", "b", "kernel"]);
        yes("params/**", &["params"]);
        yes("params/**/w", &["params", "w"]);
        yes("**", &[]);
        yes("", &[]);
        yes("", &[""]);
        yes("a/*/c", &["a", "bcd", "c"]);
        yes("l?yer_*", &["layer_12"]);
        yes("**.weight", &["attn.weight"]);
        yes(r"a\*b", &["a*b"]);
        yes(r"a\/b", &["a/b"]);
        no("kernel", &["a", "kernel"]);
        no("a/*", &["a", "b", "c"]);
        no("", &["a"]);
        no("[a-c]", &["b"]);
        no(r"a\*b", &["axb"]);
        assert!(Pattern::glob("opt/0").matches(&KeyPath(vec![Key::Name("opt".into()), Key::Index(0)])));
        assert!(Pattern::regex("layer_[0-3]/").unwrap().matches(&path(&["layer_2", "w"])));
        assert!(Pattern::regex("(").is_err());
        assert!(Pattern::glob("a/b").is_literal() && !Pattern::glob("a/*").is_literal());
    }

    #[test]
    fn hostile_patterns_take_no_exponential_time() {
        let stars = "**/".repeat(200) + "x";
        assert!(!Pattern::glob(&stars).matches(&path(&["a"; 100])));
        assert!(!Pattern::glob(&("*a".repeat(200) + "b")).matches(&path(&[&"a".repeat(1000)])));
    }

    #[test]
    fn unused_rules_are_named_with_neighbours() {
        let mut rules = Rules::new("cast", [("params/kernle", ()), ("**", ())]);
        let leaf = path(&["params", "kernel"]);
        assert!(rules.first(&leaf, None).is_some());
        let error = rules.check([leaf].iter()).unwrap_err();
        assert!(error.to_string().contains("params/kernel"), "{error}");
    }
}
