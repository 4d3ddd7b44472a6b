//! The files of a model in GGUF: one, or a numbered set as `llama-gguf-split` writes it.
//!
//! Files of a set are called `name-00001-of-00003.gguf`; each has its number (`split.no`, from 0) and theirs
//! (`split.count`), and the first alone describes the model. Any of them names the set.

use std::path::Path;
use std::sync::Arc;

use super::reader::Reader;
use super::{Contents, read_contents};
use crate::ModelError;
use crate::files::MappedFile;

/// One file of a model.
#[derive(Debug)]
pub(super) struct Shard {
    /// Its path, for messages.
    pub(super) file: Arc<str>,
    pub(super) mapped: MappedFile,
    pub(super) contents: Contents,
}

/// Opens a file and those that belong to it; returns the model's name as well.
pub(super) fn open(path: &Path) -> Result<(String, Vec<Shard>), ModelError> {
    let named = Shard::read(path)?;
    let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let count = named.size("split.count")?.unwrap_or(1);
    if count <= 1 {
        return Ok((stem, vec![named]));
    }
    let Some(name) = set_name(&stem, count) else {
        let reason =
            format!("it is one of {count} files, expected a name that ends in -00001-of-{count:05}.gguf");
        return Err(ModelError::File { file: named.file.to_string(), reason });
    };
    let mut shards = Vec::new();
    for number in 1..=count {
        let shard = Shard::read(&path.with_file_name(format!("{name}-{number:05}-of-{count:05}.gguf")))?;
        shard.check_number(number - 1, count)?;
        shards.push(shard);
    }
    check_complete(&shards)?;
    Ok((name.to_owned(), shards))
}

/// What comes before `-00001-of-00003`.
fn set_name(stem: &str, count: usize) -> Option<&str> {
    let (name, number) = stem.strip_suffix(&format!("-of-{count:05}"))?.rsplit_once('-')?;
    (number.len() == 5 && number.bytes().all(|byte| byte.is_ascii_digit())).then_some(name)
}

impl Shard {
    fn read(path: &Path) -> Result<Self, ModelError> {
        let file: Arc<str> = path.display().to_string().into();
        let mapped = MappedFile::open(path)?;
        let contents = read_contents(Reader::new(file.clone(), mapped.bytes.clone()))?;
        Ok(Self { file, mapped, contents })
    }

    fn size(&self, key: &str) -> Result<Option<usize>, ModelError> {
        self.contents.metadata.size(key)
    }

    fn check_number(&self, index: usize, count: usize) -> Result<(), ModelError> {
        let found = (self.size("split.no")?, self.size("split.count")?);
        if found == (Some(index), Some(count)) {
            return Ok(());
        }
        let reason = format!("split.no and split.count are {found:?}, expected {index} and {count}");
        Err(self.contents.metadata.error(reason))
    }
}

/// Holds the tensors of all files against the number that the first one tells.
fn check_complete(shards: &[Shard]) -> Result<(), ModelError> {
    let num_tensors: usize = shards.iter().map(|shard| shard.contents.tensors.len()).sum();
    match shards[0].size("split.tensors.count")? {
        Some(expected) if expected != num_tensors => {
            let reason = format!(
                "split.tensors.count is {expected}, and the {} files have {num_tensors}",
                shards.len()
            );
            Err(shards[0].contents.metadata.error(reason))
        }
        _ => Ok(()),
    }
}
