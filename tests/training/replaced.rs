//! Steps that another process replaces or removes while they are looked at or read: whoever reads takes what has the name then,
//! and nothing is said of a step that is true of its predecessor only.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, Once};

use touchdown::training::{Checkpointer, CheckpointerOptions, StepChoice, StepOptions, steps};
use touchdown::tree::save::NewArray;
use touchdown::{EngineOptions, ErrorKind};
use touchdown::{State, Tree};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

use crate::common::options;

/// Has something done once, right after a tree below this directory was opened and before what it refers to is looked at: the
/// library logs that it has opened it.
fn at_opening(dir: &Path, act: impl FnOnce() + Send + 'static) {
    static LOG: Once = Once::new();
    LOG.call_once(|| {
        tracing::subscriber::set_global_default(Openings).unwrap();
        // What was logged first while that was set would else be passed over for good.
        tracing::callsite::rebuild_interest_cache();
    });
    ACTS.lock().unwrap().push((dir.to_owned(), Box::new(act)));
}

/// Whether that was done.
fn is_done(dir: &Path) -> bool {
    ACTS.lock().unwrap().iter().all(|(of, _)| of != dir)
}

type Act = Box<dyn FnOnce() + Send>;

static ACTS: Mutex<Vec<(PathBuf, Act)>> = Mutex::new(Vec::new());

struct Openings;

/// The path that an event tells.
struct Told(Option<PathBuf>);

impl Visit for Told {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        if field.name() == "path" {
            self.0 = Some(format!("{value:?}").into());
        }
    }
}

impl Subscriber for Openings {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
    fn event(&self, event: &Event<'_>) {
        let mut told = Told(None);
        event.record(&mut told);
        let act = told.0.and_then(|path| {
            let mut acts = ACTS.lock().unwrap();
            let index = acts.iter().position(|(of, _)| path.starts_with(of))?;
            Some(acts.swap_remove(index).1)
        });
        if let Some(act) = act {
            act();
        }
    }
}

/// A tree whose values begin with this one, and are too many and too mixed to lie beside the keys, which opening reads.
fn tree(first: i32) -> Tree {
    let values = (0..5000_i32).map(|index| index.wrapping_mul(index).wrapping_mul(-1_640_531_535).wrapping_add(first));
    Tree::new().with("w", NewArray::from_vec(&[5000], values.collect()))
}

/// A root with steps 4 and 5, and another 5 beside it, of twice its values.
fn with_successor() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    let steps = Checkpointer::open(&root, options()).unwrap();
    for step in [4, 5] {
        steps.save(step, &tree(step as i32), &StepOptions::metric("loss", 1.0)).unwrap();
    }
    steps.close().unwrap();
    let other = Checkpointer::open(dir.path().join("other"), options()).unwrap();
    other.save(5, &tree(10), &StepOptions::metric("loss", 0.5)).unwrap();
    other.close().unwrap();
    (dir, root)
}

/// Puts the other 5 in the place of the first, which is removed, as an overwrite does.
fn replace(root: &Path) {
    let aside = root.join("5.orbax-checkpoint-tmp-1");
    std::fs::rename(root.join("5"), &aside).unwrap();
    std::fs::rename(root.parent().unwrap().join("other/5"), root.join("5")).unwrap();
    std::fs::remove_dir_all(aside).unwrap();
}

fn value(state: &State) -> i32 {
    state.array("w").unwrap().shards()[0].as_slice::<i32>().unwrap()[0]
}

#[test]
fn a_step_that_is_replaced_while_it_is_looked_into_is_not_damaged() {
    for (verify_data, by_number) in [(false, false), (true, false), (true, true)] {
        let (_dir, root) = with_successor();
        let options = CheckpointerOptions { verify_data, ..CheckpointerOptions::read_only() };
        let reader = Checkpointer::open(&root, options).unwrap();
        let step = root.join("5");
        at_opening(&step, {
            let root = root.clone();
            move || replace(&root)
        });
        let found = if by_number { reader.metadata(5).unwrap().step } else { reader.latest().unwrap().unwrap() };
        assert!(is_done(&step));
        assert_eq!((found.step, found.metrics.unwrap()["loss"].as_f64()), (5, Some(0.5)));
        assert_eq!((reader.latest().unwrap().unwrap().step, value(&reader.load(5).unwrap())), (5, 10));
        assert!(reader.steps().iter().all(|step| step.is_whole()), "{:?}", reader.steps());
    }
}

#[test]
fn a_step_that_is_replaced_or_removed_while_it_is_read_is_chosen_again() {
    let remove = |root: &Path| std::fs::remove_dir_all(root.join("5")).unwrap();
    for (choice, act, want) in [
        (StepChoice::Number(5), &replace as &dyn Fn(&Path), 10),
        (StepChoice::Latest, &replace, 10),
        (StepChoice::Latest, &remove, 4),
        (StepChoice::Best { metric: "loss".into(), smallest: true }, &remove, 4),
    ] {
        let (_dir, root) = with_successor();
        let reader = Checkpointer::open(&root, CheckpointerOptions::read_only()).unwrap();
        let mut acted = false;
        // It has been opened, and nothing was read yet.
        let loaded = reader.load_with(choice, |checkpoint| {
            if !std::mem::replace(&mut acted, true) {
                act(&root);
            }
            checkpoint.target()
        });
        assert_eq!(value(&loaded.unwrap()), want);
    }
    let (_dir, root) = with_successor();
    let reader = Checkpointer::open(&root, CheckpointerOptions::read_only()).unwrap();
    let error = reader.load_with(5, |checkpoint| {
        remove(&root);
        checkpoint.target()
    });
    assert_eq!(error.unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn a_list_of_steps_has_no_damage_of_steps_that_are_gone() {
    for (removes, numbers) in [(true, &[4][..]), (false, &[4, 5])] {
        let (_dir, root) = with_successor();
        let step = root.join("5");
        at_opening(&step, {
            let root = root.clone();
            move || if removes { std::fs::remove_dir_all(root.join("5")).unwrap() } else { replace(&root) }
        });
        let found = steps(&root, true, &EngineOptions::default()).unwrap();
        assert!(is_done(&step) && found.iter().all(|step| step.is_whole()), "{found:?}");
        assert_eq!(found.iter().map(|step| step.step).collect::<Vec<_>>(), numbers);
    }
}
