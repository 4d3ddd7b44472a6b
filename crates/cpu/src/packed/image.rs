//! Quantised matrices as bytes that outlive the process: written while a model loads, mapped at the next start.
//!
//! ```text
//! header   magic, version, formats, key of the source, number of matrices, place and checksum of the index
//! data     the blocks of matrix 0, of matrix 1, ...          each on a page of its own
//! index    per matrix: format, rows, cols, place, length, checksum
//! ```
//!
//! Matrices have no names: they come in the order in which a backend is asked for them, which a model's
//! configuration decides. The key stands for everything else that decides their contents. What is damaged or belongs
//! to other weights is refused whole. This file knows bytes, not paths; whoever calls it replaces files atomically.

use std::io::{self, Seek, SeekFrom, Write};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use thiserror::Error;

use crate::format::{WeightFormat, WeightFormats};
use crate::team::Team;

const MAGIC: [u8; 16] = *b"windrose packed\n";
/// To be raised with every change of the blocks, of quantisation or of this layout.
const VERSION: u64 = 4;
const HEADER_BYTES: usize = MAGIC.len() + 7 * 8;
const ENTRY_BYTES: usize = 6 * 8;
/// Matrices start on pages.
const ALIGNMENT: u64 = 4096;

/// Identifies the weights that were quantised.
pub type ImageKey = [u64; 2];

/// Where the matrices of an image are multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageUse {
    /// Where the image lies, which is usually a mapped file: nothing is copied, and the page cache is its only copy.
    InPlace,
    /// In memory of our own, which takes a while, but has large pages where files may have small ones.
    Copied,
}

/// Why an image cannot be used.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ImageError {
    /// It was made of other weights, in other formats, or by another version.
    #[error("it was made of other weights or by another version")]
    Stale,
    /// It is not what was written.
    #[error("it is damaged: {0}")]
    Damaged(&'static str),
}

/// A quantised matrix on its way into an image.
pub struct PackedMatrix {
    pub(crate) format: WeightFormat,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) blocks: Bytes,
}

/// The quantised matrices of an image, in order.
pub(crate) struct Image {
    bytes: Bytes,
    entries: std::vec::IntoIter<Entry>,
}

#[derive(Clone, Copy)]
struct Entry {
    format: u64,
    rows: u64,
    cols: u64,
    start: u64,
    len: u64,
    checksum: u64,
}

impl Image {
    /// Reads and verifies an image on all threads.
    ///
    /// # Errors
    /// [`ImageError`] if it is not a whole image of these formats and this key.
    pub(crate) fn open(
        bytes: Bytes,
        formats: WeightFormats,
        key: ImageKey,
        team: &mut Team,
    ) -> Result<Self, ImageError> {
        let index = read_header(&bytes, formats, key)?;
        let entries: Vec<Entry> = bytes[index].as_chunks::<ENTRY_BYTES>().0.iter().map(Entry::read).collect();
        let ranges: Option<Vec<Range<usize>>> =
            entries.iter().map(|entry| entry.range(bytes.len())).collect();
        let ranges = ranges.ok_or(ImageError::Damaged("a matrix lies outside of it"))?;
        let num_damaged = AtomicUsize::new(0);
        team.run(entries.len(), |index| {
            if checksum(&bytes[ranges[index].clone()]) != entries[index].checksum {
                num_damaged.fetch_add(1, Ordering::Relaxed);
            }
        });
        match num_damaged.into_inner() {
            0 => Ok(Self { bytes, entries: entries.into_iter() }),
            _ => Err(ImageError::Damaged("a matrix has another checksum")),
        }
    }

    /// Whether all matrices were taken.
    pub(crate) fn is_empty(&self) -> bool {
        self.entries.len() == 0
    }

    /// The next matrix, if it has the format and the shape wanted.
    pub(crate) fn next(&mut self, format: WeightFormat, rows: usize, cols: usize) -> Option<Bytes> {
        let entry = self.entries.next()?;
        let fits = (entry.format, entry.rows, entry.cols) == (format as u64, rows as u64, cols as u64);
        fits.then(|| self.bytes.slice(entry.range(self.bytes.len()).expect("`open` checked the range")))
    }
}

/// Writes the matrices of `matrices` until there are no more, as an image from the start of `out`.
///
/// The header comes last, so that an image whose writing was cut is not taken for a whole one.
///
/// # Errors
/// Of `out`.
pub(crate) fn write(
    out: &mut (impl Write + Seek),
    formats: WeightFormats,
    key: ImageKey,
    matrices: impl IntoIterator<Item = PackedMatrix>,
) -> io::Result<()> {
    let mut entries = Vec::new();
    let mut end = HEADER_BYTES as u64;
    for matrix in matrices {
        let start = end.next_multiple_of(ALIGNMENT);
        end = start + matrix.blocks.len() as u64;
        out.seek(SeekFrom::Start(start))?;
        out.write_all(&matrix.blocks)?;
        let (format, rows, cols) = (matrix.format as u64, matrix.rows as u64, matrix.cols as u64);
        entries.push(Entry {
            format,
            rows,
            cols,
            start,
            len: end - start,
            checksum: checksum(&matrix.blocks),
        });
    }
    let index: Vec<u8> = entries.iter().flat_map(|entry| entry.words()).flat_map(u64::to_le_bytes).collect();
    out.seek(SeekFrom::Start(end))?;
    out.write_all(&index)?;
    out.rewind()?;
    let header = [VERSION, formats.code(), key[0], key[1], entries.len() as u64, end, checksum(&index)];
    out.write_all(&MAGIC)?;
    header.iter().try_for_each(|word| out.write_all(&word.to_le_bytes()))?;
    out.flush()
}

/// Checks the header; the place of the index.
fn read_header(bytes: &[u8], formats: WeightFormats, key: ImageKey) -> Result<Range<usize>, ImageError> {
    let header = bytes.first_chunk::<HEADER_BYTES>().ok_or(ImageError::Damaged("it is too short"))?;
    let (magic, words) = header.split_at(MAGIC.len());
    if magic != MAGIC {
        return Err(ImageError::Damaged("it does not begin as one"));
    }
    let [version, stored_formats, key_0, key_1, num_matrices, start, stored_checksum] = words_of(words);
    if (version, stored_formats, [key_0, key_1]) != (VERSION, formats.code(), key) {
        return Err(ImageError::Stale);
    }
    let index_bytes = num_matrices.checked_mul(ENTRY_BYTES as u64);
    let index = index_bytes.and_then(|len| range(start, len, bytes.len()));
    let index = index.ok_or(ImageError::Damaged("its index lies outside of it"))?;
    match checksum(&bytes[index.clone()]) == stored_checksum {
        true => Ok(index),
        false => Err(ImageError::Damaged("its index has another checksum")),
    }
}

impl Entry {
    fn read(bytes: &[u8; ENTRY_BYTES]) -> Self {
        let [format, rows, cols, start, len, checksum] = words_of(bytes);
        Self { format, rows, cols, start, len, checksum }
    }

    fn words(&self) -> [u64; 6] {
        [self.format, self.rows, self.cols, self.start, self.len, self.checksum]
    }

    fn range(&self, image_bytes: usize) -> Option<Range<usize>> {
        range(self.start, self.len, image_bytes)
    }
}

/// `len` bytes from `start` on, if they lie within an image.
fn range(start: u64, len: u64, image_bytes: usize) -> Option<Range<usize>> {
    let end = start.checked_add(len).filter(|&end| end <= image_bytes as u64)?;
    Some(start as usize..end as usize)
}

fn words_of<const N: usize>(bytes: &[u8]) -> [u64; N] {
    let words = bytes.as_chunks().0;
    std::array::from_fn(|i| u64::from_le_bytes(words[i]))
}

/// CRC-32 of the bytes: against damage, not against an adversary.
fn checksum(bytes: &[u8]) -> u64 {
    crc32fast::hash(bytes).into()
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    const KEY: ImageKey = [7, 9];

    fn matrices() -> Vec<PackedMatrix> {
        let blocks = |len: usize| (0..len).map(|i| (i * 31) as u8).collect::<Vec<_>>().into();
        [(3, 40, 5000), (64, 32, 1), (5, 5, 4096)]
            .map(|(rows, cols, len)| PackedMatrix {
                format: WeightFormat::Q8,
                rows,
                cols,
                blocks: blocks(len),
            })
            .into()
    }

    fn image() -> Vec<u8> {
        let mut out = Cursor::new(Vec::new());
        write(&mut out, WeightFormat::Q8.into(), KEY, matrices()).unwrap();
        out.into_inner()
    }

    fn open(bytes: Vec<u8>, format: WeightFormat, key: ImageKey) -> Result<Image, ImageError> {
        Image::open(bytes.into(), format.into(), key, &mut Team::new(1))
    }

    #[test]
    fn matrices_come_back_in_order() {
        let mut image = open(image(), WeightFormat::Q8, KEY).unwrap();
        for matrix in matrices() {
            assert_eq!(image.next(matrix.format, matrix.rows, matrix.cols).unwrap(), matrix.blocks);
        }
        assert!(image.next(WeightFormat::Q8, 1, 1).is_none());
        let mut image = open(self::image(), WeightFormat::Q8, KEY).unwrap();
        assert!(image.next(WeightFormat::Q8, 3, 41).is_none(), "another shape");
        assert!(image.next(WeightFormat::Q4, 64, 32).is_none(), "another format");
    }

    #[test]
    fn images_of_something_else_are_stale() {
        for (format, key) in [(WeightFormat::Q4, KEY), (WeightFormat::Q8, [7, 8]), (WeightFormat::Q8, [6, 9])]
        {
            assert_eq!(open(image(), format, key).err(), Some(ImageError::Stale));
        }
        let mut newer = image();
        newer[MAGIC.len()] += 1;
        assert_eq!(open(newer, WeightFormat::Q8, KEY).err(), Some(ImageError::Stale));
    }

    #[test]
    fn no_damaged_byte_and_no_missing_one_is_overlooked() {
        let whole = image();
        // What lies between the parts is padding, and nobody reads it.
        let page = ALIGNMENT as usize;
        let parts = [0..HEADER_BYTES, page..page + 5000, 3 * page..3 * page + 1, 4 * page..whole.len()];
        for at in parts.into_iter().flatten() {
            let mut damaged = whole.clone();
            damaged[at] ^= 0x10;
            assert!(open(damaged, WeightFormat::Q8, KEY).is_err(), "byte {at}");
        }
        for len in 0..whole.len() {
            assert!(open(whole[..len].to_vec(), WeightFormat::Q8, KEY).is_err(), "{len} bytes");
        }
    }
}
