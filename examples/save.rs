//! Saves a tree of arrays and values as a checkpoint that Orbax loads, and reads it back.
//!
//!     cargo run --example save -- /tmp/touchdown-example

#![allow(clippy::print_stdout, reason = "an example prints")]

use touchdown::tree::save::NewArray;
use touchdown::{Device, Mesh, SaveOptions, Sharding, Tree, spec};

fn main() -> touchdown::Result<()> {
    let path = std::env::args().nth(1).unwrap_or_else(|| "touchdown-example".into());

    // An array that lies on four devices: each holds a quarter of the rows. Only the shards are asked for.
    let mesh = Mesh::new([("model", 4)], Device::cpus(4))?;
    let sharding = Sharding::new(mesh, spec!["model"], 2)?;
    let embed = NewArray::sharded(&[256, 64], touchdown::DType::Float32, sharding, |region| {
        let rows = region.start[0]..region.end(0);
        Ok(rows.flat_map(|row| [row as f32; 64]).flat_map(f32::to_le_bytes).collect::<Vec<u8>>().into())
    })?;
    let tree = Tree::new()
        .with("params/embed", embed)
        .with("params/dense/kernel", NewArray::from_vec(&[64, 32], vec![0.5f32; 64 * 32]))
        .with("params/dense/bias", touchdown::ndarray::Array1::<f32>::zeros(32))
        .with("step", 1000)
        .with("name", "example")
        .custom_metadata(serde_json::json!({"loss": 0.25}));

    let report = touchdown::save(&path, &tree, &SaveOptions { overwrite: true, ..SaveOptions::default() })?;
    println!("{path}: {} bytes stored of {} in {:?}", report.bytes_stored, report.bytes_logical, report.elapsed);

    let checkpoint = touchdown::open(&path)?;
    let state = touchdown::load(&checkpoint, &checkpoint.target())?;
    let embed = state.array("params/embed")?;
    println!("params/embed {:?}, row 100 starts with {}", embed.shape, embed.shards()[0].as_slice::<f32>()?[100 * 64]);
    Ok(())
}
