//! A GGUF file's keys and values.
//!
//! Scalars are widened to one type of each sort; arrays are walked once to find their end and stay in the mapping,
//! to be decoded when someone asks. Asking for a key as another type than it has is an error that says both.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use bytes::Bytes;

use super::reader::Reader;
use crate::ModelError;

/// Longest key, as the format has it.
const MAX_KEY_BYTES: usize = 65_535;
/// Deepest arrays in arrays; no known file has any.
const MAX_NESTING: usize = 4;

/// What a file says about its model, by key.
#[derive(Debug, Default)]
pub struct Metadata {
    file: Arc<str>,
    values: HashMap<String, Value>,
}

#[derive(Debug)]
enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    String(Bytes),
    Array(Array),
}

/// An array, still encoded.
#[derive(Debug)]
struct Array {
    kind: Kind,
    bytes: Bytes,
}

/// The type of a value, by its number in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
enum Kind {
    U8 = 0,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

impl Metadata {
    /// A number that counts something; `None` if there is no such key.
    ///
    /// # Errors
    /// [`ModelError::Config`] if the key has something else.
    pub fn size(&self, key: &str) -> Result<Option<usize>, ModelError> {
        self.get(key, "a whole number that is not negative", |value| usize::try_from(value.integer()?).ok())
    }

    /// A number; `None` if there is no such key.
    ///
    /// # Errors
    /// [`ModelError::Config`] if the key has something else.
    pub fn number(&self, key: &str) -> Result<Option<f64>, ModelError> {
        self.get(key, "a number", Value::number)
    }

    /// True or false; `None` if there is no such key.
    ///
    /// # Errors
    /// [`ModelError::Config`] if the key has something else.
    pub fn flag(&self, key: &str) -> Result<Option<bool>, ModelError> {
        self.get(key, "true or false", |value| match value {
            Value::Bool(flag) => Some(*flag),
            _ => None,
        })
    }

    /// A text; `None` if there is no such key.
    ///
    /// # Errors
    /// [`ModelError::Config`] if the key has something else or is not UTF-8.
    pub fn text(&self, key: &str) -> Result<Option<String>, ModelError> {
        self.get(key, "a text in UTF-8", |value| match value {
            Value::String(bytes) => text(bytes),
            _ => None,
        })
    }

    /// A list of texts; `None` if there is no such key.
    ///
    /// # Errors
    /// [`ModelError::Config`] if the key has something else or a text is not UTF-8.
    pub fn texts(&self, key: &str) -> Result<Option<Vec<String>>, ModelError> {
        self.get(key, "a list of texts in UTF-8", |value| match value {
            Value::Array(array) => array.strings()?.map(text).collect(),
            _ => None,
        })
    }

    /// A list of numbers; `None` if there is no such key.
    ///
    /// # Errors
    /// [`ModelError::Config`] if the key has something else.
    pub fn numbers(&self, key: &str) -> Result<Option<Vec<f64>>, ModelError> {
        self.get(key, "a list of numbers", |value| match value {
            Value::Array(array) => array.scalars()?.map(|value| value.number()).collect(),
            _ => None,
        })
    }

    /// All keys, in no order.
    pub(super) fn keys(&self) -> impl Iterator<Item = &str> {
        self.values.keys().map(String::as_str)
    }

    /// An error about a key.
    pub(super) fn error(&self, reason: String) -> ModelError {
        ModelError::Config { file: self.file.to_string(), reason }
    }

    /// How many elements the list under a key has; 0 if there is no such list.
    pub(super) fn list_len(&self, key: &str) -> usize {
        match self.values.get(key) {
            Some(Value::Array(array)) => array.len(),
            _ => 0,
        }
    }

    fn get<T>(
        &self,
        key: &str,
        expected: &str,
        read: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<Option<T>, ModelError> {
        let Some(value) = self.values.get(key) else { return Ok(None) };
        let read = read(value).map(Some);
        read.ok_or_else(|| self.error(format!("{key} is {value}, expected {expected}")))
    }
}

impl Value {
    fn integer(&self) -> Option<u64> {
        match *self {
            Self::Unsigned(value) => Some(value),
            Self::Signed(value) => u64::try_from(value).ok(),
            _ => None,
        }
    }

    fn number(&self) -> Option<f64> {
        match *self {
            Self::Unsigned(value) => Some(value as f64),
            Self::Signed(value) => Some(value as f64),
            Self::Float(value) => Some(value),
            _ => None,
        }
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unsigned(value) => value.fmt(f),
            Self::Signed(value) => value.fmt(f),
            Self::Float(value) => value.fmt(f),
            Self::Bool(value) => value.fmt(f),
            Self::String(bytes) => {
                let shown: String = String::from_utf8_lossy(bytes).chars().take(60).collect();
                write!(f, "{shown:?}")
            }
            Self::Array(array) => write!(f, "a list of {:?}", array.kind),
        }
    }
}

impl Array {
    /// The elements, if they are strings.
    fn strings(&self) -> Option<impl Iterator<Item = &[u8]>> {
        let mut rest = &self.bytes[..];
        let next = move || {
            let (len, after) = rest.split_first_chunk()?;
            let (string, after) = after.split_at_checked(u64::from_le_bytes(*len).try_into().ok()?)?;
            rest = after;
            Some(string)
        };
        (self.kind == Kind::String).then(|| std::iter::from_fn(next))
    }

    /// The elements, if they are scalars.
    fn scalars(&self) -> Option<impl Iterator<Item = Value>> {
        let size = self.kind.scalar_bytes()?;
        Some(self.bytes.chunks_exact(size).map(|bytes| scalar(self.kind, bytes)))
    }

    fn len(&self) -> usize {
        let scalars = self.scalars().map(|scalars| scalars.count());
        scalars.or_else(|| self.strings().map(Iterator::count)).unwrap_or(0)
    }
}

impl Kind {
    const ALL: [Self; 13] = [
        Self::U8,
        Self::I8,
        Self::U16,
        Self::I16,
        Self::U32,
        Self::I32,
        Self::F32,
        Self::Bool,
        Self::String,
        Self::Array,
        Self::U64,
        Self::I64,
        Self::F64,
    ];

    fn scalar_bytes(self) -> Option<usize> {
        match self {
            Self::U8 | Self::I8 | Self::Bool => Some(1),
            Self::U16 | Self::I16 => Some(2),
            Self::U32 | Self::I32 | Self::F32 => Some(4),
            Self::U64 | Self::I64 | Self::F64 => Some(8),
            Self::String | Self::Array => None,
        }
    }
}

/// Reads all keys and their values.
pub(super) fn read_metadata(reader: &mut Reader, num_keys: u64) -> Result<Metadata, ModelError> {
    let mut values = HashMap::new();
    for _ in 0..num_keys {
        let key = reader.name(MAX_KEY_BYTES, "a key")?;
        let what = format!("the value of {key}");
        let value = match read_kind(reader, &what)? {
            Kind::String => Value::String(reader.string(&what)?),
            Kind::Array => Value::Array(read_array(reader, MAX_NESTING, &what)?),
            kind => scalar(kind, &reader.take(kind.scalar_bytes().unwrap_or(0) as u64, &what)?),
        };
        if values.insert(key, value).is_some() {
            return Err(reader.error(format!("{what} is there twice")));
        }
    }
    Ok(Metadata { file: reader.file().clone(), values })
}

fn read_kind(reader: &mut Reader, what: &str) -> Result<Kind, ModelError> {
    let number = reader.u32(what)?;
    let kind = Kind::ALL.into_iter().find(|&kind| kind as u32 == number);
    kind.ok_or_else(|| reader.error(format!("{what} has type {number}, expected 0 to {}", Kind::F64 as u32)))
}

/// Finds an array's end. Every element that is walked one by one takes bytes of the file, so a false length ends at
/// the file's end.
fn read_array(reader: &mut Reader, nesting_left: usize, what: &str) -> Result<Array, ModelError> {
    let Some(nesting_left) = nesting_left.checked_sub(1) else {
        return Err(reader.error(format!("{what} has lists in lists deeper than {MAX_NESTING}")));
    };
    let kind = read_kind(reader, what)?;
    let len = reader.u64(what)?;
    let start = reader.offset();
    match kind {
        Kind::String => (0..len).try_for_each(|_| reader.string(what).map(drop))?,
        Kind::Array => (0..len).try_for_each(|_| read_array(reader, nesting_left, what).map(drop))?,
        kind => {
            let size = kind.scalar_bytes().unwrap_or(0) as u64;
            reader.take(len.saturating_mul(size), what)?;
        }
    }
    Ok(Array { kind, bytes: reader.bytes().slice(start..reader.offset()) })
}

/// Decodes a scalar; any bits are a value.
fn scalar(kind: Kind, bytes: &[u8]) -> Value {
    let mut word = [0; 8];
    word[..bytes.len()].copy_from_slice(bytes);
    let bits = u64::from_le_bytes(word);
    // Narrower types keep their low bits.
    match kind {
        Kind::U8 | Kind::U16 | Kind::U32 | Kind::U64 => Value::Unsigned(bits),
        Kind::I8 => Value::Signed((bits as i8).into()),
        Kind::I16 => Value::Signed((bits as i16).into()),
        Kind::I32 => Value::Signed((bits as i32).into()),
        Kind::I64 => Value::Signed(bits as i64),
        Kind::F32 => Value::Float(f32::from_bits(bits as u32).into()),
        Kind::F64 => Value::Float(f64::from_bits(bits)),
        Kind::Bool => Value::Bool(bits != 0),
        Kind::String | Kind::Array => unreachable!("not scalars"),
    }
}

fn text(bytes: impl AsRef<[u8]>) -> Option<String> {
    std::str::from_utf8(bytes.as_ref()).ok().map(str::to_owned)
}
