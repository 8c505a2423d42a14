//! What is written, read by the real TensorStore: OCDBT databases, zarr metadata and encoded chunks; and what TensorStore
//! then adds to those databases, read here.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "tests fail by panicking and say what they compared"
)]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use bytes::Bytes;
use serde_json::{Value as Json, json};
use support::{python, run_python, scratch};
use touchdown::DType;
use touchdown::encode::{Checksums, Encoder, prepare};
use touchdown::io::{Root, serve};
use touchdown::kv::ocdbt::{Compression as NodeCompression, Config, NodePlace, scan, write};
use touchdown::kv::{Extent, FileId, Index, Value};
use touchdown::need::Machine;
use touchdown::relpath::RelPath;
use touchdown::shape::Region;
use touchdown::zarr::{Compression, Endian, Format, Grid, NewArray, shard};

type Values = BTreeMap<Vec<u8>, Vec<u8>>;

/// Of an array, a chunk and an inner chunk.
type Shapes = (&'static [u64], &'static [u64], Option<&'static [u64]>);

/// Values go to these files in turn; nodes go behind the first one's values.
const FILES: [&str; 3] = [
    "d/00112233445566778899aabbccddeeff",
    "ocdbt.process_0/d/aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "ocdbt.process_1/d/bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb",
];

#[test]
fn tensorstore_reads_what_is_written_and_is_read() {
    let Some(python) = python("tensorstore_reads_what_is_written_and_is_read") else {
        return;
    };
    let out = scratch("save-formats");
    let (values, arrays) = arrays();
    let mut databases: Vec<(&str, Values, Config)> = vec![
        ("arrays", values.clone(), config(8 << 20, true)),
        ("arrays_small_nodes", values, config(600, false)),
        ("empty", Values::new(), config(8 << 20, true)),
        ("one", [(b"k".to_vec(), b"v".to_vec())].into(), config(8 << 20, false)),
        ("empty_key_and_value", [(Vec::new(), b"v".to_vec()), (vec![0], Vec::new())].into(), config(1, false)),
    ];
    let binary = |n: u64, len: usize| (0..len).map(move |at| (n.wrapping_mul(0x9e37_79b9) >> (at * 5 % 29)) as u8);
    let random: Values =
        (0..3000).map(|n| (binary(n, 1 + n as usize % 40).collect(), binary(n, 9).collect())).collect();
    for (name, node_bytes) in [("random_1", 1), ("random_200", 200), ("random_5000", 5000)] {
        databases.push((name, random.clone(), config(node_bytes, node_bytes == 200)));
    }
    let long = (0..20_u8).map(|n| ([vec![b'k'; 65_534], vec![n]].concat(), vec![n; 2000])).collect();
    databases.push(("long_keys", long, config(1, true)));

    let mut heights = Vec::new();
    for (name, values, config) in &databases {
        heights.push(write_database(&out, name, values, config));
    }
    assert!(heights.iter().max() >= Some(&8), "{heights:?}");
    let names: Vec<&str> = databases.iter().map(|database| database.0).collect();
    fs::write(out.join("index.json"), json!({"databases": names, "arrays": arrays}).to_string()).unwrap();

    let report = run_python(&python, "oracle.py", ["save_formats", "--out", out.to_str().unwrap()]);
    println!("heights {heights:?}; {report}");
    for (name, mut values, _) in databases {
        let (found, generation) = read_database(&out.join(name));
        values.insert(b"appended".to_vec(), b"by TensorStore".to_vec());
        assert!(found == values, "{name}: another database after TensorStore's commit");
        assert_eq!(generation, 2, "{name}");
    }
    fs::remove_dir_all(&out).expect("the databases can be removed");
}

fn config(node_bytes: u32, compress: bool) -> Config {
    let compression = if compress { NodeCompression::Zstd { level: 0 } } else { NodeCompression::None };
    Config { decoded_node_bytes_max: node_bytes, compression, ..Config::new(*b"0123456789abcdef") }
}

/// Writes a database as a save would, and what it holds beside it. Returns the height of its tree.
fn write_database(out: &Path, name: &str, values: &Values, config: &Config) -> u8 {
    let files = FILES.map(|file| RelPath::new(file).unwrap());
    let mut data = FILES.map(|_| Vec::new());
    let mut expected = Vec::new();
    let entries = values.iter().enumerate().map(|(number, (key, value))| {
        for field in [key, value] {
            expected.extend((field.len() as u32).to_le_bytes());
            expected.extend(field);
        }
        let key = Bytes::from(key.clone());
        if value.len() <= 8 || (number % 2 == 0 && value.len() <= 1024) {
            return (key, Value::Inline(value.clone().into()));
        }
        let file = number % FILES.len();
        let extent = Extent { file: FileId(file as u32), offset: data[file].len() as u64, len: value.len() as u64 };
        data[file].extend(value);
        (key, Value::Extent(extent))
    });
    let index = Index::new(files.to_vec(), entries.collect());
    let place = NodePlace { root: &RelPath::root(), file: &files[0], offset: data[0].len() as u64 };
    let written = write(&index, place, config, 1_700_000_000_000_000_000).unwrap();
    data[0].extend(written.nodes);
    let folder = out.join(name);
    for (file, data) in FILES.iter().zip(data) {
        fs::create_dir_all(folder.join(file).parent().unwrap()).unwrap();
        if !data.is_empty() {
            fs::write(folder.join(file), data).unwrap();
        }
    }
    fs::write(folder.join("manifest.ocdbt"), written.manifest).unwrap();
    fs::write(out.join(format!("{name}.expected")), expected).unwrap();
    written.height
}

/// Every value of a database, and its generation.
fn read_database(folder: &Path) -> (Values, u64) {
    let root = Root::open(folder).unwrap();
    let machine = Machine::new(|ask| async move { scan(&ask, &RelPath::root()).await });
    let database = machine.drive(|needs| serve(&root, &needs)).unwrap().expect("a manifest");
    let value = |value: &Value| match value {
        Value::Inline(bytes) => bytes.to_vec(),
        Value::Extent(extent) => {
            let data = fs::read(folder.join(database.index.file(extent.file).as_path())).unwrap();
            data[extent.offset as usize..][..extent.len as usize].to_vec()
        }
    };
    let values = database.index.entries().iter().map(|(key, at)| (key.to_vec(), value(at))).collect();
    (values, database.generation)
}

/// Arrays of every type, in every format and with every option, as keys of a database and as what the oracle needs.
fn arrays() -> (Values, Vec<Json>) {
    let (mut values, mut told) = (Values::new(), Vec::new());
    let shapes: [Shapes; 4] =
        [(&[5, 6], &[2, 3], None), (&[5, 6], &[4, 6], Some(&[2, 3])), (&[], &[], None), (&[0, 3], &[1, 3], None)];
    for dtype in DType::ALL {
        for (format, compression, checksum) in options() {
            for (number, (shape, chunk_shape, inner_shape)) in shapes.into_iter().enumerate() {
                let array = NewArray {
                    shape: shape.to_vec(),
                    dtype,
                    chunk_shape: chunk_shape.to_vec(),
                    format,
                    inner_shape: inner_shape.map(<[u64]>::to_vec),
                    compression,
                    checksum,
                };
                if array.check().is_err() {
                    continue;
                }
                let prefix = format!("{dtype}.{format:?}.{compression:?}.{checksum}.{number}/");
                let count = shape.iter().product::<u64>() as usize * dtype.size();
                let raw: Vec<u8> = (0..count).map(|at| (at * 37 + at / 7 + number) as u8).collect();
                let elements = prepare(dtype, &raw).into_owned();
                values.insert(format!("{prefix}{}", format.metadata_key()).into(), array.metadata().unwrap());
                for (key, value) in chunks(&array, &elements) {
                    values.insert(format!("{prefix}{key}").into(), value);
                }
                let mask = match dtype {
                    DType::Int2 => 0x03,
                    DType::Int4 | DType::Float4E2M1FN => 0x0f,
                    _ => 0xff,
                };
                told.push(json!({
                    "database": if number % 2 == 0 { "arrays" } else { "arrays_small_nodes" },
                    "prefix": prefix,
                    "driver": if format == Format::V2 { "zarr" } else { "zarr3" },
                    "metadata_key": format.metadata_key(),
                    "elements": elements.iter().map(|byte| format!("{byte:02x}")).collect::<String>(),
                    "mask": mask,
                }));
            }
        }
    }
    assert!(told.len() > 1000, "{} arrays", told.len());
    (values, told)
}

fn options() -> impl Iterator<Item = (Format, Compression, bool)> {
    let compressions =
        [Compression::None, Compression::Zstd { level: 1 }, Compression::Zstd { level: 3 }, Compression::Gpu];
    [Format::V2, Format::V3].into_iter().flat_map(move |format| {
        compressions
            .into_iter()
            .flat_map(move |compression| [false, true].map(|checksum| (format, compression, checksum)))
    })
}

/// The keys and values of an array's chunks.
fn chunks(array: &NewArray, elements: &[u8]) -> Vec<(String, Vec<u8>)> {
    let (sums, compressed) = (array.checksum, array.compression != Compression::None);
    let checksums = Checksums { frame: sums && compressed, crc32c: sums && array.format == Format::V3 };
    let mut encoder = Encoder::new(array.compression, checksums).unwrap();
    let grid = array.meta().unwrap().grid;
    let mut chunks = Vec::new();
    for position in grid.positions(&Region::whole(&array.shape)) {
        let chunk = grid.region(&position).unwrap();
        let mut value = Vec::new();
        if array.format == Format::V2 {
            encoder.encode(&cut(array, elements, &chunk), &mut value).unwrap();
        } else {
            let inner = Grid::new(array.inner_shape().to_vec()).unwrap();
            let mut places = Vec::new();
            for position in inner.positions(&Region::whole(&array.chunk_shape)) {
                let mut region = inner.region(&position).unwrap();
                region.start.iter_mut().zip(&chunk.start).for_each(|(inner, outer)| *inner += outer);
                let offset = value.len() as u64;
                encoder.encode(&cut(array, elements, &region), &mut value).unwrap();
                places.push(Some((offset, value.len() as u64 - offset)));
            }
            value.extend(shard::encode_index(&places, Endian::Little, true).unwrap());
        }
        chunks.push((array.format.chunk_keys().key(&position), value));
    }
    chunks
}

/// The elements of a region, zeros where it reaches beyond the array.
fn cut(array: &NewArray, elements: &[u8], region: &Region) -> Vec<u8> {
    let size = array.dtype.size();
    let one = Grid::new(vec![1; array.shape.len()]).unwrap();
    let element = |position: Vec<u64>| match Grid::index(&position, &array.shape) {
        Some(at) => elements[at as usize * size..][..size].to_vec(),
        None => vec![0; size],
    };
    one.positions(region).flat_map(element).collect()
}
