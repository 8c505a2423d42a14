//! `touchdown steps`: the steps of a root.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value as Json, json};

use super::output;
use crate::error::{Error, Result, printable};
use crate::io::store::leftovers;
use crate::plan::explain::human_bytes;
use crate::training::{SeriesStep, root_metadata, steps};
use crate::tree::EngineOptions;

pub(super) const EXAMPLE: &str = "Example:\n  touchdown steps tests/fixtures/v1_training_steps/ckpt";

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// A directory that holds steps.
    root: PathBuf,
    /// Read, check and decode every stored value of every step, too.
    #[arg(long)]
    deep: bool,
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let found = steps(&args.root, args.deep, &EngineOptions::default())?;
    if found.is_empty() {
        return Err(Error::not_found("the directory holds no steps")
            .at("path", args.root.display())
            .hint("`touchdown ls` tells what a path is"));
    }
    let sizes = found.iter().map(size).collect::<Result<Vec<_>>>()?;
    let left = leftovers(&args.root).unwrap_or_default();
    if args.json {
        let mut document = json!({
            "schema": 1,
            "latest": latest(&found).map(|step| step.step),
            "custom_metadata": null,
            "steps": found.iter().zip(&sizes).map(|(step, size)| row(step, *size)).collect::<Vec<_>>(),
            "leftovers": output::leftovers_json(&left),
        });
        match root_metadata(&args.root) {
            Ok(custom) => document["custom_metadata"] = json!(custom),
            // The steps do not depend on it.
            Err(error) if error.is_of_one_path() => document["custom_metadata_error"] = json!(error.to_string()),
            Err(error) => return Err(error),
        }
        output::json(&document)?;
    } else {
        let head = ["step", "when", "size", "state", "items", "metrics"].map(str::to_owned).to_vec();
        let rows = found.iter().zip(&sizes).map(|(step, size)| {
            let items: Vec<&str> = step.items.iter().map(|item| item.name.as_str()).collect();
            let items = if items == [""] { "(bare)".to_owned() } else { items.join(", ") };
            let state = step.reason().unwrap_or("whole").to_owned();
            vec![step.name.clone(), utc(step.time), human_bytes(*size), state, items, metrics(step)]
        });
        let mut text = output::table(&std::iter::once(head).chain(rows).collect::<Vec<_>>());
        if let Err(error) = root_metadata(&args.root) {
            text += &format!("the root's metadata cannot be read: {}\n", printable(&error.to_string()));
        }
        text += &output::leftovers_text(&left);
        let whole = found.iter().filter(|step| step.is_whole()).count();
        let latest = latest(&found).map_or("none whole".to_owned(), |step| format!("latest {}", step.step));
        text += &format!("{} steps, {whole} whole, {latest}, {}\n", found.len(), human_bytes(sizes.iter().sum()));
        output::text(&text)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn latest(found: &[SeriesStep]) -> Option<&SeriesStep> {
    found.iter().rfind(|step| step.is_whole())
}

/// The row of a step in `steps` and `prune`.
pub(super) fn row(step: &SeriesStep, size: u64) -> Json {
    let mut row = json!({
        "step": step.step,
        "name": step.name,
        "state": if step.is_whole() { "whole" } else { "incomplete" },
        "time": utc(step.time),
        "init_ns": step.init_ns,
        "commit_ns": step.commit_ns,
        "bytes": size,
        "items": step.items.iter().map(|item| json!({"name": item.name, "kind": item.kind.as_str()})).collect::<Vec<_>>(),
        "metrics": step.metrics.as_deref(),
        "custom_metadata": step.custom_metadata,
    });
    if let Some(reason) = step.reason() {
        row["reason"] = json!(reason);
    }
    if let Some(reason) = &step.metrics_damage {
        row["metrics_error"] = json!(reason);
    }
    row
}

/// Bytes of a step; nothing of one that is removed meanwhile, or of which not even that can be told.
pub(super) fn size(step: &SeriesStep) -> Result<u64> {
    match step.size_bytes() {
        Err(_) if !step.path.exists() || !step.is_whole() => Ok(0),
        size => size,
    }
}

fn metrics(step: &SeriesStep) -> String {
    let Some(metrics) = step.metrics.as_deref() else {
        return step.metrics_damage.clone().unwrap_or_default();
    };
    let shown = |(name, value): (&String, &Json)| match value {
        Json::String(text) => format!("{name}={text}"),
        value => format!("{name}={value}"),
    };
    match metrics.as_object() {
        Some(members) => members.iter().map(shown).collect::<Vec<_>>().join(" "),
        None => metrics.to_string(),
    }
}

/// A time as `2026-01-31T12:34:56Z`.
pub(super) fn utc(time: SystemTime) -> String {
    let seconds = match time.duration_since(UNIX_EPOCH) {
        Ok(since) => i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        Err(before) => i64::try_from(before.duration().as_secs()).map_or(i64::MIN, |seconds| -seconds),
    };
    let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    // Days since 1 March 0000, in eras of 400 years of which each month starts at a fixed day of its year.
    let day = days + 719_468;
    let (era, of_era) = (day.div_euclid(146_097), day.rem_euclid(146_097));
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn times_are_utc() {
        // As `date -u -d @N +%FT%TZ` says.
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (951_868_800, "2000-03-01T00:00:00Z"),
            (1_795_444_350, "2026-11-23T14:32:30Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(utc(UNIX_EPOCH + Duration::from_secs(seconds)), text);
        }
        assert_eq!(utc(UNIX_EPOCH - Duration::from_secs(1)), "1969-12-31T23:59:59Z");
    }
}
