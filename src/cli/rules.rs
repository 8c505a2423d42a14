//! Rules as the command line spells them: `GLOB=VALUE`, split at the last `=`.

use std::fmt::Display;

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::plan::Spec;
use crate::tree::{Filter, Pattern, Take};

/// A pattern: a glob, or with `--regex` a regular expression; `@float` and `@int` at its end restrict it.
pub(super) fn pattern(text: &str, regex: bool) -> Result<Pattern> {
    let (text, filter) = match (text.strip_suffix("@float"), text.strip_suffix("@int")) {
        (Some(text), _) => (text, Filter::Float),
        (_, Some(text)) => (text, Filter::Int),
        _ => (text, Filter::All),
    };
    let pattern = if regex { Pattern::regex(text)? } else { Pattern::glob(text) };
    Ok(pattern.only(filter))
}

/// A rule of an option.
pub(super) fn rule<V>(
    option: &str,
    text: &str,
    regex: bool,
    value: impl Fn(&str) -> Result<V>,
) -> Result<(Pattern, V)> {
    let (left, right) = split(option, text)?;
    let value = value(right).map_err(|error| error.at("rule", format_args!("`--{option} {text}`")))?;
    Ok((pattern(left, regex)?, value))
}

/// The two sides of a rule.
pub(super) fn split<'t>(option: &str, text: &'t str) -> Result<(&'t str, &'t str)> {
    text.rsplit_once('=')
        .ok_or_else(|| Error::invalid(format!("`--{option} {text}` is no rule")).expected("PATTERN=VALUE"))
}

pub(super) fn dtype(text: &str) -> Result<DType> {
    text.trim().parse().map_err(|error: crate::dtype::UnknownDType| Error::invalid(error.to_string()))
}

pub(super) fn spec(text: &str) -> Result<Spec> {
    Spec::parse(text)
}

/// A comma list of numbers; empty for none.
pub(super) fn numbers<N: std::str::FromStr>(text: &str) -> Result<Vec<N>>
where
    N::Err: Display,
{
    if text.trim().is_empty() {
        return Ok(Vec::new());
    }
    let parse = |part: &str| {
        part.trim().parse().map_err(|error| {
            Error::invalid(format!("`{part}` is no number: {error}")).expected("a comma list of numbers")
        })
    };
    text.split(',').map(parse).collect()
}

/// `DIM:INDEX` or `DIM:START..STOP`.
pub(super) fn take(text: &str) -> Result<Take> {
    let bad = || Error::invalid(format!("`{text}` is nothing to take")).expected("DIM:INDEX or DIM:START..STOP");
    let (dim, what) = text.split_once(':').ok_or_else(bad)?;
    let dim = dim.trim().parse().map_err(|_| bad())?;
    let number = |text: &str| text.trim().parse::<u64>().map_err(|_| bad());
    Ok(match what.split_once("..") {
        Some((start, stop)) => Take::Range { dim, start: number(start)?, stop: number(stop)? },
        None => Take::Index { dim, index: number(what)? },
    })
}

/// A number of bytes: `4096`, `512MiB`, `4GB`.
pub(super) fn bytes(text: &str) -> Result<u64> {
    const UNITS: [(&str, u64); 9] = [
        ("KiB", 1 << 10),
        ("MiB", 1 << 20),
        ("GiB", 1 << 30),
        ("TiB", 1 << 40),
        ("kB", 1_000),
        ("KB", 1_000),
        ("MB", 1_000_000),
        ("GB", 1_000_000_000),
        ("TB", 1_000_000_000_000),
    ];
    let text = text.trim();
    let bad = || {
        Error::invalid(format!("`{text}` is no number of bytes"))
            .expected("a number, or one with KiB, MiB, GiB, TiB, kB, MB, GB, TB")
    };
    let (digits, unit) = UNITS
        .iter()
        .find_map(|(name, unit)| text.strip_suffix(name).map(|digits| (digits, *unit)))
        .unwrap_or((text.strip_suffix('B').unwrap_or(text), 1));
    let number: f64 = digits.trim().parse().map_err(|_| bad())?;
    let bytes = number * unit as f64;
    #[allow(clippy::cast_possible_truncation, reason = "fractions of a byte are dropped, and it is below 2^63")]
    if bytes.is_finite() && (0.0..9e18).contains(&bytes) { Ok(bytes as u64) } else { Err(bad()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_parse_as_the_contract_says() {
        assert_eq!(bytes("512MiB").unwrap(), 512 << 20);
        assert_eq!(bytes("4GB").unwrap(), 4_000_000_000);
        assert_eq!(bytes("4096").unwrap(), 4096);
        assert!(bytes("much").is_err() && bytes("-1").is_err());
        assert_eq!(split("cast", "a=b=f32").unwrap(), ("a=b", "f32"));
        assert_eq!(take("0:3").unwrap(), Take::Index { dim: 0, index: 3 });
        assert_eq!(take("1:2..5").unwrap(), Take::Range { dim: 1, start: 2, stop: 5 });
        assert!(take("3").is_err());
        assert_eq!(numbers::<u64>("8, 16").unwrap(), [8, 16]);
        assert!(numbers::<u64>("").unwrap().is_empty());
    }
}
