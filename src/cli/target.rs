//! What is wanted of a checkpoint: the options that make a target, and target files.
//!
//! What is misspelt is left out at first and remembered, so that everything that does not fit comes in one error.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Args, ValueEnum};
use serde::Deserialize;

use super::options::{axes, devices};
use super::rules;
use crate::dtype::{CastPolicy, DType};
use crate::error::{Error, Result};
use crate::keypath::KeyPath;
use crate::limits::CPU_DEVICES_MAX;
use crate::plan::{Device, Mesh, Sharding, Spec};
use crate::shape::element_count;
use crate::tree::{Checkpoint, Missing, Otherwise, Pattern, Row, RowView, Target, Value};

/// Which leaves, and as what.
#[derive(Debug, Args)]
pub(super) struct SelectArgs {
    /// A target: the output of `ls --json`, edited.
    #[arg(long, value_name = "FILE")]
    target: Option<PathBuf>,
    /// Keep only the leaves that match.
    #[arg(long, value_name = "GLOB")]
    only: Vec<String>,
    /// Leave out the leaves that match.
    #[arg(long, value_name = "GLOB")]
    skip: Vec<String>,
    /// Take an index or a range of a dimension: 'GLOB=0:3', 'GLOB=0:2..5'.
    #[arg(long, value_name = "GLOB=DIM:INDEX")]
    take: Vec<String>,
    /// Permute dimensions: 'GLOB=1,0'.
    #[arg(long, value_name = "GLOB=1,0")]
    transpose: Vec<String>,
    /// Shape of the arrays that match; needs --pad if it differs.
    #[arg(long, value_name = "GLOB=8,16")]
    shape: Vec<String>,
    /// Rename paths by regular expression.
    #[arg(long, value_name = "REGEX=REPLACEMENT")]
    rename: Vec<String>,
    /// Element type of the arrays that match: '**@float=bfloat16'.
    #[arg(long, value_name = "GLOB=DTYPE")]
    cast: Vec<String>,
    /// What happens to values that a type cannot hold.
    #[arg(long, value_enum, default_value = "saturate")]
    cast_policy: PolicyArg,
    /// Pad at the high end and truncate where shapes differ.
    #[arg(long)]
    pad: bool,
    /// The value to pad with.
    #[arg(long, value_name = "V", default_value = "0", allow_hyphen_values = true, requires = "pad", value_parser = number)]
    pad_value: Value,
    /// What happens to leaves of the target that the checkpoint lacks.
    #[arg(long, value_enum, default_value = "error")]
    missing: MissingArg,
    /// All patterns are regular expressions over the path.
    #[arg(long)]
    regex: bool,
}

/// What is wanted, and on which devices.
#[derive(Debug, Args)]
pub(super) struct TargetArgs {
    #[command(flatten)]
    select: SelectArgs,
    /// Devices: cpu:N, cuda:0-3, cuda:0,2, cuda:0*4, or auto.
    #[arg(long, default_value = "auto")]
    devices: String,
    /// Mesh axes over the devices, row-major: data=2,model=4. Default: one axis `device`.
    #[arg(long)]
    mesh: Option<String>,
    /// Partition spec of the arrays that match: 'GLOB=axis,_,a+b'.
    #[arg(long, value_name = "GLOB=SPEC")]
    spec: Vec<String>,
    /// What happens to arrays without a spec.
    #[arg(long, value_enum, default_value = "replicate")]
    otherwise: OtherwiseArg,
    /// Refuse uneven division, as JAX does.
    #[arg(long)]
    even: bool,
    /// Load the leaves that match first; may be repeated.
    #[arg(long, value_name = "GLOB")]
    order: Vec<String>,
}

/// What is wanted, and how a new checkpoint's arrays are divided into chunks.
#[derive(Debug, Args)]
pub(super) struct DivisionArgs {
    #[command(flatten)]
    select: SelectArgs,
    /// Lay the chunks out for shards over this mesh: data=2,model=4. Default: as they were saved.
    #[arg(long)]
    mesh: Option<String>,
    /// Partition spec of the arrays that match: 'GLOB=axis,_,a+b'.
    #[arg(long, value_name = "GLOB=SPEC", requires = "mesh")]
    spec: Vec<String>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum OtherwiseArg {
    Replicate,
    Refuse,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum PolicyArg {
    Saturate,
    Wrap,
    Error,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum MissingArg {
    Error,
    Keep,
}

/// The mesh that specs speak of.
struct Place {
    mesh: Arc<Mesh>,
    devices: Vec<Device>,
    /// Whether it was given, and is not just all devices in a line.
    said: bool,
}

impl TargetArgs {
    /// The target that these options describe.
    ///
    /// # Errors
    /// Everything that does not fit, in one error.
    pub(super) fn build(&self, checkpoint: &Checkpoint) -> Result<Target> {
        let devices = devices(&self.devices)?;
        let mesh = match &self.mesh {
            Some(text) => Mesh::new(axes(text)?, devices.iter().copied())?,
            None => Mesh::line(devices.iter().copied())?,
        };
        let place = Place { mesh, devices, said: self.mesh.is_some() };
        let mut read = Reading { regex: self.select.regex, failed: Vec::new() };
        let target = self.select.apply(checkpoint, Some(&place), &mut read)?;
        let mut target = target.shard(&place.mesh, read.rules("spec", &self.spec, rules::spec));
        if !place.said {
            target = target.shard_as_saved(&place.devices);
        }
        if !self.order.is_empty() {
            target = target.order(read.patterns(&self.order));
        }
        if self.even {
            target = target.even();
        }
        read.finish(target.otherwise(match self.otherwise {
            OtherwiseArg::Replicate => Otherwise::Replicate,
            OtherwiseArg::Refuse => Otherwise::Refuse,
        }))
    }
}

impl DivisionArgs {
    /// The target that these options describe; its shardings are the division.
    ///
    /// # Errors
    /// Everything that does not fit, in one error.
    pub(super) fn build(&self, checkpoint: &Checkpoint) -> Result<Target> {
        let place = self.mesh.as_deref().map(virtual_mesh).transpose()?;
        let mut read = Reading { regex: self.select.regex, failed: Vec::new() };
        let mut target = self.select.apply(checkpoint, place.as_ref(), &mut read)?;
        if let Some(place) = &place {
            let rules = read.rules("spec", &self.spec, rules::spec);
            target = target.shard(&place.mesh, rules).otherwise(Otherwise::Replicate);
        }
        read.finish(target)
    }

    /// Whether a division was asked for.
    pub(super) fn divides(&self) -> bool {
        self.mesh.is_some()
    }
}

/// A mesh over as many virtual devices as its axes make.
fn virtual_mesh(text: &str) -> Result<Place> {
    let axes = axes(text)?;
    let sizes: Vec<u64> = axes.iter().map(|(_, size)| *size).collect();
    let count = element_count(&sizes).and_then(|count| u32::try_from(count).ok());
    let Some(count) = count.filter(|count| (1..=CPU_DEVICES_MAX).contains(count)) else {
        return Err(Error::invalid(format!("`--mesh {text}` has no devices or too many"))
            .expected(format_args!("1 to {CPU_DEVICES_MAX} devices")));
    };
    let devices = Device::cpus(count);
    Ok(Place { mesh: Mesh::new(axes, devices.iter().copied())?, devices, said: true })
}

impl SelectArgs {
    /// The target so far. Take, transpose, shape and rename speak of stored paths, in this order; cast, and whatever comes
    /// later, of the paths after renaming.
    fn apply(&self, checkpoint: &Checkpoint, place: Option<&Place>, read: &mut Reading) -> Result<Target> {
        let mut target = checkpoint.target();
        if let Some(file) = &self.target {
            let missing = match self.missing {
                MissingArg::Error => Missing::Error,
                MissingArg::Keep => Missing::Keep,
            };
            target = target.rows(rows(file, checkpoint, place, read)?, missing);
        }
        if !self.only.is_empty() {
            target = target.only(read.patterns(&self.only));
        }
        if !self.skip.is_empty() {
            target = target.skip(read.patterns(&self.skip));
        }
        target = target
            .take(read.rules("take", &self.take, rules::take))
            .transpose(read.rules("transpose", &self.transpose, rules::numbers))
            .shape(read.rules("shape", &self.shape, rules::numbers))
            .rename(self.rename.iter().filter_map(|text| read.keep(rules::split("rename", text))))
            .cast(read.rules("cast", &self.cast, rules::dtype))
            .cast_policy(match self.cast_policy {
                PolicyArg::Saturate => CastPolicy::Saturate,
                PolicyArg::Wrap => CastPolicy::Wrap,
                PolicyArg::Error => CastPolicy::Error,
            });
        if self.pad {
            target = target.pad(self.pad_value.clone());
        }
        Ok(target)
    }
}

/// Reads the texts of rules, and keeps what failed.
struct Reading {
    /// Whether patterns are regular expressions.
    regex: bool,
    failed: Vec<Error>,
}

impl Reading {
    fn keep<T>(&mut self, read: Result<T>) -> Option<T> {
        read.map_err(|error| self.failed.push(error)).ok()
    }

    fn patterns(&mut self, texts: &[String]) -> Vec<Pattern> {
        texts.iter().filter_map(|text| self.keep(rules::pattern(text, self.regex))).collect()
    }

    fn rules<V>(&mut self, option: &str, texts: &[String], value: impl Fn(&str) -> Result<V>) -> Vec<(Pattern, V)> {
        texts.iter().filter_map(|text| self.keep(rules::rule(option, text, self.regex, &value))).collect()
    }

    /// The target, unless something failed: then all of that, and what does not fit in the rest.
    fn finish(self, target: Target) -> Result<Target> {
        if self.failed.is_empty() {
            return Ok(target);
        }
        Error::merged(self.failed.into_iter().chain(target.check().err())).map_or(Ok(target), Err)
    }
}

/// The rows of a target file; types and specs that make no sense are noted and left out.
fn rows(file: &Path, checkpoint: &Checkpoint, place: Option<&Place>, read: &mut Reading) -> Result<Vec<Row>> {
    let in_file = |error: Error| error.at("target file", file.display());
    let text = std::fs::read(file)
        .map_err(|error| in_file(Error::invalid("the target file cannot be read").caused_by(error)))?;
    rows_of(&text, checkpoint, place, read).map_err(in_file)
}

/// The rows of a target file's text.
fn rows_of(text: &[u8], checkpoint: &Checkpoint, place: Option<&Place>, read: &mut Reading) -> Result<Vec<Row>> {
    let document: TargetFile = serde_json::from_slice(text).map_err(|error| {
        Error::invalid("the target file does not fit").expected("what `touchdown ls --json` prints").caused_by(error)
    })?;
    if let Some(other) = document.schema.filter(|schema| *schema != 1) {
        return Err(Error::invalid("the target file has another schema").expected(1).found(other));
    }
    let rows = document.leaves.into_iter().map(|row| {
        let dtype = row
            .dtype
            .as_deref()
            .map(|name| name.parse::<DType>().map_err(|error| Error::invalid(error.to_string()).at("leaf", &row.path)));
        let dtype = dtype.and_then(|dtype| read.keep(dtype));
        let spec = row.spec.map(|spec| row_spec(&row.path, spec, checkpoint, place));
        let sharding = spec.and_then(|spec| read.keep(spec)).flatten();
        Row { kind: row.kind, dtype, shape: row.shape, sharding, view: row.view.map(ViewOf::view), path: row.path }
    });
    Ok(rows.collect())
}

/// The mesh that a row's spec speaks of: the one on the command line; without one the saved mesh, if it has as many devices. A
/// spec as it was saved is advisory, so it is dropped where neither fits.
fn row_spec(
    path: &KeyPath,
    spec: Vec<Option<OneOrMany>>,
    checkpoint: &Checkpoint,
    place: Option<&Place>,
) -> Result<Option<(Arc<Mesh>, Spec)>> {
    let spec = Spec(spec.into_iter().map(|dim| dim.map(OneOrMany::names).unwrap_or_default()).collect());
    let fits = |mesh: &Arc<Mesh>| Sharding::new(Arc::clone(mesh), spec.clone(), spec.0.len()).is_ok();
    if let Some(place) = place.filter(|place| place.said || fits(&place.mesh)) {
        return Ok(Some((Arc::clone(&place.mesh), spec)));
    }
    let saved = checkpoint
        .leaves()
        .iter()
        .find(|leaf| leaf.path.to_string() == path.to_string())
        .and_then(|leaf| leaf.saved.as_ref());
    if let Some(saved) = saved {
        let saved_mesh = &checkpoint.meshes()[saved.mesh];
        let count = element_count(&saved_mesh.shape);
        if let Some(place) = place.filter(|place| Some(place.devices.len() as u64) == count) {
            let axes = saved_mesh.axes.iter().cloned().zip(saved_mesh.shape.iter().copied());
            let saved_mesh = Mesh::new(axes, place.devices.iter().copied())?;
            if fits(&saved_mesh) {
                return Ok(Some((saved_mesh, spec)));
            }
        }
        if Spec(saved.spec.clone()) == spec {
            return Ok(None);
        }
    }
    match place {
        // It does not fit, which planning says unless a rule replaces it.
        Some(place) => Ok(Some((Arc::clone(&place.mesh), spec))),
        None => {
            Err(Error::invalid("a spec that is not the saved one needs a mesh").at("leaf", path).hint("give `--mesh`"))
        }
    }
}

/// `ls --json`, as far as it is read back.
#[derive(Debug, Deserialize)]
struct TargetFile {
    schema: Option<u64>,
    leaves: Vec<TargetRow>,
}

#[derive(Debug, Deserialize)]
struct TargetRow {
    path: KeyPath,
    kind: Option<String>,
    dtype: Option<String>,
    shape: Option<Vec<u64>>,
    spec: Option<Vec<Option<OneOrMany>>>,
    view: Option<ViewOf>,
}

/// A row that is made of other leaves: `{"stack": {"of": [PATH, ..], "dim": 0}}`, `{"concatenate": ..}`, or
/// `{"split": {"of": PATH, "dim": 0, "start": 0, "stop": 4}}`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
enum ViewOf {
    Stack { of: Vec<KeyPath>, dim: usize },
    Concatenate { of: Vec<KeyPath>, dim: usize },
    Split { of: KeyPath, dim: usize, start: u64, stop: u64 },
}

impl ViewOf {
    fn view(self) -> RowView {
        match self {
            Self::Stack { of, dim } => RowView::Stack { of, dim },
            Self::Concatenate { of, dim } => RowView::Concatenate { of, dim },
            Self::Split { of, dim, start, stop } => RowView::Split { of, dim, start, stop },
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl OneOrMany {
    fn names(self) -> Vec<String> {
        match self {
            Self::One(name) => vec![name],
            Self::Many(names) => names,
        }
    }
}

/// An integer, exactly, or a floating-point number.
fn number(text: &str) -> Result<Value, std::num::ParseFloatError> {
    match text.trim().parse::<i128>() {
        Ok(value) => Ok(Value::Int(value)),
        Err(_) => text.trim().parse::<f64>().map(Value::Float),
    }
}

/// The fuzz target of target files: rows, and a target and a plan of them.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(text: &[u8]) {
    static CHECKPOINT: std::sync::OnceLock<Option<Checkpoint>> = std::sync::OnceLock::new();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/v1_shard2d_2x4/ckpt");
    let checkpoint = CHECKPOINT.get_or_init(|| Checkpoint::open(path, &crate::tree::OpenOptions::default()).ok());
    let Some(checkpoint) = checkpoint else { return };
    let mut read = Reading { regex: false, failed: Vec::new() };
    let Ok(rows) = rows_of(text, checkpoint, None, &mut read) else { return };
    let target = checkpoint.target().rows(rows, Missing::Keep);
    if target.check().is_ok() {
        drop(checkpoint.plan(&target));
    }
}
