//! Targets at random, and what they mean: every wanted element by the number of the stored one.

use std::sync::Arc;

use touchdown::DType;
use touchdown::keypath::KeyPath;
use touchdown::plan::{Device, Mesh, MeshDevice, Process, Spec};
use touchdown::tree::{Checkpoint, Otherwise, Pattern, Take, Target};

use super::grid::{indices, position, volume};
use super::store::{DTYPES, Stored};
use super::tape::Tape;

/// The value of padding.
pub const PAD: u8 = 3;

/// One wanted array.
#[derive(Clone, Debug)]
pub struct Wanted {
    pub name: String,
    pub dtype: DType,
    pub shape: Vec<u64>,
    /// Row-major the stored elements; `None` is padding.
    pub elements: Vec<Option<usize>>,
    pub spec: Vec<Vec<String>>,
    /// The arrays whose leaf it was first.
    stored_dtype: DType,
}

/// Devices on axes, before a rank looks at them.
#[derive(Clone, Debug)]
pub struct Layout {
    pub axes: Vec<(String, u64)>,
    pub devices: Vec<MeshDevice>,
    pub world: u32,
}

/// What is done to the checkpoint's own target.
#[derive(Clone, Debug)]
enum Step {
    Transpose(String, Vec<usize>),
    Take(String, Take),
    Join { names: Vec<String>, stack: bool, dim: usize, into: String },
    Split { name: String, dim: usize, parts: Vec<(String, u64)> },
    Rename { from: String, to: String },
}

/// A target as steps, and as the elements that they mean.
#[derive(Clone, Debug)]
pub struct Request {
    steps: Vec<Step>,
    pub wanted: Vec<Wanted>,
    casts: Vec<(String, DType)>,
    shapes: Vec<(String, Vec<u64>)>,
    order: Vec<String>,
}

impl Layout {
    pub fn random(tape: &mut Tape<'_>) -> Self {
        let count = 1 + tape.below(3) as usize;
        let names = ["x", "y", "z"];
        let mut axes: Vec<(String, u64)> = names[..count].iter().map(|name| ((*name).to_owned(), 1)).collect();
        axes.iter_mut().for_each(|(_, size)| *size = 1 + tape.below(3));
        let world = 1 + tape.below(3) as u32;
        let total = axes.iter().map(|(_, size)| *size as usize).product();
        // Some of 30 devices in any order; each belongs to a rank of its own.
        let some = tape.order(30);
        let device =
            |&number: &usize| MeshDevice { rank: tape.below(world.into()) as u32, device: Device::Cpu(number as u32) };
        let devices = some[..total].iter().map(device).collect();
        Self { axes, devices, world }
    }

    pub fn mesh(&self, rank: u32) -> Arc<Mesh> {
        let process = Process { rank, world: self.world };
        Mesh::across(process, self.axes.clone(), self.devices.iter().copied()).unwrap()
    }

    /// The same devices with their axes in another order: every device keeps its coordinate on every axis.
    pub fn with_axes(&self, order: &[usize]) -> Self {
        let axes: Vec<(String, u64)> = order.iter().map(|&axis| self.axes[axis].clone()).collect();
        let old: Vec<u64> = self.axes.iter().map(|(_, size)| *size).collect();
        let new: Vec<u64> = axes.iter().map(|(_, size)| *size).collect();
        let device = |at: &Vec<u64>| {
            let mut coordinate = vec![0; at.len()];
            order.iter().zip(at).for_each(|(&axis, at)| coordinate[axis] = *at);
            self.devices[position(&coordinate, &old)]
        };
        Self { devices: indices(&new).iter().map(device).collect(), axes, world: self.world }
    }

    /// Start and end, along every dimension, of what the device at this position holds. Written from the contract: a
    /// dimension n over k parts is cut at multiples of ceil(n/k).
    pub fn bounds(&self, shape: &[u64], spec: &[Vec<String>], device: usize) -> Vec<(u64, u64)> {
        let sizes: Vec<u64> = self.axes.iter().map(|(_, size)| *size).collect();
        let coordinate = indices(&sizes)[device].clone();
        let dim = |(dim, extent): (usize, &u64)| {
            let (mut part, mut parts) = (0, 1);
            for axis in spec.get(dim).into_iter().flatten() {
                let at = self.axes.iter().position(|(name, _)| name == axis).unwrap();
                (part, parts) = (part * sizes[at] + coordinate[at], parts * sizes[at]);
            }
            let size = extent.div_ceil(parts);
            ((part * size).min(*extent), ((part + 1) * size).min(*extent))
        };
        shape.iter().enumerate().map(dim).collect()
    }
}

impl Request {
    pub fn random(stored: &Stored, layout: &Layout, tape: &mut Tape<'_>) -> Self {
        let mut wanted: Vec<Wanted> = stored
            .arrays
            .iter()
            .map(|array| Wanted {
                name: array.name.clone(),
                dtype: array.dtype,
                stored_dtype: array.dtype,
                shape: array.shape.clone(),
                elements: (array.first..array.first + volume(&array.shape)).map(Some).collect(),
                spec: Vec::new(),
            })
            .collect();
        let mut steps = Vec::new();
        for number in 0..tape.below(5) {
            steps.extend(step(&mut wanted, number, tape));
        }
        let (mut casts, mut shapes) = (Vec::new(), Vec::new());
        for leaf in &mut wanted {
            if tape.once_in(3) {
                leaf.dtype = tape.one_of(&DTYPES);
                casts.push((leaf.name.clone(), leaf.dtype));
            }
            if tape.once_in(3) {
                let shape: Vec<u64> =
                    leaf.shape.iter().map(|extent| (extent + 2).saturating_sub(tape.below(5))).collect();
                leaf.resize(&shape);
                shapes.push((leaf.name.clone(), shape));
            }
            leaf.spec = spec(layout, leaf.shape.len(), tape);
        }
        let mut order = Vec::new();
        if tape.once_in(4) {
            order.extend(wanted.iter().rev().map(|leaf| leaf.name.clone()));
        }
        Self { steps, wanted, casts, shapes, order }
    }

    /// Whether the caller's order, and not the place in the file, decides what is read first.
    pub fn is_ordered(&self) -> bool {
        !self.order.is_empty()
    }

    pub fn target(&self, checkpoint: &Checkpoint, mesh: &Arc<Mesh>) -> Target {
        let mut target = checkpoint.target();
        for step in &self.steps {
            let path = |name: &String| KeyPath::names([name.as_str()]);
            target = match step {
                Step::Transpose(name, order) => target.transpose([(name.as_str(), order.clone())]),
                Step::Take(name, take) => target.take([(name.as_str(), *take)]),
                Step::Join { names, stack, dim, into } => {
                    let pattern = Pattern::regex(&format!("^({})$", names.join("|"))).unwrap();
                    if *stack {
                        target.stack(pattern, *dim, path(into))
                    } else {
                        target.concatenate(pattern, *dim, path(into))
                    }
                }
                Step::Split { name, dim, parts } => {
                    target.split(name, *dim, parts.iter().map(|(name, extent)| (path(name), *extent)))
                }
                Step::Rename { from, to } => target.rename([(format!("^{from}$").as_str(), to.as_str())]),
            };
        }
        target = target.cast(self.casts.iter().cloned());
        target = target.shape(self.shapes.iter().cloned()).pad(i32::from(PAD));
        let specs = self.wanted.iter().filter(|leaf| !leaf.spec.is_empty());
        let specs = specs.map(|leaf| (leaf.name.clone(), Spec(leaf.spec.clone())));
        target = target.shard(mesh, specs).otherwise(Otherwise::Replicate);
        target.order(self.order.iter().cloned())
    }
}

impl Wanted {
    /// The element at an index.
    pub fn at(&self, index: &[u64]) -> Option<usize> {
        self.elements[position(index, &self.shape)]
    }

    /// Gives it another shape; each new index says which old one it is, if any.
    fn remap(&mut self, shape: &[u64], old: impl Fn(&[u64]) -> Vec<u64>) {
        let element = |index: &Vec<u64>| {
            let old = old(index);
            old.iter().zip(&self.shape).all(|(at, extent)| at < extent).then(|| self.at(&old)).flatten()
        };
        self.elements = indices(shape).iter().map(element).collect();
        self.shape = shape.to_vec();
    }

    fn resize(&mut self, shape: &[u64]) {
        self.remap(shape, <[u64]>::to_vec);
    }

    fn transposed(&mut self, order: &[usize]) {
        let shape: Vec<u64> = order.iter().map(|&dim| self.shape[dim]).collect();
        self.remap(&shape, |index| {
            let mut old = vec![0; index.len()];
            order.iter().zip(index).for_each(|(&dim, at)| old[dim] = *at);
            old
        });
    }

    fn range(&self, dim: usize, start: u64, stop: u64) -> Self {
        let (mut part, mut shape) = (self.clone(), self.shape.clone());
        shape[dim] = stop - start;
        part.remap(&shape, |index| {
            let mut old = index.to_vec();
            old[dim] += start;
            old
        });
        part
    }
}

/// One change of view, done to the model; `None` if the arrays at hand do not allow what was chosen.
fn step(wanted: &mut Vec<Wanted>, number: u64, tape: &mut Tape<'_>) -> Option<Step> {
    let at = tape.below(wanted.len() as u64) as usize;
    let (name, rank) = (wanted[at].name.clone(), wanted[at].shape.len());
    let kind = tape.below(6);
    if rank == 0 && kind != 5 && kind != 3 {
        return None;
    }
    let dim = tape.below(rank.max(1) as u64) as usize;
    let extent = wanted[at].shape.get(dim).copied().unwrap_or(0);
    Some(match kind {
        0 => {
            let order = tape.order(rank);
            wanted[at].transposed(&order);
            Step::Transpose(name, order)
        }
        1 if extent > 0 => {
            let index = tape.below(extent);
            let mut taken = wanted[at].range(dim, index, index + 1);
            taken.shape.remove(dim);
            wanted[at] = taken;
            Step::Take(name, Take::Index { dim, index })
        }
        1 | 2 => {
            let start = tape.below(extent + 1);
            let stop = start + tape.below(extent - start + 1);
            wanted[at] = wanted[at].range(dim, start, stop);
            Step::Take(name, Take::Range { dim, start, stop })
        }
        3 | 4 => {
            let stack = kind == 3;
            let fits = |other: &Wanted| {
                let same = |axis: usize| other.shape[axis] == wanted[at].shape[axis] || (!stack && axis == dim);
                other.stored_dtype == wanted[at].stored_dtype && other.shape.len() == rank && (0..rank).all(same)
            };
            let parts: Vec<Wanted> = wanted.iter().filter(|other| fits(other)).cloned().collect();
            let dim = if stack { tape.below(rank as u64 + 1) as usize } else { dim };
            let raised = |mut part: Wanted| {
                if stack {
                    part.shape.insert(dim, 1);
                }
                part
            };
            let names: Vec<String> = parts.iter().map(|part| part.name.clone()).collect();
            let into = format!("j{number}");
            let mut joined = raised(parts[0].clone());
            for part in parts.into_iter().skip(1).map(raised) {
                let (first, mut shape) = (joined.clone(), joined.shape.clone());
                shape[dim] += part.shape[dim];
                let element = |index: &Vec<u64>| match index[dim].checked_sub(first.shape[dim]) {
                    None => first.at(index),
                    Some(behind) => {
                        let mut index = index.clone();
                        index[dim] = behind;
                        part.at(&index)
                    }
                };
                joined.elements = indices(&shape).iter().map(element).collect();
                joined.shape = shape;
            }
            joined.name = into.clone();
            let place = wanted.iter().position(|leaf| names.contains(&leaf.name)).unwrap();
            wanted.retain(|leaf| !names.contains(&leaf.name));
            wanted.insert(place, joined);
            Step::Join { names, stack, dim, into }
        }
        _ if rank > 0 && tape.once_in(2) => {
            let cut = tape.below(extent + 1);
            let parts = [(format!("l{number}"), 0, cut), (format!("r{number}"), cut, extent)];
            let whole = wanted.remove(at);
            for (place, (name, start, stop)) in parts.iter().enumerate() {
                wanted.insert(at + place, Wanted { name: name.clone(), ..whole.range(dim, *start, *stop) });
            }
            Step::Split { name, dim, parts: parts.map(|(name, start, stop)| (name, stop - start)).into() }
        }
        _ => {
            let to = format!("n{number}");
            wanted[at].name.clone_from(&to);
            Step::Rename { from: name, to }
        }
    })
}

/// Every axis on at most one dimension, some dimensions with several, some axes unused.
fn spec(layout: &Layout, rank: usize, tape: &mut Tape<'_>) -> Vec<Vec<String>> {
    let mut spec = vec![Vec::new(); rank];
    for axis in tape.order(layout.axes.len()) {
        let dim = tape.below(rank as u64 + 1) as usize;
        if dim > 0 {
            spec[dim - 1].push(layout.axes[axis].0.clone());
        }
    }
    while spec.last().is_some_and(Vec::is_empty) {
        spec.pop();
    }
    spec
}
