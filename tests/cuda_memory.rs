//! Memory of devices: whose it is, who fills it, how long it lives, and whether it is enough. On the simulated driver; what needs no
//! simulator also on a machine's own devices (`tests/simulated`).

#![allow(
    unsafe_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "tests fail by panicking and say what they compared; the driver is called through C"
)]

#[path = "simulated/mod.rs"]
mod simulated;
mod support;

use simulated::loads::{array, assert_same, contents, onto, options, saved};
use simulated::{Bed, Machine, Simulator, gpus, logical};
use touchdown::place::{Destination, DeviceMemory, Memory, ShardSpec};
use touchdown::plan::explain::Capacity;
use touchdown::tree::save::{LeafOptions, SaveOptions, Tree};
use touchdown::zarr::Compression;
use touchdown::{Checkpoint, DType, Device, Engine, ErrorKind, Leaf, Mesh, Otherwise, State, Target, spec};

/// Memory that a program has allocated on a stream of its own, as frameworks do, and still writes to when it calls the load.
struct Lent<'s> {
    simulator: &'s Simulator,
    device: usize,
    stream: usize,
    pointers: Vec<(u64, u64)>,
}

impl Destination for Lent<'_> {
    fn prepare(&mut self, shards: &[ShardSpec]) -> touchdown::Result<Vec<Memory>> {
        let simulator = self.simulator;
        let allocate = simulator.symbol::<unsafe extern "C" fn(*mut u64, usize, usize) -> u32>("cuMemAllocAsync");
        let set = simulator.symbol::<unsafe extern "C" fn(u64, u8, usize, usize) -> u32>("cuMemsetD8Async");
        let lend = |shard: &ShardSpec| {
            let mut pointer = 0;
            if shard.bytes > 0 {
                // SAFETY: the driver's signatures; the context is current.
                let codes = unsafe {
                    let code = allocate(&mut pointer, shard.bytes as usize, self.stream);
                    (code, set(pointer, 0x55, shard.bytes as usize, self.stream))
                };
                assert_eq!(codes, (0, 0));
                self.pointers.push((pointer, shard.bytes));
            }
            // SAFETY: the memory lives until `Lent` is dropped, after the load and its results.
            Ok(Memory::Device(unsafe { DeviceMemory::new(pointer, shard.bytes, self.stream as u64) }))
        };
        shards.iter().map(lend).collect()
    }
}

impl<'s> Lent<'s> {
    fn new(simulator: &'s Simulator, device: usize) -> Self {
        let retain = simulator.symbol::<unsafe extern "C" fn(*mut usize, i32) -> u32>("cuDevicePrimaryCtxRetain");
        let push = simulator.symbol::<unsafe extern "C" fn(usize) -> u32>("cuCtxPushCurrent_v2");
        let create = simulator.symbol::<unsafe extern "C" fn(*mut usize, u32) -> u32>("cuStreamCreate");
        let (mut context, mut stream) = (0, 0);
        // SAFETY: the driver's signatures.
        let codes = unsafe { (retain(&mut context, device as i32), push(context), create(&mut stream, 1)) };
        assert_eq!(codes, (0, 0, 0));
        Self { simulator, device, stream, pointers: Vec::new() }
    }
}

impl Lent<'_> {
    /// What it holds there now.
    fn read(&self, pointer: u64, len: usize) -> Vec<u8> {
        let copy =
            self.simulator.symbol::<unsafe extern "C" fn(*mut u8, u64, usize, usize) -> u32>("cuMemcpyDtoHAsync_v2");
        let wait = self.simulator.symbol::<unsafe extern "C" fn(usize) -> u32>("cuStreamSynchronize");
        let mut bytes = vec![0; len];
        // SAFETY: the driver's signatures; the room is as long as the copy.
        let codes = unsafe { (copy(bytes.as_mut_ptr(), pointer, len, self.stream), wait(self.stream)) };
        assert_eq!(codes, (0, 0));
        bytes
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        let free = self.simulator.symbol::<unsafe extern "C" fn(u64, usize) -> u32>("cuMemFreeAsync");
        let wait = self.simulator.symbol::<unsafe extern "C" fn(usize) -> u32>("cuStreamSynchronize");
        let destroy = self.simulator.symbol::<unsafe extern "C" fn(usize) -> u32>("cuStreamDestroy_v2");
        let pop = self.simulator.symbol::<unsafe extern "C" fn(*mut usize) -> u32>("cuCtxPopCurrent_v2");
        let release = self.simulator.symbol::<unsafe extern "C" fn(i32) -> u32>("cuDevicePrimaryCtxRelease_v2");
        // SAFETY: the driver's signatures, and what `new` and `prepare` have made.
        unsafe {
            for (pointer, _) in &self.pointers {
                free(*pointer, self.stream);
            }
            wait(self.stream);
            destroy(self.stream);
            pop(&mut 0);
            release(self.device as i32);
        }
    }
}

#[test]
fn lent_device_memory_is_filled_behind_the_lenders_own_work() {
    let test = "lent_device_memory_is_filled_behind_the_lenders_own_work";
    let Some(simulator) = Simulator::start(test, Machine { delay_us: 400, ..Machine::default() }) else { return };
    // The driver has to be started before the lender uses it.
    assert_eq!(touchdown::place::probe_cuda().count(), 8);
    let (_dir, checkpoint) = saved(Compression::None);
    let engine = Engine::new(options()).unwrap();
    let want = engine.load(&checkpoint, &checkpoint.target()).unwrap().wait().unwrap();
    let mut lent = Lent::new(&simulator, 3);
    let device = Device::Cuda { ordinal: 3, logical: None };
    let target = onto(checkpoint.target(), [device]);
    let got = engine.load_to(&checkpoint, &target, &mut lent).unwrap().wait().unwrap();
    assert_same(&want, &got, "lent");
    let addresses: Vec<u64> = lent.pointers.iter().map(|(pointer, _)| *pointer).collect();
    let used: Vec<u64> = got
        .leaves()
        .filter_map(|(_, leaf)| if let Leaf::Array(array) = leaf { array.shards()[0].device_memory() } else { None })
        .filter(|memory| !memory.is_empty())
        .map(DeviceMemory::pointer)
        .collect();
    assert!(used.iter().all(|pointer| addresses.contains(pointer)) && used.len() == addresses.len());
    drop((got, engine, lent));
    assert_eq!(simulator.report(), "");
}

/// Saves and copies to the host see what a program's own streams were given before, and results name a stream that lives.
#[test]
fn what_a_program_gave_its_streams_before_is_seen() {
    let test = "what_a_program_gave_its_streams_before_is_seen";
    let Some(simulator) = Simulator::start(test, Machine { delay_us: 3000, ..Machine::default() }) else { return };
    assert_eq!(touchdown::place::probe_cuda().count(), 8);
    let dir = tempfile::tempdir().unwrap();
    touchdown::save(
        dir.path().join("c"),
        &Tree::new().with("w", array(&[4096], DType::UInt8, 1)),
        &SaveOptions::default(),
    )
    .unwrap();
    let checkpoint = touchdown::open(dir.path().join("c")).unwrap();
    let target = onto(checkpoint.target(), [Device::Cuda { ordinal: 3, logical: None }]);
    // The engine is gone when this returns.
    let state = touchdown::load(&checkpoint, &target).unwrap();
    let shard = &state.array("w").unwrap().shards()[0];
    let memory = shard.device_memory().unwrap();
    let program = Lent::new(&simulator, 3);
    let wait = simulator.symbol::<unsafe extern "C" fn(usize) -> u32>("cuStreamSynchronize");
    let set = simulator.symbol::<unsafe extern "C" fn(u64, u8, usize, usize) -> u32>("cuMemsetD8Async");
    let write = |values: std::ops::Range<u8>| {
        for value in values {
            // SAFETY: the driver's signature; the shard's own memory, which nobody else uses.
            assert_eq!(unsafe { set(memory.pointer(), value, 4096, program.stream) }, 0);
        }
    };
    // SAFETY: the driver's signature.
    assert_eq!(unsafe { wait(memory.stream() as usize) }, 0, "the stream of a result lives as long as the result");
    for round in 0..3 {
        write(round * 10..round * 10 + 6);
        assert_eq!(shard.to_host().unwrap()[..], [round * 10 + 5; 4096]);
        write(100 + round * 10..106 + round * 10);
        let path = dir.path().join(format!("{round}"));
        touchdown::save(&path, &Tree::of(&checkpoint, &state), &SaveOptions::default()).unwrap();
        let saved = touchdown::open(&path).unwrap();
        let saved = touchdown::load(&saved, &saved.target()).unwrap();
        assert_eq!(saved.array("w").unwrap().shards()[0].bytes().unwrap(), [105 + round * 10; 4096]);
    }
    drop(state);
    drop(program);
    assert_eq!(simulator.report(), "");
}

/// A program may still write to its arrays, on streams that nobody else knows, when it has them loaded into.
#[test]
fn a_load_into_arrays_comes_after_what_their_program_gave() {
    let test = "a_load_into_arrays_comes_after_what_their_program_gave";
    let Some(simulator) = Simulator::start(test, Machine { delay_us: 3000, ..Machine::default() }) else { return };
    assert_eq!(touchdown::place::probe_cuda().count(), 8);
    let dir = tempfile::tempdir().unwrap();
    let tree = Tree::new().with("w", array(&[4096], DType::UInt8, 1));
    touchdown::save(dir.path().join("c"), &tree, &SaveOptions::default()).unwrap();
    let checkpoint = touchdown::open(dir.path().join("c")).unwrap();
    let target = onto(checkpoint.target(), [Device::Cuda { ordinal: 3, logical: None }]);
    let engine = Engine::new(options()).unwrap();
    let mut state = engine.load(&checkpoint, &target).unwrap().wait().unwrap();
    let want = contents(&state);
    let program = Lent::new(&simulator, 3);
    let set = simulator.symbol::<unsafe extern "C" fn(u64, u8, usize, usize) -> u32>("cuMemsetD8Async");
    let wait = simulator.symbol::<unsafe extern "C" fn(usize) -> u32>("cuStreamSynchronize");
    for round in 0..3 {
        let pointer = state.array("w").unwrap().shards()[0].device_memory().unwrap().pointer();
        for value in 0..6 {
            // SAFETY: the driver's signature; the array's own memory, which nobody else uses.
            assert_eq!(unsafe { set(pointer, value, 4096, program.stream) }, 0);
        }
        engine.load_into(&checkpoint, &target, &mut state).unwrap();
        // SAFETY: the driver's signature.
        assert_eq!(unsafe { wait(program.stream) }, 0);
        assert!(contents(&state) == want, "round {round}: what the program gave before came last");
    }
    drop((state, program, engine));
    assert_eq!(simulator.report(), "");
}

#[test]
fn arrays_on_devices_are_loaded_into_in_place() {
    let test = "arrays_on_devices_are_loaded_into_in_place";
    let Some(bed) = Bed::start(test, Machine { delay_us: 50, ..Machine::default() }) else { return };
    let (_dir, checkpoint) = saved(Compression::Zstd { level: 1 });
    let engine = Engine::new(options()).unwrap();
    let mesh = Mesh::new([("a", 2), ("b", 2)], [gpus(3), Device::cpus(1)].concat()).unwrap();
    let build = |checkpoint: &Checkpoint| {
        let rules = [("params/embed", spec!["a", "b"]), ("params/cube", spec!["b"]), ("params/narrow", spec![_, "a"])];
        checkpoint.target().shard(&mesh, rules).otherwise(Otherwise::Replicate).cast([("params/cube", DType::Float32)])
    };
    // The same tree with other values.
    let dir = tempfile::tempdir().unwrap();
    let mut other = Tree::new();
    let mut seed = 1000;
    for leaf in checkpoint.leaves() {
        let Some(at) = leaf.kind.array() else { continue };
        let meta = &checkpoint.arrays()[at].meta;
        other = other.with(leaf.path.to_string().as_str(), array(&meta.shape, meta.dtype, seed));
        seed += 1;
    }
    touchdown::save(dir.path().join("next"), &other, &SaveOptions::default()).unwrap();
    let next = touchdown::open(dir.path().join("next")).unwrap();
    let load = |checkpoint: &Checkpoint| engine.load(checkpoint, &build(checkpoint)).unwrap().wait().unwrap();
    let addresses = |state: &State| {
        let arrays =
            state.leaves().filter_map(|(_, leaf)| if let Leaf::Array(array) = leaf { Some(array) } else { None });
        arrays
            .flat_map(|array| array.shards())
            .map(|shard| match shard.device_memory() {
                Some(memory) => memory.pointer(),
                None => shard.bytes().unwrap().as_ptr() as u64,
            })
            .collect::<Vec<u64>>()
    };
    let mut state = load(&checkpoint);
    let (first, want) = (addresses(&state), contents(&load(&next)));
    engine.load_into(&next, &build(&next), &mut state).unwrap();
    assert_eq!(addresses(&state), first);
    assert!(contents(&state) == want, "other bytes than a load into new memory");
    // A part of the arrays; the others stay.
    engine.load_into(&checkpoint, &build(&checkpoint).only(["params/embed"]), &mut state).unwrap();
    let mixed = contents(&state);
    let old = contents(&load(&checkpoint));
    for ((got, old), new) in mixed.iter().zip(&old).zip(&want) {
        assert!(got == if got.0 == "params/embed" { old } else { new }, "{}", got.0);
    }
    assert_eq!(state.report().bytes_logical, 512 * 640 * 4);
    // What does not fit changes nothing.
    let refused = |target: &Target, state: &mut State| {
        let error = engine.load_into(&next, target, state).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error:?}");
        format!("{error:?}")
    };
    let cast = refused(&build(&next).cast([("params/narrow", DType::Float32)]), &mut state);
    assert!(cast.contains("params/narrow: type float32 is loaded, float64 is there"), "{cast}");
    let moved = refused(&onto(next.target().only(["params/embed"]), gpus(1)), &mut state);
    assert!(moved.contains("params/embed: sharding"), "{moved}");
    let absent = refused(&build(&next).rename([("^params/embed$", "params/table")]), &mut state);
    assert!(absent.contains("params/table: the state has no such array"), "{absent}");
    let clone = state.array("params/cube").unwrap().shards()[1].clone();
    let shared = refused(&build(&next), &mut state);
    assert!(shared.contains("params/cube: its memory is shared"), "{shared}");
    assert!(contents(&state) == mixed);
    drop(clone);
    engine.load_into(&next, &build(&next), &mut state).unwrap();
    assert!(addresses(&state) == first && contents(&state) == want);
    drop((state, engine));
    assert_eq!(bed.report(), "");
}

#[test]
fn loading_into_arrays_allocates_nothing_of_their_size() {
    let test = "loading_into_arrays_allocates_nothing_of_their_size";
    // Room for the arrays and for what workers stage in, not for the arrays twice.
    let Some(simulator) = Simulator::start(test, Machine { memory_bytes: 20 << 20, ..Machine::default() }) else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    touchdown::save(
        dir.path().join("ckpt"),
        &Tree::new().with("w", array(&[3000, 1024], DType::Float32, 1)),
        &SaveOptions {
            leaf: LeafOptions { chunk_bytes: Some(1 << 19), ..LeafOptions::default() },
            ..SaveOptions::default()
        },
    )
    .unwrap();
    let checkpoint = touchdown::open(dir.path().join("ckpt")).unwrap();
    let engine = Engine::new(options()).unwrap();
    let target = onto(checkpoint.target(), gpus(1));
    let mut state = engine.load(&checkpoint, &target).unwrap().wait().unwrap();
    assert_eq!(engine.load(&checkpoint, &target).unwrap_err().kind(), ErrorKind::OutOfMemory);
    engine.load_into(&checkpoint, &target, &mut state).unwrap();
    // A load that fails leaves arrays that can be loaded into again.
    simulator.fail("cuMemcpyHtoDAsync_v2", 1, 999);
    assert_eq!(engine.load_into(&checkpoint, &target, &mut state).unwrap_err().kind(), ErrorKind::Device);
    engine.load_into(&checkpoint, &target, &mut state).unwrap();
    let want = engine.load(&checkpoint, &onto(checkpoint.target(), Device::cpus(1))).unwrap().wait().unwrap();
    assert_same(&want, &state, "in place");
    drop((state, engine));
    assert_eq!(simulator.report(), "");
}

#[test]
fn memory_of_a_program_is_filled_by_address_length_and_stream() {
    let test = "memory_of_a_program_is_filled_by_address_length_and_stream";
    let Some(simulator) = Simulator::start(test, Machine { delay_us: 400, ..Machine::default() }) else { return };
    assert_eq!(touchdown::place::probe_cuda().count(), 8);
    let (_dir, checkpoint) = saved(Compression::None);
    let engine = Engine::new(options()).unwrap();
    let mut lent = Lent::new(&simulator, 2);
    let mesh = Mesh::line([Device::Cuda { ordinal: 2, logical: None }, Device::Cpu(0)]).unwrap();
    let target = || checkpoint.target().only(["params/**"]).shard(&mesh, [("**", spec!["device"])]);
    let mut host = vec![vec![0u8; 4 << 20]; 16];
    let mut slices = host.iter_mut();
    let (mut on_device, mut on_host) = (Vec::new(), Vec::new());
    let bytes = checkpoint.plan_within(&target(), engine.limits()).unwrap().bytes_read();
    let report = engine.fill(&checkpoint, &target(), |shard| {
        if shard.device.is_host() {
            let slice = &mut slices.next().unwrap()[..shard.bytes as usize];
            on_host.push((shard.clone(), slice.as_ptr()));
            return Ok(slice.into());
        }
        let Some(Memory::Device(memory)) = lent.prepare(std::slice::from_ref(shard))?.pop() else {
            panic!("no memory")
        };
        on_device.push((shard.clone(), memory.pointer()));
        Ok(memory.into())
    });
    assert_eq!(report.unwrap().bytes_read, bytes);
    let cpus = Mesh::line(Device::cpus(2)).unwrap();
    let want = engine
        .load(&checkpoint, &checkpoint.target().only(["params/**"]).shard(&cpus, [("**", spec!["device"])]))
        .unwrap()
        .wait()
        .unwrap();
    let expected = |shard: &ShardSpec| {
        want.array(&shard.path.to_string()).unwrap().shards()[shard.position].to_host().unwrap().to_vec()
    };
    for (shard, pointer) in &on_device {
        assert!(lent.read(*pointer, shard.bytes as usize) == expected(shard), "{} on the device", shard.path);
    }
    for (shard, first) in &on_host {
        let slice = host.iter().find(|slice| slice.as_ptr() == *first).unwrap();
        assert!(slice[..shard.bytes as usize] == expected(shard), "{} on the processor", shard.path);
    }
    assert_eq!((on_device.len(), on_host.len()), (6, 6));
    // Memory of the wrong size, and of the wrong kind.
    for (memory, says) in [((4, 0), "of the wrong size"), ((0, 1), "of another kind")] {
        let error = engine.fill(&checkpoint, &target(), |shard| {
            if shard.device.is_host() || memory.1 == 1 {
                return Ok(Vec::leak(vec![0; shard.bytes as usize]).into());
            }
            // SAFETY: nothing is written: the length is refused.
            Ok(unsafe { DeviceMemory::new(4096, shard.bytes + memory.0, 0) }.into())
        });
        assert!(error.unwrap_err().to_string().contains(says), "{says}");
    }
    drop((engine, lent));
    assert_eq!(simulator.report(), "");
}

#[test]
fn too_little_memory_to_stage_in_is_said_before_anything_is_read() {
    let test = "too_little_memory_to_stage_in_is_said_before_anything_is_read";
    let Some(simulator) = Simulator::start(test, Machine::default()) else { return };
    let (_dir, checkpoint) = saved(Compression::None);
    let target = || onto(checkpoint.target(), gpus(1));
    let need = checkpoint.plan_within(&target(), options().limits().unwrap()).unwrap().gpu_needs()[0];
    let memory_bytes = need.results + need.staging / 2;
    simulator.reset(Machine { memory_bytes, ..Machine::default() });
    assert_eq!(touchdown::place::probe_cuda().count(), 8);
    let engine = Engine::new(options()).unwrap();
    let mut lent = Lent::new(&simulator, 0);
    let error = engine.load_to(&checkpoint, &target(), &mut lent).unwrap_err();
    assert!(error.kind() == ErrorKind::OutOfMemory && error.to_string().contains("staging"), "{error}");
    assert_eq!(simulator.count("cuMemcpyHtoDAsync_v2"), 0);
    drop((engine, lent));
    assert_eq!(simulator.report(), "");
}

#[test]
fn shards_say_what_they_are() {
    let test = "shards_say_what_they_are";
    let Some(bed) = Bed::start(test, Machine::default()) else { return };
    let (_dir, checkpoint) = saved(Compression::None);
    let engine = Engine::new(options()).unwrap();
    let mesh = Mesh::line([gpus(1), Device::cpus(1)].concat()).unwrap();
    let target = checkpoint.target().only(["params/embed"]).shard(&mesh, [("**", spec!["device"])]);
    let state = engine.load(&checkpoint, &target).unwrap().wait().unwrap();
    let [device, host] = state.array("params/embed").unwrap().shards() else { panic!("two shards") };
    assert_eq!((device.dtype(), device.shape(), host.shape()), (DType::Float32, &[256, 640][..], &[256, 640][..]));
    let memory = device.device_memory().unwrap();
    let slice = device.device_slice::<f32>().unwrap();
    assert_eq!((slice.pointer(), slice.len()), (memory.pointer(), 256 * 640));
    assert_eq!(memory.len(), 256 * 640 * 4);
    assert!(memory.stream() != 0 && device.ready_event().unwrap().handle() != 0);
    // Nothing is empty in silence.
    let kinds = [
        device.bytes().unwrap_err().kind(),
        device.as_slice::<f32>().unwrap_err().kind(),
        host.device_slice::<f32>().unwrap_err().kind(),
        host.ready_event().unwrap_err().kind(),
    ];
    assert_eq!(kinds, [ErrorKind::Device; 4]);
    assert_eq!(device.device_slice::<i32>().unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(host.bytes().unwrap().len(), 256 * 640 * 4);
    drop((state, engine));
    assert_eq!(bed.report(), "");
}

#[test]
fn a_plan_knows_what_a_device_needs() {
    let test = "a_plan_knows_what_a_device_needs";
    let Some(simulator) = Simulator::start(test, Machine::default()) else { return };
    let (_dir, checkpoint) = saved(Compression::None);
    let mesh = Mesh::line([logical(1, 3), gpus(1)].concat()).unwrap();
    let target =
        || checkpoint.target().shard(&mesh, [("params/embed", spec!["device"])]).otherwise(Otherwise::Replicate);
    let plan = checkpoint.plan_within(&target(), options().limits().unwrap()).unwrap();
    let needs: Vec<(u32, u64)> = plan.gpu_needs().iter().map(|need| (need.ordinal, need.bytes())).collect();
    assert_eq!(needs.iter().map(|need| need.0).collect::<Vec<_>>(), [0, 1]);
    assert!(needs[1].1 > needs[0].1, "three quarters need more than one");
    let most = needs[1].1;
    for (memory, fits) in [(most, true), (most - 256, false)] {
        simulator.reset(Machine { memory_bytes: memory, ..Machine::default() });
        let gpu_bytes = needs.iter().map(|(ordinal, _)| (*ordinal, touchdown::place::free_bytes(*ordinal).unwrap()));
        let capacity = Capacity { host_bytes: None, gpu_bytes: gpu_bytes.collect() };
        assert_eq!(capacity.gpu_bytes[&1], memory);
        let short = plan.shortages(&capacity);
        assert_eq!(short.is_empty(), fits, "{short:?}");
        assert!(fits || short[0].device == "cuda:1" && short[0].needed == most && short[0].available == memory);
        let engine = Engine::new(options()).unwrap();
        let loaded = engine.load(&checkpoint, &target()).and_then(touchdown::Job::wait);
        assert_eq!(loaded.map(drop).map_err(|error| error.kind()).is_ok(), fits);
        drop(engine);
        assert_eq!(simulator.report(), "");
    }
}
