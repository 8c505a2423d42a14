//! Several processes: one writer, killed and gone on with; the example; memory and threads over hundreds of saves.

use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use touchdown::training::{
    Checkpointer, CheckpointerOptions, PreservationPolicy, Pruning, SeriesStep, StepChoice, StepOptions, prune,
};
use touchdown::tree::save::NewArray;
use touchdown::{ErrorKind, Tree};

use crate::common::{gated, keeping, loss, names, options, tree, whole};
#[cfg(feature = "cli")]
use crate::training_loop;

/// Runs one of the ignored tests below in a process of its own.
fn child(test: &str, root: &Path, arguments: &str) -> Process {
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", test, "--nocapture", "--test-threads", "1"])
        .env("TOUCHDOWN_TEST_ROOT", root)
        .env("TOUCHDOWN_TEST_ARGUMENTS", arguments)
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn();
    Process(child.unwrap())
}

/// A process that does not outlive the test.
struct Process(Child);

impl std::ops::Deref for Process {
    type Target = Child;
    fn deref(&self) -> &Child {
        &self.0
    }
}

impl std::ops::DerefMut for Process {
    fn deref_mut(&mut self) -> &mut Child {
        &mut self.0
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It has ended already unless the test fails.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn child_root() -> PathBuf {
    std::env::var_os("TOUCHDOWN_TEST_ROOT").map(PathBuf::from).unwrap()
}

/// Blocks until the child prints a line with this in it.
fn until_line(child: &mut Child, line: &str) {
    let mut lines = BufReader::new(child.stdout.as_mut().unwrap()).lines();
    assert!(lines.any(|found| found.unwrap().contains(line)), "the child never said `{line}`");
}

/// Saves steps without end, as fast as it can, and removes all but three.
#[test]
#[ignore = "run by other tests in a process of its own, which they kill"]
fn child_that_saves_for_ever() {
    let steps = Checkpointer::open(child_root(), keeping(PreservationPolicy::latest(3))).unwrap();
    let start = steps.latest().unwrap().map_or(0, |step| step.step + 1);
    println!("started");
    let begin = Instant::now();
    for step in start.. {
        steps.save_async(step, &tree(step), &loss(1.0)).unwrap();
        assert!(begin.elapsed() < Duration::from_secs(60), "nobody killed it");
    }
}

#[test]
fn a_writer_whose_lock_was_removed_changes_nothing_any_more() {
    let root = tempfile::tempdir().unwrap();
    let steps = Checkpointer::open(root.path(), keeping(PreservationPolicy::latest(1))).unwrap();
    steps.save(1, &tree(1), &StepOptions::default()).unwrap();
    let (gate, gated) = gated(keeping(PreservationPolicy::latest(1)));
    steps.close().unwrap();
    let steps = Checkpointer::open(root.path(), gated).unwrap();
    gate.close();
    let going_on = steps.save_async(2, &tree(2), &StepOptions::default()).unwrap().unwrap();
    std::fs::remove_file(root.path().join(".touchdown-lock")).unwrap();
    let second = Checkpointer::open(root.path(), options()).unwrap();
    for error in [steps.save_async(3, &tree(3), &StepOptions::default()).unwrap_err(), steps.delete(1).unwrap_err()] {
        assert!(error.kind() == ErrorKind::Busy && error.to_string().contains("lock"), "{error:?}");
    }
    // What was going on ends; that the other writer has a step 1 by then is not decided here.
    gate.open();
    going_on.wait().unwrap();
    assert_eq!(steps.wait().unwrap_err().kind(), ErrorKind::Busy);
    second.reload().unwrap();
    assert_eq!(whole(&second), [1, 2]);
    second.save(3, &tree(3), &StepOptions::default()).unwrap();
}

#[test]
fn one_process_writes_and_when_it_is_killed_another_goes_on() {
    let root = tempfile::tempdir().unwrap();
    let mut latest = None;
    for round in 0..12 {
        let mut writer = child("processes::child_that_saves_for_ever", root.path(), "");
        until_line(&mut writer, "started");
        let refused = Checkpointer::open(root.path(), options()).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Busy);
        assert!(refused.to_string().contains(&format!("process {}", writer.id())), "{refused}");
        assert_eq!(
            prune(root.path(), &Pruning { policy: PreservationPolicy::latest(1), ..Pruning::default() })
                .map(drop)
                .map_err(|error| error.kind())
                .err()
                .filter(|kind| *kind != ErrorKind::NotFound)
                .unwrap_or(ErrorKind::Busy),
            ErrorKind::Busy
        );
        // Readers are safe, whatever is going on.
        let reader = Checkpointer::open(root.path(), CheckpointerOptions::read_only()).unwrap();
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(50 + 37 * round) {
            reader.reload().unwrap();
            if reader.latest().unwrap().is_some() {
                let state = reader.load(StepChoice::Latest).unwrap();
                let values: &[i32] = state.array("w").unwrap().shards()[0].as_slice().unwrap();
                assert!(values.iter().all(|value| *value == values[0]));
            }
        }
        writer.kill().unwrap();
        writer.wait().unwrap();
        // Nothing that was whole is lost: the latest only grows, and with two before it.
        reader.reload().unwrap();
        let found = whole(&reader);
        assert!(found.last().copied() >= latest, "{found:?} after {latest:?}");
        assert!(found.len() >= 3 || found.last().is_none_or(|last| *last < 2), "{found:?}");
        latest = found.last().copied();
    }
    println!("killed 12 times, at step {latest:?}");
    let steps = Checkpointer::open(root.path(), keeping(PreservationPolicy::latest(3))).unwrap();
    steps.wait().unwrap();
    let (found, left) = (whole(&steps), names(root.path()));
    // Three, one whose retention was interrupted, and one that was committed meanwhile.
    assert!(latest.is_some() && found.len() <= 5, "{found:?}");
    let mut wanted: Vec<String> = found.iter().map(u64::to_string).collect();
    wanted.sort();
    assert_eq!(left, wanted, "leftovers are gone");
}

#[cfg(feature = "cli")]
#[test]
#[ignore = "run by another test in a process of its own, which it kills"]
fn child_that_trains() {
    let last = std::env::var("TOUCHDOWN_TEST_ARGUMENTS").unwrap().parse().unwrap();
    let stop = touchdown::training::flag_on_sigterm().unwrap();
    training_loop::run(child_root().to_str().unwrap(), last, &stop).unwrap();
    println!("ended well");
}

/// The example: killed, it resumes; told to end, it saves; at the end it has the latest and the best three.
#[cfg(feature = "cli")]
#[test]
fn the_training_loop_resumes_when_it_is_killed_and_saves_when_it_is_told_to_end() {
    let home = tempfile::tempdir().unwrap();
    let root = home.path().join("run");
    let latest = || {
        let steps = Checkpointer::open(&root, CheckpointerOptions::read_only()).unwrap();
        steps.latest().unwrap().map_or(0, |step| step.step)
    };
    let mut killed = child("processes::child_that_trains", &root, "20000");
    until_line(&mut killed, "step 100: loss");
    killed.kill().unwrap();
    killed.wait().unwrap();
    let first = latest();
    assert!(first >= 80 && first % 20 == 0, "{first}");
    let mut told = child("processes::child_that_trains", &root, "20000");
    until_line(&mut told, &format!("starting at step {}", first + 1));
    // Twice, as `timeout` does.
    let kill = format!("kill -TERM {0}; kill -TERM {0}", told.id());
    assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
    let mut output = String::new();
    io::Read::read_to_string(&mut told.stdout.take().unwrap(), &mut output).unwrap();
    assert!(told.wait().unwrap().success() && output.contains("ended well"), "{output}");
    let second = latest();
    assert!(second > first && output.contains(&format!("asked to stop: saved step {second}")), "{second}: {output}");
    let mut ends = child("processes::child_that_trains", &root, "300");
    until_line(&mut ends, "ended well");
    assert!(ends.wait().unwrap().success());
    let steps = Checkpointer::open(&root, CheckpointerOptions::read_only()).unwrap();
    let best = steps.best("-loss").unwrap().unwrap().step;
    let kept: Vec<u64> = steps.steps().iter().map(|step| step.step).collect();
    assert!(steps.latest().unwrap().unwrap().step == 300 && kept.contains(&best), "{kept:?}");
    assert!((3..=4).contains(&kept.len()), "{kept:?}");
}

/// Memory in bytes and threads of this process.
fn memory_and_threads() -> (u64, usize) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let field = |name: &str| -> u64 {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_whitespace().next().unwrap().parse().unwrap()
    };
    (field("VmRSS:") << 10, field("Threads:") as usize)
}

#[test]
#[ignore = "run by another test in a process of its own: its memory and threads are measured"]
fn child_that_saves_three_hundred_times() {
    let before = memory_and_threads();
    let policy = PreservationPolicy::any([PreservationPolicy::latest(2), PreservationPolicy::best(3, "-loss")]);
    let steps = Checkpointer::open(child_root(), keeping(policy)).unwrap();
    let state = Tree::new()
        .with("w", NewArray::from_vec(&[500], vec![7_i32; 500]))
        .with("big", NewArray::from_vec(&[1 << 18], vec![0.5_f32; 1 << 18]));
    let mut seen = Vec::new();
    for step in 0..300_u64 {
        let value = (step as f64 * 0.7).sin();
        steps.save_async(step, &state, &loss(value)).unwrap();
        if step % 50 == 49 {
            steps.wait().unwrap();
            seen.push(memory_and_threads());
        }
    }
    steps.close().unwrap();
    // A thread that was joined is counted until the kernel has done with it.
    let end = Instant::now() + Duration::from_secs(30);
    while memory_and_threads().1 != before.1 && Instant::now() < end {
        std::thread::yield_now();
    }
    let after = memory_and_threads();
    println!("before {before:?}, every 50 saves {seen:?}, after {after:?}");
    assert_eq!(after.1, before.1, "no thread is left");
    assert!(seen.iter().all(|(_, threads)| *threads == seen[0].1), "{seen:?}");
    // From the first 50 saves on, which warm allocators and pools up.
    let grown = seen[5].0.saturating_sub(seen[0].0);
    assert!(grown < 8 << 20, "memory grew by {grown} bytes: {seen:?}");
    println!("flat");
}

#[test]
fn three_hundred_asynchronous_saves_leave_memory_and_threads_as_they_were() {
    let root = tempfile::tempdir().unwrap();
    let mut child = child("processes::child_that_saves_three_hundred_times", root.path(), "");
    let mut output = String::new();
    io::Read::read_to_string(&mut child.stdout.take().unwrap(), &mut output).unwrap();
    assert!(child.wait().unwrap().success() && output.contains("flat"), "{output}");
    println!("{}", output.lines().find(|line| line.contains("every 50")).unwrap_or_default());
    let left: Vec<SeriesStep> = Checkpointer::open(root.path(), CheckpointerOptions::read_only()).unwrap().steps();
    assert!((3..=5).contains(&left.len()) && left.last().unwrap().step == 299, "{left:?}");
}
