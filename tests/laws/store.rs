//! Writes arrays as zarr or safetensors and remembers, for every element, which bytes of which file hold it.

use std::fs;
use std::path::Path;

use serde_json::{Value as Json, json};
use touchdown::DType;

use super::grid::{indices, position, volume};
use super::tape::Tape;

/// Where the value of an element is.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Place {
    /// Its own bytes of a file; `checked` when they are part of something with a checksum.
    Bytes { file: String, offset: u64, checked: bool },
    /// Inside something encoded, which is this range of a file.
    Encoded { file: String, offset: u64, len: u64 },
    /// The only inner chunk of a shard: what is read depends on the size of a slot.
    Single { file: String, len: u64 },
    /// Not stored.
    Absent,
}

/// All elements of a checkpoint, array after array.
#[derive(Debug, Default)]
pub struct Stored {
    pub arrays: Vec<StoredArray>,
    /// Of every element its value (small enough for every type) and its place.
    pub values: Vec<u8>,
    pub places: Vec<Place>,
}

#[derive(Debug)]
pub struct StoredArray {
    pub name: String,
    pub dtype: DType,
    pub shape: Vec<u64>,
    /// Number of its first element among all.
    pub first: usize,
}

pub const DTYPES: [DType; 6] =
    [DType::UInt8, DType::Int16, DType::Float32, DType::Int32, DType::BFloat16, DType::Float64];

/// The value of what is not stored.
const FILL: u8 = 7;

/// What stands in stored bytes that are no elements of the array.
const JUNK: u8 = 201;

impl Stored {
    /// A checkpoint of one to three arrays below `dir`. `long`: some are larger than the smallest slot.
    pub fn write(dir: &Path, tape: &mut Tape<'_>, long: bool) -> Self {
        let mut stored = Self::default();
        let count = 1 + tape.below(3);
        let safetensors = tape.once_in(4);
        let mut tensors = Vec::new();
        for number in 0..count {
            let name = format!("a{number}");
            let dtype = tape.one_of(&DTYPES);
            // A bare 0-d zarr array is a scalar, not an array; in safetensors it is one.
            let rank = if safetensors { tape.below(4) } else { 1 + tape.below(3) };
            let mut shape: Vec<u64> = (0..rank).map(|_| if tape.once_in(25) { 0 } else { 1 + tape.below(7) }).collect();
            if let (true, true, Some(last)) = (long, tape.once_in(12), shape.last_mut()) {
                *last *= 1501;
            }
            let first = stored.values.len();
            stored.values.extend((0..volume(&shape)).map(|at| value(first + at)));
            stored.places.resize(stored.values.len(), Place::Absent);
            let array = StoredArray { name, dtype, shape, first };
            if safetensors {
                tensors.push(array);
                continue;
            }
            fs::create_dir(dir.join(&array.name)).unwrap();
            match tape.below(3) {
                0 => stored.write_v2(dir, &array, tape),
                _ => stored.write_v3(dir, &array, tape),
            }
            stored.arrays.push(array);
        }
        if safetensors {
            stored.write_safetensors(dir, tensors);
        }
        stored
    }

    fn write_safetensors(&mut self, dir: &Path, tensors: Vec<StoredArray>) {
        let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
        for tensor in &tensors {
            let code = match tensor.dtype {
                DType::UInt8 => "U8",
                DType::Int16 => "I16",
                DType::Int32 => "I32",
                DType::BFloat16 => "BF16",
                DType::Float32 => "F32",
                _ => "F64",
            };
            // Sizes differ, so that not every tensor is aligned; the format allows it.
            let from = data.len();
            (0..volume(&tensor.shape))
                .for_each(|at| data.extend(element(tensor.dtype, self.values[tensor.first + at])));
            let offsets = [from, data.len()];
            header.insert(tensor.name.clone(), json!({"dtype": code, "shape": tensor.shape, "data_offsets": offsets}));
        }
        let header = Json::from(header).to_string();
        let mut at = 8 + header.len() as u64;
        for tensor in &tensors {
            for number in tensor.first..tensor.first + volume(&tensor.shape) {
                self.places[number] = Place::Bytes { file: "model.safetensors".into(), offset: at, checked: false };
                at += tensor.dtype.size() as u64;
            }
        }
        let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat();
        fs::write(dir.join("model.safetensors"), bytes).unwrap();
        // A directory keeps its tensors in the order of the header, which serde_json sorts by name.
        self.arrays = tensors;
    }

    fn write_v2(&mut self, dir: &Path, array: &StoredArray, tape: &mut Tape<'_>) {
        let chunk = chunk_shape(&array.shape, tape);
        let order = tape.one_of(&["C", "F"]);
        let big = tape.once_in(3) && array.dtype != DType::BFloat16 && array.dtype.size() > 1;
        let zstd = tape.once_in(3);
        let code = match array.dtype {
            DType::UInt8 => "|u1",
            DType::Int16 => "<i2",
            DType::Int32 => "<i4",
            DType::Float32 => "<f4",
            DType::Float64 => "<f8",
            _ => "bfloat16",
        };
        let meta = json!({
            "zarr_format": 2, "shape": array.shape, "chunks": chunk, "order": order, "filters": null,
            "dtype": if big { code.replace('<', ">") } else { code.to_owned() },
            "compressor": if zstd { json!({"id": "zstd", "level": 1}) } else { Json::Null },
            "fill_value": FILL,
            "dimension_separator": ".",
        });
        let rank = array.shape.len();
        let stored_order: Vec<usize> = if order == "C" { (0..rank).collect() } else { (0..rank).rev().collect() };
        fs::write(dir.join(&array.name).join(".zarray"), meta.to_string()).unwrap();
        for at in indices(&counts(&array.shape, &chunk)) {
            let key = at.iter().map(u64::to_string).collect::<Vec<_>>().join(".");
            let file = format!("{}/{key}", array.name);
            let start: Vec<u64> = at.iter().zip(&chunk).map(|(at, extent)| at * extent).collect();
            let elements = self.elements(array, &start, &chunk, &stored_order);
            if tape.once_in(6) {
                self.leave_out(&elements);
                continue;
            }
            let mut bytes = self.bytes(array.dtype, &elements, big);
            if zstd {
                bytes = ::zstd::bulk::compress(&bytes, 1).unwrap();
                self.encoded(&elements, &Place::Encoded { file: file.clone(), offset: 0, len: bytes.len() as u64 });
            } else {
                self.raw(array.dtype, &elements, &file, 0, false);
            }
            fs::write(dir.join(&file), bytes).unwrap();
        }
    }

    fn write_v3(&mut self, dir: &Path, array: &StoredArray, tape: &mut Tape<'_>) {
        let inner = chunk_shape(&array.shape, tape);
        let plain = tape.once_in(4);
        let several: Vec<u64> = inner.iter().map(|_| if plain { 1 } else { 1 + tape.below(3) }).collect();
        // The inner chunk is said in stored order, the shard in the array's.
        let order = if tape.once_in(3) { tape.order(array.shape.len()) } else { (0..array.shape.len()).collect() };
        let shard: Vec<u64> = inner.iter().zip(&several).map(|(inner, count)| inner * count).collect();
        let permuted = |values: &[u64]| order.iter().map(|&dim| values[dim]).collect::<Vec<u64>>();
        let big = tape.once_in(3) && array.dtype.size() > 1;
        let codec = tape.one_of(&["none", "crc32c", "zstd", "zstd+crc32c"]);
        let at_start = tape.once_in(3);
        let bytes_codec = if array.dtype.size() == 1 {
            json!({"name": "bytes"})
        } else {
            json!({"name": "bytes", "configuration": {"endian": if big { "big" } else { "little" }}})
        };
        let mut chain = vec![bytes_codec];
        if codec.starts_with("zstd") {
            chain.push(json!({"name": "zstd", "configuration": {"level": 1, "checksum": false}}));
        }
        if codec.ends_with("crc32c") {
            chain.push(json!({"name": "crc32c"}));
        }
        let mut outer = Vec::new();
        if order.windows(2).any(|pair| pair[0] > pair[1]) {
            outer.push(json!({"name": "transpose", "configuration": {"order": order}}));
        }
        if plain {
            outer.extend(chain);
        } else {
            outer.push(json!({"name": "sharding_indexed", "configuration": {
                "chunk_shape": permuted(&inner), "codecs": chain,
                "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
                "index_location": if at_start { "start" } else { "end" },
            }}));
        }
        let meta = json!({
            "zarr_format": 3, "node_type": "array", "shape": array.shape, "data_type": array.dtype.name(),
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "codecs": outer, "fill_value": FILL, "attributes": {},
        });
        fs::write(dir.join(&array.name).join("zarr.json"), meta.to_string()).unwrap();
        let encode = |bytes: Vec<u8>| {
            let bytes = if codec.starts_with("zstd") { ::zstd::bulk::compress(&bytes, 1).unwrap() } else { bytes };
            if codec.ends_with("crc32c") { with_crc(bytes) } else { bytes }
        };
        let checked = codec.ends_with("crc32c");
        for at in indices(&counts(&array.shape, &shard)) {
            let key = at.iter().map(|at| format!(".{at}")).collect::<String>();
            let file = format!("{}/c{key}", array.name);
            let shard_start: Vec<u64> = at.iter().zip(&shard).map(|(at, extent)| at * extent).collect();
            if tape.once_in(8) {
                let elements = self.elements(array, &shard_start, &shard, &order);
                self.leave_out(&elements);
                continue;
            }
            if plain {
                let elements = self.elements(array, &shard_start, &inner, &order);
                let bytes = encode(self.bytes(array.dtype, &elements, big));
                if codec.starts_with("zstd") {
                    let len = bytes.len() as u64;
                    self.encoded(&elements, &Place::Encoded { file: file.clone(), offset: 0, len });
                } else {
                    self.raw(array.dtype, &elements, &file, 0, checked);
                }
                fs::write(dir.join(&file), bytes).unwrap();
                continue;
            }
            // Inner chunks in stored order, with holes between them and some not stored.
            let numbers = indices(&permuted(&several));
            let index_len = 16 * numbers.len() as u64 + 4;
            let base = if at_start { index_len } else { 0 };
            let (mut data, mut index) = (Vec::new(), Vec::new());
            let mut inner_places = Vec::new();
            for number in &numbers {
                let mut start = shard_start.clone();
                for (stored, &dim) in order.iter().enumerate() {
                    start[dim] += number[stored] * inner[dim];
                }
                let elements = self.elements(array, &start, &inner, &order);
                if tape.once_in(6) {
                    self.leave_out(&elements);
                    index.extend([u64::MAX; 2]);
                    if numbers.len() == 1 && codec.starts_with("zstd") {
                        // Only the index tells, and it is read with the chunk that might be there.
                        self.encoded(&elements, &Place::Single { file: file.clone(), len: index_len });
                    }
                    continue;
                }
                data.extend(vec![0xA5; tape.below(3) as usize]);
                let bytes = encode(self.bytes(array.dtype, &elements, big));
                let (offset, len) = (base + data.len() as u64, bytes.len() as u64);
                index.extend([offset, len]);
                data.extend(bytes);
                inner_places.push((elements, offset, len));
            }
            let index = with_crc(index.iter().flat_map(|number| number.to_le_bytes()).collect());
            let bytes = if at_start { [index, data].concat() } else { [data, index].concat() };
            for (elements, offset, len) in inner_places {
                let file = file.clone();
                if !codec.starts_with("zstd") {
                    self.raw(array.dtype, &elements, &file, offset, checked);
                } else if numbers.len() == 1 {
                    self.encoded(&elements, &Place::Single { file, len: bytes.len() as u64 });
                } else {
                    self.encoded(&elements, &Place::Encoded { file, offset, len });
                }
            }
            fs::write(dir.join(&file), bytes).unwrap();
        }
    }

    /// The elements of a chunk in stored order, by their number; `None` beyond the array's edge.
    fn elements(&self, array: &StoredArray, start: &[u64], chunk: &[u64], order: &[usize]) -> Vec<Option<usize>> {
        let stored: Vec<u64> = order.iter().map(|&dim| chunk[dim]).collect();
        let number = |index: Vec<u64>| {
            let mut at = start.to_vec();
            order.iter().zip(index).for_each(|(&dim, index)| at[dim] += index);
            let inside = at.iter().zip(&array.shape).all(|(at, extent)| at < extent);
            inside.then(|| array.first + position(&at, &array.shape))
        };
        indices(&stored).into_iter().map(number).collect()
    }

    fn bytes(&self, dtype: DType, elements: &[Option<usize>], big: bool) -> Vec<u8> {
        let one = |number: &Option<usize>| {
            let mut bytes = element(dtype, number.map_or(JUNK, |number| self.values[number]));
            if big {
                bytes.reverse();
            }
            bytes
        };
        elements.iter().flat_map(one).collect()
    }

    fn raw(&mut self, dtype: DType, elements: &[Option<usize>], file: &str, start: u64, checked: bool) {
        for (at, number) in elements.iter().enumerate() {
            if let Some(number) = *number {
                let offset = start + (at * dtype.size()) as u64;
                self.places[number] = Place::Bytes { file: file.to_owned(), offset, checked };
            }
        }
    }

    fn encoded(&mut self, elements: &[Option<usize>], place: &Place) {
        elements.iter().flatten().for_each(|&number| self.places[number] = place.clone());
    }

    fn leave_out(&mut self, elements: &[Option<usize>]) {
        for &number in elements.iter().flatten() {
            (self.values[number], self.places[number]) = (FILL, Place::Absent);
        }
    }
}

/// Chunk extents of 1 up to one more than the array's.
fn chunk_shape(shape: &[u64], tape: &mut Tape<'_>) -> Vec<u64> {
    // Long dimensions get few chunks: every chunk is a file.
    let extent = |&extent: &u64| if extent > 100 { extent.div_ceil(3) } else { extent + 1 - tape.below(extent + 1) };
    shape.iter().map(extent).collect()
}

fn counts(shape: &[u64], chunk: &[u64]) -> Vec<u64> {
    shape.iter().zip(chunk).map(|(extent, chunk)| extent.div_ceil(*chunk)).collect()
}

/// A value of 0 to 250 that looks random, so that an element in the wrong place is noticed.
fn value(number: usize) -> u8 {
    let mixed = (number as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    ((mixed >> 40) % 251) as u8
}

fn with_crc(mut bytes: Vec<u8>) -> Vec<u8> {
    let crc = crc32c::crc32c(&bytes);
    bytes.extend(crc.to_le_bytes());
    bytes
}

/// A small number in the memory form of a type.
pub fn element(dtype: DType, value: u8) -> Vec<u8> {
    match dtype {
        DType::UInt8 => vec![value],
        DType::Int16 => i16::from(value).to_le_bytes().into(),
        DType::Int32 => i32::from(value).to_le_bytes().into(),
        DType::BFloat16 => half::bf16::from_f32(value.into()).to_le_bytes().into(),
        DType::Float32 => f32::from(value).to_le_bytes().into(),
        DType::Float64 => f64::from(value).to_le_bytes().into(),
        other => panic!("{other} is not among the types of these tests"),
    }
}
