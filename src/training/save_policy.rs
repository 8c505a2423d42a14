//! When a step is saved: policies as pure functions over the step, the steps before it, and the moment.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use super::history::StepInfo;
use crate::error::{Error, Result};

/// What a [`SavePolicy`] decides upon besides the history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SaveContext {
    /// The step in question.
    pub step: u64,
    /// The time now.
    pub now: SystemTime,
    /// Whether a save is going on in the background.
    pub saving: bool,
}

/// A closure that decides whether a step is saved.
pub type SaveFunction = Arc<dyn Fn(&[StepInfo], &SaveContext) -> bool + Send + Sync>;

/// Which steps are saved.
#[non_exhaustive]
#[derive(Clone, Default)]
pub enum SavePolicy {
    /// Every step that is asked for.
    #[default]
    Always,
    /// Multiples of this.
    Interval(u64),
    /// These steps.
    Steps(BTreeSet<u64>),
    /// As often as possible: whenever no save is going on.
    Continuous {
        /// Shortest time since the last step.
        minimum_interval: Option<Duration>,
    },
    /// The first step of an empty series.
    Initial,
    /// Any step once a flag is set: by the caller, or by [`flag_on_sigterm`](super) under the feature `cli`. Such a save waits
    /// for one that is going on, whatever [`WhenBusy`](super::WhenBusy) says: it may be the last.
    OnSignal(Arc<AtomicBool>),
    /// What any of these saves.
    Any(Vec<Self>),
    /// What a closure says.
    Custom(SaveFunction),
}

impl SavePolicy {
    /// Multiples of `interval`.
    pub fn interval(interval: u64) -> Self {
        Self::Interval(interval)
    }

    /// These steps.
    pub fn steps(steps: impl IntoIterator<Item = u64>) -> Self {
        Self::Steps(steps.into_iter().collect())
    }

    /// What any of these saves.
    pub fn any(policies: impl IntoIterator<Item = Self>) -> Self {
        Self::Any(policies.into_iter().collect())
    }

    /// What a closure says of the steps before, in order, and the moment.
    pub fn custom(saves: impl Fn(&[StepInfo], &SaveContext) -> bool + Send + Sync + 'static) -> Self {
        Self::Custom(Arc::new(saves))
    }

    /// Whether the step is saved after these. Pure but for the flag of [`OnSignal`](Self::OnSignal).
    pub fn saves(&self, before: &[StepInfo], context: &SaveContext) -> bool {
        match self {
            Self::Always => true,
            Self::Interval(interval) => *interval > 0 && context.step.is_multiple_of(*interval),
            Self::Steps(steps) => steps.contains(&context.step),
            Self::Continuous { minimum_interval } => {
                let since = |last: &StepInfo| context.now.duration_since(last.time).unwrap_or_default();
                let due = match (before.last(), minimum_interval) {
                    (Some(last), Some(interval)) => since(last) >= *interval,
                    _ => true,
                };
                !context.saving && due
            }
            Self::Initial => before.is_empty(),
            Self::OnSignal(_) => self.signalled(),
            Self::Any(policies) => policies.iter().any(|policy| policy.saves(before, context)),
            Self::Custom(saves) => saves(before, context),
        }
    }

    /// Whether a signal has come that this policy waits for.
    pub(super) fn signalled(&self) -> bool {
        match self {
            Self::OnSignal(flag) => flag.load(Ordering::Acquire),
            Self::Any(policies) => policies.iter().any(Self::signalled),
            _ => false,
        }
    }

    /// Refuses what cannot be meant.
    pub(super) fn check(&self) -> Result<()> {
        match self {
            Self::Interval(0) => Err(Error::invalid("a save policy has an interval of 0 steps")),
            Self::Any(policies) => policies.iter().try_for_each(Self::check),
            _ => Ok(()),
        }
    }
}

impl fmt::Debug for SavePolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Always => f.write_str("Always"),
            Self::Interval(interval) => write!(f, "Interval({interval})"),
            Self::Steps(steps) => write!(f, "Steps({steps:?})"),
            Self::Continuous { minimum_interval } => write!(f, "Continuous({minimum_interval:?})"),
            Self::Initial => f.write_str("Initial"),
            Self::OnSignal(_) => f.write_str("OnSignal(..)"),
            Self::Any(policies) => f.debug_tuple("Any").field(policies).finish(),
            Self::Custom(_) => f.write_str("Custom(..)"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn when_each_policy_saves() {
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let before = [StepInfo::new(0, at(0)), StepInfo::new(8, at(100))];
        let context = |step, now, saving| SaveContext { step, now: at(now), saving };
        let flag = Arc::new(AtomicBool::new(false));
        let continuous =
            |seconds: Option<u64>| SavePolicy::Continuous { minimum_interval: seconds.map(Duration::from_secs) };
        let signal = SavePolicy::any([SavePolicy::interval(100), SavePolicy::OnSignal(Arc::clone(&flag))]);
        for (policy, context, want) in [
            (SavePolicy::Always, context(9, 101, true), true),
            (SavePolicy::interval(5), context(10, 101, true), true),
            (SavePolicy::interval(5), context(9, 101, false), false),
            (SavePolicy::steps([9]), context(9, 101, false), true),
            (continuous(None), context(9, 101, false), true),
            (continuous(None), context(9, 101, true), false),
            (continuous(Some(10)), context(9, 109, false), false),
            (continuous(Some(10)), context(9, 110, false), true),
            (SavePolicy::Initial, context(9, 101, false), false),
            (SavePolicy::custom(|before, _| before.len() == 2), context(9, 101, false), true),
            (signal.clone(), context(9, 101, false), false),
        ] {
            assert_eq!(policy.saves(&before, &context), want, "{policy:?} {context:?}");
        }
        assert!(SavePolicy::Initial.saves(&[], &context(9, 101, false)));
        flag.store(true, Ordering::Release);
        assert!(signal.saves(&before, &context(9, 101, true)) && signal.signalled());
        assert!(SavePolicy::any([SavePolicy::interval(0)]).check().is_err());
    }
}
