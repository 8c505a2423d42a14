//! Views: how a target array lies in stored ones.
//!
//! A [`View`] is a list of [`Piece`]s. Each piece maps a box of the target onto a box of one stored array: every target
//! dimension is either one stored dimension or new, every other stored dimension is held at one index. Renaming needs
//! nothing here; transposing permutes the dimensions, taking fixes or narrows one, splitting makes several targets with
//! narrowed pieces, stacking and concatenating put several pieces side by side. A piece only translates boxes, so no view
//! ever needs a temporary array.

use crate::error::{Error, Result};
use crate::shape::Region;

/// A target array as pieces of stored ones. The pieces do not overlap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// Extents of the target that the pieces make up, before padding or truncation.
    pub shape: Vec<u64>,
    /// The pieces.
    pub pieces: Vec<Piece>,
}

/// A box of the target that comes from one stored array.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Which stored array, by its position in the catalogue.
    pub array: usize,
    /// Where the piece lies in the target.
    pub at: Region,
    /// For every target dimension the stored dimension that runs along it; `None` for a new dimension (extent 1).
    pub dims: Vec<Option<usize>>,
    /// For every stored dimension the index at which the piece starts: the only index for dimensions not in `dims`.
    pub base: Vec<u64>,
}

impl View {
    /// A stored array as it is.
    pub fn whole(array: usize, shape: &[u64]) -> Self {
        let piece = Piece {
            array,
            at: Region::whole(shape),
            dims: (0..shape.len()).map(Some).collect(),
            base: vec![0; shape.len()],
        };
        Self { shape: shape.to_vec(), pieces: vec![piece] }
    }

    /// The view with its dimensions permuted: new dimension `i` is old dimension `order[i]`.
    ///
    /// # Errors
    /// An order that is no permutation of the dimensions.
    pub fn transpose(&self, order: &[usize]) -> Result<Self> {
        let mut seen = vec![false; self.shape.len()];
        let fits = order.len() == seen.len()
            && order.iter().all(|&dim| seen.get_mut(dim).is_some_and(|seen| !std::mem::replace(seen, true)));
        if !fits {
            return Err(Error::invalid("the order is no permutation of the dimensions")
                .expected(format_args!("each of 0..{} once", self.shape.len()))
                .found(format_args!("{order:?}")));
        }
        let pick = |values: &[u64]| order.iter().map(|&dim| values[dim]).collect::<Vec<_>>();
        let pieces = self.pieces.iter().map(|piece| Piece {
            array: piece.array,
            at: Region { start: pick(&piece.at.start), extent: pick(&piece.at.extent) },
            dims: order.iter().map(|&dim| piece.dims[dim]).collect(),
            base: piece.base.clone(),
        });
        Ok(Self { shape: pick(&self.shape), pieces: pieces.collect() })
    }

    /// The indices `[start, stop)` of one dimension, which stays.
    ///
    /// # Errors
    /// A dimension or a range outside the view.
    pub fn range(&self, dim: usize, start: u64, stop: u64) -> Result<Self> {
        let extent = *self.shape.get(dim).ok_or_else(|| self.no_dimension(dim))?;
        if start > stop || stop > extent {
            return Err(Error::invalid("the range lies outside the dimension")
                .expected(format_args!("start <= stop <= {extent} in dimension {dim}"))
                .found(format_args!("{start}..{stop}")));
        }
        let mut shape = self.shape.clone();
        shape[dim] = stop - start;
        let pieces = self.pieces.iter().filter_map(|piece| {
            let (first, last) = (piece.at.start[dim].max(start), piece.at.end(dim).min(stop));
            let mut piece = piece.clone();
            if let Some(stored) = piece.dims[dim] {
                piece.base[stored] += first.saturating_sub(piece.at.start[dim]);
            }
            piece.at.start[dim] = first.saturating_sub(start);
            piece.at.extent[dim] = last.saturating_sub(first);
            (!piece.at.is_empty()).then_some(piece)
        });
        Ok(Self { pieces: pieces.collect(), shape })
    }

    /// One index of a dimension, which disappears.
    ///
    /// # Errors
    /// A dimension or an index outside the view.
    pub fn index(&self, dim: usize, index: u64) -> Result<Self> {
        let extent = *self.shape.get(dim).ok_or_else(|| self.no_dimension(dim))?;
        if index >= extent {
            return Err(Error::invalid("the index lies outside the dimension")
                .expected(format_args!("an index below {extent} in dimension {dim}"))
                .found(index));
        }
        let mut view = self.range(dim, index, index + 1)?;
        view.shape.remove(dim);
        for piece in &mut view.pieces {
            piece.at.start.remove(dim);
            piece.at.extent.remove(dim);
            piece.dims.remove(dim);
        }
        Ok(view)
    }

    /// The views one after the other along a dimension that they all have.
    ///
    /// # Errors
    /// No view, or shapes that differ in another dimension.
    pub fn concatenate(views: &[Self], dim: usize) -> Result<Self> {
        let first = views.first().ok_or_else(|| Error::invalid("nothing to concatenate"))?;
        if dim >= first.shape.len() {
            return Err(first.no_dimension(dim));
        }
        let mut whole = Self { shape: first.shape.clone(), pieces: Vec::new() };
        whole.shape[dim] = 0;
        for view in views {
            let same = view.shape.len() == first.shape.len()
                && (0..first.shape.len()).all(|other| other == dim || view.shape[other] == first.shape[other]);
            if !same {
                return Err(Error::invalid("arrays of different shapes cannot be joined")
                    .expected(format_args!("{:?} except in dimension {dim}", first.shape))
                    .found(format_args!("{:?}", view.shape)));
            }
            whole.pieces.extend(view.pieces.iter().cloned().map(|mut piece| {
                piece.at.start[dim] += whole.shape[dim];
                piece
            }));
            whole.shape[dim] = whole.shape[dim]
                .checked_add(view.shape[dim])
                .ok_or_else(|| Error::invalid("the joined array is too large"))?;
        }
        Ok(whole)
    }

    /// The views side by side along a new dimension.
    ///
    /// # Errors
    /// No view, shapes that differ, or a dimension beyond the rank.
    pub fn stack(views: &[Self], dim: usize) -> Result<Self> {
        let raised = views.iter().map(|view| view.expand(dim)).collect::<Result<Vec<_>>>()?;
        Self::concatenate(&raised, dim)
    }

    /// The view with a new dimension of extent 1.
    fn expand(&self, dim: usize) -> Result<Self> {
        if dim > self.shape.len() {
            return Err(self.no_dimension(dim));
        }
        let mut view = self.clone();
        view.shape.insert(dim, 1);
        for piece in &mut view.pieces {
            piece.at.start.insert(dim, 0);
            piece.at.extent.insert(dim, 1);
            piece.dims.insert(dim, None);
        }
        Ok(view)
    }

    fn no_dimension(&self, dim: usize) -> Error {
        Error::invalid("no such dimension").expected(format_args!("a dimension of {:?}", self.shape)).found(dim)
    }
}

impl Piece {
    /// The box of the stored array behind a box of the target that lies inside the piece.
    pub fn stored(&self, target: &Region) -> Region {
        let mut region = Region { start: self.base.clone(), extent: vec![1; self.base.len()] };
        for (dim, stored) in self.dims.iter().enumerate() {
            if let Some(stored) = *stored {
                region.start[stored] += target.start[dim] - self.at.start[dim];
                region.extent[stored] = target.extent[dim];
            }
        }
        region
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_of_a_stack_transposed() {
        // stored [L=4, in=3, out=5] -> layer 2 -> [out, in]
        let view = View::whole(7, &[4, 3, 5]).index(0, 2).unwrap().transpose(&[1, 0]).unwrap();
        assert_eq!(view.shape, [5, 3]);
        let stored = view.pieces[0].stored(&Region { start: vec![1, 2], extent: vec![2, 1] });
        assert_eq!(stored, Region { start: vec![2, 2, 1], extent: vec![1, 1, 2] });
    }

    #[test]
    fn ranges_of_a_concatenation_keep_only_the_pieces_they_touch() {
        let parts = [View::whole(0, &[2, 3]), View::whole(1, &[4, 3]), View::whole(2, &[1, 3])];
        let whole = View::concatenate(&parts, 0).unwrap();
        assert_eq!(whole.shape, [7, 3]);
        let middle = whole.range(0, 3, 5).unwrap();
        assert_eq!(middle.pieces.len(), 1);
        assert_eq!((middle.pieces[0].array, middle.pieces[0].base.clone()), (1, vec![1, 0]));
        let stacked = View::stack(&[View::whole(0, &[2]), View::whole(1, &[2])], 1).unwrap();
        assert_eq!(stacked.shape, [2, 2]);
        assert!(View::stack(&[View::whole(0, &[2]), View::whole(1, &[3])], 0).is_err());
    }

    #[test]
    fn nonsense_is_refused() {
        let view = View::whole(0, &[2, 3]);
        assert!(view.transpose(&[0, 0]).is_err());
        assert!(view.transpose(&[0]).is_err());
        assert!(view.index(2, 0).is_err());
        assert!(view.index(1, 3).is_err());
        assert!(view.range(0, 2, 1).is_err());
        assert!(view.range(0, 0, 3).is_err());
    }
}
