//! How a box of decoded elements reaches a shard: chosen for every slab and device by the bytes that cross the bus.
//!
//! ```text
//!   Direct   the box lies in one piece on both sides        decoded, read or copied to where it belongs
//!   Rows     equal pieces, equal distances, nothing to cast one two-dimensional copy
//!   Kernel   the device wants most of the slab              the slab crosses once, a kernel places all of its boxes
//!   Pack     the device wants little of the slab            the processor packs (and casts) the box, which crosses alone
//!   Place    the shard is in host memory                    the processor writes the elements where they belong
//! ```
//!
//! A column reshard over eight devices would send every slab to every device by kernels alone; packing sends an eighth.

use serde::Serialize;

use super::{Device, Placement};
use crate::shape::{Region, strides};

/// How one placement of a slab gets to its shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum Route {
    /// One piece on both sides and nothing to do to an element: it can be decoded or copied in place.
    Direct,
    /// One two-dimensional copy.
    Rows(Rows),
    /// The slab is sent whole and a kernel of the device places the box.
    Kernel,
    /// The host's executor packs the box into staging memory, cast where that makes it smaller, and it is sent.
    Pack,
    /// The host's executor writes into the shard.
    Place,
}

/// A two-dimensional copy, in bytes, from a slab to a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Rows {
    /// Number of rows.
    pub count: u64,
    /// Length of a row.
    pub bytes: u64,
    /// Distance of rows in the slab.
    pub source_pitch: u64,
    /// Distance of rows in the shard.
    pub target_pitch: u64,
}

/// Element sizes of a placement, and whether elements are copied as they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Elements {
    /// Bytes of a decoded element.
    pub from: u64,
    /// Bytes of a wanted element.
    pub to: u64,
    /// Whether the decoded bytes are the wanted ones: no cast, no swap, no other stored form.
    pub plain: bool,
}

/// Rows shorter than this are not worth a two-dimensional copy: the copy engine moves about one row a cycle, whatever its
/// length, so short rows are left to a kernel or packed. In bytes.
const ROW_BYTES_MIN: u64 = 64;

/// A slab is sent whole if that costs at most this many times the bytes of packed boxes: packing costs the processor a pass
/// over them, the kernel costs it nothing.
const KERNEL_BYTES_RATIO: u64 = 2;

/// How the placements of one slab that go to one device get there, in their order. `slab` is a box of a unit of extents
/// `shape`, decoded row-major; the placements are clipped to it.
pub fn routes(shape: &[u64], slab: &Region, placements: &[(&Placement, Elements)], device: Device) -> Vec<Route> {
    let simple: Vec<Option<Route>> =
        placements.iter().map(|(placement, elements)| copied(shape, placement, *elements, device)).collect();
    let rest = || placements.iter().zip(&simple).filter(|(_, route)| route.is_none()).map(|(placement, _)| placement);
    let packed: u64 = rest().map(|(placement, elements)| box_bytes(placement, elements.from.min(elements.to))).sum();
    let whole = rest().map(|(_, elements)| elements.from).max().unwrap_or(0).saturating_mul(slab.volume());
    let other = match device.is_host() {
        true => Route::Place,
        false if whole <= packed.saturating_mul(KERNEL_BYTES_RATIO) => Route::Kernel,
        false => Route::Pack,
    };
    simple.into_iter().map(|route| route.unwrap_or(other)).collect()
}

/// Bytes that cross the bus for a slab's routes to one device; none for a host device.
pub fn bus_bytes(slab: &Region, placements: &[(&Placement, Elements)], routes: &[Route]) -> u64 {
    let mut bytes = 0;
    let mut kernel: u64 = 0;
    for ((placement, elements), route) in placements.iter().zip(routes) {
        match route {
            Route::Direct | Route::Rows(_) => bytes += box_bytes(placement, elements.to),
            Route::Pack => bytes += box_bytes(placement, elements.from.min(elements.to)),
            // However many boxes it has, the slab is sent once.
            Route::Kernel => kernel = kernel.max(slab.volume() * elements.from),
            Route::Place => {}
        }
    }
    bytes + kernel
}

fn box_bytes(placement: &Placement, element: u64) -> u64 {
    placement.region.volume().saturating_mul(element)
}

/// The copy that moves a placement, if it is one.
fn copied(shape: &[u64], placement: &Placement, elements: Elements, device: Device) -> Option<Route> {
    if !elements.plain {
        return None;
    }
    // Outermost first: dimensions of the box that matter, those that lie on end on both sides merged.
    let mut dims: Vec<(u64, u64, u64)> = Vec::new();
    for ((extent, source), target) in placement.region.extent.iter().zip(strides(shape)).zip(&placement.strides) {
        match dims.last_mut() {
            _ if *extent == 1 => {}
            Some(outer) if outer.1 == source * extent && outer.2 == target * extent => {
                *outer = (outer.0 * extent, source, *target);
            }
            _ => dims.push((*extent, source, *target)),
        }
    }
    let row = match dims.last() {
        Some((extent, 1, 1)) => *extent,
        Some(_) => return None,
        None => 1,
    };
    let bytes = row * elements.to;
    match dims.as_slice() {
        [] | [_] => Some(Route::Direct),
        [(count, source, target), _] if !device.is_host() && bytes >= ROW_BYTES_MIN => Some(Route::Rows(Rows {
            count: *count,
            bytes,
            source_pitch: source * elements.from,
            target_pitch: target * elements.to,
        })),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GPU: Device = Device::Cuda { ordinal: 0, logical: None };
    const PLAIN: Elements = Elements { from: 4, to: 4, plain: true };
    const NARROWED: Elements = Elements { from: 4, to: 2, plain: false };

    fn placement(region: Region, strides: &[u64]) -> Placement {
        Placement { shard: 0, region, strides: strides.to_vec(), start: 0 }
    }

    fn one(shape: &[u64], placement: &Placement, elements: Elements, device: Device) -> Route {
        routes(shape, &Region::whole(shape), &[(placement, elements)], device)[0]
    }

    #[test]
    fn the_route_follows_from_the_box() {
        let shape = [64, 1024];
        let whole = placement(Region::whole(&shape), &[1024, 1]);
        assert_eq!(one(&shape, &whole, PLAIN, GPU), Route::Direct);
        assert_eq!(one(&shape, &whole, NARROWED, GPU), Route::Kernel);
        assert_eq!(one(&shape, &whole, NARROWED, Device::Cpu(0)), Route::Place);
        // Rows of a row shard lie on end; columns are rows of a two-dimensional copy.
        let rows = placement(Region { start: vec![16, 0], extent: vec![16, 1024] }, &[1024, 1]);
        assert_eq!(one(&shape, &rows, PLAIN, GPU), Route::Direct);
        let columns = placement(Region { start: vec![0, 128], extent: vec![64, 128] }, &[128, 1]);
        let copy = Rows { count: 64, bytes: 512, source_pitch: 4096, target_pitch: 512 };
        assert_eq!(one(&shape, &columns, PLAIN, GPU), Route::Rows(copy));
        assert_eq!(one(&shape, &columns, PLAIN, Device::Cpu(1)), Route::Place);
        // An eighth of the slab, cast: packed, half the bytes of an eighth cross.
        assert_eq!(one(&shape, &columns, NARROWED, GPU), Route::Pack);
        // A transpose of everything is a kernel's work.
        let turned = placement(Region::whole(&shape), &[1, 64]);
        assert_eq!(one(&shape, &turned, PLAIN, GPU), Route::Kernel);
        // Short rows.
        let narrow = placement(Region { start: vec![0, 0], extent: vec![64, 4] }, &[4, 1]);
        assert_eq!(one(&shape, &narrow, PLAIN, GPU), Route::Pack);
        assert_eq!(one(&[], &placement(Region::whole(&[]), &[]), PLAIN, GPU), Route::Direct);
    }

    proptest! {
        /// The bytes of a direct copy are one run on both sides, those of rows are what the pitches say, and no route sends
        /// more than twice what packing everything would.
        #[test]
        fn routes_move_the_box_and_never_much_more(
            dims in prop::collection::vec((1u64..40, 1u64..40, any::<prop::sample::Index>(), 1u64..3), 0..4),
            plain in any::<bool>(),
            host in any::<bool>(),
        ) {
            let shape: Vec<u64> = dims.iter().map(|(extent, ..)| *extent).collect();
            let extent: Vec<u64> = dims.iter().map(|(extent, part, ..)| *extent.min(part)).collect();
            let start: Vec<u64> = dims.iter().zip(&extent).map(|((whole, _, at, _), part)| at.index((whole - part + 1) as usize) as u64).collect();
            let region = Region { start, extent: extent.clone() };
            // A shard that is larger than the box by a factor along each dimension.
            let outer: Vec<u64> = dims.iter().zip(&extent).map(|((.., factor), extent)| extent * factor).collect();
            let placement = placement(region, &strides(&outer));
            let elements = if plain { PLAIN } else { NARROWED };
            let device = if host { Device::Cpu(0) } else { GPU };
            let slab = Region::whole(&shape);
            let chosen = routes(&shape, &slab, &[(&placement, elements)], device);
            let sent = bus_bytes(&slab, &[(&placement, elements)], &chosen);
            let packed = placement.region.volume() * elements.from.min(elements.to);
            prop_assert!(sent <= packed * KERNEL_BYTES_RATIO);
            prop_assert!(host == (sent == 0) || chosen[0] == Route::Direct);
            // Positions of the box's elements on both sides, in row-major order.
            let mut at = vec![(0, 0)];
            for (dim, (source, target)) in strides(&shape).into_iter().zip(&placement.strides).enumerate() {
                let range = 0..extent[dim];
                at = at.iter().flat_map(|(from, to)| range.clone().map(move |i| (from + i * source, to + i * target))).collect();
            }
            match chosen[0] {
                Route::Direct => {
                    prop_assert!(plain && at.iter().enumerate().all(|(i, place)| *place == (i as u64, i as u64)));
                }
                Route::Rows(rows) => {
                    prop_assert!(plain && !host && rows.count * rows.bytes == at.len() as u64 * 4);
                    let row = rows.bytes / 4;
                    let expected = (0..rows.count).flat_map(|r| (0..row).map(move |c| (r * rows.source_pitch / 4 + c, r * rows.target_pitch / 4 + c)));
                    prop_assert!(at.iter().copied().eq(expected));
                }
                Route::Place => prop_assert!(host),
                Route::Kernel | Route::Pack => prop_assert!(!host),
            }
        }
    }
}
