//! Weights of products `[out, in]`, packed for the kernels: 32 rows are interleaved so that a step reads 64 neighbouring
//! bytes and a panel of rows is one stream from memory. Quantised ones have a scale per row and 32 columns.
//!
//! ```text
//!               32 columns: a group
//!              ┌────────┬────────┬─────                panel 0: block 0, block 1, ...   one stream
//!  32 rows:    │block 0 │block 1 │ ...                 panel 1: block 0, block 1, ...
//!  a panel     └────────┴────────┴─────
//! ```
//!
//! | format | a weight is | bits with its scale |
//! |---|---|---|
//! | bf16 | itself | 12, or 16 where weights differ too much in size to be [`compact`] |
//! | q8 | `scale · stored`, -127..=127 | 8.5 |
//! | q4 | `scale · (stored - 8)`, -8..=7 | 4.5 |
//!
//! A product is specified to the bit, see [`Blocks::dot`], and so is quantisation: both are the same on every
//! instruction set (but for bf16 on AMX, and subnormal bf16, see [`simd`](crate::simd)), and so are the [`image`]s that
//! spare the next start the quantisation. bf16 is packed at every start, which takes no longer than reading it.

mod block;
mod compact;
mod dot;
mod image;
mod quantise;

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender, channel};

use backend::{BackendError, WeightView};
use bytes::Bytes;

use crate::format::{WeightFormat, WeightFormats};
use crate::grid::{Grid, Tile};
use crate::isa::{Isa, Kernel};
use crate::matrix::PanelSums;
use crate::operand::Operand;
use crate::simd::{LANE_ROWS, Simd, TILE_TOKENS};
use crate::team::Team;
use crate::tensor::Buffer;
use block::{Bf16Block, Block, Q4Block, Q8Block, QuantisedBlock};
use compact::CompactPanels;
use dot::Blocks;
use image::Image;
pub(crate) use image::write as write_image;
pub use image::{ImageError, ImageKey, ImageUse, PackedMatrix};

/// Columns of a block, which share a scale if they are quantised.
pub(crate) const GROUP: usize = 32;
/// Rows that are interleaved.
pub(crate) const PANEL_ROWS: usize = 2 * LANE_ROWS;

/// Makes packed matrices, or takes quantised ones from an image of an earlier load.
#[derive(Default)]
pub(crate) struct Packer {
    image: Option<(Image, ImageUse)>,
    recorder: Option<Sender<PackedMatrix>>,
}

/// A packed matrix.
pub(crate) enum Packed {
    Bf16(Panels<Bf16Block>),
    CompactBf16(CompactPanels),
    Q8(Panels<Q8Block>),
    Q4(Panels<Q4Block>),
}

/// A matrix in blocks of one format.
pub(crate) struct Panels<B> {
    num_groups: usize,
    /// `[panel][group]` blocks; rows and columns beyond the matrix are zeros.
    blocks: Bytes,
    block: PhantomData<B>,
}

impl Packer {
    /// Takes matrices from an image from now on.
    ///
    /// # Errors
    /// [`ImageError`] if it cannot be used.
    pub(crate) fn use_image(
        &mut self,
        bytes: Bytes,
        formats: WeightFormats,
        key: ImageKey,
        image_use: ImageUse,
        team: &mut Team,
    ) -> Result<(), ImageError> {
        self.image = Some((Image::open(bytes, formats, key, team)?, image_use));
        Ok(())
    }

    /// Hands out every matrix that is quantised from now on.
    pub(crate) fn record(&mut self) -> Receiver<PackedMatrix> {
        let (sender, receiver) = channel();
        self.recorder = Some(sender);
        receiver
    }

    /// Makes a matrix of views of one width, stacked along their rows.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`] if there is no room.
    pub(crate) fn pack(
        &mut self,
        format: WeightFormat,
        views: &[WeightView],
        isa: Isa,
        team: &mut Team,
    ) -> Result<Packed, BackendError> {
        let (rows, cols) = (views.iter().map(|view| view.rows).sum(), views[0].cols);
        if format == WeightFormat::Bf16
            && let Some(panels) = CompactPanels::pack(views, isa, team)?
        {
            return Ok(Packed::CompactBf16(panels));
        }
        if format.is_quantised()
            && let Some(blocks) = self.take_from_image(format, rows, cols, team)?
            && let Some(packed) = Packed::from_blocks(format, rows, cols, blocks)
        {
            return Ok(packed);
        }
        let blocks = match format {
            WeightFormat::Bf16 => pack_views::<Bf16Block>(views, isa, team),
            WeightFormat::Q8 => pack_views::<Q8Block>(views, isa, team),
            WeightFormat::Q4 => pack_views::<Q4Block>(views, isa, team),
        }?;
        if let Some(recorder) = self.recorder.as_ref().filter(|_| format.is_quantised()) {
            // Nobody listens any more: then nobody wants it.
            let _ = recorder.send(PackedMatrix { format, rows, cols, blocks: blocks.clone() });
        }
        Ok(Packed::from_blocks(format, rows, cols, blocks).expect("blocks as many as the shape has"))
    }

    /// The blocks of the image's next matrix; `None` if there is no image, or that matrix has another format or shape.
    fn take_from_image(
        &mut self,
        format: WeightFormat,
        rows: usize,
        cols: usize,
        team: &mut Team,
    ) -> Result<Option<Bytes>, BackendError> {
        let Some((image, image_use)) = &mut self.image else { return Ok(None) };
        let (blocks, image_use) = (image.next(format, rows, cols), *image_use);
        if image.is_empty() {
            // What is used in place stays; what was copied need not be mapped any longer.
            self.image = None;
        }
        match (blocks, image_use) {
            (Some(blocks), ImageUse::Copied) => copy(&blocks, team).map(Some),
            (blocks, _) => Ok(blocks),
        }
    }
}

/// Copies blocks into large pages, on all threads.
fn copy(blocks: &Bytes, team: &mut Team) -> Result<Bytes, BackendError> {
    const BAND: usize = 1 << 20;
    let mut copied = Buffer::<u8>::zeroed("a weight matrix", blocks.len())?;
    copied.prefer_huge_pages();
    team.for_each(Grid::column_bands(&mut copied, blocks.len(), BAND), |mut band| {
        let range = band.cols();
        band.row(0).copy_from_slice(&blocks[range]);
    });
    Ok(Bytes::from_owner(copied))
}

impl Packed {
    /// Wraps the blocks of a matrix; `None` if they are not as many as its shape has.
    fn from_blocks(format: WeightFormat, rows: usize, cols: usize, blocks: Bytes) -> Option<Self> {
        match format {
            WeightFormat::Bf16 => Panels::from_blocks(rows, cols, blocks).map(Self::Bf16),
            WeightFormat::Q8 => Panels::from_blocks(rows, cols, blocks).map(Self::Q8),
            WeightFormat::Q4 => Panels::from_blocks(rows, cols, blocks).map(Self::Q4),
        }
    }

    /// What is added to quantised weights to make them unsigned; `None` for bf16.
    pub(crate) fn offset(&self) -> Option<i32> {
        match self {
            Self::Bf16(_) | Self::CompactBf16(_) => None,
            Self::Q8(_) => Some(Q8Block::OFFSET),
            Self::Q4(_) => Some(Q4Block::OFFSET),
        }
    }

    /// Bytes that it takes.
    pub(crate) fn num_bytes(&self) -> usize {
        match self {
            Self::Bf16(panels) => panels.blocks.len(),
            Self::CompactBf16(panels) => panels.num_bytes(),
            Self::Q8(panels) => panels.blocks.len(),
            Self::Q4(panels) => panels.blocks.len(),
        }
    }

    /// What is read first for the products of columns from `col` on, which begins a panel or is beyond the last.
    #[inline(always)]
    pub(crate) fn beginning(&self, col: usize) -> &[u8] {
        let panel = col.div_ceil(PANEL_ROWS);
        match self {
            Self::Bf16(panels) => panels.beginning(panel),
            Self::CompactBf16(panels) => panels.beginning(panel),
            Self::Q8(panels) => panels.beginning(panel),
            Self::Q4(panels) => panels.beginning(panel),
        }
    }

    /// Computes `weight[c] · x[r]` for whole panels of columns, of which the last may be cut short. `then` is what the
    /// thread will most likely read next.
    ///
    /// # Panics
    /// If the operand was not made for a matrix of this format.
    #[inline(always)]
    pub(crate) fn dot<S: Simd>(
        &self,
        simd: S,
        cols: Range<usize>,
        x: Operand<'_>,
        rows: Range<usize>,
        then: &[u8],
        sums: &mut PanelSums,
    ) {
        assert!(cols.start.is_multiple_of(PANEL_ROWS));
        let sums = sums.reset(cols.len(), rows.len());
        let panels = cols.start / PANEL_ROWS..cols.end.div_ceil(PANEL_ROWS);
        match (self, x) {
            (Self::Bf16(all), Operand::Bf16(x)) => all.dot(simd, panels, x, rows, then, sums),
            (Self::CompactBf16(all), Operand::Bf16(x)) => all.dot(simd, panels, x, rows, then, sums),
            (Self::Q8(all), Operand::Quantised(x)) => all.dot(simd, panels, x, rows, then, sums),
            (Self::Q4(all), Operand::Quantised(x)) => all.dot(simd, panels, x, rows, then, sums),
            _ => panic!("an operand has the form that its matrix multiplies"),
        }
    }
}

impl<B: Block> Panels<B> {
    fn from_blocks(rows: usize, cols: usize, blocks: Bytes) -> Option<Self> {
        let num_groups = cols.div_ceil(GROUP);
        let num_blocks = bytemuck::try_cast_slice::<u8, B>(&blocks).ok()?.len();
        let fits = num_blocks == rows.div_ceil(PANEL_ROWS) * num_groups;
        fits.then_some(Self { num_groups, blocks, block: PhantomData })
    }
}

impl<B: Block> Blocks for Panels<B> {
    type Block = B;
    type Room = [B; 0];
    const ARE_MADE: bool = false;

    #[inline(always)]
    fn num_panels(&self) -> usize {
        self.blocks.len() / (self.num_groups * size_of::<B>())
    }

    #[inline(always)]
    fn num_groups(&self) -> usize {
        self.num_groups
    }

    #[inline(always)]
    fn stored(&self, panel: usize, groups: Range<usize>) -> &[u8] {
        bytemuck::cast_slice(self.blocks(panel, groups, &mut [], || ()))
    }

    #[inline(always)]
    fn blocks<'a>(
        &'a self,
        panel: usize,
        groups: Range<usize>,
        _: &'a mut [B; 0],
        _: impl FnMut(),
    ) -> &'a [B] {
        &bytemuck::cast_slice(&self.blocks)[panel * self.num_groups..][..self.num_groups][groups]
    }
}

/// Most tokens of a tile of a product with weights in this format.
pub(crate) fn tile_tokens(isa: Isa, format: WeightFormat) -> usize {
    let mut tokens = 0;
    isa.run(TileTokens { format, tokens: &mut tokens });
    tokens
}

struct TileTokens<'a> {
    format: WeightFormat,
    tokens: &'a mut usize,
}

impl Kernel for TileTokens<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        *self.tokens = match self.format {
            _ if S::HAS_TILES => TILE_TOKENS,
            WeightFormat::Bf16 => S::PAIR_TOKENS,
            WeightFormat::Q8 | WeightFormat::Q4 => S::QUAD_TOKENS,
        };
    }
}

/// Packs stacked views on all threads.
fn pack_views<B: Block>(views: &[WeightView], isa: Isa, team: &mut Team) -> Result<Bytes, BackendError> {
    let num_rows: usize = views.iter().map(|view| view.rows).sum();
    let num_groups = views[0].cols.div_ceil(GROUP);
    let num_blocks = num_rows.div_ceil(PANEL_ROWS) * num_groups;
    let mut blocks = Buffer::<B>::zeroed("a weight matrix", num_blocks)?;
    blocks.prefer_huge_pages();
    team.for_each(Grid::row_bands(&mut blocks, num_groups, 1), |panels| isa.run(Pack { views, panels }));
    Ok(Bytes::from_owner(blocks))
}

/// Packs the rows of the panels that the tile covers.
struct Pack<'a, B> {
    views: &'a [WeightView],
    panels: Tile<'a, B>,
}

impl<B: Block> Kernel for Pack<'_, B> {
    #[inline(always)]
    fn run<S: Simd>(mut self, _: S) {
        for panel in self.panels.rows() {
            pack_panel(self.views, panel, self.panels.row(panel));
        }
    }
}

/// Packs one panel of stacked views into blocks that were zeros.
#[inline(always)]
fn pack_panel<B: Block>(views: &[WeightView], panel: usize, blocks: &mut [B]) {
    let cols = views[0].cols;
    let mut values = vec![0.0; cols.next_multiple_of(GROUP)];
    let rows = rows_from(views, panel * PANEL_ROWS).take(PANEL_ROWS);
    for (row_in_panel, (view, row_in_view)) in rows.enumerate() {
        view.row_to_f32(row_in_view, &mut values[..cols]);
        for (block, values) in blocks.iter_mut().zip(values.as_chunks::<GROUP>().0) {
            block.set_row(row_in_panel, values);
        }
    }
}

/// The rows of stacked views from number `first` on, each with its view and its number there.
fn rows_from(views: &[WeightView], first: usize) -> impl Iterator<Item = (&WeightView, usize)> {
    views.iter().flat_map(|view| (0..view.rows).map(move |row| (view, row))).skip(first)
}

#[cfg(test)]
mod tests {
    use backend::{WeightData, WeightType, dummy_value};
    use half::bf16;

    use super::quantise::{Quantised, q4, q8};
    use super::*;
    use crate::operand::{Order, Scratch};
    use crate::tensor::Tensor;

    const NUM_TOKENS: usize = 50;

    /// A product of quantised weights as the kernels specify it, in plain loops.
    fn quantised_product(weights: &[Quantised], x: &[bf16]) -> f32 {
        let mut sum = 0.0;
        for (x, weights) in x.chunks(128).zip(weights.chunks(4)) {
            let largest = x.iter().map(|x| x.to_f32().abs()).fold(0.0, f32::max);
            let mut partial = 0.0;
            for (x, weights) in x.chunks(GROUP).zip(weights) {
                let quantised = x.iter().map(|x| (x.to_f32() * (127.0 / largest)).round_ties_even() as i32);
                let products = quantised.zip(weights.values).map(|(x, w)| x * w);
                partial = (products.sum::<i32>() as f32).mul_add(weights.scale.to_f32(), partial);
            }
            sum = partial.mul_add(largest / 127.0, sum);
        }
        sum
    }

    /// The same of bf16 weights.
    fn bf16_product(weights: &[bf16], x: &[bf16], isa: Isa) -> f32 {
        if isa == Isa::Avx512Amx {
            return bf16_product_in_tiles(weights, x);
        }
        let mut sum = 0.0;
        for (x, weights) in x.chunks(256).zip(weights.chunks(256)) {
            let mut partial = 0.0;
            for (x, weights) in x.chunks(2).zip(weights.chunks(2)) {
                for (x, w) in x.iter().zip(weights).rev() {
                    partial += x.to_f32() * w.to_f32();
                }
            }
            sum += partial;
        }
        sum
    }

    /// The same on a matrix unit.
    fn bf16_product_in_tiles(weights: &[bf16], x: &[bf16]) -> f32 {
        let mut sum = 0.0;
        for (x, weights) in x.chunks(GROUP).zip(weights.chunks(GROUP)) {
            let [mut even, mut odd] = [0.0, 0.0];
            for (x, weights) in x.chunks(2).zip(weights.chunks(2)) {
                even += x[0].to_f32() * weights[0].to_f32();
                if let ([_, x], [_, w]) = (x, weights) {
                    odd += x.to_f32() * w.to_f32();
                }
            }
            sum += even + odd;
        }
        sum
    }

    /// The product of a row of weights, packed in a format, with a row of activations.
    fn product(format: WeightFormat, weights: &[bf16], x: &[bf16], isa: Isa) -> f32 {
        if format == WeightFormat::Bf16 {
            return bf16_product(weights, x, isa);
        }
        let quantise = |weights: &[bf16]| {
            let mut padded = [0.0; GROUP];
            padded.iter_mut().zip(weights).for_each(|(padded, w)| *padded = w.to_f32());
            if format == WeightFormat::Q8 { q8(&padded) } else { q4(&padded) }
        };
        quantised_product(&weights.chunks(GROUP).map(quantise).collect::<Vec<_>>(), x)
    }

    struct Dot<'a> {
        packed: &'a Packed,
        cols: Range<usize>,
        x: Operand<'a>,
        rows: Range<usize>,
        sums: &'a mut PanelSums,
    }

    impl Kernel for Dot<'_> {
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            self.packed.dot(simd, self.cols, self.x, self.rows, &[], self.sums);
        }
    }

    fn activations(rows: usize, values: &[f32]) -> (Tensor, Scratch) {
        let features = values.len() / rows;
        let mut scratch = Scratch::default();
        scratch.reserve(rows, features).unwrap();
        let mut x = Tensor::new(rows, features, backend::DType::Bf16).unwrap();
        x.upload(values);
        (x, scratch)
    }

    fn check(format: WeightFormat, num_rows: usize, len: usize, isa: Isa) {
        let data = |seed| WeightData::Dummy { seed, mean: 0.1, std: 1.0 };
        let view = |rows, seed| WeightView { rows, cols: len, dtype: WeightType::Bf16, data: data(seed) };
        let views = [view(num_rows, 1), view(3, 2)];
        let mut team = Team::new(2);
        let packed = Packer::default().pack(format, &views, isa, &mut team).unwrap();
        check_packed(format, &packed, &views, isa);
        if format == WeightFormat::Bf16 {
            assert!(matches!(packed, Packed::CompactBf16(_)));
            let blocks = pack_views::<Bf16Block>(&views, isa, &mut team).unwrap();
            let whole = Packed::from_blocks(format, num_rows + 3, len, blocks).unwrap();
            check_packed(format, &whole, &views, isa);
        }
    }

    fn check_packed(format: WeightFormat, packed: &Packed, views: &[WeightView], isa: Isa) {
        let len = views[0].cols;
        let mut team = Team::new(2);
        let stacked: Vec<bf16> = views.iter().flat_map(WeightView::to_bf16).collect();
        let rows: Vec<&[bf16]> = stacked.chunks(len).collect();

        let values: Vec<f32> =
            (0..(NUM_TOKENS * len) as u64).map(|i| dummy_value(3, i, 0.0, 1.0).to_f32()).collect();
        let (x, mut scratch) = activations(NUM_TOKENS, &values);
        let operand = scratch.operand(&x, Order::Given, NUM_TOKENS, packed, isa, &mut team);

        for cols in [0..rows.len(), 0..rows.len().min(PANEL_ROWS), PANEL_ROWS..rows.len().max(PANEL_ROWS)] {
            for tokens in [0..1, 1..3, 2..5, 1..5, 3..8, 3..19, 2..21, 0..NUM_TOKENS] {
                let mut sums = PanelSums::default();
                let kernel =
                    Dot { packed, cols: cols.clone(), x: operand, rows: tokens.clone(), sums: &mut sums };
                isa.run(kernel);
                for (token, panel, sums) in sums.iter() {
                    for (col, &sum) in cols.clone().skip(panel).zip(sums) {
                        let token = tokens.start + token;
                        let expected = product(format, rows[col], x.bf16().row(token), isa);
                        let case = format!("{format:?} {} length {len}", isa.name());
                        assert_eq!(sum.to_bits(), expected.to_bits(), "{case}: row {col}, token {token}");
                    }
                }
            }
        }
    }

    #[test]
    fn products_have_the_specified_bits_on_every_instruction_set() {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            println!("{}", isa.name());
            for format in WeightFormat::ALL {
                for (num_rows, len) in [(1, 1), (5, 31), (29, 32), (30, 100), (61, 128), (40, 200), (64, 513)]
                {
                    check(format, num_rows, len, isa);
                }
            }
        }
    }

    #[test]
    fn an_image_gives_the_same_matrices_without_the_weights() {
        let view = |rows, mean| {
            let data = WeightData::Dummy { seed: 1, mean, std: 1.0 };
            WeightView { rows, cols: 70, dtype: WeightType::Bf16, data }
        };
        let mut team = Team::new(2);
        let isa = Isa::detect();
        let mut packer = Packer::default();
        let recorded = packer.record();
        let mut pack = |packer: &mut Packer, rows, mean| {
            let Packed::Q4(panels) =
                packer.pack(WeightFormat::Q4, &[view(rows, mean)], isa, &mut team).unwrap()
            else {
                panic!("q4 was asked for")
            };
            panels.blocks
        };
        let first = [pack(&mut packer, 40, 0.0), pack(&mut packer, 8, 0.0)];
        let mut file = std::io::Cursor::new(Vec::new());
        write_image(&mut file, WeightFormat::Q4.into(), [1, 2], recorded.try_iter()).unwrap();

        let file = Bytes::from(file.into_inner());
        for image_use in [ImageUse::InPlace, ImageUse::Copied] {
            let mut packer = Packer::default();
            let formats = WeightFormat::Q4.into();
            packer.use_image(file.clone(), formats, [1, 2], image_use, &mut Team::new(2)).unwrap();
            // Other weights prove that the image was taken; a shape that it does not have, that it is not trusted.
            let taken = pack(&mut packer, 40, 5.0);
            assert_eq!(taken, first[0]);
            assert_eq!(file.as_ptr_range().contains(&taken.as_ptr()), image_use == ImageUse::InPlace);
            assert_ne!(pack(&mut packer, 80, 0.0).len(), first[1].len());
        }
    }

    #[test]
    fn what_is_not_finite_reaches_the_result() {
        let data = WeightData::Dummy { seed: 1, mean: 0.0, std: 1.0 };
        let view = WeightView { rows: 8, cols: 64, dtype: WeightType::Bf16, data };
        let mut team = Team::new(1);
        for bad in [f32::NAN, f32::INFINITY] {
            let views = std::slice::from_ref(&view);
            let values: Vec<f32> = (0..64).map(|i| if i == 9 { bad } else { 1.0 }).collect();
            for format in WeightFormat::ALL {
                let packed = Packer::default().pack(format, views, Isa::detect(), &mut team).unwrap();
                let (x, mut scratch) = activations(1, &values);
                let x = scratch.operand(&x, Order::Given, 1, &packed, Isa::detect(), &mut team);
                let mut sums = PanelSums::default();
                Isa::detect().run(Dot { packed: &packed, cols: 0..8, x, rows: 0..1, sums: &mut sums });
                let (.., sums) = sums.iter().next().expect("a token");
                assert!(sums[..8].iter().all(|sum| !sum.is_finite()), "{bad}, {format:?}: {sums:?}");
            }
        }
    }
}
