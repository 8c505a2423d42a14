//! The tests of the engine once more, reading through io_uring where the machine has it.

#[path = "engine.rs"]
mod engine;
