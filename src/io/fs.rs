//! The files of one checkpoint, and nothing outside it.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
#[cfg(feature = "uring")]
use std::sync::atomic::AtomicU64;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::warm::Warmth;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::DIR_ENTRIES_MAX;
use crate::need::{DirEntry, EntryKind};
use crate::relpath::RelPath;

/// An open checkpoint directory. Every file is opened relative to it, read-only, and cannot lie outside: the kernel
/// refuses links that leave (`openat2` with `RESOLVE_BENEATH`; where the kernel lacks it, links are refused altogether).
#[derive(Debug)]
pub struct Root {
    dir: OwnedFd,
    path: PathBuf,
    /// A directory below that is read as it was when it was opened, whatever has its name by now.
    held: Option<(RelPath, OwnedFd)>,
}

/// A regular file of a checkpoint.
#[derive(Debug)]
pub struct OpenFile {
    file: File,
    path: RelPath,
    size: u64,
    direct: Option<Direct>,
    warmth: Warmth,
}

/// A file open a second time, for reads past the page cache.
#[derive(Debug)]
pub struct Direct {
    file: File,
    align: u64,
    /// Unlike any other in this process, also of files that are closed by now.
    #[cfg(feature = "uring")]
    id: u64,
    refused: AtomicBool,
}

impl Direct {
    /// Takes a file that was opened for direct reads at multiples of `align` bytes.
    #[cfg(feature = "uring")]
    pub(super) fn new(file: File, align: u64) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self { file, align, id: NEXT.fetch_add(1, Ordering::Relaxed), refused: AtomicBool::new(false) }
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// What offsets, lengths and addresses must be multiples of, in bytes.
    pub fn align(&self) -> u64 {
        self.align
    }

    #[cfg(feature = "uring")]
    pub(super) fn id(&self) -> u64 {
        self.id
    }

    /// No more such reads: the file system did not keep what it promised.
    #[cfg(feature = "uring")]
    pub(super) fn refuse(&self) {
        self.refused.store(true, Ordering::Relaxed);
    }
}

impl OpenFile {
    /// The file, for positioned reads.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Its path below the root.
    pub fn path(&self) -> &RelPath {
        &self.path
    }

    /// Its size when it was opened, in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The same file for reads past the page cache, if that is how it should be read.
    pub fn direct(&self) -> Option<&Direct> {
        self.direct.as_ref().filter(|direct| !direct.refused.load(Ordering::Relaxed))
    }

    /// Whether [`read_warm`](Self::read_warm) is worth a try.
    pub fn is_likely_warm(&self) -> bool {
        self.warmth.is_likely()
    }

    /// Fills a buffer from an offset on if that needs no waiting, because memory has all of it: returns whether it did. If not,
    /// what the buffer holds is not said.
    ///
    /// # Errors
    /// What the system says; `UnexpectedEof` if the file ends before.
    pub fn read_warm(&self, buffer: &mut [u8], offset: u64) -> std::io::Result<bool> {
        self.warmth.read(&self.file, buffer, offset)
    }

    #[cfg(all(test, feature = "uring"))]
    pub(super) fn set_direct(&mut self, direct: Direct) {
        self.direct = Some(direct);
    }

    /// The same file, opened for reads past the page cache, whether they are worth it or not; `None` where there are none.
    #[cfg(feature = "uring")]
    pub fn open_direct(&self) -> Option<Direct> {
        super::cached::open_direct(&self.file)
    }

    /// Has it read past the page cache from now on, if it is worth it: a file on a local disk, of which little is cached.
    #[cfg(feature = "uring")]
    pub fn prefer_direct(&mut self) {
        self.direct = super::cached::direct(&self.file, self.size);
    }
}

impl Root {
    /// Opens a directory.
    ///
    /// # Errors
    /// No such directory, or no permission.
    pub fn open(path: &Path) -> Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match rustix::fs::open(path, flags, Mode::empty()) {
            Ok(dir) => Ok(Self { dir, path: path.to_owned(), held: None }),
            Err(errno) => Err(io_error(errno, "open").at("path", path.display())),
        }
    }

    /// The path that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// From now on everything in a directory below is read of the directory that has its name now.
    ///
    /// # Errors
    /// No such directory, a link that leaves the checkpoint, no permission.
    pub fn hold(&mut self, dir: &RelPath) -> Result<()> {
        self.held = Some((dir.clone(), self.below(dir)?.dir));
        Ok(())
    }

    /// A directory below as a root of its own: the one that is held, if it is.
    ///
    /// # Errors
    /// As [`hold`](Self::hold).
    pub fn below(&self, dir: &RelPath) -> Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = self.open_beneath(dir, flags).map_err(|errno| self.refused(errno, "open", dir))?;
        Ok(Self { dir: fd, path: self.path.join(dir.as_path()), held: None })
    }

    /// Whether the directory that was opened, or the one that is held, has its name no more.
    pub fn is_replaced(&self) -> bool {
        let identity = |stat: rustix::fs::Stat| (stat.st_dev, stat.st_ino);
        let (path, fd) = match &self.held {
            Some((dir, fd)) => (self.path.join(dir.as_path()), fd),
            None => (self.path.clone(), &self.dir),
        };
        let (opened, now) = (rustix::fs::fstat(fd), rustix::fs::stat(path));
        opened.ok().map(identity) != now.ok().map(identity)
    }

    /// Opens a regular file; `None` if there is no such file.
    ///
    /// # Errors
    /// Something that is no regular file, a link that leaves the checkpoint, no permission, too many open files.
    pub fn file(&self, path: &RelPath) -> Result<Option<OpenFile>> {
        // Non-blocking, so that a FIFO does not hang the open; it is refused right after.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let fd = match self.open_beneath(path, flags) {
            Ok(fd) => fd,
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
            Err(Errno::NXIO | Errno::NODEV) => return Err(self.no_file("a socket or device", path)),
            Err(errno) => return Err(self.refused(errno, "open", path)),
        };
        let stat = rustix::fs::fstat(&fd).map_err(|errno| self.refused(errno, "stat", path))?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => {}
            FileType::Directory => return Err(self.no_file("a directory", path)),
            FileType::Fifo => return Err(self.no_file("a FIFO", path)),
            _ => return Err(self.no_file("a socket or device", path)),
        }
        // On a regular file the flag has no use, and io_uring takes it to mean that a read must not wait for the disk.
        rustix::fs::fcntl_setfl(&fd, OFlags::empty()).map_err(|errno| self.refused(errno, "open", path))?;
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        Ok(Some(OpenFile { file: File::from(fd), path: path.clone(), size, direct: None, warmth: Warmth::default() }))
    }

    /// The entries of a directory, sorted by name; `None` if there is no such directory.
    ///
    /// # Errors
    /// No permission, a link that leaves, or more than [`DIR_ENTRIES_MAX`] entries.
    pub fn list(&self, path: &RelPath) -> Result<Option<Vec<DirEntry>>> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = match self.open_beneath(path, flags) {
            Ok(fd) => fd,
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
            Err(errno) => return Err(self.refused(errno, "list", path)),
        };
        let dir = rustix::fs::Dir::read_from(&fd).map_err(|errno| self.refused(errno, "list", path))?;
        let mut entries = Vec::new();
        for entry in dir {
            let entry = entry.map_err(|errno| self.refused(errno, "list", path))?;
            let name = entry.file_name().to_bytes();
            if matches!(name, b"." | b"..") {
                continue;
            }
            if entries.len() == DIR_ENTRIES_MAX {
                return Err(Error::corrupt("a directory has too many entries")
                    .at("directory", self.shown(path))
                    .expected(format_args!("at most {DIR_ENTRIES_MAX}")));
            }
            let kind = match entry.file_type() {
                FileType::RegularFile => EntryKind::File,
                FileType::Directory => EntryKind::Dir,
                FileType::Symlink | FileType::Unknown => self.kind_of(&fd, entry.file_name()),
                _ => EntryKind::Other,
            };
            entries.push(DirEntry { name: String::from_utf8_lossy(name).into_owned(), kind });
        }
        entries.sort();
        Ok(Some(entries))
    }

    /// Whether a directory can be opened under this name.
    pub fn is_dir(&self, path: &RelPath) -> bool {
        self.open_beneath(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC).is_ok()
    }

    /// Whether a name stands for a symbolic link, not for a file or a directory itself.
    ///
    /// # Errors
    /// No permission.
    pub fn is_link(&self, path: &RelPath) -> Result<bool> {
        match self.open_beneath(path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC) {
            Ok(fd) => {
                let stat = rustix::fs::fstat(&fd).map_err(|errno| self.refused(errno, "look at", path))?;
                Ok(FileType::from_raw_mode(stat.st_mode) == FileType::Symlink)
            }
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(false),
            Err(errno) => Err(self.refused(errno, "look at", path)),
        }
    }

    /// What a link points at. Whether it stays inside is checked when it is opened.
    fn kind_of(&self, dir: &OwnedFd, name: &std::ffi::CStr) -> EntryKind {
        match rustix::fs::statat(dir, name, rustix::fs::AtFlags::empty())
            .map(|stat| FileType::from_raw_mode(stat.st_mode))
        {
            Ok(FileType::RegularFile) => EntryKind::File,
            Ok(FileType::Directory) => EntryKind::Dir,
            _ => EntryKind::Other,
        }
    }

    fn open_beneath(&self, path: &RelPath, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        let held =
            self.held.as_ref().and_then(|(dir, fd)| Some((fd, path.as_path().strip_prefix(dir.as_path()).ok()?)));
        let (dir, path) = held.unwrap_or((&self.dir, path.as_path()));
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        loop {
            match rustix::fs::openat2(dir, path, flags, Mode::empty(), resolve) {
                // A rename elsewhere raced with the lookup, or a signal came: ask again.
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(Errno::NOSYS | Errno::PERM) => return Self::open_by_elements(dir, path, flags),
                other => return other,
            }
        }
    }

    /// Without `openat2`: every element is opened by itself and must not be a link.
    fn open_by_elements(dir: &OwnedFd, path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        use std::os::unix::ffi::OsStrExt;
        let elements: Vec<_> = path.components().map(|component| component.as_os_str()).collect();
        let mut dir = rustix::io::fcntl_dupfd_cloexec(dir, 0)?;
        for (index, element) in elements.iter().enumerate() {
            let last = index + 1 == elements.len();
            let through = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let flags = if last { flags } else { through } | OFlags::NOFOLLOW;
            dir = rustix::fs::openat(&dir, element.as_bytes(), flags, Mode::empty())?;
        }
        Ok(dir)
    }

    fn refused(&self, errno: Errno, verb: &str, path: &RelPath) -> Error {
        match errno {
            Errno::XDEV | Errno::LOOP => {
                let what = match errno {
                    Errno::XDEV => "a link leaves the checkpoint",
                    _ => "a link leads in a circle, or cannot be followed here",
                };
                Error::corrupt(what).at("file", self.shown(path)).hint(
                    "files of a checkpoint are only read inside its directory; copy it with `cp -rL` to follow links",
                )
            }
            errno => io_error(errno, verb).at("file", self.shown(path)),
        }
    }

    fn no_file(&self, found: &str, path: &RelPath) -> Error {
        Error::corrupt("a file of the checkpoint is no regular file").at("file", self.shown(path)).found(found)
    }

    /// The path as the user would write it.
    pub fn shown(&self, path: &RelPath) -> String {
        if path.as_bytes().is_empty() {
            return self.path.display().to_string();
        }
        self.path.join(path.as_path()).display().to_string()
    }
}

/// An operating-system error as ours: what is not there is `NotFound`, everything else is the environment's.
pub(crate) fn io_error(errno: Errno, verb: &str) -> Error {
    let source = std::io::Error::from(errno);
    match errno {
        Errno::NOENT | Errno::NOTDIR => Error::not_found("no such file or directory").caused_by(source),
        Errno::MFILE | Errno::NFILE => {
            Error::new(ErrorKind::Io, "too many open files").caused_by(source).hint("raise the limit (`ulimit -n`)")
        }
        Errno::NOMEM => Error::new(ErrorKind::OutOfMemory, "the system has no memory").caused_by(source),
        Errno::LOOP => Error::corrupt("symbolic links lead in a circle").caused_by(source),
        Errno::NAMETOOLONG => Error::corrupt("a file name is too long").caused_by(source),
        Errno::ISDIR => Error::corrupt("a directory stands where a file should be").caused_by(source),
        _ => Error::new(ErrorKind::Io, format!("cannot {verb} a file")).caused_by(source),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_out_and_special_files_are_refused() {
        let outside = tempfile::tempdir().unwrap();
        std::fs::write(outside.path().join("secret"), "s").unwrap();
        let inside = tempfile::tempdir().unwrap();
        let root = Root::open(inside.path()).unwrap();
        let path = |name: &str| RelPath::new(name).unwrap();
        std::os::unix::fs::symlink(outside.path().join("secret"), inside.path().join("leak")).unwrap();
        std::fs::write(inside.path().join("plain"), "abc").unwrap();
        std::os::unix::fs::symlink("plain", inside.path().join("alias")).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, inside.path().join("fifo"), FileType::Fifo, Mode::RWXU, 0).unwrap();

        assert_eq!(root.file(&path("leak")).unwrap_err().kind(), ErrorKind::Corrupt);
        assert_eq!(root.file(&path("fifo")).unwrap_err().kind(), ErrorKind::Corrupt);
        let _listening = std::os::unix::net::UnixListener::bind(inside.path().join("socket")).unwrap();
        assert_eq!(root.file(&path("socket")).unwrap_err().kind(), ErrorKind::Corrupt);
        // Links to devices leave; a device itself only a privileged user can make.
        std::os::unix::fs::symlink("/dev/zero", inside.path().join("zero")).unwrap();
        assert_eq!(root.file(&path("zero")).unwrap_err().kind(), ErrorKind::Corrupt);
        let device = rustix::fs::makedev(1, 5);
        let made = rustix::fs::mknodat(
            rustix::fs::CWD,
            inside.path().join("device"),
            FileType::CharacterDevice,
            Mode::RWXU,
            device,
        );
        assert!(made.is_err() || root.file(&path("device")).unwrap_err().kind() == ErrorKind::Corrupt);
        ["zero", "socket", "device"].iter().for_each(|name| drop(std::fs::remove_file(inside.path().join(name))));
        assert_eq!(root.file(&RelPath::root()).unwrap_err().kind(), ErrorKind::Corrupt);
        assert_eq!(root.file(&path("plain")).unwrap().unwrap().size(), 3);
        assert_eq!(root.file(&path("alias")).unwrap().unwrap().size(), 3);
        assert!(root.file(&path("nothing")).unwrap().is_none());
        assert!(root.list(&path("plain")).unwrap().is_none());
        // The fallback refuses every link.
        assert!(Root::open_by_elements(&root.dir, Path::new("alias"), OFlags::RDONLY).is_err());
        assert!(Root::open_by_elements(&root.dir, Path::new("plain"), OFlags::RDONLY).is_ok());
        let names: Vec<String> =
            root.list(&RelPath::root()).unwrap().unwrap().into_iter().map(|entry| entry.name).collect();
        assert_eq!(names, ["alias", "fifo", "leak", "plain"]);
    }
}
