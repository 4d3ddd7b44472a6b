//! The cached keys and values of one kv head, in either format of the cache.

use half::bf16;

use super::CHUNK;
use super::scores::KeyLanes;
use super::softmax::Values;
use crate::kv::{KvCache, KvStorage, MAX_HEAD_DIM, RowPairsQ8, key_place};
use crate::simd::{CACHE_LINE, LANE_ROWS, PAIR, RowPairs, Simd};

/// Where 16 keys are widened to bf16 or put side by side, if they must be.
pub(super) type KeyScratch = [RowPairs; MAX_HEAD_DIM / PAIR];

/// Where the values of a chunk are widened to bf16, if they must be.
pub(super) type WideValues = [[bf16; MAX_HEAD_DIM]; CHUNK];

/// The planes of one kv head, to be read.
pub(super) trait CachedHead: Copy {
    /// The keys that lie side by side with a slot's, as they lie; of 8-bit heads before their scales.
    fn keys_beside<'a>(&'a self, slot: usize, head_dim: usize, scratch: &'a mut KeyScratch) -> KeyLanes<'a>;

    /// The keys of slots from anywhere, put side by side from lane `lane` on; of 8-bit heads before their scales. Other
    /// lanes may hold anything.
    fn keys_of<'a>(
        &'a self,
        slots: impl Iterator<Item = usize>,
        lane: usize,
        head_dim: usize,
        scratch: &'a mut KeyScratch,
    ) -> KeyLanes<'a>;

    /// The values of some slots; of 8-bit heads before their scales.
    fn values<'a>(
        &'a self,
        slots: impl Iterator<Item = usize>,
        head_dim: usize,
        scratch: &'a mut WideValues,
    ) -> Values<'a>;

    /// Asks for a slot's part of both planes.
    fn prefetch<S: Simd>(&self, simd: S, slot: usize, head_dim: usize);

    /// The scales of the slots' keys, of 8-bit heads.
    #[inline(always)]
    fn key_scales(&self) -> Option<&[f32]> {
        None
    }

    /// The scales of the slots' values, of 8-bit heads.
    #[inline(always)]
    fn value_scales(&self) -> Option<&[f32]> {
        None
    }
}

/// What is done with a kv head, in either format of the cache.
pub(super) trait OverKvHead {
    fn run<H: CachedHead>(self, kv_head: usize, head: H);
}

/// Calls `work` with a kv head.
#[inline(always)]
pub(super) fn over_kv_head(kv: &KvCache, kv_head: usize, work: impl OverKvHead) {
    let plane = |len: usize| kv_head * len..(kv_head + 1) * len;
    let [key_plane, value_plane, slots] = [kv.key_plane_len(), kv.plane_len(), kv.num_slots()].map(plane);
    match &kv.storage {
        KvStorage::Bf16 { keys, values } => {
            work.run(kv_head, Bf16Head { keys: &keys[key_plane], values: &values[value_plane] });
        }
        KvStorage::Q8 { keys, values } => {
            let head = Q8Head {
                keys: &keys.features[key_plane],
                key_scales: &keys.scales[slots.clone()],
                values: &values.features[value_plane],
                value_scales: &values.scales[slots],
            };
            work.run(kv_head, head);
        }
    }
}

#[derive(Clone, Copy)]
struct Bf16Head<'k> {
    keys: &'k [RowPairs],
    values: &'k [bf16],
}

impl CachedHead for Bf16Head<'_> {
    #[inline(always)]
    fn keys_beside<'a>(&'a self, slot: usize, head_dim: usize, _: &'a mut KeyScratch) -> KeyLanes<'a> {
        let (first, _) = key_place(slot, head_dim);
        &self.keys[first..][..head_dim / PAIR]
    }

    #[inline(always)]
    fn keys_of<'a>(
        &'a self,
        slots: impl Iterator<Item = usize>,
        lane: usize,
        head_dim: usize,
        scratch: &'a mut KeyScratch,
    ) -> KeyLanes<'a> {
        gather(self.keys, slots, lane, head_dim, scratch, |x| x)
    }

    #[inline(always)]
    fn values<'a>(
        &'a self,
        slots: impl Iterator<Item = usize>,
        head_dim: usize,
        _: &'a mut WideValues,
    ) -> Values<'a> {
        Values::new(slots.map(|slot| &self.values[slot * head_dim..][..head_dim]))
    }

    #[inline(always)]
    fn prefetch<S: Simd>(&self, simd: S, slot: usize, head_dim: usize) {
        prefetch(simd, [self.keys.as_flattened().as_flattened(), self.values], slot, head_dim);
    }
}

#[derive(Clone, Copy)]
struct Q8Head<'k> {
    keys: &'k [RowPairsQ8],
    key_scales: &'k [f32],
    values: &'k [i8],
    value_scales: &'k [f32],
}

impl CachedHead for Q8Head<'_> {
    #[inline(always)]
    fn keys_beside<'a>(&'a self, slot: usize, head_dim: usize, scratch: &'a mut KeyScratch) -> KeyLanes<'a> {
        let (first, _) = key_place(slot, head_dim);
        let wide = &mut scratch[..head_dim / PAIR];
        for (wide, keys) in wide.iter_mut().zip(&self.keys[first..]) {
            let pairs = wide.as_flattened_mut().iter_mut().zip(keys.as_flattened());
            pairs.for_each(|(wide, &x)| *wide = widened(x));
        }
        wide
    }

    #[inline(always)]
    fn keys_of<'a>(
        &'a self,
        slots: impl Iterator<Item = usize>,
        lane: usize,
        head_dim: usize,
        scratch: &'a mut KeyScratch,
    ) -> KeyLanes<'a> {
        gather(self.keys, slots, lane, head_dim, scratch, widened)
    }

    #[inline(always)]
    fn values<'a>(
        &'a self,
        slots: impl Iterator<Item = usize>,
        head_dim: usize,
        scratch: &'a mut WideValues,
    ) -> Values<'a> {
        Values::new(scratch.iter_mut().zip(slots).map(|(wide, slot)| {
            let wide = &mut wide[..head_dim];
            let features = &self.values[slot * head_dim..][..head_dim];
            wide.iter_mut().zip(features).for_each(|(wide, &x)| *wide = widened(x));
            &*wide
        }))
    }

    #[inline(always)]
    fn prefetch<S: Simd>(&self, simd: S, slot: usize, head_dim: usize) {
        prefetch(simd, [self.keys.as_flattened().as_flattened(), self.values], slot, head_dim);
    }

    #[inline(always)]
    fn key_scales(&self) -> Option<&[f32]> {
        Some(self.key_scales)
    }

    #[inline(always)]
    fn value_scales(&self) -> Option<&[f32]> {
        Some(self.value_scales)
    }
}

/// Multiplies rows of a chunk's lanes, from `first_lane` on, by the scales of their slots, if there are any.
#[inline(always)]
pub(super) fn scale(
    rows: &mut [[f32; CHUNK]],
    scales: Option<&[f32]>,
    slots: impl Iterator<Item = usize>,
    first_lane: usize,
) {
    let Some(scales) = scales else { return };
    let mut lanes = [0.0; CHUNK];
    lanes[first_lane..].iter_mut().zip(slots).for_each(|(lane, slot)| *lane = scales[slot]);
    for row in rows {
        row.iter_mut().zip(lanes).for_each(|(number, scale)| *number *= scale);
    }
}

/// Asks for a slot's part of keys and values. Keys that lie side by side are as long together as their slots' values, so
/// each slot answers for as many of their cache lines.
#[inline(always)]
fn prefetch<S: Simd, T>(simd: S, planes: [&[T]; 2], slot: usize, head_dim: usize) {
    for plane in planes {
        let part = &plane[slot * head_dim..][..head_dim];
        for line in part.chunks(CACHE_LINE / size_of::<T>()) {
            simd.prefetch(&line[0]);
        }
    }
}

/// Puts the keys of slots from anywhere side by side, from lane `lane` on.
#[inline(always)]
fn gather<'a, T: Copy>(
    keys: &[[[T; PAIR]; LANE_ROWS]],
    slots: impl Iterator<Item = usize>,
    lane: usize,
    head_dim: usize,
    scratch: &'a mut KeyScratch,
    widen: impl Fn(T) -> bf16,
) -> KeyLanes<'a> {
    let gathered = &mut scratch[..head_dim / PAIR];
    for (lane, slot) in (lane..).zip(slots) {
        let (first, from) = key_place(slot, head_dim);
        for (gathered, keys) in gathered.iter_mut().zip(&keys[first..]) {
            let [even, odd] = keys[from];
            gathered[lane] = [widen(even), widen(odd)];
        }
    }
    gathered
}

/// An integer that 8 bits hold needs no rounding in bf16.
#[inline(always)]
fn widened(x: i8) -> bf16 {
    bf16::from_bits((f32::from(x).to_bits() >> 16) as u16)
}
