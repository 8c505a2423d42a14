//! Page-aligned memory.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;
use std::sync::Arc;
#[cfg(feature = "uring")]
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, ErrorKind, Result};

/// Host memory: staging slots, results, or memory that the caller supplies.
///
/// Memory made here is zeroed and page-aligned, which is what direct reads and page-locking need; a large request comes
/// from the system as zero pages that are only backed when touched.
pub struct Buffer {
    start: NonNull<u8>,
    len: usize,
    owner: Owner,
    #[cfg(feature = "uring")]
    id: u64,
}

/// Who frees the memory.
#[derive(Clone)]
enum Owner {
    /// This buffer; allocated page-aligned.
    Aligned,
    /// This buffer; pages of its own.
    Mapped,
    /// This buffer; it was a boxed slice.
    Boxed,
    /// Somebody else.
    Foreign,
    /// The last of the buffers that are parts of this one.
    Part(Arc<Buffer>),
}

// SAFETY: the memory is owned and plain bytes.
#[allow(unsafe_code)]
unsafe impl Send for Buffer {}
// SAFETY: shared access only reads.
#[allow(unsafe_code)]
unsafe impl Sync for Buffer {}

/// What direct reads and page-locking ask for at most.
const ALIGN: usize = 4096;

/// From this size on memory comes straight from the system: below it, zeroing costs less than two system calls.
const MAPPED_BYTES_MIN: usize = 256 << 10;

/// Size of a large page on the machines that this is for.
const HUGE_PAGE_BYTES: usize = 2 << 20;

impl Buffer {
    fn new(start: NonNull<u8>, len: usize, owner: Owner) -> Self {
        #[cfg(feature = "uring")]
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self {
            start,
            len,
            owner,
            #[cfg(feature = "uring")]
            id: NEXT.fetch_add(1, Ordering::Relaxed),
        }
    }

    /// A number that no other buffer of this process ever has, unlike an address.
    #[cfg(feature = "uring")]
    pub(super) fn id(&self) -> u64 {
        self.id
    }

    /// `len` zero bytes.
    ///
    /// # Errors
    /// The system has no memory of that size.
    #[allow(unsafe_code)]
    pub fn zeroed(len: usize) -> Result<Self> {
        let refused = || {
            Error::new(ErrorKind::OutOfMemory, "the system has not enough host memory")
                .expected(format_args!("{len} bytes in one piece"))
                .hint("load fewer leaves (`--only`), a narrower type (`--cast`), or onto more devices")
        };
        if len == 0 {
            return Ok(Self::new(NonNull::dangling(), len, Owner::Aligned));
        }
        if len >= MAPPED_BYTES_MIN {
            return map(len).ok_or_else(refused);
        }
        let layout = Layout::from_size_align(len, ALIGN).map_err(|_| refused())?;
        // SAFETY: the layout has a size above zero.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(refused)?;
        Ok(Self::new(start, len, Owner::Aligned))
    }

    /// `len` zero bytes in a file without a name in this directory: memory that the system can write out and forget, for arrays
    /// that are larger than memory is meant to be used. The file's blocks are taken now, so that a full disk is an error here and
    /// not a signal later.
    ///
    /// # Errors
    /// A directory in which nothing can be written, or no space.
    #[allow(unsafe_code)]
    pub fn in_file(dir: &std::path::Path, len: usize) -> Result<Self> {
        if len == 0 {
            return Self::zeroed(0);
        }
        let failed = |error: std::io::Error| {
            Error::new(ErrorKind::Io, "no scratch file can be made")
                .at("directory", dir.display())
                .expected(format_args!("{len} bytes"))
                .caused_by(error)
        };
        let file = nameless(dir).map_err(failed)?;
        allocate(&file, len as u64).map_err(failed)?;
        use rustix::mm::{MapFlags, ProtFlags, mmap};
        // SAFETY: a new mapping at an address of the kernel's choice touches no other memory. The file has no name and this
        // handle alone, so nobody shortens it, and all its blocks are there.
        let start =
            unsafe { mmap(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &file, 0) };
        let start = start.map_err(|errno| failed(errno.into()))?;
        let start = NonNull::new(start.cast()).ok_or_else(|| Error::bug("a mapping at address 0"))?;
        Ok(Self::new(start, len, Owner::Mapped))
    }

    /// Zero bytes for several buffers in one piece, which is given back when the last of them is dropped: small ones share large
    /// pages, where each by itself would have small ones. All of them are page-aligned.
    ///
    /// # Errors
    /// The system has no memory of that size.
    pub fn zeroed_parts(lens: &[usize]) -> Result<Vec<Self>> {
        let sizes = lens.iter().map(|len| len.checked_next_multiple_of(ALIGN));
        let total = sizes.clone().try_fold(0, |sum: usize, size| sum.checked_add(size?));
        // A sum that overflows is more than there is.
        let whole = Arc::new(Self::zeroed(total.unwrap_or(usize::MAX / 2))?);
        let mut rest = whole.start;
        let part = |(&len, size): (&usize, Option<usize>)| {
            let part = Self::new(rest, len, Owner::Part(Arc::clone(&whole)));
            #[allow(unsafe_code)]
            // SAFETY: the sizes add up to the length of the whole, so this is inside of it or its end.
            let next = unsafe { rest.add(size.unwrap_or_default()) };
            rest = next;
            part
        };
        Ok(lens.iter().zip(sizes).map(part).collect())
    }

    /// The buffer that this is a part of, or itself.
    pub(super) fn whole(&self) -> &Self {
        match &self.owner {
            Owner::Part(whole) => whole,
            _ => self,
        }
    }

    /// Somebody else's memory.
    ///
    /// # Safety
    /// 1. `start` is valid for reads and writes of `len` initialised bytes as long as the buffer exists.
    /// 2. Nothing else touches those bytes meanwhile.
    #[allow(unsafe_code)]
    pub unsafe fn foreign(start: NonNull<u8>, len: usize) -> Self {
        Self::new(start, len, Owner::Foreign)
    }

    /// Whether the memory is known to be zero where it has not been written.
    pub(crate) fn starts_zeroed(&self) -> bool {
        matches!(self.owner, Owner::Aligned | Owner::Mapped | Owner::Part(_))
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The address, for writers that share the buffer (see `SharedBytes`).
    pub(crate) fn as_mut_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }
}

/// Fresh pages from the system: zero without being touched, so that an untouched result costs nothing and a touched one is
/// written once. Large pages are asked for, because 4 KiB faults cost more than the decoding that causes them, and because devices
/// copy from large pages faster. Systems back whole aligned ones only, and place a mapping of an odd length anywhere: so a little
/// more is mapped, and what lies in front of the first large page is given back.
#[allow(unsafe_code)]
fn map(len: usize) -> Option<Buffer> {
    use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
    let slack = if len >= HUGE_PAGE_BYTES { HUGE_PAGE_BYTES } else { 0 };
    let mapped = len.checked_next_multiple_of(ALIGN)?.checked_add(slack)?;
    // SAFETY: a new private mapping at an address of the kernel's choice touches no other memory.
    let first = unsafe {
        mmap_anonymous(std::ptr::null_mut(), mapped, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE).ok()?
    };
    if slack == 0 {
        return Some(Buffer::new(NonNull::new(first.cast())?, len, Owner::Mapped));
    }
    let front = first.addr().next_multiple_of(HUGE_PAGE_BYTES) - first.addr();
    let kept = len.next_multiple_of(ALIGN);
    // SAFETY: all three lie in the new mapping, at most `slack` behind its start, and the outer ones are used by nobody. The advice
    // changes no contents; a kernel without large pages refuses it, and the memory works all the same. A part that is not given
    // back is address space that is never touched.
    let start = unsafe {
        let (start, end) = (first.byte_add(front), first.byte_add(front + kept));
        for (part, len) in [(first, front), (end, slack - front)] {
            if len > 0 {
                let _ = munmap(part, len);
            }
        }
        let _ = madvise(start, kept, Advice::LinuxHugepage);
        start
    };
    Some(Buffer::new(NonNull::new(start.cast())?, len, Owner::Mapped))
}

/// A file without a name.
fn nameless(dir: &std::path::Path) -> std::io::Result<std::fs::File> {
    use rustix::fs::{CWD, Mode, OFlags, openat};
    let (mode, flags) = (Mode::RUSR | Mode::WUSR, OFlags::RDWR | OFlags::CLOEXEC);
    match openat(CWD, dir, flags | OFlags::TMPFILE, mode) {
        Ok(file) => Ok(file.into()),
        // Some file systems have none: a file whose name is taken away at once is the same.
        Err(rustix::io::Errno::NOTSUP | rustix::io::Errno::ISDIR | rustix::io::Errno::INVAL) => {
            let path = dir.join(SCRATCH_NAME);
            let file = openat(CWD, &path, flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW, mode)?;
            std::fs::remove_file(&path)?;
            Ok(file.into())
        }
        Err(errno) => Err(errno.into()),
    }
}

/// Takes all blocks of a file of this length.
fn allocate(file: &std::fs::File, len: u64) -> std::io::Result<()> {
    match rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, len) {
        Ok(()) => Ok(()),
        // Some file systems cannot be asked; what is written has blocks.
        Err(rustix::io::Errno::NOTSUP | rustix::io::Errno::NOSYS) => {
            let zeros = vec![0; 1 << 20];
            let mut at = 0;
            while at < len {
                let part = zeros.len().min(usize::try_from(len - at).unwrap_or(usize::MAX));
                std::os::unix::fs::FileExt::write_all_at(file, &zeros[..part], at)?;
                at += part as u64;
            }
            Ok(())
        }
        Err(errno) => Err(errno.into()),
    }
}

/// The name that a scratch file has for a moment where files need one.
const SCRATCH_NAME: &str = ".touchdown-scratch";

impl std::ops::Deref for Buffer {
    type Target = [u8];

    #[allow(unsafe_code)]
    fn deref(&self) -> &[u8] {
        // SAFETY: `len` initialised bytes are owned; a dangling start goes with length 0.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl std::ops::DerefMut for Buffer {
    #[allow(unsafe_code)]
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Buffer {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        match &self.owner {
            Owner::Aligned => {
                if let (1.., Ok(layout)) = (self.len, Layout::from_size_align(self.len, ALIGN)) {
                    // SAFETY: allocated in `zeroed` with this very layout.
                    unsafe { dealloc(self.start.as_ptr(), layout) };
                }
            }
            Owner::Mapped => {
                // SAFETY: mapped in `map` with this very length, and nothing refers to it any more.
                let unmapped = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len) };
                debug_assert!(unmapped.is_ok(), "a mapping of our own could not be given back");
            }
            Owner::Boxed => {
                // SAFETY: came from `Box::into_raw` with this length in `from`.
                drop(unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(self.start.as_ptr(), self.len)) });
            }
            Owner::Foreign | Owner::Part(_) => {}
        }
    }
}

impl From<Vec<u8>> for Buffer {
    fn from(bytes: Vec<u8>) -> Self {
        let len = bytes.len();
        let start = Box::into_raw(bytes.into_boxed_slice()).cast::<u8>();
        // A box is never null; a null pointer would become an empty buffer.
        match NonNull::new(start) {
            Some(start) => Self::new(start, len, Owner::Boxed),
            None => Self::new(NonNull::dangling(), 0, Owner::Foreign),
        }
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buffer({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_zeroed_aligned_and_refused_when_absurd() {
        let mut buffer = Buffer::zeroed(10_000).unwrap();
        assert!(buffer.iter().all(|byte| *byte == 0));
        assert_eq!(buffer.as_ptr() as usize % ALIGN, 0);
        buffer[9_999] = 1;
        let mut large = Buffer::zeroed(3 << 20).unwrap();
        assert!(large.iter().all(|byte| *byte == 0) && large.starts_zeroed());
        large.fill(7);
        let odd: Vec<Buffer> = (0..9).map(|odd| Buffer::zeroed(HUGE_PAGE_BYTES + 4097 * odd).unwrap()).collect();
        assert!(odd.iter().chain([&large]).all(|large| (large.as_ptr() as usize).is_multiple_of(HUGE_PAGE_BYTES)));
        let dir = tempfile::tempdir().unwrap();
        let mut scratch = Buffer::in_file(dir.path(), 5_000_001).unwrap();
        assert!(scratch.iter().all(|byte| *byte == 0) && std::fs::read_dir(dir.path()).unwrap().count() == 0);
        scratch.fill(9);
        assert_eq!(scratch[5_000_000], 9);
        assert_eq!(Buffer::in_file(&dir.path().join("no"), 1).unwrap_err().kind(), ErrorKind::Io);
        assert!(Buffer::zeroed(0).unwrap().is_empty());
        assert_eq!(&*Buffer::from(vec![1, 2, 3]), [1, 2, 3]);
        let mut parts = Buffer::zeroed_parts(&[10, 0, 4097, 300_000]).unwrap();
        for (number, part) in parts.iter_mut().enumerate() {
            assert!(
                part.starts_zeroed() && (part.as_ptr() as usize).is_multiple_of(ALIGN) && part.iter().all(|b| *b == 0)
            );
            part.fill(number as u8 + 1);
        }
        let last = parts.pop().unwrap();
        assert!(parts.iter().enumerate().all(|(number, part)| part.iter().all(|byte| *byte == number as u8 + 1)));
        drop(parts);
        assert!(last.len() == 300_000 && last.iter().all(|byte| *byte == 4), "the whole lives as long as a part");
        assert_eq!(Buffer::zeroed_parts(&[usize::MAX, 9]).unwrap_err().kind(), ErrorKind::OutOfMemory);
        assert!(Buffer::zeroed_parts(&[]).unwrap().is_empty());
        assert_eq!(Buffer::zeroed(usize::MAX / 2).unwrap_err().kind(), ErrorKind::OutOfMemory);
    }
}
