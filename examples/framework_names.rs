//! Gives a JAX tree the names and layout that a Rust framework expects, straight into memory that the framework owns.
//!
//! Kernels `[in, out]` become weights `[out, in]`, paths become dotted names, floats become bfloat16. Nothing of the size of
//! an array is allocated beside the destination.
//!
//!     cargo run --release --example framework_names -- tests/fixtures/quickstart/ckpt

#![allow(clippy::print_stdout, reason = "an example prints")]

use std::collections::BTreeMap;

use touchdown::{DType, Engine, EngineOptions, Error, Pattern, Result};

fn main() -> Result<()> {
    let path = std::env::args().nth(1).unwrap_or_else(|| "tests/fixtures/quickstart/ckpt".to_owned());
    let checkpoint = touchdown::open(path)?;
    let target = checkpoint
        .target()
        .only(["params/**"])
        .transpose([("**/kernel", vec![1, 0])])
        .rename([
            (r"^params/layer_(\d+)/kernel$", "layers.$1.weight"),
            (r"^params/layer_(\d+)/bias$", "layers.$1.bias"),
            (r"^params/embed$", "embed_tokens.weight"),
        ])
        .cast([(Pattern::glob("**").only(touchdown::tree::Filter::Float), DType::BFloat16)]);

    // The framework's own tensors: here plain vectors, made from the plan before anything is read.
    let plan = checkpoint.plan(&target)?;
    let mut tensors: BTreeMap<String, Vec<u8>> =
        plan.leaves.iter().map(|leaf| (leaf.path.to_string(), vec![0; leaf.bytes_logical as usize])).collect();

    let mut slots: BTreeMap<String, &mut [u8]> =
        tensors.iter_mut().map(|(name, bytes)| (name.clone(), bytes.as_mut_slice())).collect();
    let engine = Engine::new(EngineOptions::default())?;
    engine.fill(&checkpoint, &target, |shard| {
        slots
            .remove(&shard.path.to_string())
            .map(Into::into)
            .ok_or_else(|| Error::invalid("no tensor of that name").at("leaf", &shard.path))
    })?;

    for leaf in &plan.leaves {
        println!("{} {} {:?}: {} bytes", leaf.path, leaf.dtype, leaf.shape, tensors[&leaf.path.to_string()].len());
    }
    Ok(())
}
