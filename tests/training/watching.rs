//! An evaluator follows a root.

use std::time::{Duration, Instant};

use touchdown::training::{Checkpointer, Watch, WatchOptions};

use crate::common::{loss, options, tree};

#[test]
fn a_watch_gives_each_whole_step_once() {
    let home = tempfile::tempdir().unwrap();
    let root = home.path().join("later");
    let watching = WatchOptions { interval: Duration::from_millis(5), ..WatchOptions::default() };
    let mut watch = Watch::new(&root, watching.clone());
    let soon = Duration::from_millis(20);
    assert_eq!(watch.next(soon).unwrap(), None, "the root does not exist yet");
    let writer = std::thread::spawn({
        let root = root.clone();
        move || {
            let steps = Checkpointer::open(&root, options()).unwrap();
            for step in 1..=5 {
                steps.save_async(step, &tree(step), &loss(1.0)).unwrap();
                std::thread::sleep(Duration::from_millis(10));
            }
            steps.close().unwrap();
        }
    });
    let long = Duration::from_secs(60);
    let given: Vec<u64> = (0..5).map(|_| watch.next(long).unwrap().unwrap().step).collect();
    writer.join().unwrap();
    assert_eq!(given, [1, 2, 3, 4, 5]);
    let start = Instant::now();
    assert_eq!(watch.next(soon).unwrap(), None);
    assert!(start.elapsed() >= soon);
    // A step that is copied bit by bit is given once it is whole, with a reason until then.
    let part = root.join("6");
    std::fs::create_dir_all(part.join("state")).unwrap();
    assert_eq!(watch.next(soon).unwrap(), None);
    assert_eq!(watch.skipped().keys().collect::<Vec<_>>(), ["6"]);
    std::fs::remove_dir_all(&part).unwrap();
    std::fs::rename(root.join("5"), &part).unwrap();
    assert_eq!(watch.next(long).unwrap().map(|step| (step.step, step.name)), Some((6, "6".to_owned())));
    // It is given again when it is another one: not when something in it has changed, but when it was replaced.
    std::fs::write(root.join("6/note"), "").unwrap();
    assert_eq!(watch.next(soon).unwrap(), None);
    let aside = home.path().join("6");
    std::fs::rename(root.join("6"), aside).unwrap();
    std::fs::rename(root.join("1"), root.join("6")).unwrap();
    assert_eq!(watch.next(long).unwrap().map(|step| step.step), Some(6));
    assert_eq!(watch.next(soon).unwrap(), None);
    // One that starts late, from a step on, and one that only wants the latest.
    let mut late = Watch::new(&root, WatchOptions { after: Some(2), ..watching.clone() });
    assert_eq!((late.next(soon).unwrap().unwrap().step, late.next_latest(soon).unwrap().unwrap().step), (3, 6));
    assert_eq!(late.next(soon).unwrap(), None);
    assert_eq!(Watch::new(&root, watching).next_latest(soon).unwrap().unwrap().step, 6);
}
