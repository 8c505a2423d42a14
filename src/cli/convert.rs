//! `touchdown convert`: a checkpoint becomes another one.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value as Json, json};

use super::options::{EngineArgs, SourceArgs};
use super::signals::Signals;
use super::target::DivisionArgs;
use super::{output, rules};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{ZSTD_LEVEL_MAX, ZSTD_LEVEL_MIN};
use crate::plan::explain::human_bytes;
use crate::tree::Target;
use crate::tree::convert::{ConvertOptions, ConvertReport, ConvertTo, convert, other_items};
use crate::tree::save::{LeafOptions, SaveOptions};
use crate::zarr::{Compression, Format};

pub(super) const EXAMPLE: &str = "\
Examples:
  touchdown convert tests/fixtures/quickstart/ckpt a.safetensors --to safetensors
  touchdown convert tests/fixtures/quickstart/ckpt b --to orbax --mesh x=4 --spec '**/kernel=_,x'
  touchdown convert a.safetensors c --to orbax --cast '**@float=bfloat16' --compression zstd:3";

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    source: SourceArgs,
    /// The new checkpoint. With `--to safetensors`: a file if it ends in .safetensors, else a directory.
    destination: PathBuf,
    /// What it becomes.
    #[arg(long, value_enum)]
    to: ToArg,
    #[command(flatten)]
    target: DivisionArgs,
    #[command(flatten)]
    storage: StorageArgs,
    /// Replace what is at the destination, once the new checkpoint is whole.
    #[arg(long)]
    overwrite: bool,
    /// Go on with what an interrupted conversion with this option left behind, and leave behind the finished arrays if this one is.
    #[arg(long)]
    resume: bool,
    #[command(flatten)]
    engine: EngineArgs,
    /// One JSON object with figures.
    #[arg(long)]
    json: bool,
}

/// How it is stored.
#[derive(Debug, clap::Args)]
struct StorageArgs {
    /// Version of zarr in an Orbax checkpoint; default: 3.
    #[arg(long, value_name = "2|3")]
    zarr: Option<ZarrArg>,
    /// One directory for each array instead of a database.
    #[arg(long)]
    no_ocdbt: bool,
    /// Compression of chunks: none, zstd:LEVEL, or gpu (zstd frames whose blocks decode side by side); default: gpu.
    #[arg(long, value_name = "none|zstd:N|gpu", value_parser = compression, allow_hyphen_values = true)]
    compression: Option<Compression>,
    /// Checksums of chunks; default: wherever the format carries them.
    #[arg(long, value_enum)]
    checksum: Option<ChecksumArg>,
    /// Most bytes of a chunk, where divisors of the shape allow.
    #[arg(long, value_name = "BYTES")]
    chunk_bytes: Option<String>,
    /// Most bytes of tensors in one of several safetensors files; default: 5 GB.
    #[arg(long, value_name = "BYTES")]
    max_shard_bytes: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ToArg {
    Orbax,
    Safetensors,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ZarrArg {
    #[value(name = "2")]
    V2,
    #[value(name = "3")]
    V3,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ChecksumArg {
    On,
    Off,
}

pub(super) fn run(args: &Args, quiet: bool, signals: &Signals) -> Result<ExitCode> {
    let report = args.source.with(quiet, |checkpoint| {
        let target = args.target.build(checkpoint)?;
        let options = args.options()?;
        let left = other_items(&target);
        if args.source.item.is_none() && !left.is_empty() {
            return Err(Error::invalid(
                "a conversion takes one tree and the JSON items, and other items would stay behind",
            )
            .found(left.join(", "))
            .hint(format_args!("convert one without the others: `--item {}`", checkpoint.item().unwrap_or_default())));
        }
        signals.hold();
        work(&target, args, &options, quiet, signals)
    })?;
    if !report.other_items.is_empty() && !quiet {
        output::note(&format!("other items were not converted: {}", report.other_items.join(", ")));
    }
    match args.json {
        true => output::json(&document(&report))?,
        false => output::text(&summary(&report))?,
    }
    Ok(ExitCode::SUCCESS)
}

impl Args {
    fn options(&self) -> Result<ConvertOptions> {
        let storage = &self.storage;
        let bytes = |text: &Option<String>| text.as_deref().map(rules::bytes).transpose();
        let max_shard_bytes = bytes(&storage.max_shard_bytes)?;
        let foreign: Vec<&str> = match self.to {
            ToArg::Orbax => vec![("--max-shard-bytes", max_shard_bytes.is_some())],
            ToArg::Safetensors => vec![
                ("--mesh", self.target.divides()),
                ("--zarr", storage.zarr.is_some()),
                ("--no-ocdbt", storage.no_ocdbt),
                ("--compression", storage.compression.is_some()),
                ("--checksum", storage.checksum.is_some()),
                ("--chunk-bytes", storage.chunk_bytes.is_some()),
            ],
        }
        .into_iter()
        .filter_map(|(option, given)| given.then_some(option))
        .collect();
        if !foreign.is_empty() {
            let what = match self.to {
                ToArg::Orbax => "an Orbax checkpoint",
                ToArg::Safetensors => "safetensors",
            };
            let verb = if foreign.len() == 1 { "means" } else { "mean" };
            return Err(Error::invalid(format!("{} {verb} nothing for {what}", foreign.join(", "))));
        }
        let to = match (self.to, max_shard_bytes) {
            (ToArg::Orbax, _) => ConvertTo::Orbax,
            (ToArg::Safetensors, None) => ConvertTo::SAFETENSORS,
            (ToArg::Safetensors, Some(max_shard_bytes)) => ConvertTo::Safetensors { max_shard_bytes },
        };
        let zarr = match storage.zarr {
            Some(ZarrArg::V2) => Format::V2,
            Some(ZarrArg::V3) | None => Format::V3,
        };
        let leaf = LeafOptions {
            compression: storage.compression,
            chunk_bytes: bytes(&storage.chunk_bytes)?,
            ..LeafOptions::default()
        };
        let save = SaveOptions {
            zarr,
            ocdbt: !storage.no_ocdbt,
            checksum: storage.checksum.map(|choice| matches!(choice, ChecksumArg::On)),
            leaf,
            overwrite: self.overwrite,
            // Whoever converts a checkpoint is going to load it.
            direct: false,
            ..SaveOptions::default()
        };
        Ok(ConvertOptions {
            to,
            save,
            engine: self.engine.options()?,
            resume: self.resume,
            ..ConvertOptions::default()
        })
    }
}

/// Converts on a thread of its own, while this one shows how far it is and hears signals.
fn work(
    target: &Target,
    args: &Args,
    options: &ConvertOptions,
    quiet: bool,
    signals: &Signals,
) -> Result<ConvertReport> {
    let bar = (!quiet && std::io::stderr().is_terminal()).then(|| {
        let style = ProgressStyle::with_template("{bar:40} {bytes}/{total_bytes} {bytes_per_sec}");
        style.map_or_else(|_| ProgressBar::new(0), |style| ProgressBar::new(0).with_style(style))
    });
    let (say, said) = channel();
    let result = std::thread::scope(|scope| {
        let to = &args.destination;
        // The other end waits for it.
        let converting = move || drop(say.send(convert(target, to, options)));
        std::thread::Builder::new()
            .spawn_scoped(scope, converting)
            .map_err(|error| Error::new(ErrorKind::Io, "no thread can be started to convert on").caused_by(error))?;
        loop {
            match said.recv_timeout(LOOK_EVERY) {
                Ok(result) => return result,
                Err(RecvTimeoutError::Disconnected) => return Err(Error::bug("the conversion ended without a word")),
                Err(RecvTimeoutError::Timeout) => {}
            }
            if signals.exit_code().is_some() {
                options.progress.cancel();
            }
            if let Some(bar) = &bar {
                let so_far = options.progress.so_far();
                bar.set_length(so_far.bytes_total);
                bar.set_position(so_far.bytes_done);
            }
        }
    });
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    match result {
        Err(error) if options.progress.is_cancelled() && options.resume => {
            Err(error.hint("the same command goes on with what is done"))
        }
        result => result,
    }
}

/// The JSON object of `convert`, schema 1.
fn document(report: &ConvertReport) -> Json {
    let paths = |paths: &[crate::keypath::KeyPath]| paths.iter().map(ToString::to_string).collect::<Vec<_>>();
    json!({
        "schema": 1,
        "seconds": report.elapsed.as_secs_f64(),
        "leaves": report.leaves,
        "bytes_logical": report.bytes_logical,
        "bytes_resumed": report.bytes_resumed,
        "bytes_read": report.bytes_read,
        "bytes_decoded": report.bytes_decoded,
        "bytes_stored": report.bytes_stored,
        "peak_host_bytes": report.peak_host_bytes,
        "waves": report.waves,
        "arrays_in_ranges": report.ranged,
        "arrays_through_scratch": report.scratched,
        "lossy": report.lossy,
        "skipped": paths(&report.skipped),
        "missing": paths(&report.missing),
        "other_items": report.other_items,
    })
}

fn summary(report: &ConvertReport) -> String {
    let seconds = report.elapsed.as_secs_f64();
    let rate = report.bytes_logical as f64 / seconds.max(1e-9) / f64::from(1u32 << 30);
    let mut text = format!(
        "{} leaves, {} in {seconds:.3} s ({rate:.2} GiB/s)\nread {}, stored {}, peak host memory {}\n",
        report.leaves,
        human_bytes(report.bytes_logical),
        human_bytes(report.bytes_read),
        human_bytes(report.bytes_stored),
        human_bytes(report.peak_host_bytes),
    );
    if report.bytes_resumed > 0 {
        text += &format!("of these, {} were done before\n", human_bytes(report.bytes_resumed));
    }
    if report.scratched > 0 {
        text += &format!("{} arrays went through a scratch file\n", report.scratched);
    }
    for (path, count) in &report.lossy {
        text += &format!("lossy: {path}: {count} elements\n");
    }
    for (what, paths) in [("skipped", &report.skipped), ("missing", &report.missing)] {
        if !paths.is_empty() {
            text += &format!("{what}: {} leaves\n", paths.len());
        }
    }
    text
}

/// `none`, `gpu`, or `zstd:LEVEL`.
fn compression(text: &str) -> Result<Compression, String> {
    match text {
        "none" => return Ok(Compression::None),
        "gpu" => return Ok(Compression::Gpu),
        _ => {}
    }
    let level = text.strip_prefix("zstd:").and_then(|level| level.parse().ok());
    let level = level.filter(|level| (ZSTD_LEVEL_MIN..=ZSTD_LEVEL_MAX).contains(level));
    level.map(|level| Compression::Zstd { level }).ok_or_else(|| {
        format!("expected `none`, `gpu` or `zstd:LEVEL` with a level from {ZSTD_LEVEL_MIN} to {ZSTD_LEVEL_MAX}")
    })
}

/// How often progress is shown and signals are heard.
const LOOK_EVERY: Duration = Duration::from_millis(50);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compressions_parse() {
        assert_eq!(compression("none"), Ok(Compression::None));
        assert_eq!(compression("gpu"), Ok(Compression::Gpu));
        assert_eq!(compression("zstd:-7"), Ok(Compression::Zstd { level: -7 }));
        assert!(compression("zstd").is_err() && compression("zstd:99").is_err() && compression("lz4").is_err());
    }
}
