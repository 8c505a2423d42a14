//! Checkpoints, targets and meshes at random, with a model that knows of every element where it is stored.

pub mod grid;
pub mod store;
pub mod tape;
pub mod want;
