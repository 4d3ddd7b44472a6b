//! The cached keys, or values, of one kv head, in either format of the cache.

use std::ops::Range;

use half::bf16;

use super::CHUNK;
use super::scores::CachedRows;
use crate::kv::{MAX_HEAD_DIM, Q8Heads};

/// The plane of one kv head, to be read: all its keys, or all its values.
pub(super) trait CachedHead: Copy {
    /// Where a chunk is widened to bf16, if it must be.
    type Scratch;

    fn scratch() -> Self::Scratch;

    /// The features of some slots; of 8-bit heads before their scales.
    fn rows<'a>(
        &'a self,
        slots: impl Iterator<Item = usize>,
        head_dim: usize,
        scratch: &'a mut Self::Scratch,
    ) -> CachedRows<'a>;

    /// Multiplies each number by the scale of its slot.
    fn scale(&self, slots: impl Iterator<Item = usize>, numbers: &mut [f32]);
}

impl CachedHead for &[bf16] {
    type Scratch = ();

    fn scratch() {}

    #[inline(always)]
    fn rows<'a>(
        &'a self,
        slots: impl Iterator<Item = usize>,
        head_dim: usize,
        (): &'a mut (),
    ) -> CachedRows<'a> {
        CachedRows::new(slots.map(|slot| &self[slot * head_dim..][..head_dim]))
    }

    #[inline(always)]
    fn scale(&self, _: impl Iterator<Item = usize>, _: &mut [f32]) {}
}

/// An 8-bit plane.
#[derive(Clone, Copy)]
pub(super) struct Q8Head<'k> {
    features: &'k [i8],
    scales: &'k [f32],
}

impl<'k> Q8Head<'k> {
    #[inline(always)]
    pub(super) fn new(heads: &'k Q8Heads, features: Range<usize>, scales: Range<usize>) -> Self {
        Self { features: &heads.features[features], scales: &heads.scales[scales] }
    }
}

impl CachedHead for Q8Head<'_> {
    type Scratch = [[bf16; MAX_HEAD_DIM]; CHUNK];

    fn scratch() -> Self::Scratch {
        [[bf16::ZERO; MAX_HEAD_DIM]; CHUNK]
    }

    #[inline(always)]
    fn rows<'a>(
        &'a self,
        slots: impl Iterator<Item = usize>,
        head_dim: usize,
        scratch: &'a mut Self::Scratch,
    ) -> CachedRows<'a> {
        CachedRows::new(scratch.iter_mut().zip(slots).map(|(wide, slot)| {
            let wide = &mut wide[..head_dim];
            let features = &self.features[slot * head_dim..][..head_dim];
            wide.iter_mut().zip(features).for_each(|(wide, &x)| *wide = widened(x));
            &*wide
        }))
    }

    #[inline(always)]
    fn scale(&self, slots: impl Iterator<Item = usize>, numbers: &mut [f32]) {
        numbers.iter_mut().zip(slots).for_each(|(number, slot)| *number *= self.scales[slot]);
    }
}

/// An integer that 8 bits hold needs no rounding in bf16.
#[inline(always)]
fn widened(x: i8) -> bf16 {
    bf16::from_bits((f32::from(x).to_bits() >> 16) as u16)
}
