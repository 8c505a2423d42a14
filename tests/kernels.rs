//! The device's kernels, compiled for the host, against the processor's executor, which defines the answer; and the committed
//! PTX and the code that is made in advance against their sources. No device is needed: `tests/kernels/shim.cpp` runs a launch as
//! a loop over blocks and threads.

#![allow(
    unsafe_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "tests fail by panicking and say what they compared; the kernels are called through C"
)]

#[path = "../build.rs"]
#[allow(dead_code, reason = "the rest is for cargo")]
mod build;
#[path = "kernels/specimens.rs"]
mod specimens;
mod support;

use std::fs;
use std::mem::offset_of;
use std::path::Path;
use std::process::Command;
use std::ptr;
use std::sync::OnceLock;

use libloading::{Library, Symbol};
use proptest::prelude::*;
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect, munmap};
use specimens::{noise, specimens};
use support::{SKIP_KERNELS_VARIABLE, compiler_python, is_set, kernels_of_the_host, repository, scratch, skipped};
use touchdown::limits::KERNEL_RANK_MAX;
use touchdown::transform::cpu::{SharedBytes, castable, execute};
use touchdown::transform::cuda::{Descriptor, Flags, Kernel, Launch, PTX, Placement, THREADS, Tally, lower};
use touchdown::transform::{Convert, Op};
use touchdown::{CastPolicy, DType};

type LaunchFn = unsafe extern "C" fn(u64, *const Descriptor, *const u64, u32, *mut Tally);

/// The kernels as a library of the host, built once; `None` (and a printed line) if the caller is to be skipped.
fn kernels(test: &str) -> Option<&'static Library> {
    static LIBRARY: OnceLock<Library> = OnceLock::new();
    if is_set(SKIP_KERNELS_VARIABLE) {
        skipped(test, &format!("{SKIP_KERNELS_VARIABLE} is set"));
        return None;
    }
    Some(LIBRARY.get_or_init(|| {
        let built = kernels_of_the_host().unwrap_or_else(|reason| {
            panic!("{test}: {reason}; {SKIP_KERNELS_VARIABLE}=1 skips the tests that need a compiler")
        });
        // SAFETY: the library is ours and has no initialisers.
        unsafe { Library::new(&built) }.unwrap_or_else(|e| panic!("{}: {e}", built.display()))
    }))
}

fn symbol<T>(library: &'static Library, name: &str) -> Symbol<'static, T> {
    // SAFETY: callers name the type that `shim.cpp` declares.
    unsafe { library.get(name.as_bytes()) }.unwrap_or_else(|e| panic!("{name}: {e}"))
}

/// Runs launches with few blocks, so that blocks take several tiles, or with one block a tile.
fn launch(library: &'static Library, launches: &[Launch], blocks: Option<u64>, tallies: &mut [Tally]) {
    for launch in launches {
        let run = symbol::<LaunchFn>(library, &format!("launch_{}", launch.kernel.name()));
        let blocks = blocks.unwrap_or(launch.blocks().into());
        let boxes = launch.descriptors.len() as u32;
        // SAFETY: the tables have the lengths that the kernels expect, and the boxes lie in memory of the caller's.
        unsafe { run(blocks, launch.descriptors.as_ptr(), launch.first_tile.as_ptr(), boxes, tallies.as_mut_ptr()) };
    }
}

/// Memory between pages that cannot be touched: an access before or past it ends the process, or changes the margin.
struct Fenced {
    base: *mut u8,
    mapped: usize,
    margin: usize,
    len: usize,
}

const PAGE: usize = 1 << 16;
const MARGIN: u8 = 0xEE;

impl Fenced {
    /// Starts `margin` bytes after the first fence, or, without one, ends at the last.
    fn new(bytes: &[u8], margin: Option<usize>) -> Self {
        let inner = (bytes.len() + margin.unwrap_or(0)).max(1).next_multiple_of(PAGE);
        let mapped = inner + 2 * PAGE;
        // SAFETY: fresh memory at an address of the kernel's choice; its inner part becomes accessible.
        let base = unsafe {
            let base = mmap_anonymous(ptr::null_mut(), mapped, ProtFlags::empty(), MapFlags::PRIVATE).expect("memory");
            mprotect(base.cast::<u8>().add(PAGE).cast(), inner, MprotectFlags::READ | MprotectFlags::WRITE)
                .expect("access");
            base.cast::<u8>()
        };
        let mut fenced = Self { base, mapped, margin: margin.unwrap_or(inner - bytes.len()), len: bytes.len() };
        fenced.inner().fill(MARGIN);
        let margin = fenced.margin;
        fenced.inner()[margin..][..bytes.len()].copy_from_slice(bytes);
        fenced
    }

    fn inner(&mut self) -> &mut [u8] {
        // SAFETY: the part between the fences, which is ours.
        unsafe { std::slice::from_raw_parts_mut(self.base.add(PAGE), self.mapped - 2 * PAGE) }
    }

    fn address(&self) -> u64 {
        self.base as u64 + (PAGE + self.margin) as u64
    }

    /// What it holds, after a look at the margins.
    fn bytes(&mut self) -> &[u8] {
        let (margin, len) = (self.margin, self.len);
        let inner = self.inner();
        let outside = inner[..margin].iter().chain(&inner[margin + len..]);
        assert!(outside.copied().all(|byte| byte == MARGIN), "a kernel wrote outside the target");
        &inner[margin..][..len]
    }
}

impl Drop for Fenced {
    fn drop(&mut self) {
        // SAFETY: what `new` has mapped.
        unsafe { munmap(self.base.cast(), self.mapped) }.expect("unmapped");
    }
}

/// What the processor makes of a batch that shares its buffers.
fn on_processor(ops: &[Op], source: &[u8], target: &mut [u8]) -> Vec<u64> {
    // SAFETY: the slice is borrowed for the whole call and only this thread uses it.
    let shared = unsafe { SharedBytes::new(target.as_mut_ptr(), target.len()) };
    // SAFETY: as above.
    ops.iter().map(|op| unsafe { execute(op, source, &shared) }.expect("the processor takes it")).collect()
}

/// What the kernels make of it: through `lower`, or with the generic kernel alone.
fn on_kernels(
    library: &'static Library,
    ops: &[Op],
    source: &mut Fenced,
    target: &mut Fenced,
    blocks: Option<u64>,
) -> Vec<u64> {
    let (from, to) = ((source.address(), source.len), (target.address(), target.len));
    let placements: Vec<Placement<'_>> = ops
        .iter()
        .zip(0..)
        .map(|(op, counter)| Placement {
            op,
            source: from.0,
            source_bytes: from.1,
            target: to.0,
            target_bytes: to.1,
            counter,
        })
        .collect();
    let mut tallies = vec![Tally::default(); ops.len()];
    launch(library, &lower(&placements).expect("kernels take it"), blocks, &mut tallies);
    assert!(tallies.iter().all(|tally| tally.invalid == 0));
    tallies.iter().map(|tally| tally.lossy).collect()
}

/// A run of elements for the generic kernel, whatever `lower` would choose.
fn generic_run(convert: Convert, count: u64, source: u64, target: u64) -> Launch {
    let code = |dtype: DType| DType::ALL.iter().position(|other| *other == dtype).unwrap() as u8;
    let mut descriptor = Descriptor {
        source,
        target,
        count,
        extent: [1; KERNEL_RANK_MAX],
        rank: 1,
        source_unit: convert.from.size() as u16,
        target_unit: convert.to.size() as u16,
        from: code(convert.from),
        to: code(convert.to),
        flags: if convert.swap { Flags::SWAP } else { 0 }
            | if convert.policy == CastPolicy::Wrap { Flags::WRAP } else { 0 },
        ..Descriptor::default()
    };
    (descriptor.extent[0], descriptor.source_stride[0], descriptor.target_stride[0]) = (count, 1, 1);
    Launch { kernel: Kernel::Place, descriptors: vec![descriptor], first_tile: vec![0, count.div_ceil(16 * 256)] }
}

fn run_op(convert: Convert, count: u64) -> Op {
    Op {
        extent: vec![count],
        source_strides: vec![1],
        target_strides: vec![1],
        source_start: 0,
        target_start: 0,
        convert,
    }
}

#[test]
fn every_cast_equals_the_processors() {
    let Some(library) = kernels("every_cast_equals_the_processors") else { return };
    let (mut compared, mut casts) = (0, 0);
    for from in DType::ALL {
        let stored = specimens(from);
        let count = (stored.len() / from.size()) as u64;
        let source = Fenced::new(&stored, None);
        for to in DType::ALL.into_iter().filter(|to| castable(from, *to)) {
            for (policy, swap) in [
                (CastPolicy::Saturate, false),
                (CastPolicy::Wrap, false),
                (CastPolicy::Error, false),
                (CastPolicy::Saturate, true),
            ] {
                // The policy is about integers, and the swap about elements of several bytes.
                if policy != CastPolicy::Saturate && !to.is_int() || swap && from.size() == 1 {
                    continue;
                }
                let convert = Convert { from, to, swap, policy };
                let mut want = vec![0xA5; count as usize * to.size()];
                let lossy = on_processor(&[run_op(convert, count)], &stored, &mut want);
                let mut target = Fenced::new(&vec![0x5A; want.len()], Some(0));
                let mut tallies = [Tally::default()];
                launch(library, &[generic_run(convert, count, source.address(), target.address())], None, &mut tallies);
                let got = target.bytes();
                if got != want {
                    let wrong = |at: &usize| got[at * to.size()..][..to.size()] != want[at * to.size()..][..to.size()];
                    let at = (0..count as usize).find(wrong).unwrap();
                    let hex = |bytes: &[u8], size| format!("{:02x?}", &bytes[at * size..][..size]);
                    panic!(
                        "{convert:?}: element {at}, {}, gives {}, not {}",
                        hex(&stored, from.size()),
                        hex(got, to.size()),
                        hex(&want, to.size())
                    );
                }
                assert_eq!([tallies[0].lossy], lossy[..], "{convert:?}: lossy elements");
                assert_eq!(tallies[0].invalid, 0);
                compared += count;
                casts += 1;
            }
        }
    }
    println!("{casts} casts, {compared} elements equal");
}

#[test]
fn vectors_cast_as_single_elements() {
    let Some(library) = kernels("vectors_cast_as_single_elements") else { return };
    use DType::{BFloat16, Float8E4M3FN, Float8E5M2, Float16, Float32};
    let floats = [Float32, Float16, BFloat16, Float8E4M3FN, Float8E5M2];
    let mut vectors = 0;
    for (from, to) in floats.into_iter().flat_map(|from| floats.map(|to| (from, to))).filter(|(from, to)| from != to) {
        let stored = specimens(from);
        let count = (stored.len() / from.size()) as u64;
        let op = run_op(Convert { from, to, swap: false, policy: CastPolicy::Saturate }, count);
        let mut want = vec![0; count as usize * to.size()];
        let lossy = on_processor(std::slice::from_ref(&op), &stored, &mut want);
        for (shift, blocks) in [(0, None), (4, Some(3)), (1, Some(1))] {
            let mut source = Fenced::new(&stored, Some(shift * from.size()));
            let mut target = Fenced::new(&vec![0; want.len()], Some(shift * to.size()));
            let got = on_kernels(library, std::slice::from_ref(&op), &mut source, &mut target, blocks);
            assert_eq!(got, lossy, "{from} to {to}");
            assert!(target.bytes() == want, "{from} to {to}, {shift} elements off");
            vectors += 1;
        }
    }
    println!("{vectors} runs equal");
}

#[test]
fn invalid_bools_are_counted() {
    let Some(library) = kernels("invalid_bools_are_counted") else { return };
    let stored: Vec<u8> = (0..=255).collect();
    let source = Fenced::new(&stored, None);
    for to in [DType::Bool, DType::Float32] {
        let convert = Convert { from: DType::Bool, to, swap: false, policy: CastPolicy::Saturate };
        let target = Fenced::new(&vec![0; 256 * to.size()], None);
        let mut op = run_op(convert, 256);
        let place = |op: &Op| {
            let placement = Placement {
                op,
                source: source.address(),
                source_bytes: 256,
                target: target.address(),
                target_bytes: 256 * to.size(),
                counter: 1,
            };
            let mut tallies = [Tally::default(); 2];
            launch(library, &lower(&[placement]).unwrap(), None, &mut tallies);
            tallies
        };
        assert_eq!(place(&op), [Tally::default(), Tally { lossy: 0, invalid: 254 }]);
        (op.source_start, op.source_strides) = (7, vec![0]);
        assert_eq!(place(&op), [Tally::default(), Tally { lossy: 0, invalid: 256 }]);
    }
}

/// One box of a batch: what is copied, in which order of dimensions, with which gaps, and whether it is a fill.
#[derive(Clone, Debug)]
struct Shape {
    extent: Vec<u64>,
    seed: u64,
    gaps: (u64, u64),
    fill: bool,
    convert: Convert,
}

fn shapes() -> impl Strategy<Value = Shape> {
    let extent = prop_oneof![
        prop::collection::vec(1u64..7, 0..6),
        prop::collection::vec(1u64..90, 1..3),
        prop::collection::vec(200u64..5000, 1..2),
        (1u64..4, 16u64..150, 16u64..150).prop_map(|(a, b, c)| vec![a, b, c]),
        prop::collection::vec(1u64..12, 1..3).prop_map(|extent| extent.iter().map(|extent| extent * 8).collect()),
    ];
    let dtype = || {
        use DType::*;
        let common = vec![Float32, BFloat16, Float16, Int8, Float64, Int64, Complex128, Complex64, Int4, UInt16];
        prop_oneof![3 => prop::sample::select(common), 1 => prop::sample::select(DType::ALL.to_vec())]
    };
    let types = (dtype(), dtype(), any::<bool>(), prop::bool::weighted(0.2)).prop_filter_map(
        "no cast",
        |(from, to, same, swap)| {
            let to = if same { from } else { to };
            let policy = if swap { CastPolicy::Wrap } else { CastPolicy::Saturate };
            castable(from, to).then_some(Convert { from, to, swap, policy })
        },
    );
    let gap = || prop_oneof![Just(0u64), Just(8), 0u64..9];
    (extent, any::<u64>(), (gap(), gap()), prop::bool::weighted(0.15), types)
        .prop_map(|(extent, seed, gaps, fill, convert)| Shape { extent, seed, gaps, fill, convert })
}

impl Shape {
    /// The op, with the byte offsets of its parts of the two buffers, which end where it says then.
    fn op(&self, source_end: &mut u64, target_end: &mut u64) -> Op {
        let rank = self.extent.len();
        let mut order: Vec<usize> = (0..rank).collect();
        order.sort_by_key(|&dim| self.seed.rotate_left(dim as u32 * 7) % 97);
        let strides = |extents: &[u64], gap: u64| {
            let mut stride = 1;
            let mut strides: Vec<u64> = extents
                .iter()
                .enumerate()
                .rev()
                .map(|(dim, extent)| {
                    let own = stride;
                    stride *= if dim + 1 == extents.len() { extent + gap } else { *extent };
                    own
                })
                .collect();
            strides.reverse();
            (strides, stride)
        };
        let (source_strides, source_span) = strides(&self.extent, self.gaps.0);
        let turned: Vec<u64> = order.iter().map(|&dim| self.extent[dim]).collect();
        let (turned_strides, target_span) = strides(&turned, self.gaps.1);
        let mut target_strides = vec![0; rank];
        for (at, &dim) in order.iter().enumerate() {
            target_strides[dim] = turned_strides[at];
        }
        let (from, to) = (self.convert.from.size() as u64, self.convert.to.size() as u64);
        // Ops count in elements, so each box starts at a whole number of its own.
        let source_start = source_end.div_ceil(from);
        let target_start = target_end.div_ceil(to);
        *source_end = (source_start + source_span) * from;
        *target_end = (target_start + target_span) * to;
        Op {
            extent: self.extent.clone(),
            source_strides: if self.fill { vec![0; rank] } else { source_strides },
            target_strides,
            source_start,
            target_start,
            convert: self.convert,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn batches_of_boxes_equal_the_processors(
        shapes in prop::collection::vec(shapes(), 1..6),
        margins in (prop::option::of(0usize..20), prop::option::of(0usize..20)),
        blocks in prop::option::of(1u64..5),
        seed in any::<u64>(),
    ) {
        let Some(library) = kernels("batches_of_boxes_equal_the_processors") else { return Ok(()) };
        let (mut source_end, mut target_end) = (0, 0);
        let ops: Vec<Op> = shapes.iter().map(|shape| shape.op(&mut source_end, &mut target_end)).collect();
        let bools = shapes.iter().any(|shape| shape.convert.from == DType::Bool);
        let mask = if bools { 1 } else { 0xFF };
        let stored: Vec<u8> = noise(seed).flat_map(u64::to_le_bytes).map(|byte| byte & mask).take(source_end as usize).collect();

        let mut want = vec![0x5A; target_end as usize];
        let mut source = Fenced::new(&stored, margins.0);
        let mut target = Fenced::new(&want, margins.1);
        let lossy = on_processor(&ops, &stored, &mut want);
        let got = on_kernels(library, &ops, &mut source, &mut target, blocks);
        prop_assert_eq!(got, lossy);
        prop_assert!(target.bytes() == want, "the targets differ");
        prop_assert!(source.bytes() == stored);
    }
}

#[test]
fn host_and_kernels_agree_on_layouts() {
    let Some(library) = kernels("host_and_kernels_agree_on_layouts") else { return };
    let want = [
        size_of::<Descriptor>(),
        offset_of!(Descriptor, source),
        offset_of!(Descriptor, target),
        offset_of!(Descriptor, count),
        offset_of!(Descriptor, extent),
        offset_of!(Descriptor, source_stride),
        offset_of!(Descriptor, target_stride),
        offset_of!(Descriptor, rank),
        offset_of!(Descriptor, counter),
        offset_of!(Descriptor, source_unit),
        offset_of!(Descriptor, target_unit),
        offset_of!(Descriptor, from),
        offset_of!(Descriptor, to),
        offset_of!(Descriptor, flags),
        size_of::<Tally>(),
        offset_of!(Tally, lossy),
        offset_of!(Tally, invalid),
        KERNEL_RANK_MAX,
        THREADS as usize,
    ];
    let mut got = [0u64; 64];
    // SAFETY: it writes fewer numbers than there is room for.
    let count = unsafe { symbol::<unsafe extern "C" fn(*mut u64) -> u64>(library, "layout")(got.as_mut_ptr()) };
    assert_eq!(got[..want.len()], want.map(|number| number as u64));
    // The numbers that cut tiles, as `src/transform/cuda/batch.rs` has them.
    let cuts = [16 * 256, 4 * 256, 4 * 256, 8 * 256, 64, 8, 16];
    assert_eq!(got[want.len()..count as usize], cuts);
    let size = symbol::<unsafe extern "C" fn(u32) -> u32>(library, "element_size");
    for (code, dtype) in (0..).zip(DType::ALL) {
        // SAFETY: a pure function.
        assert_eq!(unsafe { size(code) } as usize, dtype.size(), "{dtype}");
    }
}

#[test]
fn the_committed_ptx_is_what_the_sources_compile_to() {
    let Some(python) = compiler_python("the_committed_ptx_is_what_the_sources_compile_to") else { return };
    let out = scratch("ptx").join("place.ptx");
    let script = repository().join("kernels/build_ptx.py");
    let run = Command::new(&python).arg(script).arg(&out).output().expect("Python runs");
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    let made = fs::read_to_string(&out).expect("the script writes it");
    assert!(made == PTX, "kernels/place.ptx is not what its sources compile to: run kernels/build_ptx.py");
    for kernel in Kernel::ALL {
        assert!(PTX.contains(&format!(".visible .entry {}(", kernel.name())), "{kernel:?}");
    }
    fs::remove_dir_all(out.parent().unwrap_or(Path::new(""))).expect("the folder can be removed");
}

/// What a build does that finds nvcc, which machines without a toolkit have from PyPI here.
#[test]
fn kernels_are_translated_in_advance_where_nvcc_is_found() {
    let Some(python) = compiler_python("kernels_are_translated_in_advance_where_nvcc_is_found") else { return };
    let lines =
        "import pathlib, sysconfig; print(pathlib.Path(sysconfig.get_paths()['purelib'], 'nvidia/cu13/bin/nvcc'))";
    let run = Command::new(&python).args(["-c", lines]).output().expect("Python runs");
    let nvcc = String::from_utf8(run.stdout).expect("a path");
    let folder = scratch("cubins");
    for architecture in build::ARCHITECTURES {
        let cubin = folder.join(format!("{architecture}.cubin"));
        build::compile(Path::new(nvcc.trim()), architecture, &cubin).unwrap_or_else(|reason| panic!("{reason}"));
        let bytes = fs::read(&cubin).expect("it was written");
        // An ELF file for EM_CUDA.
        assert!(bytes.starts_with(b"\x7fELF") && bytes[18..20] == [190, 0], "sm_{architecture}");
        for kernel in Kernel::ALL {
            let entry = format!(".text.{}\0", kernel.name());
            assert!(bytes.windows(entry.len()).any(|window| window == entry.as_bytes()), "{architecture}: {kernel:?}");
        }
    }
    fs::remove_dir_all(folder).expect("the folder can be removed");
}
