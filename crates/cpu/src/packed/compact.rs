//! bf16 weights in 12 bits, exactly.
//!
//! The exponents of a panel's weights are few: sixteen neighbours, a *window*, cover weights of any size between the
//! largest and its 32768th. So a weight is kept as its sign, the place of its exponent in its panel's window, and its
//! mantissa. The few that lie outside of the window, *strays*, are kept in the *margin* of their span, the line before
//! its blocks, and put where they belong whenever their block is expanded to bf16. Nothing is rounded. That a product
//! reads three quarters of the bytes pays wherever memory is what it waits for, and a model takes three quarters of the
//! room.
//!
//! ```text
//! bf16          s eeeeeeee mmmmmmm
//! code          s     wwww mmmmmmm                  w = e - the first exponent of the window
//!
//! four lines    s dddd wwww mmmmmmm                 line 0, and of line 3   wwww
//! of a block    s dddd wwww mmmmmmm                 line 1, and of line 3        mmmm
//! in three      s dddd wwww mmmmmmm                 line 2, and of line 3   s        mmm
//!
//! a panel       margin │ 8 blocks │ margin │ 8 blocks │ ...       in the order in which memory is read
//! ```
//!
//! All four codes of a place come from the same place of three lines, so this is one loop for all instruction sets. The
//! bits of a code are where bf16 has them, so that three weights of four are made with a mask and a sum.
//!
//! A matrix with many strays stays as it is. Codes of a length of their own, which would take 11 bits, are not here:
//! they must be decoded one after the other.

use std::iter::zip;
use std::ops::Range;

use backend::{BackendError, WeightView};
use bytemuck::{Pod, Zeroable};

use super::block::Bf16Block;
use super::dot::Blocks;
use super::{GROUP, PANEL_ROWS, pack_panel};
use crate::grid::{Grid, Tile};
use crate::isa::{Isa, Kernel};
use crate::operand::BF16_SPAN_BLOCKS;
use crate::simd::{CACHE_LINE, LANE_ROWS, PAIR, Simd};
use crate::team::Team;
use crate::tensor::Buffer;

/// Blocks of a span.
const SPAN: usize = BF16_SPAN_BLOCKS;
/// Weights of a line, 64 bytes in bf16.
const LINE: usize = LANE_ROWS * PAIR;
/// Groups of four lines of a block.
const QUARTETS: usize = PANEL_ROWS * GROUP / (4 * LINE);
/// Strays that fit into a margin.
const MARGIN_STRAYS: usize = 11;
/// Exponents of a window.
const WINDOW: u16 = 16;
/// Bits of a mantissa, below the exponent.
const MANTISSA: u32 = 7;
/// Bits of an exponent.
const EXPONENT: u16 = 0xff;
/// The sign of bf16, and of a code.
const SIGN: u16 = 0x8000;
/// A code's exponent in its window, and its mantissa.
const MAGNITUDE: u16 = 0x07ff;
/// The parts of a fourth line's code that the others carry, each in the four bits that are free.
const CARRIED: [u16; 3] = [0x0780, 0x0078, SIGN | 0x0007];
/// A matrix is not compact if more than one weight of so many is in a crowd: crowds would take a bit of each weight.
const WEIGHTS_PER_STRAY: usize = 32;

/// The bits of weights.
type Line = [u16; LINE];
/// A block of bf16.
type Lines = [[Line; 4]; QUARTETS];

/// 32 rows × 32 columns of codes, in the order of [`Bf16Block`].
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct CompactBlock([[Line; 3]; QUARTETS]);

const _: () = assert!(size_of::<CompactBlock>() * 8 == GROUP * PANEL_ROWS * 12);

// SAFETY: arrays of numbers, for which all zeros is a value.
unsafe impl Zeroable for CompactBlock {}
// SAFETY: `repr(C)` arrays of numbers for which any bits are a value; the size above leaves no room for padding.
unsafe impl Pod for CompactBlock {}

/// What the blocks of a span need to become weights.
#[derive(Clone, Copy, Default, Zeroable, Pod)]
#[repr(C, align(64))]
struct Margin {
    /// The first exponent of the window, where bf16 has its exponent.
    window: u16,
    /// The end of each block's strays.
    ends: [u16; SPAN],
    /// Which crowd of the panel has the span's strays, if they are too many for a margin.
    crowd: u16,
    /// By block, and in a block by place.
    strays: [Stray; MARGIN_STRAYS],
}

/// A weight whose exponent the window does not have.
#[derive(Clone, Copy, Default, Zeroable, Pod)]
#[repr(C)]
struct Stray {
    /// Its place in the block.
    place: u16,
    bits: u16,
}

/// A bf16 matrix in compact blocks.
pub(crate) struct CompactPanels {
    num_groups: usize,
    /// Of each panel its spans: a [`Margin`], and blocks.
    lines: Buffer<CacheLine>,
    /// Of each panel its crowds.
    crowds: Vec<Crowds>,
}

/// The strays of spans that have too many of them for a margin.
type Crowds = Vec<Vec<Stray>>;

/// A part of a [`Margin`] or of a block.
#[derive(Clone, Copy, Zeroable, Pod)]
#[repr(C, align(64))]
struct CacheLine([u8; CACHE_LINE]);

/// The line of a panel with which the blocks from a group on begin, or their margin if these are the first of a span.
#[inline(always)]
fn line_of(group: usize) -> usize {
    group * (size_of::<CompactBlock>() / CACHE_LINE) + group.div_ceil(SPAN)
}

impl CompactPanels {
    /// Packs stacked views on all threads; `None` if they have too many strays.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`] if there is no room.
    pub(super) fn pack(
        views: &[WeightView],
        isa: Isa,
        team: &mut Team,
    ) -> Result<Option<Self>, BackendError> {
        let num_rows: usize = views.iter().map(|view| view.rows).sum();
        let (cols, num_panels) = (views[0].cols, num_rows.div_ceil(PANEL_ROWS));
        let num_groups = cols.div_ceil(GROUP);
        let num_lines = line_of(num_groups);
        let mut lines = Buffer::<CacheLine>::zeroed("a weight matrix", num_panels * num_lines)?;
        lines.prefer_huge_pages();
        let mut crowds = vec![Crowds::new(); num_panels];
        let tiles = (Grid::row_bands(&mut lines, num_lines, 1), Grid::row_bands(&mut crowds, 1, 1));
        team.for_each(tiles, |(lines, crowds)| isa.run(Compress { views, num_rows, lines, crowds }));
        let num_crowded: usize = crowds.iter().flatten().map(Vec::len).sum();
        let is_worth_it = num_crowded * WEIGHTS_PER_STRAY <= num_rows * cols;
        Ok(is_worth_it.then_some(Self { num_groups, lines, crowds }))
    }

    /// Bytes that it takes.
    pub(super) fn num_bytes(&self) -> usize {
        let crowds = self.crowds.iter().flatten().map(|crowd| size_of_val(&crowd[..]));
        size_of_val(&self.lines[..]) + crowds.sum::<usize>()
    }

    /// The lines of a panel.
    #[inline(always)]
    fn panel(&self, panel: usize) -> &[CacheLine] {
        let num_lines = line_of(self.num_groups);
        &self.lines[panel * num_lines..][..num_lines]
    }
}

impl Blocks for CompactPanels {
    type Block = Bf16Block;
    type Room = [Bf16Block; BF16_SPAN_BLOCKS];
    const ARE_MADE: bool = true;

    #[inline(always)]
    fn num_panels(&self) -> usize {
        self.crowds.len()
    }

    #[inline(always)]
    fn num_groups(&self) -> usize {
        self.num_groups
    }

    #[inline(always)]
    fn stored(&self, panel: usize, groups: Range<usize>) -> &[u8] {
        bytemuck::cast_slice(&self.panel(panel)[line_of(groups.start)..line_of(groups.end)])
    }

    #[inline(always)]
    fn blocks<'a>(
        &'a self,
        panel: usize,
        groups: Range<usize>,
        room: &'a mut Self::Room,
        mut meanwhile: impl FnMut(),
    ) -> &'a [Bf16Block] {
        let room = &mut room[..groups.len()];
        let first = groups.start % SPAN;
        let (margin, blocks) = split_span(self.stored(panel, groups.start - first..groups.end));
        let strays = match usize::from(margin.ends[SPAN - 1]) {
            ..=MARGIN_STRAYS => &margin.strays[..],
            _ => &self.crowds[panel][usize::from(margin.crowd)],
        };
        for (index, room) in (first..).zip(&mut *room) {
            meanwhile();
            blocks[index].expand(margin.window, room);
            put_back(&strays[margin.strays_of(index)], room);
        }
        room
    }
}

/// The parts of a span.
#[inline(always)]
fn split_span(span: &[u8]) -> (&Margin, &[CompactBlock]) {
    let (margin, blocks) = span.split_at(size_of::<Margin>());
    (bytemuck::from_bytes(margin), bytemuck::cast_slice(blocks))
}

impl CompactBlock {
    /// Makes weights of the codes. Where strays belong they are any.
    #[inline(always)]
    fn expand(&self, window: u16, out: &mut Bf16Block) {
        let weight = |code: u16| (code & (SIGN | MAGNITUDE)).wrapping_add(window);
        for (lines, [a, b, c]) in zip(bytemuck::cast_mut::<_, Lines>(out), &self.0) {
            for i in 0..LINE {
                lines[0][i] = weight(a[i]);
                lines[1][i] = weight(b[i]);
                lines[2][i] = weight(c[i]);
                // The carried sign goes to the top, and between it and the mantissa's end into bits that are masked.
                let ends = ((c[i] << 1).cast_signed() >> 12).cast_unsigned();
                let carried = a[i] >> 4 & CARRIED[0] | b[i] >> 8 & CARRIED[1] | ends & CARRIED[2];
                lines[3][i] = carried.wrapping_add(window);
            }
        }
    }

    /// Makes codes of weights, those of strays too, whose exponents are then cut short.
    #[inline(always)]
    fn compress(&mut self, window: u16, block: &Bf16Block) {
        let code = |bits: u16| bits & SIGN | bits.wrapping_sub(window) & MAGNITUDE;
        for (lines, [a, b, c]) in zip(bytemuck::cast_ref::<_, Lines>(block), &mut self.0) {
            for i in 0..LINE {
                let last = code(lines[3][i]);
                a[i] = code(lines[0][i]) | (last & CARRIED[0]) << 4;
                b[i] = code(lines[1][i]) | (last & CARRIED[1]) << 8;
                // Of the third part the first shift drops the sign, which the second takes beside the mantissa's end.
                c[i] = code(lines[2][i]) | (last & CARRIED[2]) << 11 | (last & SIGN) >> 1;
            }
        }
    }
}

/// Overwrites what was expanded where strays belong.
#[inline(always)]
fn put_back(strays: &[Stray], block: &mut Bf16Block) {
    let weights: &mut [u16; PANEL_ROWS * GROUP] = bytemuck::cast_mut(block);
    for stray in strays {
        weights[usize::from(stray.place)] = stray.bits;
    }
}

impl Margin {
    /// Where the strays of a block are among those of the span.
    #[inline(always)]
    fn strays_of(&self, block: usize) -> Range<usize> {
        let start = if block == 0 { 0 } else { self.ends[block - 1] };
        start.into()..self.ends[block].into()
    }
}

/// Makes a span of blocks, whose rows and columns beyond `shape` are no weights.
#[inline(always)]
fn compress(
    window: u16,
    plain: &[Bf16Block],
    [rows, cols]: [usize; 2],
    lines: &mut [CacheLine],
    crowds: &mut Crowds,
) {
    let mut margin = Margin { window, ..Margin::default() };
    let mut strays = Vec::new();
    let (first, lines) = lines.split_first_mut().expect("a margin");
    let blocks: &mut [CompactBlock] = bytemuck::cast_slice_mut(lines);
    for (index, (plain, block)) in zip(plain, blocks).enumerate() {
        block.compress(window, plain);
        find_strays(window, plain, [rows, cols - index * GROUP], &mut strays);
        margin.ends[index..].fill(strays.len() as u16);
    }
    if strays.len() <= MARGIN_STRAYS {
        margin.strays[..strays.len()].copy_from_slice(&strays);
    } else {
        margin.crowd = crowds.len() as u16;
        crowds.push(strays);
    }
    *first = bytemuck::cast(margin);
}

/// Notes the strays of a block of which so many rows and columns are weights.
#[inline(always)]
fn find_strays(window: u16, block: &Bf16Block, [rows, cols]: [usize; 2], strays: &mut Vec<Stray>) {
    let lines: &[Line; 4 * QUARTETS] = bytemuck::cast_ref(block);
    let is_stray = |bits: u16| (bits.wrapping_sub(window) >> MANTISSA) & EXPONENT >= WINDOW;
    for (index, line) in lines.iter().enumerate() {
        // Most lines have none, which vectors tell without a look at each weight.
        if !line.iter().fold(false, |any, &bits| any | is_stray(bits)) {
            continue;
        }
        for (lane, &bits) in line.iter().enumerate() {
            let place = index * LINE + lane;
            let row = index / (GROUP / PAIR) * LANE_ROWS + lane / PAIR;
            let col = index % (GROUP / PAIR) * PAIR + lane % PAIR;
            if is_stray(bits) && row < rows && col < cols {
                strays.push(Stray { place: place as u16, bits });
            }
        }
    }
}

/// The first exponent of the window that has most of the weights, of which every eighth block is looked at.
fn best_window(blocks: &[Bf16Block]) -> u16 {
    let mut counts = [0u32; EXPONENT as usize + 1];
    for bits in blocks.iter().step_by(8).flat_map(bytemuck::cast_ref::<_, [u16; PANEL_ROWS * GROUP]>) {
        counts[usize::from(bits >> MANTISSA & EXPONENT)] += 1;
    }
    // Of zeros there may be many that are no weights.
    counts[0] = 0;
    let windows = counts.windows(WINDOW.into()).map(|counts| counts.iter().sum::<u32>());
    let best = windows.enumerate().max_by_key(|&(_, count)| count);
    best.map_or(0, |(first, _)| first as u16)
}

/// Packs the panel that the tiles cover.
struct Compress<'a> {
    views: &'a [WeightView],
    num_rows: usize,
    lines: Tile<'a, CacheLine>,
    crowds: Tile<'a, Crowds>,
}

impl Kernel for Compress<'_> {
    #[inline(always)]
    fn run<S: Simd>(mut self, _: S) {
        let cols = self.views[0].cols;
        let mut plain = vec![Bf16Block::zeroed(); cols.div_ceil(GROUP)];
        for panel in self.lines.rows() {
            plain.fill(Bf16Block::zeroed());
            pack_panel(self.views, panel, &mut plain);
            let window = best_window(&plain) << MANTISSA;
            let rows = self.num_rows - panel * PANEL_ROWS;
            let spans = zip(plain.chunks(SPAN), self.lines.row(panel).chunks_mut(line_of(SPAN)));
            for (span, (plain, lines)) in spans.enumerate() {
                let shape = [rows, cols - span * SPAN * GROUP];
                compress(window, plain, shape, lines, &mut self.crowds.row(panel)[0]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use backend::{WeightData, WeightType};
    use half::bf16;

    use super::*;

    /// The weights of a packed matrix, by rows; `None` if it is not compact.
    fn packed(weights: &[u16], cols: usize) -> Option<Vec<u16>> {
        let rows = weights.len() / cols;
        let bytes: Vec<u8> = weights.iter().flat_map(|bits| bits.to_le_bytes()).collect();
        let view = WeightView { rows, cols, dtype: WeightType::Bf16, data: WeightData::Stored(bytes.into()) };
        let panels = CompactPanels::pack(&[view], Isa::detect(), &mut Team::new(2)).unwrap()?;
        let mut room = [Bf16Block::zeroed(); BF16_SPAN_BLOCKS];
        let mut weight = |row: usize, col: usize| {
            let group = col / GROUP;
            let blocks = panels.blocks(row / PANEL_ROWS, group..group + 1, &mut room, || ());
            let (row, col) = (row % PANEL_ROWS, col % GROUP);
            blocks[0].halves[row / LANE_ROWS][col / PAIR][row % LANE_ROWS][col % PAIR].to_bits()
        };
        Some((0..rows * cols).map(|i| weight(i / cols, i % cols)).collect())
    }

    /// Numbers as a layer has them.
    fn normal(len: usize) -> Vec<u16> {
        (0..len).map(|i| backend::dummy_value(7, i as u64, 0.0, 0.02).to_bits()).collect()
    }

    #[test]
    fn weights_come_back_to_the_bit() {
        for (rows, cols) in [(1, 1), (8, 64), (32, 32), (37, 45), (70, 1000)] {
            let weights = normal(rows * cols);
            assert_eq!(packed(&weights, cols).as_ref(), Some(&weights), "{rows} × {cols}");
        }
    }

    #[test]
    fn strays_of_any_kind_come_back_to_the_bit() {
        let strange = [0.0, -0.0, 1e-40, f32::MIN_POSITIVE, 1e30, f32::INFINITY, f32::NEG_INFINITY, f32::NAN];
        let mut weights = normal(64 * 320);
        for (index, place) in (0..weights.len()).step_by(97).enumerate() {
            weights[place] = bf16::from_f32(strange[index % strange.len()]).to_bits();
        }
        assert_eq!(packed(&weights, 320).as_ref(), Some(&weights));
    }

    #[test]
    fn a_margin_has_room_up_to_its_last_stray_and_a_crowd_for_more() {
        for num_strays in MARGIN_STRAYS - 1..=MARGIN_STRAYS + 2 {
            let mut weights: Vec<u16> = (0..32 * 512).map(|i| 0x3c00 | (i % 0x80)).collect();
            // All in the first of two spans, the last at its end.
            for index in 0..num_strays {
                weights[index * 512 + 255 - (num_strays - 1 - index) * 7] = index as u16;
            }
            assert_eq!(packed(&weights, 512).as_ref(), Some(&weights), "{num_strays} strays");
        }
    }

    #[test]
    fn every_bf16_comes_back_from_a_window_that_has_it() {
        for window in 0..=EXPONENT + 1 - WINDOW {
            let first = window << MANTISSA;
            let magnitudes: Vec<u16> = (first..first + (WINDOW << MANTISSA)).collect();
            let weights: Vec<u16> = magnitudes.iter().flat_map(|bits| [*bits, bits | 0x8000]).collect();
            for weights in weights.chunks_exact(PANEL_ROWS * GROUP) {
                let plain: Bf16Block = bytemuck::pod_read_unaligned(bytemuck::cast_slice(weights));
                let (mut compact, mut expanded) = (CompactBlock::zeroed(), Bf16Block::zeroed());
                compact.compress(first, &plain);
                compact.expand(first, &mut expanded);
                assert_eq!(bytemuck::bytes_of(&expanded), bytemuck::bytes_of(&plain), "window {window}");
            }
        }
    }

    #[test]
    fn what_would_not_become_smaller_stays_as_it_is() {
        let mut weights = normal(64 * 64);
        weights.iter_mut().step_by(20).for_each(|weight| *weight = 0);
        assert_eq!(packed(&weights, 64), None);
    }
}
