//! Which steps stay: policies as pure functions over a history, as Orbax defines them.
//!
//! A history is in the order of steps; Orbax's manager keeps the order in which they were saved, so that a step saved after
//! a later one counts as the latest there. Here the order is that of the numbers, always.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::history::{Metric, StepInfo, ranking};
use crate::error::{Error, Result};

/// A closure that says of each step whether it stays. A step that it says nothing of stays.
pub type PreserveFunction = Arc<dyn Fn(&[StepInfo], SystemTime) -> Vec<bool> + Send + Sync>;

/// Which steps stay when a new one has been committed.
///
/// Only whole steps count and only they are removed. Whatever the policy says, the only whole step stays, and so does one that
/// is being read through the [`Checkpointer`](super::Checkpointer).
#[non_exhaustive]
#[derive(Clone, Default)]
pub enum PreservationPolicy {
    /// All of them.
    #[default]
    All,
    /// The latest ones, this many.
    Latest(usize),
    /// Steps at an interval.
    EverySteps {
        /// The interval; not 0.
        interval: u64,
        /// Multiples of it; else the first step and each that is at least so far from the last one that stays.
        exact: bool,
        /// Of these the latest, at most this many; not 0.
        max: Option<usize>,
    },
    /// For each multiple of an interval the step that is closest to it (of two the later), and the latest step.
    ClosestToEvery {
        /// The interval; not 0.
        interval: u64,
        /// Of these the latest, at most this many; not 0.
        max: Option<usize>,
    },
    /// The first step, and each that was committed at least this long after the last one that stays.
    EveryDuration(Duration),
    /// These steps.
    Steps(BTreeSet<u64>),
    /// The best ones by a metric; of equals the later. As long as there are no more steps than that, all of them.
    Best {
        /// How many.
        count: usize,
        /// By which metric.
        metric: Metric,
        /// Whether steps without the metric stay, too (unless `count` is 0).
        keep_without: bool,
    },
    /// The first step that is at most this old, and those after it.
    LatestDuration(Duration),
    /// What any of these keeps.
    Any(Vec<Self>),
    /// What a closure says.
    Custom(PreserveFunction),
}

impl PreservationPolicy {
    /// The latest `count` steps.
    pub fn latest(count: usize) -> Self {
        Self::Latest(count)
    }

    /// The steps that are multiples of `interval`.
    pub fn every_steps(interval: u64) -> Self {
        Self::EverySteps { interval, exact: true, max: None }
    }

    /// For each multiple of `interval` the closest step, and the latest one.
    pub fn closest_to_every(interval: u64) -> Self {
        Self::ClosestToEvery { interval, max: None }
    }

    /// These steps.
    pub fn steps(steps: impl IntoIterator<Item = u64>) -> Self {
        Self::Steps(steps.into_iter().collect())
    }

    /// The best `count` steps by a metric (`"accuracy"`, or `"-loss"` for the smallest), and those without it.
    pub fn best(count: usize, metric: impl Into<Metric>) -> Self {
        Self::Best { count, metric: metric.into(), keep_without: true }
    }

    /// What any of these keeps.
    pub fn any(policies: impl IntoIterator<Item = Self>) -> Self {
        Self::Any(policies.into_iter().collect())
    }

    /// What a closure says: of each step of a history, and the time now, whether it stays.
    pub fn custom(keeps: impl Fn(&[StepInfo], SystemTime) -> Vec<bool> + Send + Sync + 'static) -> Self {
        Self::Custom(Arc::new(keeps))
    }

    /// Which of these steps stay. Pure: nothing is done.
    pub fn keeps(&self, steps: &[StepInfo], now: SystemTime) -> Vec<bool> {
        let of = |keeps: &dyn Fn(&StepInfo) -> bool| steps.iter().map(keeps).collect();
        match self {
            Self::All => vec![true; steps.len()],
            Self::Latest(count) => last(steps.len(), *count),
            Self::EverySteps { interval: 0, .. } | Self::ClosestToEvery { interval: 0, .. } => vec![true; steps.len()],
            Self::EverySteps { interval, exact, max } => {
                let kept = match exact {
                    true => of(&|step| step.step.is_multiple_of(*interval)),
                    false => spaced(steps, |last, step| step.step.saturating_sub(last.step) >= *interval),
                };
                latest_of(kept, *max)
            }
            Self::ClosestToEvery { interval, max } => latest_of(closest(steps, *interval), *max),
            Self::EveryDuration(interval) => {
                // Where the clock went back, no time at all has passed.
                spaced(steps, |last, step| step.time.duration_since(last.time).is_ok_and(|passed| passed >= *interval))
            }
            Self::Steps(wanted) => of(&|step| wanted.contains(&step.step)),
            Self::Best { count, metric, keep_without } => best(steps, *count, metric, *keep_without),
            Self::LatestDuration(duration) => {
                let first = steps.iter().position(|step| older(step.time, now) <= *duration);
                last(steps.len(), first.map_or(0, |first| steps.len() - first))
            }
            Self::Any(policies) => {
                let mut kept = vec![false; steps.len()];
                for policy in policies {
                    kept.iter_mut().zip(policy.keeps(steps, now)).for_each(|(kept, keeps)| *kept |= keeps);
                }
                kept
            }
            Self::Custom(keeps) => {
                let said = keeps(steps, now);
                (0..steps.len()).map(|index| said.get(index).copied().unwrap_or(true)).collect()
            }
        }
    }

    /// Whether nothing is ever removed.
    pub(super) fn keeps_all(&self) -> bool {
        match self {
            Self::All => true,
            Self::Any(policies) => policies.iter().any(Self::keeps_all),
            _ => false,
        }
    }

    /// Refuses what cannot be meant.
    pub(super) fn check(&self) -> Result<()> {
        match self {
            Self::EverySteps { interval: 0, .. } | Self::ClosestToEvery { interval: 0, .. } => {
                Err(Error::invalid("a preservation policy has an interval of 0 steps"))
            }
            Self::EverySteps { max: Some(0), .. } | Self::ClosestToEvery { max: Some(0), .. } => {
                Err(Error::invalid("a preservation policy keeps at most 0 steps, which Orbax takes for no limit")
                    .hint("leave `max` out for no limit, or the policy for no steps"))
            }
            Self::Any(policies) if policies.is_empty() => {
                Err(Error::invalid("a preservation policy of no policies would remove every step"))
            }
            Self::Any(policies) => policies.iter().try_for_each(Self::check),
            _ => Ok(()),
        }
    }
}

/// Which steps may be removed: those that are not kept, but never all of them, and none that is being read.
pub(super) fn removable(kept: &[bool], is_read: impl Fn(usize) -> bool) -> Vec<usize> {
    let only = if kept.contains(&true) { None } else { kept.len().checked_sub(1) };
    let gone = |&index: &usize| !kept[index] && Some(index) != only && !is_read(index);
    (0..kept.len()).filter(gone).collect()
}

impl fmt::Debug for PreservationPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("All"),
            Self::Latest(count) => write!(f, "Latest({count})"),
            Self::EverySteps { interval, exact, max } => {
                write!(f, "EverySteps({interval}, exact: {exact}, max: {max:?})")
            }
            Self::ClosestToEvery { interval, max } => write!(f, "ClosestToEvery({interval}, max: {max:?})"),
            Self::EveryDuration(interval) => write!(f, "EveryDuration({interval:?})"),
            Self::Steps(steps) => write!(f, "Steps({steps:?})"),
            Self::Best { count, metric, keep_without } => {
                write!(f, "Best({count}, {metric:?}, keep_without: {keep_without})")
            }
            Self::LatestDuration(duration) => write!(f, "LatestDuration({duration:?})"),
            Self::Any(policies) => f.debug_tuple("Any").field(policies).finish(),
            Self::Custom(_) => f.write_str("Custom(..)"),
        }
    }
}

/// The last `count` of `len`.
fn last(len: usize, count: usize) -> Vec<bool> {
    let first = len.saturating_sub(count);
    (0..len).map(|index| index >= first).collect()
}

/// Of what is kept the last `max`; as Orbax has it, 0 is no limit.
fn latest_of(mut kept: Vec<bool>, max: Option<usize>) -> Vec<bool> {
    let Some(max) = max.filter(|max| *max > 0) else { return kept };
    kept.iter_mut().rev().filter(|kept| **kept).skip(max).for_each(|kept| *kept = false);
    kept
}

/// The first step, and each that is far enough from the last one kept.
fn spaced(steps: &[StepInfo], far: impl Fn(&StepInfo, &StepInfo) -> bool) -> Vec<bool> {
    let mut last: Option<&StepInfo> = None;
    let keep = |step| {
        let keep = last.is_none_or(|last| far(last, step));
        if keep {
            last = Some(step);
        }
        keep
    };
    steps.iter().map(keep).collect()
}

/// For each multiple of the interval the closest step, of two the later; and the last step.
fn closest(steps: &[StepInfo], interval: u64) -> Vec<bool> {
    let mut best: BTreeMap<u64, (u64, usize)> = BTreeMap::new();
    for (index, step) in steps.iter().enumerate() {
        let (below, rest) = (step.step / interval, step.step % interval);
        // Half-way steps go to the even multiple, as Python rounds.
        let up = match rest.cmp(&(interval - rest)) {
            std::cmp::Ordering::Less => false,
            std::cmp::Ordering::Equal => below % 2 == 1,
            std::cmp::Ordering::Greater => true,
        };
        let (multiple, distance) = if up { (below + 1, interval - rest) } else { (below, rest) };
        let entry = best.entry(multiple).or_insert((distance, index));
        if distance <= entry.0 {
            *entry = (distance, index);
        }
    }
    let mut kept = vec![false; steps.len()];
    best.values().for_each(|(_, index)| kept[*index] = true);
    if let Some(last) = kept.last_mut() {
        *last = true;
    }
    kept
}

fn best(steps: &[StepInfo], count: usize, metric: &Metric, keep_without: bool) -> Vec<bool> {
    if count >= steps.len() {
        return vec![true; steps.len()];
    }
    let scores: Vec<Option<f64>> = steps.iter().map(|step| metric.score(step)).collect();
    let mut kept: Vec<bool> = scores.iter().map(|score| score.is_none() && keep_without && count > 0).collect();
    ranking(scores).into_iter().take(count).for_each(|index| kept[index] = true);
    kept
}

/// How much older the first time is; nothing if it is not.
fn older(then: SystemTime, now: SystemTime) -> Duration {
    now.duration_since(then).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    /// Steps of these numbers, ten seconds apart.
    fn steps(numbers: &[u64]) -> Vec<StepInfo> {
        numbers.iter().zip(0..).map(|(&number, index)| StepInfo::new(number, at(index * 10))).collect()
    }

    fn kept(policy: &PreservationPolicy, history: &[StepInfo]) -> Vec<u64> {
        let keeps = policy.keeps(history, at(1000));
        assert_eq!(keeps.len(), history.len());
        history.iter().zip(keeps).filter(|(_, keeps)| *keeps).map(|(step, _)| step.step).collect()
    }

    #[test]
    fn what_each_policy_keeps() {
        let history = steps(&[0, 3, 5, 10, 15, 18, 20]);
        let every = |exact, max| PreservationPolicy::EverySteps { interval: 5, exact, max };
        for (policy, want) in [
            (PreservationPolicy::All, vec![0, 3, 5, 10, 15, 18, 20]),
            (PreservationPolicy::latest(2), vec![18, 20]),
            (PreservationPolicy::latest(0), vec![]),
            (PreservationPolicy::every_steps(10), vec![0, 10, 20]),
            (every(false, None), vec![0, 5, 10, 15, 20]),
            (every(true, Some(2)), vec![15, 20]),
            (every(true, Some(0)), vec![0, 5, 10, 15, 20]),
            // 5 and 15 lie half-way: to 0 and to 20, where others are closer or later.
            (PreservationPolicy::closest_to_every(10), vec![0, 10, 20]),
            (PreservationPolicy::closest_to_every(7), vec![0, 5, 15, 20]),
            (PreservationPolicy::EveryDuration(Duration::from_secs(25)), vec![0, 10, 20]),
            (PreservationPolicy::steps([3, 4, 18]), vec![3, 18]),
            (PreservationPolicy::LatestDuration(Duration::from_secs(960)), vec![15, 18, 20]),
            (PreservationPolicy::any([PreservationPolicy::latest(1), PreservationPolicy::steps([3])]), vec![3, 20]),
            (PreservationPolicy::custom(|_, _| vec![false, true]), vec![3, 5, 10, 15, 18, 20]),
        ] {
            assert_eq!(kept(&policy, &history), want, "{policy:?}");
        }
        assert!(every(true, None).check().is_ok() && PreservationPolicy::every_steps(0).check().is_err());
        assert!(every(true, Some(1)).check().is_ok() && every(true, Some(0)).check().is_err());
        assert!(PreservationPolicy::any([]).check().is_err());
    }

    #[test]
    fn extreme_numbers_keep_what_they_say() {
        let all = [0, 1, u64::MAX - 1, u64::MAX];
        let mut history = steps(&all);
        history[0].time = SystemTime::UNIX_EPOCH;
        history[3].time = at(1_u64 << 40);
        history.iter_mut().for_each(|step| step.metrics = Some(Arc::new(json!({"m": step.step}))));
        let every = |interval, exact, max| PreservationPolicy::EverySteps { interval, exact, max };
        let closest = |interval, max| PreservationPolicy::ClosestToEvery { interval, max };
        for (policy, want) in [
            (PreservationPolicy::latest(usize::MAX), &all[..]),
            (PreservationPolicy::latest(usize::MAX - 1), &all),
            (every(u64::MAX, true, Some(usize::MAX)), &[0, u64::MAX]),
            (every(u64::MAX, false, None), &[0, u64::MAX]),
            (every(1, false, Some(usize::MAX)), &all),
            // All of them are closest to 0 or to the largest, of two the later.
            (closest(u64::MAX, Some(usize::MAX)), &[0, u64::MAX]),
            (closest(1, None), &all),
            (PreservationPolicy::EveryDuration(Duration::MAX), &[0]),
            (PreservationPolicy::EveryDuration(Duration::ZERO), &all),
            (PreservationPolicy::LatestDuration(Duration::MAX), &all),
            (PreservationPolicy::LatestDuration(Duration::ZERO), &[u64::MAX]),
            (PreservationPolicy::steps([u64::MAX, 7]), &[u64::MAX]),
            (PreservationPolicy::best(usize::MAX, "m"), &all),
            (PreservationPolicy::Best { count: usize::MAX, metric: "none".into(), keep_without: false }, &all),
            (PreservationPolicy::any([PreservationPolicy::latest(0), PreservationPolicy::latest(usize::MAX)]), &all),
        ] {
            assert_eq!(kept(&policy, &history), want, "{policy:?}");
        }
    }

    #[test]
    fn the_best_stay_and_those_that_cannot_be_judged() {
        let mut history = steps(&[1, 2, 3, 4, 5]);
        for (step, loss) in history.iter_mut().zip([json!(3.0), json!(1.0), json!("NaN"), json!(1.0), json!(2)]) {
            step.metrics = Some(Arc::new(json!({"loss": loss})));
        }
        assert_eq!(kept(&PreservationPolicy::best(1, "-loss"), &history), [3, 4]);
        assert_eq!(kept(&PreservationPolicy::best(1, "loss"), &history), [1, 3]);
        let strict = |count| PreservationPolicy::Best { count, metric: "-loss".into(), keep_without: false };
        assert_eq!(kept(&strict(3), &history), [2, 4, 5]);
        assert!(
            kept(&strict(0), &history).is_empty() && kept(&PreservationPolicy::best(0, "loss"), &history).is_empty()
        );
        assert_eq!(kept(&strict(5), &history), [1, 2, 3, 4, 5]);
    }

    #[test]
    fn the_only_step_and_what_is_read_stay() {
        assert_eq!(removable(&[false, false, false], |_| false), [0, 1]);
        assert_eq!(removable(&[false, true, false], |_| false), [0, 2]);
        assert_eq!(removable(&[false, true, false], |index| index == 0), [2]);
        assert!(removable(&[], |_| false).is_empty());
    }

    fn policy() -> impl Strategy<Value = PreservationPolicy> {
        let max = proptest::option::of(0_usize..4);
        let leaf =
            prop_oneof![
                (0_usize..6).prop_map(PreservationPolicy::Latest),
                (1_u64..9, any::<bool>(), max.clone())
                    .prop_map(|(interval, exact, max)| PreservationPolicy::EverySteps { interval, exact, max }),
                (1_u64..9, max).prop_map(|(interval, max)| PreservationPolicy::ClosestToEvery { interval, max }),
                (0_u64..40).prop_map(|s| PreservationPolicy::EveryDuration(Duration::from_secs(s))),
                (0_u64..200).prop_map(|s| PreservationPolicy::LatestDuration(Duration::from_secs(s))),
                (0_usize..5, any::<bool>()).prop_map(|(count, keep_without)| PreservationPolicy::Best {
                    count,
                    metric: "-m".into(),
                    keep_without
                }),
            ];
        leaf.prop_recursive(2, 6, 3, |inner| proptest::collection::vec(inner, 1..3).prop_map(PreservationPolicy::Any))
    }

    fn history() -> impl Strategy<Value = Vec<StepInfo>> {
        proptest::collection::btree_map(0_u64..60, (0_u64..100, proptest::option::of(-3_i64..3)), 0..14).prop_map(
            |all| {
                let step = |(number, (time, metric)): (u64, (u64, Option<i64>))| {
                    let step = StepInfo::new(number, at(time));
                    match metric {
                        Some(metric) => step.metrics(json!({"m": metric})),
                        None => step,
                    }
                };
                all.into_iter().map(step).collect()
            },
        )
    }

    proptest! {
        /// After any retention something is left, and a second one with the same history in mind changes nothing that a policy
        /// of steps or ranks keeps.
        #[test]
        fn retention_never_empties_a_series(policy in policy(), history in history()) {
            let kept = policy.keeps(&history, at(120));
            prop_assert_eq!(kept.len(), history.len());
            let gone = removable(&kept, |_| false);
            prop_assert!(history.is_empty() || gone.len() < history.len());
            prop_assert!(gone.iter().all(|&index| !kept[index]));
        }

        /// What is removed would not have been kept by any part of an `Any`.
        #[test]
        fn any_is_the_union(one in policy(), other in policy(), history in history()) {
            let both = PreservationPolicy::any([one.clone(), other.clone()]).keeps(&history, at(120));
            let union: Vec<bool> = one.keeps(&history, at(120)).into_iter().zip(other.keeps(&history, at(120)))
                .map(|(one, other)| one || other).collect();
            prop_assert_eq!(both, union);
        }

        /// What stays stays when the others are gone: removing steps is done once, whatever interrupts it.
        #[test]
        fn ranks_are_stable(count in 1_usize..5, history in history()) {
            for policy in [PreservationPolicy::latest(count), PreservationPolicy::best(count, "m"), PreservationPolicy::every_steps(count as u64)] {
                let kept = policy.keeps(&history, at(120));
                let left: Vec<StepInfo> = history.iter().zip(&kept).filter(|(_, kept)| **kept).map(|(step, _)| step.clone()).collect();
                prop_assert!(policy.keeps(&left, at(120)).into_iter().all(|kept| kept), "{:?}", policy);
            }
        }
    }
}
