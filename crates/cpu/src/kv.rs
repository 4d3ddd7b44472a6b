//! One layer's paged keys and values, and the verb that fills them.
//!
//! ```text
//! keys      [kv_head][slot / 16][pair of features][slot % 16]     slot = block * block_size + offset
//! values    [kv_head][slot][head_dim]
//! scales    [kv_head][slot]                                       of 8-bit heads, one for a head of a token
//! ```
//!
//! A kv head's plane is contiguous, so the task that owns the head owns its memory. Keys lie as rows of packed weights
//! do, 16 side by side: a score is a lane, and attention needs no sum across lanes.

use backend::{AttentionShape, BackendError, RopeTable};
use bytemuck::Pod;
use half::bf16;

use crate::grid::{Grid, Tile, Tiles};
use crate::isa::Kernel;
use crate::numbers::{Element, nearest_i8, scale_and_factor};
use crate::simd::{LANE_ROWS, PAIR, RowPairs, Simd};
use crate::tensor::{Buffer, Rows};

/// Most features of a head: attention keeps its accumulators on the stack.
pub(crate) const MAX_HEAD_DIM: usize = 256;

/// In which format keys and values are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KvFormat {
    /// 16 bits a feature.
    #[default]
    Bf16,
    /// 8 bits a feature, and 32 for a token's head.
    Q8,
}

impl KvFormat {
    /// All formats, the most precise first.
    pub const ALL: [Self; 2] = [Self::Bf16, Self::Q8];

    /// The name in settings and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::Q8 => "q8",
        }
    }

    /// Bytes of one head's key, or value, of one token.
    pub fn head_bytes(self, head_dim: usize) -> usize {
        match self {
            Self::Bf16 => 2 * head_dim,
            Self::Q8 => head_dim + 4,
        }
    }
}

/// One layer's cache.
pub struct KvCache {
    pub(crate) shape: AttentionShape,
    pub(crate) block_size: usize,
    num_slots: usize,
    pub(crate) storage: KvStorage,
}

/// The planes of all kv heads.
pub(crate) enum KvStorage {
    Bf16 { keys: Buffer<RowPairs>, values: Buffer<bf16> },
    Q8 { keys: Q8Heads<RowPairsQ8>, values: Q8Heads<i8> },
}

/// [`RowPairs`] in 8 bits.
pub(crate) type RowPairsQ8 = [[i8; PAIR]; LANE_ROWS];

/// Heads in 8 bits: feature `i` is `features[i] · scale`.
pub(crate) struct Q8Heads<T> {
    pub(crate) features: Buffer<T>,
    pub(crate) scales: Buffer<f32>,
}

impl KvCache {
    /// Allocates a cache.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`] if the system refuses, [`BackendError::Unsupported`] if a head has more than
    /// [`MAX_HEAD_DIM`] features.
    pub(crate) fn new(
        shape: AttentionShape,
        num_blocks: usize,
        block_size: usize,
        format: KvFormat,
    ) -> Result<Self, BackendError> {
        if shape.head_dim > MAX_HEAD_DIM {
            let what = format!("a head_dim of {}, more than {MAX_HEAD_DIM}", shape.head_dim);
            return Err(BackendError::Unsupported(what));
        }
        assert!(shape.num_heads.is_multiple_of(shape.num_kv_heads) && shape.head_dim.is_multiple_of(2));
        let num_slots = (num_blocks * block_size).next_multiple_of(LANE_ROWS);
        let (len, num_heads) = (num_slots * shape.kv_features(), num_slots * shape.num_kv_heads);
        let (keys, values) = ("the key cache", "the value cache");
        let num_pairs = len / (LANE_ROWS * PAIR);
        let storage = match format {
            KvFormat::Bf16 => {
                let (keys, values) = (Buffer::zeroed(keys, num_pairs)?, Buffer::zeroed(values, len)?);
                KvStorage::Bf16 { keys, values }
            }
            KvFormat::Q8 => KvStorage::Q8 {
                keys: Q8Heads::new(keys, num_pairs, num_heads)?,
                values: Q8Heads::new(values, len, num_heads)?,
            },
        };
        Ok(Self { shape, block_size, num_slots, storage })
    }

    /// Query heads that share a kv head.
    pub(crate) fn group_len(&self) -> usize {
        self.shape.num_heads / self.shape.num_kv_heads
    }

    /// Features of one kv head's values.
    pub(crate) fn plane_len(&self) -> usize {
        self.num_slots * self.shape.head_dim
    }

    /// Pairs, of 16 slots each, of one kv head's keys.
    pub(crate) fn key_plane_len(&self) -> usize {
        self.plane_len() / (LANE_ROWS * PAIR)
    }

    /// Scales of one kv head's plane.
    pub(crate) fn num_slots(&self) -> usize {
        self.num_slots
    }
}

impl<T: Pod + Send> Q8Heads<T> {
    fn new(what: &str, len: usize, num_heads: usize) -> Result<Self, BackendError> {
        Ok(Self { features: Buffer::zeroed(what, len)?, scales: Buffer::zeroed(what, num_heads)? })
    }

    /// The planes, one for each kv head.
    pub(crate) fn planes(&mut self, plane_len: usize, num_slots: usize) -> impl Tiles<Tile = Q8Plane<'_, T>> {
        (Grid::row_bands(&mut self.features, plane_len, 1), Grid::row_bands(&mut self.scales, num_slots, 1))
    }
}

/// One kv head's plane in 8 bits: features and scales.
pub(crate) type Q8Plane<'a, T> = (Tile<'a, T>, Tile<'a, f32>);

/// Where a slot's keys lie in a plane: the first pair, and the lane.
#[inline(always)]
pub(crate) fn key_place(slot: usize, head_dim: usize) -> (usize, usize) {
    (slot / LANE_ROWS * (head_dim / PAIR), slot % LANE_ROWS)
}

/// One kv head's plane, to be written: the type of its elements tells keys from values.
pub(crate) trait Plane {
    /// Stores a token's head.
    fn store(&mut self, slot: usize, head: &[f32]);
}

impl Plane for Tile<'_, RowPairs> {
    #[inline(always)]
    fn store(&mut self, slot: usize, head: &[f32]) {
        store_key(self.row(self.rows().start), slot, head, Element::from_f32);
    }
}

impl Plane for Tile<'_, bf16> {
    #[inline(always)]
    fn store(&mut self, slot: usize, head: &[f32]) {
        store_value(self.row(self.rows().start), slot, head, Element::from_f32);
    }
}

impl Plane for Q8Plane<'_, RowPairsQ8> {
    #[inline(always)]
    fn store(&mut self, slot: usize, head: &[f32]) {
        let factor = store_scale(&mut self.1, slot, head);
        store_key(self.0.row(self.0.rows().start), slot, head, |x| nearest_i8(x * factor));
    }
}

impl Plane for Q8Plane<'_, i8> {
    #[inline(always)]
    fn store(&mut self, slot: usize, head: &[f32]) {
        let factor = store_scale(&mut self.1, slot, head);
        store_value(self.0.row(self.0.rows().start), slot, head, |x| nearest_i8(x * factor));
    }
}

#[inline(always)]
fn store_key<T>(plane: &mut [[[T; PAIR]; LANE_ROWS]], slot: usize, head: &[f32], round: impl Fn(f32) -> T) {
    let (first, lane) = key_place(slot, head.len());
    for (stored, pair) in plane[first..].iter_mut().zip(head.as_chunks::<PAIR>().0) {
        stored[lane] = [round(pair[0]), round(pair[1])];
    }
}

#[inline(always)]
fn store_value<T>(plane: &mut [T], slot: usize, head: &[f32], round: impl Fn(f32) -> T) {
    let stored = plane[slot * head.len()..][..head.len()].iter_mut();
    stored.zip(head).for_each(|(stored, &x)| *stored = round(x));
}

/// Stores the scale of a head of 8 bits; the factor that makes its features integers.
#[inline(always)]
fn store_scale(scales: &mut Tile<'_, f32>, slot: usize, head: &[f32]) -> f32 {
    // Magnitudes are ordered like their bits, and above all numbers comes what is not one.
    let bits = head.iter().map(|x| x.to_bits() & 0x7fff_ffff).fold(0, u32::max);
    let (scale, factor) = scale_and_factor(f32::from_bits(bits));
    scales.row(scales.rows().start)[slot] = scale;
    factor
}

/// Turns the queries and the key of one kv head's group and stores its keys and values, for all tokens.
///
/// The tile of `q` covers the group's columns.
pub(crate) struct RopeStoreKv<'a, K, V> {
    pub(crate) shape: AttentionShape,
    pub(crate) qkv: Rows<'a, f32>,
    pub(crate) rope: &'a RopeTable,
    pub(crate) positions: &'a [u32],
    pub(crate) slot_mapping: &'a [u32],
    pub(crate) q: Tile<'a, bf16>,
    pub(crate) keys: K,
    pub(crate) values: V,
}

impl<K: Plane, V: Plane> Kernel for RopeStoreKv<'_, K, V> {
    #[inline(always)]
    fn run<S: Simd>(mut self, _: S) {
        let AttentionShape { head_dim, num_heads, num_kv_heads, .. } = self.shape;
        let queries = self.q.cols();
        let kv_head = queries.start / (num_heads / num_kv_heads * head_dim);
        let key = self.shape.q_features() + kv_head * head_dim;
        let value = key + self.shape.kv_features();
        let mut turned = [0.0; MAX_HEAD_DIM];
        for row in self.q.rows() {
            let qkv = self.qkv.row(row);
            let angles = Angles::new(self.rope, self.positions[row] as usize);
            let heads = qkv[queries.clone()].chunks_exact(head_dim);
            for (head, out) in heads.zip(self.q.row(row).chunks_exact_mut(head_dim)) {
                angles.turn(head, out);
            }
            let slot = self.slot_mapping[row] as usize;
            angles.turn(&qkv[key..][..head_dim], &mut turned[..head_dim]);
            self.keys.store(slot, &turned[..head_dim]);
            self.values.store(slot, &qkv[value..][..head_dim]);
        }
    }
}

/// The angles of one position, `[head_dim / 2]` each.
struct Angles<'a> {
    cos: &'a [f32],
    sin: &'a [f32],
}

impl<'a> Angles<'a> {
    #[inline(always)]
    fn new(rope: &'a RopeTable, position: usize) -> Self {
        let range = position * rope.half_dim..(position + 1) * rope.half_dim;
        Self { cos: &rope.cos[range.clone()], sin: &rope.sin[range] }
    }

    /// Turns feature `i` and feature `i + head_dim / 2` by angle `i`.
    #[inline(always)]
    fn turn<E: Element>(&self, head: &[f32], out: &mut [E]) {
        let half = self.cos.len();
        let sin = &self.sin[..half];
        let (first, second) = (&head[..half], &head[half..2 * half]);
        let (out_first, out_second) = out[..2 * half].split_at_mut(half);
        for i in 0..half {
            out_first[i] = Element::from_f32(first[i] * self.cos[i] - second[i] * sin[i]);
            out_second[i] = Element::from_f32(second[i] * self.cos[i] + first[i] * sin[i]);
        }
    }
}
