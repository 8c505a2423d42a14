//! How a series is kept, and what goes with one step.

use serde_json::Value;

use super::names::StepNames;
use super::preservation::PreservationPolicy;
use super::save_policy::SavePolicy;
use crate::tree::EngineOptions;
use crate::tree::save::SaveOptions;

/// How a series of steps is kept. `Default` saves every step that is asked for, waits for the save before, and removes nothing.
#[derive(Clone, Debug, Default)]
pub struct CheckpointerOptions {
    /// Which steps are saved.
    pub save_policy: SavePolicy,
    /// Which steps stay once a new one is committed.
    pub preservation: PreservationPolicy,
    /// What an asynchronous save does while another is going on.
    pub when_busy: WhenBusy,
    /// Names of the steps' directories. Steps of other names in the root are not this series'.
    pub names: StepNames,
    /// The user's metadata of the root: an object, written when the root has none yet.
    /// [`set_root_metadata`](super::Checkpointer::set_root_metadata) replaces it.
    pub custom_metadata: Option<Value>,
    /// Count a step as whole only if all of its data can be read, and agree with their checksums. This reads every step once.
    pub verify_data: bool,
    /// Only read: no lock is taken, nothing is tidied up, and nothing can be saved or deleted.
    pub read_only: bool,
    /// Also remove Orbax's own unfinished saves of this series' steps at the start. Orbax takes no lock: no other process may
    /// be saving there.
    pub remove_orbax_temporaries: bool,
    /// How steps are stored. Custom metadata, metrics and overwriting are set for each step.
    pub save: SaveOptions,
    /// Threads and memory; of these, one engine saves and one loads, each made when it is first needed.
    pub engine: EngineOptions,
}

/// What an asynchronous save does while another is going on. One is going on at most. One that blocks waits in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WhenBusy {
    /// It waits until that one has ended.
    #[default]
    Wait,
    /// It is skipped.
    Skip,
    /// It is an error of kind [`Busy`](crate::ErrorKind::Busy).
    Error,
}

/// What goes with one step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepOptions {
    /// Metrics of the step, an object; by them the best are found. Numbers that are not finite are the strings `"NaN"`,
    /// `"Infinity"`, `"-Infinity"`.
    pub metrics: Option<Value>,
    /// The user's metadata of the step, an object.
    pub custom_metadata: Option<Value>,
    /// Save whatever the save policy says, and wait for a save that is going on.
    pub force: bool,
    /// Replace the step if it exists, once the new one is whole.
    pub overwrite: bool,
}

impl CheckpointerOptions {
    /// Options of who only reads.
    pub fn read_only() -> Self {
        Self { read_only: true, ..Self::default() }
    }
}

impl StepOptions {
    /// A step with a metric.
    pub fn metric(name: &str, value: f64) -> Self {
        Self::default().with_metric(name, value)
    }

    /// The same with one more metric.
    #[must_use]
    pub fn with_metric(mut self, name: &str, value: f64) -> Self {
        let value = match value {
            value if value.is_nan() => "NaN".into(),
            f64::INFINITY => "Infinity".into(),
            f64::NEG_INFINITY => "-Infinity".into(),
            value => Value::from(value),
        };
        let metrics = self.metrics.get_or_insert_with(|| Value::Object(serde_json::Map::new()));
        // What is no object is refused when it is saved.
        if let Some(metrics) = metrics.as_object_mut() {
            metrics.insert(name.to_owned(), value);
        }
        self
    }

    /// The same with the user's metadata of the step.
    #[must_use]
    pub fn custom_metadata(mut self, metadata: Value) -> Self {
        self.custom_metadata = Some(metadata);
        self
    }

    /// The same, saved whatever the save policy says.
    #[must_use]
    pub fn force(mut self) -> Self {
        self.force = true;
        self
    }

    /// The same, in place of the step if it exists.
    #[must_use]
    pub fn overwrite(mut self) -> Self {
        self.overwrite = true;
        self
    }
}
