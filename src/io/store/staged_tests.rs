//! Staged directories on the real file system, and on one that cannot exchange names.

use super::*;
use crate::io::LocalStore;
use crate::io::store::{LeftoverKind, leftovers, remove_leftover};

#[test]
fn a_file_appears_whole_and_is_gone_on_with() {
    let home = tempfile::tempdir().unwrap();
    let target = home.path().join("model.bin");
    let start = |overwrite| StagedDir::start(Arc::new(LocalStore), &target, overwrite, Becomes::File);
    let fill = |dir: StagedDir, text: &str| {
        dir.write(&path("model.bin"), text.as_bytes(), true).unwrap();
        dir
    };
    let names = || std::fs::read_dir(home.path()).unwrap().count();
    fill(start(false).unwrap(), "one").commit(true).unwrap();
    assert_eq!((std::fs::read(&target).unwrap(), names()), (b"one".to_vec(), 1));
    assert_eq!(start(false).unwrap_err().kind(), ErrorKind::Exists);
    assert_eq!(staged(&target, true).unwrap_err().kind(), ErrorKind::Exists, "a directory replaces no file");
    // One that is kept is found, and gone on with.
    let mut left = fill(start(true).unwrap(), "two");
    left.dir(&path("deep/er")).unwrap();
    left.write(&path("deep/er/file"), b"x", true).unwrap();
    left.keep(true);
    let at = left.path().to_owned();
    let resume = || StagedDir::resume(Arc::new(LocalStore), &target, true, Becomes::File, &at);
    assert_eq!(resume().unwrap_err().kind(), ErrorKind::Exists, "its saver lives");
    drop(left);
    assert_eq!(leftovers(home.path()).unwrap()[0].name, "model.bin");
    let (mut dir, mut files) = resume().unwrap();
    files.sort();
    assert_eq!(files, [path("deep/er/file"), path("model.bin")]);
    dir.dir(&path("deep/er")).unwrap();
    dir.open(&path("model.bin")).unwrap().write_at(b"2", 0).unwrap();
    dir.remove(&path("deep/er/file")).unwrap();
    dir.commit(true).unwrap();
    assert_eq!((std::fs::read(&target).unwrap(), names()), (b"2wo".to_vec(), 1));
    let plain = |text| fill(StagedDir::start(Arc::new(Plain), &target, true, Becomes::File).unwrap(), text);
    plain("four").commit(true).unwrap();
    assert_eq!((std::fs::read(&target).unwrap(), names()), (b"four".to_vec(), 1));
}

fn staged(target: &Path, overwrite: bool) -> Result<StagedDir> {
    StagedDir::create(Arc::new(LocalStore), target, overwrite)
}

fn path(text: &str) -> RelPath {
    RelPath::new(text).unwrap()
}

fn fill(mut dir: StagedDir, text: &str) -> StagedDir {
    dir.dir(&path("a/b")).unwrap();
    dir.write(&path("a/b/file"), text.as_bytes(), true).unwrap();
    dir
}

#[test]
fn a_directory_appears_whole_or_not_at_all() {
    let home = tempfile::tempdir().unwrap();
    let target = home.path().join("deep/er/run7");
    let read = || std::fs::read_to_string(target.join("a/b/file"));
    let names = || std::fs::read_dir(target.parent().unwrap()).unwrap().count();
    drop(fill(staged(&target, false).unwrap(), "one"));
    assert_eq!(names(), 0, "a dropped save leaves nothing");
    let dir = fill(staged(&target, false).unwrap(), "one");
    assert!(read().is_err() && dir.path().file_name().unwrap().to_str().unwrap().contains(".orbax-checkpoint-tmp"));
    let rival = fill(staged(&target, false).unwrap(), "two");
    dir.commit(true).unwrap();
    assert_eq!(read().unwrap(), "one");
    assert_eq!(rival.commit(true).unwrap_err().kind(), ErrorKind::Exists);
    assert_eq!((read().unwrap().as_str(), names()), ("one", 1), "the loser destroyed nothing and left nothing");
    assert_eq!(staged(&target, false).unwrap_err().kind(), ErrorKind::Exists);
    fill(staged(&target, true).unwrap(), "three").commit(false).unwrap();
    assert_eq!((read().unwrap().as_str(), names()), ("three", 1));
    std::fs::write(home.path().join("plain"), "").unwrap();
    assert_eq!(staged(&home.path().join("plain"), true).unwrap_err().kind(), ErrorKind::Exists);
}

/// A file system that cannot exchange names.
#[derive(Debug)]
struct Plain;

impl Store for Plain {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        LocalStore.create_dir(path)
    }
    fn create(&self, path: &Path) -> io::Result<Box<dyn StoreFile>> {
        LocalStore.create(path)
    }
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        LocalStore.sync_dir(path)
    }
    fn rename_new(&self, from: &Path, to: &Path) -> io::Result<()> {
        LocalStore.rename_new(from, to)
    }
    fn exchange(&self, _: &Path, _: &Path) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    fn remove_file(&self, path: &Path) -> io::Result<()> {
        LocalStore.remove_file(path)
    }
    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        LocalStore.remove_dir(path)
    }
}

/// Two savers that both may overwrite: the second one to finish does not take away what the first has finished.
#[test]
fn only_what_was_there_at_the_start_is_replaced() {
    for store in [Arc::new(LocalStore) as Arc<dyn Store>, Arc::new(Plain)] {
        let home = tempfile::tempdir().unwrap();
        let target = home.path().join("run");
        let begin = |text| fill(StagedDir::create(Arc::clone(&store), &target, true).unwrap(), text);
        for before in ["none", "old"] {
            let (first, second) = (begin("first"), begin("second"));
            first.commit(true).unwrap();
            assert_eq!(second.commit(true).unwrap_err().kind(), ErrorKind::Exists, "{before}");
            assert_eq!(std::fs::read_to_string(target.join("a/b/file")).unwrap(), "first");
            assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 1);
        }
        // What is gone meanwhile is nothing to lose.
        let third = begin("third");
        std::fs::remove_dir_all(&target).unwrap();
        third.commit(true).unwrap();
    }
}

#[test]
fn a_link_is_removed_and_not_followed() {
    let home = tempfile::tempdir().unwrap();
    let (real, link) = (home.path().join("real"), home.path().join("link"));
    std::fs::create_dir(&real).unwrap();
    std::fs::write(real.join("file"), "kept").unwrap();
    std::os::unix::fs::symlink(&real, &link).unwrap();
    remove_tree(&LocalStore, &link).unwrap();
    assert!(real.join("file").exists() && std::fs::symlink_metadata(&link).is_err());
}

#[test]
fn without_exchange_the_old_one_is_moved_aside() {
    let home = tempfile::tempdir().unwrap();
    let target = home.path().join("run");
    for text in ["one", "two"] {
        fill(StagedDir::create(Arc::new(Plain), &target, true).unwrap(), text).commit(true).unwrap();
        assert_eq!(std::fs::read_to_string(target.join("a/b/file")).unwrap(), text);
    }
    assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 1);
}

#[test]
fn leftovers_are_those_that_nobody_works_on() {
    let home = tempfile::tempdir().unwrap();
    let target = home.path().join("run");
    let living = staged(&target, false).unwrap();
    assert!(leftovers(home.path()).unwrap().is_empty());
    let dead = home.path().join("run.orbax-checkpoint-tmp-touchdown-00");
    std::fs::create_dir(&dead).unwrap();
    std::fs::create_dir(home.path().join(".touchdown-old-a-b-00")).unwrap();
    let found = leftovers(home.path()).unwrap();
    let short: Vec<_> = found.iter().map(|one| (one.kind, one.name.as_str())).collect();
    assert_eq!(short, [(LeftoverKind::Replaced, "a-b"), (LeftoverKind::Staging, "run")]);
    found.iter().for_each(|one| remove_leftover(&LocalStore, one).unwrap());
    assert!(!dead.exists() && living.path().exists());
}
