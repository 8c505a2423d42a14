//! A series of steps: what is saved is found, what is preserved is never lost, whatever is killed, and whoever else is there.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "tests panic to fail and print their counts"
)]

mod common;
mod crashes;
mod damage;
mod naming;
mod processes;
mod pruning;
mod reading;
mod replaced;
mod retention;
mod saving;
mod watching;

#[path = "../stopping/mod.rs"]
mod stopping;
#[cfg(feature = "cli")]
#[path = "../../examples/training_loop.rs"]
#[allow(dead_code)]
mod training_loop;
