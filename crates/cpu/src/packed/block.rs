//! The three formats: how 32 rows × 32 columns lie in memory.
//!
//! Weights of bf16 lie in pairs of columns, one half of the rows after the other, quantised ones in quads. Quads `step`
//! and `step + 4` are read together, so that a byte of q4 holds the same place of both:
//!
//! ```text
//! bf16 pair 0 of rows 0..16 │ pair 1 of rows 0..16 │ ... │ pair 0 of rows 16..32 │ pair 1 of rows 16..32 │ ...
//! q8   scales f16[2][16] │ quad 0 of rows 0..16, of rows 16..32 │ quad 1 of rows 0..16, of rows 16..32 │ ...
//! q4   scales f16[2][16] │ quads 0 (low halves) and 4 (high) of rows 0..16, of rows 16..32 │ quads 1 and 5 ...
//! ```

use std::mem::MaybeUninit;

use bytemuck::{Pod, Zeroable};
use half::f16;

use super::quantise::{Quantised, q4, q8};
use super::{GROUP, PANEL_ROWS};
use crate::numbers::Element;
use crate::simd::{LANE_ROWS, PAIR, PanelPairs, PanelQuads, QUAD, QuadBytes, Simd};

/// Steps of a quantised block, two quads each.
pub(super) const STEPS: usize = GROUP / QUAD / 2;

/// 32 rows × 32 columns of weights.
pub(crate) trait Block: Pod + Send + Sync {
    /// Sets a row of a block that was zeros.
    fn set_row(&mut self, row: usize, weights: &[f32; GROUP]);
}

/// A block of small integers with a scale per row.
pub(crate) trait QuantisedBlock: Block {
    /// What is added to a weight's value to make it an unsigned byte.
    const OFFSET: i32;
    /// Fewest tokens that a matrix unit multiplies faster than vectors do.
    const FEWEST_TILED: usize;

    /// The scales of rows 0..16 and 16..32.
    fn scales(&self) -> &[[f16; LANE_ROWS]; 2];

    /// Quads `step` and `step + STEPS` of 16 rows, the lower or the upper half.
    fn quads<S: Simd>(&self, simd: S, step: usize, half: usize) -> [S::Quads; 2];

    /// All weights as signed bytes, as they are stored or in `room`.
    fn signed_quads<'a>(&'a self, room: &'a mut MaybeUninit<PanelQuads>) -> &'a PanelQuads;
}

/// A block of bf16 weights.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Bf16Block {
    /// `[half][pair of columns]`
    pub(super) halves: PanelPairs,
}

/// A block of 8-bit weights.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Q8Block {
    scales: [[f16; LANE_ROWS]; 2],
    /// `[quad][half]`
    quads: PanelQuads,
}

/// A block of 4-bit weights.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Q4Block {
    scales: [[f16; LANE_ROWS]; 2],
    /// `[step][half]`
    quads: [[QuadBytes; 2]; STEPS],
}

const _: () = assert!(size_of::<Bf16Block>() * 8 == GROUP * PANEL_ROWS * 16);
const _: () = assert!(size_of::<Q8Block>() * 8 == GROUP * PANEL_ROWS * 17 / 2);
const _: () = assert!(size_of::<Q4Block>() * 8 == GROUP * PANEL_ROWS * 9 / 2);

// SAFETY: arrays of numbers, for which all zeros is a value.
unsafe impl Zeroable for Bf16Block {}
// SAFETY: `repr(C)` arrays of numbers for which any bits are a value; the sizes above leave no room for padding.
unsafe impl Pod for Bf16Block {}
// SAFETY: as for `Bf16Block`.
unsafe impl Zeroable for Q8Block {}
// SAFETY: as for `Bf16Block`.
unsafe impl Pod for Q8Block {}
// SAFETY: as for `Bf16Block`.
unsafe impl Zeroable for Q4Block {}
// SAFETY: as for `Bf16Block`.
unsafe impl Pod for Q4Block {}

impl Block for Bf16Block {
    #[inline(always)]
    fn set_row(&mut self, row: usize, weights: &[f32; GROUP]) {
        let half = &mut self.halves[row / LANE_ROWS];
        for (pair, weights) in half.iter_mut().zip(weights.as_chunks::<PAIR>().0) {
            pair[row % LANE_ROWS] = [weights[0], weights[1]].map(Element::from_f32);
        }
    }
}

impl Block for Q8Block {
    #[inline(always)]
    fn set_row(&mut self, row: usize, weights: &[f32; GROUP]) {
        let Quantised { scale, values } = q8(weights);
        let half = row / LANE_ROWS;
        self.scales[half][row % LANE_ROWS] = scale;
        for (column, value) in values.into_iter().enumerate() {
            let (quad, byte) = place(column, row);
            self.quads[quad][half][byte] = value as u8;
        }
    }
}

impl QuantisedBlock for Q8Block {
    const OFFSET: i32 = 128;
    const FEWEST_TILED: usize = 14;

    #[inline(always)]
    fn scales(&self) -> &[[f16; LANE_ROWS]; 2] {
        &self.scales
    }

    #[inline(always)]
    fn quads<S: Simd>(&self, simd: S, step: usize, half: usize) -> [S::Quads; 2] {
        [simd.bytes(&self.quads[step][half]), simd.bytes(&self.quads[step + STEPS][half])]
    }

    #[inline(always)]
    fn signed_quads<'a>(&'a self, _: &'a mut MaybeUninit<PanelQuads>) -> &'a PanelQuads {
        &self.quads
    }
}

impl Block for Q4Block {
    #[inline(always)]
    fn set_row(&mut self, row: usize, weights: &[f32; GROUP]) {
        let Quantised { scale, values } = q4(weights);
        let half = row / LANE_ROWS;
        self.scales[half][row % LANE_ROWS] = scale;
        for (column, value) in values.into_iter().enumerate() {
            let (quad, byte) = place(column, row);
            // Every place is written once.
            self.quads[quad % STEPS][half][byte] |= ((value + Self::OFFSET) as u8) << (4 * (quad / STEPS));
        }
    }
}

impl QuantisedBlock for Q4Block {
    const OFFSET: i32 = 8;
    const FEWEST_TILED: usize = 12;

    #[inline(always)]
    fn scales(&self) -> &[[f16; LANE_ROWS]; 2] {
        &self.scales
    }

    #[inline(always)]
    fn quads<S: Simd>(&self, simd: S, step: usize, half: usize) -> [S::Quads; 2] {
        simd.nibbles(&self.quads[step][half])
    }

    #[inline(always)]
    fn signed_quads<'a>(&'a self, room: &'a mut MaybeUninit<PanelQuads>) -> &'a PanelQuads {
        let rows: *mut QuadBytes = room.as_mut_ptr().cast();
        for quad in 0..GROUP / QUAD {
            for half in 0..2 {
                let shift = 4 * (quad / STEPS);
                let mut weights = self.quads[quad % STEPS][half];
                weights
                    .iter_mut()
                    .for_each(|byte| *byte = (*byte >> shift & 15).wrapping_sub(Self::OFFSET as u8));
                // SAFETY: the room is that of two halves of all quads.
                unsafe { rows.add(2 * quad + half).write(weights) };
            }
        }
        // SAFETY: all of it was written.
        unsafe { room.assume_init_ref() }
    }
}

/// Where a column's quantised weight of a row lies: the quad, and the byte of the row's half.
fn place(column: usize, row: usize) -> (usize, usize) {
    (column / QUAD, row % LANE_ROWS * QUAD + column % QUAD)
}
