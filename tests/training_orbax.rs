//! Series of steps, judged by Orbax's own `CheckpointManager` and `training.Checkpointer`: they read and go on with what is
//! written here, what they wrote is read and gone on with here, and their policies decide as those here.
//!
//! `TOUCHDOWN_DIFFERENTIAL_SEED` and `TOUCHDOWN_POLICY_COUNT` choose other and more histories.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "tests fail by panicking and say what they compared"
)]

mod saved;
mod support;

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use saved::Random;
use serde_json::{Value as Json, json};
use support::{number_from_environment, python, read_json, run_python, scratch, touchdown};
use touchdown::training::{
    Checkpointer, CheckpointerOptions, Metric, PreservationPolicy, SaveContext, SavePolicy, StepInfo, StepNames,
    StepOptions,
};
use touchdown::tree::save::{NewArray, TreeItem};
use touchdown::zarr::Format;
use touchdown::{EngineOptions, SaveOptions, Tree};

fn options(facts: &Json) -> CheckpointerOptions {
    let names = StepNames {
        prefix: facts["prefix"].as_str().map(str::to_owned),
        digits: facts["digits"].as_u64().unwrap() as usize,
    };
    let engine = EngineOptions { threads: 2, staging_bytes: 32 << 20, ..EngineOptions::default() };
    CheckpointerOptions { names, engine, ..CheckpointerOptions::default() }
}

fn tree(step: u64) -> Tree {
    Tree::new().with("w", NewArray::from_vec(&[500], vec![step as i32; 500])).with("step", step)
}

fn json_item() -> Json {
    json!({"lr": 1e-3, "layers": [1, null], "name": "ünï"})
}

fn loss(step: u64) -> f64 {
    match step {
        3 => f64::NAN,
        9 => f64::INFINITY,
        step => 1.0 / (1 + step % 4) as f64,
    }
}

fn judge(python: &Path, verb: &str, folder: &Path) {
    print!("{verb}: {}", run_python(python, "oracle.py", [verb, "--out", folder.to_str().unwrap()]));
}

/// What both managers found in a root is what is known here of it.
fn compare(folder: &Path, facts: &Json, steps: &Checkpointer) -> usize {
    let name = facts["name"].as_str().unwrap();
    let found = read_json(&folder.join(format!("{name}.json")));
    let latest = steps.latest().unwrap().unwrap();
    let root = steps.root_metadata().unwrap().unwrap_or_else(|| json!({}));
    for manager in ["v1", "v0"] {
        let found = &found[manager];
        let have: Vec<String> = steps.steps().iter().map(|step| step.step.to_string()).collect();
        let mut theirs: Vec<u64> =
            found["steps"].as_object().unwrap().keys().map(|step| step.parse().unwrap()).collect();
        theirs.sort_unstable();
        assert_eq!(theirs.iter().map(u64::to_string).collect::<Vec<_>>(), have, "{name} {manager}");
        assert_eq!((&found["latest"], &found["root"]), (&json!(latest.step), &root), "{name} {manager}");
        for step in steps.steps() {
            let theirs = &found["steps"][step.step.to_string()];
            let state = steps.load(step.step).unwrap();
            let values: &[i32] = state.array("w").unwrap().shards()[0].as_slice().unwrap();
            assert_eq!(theirs["w"], json!(values), "{name} {manager} step {}", step.step);
            if !facts["json"].is_null() {
                assert_eq!(theirs["json"], json_item(), "{name} {manager} step {}", step.step);
            }
            assert_eq!(theirs["metrics"], json!(step.metrics.as_deref()), "{name} {manager} step {}", step.step);
            if manager == "v1" {
                let custom = step.custom_metadata.clone().unwrap_or_else(|| json!({}));
                assert_eq!((&theirs["custom"], &theirs["commit_ns"]), (&custom, &json!(step.commit_ns)), "{name}");
                assert_eq!(theirs["init_ns"], json!(step.init_ns), "{name}");
                let mut items: Vec<&str> = step.items.iter().map(|item| item.name.as_str()).collect();
                items.sort_unstable();
                assert_eq!(theirs["items"], json!(items), "{name}");
            }
        }
    }
    if facts["metrics"] == true {
        // Orbax sorts by NaN where there are some, which has no meaning.
        let nan =
            steps.steps().iter().any(|step| step.metrics.as_ref().is_some_and(|metrics| metrics["loss"] == "NaN"));
        let best = steps.best("-loss").unwrap().unwrap().step;
        assert!(nan || found["v0"]["best"] == json!(best), "{name}: {} and {best}", found["v0"]["best"]);
        let path = steps.root().display().to_string();
        let run = touchdown(["ls", &path, "--step", "best:-loss", "--json"]);
        assert_eq!(serde_json::from_str::<Json>(&run.stdout).unwrap()["step"], json!(best), "{}", run.stderr);
    }
    steps.steps().len()
}

/// Orbax goes on with a series, then this library, and both find the same.
fn go_on(python: &Path, folder: &Path, mut roots: Vec<Json>) {
    let index = |roots: &[Json]| fs::write(folder.join("index.json"), json!({"roots": roots}).to_string()).unwrap();
    index(&roots);
    judge(python, "training-go-on", folder);
    for facts in &mut roots {
        let last = facts["last"].as_u64().unwrap();
        facts["metrics"] = json!(false);
        let root = folder.join(facts["name"].as_str().unwrap());
        let options = CheckpointerOptions { preservation: PreservationPolicy::latest(2), ..options(facts) };
        let steps = Checkpointer::open(&root, options).unwrap();
        let numbers = || steps.steps().iter().map(|step| step.step).collect::<Vec<_>>();
        assert_eq!(numbers(), [last + 1, last + 2], "{facts}");
        steps.save(last + 3, &tree(last + 3), &StepOptions::metric("loss", 1.0)).unwrap();
        steps.wait().unwrap();
        assert_eq!(numbers(), [last + 2, last + 3]);
    }
    index(&roots);
    judge(python, "training-read", folder);
    for facts in &roots {
        let root = folder.join(facts["name"].as_str().unwrap());
        compare(
            folder,
            facts,
            &Checkpointer::open(&root, CheckpointerOptions { read_only: true, ..options(facts) }).unwrap(),
        );
    }
}

#[test]
fn orbax_reads_and_goes_on_with_a_series() {
    let Some(python) = python("orbax_reads_and_goes_on_with_a_series") else { return };
    let folder = scratch("training-orbax");
    let (mut roots, mut open) = (Vec::new(), Vec::new());
    for (number, (prefix, digits, steps)) in [
        (None, 0, &[1_u64, 2, 3, 5, 8, 9][..]),
        (Some("ckpt"), 6, &[0, 7, 123]),
        (Some("my_run"), 0, &[4, 6]),
        (None, 4, &[12_345, 2, 12_346]),
    ]
    .into_iter()
    .enumerate()
    {
        let facts = json!({
            "name": format!("root-{number}"), "prefix": prefix, "digits": digits, "item": "state",
            "metrics": true, "last": steps.iter().max(), "json": (number == 1).then_some("config"),
        });
        let save = SaveOptions {
            zarr: if number % 2 == 0 { Format::V3 } else { Format::V2 },
            ocdbt: number != 2,
            ..SaveOptions::default()
        };
        let root = folder.join(facts["name"].as_str().unwrap());
        let custom_metadata = (number > 0).then(|| json!({"run": number, "ünï": [1.5, null]}));
        // The lock is held while Orbax reads.
        let series =
            Checkpointer::open(&root, CheckpointerOptions { save, custom_metadata, ..options(&facts) }).unwrap();
        for &step in steps {
            let mut with = StepOptions::metric("loss", loss(step)).force();
            if step % 2 == 0 {
                with = with.custom_metadata(json!({"epoch": step}));
            }
            let mut items = vec![("state".to_owned(), TreeItem::from(tree(step)))];
            if number == 1 {
                items.push(("ema".to_owned(), tree(step).into()));
                items.push(("config".to_owned(), json_item().into()));
            }
            series.save_items(step, &items, &with).unwrap();
        }
        roots.push(facts);
        open.push(series);
    }
    // What a crash leaves behind is no step to Orbax, and neither is a number below 0.
    fs::create_dir_all(folder.join("root-0/10.orbax-checkpoint-tmp-touchdown-00/state")).unwrap();
    support::copy_tree(&folder.join("root-0/9"), &folder.join("root-0/-9"));
    support::copy_tree(&folder.join("root-1/ckpt_000007"), &folder.join("root-1/ckpt_-7"));
    fs::write(folder.join("index.json"), json!({"roots": roots}).to_string()).unwrap();
    judge(&python, "training-read", &folder);
    let compared: usize = roots.iter().zip(&open).map(|(facts, series)| compare(&folder, facts, series)).sum();
    assert_eq!(compared, 14);
    drop(open);
    // Orbax goes on without the JSON.
    roots.iter_mut().for_each(|facts| facts["json"] = json!(null));
    go_on(&python, &folder, roots);
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn a_series_of_orbax_is_read_and_gone_on_with() {
    let Some(python) = python("a_series_of_orbax_is_read_and_gone_on_with") else { return };
    let folder = scratch("training-of-orbax");
    judge(&python, "training-write", &folder);
    judge(&python, "training-read", &folder);
    let mut roots = read_json(&folder.join("index.json"))["roots"].as_array().unwrap().clone();
    for facts in &mut roots {
        let root = folder.join(facts["name"].as_str().unwrap());
        let steps = Checkpointer::open(&root, options(facts)).unwrap();
        let numbers: Vec<u64> = steps.steps().iter().map(|step| step.step).collect();
        assert_eq!(json!(numbers), facts["steps"], "{facts}");
        assert_eq!(steps.root_metadata().unwrap().as_ref(), Some(&facts["root"]));
        assert_eq!(compare(&folder, facts, &steps), numbers.len());
        if facts["custom"] == true {
            assert_eq!(steps.metadata(8).unwrap().step.custom_metadata, Some(json!({"epoch": 8})));
        } else {
            assert_eq!(steps.load_items(8).unwrap()["config"].json(), Some(&json!({"lr": 0.5})));
        }
        // What the same policy keeps of it here.
        let policy = PreservationPolicy::best(2, "-loss");
        let removed: Vec<u64> = steps.would_remove(&policy).unwrap().iter().map(|step| step.step).collect();
        // The one whose loss is NaN cannot be judged, and stays.
        assert_eq!(removed, if facts["custom"] == true { vec![1, 5, 9] } else { vec![9] });
        steps.save(20, &tree(20), &StepOptions::metric("loss", 0.0)).unwrap();
        assert_eq!(steps.best("-loss").unwrap().unwrap().step, 20);
        facts["last"] = json!(20);
    }
    go_on(&python, &folder, roots);
    fs::remove_dir_all(folder).unwrap();
}

// ---------------------------------------------------------------- policies

fn at(seconds: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(seconds as u64)
}

/// A policy for Orbax's and for this library's words.
fn random_preservation(random: &mut Random, depth: u64) -> (Json, PreservationPolicy) {
    // 0, which Orbax takes for no limit, is refused where a policy is used.
    let max = |random: &mut Random| (!random.one_in(2)).then(|| random.below(5) as usize);
    match random.below(if depth == 0 { 8 } else { 10 }) {
        0 => (json!({"kind": "all"}), PreservationPolicy::All),
        1 => {
            let count = random.below(6) as usize;
            (json!({"kind": "latest", "count": count}), PreservationPolicy::latest(count))
        }
        2 => {
            let (interval, exact, max) = (1 + random.below(12), random.one_in(2), max(random));
            (
                json!({"kind": "every_steps", "interval": interval, "exact": exact, "max": max}),
                PreservationPolicy::EverySteps { interval, exact, max },
            )
        }
        3 => {
            let (interval, max) = (1 + random.below(12), max(random));
            (
                json!({"kind": "closest", "interval": interval, "max": max}),
                PreservationPolicy::ClosestToEvery { interval, max },
            )
        }
        4 => {
            let seconds = if random.one_in(4) { 0 } else { random.below(8000) };
            (
                json!({"kind": "every_seconds", "seconds": seconds}),
                PreservationPolicy::EveryDuration(Duration::from_secs(seconds)),
            )
        }
        5 => {
            let steps: Vec<u64> = (0..random.below(6)).map(|_| random.below(50)).collect();
            (json!({"kind": "steps", "steps": steps}), PreservationPolicy::steps(steps))
        }
        6 => {
            let (count, smallest, keep_without) = (random.below(6) as usize, random.one_in(2), random.one_in(2));
            let metric = Metric { name: "m".to_owned(), smallest };
            (
                json!({"kind": "best", "count": count, "smallest": smallest, "keep_without": keep_without}),
                PreservationPolicy::Best { count, metric, keep_without },
            )
        }
        7 => {
            // Between the times of steps, so that the seconds between the two decisions do not matter.
            let seconds = random.below(12) * 1000 + 500;
            (
                json!({"kind": "latest_duration", "seconds": seconds}),
                PreservationPolicy::LatestDuration(Duration::from_secs(seconds)),
            )
        }
        _ => {
            let several: Vec<_> = (0..1 + random.below(3)).map(|_| random_preservation(random, depth - 1)).collect();
            let (told, policies): (Vec<Json>, Vec<PreservationPolicy>) = several.into_iter().unzip();
            (json!({"kind": "any", "policies": told}), PreservationPolicy::any(policies))
        }
    }
}

fn random_saving(random: &mut Random, flag: &Arc<AtomicBool>, depth: u64) -> (Json, SavePolicy) {
    match random.below(if depth == 0 { 5 } else { 7 }) {
        0 => {
            let interval = 1 + random.below(10);
            (json!({"kind": "interval", "interval": interval}), SavePolicy::interval(interval))
        }
        1 => {
            let steps: Vec<u64> = (0..random.below(30)).map(|_| random.below(70)).collect();
            (json!({"kind": "steps", "steps": steps}), SavePolicy::steps(steps))
        }
        2 => {
            let seconds = (!random.one_in(3)).then(|| random.below(3000));
            let minimum_interval = seconds.map(Duration::from_secs);
            (json!({"kind": "continuous", "seconds": seconds}), SavePolicy::Continuous { minimum_interval })
        }
        3 => (json!({"kind": "initial"}), SavePolicy::Initial),
        4 => (json!({"kind": "signal"}), SavePolicy::OnSignal(Arc::clone(flag))),
        _ => {
            let several: Vec<_> = (0..random.below(4)).map(|_| random_saving(random, flag, depth - 1)).collect();
            let (told, policies): (Vec<Json>, Vec<SavePolicy>) = several.into_iter().unzip();
            (json!({"kind": "any", "policies": told}), SavePolicy::any(policies))
        }
    }
}

#[test]
fn policies_decide_as_those_of_orbax() {
    let Some(python) = python("policies_decide_as_those_of_orbax") else { return };
    let folder = scratch("training-policies");
    let seed = number_from_environment("TOUCHDOWN_DIFFERENTIAL_SEED", 1);
    let count = number_from_environment("TOUCHDOWN_POLICY_COUNT", 400);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as i64;
    let (mut told, mut ours) = (Vec::new(), Vec::new());
    for case in 0..count {
        let mut random = Random::new(seed, 9000 + case);
        let (mut step, mut history, mut infos) = (0, Vec::new(), Vec::new());
        let mut time = now - 12_000;
        for _ in 0..random.below(13) {
            step += random.below(9) + u64::from(step > 0 || !history.is_empty());
            // Clocks are set back, too.
            time += 1000 * (random.below(3) as i64 - 1);
            let metric = (!random.one_in(4)).then(|| random.below(5) as i64 - 2);
            history.push(json!({"step": step, "time": time, "m": metric}));
            let info = StepInfo::new(step, at(time));
            infos.push(match metric {
                Some(metric) => info.metrics(json!({"m": metric})),
                None => info,
            });
        }
        let (saving, signal) = (random.one_in(2), random.one_in(3));
        let flag = Arc::new(AtomicBool::new(signal));
        let preservation: Vec<_> = (0..6).map(|_| random_preservation(&mut random, 2)).collect();
        let saves: Vec<_> = (0..4).map(|_| random_saving(&mut random, &flag, 2)).collect();
        let context = SaveContext { step: step + 1 + random.below(10), now: at(now), saving };
        told.push(json!({
            "history": history, "saving": saving, "signal": signal, "step": context.step, "now": now,
            "preservation": preservation.iter().map(|(told, _)| told).collect::<Vec<_>>(),
            "save": saves.iter().map(|(told, _)| told).collect::<Vec<_>>(),
        }));
        ours.push(json!({
            "kept": preservation.iter().map(|(_, policy)| policy.keeps(&infos, at(now))).collect::<Vec<_>>(),
            "saved": saves.iter().map(|(_, policy)| policy.saves(&infos, &context)).collect::<Vec<_>>(),
        }));
    }
    fs::write(folder.join("cases.json"), json!(told).to_string()).unwrap();
    judge(&python, "training-policies", &folder);
    let theirs = read_json(&folder.join("decisions.json"));
    let (mut decisions, mut no) = (0, 0);
    for ((theirs, ours), case) in theirs.as_array().unwrap().iter().zip(&ours).zip(&told) {
        for kind in ["kept", "saved"] {
            let (theirs, ours) = (theirs[kind].as_array().unwrap(), ours[kind].as_array().unwrap());
            for (index, (theirs, ours)) in theirs.iter().zip(ours).enumerate() {
                let policy = &case[if kind == "kept" { "preservation" } else { "save" }][index];
                assert_eq!(theirs, ours, "{policy}\n{case:#}");
                decisions += theirs.as_array().map_or(1, Vec::len);
                no += theirs
                    .as_array()
                    .map_or(usize::from(theirs == false), |all| all.iter().filter(|kept| *kept == false).count());
            }
        }
    }
    println!("seed {seed}: {decisions} decisions compared, {no} of them no");
    assert!(decisions as u64 > 20 * count && no * 5 > decisions);
    fs::remove_dir_all(folder).unwrap();
}
