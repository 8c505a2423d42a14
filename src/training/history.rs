//! What policies see: the steps of a series, and their metrics.

use std::sync::Arc;
use std::time::SystemTime;

use serde_json::Value;

use crate::layout::StepChoice;
use crate::layout::orbax::json;

/// A step as policies see it.
#[derive(Clone, Debug, PartialEq)]
pub struct StepInfo {
    /// Its number.
    pub step: u64,
    /// When it was committed.
    pub time: SystemTime,
    /// Its metrics, if it has any.
    pub metrics: Option<Arc<Value>>,
}

/// A metric by name, and which of its values is the best. The text form is that of `--step best:METRIC`: `accuracy`, or
/// `-loss` where the smallest is best.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metric {
    /// The name of the member of the metrics.
    pub name: String,
    /// Whether the smallest value is the best.
    pub smallest: bool,
}

impl StepInfo {
    /// A step without metrics.
    pub fn new(step: u64, time: SystemTime) -> Self {
        Self { step, time, metrics: None }
    }

    /// The same with metrics.
    #[must_use]
    pub fn metrics(mut self, metrics: Value) -> Self {
        self.metrics = Some(Arc::new(metrics));
        self
    }

    /// The value of a metric; `None` if the step has none of that name, or it is no number, or NaN.
    pub fn metric(&self, name: &str) -> Option<f64> {
        self.metrics.as_ref()?.get(name).and_then(json::number).filter(|value| !value.is_nan())
    }
}

impl Metric {
    /// A metric whose largest value is the best.
    pub fn largest(name: impl Into<String>) -> Self {
        Self { name: name.into(), smallest: false }
    }

    /// A metric whose smallest value is the best.
    pub fn smallest(name: impl Into<String>) -> Self {
        Self { name: name.into(), smallest: true }
    }

    /// How good a step is by it: larger is better. `None` for a step without it.
    pub fn score(&self, step: &StepInfo) -> Option<f64> {
        step.metric(&self.name).map(|value| if self.smallest { -value } else { value })
    }
}

impl From<&str> for Metric {
    fn from(text: &str) -> Self {
        match text.strip_prefix('-') {
            Some(name) => Self::smallest(name),
            None => Self::largest(text),
        }
    }
}

impl From<Metric> for StepChoice {
    fn from(metric: Metric) -> Self {
        Self::Best { metric: metric.name, smallest: metric.smallest }
    }
}

/// The positions of the steps that have a score, the best first; of equals the later first.
pub(super) fn ranking(scores: impl IntoIterator<Item = Option<f64>>) -> Vec<usize> {
    let scored = scores.into_iter().enumerate().filter_map(|(index, score)| Some((index, score?)));
    let mut scored: Vec<(usize, f64)> = scored.filter(|(_, score)| !score.is_nan()).collect();
    // No NaN is left; -0 and 0 are equals, as elsewhere.
    scored.sort_by(|(a, x), (b, y)| y.partial_cmp(x).unwrap_or(std::cmp::Ordering::Equal).then(b.cmp(a)));
    scored.into_iter().map(|(index, _)| index).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_numbers_that_can_be_compared() {
        let step = StepInfo::new(1, SystemTime::UNIX_EPOCH);
        assert_eq!(step.metric("loss"), None);
        let step =
            step.metrics(serde_json::json!({"loss": 0.5, "nan": "NaN", "inf": "-Infinity", "text": "x", "n": 3}));
        assert_eq!(
            ["loss", "nan", "inf", "text", "n"].map(|name| step.metric(name)),
            [Some(0.5), None, Some(f64::NEG_INFINITY), None, Some(3.0)]
        );
        assert_eq!((Metric::from("-loss").score(&step), Metric::from("loss").score(&step)), (Some(-0.5), Some(0.5)));
        assert_eq!(StepChoice::from(Metric::from("-a")), StepChoice::Best { metric: "a".to_owned(), smallest: true });
    }

    #[test]
    fn of_equals_the_later_is_better() {
        let nan = Some(f64::NAN);
        assert_eq!(ranking([Some(1.0), None, Some(2.0), nan, Some(1.0), Some(-0.0), Some(0.0)]), [2, 4, 0, 6, 5]);
    }
}
