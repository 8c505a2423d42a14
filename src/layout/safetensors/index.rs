//! `model.safetensors.index.json`: which file holds which tensor of a sharded model.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use crate::layout::orbax::json::{self, JsonError};

/// A parsed index.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Index {
    /// The file of each tensor, a plain name beside the index.
    pub weight_map: BTreeMap<String, String>,
}

/// Why an index cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IndexError {
    /// Not JSON, or without `weight_map`.
    #[error("{0}")]
    Json(#[from] JsonError),
    /// A file outside the index's own directory.
    #[error("the tensor `{tensor}` is said to be in `{file}`, which is no plain file name")]
    File {
        /// The tensor.
        tensor: String,
        /// The name.
        file: String,
    },
}

impl IndexError {
    /// The byte at which the parser stopped, where it is known.
    pub fn offset(&self) -> Option<u64> {
        match self {
            Self::Json(error) => Some(error.offset),
            Self::File { .. } => None,
        }
    }
}

impl Index {
    /// The names of the files, sorted, each once.
    pub fn files(&self) -> BTreeSet<&str> {
        self.weight_map.values().map(String::as_str).collect()
    }
}

/// Parses an index. Only `weight_map` is read: `metadata.total_size` is informational.
///
/// # Errors
/// Bytes that are not of that form, or a file name that is a path.
pub fn parse(bytes: &[u8]) -> Result<Index, IndexError> {
    let index: Index = json::from_slice(bytes)?;
    let is_plain = |name: &str| !matches!(name, "" | "." | "..") && !name.contains(['/', '\\', '\0']);
    match index.weight_map.iter().find(|(_, file)| !is_plain(file)) {
        Some((tensor, file)) => Err(IndexError::File { tensor: tensor.clone(), file: file.clone() }),
        None => Ok(index),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_names_its_files_once() {
        let index = parse(br#"{"metadata": {"total_size": 8}, "weight_map": {"a": "m-2.safetensors", "b": "m-1.safetensors", "c": "m-2.safetensors"}}"#);
        assert_eq!(index.unwrap().files().into_iter().collect::<Vec<_>>(), ["m-1.safetensors", "m-2.safetensors"]);
    }

    #[test]
    fn paths_that_leave_the_directory_are_refused() {
        for name in ["/etc/passwd", "../x", "a/b", "..", ".", "", "a\\\\b", "a\\u0000b"] {
            let error = parse(format!(r#"{{"weight_map": {{"w": "{name}"}}}}"#).as_bytes()).unwrap_err();
            assert!(matches!(error, IndexError::File { tensor, .. } if tensor == "w"), "{name}");
        }
        assert!(matches!(parse(b"{}"), Err(IndexError::Json(_))));
        assert!(matches!(parse(br#"{"weight_map": {"w": 1}}"#), Err(IndexError::Json(_))));
    }
}
