//! Activations `[max_rows, features]`, row-major without padding, and the mapped memory they lie in.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

use backend::{BackendError, DType};
use bytemuck::Pod;
use half::bf16;
use memmap2::MmapMut;

use crate::numbers::Element;

/// Elements in zeroed memory that starts on a page.
///
/// The memory is mapped, not allocated: an aligned allocation would be filled with zeros byte by byte, which for a
/// cache of many gigabytes takes seconds and makes resident what nobody has used yet.
pub(crate) struct Buffer<T> {
    map: MmapMut,
    len: usize,
    element: PhantomData<T>,
}

impl<T: Pod> Buffer<T> {
    /// Maps `len` zeros; they cost memory only where they are written.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`] for `what` if the system refuses.
    pub(crate) fn zeroed(what: &str, len: usize) -> Result<Self, BackendError> {
        let num_bytes = len.checked_mul(size_of::<T>());
        let out_of_memory = || BackendError::OutOfMemory {
            what: what.to_owned(),
            needed_bytes: num_bytes.unwrap_or(usize::MAX) as u64,
        };
        let map = num_bytes.and_then(|num_bytes| MmapMut::map_anon(num_bytes.max(1)).ok());
        Ok(Self { map: map.ok_or_else(out_of_memory)?, len, element: PhantomData })
    }

    /// Asks for large pages, which spare weights that are read from end to end most of the address translation. A
    /// system that has none to give gives small ones.
    pub(crate) fn prefer_huge_pages(&self) {
        #[cfg(target_os = "linux")]
        let _ = self.map.advise(memmap2::Advice::HugePage);
    }
}

/// The bytes, so that a buffer can be shared as `Bytes`.
impl<T> AsRef<[u8]> for Buffer<T> {
    fn as_ref(&self) -> &[u8] {
        &self.map[..self.len * size_of::<T>()]
    }
}

impl<T: Pod> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        bytemuck::cast_slice(&self.map[..self.len * size_of::<T>()])
    }
}

impl<T: Pod> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        bytemuck::cast_slice_mut(&mut self.map[..self.len * size_of::<T>()])
    }
}

/// Activations of one dtype.
pub struct Tensor {
    features: usize,
    pub(crate) values: Values,
}

pub(crate) enum Values {
    Bf16(Buffer<bf16>),
    F32(Buffer<f32>),
}

impl Tensor {
    pub(crate) fn new(max_rows: usize, features: usize, dtype: DType) -> Result<Self, BackendError> {
        let len = max_rows * features;
        let values = match dtype {
            DType::Bf16 => Values::Bf16(Buffer::zeroed("a tensor", len)?),
            DType::F32 => Values::F32(Buffer::zeroed("a tensor", len)?),
        };
        Ok(Self { features, values })
    }

    /// Elements of a row.
    pub(crate) fn features(&self) -> usize {
        self.features
    }

    /// The rows of a bf16 tensor.
    ///
    /// # Panics
    /// If it holds f32.
    pub(crate) fn bf16(&self) -> Rows<'_, bf16> {
        match &self.values {
            Values::Bf16(values) => Rows { values, features: self.features },
            Values::F32(_) => panic!("this operand is bf16, but the tensor holds f32"),
        }
    }

    /// The rows of an f32 tensor.
    ///
    /// # Panics
    /// If it holds bf16.
    pub(crate) fn f32(&self) -> Rows<'_, f32> {
        match &self.values {
            Values::F32(values) => Rows { values, features: self.features },
            Values::Bf16(_) => panic!("this operand is f32, but the tensor holds bf16"),
        }
    }

    /// The first `rows` rows of a bf16 tensor, to be written.
    pub(crate) fn bf16_mut(&mut self, rows: usize) -> &mut [bf16] {
        match &mut self.values {
            Values::Bf16(values) => &mut values[..rows * self.features],
            Values::F32(_) => panic!("this result is bf16, but the tensor holds f32"),
        }
    }

    /// The first `rows` rows of an f32 tensor, to be written.
    pub(crate) fn f32_mut(&mut self, rows: usize) -> &mut [f32] {
        match &mut self.values {
            Values::F32(values) => &mut values[..rows * self.features],
            Values::Bf16(_) => panic!("this result is f32, but the tensor holds bf16"),
        }
    }

    /// Rounds `values` into the leading rows.
    pub(crate) fn upload(&mut self, values: &[f32]) {
        assert!(values.len().is_multiple_of(self.features));
        match &mut self.values {
            Values::Bf16(own) => convert(values, &mut own[..values.len()]),
            Values::F32(own) => own[..values.len()].copy_from_slice(values),
        }
    }

    /// Widens the first `rows` rows.
    pub(crate) fn download(&self, rows: usize) -> Vec<f32> {
        let len = rows * self.features;
        match &self.values {
            Values::Bf16(values) => values[..len].iter().map(|x| Element::to_f32(*x)).collect(),
            Values::F32(values) => values[..len].to_vec(),
        }
    }
}

fn convert<E: Element>(values: &[f32], out: &mut [E]) {
    out.iter_mut().zip(values).for_each(|(out, &x)| *out = E::from_f32(x));
}

/// The rows of a matrix of activations.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a, T> {
    values: &'a [T],
    features: usize,
}

impl<'a, T> Rows<'a, T> {
    /// Wraps rows of so many elements.
    pub(crate) fn new(values: &'a [T], features: usize) -> Self {
        Self { values, features }
    }

    /// Elements of a row.
    pub(crate) fn features(&self) -> usize {
        self.features
    }

    /// One row.
    #[inline(always)]
    pub(crate) fn row(&self, row: usize) -> &'a [T] {
        &self.values[row * self.features..][..self.features]
    }
}
