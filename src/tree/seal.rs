//! Checksums for checkpoints that have none: of every value, in a file beside them that Orbax ignores.
//!
//! Values are read and decoded like a deep [`verify`](super::verify::verify) does, so that damage is not sealed; nothing that was
//! there is touched. From then on opening, loading and verifying compare what they read whole.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;

use super::catalog::{LeafKind, META_KEYS};
use super::check::{check_unit, each_unit};
use super::checkpoint::{Checkpoint, OpenOptions, ask, describe};
use super::engine::EngineOptions;
use super::inline::whole_wants;
use super::land::{decoder_cost, usize_of};
use crate::error::{Error, ErrorKind, Result};
use crate::io::store::{Becomes, LocalStore, StagedDir, Store};
use crate::io::{Ring, Root, read_error};
use crate::layout::orbax::sums::{SUMMED_FILES, SUMS_FILE, Sums, ValueSum};
use crate::layout::orbax::tree::MSGPACK_FILE;
use crate::layout::{Format, ItemKind};
use crate::limits::{METADATA_FILE_BYTES_MAX, SLOT_BYTES};
use crate::need::DirEntry;
use crate::plan::{self, Limits, Source, Values, Verify};
use crate::relpath::RelPath;

/// What [`seal`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sealed {
    /// Trees and JSON items that were sealed.
    pub items: u64,
    /// Values that have a checksum now. Those that stand in a database's nodes have the nodes'.
    pub values: u64,
    /// Their stored bytes.
    pub bytes: u64,
    /// Leaves that cannot be read here, whose values have none.
    pub unsupported: Vec<String>,
}

/// The checksums of a checkpoint, before they are written.
#[derive(Debug)]
pub struct Seal {
    root: Arc<Root>,
    items: Vec<(RelPath, Sums)>,
    /// What will have been done.
    pub sealed: Sealed,
}

/// Writes the checksums of all values of a checkpoint, and of the files that describe it and its items, beside them. Sealing again compares with the checksums that are
/// there.
///
/// # Errors
/// As [`Seal::of`] and [`Seal::write`].
pub fn seal(path: &Path, options: &OpenOptions, engine: &EngineOptions) -> Result<Sealed> {
    let seal = Seal::of(path, options, engine)?;
    seal.write(&(Arc::new(LocalStore) as Arc<dyn Store>))?;
    Ok(seal.sealed)
}

impl Seal {
    /// Reads, checks and decodes every value.
    ///
    /// # Errors
    /// A path without an Orbax checkpoint; anything that is damaged: that is not sealed.
    pub fn of(path: &Path, options: &OpenOptions, engine: &EngineOptions) -> Result<Self> {
        let (root, description) = describe(path, options)?;
        if description.format == Format::Safetensors {
            return Err(Error::unsupported("safetensors are not sealed")
                .at("path", path.display())
                .expected("an Orbax checkpoint"));
        }
        let mut seal = Self { root, items: Vec::new(), sealed: Sealed::default() };
        let wanted = |name: &str| options.item.as_ref().is_none_or(|item| item == name);
        for item in description.items.iter().filter(|item| wanted(&item.name)) {
            let options = OpenOptions { item: Some(item.name.clone()), ..options.clone() };
            let sums = match item.kind {
                ItemKind::Tree => seal.tree(&Checkpoint::open(path, &options)?, &item.dir, engine),
                ItemKind::Json => seal.described(&item.dir),
                ItemKind::Other => continue,
            };
            let named = |error: Error| if item.name.is_empty() { error } else { error.at("item", &item.name) };
            seal.items.push((item.dir.clone(), sums.map_err(named)?));
            seal.sealed.items += 1;
        }
        if seal.items.is_empty() {
            let names: Vec<&str> = description.items.iter().map(|item| item.name.as_str()).collect();
            return Err(Error::invalid("there is no such item to seal")
                .at("path", path.display())
                .found(names.join(", ")));
        }
        let own = description.step.map_or_else(RelPath::root, |step| step.dir);
        if options.item.is_none() && !seal.items.iter().any(|(dir, _)| *dir == own) {
            let sums = seal.described(&own)?;
            seal.items.extend((!sums.is_empty()).then_some((own, sums)));
        }
        Ok(seal)
    }

    /// Writes the files, one an item; each appears whole.
    ///
    /// # Errors
    /// Whatever the file system refuses.
    pub fn write(&self, store: &Arc<dyn Store>) -> Result<()> {
        for (dir, sums) in &self.items {
            let target = self.root.path().join(dir.as_path()).join(SUMS_FILE);
            let staged = StagedDir::start(Arc::clone(store), &target, true, Becomes::File)?;
            staged.write(&RelPath::new(SUMS_FILE)?, &sums.to_bytes(), true)?;
            staged.commit(true)?;
        }
        Ok(())
    }

    /// The checksums of one tree.
    fn tree(&mut self, checkpoint: &Checkpoint, dir: &RelPath, engine: &EngineOptions) -> Result<Sums> {
        let mut sums = self.described(dir)?;
        let msgpack = dir.join(MSGPACK_FILE)?;
        if !self.root.is_dir(&msgpack) {
            self.file(dir, &msgpack, &mut sums)?;
        }
        let mut arrays = Vec::new();
        for leaf in checkpoint.leaves() {
            if let LeafKind::Unreadable(error) = &leaf.kind {
                if error.kind() != ErrorKind::Unsupported {
                    return Err(error.duplicate().at("leaf", &leaf.path));
                }
                self.sealed.unsupported.push(leaf.path.to_string());
            }
            arrays.extend(leaf.kind.array());
        }
        for array in &arrays {
            if let Values::Directory(array) = &checkpoint.arrays()[*array].values {
                META_KEYS.iter().try_for_each(|name| self.file(dir, &array.join(name)?, &mut sums))?;
            }
        }
        // As opening looks for it.
        let is_database = |entry: &DirEntry| entry.name == "manifest.ocdbt" || entry.name.starts_with("ocdbt.process_");
        if self.root.list(dir)?.unwrap_or_default().iter().any(is_database) {
            let index = checkpoint.arrays().iter().find_map(|array| match &array.values {
                Values::Keys { index, .. } => Some(index),
                _ => None,
            });
            sums.add_keys(index.map_or(0, |index| index.crc32c(dir)));
        }
        self.values(checkpoint, dir, &arrays, engine, &mut sums)?;
        Ok(sums)
    }

    /// The checksums of the files that describe what is in a directory. What a save of our own has checksums of keeps them;
    /// opening has compared them.
    fn described(&self, dir: &RelPath) -> Result<Sums> {
        let read = |name: &str| -> Result<Option<Bytes>> {
            let path = dir.join(name)?;
            // An item may be a directory of such a name.
            if self.root.is_dir(&path) {
                return Ok(None);
            }
            ask(&self.root, |asker| async move { asker.file(path, METADATA_FILE_BYTES_MAX).await })
        };
        let mut sums = match read(SUMS_FILE)? {
            Some(file) => Sums::parse(&file)?.without_values(),
            None => Sums::default(),
        };
        for name in SUMMED_FILES {
            if let Some(file) = read(name)? {
                sums.add(name, &file);
            }
        }
        Ok(sums)
    }

    /// Seals a whole file, if it is there.
    fn file(&mut self, dir: &RelPath, path: &RelPath, sums: &mut Sums) -> Result<()> {
        let Some(file) = self.root.file(path)? else { return Ok(()) };
        let mut sum = ValueSum { offset: 0, len: 0, crc: 0 };
        let mut piece = vec![0; SLOT_BYTES];
        while sum.len < file.size() {
            let part = usize_of((file.size() - sum.len).min(SLOT_BYTES as u64))?;
            file.file()
                .read_exact_at(&mut piece[..part], sum.len)
                .map_err(|error| read_error(error, &self.root.shown(path), sum.len, part as u64, file.size()))?;
            sum =
                ValueSum { offset: 0, len: sum.len + part as u64, crc: crc32c::crc32c_append(sum.crc, &piece[..part]) };
        }
        self.add(dir, path, sum, sums)
    }

    /// Seals the values of these arrays that lie in files.
    fn values(
        &mut self,
        checkpoint: &Checkpoint,
        dir: &RelPath,
        arrays: &[usize],
        engine: &EngineOptions,
        sums: &mut Sums,
    ) -> Result<()> {
        let limits = EngineOptions { verify: Verify::Full, ..*engine }.limits()?;
        let limits = Limits { counts_plan: false, ..limits };
        let (all, wants) = (checkpoint.arrays(), whole_wants(checkpoint.arrays(), arrays.iter().copied()));
        let plan =
            ask(&self.root, |asker| async move { plan::build_whole(&asker, all, wants, limits, decoder_cost).await })?;
        let ring = Ring::new(usize::try_from(limits.slot_bytes).unwrap_or(SLOT_BYTES));
        let plans = [plan];
        let found = each_unit(&plans, &self.root, engine.workers(), |plan, unit, file| {
            check_unit(plan, unit, file, &self.root, &ring)
        });
        let [plan] = &plans;
        for (unit, sum) in plan.units.iter().zip(found) {
            let sum = sum?;
            if let Source::File { file, offset, .. } = unit.source {
                let offset = offset.saturating_add(sum.offset);
                self.add(dir, &plan.files[file as usize], ValueSum { offset, ..sum }, sums)?;
            }
        }
        Ok(())
    }

    fn add(&mut self, dir: &RelPath, path: &RelPath, sum: ValueSum, sums: &mut Sums) -> Result<()> {
        let below = match dir.as_bytes() {
            [] => Some(path.as_bytes()),
            dir => path.as_bytes().strip_prefix(dir).and_then(|below| below.strip_prefix(b"/")),
        };
        let name = below.and_then(|below| std::str::from_utf8(below).ok()).ok_or_else(|| {
            Error::unsupported("a value lies in a file that the checksums cannot name")
                .at("file", self.root.shown(path))
        })?;
        self.sealed.values += 1;
        self.sealed.bytes += sum.len;
        sums.add_value(name, sum);
        Ok(())
    }
}
