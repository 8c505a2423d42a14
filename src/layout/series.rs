//! The steps of a root with what they say about themselves, for who keeps a series of them.
//!
//! [`describe`](super::describe) asks which one step is meant; here every step counts, and a root may have none yet.

use super::batch::{corrupt, files, files_or_reasons, has_dir};
use super::orbax::{checkpoint, json, step};
use super::steps::{self, Found};
use super::survey::{Holds, Survey};
use super::{Item, ItemKind, Step, StepState};
use crate::error::Result;
use crate::limits::{METADATA_FILE_BYTES_MAX, METRICS_BYTES_MAX};
use crate::need::{Asker, Need};
use crate::relpath::RelPath;

/// A step and its items.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Which step, and whether its listings say that it is whole.
    pub step: Step,
    /// Its items, by name; a step that is a bare item has one with an empty name.
    pub items: Vec<Item>,
    /// Whether it has metrics.
    pub has_metrics: bool,
}

/// What the files of a step's own directory say.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Notes {
    /// When its save began, in nanoseconds since the Unix epoch.
    pub init_ns: Option<i64>,
    /// When it was committed.
    pub commit_ns: Option<i64>,
    /// The user's metadata of the step.
    pub custom_metadata: Option<serde_json::Value>,
    /// Its metrics, as far as they can be read.
    pub metrics: Option<serde_json::Value>,
    /// Why the step's metadata cannot be read: it is damaged.
    pub damage: Option<String>,
    /// Why its metrics cannot be read: the step itself can.
    pub metrics_damage: Option<String>,
}

/// The steps below the root whose directories have a wanted name, by number and name; unfinished ones included. `None` if
/// there is no such directory.
///
/// # Errors
/// What cannot be listed or read.
pub async fn list(ask: &Asker, wanted: &(dyn Fn(&str) -> bool + Sync)) -> Result<Option<Vec<Listed>>> {
    let root = RelPath::root();
    let mut survey = Survey::new(ask);
    survey.list(vec![root.clone()]).await?;
    survey.insist(&root).await?;
    if survey.entries(&root).is_none() {
        return Ok(None);
    }
    let named = survey.children(&root).into_iter().filter(|(name, _)| wanted(name));
    let named = named.filter_map(|(name, dir)| Some((step::parse(&name)?, name, dir))).collect();
    let mut found = steps::classified(&mut survey, named).await?;
    found.retain(|found| !steps::holds_steps(&survey, found));
    steps::judge(ask, &survey, &mut found).await?;
    found.extend(steps::unfinished(&survey, &root).into_iter().filter(|found| wanted(&found.step.name)));
    found.sort_by(|a, b| (a.step.number, &a.step.name).cmp(&(b.step.number, &b.step.name)));
    let listed = |Found { step, holds }: Found| {
        let entries = survey.entries(&step.dir).unwrap_or_default();
        let has_metrics = has_dir(entries, checkpoint::METRICS_ITEM);
        let items = match holds {
            Holds::Composite(composite) => composite.items,
            Holds::Item(kind) => vec![Item { name: String::new(), kind, dir: step.dir.clone() }],
            Holds::Nothing => Vec::new(),
        };
        let items =
            items.into_iter().filter(|item| item.name != checkpoint::METRICS_ITEM || item.kind == ItemKind::Tree);
        Listed { items: items.collect(), has_metrics, step }
    };
    Ok(Some(found.into_iter().map(listed).collect()))
}

/// What these steps say about themselves, in their order. Unfinished ones are not asked. A file that cannot be read, or makes no
/// sense, is no error here but damage.
///
/// # Errors
/// An environment that fails.
pub async fn notes(ask: &Asker, steps: &[Listed]) -> Result<Vec<Notes>> {
    let mut needs = Vec::new();
    for listed in steps.iter().filter(|listed| asked(listed)) {
        let path = listed.step.dir.join(checkpoint::METADATA_FILE)?;
        needs.push(Need::File { path, max: METADATA_FILE_BYTES_MAX });
        let path = steps::metrics_file(&listed.step.dir)?;
        needs.push(Need::File { path, max: METRICS_BYTES_MAX });
    }
    let mut answers = files_or_reasons(ask, needs).await?.into_iter();
    let mut all = Vec::new();
    for listed in steps {
        let mut notes = Notes::default();
        if asked(listed) {
            let (metadata, metrics) = (answers.next(), answers.next());
            let (metadata, metrics) = (metadata.unwrap_or(Ok(None)), metrics.unwrap_or(Ok(None)));
            notes.damage = metadata.as_ref().err().cloned();
            notes.metrics_damage = metrics.as_ref().err().cloned();
            if let Ok(Some(file)) = metadata {
                match checkpoint::parse(&file) {
                    Ok(metadata) => {
                        (notes.init_ns, notes.commit_ns) = (metadata.init_ns, metadata.commit_ns);
                        notes.custom_metadata = metadata.custom_metadata;
                    }
                    Err(error) => notes.damage = Some(format!("{} is not valid: {error}", checkpoint::METADATA_FILE)),
                }
            }
            if let Ok(Some(file)) = metrics {
                match json::parse(&file) {
                    Ok(metrics) => notes.metrics = Some(metrics),
                    Err(error) => notes.metrics_damage = Some(format!("the metrics are not valid: {error}")),
                }
            }
        }
        all.push(notes);
    }
    Ok(all)
}

/// The user's metadata of a root; `None` if it has none.
///
/// # Errors
/// A file that cannot be read, or is damaged.
pub async fn root_notes(ask: &Asker) -> Result<Option<serde_json::Value>> {
    let dir = RelPath::root().join(checkpoint::ROOT_METADATA_DIR)?;
    let names = [checkpoint::ROOT_METADATA_FILE, checkpoint::OLD_ROOT_METADATA_FILE];
    let paths = names.iter().map(|name| dir.join(name)).collect::<Result<Vec<_>, _>>()?;
    let mut read = files(ask, paths.clone()).await?.into_iter();
    let (new, old) = (read.next().flatten(), read.next().flatten());
    let parsed = match (new, old) {
        (Some(file), _) => checkpoint::parse_root(&file),
        (None, Some(file)) => checkpoint::parse_old_root(&file),
        (None, None) => Ok(None),
    };
    parsed.map_err(|error| corrupt(&error, Some(error.offset), &dir))
}

/// Whether a step has files of its own to be asked for.
fn asked(listed: &Listed) -> bool {
    listed.step.state == StepState::Whole || !step::is_temporary(&listed.step.name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::testing::Dir;

    #[test]
    fn every_step_is_listed_with_what_it_says() {
        let metadata = r#"{"item_handlers": {}, "commit_timestamp_nsecs": 7, "custom_metadata": {"a": 1}}"#;
        let dir = Dir::new()
            .file("3/state/_METADATA", "{}")
            .file("3/_CHECKPOINT_METADATA", metadata)
            .file("3/metrics/metrics", r#"{"loss": NaN}"#)
            .file("5/_CHECKPOINT_METADATA", "no json")
            .file("5/default/_METADATA", "{}")
            .file("5/metrics/metrics", "{")
            .dir("7.orbax-checkpoint-tmp")
            // A tree beside the steps: the root of a series all the same.
            .file("export/state/_METADATA", "{}")
            .file("export/_METADATA", "{}");
        let (steps, notes) = dir
            .run(|ask| async move {
                let steps = list(&ask, &|_| true).await?.unwrap();
                let notes = notes(&ask, &steps).await?;
                Ok((steps, notes))
            })
            .unwrap();
        let names: Vec<&str> = steps.iter().map(|listed| listed.step.name.as_str()).collect();
        assert_eq!(names, ["3", "5", "7.orbax-checkpoint-tmp"]);
        assert_eq!(steps[0].items.iter().map(|item| item.name.as_str()).collect::<Vec<_>>(), ["state"]);
        assert_eq!((notes[0].commit_ns, notes[0].damage.as_ref()), (Some(7), None));
        assert_eq!(notes[0].metrics, Some(serde_json::json!({"loss": "NaN"})));
        assert!(notes[1].damage.is_some() && notes[1].metrics_damage.is_some());
        assert_eq!(notes[2], Notes::default());
        let none = dir.run(|ask| async move { list(&ask, &|name| name == "5").await }).unwrap().unwrap();
        assert_eq!(none.len(), 1);
        assert_eq!(Dir::default().run(|ask| async move { list(&ask, &|_| true).await }).unwrap(), None);
    }
}
