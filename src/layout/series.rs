//! The steps of a root with what they say about themselves, for who keeps a series of them.
//!
//! [`describe`](super::describe) asks which one step is meant; here every step counts, and a root may have none yet.

use super::batch::{corrupt, files, files_or_reasons, has_dir, has_file};
use super::orbax::tree::{METADATA_FILE, MSGPACK_FILE};
use super::orbax::{checkpoint, json, step};
use super::steps::{self, Found};
use super::survey::{Holds, MANIFEST_FILE, Survey};
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

/// What shows that the root is a checkpoint itself, whose items may be named like steps; `None` if nothing does.
///
/// # Errors
/// What cannot be listed.
pub async fn checkpoint_mark(ask: &Asker) -> Result<Option<String>> {
    let root = RelPath::root();
    let mut survey = Survey::new(ask);
    let holds = survey.classify(std::slice::from_ref(&root)).await?;
    survey.insist(&root).await?;
    let entries = survey.entries(&root).unwrap_or_default();
    let files = [checkpoint::METADATA_FILE, checkpoint::V1_MARKER, METADATA_FILE, MSGPACK_FILE, MANIFEST_FILE];
    if let Some(file) = files.into_iter().find(|file| has_file(entries, file)) {
        return Ok(Some(format!("`{file}`")));
    }
    if holds.contains(&Holds::Item(ItemKind::Tree)) {
        return Ok(Some("directories of arrays".to_owned()));
    }
    let named = steps::named(&survey, &root, &|_| true);
    let mut found = steps::classified(&mut survey, named).await?;
    found.retain(|found| !steps::holds_steps(&survey, found));
    Ok(steps::tree_beside(&survey, &root, &found).map(|name| format!("the tree `{name}`")))
}

/// The steps below the root whose directories have a wanted name, by number and name; unfinished ones included. Other
/// directories may be looked at as if they had a step's name. `None` if there is no such root.
///
/// # Errors
/// What cannot be listed or read.
pub async fn list(
    ask: &Asker,
    wanted: &(dyn Fn(&str) -> bool + Sync),
    renamed: &[(RelPath, String)],
) -> Result<Option<Vec<Listed>>> {
    let root = RelPath::root();
    let mut survey = Survey::new(ask);
    survey.list(vec![root.clone()]).await?;
    survey.insist(&root).await?;
    if survey.entries(&root).is_none() {
        return Ok(None);
    }
    let renamed = renamed.iter().filter_map(|(dir, name)| Some((step::parse(name)?, name.clone(), dir.clone())));
    let named = steps::named(&survey, &root, wanted).into_iter().chain(renamed).collect();
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
    let mut read = files(ask, paths).await?.into_iter();
    let (new, old) = (read.next().flatten(), read.next().flatten());
    let (parsed, name) = match (new, old) {
        (Some(file), _) => (checkpoint::parse_root(&file), checkpoint::ROOT_METADATA_FILE),
        (None, Some(file)) => (checkpoint::parse_old_root(&file), checkpoint::OLD_ROOT_METADATA_FILE),
        (None, None) => return Ok(None),
    };
    let path = dir.join(name)?;
    parsed.map_err(|error| corrupt(&error, Some(error.offset), &path))
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
                let steps = list(&ask, &|_| true, &[]).await?.unwrap();
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
        // One of them, and one that is to get its name back.
        let renamed = [(RelPath::new(".old-4").unwrap(), "4".to_owned())];
        let dir = dir.file(".old-4/state/_METADATA", "{}");
        let listed = dir.run(|ask| {
            let renamed = &renamed;
            async move { list(&ask, &|name| name == "5", renamed).await }
        });
        let listed = listed.unwrap().unwrap();
        let places: Vec<_> = listed.iter().map(|listed| (listed.step.number, listed.step.dir.to_string())).collect();
        assert_eq!(places, [(4, ".old-4".to_owned()), (5, "5".to_owned())]);
        assert_eq!(Dir::default().run(|ask| async move { list(&ask, &|_| true, &[]).await }).unwrap(), None);
    }

    #[test]
    fn a_checkpoint_is_no_root_whatever_its_items_are_called() {
        let mark = |dir: &Dir| dir.run(|ask| async move { checkpoint_mark(&ask).await }).unwrap();
        let tree = |dir: Dir, path: &str| dir.file(&format!("{path}/_METADATA"), "{}");
        let items = || tree(tree(Dir::new(), "weights"), "model_2");
        assert_eq!(mark(&items()).as_deref(), Some("the tree `weights`"));
        assert_eq!(mark(&tree(Dir::new(), "weights").file("key_1/np_random_key/_METADATA", "{}")), mark(&items()));
        assert_eq!(mark(&items().file("orbax.checkpoint", "")).as_deref(), Some("`orbax.checkpoint`"));
        assert_eq!(mark(&Dir::new().file("w/.zarray", "{}")).as_deref(), Some("directories of arrays"));
        // Nothing speaks against these: nothing at all, steps of either kind, and a tree beside steps that hold items.
        let export = tree(tree(Dir::new(), "3/weights"), "export");
        for root in [Dir::default(), Dir::new(), tree(Dir::new(), "model_1"), tree(Dir::new(), "3/weights"), export] {
            assert_eq!(mark(&root), None);
        }
    }
}
