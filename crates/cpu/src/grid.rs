//! Handing out disjoint tiles of one buffer to the tasks of a run.
//!
//! ```text
//!            tile_cols
//!           ┌────┬────┬──┐
//! tile_rows │ 0  │ 1  │2 │     a tile is a rectangle of a row-major matrix, so its rows are not contiguous
//!           ├────┼────┼──┤     with one another; the last tiles of a row or column may be smaller
//!           │ 3  │ 4  │5 │
//!           └────┴────┴──┘
//! ```
//!
//! The borrow checker cannot see that rectangles are disjoint, so this file says it once for all verbs.

use std::marker::PhantomData;
use std::ops::Range;

/// What a run hands out, one piece per task.
///
/// # Safety
/// Pieces of different indices must not overlap in memory.
pub(crate) unsafe trait Tiles: Sync {
    /// The piece of one task.
    type Tile;

    /// Number of pieces.
    fn num_tiles(&self) -> usize;

    /// Takes one piece.
    ///
    /// # Safety
    /// `index < num_tiles()`, and each index is taken at most once.
    unsafe fn tile(&self, index: usize) -> Self::Tile;
}

/// A mutable row-major matrix cut into tiles.
pub(crate) struct Grid<'a, T> {
    data: *mut T,
    rows: usize,
    cols: usize,
    tile_rows: usize,
    tile_cols: usize,
    borrowed: PhantomData<&'a mut [T]>,
}

// SAFETY: sharing a grid lets threads take tiles, each an exclusive borrow of other elements, which is what
// sending `&mut T` to them would do.
unsafe impl<T: Send> Sync for Grid<'_, T> {}

impl<'a, T> Grid<'a, T> {
    /// Cuts a matrix of `cols` columns.
    ///
    /// # Panics
    /// If `data` is not a whole number of rows or a tile is empty.
    pub(crate) fn new(data: &'a mut [T], cols: usize, tile_rows: usize, tile_cols: usize) -> Self {
        assert!(tile_rows > 0 && tile_cols > 0 && cols > 0 && data.len().is_multiple_of(cols));
        let rows = data.len() / cols;
        Self { data: data.as_mut_ptr(), rows, cols, tile_rows, tile_cols, borrowed: PhantomData }
    }

    /// Cuts a matrix into bands of whole rows.
    pub(crate) fn row_bands(data: &'a mut [T], cols: usize, tile_rows: usize) -> Self {
        Self::new(data, cols, tile_rows, cols)
    }

    /// Cuts a matrix into bands of whole columns.
    pub(crate) fn column_bands(data: &'a mut [T], cols: usize, tile_cols: usize) -> Self {
        let rows = (data.len() / cols).max(1);
        Self::new(data, cols, rows, tile_cols)
    }
}

// SAFETY: tile `index` covers the rectangle of its row and column in the grid, and rectangles of different
// indices share no element.
unsafe impl<'a, T: Send> Tiles for Grid<'a, T> {
    type Tile = Tile<'a, T>;

    fn num_tiles(&self) -> usize {
        self.rows.div_ceil(self.tile_rows) * self.cols.div_ceil(self.tile_cols)
    }

    unsafe fn tile(&self, index: usize) -> Tile<'a, T> {
        let tiles_per_row = self.cols.div_ceil(self.tile_cols);
        let first_row = index / tiles_per_row * self.tile_rows;
        let first_col = index % tiles_per_row * self.tile_cols;
        assert!(first_row < self.rows);
        Tile {
            data: self.data,
            stride: self.cols,
            rows: first_row..self.rows.min(first_row + self.tile_rows),
            cols: first_col..self.cols.min(first_col + self.tile_cols),
            borrowed: PhantomData,
        }
    }
}

// SAFETY: pieces of different indices are made of pieces of different indices, which do not overlap.
unsafe impl<A: Tiles, B: Tiles> Tiles for (A, B) {
    type Tile = (A::Tile, B::Tile);

    fn num_tiles(&self) -> usize {
        assert_eq!(self.0.num_tiles(), self.1.num_tiles());
        self.0.num_tiles()
    }

    unsafe fn tile(&self, index: usize) -> Self::Tile {
        // SAFETY: the caller's promise is the same for both.
        unsafe { (self.0.tile(index), self.1.tile(index)) }
    }
}

/// One rectangle of a matrix, exclusively borrowed.
pub(crate) struct Tile<'a, T> {
    data: *mut T,
    stride: usize,
    rows: Range<usize>,
    cols: Range<usize>,
    borrowed: PhantomData<&'a mut [T]>,
}

impl<T> Tile<'_, T> {
    /// The rows it covers.
    pub(crate) fn rows(&self) -> Range<usize> {
        self.rows.clone()
    }

    /// The columns it covers.
    pub(crate) fn cols(&self) -> Range<usize> {
        self.cols.clone()
    }

    /// The covered elements of one of the matrix's rows.
    ///
    /// # Panics
    /// If the tile does not cover the row.
    #[inline(always)]
    pub(crate) fn row(&mut self, row: usize) -> &mut [T] {
        assert!(self.rows.contains(&row));
        // SAFETY: `rows` and `cols` lie within the matrix that the grid borrowed, only this tile covers them,
        // and `&mut self` is held as long as the slice.
        unsafe {
            let first = self.data.add(row * self.stride + self.cols.start);
            std::slice::from_raw_parts_mut(first, self.cols.len())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_every_element_once() {
        for (rows, cols, tile_rows, tile_cols) in
            [(1, 1, 1, 1), (5, 7, 2, 3), (4, 6, 4, 2), (3, 8, 8, 8), (0, 3, 1, 1)]
        {
            let mut data = vec![0; rows * cols];
            let grid = Grid::new(&mut data, cols, tile_rows, tile_cols);
            for index in 0..grid.num_tiles() {
                // SAFETY: the loop takes each index once.
                let mut tile = unsafe { grid.tile(index) };
                for row in tile.rows() {
                    tile.row(row).iter_mut().for_each(|x| *x += 1);
                }
            }
            assert!(data.iter().all(|&x| x == 1), "[{rows}, {cols}] in [{tile_rows}, {tile_cols}]: {data:?}");
        }
    }
}
