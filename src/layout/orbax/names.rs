//! What of a tree or of an item's name cannot be saved: names that collide, leave the directory, or are taken.
//!
//! Orbax writes such trees and loses data silently. Everything is found before anything is written, and all at once.
//! Must not know: what the leaves hold.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::metadata::{Entry, ValueType, collisions, key_prefix, param_name, shared_names};
use super::strings::{self, NoPlace};
use super::{checkpoint, step, sums, tree};
use crate::error::{Error, counted};
use crate::keypath::{Key, KeyPath};
use crate::limits::{FILE_NAME_BYTES_MAX, KEY_PATH_DEPTH_MAX, LEAVES_MAX, PARAM_NAME_BYTES_MAX, PATH_BYTES_MAX};

/// Where the arrays of an item are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    /// In an OCDBT database: names are keys.
    Ocdbt,
    /// In files below the item: names are directories.
    Files,
}

/// One thing that cannot be saved.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unsavable {
    /// No leaf at all; Orbax refuses such trees, and `{"a": None}` is none.
    #[error("the tree has no leaf, not even an empty container")]
    EmptyTree,
    /// More leaves than a reader takes.
    #[error("the tree has {0} leaves, more than {LEAVES_MAX}")]
    ManyLeaves(usize),
    /// A path with too many elements.
    #[error("a leaf lies {0} levels deep, deeper than {KEY_PATH_DEPTH_MAX}")]
    Deep(usize),
    /// Two leaves with one path.
    #[error("`{0}` is given twice")]
    Duplicate(KeyPath),
    /// A leaf that other leaves lie in.
    #[error("`{path}` is a leaf, and `{below}` lies in it")]
    LeafInLeaf {
        /// The leaf.
        path: KeyPath,
        /// The first leaf below it.
        below: KeyPath,
    },
    /// A container with both positions and names.
    #[error("`{0}` has both positions and names")]
    Mixed(KeyPath),
    /// A sequence without one of its positions.
    #[error("`{path}` has no element at position {position}, but later ones")]
    Gap {
        /// The sequence.
        path: KeyPath,
        /// The first position that is missing.
        position: u64,
    },
    /// Leaves that have the same storage name.
    #[error("{} are all stored under the name `{name}`", list(.paths))]
    Collision {
        /// The name.
        name: String,
        /// The leaves.
        paths: Vec<KeyPath>,
    },
    /// A name that is too long for a database's keys.
    #[error("`{path}` has a name of {len} bytes, longer than {PARAM_NAME_BYTES_MAX}")]
    LongName {
        /// The leaf.
        path: KeyPath,
        /// The length of its name.
        len: usize,
    },
    /// A name that is no directory below the item.
    #[error("`{path}` cannot be a directory of the name `{name}`: {reason}")]
    Directory {
        /// The leaf.
        path: KeyPath,
        /// Its name.
        name: String,
        /// What is wrong with the name.
        reason: BadName,
    },
    /// An array whose directory lies where another one has its chunks.
    #[error("`{path}` would lie among the chunks of `{other}`")]
    AmongChunks {
        /// The leaf.
        path: KeyPath,
        /// The other leaf.
        other: KeyPath,
    },
    /// A string that has no place in `_strings.json`.
    #[error("`{path}`: {reason}")]
    Text {
        /// The leaf.
        path: KeyPath,
        /// Why it has none.
        reason: NoPlace,
    },
}

/// What is wrong with the name of a file, a directory or an item.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadName {
    /// An empty name or element.
    #[error("an empty element")]
    Empty,
    /// It begins with `/`.
    #[error("it is absolute")]
    Absolute,
    /// An element is `.` or `..`.
    #[error("an element is `.` or `..`")]
    Dots,
    /// A NUL byte.
    #[error("it has a NUL byte")]
    Nul,
    /// A backslash, which Orbax takes for a slash.
    #[error("it has a backslash")]
    Backslash,
    /// A slash in the name of an item.
    #[error("it has a slash")]
    Slash,
    /// An element or the whole is too long.
    #[error("it is longer than a file system allows")]
    Long,
    /// The name means something else.
    #[error("the name is reserved")]
    Reserved,
    /// The name of an unfinished save.
    #[error("the name is that of an unfinished save")]
    Temporary,
    /// It begins with `.`.
    #[error("it is hidden")]
    Hidden,
}

/// Finds everything that keeps the tree of these leaves from being saved and read again, in the order of the variants of
/// [`Unsavable`] and of the paths.
///
/// # Errors
/// What was found, if anything was.
pub fn check_tree(entries: &[Entry], storage: Storage) -> Result<(), Vec<Unsavable>> {
    let mut problems = Vec::new();
    match entries.len() {
        0 => problems.push(Unsavable::EmptyTree),
        count if count > LEAVES_MAX => problems.push(Unsavable::ManyLeaves(count)),
        _ => {}
    }
    let mut paths: Vec<&KeyPath> = entries.iter().map(|entry| &entry.path).collect();
    paths.sort();
    let deepest = paths.iter().map(|path| path.0.len()).max().unwrap_or(0);
    if deepest > KEY_PATH_DEPTH_MAX {
        problems.push(Unsavable::Deep(deepest));
    } else {
        check_structure(&paths, &mut problems);
    }
    let collisions = collisions(entries).into_iter().map(|(name, paths)| Unsavable::Collision { name, paths });
    problems.extend(collisions);
    let named = |wanted: fn(&ValueType) -> bool| {
        let stored = entries.iter().filter(move |entry| wanted(&entry.value_type) && !entry.skip_deserialize);
        let named: BTreeMap<String, &KeyPath> = stored.map(|entry| (param_name(&entry.path), &entry.path)).collect();
        named
    };
    let arrays = named(|kind| kind.has_data() && *kind != ValueType::String);
    match storage {
        Storage::Ocdbt => {
            let long = arrays.iter().filter(|(name, _)| name.len() > PARAM_NAME_BYTES_MAX);
            problems.extend(long.map(|(name, path)| Unsavable::LongName { path: (*path).clone(), len: name.len() }));
            check_prefixes(&arrays, &mut problems);
        }
        Storage::Files => check_directories(&arrays, &mut problems),
    }
    let texts = named(|kind| *kind == ValueType::String);
    let (_, no_place) = strings::nest(texts.keys().map(|name| (name.as_str(), "")));
    let at = |reason: NoPlace| {
        let path = texts.get(reason.name()).map_or(KeyPath::ROOT, |path| (*path).clone());
        Unsavable::Text { path, reason }
    };
    problems.extend(no_place.into_iter().map(at));
    if problems.is_empty() { Ok(()) } else { Err(problems) }
}

/// Whether an item may have this name.
///
/// # Errors
/// A name that is no plain directory name, that Orbax refuses (`metrics`, `AUTO`, `_CHECKPOINT_DELETION`), or that a
/// reader takes for something else.
pub fn check_item_name(name: &str) -> Result<(), BadName> {
    if name.contains('/') {
        return Err(if name.starts_with('/') { BadName::Absolute } else { BadName::Slash });
    }
    check_element(name)?;
    if ITEM_RESERVED.contains(&name) || name.starts_with("ocdbt.process_") {
        return Err(BadName::Reserved);
    }
    if step::is_temporary(name) {
        return Err(BadName::Temporary);
    }
    match step::is_reserved(name) {
        true if name.starts_with('.') => Err(BadName::Hidden),
        true => Err(BadName::Reserved),
        false => Ok(()),
    }
}

/// Everything that was found as one error, a line each.
pub fn refused(problems: &[Unsavable]) -> Error {
    Error::invalid(format!("the tree cannot be saved for {}", counted(problems.len(), "reason", "reasons")))
        .lines(problems.iter().map(ToString::to_string))
}

/// Duplicates, leaves in leaves, mixed containers and gaps. The paths are sorted.
fn check_structure(paths: &[&KeyPath], problems: &mut Vec<Unsavable>) {
    // In lexicographic order a path stands right before the first of those that it is a prefix of.
    for pair in paths.windows(2) {
        let [first, second] = pair else { continue };
        if first == second {
            problems.push(Unsavable::Duplicate((*first).clone()));
        } else if second.0.starts_with(&first.0) {
            problems.push(Unsavable::LeafInLeaf { path: (*first).clone(), below: (*second).clone() });
        }
    }
    let mut containers: BTreeMap<&[Key], (BTreeSet<u64>, bool)> = BTreeMap::new();
    for path in paths {
        for (end, key) in path.0.iter().enumerate() {
            let (positions, has_names) = containers.entry(path.0.get(..end).unwrap_or_default()).or_default();
            match key {
                Key::Index(position) => _ = positions.insert(*position),
                Key::Name(_) => *has_names = true,
            }
        }
    }
    for (path, (positions, has_names)) in containers {
        let path = || KeyPath(path.to_vec());
        let gap = (0_u64..).zip(&positions).find(|(expected, position)| expected != *position);
        match gap {
            _ if has_names && !positions.is_empty() => problems.push(Unsavable::Mixed(path())),
            Some((position, _)) => problems.push(Unsavable::Gap { path: path(), position }),
            None => {}
        }
    }
}

/// Names that differ but begin the same keys.
fn check_prefixes(arrays: &BTreeMap<String, &KeyPath>, problems: &mut Vec<Unsavable>) {
    let shared = shared_names(arrays.iter().map(|(name, path)| (key_prefix(name), *path)));
    problems.extend(shared.into_iter().map(|(name, paths)| Unsavable::Collision { name, paths }));
}

fn check_directories(arrays: &BTreeMap<String, &KeyPath>, problems: &mut Vec<Unsavable>) {
    let by_name: HashMap<&str, &KeyPath> = arrays.iter().map(|(name, path)| (name.as_str(), *path)).collect();
    for (name, path) in arrays {
        if let Err(reason) = check_directory(name, path) {
            problems.push(Unsavable::Directory { path: (*path).clone(), name: name.clone(), reason });
            continue;
        }
        for (at, _) in name.match_indices('/') {
            let (above, below) = name.split_at(at);
            let other = by_name.get(above).filter(|_| is_stored_name(below.trim_start_matches('/')));
            problems
                .extend(other.map(|other| Unsavable::AmongChunks { path: (*path).clone(), other: (*other).clone() }));
        }
    }
}

/// Whether a path begins with what an array keeps in its own directory: `.zarray`, `0.0`, `zarr.json`, `c`.
fn is_stored_name(path: &str) -> bool {
    let first = path.split('/').next().unwrap_or_default();
    let is_chunk = || first.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    matches!(first, ".zarray" | ".zattrs" | "zarr.json" | "c") || is_chunk()
}

fn check_directory(name: &str, path: &KeyPath) -> Result<(), BadName> {
    // A bare leaf lies in the item's own directory.
    if path.0.is_empty() {
        return Ok(());
    }
    if name.starts_with('/') {
        return Err(BadName::Absolute);
    }
    name.split('/').try_for_each(check_element)?;
    let first = name.split('/').next().unwrap_or_default();
    if ARRAY_RESERVED.contains(&first) || first.starts_with("ocdbt.process_") {
        return Err(BadName::Reserved);
    }
    // Half of what a path may have is left to the item's own path and to the chunk's.
    if name.len() > PATH_BYTES_MAX / 2 { Err(BadName::Long) } else { Ok(()) }
}

fn check_element(element: &str) -> Result<(), BadName> {
    match element {
        "" => Err(BadName::Empty),
        "." | ".." => Err(BadName::Dots),
        _ if element.contains('\0') => Err(BadName::Nul),
        _ if element.contains('\\') => Err(BadName::Backslash),
        _ if element.len() > FILE_NAME_BYTES_MAX => Err(BadName::Long),
        _ => Ok(()),
    }
}

fn list(paths: &[KeyPath]) -> String {
    paths.iter().map(|path| format!("`{path}`")).collect::<Vec<_>>().join(", ")
}

/// What the item's directory holds besides the arrays.
const ARRAY_RESERVED: [&str; 8] = [
    tree::METADATA_FILE,
    tree::SHARDING_FILE,
    tree::STRINGS_FILE,
    tree::ARRAY_METADATA_DIR,
    sums::SUMS_FILE,
    "manifest.ocdbt",
    "d",
    checkpoint::COMMIT_FILE,
];

/// The names that Orbax refuses, the files of a checkpoint, and what makes a reader take the checkpoint for an item.
const ITEM_RESERVED: [&str; 9] = [
    "metrics",
    "AUTO",
    checkpoint::DELETION_FILE,
    checkpoint::METADATA_FILE,
    checkpoint::V1_MARKER,
    checkpoint::COMMIT_FILE,
    sums::SUMS_FILE,
    tree::METADATA_FILE,
    "manifest.ocdbt",
];

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn array(path: &[Key]) -> Entry {
        Entry::new(KeyPath(path.to_vec()), ValueType::NpArray)
    }

    fn named(names: &[&str]) -> Entry {
        Entry::new(KeyPath::names(names.iter().copied()), ValueType::NpArray)
    }

    fn problems(entries: &[Entry], storage: Storage) -> Vec<String> {
        check_tree(entries, storage).unwrap_err().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn everything_is_told_at_once() {
        let text = |name: &str| Entry::new(KeyPath::names([name]), ValueType::String);
        let name = |name: &str| Key::Name(name.to_owned());
        let entries = [
            named(&["a.b"]),
            named(&["a", "b"]),
            named(&["x"]),
            named(&["x", "y"]),
            named(&["x"]),
            array(&[name("l"), Key::Index(0)]),
            array(&[name("l"), Key::Index(2)]),
            array(&[name("m"), Key::Index(0)]),
            array(&[name("m"), name("n")]),
            named(&["s/"]),
            named(&["s"]),
            text("a~"),
            text("t"),
        ];
        let expected = [
            "`x` is given twice",
            "`x` is a leaf, and `x/y` lies in it",
            "`l` has no element at position 1, but later ones",
            "`m` has both positions and names",
            "`a/b`, `a.b` are all stored under the name `a.b`",
            "`x`, `x` are all stored under the name `x`",
            "`s`, `s\\/` are all stored under the name `s/`",
            "`a~`: the name `a~` has a `~` that JSON pointers do not allow",
        ];
        let found = problems(&entries, Storage::Ocdbt);
        assert_eq!(found, expected);
        assert_eq!(refused(&check_tree(&entries, Storage::Ocdbt).unwrap_err()).list(), found);
        assert_eq!(problems(&[], Storage::Files), ["the tree has no leaf, not even an empty container"]);
    }

    #[test]
    fn names_that_are_no_directories() {
        let long = "n".repeat(256);
        let cases = [
            ("..", BadName::Dots),
            ("a/../b", BadName::Dots),
            ("/a", BadName::Absolute),
            ("a//b", BadName::Empty),
            ("a/", BadName::Empty),
            ("", BadName::Empty),
            ("a\0", BadName::Nul),
            ("a\\b", BadName::Backslash),
            (&long, BadName::Long),
            ("_METADATA", BadName::Reserved),
            ("_strings.json/x", BadName::Reserved),
            ("ocdbt.process_7", BadName::Reserved),
            ("d", BadName::Reserved),
        ];
        for (name, reason) in cases {
            let entries = [named(&[name])];
            let found = check_tree(&entries, Storage::Files).unwrap_err();
            assert!(
                matches!(&found[..], [Unsavable::Directory { reason: found, .. }] if *found == reason),
                "{found:?}"
            );
            assert_eq!(check_tree(&entries, Storage::Ocdbt), Ok(()), "{name}");
        }
        assert_eq!(check_tree(&[array(&[])], Storage::Files), Ok(()));
        assert_eq!(check_tree(&[named(&["zarr.json"]), named(&["a/_METADATA"])], Storage::Files), Ok(()));
        let giant = "n".repeat(PARAM_NAME_BYTES_MAX + 1);
        assert!(problems(&[named(&[&giant])], Storage::Ocdbt)[0].contains("64001 bytes"));
    }

    #[test]
    fn directories_among_chunks() {
        let inside = |below: &str| check_tree(&[named(&["p"]), named(&[&format!("p/{below}")])], Storage::Files);
        for below in ["c", "c/0", "zarr.json", ".zarray", "0", "1.2"] {
            let path = KeyPath::names([&*format!("p/{below}")]);
            assert_eq!(inside(below), Err(vec![Unsavable::AmongChunks { path, other: KeyPath::names(["p"]) }]));
        }
        assert_eq!(inside("q"), Ok(()));
    }

    #[test]
    fn names_of_items() {
        for name in ["state", "params", "ema_params", "a b", "ünï", "default"] {
            assert_eq!(check_item_name(name), Ok(()), "{name}");
        }
        let cases = [
            ("", BadName::Empty),
            ("..", BadName::Dots),
            ("a/b", BadName::Slash),
            ("/a", BadName::Absolute),
            ("metrics", BadName::Reserved),
            ("AUTO", BadName::Reserved),
            ("_CHECKPOINT_DELETION", BadName::Reserved),
            ("orbax.checkpoint", BadName::Reserved),
            ("_METADATA", BadName::Reserved),
            ("descriptor", BadName::Reserved),
            ("x.orbax-checkpoint-tmp", BadName::Temporary),
            ("x.partial_save", BadName::Temporary),
            (".x", BadName::Hidden),
        ];
        for (name, reason) in cases {
            assert_eq!(check_item_name(name), Err(reason), "{name}");
        }
    }

    proptest! {
        /// What is accepted has one name a leaf, and comes back from `_METADATA` as it was.
        #[test]
        fn what_is_accepted_comes_back(
            keys in proptest::collection::vec(
                proptest::collection::vec(prop_oneof!["[ab./]{0,3}".prop_map(Key::Name), (0_u64..3).prop_map(Key::Index)], 0..4),
                1..6,
            ),
            in_files: bool,
        ) {
            let entries: Vec<Entry> = keys.iter().map(|keys| array(keys)).collect();
            if check_tree(&entries, if in_files { Storage::Files } else { Storage::Ocdbt }).is_ok() {
                let names: BTreeSet<String> = entries.iter().map(|entry| param_name(&entry.path)).collect();
                prop_assert_eq!(names.len(), entries.len());
                let metadata = super::super::metadata::TreeMetadata { entries, ..Default::default() };
                prop_assert_eq!(super::super::metadata::parse(&metadata.to_bytes()).unwrap(), metadata);
            }
        }
    }
}
