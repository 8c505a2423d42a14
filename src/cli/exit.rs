//! Exit codes and how errors are printed.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use crate::error::{Error, ErrorKind, printable};

/// The answer is no.
pub(super) const NO: u8 = 1;

/// The exit code of an error.
fn code(kind: ErrorKind) -> u8 {
    match kind {
        ErrorKind::Invalid | ErrorKind::Exists | ErrorKind::Budget => 2,
        ErrorKind::NotFound | ErrorKind::Corrupt | ErrorKind::Unsupported => 3,
        ErrorKind::Io | ErrorKind::OutOfMemory | ErrorKind::Device | ErrorKind::Busy | ErrorKind::Bug => 4,
        ErrorKind::Cancelled => 130,
    }
}

/// Prints `error:`, `caused by:` and `hint:` lines and gives the exit code.
pub(super) fn report(error: &Error, color: clap::ColorChoice) -> ExitCode {
    if is_broken_pipe(error) {
        return ExitCode::SUCCESS;
    }
    let (red, cyan, plain) = if colored(color) { ("\x1b[1;31m", "\x1b[1;36m", "\x1b[0m") } else { ("", "", "") };
    let mut text = format!("{red}error:{plain} {error}\n");
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        let said = error.to_string();
        // Ours is escaped but for the lines that it means.
        let shown = if error.is::<Error>() { said.into() } else { printable(&said) };
        text += &format!("caused by: {shown}\n");
        cause = error.source();
    }
    if let Some(hint) = error.advice() {
        text += &format!("{cyan}hint:{plain} {}\n", printable(hint));
    }
    // Where stderr is closed there is nobody to tell.
    let _ = std::io::stderr().write_all(text.as_bytes());
    ExitCode::from(code(error.kind()))
}

/// Whether to colour what goes to stderr.
pub(super) fn colored(color: clap::ColorChoice) -> bool {
    match color {
        clap::ColorChoice::Always => true,
        clap::ColorChoice::Never => false,
        clap::ColorChoice::Auto => {
            std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()) && std::io::stderr().is_terminal()
        }
    }
}

/// What was said, or not because nobody reads it any more, which is no error.
pub(super) fn or_closed(said: crate::error::Result<()>) -> crate::error::Result<()> {
    said.or_else(|error| if is_broken_pipe(&error) { Ok(()) } else { Err(error) })
}

fn is_broken_pipe(error: &Error) -> bool {
    let source = std::error::Error::source(error);
    let io = source.and_then(|source| source.downcast_ref::<std::io::Error>());
    io.is_some_and(|io| io.kind() == std::io::ErrorKind::BrokenPipe)
}
