//! `touchdown load`: shards onto devices.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value as Json, json};

use super::dump;
use super::options::{EngineArgs, SourceArgs, passed_over};
use super::output;
use super::signals::Signals;
use super::target::TargetArgs;
use crate::error::Result;
use crate::plan::explain::human_bytes;
use crate::tree::{DeviceStartup, Engine, Job, Report, Stage, State};

pub(super) const EXAMPLE: &str = "\
Example:
  touchdown load tests/fixtures/quickstart/ckpt --devices cpu:4 --spec '**/kernel=_,device'
  touchdown load tests/fixtures/quickstart/ckpt --cast '**@float=bfloat16' --dump out";

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    source: SourceArgs,
    #[command(flatten)]
    target: TargetArgs,
    #[command(flatten)]
    engine: EngineArgs,
    /// Write what landed: DIR/dump.json and one raw file a distinct shard.
    #[arg(long, value_name = "DIR")]
    dump: Option<PathBuf>,
    /// One JSON object with figures.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args, quiet: bool, signals: &Signals) -> Result<ExitCode> {
    let (checkpoint, engine, state) = args.source.with(quiet, |checkpoint| {
        if let Some(dir) = &args.dump {
            dump::check(dir)?;
        }
        let target = args.target.build(checkpoint)?;
        let engine = Engine::new(args.engine.options()?)?;
        let job = engine.load(checkpoint, &target)?;
        let state = if !quiet && std::io::stderr().is_terminal() { watch(job)? } else { job.wait()? };
        Ok((checkpoint.clone(), engine, state))
    })?;
    if let Some(dir) = &args.dump {
        signals.hold();
        dump::dump(&state, dir, &|| signals.exit_code().is_some())?;
    }
    let report = state.report();
    if args.json {
        let mut document = document(&state, report, engine.device_startup());
        let description = checkpoint.description();
        if let Some(step) = &description.step {
            let row = |(name, reason): (&str, &str)| json!({"name": name, "reason": reason});
            document["step"] = json!(step.number);
            document["passed_over"] = passed_over(description).map(row).collect();
        }
        output::json(&document)?;
    } else {
        output::text(&summary(&state, report, engine.device_startup()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Waits with a progress bar.
fn watch(job: Job) -> Result<State> {
    let bar = ProgressBar::new(job.progress().bytes_total);
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {bytes}/{total_bytes} {bytes_per_sec} {msg}") {
        bar.set_style(style);
    }
    while !job.is_finished() {
        let progress = job.progress();
        bar.set_position(progress.bytes_read);
        bar.set_message(format!("{}/{} arrays", progress.leaves_done, progress.leaves_total));
        std::thread::sleep(Duration::from_millis(50));
    }
    bar.finish_and_clear();
    job.wait()
}

/// The JSON object of `load`, schema 1.
fn document(state: &State, report: &Report, startup: DeviceStartup) -> Json {
    let stage = |stage: &Stage| json!({"busy": stage.busy.as_secs_f64(), "blocked": stage.blocked.as_secs_f64(), "bytes": stage.bytes});
    let devices = report.devices.iter().map(|(device, bytes)| json!({"device": device.to_string(), "bytes": bytes}));
    let paths = |paths: &[crate::keypath::KeyPath]| paths.iter().map(ToString::to_string).collect::<Vec<_>>();
    json!({
        "schema": 1,
        "seconds": report.elapsed.as_secs_f64(),
        "bytes_logical": report.bytes_logical,
        "bytes_needed": report.bytes_needed,
        "bytes_read": report.bytes_read,
        "bytes_decoded": report.bytes_decoded,
        "bytes_unverified": report.bytes_unverified,
        "peak_host_bytes": report.peak_host_bytes,
        "peak_device_bytes": report.peak_device_bytes,
        "launches": report.launches,
        "leaves": state.leaves().len(),
        "lossy": report.lossy,
        "skipped": paths(&report.skipped),
        "missing": paths(&report.missing),
        "startup": {"cuda": startup.cuda.as_secs_f64(), "pin": startup.pin.as_secs_f64()},
        "stages": {
            "open": stage(&report.stages.open),
            "plan": stage(&report.stages.plan),
            "read": stage(&report.stages.read),
            "decode": stage(&report.stages.decode),
            "transform": stage(&report.stages.transform),
            "copy": stage(&report.stages.copy),
        },
        "devices": devices.collect::<Vec<_>>(),
    })
}

fn summary(state: &State, report: &Report, startup: DeviceStartup) -> String {
    let seconds = report.elapsed.as_secs_f64();
    let rate = report.bytes_logical as f64 / seconds.max(1e-9) / f64::from(1u32 << 30);
    let mut text = format!(
        "{} leaves, {} in {seconds:.3} s ({rate:.2} GiB/s)\n",
        state.leaves().len(),
        human_bytes(report.bytes_logical)
    );
    text += &format!(
        "needed {}, read {} in {} requests, decoded {}, unverified {}\n",
        human_bytes(report.bytes_needed),
        human_bytes(report.bytes_read),
        report.requests,
        human_bytes(report.bytes_decoded),
        human_bytes(report.bytes_unverified)
    );
    text += &format!("peak host memory {}\n", human_bytes(report.peak_host_bytes));
    if report.peak_device_bytes > 0 {
        let (cuda, pin) = (startup.cuda.as_secs_f64(), startup.pin.as_secs_f64());
        text += &format!("peak device memory {}\n", human_bytes(report.peak_device_bytes));
        text += &format!("before that: {cuda:.3} s to start devices, {pin:.3} s to lock staging memory\n");
    }
    for (device, bytes) in &report.devices {
        text += &format!("  {device}  {}\n", human_bytes(*bytes));
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
