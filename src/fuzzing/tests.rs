//! Replays the corpus, and changes it at random.

use std::collections::BTreeMap;
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};

use super::TARGETS;

/// The inputs of every target, by file.
fn corpus(target: &str) -> BTreeMap<PathBuf, Vec<u8>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let files = std::fs::read_dir(&dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    let files = files.map(|entry| entry.unwrap().path());
    files.map(|path| (path.clone(), std::fs::read(path).unwrap())).collect()
}

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |text| text.parse().unwrap())
}

/// splitmix64
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }
}

/// Words that formats are made of, and numbers at which they break.
const WORDS: [&[u8]; 20] = [
    b"0",
    b"-1",
    b"4294967296",
    b"18446744073709551615",
    b"18446744073709551616",
    b"1e308",
    b"null",
    b"\"\"",
    b"[]",
    b"{}",
    b"[[[[[[[[",
    b"{\"a\":{\"a\":",
    b"\\ud800",
    b"NaN",
    b"\x00",
    b"\xff\xff\xff\xff\xff\xff\xff\xff",
    b"\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01",
    b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
    b"\x28\xb5\x2f\xfd",
    b"../",
];

/// A few changes of a seed.
fn change(random: &mut Random, seeds: &[&Vec<u8>]) -> Vec<u8> {
    let mut bytes = seeds[random.below(seeds.len())].clone();
    for _ in 0..=random.below(4) {
        let at = random.below(bytes.len() + 1);
        let rest = bytes.len() - at;
        let most = if random.below(4) == 0 { rest + 1 } else { 8 };
        let len = random.below(most).min(rest);
        match random.below(7) {
            0 | 1 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            2 if at < bytes.len() => bytes[at] = [0, 1, 0x7f, 0x80, 0xff, random.next() as u8][random.below(6)],
            3 => drop(bytes.splice(at..at + len, WORDS[random.below(WORDS.len())].iter().copied())),
            4 => drop(bytes.drain(at..at + len)),
            5 => {
                let donor = seeds[random.below(seeds.len())];
                let from = random.below(donor.len() + 1);
                let part = donor[from..(from + random.below(40)).min(donor.len())].to_vec();
                drop(bytes.splice(at..at + len, part));
            }
            6 => {
                let part = bytes[at..at + len].to_vec();
                drop(bytes.splice(at..at, part));
            }
            _ => {}
        }
    }
    bytes.truncate(64 << 10);
    bytes
}

/// Runs one input; a panic is told with the input.
fn survives(target: &str, body: super::Body, bytes: &[u8]) -> Result<(), String> {
    let seen = catch_unwind(|| body(bytes));
    seen.map_err(|_| format!("{target}: {:?}", bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>()))
}

#[test]
fn every_target_survives_its_corpus_and_changes_of_it() {
    let runs = number("TOUCHDOWN_FUZZ_RUNS", 2000);
    let seed = number("TOUCHDOWN_FUZZ_SEED", 1);
    let only = std::env::var("TOUCHDOWN_FUZZ_TARGET").ok();
    let mut crashes = Vec::new();
    for (number, (target, body)) in (0..).zip(TARGETS) {
        if only.as_deref().is_some_and(|only| only != *target) {
            continue;
        }
        let corpus = corpus(target);
        assert!(!corpus.is_empty(), "{target} has no corpus");
        crashes.extend(corpus.values().filter_map(|bytes| survives(target, *body, bytes).err()));
        let seeds: Vec<&Vec<u8>> = corpus.values().collect();
        let mut random = Random(seed.wrapping_mul(1000).wrapping_add(number));
        let tried = (0..runs).map(|_| change(&mut random, &seeds));
        crashes.extend(tried.filter_map(|bytes| survives(target, *body, &bytes).err()).take(3));
        println!("{target}: {} inputs, {runs} changes", corpus.len());
    }
    assert!(crashes.is_empty(), "{} inputs crash:\n{}", crashes.len(), crashes.join("\n"));
}

/// The fuzzer's binaries are these targets.
#[test]
fn every_target_has_a_binary() {
    let manifest = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/Cargo.toml")).unwrap();
    let mut named: Vec<&str> = manifest.lines().filter_map(|line| line.strip_prefix("name = \"")).collect();
    named.retain(|name| *name != "touchdown-fuzz\"");
    let targets: Vec<String> = TARGETS.iter().map(|(name, _)| format!("{name}\"")).collect();
    // Without the program there is no target file to parse.
    let expected = if cfg!(feature = "cli") { targets.len() } else { targets.len() + 1 };
    assert!(named.len() == expected && targets.iter().all(|name| named.contains(&name.as_str())), "{named:?}");
}
