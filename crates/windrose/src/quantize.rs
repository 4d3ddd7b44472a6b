//! `windrose quantize`: makes a model's file of quantised weights ahead of the first start.

use anyhow::{Context, Result};

use crate::device::Device;
use crate::inspect::bytes;
use crate::load::Model;
use crate::packed_file::PackedFile;
use crate::settings::Settings;

/// Quantises the model that the settings name for the processor, into the formats that its start would choose, or q8
/// where that is bf16, and says where the result is.
pub(crate) fn run(settings: &mut Settings) -> Result<()> {
    "cpu".clone_into(&mut settings.device);
    let mut model = Model::find(settings)?;
    if settings.weights == "auto"
        && matches!(model.device, Device::Cpu(formats) if !formats.weights.is_quantised())
    {
        "q8".clone_into(&mut settings.weights);
        model = Model::find(settings)?;
    }
    let file = PackedFile::of(&model, settings)?.context(
        "there is nothing to write: give a model's directory (--model), weights \"q8\" or \"q4\", and a packed_dir \
         other than \"off\"",
    )?;
    model.load(settings)?;
    let size = std::fs::metadata(file.path()).context("the file was not written; the log says why")?.len();
    println!("{} ({})", file.path().display(), bytes(size));
    Ok(())
}
