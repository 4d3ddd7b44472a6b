//! AMX: eight tiles of 1 KiB per thread, `tdpbf16ps` for bf16 and `tdpbssd` for bytes.
//!
//! Compilers know neither the tiles nor, on stable Rust, the instructions, so both are named in assembly. Nothing else
//! touches the tiles of a thread between [`Amx::new`] and its drop. Linux lends them to processes that ask.

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::sync::LazyLock;

use super::tiles::{HalfPairs, PanelInts, PanelPairs, PanelQuads, TILE_TOKENS, TileUse, Tiles};
use super::{LANE_ROWS, QuadBytes};

/// Bytes of a row of weights or sums.
const ROW_BYTES: usize = 64;
/// Bytes of a token's sums with both halves of a panel.
const SUMS_BYTES: usize = 2 * ROW_BYTES;
/// Bytes of a token's 32 columns: of bf16, and quantised.
const PAIRS_BYTES: usize = 64;
const QUADS_BYTES: usize = 32;

/// The tiles of this thread: numbers 0 to 3 are sums, 4 (and 5 for pairs) tokens, the others weights.
pub(crate) struct Amx {
    num_tokens: usize,
    purpose: TileUse,
    /// Tiles belong to a thread.
    not_send: PhantomData<*const ()>,
}

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Whether the machine has AMX for bf16 and bytes, and the system lends it to this process, which asks here.
pub(crate) fn is_available() -> bool {
    static AVAILABLE: LazyLock<bool> = LazyLock::new(|| has_instructions() && request_tiles());
    *AVAILABLE
}

fn has_instructions() -> bool {
    const EXTENDED_FEATURES: u32 = 7;
    const BF16_TILE_INT8: u32 = 1 << 22 | 1 << 24 | 1 << 25;
    __cpuid(0).eax >= EXTENDED_FEATURES
        && __cpuid_count(EXTENDED_FEATURES, 0).edx & BF16_TILE_INT8 == BF16_TILE_INT8
}

/// Asks for the tiles' state to be kept for this process's threads.
fn request_tiles() -> bool {
    #[cfg(target_os = "linux")]
    {
        // Of `asm/prctl.h`, and the number of the state component that holds tiles.
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        const XFEATURE_XTILE_DATA: libc::c_long = 18;
        // SAFETY: the call reads and writes no memory of ours.
        unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA) == 0 }
    }
    #[cfg(not(target_os = "linux"))]
    false
}

impl Amx {
    /// Shapes the tiles for some tokens, up to [`TILE_TOKENS`].
    ///
    /// # Safety
    /// [`is_available`], and there is no other value on this thread.
    ///
    /// # Panics
    /// If there are no tokens, or too many.
    #[inline(always)]
    pub(super) unsafe fn new(purpose: TileUse, num_tokens: usize) -> Self {
        assert!((1..=TILE_TOKENS).contains(&num_tokens));
        let (token_tiles, token_bytes, weight_rows) = match purpose {
            TileUse::Pairs => (4..6, PAIRS_BYTES, size_of::<PanelPairs>() / (2 * ROW_BYTES)),
            TileUse::Quads => (4..5, QUADS_BYTES, size_of::<PanelQuads>() / (2 * ROW_BYTES)),
        };
        let mut config =
            Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        for tile in 0..8 {
            (config.rows[tile], config.row_bytes[tile]) = match tile {
                0..4 => (num_tokens as u8, ROW_BYTES as u16),
                _ if token_tiles.contains(&tile) => (num_tokens as u8, token_bytes as u16),
                _ => (weight_rows as u8, ROW_BYTES as u16),
            };
        }
        // SAFETY: the machine has the instruction, and the configuration is one that it accepts: tiles of 1 to 16 rows
        // of up to 64 bytes.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly)) };
        Self { num_tokens, purpose, not_send: PhantomData }
    }

    /// Loads a tile from rows `stride` bytes apart.
    ///
    /// # Safety
    /// The tile's rows, as [`Amx::new`] shaped them, can be read.
    #[inline(always)]
    unsafe fn load<const TILE: usize>(&self, rows: *const u8, stride: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            asm!("tileloadd tmm{tile}, [{rows} + {stride}]", tile = const TILE, rows = in(reg) rows,
                stride = in(reg) stride, options(nostack, readonly, preserves_flags));
        }
    }

    /// Stores a tile to rows `stride` bytes apart.
    ///
    /// # Safety
    /// The tile's rows, as [`Amx::new`] shaped them, can be written.
    #[inline(always)]
    unsafe fn store<const TILE: usize>(&self, rows: *mut u8, stride: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            asm!("tilestored [{rows} + {stride}], tmm{tile}", tile = const TILE, rows = in(reg) rows,
                stride = in(reg) stride, options(nostack, preserves_flags));
        }
    }

    /// Loads a set of sums, the tiles of both halves of a panel, from rows `stride` bytes apart.
    ///
    /// # Safety
    /// As for [`Amx::load`], with rows of both halves.
    #[inline(always)]
    unsafe fn load_sums<const SET: usize>(&self, rows: *const u8, stride: usize) {
        const { assert!(SET < 2) };
        // SAFETY: the caller's promise.
        unsafe {
            if SET == 0 {
                self.load::<0>(rows, stride);
                self.load::<1>(rows.add(ROW_BYTES), stride);
            } else {
                self.load::<2>(rows, stride);
                self.load::<3>(rows.add(ROW_BYTES), stride);
            }
        }
    }

    /// Stores a set of sums to rows `stride` bytes apart.
    ///
    /// # Safety
    /// As for [`Amx::store`], with rows of both halves.
    #[inline(always)]
    unsafe fn store_sums<const SET: usize>(&self, rows: *mut u8, stride: usize) {
        const { assert!(SET < 2) };
        // SAFETY: the caller's promise.
        unsafe {
            if SET == 0 {
                self.store::<0>(rows, stride);
                self.store::<1>(rows.add(ROW_BYTES), stride);
            } else {
                self.store::<2>(rows, stride);
                self.store::<3>(rows.add(ROW_BYTES), stride);
            }
        }
    }

    /// Makes a set of sums zero.
    #[inline(always)]
    fn zero_sums<const SET: usize>(&self) {
        const { assert!(SET < 2) };
        // SAFETY: the tiles belong to `self`.
        unsafe {
            asm!("tilezero tmm{lower}", "tilezero tmm{upper}", lower = const 2 * SET, upper = const 2 * SET + 1,
                options(nomem, nostack, preserves_flags));
        }
    }

    /// Loads the tile of some tokens' 32 columns.
    #[inline(always)]
    fn load_tokens<const TILE: usize, X>(&self, x: &[X], offset: usize, num_bytes: usize) {
        assert!(x.len() >= self.num_tokens && offset + num_bytes <= size_of::<X>());
        // SAFETY: as many tokens as the tile has rows, each with the bytes that are read.
        unsafe { self.load::<TILE>(x.as_ptr().cast::<u8>().add(offset), size_of::<X>()) };
    }

    /// Loads the tile of the pairs of half a panel.
    #[inline(always)]
    fn load_pairs<const TILE: usize>(&self, weights: &HalfPairs) {
        // SAFETY: half a panel has the tile's rows, see `new`, one after another.
        unsafe { self.load::<TILE>(weights.as_ptr().cast(), ROW_BYTES) };
    }

    /// Loads the tile of the quads of half a panel, which are interleaved with the other half's.
    #[inline(always)]
    fn load_quads<const TILE: usize>(&self, weights: &PanelQuads, half: usize) {
        const { assert!(size_of::<QuadBytes>() == ROW_BYTES) };
        // SAFETY: half a panel has the tile's rows, see `new`, each as long as `QuadBytes`.
        unsafe { self.load::<TILE>(weights.as_ptr().cast::<QuadBytes>().add(half).cast(), 2 * ROW_BYTES) };
    }
}

impl Drop for Amx {
    #[inline(always)]
    fn drop(&mut self) {
        // SAFETY: `new` was promised that the machine has the instruction.
        unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) };
    }
}

/// One instruction on three tiles.
macro_rules! multiply {
    ($instruction:literal, $sums:expr, $x:expr, $weights:expr) => {
        // SAFETY: the tiles belong to `self`, and `new` shaped them so that they fit.
        unsafe {
            asm!(concat!($instruction, " tmm{sums}, tmm{x}, tmm{weights}"), sums = const $sums, x = const $x,
                weights = const $weights, options(nomem, nostack, preserves_flags))
        }
    };
}

impl Tiles for Amx {
    #[inline(always)]
    fn take_sums<const TILES: usize>(&self, sums: &[[f32; 2 * LANE_ROWS]], firsts: [usize; TILES]) {
        const { assert!(TILES == 1 || TILES == 2) };
        let rows = |first: usize| sums[first..][..self.num_tokens].as_ptr().cast();
        // SAFETY: rows of two halves, as many as the tile has.
        unsafe {
            self.load_sums::<0>(rows(firsts[0]), SUMS_BYTES);
            if TILES == 2 {
                self.load_sums::<1>(rows(firsts[TILES - 1]), SUMS_BYTES);
            }
        }
    }

    #[inline(always)]
    fn add_pairs<'a, X, const TILES: usize>(
        &self,
        weights: impl Iterator<Item = &'a PanelPairs>,
        x: &[X],
        firsts: [usize; TILES],
        mut meanwhile: impl FnMut(),
    ) {
        const { assert!(TILES == 1 || TILES == 2) };
        assert!(self.purpose == TileUse::Pairs);
        for (group, weights) in weights.enumerate() {
            meanwhile();
            self.load_tokens::<4, X>(&x[firsts[0]..], group * PAIRS_BYTES, PAIRS_BYTES);
            self.load_pairs::<6>(&weights[0]);
            multiply!("tdpbf16ps", 0, 4, 6);
            self.load_pairs::<7>(&weights[1]);
            multiply!("tdpbf16ps", 1, 4, 7);
            if TILES == 2 {
                self.load_tokens::<5, X>(&x[firsts[TILES - 1]..], group * PAIRS_BYTES, PAIRS_BYTES);
                multiply!("tdpbf16ps", 2, 5, 6);
                multiply!("tdpbf16ps", 3, 5, 7);
            }
        }
    }

    #[inline(always)]
    fn put_sums<const TILES: usize>(&self, sums: &mut [[f32; 2 * LANE_ROWS]], firsts: [usize; TILES]) {
        const { assert!(TILES == 1 || TILES == 2) };
        let mut rows = |first: usize| sums[first..][..self.num_tokens].as_mut_ptr().cast();
        // SAFETY: rows of two halves, as many as the tile has.
        unsafe {
            self.store_sums::<0>(rows(firsts[0]), SUMS_BYTES);
            if TILES == 2 {
                self.store_sums::<1>(rows(firsts[TILES - 1]), SUMS_BYTES);
            }
        }
    }

    #[inline(always)]
    fn dot_pairs<'a, X, const PARTS: usize>(
        &self,
        weights: impl Iterator<Item = [&'a HalfPairs; 2]>,
        x: &[X],
        mut meanwhile: impl FnMut(),
        out: &mut [[f32; 2 * LANE_ROWS]],
    ) {
        assert!(self.purpose == TileUse::Pairs && out.len() >= self.num_tokens);
        self.zero_sums::<0>();
        for (group, [lower, upper]) in weights.enumerate() {
            meanwhile();
            self.load_pairs::<6>(lower);
            self.load_pairs::<7>(upper);
            for part in group * PARTS..(group + 1) * PARTS {
                self.load_tokens::<4, X>(x, part * PAIRS_BYTES, PAIRS_BYTES);
                multiply!("tdpbf16ps", 0, 4, 6);
                multiply!("tdpbf16ps", 1, 4, 7);
            }
        }
        // SAFETY: rows of two halves, as many as the tile has.
        unsafe { self.store_sums::<0>(out.as_mut_ptr().cast(), SUMS_BYTES) };
    }

    #[inline(always)]
    fn dot_quads<X, const SET: usize>(&self, weights: &PanelQuads, x: &[X], group: usize) {
        const { assert!(SET < 2) };
        assert!(self.purpose != TileUse::Pairs);
        self.load_tokens::<4, X>(x, group * QUADS_BYTES, QUADS_BYTES);
        self.zero_sums::<SET>();
        self.load_quads::<5>(weights, 0);
        multiply!("tdpbssd", 2 * SET, 4, 5);
        self.load_quads::<6>(weights, 1);
        multiply!("tdpbssd", 2 * SET + 1, 4, 6);
    }

    #[inline(always)]
    fn store_ints<const SET: usize>(&self, out: &mut [MaybeUninit<PanelInts>]) {
        assert!(out.len() >= self.num_tokens);
        // SAFETY: rows of two halves, as many as the tile has.
        unsafe { self.store_sums::<SET>(out.as_mut_ptr().cast(), size_of::<PanelInts>()) };
    }

    #[inline(always)]
    fn multiply(&self) -> usize {
        match self.purpose {
            TileUse::Pairs => {
                multiply!("tdpbf16ps", 0, 4, 6);
                multiply!("tdpbf16ps", 1, 4, 7);
                multiply!("tdpbf16ps", 2, 5, 6);
                multiply!("tdpbf16ps", 3, 5, 7);
            }
            TileUse::Quads => {
                multiply!("tdpbssd", 0, 4, 5);
                multiply!("tdpbssd", 1, 4, 6);
                multiply!("tdpbssd", 2, 4, 5);
                multiply!("tdpbssd", 3, 4, 6);
            }
        }
        const COLUMNS: usize = 32;
        4 * 2 * self.num_tokens * LANE_ROWS * COLUMNS
    }

    #[inline(always)]
    fn num_tokens(&self) -> usize {
        self.num_tokens
    }
}
