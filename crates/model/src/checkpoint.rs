//! The tensors of a checkpoint by name, from one or several safetensors files, still in the mapped files.
//!
//! ```text
//! model.safetensors.index.json? ──► shards ──► header checked ──► name → (file, type, shape, bytes)
//! ```
//!
//! Headers are checked by the `safetensors` crate: size cap, offsets that overlap, leave holes or leave the file,
//! sizes that contradict shapes. What is wrong is told with the file's name. Nothing is converted here.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use backend::WeightType;
use bytes::Bytes;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

use crate::{ModelError, ModelFiles};

const SINGLE_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";

/// One tensor of a checkpoint, in its mapped file.
#[derive(Debug, Clone)]
pub(crate) struct StoredTensor {
    pub(crate) file: Arc<str>,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Bytes,
}

impl StoredTensor {
    /// The element type, if it is one that weights can have.
    pub(crate) fn weight_type(&self) -> Option<WeightType> {
        match self.dtype {
            Dtype::BF16 => Some(WeightType::Bf16),
            Dtype::F16 => Some(WeightType::F16),
            Dtype::F32 => Some(WeightType::F32),
            _ => None,
        }
    }
}

/// All tensors of a model.
#[derive(Debug)]
pub(crate) struct Checkpoint {
    tensors: HashMap<String, StoredTensor>,
    /// Named in errors about tensors that are nowhere.
    description: String,
}

#[derive(Deserialize)]
struct ShardIndex {
    weight_map: HashMap<String, String>,
}

impl Checkpoint {
    /// Maps every file of the checkpoint and checks its header.
    pub(crate) fn open(files: &ModelFiles) -> Result<Self, ModelError> {
        let shards = shard_names(files)?;
        let mut tensors = HashMap::new();
        for shard in &shards {
            let file: Arc<str> = files.display_name(shard).into();
            for (name, tensor) in read_shard(&file, files.map(shard)?)? {
                if let Some(other) = tensors.insert(name.clone(), tensor) {
                    let reason = format!("it is in {} as well, expected in one file only", other.file);
                    return Err(ModelError::Tensor { file: file.to_string(), tensor: name, reason });
                }
            }
        }
        let description = match shards.as_slice() {
            [single] => files.display_name(single),
            several => format!("{} and {} more files", files.display_name(&several[0]), several.len() - 1),
        };
        Ok(Self { tensors, description })
    }

    /// Takes a tensor out, so that what remains at the end is what nothing asked for.
    pub(crate) fn take(&mut self, name: &str) -> Result<StoredTensor, ModelError> {
        self.tensors.remove(name).ok_or_else(|| ModelError::Tensor {
            file: self.description.clone(),
            tensor: name.to_owned(),
            reason: "it is missing".to_owned(),
        })
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

fn read_shard(file: &Arc<str>, bytes: Bytes) -> Result<Vec<(String, StoredTensor)>, ModelError> {
    let parsed = SafeTensors::deserialize(&bytes).map_err(|e| ModelError::File {
        file: file.to_string(),
        reason: format!("it is not a sound safetensors file: {e}"),
    })?;
    let tensors = parsed.iter().map(|(name, view)| {
        let tensor = StoredTensor {
            file: file.clone(),
            dtype: view.dtype(),
            shape: view.shape().to_vec(),
            bytes: bytes.slice_ref(view.data()),
        };
        (name.to_owned(), tensor)
    });
    Ok(tensors.collect())
}
