//! Weights on their way from a checkpoint to a backend: a named, typed view of bytes that are usually
//! still in a memory-mapped file.
//!
//! A backend makes its own opaque handle of a view (maps, packs, uploads, quantises) and owns what it
//! keeps: [`Bytes`] is reference-counted, so a backend that maps holds the file open without copying it.

mod ggml;

use bytes::Bytes;
use half::{bf16, f16};

/// How the elements of a stored weight are encoded: in blocks along a row, of one element for plain numbers. The
/// quantised blocks are those of ggml, drawn in `weights/ggml.rs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WeightType {
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
    /// IEEE single precision.
    F32,
    /// 8 bits and a scale for 32.
    Q8_0,
    /// 4 bits and a scale for 32.
    Q4_0,
    /// 4 bits, eight scales and offsets for 256.
    Q4K,
    /// 5 bits, eight scales and offsets for 256.
    Q5K,
    /// 6 bits, sixteen scales for 256.
    Q6K,
}

impl WeightType {
    /// Elements of one block; a row is a whole number of blocks.
    pub fn block_len(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 | Self::F32 => 1,
            Self::Q8_0 | Self::Q4_0 => ggml::BLOCK_LEN,
            Self::Q4K | Self::Q5K | Self::Q6K => ggml::SUPER_BLOCK_LEN,
        }
    }

    /// Bytes of one block.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
            Self::Q8_0 => ggml::Q8_0_BYTES,
            Self::Q4_0 => ggml::Q4_0_BYTES,
            Self::Q4K => ggml::Q4_K_BYTES,
            Self::Q5K => ggml::Q5_K_BYTES,
            Self::Q6K => ggml::Q6_K_BYTES,
        }
    }

    /// Bytes of a row of `cols` elements.
    ///
    /// # Panics
    /// If `cols` is not a whole number of blocks; the loader has checked it.
    pub fn row_bytes(self, cols: usize) -> usize {
        assert!(cols.is_multiple_of(self.block_len()), "a row is a whole number of blocks");
        cols / self.block_len() * self.block_bytes()
    }

    /// Decodes whole blocks.
    fn decode(self, blocks: &[u8], out: &mut [f32]) {
        match self {
            Self::Bf16 => decode_each(blocks, out, |&element| bf16::from_le_bytes(element).to_f32()),
            Self::F16 => decode_each(blocks, out, |&element| f16::from_le_bytes(element).to_f32()),
            Self::F32 => decode_each(blocks, out, |&element| f32::from_le_bytes(element)),
            Self::Q8_0 => decode_blocks(blocks, out, ggml::q8_0),
            Self::Q4_0 => decode_blocks(blocks, out, ggml::q4_0),
            Self::Q4K => decode_blocks(blocks, out, ggml::q4_k),
            Self::Q5K => decode_blocks(blocks, out, ggml::q5_k),
            Self::Q6K => decode_blocks(blocks, out, ggml::q6_k),
        }
    }
}

/// Where the elements come from.
#[derive(Debug, Clone)]
pub enum WeightData {
    /// Little-endian blocks, row-major, of exactly `rows * dtype.row_bytes(cols)` bytes.
    Stored(Bytes),
    /// Seeded values that the backend makes itself (on its device, if it has one): normal-like with mean
    /// `mean` and standard deviation `std`. See [`dummy_value`].
    Dummy {
        /// Seed of this tensor.
        seed: u64,
        /// Mean of the values.
        mean: f32,
        /// Standard deviation of the values.
        std: f32,
    },
}

/// A matrix `[rows, cols]`, row-major; a vector has one row.
#[derive(Debug, Clone)]
pub struct WeightView {
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// Encoding of stored data.
    pub dtype: WeightType,
    /// The elements.
    pub data: WeightData,
}

impl WeightView {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.rows * self.cols
    }

    /// Whether the view has no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Decodes row `row` to f32, exactly for all types but the quantised ones, which round as their equations say.
    ///
    /// # Panics
    /// If there is no such row, if `out` is not one row, or if stored data has another length than the shape says;
    /// the loader has checked it.
    pub fn row_to_f32(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows);
        assert_eq!(out.len(), self.cols);
        match &self.data {
            WeightData::Dummy { seed, mean, std } => {
                let indices = (row * self.cols) as u64..;
                for (out, index) in out.iter_mut().zip(indices) {
                    *out = dummy_value(*seed, index, *mean, *std).to_f32();
                }
            }
            WeightData::Stored(bytes) => {
                let row_bytes = self.dtype.row_bytes(self.cols);
                assert_eq!(bytes.len(), self.rows * row_bytes);
                self.dtype.decode(&bytes[row * row_bytes..][..row_bytes], out);
            }
        }
    }

    /// All elements rounded to bf16 (to nearest, ties to even), which is what every backend computes with.
    ///
    /// # Panics
    /// As [`row_to_f32`](Self::row_to_f32).
    pub fn to_bf16(&self) -> Vec<bf16> {
        let mut elements = Vec::with_capacity(self.len());
        let mut decoded = vec![0.0; self.cols];
        for row in 0..self.rows {
            self.row_to_f32(row, &mut decoded);
            elements.extend(decoded.iter().map(|&element| bf16::from_f32(element)));
        }
        elements
    }
}

fn decode_each<const BYTES: usize>(bytes: &[u8], out: &mut [f32], decode: impl Fn(&[u8; BYTES]) -> f32) {
    out.iter_mut().zip(bytes.as_chunks().0).for_each(|(out, element)| *out = decode(element));
}

fn decode_blocks<const BYTES: usize, const LEN: usize>(
    bytes: &[u8],
    out: &mut [f32],
    decode: impl Fn(&[u8; BYTES], &mut [f32; LEN]),
) {
    let blocks = bytes.as_chunks().0.iter();
    blocks.zip(out.as_chunks_mut().0).for_each(|(block, out)| decode(block, out));
}

/// Element `index` of a dummy weight: the sum of four 16-bit uniforms (Irwin-Hall), scaled to the wanted
/// mean and standard deviation. A pure function of its arguments, so any device can fill any part.
pub fn dummy_value(seed: u64, index: u64, mean: f32, std: f32) -> bf16 {
    let bits = crate::sampling::mix64(seed ^ index.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let sum = (0..4).map(|i| (bits >> (16 * i)) & 0xffff).sum::<u64>() as f32;
    // Each uniform on 0..65536 has variance 65536² / 12, so the sum has standard deviation 65536 / √3.
    let centred = (sum - 2.0 * 65535.0) * (1.732_050_8 / 65536.0);
    bf16::from_f32(mean + std * centred)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stored_types_round_to_bf16() {
        let view = |dtype, data: &[u8]| WeightView {
            rows: 1,
            cols: data.len() / WeightType::block_bytes(dtype),
            dtype,
            data: WeightData::Stored(Bytes::copy_from_slice(data)),
        };
        let f32s: Vec<u8> = [1.0f32, 1.003_906_3].iter().flat_map(|x| x.to_le_bytes()).collect();
        assert_eq!(view(WeightType::F32, &f32s).to_bf16(), [1.0, 1.0].map(bf16::from_f32));
        let f16s: Vec<u8> = [0.5f32, -2.0].iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect();
        assert_eq!(view(WeightType::F16, &f16s).to_bf16(), [0.5, -2.0].map(bf16::from_f32));
    }

    #[test]
    fn dummy_values_have_the_mean_and_deviation_asked_for() {
        let n = 100_000;
        let values: Vec<f64> = (0..n).map(|i| dummy_value(7, i, 1.0, 0.5).to_f64()).collect();
        let mean = values.iter().sum::<f64>() / n as f64;
        let variance = values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n as f64;
        assert!((mean - 1.0).abs() < 0.01, "mean {mean}");
        assert!((variance.sqrt() - 0.5).abs() < 0.01, "deviation {}", variance.sqrt());
    }
}
