//! The processor's executor of casts: the definition of the right answer.
//!
//! ```text
//! stored bytes --normalise--> memory form --convert--> memory form of the wanted type, and how many elements were lossy
//! ```
//!
//! Start reading in `cast.rs`. Must not know: shapes, strides, files, plans; everything here is a run of elements.

mod cast;
mod encode;
mod float;
mod int;
mod lanes;
mod normalise;
mod place;
mod table;
mod wide;

pub use cast::{CastError, castable, convert};
pub use normalise::normalise;
pub use place::{Cpu, OpError, SharedBytes, execute, execute_in};

#[cfg(test)]
mod tests;
