//! Which step is meant, and keeping it while it is read.

use std::ops::Deref;
use std::sync::Arc;

use super::history::{Metric, ranking};
use super::root::{SeriesStep, is_temporary};
use super::shared::{Checked, Reading, Shared};
use crate::error::{Error, ErrorKind, Result};
use crate::layout::StepChoice;
use crate::limits::{ERROR_LINES_MAX, NEAREST_NAMES_MAX, STEP_GONE_RETRIES_MAX};
use crate::tree::{Checkpoint, OpenOptions};

/// Which tree is meant: of which step, and which of its items. It is made of a step, by number, as the latest or by a metric,
/// alone or with an item's name: `5`, `StepChoice::Latest`, `(5, "ema")`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepItem {
    /// The step.
    pub step: StepChoice,
    /// The item; `None` for `state`, `pytree`, `default`, `params`, or the only tree.
    pub item: Option<String>,
}

impl From<u64> for StepItem {
    fn from(step: u64) -> Self {
        StepChoice::from(step).into()
    }
}

impl From<Metric> for StepItem {
    fn from(metric: Metric) -> Self {
        StepChoice::from(metric).into()
    }
}

impl From<StepChoice> for StepItem {
    fn from(step: StepChoice) -> Self {
        Self { step, item: None }
    }
}

impl<S: Into<StepChoice>> From<(S, &str)> for StepItem {
    fn from((step, item): (S, &str)) -> Self {
        Self { step: step.into(), item: Some(item.to_owned()) }
    }
}

/// A step that was opened through a series: a [`Checkpoint`] that the series does not remove as long as this lives.
#[derive(Debug)]
pub struct OpenStep {
    pub(super) checkpoint: Checkpoint,
    pub(super) step: SeriesStep,
    pub(super) reading: Reading,
}

impl OpenStep {
    /// The step as the series has it.
    pub fn step(&self) -> &SeriesStep {
        &self.step
    }
}

impl Deref for OpenStep {
    type Target = Checkpoint;

    fn deref(&self) -> &Checkpoint {
        &self.checkpoint
    }
}

/// The latest whole step.
pub(super) fn latest(shared: &Shared) -> Result<Option<SeriesStep>> {
    first_whole(shared, |steps| (0..steps.len()).rev().collect())
}

/// The best whole step by a metric; of equals the latest. `None` if no whole step has it.
pub(super) fn best(shared: &Shared, metric: &Metric) -> Result<Option<SeriesStep>> {
    first_whole(shared, |steps| ranking(steps.iter().map(|step| metric.score(&step.info()))))
}

/// The first whole step in some order. If one is gone by then, because another process removed or replaced it, what is known of
/// the series is old, and it is looked at again.
fn first_whole(shared: &Shared, order: impl Fn(&[SeriesStep]) -> Vec<usize>) -> Result<Option<SeriesStep>> {
    let mut retries = STEP_GONE_RETRIES_MAX;
    'again: loop {
        let steps: Vec<SeriesStep> = shared.lock().steps.iter().filter(|step| step.is_whole()).cloned().collect();
        for index in order(&steps) {
            match shared.check(&steps[index])? {
                // One that was whole and was replaced since is whole; its successor is the better answer.
                Checked::Whole if retries == 0 || steps[index].is_same() => return Ok(Some(steps[index].clone())),
                Checked::Damaged => {}
                // To pass it over would be to say that it is not whole.
                Checked::Gone if retries == 0 => return Err(restless(steps[index].step)),
                Checked::Whole | Checked::Gone => {
                    retries -= 1;
                    shared.reload()?;
                    continue 'again;
                }
            }
        }
        return Ok(None);
    }
}

/// The step that is meant.
pub(super) fn choose(shared: &Shared, choice: &StepChoice) -> Result<SeriesStep> {
    let found = match choice {
        StepChoice::Number(number) => return numbered(shared, *number),
        StepChoice::Unstated | StepChoice::Latest => latest(shared)?,
        StepChoice::Best { metric, smallest } => {
            let by = Metric { name: metric.clone(), smallest: *smallest };
            if let Some(best) = best(shared, &by)? {
                return Ok(best);
            }
            if latest(shared)?.is_some() {
                let steps = shared.lock().steps.clone();
                let mut names: Vec<String> = steps
                    .iter()
                    .filter_map(|step| step.metrics.as_ref()?.as_object())
                    .flat_map(|metrics| metrics.keys().cloned())
                    .collect();
                names.sort();
                names.dedup();
                let found = if names.is_empty() { "no metrics".to_owned() } else { names.join(", ") };
                return Err(
                    Error::invalid(format!("no whole step has the metric `{metric}` with a number")).found(found)
                );
            }
            None
        }
    };
    found.ok_or_else(|| none_whole(shared))
}

fn numbered(shared: &Shared, number: u64) -> Result<SeriesStep> {
    let numbered = || -> Vec<SeriesStep> {
        shared.lock().steps.iter().rev().filter(|step| step.step == number).cloned().collect()
    };
    let mut retries = STEP_GONE_RETRIES_MAX;
    'again: loop {
        for step in numbered() {
            match shared.check(&step)? {
                Checked::Whole if retries == 0 || step.is_same() => return Ok(step),
                Checked::Damaged => {}
                Checked::Gone if retries == 0 => return Err(restless(number)),
                Checked::Whole | Checked::Gone => {
                    retries -= 1;
                    shared.reload()?;
                    if numbered().is_empty() {
                        return Err(gone(number));
                    }
                    continue 'again;
                }
            }
        }
        break;
    }
    let steps = shared.lock().steps.clone();
    // What is said of the step itself says more than that a save of it was not finished.
    let of_number = steps.iter().rev().filter(|step| step.step == number);
    let reason = of_number.min_by_key(|step| is_temporary(&step.name)).and_then(SeriesStep::reason);
    if let Some(reason) = reason {
        return Err(Error::corrupt(format!("step {number} is not whole: {reason}"))
            .at("root", shared.root.display())
            .hint("choose another step"));
    }
    let mut near: Vec<u64> = steps.iter().map(|step| step.step).collect();
    near.sort_by_key(|&other| (other.abs_diff(number), other));
    near.dedup();
    let count = near.len();
    near.truncate(NEAREST_NAMES_MAX);
    let near: Vec<String> = near.iter().map(u64::to_string).collect();
    let found =
        if count == 0 { "no steps".to_owned() } else { format!("{count} steps, the nearest are {}", near.join(", ")) };
    Err(Error::invalid(format!("there is no step {number}")).at("root", shared.root.display()).found(found))
}

fn gone(number: u64) -> Error {
    Error::not_found(format!("step {number} was removed meanwhile")).hint("choose another step")
}

fn restless(number: u64) -> Error {
    Error::new(ErrorKind::Busy, format!("step {number} was replaced again whenever it was looked at")).hint("try again")
}

fn none_whole(shared: &Shared) -> Error {
    let state = shared.lock();
    if state.steps.is_empty() {
        return Error::not_found("the series has no steps yet").at("root", shared.root.display());
    }
    let line = |step: &SeriesStep| format!("{}: {}", step.name, step.reason().unwrap_or("it is gone"));
    Error::corrupt(format!("none of the {} steps is whole", state.steps.len()))
        .at("root", shared.root.display())
        .lines(state.steps.iter().rev().take(ERROR_LINES_MAX).map(line))
}

/// Chooses a step and does something with it. Where that fails and another process has replaced the step meanwhile, or removed it
/// and any other would do, the series is looked at again.
pub(super) fn with_step<T>(
    shared: &Arc<Shared>,
    which: &StepItem,
    mut work: impl FnMut(OpenStep) -> Result<T>,
) -> Result<T> {
    with_reading(shared, &which.step, |step, reading| {
        let options = OpenOptions { item: which.item.clone(), ..OpenOptions::default() };
        let checkpoint = Checkpoint::open(&step.path, &options)?;
        work(OpenStep { checkpoint, step, reading })
    })
}

/// The same without opening an item: steps may have several, or no tree.
pub(super) fn with_reading<T>(
    shared: &Arc<Shared>,
    choice: &StepChoice,
    mut work: impl FnMut(SeriesStep, Reading) -> Result<T>,
) -> Result<T> {
    let is_named = matches!(choice, StepChoice::Number(_));
    let mut retries = STEP_GONE_RETRIES_MAX;
    loop {
        let chosen = choose(shared, choice)?;
        let (step, result) = match begin(shared, &chosen) {
            Some((step, reading)) => (step.clone(), Some(work(step, reading))),
            None => (chosen, None),
        };
        match result {
            Some(result) if result.is_ok() || step.is_same() => return result,
            result => {
                shared.reload()?;
                if retries == 0 || (is_named && !step.path.exists()) {
                    let why = if step.path.exists() { restless(step.step) } else { gone(step.step) };
                    return Err(match result.and_then(Result::err) {
                        Some(error) => why.caused_by(error),
                        None => why,
                    });
                }
                retries -= 1;
            }
        }
    }
}

/// Begins to read a step, unless it is gone.
fn begin(shared: &Arc<Shared>, step: &SeriesStep) -> Option<(SeriesStep, Reading)> {
    let reading = Reading::begin(shared, &step.name)?;
    // It may have been replaced until it could be read.
    let step = shared.lock().steps.iter().find(|have| have.name == step.name).unwrap_or(step).clone();
    Some((step, reading))
}
