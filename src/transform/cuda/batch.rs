//! Ops to launches: which kernel copies a box, in which units, and how its tiles are counted.
//!
//! A box goes the fastest way that its types and addresses allow:
//!
//! ```text
//! one element everywhere              fill        words of as many elements as fit 16 bytes and the alignment
//! stored bytes are the wanted ones    transpose   if another dimension is contiguous in the source than in the target
//!                                     copy        words as large as addresses, strides and runs allow
//! f32, f16, bf16 to each other,       cast        if runs and strides are whole vectors of 8 elements, aligned
//! fp8 to f32 and bf16 and back
//! anything else                       place
//! ```
//!
//! A contiguous run whose both ends are not aligned, but whose middle is, becomes up to three boxes, so that no kernel has to
//! know about heads and tails. Boxes of a kernel are one launch.

#![allow(clippy::cast_possible_truncation, reason = "words have at most 16 bytes and ranks are bounded")]

use super::descriptor::{Descriptor, Flags, code};
use crate::dtype::{CastPolicy, DType};
use crate::limits::{ARRAY_BYTES_MAX, KERNEL_RANK_MAX};
use crate::transform::cpu::{CastError, OpError, castable};
use crate::transform::dims::{Dim, check_inside, merged, simplify};
use crate::transform::{Convert, Op};

/// Threads of a block, of every kernel.
pub const THREADS: u32 = 256;

/// An op, and where its two sides are.
#[derive(Clone, Copy, Debug)]
pub struct Placement<'a> {
    /// The box copy.
    pub op: &'a Op,
    /// Address of the source's element 0.
    pub source: u64,
    /// Bytes of the source.
    pub source_bytes: usize,
    /// Address of the target's element 0.
    pub target: u64,
    /// Bytes of the target.
    pub target_bytes: usize,
    /// Which [`Tally`](super::Tally) counts this op's lossy and invalid elements.
    pub counter: u32,
}

/// A kernel of `kernels/place.cu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kernel {
    /// Any types, strides and alignment.
    Place,
    /// Floats of 4, 2 and 1 bytes to each other, contiguous and aligned.
    Cast,
    /// Bytes as they are.
    Copy,
    /// Bytes as they are, two dimensions exchanged.
    Transpose,
    /// One element into every place.
    Fill,
}

/// One kernel over a table of boxes, in any number of blocks of [`THREADS`] threads. The kernel's arguments are the addresses
/// of copies of `descriptors` and `first_tile` in device memory, the number of descriptors, and the address of the tallies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// What is launched.
    pub kernel: Kernel,
    /// The boxes, at least one.
    pub descriptors: Vec<Descriptor>,
    /// Of each box, how many tiles those before it have; then, how many there are.
    pub first_tile: Vec<u64>,
}

/// Why ops cannot be given to kernels.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LowerError {
    /// The processor would refuse it too.
    #[error(transparent)]
    Op(#[from] OpError),
    /// More dimensions than a descriptor holds, after simplification.
    #[error("a box of {rank} dimensions that cannot be merged: kernels copy at most {KERNEL_RANK_MAX}")]
    Rank {
        /// Dimensions that are left.
        rank: usize,
    },
    /// More elements than the target has, so that some would be written twice.
    #[error("a box of {extent:?} elements in a target of {elements}: it writes elements twice")]
    Overlap {
        /// Extents of the box.
        extent: Vec<u64>,
        /// Elements of the target.
        elements: u64,
    },
    /// An array that is larger than any, or reaches past the end of the address space.
    #[error("an array of {bytes} bytes at address {address:#x} is larger than memory")]
    Memory {
        /// Where it starts.
        address: u64,
        /// Its length.
        bytes: usize,
    },
}

impl Kernel {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Place, Self::Cast, Self::Copy, Self::Transpose, Self::Fill];

    /// The name of the entry point.
    pub fn name(self) -> &'static str {
        match self {
            Self::Place => "touchdown_place",
            Self::Cast => "touchdown_cast",
            Self::Copy => "touchdown_copy",
            Self::Transpose => "touchdown_transpose",
            Self::Fill => "touchdown_fill",
        }
    }

    /// Tiles of a box: each kernel's head comment says what a tile is.
    fn tiles(self, box_: &Descriptor) -> u64 {
        let squares = |side: u64| {
            let (outer, plane) = box_.extent[..box_.rank as usize].split_at((box_.rank as usize).saturating_sub(2));
            outer.iter().product::<u64>() * plane.iter().map(|extent| extent.div_ceil(side)).product::<u64>()
        };
        let runs = |steps: u64| box_.count.div_ceil(steps * u64::from(THREADS));
        match self {
            Self::Place if box_.flags & Flags::SQUARES != 0 => squares(SQUARE_SIDE),
            Self::Place => runs(PLACE_STEPS),
            Self::Cast => runs(CAST_STEPS),
            Self::Copy => runs(COPY_STEPS),
            Self::Transpose => squares(MICRO_TILES * micro_side(u64::from(box_.source_unit))),
            Self::Fill => runs(FILL_STEPS),
        }
    }
}

impl Launch {
    /// Tiles of all boxes: more blocks than that have nothing to do.
    pub fn tiles(&self) -> u64 {
        self.first_tile.last().copied().unwrap_or(0)
    }

    /// A number of blocks that fills any device: one a tile, up to what a grid may have, or what one counter takes.
    pub fn blocks(&self) -> u32 {
        let most =
            if matches!(self.kernel, Kernel::Place | Kernel::Cast) { COUNTING_BLOCKS_MAX } else { GRID_BLOCKS_MAX };
        self.tiles().min(most) as u32
    }
}

/// Dimensions of a box that lies inside its arrays, as a kernel sees it: without those of extent 1, neighbours on end merged.
pub fn rank(op: &Op) -> usize {
    simplify(op).len()
}

/// Turns a batch of ops into at most one launch a kernel. Boxes without elements vanish.
///
/// # Errors
/// What the processor would refuse before it writes (a box that reaches outside, complex to bool), and boxes of too many
/// dimensions. Invalid stored bools are found by the kernels: see [`Tally::invalid`](super::Tally::invalid).
pub fn lower(placements: &[Placement<'_>]) -> Result<Vec<Launch>, LowerError> {
    let mut tables: [Vec<Descriptor>; Kernel::ALL.len()] = Default::default();
    for placement in placements {
        if placement.op.extent.contains(&0) {
            continue;
        }
        for (kernel, descriptor) in boxes(placement)? {
            tables[kernel as usize].push(descriptor);
        }
    }
    let launches = Kernel::ALL.into_iter().zip(tables).filter(|(_, table)| !table.is_empty());
    Ok(launches
        .map(|(kernel, descriptors)| {
            let mut first_tile = vec![0];
            let mut tiles = 0;
            for descriptor in &descriptors {
                tiles += kernel.tiles(descriptor);
                first_tile.push(tiles);
            }
            Launch { kernel, descriptors, first_tile }
        })
        .collect())
}

/// The boxes of one op that has elements.
fn boxes(placement: &Placement<'_>) -> Result<Vec<(Kernel, Descriptor)>, LowerError> {
    let Placement { op, source, source_bytes, target, target_bytes, counter } = *placement;
    let Convert { from, to, .. } = op.convert;
    if !castable(from, to) {
        return Err(OpError::from(CastError::ComplexToBool { from }).into());
    }
    for (address, bytes) in [(source, source_bytes), (target, target_bytes)] {
        let fits = bytes as u64 <= ARRAY_BYTES_MAX && address.checked_add(bytes as u64).is_some();
        fits.then_some(()).ok_or(LowerError::Memory { address, bytes })?;
    }
    check_inside(op, source_bytes, target_bytes)?;
    let elements = (target_bytes / to.size()) as u64;
    let volume = op.extent.iter().try_fold(1u64, |volume, extent| volume.checked_mul(*extent));
    if volume.is_none_or(|volume| volume > elements) {
        return Err(LowerError::Overlap { extent: op.extent.clone(), elements });
    }
    // From here on nothing overflows: positions and volumes are bounded by the bytes of the two sides.
    let part = Part {
        convert: op.convert,
        source: source + op.source_start * from.size() as u64,
        target: target + op.target_start * to.size() as u64,
        counter,
        dims: simplify(op),
    };
    if part.dims.len() > KERNEL_RANK_MAX {
        return Err(LowerError::Rank { rank: part.dims.len() });
    }
    if part.dims.iter().all(|dim| dim.source == 0) && !part.dims.is_empty() {
        return Ok(part.fill());
    }
    if op.convert.is_plain() {
        let turned = part.transpose();
        return Ok(turned.map_or_else(|| part.copy(), |turned| vec![turned]));
    }
    Ok(part.cast().unwrap_or_else(|| vec![part.place()]))
}

/// A box with its addresses; dimensions in elements, outermost in the target first.
#[derive(Clone, Debug)]
struct Part {
    convert: Convert,
    source: u64,
    target: u64,
    counter: u32,
    dims: Vec<Dim>,
}

impl Part {
    /// The sizes of an element on both sides.
    fn sizes(&self) -> (u64, u64) {
        (self.convert.from.size() as u64, self.convert.to.size() as u64)
    }

    fn descriptor(&self, dims: &[Dim], (source_unit, target_unit): (u64, u64)) -> Descriptor {
        let Convert { from, to, swap, policy } = self.convert;
        let mut descriptor = Descriptor {
            source: self.source,
            target: self.target,
            count: dims.iter().map(|dim| dim.extent as u64).product(),
            extent: [1; KERNEL_RANK_MAX],
            rank: dims.len().max(1) as u32,
            counter: self.counter,
            source_unit: source_unit as u16,
            target_unit: target_unit as u16,
            from: code(from),
            to: code(to),
            flags: if swap { Flags::SWAP } else { 0 } | if policy == CastPolicy::Wrap { Flags::WRAP } else { 0 },
            ..Descriptor::default()
        };
        for (at, dim) in dims.iter().enumerate().take(KERNEL_RANK_MAX) {
            descriptor.extent[at] = dim.extent as u64;
            descriptor.source_stride[at] = dim.source as u64;
            descriptor.target_stride[at] = dim.target as u64;
        }
        descriptor
    }

    /// Any types and strides.
    fn place(&self) -> (Kernel, Descriptor) {
        let mut dims = self.dims.clone();
        let squares = self.turned().is_some_and(|dense| {
            let last = dims.len() - 1;
            let large = dims[dense].extent >= SQUARE_WORTH && dims[last].extent >= SQUARE_WORTH;
            if large {
                let dim = dims.remove(dense);
                dims.insert(last - 1, dim);
            }
            large
        });
        let mut descriptor = self.descriptor(&dims, self.sizes());
        descriptor.flags |= if squares { Flags::SQUARES } else { 0 };
        (Kernel::Place, descriptor)
    }

    /// The dimension, other than the last, along which the source is denser than along the last.
    fn turned(&self) -> Option<usize> {
        let (last, outer) = self.dims.split_last()?;
        let dense = (0..outer.len()).filter(|&at| outer[at].source > 0).min_by_key(|&at| outer[at].source)?;
        (outer[dense].source < last.source).then_some(dense)
    }

    /// One element everywhere.
    fn fill(&self) -> Vec<(Kernel, Descriptor)> {
        let (_, size) = self.sizes();
        let whole = |part: &Self, word: u64| {
            let per_word = (word / size) as usize;
            let mut dims = part.dims.clone();
            if let (Some(last), true) = (dims.last_mut(), per_word > 1) {
                last.extent /= per_word;
            }
            let outer = dims.len() - 1;
            dims[..outer].iter_mut().for_each(|dim| dim.target /= per_word);
            // An element that is not aligned to its size is written byte by byte.
            (Kernel::Fill, part.descriptor(&dims, (part.sizes().0, word)))
        };
        let parts = self.split(|part| {
            let (last, outer) = part.dims.split_last()?;
            let fits = |word: u64| {
                let run = last.target == 1 && (last.extent as u64 * size).is_multiple_of(word);
                run && part.target.is_multiple_of(word)
                    && outer.iter().all(|dim| (dim.target as u64 * size).is_multiple_of(word))
            };
            // Of a run the middle is worth more than words that reach its ends.
            let words: &[u64] = if outer.is_empty() { &[16] } else { &[16, 8, 4, 2] };
            words.iter().copied().filter(|word| *word > size).find(|word| fits(*word))
        });
        parts.into_iter().map(|(part, word)| whole(&part, word.unwrap_or(size))).collect()
    }

    /// Stored bytes are the wanted ones, and the source is contiguous along another dimension than the target.
    fn transpose(&self) -> Option<(Kernel, Descriptor)> {
        let (size, _) = self.sizes();
        let dense = self.turned()?;
        let last = self.dims.len() - 1;
        if self.dims[dense].source != 1 || self.dims[last].target != 1 || self.dims[dense].extent < TRANSPOSE_WORTH {
            return None;
        }
        if size > 8 {
            return Some(self.place());
        }
        let mut dims = self.dims.clone();
        let dim = dims.remove(dense);
        dims.insert(last - 1, dim);
        let turned = self.descriptor(&dims, (size, size));
        // The kernel counts a box's tiles in 32 bits.
        let few = Kernel::Transpose.tiles(&turned) <= u64::from(u32::MAX);
        Some(if few { (Kernel::Transpose, turned) } else { self.place() })
    }

    /// Stored bytes are the wanted ones.
    fn copy(&self) -> Vec<(Kernel, Descriptor)> {
        let parts = self.split(|part| {
            // A run whose ends are not aligned is not worth words of less than 16 bytes if its middle is.
            Some(part.words().1).filter(|word| *word == 16 || part.dims.len() != 1 || part.dims[0].source != 1)
        });
        let described = parts.into_iter().map(|(part, _)| {
            let (dims, word) = part.words();
            if dims.len() > KERNEL_RANK_MAX {
                return part.place();
            }
            (Kernel::Copy, part.descriptor(&dims, (word, word)))
        });
        described.collect()
    }

    /// The box as one of words, and the bytes of a word.
    fn words(&self) -> (Vec<Dim>, u64) {
        let size = self.convert.from.size();
        let bytes = self.dims.iter().map(|dim| Dim {
            extent: dim.extent,
            source: dim.source * size,
            target: dim.target * size,
        });
        let element = Dim { extent: size, source: 1, target: 1 };
        let mut dims = merged(bytes.chain((size > 1).then_some(element)).collect());
        let run = |dim: &Dim| dim.source == 1 && dim.target == 1;
        let contiguous = dims.last().is_some_and(run);
        let outer = dims.len() - usize::from(contiguous);
        let strides = dims[..outer].iter().flat_map(|dim| [dim.source, dim.target]);
        let length = if contiguous { dims[outer].extent } else { 1 };
        let common = strides.fold(length as u64 | self.source | self.target | 16, |all, stride| all | stride as u64);
        let word = 1 << common.trailing_zeros();
        for dim in &mut dims[..outer] {
            *dim = Dim { extent: dim.extent, source: dim.source / word, target: dim.target / word };
        }
        if contiguous {
            dims[outer].extent /= word;
        }
        dims.retain(|dim| dim.extent > 1);
        (dims, word as u64)
    }

    /// Floats to each other, if the kernel has the pair and the box is one of whole vectors, or a run whose middle is.
    fn cast(&self) -> Option<Vec<(Kernel, Descriptor)>> {
        let Convert { from, to, swap, .. } = self.convert;
        if swap || !has_vectors(from, to) {
            return None;
        }
        let align = |dtype: DType| (dtype.size() * CAST_LANES).min(16) as u64;
        let parts = self.split(|part| {
            let (last, outer) = part.dims.split_last()?;
            let aligned = part.source.is_multiple_of(align(from)) && part.target.is_multiple_of(align(to));
            let whole = |elements: usize| elements.is_multiple_of(CAST_LANES);
            let fits = aligned && last.source == 1 && last.target == 1 && whole(last.extent);
            (fits && outer.iter().all(|dim| whole(dim.source) && whole(dim.target))).then_some(16)
        });
        let described = parts.into_iter().map(|(part, fits)| {
            if fits.is_none() {
                return part.place();
            }
            let mut dims = part.dims.clone();
            let outer = dims.len() - 1;
            dims[outer].extent /= CAST_LANES;
            for dim in &mut dims[..outer] {
                *dim = Dim { extent: dim.extent, source: dim.source / CAST_LANES, target: dim.target / CAST_LANES };
            }
            let (from, to) = part.sizes();
            (Kernel::Cast, part.descriptor(&dims, (from * CAST_LANES as u64, to * CAST_LANES as u64)))
        });
        Some(described.collect())
    }

    /// The whole box with what `fits` says of it; or, if that is nothing and the box is one long run, its head, its aligned
    /// middle and its tail.
    fn split(&self, fits: impl Fn(&Self) -> Option<u64>) -> Vec<(Self, Option<u64>)> {
        let whole = fits(self);
        let [Dim { extent, source: step, target: 1 }] = self.dims[..] else { return vec![(self.clone(), whole)] };
        if whole.is_some() || extent < SPLIT_WORTH || step > 1 {
            return vec![(self.clone(), whole)];
        }
        let (from, to) = self.sizes();
        let slice = |start: usize, extent: usize| Self {
            source: self.source + (start * step) as u64 * from,
            target: self.target + start as u64 * to,
            dims: vec![Dim { extent, source: step, target: 1 }],
            ..self.clone()
        };
        let middles = (0..ALIGNMENT).map(|head| (head, (extent - head) / ALIGNMENT * ALIGNMENT));
        let found = middles.map(|(head, length)| (head, length, fits(&slice(head, length))));
        let Some((head, length, fit @ Some(_))) = found.into_iter().find(|(.., fit)| fit.is_some()) else {
            return vec![(self.clone(), whole)];
        };
        let mut parts = vec![(slice(head, length), fit)];
        let mut edge = |start: usize, extent: usize| {
            if extent > 0 {
                let edge = slice(start, extent);
                let fit = fits(&edge);
                parts.push((edge, fit));
            }
        };
        edge(0, head);
        edge(head + length, extent - head - length);
        parts
    }
}

/// Elements along each side of a micro-tile of `touchdown_transpose`: words of 16 bytes, of single bytes words of 8.
fn micro_side(size: u64) -> u64 {
    if size == 1 { 8 } else { 16 / size }
}

/// Whether `touchdown_cast` has a pair of types.
fn has_vectors(from: DType, to: DType) -> bool {
    use DType::{BFloat16, Float8E4M3FN, Float8E5M2, Float16, Float32};
    let (large, small) = if from.size() >= to.size() { (from, to) } else { (to, from) };
    match small {
        Float16 | BFloat16 => from != to && matches!(large, Float32 | Float16 | BFloat16),
        Float8E4M3FN | Float8E5M2 => matches!(large, Float32 | BFloat16),
        _ => false,
    }
}

/// Units of a tile that a thread takes: `kernels/place.cu` has the same.
const PLACE_STEPS: u64 = 16;
const CAST_STEPS: u64 = 4;
const COPY_STEPS: u64 = 4;
const FILL_STEPS: u64 = 8;

/// Elements along each side of a square of `touchdown_place`.
const SQUARE_SIDE: u64 = 64;

/// Micro-tiles along each side of a tile of `touchdown_transpose`.
const MICRO_TILES: u64 = 16;

/// Elements of a vector of `touchdown_cast`.
const CAST_LANES: usize = 8;

/// Below this extent a turned dimension fills too little of a square, and boxes are walked in runs.
const SQUARE_WORTH: usize = 16;

/// As above for transposes, whose tiles hold smaller pieces.
const TRANSPOSE_WORTH: usize = 8;

/// Runs of fewer elements are not split to reach aligned words.
const SPLIT_WORTH: usize = 256;

/// Elements among which the first aligned one is, if there is one: words have 16 bytes.
const ALIGNMENT: usize = 16;

/// Most blocks of kernels that count: every warp of every block may add to the same counter, and an H200 makes fewer than 10^9 such
/// additions a second. Enough for several blocks on each of 500 multiprocessors.
const COUNTING_BLOCKS_MAX: u64 = 4096;

/// Most blocks of a grid along its first dimension, on every device.
const GRID_BLOCKS_MAX: u64 = (1 << 31) - 1;

#[cfg(test)]
mod tests;
