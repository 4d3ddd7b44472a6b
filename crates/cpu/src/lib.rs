//! The CPU backend: bf16 weights read where they lie, f32 accumulation, SIMD chosen at run time, and one
//! thread team that runs each verb as a list of independent tasks.
//!
//! ```text
//! Cpu (the verbs) ──► Team: tasks ──► Isa::run: a Kernel compiled per instruction set ──► dot_rows
//!                      each owns a tile of the result (grid)             linear, experts, attention
//! ```
//!
//! Two decisions shape everything. A task owns a rectangle of its verb's result, so tasks share nothing and
//! need no order. And a number of a result is computed by one fixed chain of operations that depends on its
//! own inputs and the instruction set alone, so a row's bits never depend on the batch, the number of threads
//! or the tile it fell in.
//!
//! This crate knows nothing of models; it does not quantise, and it does not pin threads.

mod attention;
mod dot;
mod elementwise;
mod experts;
mod grid;
mod isa;
mod kv;
mod limits;
mod linear;
mod matrix;
mod numbers;
mod simd;
mod team;
mod tensor;

use backend::sampling::sample_row;
use backend::{
    AttentionShape, Backend, BackendError, Batch, DType, ExpertsView, NonFiniteLogits, RopeTable, RouteShape,
    SampleRow, Sampled, StepShape, WeightView,
};
use half::bf16;

pub use crate::isa::Isa;
pub use crate::kv::KvCache;
pub use crate::matrix::{Experts, Matrix};
pub use crate::tensor::Tensor;

use crate::attention::Attention;
use crate::elementwise::{Add, AddRmsNorm, Embed, GatherRows, RmsNorm};
use crate::experts::{Down, GATE_UP_COLS, GateUp};
use crate::grid::Grid;
use crate::kv::RopeStoreKv;
use crate::linear::Linear;
use crate::numbers::Element;
use crate::team::Team;
use crate::tensor::Values;

/// How to run.
#[derive(Debug, Clone, Copy, Default)]
pub struct CpuOptions {
    /// Threads of the team, the caller's included; `None`: as many as the process may use.
    pub num_threads: Option<usize>,
    /// Instruction set; `None`: the fastest that the machine has.
    pub isa: Option<Isa>,
}

/// The CPU backend.
pub struct Cpu {
    isa: Isa,
    team: Team,
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
        Self { isa, team: Team::new(num_threads), batch: Batch::new(), sampled: Vec::new() }
    }

    /// Columns of a band, so that every thread gets several: at most `max`, a multiple of the dot tile's rows.
    fn band_cols(&self, cols: usize, max: usize) -> usize {
        (cols / (4 * self.team.num_threads())).next_multiple_of(dot::MAX_TILE).clamp(dot::MAX_TILE, max)
    }

    /// Rows of a band, so that every thread gets several, but each band is worth waking a thread for.
    fn band_rows(&self, rows: usize, features: usize) -> usize {
        const MIN_ELEMENTS: usize = 1 << 14;
        rows.div_ceil(4 * self.team.num_threads()).max(MIN_ELEMENTS / features).max(1)
    }
}

/// Computes a linear layer into `rows` rows of `out`.
fn linear<E: Element>(cpu: &mut Cpu, x: &Tensor, weight: &Matrix, out: &mut [E]) {
    let band_cols = cpu.band_cols(weight.rows(), dot::MAX_ROWS);
    let isa = cpu.isa;
    let x = x.bf16();
    cpu.team.for_each(Grid::column_bands(out, weight.rows(), band_cols), |out| {
        isa.run(Linear { x, weight, out });
    });
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
        format!("cpu {}, {threads} thread{}", self.isa.name(), if threads == 1 { "" } else { "s" })
    }

    fn tensor(&mut self, max_rows: usize, features: usize, dtype: DType) -> Result<Tensor, BackendError> {
        Tensor::new(max_rows, features, dtype)
    }

    fn vector(&mut self, view: &WeightView) -> Result<Vec<f32>, BackendError> {
        Ok(view.to_bf16().into_iter().map(bf16::to_f32).collect())
    }

    fn matrix(&mut self, parts: &[WeightView]) -> Result<Matrix, BackendError> {
        Matrix::new(parts, &mut self.team)
    }

    fn experts(&mut self, view: &ExpertsView) -> Result<Experts, BackendError> {
        Experts::new(view, &mut self.team)
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
        KvCache::new(shape, num_blocks, block_size)
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
        let plane_len = kv.plane_len();
        let q = Grid::column_bands(q_out.bf16_mut(positions.len()), shape.q_features(), group_cols);
        let keys = Grid::row_bands(&mut kv.keys, plane_len, 1);
        let values = Grid::row_bands(&mut kv.values, plane_len, 1);
        self.team.for_each((q, (keys, values)), |(q, (keys, values))| {
            isa.run(RopeStoreKv { shape, qkv, rope, positions, slot_mapping, q, keys, values });
        });
    }

    fn attention(&mut self, q: &Tensor, kv: &KvCache, out: &mut Tensor) {
        assert!([q.features(), out.features()] == [kv.shape.q_features(); 2]);
        let (isa, batch, q) = (self.isa, &self.batch, q.bf16());
        let group_cols = kv.group_len() * kv.shape.head_dim;
        // Few tokens are usually decodes, each with a context of its own; many are chunks of prompts.
        let band_rows = if batch.num_tokens() <= 64 { 1 } else { 8 };
        let features = out.features();
        let grid = Grid::new(out.bf16_mut(batch.num_tokens()), features, band_rows, group_cols);
        self.team.for_each(grid, |out| isa.run(Attention { q, kv, batch, out }));
    }

    fn route(&mut self, x: &Tensor, router: Option<&Matrix>, routing: &mut Routing) {
        let num_tokens = self.batch.num_tokens();
        if let Some(router) = router {
            self.linear(x, router, &mut routing.logits, num_tokens);
        }
        let logits = routing.logits.f32();
        routing.routing.clear();
        (0..num_tokens).for_each(|token| routing.routing.push_token(logits.row(token)));
        routing.routing.group_by_expert();
    }

    fn experts_gate_up(&mut self, x: &Tensor, experts: &Experts, routing: &Routing, act: &mut Tensor) {
        let (isa, x, routing, features) = (self.isa, x.bf16(), &routing.routing, act.features());
        let band_cols = self.band_cols(features, GATE_UP_COLS);
        let grid = Grid::column_bands(act.bf16_mut(routing.permutation.len()), features, band_cols);
        self.team.for_each(grid, |act| isa.run(GateUp { x, experts, routing, act }));
    }

    fn experts_down(&mut self, act: &Tensor, experts: &Experts, routing: &Routing, out: &mut Tensor) {
        let (isa, act, routing, features) = (self.isa, act.bf16(), &routing.routing, out.features());
        let band_cols = self.band_cols(features, dot::MAX_ROWS);
        let grid = Grid::column_bands(out.f32_mut(routing.num_tokens()), features, band_cols);
        self.team.for_each(grid, |out| isa.run(Down { act, experts, routing, out }));
    }

    fn gather_rows(&mut self, x: &Tensor, out: &mut Tensor) {
        assert_eq!(x.features(), out.features());
        let (isa, x, indices, features) = (self.isa, x.f32(), &self.batch.logits_indices[..], out.features());
        let band_rows = self.band_rows(indices.len(), features);
        let grid = Grid::row_bands(out.f32_mut(indices.len()), features, band_rows);
        self.team.for_each(grid, |out| isa.run(GatherRows { x, indices, out }));
    }

    fn sample(&mut self, logits: &Tensor, rows: &[SampleRow<'_>]) {
        let logits = logits.f32();
        self.sampled.clear();
        self.sampled.resize(rows.len(), Err(NonFiniteLogits));
        self.team.for_each(Grid::row_bands(&mut self.sampled, 1, 1), |mut sampled| {
            for row in sampled.rows() {
                sampled.row(row)[0] = sample_row(logits.row(row), &rows[row]);
            }
        });
    }

    fn finish_step(&mut self) -> Result<Vec<Result<Sampled, NonFiniteLogits>>, BackendError> {
        Ok(std::mem::take(&mut self.sampled))
    }

    fn read_routing(&mut self, routing: &Routing) -> backend::Routing {
        routing.routing.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_instruction_set_conforms_on_any_number_of_threads() {
        for isa in Isa::ALL {
            if !isa.is_available() {
                println!("skipped {}: this machine does not have it", isa.name());
                continue;
            }
            for num_threads in [1, 2, 3] {
                println!("{} on {num_threads} threads", isa.name());
                let options = CpuOptions { num_threads: Some(num_threads), isa: Some(isa) };
                backend::conformance::check_all(|| Cpu::new(options));
            }
        }
    }
}
