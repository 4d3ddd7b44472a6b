//! The quantised blocks of ggml, decoded to f32.
//!
//! A block is a run of elements of one row that share their scales; it lies in a file as drawn here, byte 0 at the
//! left. Products are rounded in the order in which the equations write them, so a decoded element is what ggml's
//! scalar decoders and Python's `gguf` give, to the bit. Nothing is computed on quantised blocks here.
//!
//! ```text
//! Q8_0   d:f16 │ 32 × q:i8
//! Q4_0   d:f16 │ 16 bytes of two q
//! Q4_K   d:f16 │ dmin:f16 │ 12 bytes of scales and offsets │ 128 bytes of two q
//! Q5_K   d:f16 │ dmin:f16 │ 12 bytes of scales and offsets │ 32 bytes of fifth bits │ 128 bytes of two q
//! Q6_K   128 bytes of two q │ 64 bytes of fifth and sixth bits │ 16 × scale:i8 │ d:f16
//! ```
//!
//! Source: the block structures in ggml's `ggml-common.h` and the `dequantize_row_*` functions in `ggml-quants.c`,
//! described from their layout.

use half::f16;

/// Elements of a block with one scale.
pub(super) const BLOCK_LEN: usize = 32;
/// Elements of a block with scales of scales.
pub(super) const SUPER_BLOCK_LEN: usize = 256;

pub(super) const Q8_0_BYTES: usize = 2 + 32;
pub(super) const Q4_0_BYTES: usize = 2 + 16;
pub(super) const Q4_K_BYTES: usize = 2 + 2 + SCALES_BYTES + 128;
pub(super) const Q5_K_BYTES: usize = 2 + 2 + SCALES_BYTES + 32 + 128;
pub(super) const Q6_K_BYTES: usize = 128 + 64 + 16 + 2;

/// Eight scales and eight offsets of six bits each.
const SCALES_BYTES: usize = 12;

/// `element = d · q`.
pub(super) fn q8_0(block: &[u8; Q8_0_BYTES], out: &mut [f32; BLOCK_LEN]) {
    let d = half_at(block, 0);
    for (out, &q) in out.iter_mut().zip(&block[2..]) {
        *out = d * f32::from(q.cast_signed());
    }
}

/// `element = d · (q − 8)`; low halves are the first 16 elements, high halves the others.
pub(super) fn q4_0(block: &[u8; Q4_0_BYTES], out: &mut [f32; BLOCK_LEN]) {
    let d = half_at(block, 0);
    for (i, &pair) in block[2..].iter().enumerate() {
        out[i] = d * (f32::from(pair & 15) - 8.0);
        out[i + 16] = d * (f32::from(pair >> 4) - 8.0);
    }
}

/// `element = d · scale · q − dmin · offset`, with a scale and an offset for each 32 elements. Each 32 bytes hold
/// 64 elements: their low halves the first 32, their high halves the others.
pub(super) fn q4_k(block: &[u8; Q4_K_BYTES], out: &mut [f32; SUPER_BLOCK_LEN]) {
    let (scales, quants) = block[4..].split_at(SCALES_BYTES);
    let groups = Groups::new(block, scales);
    for (index, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let shift = 4 * (index % 2);
        let bytes = &quants[index / 2 * 32..][..32];
        groups.decode(index, bytes.iter().map(|byte| (byte >> shift) & 15), out);
    }
}

/// As [`q4_k`], with a fifth bit from another place: bit `g` of its byte `i` belongs to element `i` of group `g`.
pub(super) fn q5_k(block: &[u8; Q5_K_BYTES], out: &mut [f32; SUPER_BLOCK_LEN]) {
    let (scales, rest) = block[4..].split_at(SCALES_BYTES);
    let (fifths, quants) = rest.split_at(32);
    let groups = Groups::new(block, scales);
    for (index, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let shift = 4 * (index % 2);
        let bytes = quants[index / 2 * 32..][..32].iter().zip(fifths);
        let elements = bytes.map(|(byte, fifth)| ((byte >> shift) & 15) | (((fifth >> index) & 1) << 4));
        groups.decode(index, elements, out);
    }
}

/// `element = d · scale · (q − 32)`, with a scale for each 16 elements. Each half of 128 elements has 64 bytes of
/// low bits and 32 of high bits, read in four quarters of 32 elements:
///
/// ```text
/// quarter      0             1              2              3
/// low bits     0..32 low     32..64 low     0..32 high     32..64 high
/// high bits    bits 0, 1     bits 2, 3      bits 4, 5      bits 6, 7      of bytes 0..32
/// ```
pub(super) fn q6_k(block: &[u8; Q6_K_BYTES], out: &mut [f32; SUPER_BLOCK_LEN]) {
    let (lows, highs, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let d = half_at(block, 208);
    for (index, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let (half, quarter, start) = (index / 8, index % 8 / 2, index % 2 * 16);
        let lows = &lows[half * 64 + quarter % 2 * 32 + start..];
        let highs = &highs[half * 32 + start..];
        let scale = d * f32::from(scales[index].cast_signed());
        for ((out, low), high) in out.iter_mut().zip(lows).zip(highs) {
            let q = ((low >> (quarter / 2 * 4)) & 15) | (((high >> (2 * quarter)) & 3) << 4);
            *out = scale * (f32::from(q) - 32.0);
        }
    }
}

/// The scales and offsets of the eight groups of 32 elements in a block of [`q4_k`] or [`q5_k`].
struct Groups {
    scales: [f32; 8],
    offsets: [f32; 8],
}

impl Groups {
    /// Unpacks six-bit numbers. Group `i` of the first four has its scale in the low six bits of byte `i` and its
    /// offset in those of byte `4 + i`; group `4 + i` has the low four bits of both in byte `8 + i` and the high
    /// two where the first four left room.
    fn new(block: &[u8], packed: &[u8]) -> Self {
        let (d, dmin) = (half_at(block, 0), half_at(block, 2));
        let mut groups = Self { scales: [0.0; 8], offsets: [0.0; 8] };
        for i in 0..4 {
            let (scale, offset, rest) = (packed[i], packed[4 + i], packed[8 + i]);
            groups.scales[i] = d * f32::from(scale & 63);
            groups.offsets[i] = dmin * f32::from(offset & 63);
            groups.scales[4 + i] = d * f32::from((rest & 15) | ((scale >> 6) << 4));
            groups.offsets[4 + i] = dmin * f32::from((rest >> 4) | ((offset >> 6) << 4));
        }
        groups
    }

    fn decode(&self, group: usize, quants: impl Iterator<Item = u8>, out: &mut [f32; 32]) {
        let (scale, offset) = (self.scales[group], self.offsets[group]);
        out.iter_mut().zip(quants).for_each(|(out, q)| *out = scale * f32::from(q) - offset);
    }
}

fn half_at(block: &[u8], offset: usize) -> f32 {
    f16::from_le_bytes([block[offset], block[offset + 1]]).to_f32()
}
