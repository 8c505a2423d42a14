//! The manifest: a database's configuration and where its latest version stands.

use super::codec::{Cursor, MANIFEST_MAGIC, STORED, ZSTD, decode_envelope, encode_envelope, put_uleb};
use super::data_ref::DataFileTable;
use super::version_tree::{Statistics, Version, decode_versions, encode_version, skip_version_nodes};
use super::{OcdbtError, Result};
use crate::limits::{
    OCDBT_INLINE_BYTES_DEFAULT, OCDBT_INLINE_BYTES_MAX, OCDBT_NODE_BYTES_DEFAULT, ZSTD_LEVEL_MAX, ZSTD_LEVEL_MIN,
};

/// The contents of `manifest.ocdbt`, or of one numbered manifest.
///
/// | field         | encoding | |
/// |---------------|----------|-|
/// | configuration |          | see [`Config`]; one field of it is the kind of manifest |
/// | data files    |          | see [`DataFileTable`]; this and the rest only if the kind is single |
/// | versions      |          | see [`Version`]; the last one is the current state |
/// | version nodes |          | older versions; not read |
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Manifest {
    /// The versions stand in this file.
    Single { config: Config, files: DataFileTable, latest: Version },
    /// The versions stand in files beside this one, named by the generation that they reach.
    Numbered { config: Config },
}

/// How a database was configured. Hints to writers: a reader believes each node instead.
///
/// | field                  | encoding  | constraint |
/// |------------------------|-----------|------------|
/// | uuid                   | 16 bytes  | |
/// | manifest kind          | u8        | 0 single, 1 numbered |
/// | max_inline_value_bytes | uleb      | at most 2^20 |
/// | max_decoded_node_bytes | uleb      | 32 bits |
/// | version_tree_arity     | u8        | logarithm, 1..=16 |
/// | compression            | uleb      | 0 none, 1 zstd |
/// | zstd level             | i32le     | -131072..=22; only if the compression is zstd |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Identifies the database.
    pub uuid: [u8; 16],
    /// Longest value in bytes that is stored in a node.
    pub inline_value_bytes_max: u32,
    /// Size in bytes at which a node is split, before compression.
    pub decoded_node_bytes_max: u32,
    /// Logarithm to base 2 of how many versions one node of the version tree holds.
    pub version_tree_arity_log2: u8,
    /// How nodes are compressed.
    pub compression: Compression,
}

/// How the nodes of a database are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// One zstd frame a node.
    Zstd {
        /// The level asked for.
        level: i32,
    },
}

impl Manifest {
    pub(super) fn decode(encoded: &[u8]) -> Result<Self> {
        let body = decode_envelope(encoded, MANIFEST_MAGIC)?;
        let mut body = Cursor::new(&body);
        let (config, single) = Config::decode(&mut body)?;
        let manifest = if single {
            let files = DataFileTable::decode(&mut body)?;
            let latest = decode_versions(&mut body, config.version_tree_arity_log2, files.count())?;
            skip_version_nodes(&mut body, files.count())?;
            Self::Single { config, files, latest }
        } else {
            Self::Numbered { config }
        };
        body.finish()?;
        Ok(manifest)
    }
}

/// A manifest that holds one version of a database: the inverse of [`Manifest::decode`].
pub(super) fn encode_manifest(
    config: &Config,
    files: &DataFileTable,
    version: &Version,
    statistics: Statistics,
    commit_time: u64,
) -> Result<Vec<u8>> {
    let mut body = Vec::new();
    config.encode(&mut body)?;
    files.encode(&mut body);
    encode_version(&mut body, version, statistics, commit_time);
    // No version nodes: there are no earlier versions.
    put_uleb(&mut body, 0);
    encode_envelope(MANIFEST_MAGIC, &body, config.compression)
}

impl Config {
    /// What this library writes: the limits of values that Orbax sets, nodes of 8 MiB before compression, zstd at its
    /// default level. `uuid` identifies the database and should be random.
    pub const fn new(uuid: [u8; 16]) -> Self {
        Self {
            uuid,
            inline_value_bytes_max: OCDBT_INLINE_BYTES_DEFAULT,
            decoded_node_bytes_max: OCDBT_NODE_BYTES_DEFAULT,
            version_tree_arity_log2: VERSION_TREE_ARITY_LOG2,
            compression: Compression::Zstd { level: 0 },
        }
    }

    /// The configuration of a manifest of kind single; refuses what [`decode`](Self::decode) would.
    fn encode(&self, body: &mut Vec<u8>) -> Result<()> {
        let inline = u64::from(self.inline_value_bytes_max);
        if inline > OCDBT_INLINE_BYTES_MAX {
            let what = "max_inline_value_bytes";
            return Err(OcdbtError::Range { what, min: 0, max: OCDBT_INLINE_BYTES_MAX, found: inline });
        }
        check_arity(self.version_tree_arity_log2)?;
        body.extend_from_slice(&self.uuid);
        body.push(SINGLE);
        put_uleb(body, inline);
        put_uleb(body, self.decoded_node_bytes_max.into());
        body.push(self.version_tree_arity_log2);
        match self.compression {
            Compression::None => put_uleb(body, STORED),
            Compression::Zstd { level } => {
                put_uleb(body, ZSTD);
                body.extend_from_slice(&check_level(level)?.to_le_bytes());
            }
        }
        Ok(())
    }

    /// The configuration, and whether the manifest's kind is single.
    fn decode(body: &mut Cursor<'_>) -> Result<(Self, bool)> {
        let uuid = body.array()?;
        let single = match body.u8()? {
            SINGLE => true,
            NUMBERED => false,
            found => return Err(OcdbtError::ManifestKind { found }),
        };
        let inline_value_bytes_max = decode_u32(body, "max_inline_value_bytes", OCDBT_INLINE_BYTES_MAX)?;
        let decoded_node_bytes_max = decode_u32(body, "max_decoded_node_bytes", u32::MAX.into())?;
        let version_tree_arity_log2 = body.u8()?;
        check_arity(version_tree_arity_log2)?;
        let compression = match body.uleb()? {
            STORED => Compression::None,
            ZSTD => Compression::Zstd { level: check_level(body.i32_le()?)? },
            found => return Err(OcdbtError::Compression { found }),
        };
        let config =
            Self { uuid, inline_value_bytes_max, decoded_node_bytes_max, version_tree_arity_log2, compression };
        Ok((config, single))
    }
}

fn check_arity(log2: u8) -> Result<()> {
    if (1..=16).contains(&log2) {
        return Ok(());
    }
    Err(OcdbtError::Range { what: "version_tree_arity_log2", min: 1, max: 16, found: log2.into() })
}

fn check_level(level: i32) -> Result<i32> {
    if (ZSTD_LEVEL_MIN..=ZSTD_LEVEL_MAX).contains(&level) { Ok(level) } else { Err(OcdbtError::Level { found: level }) }
}

fn decode_u32(body: &mut Cursor<'_>, what: &'static str, max: u64) -> Result<u32> {
    let found = body.uleb_within(what, 0, max)?;
    u32::try_from(found).map_err(|_| OcdbtError::Range { what, min: 0, max, found })
}

/// Values of the manifest kind.
const SINGLE: u8 = 0;
const NUMBERED: u8 = 1;

/// TensorStore's default.
const VERSION_TREE_ARITY_LOG2: u8 = 4;

#[cfg(test)]
mod tests {
    use super::super::data_ref::DataRef;
    use super::super::testing::{hex, seal};
    use super::*;

    /// A manifest that TensorStore wrote: three keys, one leaf, no compression.
    fn three_keys() -> Vec<u8> {
        hex("0cdb3a2a61000000000000000000000102030405060708090a0b0c0d0e0f0004808080040400012200642f66323664333637
             6264333437343361353833313133353435396164616136343001010000085603560836c8284e3db3ea1800c9c4efa1")
    }

    #[test]
    fn a_manifest_of_tensorstore_is_read() {
        let Manifest::Single { config, files, latest } = Manifest::decode(&three_keys()).unwrap() else {
            panic!("single")
        };
        let expected = Config {
            uuid: std::array::from_fn(|index| index as u8),
            inline_value_bytes_max: 4,
            decoded_node_bytes_max: 8 << 20,
            version_tree_arity_log2: 4,
            compression: Compression::None,
        };
        assert_eq!(config, expected);
        assert_eq!(files.file(0).unwrap().path(), b"d/f26d367bd34743a5831135459adaa640");
        assert_eq!(files.file(0).unwrap().base(), b"");
        assert_eq!(latest.generation, 1);
        assert_eq!(latest.root_height, 0);
        assert_eq!(latest.root, Some(DataRef { file: 0, offset: 8, len: 86 }));
    }

    #[test]
    fn every_truncation_and_every_flipped_bit_is_an_error() {
        let good = three_keys();
        for len in 0..good.len() {
            assert!(Manifest::decode(&good[..len]).is_err(), "{len}");
        }
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Manifest::decode(&bad).is_err(), "{bit}");
        }
        let mut long = good;
        long.push(0);
        assert_eq!(Manifest::decode(&long), Err(OcdbtError::Length { stored: 97, found: 98 }));
    }

    /// A sealed manifest whose body is the good one with `from` replaced by `to` at `at`.
    fn patched(at: usize, from: &str, to: &str) -> Result<Manifest> {
        let mut body = three_keys()[14..93].to_vec();
        let (from, to) = (hex(from), hex(to));
        assert_eq!(&body[at..at + from.len()], from);
        body.splice(at..at + from.len(), to);
        Manifest::decode(&seal(MANIFEST_MAGIC, &body, false))
    }

    #[test]
    fn what_tensorstore_accepts_is_accepted() {
        assert!(patched(0, "", "").is_ok());
        for generation in ["07", "e807"] {
            assert!(patched(62, "01", generation).is_ok());
        }
        // A commit time of 5, wrong statistics, integers with redundant groups.
        assert!(patched(70, "36c8284e3db3ea18", "0500000000000000").is_ok());
        assert!(patched(67, "035608", "000000").is_ok());
        assert!(patched(17, "04", "848000").is_ok());
        // A compressed body under a configuration that says otherwise, and the reverse.
        let body = &three_keys()[14..93];
        assert_eq!(Manifest::decode(&seal(MANIFEST_MAGIC, body, true)), Manifest::decode(&three_keys()));
        assert!(patched(23, "00", "01 00000000").is_ok());
    }

    #[test]
    fn what_tensorstore_rejects_is_rejected() {
        assert_eq!(patched(62, "01", "00").unwrap_err(), OcdbtError::Generation { previous: 0, found: 0 });
        assert_eq!(patched(79, "", "00").unwrap_err(), OcdbtError::Trailing { count: 1 });
        assert!(matches!(patched(22, "04", "00").unwrap_err(), OcdbtError::Range { found: 0, .. }));
        assert!(matches!(patched(22, "04", "11").unwrap_err(), OcdbtError::Range { found: 17, .. }));
        assert_eq!(patched(16, "00", "02").unwrap_err(), OcdbtError::ManifestKind { found: 2 });
        assert_eq!(patched(23, "00", "01 63000000").unwrap_err(), OcdbtError::Level { found: 99 });
        assert_eq!(patched(64, "00", "01").unwrap_err(), OcdbtError::FileId { found: 1, count: 1 });
        assert!(matches!(patched(61, "01", "00").unwrap_err(), OcdbtError::Range { found: 0, .. }));
        assert_eq!(patched(61, "01", "10").unwrap_err(), OcdbtError::Truncated);
    }

    #[test]
    fn foreign_versions_and_compressions_are_unsupported() {
        let mut bytes = three_keys();
        bytes[12] = 1;
        let end = bytes.len() - 4;
        let crc = crc32c::crc32c(&bytes[..end]).to_le_bytes();
        bytes[end..].copy_from_slice(&crc);
        let error = Manifest::decode(&bytes).unwrap_err();
        assert_eq!(error, OcdbtError::Version { found: 1 });
        assert_eq!(crate::Error::from(error).kind(), crate::ErrorKind::Unsupported);
    }
}
