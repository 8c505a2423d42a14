//! Device memory and registered host memory, by address.
//!
//! Device memory is host memory between pages that cannot be touched. An allocation ends right before the second fence, as far
//! as its alignment allows; the bytes between are checked when it is freed. Freed memory is unmapped: a kernel that still uses it
//! ends the process, a copy is refused.

use std::collections::BTreeMap;

use crate::{Code, code};

#[derive(Default)]
pub(crate) struct Memory {
    device: BTreeMap<usize, Allocation>,
    /// Registered host ranges: length, and copies that have not run.
    host: BTreeMap<usize, Registered>,
    used: BTreeMap<usize, usize>,
    peak: BTreeMap<usize, usize>,
}

struct Allocation {
    len: usize,
    device: usize,
    base: usize,
    mapped: usize,
}

struct Registered {
    len: usize,
    in_flight: usize,
}

impl Memory {
    pub(crate) fn used(&self, device: usize) -> usize {
        self.used.get(&device).copied().unwrap_or(0)
    }

    pub(crate) fn peak(&self, device: usize) -> usize {
        self.peak.get(&device).copied().unwrap_or(0)
    }

    pub(crate) fn allocate(&mut self, device: usize, len: usize, limit: usize) -> Result<usize, Code> {
        if len == 0 {
            return Err(code::INVALID_VALUE);
        }
        let rounded = len.checked_next_multiple_of(ALIGN).ok_or(code::OUT_OF_MEMORY)?;
        let used = self.used(device);
        if rounded > limit.saturating_sub(used) {
            return Err(code::OUT_OF_MEMORY);
        }
        let inner = rounded.next_multiple_of(PAGE);
        let mapped = inner + 2 * PAGE;
        // SAFETY: fresh memory at an address of the kernel's choice; its inner part becomes accessible and is written.
        let base = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            let base = libc::mmap(std::ptr::null_mut(), mapped, libc::PROT_NONE, flags, -1, 0);
            if base == libc::MAP_FAILED {
                return Err(code::OUT_OF_MEMORY);
            }
            let start = base.cast::<u8>().add(PAGE);
            if libc::mprotect(start.cast(), inner, libc::PROT_READ | libc::PROT_WRITE) != 0 {
                libc::munmap(base, mapped);
                return Err(code::OUT_OF_MEMORY);
            }
            start.write_bytes(FRESH, inner);
            base as usize
        };
        let start = base + PAGE + inner - rounded;
        // SAFETY: inside the accessible part, behind the allocation.
        unsafe { ((start + len) as *mut u8).write_bytes(SLACK, rounded - len) };
        self.device.insert(start, Allocation { len, device, base, mapped });
        self.used.insert(device, used + rounded);
        let peak = self.peak(device).max(used + rounded);
        self.peak.insert(device, peak);
        Ok(start)
    }

    /// Frees an allocation. The second value says what was found wrong with it.
    pub(crate) fn free(&mut self, address: usize) -> Result<Option<String>, Code> {
        let allocation = self.device.remove(&address).ok_or(code::INVALID_VALUE)?;
        let rounded = allocation.len.next_multiple_of(ALIGN);
        *self.used.entry(allocation.device).or_default() -= rounded;
        let end = address + allocation.len;
        // SAFETY: the slack of this allocation, which is still mapped; then all of it, which nothing refers to any more.
        let wrong = unsafe {
            let slack = std::slice::from_raw_parts(end as *const u8, rounded - allocation.len);
            let wrong = slack.iter().any(|byte| *byte != SLACK);
            libc::munmap(allocation.base as *mut _, allocation.mapped);
            wrong
        };
        Ok(wrong.then(|| format!("something wrote past {} bytes of device {}", allocation.len, allocation.device)))
    }

    /// The device in one of whose allocations all of these bytes lie.
    pub(crate) fn device_of(&self, address: usize, len: usize) -> Option<usize> {
        let (start, allocation) = self.device.range(..=address).next_back()?;
        let end = address.checked_add(len)?;
        (end <= start + allocation.len && address < start + allocation.len).then_some(allocation.device)
    }

    pub(crate) fn register(&mut self, address: usize, len: usize) -> Result<(), Code> {
        if len == 0 || address == 0 {
            return Err(code::INVALID_VALUE);
        }
        // Whole pages are locked, so two ranges may not even share one.
        let pages = |address: usize, len: usize| (address / PAGE, (address + len).div_ceil(PAGE));
        let (first, end) = pages(address, len);
        let mut others = self.host.iter().map(|(address, other)| pages(*address, other.len));
        if others.any(|(other, other_end)| first < other_end && other < end) {
            return Err(code::HOST_MEMORY_ALREADY_REGISTERED);
        }
        self.host.insert(address, Registered { len, in_flight: 0 });
        Ok(())
    }

    pub(crate) fn unregister(&mut self, address: usize) -> Result<Option<String>, Code> {
        let range = self.host.remove(&address).ok_or(code::HOST_MEMORY_NOT_REGISTERED)?;
        let busy = range.in_flight > 0;
        Ok(busy.then(|| format!("{} host bytes were unregistered under a copy", range.len)))
    }

    /// Where the registered range starts that holds all of these bytes.
    pub(crate) fn registered(&self, address: usize, len: usize) -> Option<usize> {
        let (start, range) = self.host.range(..=address).next_back()?;
        (address.checked_add(len)? <= start + range.len).then_some(*start)
    }

    /// A copy to or from a registered range begins to wait, or has ended.
    pub(crate) fn in_flight(&mut self, range: usize, begins: bool) {
        if let Some(range) = self.host.get_mut(&range) {
            range.in_flight = if begins { range.in_flight + 1 } else { range.in_flight.saturating_sub(1) };
        }
    }

    pub(crate) fn alive(&self) -> Vec<String> {
        let device = self.device.values().map(|it| format!("{} bytes of device {}", it.len, it.device));
        device.chain(self.host.values().map(|it| format!("{} registered host bytes", it.len))).collect()
    }
}

/// What every allocation is aligned to.
const ALIGN: usize = 256;

const PAGE: usize = 4096;

/// What fresh device memory holds.
const FRESH: u8 = 0xA5;

/// What stands between the end of an allocation and the fence.
const SLACK: u8 = 0xEE;
