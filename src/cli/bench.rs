//! `touchdown bench`: how fast a checkpoint loads here, and how far that is from what the machine can do.

use std::process::ExitCode;

use serde_json::{Value as Json, json};

use super::options::{EngineArgs, SourceArgs, devices};
use super::output;
use crate::error::{Error, Result};
use crate::limits::BENCH_ROUNDS_MAX;
use crate::tree::bench::{Bench, BenchOptions, Measured, MeasuredDevice, MeasuredLoad, Sample, bench};

pub(super) const EXAMPLE: &str = "\
Example:
  touchdown bench tests/fixtures/quickstart/ckpt --rounds 3
  touchdown bench tests/fixtures/quickstart/ckpt --devices cpu:4 --json
  touchdown bench tests/fixtures/quickstart/ckpt --devices auto";

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    source: SourceArgs,
    /// Devices over which resharded loads are divided; GPUs are measured, too, and get all loads.
    #[arg(long, default_value = "cpu:8")]
    devices: String,
    /// Rounds that count; one more warms up.
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Drop the checkpoint's files from the page cache before every reading measurement.
    #[arg(long)]
    cold: bool,
    #[command(flatten)]
    engine: EngineArgs,
    /// One JSON object with every sample.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args, quiet: bool) -> Result<ExitCode> {
    if !(1..=BENCH_ROUNDS_MAX).contains(&args.rounds) {
        return Err(Error::invalid("too few or too many rounds")
            .expected(format_args!("1 to {BENCH_ROUNDS_MAX}"))
            .found(args.rounds));
    }
    let checkpoint = args.source.open(quiet)?;
    let options = BenchOptions {
        devices: devices(&args.devices)?,
        rounds: args.rounds,
        cold: args.cold,
        engine: args.engine.options()?,
    };
    let found = bench(&checkpoint, &options)?;
    match args.json {
        true => output::json(&document(&found))?,
        false => output::text(&text(&found))?,
    }
    Ok(ExitCode::SUCCESS)
}

/// The JSON object of `bench`, schema 1.
fn document(found: &Bench) -> Json {
    let samples = |measured: &Measured| {
        let sample =
            |sample: &Sample| json!({"seconds": sample.elapsed.as_secs_f64(), "cpu_seconds": sample.cpu.as_secs_f64()});
        measured.samples.iter().map(sample).collect::<Vec<_>>()
    };
    let row = |measured: &Measured| {
        json!({
            "name": measured.name,
            "bytes": measured.samples.first().map_or(0, |sample| sample.bytes),
            "seconds": measured.median().as_secs_f64(),
            "gb_per_second": measured.rate() / 1e9,
            "cpu_seconds_per_gb": measured.cpu_seconds_per_gb(),
            "samples": samples(measured),
        })
    };
    let load = |load: &MeasuredLoad| {
        let mut document = row(&load.measured);
        let (report, seconds) = (&load.report, load.measured.median().as_secs_f64());
        let stage = |stage: &crate::tree::Stage| json!({"busy": stage.busy.as_secs_f64(), "blocked": stage.blocked.as_secs_f64(), "bytes": stage.bytes});
        let more = json!({
            "bytes_needed": report.bytes_needed,
            "bytes_read": report.bytes_read,
            "bytes_decoded": report.bytes_decoded,
            "peak_host_bytes": report.peak_host_bytes,
            "peak_device_bytes": report.peak_device_bytes,
            "requests": report.requests,
            "launches": report.launches,
            "stages": {"read": stage(&report.stages.read), "decode": stage(&report.stages.decode), "transform": stage(&report.stages.transform), "copy": stage(&report.stages.copy)},
            "limit_seconds": load.limit.as_secs_f64(),
            "limited_by": load.limited_by,
            "fraction_of_limit": load.limit.as_secs_f64() / seconds.max(f64::MIN_POSITIVE),
        });
        if let (Some(document), Json::Object(more)) = (document.as_object_mut(), more) {
            document.extend(more);
        }
        document
    };
    let device = |device: &MeasuredDevice| {
        let row = |measured: &Measured| {
            json!({
                "name": measured.name,
                "bytes": measured.samples.first().map_or(0, |sample| sample.bytes),
                "seconds": measured.median().as_secs_f64(),
                "gb_per_second": measured.rate() / 1e9,
                "of_copy_on_the_device": ratio(measured.rate(), device.copy_rate),
                "samples": measured.samples.iter().map(|sample| sample.elapsed.as_secs_f64()).collect::<Vec<_>>(),
            })
        };
        json!({
            "device": format!("cuda:{}", device.ordinal),
            "bytes": device.bytes,
            "measured": device.measured.iter().map(row).collect::<Vec<_>>(),
        })
    };
    let started = found.device_startup;
    json!({
        "schema": 1,
        "cold": found.cold,
        "workers": found.workers,
        "startup": found.startup.as_secs_f64(),
        "device_startup": {"cuda": started.cuda.as_secs_f64(), "pin": started.pin.as_secs_f64()},
        "largest_unit_seconds": found.largest_unit.as_secs_f64(),
        "machine": found.machine.iter().map(row).collect::<Vec<_>>(),
        "devices": found.devices.iter().map(device).collect::<Vec<_>>(),
        "loads": found.loads.iter().map(load).collect::<Vec<_>>(),
    })
}

fn ratio(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { part / whole } else { 0.0 }
}

fn text(found: &Bench) -> String {
    let head = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<String>>();
    let figures = |measured: &Measured| {
        vec![
            measured.name.to_owned(),
            format!("{:.4} s", measured.median().as_secs_f64()),
            format!("{:.2} GB/s", measured.rate() / 1e9),
            format!("{:.3}", measured.cpu_seconds_per_gb()),
        ]
    };
    let mut machine = vec![head(&["this machine", "median", "rate", "cpu s/GB"])];
    machine.extend(found.machine.iter().map(figures));
    let mut loads = vec![head(&["load", "median", "rate", "cpu s/GB", "of the limit"])];
    for load in &found.loads {
        let mut row = figures(&load.measured);
        let fraction = load.limit.as_secs_f64() / load.measured.median().as_secs_f64().max(f64::MIN_POSITIVE);
        row.push(format!("{fraction:.2} ({})", load.limited_by));
        loads.push(row);
    }
    let mut devices = String::new();
    for device in &found.devices {
        let title = format!("cuda:{} as its driver does it, {} MiB", device.ordinal, device.bytes >> 20);
        let mut rows = vec![head(&[&title, "median", "rate", "of the copy on it"])];
        rows.extend(device.measured.iter().map(|measured| {
            let share = ratio(measured.rate(), device.copy_rate);
            [&figures(measured)[..3], &[format!("{share:.2}")]].concat()
        }));
        devices += &(output::table(&rows) + "\n");
    }
    let state = if found.cold { "cold" } else { "warm, unless the files are larger than the page cache" };
    format!(
        "{}\n{devices}{}\nfiles: {state}; {} workers; starting the engine took {:.4} s, devices {:.4} s\n",
        output::table(&machine),
        output::table(&loads),
        found.workers,
        found.startup.as_secs_f64(),
        (found.device_startup.cuda + found.device_startup.pin).as_secs_f64()
    )
}
