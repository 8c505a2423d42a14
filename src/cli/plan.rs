//! `touchdown plan`: what a load would do.

use std::path::PathBuf;
use std::process::ExitCode;

use super::options::{EngineArgs, SourceArgs};
use super::output;
use super::target::TargetArgs;
use crate::error::{Error, ErrorKind, Result};
use crate::plan::explain::Capacity;
use crate::plan::svg;

pub(super) const EXAMPLE: &str = "\
Example:
  touchdown plan tests/fixtures/quickstart/ckpt --devices cpu:4 --spec '**/kernel=_,device'
  touchdown plan tests/fixtures/quickstart/ckpt --devices cpu:8 --svg plan.svg --json";

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    source: SourceArgs,
    #[command(flatten)]
    target: TargetArgs,
    #[command(flatten)]
    engine: EngineArgs,
    /// Draw the mesh and how arrays lie on it.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args, quiet: bool) -> Result<ExitCode> {
    let plan = args.source.with(quiet, |checkpoint| {
        checkpoint.plan_within(&args.target.build(checkpoint)?, args.engine.options()?.limits()?)
    })?;
    let ordinals = plan.gpu_needs().into_iter().map(|need| need.ordinal);
    let capacity = Capacity {
        host_bytes: available_memory(),
        gpu_bytes: ordinals.filter_map(|ordinal| Some((ordinal, free_gpu_memory(ordinal)?))).collect(),
    };
    if let Some(file) = &args.svg {
        std::fs::write(file, svg::draw(&plan)).map_err(|error| {
            Error::new(ErrorKind::Io, "cannot write the picture").at("file", file.display()).caused_by(error)
        })?;
    }
    if args.json {
        output::json(&plan.json(&capacity))?;
    } else {
        output::text(&plan.text(&capacity))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Free memory of a GPU, in bytes. A plan may be for another machine: that this one lacks the GPU is said, and no error.
fn free_gpu_memory(ordinal: u32) -> Option<u64> {
    match crate::place::free_bytes(ordinal) {
        Ok(free) => Some(free),
        Err(error) => {
            tracing::warn!(device = format_args!("cuda:{ordinal}"), %error, "what the device has is not known");
            None
        }
    }
}

/// Host memory that the kernel says is available, in bytes.
pub(super) fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}
