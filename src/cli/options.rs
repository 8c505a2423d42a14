//! Options that several verbs share, and their validation: which checkpoint, how the work is done, devices and meshes.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::fs::{DirEntryExt, MetadataExt};
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};

use super::{output, rules};
use crate::error::{Error, Result};
use crate::io::Io;
use crate::layout::{Description, StepChoice, StepState};
use crate::limits::{CPU_DEVICES_MAX, ERROR_LINES_MAX, STEP_GONE_RETRIES_MAX, WORKERS_MAX};
use crate::place::gpus;
use crate::plan::{Device, Verify};
use crate::tree::{Checkpoint, EngineOptions, OpenOptions};

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
        let step = self.step.as_deref().map(step).transpose()?.unwrap_or_default();
        Ok(OpenOptions { item: self.item.clone(), step, force: self.force })
    }

    /// Opens it; unless quiet, stderr tells which steps were passed over.
    pub(super) fn open(&self, quiet: bool) -> Result<Checkpoint> {
        let checkpoint = Checkpoint::open(&self.path, &self.options()?)?;
        if !quiet {
            note_passed_over(checkpoint.description());
        }
        Ok(checkpoint)
    }

    /// Opens it and does something with it, which only reads until it has succeeded; again if that fails because the step, or
    /// all of it, was removed or replaced meanwhile.
    pub(super) fn with<T>(&self, quiet: bool, mut work: impl FnMut(&Checkpoint) -> Result<T>) -> Result<T> {
        settled(&self.path, is_failed_by_files, || work(&self.open(quiet)?))
    }
}

/// Whether files that are missing or others than they should be may be why something failed.
pub(super) fn is_failed_by_files<T>(result: &Result<T>) -> bool {
    result.as_ref().is_err_and(Error::is_of_one_path)
}

/// What is read of a directory. If it `is_off` and another process has changed the directory meanwhile, as one does that removes
/// a step or puts another in its place, it is read again.
pub(super) fn settled<T>(
    path: &Path,
    is_off: impl Fn(&Result<T>) -> bool,
    mut read: impl FnMut() -> Result<T>,
) -> Result<T> {
    let mut retries = STEP_GONE_RETRIES_MAX;
    loop {
        let before = entries(path);
        let result = read();
        if retries == 0 || !is_off(&result) || entries(path) == before {
            return result;
        }
        retries -= 1;
    }
}

/// Which directory or file is at a path, and which are in it.
fn entries(path: &Path) -> Option<(u64, BTreeMap<OsString, u64>)> {
    let itself = std::fs::metadata(path).ok()?.ino();
    let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
    Some((itself, entries.map(|entry| (entry.file_name(), entry.ino())).collect()))
}

/// A number, `latest`, `best:METRIC` or `best:-METRIC`.
pub(super) fn step(text: &str) -> Result<StepChoice> {
    if text == "latest" {
        return Ok(StepChoice::Latest);
    }
    if let Some(metric) = text.strip_prefix("best:") {
        let (smallest, metric) = metric.strip_prefix('-').map_or((false, metric), |metric| (true, metric));
        return Ok(StepChoice::Best { metric: metric.to_owned(), smallest });
    }
    text.parse().map(StepChoice::Number).map_err(|_| {
        Error::invalid(format!("`--step {text}` is no step"))
            .expected("a number, `latest`, `best:METRIC` or `best:-METRIC`")
    })
}

/// Says which steps were passed over because they are not whole, and which one was taken.
pub(super) fn note_passed_over(description: &Description) {
    let Some(step) = description.step.as_ref().filter(|_| !description.passed_over.is_empty()) else { return };
    for (name, reason) in passed_over(description).take(ERROR_LINES_MAX) {
        output::note(&format!("step {name} was passed over: {reason}"));
    }
    match description.passed_over.len().checked_sub(ERROR_LINES_MAX) {
        Some(more) if more > 0 => output::note(&format!("step {} is used; {more} more were passed over", step.name)),
        _ => output::note(&format!("step {} is used", step.name)),
    }
}

/// The steps that were passed over, with the reasons.
pub(super) fn passed_over(description: &Description) -> impl Iterator<Item = (&str, &str)> {
    description.passed_over.iter().filter_map(|step| match &step.state {
        StepState::Incomplete(reason) => Some((step.name.as_str(), reason.as_str())),
        StepState::Whole => None,
    })
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

/// `data=2,model=4`.
pub(super) fn axes(text: &str) -> Result<Vec<(String, u64)>> {
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
        Error::invalid(format!("`--devices {text}` names no devices, or too many"))
            .expected(format_args!("cpu:N, cuda:0-3, cuda:0,2, cuda:0*4 or auto; N at most {CPU_DEVICES_MAX}"))
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

    #[test]
    fn what_was_replaced_while_it_was_read_is_read_again() {
        let root = tempfile::tempdir().unwrap();
        let (step, other) = (root.path().join("5"), root.path().join("other"));
        let damage = || Err::<u32, Error>(Error::corrupt("a file is missing"));
        let reads = |changes: usize, result: &dyn Fn() -> Result<u32>| {
            std::fs::create_dir(&step).unwrap();
            let mut tries = 0;
            let found = settled(root.path(), is_failed_by_files, || {
                tries += 1;
                if tries > changes {
                    return if changes == 0 { result() } else { Ok(7) };
                }
                // Another takes its name, and it goes.
                std::fs::create_dir(&other).unwrap();
                std::fs::remove_dir(&step).unwrap();
                std::fs::rename(&other, &step).unwrap();
                result()
            });
            std::fs::remove_dir(&step).unwrap();
            (found.ok(), tries)
        };
        assert_eq!((reads(2, &damage), reads(0, &damage)), ((Some(7), 3), (None, 1)));
        assert_eq!(reads(usize::MAX, &damage), (None, STEP_GONE_RETRIES_MAX + 1));
        assert_eq!(reads(1, &|| Err(Error::invalid("no such item"))), (None, 1));
    }
}
