//! `touchdown diff`: how two checkpoints differ.

use std::path::PathBuf;
use std::process::ExitCode;

use serde_json::json;

use super::exit;
use super::options::{EngineArgs, SourceArgs, is_failed_by_files, settled};
use super::output;
use crate::error::{Error, Result, printable};
use crate::keypath::KeyPath;
use crate::tree::diff::{Difference, diff};

pub(super) const EXAMPLE: &str =
    "Example:\n  touchdown diff tests/fixtures/quickstart/ckpt tests/fixtures/v1_basic/ckpt --json";

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// One checkpoint.
    a: PathBuf,
    /// The other.
    b: PathBuf,
    /// Which item of both.
    #[arg(long)]
    item: Option<String>,
    /// Which step of both, which are roots of steps: a number, `latest`, `best:METRIC` or `best:-METRIC`. Given twice: of the
    /// first, and of the second.
    #[arg(long)]
    step: Vec<String>,
    #[command(flatten)]
    engine: EngineArgs,
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args, quiet: bool) -> Result<ExitCode> {
    let (of_a, of_b) = match &args.step[..] {
        [] => (None, None),
        [both] => (Some(both), Some(both)),
        [a, b] => (Some(a), Some(b)),
        more => {
            return Err(Error::invalid("too many steps")
                .expected("`--step` once for both checkpoints, or twice")
                .found(more.join(", ")));
        }
    };
    let source = |path: &PathBuf, step: Option<&String>| {
        let (path, item, step) = (path.clone(), args.item.clone(), step.cloned());
        SourceArgs { path, item, step, force: false }.open(quiet)
    };
    let engine = args.engine.options()?;
    let both = || diff(&source(&args.a, of_a)?, &source(&args.b, of_b)?, &engine);
    let found = settled(&args.a, is_failed_by_files, || settled(&args.b, is_failed_by_files, &both))?;
    let same = found.only_a.is_empty() && found.only_b.is_empty() && found.different.is_empty();
    let said = if args.json {
        let paths = |paths: &[KeyPath]| paths.iter().map(ToString::to_string).collect::<Vec<_>>();
        let different = |difference: &Difference| {
            json!({
                "path": difference.path.to_string(), "what": difference.what, "a": difference.a, "b": difference.b,
                "elements": difference.elements,
            })
        };
        output::json(&json!({
            "schema": 1, "same": same, "equal": found.equal,
            "only_a": paths(&found.only_a), "only_b": paths(&found.only_b),
            "different": found.different.iter().map(different).collect::<Vec<_>>(),
        }))
    } else {
        let mut text = String::new();
        let shown = |path: &KeyPath| printable(&path.to_string()).into_owned();
        found.only_a.iter().for_each(|path| text += &format!("only in the first: {}\n", shown(path)));
        found.only_b.iter().for_each(|path| text += &format!("only in the second: {}\n", shown(path)));
        for difference in &found.different {
            let Difference { path, what, a, b, .. } = difference;
            text += &format!("{}: {what} {} | {}\n", shown(path), printable(a), printable(b));
        }
        text += &format!("{} leaves equal\n", found.equal);
        output::text(&text)
    };
    if same { said.map(|()| ExitCode::SUCCESS) } else { exit::or_closed(said).map(|()| ExitCode::from(exit::NO)) }
}
