//! The CPU backend: weights in bf16 or quantised, packed for the kernels, SIMD chosen at run time, and one thread team
//! that runs each verb as a list of independent tasks.
//!
//! ```text
//! Cpu (the verbs) ──► Team: tasks ──► Isa::run: a Kernel compiled per instruction set ──► packed: Panels × operand
//!                      each owns a tile of the result (grid)             linear, experts
//! ```
//!
//! Two decisions shape everything. A task owns a rectangle of its verb's result, so tasks share nothing and
//! need no order. And a number of a result is computed by one fixed chain of operations that depends on its
//! own inputs and the instruction set alone, so a row's bits never depend on the batch, the number of threads
//! or the tile it fell in.
//!
//! This crate knows nothing of models and files, and it does not pin threads.

mod attention;
mod elementwise;
mod experts;
mod format;
mod grid;
mod isa;
mod kv;
mod limits;
mod linear;
mod matrix;
mod numbers;
mod operand;
mod packed;
mod simd;
mod team;
mod tensor;

use std::io::{self, Seek, Write};
use std::sync::mpsc::Receiver;

use backend::{
    AttentionShape, Backend, BackendError, Batch, DType, ExpertLoad, ExpertsView, MatrixUse, NonFiniteLogits,
    RopeTable, RouteShape, SampleRow, Sampled, StepShape, WeightView,
};
use bytes::Bytes;
use half::bf16;

pub use crate::format::{WeightFormat, WeightFormats};
pub use crate::isa::Isa;
pub use crate::kv::{KvCache, KvFormat};
pub use crate::limits::MemoryProbe;
pub use crate::matrix::{Experts, Matrix};
pub use crate::packed::{ImageError, ImageKey, ImageUse, PackedMatrix};
pub use crate::tensor::Tensor;

use crate::attention::{Attention, AttentionSplit, Inputs, MergeSplits, Splits};
use crate::elementwise::{Add, AddRmsNorm, Embed, GatherRows, RmsNorm, Sample};
use crate::experts::{Down, GateUp};
use crate::grid::{Grid, Tiles};
use crate::kv::{KvStorage, RopeStoreKv};
use crate::linear::Linear;
use crate::matrix::WeightSize;
use crate::numbers::Element;
use crate::operand::{Order, Scratch};
use crate::packed::{PANEL_ROWS, Packer};
use crate::team::Team;
use crate::tensor::{Rows, Values};

/// Rows from which on the panels of a task share them.
const MANY_ROWS: usize = 32;
/// Most panels of a task that share many rows.
const SHARING_PANELS: usize = 4;
/// Most panels of a task that few rows take one after another: a stream from memory, which is slow to begin.
const STREAMED_PANELS: usize = 8;

/// How to run.
#[derive(Debug, Clone, Copy, Default)]
pub struct CpuOptions {
    /// Threads of the team, the caller's included; `None`: as many as the process may use.
    pub num_threads: Option<usize>,
    /// Instruction set; `None`: the fastest that the machine has.
    pub isa: Option<Isa>,
    /// The formats in which the weights of products are kept.
    pub weights: WeightFormats,
    /// The format in which keys and values are kept.
    pub kv_cache: KvFormat,
}

/// The CPU backend.
pub struct Cpu {
    isa: Isa,
    weights: WeightFormats,
    kv_cache: KvFormat,
    /// Most tokens of a tile of a product of experts.
    tile_tokens: usize,
    packer: Packer,
    size: WeightSize,
    team: Team,
    scratch: Scratch,
    splits: Splits,
    partials: Vec<f32>,
    batch: Batch,
    sampled: Vec<Result<Sampled, NonFiniteLogits>>,
}

/// One layer's routing and the router's logits that it came from.
pub struct Routing {
    logits: Tensor,
    routing: backend::Routing,
}

impl Cpu {
    /// Starts the thread team.
    ///
    /// # Panics
    /// If the machine does not have the instruction set asked for, or zero threads are.
    pub fn new(options: CpuOptions) -> Self {
        let isa = options.isa.unwrap_or_else(Isa::detect);
        assert!(isa.is_available(), "this machine has no {}", isa.name());
        let available = || std::thread::available_parallelism().map_or(1, usize::from);
        let num_threads = options.num_threads.unwrap_or_else(available);
        assert!(num_threads > 0, "a team has at least the caller's thread");
        Self {
            isa,
            weights: options.weights,
            kv_cache: options.kv_cache,
            tile_tokens: packed::tile_tokens(isa, WeightFormat::default()),
            packer: Packer::default(),
            size: WeightSize::default(),
            team: Team::new(num_threads),
            scratch: Scratch::default(),
            splits: Splits::default(),
            partials: Vec::new(),
            batch: Batch::new(),
            sampled: Vec::new(),
        }
    }

    /// Takes quantised matrices from an image (see [`write_image`]) instead of quantising, in the order in which they
    /// are asked for. What the image does not have is quantised as ever.
    ///
    /// # Errors
    /// [`ImageError`] if the image was made of something else than `key`, in another format, or is damaged.
    ///
    /// # Panics
    /// If the weights are kept in bf16.
    pub fn use_image(&mut self, image: Bytes, key: ImageKey, image_use: ImageUse) -> Result<(), ImageError> {
        assert!(self.weights.is_quantised(), "bf16 weights are packed at every start");
        self.packer.use_image(image, self.weights, key, image_use, &mut self.team)
    }

    /// Hands out every matrix that is quantised from now on, for [`write_image`].
    pub fn record(&mut self) -> Receiver<PackedMatrix> {
        self.packer.record()
    }

    /// Output columns of a task that multiplies so many rows, so that every thread gets several tasks.
    fn band_cols(&self, weight: &Matrix, num_rows: usize) -> usize {
        let most_panels = if num_rows < MANY_ROWS { STREAMED_PANELS } else { SHARING_PANELS };
        let cols = weight.rows() / (4 * self.team.num_threads());
        cols.next_multiple_of(PANEL_ROWS).clamp(PANEL_ROWS, most_panels * PANEL_ROWS)
    }

    /// Rows of a band, so that every thread gets several, but each band is worth waking a thread for.
    fn band_rows(&self, rows: usize, features: usize) -> usize {
        self.team.band_rows(rows, features)
    }
}

/// Writes recorded matrices as an image for [`Cpu::use_image`], from the start of `out`; whoever calls this replaces
/// files atomically.
///
/// # Errors
/// Of `out`.
///
/// # Panics
/// If all weights are kept in bf16.
pub fn write_image(
    out: &mut (impl Write + Seek),
    formats: WeightFormats,
    key: ImageKey,
    matrices: impl IntoIterator<Item = PackedMatrix>,
) -> io::Result<()> {
    assert!(formats.is_quantised(), "bf16 weights are packed at every start");
    packed::write_image(out, formats, key, matrices)
}

/// Computes a linear layer into `rows` rows of `out`.
fn linear<E: Element>(cpu: &mut Cpu, x: &Tensor, weight: &Matrix, out: &mut [E]) {
    let rows = out.len() / weight.rows();
    if rows == 0 {
        return;
    }
    let band_cols = cpu.band_cols(weight, rows);
    let Cpu { isa, ref mut team, ref mut scratch, .. } = *cpu;
    let x = scratch.operand(x, Order::Given, rows, weight.panels(), isa, team);
    team.for_each_in_runs(Grid::column_bands(out, weight.rows(), band_cols), |out| {
        isa.run(Linear { x, weight, out });
    });
}

/// Copies the rows whose logits are wanted.
fn gather_rows<E: Element>(cpu: &mut Cpu, x: Rows<'_, E>, out: &mut [E]) {
    let (isa, indices) = (cpu.isa, &cpu.batch.logits_indices[..]);
    let grid = Grid::row_bands(out, x.features(), cpu.band_rows(indices.len(), x.features()));
    cpu.team.for_each(grid, |out| isa.run(GatherRows { x, indices, out }));
}

impl Backend for Cpu {
    type Tensor = Tensor;
    type Vector = Vec<f32>;
    type Matrix = Matrix;
    type Experts = Experts;
    type KvCache = KvCache;
    type Routing = Routing;
    type Rope = RopeTable;

    fn describe(&self) -> String {
        let threads = self.team.num_threads();
        let plural = if threads == 1 { "" } else { "s" };
        let (isa, weights) = (self.isa.name(), self.weights.name());
        format!("cpu {isa}, {threads} thread{plural}, {weights} weights of {:.1} bits", self.weight_bits())
    }

    fn weight_bits(&self) -> f64 {
        self.size.bits().unwrap_or(self.weights.bits())
    }

    fn tensor(&mut self, max_rows: usize, features: usize, dtype: DType) -> Result<Tensor, BackendError> {
        if dtype == DType::Bf16 {
            self.scratch.reserve(max_rows, features)?;
        }
        Tensor::new(max_rows, features, dtype)
    }

    fn vector(&mut self, view: &WeightView) -> Result<Vec<f32>, BackendError> {
        Ok(view.to_bf16().into_iter().map(bf16::to_f32).collect())
    }

    fn matrix(&mut self, parts: &[WeightView], purpose: MatrixUse) -> Result<Matrix, BackendError> {
        let format = match (purpose, parts) {
            (MatrixUse::Lookup, [table]) => return Matrix::table(table, &mut self.team),
            (MatrixUse::Lookup, _) => panic!("a table to look rows up in has one part"),
            (MatrixUse::Exact, _) => WeightFormat::Bf16,
            (MatrixUse::Product, _) => self.weights.of(parts),
        };
        let matrix = Matrix::packed(parts, format, &mut self.packer, self.isa, &mut self.team)?;
        if purpose == MatrixUse::Product {
            self.size.add(&matrix);
        }
        Ok(matrix)
    }

    fn experts(&mut self, view: &ExpertsView) -> Result<Experts, BackendError> {
        let experts = Experts::new(view, self.weights, &mut self.packer, self.isa, &mut self.team)?;
        experts.matrices().for_each(|matrix| self.size.add(matrix));
        self.tile_tokens = packed::tile_tokens(self.isa, self.weights.of(&view.gate));
        Ok(experts)
    }

    fn rope(&mut self, table: &RopeTable) -> Result<RopeTable, BackendError> {
        Ok(table.clone())
    }

    fn kv_cache(
        &mut self,
        shape: AttentionShape,
        num_blocks: usize,
        block_size: usize,
    ) -> Result<KvCache, BackendError> {
        KvCache::new(shape, num_blocks, block_size, self.kv_cache)
    }

    fn routing(&mut self, max_tokens: usize, shape: RouteShape) -> Result<Routing, BackendError> {
        let logits = Tensor::new(max_tokens, shape.num_experts, DType::F32)?;
        let routing = backend::Routing::with_capacity(max_tokens, shape.num_experts, shape.top_k);
        Ok(Routing { logits, routing })
    }

    fn upload(&mut self, tensor: &mut Tensor, values: &[f32]) {
        tensor.upload(values);
    }

    fn download(&mut self, tensor: &Tensor, rows: usize) -> Vec<f32> {
        tensor.download(rows)
    }

    fn begin_step(&mut self, batch: &Batch) -> Result<StepShape, BackendError> {
        self.batch.clone_from(batch);
        self.sampled.clear();
        Ok(batch.shape())
    }

    fn embed(&mut self, table: &Matrix, out: &mut Tensor) {
        assert_eq!(table.cols(), out.features());
        let (isa, token_ids, features) = (self.isa, &self.batch.token_ids[..], out.features());
        let band_rows = self.band_rows(token_ids.len(), features);
        let grid = Grid::row_bands(out.f32_mut(token_ids.len()), features, band_rows);
        self.team.for_each(grid, |out| isa.run(Embed { table, token_ids, out }));
    }

    fn add(&mut self, x: &mut Tensor, y: &Tensor, rows: usize) {
        assert_eq!(x.features(), y.features());
        let (isa, y, features) = (self.isa, y.f32(), x.features());
        let band_rows = self.band_rows(rows, features);
        let grid = Grid::row_bands(x.f32_mut(rows), features, band_rows);
        self.team.for_each(grid, |x| isa.run(Add { x, y }));
    }

    fn rms_norm(&mut self, x: &Tensor, weight: &Vec<f32>, eps: f32, out: &mut Tensor, rows: usize) {
        assert!(x.features() == out.features() && x.features() == weight.len());
        let (isa, x, features) = (self.isa, x.f32(), out.features());
        let band_rows = self.band_rows(rows, features);
        let grid = Grid::row_bands(out.bf16_mut(rows), features, band_rows);
        self.team.for_each(grid, |out| isa.run(RmsNorm { x, weight, eps, out }));
    }

    fn add_rms_norm(
        &mut self,
        residual: &mut Tensor,
        delta: &Tensor,
        weight: &Vec<f32>,
        eps: f32,
        out: &mut Tensor,
        rows: usize,
    ) {
        let features = residual.features();
        assert!([delta.features(), out.features(), weight.len()] == [features; 3]);
        let (isa, delta) = (self.isa, delta.f32());
        let band_rows = self.band_rows(rows, features);
        let residual = Grid::row_bands(residual.f32_mut(rows), features, band_rows);
        let out = Grid::row_bands(out.bf16_mut(rows), features, band_rows);
        self.team.for_each((residual, out), |(residual, out)| {
            isa.run(AddRmsNorm { residual, delta, weight, eps, out });
        });
    }

    fn linear(&mut self, x: &Tensor, weight: &Matrix, out: &mut Tensor, rows: usize) {
        assert!(x.features() == weight.cols() && out.features() == weight.rows());
        match out.values {
            Values::Bf16(_) => linear(self, x, weight, out.bf16_mut(rows)),
            Values::F32(_) => linear(self, x, weight, out.f32_mut(rows)),
        }
    }

    fn rope_store_kv(&mut self, qkv: &Tensor, rope: &RopeTable, q_out: &mut Tensor, kv: &mut KvCache) {
        let (isa, shape) = (self.isa, kv.shape);
        assert!(qkv.features() == shape.qkv_features() && q_out.features() == shape.q_features());
        assert_eq!(rope.half_dim * 2, shape.head_dim);
        let Batch { positions, slot_mapping, .. } = &self.batch;
        let (qkv, group_cols) = (qkv.f32(), kv.group_len() * shape.head_dim);
        let [key_plane, value_plane, num_slots] = [kv.key_plane_len(), kv.plane_len(), kv.num_slots()];
        let q = Grid::column_bands(q_out.bf16_mut(positions.len()), shape.q_features(), group_cols);
        match &mut kv.storage {
            KvStorage::Bf16 { keys, values } => {
                let planes = (Grid::row_bands(keys, key_plane, 1), Grid::row_bands(values, value_plane, 1));
                self.team.for_each((q, planes), |(q, (keys, values))| {
                    isa.run(RopeStoreKv { shape, qkv, rope, positions, slot_mapping, q, keys, values });
                });
            }
            KvStorage::Q8 { keys, values } => {
                let planes = (keys.planes(key_plane, num_slots), values.planes(value_plane, num_slots));
                self.team.for_each((q, planes), |(q, (keys, values))| {
                    isa.run(RopeStoreKv { shape, qkv, rope, positions, slot_mapping, q, keys, values });
                });
            }
        }
    }

    fn attention(&mut self, q: &Tensor, kv: &KvCache, out: &mut Tensor) {
        assert!([q.features(), out.features()] == [kv.shape.q_features(); 2]);
        let Self { isa, ref mut team, ref batch, ref mut splits, ref mut partials, .. } = *self;
        let inputs = Inputs { q: q.bf16(), kv, batch };
        let (num_tokens, features) = (batch.num_tokens(), out.features());
        // Few tokens of a sequence are decodes, each with a context of its own; many are chunks of prompts, of which
        // neighbours share their keys and values.
        let band_rows = if num_tokens < 4 * batch.num_seqs() { 1 } else { 16 };
        let out = out.bf16_mut(num_tokens);
        let grid = Grid::new(out, features, band_rows, kv.group_len() * kv.shape.head_dim);
        if grid.num_tiles() < 4 * team.num_threads() {
            splits.count(batch, kv);
            if splits.are_many() {
                let (num_items, width) = (splits.num_items(), splits.width());
                partials.resize(partials.len().max(num_items * width), 0.0);
                let (partials, splits) = (&mut partials[..num_items * width], &*splits);
                team.for_each(Grid::row_bands(partials, width, 1), |partial| {
                    isa.run(AttentionSplit { inputs, splits, partial });
                });
                let partials = Rows::new(partials, width);
                team.for_each(grid, |out| isa.run(MergeSplits { inputs, splits, partials, out }));
                return;
            }
        }
        team.for_each(grid, |out| isa.run(Attention { inputs, out }));
    }

    fn route(
        &mut self,
        x: &Tensor,
        router: Option<&Matrix>,
        routing: &mut Routing,
        layer: usize,
        rows: usize,
    ) {
        if let Some(router) = router {
            self.linear(x, router, &mut routing.logits, rows);
        }
        let logits = routing.logits.f32();
        routing.routing.route((0..rows).map(|row| logits.row(row)), &self.batch.steering, layer);
    }

    fn experts_gate_up(&mut self, x: &Tensor, experts: &Experts, routing: &Routing, act: &mut Tensor) {
        let (gate, routing, features) = (&experts.gate[0], &routing.routing, act.features());
        if routing.num_rows() == 0 {
            return;
        }
        let band_cols = self.band_cols(gate, routing.mean_rows());
        let Self { isa, ref mut team, ref mut scratch, .. } = *self;
        let x = scratch.operand(x, Order::Gathered(routing), routing.num_rows(), gate.panels(), isa, team);
        let grid = Grid::column_bands(act.bf16_mut(routing.num_rows()), features, band_cols);
        team.for_each_in_runs(grid, |act| isa.run(GateUp { x, experts, routing, act }));
    }

    fn experts_down(&mut self, act: &Tensor, experts: &Experts, routing: &Routing, out: &mut Tensor) {
        let (down, routing, features) = (&experts.down[0], &routing.routing, out.features());
        if routing.num_rows() == 0 {
            return;
        }
        let band_cols = self.band_cols(down, routing.mean_rows());
        let Self { isa, ref mut team, ref mut scratch, .. } = *self;
        let act = scratch.operand(act, Order::Given, routing.num_rows(), down.panels(), isa, team);
        let grid = Grid::column_bands(out.f32_mut(routing.num_tokens()), features, band_cols);
        team.for_each_in_runs(grid, |out| isa.run(Down { act, experts, routing, out }));
    }

    fn gather_rows(&mut self, x: &Tensor, out: &mut Tensor) {
        assert_eq!(x.features(), out.features());
        let rows = self.batch.logits_indices.len();
        match out.values {
            Values::Bf16(_) => gather_rows(self, x.bf16(), out.bf16_mut(rows)),
            Values::F32(_) => gather_rows(self, x.f32(), out.f32_mut(rows)),
        }
    }

    fn sample(&mut self, logits: &Tensor, rows: &[SampleRow<'_>]) {
        let logits = logits.f32();
        self.sampled.clear();
        self.sampled.resize(rows.len(), Err(NonFiniteLogits));
        let isa = self.isa;
        self.team.for_each(Grid::row_bands(&mut self.sampled, 1, 1), |sampled| {
            isa.run(Sample { logits, rows, sampled });
        });
    }

    fn finish_step(&mut self) -> Result<Vec<Result<Sampled, NonFiniteLogits>>, BackendError> {
        Ok(std::mem::take(&mut self.sampled))
    }

    fn read_routing(&mut self, routing: &Routing) -> backend::Routing {
        routing.routing.clone()
    }

    fn add_expert_loads(&mut self, routing: &Routing, loads: &mut [ExpertLoad]) {
        for (expert, load) in loads.iter_mut().enumerate() {
            let of_step = routing.routing.load(expert);
            let tile_rows = experts::tile_rows(of_step.num_tokens as usize, self.tile_tokens) as u64;
            *load += ExpertLoad { tile_rows, ..of_step };
        }
    }
}

#[cfg(test)]
mod tests {
    use backend::conformance::Quantisation;

    use super::*;

    #[test]
    fn every_instruction_set_conforms_on_any_number_of_threads() {
        for isa in Isa::ALL {
            if !isa.is_available() {
                println!("skipped {}: this machine does not have it", isa.name());
                continue;
            }
            for num_threads in [1, 2, 3] {
                // A product's bits are tested where it is specified; this only tells a product from nonsense, as a
                // SwiGLU multiplies errors of its gate by large values of its other half.
                for (weights, products, kv_cache, attention) in [
                    (WeightFormat::Bf16, 0.0, KvFormat::Bf16, 0.0),
                    (WeightFormat::Q8, 0.2, KvFormat::Q8, 0.02),
                    (WeightFormat::Q4, 1.5, KvFormat::Bf16, 0.0),
                ] {
                    println!("{} on {num_threads} threads, {} weights", isa.name(), weights.name());
                    let options = CpuOptions {
                        num_threads: Some(num_threads),
                        isa: Some(isa),
                        weights: weights.into(),
                        kv_cache,
                    };
                    backend::conformance::check_all_quantised(
                        || Cpu::new(options),
                        Quantisation { products, attention },
                    );
                }
            }
        }
    }
}
