//! The one error type that users see.
//!
//! A module has its own precise enum where its caller can act on the difference; it is converted once, at the
//! module's edge, into [`Error`], which says what failed, where, what was expected, what was found, and what to do.

use std::borrow::Cow;
use std::fmt;

/// What a library call returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Something that failed: what, where, expected, found, and a hint.
///
/// `Display` is one line, `what, where: expected .., found ..`; the causes are the [`source`](std::error::Error::source)
/// chain and the advice is [`hint`](Self::hint).
pub struct Error(Box<Parts>);

struct Parts {
    kind: ErrorKind,
    what: String,
    at: Vec<(&'static str, String)>,
    expected: Option<String>,
    found: Option<String>,
    lines: Vec<String>,
    hint: Option<String>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// What the caller can do about an [`Error`].
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The arguments do not fit: change them.
    Invalid,
    /// The destination exists already.
    Exists,
    /// The path, or something that the checkpoint refers to, is not there.
    NotFound,
    /// The bytes contradict the format, themselves or a checksum.
    Corrupt,
    /// The file is well formed, but this library (or this build of it) cannot read it.
    Unsupported,
    /// The operating system refused: permission, I/O error, no space, too many files.
    Io,
    /// Host or device memory ran out.
    OutOfMemory,
    /// The memory budget is too small for one indivisible piece of work.
    Budget,
    /// No device, no driver, or the driver failed.
    Device,
    /// Somebody else is at work there: wait for them, or end them.
    Busy,
    /// The caller cancelled.
    Cancelled,
    /// A broken invariant of this library. Please report it.
    Bug,
}

impl Error {
    /// A new error of this kind: `what` is one lower-case clause without a full stop.
    pub fn new(kind: ErrorKind, what: impl Into<String>) -> Self {
        Self(Box::new(Parts {
            kind,
            what: what.into(),
            at: Vec::new(),
            expected: None,
            found: None,
            lines: Vec::new(),
            hint: None,
            source: None,
        }))
    }

    /// Arguments that do not fit.
    pub fn invalid(what: impl Into<String>) -> Self {
        Self::new(ErrorKind::Invalid, what)
    }

    /// Bytes that contradict their format.
    pub fn corrupt(what: impl Into<String>) -> Self {
        Self::new(ErrorKind::Corrupt, what)
    }

    /// Something well formed that cannot be read here.
    pub fn unsupported(what: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unsupported, what)
    }

    /// Something that is not there.
    pub fn not_found(what: impl Into<String>) -> Self {
        Self::new(ErrorKind::NotFound, what)
    }

    /// A broken invariant of this library.
    pub fn bug(what: impl Into<String>) -> Self {
        Self::new(ErrorKind::Bug, what)
            .hint("this is a bug in touchdown; please report it with the checkpoint's layout")
    }

    /// Adds where: the innermost place first (`offset`), then what encloses it (`file`, `leaf`, `checkpoint`).
    #[must_use]
    pub fn at(mut self, name: &'static str, place: impl fmt::Display) -> Self {
        self.0.at.push((name, place.to_string()));
        self
    }

    /// Says what was expected.
    #[must_use]
    pub fn expected(mut self, expected: impl fmt::Display) -> Self {
        self.0.expected = Some(expected.to_string());
        self
    }

    /// Says what was found instead.
    #[must_use]
    pub fn found(mut self, found: impl fmt::Display) -> Self {
        self.0.found = Some(found.to_string());
        self
    }

    /// Adds one line of a list (one mismatching leaf of many); the caller keeps the order stable.
    #[must_use]
    pub fn lines(mut self, lines: impl IntoIterator<Item = String>) -> Self {
        self.0.lines.extend(lines);
        self
    }

    /// Says what to do next.
    #[must_use]
    pub fn hint(mut self, hint: impl fmt::Display) -> Self {
        self.0.hint = Some(hint.to_string());
        self
    }

    /// Keeps the cause.
    #[must_use]
    pub fn caused_by(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// Several failures as one: none is `None`, one is itself, of more each is a line (its own lines follow it), and the kind
    /// and the hint are the first one's.
    pub fn merged(errors: impl IntoIterator<Item = Self>) -> Option<Self> {
        let mut errors: Vec<Self> = errors.into_iter().collect();
        if errors.len() < 2 {
            return errors.pop();
        }
        let what = if errors[0].kind() == ErrorKind::Invalid { "do not fit" } else { "failed" };
        let mut merged = Self::new(errors[0].kind(), format!("{} things {what}", errors.len()));
        merged.0.hint = errors.iter().find_map(|error| error.0.hint.clone());
        for mut error in errors {
            let lines = std::mem::take(&mut error.0.lines);
            merged.0.lines.push(error.to_string());
            merged.0.lines.extend(lines.into_iter().map(|line| format!("  {line}")));
        }
        Some(merged)
    }

    /// What the caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// Whether it concerns what was looked at alone. Not so what the whole process has too little of: memory, open files.
    pub(crate) fn is_of_one_path(&self) -> bool {
        match self.0.kind {
            ErrorKind::NotFound | ErrorKind::Corrupt | ErrorKind::Unsupported => true,
            ErrorKind::Io => {
                self.0.source.as_ref().and_then(|source| source.downcast_ref::<std::io::Error>()).is_some_and(
                    |source| {
                        let errno = rustix::io::Errno::from_io_error(source);
                        errno.is_some_and(|errno| !matches!(errno, rustix::io::Errno::MFILE | rustix::io::Errno::NFILE))
                    },
                )
            }
            _ => false,
        }
    }

    /// What failed, without the place.
    pub fn what(&self) -> &str {
        &self.0.what
    }

    /// Where it failed, innermost first: (`"file"`, `"d/3f.."`), (`"leaf"`, `"params/w"`).
    pub fn places(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.0.at.iter().map(|(name, place)| (*name, place.as_str()))
    }

    /// The lines of a list error, in stable order; empty for a single failure.
    pub fn list(&self) -> &[String] {
        &self.0.lines
    }

    /// What to do next, if there is something better than reading the message.
    pub fn advice(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }

    /// The same failure, reported to a second caller: the text is kept, the typed cause becomes text.
    #[must_use]
    pub fn duplicate(&self) -> Self {
        let parts = &self.0;
        Self(Box::new(Parts {
            kind: parts.kind,
            what: parts.what.clone(),
            at: parts.at.clone(),
            expected: parts.expected.clone(),
            found: parts.found.clone(),
            lines: parts.lines.clone(),
            hint: parts.hint.clone(),
            source: parts.source.as_ref().map(|source| source.to_string().into()),
        }))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = &self.0;
        // Names and texts of files are in all of it: only the lines of a list begin new lines.
        f.write_str(&printable(&parts.what))?;
        for (index, (name, place)) in parts.at.iter().enumerate() {
            f.write_str(if index == 0 { " in " } else { " of " })?;
            write!(f, "{name} {}", printable(place))?;
        }
        let (expected, found) = (parts.expected.as_deref().map(printable), parts.found.as_deref().map(printable));
        match (expected, found) {
            (Some(expected), Some(found)) => write!(f, ": expected {expected}, found {found}")?,
            (Some(expected), None) => write!(f, ": expected {expected}")?,
            (None, Some(found)) => write!(f, ": found {found}")?,
            (None, None) => {}
        }
        for line in parts.lines.iter().take(crate::limits::ERROR_LINES_MAX) {
            write!(f, "\n  {}", printable(line))?;
        }
        match parts.lines.len().checked_sub(crate::limits::ERROR_LINES_MAX) {
            Some(more) if more > 0 => write!(f, "\n  and {more} more"),
            _ => Ok(()),
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self}", self.0.kind)?;
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            write!(f, "\ncaused by: {error}")?;
            cause = error.source();
        }
        self.0.hint.iter().try_for_each(|hint| write!(f, "\nhint: {hint}"))
    }
}

/// A number of things: `1 leaf`, `3 leaves`.
pub(crate) fn counted(count: usize, one: &str, more: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { more })
}

/// Text from a checkpoint as a terminal may show it: control characters are escaped, so that a name can neither forge lines nor
/// drive the terminal.
pub(crate) fn printable(text: &str) -> Cow<'_, str> {
    if !text.contains(char::is_control) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len());
    for char in text.chars() {
        if char.is_control() { out.extend(char.escape_default()) } else { out.push(char) }
    }
    Cow::Owned(out)
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_deref().map(|source| source as _)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_lines_of_a_list_begin_new_lines() {
        let bad = "x\nerror: \x1b[31m";
        let error =
            Error::corrupt(bad).at("leaf", bad).expected(bad).found(bad).lines([bad.to_owned(), "two".to_owned()]);
        let lines: Vec<String> = error.to_string().lines().map(str::to_owned).collect();
        assert_eq!(lines.len(), 3, "{lines:?}");
        assert!(lines.iter().all(|line| !line.contains(char::is_control)), "{lines:?}");
        assert_eq!(lines[1], r"  x\nerror: \u{1b}[31m");
    }
}
