//! Names of step directories: `[<prefix>_]<n>`, the number with leading zeros if so wished.

use crate::error::{Error, Result};
use crate::layout::orbax::step;
use crate::limits::{STEP_DIGITS_MAX, STEP_PREFIX_BYTES_MAX};

/// How the directories of a series are named. Of a root only the directories with this prefix belong to the series. Leading zeros
/// do not matter when names are read; a writer is refused a root whose steps have others than it would write. Numbers below 0,
/// which Orbax writes and then does not find itself, are no steps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StepNames {
    /// What stands before the number and a `_`; `None` for the bare number.
    pub prefix: Option<String>,
    /// The number has at least this many digits, leading zeros included.
    pub digits: usize,
}

impl StepNames {
    /// `<prefix>_<n>`.
    pub fn prefixed(prefix: impl Into<String>) -> Self {
        Self { prefix: Some(prefix.into()), digits: 0 }
    }

    /// The same with leading zeros up to so many digits (Orbax's `step_format_fixed_length`).
    #[must_use]
    pub fn digits(mut self, digits: usize) -> Self {
        self.digits = digits;
        self
    }

    /// The name of a step's directory.
    pub fn name(&self, step: u64) -> String {
        let digits = self.digits;
        match &self.prefix {
            Some(prefix) => format!("{prefix}_{step:0digits$}"),
            None => format!("{step:0digits$}"),
        }
    }

    /// The step that a name stands for, if it is one of this series.
    pub fn step(&self, name: &str) -> Option<u64> {
        (prefix(name) == self.prefix.as_deref()).then(|| step::parse(name)).flatten()
    }

    /// The same prefix with so many digits that these steps, with their names, are called as they are; the fewest, if there are
    /// some.
    pub(super) fn fitting<'a>(&self, steps: impl Iterator<Item = (u64, &'a str)> + Clone) -> Option<Self> {
        let mut all = (0..=STEP_DIGITS_MAX).map(|digits| self.clone().digits(digits));
        all.find(|names| steps.clone().all(|(step, name)| names.name(step) == name))
    }

    /// Refuses prefixes that cannot be part of a directory's name, or that readers pass over.
    pub(super) fn check(&self) -> Result<()> {
        let name = self.name(0);
        let prefix = self.prefix.as_deref().unwrap_or_default();
        let is_plain = !prefix.contains(['/', '\0']) && !step::is_reserved(&name) && !step::is_temporary(&name);
        if !is_plain || prefix.len() > STEP_PREFIX_BYTES_MAX {
            return Err(
                Error::invalid("a directory of steps cannot have this prefix").found(format_args!("{prefix:?}"))
            );
        }
        if self.digits > STEP_DIGITS_MAX {
            return Err(Error::invalid("step numbers have fewer digits")
                .expected(format_args!("at most {STEP_DIGITS_MAX}"))
                .found(self.digits));
        }
        Ok(())
    }
}

/// What stands before the `_` and the number in a step's name.
pub(super) fn prefix(name: &str) -> Option<&str> {
    name.rsplit_once('_').map(|(prefix, _)| prefix)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers() {
        let plain = StepNames::default();
        assert_eq!((plain.name(7), plain.step("7"), plain.step("007")), ("7".to_owned(), Some(7), Some(7)));
        assert_eq!((plain.step("a_7"), plain.step("x"), plain.step("7.orbax-checkpoint-tmp")), (None, None, None));
        let padded = StepNames::prefixed("ckpt").digits(6);
        assert_eq!((padded.name(3), padded.name(12_345_678)), ("ckpt_000003".to_owned(), "ckpt_12345678".to_owned()));
        assert_eq!((padded.step("ckpt_3"), padded.step("a_ckpt_3"), padded.step("3")), (Some(3), None, None));
        let fitting = |steps: &[(u64, &str)]| plain.fitting(steps.iter().copied()).map(|names| names.digits);
        assert_eq!([fitting(&[(1, "1"), (12, "12")]), fitting(&[(1, "01"), (123, "123")])], [Some(0), Some(2)]);
        assert_eq!([fitting(&[(1, "01"), (2, "2")]), fitting(&[(1, "0001"), (2, "002")])], [None, None]);
        assert_eq!([plain.step("-5"), plain.step("x_-5")], [None, None]);
        for bad in ["a/b", ".a", "x.orbax-checkpoint-tmp", &"x".repeat(300)] {
            assert!(StepNames::prefixed(bad).check().is_err(), "{bad}");
        }
        assert!(padded.check().is_ok() && plain.digits(21).check().is_err());
    }
}
