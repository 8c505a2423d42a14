//! A plan in words and as JSON: what will be read, decoded and held, and whether it fits.

use std::fmt::Write;

use serde_json::{Value as Json, json};

use super::{Device, Plan, PlannedLeaf};

/// What a machine has, to say whether a plan fits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capacity {
    /// Host memory that is free for use, in bytes, where that is known.
    pub host_bytes: Option<u64>,
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

impl Plan {
    /// The most host memory in use at once: results on CPU devices, and staging.
    pub fn peak_host_bytes(&self) -> u64 {
        self.result_bytes() + self.staging_bytes()
    }

    /// The most memory of GPUs in use at once, of all of them together: results, and a slot for each worker to stage in.
    pub fn peak_device_bytes(&self) -> u64 {
        let staging = self.limits.slot_bytes * u64::from(self.limits.workers);
        self.gpu_bytes().iter().map(|(_, bytes)| bytes + staging).sum()
    }

    /// What does not fit into this machine.
    pub fn shortages(&self, capacity: Capacity) -> Vec<Shortage> {
        let needed = self.peak_host_bytes();
        let short = capacity.host_bytes.filter(|available| needed > *available);
        short.map(|available| Shortage { device: "host".to_owned(), needed, available }).into_iter().collect()
    }

    /// Bytes that the whole plan decodes or reads for each byte that is needed of it.
    pub fn amplification(&self) -> f64 {
        ratio(self.bytes_read(), self.bytes_needed())
    }

    /// The plan as one JSON object, schema 1.
    pub fn json(&self, capacity: Capacity) -> Json {
        let devices = self.device_bytes();
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
            "fits": shortages.is_empty(),
            "shortages": shortages.iter().map(short).collect::<Vec<_>>(),
            "devices": devices.iter().map(|(device, bytes)| json!({"device": device.to_string(), "bytes": bytes})).collect::<Vec<_>>(),
            "leaves": self.leaves.iter().map(leaf).collect::<Vec<_>>(),
        })
    }

    /// The plan in words: totals, a line a leaf, a line a device.
    pub fn text(&self, capacity: Capacity) -> String {
        let mut text = String::new();
        let mut rows: Vec<[String; 6]> = vec![["leaf", "type", "shape", "spec", "read", "x needed"].map(str::to_owned)];
        for leaf in &self.leaves {
            let name = leaf.path.to_string();
            rows.push([
                if name.is_empty() { "(root)".to_owned() } else { name },
                leaf.dtype.to_string(),
                format!("{:?}", leaf.shape),
                leaf.sharding.spec.to_string(),
                human_bytes(leaf.bytes_read),
                if leaf.bytes_needed == 0 {
                    "-".to_owned()
                } else {
                    format!("{:.2}", ratio(leaf.bytes_read, leaf.bytes_needed))
                },
            ]);
        }
        let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: [usize; 6] = std::array::from_fn(width);
        for row in &rows {
            let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}"));
            let line = cells.collect::<Vec<_>>().join("  ");
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{}", line.trim_end());
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
        if self.peak_device_bytes() > 0 {
            let _ = writeln!(text, "peak device memory at most {}", human_bytes(self.peak_device_bytes()));
        }
        for (device, bytes) in self.device_bytes() {
            let shared = if matches!(device, Device::Cpu(_)) { " (host memory; replicas share it)" } else { "" };
            let _ = writeln!(text, "  {device}  {}{shared}", human_bytes(bytes));
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
        f.write_str(&self.text(Capacity::default()))
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
