//! `touchdown doctor`: what this machine offers.

use std::process::ExitCode;

use serde_json::json;

use super::output;
use super::plan::available_memory;
use crate::error::Result;
use crate::plan::explain::human_bytes;

pub(super) const EXAMPLE: &str = "Example:\n  touchdown doctor --json";

#[derive(Debug, clap::Args)]
pub(super) struct Args {
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
        }))?;
        return Ok(ExitCode::SUCCESS);
    }
    let text = |value: Option<String>| value.unwrap_or_else(|| "unknown".to_owned());
    let rows = [
        ["touchdown".to_owned(), env!("CARGO_PKG_VERSION").to_owned()],
        ["kernel".to_owned(), text(kernel)],
        ["cores".to_owned(), cores.to_string()],
        ["memory available".to_owned(), text(memory.map(human_bytes))],
        ["positioned reads".to_owned(), "yes, on threads".to_owned()],
        ["io_uring".to_owned(), format!("{}, {uring_why}", if uring { "allowed here" } else { "not allowed here" })],
        ["open files (soft limit)".to_owned(), text(files)],
        ["locked memory (soft limit)".to_owned(), text(locked)],
        ["transparent huge pages".to_owned(), text(huge)],
        ["CUDA".to_owned(), gpus.to_string()],
        ["codecs".to_owned(), codecs().join(", ")],
    ];
    output::text(&output::table(&rows.map(|row| row.to_vec())))?;
    Ok(ExitCode::SUCCESS)
}

/// Whether the kernel's switch allows io_uring. This version does not use it; the next reader will.
fn io_uring() -> (bool, &'static str) {
    if !cfg!(feature = "uring") {
        return (false, "not part of this build (feature `uring`)");
    }
    match first_line("/proc/sys/kernel/io_uring_disabled").as_deref() {
        Some("0") => (true, "this version does not use it yet"),
        Some("1") => (false, "kernel.io_uring_disabled is 1: only for privileged processes"),
        Some(_) => (false, "kernel.io_uring_disabled is 2: switched off"),
        None => (false, "the kernel has no io_uring switch (older than 6.6, or none)"),
    }
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
