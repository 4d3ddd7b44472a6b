//! GGUF, the one-file format of ggml: metadata and tensors, opened and checked before anything is believed.
//!
//! ```text
//! "GGUF" │ version:u32 │ num_tensors:u64 │ num_keys:u64
//! num_keys    × ( key:string │ kind:u32 │ value )                                         metadata.rs
//! num_tensors × ( name:string │ num_dims:u32 │ dims:u64… │ type:u32 │ offset:u64 )         tensors.rs
//! padding to the alignment │ data, each tensor at its offset, aligned
//! ```
//!
//! Numbers are little-endian, a string is its length (u64) and its bytes, `dims` begins with the innermost. A model
//! may be split over files (shards.rs). Every count is checked against the bytes that the file has left, nothing is
//! allocated from a count alone, and tensors stay in the mapping. Versions 2 and 3 are the same to a little-endian
//! reader; version 1 had 32-bit lengths and is refused.
//!
//! Source: `docs/gguf.md` in the ggml repository.

mod config;
mod metadata;
mod names;
mod reader;
mod shards;
mod tensors;

use std::collections::HashMap;
use std::path::Path;

use backend::WeightType;
use bytes::Bytes;

use self::metadata::read_metadata;
use self::reader::Reader;
use self::shards::Shard;
use self::tensors::{GgufTensor, read_tensors};
use crate::files::MappedFile;
use crate::{ModelConfig, ModelError};

pub use self::metadata::Metadata;
pub(crate) use self::names::{checkpoint_tensors, spelling};

const MAGIC: u32 = u32::from_le_bytes(*b"GGUF");

/// A model in GGUF, open and checked.
#[derive(Debug)]
pub struct Gguf {
    name: String,
    metadata: Metadata,
    shards: Vec<Shard>,
}

/// What one file holds.
#[derive(Debug)]
struct Contents {
    metadata: Metadata,
    tensors: Vec<GgufTensor>,
    /// Everything before the data.
    header: Bytes,
}

impl Gguf {
    /// Maps a file, and the others of its set if it is one of several, and checks them.
    ///
    /// # Errors
    /// One readable sentence that names the file and what is wrong with it.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let (name, mut files) = shards::open(path)?;
        // What describes the model is in the first file.
        let metadata = std::mem::take(&mut files[0].contents.metadata);
        Ok(Self { name, metadata, shards: files })
    }

    /// The file's name, without what tells its shards apart.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the file says about the model.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// Everything but the tensors' data: the first file's metadata and list of tensors as they are in it.
    pub fn header(&self) -> &Bytes {
        &self.shards[0].contents.header
    }

    /// How many weights that activations are multiplied with are stored in each type: those of all matrices but
    /// routers, and of the table of tokens only where it is the output projection as well.
    pub fn product_types(&self) -> HashMap<WeightType, usize> {
        let is_tied = config::is_tied(self.tensors());
        let products = self.tensors().filter(|tensor| {
            let is_router = tensor.name.ends_with(".ffn_gate_inp.weight");
            let is_table = tensor.name == "token_embd.weight";
            tensor.shape.len() > 1 && !is_router && (is_tied || !is_table)
        });
        let mut weights = HashMap::new();
        for tensor in products {
            *weights.entry(tensor.dtype).or_default() += tensor.shape.iter().product::<usize>();
        }
        weights
    }

    /// The shape of the model.
    pub(crate) fn config(&self) -> Result<ModelConfig, ModelError> {
        config::read(&self.metadata, self.tensors())
    }

    /// The name and contents of all files.
    pub(crate) fn files(&self) -> impl Iterator<Item = (&str, &MappedFile)> {
        self.shards.iter().map(|shard| (&*shard.file, &shard.mapped))
    }

    fn tensors(&self) -> impl Iterator<Item = &GgufTensor> + Clone {
        self.shards.iter().flat_map(|shard| &shard.contents.tensors)
    }
}

fn read_contents(mut reader: Reader) -> Result<Contents, ModelError> {
    let magic = reader.u32("the magic")?;
    if magic != MAGIC {
        return Err(reader.error("it does not begin with \"GGUF\""));
    }
    match reader.u32("the version")? {
        2 | 3 => {}
        version if matches!(version.swap_bytes(), 1..=3) => {
            return Err(reader.error("it is big-endian, expected little-endian; convert the model again"));
        }
        version => {
            let reason =
                format!("its version is {version}, expected 2 or 3; convert the model again if it is older");
            return Err(reader.error(reason));
        }
    }
    let num_tensors = reader.u64("the number of tensors")?;
    let num_keys = reader.u64("the number of keys")?;
    let metadata = read_metadata(&mut reader, num_keys)?;
    let tensors = read_tensors(&mut reader, num_tensors, &metadata)?;
    Ok(Contents { metadata, tensors, header: reader.consumed() })
}
