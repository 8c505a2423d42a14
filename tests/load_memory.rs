//! The memory budget of a load holds for very many tiny chunks, judged by what the process has in memory. One test: nothing else
//! is to run in this process.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "tests panic to fail and print their counts"
)]

use touchdown::tree::save::{LeafOptions, NewArray, SaveOptions, Tree};
use touchdown::zarr::Compression;
use touchdown::{DType, Engine, EngineOptions, ErrorKind, Job};

fn status(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

/// What something gives, and by how much memory grew beyond what there was before it.
fn grown<T>(what: impl FnOnce() -> T) -> (T, u64) {
    // The high-water mark starts from what there is now.
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    let before = status("VmRSS");
    let result = what();
    (result, status("VmHWM").saturating_sub(before))
}

fn engine(staging_bytes: u64) -> EngineOptions {
    EngineOptions { threads: 2, staging_bytes, ..EngineOptions::default() }
}

#[test]
fn very_many_tiny_chunks_are_loaded_within_the_budget_or_refused() {
    const CHUNKS: u64 = 80_000;
    let home = tempfile::tempdir().unwrap();
    let leaf = LeafOptions { compression: Some(Compression::None), chunk_bytes: Some(512), ..LeafOptions::default() };
    let options = SaveOptions { leaf, sync: false, ..SaveOptions::default() };
    let bytes: Vec<u8> =
        (0..CHUNKS * 64).flat_map(|word| word.wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes()).collect();
    let tree = Tree::new().with("w", NewArray::new(&[CHUNKS, 512], DType::UInt8, bytes));
    let path = home.path().join("c");
    Engine::new(engine(512 << 20)).unwrap().save(&path, &tree, &options).unwrap().wait().unwrap();
    drop(tree);
    let checkpoint = touchdown::open(&path).unwrap();
    let load = |budget: u64| {
        let engine = Engine::new(engine(budget)).unwrap();
        grown(|| engine.load(&checkpoint, &checkpoint.target()).and_then(Job::wait))
    };
    let (refused, grown_by) = load(48 << 20);
    let error = refused.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Budget);
    let named = error.advice().unwrap().split("--memory ").nth(1).and_then(|rest| rest.split('`').next()).unwrap();
    let named: u64 = named.parse().unwrap();
    println!("{grown_by} bytes until it was refused");
    assert!(grown_by <= 54 << 20, "{grown_by}");
    for budget in [named, 384 << 20] {
        let (state, grown_by) = load(budget);
        let (beyond, report) = (grown_by.saturating_sub(CHUNKS * 512), state.unwrap().report().peak_host_bytes);
        println!("{beyond} bytes beyond the results, {report} reported with them");
        // What the allocator keeps depends on which thread frees what.
        assert!(beyond <= budget + budget / 8, "{beyond} of {budget}");
        assert!(report <= budget + CHUNKS * 512);
    }
    let plan = checkpoint.plan_within(&checkpoint.target(), engine(384 << 20).limits().unwrap()).unwrap();
    assert!(plan.held_bytes > CHUNKS * 300 && plan.staging_bytes() > plan.held_bytes);
}
