//! Shards in CUDA memory: a driver that is found at run time, and how slabs get to its devices.
//!
//! ```text
//!  parcels (decoded elements in locked host memory, boxes with routes)
//!     │ Direct, Rows ────────────────── copy stream ──────────────────────────► shards
//!     │ Kernel: the slab ──┐
//!     │ Pack: host packs ──┴─► copy stream ─► staging ─ event ─► kernel stream ─► shards, tallies
//!     └─ an event; whoever holds the slab's slot waits for it, then the slot is free again
//!
//!  library.rs   the entry points, found and checked        driver.rs    owned objects and calls over them
//!  gpu.rs       a device: streams, kernels, lanes          lane.rs      what one worker uses of a device
//!  delivery.rs  parcels to copies and launches             results.rs   memory of shards, in slabs
//!  crossing.rs  one run to its place                       download.rs  shards back to the host
//!  measure.rs   how fast it is
//! ```
//!
//! There is one copy stream and one kernel stream a device. A worker that has parcels takes a *lane* (staging memory, tables,
//! events), gives everything to the streams, waits for the lane's event and returns the lane: while one worker waits, others
//! decode and give. Staging is therefore a slot a worker, whatever the checkpoint's size, and nothing is allocated on the way.
//! What belongs to the device as it is stored needs no lane: it is a *crossing*, which nobody waits for at once.
//!
//! Must not know: files, formats, arrays (a shard is a number here).

mod crossing;
mod delivery;
mod download;
mod driver;
mod gpu;
mod lane;
mod library;
mod measure;
mod results;

pub(crate) use crossing::Crossing;
pub(crate) use delivery::Delivery;
pub(super) use gpu::free_bytes;
pub(crate) use gpu::{Gpu, Staging};
pub(super) use library::probe;
pub(crate) use measure::Gauge;
