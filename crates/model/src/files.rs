//! The files of a model: a directory in Hugging Face layout, a GGUF file, or files embedded in the binary.
//!
//! Large files are memory-mapped and everything above works on [`Bytes`], so a mapped checkpoint is never
//! copied and stays open for as long as any weight refers to it. What was read to be converted leaves this process's
//! memory when its layer is loaded. This is the one place of the crate with `unsafe`. Pickled checkpoints (`.bin`,
//! `.pt`) are never opened: reading one executes it.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use memmap2::Mmap;

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
        self.open_file(name).map(|file| file.bytes)
    }

    /// Maps a large file, as [`ModelFiles::map`] does.
    pub(crate) fn open_file(&self, name: &str) -> Result<MappedFile, ModelError> {
        let error =
            |reason: &str| ModelError::File { file: self.display_name(name), reason: reason.to_owned() };
        match self {
            Self::Embedded(_) => {
                let bytes = self.embedded(name).ok_or_else(|| error("it is not embedded"))?;
                Ok(MappedFile { bytes, map: None })
            }
            Self::Gguf(gguf) => {
                let found = gguf.files().find(|(file, _)| *file == name);
                found.map(|(_, file)| file.clone()).ok_or_else(|| error("it is no file of the model"))
            }
            Self::Directory(directory) => MappedFile::open(&directory.join(name)),
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

/// The contents of a large file.
#[derive(Debug, Clone)]
pub(crate) struct MappedFile {
    pub(crate) bytes: Bytes,
    /// None of what is empty or embedded.
    map: Option<Arc<Mmap>>,
}

/// A map that owns the bytes of a [`MappedFile`].
struct Owner(Arc<Mmap>);

impl AsRef<[u8]> for Owner {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl MappedFile {
    /// Maps a file.
    pub(crate) fn open(path: &Path) -> Result<Self, ModelError> {
        let error =
            |e: io::Error| ModelError::File { file: path.display().to_string(), reason: e.to_string() };
        let map = map_file(path).map_err(error)?.map(Arc::new);
        let bytes = map.clone().map_or_else(Bytes::new, |map| Bytes::from_owner(Owner(map)));
        Ok(Self { bytes, map })
    }

    /// Takes what has been read so far out of this process, as weights that were converted are not needed again. The
    /// system keeps it in its own cache as long as it likes, and what is read after all comes from there.
    #[allow(unsafe_code)]
    pub(crate) fn release_pages(&self) {
        #[cfg(unix)]
        if let Some(map) = &self.map {
            // SAFETY: nobody can have written to a read-only map, so its pages are those of the file, as they will be
            // when they are read again. A refusal only keeps them.
            let _ = unsafe { map.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
        }
    }
}

/// Maps a file that is not empty.
///
/// Large pages are asked for, where the file system has them: what is served from the map is then read at a tenth more
/// of the memory's speed, and what is not in memory yet comes in large pieces, twice as fast.
#[allow(unsafe_code)]
fn map_file(path: &Path) -> io::Result<Option<Mmap>> {
    let file = File::open(path)?;
    if file.metadata()?.len() == 0 {
        return Ok(None);
    }
    // SAFETY: the map is private and read-only, and every value read from it is an integer or a float, for
    // which any bits are valid. Another process that truncates the file while it is served would end this
    // one with SIGBUS; a checkpoint in use must be replaced by renaming, as every downloader does.
    let map = unsafe { Mmap::map(&file) }?;
    #[cfg(target_os = "linux")]
    let _ = map.advise(memmap2::Advice::HugePage);
    Ok(Some(map))
}
