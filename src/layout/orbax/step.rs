//! Names of directories: steps, and what is not finished or not ours.

/// Parses the name of a step directory, `[<prefix>_]<n>`: all digits, or all digits after the last `_`.
///
/// `5`, `00005` and `checkpoint_5` are step 5; `step-9999` is none (name it by an explicit path).
pub fn parse(name: &str) -> Option<u64> {
    let digits = name.rsplit_once('_').map_or(name, |(_, digits)| digits);
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    digits.parse().ok()
}

/// Whether this is the name of a save that was never finished.
///
/// Orbax writes to `<name>.orbax-checkpoint-tmp` (older releases append `-<n>`) and renames; partial saves lie in
/// `<name>.partial_save..`, T5X's in `<name>.tmp-<n>`.
pub fn is_temporary(name: &str) -> bool {
    finished_name(name).is_some()
}

/// The name that an unfinished save was to get; `None` for any other name.
pub fn finished_name(name: &str) -> Option<&str> {
    let orbax = TEMPORARY_MARKS.iter().find_map(|mark| name.split_once(mark));
    let t5x = || {
        name.split_once(".tmp-")
            .filter(|(_, stamp)| !stamp.is_empty() && stamp.bytes().all(|byte| byte.is_ascii_digit()))
    };
    orbax.or_else(t5x).map(|(finished, _)| finished)
}

/// Whether a child directory with this name is never an item or a step: bookkeeping of Orbax and of other tools.
pub fn is_reserved(name: &str) -> bool {
    name.starts_with('.') || RESERVED.contains(&name)
}

const TEMPORARY_MARKS: [&str; 2] = [".orbax-checkpoint-tmp", ".partial_save"];

/// `AUTO` and the deletion record are names that Orbax refuses to save under; `descriptor` is in published Gemma files.
const RESERVED: [&str; 4] = ["AUTO", super::checkpoint::DELETION_FILE, "descriptor", "lost+found"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn step_names() {
        let cases =
            [("0", 0), ("00005", 5), ("ckpt_00012", 12), ("a_b_7", 7), ("_3", 3), ("18446744073709551615", u64::MAX)];
        for (name, step) in cases {
            assert_eq!(parse(name), Some(step), "{name}");
        }
        for name in ["", "_", "a_", "step-9", "5a", "-5", "+5", "a_5.orbax-checkpoint-tmp", "18446744073709551616", "٣"]
        {
            assert_eq!(parse(name), None, "{name}");
        }
    }

    #[test]
    fn unfinished_names() {
        let cases = [
            ("2.orbax-checkpoint-tmp", "2"),
            ("ckpt_2.orbax-checkpoint-tmp-1690000000", "ckpt_2"),
            ("x.partial_save", "x"),
            ("checkpoint_10.tmp-1690000000", "checkpoint_10"),
        ];
        for (name, finished) in cases {
            assert_eq!(finished_name(name), Some(finished));
        }
        assert!(!is_temporary("x.tmp-") && !is_temporary("x.tmp-a") && !is_temporary("2"));
    }
}
