//! What is converted into what, and what a conversion did.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::keypath::KeyPath;
use crate::limits::TENSOR_FILE_BYTES_DEFAULT;
use crate::tree::EngineOptions;
use crate::tree::save::{Progress, SaveOptions, SaveProgress};

/// How a checkpoint is converted.
#[derive(Clone, Debug)]
pub struct ConvertOptions {
    /// Into what.
    pub to: ConvertTo,
    /// Format, chunks, compression, overwriting and syncing of what is written. Element types are the target's business. For
    /// safetensors only `overwrite`, `sync` and `store` mean something.
    ///
    /// Custom metadata of the checkpoint is the source's, unless some is given here.
    pub save: SaveOptions,
    /// How it works. `staging_bytes` bounds all memory here: half of it is for what is converted at once, half for reading,
    /// decoding and encoding.
    pub engine: EngineOptions,
    /// Go on with what an earlier conversion of the same source with the same options left behind, and leave behind what was
    /// done if this one fails or is cancelled: all but the last arrays, of about a second, or the last range of one that does not
    /// fit the memory.
    pub resume: bool,
    /// To watch it, and to cancel it, from another thread.
    pub progress: ConvertProgress,
}

/// What comes out of a conversion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConvertTo {
    /// An Orbax checkpoint with one item, `state`.
    Orbax,
    /// safetensors: one file where the destination ends in `.safetensors`; else a directory with one file, or with several and
    /// an index.
    Safetensors {
        /// Most bytes of tensors in one of several files; a larger tensor has a file of its own.
        max_shard_bytes: u64,
    },
}

/// How far a conversion is, and the means to stop it. Clones are handles of the same conversion.
#[derive(Clone, Debug)]
pub struct ConvertProgress(pub(super) Arc<Progress>);

/// What a conversion did.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ConvertReport {
    /// From the call to the destination being in place.
    pub elapsed: Duration,
    /// Leaves of the new checkpoint.
    pub leaves: usize,
    /// Bytes of all arrays and numbers in their new types, in memory form.
    pub bytes_logical: u64,
    /// Of these, bytes that an earlier conversion had done.
    pub bytes_resumed: u64,
    /// Data bytes read: requested from files, or values that came with the metadata.
    pub bytes_read: u64,
    /// Bytes that came out of decoding, uncompressed bytes included.
    pub bytes_decoded: u64,
    /// Bytes of all values as they are stored; with safetensors of all files.
    pub bytes_stored: u64,
    /// The most memory that was held at once, by the engine's own count; scratch files are not in it: their pages are the
    /// page cache's, which the system writes out when memory is short, though its figures show them as the process's.
    pub peak_host_bytes: u64,
    /// How often arrays were loaded and written, a few at a time.
    pub waves: u64,
    /// Arrays that were converted in several ranges of rows.
    pub ranged: u64,
    /// Arrays that went through a scratch file, because no range of them fits the memory.
    pub scratched: u64,
    /// Lossy elements of every array that has any.
    pub lossy: BTreeMap<String, u64>,
    /// Leaves of the source that were left out.
    pub skipped: Vec<KeyPath>,
    /// Leaves that were asked for and that the source lacks.
    pub missing: Vec<KeyPath>,
    /// Other items of the source, which are not converted.
    pub other_items: Vec<String>,
}

impl Default for ConvertOptions {
    fn default() -> Self {
        Self {
            to: ConvertTo::Orbax,
            save: SaveOptions::default(),
            engine: EngineOptions::default(),
            resume: false,
            progress: ConvertProgress::default(),
        }
    }
}

impl ConvertTo {
    /// safetensors, with files as large as Hugging Face makes them.
    pub const SAFETENSORS: Self = Self::Safetensors { max_shard_bytes: TENSOR_FILE_BYTES_DEFAULT };
}

impl Default for ConvertProgress {
    fn default() -> Self {
        Self(Progress::new(0))
    }
}

impl ConvertProgress {
    /// How far it is, in bytes of arrays.
    pub fn so_far(&self) -> SaveProgress {
        self.0.so_far()
    }

    /// Asks it to stop. It then fails with [`ErrorKind::Cancelled`](crate::ErrorKind::Cancelled), unless the destination is in
    /// place already.
    pub fn cancel(&self) {
        self.0.cancel();
    }

    /// Whether somebody asked it to stop.
    pub fn is_cancelled(&self) -> bool {
        self.0.is_cancelled()
    }
}
