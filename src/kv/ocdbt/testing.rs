//! Databases for tests: an encoder that makes every choice the format allows at random, and files in memory.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use bytes::Bytes;

use super::codec::{MANIFEST_MAGIC, NODE_MAGIC};
use crate::need::{Answer, DirEntry, EntryKind, Need};

/// Files in memory, by path.
pub(super) type Files = BTreeMap<String, Vec<u8>>;

/// A value, and where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Stored {
    Inline(Vec<u8>),
    OutOfLine(String, u64, u64),
}

/// A database, and what a scan of it should find.
pub(super) struct Written {
    pub(super) files: Files,
    pub(super) expected: BTreeMap<Vec<u8>, Stored>,
    pub(super) height: u8,
    pub(super) node_count: usize,
}

/// Answers as a driver over these files would.
pub(super) fn serve(files: &Files, need: &Need) -> Answer {
    let find = |path: &crate::relpath::RelPath| files.get(&path.to_string());
    match need {
        Need::File { path, .. } => find(path).map_or(Answer::Missing, |bytes| Answer::Bytes(bytes.clone().into())),
        Need::Range { path, offset, len } => find(path).map_or(Answer::Missing, |bytes| {
            // A real driver fails on a range beyond the file; what a walk does with too few bytes is tested here.
            let start = (*offset).min(bytes.len() as u64) as usize;
            let end = offset.saturating_add(*len).min(bytes.len() as u64) as usize;
            Answer::Bytes(Bytes::copy_from_slice(&bytes[start..end]))
        }),
        Need::List { .. } => {
            let entry = |name: &String| DirEntry { name: name.clone(), kind: EntryKind::File };
            Answer::Listing(files.keys().filter(|name| !name.contains('/')).map(entry).collect())
        }
        other => panic!("unexpected {other:?}"),
    }
}

/// Bytes from hexadecimal digits; white space is dropped.
pub(super) fn hex(digits: &str) -> Vec<u8> {
    let digits: Vec<char> = digits.chars().filter(|digit| !digit.is_whitespace()).collect();
    digits.chunks(2).map(|pair| u8::from_str_radix(&String::from_iter(pair), 16).unwrap()).collect()
}

/// Puts a body into its envelope.
pub(super) fn seal(magic: u32, body: &[u8], compress: bool) -> Vec<u8> {
    if !compress {
        return envelope(magic, 0, body);
    }
    // Without a content size in the frame, which is the harder case.
    let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
    std::io::Write::write_all(&mut encoder, body).unwrap();
    envelope(magic, 1, &encoder.finish().unwrap())
}

pub(super) fn envelope(magic: u32, compression: u8, stored: &[u8]) -> Vec<u8> {
    let mut bytes = magic.to_be_bytes().to_vec();
    bytes.extend((stored.len() as u64 + 18).to_le_bytes());
    bytes.extend([0, compression]);
    bytes.extend(stored);
    bytes.extend(crc32c::crc32c(&bytes).to_le_bytes());
    bytes
}

fn uleb(bytes: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}

fn ulebs(bytes: &mut Vec<u8>, values: impl IntoIterator<Item = u64>) {
    values.into_iter().for_each(|value| uleb(bytes, value));
}

/// A manifest of one version; `root` is the root node's height, file, offset and length.
pub(super) fn manifest(root: Option<(u8, &str, u64, u64)>, generation: u64) -> Vec<u8> {
    let root = root.map(|(height, file, offset, len)| (height, file, 0, offset, len));
    seal(MANIFEST_MAGIC, &manifest_body(root, generation), false)
}

/// The same, with the length of the file's base after the file.
fn manifest_body(root: Option<(u8, &str, usize, u64, u64)>, generation: u64) -> Vec<u8> {
    let (height, file, base_len, offset, len) = root.unwrap_or((0, "", 0, u64::MAX, u64::MAX));
    let mut body = config(0);
    file_table(&mut body, &[file.split_at(base_len)], &mut Dice(1));
    ulebs(&mut body, [1, generation]);
    body.push(height);
    ulebs(&mut body, [0, offset, len, 7, 7, 7]);
    body.extend([9; 8]);
    // One reference to older versions.
    ulebs(&mut body, [1, 1, 0, 5, 5, 1]);
    body.extend([9; 8]);
    body.push(1);
    body
}

/// A manifest that says that the versions stand elsewhere.
pub(super) fn numbered_manifest() -> Vec<u8> {
    seal(MANIFEST_MAGIC, &config(1), false)
}

fn config(kind: u8) -> Vec<u8> {
    let mut body = vec![0; 16];
    body.push(kind);
    ulebs(&mut body, [1024, 100_000_000]);
    body.push(4);
    uleb(&mut body, 1);
    body.extend(0_i32.to_le_bytes());
    body
}

/// A leaf without files whose values are empty.
pub(super) fn leaf_node(keys: &[&str]) -> Vec<u8> {
    let keys: Vec<_> = keys.iter().map(|key| (key.as_bytes().to_vec(), Stored::Inline(Vec::new()))).collect();
    seal(NODE_MAGIC, &leaf_body(&keys, 0, &mut Dice(1)), false)
}

/// An interior node whose children (key, prefix length, offset, length) are all in the file `d`.
pub(super) fn interior_node(height: u8, children: &[(&str, u8, u64, u64)]) -> Vec<u8> {
    let child = |&(key, prefix_len, offset, len): &(&str, u8, u64, u64)| Child {
        key: key.as_bytes().to_vec(),
        prefix_len: prefix_len.into(),
        file: ("", "d".to_owned()),
        offset,
        len,
        keys: 0..0,
    };
    let children: Vec<_> = children.iter().map(child).collect();
    seal(NODE_MAGIC, &interior_body(height, &children, 0, &mut Dice(1)), false)
}

/// Numbers from a seed (xorshift64*).
struct Dice(u64);

impl Dice {
    /// A number in `0..=max`.
    fn roll(&mut self, max: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % (max + 1)
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.roll(of.len() - 1)]
    }
}

/// An entry of an interior node. Its key is whole, its file relative to the directory of the node that holds it.
struct Child {
    key: Vec<u8>,
    prefix_len: usize,
    file: (&'static str, String),
    offset: u64,
    len: u64,
    /// Positions of the keys below.
    keys: Range<usize>,
}

/// Some database with these keys.
pub(super) fn write_database(keys: BTreeSet<Vec<u8>>, seed: u64) -> Written {
    write_damaged(keys, seed, &|_| {})
}

/// Some database with these keys, of which one node's body was changed before its checksum was computed.
pub(super) fn write_damaged(keys: BTreeSet<Vec<u8>>, seed: u64, damage: &dyn Fn(&mut Vec<u8>)) -> Written {
    let dice = &mut Dice(seed | 1);
    let entries: Vec<_> = keys.into_iter().map(|key| (key, value(dice))).collect();
    // The shape: how many keys or children each node of a level has, from the leaves up.
    let mut shape = vec![cut(entries.len(), dice)];
    while shape.last().unwrap().len() > 1 || dice.roll(3) == 0 {
        shape.push(cut(shape.last().unwrap().len(), dice));
    }
    // The directories: the nodes of a level stand in a base below the directory of the level above.
    let bases: Vec<&str> = shape.iter().map(|_| dice.pick(&["", "", "x/", "ocdbt.process_0/"])).collect();
    let damaged = dice.roll(shape.iter().map(Vec::len).sum::<usize>() - 1);

    let mut files = Files::new();
    let mut expected = BTreeMap::new();
    let mut children = Vec::new();
    let mut node_count = 0;
    for (height, counts) in shape.iter().enumerate() {
        let directory: String = bases[height..].iter().rev().copied().collect();
        let mut below = children.into_iter();
        children = Vec::new();
        for &count in counts {
            let kids: Vec<Child> = if height == 0 { Vec::new() } else { below.by_ref().take(count).collect() };
            let start = children.last().map_or(0, |node: &Child| node.keys.end);
            let keys = start..kids.last().map_or(start + count, |kid| kid.keys.end);
            let run = &entries[keys.clone()];
            let prefix_len = if height + 1 == shape.len() {
                0
            } else {
                let max = shared(&run[0].0, &run[run.len() - 1].0);
                dice.roll(kids.iter().map(|kid| kid.prefix_len).fold(max, usize::min))
            };
            // The parent may store any key that is beyond the node before and not beyond this one.
            let mut key = kids.first().map_or(&run[0].0, |kid| &kid.key).clone();
            let before = start.checked_sub(1).map(|before| &entries[before].0[..]);
            while key.len() > prefix_len
                && before.is_none_or(|before| &key[..key.len() - 1] > before)
                && dice.roll(1) == 0
            {
                key.pop();
            }

            let mut body = if height == 0 {
                expected.extend(run.iter().map(|(key, value)| (key.clone(), resolved(value, &directory))));
                leaf_body(run, prefix_len, dice)
            } else {
                interior_body(height as u8, &kids, prefix_len, dice)
            };
            if node_count == damaged {
                damage(&mut body);
            }
            node_count += 1;
            let encoded = seal(NODE_MAGIC, &body, dice.roll(1) == 0);
            let name = dice.pick(&["d/0", "d/1", "e"]).to_owned();
            let file = files.entry(format!("{directory}{name}")).or_default();
            let (offset, len) = (file.len() as u64, encoded.len() as u64);
            file.extend(encoded);
            children.push(Child { key, prefix_len, file: (bases[height], name), offset, len, keys });
        }
    }

    let height = (shape.len() - 1) as u8;
    let root = &children[0];
    let path = format!("{}{}", root.file.0, root.file.1);
    let body = manifest_body(Some((height, &path, root.file.0.len(), root.offset, root.len)), 1 + dice.roll(40) as u64);
    files.insert("manifest.ocdbt".to_owned(), seal(MANIFEST_MAGIC, &body, dice.roll(1) == 0));
    Written { files, expected, height, node_count }
}

/// Cuts `count` things into runs of at least one.
fn cut(count: usize, dice: &mut Dice) -> Vec<usize> {
    let max = dice.pick(&[1, 4, 400]);
    let mut runs = Vec::new();
    let mut left = count;
    while left > 0 {
        let run = (1 + dice.roll(max)).min(left);
        runs.push(run);
        left -= run;
    }
    runs
}

fn value(dice: &mut Dice) -> Stored {
    if dice.roll(1) == 0 {
        return Stored::Inline((0..dice.roll(20)).map(|byte| byte as u8).collect());
    }
    let file = dice.pick(&["values", "ocdbt.process_0/d/1", "ocdbt.process_1/d/1"]);
    Stored::OutOfLine(file.to_owned(), dice.roll(1000) as u64, dice.roll(3) as u64 * 1000)
}

/// The value as an index should have it, given the directory of the leaf.
fn resolved(value: &Stored, directory: &str) -> Stored {
    match value {
        Stored::OutOfLine(_, _, 0) => Stored::Inline(Vec::new()),
        Stored::OutOfLine(file, offset, len) => Stored::OutOfLine(format!("{directory}{file}"), *offset, *len),
        Stored::Inline(_) => value.clone(),
    }
}

fn leaf_body(entries: &[(Vec<u8>, Stored)], prefix_len: usize, dice: &mut Dice) -> Vec<u8> {
    let out_of_line: Vec<_> = entries
        .iter()
        .filter_map(|(_, value)| match value {
            // An empty value may name no file.
            Stored::OutOfLine(_, offset, 0) => Some((("", ""), *offset)),
            Stored::OutOfLine(file, offset, _) => Some((file.split_at(file.find("d/").unwrap_or(0)), *offset)),
            Stored::Inline(_) => None,
        })
        .collect();
    let paths: BTreeSet<_> = out_of_line.iter().map(|&(path, _)| path).collect();
    let paths: Vec<_> = paths.into_iter().collect();

    let mut body = vec![0];
    file_table(&mut body, &paths, dice);
    uleb(&mut body, entries.len() as u64);
    let keys: Vec<_> = entries.iter().map(|(key, _)| &key[prefix_len..]).collect();
    front_code(&mut body, &keys, |_| usize::MAX, [], dice);
    for (_, value) in entries {
        match value {
            Stored::Inline(bytes) => uleb(&mut body, bytes.len() as u64),
            Stored::OutOfLine(_, _, len) => uleb(&mut body, *len),
        }
    }
    body.extend(entries.iter().map(|(_, value)| u8::from(matches!(value, Stored::OutOfLine(..)))));
    ulebs(&mut body, out_of_line.iter().map(|(path, _)| paths.iter().position(|other| other == path).unwrap() as u64));
    ulebs(&mut body, out_of_line.iter().map(|&(_, offset)| offset));
    for (_, value) in entries {
        if let Stored::Inline(bytes) = value {
            body.extend(bytes);
        }
    }
    body
}

fn interior_body(height: u8, children: &[Child], prefix_len: usize, dice: &mut Dice) -> Vec<u8> {
    let paths: BTreeSet<(&str, &str)> = children.iter().map(|child| (child.file.0, &*child.file.1)).collect();
    let paths: Vec<_> = paths.into_iter().collect();
    let id = |child: &Child| paths.iter().position(|&path| path == (child.file.0, &*child.file.1)).unwrap() as u64;

    let mut body = vec![height];
    file_table(&mut body, &paths, dice);
    uleb(&mut body, children.len() as u64);
    let keys: Vec<_> = children.iter().map(|child| &child.key[prefix_len..]).collect();
    let prefixes = children.iter().map(|child| (child.prefix_len - prefix_len) as u64);
    front_code(&mut body, &keys, |_| usize::MAX, prefixes, dice);
    ulebs(&mut body, children.iter().map(id));
    ulebs(&mut body, children.iter().map(|child| child.offset));
    ulebs(&mut body, children.iter().map(|child| child.len));
    // Statistics, all wrong.
    ulebs(&mut body, std::iter::repeat_n(7, 3 * children.len()));
    body
}

/// Writes strings: columns of lengths, a column between, suffixes. A prefix is at most what its `limit` allows.
fn front_code(
    body: &mut Vec<u8>,
    strings: &[impl AsRef<[u8]>],
    limit: impl Fn(usize) -> usize,
    between: impl IntoIterator<Item = u64>,
    dice: &mut Dice,
) {
    let strings: Vec<&[u8]> = strings.iter().map(AsRef::as_ref).collect();
    let mut prefixes = vec![0];
    prefixes.extend(
        (1..strings.len()).map(|index| dice.roll(shared(strings[index - 1], strings[index]).min(limit(index)))),
    );
    let coded = || strings.iter().zip(&prefixes);
    ulebs(body, prefixes.iter().skip(1).map(|&prefix| prefix as u64));
    ulebs(body, coded().map(|(string, prefix)| (string.len() - prefix) as u64));
    ulebs(body, between);
    body.extend(coded().flat_map(|(string, &prefix)| string[prefix..].to_vec()));
}

/// Paths are (base, relative), sorted.
fn file_table(body: &mut Vec<u8>, paths: &[(&str, &str)], dice: &mut Dice) {
    uleb(body, paths.len() as u64);
    if paths.is_empty() {
        return;
    }
    let whole: Vec<_> = paths.iter().map(|(base, relative)| [*base, *relative].concat()).collect();
    // A prefix may reach beyond the base only if the bases are the same.
    let limit = |index: usize| match (paths[index - 1].0, paths[index].0) {
        (before, base) if before == base => usize::MAX,
        (before, base) => before.len().min(base.len()),
    };
    front_code(body, &whole, limit, paths.iter().map(|(base, _)| base.len() as u64), dice);
}

/// Length of the common prefix.
fn shared(a: &[u8], b: &[u8]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}
