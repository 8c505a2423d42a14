//! What every [`Reader`] does alike, asked of each of them.

use std::io::{ErrorKind as Io, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::{Completion, OpenFile, PreadReader, ReadAt, Reader, Ring, Root, Ticket};
use crate::relpath::RelPath;

/// Runs a test with every reader; one that this machine has not is named on the terminal.
fn with_every_reader(test: impl Fn(&mut dyn Reader)) {
    let mut ran = vec!["pread"];
    test(&mut PreadReader::new(1).unwrap());
    test(&mut PreadReader::new(3).unwrap());
    test(super::reader(super::Io::Auto, 2).unwrap().as_mut());
    match super::reader(super::Io::Uring, 1) {
        Ok(mut uring) => {
            assert_eq!(uring.name(), "uring");
            test(uring.as_mut());
            ran.push("uring");
        }
        Err(error) => skipped(&error),
    }
    println!("readers tested: {ran:?}");
}

/// Says past the capturing of tests that io_uring was not tested.
fn skipped(error: &crate::Error) {
    // Where stderr is closed there is nobody to tell.
    let _ = writeln!(std::io::stderr(), "skipped: the io_uring reader is not tested: {error:?}");
}

struct Files {
    dir: tempfile::TempDir,
    bytes: Vec<u8>,
    file: Arc<OpenFile>,
}

/// A file of so many bytes that tell their position.
fn file(len: usize) -> Files {
    let dir = tempfile::tempdir().unwrap();
    let bytes: Vec<u8> = (0..len).map(|at| (at.wrapping_mul(2_654_435_761) >> 7) as u8).collect();
    std::fs::write(dir.path().join("f"), &bytes).unwrap();
    let root = Root::open(dir.path()).unwrap();
    let file = Arc::new(root.file(&RelPath::new("f").unwrap()).unwrap().unwrap());
    Files { dir, bytes, file }
}

fn read(files: &Files, ring: &Arc<Ring>, offset: u64, len: usize) -> ReadAt {
    ReadAt::new(Arc::clone(&files.file), offset, len, ring.slot().unwrap())
}

/// The next completion, wakes passed over; fails after a time in which every read should be done.
fn next(reader: &mut dyn Reader) -> Completion {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(completion) = reader.next(Some(deadline)) {
            return completion;
        }
        assert!(Instant::now() < deadline, "{} has lost a read", reader.name());
    }
}

fn one(reader: &mut dyn Reader, read: ReadAt) -> Completion {
    reader.submit(Ticket(7), read);
    let completion = next(reader);
    assert_eq!(completion.ticket, Ticket(7));
    completion
}

#[test]
fn bytes_arrive_from_any_offset() {
    let (files, ring) = (file(100_003), Ring::new(70_000));
    with_every_reader(|reader| {
        for (offset, len) in [(0, 1), (0, 70_000), (1, 4096), (4095, 3), (99_999, 4), (100_002, 1), (33_333, 66_670)] {
            let done = one(reader, read(&files, &ring, offset, len));
            done.result.unwrap();
            assert_eq!(done.read.bytes(), &files.bytes[offset as usize..offset as usize + len]);
        }
    });
}

#[test]
fn nothing_the_end_and_impossible_positions_are_told_apart() {
    let (files, ring) = (file(1000), Ring::new(512));
    with_every_reader(|reader| {
        let mut result = |offset, len| one(reader, read(&files, &ring, offset, len)).result;
        for offset in [0, 1000, 5000, u64::MAX] {
            result(offset, 0).unwrap();
        }
        for (offset, len) in [(1000, 1), (999, 2), (600, 512), (1 << 40, 1)] {
            assert_eq!(result(offset, len).unwrap_err().kind(), Io::UnexpectedEof, "{len} bytes at {offset}");
        }
        for offset in [1 << 63, u64::MAX - 1, u64::MAX] {
            assert_eq!(result(offset, 1).unwrap_err().kind(), Io::InvalidInput, "at {offset}");
        }
        assert_eq!(result(0, 513).unwrap_err().kind(), Io::InvalidInput);
        result(488, 512).unwrap();
    });
}

#[test]
fn a_file_that_became_shorter_ends() {
    with_every_reader(|reader| {
        let (files, ring) = (file(10_000), Ring::new(8192));
        std::fs::OpenOptions::new().write(true).open(files.dir.path().join("f")).unwrap().set_len(5000).unwrap();
        let done = one(reader, read(&files, &ring, 1000, 8000));
        assert_eq!(done.result.unwrap_err().kind(), Io::UnexpectedEof);
        one(reader, read(&files, &ring, 1000, 4000)).result.unwrap();
    });
}

#[test]
fn many_more_reads_than_the_depth_all_come_back() {
    let (files, ring) = (file(1 << 20), Ring::new(4096));
    with_every_reader(|reader| {
        let count = 20 * reader.depth() as u64 + 3;
        let place = |ticket: u64| (ticket * 7919) % ((1 << 20) - 4096);
        for ticket in 0..count {
            reader.submit(Ticket(ticket), read(&files, &ring, place(ticket), 4096));
        }
        let mut seen = vec![false; count as usize];
        for _ in 0..count {
            let done = next(reader);
            let at = place(done.ticket.0) as usize;
            assert_eq!((done.read.offset, done.read.len), (at as u64, 4096));
            assert!(!std::mem::replace(&mut seen[done.ticket.0 as usize], true), "a read came back twice");
            done.result.unwrap();
            assert_eq!(done.read.buffer[..], files.bytes[at..at + 4096]);
        }
        assert!(reader.next(Some(Instant::now())).is_none());
    });
}

#[test]
fn waiting_ends_at_the_deadline_and_when_woken() {
    let (files, ring) = (file(100), Ring::new(100));
    with_every_reader(|reader| {
        let start = Instant::now();
        assert!(reader.next(Some(start + Duration::from_millis(30))).is_none());
        assert!(start.elapsed() >= Duration::from_millis(30));
        // Before the call, and during it.
        let waker = reader.waker();
        waker.wake();
        assert!(reader.next(None).is_none());
        let during = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            waker.wake();
        });
        assert!(reader.next(None).is_none());
        during.join().unwrap();
        // A wake does not swallow a read.
        reader.waker().wake();
        assert!(one(reader, read(&files, &ring, 0, 100)).result.is_ok());
    });
}

#[test]
fn dropping_waits_for_reads_in_flight_and_gives_their_slots_back() {
    let files = file(1 << 20);
    for io in [super::Io::Pread, super::Io::Uring] {
        for round in 0..50 {
            let ring = Ring::new(1 << 20);
            let mut reader = match super::reader(io, 2) {
                Ok(reader) => reader,
                Err(error) => return skipped(&error),
            };
            let waker = reader.waker();
            for ticket in 0..round {
                reader.submit(Ticket(ticket), read(&files, &ring, 0, 1 << 20));
            }
            drop(reader);
            assert_eq!(Arc::strong_count(&ring), 1, "a slot outlives its reader");
            assert_eq!(Arc::strong_count(&files.file), 1, "a file is held by a reader that is gone");
            waker.wake();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Random reads, some in flight at once, against the bytes of the file: 64 times up to 100 with each reader.
    #[test]
    fn any_reads_give_what_the_file_holds(
        len in 1usize..200_000,
        reads in prop::collection::vec((0u64..220_000, 0usize..40_000), 1..100),
        at_once in 1usize..80,
    ) {
        let (files, ring) = (file(len), Ring::new(40_000));
        with_every_reader(|reader| {
            let (mut started, mut in_flight) = (0, 0);
            while started < reads.len() || in_flight > 0 {
                if started < reads.len() && in_flight < at_once {
                    let (offset, len) = reads[started];
                    reader.submit(Ticket(started as u64), read(&files, &ring, offset, len));
                    (started, in_flight) = (started + 1, in_flight + 1);
                    continue;
                }
                let done = next(reader);
                in_flight -= 1;
                let (offset, len) = reads[done.ticket.0 as usize];
                match files.bytes.get(offset as usize..offset as usize + len) {
                    Some(bytes) => {
                        done.result.unwrap();
                        assert_eq!(&done.read.buffer[..len], bytes);
                    }
                    None if len == 0 => done.result.unwrap(),
                    None => assert_eq!(done.result.unwrap_err().kind(), Io::UnexpectedEof),
                }
            }
        });
    }
}

/// Reads past the page cache: the same bytes, whatever the position, the tail and what goes wrong.
#[cfg(feature = "uring")]
mod direct {
    use std::fs::File;

    use super::*;
    use crate::io::either::EitherReader;
    use crate::io::fs::Direct;
    use crate::io::uring::{Mode, UringReader};
    use crate::limits::SLOT_SLACK_BYTES;

    const SLOT: usize = 300_000;

    /// A file of which nothing is cached, open for direct reads; `None`, and a word on the terminal, where there are none.
    fn cold(len: usize) -> Option<Files> {
        let mut files = file(len);
        let path = files.dir.path().join("f");
        let on_disk = File::open(path).unwrap();
        on_disk.sync_all().unwrap();
        rustix::fs::fadvise(&on_disk, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        Arc::get_mut(&mut files.file).unwrap().prefer_direct();
        if let Err(error) = crate::io::uring_setup() {
            skipped(&error);
            return None;
        }
        if files.file.direct().is_none() {
            let why = "skipped: direct reads are not tested: temporary files lie in memory, or their system has none";
            let _ = writeln!(std::io::stderr(), "{why}");
            return None;
        }
        Some(files)
    }

    fn ring() -> Arc<Ring> {
        Ring::new(SLOT + SLOT_SLACK_BYTES as usize)
    }

    fn expect(files: &Files, done: &Completion) {
        let (start, len) = (done.read.offset as usize, done.read.len);
        assert_eq!(done.read.bytes(), &files.bytes[start..start + len], "{len} bytes at {start}");
    }

    #[test]
    fn bytes_arrive_from_any_offset_and_at_the_tail() {
        let Some(files) = cold(3_000_123) else { return };
        let (ring, len) = (ring(), files.bytes.len());
        let mut plain = UringReader::new().unwrap();
        let mut either = EitherReader::new(2).unwrap();
        let readers: [&mut dyn Reader; 2] = [&mut plain, &mut either];
        for reader in readers {
            let mut aside = 0;
            for offset in [0, 1, 511, 512, 4095, 4096, 4097, 1 << 20, len - SLOT, len - 5000, len - 1] {
                for want in [1, 2, 511, 4096, 5000, SLOT] {
                    let want = want.min(len - offset);
                    let done = one(reader, read(&files, &ring, offset as u64, want));
                    assert!(done.result.is_ok(), "{want} bytes at {offset}: {:?}", done.result);
                    expect(&files, &done);
                    aside += usize::from(done.read.start > 0);
                }
            }
            assert!(aside > 20, "the blocks around the bytes were read: {aside}");
            assert!(files.file.direct().is_some(), "no read was refused");
            let beyond = one(reader, read(&files, &ring, len as u64 - 10, 11));
            assert_eq!(beyond.result.unwrap_err().kind(), Io::UnexpectedEof);
        }
    }

    #[test]
    fn many_at_once_each_come_back_with_their_own_bytes() {
        let Some(files) = cold(2_000_007) else { return };
        let (ring, mut reader) = (ring(), EitherReader::new(2).unwrap());
        let place = |ticket: u64| (ticket * 99_991) % 1_700_000;
        for ticket in 0..300 {
            reader.submit(Ticket(ticket), read(&files, &ring, place(ticket), SLOT));
        }
        for _ in 0..300 {
            let done = next(&mut reader);
            assert_eq!(done.read.offset, place(done.ticket.0));
            assert!(done.result.is_ok());
            expect(&files, &done);
        }
    }

    #[test]
    fn where_it_cannot_be_done_the_page_cache_serves() {
        let Some(mut files) = cold(1_500_000) else { return };
        let mut reader = UringReader::new().unwrap();
        // No room for the blocks at the ends.
        let tight = Ring::new(4097);
        let done = one(&mut reader, read(&files, &tight, 4095, 4097));
        assert!(done.result.is_ok() && done.read.start == 0);
        expect(&files, &done);
        drop(done);
        // A system that refuses what it promised: blocks of one byte.
        let again = rustix::fs::open(
            files.dir.path().join("f"),
            rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECT,
            rustix::fs::Mode::empty(),
        );
        Arc::get_mut(&mut files.file).unwrap().set_direct(Direct::new(again.unwrap().into(), 1));
        let ring = ring();
        let done = one(&mut reader, read(&files, &ring, 77, 1000));
        assert!(done.result.is_ok());
        expect(&files, &done);
        assert!(files.file.direct().is_none(), "it is not asked a second time");
    }

    #[test]
    fn a_file_that_became_shorter_ends() {
        let Some(files) = cold(2_000_000) else { return };
        let ring = ring();
        std::fs::OpenOptions::new().write(true).open(files.dir.path().join("f")).unwrap().set_len(1_100_000).unwrap();
        let mut reader = UringReader::new().unwrap();
        let done = one(&mut reader, read(&files, &ring, 1_000_000, 200_000));
        assert_eq!(done.result.unwrap_err().kind(), Io::UnexpectedEof);
        let done = one(&mut reader, read(&files, &ring, 1_000_000, 100_000));
        assert!(done.result.is_ok());
        expect(&files, &done);
    }

    #[test]
    fn without_io_uring_all_files_are_read_with_positioned_reads() {
        let Some(files) = cold(2_000_000) else { return };
        let refuse: fn(Mode) -> std::io::Result<io_uring::IoUring> = |_| Err(rustix::io::Errno::PERM.into());
        let mut reader = EitherReader::with(2, refuse).unwrap();
        assert!(reader.reads_directly());
        let ring = ring();
        let done = one(&mut reader, read(&files, &ring, 5, 100_000));
        assert!(done.result.is_ok() && done.read.start == 0);
        expect(&files, &done);
        assert!(!reader.reads_directly(), "the next files are not even asked about");
    }
}

#[cfg(feature = "uring")]
mod set_up {
    use rustix::io::Errno;

    use super::*;
    use crate::ErrorKind;
    use crate::io::uring::{Mode, UringReader};

    /// What a kernel that refuses a ring makes the reader say.
    #[test]
    fn a_refused_ring_says_why_and_what_else_works() {
        let refused = |build| UringReader::with(build).map(drop).unwrap_err();
        let errors = [
            (refused(|_| Err(Errno::NOSYS.into())), "older than 5.6"),
            (refused(|_| Err(Errno::PERM.into())), "seccomp"),
            (refused(|_| Err(Errno::NOMEM.into())), "locked memory"),
            (refused(|_| Err(Errno::MFILE.into())), "ulimit -n"),
            (refused(|_| Err(Errno::INVAL.into())), "the kernel refuses it"),
        ];
        for (error, why) in errors {
            assert_eq!(error.kind(), ErrorKind::Io);
            let text = format!("{error:?}");
            assert!(["64 entries", why, "--io pread", "os error"].iter().all(|part| text.contains(part)), "{text}");
        }
    }

    /// Kernels that lack a mode get the next one, and read with it.
    #[test]
    fn older_kernels_get_older_rings() {
        if let Err(error) = crate::io::uring_setup() {
            return skipped(&error);
        }
        let old: [fn(Mode) -> std::io::Result<io_uring::IoUring>; 2] = [
            |mode| if mode == Mode::Deferred { Err(Errno::INVAL.into()) } else { mode.build() },
            |mode| if mode == Mode::Plain { mode.build() } else { Err(Errno::INVAL.into()) },
        ];
        for build in old {
            let (files, ring) = (file(10_000), Ring::new(10_000));
            let mut reader = UringReader::with(build).unwrap();
            let done = one(&mut reader, read(&files, &ring, 5, 9_995));
            done.result.unwrap();
            assert_eq!(done.read.buffer[..9_995], files.bytes[5..]);
        }
    }
}
