//! The memory budget holds for very many small things, too, judged by what the process has in memory. One test: nothing else is
//! to run in this process.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "tests panic to fail and print their counts"
)]

use touchdown::tree::save::{LeafOptions, NewArray, SaveOptions, SaveReport, Tree};
use touchdown::zarr::Compression;
use touchdown::{ConvertOptions, DType, Engine, EngineOptions, ErrorKind};

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

fn tiny_chunks() -> SaveOptions {
    let leaf = LeafOptions { compression: Some(Compression::None), chunk_bytes: Some(512), ..LeafOptions::default() };
    SaveOptions { leaf, sync: false, ..SaveOptions::default() }
}

/// An array of so many chunks of 512 bytes.
fn chunked(chunks: u64) -> Tree {
    let bytes: Vec<u8> =
        (0..chunks * 64).flat_map(|word| word.wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes()).collect();
    Tree::new().with("w", NewArray::new(&[chunks * 512], DType::UInt8, bytes))
}

#[test]
fn very_many_small_things_stay_within_the_budget_or_are_refused() {
    let home = tempfile::tempdir().unwrap();
    let save = |name: &str, tree: &Tree, options: &SaveOptions, budget: u64| {
        Engine::new(engine(budget)).unwrap().save(home.path().join(name), tree, options).and_then(|job| job.wait())
    };
    let within = |(report, grown): (Result<SaveReport, touchdown::Error>, u64), budget: u64| {
        let reported = report.unwrap().peak_host_bytes;
        println!("{grown} bytes, {reported} reported");
        assert!(reported <= budget, "{reported} of {budget}");
        // What the allocator keeps depends on which thread frees what.
        assert!(grown <= budget + budget / 8, "{grown} of {budget}");
        assert!(reported >= grown / 2, "{reported}, {grown}");
    };
    // Many chunks.
    let tree = chunked(80_000);
    within(grown(|| save("chunks", &tree, &tiny_chunks(), 48 << 20)), 48 << 20);
    // As many with too little memory: nothing is written.
    let (refused, _) = grown(|| save("refused", &tree, &tiny_chunks(), 14 << 20));
    let error = refused.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Budget);
    assert!(error.to_string().contains("80000 chunks") && format!("{error:?}").contains("larger chunks"), "{error:?}");
    assert!(!home.path().join("refused").exists());
    // The same through a conversion.
    save("source", &tree, &SaveOptions { sync: false, ..SaveOptions::default() }, 64 << 20).unwrap();
    drop(tree);
    let checkpoint = touchdown::open(home.path().join("source")).unwrap();
    let convert = |name: &str, budget: u64| {
        let options = ConvertOptions { save: tiny_chunks(), engine: engine(budget), ..ConvertOptions::default() };
        touchdown::convert(&checkpoint.target(), home.path().join(name), &options)
    };
    let (report, grown_by) = grown(|| convert("converted", 72 << 20));
    let reported = report.unwrap().peak_host_bytes;
    println!("{grown_by} bytes, {reported} reported");
    assert!(reported <= 72 << 20 && grown_by <= 81 << 20, "{reported}, {grown_by}");
    let error = convert("refused", 36 << 20).unwrap_err();
    assert!(error.kind() == ErrorKind::Budget && error.to_string().contains("80000 chunks"), "{error}");
    assert!(!home.path().join("refused").exists());
    // Many small values: 100,000 of them fit the default budget.
    let mut tree = Tree::new();
    for number in 0..40_000_u64 {
        let bytes = (0..125).flat_map(|word| (number * 125 + word).wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes());
        let path = format!("block_{}/layer_{}/bias", number / 100, number % 100);
        tree.push(path.as_str(), NewArray::new(&[1000], DType::UInt8, bytes.collect::<Vec<u8>>()));
    }
    let options = SaveOptions { sync: false, ..SaveOptions::default() };
    within(grown(|| save("values", &tree, &options, 112 << 20)), 112 << 20);
    assert_eq!(save("refused", &tree, &options, 64 << 20).unwrap_err().kind(), ErrorKind::Budget);
}
