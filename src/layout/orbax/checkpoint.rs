//! The checkpoint's own files: `_CHECKPOINT_METADATA`, `_ROOT_METADATA`, `_CHECKPOINT_DELETION`, and the markers.
//!
//! All of them are optional and every member of them is: releases 0.5.11 to 0.11.0 wrote only the two timestamps, older
//! ones nothing. Unknown members are passed over.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::json::{self, JsonError};
use super::python::Doc;

/// The checkpoint's metadata file (`orbax/checkpoint/_src/metadata/checkpoint.py`).
pub const METADATA_FILE: &str = "_CHECKPOINT_METADATA";
/// The empty file that marks the v1 layout, since 0.11.19.
pub const V1_MARKER: &str = "orbax.checkpoint";
/// The record of an item that is being deleted.
pub const DELETION_FILE: &str = "_CHECKPOINT_DELETION";
/// The directory beside the steps that holds the root's metadata.
pub const ROOT_METADATA_DIR: &str = "metadata";
/// The root's metadata file, since 0.10.
pub const ROOT_METADATA_FILE: &str = "_ROOT_METADATA";
/// Its name before.
pub const OLD_ROOT_METADATA_FILE: &str = "metadata";

/// The text that says that a save ended, since 0.12.3; of a store without renames it is the commit itself.
pub const COMMIT_FILE: &str = "commit_success.txt";
/// The item that holds the metrics of a step, and the name of its file.
pub const METRICS_ITEM: &str = "metrics";
/// The handler of a tree in the v1 layout.
pub const TREE_HANDLER: &str = "orbax.checkpoint.experimental.v1._src.handlers.pytree_handler.PyTreeHandler";
/// The handler of a JSON item in the v1 layout, whose file is `data.json`.
pub const JSON_HANDLER: &str = "orbax.checkpoint.experimental.v1._src.handlers.json_handler.JsonHandler";
/// The handler of the item `metrics`, whose file is `metrics`.
pub const METRICS_HANDLER: &str = "orbax.checkpoint.experimental.v1._src.handlers.json_handler.MetricsHandler";

/// What `_CHECKPOINT_METADATA` says.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CheckpointMetadata {
    /// The handler class of each item; hints, the files decide.
    pub item_handlers: BTreeMap<String, String>,
    /// When the save began, in nanoseconds since the Unix epoch.
    pub init_ns: Option<i64>,
    /// When it was committed.
    pub commit_ns: Option<i64>,
    /// The user's metadata; `None` for absent, null and `{}`.
    pub custom_metadata: Option<Value>,
    /// The text of the user's metadata, where it has numbers that a [`Value`] does not hold; it is what is written then.
    pub custom_text: Option<String>,
}

/// Parses `_CHECKPOINT_METADATA`. A member of an unexpected type counts as absent.
///
/// # Errors
/// Bytes that are no JSON object.
pub fn parse(bytes: &[u8]) -> Result<CheckpointMetadata, JsonError> {
    let file: Map<String, Value> = json::from_slice(bytes)?;
    let handlers = file.get("item_handlers").and_then(Value::as_object);
    let item_handlers = handlers.into_iter().flatten().map(|(name, class)| {
        let class = class.as_str().unwrap_or_default();
        (name.clone(), class.to_owned())
    });
    let nanoseconds = |name: &str| file.get(name).and_then(Value::as_i64);
    Ok(CheckpointMetadata {
        item_handlers: item_handlers.collect(),
        init_ns: nanoseconds("init_timestamp_nsecs"),
        commit_ns: nanoseconds("commit_timestamp_nsecs"),
        custom_metadata: file.get("custom_metadata").and_then(worth_keeping),
        custom_text: json::inexact_member(bytes, "custom_metadata"),
    })
}

impl CheckpointMetadata {
    /// The file's bytes. User metadata that is null or `{}` parses as `None`; everything else comes back as it is.
    pub fn to_bytes(&self) -> Vec<u8> {
        let handlers = self.item_handlers.iter().map(|(name, class)| (name.as_str(), Doc::text(class)));
        let time = |nanoseconds: Option<i64>| Doc::or_null(nanoseconds.map(Doc::Int));
        let empty = || Doc::object([]);
        let custom = self.custom_text.as_deref().map(Doc::Bare).or(self.custom_metadata.as_ref().map(Doc::Value));
        let members = [
            ("item_handlers", Doc::object(handlers)),
            ("metrics", empty()),
            ("performance_metrics", empty()),
            ("init_timestamp_nsecs", time(self.init_ns)),
            ("commit_timestamp_nsecs", time(self.commit_ns)),
            ("custom_metadata", custom.unwrap_or_else(empty)),
        ];
        Doc::object(members).dumps().into_bytes()
    }
}

/// The bytes of `metadata/_ROOT_METADATA` with this user metadata.
pub fn root_to_bytes(custom_metadata: Option<&Value>) -> Vec<u8> {
    let custom = custom_metadata.map_or_else(|| Doc::object([]), Doc::Value);
    Doc::object([("internal_metadata", Doc::object([])), ("custom_metadata", custom)]).dumps().into_bytes()
}

/// The text of `commit_success.txt`, which names where the checkpoint lies in the end.
pub fn commit_text(path: impl std::fmt::Display) -> String {
    format!("Checkpoint commit was successful to {path}")
}

/// Parses `metadata/_ROOT_METADATA` into the user's metadata: `{"internal_metadata": .., "custom_metadata": ..}`, or
/// `{"custom": ..}` from 0.10 to 0.11.0.
///
/// # Errors
/// Bytes that are no JSON object.
pub fn parse_root(bytes: &[u8]) -> Result<Option<Value>, JsonError> {
    let file: Map<String, Value> = json::from_slice(bytes)?;
    Ok(file.get("custom_metadata").or_else(|| file.get("custom")).and_then(worth_keeping))
}

/// Parses `metadata/metadata`, which before 0.10 was the user's dict itself.
///
/// # Errors
/// Bytes that are no JSON.
pub fn parse_old_root(bytes: &[u8]) -> Result<Option<Value>, JsonError> {
    Ok(worth_keeping(&json::parse(bytes)?))
}

/// Which item a `_CHECKPOINT_DELETION` record removes; `None` if it is the whole checkpoint, or cannot be told.
pub fn pending_deletion(bytes: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Record {
        checkpointable_name: Option<String>,
    }
    json::from_slice::<Record>(bytes).ok()?.checkpointable_name
}

fn worth_keeping(value: &Value) -> Option<Value> {
    let empty = value.is_null() || value.as_object().is_some_and(Map::is_empty);
    (!empty).then(|| value.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_release_is_read() {
        let new = br#"{"item_handlers": {"state": "orbax.checkpoint.experimental.v1._src.handlers.pytree_handler.PyTreeHandler"}, "metrics": {}, "performance_metrics": {}, "init_timestamp_nsecs": 1795444344258817536, "commit_timestamp_nsecs": null, "custom_metadata": {"k": 1, "n": null}}"#;
        let metadata = parse(new).unwrap();
        assert_eq!(metadata.item_handlers.keys().collect::<Vec<_>>(), ["state"]);
        assert_eq!((metadata.init_ns, metadata.commit_ns), (Some(1_795_444_344_258_817_536), None));
        assert_eq!(metadata.custom_metadata, Some(serde_json::json!({"k": 1, "n": null})));
        let old = parse(br#"{"init_timestamp_nsecs": 1, "commit_timestamp_nsecs": 2}"#).unwrap();
        assert_eq!(old, CheckpointMetadata { init_ns: Some(1), commit_ns: Some(2), ..Default::default() });
        assert!(parse(br#"{"item_handlers": "a.Class", "custom_metadata": {}}"#).unwrap().custom_metadata.is_none());
        assert!(parse(b"[]").is_err() && parse(b"").is_err());
    }

    #[test]
    fn root_metadata_of_three_forms() {
        let user = Some(serde_json::json!({"exp": "hi"}));
        assert_eq!(parse_root(br#"{"internal_metadata": {}, "custom_metadata": {"exp": "hi"}}"#).unwrap(), user);
        assert_eq!(parse_root(br#"{"custom": {"exp": "hi"}}"#).unwrap(), user);
        assert_eq!(parse_old_root(br#"{"exp": "hi"}"#).unwrap(), user);
    }

    #[test]
    fn a_deletion_names_its_item() {
        assert_eq!(pending_deletion(br#"{"operation_id": "x", "checkpointable_name": "opt"}"#), Some("opt".into()));
        assert_eq!(pending_deletion(br#"{"checkpointable_name": null}"#), None);
        assert_eq!(pending_deletion(b"{"), None);
    }

    #[test]
    fn a_real_file_is_written_as_it_was() {
        let real = r#"{"item_handlers": {"state": "orbax.checkpoint.experimental.v1._src.handlers.pytree_handler.PyTreeHandler"}, "metrics": {}, "performance_metrics": {}, "init_timestamp_nsecs": 1795527528423193600, "commit_timestamp_nsecs": 1795527528545887154, "custom_metadata": {"a": 1}}"#;
        let metadata = parse(real.as_bytes()).unwrap();
        assert_eq!(metadata.item_handlers["state"], TREE_HANDLER);
        assert_eq!(String::from_utf8(metadata.to_bytes()).unwrap(), real);
        assert_eq!(commit_text("/tmp/a b"), "Checkpoint commit was successful to /tmp/a b");
    }

    proptest::proptest! {
        #[test]
        fn what_is_written_is_read(item_handlers: BTreeMap<String, String>, init_ns: Option<i64>, commit_ns: Option<i64>, user: Option<String>) {
            let custom_metadata = user.map(|user| serde_json::json!({user.clone(): [user]}));
            let metadata = CheckpointMetadata { item_handlers, init_ns, commit_ns, custom_metadata, custom_text: None };
            proptest::prop_assert_eq!(&parse(&metadata.to_bytes()).unwrap(), &metadata);
            let root = root_to_bytes(metadata.custom_metadata.as_ref());
            proptest::prop_assert_eq!(parse_root(&root).unwrap(), metadata.custom_metadata);
        }
    }
}
