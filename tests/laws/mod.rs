//! Checkpoints, targets and meshes at random, with a model that knows of every element where it is stored.

#![allow(dead_code, unreachable_pub, reason = "every test binary uses its own part of this module")]

pub mod case;
pub mod grid;
pub mod store;
pub mod tape;
pub mod want;
