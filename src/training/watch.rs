//! Following a root: an evaluator beside a training run.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::names::StepNames;
use super::root::{Identity, SeriesStep, is_temporary, scan};
use crate::error::{ErrorKind, Result};
use crate::layout::orbax::step;
use crate::limits::WATCH_INTERVAL_MS_DEFAULT;
use crate::tree::EngineOptions;

/// How a root is watched.
#[derive(Clone, Debug)]
pub struct WatchOptions {
    /// Only steps after this one; `None` for all, those that are there already first.
    pub after: Option<u64>,
    /// Which names; `None` for any.
    pub names: Option<StepNames>,
    /// How often the root is looked at.
    pub interval: Duration,
    /// Count a step as whole only if all of its data can be read.
    pub verify_data: bool,
    /// How steps are looked into.
    pub engine: EngineOptions,
}

impl Default for WatchOptions {
    fn default() -> Self {
        Self {
            after: None,
            names: None,
            interval: Duration::from_millis(WATCH_INTERVAL_MS_DEFAULT),
            verify_data: false,
            engine: EngineOptions::default(),
        }
    }
}

/// Gives each whole step of a root once, as it appears, and one that is replaced by another once more. It only reads, and the root need not exist yet.
#[derive(Debug)]
pub struct Watch {
    root: PathBuf,
    options: WatchOptions,
    /// The names that were given, or are waiting to be, and the directories that had them.
    known: HashMap<String, Option<Identity>>,
    waiting: VecDeque<SeriesStep>,
    skipped: BTreeMap<String, String>,
}

impl Watch {
    /// Starts to watch a root.
    pub fn new(root: impl AsRef<Path>, options: WatchOptions) -> Self {
        let root = root.as_ref().to_owned();
        Self { root, options, known: HashMap::new(), waiting: VecDeque::new(), skipped: BTreeMap::new() }
    }

    /// The next whole step that was not given yet, those that appear together by number. Blocks at most this long; `None` when
    /// the time is over.
    ///
    /// The step may be removed at any time by who writes the series: an error of loading it with its directory gone means that.
    ///
    /// # Errors
    /// A root that cannot be read.
    pub fn next(&mut self, timeout: Duration) -> Result<Option<SeriesStep>> {
        let deadline = Instant::now().checked_add(timeout);
        loop {
            // Steps that were removed while others were evaluated are of no use.
            while let Some(step) = self.waiting.pop_front() {
                if step.path.exists() {
                    return Ok(Some(step));
                }
            }
            self.look()?;
            if !self.waiting.is_empty() {
                continue;
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Ok(None);
            }
            std::thread::sleep(left.map_or(self.options.interval, |left| left.min(self.options.interval)));
        }
    }

    /// The same, but of several that are waiting the latest; the others are passed over for good.
    ///
    /// # Errors
    /// As [`next`](Self::next).
    pub fn next_latest(&mut self, timeout: Duration) -> Result<Option<SeriesStep>> {
        let Some(mut step) = self.next(timeout)? else { return Ok(None) };
        self.look()?;
        for later in self.waiting.drain(..).filter(|later| later.path.exists()) {
            if later.step >= step.step {
                step = later;
            }
        }
        Ok(Some(step))
    }

    /// The names of steps that are not whole, as of the last look, and why. They are given once they are.
    pub fn skipped(&self) -> &BTreeMap<String, String> {
        &self.skipped
    }

    /// Takes in what is new.
    fn look(&mut self) -> Result<()> {
        let (known, options) = (&self.known, &self.options);
        let wanted = |name: &str| {
            let number = options.names.as_ref().map_or_else(|| step::parse(name), |names| names.step(name));
            let after = |number: u64| options.after.is_none_or(|after| number > after);
            let is_given = || {
                let now = || Identity::of(&self.root.join(name));
                known.get(name).is_some_and(|given| given.zip(now()).is_none_or(|(given, now)| given.is_of(now)))
            };
            !is_temporary(name) && number.is_some_and(after) && !is_given()
        };
        let found = match scan(&self.root, &wanted) {
            // It has not been made yet.
            Err(error) if error.kind() == ErrorKind::NotFound && !self.root.exists() => Vec::new(),
            found => found?,
        };
        self.skipped.clear();
        for step in found {
            let reason = match step.reason() {
                Some(reason) => Some(reason.to_owned()),
                None => step.damage(self.options.verify_data, &self.options.engine)?,
            };
            match reason {
                None => {
                    self.known.insert(step.name.clone(), step.identity);
                    self.waiting.push_back(step);
                }
                Some(reason) if step.path.exists() => _ = self.skipped.insert(step.name.clone(), reason),
                Some(_) => {}
            }
        }
        Ok(())
    }
}
