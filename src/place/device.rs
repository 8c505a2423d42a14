//! Memory of devices as values: an address, a length, a stream, and what keeps it.

use std::any::Any;
use std::marker::PhantomData;
use std::sync::Arc;

use super::host::Element;
use super::parcel::Span;
use crate::error::Result;

/// Keeps memory or an event of a device.
pub(crate) type Hold = Arc<dyn Any + Send + Sync>;

/// What a device does for those who hold its memory.
pub(crate) trait Download: std::fmt::Debug + Send + Sync {
    /// Waits until the device has done everything that it was given, on whatever stream: downloads have one of their own.
    ///
    /// # Errors
    /// A device that fails.
    fn settle(&self) -> Result<()>;

    /// Copies runs of device memory, one behind the other, until there is no more room, and returns when they are here.
    ///
    /// # Errors
    /// A device that fails, or runs that are shorter than the room.
    ///
    /// # Safety
    /// 1. The runs are valid, and nobody writes them meanwhile.
    #[allow(unsafe_code)]
    unsafe fn download(&self, runs: &mut dyn Iterator<Item = Span>, to: &mut [u8]) -> Result<()>;

    /// An event that is reached.
    ///
    /// # Errors
    /// A device that fails.
    fn reached(&self) -> Result<DeviceEvent>;
}

/// Memory of a device: an address, a length, and a stream.
///
/// The stream of a caller's memory is the one that has used it so far: an engine writes once what that stream has now is done.
/// The stream of an engine's own memory is the one that it writes on; nothing of a shard that was handed out is left on it, so
/// that any stream may use the shard at once.
pub struct DeviceMemory {
    pointer: u64,
    len: u64,
    stream: u64,
    owner: Owner,
}

/// Whose memory it is.
enum Owner {
    /// The caller's, who has promised to keep it.
    Caller,
    /// Of an engine; the value keeps it.
    Engine(#[allow(dead_code, reason = "it is kept, not used")] Hold),
    /// Of a destination of this crate, allocated on the stream that will use it; the value keeps it.
    #[cfg(feature = "cudarc")]
    Destination(Hold),
    /// Of an array that is loaded into once more and keeps it.
    Array,
}

impl std::fmt::Debug for DeviceMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DeviceMemory({} bytes at {:#x})", self.len, self.pointer)
    }
}

impl DeviceMemory {
    /// Names memory that the caller owns.
    ///
    /// # Safety
    /// 1. `pointer` is valid for writes of `len` bytes in the primary context of the shard's device until the load has ended, and
    ///    for reads as long as its shard is used.
    /// 2. Nothing else writes those bytes meanwhile, on any stream, beyond what `stream` was given before the load was called.
    /// 3. `stream` is a live stream of that context, or one of the driver's special handles as the thread that calls the load
    ///    means it, until that call has returned.
    #[allow(unsafe_code)]
    pub unsafe fn new(pointer: u64, len: u64, stream: u64) -> Self {
        Self { pointer, len, stream, owner: Owner::Caller }
    }

    /// Memory of an engine, which this value keeps.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "devices make it"))]
    pub(crate) fn held(pointer: u64, len: u64, stream: u64, hold: Hold) -> Self {
        Self { pointer, len, stream, owner: Owner::Engine(hold) }
    }

    /// Memory of a destination, allocated on this stream, which this value keeps.
    #[cfg(feature = "cudarc")]
    pub(crate) fn given(pointer: u64, len: u64, stream: u64, hold: Hold) -> Self {
        Self { pointer, len, stream, owner: Owner::Destination(hold) }
    }

    /// The same memory for a load that its owner outlives.
    pub(crate) fn again(&self) -> Self {
        Self { pointer: self.pointer, len: self.len, stream: self.stream, owner: Owner::Array }
    }

    /// The stream behind whose work a load has to write: that of somebody who still uses the memory.
    pub(crate) fn stream_to_follow(&self) -> Option<u64> {
        let used = match &self.owner {
            Owner::Caller => true,
            #[cfg(feature = "cudarc")]
            Owner::Destination(_) => true,
            _ => false,
        };
        (used && self.len > 0).then_some(self.stream)
    }

    /// Whether the caller has promised to keep it for one load only.
    pub(crate) fn is_lent(&self) -> bool {
        matches!(self.owner, Owner::Caller)
    }

    /// Whether a destination has allocated it.
    #[cfg(feature = "cudarc")]
    pub(crate) fn is_given(&self) -> bool {
        matches!(self.owner, Owner::Destination(_))
    }

    /// What keeps the memory of a destination.
    #[cfg(feature = "cudarc")]
    pub(crate) fn into_given(self) -> Option<Hold> {
        match self.owner {
            Owner::Destination(hold) => Some(hold),
            _ => None,
        }
    }

    pub(crate) fn span(&self) -> Span {
        Span { pointer: self.pointer, len: self.len }
    }

    /// Device address of the first byte.
    pub fn pointer(&self) -> u64 {
        self.pointer
    }

    /// Number of bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The driver's stream handle.
    pub fn stream(&self) -> u64 {
        self.stream
    }
}

/// Elements of one type in device memory, row-major: what a kernel is given.
#[derive(Debug)]
pub struct DeviceSlice<'m, T> {
    pointer: u64,
    len: usize,
    _memory: PhantomData<&'m [T]>,
}

impl<T> Clone for DeviceSlice<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for DeviceSlice<'_, T> {}

impl<'m, T: Element> DeviceSlice<'m, T> {
    /// All of some memory, whose length is a number of elements.
    pub(crate) fn of(memory: &'m DeviceMemory) -> Self {
        let len = usize::try_from(memory.len).unwrap_or(usize::MAX) / size_of::<T>();
        Self { pointer: memory.pointer, len, _memory: PhantomData }
    }

    /// Device address of the first element.
    pub fn pointer(&self) -> u64 {
        self.pointer
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// An event of a device's primary context, as a driver's handle. It lives as long as this value.
pub struct DeviceEvent {
    handle: u64,
    _hold: Hold,
}

impl DeviceEvent {
    #[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "devices make it"))]
    pub(crate) fn held(handle: u64, hold: Hold) -> Self {
        Self { handle, _hold: hold }
    }

    /// The driver's handle, a `CUevent`.
    pub fn handle(&self) -> u64 {
        self.handle
    }
}

impl std::fmt::Debug for DeviceEvent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DeviceEvent({:#x})", self.handle)
    }
}
