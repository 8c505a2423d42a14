//! What the kernel side of a ring knows in advance: buffers, whose pages then are not looked up and locked for every read, and
//! files, which are not looked up either.
//!
//! Both are met on the way and entered then, under a number that no other buffer or file of this process ever has: an address or
//! a descriptor that is used again must not lead to the old memory or the old file. Where the kernel refuses (before 5.19, or
//! when no more memory may be locked), reads work without.

use std::collections::HashMap;
use std::os::fd::AsRawFd;

use io_uring::{IoUring, types};

use crate::io::fs::Direct;
use crate::io::ring::Slot;
use crate::limits::{URING_BUFFERS_MAX, URING_FILES_MAX};

/// The two tables.
#[derive(Debug)]
pub(super) struct Registered {
    /// Position of a buffer by its number; `None` if the kernel takes no more.
    buffers: Option<HashMap<u64, u16>>,
    /// Whether buffers are still entered.
    more_buffers: bool,
    files: Option<HashMap<u64, u32>>,
    next_file: u32,
}

impl Registered {
    /// Empty tables, where the kernel has them.
    pub(super) fn new(ring: &IoUring) -> Self {
        let submitter = ring.submitter();
        let buffers = submitter.register_buffers_sparse(URING_BUFFERS_MAX);
        let files = submitter.register_files_sparse(URING_FILES_MAX);
        tracing::debug!(buffers = buffers.is_ok(), files = files.is_ok(), "tables of the ring");
        Self {
            buffers: buffers.is_ok().then(HashMap::new),
            more_buffers: true,
            files: files.is_ok().then(HashMap::new),
            next_file: 0,
        }
    }

    /// The position of a slot's memory, which is entered if it is new.
    #[allow(unsafe_code)]
    pub(super) fn buffer(&mut self, ring: &IoUring, slot: &mut Slot) -> Option<u16> {
        let known = self.buffers.as_mut()?;
        let id = slot.id();
        if let Some(&position) = known.get(&id) {
            return Some(position);
        }
        let position = u16::try_from(known.len()).ok().filter(|position| u32::from(*position) < URING_BUFFERS_MAX)?;
        if !self.more_buffers {
            return None;
        }
        let memory = libc::iovec { iov_base: slot.as_mut_ptr().cast(), iov_len: slot.len() };
        // SAFETY: 1. The memory is a slot's, valid now. 2. Its pages stay locked until the ring is closed, so nothing else can
        // be in them; if the slot's memory is freed before, its number is never asked for again, and no request names it.
        let entered = unsafe { ring.submitter().register_buffers_update(position.into(), &[memory], None) };
        match entered {
            Ok(()) => {
                known.insert(id, position);
                Some(position)
            }
            Err(error) => {
                tracing::debug!(%error, entered = known.len(), "no more buffers are locked for the ring");
                self.more_buffers = false;
                None
            }
        }
    }

    /// The position of a file, which is entered if it is new, in the place of the one that was entered first.
    pub(super) fn file(&mut self, ring: &IoUring, file: &Direct) -> Option<types::Fixed> {
        let known = self.files.as_mut()?;
        if let Some(&position) = known.get(&file.id()) {
            return Some(types::Fixed(position));
        }
        let position = self.next_file;
        // Requests in flight keep the file that they were made for.
        let entered = ring.submitter().register_files_update(position, &[file.file().as_raw_fd()]);
        if entered.is_err() {
            self.files = None;
            return None;
        }
        known.retain(|_, other| *other != position);
        known.insert(file.id(), position);
        self.next_file = (position + 1) % URING_FILES_MAX;
        Some(types::Fixed(position))
    }
}
