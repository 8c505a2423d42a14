//! How a tree is saved.

use std::fmt;
use std::sync::Arc;

use super::tree::NewLeaf;
use crate::dtype::{CastPolicy, DType};
use crate::error::{Error, Result};
use crate::io::{LocalStore, Store};
use crate::keypath::KeyPath;
use crate::layout::orbax::json;
use crate::limits::{DATA_FILE_BYTES_DEFAULT, JSON_DEPTH_MAX, OCDBT_NODE_BYTES_DEFAULT};
use crate::tree::Pattern;
use crate::zarr::{Compression, Format};

/// How a checkpoint is saved. `Default` is what Orbax 0.12 and this library read fastest: an OCDBT database of zarr v3 arrays,
/// compressed by the GPU profile, with checksums.
#[derive(Clone)]
pub struct SaveOptions {
    /// Version of zarr.
    pub zarr: Format,
    /// One database an item (Orbax's default), or one directory an array.
    pub ocdbt: bool,
    /// Checksums of all chunks: `Some(true)` demands them, `None` has them wherever the format can carry them (zarr v2 without
    /// compression cannot).
    pub checksum: Option<bool>,
    /// What holds for every leaf.
    pub leaf: LeafOptions,
    /// What holds for the leaves that match: for every field the first rule that sets it. A rule without a match is an error.
    pub rules: Vec<(Pattern, LeafOptions)>,
    /// What holds for one leaf, before all rules.
    pub each: Option<LeafChoice>,
    /// What happens to values that a storage type cannot hold.
    pub cast_policy: CastPolicy,
    /// Size at which a data file is full and the next value starts another, in bytes.
    pub data_file_bytes: u64,
    /// Decoded size at which a node of a database's B+tree is split, in bytes. Smaller nodes make a taller tree, of which a
    /// reader of few arrays reads less.
    pub node_bytes: u32,
    /// Which containers are tuples and namedtuples is recorded (Orbax's `support_rich_types`).
    pub rich_types: bool,
    /// Any JSON that the reader gets back as the checkpoint's custom metadata; an object, for Orbax.
    pub custom_metadata: Option<serde_json::Value>,
    /// Metrics of a step, an object: the item `metrics`, where Orbax's managers keep and look for them.
    pub metrics: Option<serde_json::Value>,
    /// Replace the checkpoint at the destination, once the new one is whole. What is no checkpoint is not replaced, nor one that
    /// somebody else has put there since the save began.
    pub overwrite: bool,
    /// Have everything on stable storage before the checkpoint appears.
    pub sync: bool,
    /// Large chunks of a database that is synced go straight to a local disk, past the page cache: it is faster, and leaves the cache
    /// to others. `false` for what is read again soon on this machine.
    pub direct: bool,
    /// Where it is written.
    pub store: Arc<dyn Store>,
}

/// A choice for each leaf.
pub type LeafChoice = Arc<dyn Fn(&KeyPath, &NewLeaf) -> LeafOptions + Send + Sync>;

/// How one array is stored; `None` leaves it to the next level.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LeafOptions {
    /// Element type in storage.
    pub dtype: Option<DType>,
    /// Compression of its chunks.
    pub compression: Option<Compression>,
    /// Largest chunk in bytes, where divisors allow.
    pub chunk_bytes: Option<u64>,
    /// Extents of a chunk, exactly.
    pub chunk_shape: Option<Vec<u64>>,
}

impl Default for SaveOptions {
    fn default() -> Self {
        Self {
            zarr: Format::V3,
            ocdbt: true,
            checksum: None,
            leaf: LeafOptions::default(),
            rules: Vec::new(),
            each: None,
            cast_policy: CastPolicy::default(),
            data_file_bytes: DATA_FILE_BYTES_DEFAULT,
            node_bytes: OCDBT_NODE_BYTES_DEFAULT,
            rich_types: false,
            custom_metadata: None,
            metrics: None,
            overwrite: false,
            sync: true,
            direct: true,
            store: Arc::new(LocalStore),
        }
    }
}

impl fmt::Debug for SaveOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SaveOptions")
            .field("zarr", &self.zarr)
            .field("ocdbt", &self.ocdbt)
            .field("checksum", &self.checksum)
            .field("leaf", &self.leaf)
            .field("rules", &self.rules)
            .field("overwrite", &self.overwrite)
            .field("sync", &self.sync)
            .field("direct", &self.direct)
            .finish_non_exhaustive()
    }
}

impl LeafOptions {
    /// These options, and where they say nothing, those.
    #[must_use]
    pub fn or(self, rest: &Self) -> Self {
        Self {
            dtype: self.dtype.or(rest.dtype),
            compression: self.compression.or(rest.compression),
            chunk_bytes: self.chunk_bytes.or(rest.chunk_bytes),
            chunk_shape: self.chunk_shape.or_else(|| rest.chunk_shape.clone()),
        }
    }
}

impl SaveOptions {
    /// The options of one leaf.
    pub(super) fn of(&self, path: &KeyPath, leaf: &NewLeaf) -> LeafOptions {
        let mut options = self.each.as_ref().map(|each| each(path, leaf)).unwrap_or_default();
        let dtype = match leaf {
            NewLeaf::Array(array) => Some(array.dtype),
            _ => None,
        };
        for (pattern, rule) in &self.rules {
            if pattern.matches(path) && dtype.is_none_or(|dtype| pattern.admits(dtype)) {
                options = options.or(rule);
            }
        }
        options.or(&self.leaf)
    }

    /// What keeps the checkpoint's own custom metadata from being saved.
    pub(in crate::tree) fn check_custom_metadata(&self, problems: &mut Vec<Error>) {
        let Some(custom) = &self.custom_metadata else { return };
        if !custom.is_object() {
            problems.push(Error::invalid("custom metadata of a checkpoint must be a JSON object").found(custom));
        }
        problems.extend(too_deep("custom metadata of a checkpoint", custom, 1));
    }

    /// Whether chunks of this compression carry checksums.
    ///
    /// # Errors
    /// Checksums are demanded where the format has none.
    pub(super) fn checksum_of(&self, compression: Compression) -> Result<bool> {
        let can = !(self.zarr == Format::V2 && compression == Compression::None);
        match self.checksum {
            Some(true) if !can => Err(Error::invalid("zarr v2 without compression cannot carry checksums")
                .hint("save as zarr v3, compress, or leave checksums out")),
            Some(wanted) => Ok(wanted),
            None => Ok(can),
        }
    }
}

/// Why JSON that so many levels are written around cannot be read again, if it cannot.
pub(super) fn too_deep(what: &str, value: &serde_json::Value, around: usize) -> Option<Error> {
    let levels = JSON_DEPTH_MAX - around;
    (!json::nests_within(value, levels)).then(|| {
        Error::invalid(format!("{what}: the JSON is nested too deep to be read again"))
            .expected(format_args!("at most {levels} levels"))
    })
}
