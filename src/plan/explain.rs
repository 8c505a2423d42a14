//! A plan in words and as JSON: what will be read, decoded and held, and whether it fits.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;

use serde_json::{Value as Json, json};

use super::parts::addressable;
use super::{Device, Plan, PlannedLeaf, Source};
use crate::error::printable;
use crate::limits::{DEVICE_ALIGN, LANE_EXTRA_BYTES, PACK_BYTES};

/// What a machine has, to say whether a plan fits.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Capacity {
    /// Host memory that is free for use, in bytes, where that is known.
    pub host_bytes: Option<u64>,
    /// Free memory of GPUs, by ordinal, in bytes, where that is known.
    pub gpu_bytes: BTreeMap<u32, u64>,
}

/// What a plan needs of one GPU, whatever the number of logical devices on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GpuNeed {
    /// The GPU's ordinal.
    pub ordinal: u32,
    /// Bytes of its shards.
    pub results: u64,
    /// Bytes in which slabs wait for kernels, at most.
    pub staging: u64,
}

impl GpuNeed {
    /// All of it, in bytes.
    pub fn bytes(&self) -> u64 {
        self.results.saturating_add(self.staging)
    }
}

/// What does not fit: the device (`host` for memory that all CPU devices share), what it needs and what it has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shortage {
    /// The device.
    pub device: String,
    /// Bytes needed.
    pub needed: u64,
    /// Bytes available.
    pub available: u64,
}

/// What one device of this process holds, and what is done for it. What several devices share counts for each of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceCost {
    /// The device.
    pub device: Device,
    /// Bytes that it holds.
    pub bytes: u64,
    /// Stored bytes that it needs: of uncompressed chunks its elements, else whole units.
    pub needed: u64,
    /// Stored bytes of the units that it takes part in.
    pub read: u64,
    /// Bytes that those units decode to.
    pub decoded: u64,
}

impl Plan {
    /// What every device of this process holds and costs, in the order of the meshes.
    pub fn device_costs(&self) -> Vec<DeviceCost> {
        let held = self.device_bytes();
        let mut costs: Vec<DeviceCost> =
            held.iter().map(|&(device, bytes)| DeviceCost { device, bytes, needed: 0, read: 0, decoded: 0 }).collect();
        let at: HashMap<Device, usize> = held.iter().enumerate().map(|(at, (device, _))| (*device, at)).collect();
        // Stored bytes that a device needs of the unit at hand; `None` if it takes no part.
        let mut needs: Vec<Option<u64>> = vec![None; costs.len()];
        let mut touched: Vec<usize> = Vec::new();
        for unit in &self.units {
            let array = &self.arrays[unit.array as usize];
            let stored = !matches!(unit.source, Source::Fill(_));
            let in_parts = addressable(&array.codecs) && !unit.indexed;
            for placement in &unit.placements {
                let shard = &self.shards[placement.shard as usize];
                let mesh = &self.leaves[shard.leaf as usize].sharding.mesh;
                let elements = placement.region.volume().saturating_mul(array.dtype.size() as u64);
                for &position in &shard.devices {
                    let Some(&device) = at.get(&mesh.devices()[position as usize].device) else { continue };
                    if needs[device].is_none() {
                        touched.push(device);
                    }
                    let need = needs[device].get_or_insert(0);
                    *need = if in_parts { need.saturating_add(elements) } else { unit.stored_bytes() };
                }
            }
            for device in touched.drain(..) {
                let need = needs[device].take().unwrap_or_default();
                if stored {
                    // Leaves that show the same elements twice need them once.
                    costs[device].needed += need.min(unit.stored_bytes());
                    costs[device].read += unit.stored_bytes();
                    costs[device].decoded += unit.decoded_bytes;
                }
            }
        }
        costs
    }

    /// The most host memory in use at once: results on CPU devices, and staging.
    pub fn peak_host_bytes(&self) -> u64 {
        self.result_bytes() + self.staging_bytes()
    }

    /// The most memory of GPUs in use at once, of all of them together.
    pub fn peak_device_bytes(&self) -> u64 {
        self.gpu_needs().iter().map(GpuNeed::bytes).sum()
    }

    /// What the load needs of each GPU of this process: results, and a slot for each worker to stage in.
    pub fn gpu_needs(&self) -> Vec<GpuNeed> {
        let mut results: BTreeMap<u32, u64> = BTreeMap::new();
        for shard in &self.shards {
            if let Some(ordinal) = self.device(shard).gpu() {
                let bytes = results.entry(ordinal).or_default();
                *bytes =
                    bytes.saturating_add(shard.bytes.saturating_add(DEVICE_ALIGN - 1) / DEVICE_ALIGN * DEVICE_ALIGN);
            }
        }
        let lane = self.limits.slot_bytes.max(PACK_BYTES as u64) + LANE_EXTRA_BYTES as u64;
        let staging = lane * u64::from(self.limits.workers);
        results.into_iter().map(|(ordinal, results)| GpuNeed { ordinal, results, staging }).collect()
    }

    /// What does not fit into this machine.
    pub fn shortages(&self, capacity: &Capacity) -> Vec<Shortage> {
        let host = (capacity.host_bytes, self.peak_host_bytes(), "host".to_owned());
        let gpus = self.gpu_needs().into_iter().map(|need| {
            (capacity.gpu_bytes.get(&need.ordinal).copied(), need.bytes(), format!("cuda:{}", need.ordinal))
        });
        let short = std::iter::once(host).chain(gpus).filter_map(|(available, needed, device)| {
            let available = available.filter(|available| needed > *available)?;
            Some(Shortage { device, needed, available })
        });
        short.collect()
    }

    /// Bytes that the whole plan decodes or reads for each byte that is needed of it.
    pub fn amplification(&self) -> f64 {
        ratio(self.bytes_read(), self.bytes_needed())
    }

    /// The plan as one JSON object, schema 1.
    pub fn json(&self, capacity: &Capacity) -> Json {
        let device = |cost: &DeviceCost| {
            json!({
                "device": cost.device.to_string(),
                "bytes": cost.bytes,
                "bytes_needed": cost.needed,
                "bytes_read": cost.read,
                "bytes_decoded": cost.decoded,
            })
        };
        let leaf = |leaf: &PlannedLeaf| {
            let parts = leaf.parts.iter().enumerate().map(|(position, part)| {
                let index: Vec<[u64; 2]> =
                    (0..part.region.rank()).map(|d| [part.region.start[d], part.region.end(d)]).collect();
                json!({"device": position, "index": index, "local": part.shard.is_some()})
            });
            json!({
                "path": leaf.path,
                "dtype": leaf.dtype.name(),
                "shape": leaf.shape,
                "spec": leaf.sharding.spec.to_string(),
                "mesh": leaf.sharding.mesh.to_string(),
                "bytes_logical": leaf.bytes_logical,
                "bytes_needed": leaf.bytes_needed,
                "bytes_read": leaf.bytes_read,
                "bytes_decoded": leaf.bytes_decoded,
                "amplification": ratio(leaf.bytes_read, leaf.bytes_needed),
                "units": leaf.units,
                "shards": parts.collect::<Vec<_>>(),
            })
        };
        let gpu = |need: &GpuNeed| {
            json!({
                "device": format!("cuda:{}", need.ordinal),
                "results": need.results,
                "staging": need.staging,
                "needed": need.bytes(),
                "free": capacity.gpu_bytes.get(&need.ordinal),
            })
        };
        let shortages = self.shortages(capacity);
        let short =
            |short: &Shortage| json!({"device": short.device, "needed": short.needed, "available": short.available});
        json!({
            "schema": 1,
            "bytes_logical": self.bytes_logical(),
            "bytes_needed": self.bytes_needed(),
            "bytes_read": self.bytes_read(),
            "bytes_decoded": self.bytes_decoded(),
            "amplification": self.amplification(),
            "requests": self.requests(),
            "units": self.units.len(),
            "files": self.files.len(),
            "peak_host_bytes": self.peak_host_bytes(),
            "staging_bytes": self.staging_bytes(),
            "peak_device_bytes": self.peak_device_bytes(),
            "gpus": self.gpu_needs().iter().map(gpu).collect::<Vec<_>>(),
            "fits": shortages.is_empty(),
            "shortages": shortages.iter().map(short).collect::<Vec<_>>(),
            "devices": self.device_costs().iter().map(device).collect::<Vec<_>>(),
            "leaves": self.leaves.iter().map(leaf).collect::<Vec<_>>(),
        })
    }

    /// The plan in words: totals, a line a leaf, a line a device.
    pub fn text(&self, capacity: &Capacity) -> String {
        let mut text = String::new();
        const COLUMNS: [&str; 8] = ["leaf", "type", "shape", "spec", "needed", "read", "decoded", "x needed"];
        let mut rows: Vec<[String; 8]> = vec![COLUMNS.map(str::to_owned)];
        for leaf in &self.leaves {
            let name = leaf.path.to_string();
            rows.push([
                if name.is_empty() { "(root)".to_owned() } else { printable(&name).into_owned() },
                leaf.dtype.to_string(),
                format!("{:?}", leaf.shape),
                leaf.sharding.spec.to_string(),
                human_bytes(leaf.bytes_needed),
                human_bytes(leaf.bytes_read),
                human_bytes(leaf.bytes_decoded),
                if leaf.bytes_needed == 0 {
                    "-".to_owned()
                } else {
                    format!("{:.2}", ratio(leaf.bytes_read, leaf.bytes_needed))
                },
            ]);
        }
        let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: [usize; 8] = std::array::from_fn(width);
        for row in &rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(widths) {
                line += cell;
                // Not by a format's width, which is 16 bits wide.
                line.extend(std::iter::repeat_n(' ', width.saturating_sub(cell.chars().count()) + 2));
            }
            text.extend([line.trim_end(), "\n"]);
        }
        let _ = writeln!(
            text,
            "needed {}, read {} ({:.2} x) in {} requests over {} files, decoded {}, result {}",
            human_bytes(self.bytes_needed()),
            human_bytes(self.bytes_read()),
            self.amplification(),
            self.requests(),
            self.files.len(),
            human_bytes(self.bytes_decoded()),
            human_bytes(self.bytes_logical()),
        );
        let _ = writeln!(
            text,
            "peak host memory {}: {} results, at most {} staging",
            human_bytes(self.peak_host_bytes()),
            human_bytes(self.result_bytes()),
            human_bytes(self.staging_bytes()),
        );
        for need in self.gpu_needs() {
            let free = capacity.gpu_bytes.get(&need.ordinal);
            let free = free.map_or_else(|| "an unknown amount".to_owned(), |free| human_bytes(*free));
            let _ = writeln!(
                text,
                "peak memory of cuda:{} {} of {free} free: {} results, at most {} staging",
                need.ordinal,
                human_bytes(need.bytes()),
                human_bytes(need.results),
                human_bytes(need.staging),
            );
        }
        for DeviceCost { device, bytes, needed, read, decoded } in self.device_costs() {
            let shared = if matches!(device, Device::Cpu(_)) { " (host memory; replicas share it)" } else { "" };
            let _ = writeln!(
                text,
                "  {device}  holds {}{shared}, needs {} of {} read and {} decoded",
                human_bytes(bytes),
                human_bytes(needed),
                human_bytes(read),
                human_bytes(decoded),
            );
        }
        for short in self.shortages(capacity) {
            let Shortage { device, needed, available } = short;
            let _ =
                writeln!(text, "does not fit: {device} needs {}, has {}", human_bytes(needed), human_bytes(available));
        }
        text
    }
}

impl std::fmt::Display for Plan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text(&Capacity::default()))
    }
}

fn ratio(above: u64, below: u64) -> f64 {
    if below == 0 { 1.0 } else { above as f64 / below as f64 }
}

/// Bytes for people: `1.50 GiB`.
pub fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.2} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_well() {
        assert_eq!(human_bytes(1023), "1023 B");
        assert_eq!(human_bytes(1536 << 20), "1.50 GiB");
        assert_eq!(human_bytes(u64::MAX), "16.00 EiB");
    }
}
