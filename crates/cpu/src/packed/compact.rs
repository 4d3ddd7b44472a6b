//! bf16 weights in 12 bits, exactly.
//!
//! The exponents of a panel's weights are few: sixteen neighbours, a *window*, cover weights of any size between the
//! largest and its 32768th. So a weight is kept as its sign, the place of its exponent in its panel's window, and its
//! mantissa. The few that lie outside of the window, *strays*, are kept beside the blocks, and put where they belong
//! whenever their block is expanded to bf16. Nothing is rounded. That a product reads three quarters of the bytes
//! pays wherever memory is what it waits for, and a model takes three quarters of the room.
//!
//! ```text
//! bf16          s eeeeeeee mmmmmmm
//! code          s     wwww mmmmmmm                  w = e - the first exponent of the window
//!
//! four lines of a block     line 0    line 1    line 2    line 3: abcd, four bits each
//! in the room of three      code a.   code b.   code c.           a, b, c follow the codes of the others
//! ```
//!
//! All four codes of a place come from the same place of three lines, so this is one loop for all instruction sets.
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
use crate::simd::{LANE_ROWS, PAIR, Simd};
use crate::team::Team;
use crate::tensor::Buffer;

/// Weights of a line, 64 bytes in bf16.
const LINE: usize = LANE_ROWS * PAIR;
/// Groups of four lines of a block.
const QUARTETS: usize = PANEL_ROWS * GROUP / (4 * LINE);
/// Exponents of a window.
const WINDOW: u16 = 16;
/// Bits of a mantissa, below the exponent.
const MANTISSA: u32 = 7;
/// Bits of an exponent.
const EXPONENT: u16 = 0xff;
/// A code's sign and its other bits once it is shifted, with its sign, to where bf16 has its mantissa.
const CODE: u16 = 0x87ff;
/// A matrix is not compact if more than one weight of so many is a stray: they would take a bit of each weight.
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

/// A bf16 matrix in compact blocks.
pub(crate) struct CompactPanels {
    num_groups: usize,
    /// `[panel][group]`
    blocks: Buffer<CompactBlock>,
    panels: Vec<Panel>,
}

/// What a panel's codes need to become weights.
#[derive(Clone, Default)]
struct Panel {
    /// The first exponent of its window, where bf16 has its exponent.
    window: u16,
    /// By group, and in a group by place.
    strays: Vec<Stray>,
    /// The end of each group's strays.
    ends: Vec<u32>,
}

/// A weight whose exponent its panel's window does not have.
#[derive(Clone, Copy)]
struct Stray {
    /// Its place in the block.
    place: u16,
    bits: u16,
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
        let mut blocks = Buffer::<CompactBlock>::zeroed("a weight matrix", num_panels * num_groups)?;
        blocks.prefer_huge_pages();
        let mut panels = vec![Panel::default(); num_panels];
        let tiles = (Grid::row_bands(&mut blocks, num_groups, 1), Grid::row_bands(&mut panels, 1, 1));
        team.for_each(tiles, |(blocks, panels)| isa.run(Compress { views, num_rows, blocks, panels }));
        let num_strays: usize = panels.iter().map(|panel| panel.strays.len()).sum();
        let is_worth_it = num_strays * WEIGHTS_PER_STRAY <= num_rows * cols;
        Ok(is_worth_it.then_some(Self { num_groups, blocks, panels }))
    }

    /// Bytes that it takes.
    pub(super) fn num_bytes(&self) -> usize {
        let beside = |panel: &Panel| size_of_val(&panel.strays[..]) + size_of_val(&panel.ends[..]);
        size_of_val(&self.blocks[..]) + self.panels.iter().map(beside).sum::<usize>()
    }
}

impl Blocks for CompactPanels {
    type Block = Bf16Block;
    type Room = [Bf16Block; BF16_SPAN_BLOCKS];
    const ARE_MADE: bool = true;

    #[inline(always)]
    fn num_groups(&self) -> usize {
        self.num_groups
    }

    #[inline(always)]
    fn stored(&self, panel: usize, groups: Range<usize>) -> &[u8] {
        bytemuck::cast_slice(&self.blocks[panel * self.num_groups..][..self.num_groups][groups])
    }

    #[inline(always)]
    fn blocks<'a>(
        &'a self,
        panel: usize,
        groups: Range<usize>,
        room: &'a mut Self::Room,
        mut meanwhile: impl FnMut(),
    ) -> &'a [Bf16Block] {
        let blocks: &[CompactBlock] = bytemuck::cast_slice(self.stored(panel, groups.clone()));
        let panel = &self.panels[panel];
        let room = &mut room[..groups.len()];
        for (group, (block, room)) in zip(groups, zip(blocks, &mut *room)) {
            meanwhile();
            block.expand(panel.window, room);
            put_back(panel.strays_of(group), room);
        }
        room
    }
}

impl CompactBlock {
    /// Makes weights of the codes. Where strays belong they are any.
    #[inline(always)]
    fn expand(&self, window: u16, out: &mut Bf16Block) {
        let weight = |code: u16| ((code.cast_signed() >> 4).cast_unsigned() & CODE).wrapping_add(window);
        for (lines, [a, b, c]) in zip(bytemuck::cast_mut::<_, Lines>(out), &self.0) {
            for i in 0..LINE {
                lines[0][i] = weight(a[i]);
                lines[1][i] = weight(b[i]);
                lines[2][i] = weight(c[i]);
                lines[3][i] = weight(a[i] << 12 | b[i] << 8 & 0x0f00 | c[i] << 4 & 0x00f0);
            }
        }
    }

    /// Makes codes of weights, those of strays too, whose exponents are then cut short.
    #[inline(always)]
    fn compress(&mut self, window: u16, block: &Bf16Block) {
        let code = |bits: u16| bits.wrapping_sub(window) << 4 & 0x7ff0 | bits & 0x8000;
        for (lines, [a, b, c]) in zip(bytemuck::cast_ref::<_, Lines>(block), &mut self.0) {
            for i in 0..LINE {
                let last = code(lines[3][i]) >> 4;
                a[i] = code(lines[0][i]) | last >> 8;
                b[i] = code(lines[1][i]) | last >> 4 & 15;
                c[i] = code(lines[2][i]) | last & 15;
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

impl Panel {
    /// The strays of a group.
    #[inline(always)]
    fn strays_of(&self, group: usize) -> &[Stray] {
        let start = if group == 0 { 0 } else { self.ends[group - 1] };
        &self.strays[start as usize..self.ends[group] as usize]
    }

    /// Makes codes of a panel's blocks, whose rows and columns beyond `shape` are no weights.
    #[inline(always)]
    fn compress(&mut self, plain: &[Bf16Block], [rows, cols]: [usize; 2], out: &mut [CompactBlock]) {
        self.window = best_window(plain) << MANTISSA;
        for (group, (plain, out)) in zip(plain, out).enumerate() {
            out.compress(self.window, plain);
            self.find_strays(plain, [rows, cols - group * GROUP]);
            self.ends.push(self.strays.len() as u32);
        }
    }

    /// Notes the strays of a block of which so many rows and columns are weights.
    #[inline(always)]
    fn find_strays(&mut self, block: &Bf16Block, [rows, cols]: [usize; 2]) {
        let lines: &[Line; 4 * QUARTETS] = bytemuck::cast_ref(block);
        let is_stray = |bits: u16| (bits.wrapping_sub(self.window) >> MANTISSA) & EXPONENT >= WINDOW;
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
                    self.strays.push(Stray { place: place as u16, bits });
                }
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
    blocks: Tile<'a, CompactBlock>,
    panels: Tile<'a, Panel>,
}

impl Kernel for Compress<'_> {
    #[inline(always)]
    fn run<S: Simd>(mut self, _: S) {
        let cols = self.views[0].cols;
        let mut plain = vec![Bf16Block::zeroed(); cols.div_ceil(GROUP)];
        for panel in self.blocks.rows() {
            plain.fill(Bf16Block::zeroed());
            pack_panel(self.views, panel, &mut plain);
            let shape = [self.num_rows - panel * PANEL_ROWS, cols];
            self.panels.row(panel)[0].compress(&plain, shape, self.blocks.row(panel));
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
