//! What a model's handles are on a GPU. Rows are padded with zeros to a multiple of 64 features, the width of a tile of
//! the products, so no kernel has a ragged edge along them; every kernel leaves the padding zero.

use backend::DType;

use crate::device::Buffer;
use crate::kernels::{AttentionKernels, KvAddresses, KvArguments};

/// Rows are padded to a multiple of this many features.
pub(crate) const TILE_K: usize = 64;

/// The row stride of so many features.
pub(crate) fn stride(features: usize) -> usize {
    features.next_multiple_of(TILE_K)
}

/// The same for e4m3, of which a tile is twice as wide.
pub(crate) fn stride_e4m3(features: usize) -> usize {
    features.next_multiple_of(2 * TILE_K)
}

/// Activations `[max_rows, stride]`.
pub struct Tensor {
    pub(crate) buffer: Buffer,
    pub(crate) max_rows: usize,
    pub(crate) features: usize,
    pub(crate) stride: usize,
    pub(crate) dtype: DType,
}

impl Tensor {
    /// Size of an element.
    pub(crate) fn element_bytes(&self) -> usize {
        element_bytes(self.dtype)
    }

    /// Where it starts; checks that it has the rows and the type that a verb works on.
    #[track_caller]
    pub(crate) fn rows(&self, rows: usize, dtype: DType) -> u64 {
        assert!(rows <= self.max_rows, "{rows} rows of a tensor of {}", self.max_rows);
        assert_eq!(self.dtype, dtype);
        self.buffer.address
    }
}

pub(crate) fn element_bytes(dtype: DType) -> usize {
    match dtype {
        DType::Bf16 => 2,
        DType::F32 => 4,
    }
}

/// A norm's weight, f32 `[stride]`.
pub struct Vector {
    pub(crate) buffer: Buffer,
    pub(crate) features: usize,
}

/// One matrix, or one of each expert: `[num_experts, weight_rows, stride]`.
pub struct Matrix {
    pub(crate) buffer: Buffer,
    /// f32 `[num_experts, weight_rows]` of e4m3; without them it is bf16.
    pub(crate) scales: Option<Buffer>,
    pub(crate) num_experts: usize,
    /// Rows of one expert, those that only fill up included.
    pub(crate) weight_rows: usize,
    pub(crate) cols: usize,
    pub(crate) stride: usize,
    /// Features of what it makes.
    pub(crate) features: usize,
}

impl Matrix {
    /// Width in units of two bytes, in which the products count.
    pub(crate) fn units(&self) -> usize {
        if self.scales.is_some() { self.stride / 2 } else { self.stride }
    }
}

/// One layer's experts.
pub struct Experts {
    /// Gate and up, interleaved by eight rows.
    pub(crate) gate_up: Matrix,
    pub(crate) down: Matrix,
}

/// How keys and values are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvFormat {
    /// 16 bits a feature.
    Bf16,
    /// FP8 (E4M3), and a scale of 32 bits for a token's head: 8 bits a feature.
    E4m3,
}

impl KvFormat {
    /// Bytes of a row of so many features, its scale apart.
    pub(crate) fn row_bytes(self, head_stride: usize) -> usize {
        match self {
            Self::Bf16 => 2 * head_stride,
            Self::E4m3 => head_stride,
        }
    }

    /// Bytes of a row's scale.
    pub(crate) fn scale_bytes(self) -> usize {
        match self {
            Self::Bf16 => 0,
            Self::E4m3 => size_of::<f32>(),
        }
    }
}

/// One layer's paged keys and values `[num_blocks, 2, kv_heads, block_size, head_stride]`; behind them the rows' scales,
/// f32 `[num_blocks, 2, kv_heads, block_size]`, if they are e4m3.
pub struct KvCache {
    pub(crate) buffer: Buffer,
    pub(crate) num_rows: usize,
    pub(crate) format: KvFormat,
    pub(crate) kv: KvArguments,
    /// Tokens that a token sees.
    pub(crate) window: i32,
    /// log2(e) / sqrt(head_dim).
    pub(crate) scale: f32,
    /// The kernels for heads of this width.
    pub(crate) kernels: &'static AttentionKernels,
}

impl KvCache {
    /// Where rows and scales start.
    pub(crate) fn addresses(&self) -> KvAddresses {
        let row_bytes = self.format.row_bytes(self.kv.head_stride as usize);
        let scales = match self.format {
            KvFormat::Bf16 => 0,
            KvFormat::E4m3 => self.buffer.address + (self.num_rows * row_bytes) as u64,
        };
        KvAddresses { rows: self.buffer.address, scales }
    }
}

/// One layer's routing, as `route.cu` draws it.
pub struct Routing {
    pub(crate) tables: Buffer,
    pub(crate) max_tokens: usize,
    pub(crate) num_experts: usize,
    pub(crate) top_k: usize,
    /// Entry of the backend's expert counts where this layer's start: offsets `[num_experts + 1]`, then the sums of the
    /// gate weights `[num_experts]`.
    pub(crate) first_count: usize,
    /// Tokens routed by the step that is being launched, and entries for each.
    pub(crate) num_tokens: usize,
    pub(crate) width: usize,
}

impl Routing {
    /// Most rows of the experts' tensors in this step: as many as there are entries.
    pub(crate) fn num_rows(&self) -> usize {
        self.num_tokens * self.width
    }

    /// Where the `index`-th table starts: ids, weights, permutation, rows; behind them the count of finished blocks.
    pub(crate) fn table(&self, index: usize) -> u64 {
        self.tables.address + (index * self.table_bytes()) as u64
    }

    /// Bytes of a table.
    pub(crate) fn table_bytes(&self) -> usize {
        self.max_tokens * self.top_k * size_of::<u32>()
    }
}

/// Cosines and sines, f32 `[positions, half_dim]` each.
pub struct Rope {
    pub(crate) cos: Buffer,
    pub(crate) sin: Buffer,
    pub(crate) half_dim: usize,
}
