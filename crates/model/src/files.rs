//! The files of a model: a directory in Hugging Face layout, a GGUF file, or files embedded in the binary.
//!
//! Large files are memory-mapped and everything above works on [`Bytes`], so a mapped checkpoint is never
//! copied and stays open for as long as any weight refers to it. This is the one place of the crate with
//! `unsafe`. Pickled checkpoints (`.bin`, `.pt`) are never opened: reading one executes it.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

use crate::{Gguf, ModelError};

/// Largest file that is read into memory rather than mapped.
const MAX_TEXT_BYTES: u64 = 64 << 20;

/// Where a model's files come from.
#[derive(Debug, Clone)]
pub enum ModelFiles {
    /// A directory with `config.json`, `*.safetensors`, `tokenizer.json` and so on.
    Directory(PathBuf),
    /// A GGUF file, or a set of them, which has everything; there are no text files beside it.
    Gguf(Arc<Gguf>),
    /// Name and contents of files in the binary itself.
    Embedded(&'static [(&'static str, &'static [u8])]),
}

impl ModelFiles {
    /// Opens a `.gguf` file, a model directory, or the directory of a `config.json`.
    ///
    /// # Errors
    /// If there is no such file or directory, no `config.json` in it, or the GGUF file is not sound; the message says
    /// what to do.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        if path.extension().is_some_and(|extension| extension == "gguf") && !path.is_dir() {
            return Gguf::open(path).map(|gguf| Self::Gguf(gguf.into()));
        }
        let directory = if path.file_name().is_some_and(|name| name == "config.json") {
            path.parent().unwrap_or(Path::new("."))
        } else {
            path
        };
        let error =
            |reason: &str| ModelError::File { file: path.display().to_string(), reason: reason.to_owned() };
        if !path.exists() {
            return Err(error(
                "no such file or directory; give the directory of a model in Hugging Face layout, or a .gguf file",
            ));
        }
        if !directory.join("config.json").is_file() {
            return Err(error(
                "this is not a model directory in Hugging Face layout: it has no config.json (of a model in GGUF, \
                 give the file)",
            ));
        }
        Ok(Self::Directory(directory.to_owned()))
    }

    /// Reads a small text file; `None` if the model has no such file.
    ///
    /// # Errors
    /// If the file exists but cannot be read, or is larger than any text file of a model should be.
    pub fn read(&self, name: &str) -> Result<Option<Bytes>, ModelError> {
        let path = match self {
            Self::Embedded(_) => return Ok(self.embedded(name)),
            Self::Gguf(_) => return Ok(None),
            Self::Directory(directory) => directory.join(name),
        };
        let error = |reason: String| ModelError::File { file: path.display().to_string(), reason };
        match std::fs::metadata(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(error(e.to_string())),
            Ok(metadata) if metadata.len() > MAX_TEXT_BYTES => {
                return Err(error(format!(
                    "{} bytes, more than the {MAX_TEXT_BYTES} accepted",
                    metadata.len()
                )));
            }
            Ok(_) => {}
        }
        std::fs::read(&path).map(|contents| Some(contents.into())).map_err(|e| error(e.to_string()))
    }

    /// Maps a large file.
    ///
    /// # Errors
    /// If there is no such file or it cannot be mapped.
    pub fn map(&self, name: &str) -> Result<Bytes, ModelError> {
        let error = |reason: String| ModelError::File { file: self.display_name(name), reason };
        match self {
            Self::Embedded(_) => self.embedded(name).ok_or_else(|| error("it is not embedded".to_owned())),
            Self::Gguf(gguf) => {
                let found = gguf.files().find(|(file, _)| *file == name);
                found
                    .map(|(_, bytes)| bytes.clone())
                    .ok_or_else(|| error("it is no file of the model".to_owned()))
            }
            Self::Directory(directory) => map_path(&directory.join(name)),
        }
    }

    /// Names of all files that end in `suffix`, sorted.
    pub fn names_ending_in(&self, suffix: &str) -> Vec<String> {
        let mut names: Vec<String> = match self {
            Self::Embedded(files) => files.iter().map(|(name, _)| (*name).to_owned()).collect(),
            Self::Gguf(gguf) => gguf.files().map(|(file, _)| file.to_owned()).collect(),
            Self::Directory(directory) => std::fs::read_dir(directory)
                .into_iter()
                .flatten()
                .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
                .collect(),
        };
        names.retain(|name| name.ends_with(suffix));
        names.sort();
        names
    }

    /// How a file is called in messages.
    pub fn display_name(&self, name: &str) -> String {
        match self {
            Self::Embedded(_) => format!("embedded {name}"),
            Self::Gguf(_) => name.to_owned(),
            Self::Directory(directory) => directory.join(name).display().to_string(),
        }
    }

    fn embedded(&self, name: &str) -> Option<Bytes> {
        let Self::Embedded(files) = self else { return None };
        files.iter().find(|(file, _)| *file == name).map(|(_, contents)| Bytes::from_static(contents))
    }
}

/// Maps a large file by its path.
pub(crate) fn map_path(path: &Path) -> Result<Bytes, ModelError> {
    map_file(path).map_err(|e| ModelError::File { file: path.display().to_string(), reason: e.to_string() })
}

#[allow(unsafe_code)]
fn map_file(path: &Path) -> io::Result<Bytes> {
    let file = File::open(path)?;
    if file.metadata()?.len() == 0 {
        return Ok(Bytes::new());
    }
    // SAFETY: the map is private and read-only, and every value read from it is an integer or a float, for
    // which any bits are valid. Another process that truncates the file while it is served would end this
    // one with SIGBUS; a checkpoint in use must be replaced by renaming, as every downloader does.
    let map = unsafe { memmap2::Mmap::map(&file)? };
    Ok(Bytes::from_owner(map))
}
