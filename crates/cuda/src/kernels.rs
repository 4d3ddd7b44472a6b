//! The kernels by file and name, and the structures of their arguments, as `kernels/*.cu` declares them.
//!
//! Nothing here launches anything.

use std::ffi::c_void;

use crate::probe::Capability;
use crate::tensor::KvFormat;

/// One width of the grouped product: tokens of a tile, and what its launch must know.
#[derive(Debug)]
pub(crate) struct Tile {
    /// Tokens of a tile.
    pub(crate) tokens: usize,
    /// Threads of a block.
    pub(crate) threads: u32,
    /// Dynamic shared memory of a block.
    pub(crate) shared_bytes: u32,
    /// The kernels for bf16 by [`Epilogue`].
    pub(crate) bf16: [&'static str; 3],
    /// The same for e4m3.
    pub(crate) e4m3: [&'static str; 3],
}

/// What is done with a product, and the index of its kernel in a [`Tile`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Epilogue {
    /// Stored as it is.
    F32,
    /// Rounded.
    Bf16,
    /// Gate and up become one activation, rounded.
    Swiglu,
}

/// `consumers` warpgroups of 64 rows of weights each, `stages` of 64 k of weights and tokens.
macro_rules! wgmma {
    ($tokens:literal, $consumers:literal, $stages:literal) => {
        Tile {
            tokens: $tokens,
            threads: 32 * (4 * $consumers + 1),
            shared_bytes: $stages * ($consumers * 64 + $tokens) * 128,
            bf16: names!("wgmma", $tokens),
            e4m3: names!("wgmma_e4m3", $tokens),
        }
    };
}

macro_rules! mma {
    ($tokens:literal) => {
        Tile {
            tokens: $tokens,
            threads: 128,
            shared_bytes: 3 * (64 + $tokens) * 128,
            bf16: names!("mma", $tokens),
            e4m3: names!("mma_e4m3", $tokens),
        }
    };
}

/// By [`Epilogue`].
macro_rules! names {
    ($prefix:literal, $tokens:literal) => {
        [
            concat!($prefix, "_f32_", $tokens),
            concat!($prefix, "_bf16_", $tokens),
            concat!($prefix, "_swiglu_", $tokens),
        ]
    };
}

/// `grouped_gemm_wgmma.cu`, narrow to wide.
pub(crate) static WGMMA_TILES: [Tile; 6] = [
    wgmma!(8, 1, 20),
    wgmma!(16, 1, 18),
    wgmma!(32, 1, 16),
    wgmma!(64, 1, 12),
    wgmma!(128, 2, 6),
    wgmma!(256, 2, 4),
];

/// `grouped_gemm_mma.cu`, narrow to wide.
pub(crate) static MMA_TILES: [Tile; 2] = [mma!(16), mma!(64)];

/// A kernel of attention: what its launch needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct AttentionKernel {
    pub(crate) name: &'static str,
    /// Most query rows of an item: tokens times query heads of one kv head.
    pub(crate) rows: usize,
    pub(crate) threads: u32,
    pub(crate) shared_bytes: u32,
}

/// The kernels of attention for one width of a head and one format of the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct AttentionKernels {
    pub(crate) head_stride: usize,
    pub(crate) rope_store_kv: &'static str,
    /// For single tokens, or a few.
    pub(crate) decode: AttentionKernel,
    /// For prompts.
    pub(crate) prefill: AttentionKernel,
}

/// Of a cache whose kernels have a suffix and whose rows have so many bytes.
macro_rules! attention {
    ($suffix:literal, $head_stride:literal, $row_bytes:expr) => {
        attention!($suffix, $head_stride, $row_bytes, {
            // Two tiles of 64 keys and values, and the queries.
            AttentionKernel {
                name: concat!("attention_prefill", $suffix, "_", $head_stride),
                rows: 64,
                threads: 128,
                shared_bytes: 4 * 64 * $row_bytes + 64 * $head_stride * 2,
            }
        })
    };
    ($suffix:literal, $head_stride:literal, $row_bytes:expr, $prefill:expr) => {
        AttentionKernels {
            head_stride: $head_stride,
            rope_store_kv: concat!("rope_store_kv", $suffix),
            // A tile of 64 keys and values, and the queries.
            decode: AttentionKernel {
                name: concat!("attention_decode", $suffix, "_", $head_stride),
                rows: 16,
                threads: 32,
                shared_bytes: 2 * 64 * $row_bytes + 16 * $head_stride * 2,
            },
            prefill: $prefill,
        }
    };
}

/// Elements and a scale.
macro_rules! attention_e4m3 {
    ($head_stride:literal) => {
        attention!("_e4m3", $head_stride, ($head_stride + 4))
    };
}

macro_rules! attention_bf16 {
    ($head_stride:literal) => {
        attention!("", $head_stride, ($head_stride * 2))
    };
}

/// With wgmma for prompts, which takes `arriving_bytes` for rows that are not bf16 yet.
macro_rules! attention_wgmma {
    ($suffix:literal, $head_stride:literal, $row_bytes:expr, $arriving_bytes:expr) => {
        attention!($suffix, $head_stride, $row_bytes, {
            // Four stages of 64 keys and values, and the queries.
            AttentionKernel {
                name: concat!("attention_prefill_wgmma", $suffix, "_", $head_stride),
                rows: 128,
                threads: 384,
                shared_bytes: (4 * 2 * 64 + 128) * $head_stride * 2 + $arriving_bytes,
            }
        })
    };
}

macro_rules! attention_wgmma_bf16 {
    ($head_stride:literal) => {
        attention_wgmma!("", $head_stride, ($head_stride * 2), 0)
    };
}

/// Three tiles of 64 keys and values that arrive, and scales of the stages.
macro_rules! attention_wgmma_e4m3 {
    ($head_stride:literal) => {
        attention_wgmma!(
            "_e4m3",
            $head_stride,
            ($head_stride + 4),
            3 * 2 * 64 * ($head_stride + 4) + 4 * 2 * 64 * 4
        )
    };
}

static ATTENTION_BF16: [AttentionKernels; 4] =
    [attention_bf16!(16), attention_bf16!(32), attention_bf16!(64), attention_bf16!(128)];

static ATTENTION_WGMMA_BF16: [AttentionKernels; 4] =
    [attention_bf16!(16), attention_bf16!(32), attention_wgmma_bf16!(64), attention_wgmma_bf16!(128)];

static ATTENTION_E4M3: [AttentionKernels; 4] =
    [attention_e4m3!(16), attention_e4m3!(32), attention_e4m3!(64), attention_e4m3!(128)];

static ATTENTION_WGMMA_E4M3: [AttentionKernels; 4] =
    [attention_e4m3!(16), attention_e4m3!(32), attention_wgmma_e4m3!(64), attention_wgmma_e4m3!(128)];

/// Widths of a head that attention is compiled for, narrow to wide, with the kernels that a device runs.
pub(crate) fn attention(format: KvFormat, has_wgmma: bool) -> &'static [AttentionKernels] {
    match (format, has_wgmma) {
        (KvFormat::Bf16, false) => &ATTENTION_BF16,
        (KvFormat::Bf16, true) => &ATTENTION_WGMMA_BF16,
        (KvFormat::E4m3, false) => &ATTENTION_E4M3,
        (KvFormat::E4m3, true) => &ATTENTION_WGMMA_E4M3,
    }
}

/// The products' kernels that a device runs.
pub(crate) fn tiles(has_wgmma: bool) -> &'static [Tile] {
    if has_wgmma { &WGMMA_TILES } else { &MMA_TILES }
}

/// The files that a device needs.
pub(crate) fn files(capability: Capability) -> Vec<&'static str> {
    by_file(capability).into_iter().map(|(file, _)| file).collect()
}

/// The files that a device needs, each with its kernels.
pub(crate) fn by_file(capability: Capability) -> Vec<(&'static str, Vec<&'static str>)> {
    let (has_wgmma, has_e4m3) = (capability.has_wgmma(), capability.has_e4m3());
    let products = tiles(has_wgmma).iter().flat_map(|tile| {
        let e4m3 = tile.e4m3.into_iter().filter(|_| has_e4m3);
        tile.bf16.into_iter().chain(e4m3)
    });
    let formats = [KvFormat::Bf16, KvFormat::E4m3];
    let formats = formats.into_iter().filter(|&format| format == KvFormat::Bf16 || has_e4m3);
    let attention: Vec<_> = formats.flat_map(|format| attention(format, has_wgmma)).collect();
    let (prefill_wgmma, prefill): (Vec<_>, Vec<_>) = attention
        .iter()
        .map(|kernels| kernels.prefill.name)
        .partition(|name| name.starts_with("attention_prefill_wgmma"));
    let if_e4m3 = |names: [&'static str; 2]| names.into_iter().filter(move |_| has_e4m3);
    let grouped_gemm = if has_wgmma { "grouped_gemm_wgmma" } else { "grouped_gemm_mma" };
    let files = [
        ("add", vec!["add"]),
        ("attention_decode", attention.iter().map(|kernels| kernels.decode.name).collect()),
        ("attention_fold", vec!["attention_fold"]),
        ("attention_prefill", prefill),
        ("attention_prefill_wgmma", prefill_wgmma),
        ("combine_experts", vec!["combine_experts"]),
        ("embed", vec!["embed"]),
        ("gather_rows", vec!["gather_rows"]),
        (grouped_gemm, products.collect()),
        (
            "place_weights",
            ["place_rows", "place_dummy"]
                .into_iter()
                .chain(if_e4m3(["place_rows_e4m3", "place_dummy_e4m3"]))
                .collect(),
        ),
        ("quantize_rows", has_e4m3.then_some("quantize_rows").into_iter().collect()),
        ("read_sweep", vec!["read_sweep"]),
        ("rms_norm", vec!["rms_norm", "add_rms_norm"]),
        (
            "rope_store_kv",
            ["rope_store_kv"].into_iter().chain(has_e4m3.then_some("rope_store_kv_e4m3")).collect(),
        ),
        ("route", vec!["route"]),
        ("sample", vec!["sample"]),
    ];
    files.into_iter().filter(|(_, names)| !names.is_empty()).collect()
}

/// Something that a kernel takes by value.
///
/// # Safety
/// Its bytes are what the kernel's parameter has in C++.
pub(crate) unsafe trait Argument {
    /// Where the driver copies it from.
    fn pointer(&self) -> *mut c_void {
        std::ptr::from_ref(self).cast::<c_void>().cast_mut()
    }
}

macro_rules! arguments {
    ($($type:ty),*) => {
        // SAFETY: plain numbers, and `repr(C)` structures of them.
        $(unsafe impl Argument for $type {})*
    };
}
arguments!(u64, i64, u32, i32, f32);
arguments!(
    GroupedShape,
    NormShape,
    RoutingTables,
    RouteArguments,
    SteeringArguments,
    KvAddresses,
    KvArguments,
    AttentionArguments,
    RowStrides,
    Placement
);

/// `GroupedShape` of `grouped_gemm.cuh`.
#[repr(C)]
pub(crate) struct GroupedShape {
    pub(crate) offsets: u64,
    pub(crate) num_experts: i32,
    pub(crate) num_rows: i32,
    pub(crate) weight_rows: i32,
    pub(crate) stride: i32,
    pub(crate) features: i32,
    pub(crate) out_stride: i32,
    pub(crate) weight_scales: u64,
    pub(crate) row_scales: u64,
}

/// `RowStrides` of `quantize_rows.cu`.
#[repr(C)]
pub(crate) struct RowStrides {
    pub(crate) x: i32,
    pub(crate) out: i32,
}

/// `NormShape` of `rms_norm.cu`.
#[repr(C)]
pub(crate) struct NormShape {
    pub(crate) features: i32,
    pub(crate) stride: i32,
    pub(crate) eps: f32,
}

/// `RoutingTables` of `route.cu`.
#[repr(C)]
pub(crate) struct RoutingTables {
    pub(crate) topk_ids: u64,
    pub(crate) topk_weights: u64,
    pub(crate) expert_offsets: u64,
    pub(crate) gate_sums: u64,
    pub(crate) permutation: u64,
    pub(crate) rows: u64,
    pub(crate) finished_blocks: u64,
}

/// `RouteShape` of `route.cu`.
#[repr(C)]
pub(crate) struct RouteArguments {
    pub(crate) num_tokens: i32,
    pub(crate) num_experts: i32,
    pub(crate) top_k: i32,
    pub(crate) width: i32,
    pub(crate) stride: i32,
}

/// `RouteRule` of `route.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct RuleArguments {
    pub(crate) banned: u64,
    pub(crate) forced: u64,
    pub(crate) top_k: u32,
    pub(crate) temperature: f32,
    pub(crate) first_given: u32,
    pub(crate) padding: u32,
}

/// `StepSteering` of `route.cu`.
#[repr(C)]
pub(crate) struct SteeringArguments {
    pub(crate) token_rows: u64,
    pub(crate) rules: u64,
    pub(crate) given_ids: u64,
    pub(crate) given_weights: u64,
    pub(crate) num_token_rows: i32,
    pub(crate) num_layers: i32,
}

/// `KvCache` of `kv_cache.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct KvAddresses {
    pub(crate) rows: u64,
    pub(crate) scales: u64,
}

/// `KvShape` of `kv_cache.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct KvArguments {
    pub(crate) num_heads: i32,
    pub(crate) num_kv_heads: i32,
    pub(crate) head_dim: i32,
    pub(crate) head_stride: i32,
    pub(crate) block_size: i32,
}

/// `AttentionShape` of `attention.cuh`.
#[repr(C)]
pub(crate) struct AttentionArguments {
    pub(crate) kv: KvArguments,
    pub(crate) q_stride: i32,
    pub(crate) out_stride: i32,
    pub(crate) window: i32,
    pub(crate) scale: f32,
}

/// `Placement` of `place_weights.cu`.
#[repr(C)]
pub(crate) struct Placement {
    pub(crate) cols: i32,
    pub(crate) stride: i32,
    pub(crate) first_row: i32,
    pub(crate) interleaved: i32,
}

/// `AttentionItem` of `attention.cuh`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct AttentionItem {
    pub(crate) block_table_start: i32,
    pub(crate) first_token: i32,
    pub(crate) num_tokens: i32,
    pub(crate) first_position: i32,
    pub(crate) first_chunk: i32,
    pub(crate) end_chunk: i32,
    pub(crate) first_partial: i32,
}

/// `FoldItem` of `attention_fold.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct FoldItem {
    pub(crate) token: i32,
    pub(crate) first_partial: i32,
    pub(crate) chunk_rows: i32,
    pub(crate) num_chunks: i32,
}

/// `SampleRow` of `sample.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct SampleArguments {
    pub(crate) top_p: f64,
    pub(crate) uniform: f64,
    pub(crate) scale: f32,
    pub(crate) top_k: u32,
    pub(crate) least_weight: u32,
    pub(crate) forced: u32,
    pub(crate) first_edit: i32,
    pub(crate) num_edits: i32,
    pub(crate) num_top: i32,
    pub(crate) first_mask_word: i32,
}

/// `LogitEdit` of `sample.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct EditArguments {
    pub(crate) token: u32,
    pub(crate) bias: f32,
    pub(crate) repetition: f32,
    pub(crate) subtracted: f32,
}

/// `TokenLogprob` of `sample.cu`.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct LogprobResult {
    pub(crate) token: u32,
    pub(crate) logprob: f32,
    pub(crate) rank: u32,
}
