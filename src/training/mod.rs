//! A series of steps that can be trusted: what a training or fine-tuning loop needs around saving.
//!
//! ```text
//!   training loop ──save(step, tree)──► SavePolicy ──yes──► Engine::save ──job──► the series' own thread
//!                                          │ no: skipped                              │ waits for the commit
//!                                          ▼                                          ▼
//!                        history of whole steps ◄───────────────────────── PreservationPolicy: which stay
//!                                          │                                          │ the others: rename, then remove
//!   evaluator ──Watch──► each new whole step, once                                    ▼
//!
//!   <root>/1000/state/..  metrics/metrics       a step: one checkpoint, which appears whole or not at all
//!   <root>/metadata/_ROOT_METADATA              the user's metadata of the series
//!   <root>/.touchdown-lock                      held by the one process that writes
//! ```
//!
//! A root is what Orbax's `CheckpointManager` and `training.Checkpointer` keep: they read what is written here, and what they
//! wrote is read here. Policies are pure functions over a history ([`StepInfo`]), so what they would do can be asked without
//! doing it.
//!
//! Must not know: how a tree is stored. Start reading at [`Checkpointer`].

mod checkpointer;
mod choose;
mod handle;
mod history;
mod lock;
mod names;
mod options;
mod preservation;
mod prune;
mod recovery;
mod remove;
mod root;
mod save_policy;
mod saving;
mod shared;
#[cfg(feature = "cli")]
mod signal;
mod watch;
mod worker;

pub use checkpointer::{Checkpointer, StepMetadata};
pub use choose::{OpenStep, StepItem};
pub use handle::{StepLoad, StepSave};
pub use history::{Metric, StepInfo};
pub use names::StepNames;
pub use options::{CheckpointerOptions, StepOptions, WhenBusy};
pub use preservation::{PreservationPolicy, PreserveFunction};
pub use prune::{PruneReport, Pruning, prune};
pub use root::{SeriesStep, root_metadata, steps};
pub use save_policy::{SaveContext, SaveFunction, SavePolicy};
#[cfg(feature = "cli")]
pub use signal::flag_on_sigterm;
pub use watch::{Watch, WatchOptions};

pub use crate::layout::{StepChoice, StepState};
