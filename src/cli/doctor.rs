//! `touchdown doctor`: what this machine offers.

use std::path::PathBuf;
use std::process::ExitCode;

use serde_json::json;

use super::output;
use super::plan::available_memory;
use crate::error::{Error, Result};
use crate::io::store::leftovers;
use crate::plan::explain::human_bytes;

pub(super) const EXAMPLE: &str = "Example:\n  touchdown doctor --json";

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// A directory of checkpoints, to look for what crashed saves left there.
    #[arg(default_value = ".")]
    dir: PathBuf,
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let memory = available_memory();
    let kernel = first_line("/proc/sys/kernel/osrelease");
    let (uring, uring_why) = io_uring();
    let gpus = crate::place::probe_cuda();
    let huge = first_line("/sys/kernel/mm/transparent_hugepage/enabled");
    let files = limit("Max open files");
    let locked = limit("Max locked memory");
    let left = leftovers(&args.dir).map_err(|error| {
        Error::not_found("the directory cannot be listed").at("path", args.dir.display()).caused_by(error)
    })?;
    if args.json {
        output::json(&json!({
            "schema": 1,
            "version": env!("CARGO_PKG_VERSION"),
            "kernel": kernel,
            "cores": cores,
            "host_bytes_available": memory,
            "io": {"pread": true, "uring": uring, "uring_detail": uring_why},
            "limits": {"open_files": files, "locked_memory": locked},
            "transparent_hugepages": huge,
            "cuda": {"state": gpus.state(), "detail": gpus.to_string(), "devices": gpus.count()},
            "codecs": codecs(),
            "leftovers": output::leftovers_json(&left),
        }))?;
        return Ok(ExitCode::SUCCESS);
    }
    let text = |value: Option<String>| value.unwrap_or_else(|| "unknown".to_owned());
    let rows = [
        ["touchdown".to_owned(), env!("CARGO_PKG_VERSION").to_owned()],
        ["kernel".to_owned(), text(kernel)],
        ["cores".to_owned(), cores.to_string()],
        ["memory available".to_owned(), text(memory.map(human_bytes))],
        ["positioned reads".to_owned(), "yes, on threads (default)".to_owned()],
        [
            "io_uring".to_owned(),
            if uring { format!("yes (`--io uring`), {uring_why}") } else { format!("no, {uring_why}") },
        ],
        ["open files (soft limit)".to_owned(), text(files)],
        ["locked memory (soft limit)".to_owned(), text(locked)],
        ["transparent huge pages".to_owned(), text(huge)],
        ["CUDA".to_owned(), gpus.to_string()],
        ["codecs".to_owned(), codecs().join(", ")],
    ];
    output::text(&(output::table(&rows.map(|row| row.to_vec())) + &output::leftovers_text(&left)))?;
    Ok(ExitCode::SUCCESS)
}

/// Whether a ring can be set up here, which is tried, and why not.
fn io_uring() -> (bool, String) {
    let Err(error) = crate::io::uring_setup() else { return (true, "can be set up".to_owned()) };
    let advice = error.advice().map_or_else(String::new, |advice| format!(" ({advice})"));
    (false, format!("{error}{advice}"))
}

fn codecs() -> Vec<&'static str> {
    let optional =
        [("gzip", cfg!(feature = "gzip")), ("bz2", cfg!(feature = "bz2")), ("blosc", cfg!(feature = "blosc"))];
    let built = optional.into_iter().filter(|(_, built)| *built).map(|(name, _)| name);
    ["zstd", "crc32c"].into_iter().chain(built).collect()
}

fn first_line(path: &str) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    text.lines().next().map(|line| line.trim().to_owned())
}

/// The soft limit of a row of `/proc/self/limits`.
fn limit(name: &str) -> Option<String> {
    let text = std::fs::read_to_string("/proc/self/limits").ok()?;
    let row = text.lines().find_map(|line| line.strip_prefix(name))?;
    row.split_whitespace().next().map(str::to_owned)
}
