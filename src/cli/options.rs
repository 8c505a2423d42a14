//! Options that several verbs share, and their validation.

use std::path::PathBuf;
use std::sync::Arc;

use clap::{Args, ValueEnum};
use serde::Deserialize;

use super::rules;
use crate::dtype::{CastPolicy, DType};
use crate::error::{Error, Result};
use crate::io::Io;
use crate::keypath::KeyPath;
use crate::layout::StepChoice;
use crate::limits::{CPU_DEVICES_MAX, WORKERS_MAX};
use crate::place::gpus;
use crate::plan::{Device, Mesh, Sharding, Spec, Verify};
use crate::tree::{Checkpoint, EngineOptions, Missing, OpenOptions, Otherwise, Pattern, Row, RowView, Target, Value};

/// Which checkpoint.
#[derive(Debug, Args)]
pub(super) struct SourceArgs {
    /// An Orbax checkpoint, a root of steps, a .safetensors file or a directory of them.
    pub(super) path: PathBuf,
    /// Which item; default: state, pytree, default, params, else the only tree.
    #[arg(long)]
    pub(super) item: Option<String>,
    /// Which step of a root of steps: a number, `latest`, `best:METRIC` (largest) or `best:-METRIC` (smallest).
    #[arg(long)]
    pub(super) step: Option<String>,
    /// Open a directory although its name says that its save was not finished.
    #[arg(long)]
    pub(super) force: bool,
}

impl SourceArgs {
    pub(super) fn options(&self) -> Result<OpenOptions> {
        let step = match self.step.as_deref() {
            None => StepChoice::Unstated,
            Some("latest") => StepChoice::Latest,
            Some(text) => match text.strip_prefix("best:") {
                Some(metric) => {
                    let (smallest, metric) = metric.strip_prefix('-').map_or((false, metric), |metric| (true, metric));
                    StepChoice::Best { metric: metric.to_owned(), smallest }
                }
                None => StepChoice::Number(text.parse().map_err(|_| {
                    Error::invalid(format!("`--step {text}` is no step"))
                        .expected("a number, `latest`, `best:METRIC` or `best:-METRIC`")
                })?),
            },
        };
        Ok(OpenOptions { item: self.item.clone(), step, force: self.force })
    }

    pub(super) fn open(&self) -> Result<Checkpoint> {
        Checkpoint::open(&self.path, &self.options()?)
    }
}

/// What is wanted of it, and where.
#[derive(Debug, Args)]
pub(super) struct TargetArgs {
    /// A target: the output of `ls --json`, edited.
    #[arg(long, value_name = "FILE")]
    target: Option<PathBuf>,
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
    /// Element type of the arrays that match: '**@float=bfloat16'.
    #[arg(long, value_name = "GLOB=DTYPE")]
    cast: Vec<String>,
    /// Leave out the leaves that match.
    #[arg(long, value_name = "GLOB")]
    skip: Vec<String>,
    /// Keep only the leaves that match.
    #[arg(long, value_name = "GLOB")]
    only: Vec<String>,
    /// Shape of the arrays that match; needs --pad if it differs.
    #[arg(long, value_name = "GLOB=8,16")]
    shape: Vec<String>,
    /// Rename paths by regular expression.
    #[arg(long, value_name = "REGEX=REPLACEMENT")]
    rename: Vec<String>,
    /// Permute dimensions: 'GLOB=1,0'.
    #[arg(long, value_name = "GLOB=1,0")]
    transpose: Vec<String>,
    /// Take an index or a range of a dimension: 'GLOB=0:3', 'GLOB=0:2..5'.
    #[arg(long, value_name = "GLOB=DIM:INDEX")]
    take: Vec<String>,
    /// Pad at the high end and truncate where shapes differ.
    #[arg(long)]
    pad: bool,
    /// The value to pad with.
    #[arg(long, value_name = "V", default_value = "0", allow_hyphen_values = true, requires = "pad", value_parser = number)]
    pad_value: Value,
    /// What happens to values that a type cannot hold.
    #[arg(long, value_enum, default_value = "saturate")]
    cast_policy: PolicyArg,
    /// What happens to leaves of the target that the checkpoint lacks.
    #[arg(long, value_enum, default_value = "error")]
    missing: MissingArg,
    /// Load the leaves that match first; may be repeated.
    #[arg(long, value_name = "GLOB")]
    order: Vec<String>,
    /// All patterns are regular expressions over the path.
    #[arg(long)]
    regex: bool,
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

impl TargetArgs {
    /// The target that these options describe. Take, transpose, shape and rename speak of stored paths, in this order;
    /// cast, spec and order of the paths after renaming.
    pub(super) fn build(&self, checkpoint: &Checkpoint) -> Result<Target> {
        let devices = devices(&self.devices)?;
        let mesh = match &self.mesh {
            Some(text) => Mesh::new(axes(text)?, devices.iter().copied())?,
            None => Mesh::line(devices.iter().copied())?,
        };
        // What is misspelt is left out for now, so that everything that does not fit is reported at once.
        let mut read = Reading { regex: self.regex, failed: Vec::new() };
        let mut target = checkpoint.target();
        if let Some(file) = &self.target {
            let missing = match self.missing {
                MissingArg::Error => Missing::Error,
                MissingArg::Keep => Missing::Keep,
            };
            target = target.rows(self.rows(file, checkpoint, &mesh, &devices, &mut read)?, missing);
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
            .shard(&mesh, read.rules("spec", &self.spec, rules::spec));
        if self.mesh.is_none() {
            target = target.shard_as_saved(&devices);
        }
        if !self.order.is_empty() {
            target = target.order(read.patterns(&self.order));
        }
        if self.pad {
            target = target.pad(self.pad_value.clone());
        }
        if self.even {
            target = target.even();
        }
        let target = target
            .cast_policy(match self.cast_policy {
                PolicyArg::Saturate => CastPolicy::Saturate,
                PolicyArg::Wrap => CastPolicy::Wrap,
                PolicyArg::Error => CastPolicy::Error,
            })
            .otherwise(match self.otherwise {
                OtherwiseArg::Replicate => Otherwise::Replicate,
                OtherwiseArg::Refuse => Otherwise::Refuse,
            });
        if read.failed.is_empty() {
            return Ok(target);
        }
        Error::merged(read.failed.into_iter().chain(target.check().err())).map_or(Ok(target), Err)
    }

    /// The rows of a target file; types and specs that make no sense are noted and left out.
    fn rows(
        &self,
        file: &std::path::Path,
        checkpoint: &Checkpoint,
        mesh: &Arc<Mesh>,
        devices: &[Device],
        read: &mut Reading,
    ) -> Result<Vec<Row>> {
        let in_file = |error: Error| error.at("target file", file.display());
        let text = std::fs::read(file)
            .map_err(|error| in_file(Error::invalid("the target file cannot be read").caused_by(error)))?;
        let document: TargetFile = serde_json::from_slice(&text).map_err(|error| {
            in_file(
                Error::invalid("the target file does not fit")
                    .expected("what `touchdown ls --json` prints")
                    .caused_by(error),
            )
        })?;
        if let Some(other) = document.schema.filter(|schema| *schema != 1) {
            return Err(in_file(Error::invalid("the target file has another schema").expected(1).found(other)));
        }
        let rows = document.leaves.into_iter().map(|row| {
            let dtype = row.dtype.as_deref().map(|name| {
                name.parse::<DType>().map_err(|error| in_file(Error::invalid(error.to_string()).at("leaf", &row.path)))
            });
            let dtype = dtype.and_then(|dtype| read.keep(dtype));
            let spec = row.spec.map(|spec| self.row_spec(&row.path, spec, checkpoint, mesh, devices).map_err(in_file));
            let sharding = spec.and_then(|spec| read.keep(spec)).flatten();
            Row { kind: row.kind, dtype, shape: row.shape, sharding, view: row.view.map(ViewOf::view), path: row.path }
        });
        Ok(rows.collect())
    }

    /// The mesh that a row's spec speaks of: the one on the command line; without one the saved mesh, if it has as many
    /// devices. A spec as it was saved is advisory, so it is dropped where neither fits.
    fn row_spec(
        &self,
        path: &KeyPath,
        spec: Vec<Option<OneOrMany>>,
        checkpoint: &Checkpoint,
        mesh: &Arc<Mesh>,
        devices: &[Device],
    ) -> Result<Option<(Arc<Mesh>, Spec)>> {
        let spec = Spec(spec.into_iter().map(|dim| dim.map(OneOrMany::names).unwrap_or_default()).collect());
        let fits = |mesh: &Arc<Mesh>| Sharding::new(Arc::clone(mesh), spec.clone(), spec.0.len()).is_ok();
        if self.mesh.is_some() || fits(mesh) {
            return Ok(Some((Arc::clone(mesh), spec)));
        }
        let saved = checkpoint
            .leaves()
            .iter()
            .find(|leaf| leaf.path.to_string() == path.to_string())
            .and_then(|leaf| leaf.saved.as_ref());
        if let Some(saved) = saved {
            let saved_mesh = &checkpoint.meshes()[saved.mesh];
            if saved_mesh.shape.iter().product::<u64>() == devices.len() as u64 {
                let saved_mesh = Mesh::new(
                    saved_mesh.axes.iter().cloned().zip(saved_mesh.shape.iter().copied()),
                    devices.iter().copied(),
                )?;
                if fits(&saved_mesh) {
                    return Ok(Some((saved_mesh, spec)));
                }
            }
            if Spec(saved.spec.clone()) == spec {
                return Ok(None);
            }
        }
        // It does not fit, which planning says unless a rule replaces it.
        Ok(Some((Arc::clone(mesh), spec)))
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
}

/// How the work is done.
#[derive(Debug, Args)]
pub(super) struct EngineArgs {
    /// When checksums are checked.
    #[arg(long, value_enum, default_value = "auto")]
    verify: VerifyArg,
    /// Most memory beyond the results: 512MiB, 4GB.
    #[arg(long, value_name = "BYTES")]
    memory: Option<String>,
    /// Workers that decode and place; 0 for one a core.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// How files are read: through io_uring, with positioned reads on threads, or whichever suits (auto).
    #[arg(long, value_enum, default_value = "auto")]
    io: IoArg,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum VerifyArg {
    Auto,
    Full,
    Off,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum IoArg {
    Auto,
    Uring,
    Pread,
}

impl EngineArgs {
    pub(super) fn options(&self) -> Result<EngineOptions> {
        if self.threads > WORKERS_MAX {
            return Err(Error::invalid("too many threads")
                .expected(format_args!("at most {WORKERS_MAX}"))
                .found(self.threads));
        }
        let mut options = EngineOptions { threads: self.threads, ..EngineOptions::default() };
        options.verify = match self.verify {
            VerifyArg::Auto => Verify::Auto,
            VerifyArg::Full => Verify::Full,
            VerifyArg::Off => Verify::Off,
        };
        options.io = match self.io {
            IoArg::Auto => Io::Auto,
            IoArg::Uring => Io::Uring,
            IoArg::Pread => Io::Pread,
        };
        if let Some(memory) = &self.memory {
            options.staging_bytes = rules::bytes(memory)?;
        }
        Ok(options)
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

/// `data=2,model=4`.
fn axes(text: &str) -> Result<Vec<(String, u64)>> {
    let axis = |part: &str| {
        let (name, size) = part.split_once('=')?;
        let size = size.trim().parse().ok()?;
        (!name.trim().is_empty()).then(|| (name.trim().to_owned(), size))
    };
    let axes: Option<Vec<_>> = text.split(',').map(axis).collect();
    axes.ok_or_else(|| {
        Error::invalid(format!("`--mesh {text}` is no mesh")).expected("AXIS=SIZE,AXIS=SIZE, as in data=2,model=4")
    })
}

/// `cpu:N`, `cuda:0-3`, `cuda:0,2`, `cuda:0*4`, mixtures of them, or `auto`.
pub(super) fn devices(text: &str) -> Result<Vec<Device>> {
    let bad = || {
        Error::invalid(format!("`--devices {text}` names no devices"))
            .expected("cpu:N, cuda:0-3, cuda:0,2, cuda:0*4 or auto")
    };
    if text == "auto" {
        // Whatever is wrong with a driver, here it means that there are no GPUs; `doctor` says what.
        let gpus = gpus();
        return Ok(if gpus.is_empty() { Device::cpus(1) } else { gpus });
    }
    let number = |text: &str| text.trim().parse::<u32>().ok();
    let mut devices = Vec::new();
    let mut cuda = false;
    for part in text.split(',') {
        let body = match part.split_once(':') {
            Some(("cpu", count)) => {
                cuda = false;
                let count = number(count).filter(|count| (1..=CPU_DEVICES_MAX).contains(count)).ok_or_else(bad)?;
                devices.extend(Device::cpus(count));
                continue;
            }
            Some(("cuda", body)) => {
                cuda = true;
                body
            }
            None if cuda => part,
            _ => return Err(bad()),
        };
        if let Some((ordinal, count)) = body.split_once('*') {
            let (ordinal, count) = number(ordinal)
                .zip(number(count))
                .filter(|(_, count)| (1..=CPU_DEVICES_MAX).contains(count))
                .ok_or_else(bad)?;
            devices.extend((0..count).map(|logical| Device::Cuda { ordinal, logical: Some(logical) }));
        } else {
            let (first, last) = body.split_once('-').unwrap_or((body, body));
            let (first, last) = number(first)
                .zip(number(last))
                .filter(|(first, last)| first <= last && last - first < CPU_DEVICES_MAX)
                .ok_or_else(bad)?;
            devices.extend((first..=last).map(|ordinal| Device::Cuda { ordinal, logical: None }));
        }
    }
    Ok(devices)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn devices_parse() {
        assert_eq!(devices("cpu:2").unwrap(), [Device::Cpu(0), Device::Cpu(1)]);
        assert_eq!(devices("cpu:0").unwrap_err().kind(), ErrorKind::Invalid);
        let gpu = |ordinal, logical| Device::Cuda { ordinal, logical };
        assert_eq!(devices("cuda:0-2").unwrap(), [gpu(0, None), gpu(1, None), gpu(2, None)]);
        assert_eq!(devices("cuda:0,2,cpu:1").unwrap(), [gpu(0, None), gpu(2, None), Device::Cpu(0)]);
        assert_eq!(devices("cuda:1*2").unwrap(), [gpu(1, Some(0)), gpu(1, Some(1))]);
        assert_eq!(devices("cuda:3-0").unwrap_err().kind(), ErrorKind::Invalid);
        assert_eq!(devices("tpu:0").unwrap_err().kind(), ErrorKind::Invalid);
        assert_eq!(axes("data=2, model=4").unwrap(), [("data".to_owned(), 2), ("model".to_owned(), 4)]);
        assert!(axes("data").is_err());
    }
}
