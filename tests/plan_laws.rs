//! Laws of the planner, over checkpoints, targets and meshes at random. Nothing but this file's own model judges.
//!
//! The model (`laws/`) writes every array itself and knows for each element its value and the bytes that hold it; a
//! target is a list of stored elements. What the planner says and what a load gives must follow from the two.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "tests panic to fail and print their counts"
)]

#[path = "laws/mod.rs"]
mod laws;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io::Write;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

use laws::case::Case;
use laws::grid::{indices, volume};
use laws::store::Place;
use laws::tape::Tape;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestError, TestRunner};
use touchdown::ErrorKind;
use touchdown::dtype::CastPolicy;
use touchdown::io::Io;
use touchdown::plan::{Limits, Plan, Source, Verify};
use touchdown::tree::{Engine, EngineOptions, State};

/// Runs a law over random cases, and says how many there were and what they compared. `long`: with arrays of many slots.
fn check(cases: u32, long: bool, what: &str, law: impl Fn(&Case, &mut Tape<'_>) -> u64) {
    let compared = AtomicU64::new(0);
    let config = Config { cases, failure_persistence: None, max_shrink_iters: 1_000, ..Config::default() };
    let result = TestRunner::new(config).run(&prop::collection::vec(any::<u32>(), 400), |numbers| {
        let mut tape = Tape::new(&numbers);
        let case = Case::new(&mut tape, long);
        compared.fetch_add(law(&case, &mut tape), Ordering::Relaxed);
        Ok(())
    });
    match result {
        Ok(()) => {}
        Err(TestError::Fail(reason, numbers)) => {
            let Case { stored, layout, request, .. } = Case::new(&mut Tape::new(&numbers), long);
            panic!("{reason}\n{:#?}\n{layout:?}\n{request:?}", stored.arrays);
        }
        Err(TestError::Abort(reason)) => panic!("{reason}"),
    }
    let compared = compared.into_inner();
    println!("{cases} cases, {compared} {what}");
    assert!(compared > 0, "nothing was compared");
}

impl Case {
    fn plan(&self, rank: u32, limits: Limits) -> Plan {
        let target = self.request.target(&self.checkpoint, &self.layout.mesh(rank));
        self.checkpoint.plan_within(&target, limits).unwrap()
    }

    /// The stored elements that the devices of a rank need.
    fn needed(&self, rank: u32) -> BTreeSet<usize> {
        let mut needed = BTreeSet::new();
        for device in self.local(rank) {
            for leaf in &self.request.wanted {
                needed.extend(self.held(leaf, device).iter().filter_map(|index| leaf.at(index)));
            }
        }
        needed
    }

    /// The bytes of files that hold these elements, as ranges by file: elements by themselves, encoded things whole.
    fn bytes_of(&self, elements: &BTreeSet<usize>, slot_bytes: u64) -> Bytes {
        let mut bytes = Bytes { spans: BTreeMap::new(), exact: true, unchecked: true };
        for array in &self.stored.arrays {
            let size = array.dtype.size() as u64;
            for number in elements.range(array.first..array.first + volume(&array.shape)) {
                let (file, offset, len) = match &self.stored.places[*number] {
                    Place::Absent => continue,
                    Place::Bytes { file, offset, checked } => {
                        bytes.unchecked &= !checked;
                        (file, *offset, size)
                    }
                    Place::Encoded { file, offset, len } => (file, *offset, *len),
                    Place::Single { file, len } => {
                        bytes.exact &= *len <= slot_bytes;
                        (file, 0, *len)
                    }
                };
                bytes.spans.entry(file.clone()).or_default().insert((offset, offset + len));
            }
        }
        bytes
    }
}

/// Wanted bytes of files: disjoint, sorted spans.
struct Bytes {
    spans: BTreeMap<String, BTreeSet<(u64, u64)>>,
    /// Whether the spans are known to the byte.
    exact: bool,
    /// Whether none is part of something with a checksum, which may be read whole for that.
    unchecked: bool,
}

impl Bytes {
    fn count(&self) -> u64 {
        self.spans.values().flatten().map(|(start, end)| end - start).sum()
    }
}

fn limits(tape: &mut Tape<'_>) -> Limits {
    let slot_bytes = tape.one_of(&[1 << 20, 16, 24, 40, 64, 256, 4096, 65_536]);
    Limits {
        staging_bytes: 64 << 20,
        slot_bytes,
        workers: 1 + tape.below(4) as u32,
        merge_gap_bytes: tape.one_of(&[0, 1, 4, 9, 33, 200, 5_000, 1 << 30]),
        verify: tape.one_of(&[Verify::Auto, Verify::Full, Verify::Off]),
        counts_plan: true,
    }
}

fn options(tape: &mut Tape<'_>) -> EngineOptions {
    let threads = 1 + tape.below(3);
    EngineOptions {
        // From the smallest that is taken: slots of 64 KiB, and room for the ends of direct reads.
        staging_bytes: (72 << 10) * 2 * (threads + 3) * (1 + tape.below(4)),
        threads: threads as usize,
        reader_threads: 1 + tape.below(3) as usize,
        merge_gap_bytes: tape.one_of(&[0, 1, 9, 200, 5_000, 1 << 30]),
        verify: tape.one_of(&[Verify::Auto, Verify::Full, Verify::Off]),
        io: tape.one_of(&READERS),
        ..EngineOptions::default()
    }
}

/// What this machine reads with.
static READERS: LazyLock<Vec<Io>> = LazyLock::new(|| match touchdown::io::uring_setup() {
    Ok(()) => vec![Io::Pread, Io::Uring, Io::Auto],
    Err(error) => {
        // Past the capturing of tests; where stderr is closed there is nobody to tell.
        let _ = writeln!(std::io::stderr(), "skipped: the laws are not tested with io_uring: {error:?}");
        vec![Io::Pread]
    }
});

/// The ranges of files that units read: file, start, end.
fn unit_ranges(plan: &Plan) -> Vec<(u32, u64, u64)> {
    let range = |unit: &touchdown::plan::Unit| match unit.source {
        Source::File { file, offset, len } => Some((file, offset, offset + len)),
        Source::Inline(_) | Source::Fill(_) => None,
    };
    plan.units.iter().filter_map(range).collect()
}

fn assert_disjoint(mut ranges: Vec<(u32, u64, u64)>, what: &str) {
    ranges.sort_unstable();
    for pair in ranges.windows(2) {
        let apart = pair[0].0 != pair[1].0 || pair[0].2 <= pair[1].1;
        assert!(apart, "two {what} read the same bytes: {pair:?}");
    }
}

fn load(case: &Case, engine: &Engine, rank: u32) -> State {
    let target = case.request.target(&case.checkpoint, &case.layout.mesh(rank));
    engine.load(&case.checkpoint, &target).unwrap().wait().unwrap()
}

#[test]
fn the_shards_of_all_ranks_are_the_naive_slices_of_the_stored_values() {
    check(250, true, "shards compared", |case, tape| {
        let mut options = options(tape);
        // A decoder or the plan may need more than the budget has. What the error then names is enough for what it names, and of
        // several needs one is met after the other.
        for rank in case.ranks() {
            let target = case.request.target(&case.checkpoint, &case.layout.mesh(rank));
            while let Err(error) = case.checkpoint.plan_within(&target, options.limits().unwrap()) {
                assert_eq!(error.kind(), ErrorKind::Budget, "{error}");
                let hint = error.advice().unwrap_or_default().split("--memory ").nth(1).unwrap_or_default();
                let needed: u64 = hint.split('`').next().unwrap_or_default().parse().unwrap();
                assert!(needed > options.staging_bytes, "{error}");
                options.staging_bytes = needed;
            }
        }
        let engine = Engine::new(options).unwrap();
        let mut compared = 0;
        let mut seen = vec![HashSet::new(); case.request.wanted.len()];
        for rank in case.ranks() {
            let state = load(case, &engine, rank);
            let names: Vec<String> = state.leaves().map(|(path, _)| path.to_string()).collect();
            assert_eq!(names, case.request.wanted.iter().map(|leaf| leaf.name.clone()).collect::<Vec<_>>());
            let mut bytes_logical = 0;
            for (leaf, seen) in case.request.wanted.iter().zip(&mut seen) {
                let array = state.array(&leaf.name).unwrap();
                assert_eq!((&array.shape, array.dtype, array.lossy), (&leaf.shape, leaf.dtype, 0));
                let positions: Vec<usize> = array.shards().iter().map(|shard| shard.position).collect();
                assert_eq!(positions, case.local(rank), "only the rank's own devices, in mesh order");
                for shard in array.shards() {
                    assert_eq!(shard.device, case.layout.devices[shard.position].device);
                    let bounds = case.layout.bounds(&leaf.shape, &leaf.spec, shard.position);
                    let have: Vec<(u64, u64)> =
                        (0..leaf.shape.len()).map(|dim| (shard.region.start[dim], shard.region.end(dim))).collect();
                    assert_eq!(have, bounds);
                    let expected = case.expected(leaf, shard.position);
                    assert!(shard.bytes().unwrap() == expected, "{} on device {}", leaf.name, shard.position);
                    seen.extend(case.held(leaf, shard.position));
                    compared += 1;
                }
                bytes_logical += (volume(&leaf.shape) * leaf.dtype.size()) as u64;
            }
            let (plan, report) = (case.plan(rank, engine.limits()), state.report());
            assert_eq!(report.bytes_logical, bytes_logical);
            assert_eq!((report.bytes_read, report.requests), (plan.bytes_read(), plan.requests()));
            let staging = report.peak_host_bytes - plan.result_bytes();
            assert!(staging <= options.staging_bytes, "{staging} of {} bytes", options.staging_bytes);
            assert!(report.peak_host_bytes <= plan.peak_host_bytes(), "the plan forecast less than was held");
        }
        for (leaf, seen) in case.request.wanted.iter().zip(seen) {
            assert_eq!(seen.len(), volume(&leaf.shape), "the shards of all ranks cover {}", leaf.name);
        }
        compared
    });
}

#[test]
fn every_element_is_on_as_many_devices_as_the_unused_axes_have() {
    check(150, false, "elements counted", |case, _| {
        let plan = case.plan(0, EngineOptions::default().limits().unwrap());
        let mut counted = 0;
        for (leaf, planned) in case.request.wanted.iter().zip(&plan.leaves) {
            let unused =
                case.layout.axes.iter().filter(|(name, _)| !leaf.spec.iter().flatten().any(|axis| axis == name));
            let copies: u64 = unused.map(|(_, size)| *size).product();
            let mut count = vec![0u64; volume(&leaf.shape)];
            for part in &planned.parts {
                for index in indices(&part.region.extent) {
                    let index: Vec<u64> = index.iter().zip(&part.region.start).map(|(at, start)| at + start).collect();
                    count[laws::grid::position(&index, &leaf.shape)] += 1;
                }
            }
            assert!(count.iter().all(|have| *have == copies), "{}: {count:?}, expected {copies}", leaf.name);
            counted += count.len() as u64;
        }
        counted
    });
}

#[test]
fn every_wanted_byte_is_read_by_one_unit_and_no_byte_by_two() {
    check(400, false, "wanted bytes found", |case, tape| {
        let limits = limits(tape);
        let mut found = 0;
        for rank in case.ranks() {
            let plan = case.plan(rank, limits);
            let ranges = unit_ranges(&plan);
            assert_disjoint(ranges.clone(), "units");
            let wanted = case.bytes_of(&case.needed(rank), limits.slot_bytes);
            for (file, spans) in &wanted.spans {
                let number = plan.files.iter().position(|have| have.to_string() == *file);
                if number.is_none() && !wanted.exact {
                    continue;
                }
                let number = number.unwrap_or_else(|| panic!("{file} is not read")) as u32;
                for &(start, end) in spans {
                    // A wanted span may be cut where one range ends and the next begins.
                    let inside = ranges.iter().filter(|range| range.0 == number);
                    let covered: u64 = inside.map(|range| range.2.min(end).saturating_sub(range.1.max(start))).sum();
                    if wanted.exact {
                        assert_eq!(covered, end - start, "{file} {start}..{end}");
                    }
                    found += covered;
                }
            }
            if wanted.exact {
                assert_eq!(plan.files.len(), wanted.spans.len(), "a file is opened that holds nothing wanted");
            }
        }
        found
    });
}

#[test]
fn needed_bytes_are_exactly_the_wanted_ones_and_only_small_gaps_are_read_with_them() {
    check(400, false, "bytes needed", |case, tape| {
        let limits = limits(tape);
        let mut needed = 0;
        for rank in case.ranks() {
            let plan = case.plan(rank, limits);
            let wanted = case.bytes_of(&case.needed(rank), limits.slot_bytes);
            assert!(plan.bytes_needed() <= plan.bytes_read(), "{} of {}", plan.bytes_needed(), plan.bytes_read());
            let units: u64 = plan.units.iter().map(touchdown::plan::Unit::stored_bytes).sum();
            let costs = plan.device_costs();
            for cost in &costs {
                assert!(
                    cost.needed <= cost.read && cost.read <= units && cost.decoded <= plan.bytes_decoded(),
                    "{cost:?}"
                );
            }
            // What is needed at all is needed by somebody, and nobody needs what is not needed at all.
            assert!(costs.iter().map(|cost| cost.needed).sum::<u64>() >= plan.bytes_needed());
            if let [alone] = costs.as_slice() {
                assert_eq!((alone.read, alone.decoded), (units, plan.bytes_decoded()));
            }
            if !wanted.exact {
                continue;
            }
            assert_eq!(plan.bytes_needed(), wanted.count(), "the bytes that hold wanted elements");
            if !wanted.unchecked {
                continue;
            }
            if limits.merge_gap_bytes == 0 {
                assert_eq!(plan.bytes_read(), wanted.count(), "without merging nothing else is read");
            }
            for read in plan.batches.iter().filter_map(|batch| batch.read) {
                let file = plan.files[read.file as usize].to_string();
                let mut at = read.offset;
                let inside =
                    wanted.spans[&file].iter().filter(|span| span.1 > read.offset && span.0 < read.offset + read.len);
                for &(start, end) in inside {
                    assert!(start.saturating_sub(at) <= limits.merge_gap_bytes, "a gap of {} bytes", start - at);
                    at = end;
                }
                assert!((read.offset + read.len).saturating_sub(at) <= limits.merge_gap_bytes);
            }
            needed += wanted.count();
        }
        needed
    });
}

#[test]
fn batches_name_every_unit_once_in_order_and_stay_within_a_slot() {
    check(300, false, "batches", |case, tape| {
        let limits = limits(tape);
        let plan = case.plan(0, limits);
        let mut next = 0;
        for batch in &plan.batches {
            assert_eq!(batch.units.start, next);
            assert!(batch.units.end > next, "an empty batch");
            next = batch.units.end;
            let units = &plan.units[batch.units.start as usize..batch.units.end as usize];
            for unit in units {
                match (&unit.source, batch.read) {
                    (Source::File { file, offset, len }, Some(read)) => {
                        assert_eq!(*file, read.file);
                        assert!(read.offset <= *offset && offset + len <= read.offset + read.len);
                    }
                    (Source::Inline(_) | Source::Fill(_), None) => {}
                    other => panic!("a unit in the wrong batch: {other:?}"),
                }
            }
            let large = batch.read.is_some_and(|read| read.len > limits.slot_bytes);
            assert!(!large || units.len() == 1, "merging made a read larger than a slot");
        }
        assert_eq!(next as usize, plan.units.len());
        if !case.request.is_ordered() {
            let reads = plan.batches.iter().filter_map(|batch| batch.read);
            assert_disjoint(reads.map(|read| (read.file, read.offset, read.offset + read.len)).collect(), "batches");
        }
        plan.batches.len() as u64
    });
}

#[test]
fn placements_fill_every_wanted_element_of_a_shard_once() {
    check(200, false, "elements placed", |case, tape| {
        let limits = limits(tape);
        let mut placed = 0;
        for rank in case.ranks() {
            let plan = case.plan(rank, limits);
            let mut written: Vec<Vec<bool>> =
                plan.shards.iter().map(|shard| vec![false; shard.region.volume() as usize]).collect();
            for unit in &plan.units {
                for placement in &unit.placements {
                    for index in indices(&placement.region.extent) {
                        let steps: u64 = index.iter().zip(&placement.strides).map(|(at, stride)| at * stride).sum();
                        let slot = &mut written[placement.shard as usize][(placement.start + steps) as usize];
                        assert!(!std::mem::replace(slot, true), "an element is written twice");
                        placed += 1;
                    }
                }
            }
            for (shard, written) in plan.shards.iter().zip(written) {
                let leaf = &case.request.wanted[shard.leaf as usize];
                for (index, written) in indices(&shard.region.extent).into_iter().zip(written) {
                    let index: Vec<u64> = index.iter().zip(&shard.region.start).map(|(at, start)| at + start).collect();
                    assert_eq!(written, leaf.at(&index).is_some(), "{} at {index:?}", leaf.name);
                    assert!(written || shard.init.is_some(), "padding that nobody writes");
                }
            }
        }
        placed
    });
}

#[test]
fn a_device_holds_the_same_wherever_the_mesh_lists_it() {
    check(200, false, "parts compared", |case, tape| {
        let limits = limits(tape);
        let mut compared = 0;
        let turned = case.layout.with_axes(&tape.order(case.layout.axes.len()));
        for rank in case.ranks() {
            let plan = case.plan(rank, limits);
            let target = case.request.target(&case.checkpoint, &turned.mesh(rank));
            let other = case.checkpoint.plan_within(&target, limits).unwrap();
            assert_eq!((plan.bytes_read(), plan.bytes_needed()), (other.bytes_read(), other.bytes_needed()));
            assert_eq!(plan.units.len(), other.units.len());
            for (leaf, other) in plan.leaves.iter().zip(&other.leaves) {
                for (part, device) in leaf.parts.iter().zip(&case.layout.devices) {
                    let at = turned.devices.iter().position(|have| have == device).unwrap();
                    assert_eq!(part.region, other.parts[at].region);
                    assert_eq!(part.shard.is_some(), other.parts[at].shard.is_some());
                    compared += 1;
                }
            }
        }
        compared
    });
}

#[test]
fn planning_again_gives_the_same_plan() {
    check(150, false, "bytes of plans compared", |case, tape| {
        let limits = limits(tape);
        let text = || format!("{:?}", case.plan(0, limits));
        let (one, two) = (text(), text());
        assert!(one == two, "two plans of one target differ");
        one.len() as u64
    });
}

#[test]
fn a_rank_plans_its_own_shards_and_nothing_else() {
    check(200, false, "shards", |case, tape| {
        let limits = limits(tape);
        let mut shards = 0;
        for rank in case.ranks() {
            let plan = case.plan(rank, limits);
            for (number, shard) in plan.shards.iter().enumerate() {
                assert!(!shard.devices.is_empty());
                for &device in &shard.devices {
                    assert_eq!(case.layout.devices[device as usize].rank, rank);
                    assert_eq!(plan.leaves[shard.leaf as usize].parts[device as usize].shard, Some(number as u32));
                }
            }
            let distinct: HashSet<_> = plan.shards.iter().map(|shard| (shard.leaf, &shard.region)).collect();
            assert_eq!(distinct.len(), plan.shards.len(), "replicas share one shard");
            for leaf in &plan.leaves {
                assert_eq!(leaf.policy, CastPolicy::Saturate);
                let local: Vec<usize> = (0..leaf.parts.len()).filter(|&at| leaf.parts[at].shard.is_some()).collect();
                assert_eq!(local, case.local(rank));
            }
            assert!(!case.local(rank).is_empty() || plan.units.is_empty(), "a rank without devices reads something");
            shards += plan.shards.len() as u64;
        }
        shards
    });
}
