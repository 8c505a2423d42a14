//! Devices, meshes and partition specs: which part of an array each device holds.
//!
//! The words are JAX's: a [`Mesh`] lays devices out on named axes, a [`Spec`] names for every dimension the axes that
//! divide it, and both together ([`Sharding`]) give every device its [`Region`] of an array.

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;

use serde::Serialize;

use crate::error::{Error, Result};
use crate::limits::DEVICES_MAX;
use crate::shape::Region;

/// A place where a shard can live.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub enum Device {
    /// A virtual device in host memory.
    Cpu(u32),
    /// A GPU, or one of several logical devices on it.
    Cuda {
        /// The driver's ordinal.
        ordinal: u32,
        /// Which logical device of the GPU, where it carries several.
        logical: Option<u32>,
    },
}

impl Device {
    /// `count` virtual devices in host memory.
    pub fn cpus(count: u32) -> Vec<Self> {
        (0..count).map(Self::Cpu).collect()
    }

    /// Whether shards of this device are host memory.
    pub fn is_host(self) -> bool {
        matches!(self, Self::Cpu(_))
    }

    /// The driver's ordinal of the GPU that holds this device's shards; `None` for host memory.
    pub fn gpu(self) -> Option<u32> {
        match self {
            Self::Cpu(_) => None,
            Self::Cuda { ordinal, .. } => Some(ordinal),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu(index) => write!(f, "cpu:{index}"),
            Self::Cuda { ordinal, logical: None } => write!(f, "cuda:{ordinal}"),
            Self::Cuda { ordinal, logical: Some(logical) } => write!(f, "cuda:{ordinal}.{logical}"),
        }
    }
}

/// Which of several processes this one is. Loading needs no communication: rank and mesh decide every byte range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Process {
    /// This process, from 0.
    pub rank: u32,
    /// How many there are.
    pub world: u32,
}

impl Process {
    /// The only process.
    pub const SOLO: Self = Self { rank: 0, world: 1 };

    /// Rank and world as launchers state them: `RANK`/`WORLD_SIZE` (torchrun), `OMPI_COMM_WORLD_RANK`/`_SIZE`,
    /// `PMI_RANK`/`PMI_SIZE`, `SLURM_PROCID`/`SLURM_NTASKS`. `None` when no pair is set.
    ///
    /// # Errors
    /// A pair that is set but is not a rank below a world.
    pub fn from_env() -> Result<Option<Self>> {
        Self::from_lookup(|name| std::env::var(name).ok())
    }

    fn from_lookup(lookup: impl Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        const PAIRS: [(&str, &str); 4] = [
            ("RANK", "WORLD_SIZE"),
            ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
            ("PMI_RANK", "PMI_SIZE"),
            ("SLURM_PROCID", "SLURM_NTASKS"),
        ];
        for (rank_name, world_name) in PAIRS {
            let (Some(rank), Some(world)) = (lookup(rank_name), lookup(world_name)) else { continue };
            return match (rank.trim().parse::<u32>(), world.trim().parse::<u32>()) {
                (Ok(rank), Ok(world)) if rank < world => Ok(Some(Self { rank, world })),
                _ => Err(Error::invalid("the launcher's rank and world do not fit")
                    .expected("a rank below the world size")
                    .found(format_args!("{rank_name}={rank} {world_name}={world}"))),
            };
        }
        Ok(None)
    }
}

/// Devices laid out, row-major, on named axes. Devices of other processes may be among them; only local ones are loaded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Mesh {
    axes: Vec<(String, u64)>,
    devices: Vec<MeshDevice>,
    process: Process,
}

/// One device of a mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct MeshDevice {
    /// The process that owns it.
    pub rank: u32,
    /// The device, as its own process names it.
    pub device: Device,
}

impl Mesh {
    /// A mesh over devices of this process.
    ///
    /// # Errors
    /// An axis of size 0, two axes of one name, or a product of sizes that is not the number of devices.
    pub fn new<N: Into<String>>(
        axes: impl IntoIterator<Item = (N, u64)>,
        devices: impl IntoIterator<Item = Device>,
    ) -> Result<Arc<Self>> {
        let devices = devices.into_iter().map(|device| MeshDevice { rank: 0, device });
        Self::across(Process::SOLO, axes, devices)
    }

    /// A mesh over devices of several processes, seen from one of them.
    ///
    /// # Errors
    /// As [`new`](Self::new), or a device of a rank outside the world.
    pub fn across<N: Into<String>>(
        process: Process,
        axes: impl IntoIterator<Item = (N, u64)>,
        devices: impl IntoIterator<Item = MeshDevice>,
    ) -> Result<Arc<Self>> {
        let axes: Vec<(String, u64)> = axes.into_iter().map(|(name, size)| (name.into(), size)).collect();
        let devices: Vec<MeshDevice> = devices.into_iter().collect();
        let mesh = Self { axes, devices, process };
        for (index, (name, size)) in mesh.axes.iter().enumerate() {
            if *size == 0 {
                return Err(Error::invalid(format!("mesh axis `{name}` has size 0")));
            }
            if mesh.axes[..index].iter().any(|(other, _)| other == name) {
                return Err(Error::invalid(format!("mesh axis `{name}` is named twice")));
            }
        }
        let product = mesh.axes.iter().try_fold(1u64, |product, (_, size)| product.checked_mul(*size));
        let count = mesh.devices.len() as u64;
        if count == 0 || count > DEVICES_MAX || product != Some(count) {
            return Err(Error::invalid("the mesh does not fit its devices")
                .expected(format_args!("a product of {count}, the number of devices"))
                .found(format_args!("a mesh {mesh}"))
                .hint("the product of the axis sizes must be the number of devices (`--devices cpu:8 --mesh data=2,model=4`)"));
        }
        if process.rank >= process.world {
            return Err(Error::invalid("this process lies outside the world")
                .expected(format_args!("a rank below {}", process.world))
                .found(process.rank));
        }
        let mut seen = HashSet::new();
        if let Some(twice) = mesh.devices.iter().find(|device| !seen.insert((device.rank, device.device))) {
            return Err(Error::invalid(format!(
                "the mesh has device {} of process {} twice",
                twice.device, twice.rank
            ))
            .hint("several logical devices on one GPU are `cuda:0*4`"));
        }
        if let Some(stray) = mesh.devices.iter().find(|device| device.rank >= process.world) {
            return Err(Error::invalid("a mesh device belongs to a process outside the world")
                .expected(format_args!("a rank below {}", process.world))
                .found(stray.rank));
        }
        Ok(Arc::new(mesh))
    }

    /// One axis, `device`, over these devices.
    ///
    /// # Errors
    /// No device.
    pub fn line(devices: impl IntoIterator<Item = Device>) -> Result<Arc<Self>> {
        let devices: Vec<Device> = devices.into_iter().collect();
        Self::new([("device", devices.len() as u64)], devices)
    }

    /// One virtual CPU device.
    pub fn single() -> Arc<Self> {
        let devices = vec![MeshDevice { rank: 0, device: Device::Cpu(0) }];
        Arc::new(Self { axes: vec![("device".to_owned(), 1)], devices, process: Process::SOLO })
    }

    /// Axis names and sizes, major first.
    pub fn axes(&self) -> &[(String, u64)] {
        &self.axes
    }

    /// The devices, row-major over the axes. A device's position here is its number in plans and dumps.
    pub fn devices(&self) -> &[MeshDevice] {
        &self.devices
    }

    /// The process from which this mesh is seen.
    pub fn process(&self) -> Process {
        self.process
    }

    /// Positions of the devices of this process.
    pub fn local(&self) -> impl Iterator<Item = usize> {
        (0..self.devices.len()).filter(|&position| self.devices[position].rank == self.process.rank)
    }

    /// Size of an axis.
    pub fn axis_size(&self, name: &str) -> Option<u64> {
        self.axes.iter().find(|(axis, _)| axis == name).map(|(_, size)| *size)
    }

    /// Coordinate of a device along an axis.
    fn coordinate(&self, position: u64, axis: usize) -> u64 {
        let below: u64 = self.axes[axis + 1..].iter().map(|(_, size)| size).product();
        position / below % self.axes[axis].1
    }
}

impl fmt::Display for Mesh {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (name, size)) in self.axes.iter().enumerate() {
            write!(f, "{}{name}={size}", if index > 0 { "," } else { "" })?;
        }
        Ok(())
    }
}

/// For every dimension the mesh axes that divide it, major first. Missing dimensions are not divided.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize)]
pub struct Spec(pub Vec<Vec<String>>);

impl Spec {
    /// Every device holds everything.
    pub const REPLICATED: Self = Self(Vec::new());

    /// Parses `data,_,a+b`: a comma list per dimension, `_` for none, `a+b` for several axes.
    ///
    /// # Errors
    /// An empty axis name.
    pub fn parse(text: &str) -> Result<Self> {
        if text.trim().is_empty() {
            return Ok(Self::REPLICATED);
        }
        let dim = |part: &str| match part.trim() {
            "_" => Ok(Vec::new()),
            part => part
                .split('+')
                .map(str::trim)
                .map(|axis| match axis {
                    "" | "_" => Err(Error::invalid(format!("the partition spec `{text}` has an empty axis name"))
                        .hint("write a comma list per dimension: an axis name, `a+b` for several, `_` for none")),
                    axis => Ok(axis.to_owned()),
                })
                .collect(),
        };
        text.split(',').map(dim).collect::<Result<_>>().map(Self)
    }

    /// The spec after the dimensions are permuted: new dimension `i` is old dimension `order[i]`.
    pub fn permuted(&self, order: &[usize]) -> Self {
        Self(order.iter().map(|&dim| self.0.get(dim).cloned().unwrap_or_default()).collect())
    }
}

impl fmt::Display for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, axes) in self.0.iter().enumerate() {
            f.write_str(if index > 0 { "," } else { "" })?;
            f.write_str(&if axes.is_empty() { "_".to_owned() } else { axes.join("+") })?;
        }
        Ok(())
    }
}

/// Builds a [`Spec`]: `spec![_, "model"]`, `spec!["a" + "b", _]`, `spec![]` for replicated.
#[macro_export]
macro_rules! spec {
    (@dim [$($done:expr),*] _ , $($rest:tt)*) => { $crate::spec!(@dim [$($done,)* ::std::vec::Vec::new()] $($rest)*) };
    (@dim [$($done:expr),*] _) => { $crate::plan::Spec(::std::vec![$($done,)* ::std::vec::Vec::new()]) };
    (@dim [$($done:expr),*] $axis:literal $(+ $more:literal)* , $($rest:tt)*) => {
        $crate::spec!(@dim [$($done,)* $crate::spec!(@axes $axis $($more)*)] $($rest)*)
    };
    (@dim [$($done:expr),*] $axis:literal $(+ $more:literal)*) => {
        $crate::plan::Spec(::std::vec![$($done,)* $crate::spec!(@axes $axis $($more)*)])
    };
    (@axes $($axis:literal)+) => { ::std::vec![$(::std::string::String::from($axis)),+] };
    (@dim [$($done:expr),*]) => { $crate::plan::Spec(::std::vec![$($done),*]) };
    ($($dims:tt)*) => { $crate::spec!(@dim [] $($dims)*) };
}

/// A mesh and a partition spec: JAX's `NamedSharding`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Sharding {
    /// The devices.
    pub mesh: Arc<Mesh>,
    /// How dimensions are divided over them.
    pub spec: Spec,
}

impl Sharding {
    /// Checks a spec against a mesh and a rank.
    ///
    /// # Errors
    /// A spec longer than the rank, an axis that the mesh lacks, or an axis used twice.
    pub fn new(mesh: Arc<Mesh>, spec: Spec, rank: usize) -> Result<Self> {
        if spec.0.len() > rank {
            return Err(Error::invalid("the partition spec is longer than the array's rank")
                .expected(format_args!("at most {rank} entries"))
                .found(format_args!("`{spec}`")));
        }
        let mut seen: Vec<&str> = Vec::new();
        for axis in spec.0.iter().flatten() {
            if mesh.axis_size(axis).is_none() {
                let names: Vec<&str> = mesh.axes.iter().map(|(name, _)| name.as_str()).collect();
                return Err(Error::invalid(format!("the mesh has no axis `{axis}`"))
                    .expected(format_args!("one of {}", names.join(", ")))
                    .found(format_args!("`{spec}`")));
            }
            if seen.contains(&axis.as_str()) {
                return Err(Error::invalid(format!("the partition spec `{spec}` uses axis `{axis}` twice")));
            }
            seen.push(axis);
        }
        Ok(Self { mesh, spec })
    }

    /// Into how many parts a dimension is divided.
    pub fn parts(&self, dim: usize) -> u64 {
        let axes = self.spec.0.get(dim).map(Vec::as_slice).unwrap_or_default();
        axes.iter().filter_map(|axis| self.mesh.axis_size(axis)).product()
    }

    /// The first dimension that its axes do not divide evenly, with its extent and parts: what JAX refuses.
    pub fn uneven(&self, shape: &[u64]) -> Option<(usize, u64, u64)> {
        (0..shape.len()).map(|dim| (dim, shape[dim], self.parts(dim))).find(|(_, extent, parts)| extent % parts != 0)
    }

    /// The part of an array that the device at this position holds. A dimension of extent n over k parts is cut into
    /// pieces of c = ceil(n/k): part i is `[min(i*c, n), min((i+1)*c, n))`, so late parts may be short or empty.
    pub fn region(&self, shape: &[u64], position: usize) -> Region {
        let mut region = Region::whole(shape);
        for (dim, &extent) in shape.iter().enumerate() {
            let axes = self.spec.0.get(dim).map(Vec::as_slice).unwrap_or_default();
            let mut part = 0;
            for axis in axes {
                let Some(index) = self.mesh.axes.iter().position(|(name, _)| name == axis) else { continue };
                part = part * self.mesh.axes[index].1 + self.mesh.coordinate(position as u64, index);
            }
            let size = extent.div_ceil(self.parts(dim));
            region.start[dim] = part.saturating_mul(size).min(extent);
            region.extent[dim] = (part + 1).saturating_mul(size).min(extent) - region.start[dim];
        }
        region
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_axes_divide_one_dimension_major_first() {
        let mesh = Mesh::new([("a", 2), ("b", 2)], Device::cpus(4)).unwrap();
        let sharding = Sharding::new(mesh, spec!["b" + "a", _], 2).unwrap();
        let starts: Vec<u64> = (0..4).map(|position| sharding.region(&[8, 3], position).start[0]).collect();
        assert_eq!(starts, [0, 4, 2, 6]);
    }

    #[test]
    fn uneven_division_leaves_short_and_empty_parts() {
        let mesh = Mesh::line(Device::cpus(4)).unwrap();
        let sharding = Sharding::new(mesh, spec!["device"], 1).unwrap();
        let extents: Vec<u64> = (0..4).map(|position| sharding.region(&[5], position).extent[0]).collect();
        assert_eq!(extents, [2, 2, 1, 0]);
        assert_eq!(sharding.uneven(&[5]), Some((0, 5, 4)));
        assert_eq!(sharding.uneven(&[8]), None);
    }

    #[test]
    fn specs_are_checked() {
        let mesh = Mesh::new([("x", 2)], Device::cpus(2)).unwrap();
        assert!(Sharding::new(Arc::clone(&mesh), spec!["y"], 1).is_err());
        assert!(Sharding::new(Arc::clone(&mesh), spec![_, "x"], 1).is_err());
        assert!(Sharding::new(Arc::clone(&mesh), spec!["x", "x"], 2).is_err());
        assert!(Mesh::new([("x", 3)], Device::cpus(2)).is_err());
        assert_eq!(Spec::parse("_,a+b").unwrap(), spec![_, "a" + "b"]);
        assert_eq!(Spec::parse("").unwrap(), spec![]);
    }

    #[test]
    fn ranks_come_from_any_launcher() {
        let slurm = |name: &str| match name {
            "SLURM_PROCID" => Some("3".to_owned()),
            "SLURM_NTASKS" => Some("8".to_owned()),
            _ => None,
        };
        assert_eq!(Process::from_lookup(slurm).unwrap(), Some(Process { rank: 3, world: 8 }));
        assert_eq!(Process::from_lookup(|_| None).unwrap(), None);
        assert!(Process::from_lookup(|_| Some("5".to_owned())).is_err());
    }
}
