//! Boxes of indices, the slow and plain way.

/// Every index of a box of these extents, row-major.
pub fn indices(extent: &[u64]) -> Vec<Vec<u64>> {
    let mut all = vec![Vec::new()];
    for &count in extent {
        let longer = |head: &Vec<u64>| (0..count).map(|at| [head.as_slice(), &[at]].concat()).collect::<Vec<_>>();
        all = all.iter().flat_map(longer).collect();
    }
    all
}

/// Row-major position of an index.
pub fn position(index: &[u64], extent: &[u64]) -> usize {
    index.iter().zip(extent).fold(0, |position, (at, count)| position * *count as usize + *at as usize)
}

pub fn volume(extent: &[u64]) -> usize {
    extent.iter().product::<u64>() as usize
}
