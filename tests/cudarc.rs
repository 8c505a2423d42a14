//! Arrays as slices of the unmodified cudarc, which runs on the simulated driver here: no copy, the same bits, nothing leaked.

#![allow(
    unsafe_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "tests fail by panicking and say what they compared; memory is lent by its address"
)]

#[path = "simulated/mod.rs"]
mod simulated;
mod support;

use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use half::bf16;
use simulated::{Bed, Machine, real_devices};
use touchdown::cudarc::driver::sys::{CUresult, cuEventQuery};
use touchdown::cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr};
use touchdown::half;
use touchdown::place::cudarc::CudarcDestination;
use touchdown::place::{DeviceMemory, Element, probe_cuda};
use touchdown::tree::save::NewArray;
use touchdown::{
    Checkpoint, Device, Engine, EngineOptions, ErrorKind, Leaf, Mesh, Otherwise, SaveOptions, Shard, State, Target,
    Tree, spec,
};

/// cudarc looks for `libcuda.so` where the system looks for libraries, so the tests run in a process of their own that finds the
/// simulator under that name. `None` in the process that has started it, once it has succeeded.
fn driver(test: &str) -> Option<Bed> {
    const CHILD: &str = "TOUCHDOWN_CUDARC_CHILD";
    if std::env::var_os(CHILD).is_some() || real_devices().is_some() {
        return Bed::start(test, Machine { devices: 2, delay_us: 50, ..Machine::default() });
    }
    let driver = &simulated::files(test)?.driver;
    let folder = tempfile::tempdir().unwrap();
    symlink(driver, folder.path().join("libcuda.so")).unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", test, "--nocapture"]).env(CHILD, "1").env("LD_LIBRARY_PATH", library_path(folder.path()));
    let output = support::finish(child, std::time::Duration::from_secs(120));
    assert_eq!(output.code, Some(0), "{}\n{}", output.stdout, output.stderr);
    assert!(output.stdout.contains("1 passed"), "{}", output.stdout);
    None
}

/// The folder before those in which libraries are looked for now.
fn library_path(first: &Path) -> std::ffi::OsString {
    let rest = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let rest: Vec<_> = std::env::split_paths(&rest).collect();
    std::env::join_paths(std::iter::once(first.to_owned()).chain(rest)).unwrap()
}

/// A large and a small float array, halves, bytes, a scalar, and one with no elements.
fn saved() -> (tempfile::TempDir, Checkpoint) {
    let values = |count: u32| (0..count).map(|at| at as f32 * 0.5 - 7.0).collect::<Vec<f32>>();
    let halves: Vec<bf16> = values(48 * 64).into_iter().map(bf16::from_f32).collect();
    let tree = Tree::new()
        .with("large", NewArray::from_vec(&[1200, 1024], values(1200 * 1024)))
        .with("small", NewArray::from_vec(&[30], values(30)))
        .with("half", NewArray::from_vec(&[48, 64], halves))
        .with("bytes", NewArray::from_vec(&[7], (1..8).collect::<Vec<u8>>()))
        .with("zero", NewArray::from_vec(&[], vec![3.5f32]))
        .with("empty", NewArray::from_vec(&[0, 4], Vec::<f32>::new()));
    let dir = tempfile::tempdir().unwrap();
    touchdown::save(dir.path().join("ckpt"), &tree, &SaveOptions::default()).unwrap();
    let checkpoint = touchdown::open(dir.path().join("ckpt")).unwrap();
    (dir, checkpoint)
}

fn gpus(count: u32) -> Vec<Device> {
    (0..count).map(|ordinal| Device::Cuda { ordinal, logical: None }).collect()
}

fn target(checkpoint: &Checkpoint, devices: Vec<Device>) -> Target {
    let mesh = Mesh::line(devices).unwrap();
    checkpoint.target().shard(&mesh, [("large", spec![_, "device"])]).otherwise(Otherwise::Replicate)
}

/// Two, unless the machine has only one.
fn device_count() -> u32 {
    real_devices().map_or(2, |real| real.min(2))
}

fn stream(ordinal: u32) -> Arc<CudaStream> {
    // The driver is looked for before cudarc uses it.
    assert!(probe_cuda().count() > ordinal as usize);
    CudaContext::new(ordinal as usize).unwrap().new_stream().unwrap()
}

/// What the processor makes of the same target.
fn expected<T: Element>(checkpoint: &Checkpoint, devices: u32, path: &str, position: usize) -> Vec<T> {
    let engine = Engine::new(EngineOptions::default()).unwrap();
    let state = engine.load(checkpoint, &target(checkpoint, Device::cpus(devices))).unwrap().wait().unwrap();
    state.array(path).unwrap().shards()[position].as_slice::<T>().unwrap().to_vec()
}

fn shards(state: State) -> Vec<(String, Shard)> {
    let arrays = state.into_leaves().filter_map(|(path, leaf)| match leaf {
        Leaf::Array(array) => Some((path, array)),
        _ => None,
    });
    arrays
        .flat_map(|(path, array)| array.into_shards().into_iter().map(move |shard| (path.to_string(), shard)))
        .collect()
}

#[test]
fn arrays_become_slices_that_cudarc_owns() {
    let Some(driver) = driver("arrays_become_slices_that_cudarc_owns") else { return };
    let devices = device_count();
    let (_dir, checkpoint) = saved();
    let engine = Engine::new(EngineOptions { threads: 2, ..EngineOptions::default() }).unwrap();
    let streams: Vec<Arc<CudaStream>> = (0..devices).map(stream).collect();
    let mut memory = CudarcDestination::new(streams.clone());
    let target = target(&checkpoint, gpus(devices));
    let load = |memory: &mut CudarcDestination| engine.load_to(&checkpoint, &target, memory).unwrap().wait().unwrap();
    let mut owned: Vec<(CudaSlice<f32>, u64)> = Vec::new();
    for (path, shard) in shards(load(&mut memory)) {
        let (position, pointer) = (shard.position, shard.device_memory().unwrap().pointer());
        let stream = &streams[position];
        match path.as_str() {
            "half" => {
                let slice = shard.into_cuda_slice::<bf16>().unwrap();
                let got = stream.clone_dtoh(&slice).unwrap();
                stream.synchronize().unwrap();
                assert_eq!(
                    (slice.device_ptr(stream).0, got),
                    (pointer, expected(&checkpoint, devices, &path, position))
                );
            }
            "bytes" => assert_eq!(shard.into_cuda_slice::<u8>().unwrap().len(), 7),
            _ => owned.push((shard.into_cuda_slice().unwrap(), pointer)),
        }
    }
    // The slices outlive the state and the engine, and are what their shards were.
    drop(memory);
    let paths = ["empty", "large", "small", "zero"];
    let count = devices as usize;
    assert_eq!(owned.len(), count * paths.len());
    for (number, (slice, pointer)) in owned.iter().enumerate() {
        let (path, position) = (paths[number / count], number % count);
        assert_eq!(slice.ordinal(), position, "{path}");
        let stream = &streams[position];
        assert_eq!(slice.device_ptr(stream).0, *pointer, "{path}");
        let want: Vec<f32> = expected(&checkpoint, devices, path, position);
        assert_eq!(slice.len(), want.len(), "{path}");
        if !want.is_empty() {
            let got = stream.clone_dtoh(slice).unwrap();
            stream.synchronize().unwrap();
            assert!(got == want, "{path} on {position}");
        }
    }
    // What cannot be handed over says why.
    let state = load(&mut CudarcDestination::new(streams.clone()));
    let shard = |state: &State| state.array("small").unwrap().shards()[0].clone();
    let refused = |shard: Shard| shard.into_cuda_slice::<f32>().unwrap_err().to_string();
    assert!(refused(shard(&state)).contains("shared with its clones"));
    let wrong = shard(&state).into_cuda_slice::<i32>().unwrap_err();
    assert!(wrong.to_string().contains("another element type"), "{wrong}");
    let own = engine.load(&checkpoint, &target).unwrap().wait().unwrap();
    assert!(refused(shard(&own)).contains("the shard's memory is the engine's"));
    let host = engine.load(&checkpoint, &checkpoint.target()).unwrap().wait().unwrap();
    assert!(refused(shard(&host)).contains("not in device memory"));
    if let Bed::Simulated(simulator) = &driver {
        simulator.fail("cuMemAllocAsync", 2, CUresult::CUDA_ERROR_OUT_OF_MEMORY as u32);
        let full = engine.load_to(&checkpoint, &target, &mut CudarcDestination::new(streams.clone())).unwrap_err();
        simulator.fail("*", 0, 0);
        let text = format!("{full:?}");
        assert_eq!(full.kind(), ErrorKind::OutOfMemory, "{text}");
        assert!(text.contains("bytes free beside those before it") && text.contains("large: "), "{text}");
    }
    let lacking = engine.load_to(&checkpoint, &target, &mut CudarcDestination::new([])).unwrap_err();
    assert!(lacking.kind() == ErrorKind::Device && lacking.to_string().contains("no stream"), "{lacking}");
    drop((state, own, owned, engine));
    // cudarc frees on its streams.
    streams.iter().for_each(|stream| stream.synchronize().unwrap());
    drop(streams);
    assert_eq!(driver.report(), "");
}

#[test]
fn memory_of_the_engine_is_seen_as_slices() {
    let Some(driver) = driver("memory_of_the_engine_is_seen_as_slices") else { return };
    let (_dir, checkpoint) = saved();
    let engine = Engine::new(EngineOptions { threads: 2, ..EngineOptions::default() }).unwrap();
    let own = stream(0);
    // While others are still on their way.
    let mut job = engine.load(&checkpoint, &target(&checkpoint, gpus(1)).order(["small", "large"])).unwrap();
    let first = job.next().unwrap();
    assert_eq!(first.path.to_string(), "small");
    let small = first.shards()[0].cuda_slice::<f32>(&own).unwrap();
    let event = first.shards()[0].ready_event().unwrap();
    let raw = first.shards()[0].device_slice::<f32>().unwrap();
    assert_eq!((raw.pointer(), raw.len()), (small.device_ptr(&own).0, small.len()));
    // SAFETY: an event that lives.
    assert_eq!(unsafe { cuEventQuery(event.handle() as _) }, CUresult::CUDA_SUCCESS);
    let state = job.wait().unwrap();
    let large = state.array("large").unwrap().shards()[0].cuda_slice::<f32>(&own).unwrap();
    if device_count() > 1 {
        let other = state.array("large").unwrap().shards()[0].cuda_slice::<f32>(&stream(1));
        assert_eq!(other.unwrap_err().kind(), ErrorKind::Device);
    }
    assert!(state.array("large").unwrap().shards()[0].cuda_slice::<u8>(&own).is_err());
    drop((first, state, engine, event));
    // The slices keep what they show.
    for (slice, path) in [(&small, "small"), (&large, "large")] {
        let got = own.clone_dtoh(&**slice).unwrap();
        own.synchronize().unwrap();
        assert!(got == expected::<f32>(&checkpoint, 1, path, 0), "{path}");
    }
    drop((small, large, own));
    assert_eq!(driver.report(), "");
}

#[test]
fn slices_of_a_program_are_filled() {
    let Some(driver) = driver("slices_of_a_program_are_filled") else { return };
    let (_dir, checkpoint) = saved();
    let engine = Engine::new(EngineOptions { threads: 2, ..EngineOptions::default() }).unwrap();
    let own = stream(0);
    let mut weights = own.alloc_zeros::<f32>(1200 * 1024).unwrap();
    let target = target(&checkpoint, gpus(1)).only(["large"]);
    let report = engine.fill(&checkpoint, &target, |shard| {
        let (pointer, _) = weights.device_ptr(&own);
        // SAFETY: the slice lives until after the call, and only `own` has used it.
        Ok(unsafe { DeviceMemory::new(pointer, shard.bytes, own.cu_stream().addr() as u64) }.into())
    });
    assert_eq!(report.unwrap().bytes_logical, 1200 * 1024 * 4);
    let got = own.clone_dtoh(&weights).unwrap();
    own.synchronize().unwrap();
    assert!(got == expected::<f32>(&checkpoint, 1, "large", 0));
    own.memset_zeros(&mut weights).unwrap();
    drop((weights, engine));
    // cudarc frees on its stream.
    own.synchronize().unwrap();
    drop(own);
    assert_eq!(driver.report(), "");
}
