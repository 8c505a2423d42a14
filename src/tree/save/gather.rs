//! From the parts of an array in memory to the elements of one chunk.

use std::borrow::Cow;

use bytes::Bytes;

use super::tree::{DevicePart, NewPart};
use crate::dtype::DType;
use crate::encode::{prepare, prepare_in_place};
use crate::error::{Error, Result};
use crate::limits::DOWNLOAD_BYTES;
use crate::place::Memory;
use crate::place::parcel::Span;
use crate::plan::route::{Elements, Route, routes};
use crate::plan::{Device, Placement, Slabs};
use crate::shape::{Region, strides};
use crate::transform::cpu::{OpError, execute_in};
use crate::transform::{Convert, Op};

/// An array whose chunks are wanted.
#[derive(Debug)]
pub(super) struct Source {
    /// Global extents.
    pub(super) shape: Vec<u64>,
    /// Disjoint parts that hold every element.
    pub(super) parts: Vec<NewPart>,
    /// From the type in memory to the type in storage.
    pub(super) convert: Convert,
}

/// Elements of a chunk: a part of the caller's memory, or gathered ones.
#[derive(Debug)]
pub(super) enum Gathered {
    Shared(Bytes),
    Copied(Vec<u8>),
}

impl Source {
    /// The elements of a box, row-major in the stored type's memory form, and how many of them the cast lost. What lies beyond
    /// the array is zero.
    ///
    /// # Errors
    /// An element that is not valid (a bool that is neither 0 nor 1), no memory.
    pub(super) fn elements(&self, wanted: &Region) -> Result<(Gathered, u64)> {
        if let Some(shared) = self.shared(wanted) {
            return Ok((Gathered::Shared(shared), 0));
        }
        let mut gathered = Vec::new();
        let lossy = self.gather(wanted, &mut gathered)?;
        Ok((Gathered::Copied(gathered), lossy))
    }

    /// The box in the caller's memory, if it lies there in one piece as it is to be stored.
    fn shared(&self, wanted: &Region) -> Option<Bytes> {
        let size = self.convert.to.size() as u64;
        if !self.convert.is_plain() {
            return None;
        }
        let part = self.parts.iter().find(|part| part.region.contains(wanted) && part.device.is_none())?;
        let start: Vec<u64> = wanted.start.iter().zip(&part.region.start).map(|(at, from)| at - from).collect();
        let first: u64 = start.iter().zip(strides(&part.region.extent)).map(|(at, stride)| at * stride).sum();
        let region = Region { start, extent: wanted.extent.clone() };
        let placement = Placement { shard: 0, strides: strides(&wanted.extent), start: 0, region };
        let elements = Elements { from: size, to: size, plain: true };
        let whole = Region::whole(&part.region.extent);
        if routes(&part.region.extent, &whole, &[(&placement, elements)], Device::Cpu(0)) != [Route::Direct] {
            return None;
        }
        let (first, len) = (usize::try_from(first * size).ok()?, usize::try_from(wanted.volume() * size).ok()?);
        Some(part.data.slice(first..first + len))
    }

    fn gather(&self, wanted: &Region, out: &mut Vec<u8>) -> Result<u64> {
        let size = self.convert.to.size();
        let len = wanted.volume().checked_mul(size as u64).and_then(|bytes| usize::try_from(bytes).ok());
        let len = len.ok_or_else(|| Error::bug("a chunk is larger than the address space"))?;
        out.try_reserve_exact(len).map_err(|_| {
            Error::new(crate::ErrorKind::OutOfMemory, "no memory for a chunk").expected(format_args!("{len} bytes"))
        })?;
        out.resize(len, 0);
        let mut lossy = 0;
        for part in &self.parts {
            let Some(common) = part.region.intersect(wanted) else { continue };
            let at = |origin: &Region, strides: &[u64]| -> u64 {
                common
                    .start
                    .iter()
                    .zip(&origin.start)
                    .zip(strides)
                    .map(|((at, from), stride)| (at - from) * stride)
                    .sum()
            };
            let (source_strides, target_strides) = (strides(&part.region.extent), strides(&wanted.extent));
            let op = Op {
                source_start: at(&part.region, &source_strides),
                target_start: at(wanted, &target_strides),
                extent: common.extent.clone(),
                source_strides,
                target_strides,
                convert: self.convert,
            };
            lossy += match &part.device {
                Some(device) => fetch(device, &part.region.extent, &op, out)?,
                None => execute_in(&op, &part.data, out).map_err(op_error)?,
            };
        }
        Ok(lossy)
    }

    /// The stored element type.
    pub(super) fn dtype(&self) -> DType {
        self.convert.to
    }
}

/// Does an op whose source is an array of this extent on a device, piece by piece.
fn fetch(device: &DevicePart, extent: &[u64], op: &Op, out: &mut [u8]) -> Result<u64> {
    let Memory::Device(memory) = &*device.memory else {
        return Err(Error::bug("a part of a device is in host memory"));
    };
    let size = op.convert.from.size() as u64;
    let mut piece_bytes = Vec::new();
    let mut lossy = 0;
    for (piece, bytes) in Slabs::new(&op.extent, op.convert.from.size(), DOWNLOAD_BYTES as u64) {
        let moved = |strides: &[u64]| piece.start.iter().zip(strides).map(|(at, stride)| at * stride).sum::<u64>();
        let first = op.source_start + moved(&op.source_strides);
        let mut spans = runs(extent, &piece.extent)
            .map(|(start, count)| Span { pointer: memory.pointer() + (first + start) * size, len: count * size });
        piece_bytes.resize(usize::try_from(bytes).unwrap_or(usize::MAX), 0);
        #[allow(unsafe_code)]
        // SAFETY: boxes of the part's own memory, which the part keeps; it holds as many bytes as its region needs, which was
        // checked when the save was planned.
        unsafe { device.download.download(&mut spans, &mut piece_bytes) }?;
        let packed = Op {
            extent: piece.extent.clone(),
            source_strides: strides(&piece.extent),
            target_strides: op.target_strides.clone(),
            source_start: 0,
            target_start: op.target_start + moved(&op.target_strides),
            convert: op.convert,
        };
        lossy += execute_in(&packed, &piece_bytes, out).map_err(op_error)?;
    }
    Ok(lossy)
}

/// The contiguous runs of a box at the start of an array, in the box's row-major order: first element and number of elements.
fn runs<'a>(array: &'a [u64], part: &'a [u64]) -> impl Iterator<Item = (u64, u64)> + 'a {
    let distances = strides(array);
    // Dimensions from this one on are one run.
    let inner = (1..part.len()).rev().find(|&dim| part[dim] != array[dim]).unwrap_or(0);
    let count: u64 = part[inner.min(part.len())..].iter().product();
    let outer: u64 = part[..inner].iter().product();
    (0..outer).map(move |mut number| {
        let mut start = 0;
        for dim in (0..inner).rev() {
            start += number % part[dim] * distances[dim];
            number /= part[dim];
        }
        (start, count)
    })
}

fn op_error(error: OpError) -> Error {
    match error {
        OpError::Outside { .. } => Error::bug(error.to_string()),
        OpError::Cast(error) => Error::invalid(error.to_string()),
    }
}

impl Gathered {
    /// The elements as they are stored.
    pub(super) fn stored(self, dtype: DType) -> Bytes {
        match self {
            Self::Shared(bytes) => match prepare(dtype, &bytes) {
                Cow::Borrowed(_) => bytes,
                Cow::Owned(stored) => stored.into(),
            },
            Self::Copied(mut bytes) => {
                prepare_in_place(dtype, &mut bytes);
                bytes.into()
            }
        }
    }
}

#[cfg(test)]
impl std::ops::Deref for Gathered {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Shared(bytes) => bytes,
            Self::Copied(bytes) => bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::CastPolicy;
    use proptest::prelude::*;

    fn source(shape: &[u64], parts: Vec<NewPart>, to: DType) -> Source {
        let convert = Convert { from: DType::UInt16, to, swap: false, policy: CastPolicy::Saturate };
        Source { shape: shape.to_vec(), parts, convert }
    }

    proptest! {
        /// A box of an array in parts equals the box of the array in one piece, element by element.
        #[test]
        fn a_box_is_the_same_whatever_parts_the_array_is_in(
            dims in prop::collection::vec((1u64..9, 1u64..4, 1u64..9, any::<prop::sample::Index>()), 0..4),
            widen in any::<bool>(),
        ) {
            let shape: Vec<u64> = dims.iter().map(|(extent, ..)| *extent).collect();
            let count: u64 = shape.iter().product();
            let value = |index: &[u64]| -> u16 { index.iter().zip(strides(&shape)).map(|(i, s)| i * s).sum::<u64>() as u16 + 7 };
            let indices = |region: &Region| {
                let mut all = vec![vec![]];
                for dim in 0..region.rank() {
                    all = all.into_iter().flat_map(|index: Vec<u64>| {
                        (region.start[dim]..region.end(dim)).map(move |i| [&index[..], &[i]].concat())
                    }).collect();
                }
                all
            };
            // Cut every dimension into parts.
            let mut regions = vec![Region { start: vec![], extent: vec![] }];
            for (extent, parts, ..) in &dims {
                let step = extent.div_ceil(*parts);
                regions = regions.iter().flat_map(|region| {
                    (0..extent.div_ceil(step)).map(move |part| Region {
                        start: [&region.start[..], &[part * step]].concat(),
                        extent: [&region.extent[..], &[step.min(extent - part * step)]].concat(),
                    })
                }).collect();
            }
            let parts = regions.into_iter().map(|region| {
                let data: Vec<u8> = indices(&region).iter().flat_map(|index| value(index).to_le_bytes()).collect();
                NewPart::new(region, data)
            }).collect();
            // A box that may reach beyond the array.
            let start: Vec<u64> = dims.iter().map(|(extent, _, _, at)| at.index(*extent as usize) as u64).collect();
            let wanted = Region { start, extent: dims.iter().map(|(_, _, extent, _)| *extent).collect() };
            let to = if widen { DType::UInt32 } else { DType::UInt16 };
            let (elements, lossy) = source(&shape, parts, to).elements(&wanted).unwrap();
            let expected: Vec<u8> = indices(&wanted).iter().flat_map(|index| {
                let inside = index.iter().zip(&shape).all(|(i, extent)| i < extent);
                let value = if inside { value(index) } else { 0 };
                if widen { u32::from(value).to_le_bytes().to_vec() } else { value.to_le_bytes().to_vec() }
            }).collect();
            prop_assert_eq!(&*elements, expected.as_slice());
            prop_assert!(lossy == 0 && count > 0);
        }
    }

    #[test]
    fn runs_are_as_long_as_the_box_allows() {
        let of = |array: &[u64], part: &[u64]| runs(array, part).collect::<Vec<_>>();
        assert_eq!(of(&[], &[]), [(0, 1)]);
        assert_eq!(of(&[7], &[3]), [(0, 3)]);
        assert_eq!(of(&[4, 5], &[2, 5]), [(0, 10)]);
        assert_eq!(of(&[4, 5], &[2, 3]), [(0, 3), (5, 3)]);
        assert_eq!(of(&[3, 4, 5], &[2, 2, 5]), [(0, 10), (20, 10)]);
        assert_eq!(of(&[3, 4, 5], &[2, 2, 1]), [(0, 1), (5, 1), (20, 1), (25, 1)]);
        assert_eq!(of(&[3, 4, 5], &[3, 4, 5]), [(0, 60)]);
    }

    #[test]
    fn rows_of_a_part_are_not_copied() {
        let data: Bytes = (0..200u8).collect::<Vec<u8>>().into();
        let whole = NewPart::new(Region::whole(&[10, 10]), data.clone());
        let source = source(&[10, 10], vec![whole], DType::UInt16);
        let rows = Region { start: vec![2, 0], extent: vec![3, 10] };
        let (elements, _) = source.elements(&rows).unwrap();
        assert!(matches!(&elements, Gathered::Shared(bytes) if bytes.as_ptr() == data[40..].as_ptr()));
        let columns = Region { start: vec![0, 2], extent: vec![10, 3] };
        assert!(matches!(source.elements(&columns).unwrap().0, Gathered::Copied(_)));
    }
}
