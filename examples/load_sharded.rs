//! Loads a checkpoint onto a mesh of virtual CPU devices, first layers first, and uses each array as it completes.
//!
//!     cargo run --release --example load_sharded -- tests/fixtures/quickstart/ckpt

#![allow(clippy::print_stdout, reason = "an example prints")]

use touchdown::{DType, Device, Engine, EngineOptions, Mesh, Otherwise, Result, spec};

fn main() -> Result<()> {
    let path = std::env::args().nth(1).unwrap_or_else(|| "tests/fixtures/quickstart/ckpt".to_owned());
    let checkpoint = touchdown::open(path)?;
    let mesh = Mesh::new([("data", 2), ("model", 4)], Device::cpus(8))?;
    let target = checkpoint
        .target()
        .only(["params/**"])
        .shard(&mesh, [("**/kernel", spec![_, "model"]), ("**/bias", spec!["model"])])
        .otherwise(Otherwise::Replicate)
        .cast([("**", DType::BFloat16)])
        .order(["params/embed", "params/layer_0/**", "params/layer_1/**"]);
    println!("{}", checkpoint.plan(&target)?);

    let engine = Engine::new(EngineOptions::default())?;
    let mut job = engine.load(&checkpoint, &target)?;
    // `by_ref` keeps the job, so that its result can be asked for at the end.
    for array in job.by_ref() {
        println!("ready: {} {:?} in {} shards", array.path, array.shape, array.shards().len());
    }
    let state = job.wait()?;
    println!("{} bytes read for {} needed", state.report().bytes_read, state.report().bytes_needed);
    Ok(())
}
