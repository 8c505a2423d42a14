//! What is fuzzed: every parser, as a function of bytes that must return, whatever they are.
//!
//! `fuzz/` runs these under a fuzzer that is guided by coverage (`cargo fuzz run zarr_v3`). The tests below replay what is committed
//! in `fuzz/corpus`, every crash that was ever found among it, and change it at random; `TOUCHDOWN_FUZZ_RUNS` says how often a target.

use bytes::Bytes;

use crate::decode::{self, DecodeError};
use crate::kv::ocdbt;
use crate::layout::orbax::{array_metadata, checkpoint, json, metadata, msgpack, sharding, strings, sums};
use crate::layout::safetensors;
use crate::relpath::RelPath;
use crate::zarr::shard::{ShardIndex, index_range};
use crate::zarr::{self, ByteCodec, Endian, IndexLocation};

/// A body: bytes in, nothing out, and no panic.
type Body = fn(&[u8]);

/// Every target by the name of its binary and its corpus.
pub const TARGETS: &[(&str, Body)] = &[
    ("array_metadata", |bytes| drop(array_metadata::parse(bytes))),
    ("checkpoint_metadata", checkpoint_metadata),
    ("codecs", codecs),
    ("data_files", ocdbt::fuzz::data_files),
    ("directory", crate::tree::fuzz::directory),
    ("manifest", ocdbt::fuzz::manifest),
    ("metadata", tree_metadata),
    ("msgpack", |bytes| drop(msgpack::parse(&Bytes::copy_from_slice(bytes)))),
    ("node", ocdbt::fuzz::node),
    ("paths", paths),
    ("safetensors", safetensors_header),
    ("safetensors_index", |bytes| drop(safetensors::index::parse(bytes))),
    ("safetensors_tree", |bytes| drop(safetensors::tree::parse(&String::from_utf8_lossy(bytes)))),
    ("shard_index", shard_index),
    ("sharding", |bytes| drop(sharding::parse(bytes))),
    ("strings", |bytes| drop(json::parse(bytes).map(|texts| strings::lookup(&texts, "a.b").map(str::len)))),
    ("sums", sums_file),
    #[cfg(feature = "cli")]
    ("target", crate::cli::fuzz_target),
    ("versions", ocdbt::fuzz::versions),
    ("zarr_v2", |bytes| array(zarr::parse_v2(bytes))),
    ("zarr_v3", |bytes| array(zarr::parse_v3(bytes))),
];

/// Runs the target of this name.
pub fn run(name: &str, bytes: &[u8]) {
    if let Some((_, body)) = TARGETS.iter().find(|(target, _)| *target == name) {
        body(bytes);
    }
}

fn checkpoint_metadata(bytes: &[u8]) {
    if let Ok(read) = checkpoint::parse(bytes) {
        assert!(checkpoint::parse(&read.to_bytes()).is_ok(), "what is written is not read");
    }
    drop((checkpoint::parse_root(bytes), checkpoint::parse_old_root(bytes)));
}

fn tree_metadata(bytes: &[u8]) {
    if let Ok(read) = metadata::parse(bytes) {
        drop(metadata::collisions(&read.entries));
        read.entries.iter().for_each(|entry| drop(metadata::param_name(&entry.path)));
    }
}

/// What an array's metadata say of its chunks is computed without overflow.
fn array(read: Result<zarr::ArrayMeta, zarr::MetaError>) {
    let Ok(meta) = read else { return };
    drop((meta.grid.chunk_count(&meta.shape), decode::check(&meta.layout.innermost().codecs)));
    let first = vec![0; meta.shape.len()];
    drop((meta.keys.key(&first), meta.grid.region(&first)));
}

/// Chain, decoded length, length of pieces, and the encoded bytes: whole and in pieces give the same.
fn codecs(bytes: &[u8]) {
    let [chain, high, low, piece, encoded @ ..] = bytes else { return };
    let chain = CHAINS[usize::from(*chain) % CHAINS.len()];
    let len = usize::from(*high) << 8 | usize::from(*low);
    let mut whole = vec![0; len];
    let at_once = decode::decode_all(chain, encoded, &mut whole, true);
    let mut pieces = vec![0; len];
    let streamed = stream(chain, encoded, &mut pieces, usize::from(*piece) + 1);
    assert_eq!(at_once.is_ok(), streamed.is_ok(), "{chain:?}: {at_once:?} at once, {streamed:?} in pieces");
    assert!(at_once.is_err() || whole == pieces, "{chain:?}: whole and in pieces differ");
}

fn stream(chain: &[ByteCodec], encoded: &[u8], out: &mut [u8], piece: usize) -> Result<(), DecodeError> {
    let mut decoder = decode::decoder(chain, encoded.len() as u64, out.len() as u64, true, 1 << 20)?;
    let mut written = 0;
    // Once at least: nothing may be too little.
    let nothing = encoded.is_empty().then_some(&[][..]);
    for mut piece in encoded.chunks(piece).chain(nothing) {
        loop {
            let step = decoder.step(piece, &mut out[written..])?;
            written += step.written;
            piece = &piece[step.read..];
            if step.read == 0 && step.written == 0 {
                break;
            }
        }
    }
    decoder.finish()
}

const CHAINS: &[&[ByteCodec]] = &[
    &[],
    &[ByteCodec::Crc32c],
    &[ByteCodec::Zstd],
    &[ByteCodec::Zstd, ByteCodec::Crc32c],
    &[ByteCodec::Packed { bits: 4 }],
    &[ByteCodec::Gzip],
    &[ByteCodec::Zlib],
    &[ByteCodec::Bz2],
    &[ByteCodec::Blosc],
    &[ByteCodec::Crc32c, ByteCodec::Gzip, ByteCodec::Zstd],
];

/// A path of a database stays below the directory that it is joined to.
fn paths(bytes: &[u8]) {
    let Ok(path) = RelPath::new(bytes) else { return };
    let inside = |path: &RelPath| {
        let normal = |part| matches!(part, std::path::Component::Normal(_) | std::path::Component::CurDir);
        assert!(path.as_path().components().all(normal), "{path:?} leaves");
    };
    inside(&path);
    if let Ok(below) = RelPath::root().join("d").and_then(|dir| dir.join(bytes)) {
        inside(&below);
    }
}

fn safetensors_header(bytes: &[u8]) {
    let Some((size, head)) = bytes.split_first_chunk::<4>() else { return };
    let size = u64::from(u32::from_le_bytes(*size)).max(head.len() as u64);
    drop(safetensors::header::length(head, size));
    if let Ok(header) = safetensors::header::parse(head, size) {
        drop(header.sorted());
    }
}

/// Count, place, order, checksum, length of the value, and the index.
fn shard_index(bytes: &[u8]) {
    let [count, flags, high, low, index @ ..] = bytes else { return };
    let count = if flags & 4 == 0 { u64::from(*count) } else { u64::MAX >> (count % 64) };
    let location = if flags & 1 == 0 { IndexLocation::End } else { IndexLocation::Start };
    let endian = if flags & 2 == 0 { Endian::Little } else { Endian::Big };
    let value_len = u64::from(*high) << 8 | u64::from(*low);
    for crc32c in [false, true] {
        if let Ok(range) = index_range(location, value_len, count, crc32c) {
            assert!(range.end <= value_len, "an index outside its value");
        }
        if let Ok(index) = ShardIndex::parse(index, count, endian, crc32c, value_len) {
            for (offset, len) in (0..index.len()).filter_map(|inner| index.entry(inner)) {
                assert!(offset + len <= value_len, "an inner chunk outside its value");
            }
        }
    }
}

fn sums_file(bytes: &[u8]) {
    if let Ok(read) = sums::Sums::parse(bytes) {
        let again = sums::Sums::parse(&read.to_bytes());
        assert_eq!(again.ok().as_ref(), Some(&read), "what is written is not what was read");
        drop(RelPath::new("state").map(|dir| read.values(&dir)));
    }
}

#[cfg(test)]
mod tests;
