//! The command line: one verb, one file.
//!
//! Raw arguments are clap's structs in each verb's file; `options.rs` turns them into the library's types and holds all
//! validation. stdout is data, stderr is everything else. `exit.rs` is the only place that knows exit codes.

#![allow(clippy::print_stdout, clippy::print_stderr)] // printing is this folder's job

mod bench;
mod cat;
mod convert;
mod diff;
mod doctor;
mod dump;
mod exit;
mod kv;
mod load;
mod ls;
mod options;
mod output;
mod plan;
mod prune;
mod repair;
mod rules;
mod seal;
mod signals;
mod steps;
mod target;
mod verify;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use self::signals::Signals;
use crate::error::{ErrorKind, Result};

/// Lands Orbax checkpoints on devices: native reader, resharding planner and loader.
#[derive(Debug, Parser)]
#[command(name = "touchdown", version, about, after_help = AFTER_HELP)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
    /// Print less: no progress, no notes.
    #[arg(short, long, global = true)]
    quiet: bool,
    /// Log more to stderr (-vv for even more); RUST_LOG wins.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    /// When to colour errors and hints.
    #[arg(long, global = true, value_enum, default_value = "auto")]
    color: clap::ColorChoice,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// List the leaves: path, type, shape, saved sharding, size.
    #[command(after_help = ls::EXAMPLE)]
    Ls(ls::Args),
    /// Load shards onto devices, and write what landed if asked.
    #[command(after_help = load::EXAMPLE)]
    Load(Box<load::Args>),
    /// Show what a load would read, decode and hold, without reading data.
    #[command(after_help = plan::EXAMPLE)]
    Plan(Box<plan::Args>),
    /// Turn a checkpoint into another: format, types, chunks, compression.
    #[command(after_help = convert::EXAMPLE)]
    Convert(Box<convert::Args>),
    /// Print the values of one leaf.
    #[command(after_help = cat::EXAMPLE)]
    Cat(cat::Args),
    /// List the keys of an OCDBT database, or print one value.
    #[command(after_help = kv::EXAMPLE)]
    Kv(kv::Args),
    /// Check the structure and every reference; with --deep every stored value.
    #[command(after_help = verify::EXAMPLE)]
    Verify(verify::Args),
    /// Write checksums of all values beside them, for checkpoints that have none.
    #[command(after_help = seal::EXAMPLE)]
    Seal(seal::Args),
    /// Copy a checkpoint and rebuild the manifest that it lacks.
    #[command(after_help = repair::EXAMPLE)]
    Repair(repair::Args),
    /// Compare two checkpoints leaf by leaf.
    #[command(after_help = diff::EXAMPLE)]
    Diff(diff::Args),
    /// List the steps of a root: when, size, metrics, state, items.
    #[command(after_help = steps::EXAMPLE)]
    Steps(steps::Args),
    /// Remove the steps of a root that need not be kept.
    #[command(after_help = prune::EXAMPLE)]
    Prune(prune::Args),
    /// Measure how fast it loads here, beside what this machine can do with the same bytes.
    #[command(after_help = bench::EXAMPLE)]
    Bench(bench::Args),
    /// Show what this machine offers: reads, memory, devices.
    #[command(after_help = doctor::EXAMPLE)]
    Doctor(doctor::Args),
    /// Print a shell completion script.
    #[command(
        after_help = "Example:\n  touchdown completions bash > ~/.local/share/bash-completion/completions/touchdown"
    )]
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

/// Runs the program.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version go to stdout with 0, usage errors to stderr with 2; a closed pipe is not worth a word.
            let code = u8::try_from(error.exit_code()).unwrap_or(2);
            let _ = error.print();
            return ExitCode::from(code);
        }
    };
    start_logging(&cli);
    let signals = match Signals::install() {
        Ok(signals) => signals,
        Err(error) => return exit::report(&error, cli.color),
    };
    match run(&cli, &signals) {
        Ok(code) => code,
        Err(error) => {
            let code = exit::report(&error, cli.color);
            signals.exit_code().filter(|_| error.kind() == ErrorKind::Cancelled).map_or(code, ExitCode::from)
        }
    }
}

fn run(cli: &Cli, signals: &Signals) -> Result<ExitCode> {
    match &cli.verb {
        Verb::Ls(args) => ls::run(args, cli.quiet),
        Verb::Load(args) => load::run(args, cli.quiet, signals),
        Verb::Plan(args) => plan::run(args, cli.quiet),
        Verb::Convert(args) => convert::run(args, cli.quiet, signals),
        Verb::Cat(args) => cat::run(args, cli.quiet),
        Verb::Kv(args) => kv::run(args, cli.quiet),
        Verb::Verify(args) => verify::run(args),
        Verb::Seal(args) => seal::run(args, signals),
        Verb::Repair(args) => repair::run(args, signals),
        Verb::Diff(args) => diff::run(args, cli.quiet),
        Verb::Steps(args) => steps::run(args),
        Verb::Prune(args) => prune::run(args, signals),
        Verb::Bench(args) => bench::run(args, cli.quiet),
        Verb::Doctor(args) => doctor::run(args),
        Verb::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "touchdown", &mut script);
            output::bytes(&script)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// See [`crate::fuzzing`].
#[cfg(any(test, fuzzing))]
pub(crate) use target::fuzz as fuzz_target;

/// Logs to stderr: warnings, more with -v, or what RUST_LOG says.
fn start_logging(cli: &Cli) {
    let level = match (cli.quiet, cli.verbose) {
        (true, _) => "error",
        (false, 0) => "warn",
        (false, 1) => "info",
        (false, 2) => "debug",
        (false, _) => "trace",
    };
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| level.into());
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // A second subscriber can only be one that the embedding test installed.
    let _ = log.with_ansi(exit::colored(cli.color)).try_init();
}

const AFTER_HELP: &str = "\
Exit codes:
  0    ok
  1    the answer is no (verify found damage, diff differs)
  2    the arguments can be mended (usage, no match, shape, axis, missing leaf)
  3    the path is missing, or what the checkpoint says is wrong
  4    the environment (permission, I/O error, memory, no device or driver)
  130, 143  ended by SIGINT, SIGTERM

Start with:
  touchdown ls CHECKPOINT";
