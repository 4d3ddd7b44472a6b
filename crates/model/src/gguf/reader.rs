//! A cursor over a mapped file that cannot leave it.

use std::sync::Arc;

use bytes::Bytes;

use crate::ModelError;

/// Reads a file from its beginning.
pub(super) struct Reader {
    file: Arc<str>,
    bytes: Bytes,
    offset: usize,
}

impl Reader {
    pub(super) fn new(file: Arc<str>, bytes: Bytes) -> Self {
        Self { file, bytes, offset: 0 }
    }

    /// The file's name for messages.
    pub(super) fn file(&self) -> &Arc<str> {
        &self.file
    }

    /// The whole file.
    pub(super) fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// Bytes read so far.
    pub(super) fn offset(&self) -> usize {
        self.offset
    }

    /// What was read so far.
    pub(super) fn consumed(&self) -> Bytes {
        self.bytes.slice(..self.offset)
    }

    /// An error about this file.
    pub(super) fn error(&self, reason: impl Into<String>) -> ModelError {
        let reason = format!("it is not a sound GGUF file: {}", reason.into());
        ModelError::File { file: self.file.to_string(), reason }
    }

    /// The next `len` bytes, of which `what` is the name in messages.
    pub(super) fn take(&mut self, len: u64, what: &str) -> Result<Bytes, ModelError> {
        let left = self.bytes.len() - self.offset;
        let fitting = usize::try_from(len).ok().filter(|&len| len <= left);
        let Some(len) = fitting else {
            return Err(self.error(format!(
                "it ends within {what}: {len} bytes expected at byte {}, {left} left; the file is truncated or \
                 damaged",
                self.offset
            )));
        };
        let start = self.offset;
        self.offset += len;
        Ok(self.bytes.slice(start..self.offset))
    }

    pub(super) fn u32(&mut self, what: &str) -> Result<u32, ModelError> {
        let bytes = self.take(4, what)?;
        Ok(u32::from_le_bytes(bytes[..].try_into().expect("four bytes")))
    }

    pub(super) fn u64(&mut self, what: &str) -> Result<u64, ModelError> {
        let bytes = self.take(8, what)?;
        Ok(u64::from_le_bytes(bytes[..].try_into().expect("eight bytes")))
    }

    /// A string's bytes, which need not be UTF-8.
    pub(super) fn string(&mut self, what: &str) -> Result<Bytes, ModelError> {
        let len = self.u64(what)?;
        self.take(len, what)
    }

    /// A name: UTF-8 of at most `max_len` bytes.
    pub(super) fn name(&mut self, max_len: usize, what: &str) -> Result<String, ModelError> {
        let bytes = self.string(what)?;
        let name = std::str::from_utf8(&bytes).ok().filter(|name| name.len() <= max_len);
        let name = name.map(str::to_owned);
        name.ok_or_else(|| self.error(format!("{what} is not a text of at most {max_len} bytes")))
    }
}
