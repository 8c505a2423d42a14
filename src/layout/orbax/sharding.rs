//! `_sharding`: how each `jax.Array` was laid out when it was saved.
//!
//! One JSON object: the key is the parameter name in URL-safe base64, the value a string that holds JSON again
//! (`orbax/checkpoint/_src/metadata/sharding.py`). It is advice: the bytes on disk do not depend on it, so an entry that
//! cannot be read is kept as [`SavedSharding::Other`] with the reason and never stops the others.

use std::collections::HashMap;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value;

use super::base64;
use super::json::{self, JsonError};
use super::python::Doc;
use crate::limits::{DEVICES_MAX, RANK_MAX};

/// How one array was laid out over devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SavedSharding {
    /// Dimensions over the named axes of a mesh.
    Named {
        /// The mesh; arrays with equal meshes share one.
        mesh: Arc<SavedMesh>,
        /// The axes of each dimension, major first; none for a replicated one. May be shorter than the rank.
        spec: Vec<Vec<String>>,
    },
    /// Whole on one device.
    Single {
        /// As the runtime spelt it: `cpu:0`, `TFRT_CPU_0`, `cuda:0`, `TPU_0(process=0,(0,0,0,0))`.
        device: String,
    },
    /// Dimensions over positions of an unnamed mesh; written from about 0.6 to 0.11.
    Positional {
        /// Parts of each dimension.
        shape: Vec<u64>,
    },
    /// Another class, or an entry that cannot be read, and why.
    Other(String),
}

/// A mesh of devices as it was saved.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SavedMesh {
    /// The names of the axes.
    pub axes: Vec<String>,
    /// Devices along each axis.
    pub shape: Vec<u64>,
    /// The devices' ids in row-major order; recorded since 0.6.
    pub device_ids: Option<Vec<i64>>,
}

/// Parses a `_sharding` file into the sharding of each parameter name.
///
/// # Errors
/// Bytes that are no JSON object. A single entry never fails.
pub fn parse(bytes: &[u8]) -> Result<HashMap<String, SavedSharding>, JsonError> {
    let file: HashMap<String, Value> = json::from_slice(bytes)?;
    // Most of 100,000 entries are the same few texts: each is parsed once, and equal meshes are one.
    let mut seen: HashMap<String, SavedSharding> = HashMap::new();
    let mut meshes = Meshes::default();
    let mut shardings = HashMap::with_capacity(file.len());
    for (key, value) in file {
        let Some(name) = base64::decode(&key).and_then(|name| String::from_utf8(name).ok()) else {
            tracing::debug!(key, "a key of _sharding is no base64 of a name; it is passed over");
            continue;
        };
        let sharding = match value {
            Value::String(text) => match seen.get(&text) {
                Some(known) => known.clone(),
                None => {
                    let sharding = match json::parse(text.as_bytes()) {
                        Ok(entry) => entry_sharding(&entry, &mut meshes),
                        Err(error) => SavedSharding::Other(error.to_string()),
                    };
                    seen.insert(text, sharding.clone());
                    sharding
                }
            },
            object => entry_sharding(&object, &mut meshes),
        };
        shardings.insert(name, sharding);
    }
    Ok(shardings)
}

/// The file's bytes, as Orbax 0.12 writes them: parameter names sorted by their encoded form, every axis `Auto`.
///
/// Only named and single-device shardings have an entry, as in Orbax; of positional ones it cannot read any. Parsing the
/// bytes gives the written entries again.
pub fn to_bytes(shardings: &HashMap<String, SavedSharding>) -> Vec<u8> {
    let mut sorted: Vec<(String, &SavedSharding)> =
        shardings.iter().map(|(name, sharding)| (base64::encode(name.as_bytes()), sharding)).collect();
    sorted.sort_unstable_by(|a, b| a.0.cmp(&b.0));
    // TensorStore writes this file: compact and sorted, which is what a map's text is.
    let mut out = String::from("{");
    for (name, sharding) in sorted {
        let entry = match sharding {
            SavedSharding::Named { mesh, spec } => named_doc(mesh, spec),
            SavedSharding::Single { device } => {
                Doc::object([("sharding_type", Doc::text("SingleDeviceSharding")), ("device_str", Doc::text(device))])
            }
            SavedSharding::Positional { .. } | SavedSharding::Other(_) => continue,
        };
        if out.len() > 1 {
            out.push(',');
        }
        out.push_str(&format!("{}:{}", Value::String(name), Value::String(entry.dumps())));
    }
    out.push('}');
    out.into_bytes()
}

fn named_doc<'a>(mesh: &'a SavedMesh, spec: &'a [Vec<String>]) -> Doc<'a> {
    let names = |names: &'a [String]| Doc::List(names.iter().map(|name| Doc::text(name)).collect());
    let dimension = |axes: &'a Vec<String>| match axes.as_slice() {
        [] => Doc::Null,
        [axis] => Doc::text(axis),
        axes => names(axes),
    };
    let mut members = vec![
        ("sharding_type", Doc::text("NamedSharding")),
        ("shape", Doc::sizes(&mesh.shape)),
        ("axis_names", names(&mesh.axes)),
        ("axis_types", Doc::List(mesh.axes.iter().map(|_| Doc::text("AxisType.Auto")).collect())),
        ("partition_spec", Doc::List(spec.iter().map(dimension).collect())),
    ];
    members
        .extend(mesh.device_ids.as_ref().map(|ids| ("device_mesh", Doc::object([("mesh", nested(ids, &mesh.shape))]))));
    Doc::object(members)
}

/// The devices as nested lists of the mesh's shape.
fn nested(ids: &[i64], shape: &[u64]) -> Doc<'static> {
    let devices = ids.iter().map(|&id| Doc::object([("id", Doc::Int(id))])).collect();
    // From the innermost axis out: each pass joins as many neighbours as the axis is long.
    let nest = |nodes: Vec<Doc<'static>>, &size: &u64| {
        let mut nodes = nodes.into_iter();
        let mut rows = Vec::new();
        loop {
            let row: Vec<_> = nodes.by_ref().take(usize::try_from(size).unwrap_or(usize::MAX)).collect();
            if row.is_empty() {
                return rows;
            }
            rows.push(Doc::List(row));
        }
    };
    Doc::or_null(shape.iter().rev().fold(devices, nest).pop())
}

/// The distinct meshes so far.
#[derive(Default)]
struct Meshes(HashMap<SavedMesh, Arc<SavedMesh>>);

impl Meshes {
    fn share(&mut self, mesh: SavedMesh) -> Arc<SavedMesh> {
        Arc::clone(self.0.entry(mesh).or_insert_with_key(|mesh| Arc::new(mesh.clone())))
    }
}

fn entry_sharding(entry: &Value, meshes: &mut Meshes) -> SavedSharding {
    let kind = entry.get("sharding_type").and_then(Value::as_str).unwrap_or_default();
    let sharding = match kind {
        "NamedSharding" => {
            RawNamed::deserialize(entry).map_err(|error| error.to_string()).and_then(|raw| named(raw, meshes))
        }
        "SingleDeviceSharding" => match entry.get("device_str").and_then(Value::as_str) {
            Some(device) => Ok(SavedSharding::Single { device: device.to_owned() }),
            None => Err("no device_str".to_owned()),
        },
        "PositionalSharding" => match entry.get("shape").map(Vec::<u64>::deserialize) {
            Some(Ok(shape)) => Ok(SavedSharding::Positional { shape }),
            _ => Err("no shape".to_owned()),
        },
        "" => Err("no sharding_type".to_owned()),
        other => return SavedSharding::Other(other.to_owned()),
    };
    sharding.unwrap_or_else(|reason| SavedSharding::Other(format!("{kind} that cannot be read: {reason}")))
}

#[derive(Deserialize)]
struct RawNamed {
    shape: Vec<u64>,
    axis_names: Vec<String>,
    #[serde(default)]
    partition_spec: Vec<Option<Axes>>,
    device_mesh: Option<RawMesh>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Axes {
    One(String),
    Several(Vec<String>),
}

#[derive(Deserialize)]
struct RawMesh {
    mesh: Value,
}

fn named(raw: RawNamed, meshes: &mut Meshes) -> Result<SavedSharding, String> {
    let RawNamed { shape, axis_names: axes, partition_spec, device_mesh } = raw;
    if shape.len() != axes.len() {
        return Err(format!("{} axis names for a mesh of {} axes", axes.len(), shape.len()));
    }
    if let Some((_, name)) =
        axes.iter().enumerate().find(|(index, name)| axes.iter().take(*index).any(|other| other == *name))
    {
        return Err(format!("the mesh has two axes `{name}`"));
    }
    let count = shape.iter().try_fold(1_u64, |count, &size| count.checked_mul(size));
    let Some(count) = count.filter(|count| (1..=DEVICES_MAX).contains(count)) else {
        return Err(format!("a mesh of {shape:?} devices (1 to {DEVICES_MAX} are possible)"));
    };
    if partition_spec.len() > RANK_MAX {
        return Err(format!("a spec of {} dimensions", partition_spec.len()));
    }
    let mut used = Vec::new();
    let mut spec = Vec::with_capacity(partition_spec.len());
    for axes_of_dimension in partition_spec {
        let names = match axes_of_dimension {
            None => Vec::new(),
            Some(Axes::One(name)) => vec![name],
            Some(Axes::Several(names)) => names,
        };
        for name in &names {
            if !axes.contains(name) {
                return Err(format!("the spec names the axis `{name}`, the mesh has {axes:?}"));
            }
            if used.contains(name) {
                return Err(format!("the spec uses the axis `{name}` twice"));
            }
            used.push(name.clone());
        }
        spec.push(names);
    }
    let device_ids = device_mesh.and_then(|mesh| device_ids(&mesh.mesh, count));
    Ok(SavedSharding::Named { mesh: meshes.share(SavedMesh { axes, shape, device_ids }), spec })
}

/// The ids in the nested lists of a mesh, in order; `None` unless there is one a device.
fn device_ids(mesh: &Value, count: u64) -> Option<Vec<i64>> {
    fn collect(node: &Value, ids: &mut Vec<i64>) -> Option<()> {
        match node {
            Value::Array(nodes) => nodes.iter().try_for_each(|node| collect(node, ids)),
            device => {
                ids.push(device.get("id")?.as_i64()?);
                Some(())
            }
        }
    }
    let mut ids = Vec::new();
    collect(mesh, &mut ids)?;
    (ids.len() as u64 == count).then_some(ids)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn file(entries: &[(&str, &str)]) -> Vec<u8> {
        let map: serde_json::Map<_, _> =
            entries.iter().map(|(key, text)| (key.to_string(), Value::String(text.to_string()))).collect();
        serde_json::to_vec(&map).unwrap()
    }

    const NAMED: &str = r#"{"sharding_type": "NamedSharding", "shape": [2, 2], "axis_names": ["x", "y"], "axis_types": ["AxisType.Auto", "AxisType.Auto"], "partition_spec": ["x", null, ["y"]], "device_mesh": {"mesh": [[{"id": 0}, {"id": 1}], [{"id": 2048}, {"id": 2049}]]}}"#;

    #[test]
    fn every_form_is_read() {
        let old = r#"{"sharding_type": "NamedSharding", "shape": [2, 4], "axis_names": ["d", "m"], "partition_spec": [["m", "d"]]}"#;
        let shardings = parse(&file(&[
            ("YQ==", NAMED),
            ("", r#"{"sharding_type": "SingleDeviceSharding", "device_str": "TFRT_CPU_0"}"#),
            ("Yg==", old),
            ("Yw==", r#"{"sharding_type": "PositionalSharding", "shape": [2, 1], "memory_kind": "device"}"#),
            ("ZA==", r#"{"sharding_type": "GSPMDSharding"}"#),
        ]))
        .unwrap();
        let mesh = SavedMesh {
            axes: vec!["x".into(), "y".into()],
            shape: vec![2, 2],
            device_ids: Some(vec![0, 1, 2048, 2049]),
        };
        let spec = vec![vec!["x".to_owned()], vec![], vec!["y".to_owned()]];
        assert_eq!(shardings["a"], SavedSharding::Named { mesh: Arc::new(mesh), spec });
        assert_eq!(shardings[""], SavedSharding::Single { device: "TFRT_CPU_0".into() });
        assert!(
            matches!(&shardings["b"], SavedSharding::Named { mesh, spec } if mesh.device_ids.is_none() && spec[0] == ["m", "d"])
        );
        assert_eq!(shardings["c"], SavedSharding::Positional { shape: vec![2, 1] });
        assert_eq!(shardings["d"], SavedSharding::Other("GSPMDSharding".into()));
    }

    #[test]
    fn one_bad_entry_does_not_stop_the_others() {
        let bad = |text: &str| {
            let shardings = parse(&file(&[("YQ==", text), ("Yg==", NAMED), ("?", NAMED)])).unwrap();
            assert!(matches!(shardings["b"], SavedSharding::Named { .. }));
            assert_eq!(shardings.len(), 2);
            match &shardings["a"] {
                SavedSharding::Other(reason) => reason.clone(),
                other => panic!("{other:?}"),
            }
        };
        let named = |shape: &str, axes: &str, spec: &str| {
            bad(&format!(
                r#"{{"sharding_type": "NamedSharding", "shape": {shape}, "axis_names": {axes}, "partition_spec": {spec}}}"#
            ))
        };
        bad("{");
        bad("[]");
        bad(r#"{"sharding_type": "SingleDeviceSharding"}"#);
        assert!(named("[2]", r#"["x", "y"]"#, "[]").contains("2 axis names for a mesh of 1"));
        assert!(named("[2, 2]", r#"["x", "x"]"#, "[]").contains("two axes `x`"));
        assert!(named("[4294967296, 4294967296]", r#"["x", "y"]"#, "[]").contains("mesh of"));
        assert!(named("[0]", r#"["x"]"#, "[]").contains("mesh of"));
        assert!(named("[2]", r#"["x"]"#, r#"["z"]"#).contains("axis `z`"));
        assert!(named("[2]", r#"["x"]"#, r#"["x", "x"]"#).contains("twice"));
        assert!(named("[2]", r#"["x"]"#, "[7]").contains("NamedSharding that cannot be read"));
    }

    #[test]
    fn equal_meshes_are_shared_and_wrong_ids_are_left_out() {
        let other = NAMED.replace(r#"["x", null, ["y"]]"#, "[]");
        let short = NAMED.replace(r#"{"id": 0}, "#, "");
        let shardings = parse(&file(&[("YQ==", NAMED), ("Yg==", &other), ("Yw==", &short)])).unwrap();
        let mesh = |name: &str| match &shardings[name] {
            SavedSharding::Named { mesh, .. } => Arc::clone(mesh),
            other => panic!("{other:?}"),
        };
        assert!(Arc::ptr_eq(&mesh("a"), &mesh("b")));
        assert_eq!(mesh("c").device_ids, None);
    }

    #[test]
    fn truncation_at_every_byte_is_an_error() {
        let bytes = file(&[("YQ==", NAMED)]);
        for end in 0..bytes.len() {
            assert!(parse(&bytes[..end]).is_err());
        }
    }

    /// From a real save: the writer gives its bytes.
    #[test]
    fn a_real_file_is_written_as_it_was() {
        let real = r#"{"ag==":"{\"sharding_type\": \"NamedSharding\", \"shape\": [2, 2], \"axis_names\": [\"x\", \"y\"], \"axis_types\": [\"AxisType.Auto\", \"AxisType.Auto\"], \"partition_spec\": [[\"x\", \"y\"], null], \"device_mesh\": {\"mesh\": [[{\"id\": 0}, {\"id\": 1}], [{\"id\": 2}, {\"id\": 3}]]}}","ajE=":"{\"sharding_type\": \"SingleDeviceSharding\", \"device_str\": \"cpu:0\"}"}"#;
        assert_eq!(String::from_utf8(to_bytes(&parse(real.as_bytes()).unwrap())).unwrap(), real);
    }

    fn shardings() -> impl Strategy<Value = SavedSharding> {
        let axes = proptest::collection::hash_set("[a-zé\"]{1,3}", 0..4);
        let named = (axes, any::<bool>(), 0..5_usize, any::<u64>()).prop_map(|(axes, has_ids, rank, seed)| {
            let axes: Vec<String> = axes.into_iter().collect();
            let shape: Vec<u64> = (0..axes.len() as u64).map(|axis| 1 + (seed >> (2 * axis)) % 4).collect();
            let count: u64 = shape.iter().product();
            let mut spec = vec![Vec::new(); rank];
            for (index, axis) in axes.iter().enumerate() {
                if let Some(dimension) = spec.get_mut((seed >> (8 + 3 * index)) as usize % 6) {
                    dimension.push(axis.clone());
                }
            }
            let device_ids = has_ids.then(|| (0..count as i64).map(|id| 7 * id - 2048).collect());
            SavedSharding::Named { mesh: Arc::new(SavedMesh { axes, shape, device_ids }), spec }
        });
        prop_oneof![named, ".{0,8}".prop_map(|device| SavedSharding::Single { device })]
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(shardings in proptest::collection::hash_map(any::<String>(), shardings(), 0..6)) {
            prop_assert_eq!(parse(&to_bytes(&shardings)).unwrap(), shardings);
        }
    }
}
