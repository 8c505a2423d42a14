//! The driver's entry points, as far as Touchdown and its tests use them. Each is counted, and fails if a test asked for it.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::kernels::{COMPUTE_CAPABILITY, module};
use crate::state::{CALLS, CONTEXT_HANDLES, CURRENT, State, locked, start, state};
use crate::stream::{Event, Stream};
use crate::{Code, code};

fn call(name: &'static str, body: impl FnOnce() -> Result<(), Code>) -> Code {
    {
        let mut calls = locked(&CALLS);
        let count = calls.counts.entry(name).or_default();
        *count += 1;
        let count = *count;
        calls.total += 1;
        let total = calls.total;
        let hit = |(entry, nth, _): &(String, u64, Code)| match entry.as_str() {
            "*" => *nth == total,
            entry => entry == name && *nth == count,
        };
        if calls.fault.as_ref().is_some_and(hit) {
            return calls.fault.take().map_or(0, |(.., code)| code);
        }
    }
    body().err().unwrap_or(0)
}

/// Writes a result where the caller wants it.
fn give<T>(to: *mut T, value: T) -> Result<(), Code> {
    if to.is_null() {
        return Err(code::INVALID_VALUE);
    }
    // SAFETY: the driver's interface: a pointer to one value.
    unsafe { to.write(value) };
    Ok(())
}

macro_rules! entries {
    ($(fn $name:ident($($argument:ident: $kind:ty),* $(,)?) $body:block)*) => {$(
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($argument: $kind),*) -> Code {
            call(stringify!($name), || $body)
        }
    )*};
}

entries! {
    fn cuInit(flags: c_uint) {
        if flags != 0 {
            return Err(code::INVALID_VALUE);
        }
        start()
    }

    fn cuDriverGetVersion(version: *mut c_int) { give(version, state()?.config.driver) }

    fn cuDeviceGetCount(count: *mut c_int) { give(count, state()?.config.devices as c_int) }

    fn cuDeviceGet(device: *mut c_int, ordinal: c_int) {
        known(&*state()?, ordinal)?;
        give(device, ordinal)
    }

    fn cuDeviceGetName(name: *mut c_char, len: c_int, device: c_int) {
        known(&*state()?, device)?;
        let text = format!("Simulated GPU {device}\0");
        let count = text.len().min(len as usize);
        // SAFETY: the caller has room for `len` bytes.
        unsafe { std::ptr::copy_nonoverlapping(text.as_ptr(), name.cast(), count) };
        Ok(())
    }

    fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_uint, device: c_int) {
        known(&*state()?, device)?;
        give(value, match attribute {
            11 => c_int::MAX, // largest pitch of a copy
            75 => COMPUTE_CAPABILITY.0,
            76 => COMPUTE_CAPABILITY.1,
            115 => 1, // pools of memory
            _ => return Err(code::INVALID_VALUE),
        })
    }

    fn cuDeviceCanAccessPeer(can: *mut c_int, device: c_int, peer: c_int) {
        let state = state()?;
        known(&state, device)?;
        known(&state, peer)?;
        give(can, c_int::from(device != peer))
    }

    fn cuDevicePrimaryCtxRetain(context: *mut usize, device: c_int) {
        let state = state()?;
        let device = known(&state, device)?;
        *locked(&state.objects).contexts.entry(device).or_default() += 1;
        give(context, CONTEXT_HANDLES + device)
    }

    fn cuDevicePrimaryCtxRelease_v2(device: c_int) {
        let state = state()?;
        let device = known(&state, device)?;
        let mut objects = locked(&state.objects);
        let count = objects.contexts.get_mut(&device).filter(|count| **count > 0).ok_or(code::INVALID_CONTEXT)?;
        *count -= 1;
        Ok(())
    }

    fn cuCtxPushCurrent_v2(context: usize) {
        state()?.device_of(context)?;
        CURRENT.with_borrow_mut(|stack| stack.push(context));
        Ok(())
    }

    fn cuCtxPopCurrent_v2(context: *mut usize) {
        let popped = CURRENT.with_borrow_mut(Vec::pop).ok_or(code::INVALID_CONTEXT)?;
        give(context, popped)
    }

    fn cuCtxGetCurrent(context: *mut usize) {
        state()?;
        give(context, CURRENT.with_borrow(|stack| stack.last().copied()).unwrap_or(0))
    }

    fn cuCtxSetCurrent(context: usize) {
        if context != 0 {
            state()?.device_of(context)?;
        }
        CURRENT.with_borrow_mut(|stack| {
            stack.pop();
            stack.extend((context != 0).then_some(context));
        });
        Ok(())
    }

    fn cuCtxSynchronize() {
        let state = state()?;
        state.synchronize(state.device()?)
    }

    fn cuCtxEnablePeerAccess(peer: usize, flags: c_uint) {
        let state = state()?;
        let (device, peer) = (state.device()?, state.device_of(peer)?);
        if flags != 0 || device == peer {
            return Err(code::INVALID_VALUE);
        }
        match locked(&state.objects).peers.insert((device, peer)) {
            true => Ok(()),
            false => Err(code::PEER_ACCESS_ALREADY_ENABLED),
        }
    }

    fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) {
        let state = state()?;
        let device = state.device()?;
        let all = state.config.memory_bytes;
        give(free, all - locked(&state.memory).used(device))?;
        give(total, all)
    }

    fn cuMemAlloc_v2(pointer: *mut u64, len: usize) { allocate(pointer, len) }

    fn cuMemFree_v2(pointer: u64) {
        let state = state()?;
        let device = locked(&state.memory).device_of(pointer as usize, 1).ok_or(code::INVALID_VALUE)?;
        // Nothing of a broken device runs any more; its memory is given back all the same.
        let whole = state.synchronize(device);
        let wrong = locked(&state.memory).free(pointer as usize)?;
        state.violation(wrong);
        whole
    }

    fn cuMemAllocAsync(pointer: *mut u64, len: usize, stream: usize) {
        state()?.stream(stream)?;
        allocate(pointer, len)
    }

    fn cuMemFreeAsync(pointer: u64, stream: usize) {
        let state = state()?;
        let owner = Arc::clone(&state);
        state.stream(stream)?.push(move || {
            let wrong = locked(&owner.memory).free(pointer as usize)?;
            owner.violation(wrong);
            Ok(())
        });
        Ok(())
    }

    fn cuMemHostRegister_v2(pointer: usize, len: usize, flags: c_uint) {
        let state = state()?;
        state.device()?;
        if flags & !0xF != 0 {
            return Err(code::INVALID_VALUE);
        }
        locked(&state.memory).register(pointer, len)
    }

    fn cuMemHostUnregister(pointer: usize) {
        let state = state()?;
        state.device()?;
        let wrong = locked(&state.memory).unregister(pointer)?;
        state.violation(wrong);
        Ok(())
    }

    fn cuMemcpyHtoDAsync_v2(target: u64, source: usize, len: usize, stream: usize) {
        let state = state()?;
        let stream = state.stream(stream)?;
        upload(&state, &stream, source, vec![(target as usize, 0)], len, len)
    }

    fn cuMemcpyDtoHAsync_v2(target: usize, source: u64, len: usize, stream: usize) {
        let state = state()?;
        download(&state, &*state.stream(stream)?, target, source as usize, len)
    }

    fn cuMemcpy2DAsync_v2(copy: *const Copy2D, stream: usize) {
        let state = state()?;
        let stream = state.stream(stream)?;
        // SAFETY: the driver's interface: a pointer to one description.
        let copy = unsafe { &*copy };
        let (width, height) = (copy.width_bytes, copy.height);
        if copy.source_kind != HOST || copy.target_kind != DEVICE {
            return Err(code::INVALID_VALUE);
        }
        if width > copy.source_pitch || width > copy.target_pitch || copy.target_pitch > c_int::MAX as usize
            || copy.source_pitch > c_int::MAX as usize
        {
            return Err(code::INVALID_VALUE);
        }
        if width == 0 || height == 0 {
            return Ok(());
        }
        let source = copy.source_host as usize + copy.source_y * copy.source_pitch + copy.source_x;
        let target = copy.target_device as usize + copy.target_y * copy.target_pitch + copy.target_x;
        let rows = (0..height).map(|row| (target + row * copy.target_pitch, row * copy.source_pitch)).collect();
        upload(&state, &stream, source, rows, width, (height - 1) * copy.source_pitch + width)
    }

    fn cuMemcpyDtoDAsync_v2(target: u64, source: u64, len: usize, stream: usize) {
        let state = state()?;
        let stream = state.stream(stream)?;
        let (owner, device) = (Arc::clone(&state), stream.device);
        stream.push(move || {
            let memory = locked(&owner.memory);
            let ends = [target as usize, source as usize];
            if len > 0 && ends.iter().any(|address| memory.device_of(*address, len) != Some(device)) {
                return Err(illegal(&owner, "a copy on a device"));
            }
            // SAFETY: both ranges lie in live allocations, which the lock keeps.
            unsafe { std::ptr::copy(source as *const u8, target as *mut u8, len) };
            Ok(())
        });
        Ok(())
    }

    fn cuMemcpyPeerAsync(target: u64, to: usize, source: u64, from: usize, len: usize, stream: usize) {
        let state = state()?;
        let (to, from) = (state.device_of(to)?, state.device_of(from)?);
        let owner = Arc::clone(&state);
        state.stream(stream)?.push(move || {
            let memory = locked(&owner.memory);
            let ends = [(target as usize, to), (source as usize, from)];
            if len > 0 && ends.iter().any(|(address, device)| memory.device_of(*address, len) != Some(*device)) {
                return Err(illegal(&owner, "a copy between devices"));
            }
            // SAFETY: both ranges lie in live allocations, which the lock keeps.
            unsafe { std::ptr::copy(source as *const u8, target as *mut u8, len) };
            Ok(())
        });
        Ok(())
    }

    fn cuMemsetD8Async(target: u64, value: u8, len: usize, stream: usize) {
        let state = state()?;
        let stream = state.stream(stream)?;
        let (owner, device) = (Arc::clone(&state), stream.device);
        stream.push(move || {
            let memory = locked(&owner.memory);
            if len > 0 && memory.device_of(target as usize, len) != Some(device) {
                return Err(illegal(&owner, "a fill"));
            }
            // SAFETY: the range lies in a live allocation, which the lock keeps.
            unsafe { (target as *mut u8).write_bytes(value, len) };
            Ok(())
        });
        Ok(())
    }

    fn cuStreamCreate(stream: *mut usize, flags: c_uint) {
        if flags > 1 {
            return Err(code::INVALID_VALUE);
        }
        give(stream, state()?.new_stream()?)
    }

    fn cuStreamDestroy_v2(stream: usize) {
        let stream = locked(&state()?.objects).streams.remove(&stream).ok_or(code::INVALID_HANDLE)?;
        stream.close();
        Ok(())
    }

    fn cuStreamSynchronize(stream: usize) { state()?.stream(stream)?.synchronize() }

    fn cuStreamWaitEvent(stream: usize, event: usize, _flags: c_uint) {
        let state = state()?;
        let event = state.event(event)?;
        let number = event.recorded();
        state.stream(stream)?.push(move || {
            event.wait(number);
            Ok(())
        });
        Ok(())
    }

    fn cuEventCreate(event: *mut usize, flags: c_uint) {
        let state = state()?;
        state.device()?;
        if flags > 7 {
            return Err(code::INVALID_VALUE);
        }
        let handle = state.handle();
        locked(&state.objects).events.insert(handle, Arc::new(Event::default()));
        give(event, handle)
    }

    fn cuEventDestroy_v2(event: usize) {
        locked(&state()?.objects).events.remove(&event).map(|_| ()).ok_or(code::INVALID_HANDLE)
    }

    fn cuEventRecord(event: usize, stream: usize) {
        let state = state()?;
        state.event(event)?.record(&*state.stream(stream)?);
        Ok(())
    }

    fn cuEventQuery(event: usize) {
        match state()?.event(event)?.is_reached() {
            true => Ok(()),
            false => Err(code::NOT_READY),
        }
    }

    fn cuEventSynchronize(event: usize) {
        let state = state()?;
        let event = state.event(event)?;
        event.wait(event.recorded());
        let failed = state.failed.iter().map(|code| code.load(Ordering::Acquire)).find(|code| *code != 0);
        failed.map_or(Ok(()), Err)
    }

    fn cuModuleLoadData(handle: *mut usize, image: *const u8) {
        let state = state()?;
        state.device()?;
        // SAFETY: passed on.
        let module = unsafe { module(state.config.driver, image) }?;
        let number = state.handle();
        locked(&state.objects).modules.insert(number, module);
        give(handle, number)
    }

    fn cuModuleUnload(module: usize) {
        let state = state()?;
        let mut objects = locked(&state.objects);
        objects.functions.retain(|_, (owner, _)| *owner != module);
        objects.modules.remove(&module).map(|_| ()).ok_or(code::INVALID_HANDLE)
    }

    fn cuModuleGetFunction(function: *mut usize, module: usize, name: *const c_char) {
        let state = state()?;
        // SAFETY: the driver's interface: text that ends with a zero byte.
        let name = unsafe { CStr::from_ptr(name) }.to_str().map_err(|_| code::NOT_FOUND)?;
        let kernels = state.kernels.as_ref().ok_or(code::NOT_FOUND)?;
        let mut objects = locked(&state.objects);
        let found = kernels.function(&*objects.modules.get(&module).cloned().ok_or(code::INVALID_HANDLE)?, name)?;
        let handle = state.handle();
        objects.functions.insert(handle, (module, found));
        give(function, handle)
    }

    fn cuLaunchKernel(
        function: usize,
        grid_x: c_uint,
        grid_y: c_uint,
        grid_z: c_uint,
        block_x: c_uint,
        block_y: c_uint,
        block_z: c_uint,
        _shared_bytes: c_uint,
        stream: usize,
        parameters: *mut *mut c_void,
        _extra: *mut *mut c_void,
    ) {
        let state = state()?;
        if grid_x == 0 || grid_x > i32::MAX as u32 || (grid_y, grid_z) != (1, 1) || (block_y, block_z) != (1, 1)
            || block_x != THREADS
        {
            return Err(code::INVALID_VALUE);
        }
        let (_, function) = *locked(&state.objects).functions.get(&function).ok_or(code::INVALID_HANDLE)?;
        // SAFETY: the driver's interface: a pointer to each parameter, of the types that all kernels here have. They are read
        // now, as a driver does.
        let parameters = unsafe {
            let at = |index: usize| *parameters.add(index);
            (at(0).cast::<u64>().read(), at(1).cast::<u64>().read(), at(2).cast::<u32>().read(), at(3).cast::<u64>().read())
        };
        let stream = state.stream(stream)?;
        let (owner, device) = (Arc::clone(&state), stream.device);
        stream.push(move || {
            let kernels = owner.kernels.as_ref().ok_or(code::LAUNCH_FAILED)?;
            kernels.run(&owner, device, function, grid_x, parameters)
        });
        Ok(())
    }

    fn cuGetErrorName(error: Code, text: *mut *const c_char) { give(text, code::name(error).as_ptr()) }

    fn cuGetErrorString(error: Code, text: *mut *const c_char) { give(text, code::name(error).as_ptr()) }
}

/// What `cuMemcpy2DAsync_v2` is given.
#[repr(C)]
pub struct Copy2D {
    source_x: usize,
    source_y: usize,
    source_kind: c_uint,
    source_host: *const c_void,
    source_device: u64,
    source_array: usize,
    source_pitch: usize,
    target_x: usize,
    target_y: usize,
    target_kind: c_uint,
    target_host: *mut c_void,
    target_device: u64,
    target_array: usize,
    target_pitch: usize,
    width_bytes: usize,
    height: usize,
}

const HOST: c_uint = 1;
const DEVICE: c_uint = 2;

/// Threads of a block: the kernels are compiled for exactly these.
const THREADS: c_uint = 256;

fn known(state: &State, device: c_int) -> Result<usize, Code> {
    usize::try_from(device).ok().filter(|device| *device < state.config.devices).ok_or(code::INVALID_DEVICE)
}

fn allocate(pointer: *mut u64, len: usize) -> Result<(), Code> {
    let state = state()?;
    let device = state.device()?;
    let address = locked(&state.memory).allocate(device, len, state.config.memory_bytes)?;
    give(pointer, address as u64)
}

fn illegal(state: &State, what: &str) -> Code {
    state.violation(Some(format!("{what} reaches outside of live memory")));
    code::ILLEGAL_ADDRESS
}

/// Rows of host memory to the device: where each goes and where in the source it starts. Registered memory is read when the
/// copy runs, and must hold then what it held at the call; other memory is read now, as drivers do.
fn upload(
    state: &Arc<State>,
    stream: &Arc<Stream>,
    source: usize,
    rows: Vec<(usize, usize)>,
    width: usize,
    span: usize,
) -> Result<(), Code> {
    if span == 0 {
        return Ok(());
    }
    locked(&CALLS).uploaded += (rows.len() * width) as u64;
    let registered = locked(&state.memory).registered(source, span);
    // SAFETY: the caller's memory, valid for the call, and if it is registered until the copy has run.
    let bytes = || unsafe { std::slice::from_raw_parts(source as *const u8, span) };
    let staged = registered.is_none().then(|| bytes().to_vec());
    let before = checksum(bytes());
    registered.inspect(|range| locked(&state.memory).in_flight(*range, true));
    let (owner, device) = (Arc::clone(state), stream.device);
    stream.push(move || {
        let mut memory = locked(&owner.memory);
        if let Some(range) = registered {
            if memory.registered(source, span).is_none() {
                return Err(illegal(&owner, "a copy from memory that is no longer registered"));
            }
            memory.in_flight(range, false);
        }
        // SAFETY: registered memory, which is still there; the staged copy is the task's own.
        let bytes =
            staged.as_deref().unwrap_or_else(|| unsafe { std::slice::from_raw_parts(source as *const u8, span) });
        if checksum(bytes) != before {
            owner.violation(Some("pinned memory changed between a copy's call and the copy".to_owned()));
        }
        for (target, at) in rows {
            if memory.device_of(target, width) != Some(device) {
                return Err(illegal(&owner, "a copy to the device"));
            }
            // SAFETY: the target lies in a live allocation, which the lock keeps, and the source in `bytes`.
            unsafe { std::ptr::copy_nonoverlapping(bytes[at..][..width].as_ptr(), target as *mut u8, width) };
        }
        Ok(())
    });
    Ok(())
}

/// Device memory to host memory. Registered memory is poisoned until the copy runs; of other memory the call is synchronous.
fn download(state: &Arc<State>, stream: &Stream, target: usize, source: usize, len: usize) -> Result<(), Code> {
    if len == 0 {
        return Ok(());
    }
    let registered = locked(&state.memory).registered(target, len);
    if let Some(range) = registered {
        locked(&state.memory).in_flight(range, true);
        // SAFETY: the caller's memory, which is the copy's from now on.
        unsafe { (target as *mut u8).write_bytes(NOT_ARRIVED, len) };
    }
    let (owner, device) = (Arc::clone(state), stream.device);
    stream.push(move || {
        let mut memory = locked(&owner.memory);
        if let Some(range) = registered {
            memory.in_flight(range, false);
        }
        if memory.device_of(source, len) != Some(device) {
            return Err(illegal(&owner, "a copy from the device"));
        }
        // SAFETY: the source lies in a live allocation, which the lock keeps; the target is the caller's until it has waited.
        unsafe { std::ptr::copy_nonoverlapping(source as *const u8, target as *mut u8, len) };
        Ok(())
    });
    if registered.is_some() { Ok(()) } else { stream.synchronize() }
}

/// Enough to notice that somebody wrote.
fn checksum(bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<8>();
    let sum = words.iter().fold(0u64, |sum, word| sum.rotate_left(5).wrapping_add(u64::from_le_bytes(*word)));
    rest.iter().fold(sum, |sum, byte| sum.rotate_left(5).wrapping_add(u64::from(*byte)))
}

/// What a download's target holds until it has arrived.
const NOT_ARRIVED: u8 = 0xDD;
