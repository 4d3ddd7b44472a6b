//! Why a model cannot be loaded: one readable sentence that names the file, the tensor, what was expected and
//! what was found.

use backend::BackendError;
use thiserror::Error;

/// A model that cannot be served.
#[derive(Debug, Error)]
pub enum ModelError {
    /// A file of the model is missing or cannot be read.
    #[error("cannot read {file}: {reason}")]
    File {
        /// Path or name of the file.
        file: String,
        /// What the system said, or what to do.
        reason: String,
    },
    /// `config.json` describes something that this build does not run, or makes no sense.
    #[error("{file}: {reason}")]
    Config {
        /// Path or name of the file.
        file: String,
        /// The key, the value found and what is accepted.
        reason: String,
    },
    /// A tensor is missing, misshaped, wrongly typed or unexpected.
    #[error("{file}: tensor {tensor}: {reason}")]
    Tensor {
        /// Path or name of the file that has (or should have) the tensor.
        file: String,
        /// Name in the checkpoint.
        tensor: String,
        /// Expected and found.
        reason: String,
    },
    /// The backend could not take the weights or allocate its workspace.
    #[error(transparent)]
    Backend(#[from] BackendError),
}
