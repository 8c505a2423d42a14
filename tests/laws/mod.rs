//! Checkpoints, targets and meshes at random, with a model that knows of every element where it is stored.

#![allow(unreachable_pub, reason = "a module of a test binary")]

pub mod grid;
pub mod store;
pub mod tape;
pub mod want;
