//! The two formats: how 32 rows × 32 columns lie in memory.
//!
//! A block's columns are eight quads of four. Quads `step` and `step + 4` are read together, so that a byte of q4
//! holds the same place of both:
//!
//! ```text
//! q8   scales f16[2][16] │ step 0: quad 0 of rows 0..16, of rows 16..32, quad 4 of rows 0..16, of rows 16..32 │ ...
//! q4   scales f16[2][16] │ step 0: quads 0 (low halves) and 4 (high) of rows 0..16, of rows 16..32 │ step 1 ...
//! ```

use bytemuck::{Pod, Zeroable};
use half::f16;

use super::GROUP;
use super::quantise::{Quantised, q4, q8};
use crate::simd::{QUAD, QUAD_ROWS, QuadBytes, Simd};

/// Steps of a block, two quads each.
pub(super) const STEPS: usize = GROUP / QUAD / 2;

/// 32 rows × 32 columns of quantised weights.
pub(crate) trait Block: Pod + Send + Sync {
    /// What is added to a weight's value to store it.
    const OFFSET: i32;

    /// The scales of rows 0..16 and 16..32.
    fn scales(&self) -> &[[f16; QUAD_ROWS]; 2];

    /// Quads `step` and `step + STEPS` of 16 rows, the lower or the upper half.
    fn quads<S: Simd>(&self, simd: S, step: usize, half: usize) -> [S::Quads; 2];

    /// Quantises a row's weights.
    fn set_row(&mut self, row: usize, weights: &[f32; GROUP]);
}

/// A block of 8-bit weights.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Q8Block {
    scales: [[f16; QUAD_ROWS]; 2],
    /// `[step][first or second quad][half]`
    quads: [[[QuadBytes; 2]; 2]; STEPS],
}

/// A block of 4-bit weights.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Q4Block {
    scales: [[f16; QUAD_ROWS]; 2],
    /// `[step][half]`
    quads: [[QuadBytes; 2]; STEPS],
}

const _: () = assert!(size_of::<Q8Block>() * 8 == GROUP * 2 * QUAD_ROWS * 17 / 2);
const _: () = assert!(size_of::<Q4Block>() * 8 == GROUP * 2 * QUAD_ROWS * 9 / 2);

// SAFETY: arrays of numbers, for which all zeros is a value.
unsafe impl Zeroable for Q8Block {}
// SAFETY: `repr(C)` arrays of numbers for which any bits are a value; the sizes above leave no room for padding.
unsafe impl Pod for Q8Block {}
// SAFETY: as for `Q8Block`.
unsafe impl Zeroable for Q4Block {}
// SAFETY: as for `Q8Block`.
unsafe impl Pod for Q4Block {}

/// Where a column's weight of a row lies: the step, which of its two quads, and the byte.
fn place(column: usize, row: usize) -> (usize, usize, usize) {
    let quad = column / QUAD;
    (quad % STEPS, quad / STEPS, row % QUAD_ROWS * QUAD + column % QUAD)
}

impl Block for Q8Block {
    const OFFSET: i32 = 128;

    #[inline(always)]
    fn scales(&self) -> &[[f16; QUAD_ROWS]; 2] {
        &self.scales
    }

    #[inline(always)]
    fn quads<S: Simd>(&self, simd: S, step: usize, half: usize) -> [S::Quads; 2] {
        let [first, second] = &self.quads[step];
        [simd.bytes(&first[half]), simd.bytes(&second[half])]
    }

    #[inline(always)]
    fn set_row(&mut self, row: usize, weights: &[f32; GROUP]) {
        let Quantised { scale, values } = q8(weights);
        let half = row / QUAD_ROWS;
        self.scales[half][row % QUAD_ROWS] = scale;
        for (column, value) in values.into_iter().enumerate() {
            let (step, quad, byte) = place(column, row);
            self.quads[step][quad][half][byte] = (value + Self::OFFSET) as u8;
        }
    }
}

impl Block for Q4Block {
    const OFFSET: i32 = 8;

    #[inline(always)]
    fn scales(&self) -> &[[f16; QUAD_ROWS]; 2] {
        &self.scales
    }

    #[inline(always)]
    fn quads<S: Simd>(&self, simd: S, step: usize, half: usize) -> [S::Quads; 2] {
        simd.nibbles(&self.quads[step][half])
    }

    #[inline(always)]
    fn set_row(&mut self, row: usize, weights: &[f32; GROUP]) {
        let Quantised { scale, values } = q4(weights);
        let half = row / QUAD_ROWS;
        self.scales[half][row % QUAD_ROWS] = scale;
        for (column, value) in values.into_iter().enumerate() {
            let (step, quad, byte) = place(column, row);
            // A block starts as zeros, and every place is written once.
            self.quads[step][half][byte] |= ((value + Self::OFFSET) as u8) << (4 * quad);
        }
    }
}
