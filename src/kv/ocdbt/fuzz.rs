//! Bodies of the fuzz targets of this folder: whatever the bytes are, the decoders return.

use super::btree::{Expected, Node};
use super::codec::{Cursor, MANIFEST_MAGIC, NODE_MAGIC, encode_envelope};
use super::data_ref::DataFileTable;
use super::manifest::{Compression, Manifest};
use super::version_tree::{decode_versions, skip_version_nodes};

/// A manifest as it is, and as the body of one with the right checksum.
pub(crate) fn manifest(bytes: &[u8]) {
    drop(Manifest::decode(bytes));
    if let Ok(whole) = encode_envelope(MANIFEST_MAGIC, bytes, Compression::None) {
        drop(Manifest::decode(&whole));
    }
}

/// A node of the height that it says it has, below a parent whose key is the rest of the first line.
pub(crate) fn node(bytes: &[u8]) {
    let heights = [bytes.first().copied().unwrap_or(0), 0, 1];
    for height in heights {
        for (key, prefix_len) in [(&b""[..], 0), (b"params.w/", 7)] {
            let expected = Expected { height, key, prefix_len };
            drop(Node::decode(bytes, expected));
            if let Ok(whole) = encode_envelope(NODE_MAGIC, bytes, Compression::None) {
                drop(Node::decode(&whole, expected));
            }
        }
    }
}

/// A table of files.
pub(crate) fn data_files(bytes: &[u8]) {
    if let Ok(table) = DataFileTable::decode(&mut Cursor::new(bytes)) {
        (0..table.count()).for_each(|id| assert!(table.file(id).is_ok(), "a file of the table is not in it"));
    }
}

/// Versions and nodes of older versions; the first two bytes say of how many files and of which arity.
pub(crate) fn versions(bytes: &[u8]) {
    let [files, arity, body @ ..] = bytes else { return };
    let mut body = Cursor::new(body);
    if decode_versions(&mut body, arity % 17, usize::from(*files)).is_ok() {
        drop(skip_version_nodes(&mut body, usize::from(*files)));
    }
}
