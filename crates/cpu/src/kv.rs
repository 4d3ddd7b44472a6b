//! One layer's paged keys and values, and the verb that fills them.
//!
//! ```text
//! keys, values   [kv_head][slot][head_dim]    slot = block * block_size + offset
//! ```
//!
//! A kv head's plane is contiguous, so the task that owns the head owns its memory, and the keys of
//! neighbouring positions follow one another within a block.

use backend::{AttentionShape, BackendError, RopeTable};
use half::bf16;

use crate::grid::Tile;
use crate::isa::Kernel;
use crate::numbers::Element;
use crate::simd::Simd;
use crate::tensor::{Buffer, Rows};

/// Most features of a head: attention keeps its accumulators on the stack.
pub(crate) const MAX_HEAD_DIM: usize = 256;

/// One layer's cache.
pub struct KvCache {
    pub(crate) shape: AttentionShape,
    pub(crate) block_size: usize,
    pub(crate) num_slots: usize,
    pub(crate) keys: Buffer<bf16>,
    pub(crate) values: Buffer<bf16>,
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
    ) -> Result<Self, BackendError> {
        if shape.head_dim > MAX_HEAD_DIM {
            let what = format!("a head_dim of {}, more than {MAX_HEAD_DIM}", shape.head_dim);
            return Err(BackendError::Unsupported(what));
        }
        assert!(shape.num_heads.is_multiple_of(shape.num_kv_heads) && shape.head_dim.is_multiple_of(2));
        let num_slots = num_blocks * block_size;
        let len = num_slots * shape.kv_features();
        let keys = Buffer::zeroed("the key cache", len)?;
        let values = Buffer::zeroed("the value cache", len)?;
        Ok(Self { shape, block_size, num_slots, keys, values })
    }

    /// Query heads that share a kv head.
    pub(crate) fn group_len(&self) -> usize {
        self.shape.num_heads / self.shape.num_kv_heads
    }

    /// Elements of one kv head's plane.
    pub(crate) fn plane_len(&self) -> usize {
        self.num_slots * self.shape.head_dim
    }
}

/// Turns the queries and the key of one kv head's group and stores its keys and values, for all tokens.
///
/// The tile of `q` covers the group's columns; those of `keys` and `values` are the head's planes.
pub(crate) struct RopeStoreKv<'a> {
    pub(crate) shape: AttentionShape,
    pub(crate) qkv: Rows<'a, f32>,
    pub(crate) rope: &'a RopeTable,
    pub(crate) positions: &'a [u32],
    pub(crate) slot_mapping: &'a [u32],
    pub(crate) q: Tile<'a, bf16>,
    pub(crate) keys: Tile<'a, bf16>,
    pub(crate) values: Tile<'a, bf16>,
}

impl Kernel for RopeStoreKv<'_> {
    #[inline(always)]
    fn run<S: Simd>(mut self, _: S) {
        let AttentionShape { head_dim, .. } = self.shape;
        let kv_head = self.keys.rows().start;
        let queries = self.q.cols();
        let key = self.shape.q_features() + kv_head * head_dim;
        let value = key + self.shape.kv_features();
        let key_plane = self.keys.row(kv_head);
        let value_plane = self.values.row(kv_head);
        for row in self.q.rows() {
            let qkv = self.qkv.row(row);
            let angles = Angles::new(self.rope, self.positions[row] as usize);
            let heads = qkv[queries.clone()].chunks_exact(head_dim);
            for (head, out) in heads.zip(self.q.row(row).chunks_exact_mut(head_dim)) {
                angles.turn(head, out);
            }
            let slot = self.slot_mapping[row] as usize * head_dim;
            angles.turn(&qkv[key..][..head_dim], &mut key_plane[slot..][..head_dim]);
            let stored = value_plane[slot..][..head_dim].iter_mut();
            stored.zip(&qkv[value..]).for_each(|(stored, &x)| *stored = Element::from_f32(x));
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
    fn turn(&self, head: &[f32], out: &mut [bf16]) {
        let half = self.cos.len();
        let (first, second) = (&head[..half], &head[half..2 * half]);
        let (out_first, out_second) = out.split_at_mut(half);
        for i in 0..half {
            out_first[i] = Element::from_f32(first[i] * self.cos[i] - second[i] * self.sin[i]);
            out_second[i] = Element::from_f32(second[i] * self.cos[i] + first[i] * self.sin[i]);
        }
    }
}
