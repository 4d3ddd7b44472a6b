//! Matrix products: one grouped product, with a group per expert or a single one, on the widest tensor cores there are.
//!
//! The weights are the left operand and tokens the right one. The width of a tile of tokens is chosen by the step's
//! shape and does not show in a bit of the result.

use cudarc::driver::{DriverError, sys};

use crate::device::{Device, Grid};
use crate::kernels::{self, Argument, Epilogue, GroupedShape, Tile};
use crate::quantized::Quantized;
use crate::tensor::{Matrix, TILE_K};

/// Rows of weights of a tile's box.
const TILE_ROWS: u32 = 64;
/// Blocks per multiprocessor of the kernels without bulk copies.
const MMA_BLOCKS_PER_MULTIPROCESSOR: usize = 4;

/// The right operand and the output of a product.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rows {
    /// `[max_rows, stride of the weights]`, in the format of the weights.
    pub(crate) x: u64,
    /// f32 `[max_rows]`: the scales of `x` if it is e4m3, else null.
    pub(crate) scales: u64,
    /// Rows that exist in memory.
    pub(crate) max_rows: usize,
    /// Rows of this step, of all experts together.
    pub(crate) num_rows: usize,
    /// `[num_experts + 1]` first row of each expert; `None` if there are no experts.
    pub(crate) offsets: Option<u64>,
    /// `[max_rows, out_stride]`.
    pub(crate) out: u64,
    pub(crate) out_stride: usize,
}

impl Rows {
    /// A right operand in bf16, without an output yet.
    pub(crate) fn bf16(x: u64, max_rows: usize) -> Self {
        Self { x, scales: 0, max_rows, num_rows: 0, offsets: None, out: 0, out_stride: 0 }
    }

    /// The same in e4m3.
    pub(crate) fn quantized(rows: Quantized) -> Self {
        Self { scales: rows.scales, ..Self::bf16(rows.x, rows.max_rows) }
    }
}

/// Launches `out = x · weightsᵀ`.
pub(crate) fn multiply(device: &mut Device, weights: &Matrix, rows: Rows, epilogue: Epilogue) {
    if rows.num_rows == 0 {
        return;
    }
    assert!(rows.offsets.is_some() || weights.num_experts == 1, "experts need their offsets");
    let shape = GroupedShape {
        offsets: rows.offsets.unwrap_or(0),
        num_experts: weights.num_experts as i32,
        num_rows: rows.num_rows as i32,
        weight_rows: weights.weight_rows as i32,
        stride: weights.units() as i32,
        features: weights.features as i32,
        out_stride: rows.out_stride as i32,
        weight_scales: weights.scales.as_ref().map_or(0, |scales| scales.address),
        row_scales: rows.scales,
    };
    let tile = choose_tile(kernels::tiles(device.has_wgmma), rows.num_rows, weights.num_experts);
    let num_multiprocessors = device.num_multiprocessors as usize;
    let blocks = if device.has_wgmma { 1 } else { MMA_BLOCKS_PER_MULTIPROCESSOR } * num_multiprocessors;
    let grid = Grid { blocks: [blocks, 1], threads: tile.threads, shared_bytes: tile.shared_bytes };
    let kernels = if weights.scales.is_some() { &tile.e4m3 } else { &tile.bf16 };
    let kernel = kernels[epilogue as usize];
    if !device.has_wgmma {
        device.launch(kernel, grid, &[&weights.buffer.address, &rows.x, &shape, &rows.out]);
        return;
    }
    let maps = device.call_beside(|| {
        Ok([
            TensorMap::of_weights(weights)?,
            TensorMap::of_rows(rows.x, weights.units(), rows.max_rows, tile.tokens as u32)?,
        ])
    });
    if let Some([weights, x]) = maps {
        device.launch(kernel, grid, &[&weights, &x, &shape, &rows.out]);
    }
}

/// Rows that the tiles of each expert's products have room for, if experts get so many tokens: the grid is shaped for
/// `num_rows`, whoever gets them.
pub(crate) fn tile_rows<'a>(
    device: &Device,
    num_rows: usize,
    num_tokens: impl ExactSizeIterator<Item = u32> + 'a,
) -> impl Iterator<Item = u64> + 'a {
    rows_of_tiles(kernels::tiles(device.has_wgmma), num_rows, num_tokens)
}

fn rows_of_tiles<'a>(
    tiles: &'static [Tile],
    num_rows: usize,
    num_tokens: impl ExactSizeIterator<Item = u32> + 'a,
) -> impl Iterator<Item = u64> + 'a {
    let tile = choose_tile(tiles, num_rows, num_tokens.len());
    num_tokens.map(|num_tokens| u64::from(num_tokens).next_multiple_of(tile.tokens as u64))
}

/// The narrowest tile that holds twice an expert's share of the rows, because experts are not equally popular; or all
/// rows if that is less. Measured: `kernels/README.md`.
fn choose_tile(tiles: &'static [Tile], num_rows: usize, num_experts: usize) -> &'static Tile {
    let wanted = (2 * num_rows).div_ceil(num_experts).min(num_rows);
    let widest = &tiles[tiles.len() - 1];
    tiles.iter().find(|tile| tile.tokens >= wanted).unwrap_or(widest)
}

/// What the copy engine must know of a tensor.
#[repr(C, align(64))]
pub(crate) struct TensorMap(sys::CUtensorMap);

// SAFETY: the kernel's `TensorMap` is the same opaque structure.
unsafe impl Argument for TensorMap {}

impl TensorMap {
    /// `[expert][row][k]` in boxes of 64 rows.
    fn of_weights(weights: &Matrix) -> Result<Self, DriverError> {
        let dims = [weights.units() as u64, weights.weight_rows as u64, weights.num_experts as u64];
        let row_bytes = 2 * dims[0];
        Self::new(
            weights.buffer.address,
            &dims,
            &[row_bytes, row_bytes * dims[1]],
            &[TILE_K as u32, TILE_ROWS, 1],
        )
    }

    /// `[row][k]` in boxes of `tokens` rows; `units` of two bytes each.
    fn of_rows(address: u64, units: usize, max_rows: usize, tokens: u32) -> Result<Self, DriverError> {
        let dims = [units as u64, max_rows as u64];
        Self::new(address, &dims, &[2 * dims[0]], &[TILE_K as u32, tokens])
    }

    /// Units of two bytes, one bf16 or two e4m3, innermost dimension first, under the 128-byte swizzle.
    fn new(address: u64, dims: &[u64], strides_bytes: &[u64], box_dims: &[u32]) -> Result<Self, DriverError> {
        assert!(dims.len() == box_dims.len() && dims.len() == strides_bytes.len() + 1);
        let mut map = Self(sys::CUtensorMap { opaque: [0; 16] });
        let element_strides = [1; 3];
        // SAFETY: the pointers are to arrays of as many elements as the rank says.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut map.0,
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                dims.len() as u32,
                address as *mut std::ffi::c_void,
                dims.as_ptr(),
                strides_bytes.as_ptr(),
                box_dims.as_ptr(),
                element_strides.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        }
        .result()?;
        Ok(map)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tile_holds_what_an_expert_is_likely_to_get() {
        let tokens = |num_rows, num_experts| choose_tile(&kernels::WGMMA_TILES, num_rows, num_experts).tokens;
        assert_eq!([2, 16, 64, 256, 16384].map(|rows| tokens(rows, 8)), [8, 8, 16, 64, 256]);
        assert_eq!([1, 9, 64, 1000].map(|rows| tokens(rows, 1)), [8, 16, 64, 256]);
    }

    #[test]
    fn an_experts_rows_fill_tiles_of_the_steps_width() {
        let check = |num_rows: usize, num_tokens: [u32; 4], expected: [u64; 4]| {
            let rows = rows_of_tiles(&kernels::WGMMA_TILES, num_rows, num_tokens.into_iter());
            assert_eq!(rows.collect::<Vec<_>>(), expected, "{num_tokens:?} of {num_rows}");
        };
        check(2, [1, 0, 1, 0], [8, 0, 8, 0]);
        check(20, [9, 0, 8, 3], [16, 0, 16, 16]);
        check(32, [17, 15, 0, 0], [32, 16, 0, 0]);
        check(2000, [257, 256, 1, 1486], [512, 256, 256, 1536]);
    }
}
