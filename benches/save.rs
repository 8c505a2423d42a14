//! Saving beside Orbax: the same state of 1.09 GB, interleaved, each save synced to disk.
//!
//!     cargo bench --bench save --features cli            # makes its own Python environment, as the tests do
//!
//! The state is what a small transformer has: 8 layers of nine bfloat16 weights and a float32 embedding, normally distributed. Orbax
//! gets it as jax arrays on one CPU device and saves with its defaults (OCDBT, zarr v3, zstd level 3). Figures are seconds of
//! the save call.

#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a benchmark prints and may stop"
)]

#[path = "../tests/support/mod.rs"]
mod support;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use bytes::Bytes;
use serde_json::{Value as Json, json};
use touchdown::encode::{Checksums, Encoder};
use touchdown::tree::save::{LeafOptions, NewArray, SaveOptions, Tree};
use touchdown::zarr::Compression;
use touchdown::{DType, Engine, EngineOptions};

const LAYERS: usize = 8;
const WIDTH: u64 = 2048;
const ROUNDS: usize = 5;

fn main() {
    let folder = support::scratch("bench-save");
    let (tree, index) = state(&folder);
    let bytes = tree.bytes() as f64;
    fs::write(folder.join("index.json"), index.to_string()).unwrap();
    let Some(python) = support::python("bench save") else { return };
    let engine = Engine::new(EngineOptions::default()).unwrap();
    let profile = |name: &'static str, compression, checksum, sync| {
        let leaf = LeafOptions { compression: Some(compression), ..LeafOptions::default() };
        (name, SaveOptions { leaf, checksum: Some(checksum), sync, ..SaveOptions::default() })
    };
    let profiles = [
        profile("touchdown, default (gpu profile, checksums)", Compression::Gpu, true, true),
        profile("touchdown, zstd 3, checksums", Compression::Zstd { level: 3 }, true, true),
        profile("touchdown, zstd 3, no checksums (as Orbax)", Compression::Zstd { level: 3 }, false, true),
        profile("touchdown, uncompressed, checksums", Compression::None, true, true),
        profile("touchdown, default, not synced", Compression::Gpu, true, false),
        profile("touchdown, zstd 3, checksums, not synced", Compression::Zstd { level: 3 }, true, false),
    ];
    let mut seconds: Vec<Vec<f64>> = vec![Vec::new(); profiles.len()];
    let [mut orbax, mut bounds, mut written] = [const { Vec::<f64>::new() }; 3];
    let mut stored = vec![0; profiles.len()];
    let resident = Resident::watch();
    for round in 0..ROUNDS {
        for (number, (_, options)) in profiles.iter().enumerate() {
            let path = folder.join("ours");
            let start = Instant::now();
            let report = engine.save(&path, &tree, options).unwrap().wait().unwrap();
            seconds[number].push(start.elapsed().as_secs_f64());
            stored[number] = report.bytes_stored;
            touchdown::delete(&path).unwrap();
        }
        bounds.push(encode_bound(&tree, None));
        let path = folder.join("frames");
        written.push(encode_bound(&tree, Some(&fs::File::create(&path).unwrap())));
        fs::remove_file(&path).unwrap();
        let path = folder.join("orbax");
        let said = support::run_python(&python, "../../benches/save_orbax.py", [folder.as_os_str(), path.as_os_str()]);
        let said: Json = serde_json::from_str(&said).unwrap();
        orbax.push(said["seconds"].as_f64().unwrap());
        println!("round {round}: orbax {said}");
        fs::remove_dir_all(&path).unwrap();
    }
    println!("{:.0} MB, {} rounds; median (best) seconds, GB/s by the median, stored bytes", bytes / 1e6, ROUNDS);
    let row = |name: &str, seconds: &[f64], stored: u64| {
        let (median, best) = middle(seconds);
        println!(
            "{name:<46} {median:6.2} ({best:5.2}) s {:6.2} GB/s {:8.0} MB",
            bytes / median / 1e9,
            stored as f64 / 1e6
        );
    };
    profiles.iter().zip(&seconds).zip(&stored).for_each(|(((name, _), seconds), stored)| row(name, seconds, *stored));
    row("orbax v1 save, defaults", &orbax, 0);
    println!(
        "resident memory of the process, most during the saves minus before: {:.0} MB",
        resident.grown() as f64 / 1e6
    );
    for (what, seconds) in [("nothing written", &bounds), ("frames written to the page cache", &written)] {
        let (median, best) = middle(seconds);
        println!("zstd 3 with checksums, all cores, {what}: {median:.2} ({best:.2}) s");
    }
    // It is larger than what tests leave for who wants to look at it.
    fs::remove_dir_all(&folder).unwrap();
}

/// Watches the resident memory of this process.
struct Resident {
    before: u64,
    most: Arc<AtomicU64>,
}

impl Resident {
    fn watch() -> Self {
        let most = Arc::new(AtomicU64::new(0));
        let seen = Arc::clone(&most);
        std::thread::spawn(move || {
            loop {
                seen.fetch_max(Self::now(), Ordering::Relaxed);
                std::thread::sleep(std::time::Duration::from_millis(2));
            }
        });
        Self { before: Self::now(), most }
    }

    fn now() -> u64 {
        let statm = fs::read_to_string("/proc/self/statm").unwrap();
        statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
    }

    fn grown(&self) -> u64 {
        self.most.load(Ordering::Relaxed).saturating_sub(self.before)
    }
}

fn middle(seconds: &[f64]) -> (f64, f64) {
    let mut sorted = seconds.to_vec();
    sorted.sort_by(f64::total_cmp);
    (sorted[sorted.len() / 2], sorted[0])
}

/// How long compressing everything at level 3 takes on all cores, and writing the frames by the same threads if there is a file: what
/// a save cannot be faster than.
fn encode_bound(tree: &Tree, file: Option<&fs::File>) -> f64 {
    let pieces: Vec<Bytes> = tree
        .leaves()
        .iter()
        .filter_map(|(_, leaf)| match leaf {
            touchdown::tree::save::NewLeaf::Array(array) => Some(array.parts[0].data.clone()),
            _ => None,
        })
        .flat_map(|data| {
            (0..data.len()).step_by(4 << 20).map(move |at| data.slice(at..(at + (4 << 20)).min(data.len())))
        })
        .collect();
    let (next, end) = (AtomicUsize::new(0), AtomicU64::new(0));
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                let checksums = Checksums { frame: true, crc32c: true };
                let mut encoder = Encoder::new(Compression::Zstd { level: 3 }, checksums).unwrap();
                let mut out = Vec::new();
                while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
                    out.clear();
                    encoder.encode(piece, &mut out).unwrap();
                    if let Some(file) = file {
                        file.write_all_at(&out, end.fetch_add(out.len() as u64, Ordering::Relaxed)).unwrap();
                    }
                }
            });
        }
    });
    start.elapsed().as_secs_f64()
}

/// The state, and its files for the other side.
fn state(folder: &Path) -> (Tree, Json) {
    let mut random = Normal(0x5eed);
    let (mut tree, mut index) = (Tree::new(), Vec::new());
    let mut add = |name: String, shape: Vec<u64>, dtype: DType| {
        let count: u64 = shape.iter().product();
        let bytes: Vec<u8> = match dtype {
            DType::Float32 => (0..count).flat_map(|_| random.next().to_le_bytes()).collect(),
            _ => (0..count).flat_map(|_| half::bf16::from_f32(random.next()).to_le_bytes()).collect(),
        };
        let file = folder.join(format!("{}.bin", index.len()));
        fs::write(&file, &bytes).unwrap();
        index.push(json!({"name": name, "shape": shape, "dtype": dtype.name(), "file": file}));
        tree.push(name.as_str(), NewArray::new(&shape, dtype, bytes));
    };
    add("embed".into(), vec![16 * WIDTH, WIDTH], DType::Float32);
    for layer in 0..LAYERS {
        for part in ["q", "k", "v", "o"] {
            add(format!("layer_{layer}/attn/{part}"), vec![WIDTH, WIDTH], DType::BFloat16);
        }
        for (part, shape) in
            [("gate", [WIDTH, 5632]), ("up", [WIDTH, 5632]), ("down", [5632, WIDTH])].map(|(p, s)| (p, s.to_vec()))
        {
            add(format!("layer_{layer}/mlp/{part}"), shape, DType::BFloat16);
        }
        for part in ["norm_1", "norm_2"] {
            add(format!("layer_{layer}/{part}"), vec![WIDTH], DType::BFloat16);
        }
    }
    (tree, json!(index))
}

/// Normally distributed numbers of standard deviation 0.02: xorshift and Box-Muller.
struct Normal(u64);

impl Normal {
    fn uniform(&mut self) -> f32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        ((self.0 >> 40) as f32 + 0.5) / (1u64 << 24) as f32
    }

    fn next(&mut self) -> f32 {
        let (a, b) = (self.uniform(), self.uniform());
        0.02 * (-2.0 * a.ln()).sqrt() * (std::f32::consts::TAU * b).cos()
    }
}
