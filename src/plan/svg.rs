//! A plan as a picture: the mesh, and how every array lies on it.
//!
//! Each device of the mesh has a colour. The mesh is drawn as a grid (the last axis runs to the right, all others down),
//! each array as a rectangle of its last two dimensions, cut into the parts that devices hold. A part has a frame; one that several
//! devices hold is striped with their colours inside it. Arrays with equal shape and sharding are drawn once, with a count.

use std::collections::HashMap;
use std::fmt::Write;

use super::{Mesh, Plan, PlannedLeaf};
use crate::limits::{SVG_ARRAYS_MAX, SVG_DEVICES_MAX, SVG_STRIPES_MAX};
use crate::shape::Region;

/// Draws the plan as an SVG document.
pub fn draw(plan: &Plan) -> String {
    let mut picture = Picture { body: String::new(), y: MARGIN, width: 4.0 * MARGIN };
    let mut meshes: Vec<&Mesh> = Vec::new();
    for leaf in &plan.leaves {
        if !meshes.contains(&&*leaf.sharding.mesh) {
            meshes.push(&leaf.sharding.mesh);
        }
    }
    for mesh in meshes {
        picture.mesh(mesh);
    }
    // Leaves that look alike are drawn once, in the order of their first.
    let mut groups: Vec<(&PlannedLeaf, usize)> = Vec::new();
    let mut seen: HashMap<(String, String, String), usize> = HashMap::new();
    for leaf in &plan.leaves {
        let look = (format!("{:?}", leaf.shape), leaf.sharding.spec.to_string(), leaf.sharding.mesh.to_string());
        let next = groups.len();
        match *seen.entry(look).or_insert(next) {
            group if group < next => groups[group].1 += 1,
            _ => groups.push((leaf, 1)),
        }
    }
    for (leaf, count) in groups.iter().take(SVG_ARRAYS_MAX) {
        picture.array(leaf, *count);
    }
    if let Some(more @ 1..) = groups.len().checked_sub(SVG_ARRAYS_MAX) {
        picture.text(&format!("and {more} more kinds of arrays"));
    }
    if plan.leaves.is_empty() {
        picture.text("no arrays");
    }
    let Picture { body, y, width } = picture;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width:.0}\" height=\"{height:.0}\" viewBox=\"0 0 {width:.0} {height:.0}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n{body}</svg>\n",
        height = y + MARGIN,
    )
}

struct Picture {
    body: String,
    y: f64,
    width: f64,
}

impl Picture {
    fn text(&mut self, text: &str) {
        self.y += LINE;
        // Writing to a String cannot fail.
        let _ =
            writeln!(self.body, "<text x=\"{MARGIN}\" y=\"{:.1}\" fill=\"#222222\">{}</text>", self.y, escaped(text));
        self.width = self.width.max(MARGIN * 2.0 + text.chars().count() as f64 * 7.2);
        self.y += 6.0;
    }

    fn rect(&mut self, x: f64, y: f64, w: f64, h: f64, fill: &str, stroke: &str) {
        self.width = self.width.max(x + w + MARGIN);
        let _ = writeln!(
            self.body,
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{w:.1}\" height=\"{h:.1}\" fill=\"{fill}\" stroke=\"{stroke}\" stroke-width=\"1\"/>"
        );
    }

    /// The devices as a grid.
    fn mesh(&mut self, mesh: &Mesh) {
        let count = mesh.devices().len();
        self.text(&format!("mesh {mesh}, {count} devices"));
        let columns = mesh
            .axes()
            .last()
            .map_or(1, |(_, size)| usize::try_from(*size).unwrap_or(usize::MAX))
            .clamp(1, count.max(1));
        for position in 0..count.min(SVG_DEVICES_MAX) {
            let x = MARGIN + (position % columns) as f64 * CELL_WIDTH;
            let y = self.y + (position / columns) as f64 * CELL_HEIGHT;
            self.rect(x, y, CELL_WIDTH, CELL_HEIGHT, &colour(position, count), "#ffffff");
            let device = mesh.devices()[position];
            let label = if mesh.process().world > 1 {
                format!("r{} {}", device.rank, device.device)
            } else {
                device.device.to_string()
            };
            let _ = writeln!(
                self.body,
                "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#222222\">{}</text>",
                x + CELL_WIDTH / 2.0,
                y + CELL_HEIGHT / 2.0 + 4.0,
                escaped(&label)
            );
        }
        self.y += count.min(SVG_DEVICES_MAX).div_ceil(columns) as f64 * CELL_HEIGHT + LINE;
    }

    /// One array: its last two dimensions, cut into parts.
    fn array(&mut self, leaf: &PlannedLeaf, count: usize) {
        let same = if count > 1 { format!("  (and {} alike)", count - 1) } else { String::new() };
        let spec = leaf.sharding.spec.to_string();
        let spec = if spec.is_empty() { "replicated".to_owned() } else { spec };
        self.text(&format!("{}  {} {:?}  {spec}{same}", leaf.path, leaf.dtype, leaf.shape));
        let rank = leaf.shape.len();
        let extent = |dim: Option<usize>| dim.map_or(1, |dim| leaf.shape[dim]).max(1) as f64;
        let (row_dim, column_dim) = (rank.checked_sub(2), rank.checked_sub(1));
        let (rows, columns) = (extent(row_dim), extent(column_dim));
        let scale = ARRAY_SIDE_MAX / rows.max(columns);
        let (width, height) = ((columns * scale).max(ARRAY_SIDE_MIN), (rows * scale).max(ARRAY_SIDE_MIN));
        // Parts that look equal in these two dimensions, with everybody who holds one.
        let mut parts: Vec<([u64; 4], Vec<usize>)> = Vec::new();
        for (position, part) in leaf.parts.iter().enumerate() {
            let side =
                |region: &Region, dim: Option<usize>| dim.map_or((0, 1), |dim| (region.start[dim], region.end(dim)));
            let ((top, bottom), (left, right)) = (side(&part.region, row_dim), side(&part.region, column_dim));
            if part.region.is_empty() {
                continue;
            }
            let key = [top, bottom, left, right];
            match parts.iter_mut().find(|(have, _)| *have == key) {
                Some((_, holders)) => holders.push(position),
                None => parts.push((key, vec![position])),
            }
        }
        let devices = leaf.parts.len();
        for ([top, bottom, left, right], holders) in parts {
            let x = MARGIN + left as f64 / columns * width;
            let y = self.y + top as f64 / rows * height;
            let (w, h) = ((right - left) as f64 / columns * width, (bottom - top) as f64 / rows * height);
            let drawn = holders.len().min(SVG_STRIPES_MAX);
            for (stripe, position) in holders.iter().take(drawn).enumerate() {
                let width = w / drawn as f64;
                self.rect(x + width * stripe as f64, y, width, h, &colour(*position, devices), "none");
            }
            self.rect(x, y, w, h, "none", "#333333");
        }
        self.y += height + LINE;
    }
}

/// A colour for each device: hues around the circle, light enough for black text.
fn colour(position: usize, count: usize) -> String {
    format!("hsl({:.0},65%,72%)", position as f64 * 360.0 / count.max(1) as f64)
}

fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for char in text.chars() {
        match char {
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '&' => out.push_str("&amp;"),
            '"' => out.push_str("&quot;"),
            // What XML has no way to write.
            char if char.is_control() || matches!(char, '\u{FFFE}' | '\u{FFFF}') => out.push('\u{FFFD}'),
            char => out.push(char),
        }
    }
    out
}

/// All lengths are in pixels.
const MARGIN: f64 = 20.0;
const LINE: f64 = 18.0;
const CELL_WIDTH: f64 = 74.0;
const CELL_HEIGHT: f64 = 28.0;
const ARRAY_SIDE_MAX: f64 = 160.0;
const ARRAY_SIDE_MIN: f64 = 14.0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_break_the_document() {
        assert_eq!(escaped("a<b>&\"\u{1}\u{FFFE}"), "a&lt;b&gt;&amp;&quot;\u{FFFD}\u{FFFD}");
    }
}
