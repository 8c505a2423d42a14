//! `touchdown prune`: removes the steps of a root that need not be kept.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde_json::json;

use super::output;
use super::signals::Signals;
use super::steps::{row, size};
use crate::error::{Error, ErrorKind, Result, printable};
use crate::plan::explain::human_bytes;
use crate::training::{PreservationPolicy, PruneReport, Pruning, SeriesStep, prune};

pub(super) const EXAMPLE: &str = "A step that any of the options keeps stays. Steps that are not whole do not count, and stay.\n\nExample:\n  touchdown prune tests/fixtures/v1_training_steps/ckpt --keep-latest 1 --keep-every 5 --dry-run";

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// A directory that holds steps.
    root: PathBuf,
    /// Keep the latest N steps.
    #[arg(long, value_name = "N")]
    keep_latest: Option<usize>,
    /// Keep the steps that are multiples of N.
    #[arg(long, value_name = "N")]
    keep_every: Option<u64>,
    /// Keep the best N steps by a metric, and those without it: `3:accuracy` (largest), `3:-loss` (smallest).
    #[arg(long, value_name = "N:METRIC", value_parser = best)]
    keep_best: Vec<(usize, String)>,
    /// The prefix of the steps' names, for a root with several series; '' for names without one.
    #[arg(long)]
    prefix: Option<String>,
    /// Only say what would be removed.
    #[arg(long)]
    dry_run: bool,
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args, signals: &Signals) -> Result<ExitCode> {
    let latest = args.keep_latest.map(PreservationPolicy::latest);
    let every = args.keep_every.map(PreservationPolicy::every_steps);
    let best = args.keep_best.iter().map(|(count, metric)| PreservationPolicy::best(*count, metric.as_str()));
    let policies: Vec<PreservationPolicy> = latest.into_iter().chain(every).chain(best).collect();
    if policies.is_empty() {
        return Err(Error::invalid("nothing says which steps are kept")
            .expected("one or more of --keep-latest, --keep-every, --keep-best"));
    }
    let pruning = Pruning {
        policy: PreservationPolicy::any(policies),
        prefix: args.prefix.clone(),
        dry_run: args.dry_run,
        // A step that is being removed goes first: what was set aside for that does not stay.
        stop: signals.hold(),
        ..Pruning::default()
    };
    let report = prune(&args.root, &pruning)?;
    let freed: u64 = report.removed.iter().map(|(_, bytes)| bytes).sum();
    if args.json {
        let rows =
            |steps: &[SeriesStep]| steps.iter().map(|step| Ok(row(step, size(step)?))).collect::<Result<Vec<_>>>();
        let paths = |paths: &[PathBuf]| paths.iter().map(|path| shown(path)).collect::<Vec<_>>();
        output::json(&json!({
            "schema": 1,
            "dry_run": args.dry_run,
            "kept": rows(&report.kept)?,
            "removed": report.removed.iter().map(|(step, bytes)| row(step, *bytes)).collect::<Vec<_>>(),
            "skipped": rows(&report.skipped)?,
            "bytes": freed,
            "restored": paths(&report.restored),
            "leftovers": paths(&report.leftovers),
            "failed": report.failed.iter().map(|(path, reason)| json!({"path": shown(path), "reason": reason})).collect::<Vec<_>>(),
        }))?;
        return failures(&report);
    }
    let (verb, restored, summary) = match args.dry_run {
        true => ("would remove", "would put back", "to be removed"),
        false => ("removed", "put back", "removed"),
    };
    let kept = report.kept.iter().map(|step| vec![step.name.clone(), "kept".to_owned()]);
    let removed =
        report.removed.iter().map(|(step, bytes)| vec![step.name.clone(), verb.to_owned(), human_bytes(*bytes)]);
    let skipped = report.skipped.iter().map(|step| {
        let reason = format!("not whole, left alone: {}", step.reason().unwrap_or_default());
        vec![step.name.clone(), reason]
    });
    let mut text = output::table(&kept.chain(removed).chain(skipped).collect::<Vec<_>>());
    for step in &report.restored {
        text += &format!("{restored} what an interrupted overwrite had moved aside: {}\n", printable(&shown(step)));
    }
    for leftover in &report.leftovers {
        text += &format!("{verb} what a crash had left: {}\n", printable(&shown(leftover)));
    }
    let counts = (report.kept.len(), report.removed.len());
    text += &format!("{} kept, {} {summary}, {}\n", counts.0, counts.1, human_bytes(freed));
    output::text(&text)?;
    failures(&report)
}

/// What could not be removed is an error after all the rest was done.
fn failures(report: &PruneReport) -> Result<ExitCode> {
    if report.failed.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    Err(Error::new(ErrorKind::Io, "some of it could not be removed")
        .lines(report.failed.iter().map(|(path, reason)| format!("{}: {reason}", shown(path))))
        .hint("run it again once that can be removed"))
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

fn best(text: &str) -> Result<(usize, String), String> {
    let parts = text.split_once(':').and_then(|(count, metric)| Some((count.parse().ok()?, metric.to_owned())));
    parts.filter(|(_, metric)| !metric.is_empty()).ok_or_else(|| "expected N:METRIC or N:-METRIC".to_owned())
}
