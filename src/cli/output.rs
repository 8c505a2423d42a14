//! What goes to stdout, and how sizes read.

use std::io::{BufWriter, Write};

use serde_json::{Value as Json, json};

use crate::error::{Error, ErrorKind, Result, printable};
use crate::io::store::{Leftover, LeftoverKind};

/// Writes bytes to stdout.
pub(super) fn bytes(bytes: &[u8]) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(bytes).and_then(|()| out.flush()).map_err(failed)
}

/// Writes text to stdout.
pub(super) fn text(text: &str) -> Result<()> {
    bytes(text.as_bytes())
}

/// Writes one JSON object and a line end to stdout.
pub(super) fn json(value: &Json) -> Result<()> {
    let mut out = BufWriter::new(std::io::stdout().lock());
    let written = serde_json::to_writer(&mut out, value).map_err(std::io::Error::from);
    written.and_then(|()| out.write_all(b"\n")).and_then(|()| out.flush()).map_err(failed)
}

/// Says something on stderr that is no error.
pub(super) fn note(text: &str) {
    // Where stderr is closed there is nobody to tell.
    let _ = writeln!(std::io::stderr(), "note: {}", printable(text));
}

fn failed(error: std::io::Error) -> Error {
    Error::new(ErrorKind::Io, "cannot write to stdout").caused_by(error)
}

/// Rows of text in columns as wide as they need to be; the last column is not padded.
pub(super) fn table(rows: &[Vec<String>]) -> String {
    let shown: Vec<Vec<String>> =
        rows.iter().map(|row| row.iter().map(|cell| printable(cell).into_owned()).collect()).collect();
    let rows = shown.as_slice();
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        for (column, cell) in row.iter().enumerate() {
            text += cell;
            if column + 1 < row.len() {
                text.extend(std::iter::repeat_n(' ', widths[column] - cell.chars().count() + 2));
            }
        }
        text.truncate(text.trim_end_matches(' ').len());
        text.push('\n');
    }
    text
}

/// A shape as `[3, 4]`.
pub(super) fn shape(shape: &[u64]) -> String {
    format!("{shape:?}")
}

/// What crashed saves left behind, for people.
pub(super) fn leftovers_text(leftovers: &[Leftover]) -> String {
    let line = |leftover: &Leftover| {
        let what = match leftover.kind {
            LeftoverKind::Staging => "of an unfinished save or removal; it can be removed",
            LeftoverKind::Replaced => {
                "an old checkpoint that was being replaced; if there is none of its name, rename it back"
            }
        };
        format!("left over: {}, {what}\n", printable(&leftover.path.display().to_string()))
    };
    leftovers.iter().map(line).collect()
}

/// The same as JSON.
pub(super) fn leftovers_json(leftovers: &[Leftover]) -> Json {
    let entry = |leftover: &Leftover| {
        let kind = match leftover.kind {
            LeftoverKind::Staging => "staging",
            LeftoverKind::Replaced => "replaced",
        };
        json!({"path": leftover.path.display().to_string(), "kind": kind, "name": leftover.name})
    };
    leftovers.iter().map(entry).collect()
}
