//! Files past the page cache: which have such reads and writes, and the descriptors for them.
//!
//! Must not know: who reads and writes, and how.

use std::fs::File;
use std::os::fd::AsRawFd;

use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags};

use crate::limits::ALIGN_BYTES;

/// The file again, for direct writes at multiples of [`ALIGN_BYTES`]; `None` where the file system has none, or is no disk of this
/// machine.
pub(super) fn writable(file: &File) -> Option<File> {
    // Whole pages are enough for every alignment that it may have.
    (is_local(file) && alignment(file).is_some()).then(|| reopened(file, OFlags::WRONLY))?
}

/// The file again, past the page cache.
pub(super) fn reopened(file: &File, access: OFlags) -> Option<File> {
    // The descriptor's own name leads to the same file, whatever has been renamed meanwhile.
    let name = format!("/proc/self/fd/{}", file.as_raw_fd());
    let flags = access | OFlags::CLOEXEC | OFlags::DIRECT;
    let again = rustix::fs::open(name, flags, Mode::empty()).ok()?;
    let (one, other) = (rustix::fs::fstat(file).ok()?, rustix::fs::fstat(&again).ok()?);
    let same = (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino);
    same.then(|| again.into())
}

/// Whether it lies on a disk of this machine: not in memory, and not at the other end of a network.
pub(super) fn is_local(file: &File) -> bool {
    rustix::fs::fstatfs(file).is_ok_and(|system| !ELSEWHERE.contains(&(system.f_type as u64 & 0xffff_ffff)))
}

/// What direct reads and writes of the file must be aligned to, in bytes; `None` if it has none.
pub(super) fn alignment(file: &File) -> Option<u64> {
    let asked = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
    let Some(told) = asked.ok().filter(|told| told.stx_mask & StatxFlags::DIOALIGN.bits() != 0) else {
        return Some(ALIGN_BYTES);
    };
    let align = u64::from(told.stx_dio_mem_align.max(told.stx_dio_offset_align));
    // Slots have room for blocks of this size, and lie at its multiples.
    (align.is_power_of_two() && align <= ALIGN_BYTES).then_some(align)
}

/// `statfs` types of file systems in memory (tmpfs, ramfs, hugetlbfs) and on networks (NFS, SMB, CIFS, Ceph, Lustre, FUSE, 9P,
/// AFS, GPFS, BeeGFS, OCFS2, GFS2): `linux/magic.h` and their own sources.
const ELSEWHERE: [u64; 17] = [
    0x0102_1994,
    0x8584_58f6,
    0x9584_58f6,
    0x6969,
    0x517b,
    0xfe53_4d42,
    0xff53_4d42,
    0x00c3_6400,
    0x0bd0_0bd0,
    0x6573_5546,
    0x0102_1997,
    0x5346_414f,
    0x6b41_4653,
    0x4750_4653,
    0x1983_0326,
    0x7461_636f,
    0x0116_1970,
];
