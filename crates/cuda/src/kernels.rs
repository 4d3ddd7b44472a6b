//! The kernels by file and name, and the structures of their arguments, as `kernels/*.cu` declares them.
//!
//! Nothing here launches anything.

use std::ffi::c_void;

use crate::probe::Capability;

/// One width of the grouped product: tokens of a tile, and what its launch must know.
#[derive(Debug)]
pub(crate) struct Tile {
    /// Tokens of a tile.
    pub(crate) tokens: usize,
    /// Threads of a block.
    pub(crate) threads: u32,
    /// Dynamic shared memory of a block.
    pub(crate) shared_bytes: u32,
    /// The kernels by [`Epilogue`].
    pub(crate) kernels: [&'static str; 3],
}

/// What is done with a product, and the index of its kernel in [`Tile::kernels`].
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
const fn wgmma(tokens: usize, consumers: u32, stages: u32, kernels: [&'static str; 3]) -> Tile {
    let stage_bytes = (consumers * 64 + tokens as u32) * 128;
    Tile { tokens, threads: 32 * (4 * consumers + 1), shared_bytes: stages * stage_bytes, kernels }
}

const fn mma(tokens: usize, kernels: [&'static str; 3]) -> Tile {
    Tile { tokens, threads: 128, shared_bytes: 3 * (64 + tokens as u32) * 128, kernels }
}

/// `grouped_gemm_wgmma.cu`, narrow to wide.
pub(crate) static WGMMA_TILES: [Tile; 6] = [
    wgmma(8, 1, 20, ["wgmma_f32_8", "wgmma_bf16_8", "wgmma_swiglu_8"]),
    wgmma(16, 1, 18, ["wgmma_f32_16", "wgmma_bf16_16", "wgmma_swiglu_16"]),
    wgmma(32, 1, 16, ["wgmma_f32_32", "wgmma_bf16_32", "wgmma_swiglu_32"]),
    wgmma(64, 1, 12, ["wgmma_f32_64", "wgmma_bf16_64", "wgmma_swiglu_64"]),
    wgmma(128, 2, 6, ["wgmma_f32_128", "wgmma_bf16_128", "wgmma_swiglu_128"]),
    wgmma(256, 2, 4, ["wgmma_f32_256", "wgmma_bf16_256", "wgmma_swiglu_256"]),
];

/// `grouped_gemm_mma.cu`, narrow to wide.
pub(crate) static MMA_TILES: [Tile; 2] = [
    mma(16, ["mma_f32_16", "mma_bf16_16", "mma_swiglu_16"]),
    mma(64, ["mma_f32_64", "mma_bf16_64", "mma_swiglu_64"]),
];

/// Widths of a head that attention is compiled for, with its kernels.
pub(crate) const ATTENTION: [(usize, &str); 4] =
    [(16, "attention_16"), (32, "attention_32"), (64, "attention_64"), (128, "attention_128")];

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
    let has_wgmma = capability.has_wgmma();
    let grouped_gemm = if has_wgmma { "grouped_gemm_wgmma" } else { "grouped_gemm_mma" };
    let attention = ATTENTION.iter().map(|&(_, name)| name).chain(["attention_fold"]);
    vec![
        ("add", vec!["add"]),
        ("attention", attention.collect()),
        ("combine_experts", vec!["combine_experts"]),
        ("embed", vec!["embed"]),
        ("gather_rows", vec!["gather_rows"]),
        (grouped_gemm, tiles(has_wgmma).iter().flat_map(|tile| tile.kernels).collect()),
        ("place_weights", vec!["place_rows", "place_dummy"]),
        ("read_sweep", vec!["read_sweep"]),
        ("rms_norm", vec!["rms_norm", "add_rms_norm"]),
        ("rope_store_kv", vec!["rope_store_kv"]),
        ("route", vec!["route"]),
        ("sample", vec!["sample"]),
    ]
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
    KvArguments,
    AttentionArguments,
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
    pub(crate) stride: i32,
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

/// `AttentionShape` of `attention.cu`.
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

/// `AttentionItem` of `attention.cu`.
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

/// `FoldItem` of `attention.cu`.
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
    pub(crate) padding: i32,
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
