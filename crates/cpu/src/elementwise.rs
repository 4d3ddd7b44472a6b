//! The verbs that treat every row, or every element, by itself: embed, add, rms_norm, gather_rows, sample.
//!
//! They are a small share of a step, so they are plain loops that the compiler vectorises; their sums run in
//! fixed lanes, so that a row's result is the same wherever it is computed.

use backend::sampling::sample_row;
use backend::{NonFiniteLogits, SampleRow, Sampled};
use half::bf16;

use crate::grid::Tile;
use crate::isa::Kernel;
use crate::matrix::Matrix;
use crate::numbers::Element;
use crate::simd::Simd;
use crate::tensor::Rows;

/// Lanes of a sum of squares.
const LANES: usize = 16;

/// `out[t] = table[token_ids[t]]`.
pub(crate) struct Embed<'a> {
    pub(crate) table: &'a Matrix,
    pub(crate) token_ids: &'a [u32],
    pub(crate) out: Tile<'a, f32>,
}

impl Kernel for Embed<'_> {
    #[inline(always)]
    fn run<S: Simd>(mut self, _: S) {
        for row in self.out.rows() {
            let embedding = self.table.row(self.token_ids[row] as usize);
            self.out.row(row).iter_mut().zip(embedding).for_each(|(out, x)| *out = Element::to_f32(*x));
        }
    }
}

/// `x += y`.
pub(crate) struct Add<'a> {
    pub(crate) x: Tile<'a, f32>,
    pub(crate) y: Rows<'a, f32>,
}

impl Kernel for Add<'_> {
    #[inline(always)]
    fn run<S: Simd>(mut self, _: S) {
        for row in self.x.rows() {
            add(self.x.row(row), self.y.row(row));
        }
    }
}

/// `out = x / sqrt(mean(x²) + eps) * weight`.
pub(crate) struct RmsNorm<'a> {
    pub(crate) x: Rows<'a, f32>,
    pub(crate) weight: &'a [f32],
    pub(crate) eps: f32,
    pub(crate) out: Tile<'a, bf16>,
}

impl Kernel for RmsNorm<'_> {
    #[inline(always)]
    fn run<S: Simd>(mut self, _: S) {
        for row in self.out.rows() {
            rms_norm(self.x.row(row), self.weight, self.eps, self.out.row(row));
        }
    }
}

/// `residual += delta; out = rms_norm(residual)`.
pub(crate) struct AddRmsNorm<'a> {
    pub(crate) residual: Tile<'a, f32>,
    pub(crate) delta: Rows<'a, f32>,
    pub(crate) weight: &'a [f32],
    pub(crate) eps: f32,
    pub(crate) out: Tile<'a, bf16>,
}

impl Kernel for AddRmsNorm<'_> {
    #[inline(always)]
    fn run<S: Simd>(mut self, _: S) {
        for row in self.out.rows() {
            let residual = self.residual.row(row);
            add(residual, self.delta.row(row));
            rms_norm(residual, self.weight, self.eps, self.out.row(row));
        }
    }
}

/// `out[i] = x[indices[i]]`.
pub(crate) struct GatherRows<'a, E> {
    pub(crate) x: Rows<'a, E>,
    pub(crate) indices: &'a [u32],
    pub(crate) out: Tile<'a, E>,
}

impl<E: Element> Kernel for GatherRows<'_, E> {
    #[inline(always)]
    fn run<S: Simd>(mut self, _: S) {
        for row in self.out.rows() {
            self.out.row(row).copy_from_slice(self.x.row(self.indices[row] as usize));
        }
    }
}

/// Takes a token from each row of logits.
pub(crate) struct Sample<'a> {
    pub(crate) logits: Rows<'a, f32>,
    pub(crate) rows: &'a [SampleRow<'a>],
    pub(crate) sampled: Tile<'a, Result<Sampled, NonFiniteLogits>>,
}

impl Kernel for Sample<'_> {
    #[inline(always)]
    fn run<S: Simd>(mut self, _: S) {
        for row in self.sampled.rows() {
            self.sampled.row(row)[0] = sample_row(self.logits.row(row), &self.rows[row]);
        }
    }
}

#[inline(always)]
fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

#[inline(always)]
fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [bf16]) {
    let mean_square = sum_of_squares(x) / x.len() as f32;
    let scale = 1.0 / (mean_square + eps).sqrt();
    for ((out, &x), &weight) in out.iter_mut().zip(x).zip(weight) {
        *out = Element::from_f32(x * scale * weight);
    }
}

#[inline(always)]
fn sum_of_squares(x: &[f32]) -> f32 {
    let mut lanes = [0.0; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] += chunk[lane] * chunk[lane];
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane += x * x;
    }
    crate::numbers::sum_lanes(&mut lanes)
}
