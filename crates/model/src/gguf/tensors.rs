//! A GGUF file's tensors: what the list says, held against the data that the file has.

use backend::WeightType;
use bytes::Bytes;

use super::metadata::Metadata;
use super::reader::Reader;
use crate::ModelError;

/// Longest name of a tensor; ggml's own limit is 64.
const MAX_NAME_BYTES: usize = 256;
/// Most dimensions, as ggml has it.
const MAX_DIMS: u32 = 4;
/// Where data is aligned unless the file says otherwise.
const DEFAULT_ALIGNMENT: usize = 32;
/// Largest alignment accepted, that of a huge page.
const MAX_ALIGNMENT: usize = 1 << 21;

/// A tensor in its mapped file.
#[derive(Debug, Clone)]
pub(super) struct GgufTensor {
    pub(super) name: String,
    pub(super) dtype: WeightType,
    /// Outermost dimension first, as everywhere but in the file.
    pub(super) shape: Vec<usize>,
    pub(super) bytes: Bytes,
}

/// A tensor as the list has it.
struct Entry {
    name: String,
    dtype: WeightType,
    shape: Vec<usize>,
    offset: u64,
    len: usize,
}

/// Reads the list of tensors and finds their data.
pub(super) fn read_tensors(
    reader: &mut Reader,
    num_tensors: u64,
    metadata: &Metadata,
) -> Result<Vec<GgufTensor>, ModelError> {
    let alignment = alignment(metadata)?;
    let mut entries = Vec::new();
    for _ in 0..num_tensors {
        entries.push(read_entry(reader)?);
    }
    entries.sort_by_key(|entry| entry.offset);
    check_apart(reader, &entries)?;
    let data_start = reader.offset().next_multiple_of(alignment) as u64;
    entries.into_iter().map(|entry| locate(reader, entry, data_start, alignment)).collect()
}

fn alignment(metadata: &Metadata) -> Result<usize, ModelError> {
    let alignment = metadata.size("general.alignment")?.unwrap_or(DEFAULT_ALIGNMENT);
    if !alignment.is_power_of_two() || alignment > MAX_ALIGNMENT {
        return Err(metadata.error(format!(
            "general.alignment is {alignment}, expected a power of two up to {MAX_ALIGNMENT}"
        )));
    }
    Ok(alignment)
}

fn read_entry(reader: &mut Reader) -> Result<Entry, ModelError> {
    let name = reader.name(MAX_NAME_BYTES, "a tensor's name")?;
    let what = format!("the description of tensor {name}");
    let num_dims = reader.u32(&what)?;
    if !(1..=MAX_DIMS).contains(&num_dims) {
        let reason = format!("it has {num_dims} dimensions, expected 1 to {MAX_DIMS}");
        return Err(tensor_error(reader, &name, reason));
    }
    let mut dims = Vec::new();
    for _ in 0..num_dims {
        dims.push(reader.u64(&what)?);
    }
    let type_number = reader.u32(&what)?;
    let offset = reader.u64(&what)?;
    let dtype = weight_type(type_number).map_err(|reason| tensor_error(reader, &name, reason))?;
    let len = data_len(&dims, dtype).map_err(|reason| tensor_error(reader, &name, reason))?;
    let shape = dims.iter().rev().map(|&dim| dim as usize).collect();
    Ok(Entry { name, dtype, shape, offset, len })
}

/// Bytes of a tensor; `dims` begins with the elements of a row.
fn data_len(dims: &[u64], dtype: WeightType) -> Result<usize, String> {
    let sizes = dims.iter().map(|&dim| usize::try_from(dim).ok().filter(|&dim| dim > 0));
    let elements = sizes.clone().try_fold(1usize, |product, dim| product.checked_mul(dim?));
    let (Some(elements), Some(cols)) = (elements, sizes.clone().next().flatten()) else {
        return Err(format!("its dimensions are {dims:?}, which no file can hold"));
    };
    if !cols.is_multiple_of(dtype.block_len()) {
        let block_len = dtype.block_len();
        return Err(format!(
            "its rows have {cols} elements, expected whole blocks of {block_len} ({dtype:?})"
        ));
    }
    // Blocks have at most four bytes per element, so a product that fits may still grow.
    let len = (elements / dtype.block_len()).checked_mul(dtype.block_bytes());
    len.ok_or_else(|| format!("its dimensions are {dims:?}, which no file can hold"))
}

/// Checks that no two tensors share bytes; `entries` are in the order of their data.
fn check_apart(reader: &Reader, entries: &[Entry]) -> Result<(), ModelError> {
    for pair in entries.windows(2) {
        if pair[0].offset.saturating_add(pair[0].len as u64) > pair[1].offset {
            let reason = format!("its data overlaps that of {}", pair[0].name);
            return Err(tensor_error(reader, &pair[1].name, reason));
        }
    }
    Ok(())
}

fn locate(
    reader: &Reader,
    entry: Entry,
    data_start: u64,
    alignment: usize,
) -> Result<GgufTensor, ModelError> {
    let Entry { name, dtype, shape, offset, len } = entry;
    if !offset.is_multiple_of(alignment as u64) {
        let reason = format!("its offset is {offset}, expected a multiple of the alignment {alignment}");
        return Err(tensor_error(reader, &name, reason));
    }
    let start = data_start.checked_add(offset).and_then(|start| usize::try_from(start).ok());
    let range = start.and_then(|start| Some(start..start.checked_add(len)?));
    let file_len = reader.bytes().len();
    match range.filter(|range| range.end <= file_len) {
        Some(range) => Ok(GgufTensor { name, dtype, shape, bytes: reader.bytes().slice(range) }),
        None => {
            let reason = format!(
                "its {len} bytes at offset {offset} of the data leave the file of {file_len} bytes; the file is \
                 truncated or damaged"
            );
            Err(tensor_error(reader, &name, reason))
        }
    }
}

/// The encoding with ggml's number `number`.
fn weight_type(number: u32) -> Result<WeightType, String> {
    let name = match number {
        0 => return Ok(WeightType::F32),
        1 => return Ok(WeightType::F16),
        2 => return Ok(WeightType::Q4_0),
        8 => return Ok(WeightType::Q8_0),
        12 => return Ok(WeightType::Q4K),
        13 => return Ok(WeightType::Q5K),
        14 => return Ok(WeightType::Q6K),
        30 => return Ok(WeightType::Bf16),
        3 => "Q4_1",
        6 => "Q5_0",
        7 => "Q5_1",
        10 => "Q2_K",
        11 => "Q3_K",
        16 | 17 | 22 => "IQ2",
        18 | 21 => "IQ3",
        19 | 29 => "IQ1",
        20 | 23 => "IQ4",
        24..=27 => "integers",
        28 => "F64",
        34 | 35 => "ternary",
        39 => "MXFP4",
        _ => "unknown",
    };
    Err(format!(
        "its type is {number} ({name}), expected F32, F16, BF16, Q8_0, Q4_0, Q4_K, Q5_K or Q6_K; give a file \
         quantised as Q4_K_M, Q5_K_M, Q6_K or Q8_0"
    ))
}

fn tensor_error(reader: &Reader, tensor: &str, reason: String) -> ModelError {
    ModelError::Tensor { file: reader.file().to_string(), tensor: tensor.to_owned(), reason }
}
