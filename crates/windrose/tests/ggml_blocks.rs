//! Quantised blocks decode to the bits that Python's `gguf` gives; `tests/fixtures/record_gguf.py` recorded them.

use backend::{WeightData, WeightType, WeightView};
use safetensors::SafeTensors;

const BLOCKS: &[u8] = include_bytes!("../../../tests/fixtures/gguf/blocks.safetensors");

/// Decodes all blocks as the rows of a matrix, `blocks_per_row` in each.
fn check(name: &str, dtype: WeightType, blocks_per_row: usize) {
    let tensors = SafeTensors::deserialize(BLOCKS).unwrap();
    let blocks = tensors.tensor(&format!("{name}.blocks")).unwrap();
    let values = tensors.tensor(&format!("{name}.values")).unwrap();
    let [num_blocks, block_bytes] = blocks.shape() else { panic!("blocks have two dimensions") };
    assert_eq!(*block_bytes, dtype.block_bytes(), "{name}");
    let cols = blocks_per_row * dtype.block_len();
    let data = WeightData::Stored(blocks.data().to_vec().into());
    let view = WeightView { rows: num_blocks / blocks_per_row, cols, dtype, data };

    let mut row = vec![0.0; cols];
    for (index, expected) in values.data().chunks_exact(4 * cols).enumerate() {
        view.row_to_f32(index, &mut row);
        for (column, (got, expected)) in row.iter().zip(expected.as_chunks().0).enumerate() {
            let expected = f32::from_le_bytes(*expected);
            assert_eq!(
                got.to_bits(),
                expected.to_bits(),
                "{name}: row {index}, column {column}: {got} {expected}"
            );
        }
    }
}

#[test]
fn every_quantised_type_decodes_to_the_bit() {
    for blocks_per_row in [1, 3] {
        check("Q8_0", WeightType::Q8_0, blocks_per_row);
        check("Q4_0", WeightType::Q4_0, blocks_per_row);
        check("Q4_K", WeightType::Q4K, blocks_per_row);
        check("Q5_K", WeightType::Q5K, blocks_per_row);
        check("Q6_K", WeightType::Q6K, blocks_per_row);
    }
}
