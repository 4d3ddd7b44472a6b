//! Weights on their way from a checkpoint to a backend: a named, typed view of bytes that are usually
//! still in a memory-mapped file.
//!
//! A backend makes its own opaque handle of a view (maps, packs, uploads, quantises) and owns what it
//! keeps: [`Bytes`] is reference-counted, so a backend that maps holds the file open without copying it.

use bytes::Bytes;
use half::{bf16, f16};

/// Element type of a stored weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WeightType {
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
    /// IEEE single precision.
    F32,
}

impl WeightType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
        }
    }
}

/// Where the elements come from.
#[derive(Debug, Clone)]
pub enum WeightData {
    /// Little-endian elements, row-major, of exactly `rows * cols * dtype.size()` bytes.
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
    /// Element type of stored data.
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

    /// All elements rounded to bf16 (to nearest, ties to even), which is what every backend computes with.
    ///
    /// # Panics
    /// If stored data has another length than the shape says; the loader has checked it.
    pub fn to_bf16(&self) -> Vec<bf16> {
        match &self.data {
            WeightData::Dummy { seed, mean, std } => {
                (0..self.len() as u64).map(|i| dummy_value(*seed, i, *mean, *std)).collect()
            }
            WeightData::Stored(bytes) => {
                assert_eq!(bytes.len(), self.len() * self.dtype.size());
                decode_bf16(self.dtype, bytes)
            }
        }
    }
}

fn decode_bf16(dtype: WeightType, bytes: &[u8]) -> Vec<bf16> {
    match dtype {
        WeightType::Bf16 => bytes.as_chunks().0.iter().map(|&element| bf16::from_le_bytes(element)).collect(),
        WeightType::F16 => {
            let elements = bytes.as_chunks().0.iter();
            elements.map(|&e| bf16::from_f32(f16::from_le_bytes(e).to_f32())).collect()
        }
        WeightType::F32 => {
            let elements = bytes.as_chunks().0.iter();
            elements.map(|&e| bf16::from_f32(f32::from_le_bytes(e))).collect()
        }
    }
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
            cols: data.len() / WeightType::size(dtype),
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
