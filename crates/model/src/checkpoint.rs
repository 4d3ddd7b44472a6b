//! The tensors of a checkpoint by name, from one or several safetensors files or from GGUF, still in the mapped files.
//!
//! ```text
//! model.safetensors.index.json? ──► shards ──► header checked ──┬─► name → (file, type, shape, bytes)
//! model.gguf ──► gguf.rs ──► names of Hugging Face ─────────────┘
//! ```
//!
//! Headers are checked by the `safetensors` crate: size cap, offsets that overlap, leave holes or leave the file,
//! sizes that contradict shapes. What is wrong is told with the file's name. Nothing is converted here.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use backend::WeightType;
use bytes::Bytes;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

use crate::files::MappedFile;
use crate::{Gguf, ModelConfig, ModelError, ModelFiles, gguf};

const SINGLE_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";

/// One tensor of a checkpoint, in its mapped file.
#[derive(Debug, Clone)]
pub(crate) struct StoredTensor {
    pub(crate) file: Arc<str>,
    /// Its name in that file.
    pub(crate) name: String,
    pub(crate) dtype: WeightType,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Bytes,
    pub(crate) row_order: RowOrder,
}

/// How the rows of a stored matrix lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RowOrder {
    /// As the forward pass wants them: of each head the features that rope rotates as pairs are half a head apart.
    Canonical,
    /// As ggml wants them: the two features of a pair are neighbours.
    Interleaved {
        /// Rows of a head.
        head_dim: usize,
    },
}

impl RowOrder {
    /// A matrix's rows in canonical order, copied only if they are not. The two matrices of a layer that can be
    /// interleaved are small beside its experts.
    ///
    /// # Panics
    /// If the rows are not whole heads; the loader has checked the shape.
    pub(crate) fn restore(self, rows: &Bytes, row_bytes: usize) -> Bytes {
        let Self::Interleaved { head_dim } = self else { return rows.clone() };
        assert!(rows.len().is_multiple_of(head_dim * row_bytes));
        let mut restored = Vec::with_capacity(rows.len());
        for head in rows.chunks_exact(head_dim * row_bytes) {
            for half in 0..2 {
                let of_half = head.chunks_exact(row_bytes).skip(half).step_by(2);
                of_half.for_each(|row| restored.extend_from_slice(row));
            }
        }
        restored.into()
    }
}

/// All tensors of a model.
#[derive(Debug)]
pub(crate) struct Checkpoint {
    tensors: HashMap<String, StoredTensor>,
    files: Vec<MappedFile>,
    /// Named in errors about tensors that are nowhere.
    description: String,
    /// A tensor's name in the files, for the same.
    spelling: fn(&str) -> String,
}

#[derive(Deserialize)]
struct ShardIndex {
    weight_map: HashMap<String, String>,
}

impl Checkpoint {
    /// Maps every file of the checkpoint and checks its header.
    pub(crate) fn open(files: &ModelFiles, config: &ModelConfig) -> Result<Self, ModelError> {
        match files {
            ModelFiles::Gguf(gguf) => Self::of_gguf(gguf, config),
            ModelFiles::Directory(_) | ModelFiles::Embedded(_) => Self::of_safetensors(files),
        }
    }

    fn of_gguf(gguf: &Gguf, config: &ModelConfig) -> Result<Self, ModelError> {
        let tensors = gguf::checkpoint_tensors(gguf, config)?;
        Ok(Self {
            tensors,
            files: gguf.files().map(|(_, file)| file.clone()).collect(),
            description: describe(gguf.files().map(|(file, _)| file.to_owned())),
            spelling: gguf::spelling,
        })
    }

    fn of_safetensors(files: &ModelFiles) -> Result<Self, ModelError> {
        let shards = shard_names(files)?;
        let (mut tensors, mut mapped) = (HashMap::new(), Vec::new());
        for shard in &shards {
            let file: Arc<str> = files.display_name(shard).into();
            mapped.push(files.open_file(shard)?);
            for (name, tensor) in read_shard(&file, &mapped[mapped.len() - 1].bytes)? {
                if let Some(other) = tensors.insert(name.clone(), tensor) {
                    let reason = format!("it is in {} as well, expected in one file only", other.file);
                    return Err(ModelError::Tensor { file: file.to_string(), tensor: name, reason });
                }
            }
        }
        let description = describe(shards.iter().map(|shard| files.display_name(shard)));
        Ok(Self { tensors, files: mapped, description, spelling: str::to_owned })
    }

    /// Takes a tensor out, so that what remains at the end is what nothing asked for.
    pub(crate) fn take(&mut self, name: &str) -> Result<StoredTensor, ModelError> {
        self.tensors.remove(name).ok_or_else(|| ModelError::Tensor {
            file: self.description.clone(),
            tensor: (self.spelling)(name),
            reason: "it is missing".to_owned(),
        })
    }

    /// See [`MappedFile::release_pages`].
    pub(crate) fn release_pages(&self) {
        self.files.iter().for_each(MappedFile::release_pages);
    }

    /// Whether there is such a tensor.
    pub(crate) fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The tensors that were not taken, sorted by name.
    pub(crate) fn remaining(&self) -> Vec<(&str, &StoredTensor)> {
        let mut remaining: Vec<_> =
            self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        remaining.sort_by_key(|(name, _)| *name);
        remaining
    }
}

/// The files of a checkpoint in a few words.
fn describe(mut files: impl Iterator<Item = String>) -> String {
    let first = files.next().unwrap_or_default();
    match files.count() {
        0 => first,
        more => format!("{first} and {more} more files"),
    }
}

/// The files to map: those of the index, or the single one.
fn shard_names(files: &ModelFiles) -> Result<Vec<String>, ModelError> {
    let Some(contents) = files.read(INDEX_FILE)? else {
        if files.names_ending_in(".safetensors").iter().any(|name| name == SINGLE_FILE) {
            return Ok(vec![SINGLE_FILE.to_owned()]);
        }
        return Err(no_weights(files));
    };
    let error = |reason: String| ModelError::File { file: files.display_name(INDEX_FILE), reason };
    let index: ShardIndex = serde_json::from_slice(&contents).map_err(|e| error(e.to_string()))?;
    let shards: BTreeSet<String> = index.weight_map.into_values().collect();
    if let Some(outside) = shards.iter().find(|shard| shard.contains(['/', '\\']) || shard.starts_with('.')) {
        return Err(error(format!("it names {outside:?}, expected files in the model's own directory")));
    }
    if shards.is_empty() {
        return Err(error("its weight_map names no file".to_owned()));
    }
    Ok(shards.into_iter().collect())
}

fn no_weights(files: &ModelFiles) -> ModelError {
    let pickled = [".bin", ".pt", ".pth"].iter().flat_map(|suffix| files.names_ending_in(suffix)).next();
    let reason = match pickled {
        Some(name) => format!(
            "there is no such file, and {name} is a pickle, which runs code when read and is never opened; \
             convert the checkpoint to safetensors"
        ),
        None => "there is no such file and no index of shards; give a complete checkpoint or --dummy-weights"
            .to_owned(),
    };
    ModelError::File { file: files.display_name(SINGLE_FILE), reason }
}

fn read_shard(file: &Arc<str>, bytes: &Bytes) -> Result<Vec<(String, StoredTensor)>, ModelError> {
    let parsed = SafeTensors::deserialize(bytes).map_err(|e| ModelError::File {
        file: file.to_string(),
        reason: format!("it is not a sound safetensors file: {e}"),
    })?;
    let tensor = |(name, view): (&str, TensorView)| {
        let dtype = weight_type(view.dtype()).map_err(|reason| ModelError::Tensor {
            file: file.to_string(),
            tensor: name.to_owned(),
            reason,
        })?;
        let tensor = StoredTensor {
            file: file.clone(),
            name: name.to_owned(),
            dtype,
            shape: view.shape().to_vec(),
            bytes: bytes.slice_ref(view.data()),
            row_order: RowOrder::Canonical,
        };
        Ok((name.to_owned(), tensor))
    };
    parsed.iter().map(tensor).collect()
}

fn weight_type(dtype: Dtype) -> Result<WeightType, String> {
    match dtype {
        Dtype::BF16 => Ok(WeightType::Bf16),
        Dtype::F16 => Ok(WeightType::F16),
        Dtype::F32 => Ok(WeightType::F32),
        other => Err(format!("expected BF16, F16 or F32, found {other:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interleaved_rows_are_restored_head_by_head() {
        // Two heads of four rows of two bytes; a row is named by its place in canonical order.
        let stored = [[0, 0], [2, 2], [1, 1], [3, 3], [4, 4], [6, 6], [5, 5], [7, 7]].concat();
        let restored = RowOrder::Interleaved { head_dim: 4 }.restore(&stored.into(), 2);
        let expected: Vec<u8> = (0..8).flat_map(|row| [row, row]).collect();
        assert_eq!(restored, expected);
    }
}
