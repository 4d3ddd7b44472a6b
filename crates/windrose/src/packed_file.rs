//! A model's quantised weights as a file, so that the next start maps them instead of quantising again.
//!
//! The file is named after the formats (`windrose-q8.packed`) and lies beside the model; a GGUF file's, or one in a
//! directory of its own, has the model's name before it. It is written under another name and renamed when whole. A file
//! that is damaged, or was made of other weights, is made anew; one that cannot be written is only worth a warning.

use std::fs::{self, File};
use std::io::{BufWriter, ErrorKind};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cpu::{Cpu, ImageKey, ImageUse, PackedMatrix, WeightFormats};
use model::ModelFiles;
use tracing::{info, warn};

use crate::device::{CpuFormats, Device};
use crate::fingerprint;
use crate::inspect::bytes;
use crate::load::Model;
use crate::settings::Settings;

/// Where a model's quantised weights are kept, and what they were made of.
pub(crate) struct PackedFile {
    directory: PathBuf,
    name: String,
    formats: WeightFormats,
    key: ImageKey,
    image_use: ImageUse,
}

impl PackedFile {
    /// The file of a model; `None` if its weights are not quantised or come from no file.
    ///
    /// # Errors
    /// If the model's files cannot be read.
    pub(crate) fn of(model: &Model, settings: &Settings) -> Result<Option<Self>> {
        let Device::Cpu(CpuFormats { weights: formats, .. }) = model.device else { return Ok(None) };
        let wanted = formats.is_quantised() && settings.packed_dir != "off";
        if !wanted || settings.dummy_seed()?.is_some() {
            return Ok(None);
        }
        let name = format!("windrose-{}.packed", formats.name());
        let named = |model: &str| format!("{}.{name}", model.replace(['/', '\\'], "-"));
        let beside = match &model.files {
            ModelFiles::Embedded(_) => return Ok(None),
            ModelFiles::Directory(directory) => (directory.clone(), name.clone()),
            ModelFiles::Gguf(gguf) => {
                let path = Path::new(&settings.model);
                (path.parent().unwrap_or(Path::new("")).to_owned(), named(gguf.name()))
            }
        };
        let (directory, name) = match settings.packed_dir.as_str() {
            "" => beside,
            other => (other.into(), named(&model.name)),
        };
        let key = fingerprint::of_weights(&model.files)?;
        let image_use = if settings.copy_packed { ImageUse::Copied } else { ImageUse::InPlace };
        Ok(Some(Self { directory, name, formats, key, image_use }))
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.directory.join(&self.name)
    }

    /// Makes the backend take its weights from the file, if there is a sound one.
    pub(crate) fn use_in(&self, backend: &mut Cpu) -> bool {
        let path = self.path();
        if !path.exists() {
            return false;
        }
        let image =
            ModelFiles::Directory(self.directory.clone()).map(&self.name).context("it cannot be read");
        let used = image.and_then(|image| Ok(backend.use_image(image, self.key, self.image_use)?));
        match &used {
            Ok(()) => info!(file = %path.display(), "quantised weights found"),
            Err(error) => warn!("{} is made anew: {error:#}", path.display()),
        }
        used.is_ok()
    }

    /// Writes the file, or warns.
    pub(crate) fn write(&self, matrices: impl IntoIterator<Item = PackedMatrix>) {
        let path = self.path();
        match self.try_write(&path, matrices) {
            Ok(size) => info!(file = %path.display(), size = bytes(size), "quantised weights written"),
            Err(error) => warn!(
                "quantised weights were not kept, so the next start quantises again (packed_dir = \"off\" if that is \
                 meant): {error:#}"
            ),
        }
    }

    /// Writes beside the target and renames; the size.
    fn try_write(&self, path: &Path, matrices: impl IntoIterator<Item = PackedMatrix>) -> Result<u64> {
        fs::create_dir_all(&self.directory)
            .with_context(|| format!("cannot make {}", self.directory.display()))?;
        let partial = self.directory.join(format!(".{}.{}.partial", self.name, std::process::id()));
        let written = write_whole(&partial, self.formats, self.key, matrices)
            .and_then(|size| fs::rename(&partial, path).map(|()| size));
        if written.is_err() {
            remove_if_there(&partial);
        }
        written.with_context(|| format!("cannot write {}", path.display()))
    }
}

fn write_whole(
    path: &Path,
    formats: WeightFormats,
    key: ImageKey,
    matrices: impl IntoIterator<Item = PackedMatrix>,
) -> std::io::Result<u64> {
    let mut out = BufWriter::new(File::create(path)?);
    cpu::write_image(&mut out, formats, key, matrices)?;
    let file = out.into_inner()?;
    file.sync_all()?;
    Ok(file.metadata()?.len())
}

fn remove_if_there(path: &Path) {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            warn!("cannot remove {}: {error}", path.display())
        }
        _ => {}
    }
}
