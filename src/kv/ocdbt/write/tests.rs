use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::super::manifest::Compression;
use super::super::scan::{Database, scan};
use super::super::testing::{self, hex};
use super::*;
use crate::kv::Extent;
use crate::need::Machine;

const NODES: &str = "d/0123456789abcdef0123456789abcdef";

fn path(path: &str) -> RelPath {
    RelPath::new(path).unwrap()
}

/// The database in the directory `db`, after `offset` bytes of values, as its files.
fn write_at(index: &Index, db: &str, offset: usize, config: &Config) -> (Written, testing::Files) {
    let (root, file) = (path(db), path(db).join(NODES).unwrap());
    let place = NodePlace { root: &root, file: &file, offset: offset as u64 };
    let written = write(index, place, config, 7).unwrap();
    let data = [vec![0xff; offset], written.nodes.clone()].concat();
    let manifest = root.join("manifest.ocdbt").unwrap();
    let files = [(manifest.to_string(), written.manifest.clone()), (file.to_string(), data)];
    (written, files.into())
}

fn read(files: &testing::Files, root: &str) -> Database {
    let root = path(root);
    let machine = Machine::new(|ask| async move { scan(&ask, &root).await });
    machine
        .drive(|needs| Ok(needs.iter().map(|need| testing::serve(files, need)).collect()))
        .unwrap()
        .expect("a database")
}

/// What an index says, whatever the numbers of its files; empty values are all the same.
fn contents(index: &Index) -> BTreeMap<Vec<u8>, (String, u64, Vec<u8>)> {
    let value = |value: &Value| match value {
        Value::Inline(bytes) => (String::new(), 0, bytes.to_vec()),
        Value::Extent(extent) if extent.len == 0 => (String::new(), 0, Vec::new()),
        Value::Extent(extent) => (index.file(extent.file).to_string(), extent.offset, extent.len.to_le_bytes().into()),
    };
    index.entries().iter().map(|(key, at)| (key.to_vec(), value(at))).collect()
}

fn config(node_bytes: u32, compress: bool) -> Config {
    let compression = if compress { Compression::Zstd { level: 0 } } else { Compression::None };
    Config { decoded_node_bytes_max: node_bytes, compression, ..Config::new([9; 16]) }
}

fn inline(bytes: &[u8]) -> Value {
    Value::Inline(Bytes::copy_from_slice(bytes))
}

fn keys(keys: impl IntoIterator<Item = Vec<u8>>) -> Index {
    Index::new(Vec::new(), keys.into_iter().map(|key| (Bytes::from(key), inline(b"v"))).collect())
}

/// What TensorStore was asked to write with.
fn vector(inline_value_bytes_max: u32, decoded_node_bytes_max: u32) -> Config {
    Config {
        uuid: std::array::from_fn(|index| index as u8),
        inline_value_bytes_max,
        decoded_node_bytes_max,
        version_tree_arity_log2: 4,
        compression: Compression::None,
    }
}

#[test]
fn a_leaf_of_tensorstore_is_reproduced() {
    let file = path("d/f26d367bd34743a5831135459adaa640");
    let extent = Value::Extent(Extent { file: FileId(0), offset: 0, len: 8 });
    let entries = [("a/.zarray", inline(b"{}")), ("a/0", extent), ("a/1", inline(b"xyz"))];
    let entries = entries.map(|(key, value)| (Bytes::from(key), value));
    let index = Index::new(vec![file.clone()], entries.into());
    let place = NodePlace { root: &RelPath::root(), file: &file, offset: 8 };
    let commit_time = u64::from_le_bytes(hex("36c8284e3db3ea18").try_into().unwrap());
    let written = write(&index, place, &vector(4, 8 << 20), commit_time).unwrap();
    let nodes =
        hex("0cdb20de5600000000000000000000012200642f663236643336376264333437343361353833313133353435396164616136
                     3430030202090101612f2e7a6172726179303102080300010000007b7d78797a591c1684");
    let manifest = hex(
        "0cdb3a2a61000000000000000000000102030405060708090a0b0c0d0e0f0004808080040400012200642f66323664333637
                        6264333437343361353833313133353435396164616136343001010000085603560836c8284e3db3ea1800c9c4efa1",
    );
    assert_eq!(written, Written { nodes, manifest, height: 0, node_count: 1 });
}

#[test]
fn two_levels_of_tensorstore_are_reproduced() {
    let file = path("d/ab35422854b2904f12893a4912ebe691");
    let entries = (0..4).map(|n| (Bytes::from(format!("abc{n}")), inline(format!("v{n}").as_bytes())));
    let index = Index::new(Vec::new(), entries.collect());
    let place = NodePlace { root: &RelPath::root(), file: &file, offset: 0 };
    let commit_time = u64::from_le_bytes(hex("da6d674e3db3ea18").try_into().unwrap());
    let written = write(&index, place, &vector(4, 60), commit_time).unwrap();
    let nodes = hex("0cdb20de22000000000000000000000002000101303102020000763076318ceb2c9a
                     0cdb20de2200000000000000000000000200010132330202000076327633ac92a94a
                     0cdb20de4f00000000000000000001012200642f61623335343232383534623239303466313238393361343931326562653639
                     3102030401030361626330320000002222220202222200001d673ae8");
    let manifest =
        hex("0cdb3a2a5f000000000000000000000102030405060708090a0b0c0d0e0f00043c0400012200642f616233353432323835346232
                        393034663132383933613439313265626536393101010100444f04930100da6d674e3db3ea1800193fd6f8");
    assert_eq!(written, Written { nodes, manifest, height: 1, node_count: 3 });
}

#[test]
fn a_database_may_be_empty() {
    let (written, files) = write_at(&Index::default(), "state", 3, &config(100, true));
    assert_eq!((written.nodes.len(), written.height, written.node_count), (0, 0, 0));
    assert!(read(&files, "state").index.entries().is_empty());
}

#[test]
fn keys_of_the_longest_length_and_high_trees_are_written() {
    let long = |last: u8| [vec![b'k'; OCDBT_KEY_BYTES_MAX as usize - 1], vec![last]].concat();
    let index = keys((0..9).map(long));
    let (written, files) = write_at(&index, "", 0, &config(1, false));
    assert_eq!((written.height, written.node_count), (3, 9 + 4 + 2 + 1));
    assert_eq!(contents(&read(&files, "").index), contents(&index));

    let index = keys((0..400_u16).map(|key| key.to_be_bytes().to_vec()));
    let (written, files) = write_at(&index, "", 0, &config(1, false));
    assert_eq!(written.height, 8);
    assert_eq!(contents(&read(&files, "").index), contents(&index));
}

#[test]
fn statistics_add_up() {
    let file = path(NODES);
    let extent = |n: u64| Value::Extent(Extent { file: FileId(0), offset: n, len: n });
    let entries = (0..50_u64).map(|n| (Bytes::from(format!("{n:02}")), extent(n))).collect();
    let index = Index::new(vec![file.clone()], entries);
    let place = NodePlace { root: &RelPath::root(), file: &file, offset: 0 };
    let written = write(&index, place, &config(150, false), 7).unwrap();
    assert!(written.height > 1);
    let mut expected = Vec::new();
    put_ulebs(&mut expected, [50, written.nodes.len() as u64, (0..50).sum()]);
    expected.extend(7_u64.to_le_bytes());
    // Before the number of version nodes and the checksum.
    let end = written.manifest.len() - 5;
    assert!(!matches!(config(150, false).compression, Compression::Zstd { .. }));
    assert_eq!(&written.manifest[end - expected.len()..end], expected);
}

#[test]
fn what_cannot_be_written_is_named() {
    let root = path("state");
    let file = root.join(NODES).unwrap();
    let write = |index: &Index, file: &RelPath, offset, config: &Config| {
        super::write(index, NodePlace { root: &root, file, offset }, config, 7).unwrap_err()
    };
    let refused = |index: &Index| write(index, &file, 0, &config(100, true));
    let pair = |a: &str, b: &str| {
        let entry = |key: &str| (Bytes::copy_from_slice(key.as_bytes()), inline(b""));
        Index { files: Vec::new(), entries: vec![entry(a), entry(b)] }
    };
    assert_eq!(refused(&pair("b", "a")), WriteError::Unsorted { index: 1 });
    assert_eq!(refused(&pair("a", "a")), WriteError::Unsorted { index: 1 });
    assert_eq!(refused(&keys([vec![0; 65_536]])), WriteError::Key { index: 0, len: 65_536 });
    let large = Index::new(Vec::new(), vec![(Bytes::new(), Value::Inline(vec![0; (1 << 20) + 1].into()))]);
    assert_eq!(refused(&large), WriteError::Inline { index: 0, len: (1 << 20) + 1 });

    let extent = |name: &str, id: u32, offset: u64, len: u64| {
        let value = Value::Extent(Extent { file: FileId(id), offset, len });
        Index::new(vec![path(name)], vec![(Bytes::from("a"), value)])
    };
    assert_eq!(refused(&extent("state/d/0", 1, 0, 1)), WriteError::File { index: 0, file: 1 });
    for outside in ["d/0", "stat", "state2/d/0", "state"] {
        assert_eq!(refused(&extent(outside, 0, 0, 1)), WriteError::Outside(path(outside)));
        assert_eq!(write(&keys([]), &path(outside), 0, &config(9, true)), WriteError::Outside(path(outside)));
    }
    let beyond = OcdbtError::Extent { offset: i64::MAX as u64, len: 1 };
    assert_eq!(refused(&extent("state/d/0", 0, i64::MAX as u64, 1)), WriteError::Format(beyond));
    let full = write(&keys([vec![1]]), &file, i64::MAX as u64, &config(100, true));
    assert!(matches!(full, WriteError::Format(OcdbtError::Extent { .. })));
    for bad in [
        Config { version_tree_arity_log2: 0, ..config(100, true) },
        Config { version_tree_arity_log2: 17, ..config(100, true) },
        Config { inline_value_bytes_max: (1 << 20) + 1, ..config(100, true) },
        Config { compression: Compression::Zstd { level: 23 }, ..config(100, true) },
    ] {
        assert!(matches!(write(&keys([]), &file, 0, &bad), WriteError::Format(_)));
    }
}

#[test]
fn a_large_inline_value_gets_a_leaf_of_its_own() {
    let entries = (0..3).map(|n| (Bytes::from(vec![n]), Value::Inline(vec![n; 1 << 20].into()))).collect();
    let index = Index::new(Vec::new(), entries);
    let (written, files) = write_at(&index, "", 0, &config(1000, true));
    assert_eq!(written.node_count, 4);
    assert_eq!(read(&files, "").index, index);
}

#[test]
fn runs_keep_their_limits() {
    assert_eq!(cut([1; 10].into_iter(), 4, 1), [4, 4, 2]);
    assert_eq!(cut([9; 3].into_iter(), 4, 1), [1, 1, 1]);
    assert_eq!(cut([9; 5].into_iter(), 4, 2), [2, 3]);
    assert_eq!(cut([9; 4].into_iter(), 4, 2), [2, 2]);
    let max = OCDBT_NODE_ENTRIES_MAX as usize;
    assert_eq!(cut(std::iter::repeat_n(0, max + 1), 4, 1), [max, 1]);
    assert_eq!(cut(std::iter::repeat_n(0, max), 4, 2), [max]);
    assert_eq!(cut(std::iter::repeat_n(0, max + 1), 4, 2), [max - 1, 2]);
}

fn value() -> impl Strategy<Value = Value> {
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..30).prop_map(|bytes| inline(&bytes)),
        (0_u32..6, any::<u32>(), 0_u64..3).prop_map(|(file, offset, len)| {
            Value::Extent(Extent { file: FileId(file), offset: offset.into(), len: len << 33 })
        }),
    ]
}

/// Few or many keys that share much, keys of any bytes, and long ones.
fn many_keys() -> impl Strategy<Value = BTreeSet<Vec<u8>>> {
    prop_oneof![
        prop::collection::btree_set(prop::collection::vec(0_u8..3, 0..8), 0..200),
        prop::collection::btree_set(prop::collection::vec(any::<u8>(), 0..12), 0..60),
        prop::collection::btree_set((0_u8..3, 0_usize..300).prop_map(|(byte, len)| vec![byte; len]), 0..40),
        prop::collection::btree_set((0_u32..90, 0_u32..4).prop_map(|(p, c)| format!("p.{p}/c/{c}").into()), 0..300),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn what_is_written_is_scanned(
        keys in many_keys(),
        values in prop::collection::vec(value(), 1..20),
        root in prop::sample::select(vec!["", "state", "a/b"]),
        offset in 0_usize..3000,
        node_bytes in prop::sample::select(vec![0_u32, 1, 60, 200, 1000, 5000, 1 << 23, u32::MAX]),
        compress: bool,
    ) {
        let names = [NODES, "d/1", "ocdbt.process_0/d/1", "ocdbt.process_0/d/2", "ocdbt.process_1/d/1", "values"];
        let files = names.map(|name| path(root).join(name).unwrap());
        let values = values.iter().cycle().cloned();
        let index = Index::new(files.into(), keys.into_iter().map(Bytes::from).zip(values).collect());
        let config = config(node_bytes, compress);
        let (written, files) = write_at(&index, root, offset, &config);
        let database = read(&files, root);
        prop_assert_eq!(contents(&database.index), contents(&index));
        prop_assert_eq!((database.height, database.node_count), (written.height, written.node_count));
        prop_assert_eq!((database.generation, database.config), (1, config));
        // A database can be written again from what was read of it.
        prop_assert_eq!(write_at(&database.index, root, offset, &config).0, written);
    }
}
