//! Names near a misspelt one, for error messages.

use crate::limits::NEAREST_NAMES_MAX;

/// The names nearest to `wanted` by edit distance, nearest first; those that share less than half are left out, unless
/// there are only a few names altogether, or none shares more.
pub(crate) fn nearest<'a>(wanted: &str, names: impl IntoIterator<Item = &'a str>) -> Vec<&'a str> {
    let wanted: Vec<char> = wanted.chars().take(COMPARED_CHARS_MAX).collect();
    let mut ranked: Vec<(usize, &str)> = names.into_iter().map(|name| (distance(&wanted, name), name)).collect();
    ranked.sort_unstable();
    if ranked.len() > NEAREST_NAMES_MAX {
        let shares = |(distance, name): &(usize, &str)| 2 * distance <= wanted.len().max(name.chars().count());
        if ranked.iter().any(shares) {
            ranked.retain(shares);
        }
        ranked.truncate(NEAREST_NAMES_MAX);
    }
    ranked.into_iter().map(|(_, name)| name).collect()
}

/// Levenshtein's distance: how many characters must be inserted, removed or replaced.
fn distance(wanted: &[char], name: &str) -> usize {
    let mut row: Vec<usize> = (0..=wanted.len()).collect();
    for (above, char) in name.chars().take(COMPARED_CHARS_MAX).enumerate() {
        let mut diagonal = above;
        let mut left = above + 1;
        let mut cells = row.iter_mut();
        if let Some(first) = cells.next() {
            *first = left;
        }
        for (cell, other) in cells.zip(wanted) {
            let replaced = diagonal + usize::from(char != *other);
            diagonal = *cell;
            *cell = replaced.min(left + 1).min(*cell + 1);
            left = *cell;
        }
    }
    row.last().copied().unwrap_or_default()
}

/// Of longer names only the beginning is compared, so that a file of long names costs no time.
const COMPARED_CHARS_MAX: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances() {
        let distance = |a: &str, b: &str| distance(&a.chars().collect::<Vec<_>>(), b);
        let cases = [
            ("", "", 0),
            ("abc", "", 3),
            ("", "abc", 3),
            ("kitten", "sitting", 3),
            ("é", "e", 1),
            ("state", "stat", 1),
        ];
        for (a, b, expected) in cases {
            assert_eq!(distance(a, b), expected, "{a} {b}");
        }
    }

    #[test]
    fn near_names_come_first_and_far_ones_only_where_there_are_few() {
        assert_eq!(nearest("parms", ["opt", "params", "state"]), ["params", "opt", "state"]);
        assert_eq!(nearest("parms", ["opt", "params", "state", "ema"]), ["params"]);
        assert_eq!(nearest("zzzzzzzz", ["opt", "params", "state", "ema"]).len(), NEAREST_NAMES_MAX);
    }
}
