//! The oracle: every verb of [`Backend`] in plain loops, one token and one output at a time, rounding to f32
//! and bf16 where the verbs say so and summing in f64 in between.
//!
//! It is written to be read, not to be fast: no SIMD, no threads, no blocking. It runs a tiny model in tests
//! and is what every other backend is compared with.

use half::bf16;

use crate::sampling::sample_row;
use crate::{
    AttentionShape, Backend, BackendError, Batch, DType, ExpertsView, MatrixUse, NonFiniteLogits, RopeTable,
    RouteShape, Routing, SampleRow, Sampled, StepShape, WeightView,
};

/// Rounds to the nearest bf16, ties to even, and back.
pub fn round_bf16(x: f32) -> f32 {
    bf16::from_f32(x).to_f32()
}

/// The reference backend and the batch of its current step.
#[derive(Debug, Default)]
pub struct Reference {
    batch: Batch,
    sampled: Vec<Result<Sampled, NonFiniteLogits>>,
}

impl Reference {
    /// Makes a backend with no step begun.
    pub fn new() -> Self {
        Self::default()
    }
}

/// Activations; values of a bf16 tensor are f32 numbers that bf16 can represent.
#[derive(Debug)]
pub struct Tensor {
    features: usize,
    dtype: DType,
    values: Vec<f32>,
}

impl Tensor {
    fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.features..][..self.features]
    }

    /// Writes one row, rounded to the tensor's dtype.
    fn set_row(&mut self, row: usize, values: impl IntoIterator<Item = f32>) {
        let rounded = values.into_iter().map(|x| if self.dtype == DType::Bf16 { round_bf16(x) } else { x });
        let out = &mut self.values[row * self.features..][..self.features];
        let written = out.iter_mut().zip(rounded).map(|(out, x)| *out = x).count();
        assert_eq!(written, self.features);
    }
}

/// A matrix `[out, in]`, widened to f32.
#[derive(Debug)]
pub struct Matrix {
    cols: usize,
    values: Vec<f32>,
}

impl Matrix {
    fn new(parts: &[WeightView]) -> Self {
        let cols = parts[0].cols;
        assert!(parts.iter().all(|part| part.cols == cols), "stacked matrices have one width");
        let values = parts.iter().flat_map(WeightView::to_bf16).map(bf16::to_f32).collect();
        Self { cols, values }
    }

    fn rows(&self) -> usize {
        self.values.len() / self.cols
    }

    fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.cols..][..self.cols]
    }

    /// The product `weight · x`, `[out]`.
    fn apply(&self, x: &[f32]) -> impl Iterator<Item = f32> {
        assert_eq!(x.len(), self.cols);
        (0..self.rows()).map(|row| dot(self.row(row), x))
    }
}

/// One layer's experts.
#[derive(Debug)]
pub struct Experts {
    gate: Vec<Matrix>,
    up: Vec<Matrix>,
    down: Vec<Matrix>,
}

/// One layer's cache: keys and values `[slot, kv_heads × head_dim]`, rounded to bf16.
#[derive(Debug)]
pub struct KvCache {
    shape: AttentionShape,
    block_size: usize,
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl KvCache {
    /// Where kv head `head` of `slot` starts in `keys` and in `values`.
    fn offset(&self, slot: usize, head: usize) -> usize {
        slot * self.shape.kv_features() + head * self.shape.head_dim
    }
}

/// Sums in f64, so that the result is the exact product rounded once, whatever the order.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>() as f32
}

fn silu(x: f32) -> f32 {
    x / (1.0 + (-x).exp())
}

impl Backend for Reference {
    type Tensor = Tensor;
    type Vector = Vec<f32>;
    type Matrix = Matrix;
    type Experts = Experts;
    type KvCache = KvCache;
    type Routing = Routing;
    type Rope = RopeTable;

    fn describe(&self) -> String {
        "reference".to_owned()
    }

    fn weight_bits(&self) -> f64 {
        32.0
    }

    fn tensor(&mut self, max_rows: usize, features: usize, dtype: DType) -> Result<Tensor, BackendError> {
        Ok(Tensor { features, dtype, values: vec![0.0; max_rows * features] })
    }

    fn vector(&mut self, view: &WeightView) -> Result<Vec<f32>, BackendError> {
        Ok(view.to_bf16().into_iter().map(bf16::to_f32).collect())
    }

    fn matrix(&mut self, parts: &[WeightView], _: MatrixUse) -> Result<Matrix, BackendError> {
        Ok(Matrix::new(parts))
    }

    fn experts(&mut self, view: &ExpertsView) -> Result<Experts, BackendError> {
        let matrices =
            |views: &[WeightView]| views.iter().map(|v| Matrix::new(std::slice::from_ref(v))).collect();
        Ok(Experts { gate: matrices(&view.gate), up: matrices(&view.up), down: matrices(&view.down) })
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
        let elements = num_blocks * block_size * shape.kv_features();
        Ok(KvCache { shape, block_size, keys: vec![0.0; elements], values: vec![0.0; elements] })
    }

    fn routing(&mut self, max_tokens: usize, shape: RouteShape) -> Result<Routing, BackendError> {
        Ok(Routing::with_capacity(max_tokens, shape.num_experts, shape.top_k))
    }

    fn upload(&mut self, tensor: &mut Tensor, values: &[f32]) {
        for (row, values) in values.chunks_exact(tensor.features).enumerate() {
            tensor.set_row(row, values.iter().copied());
        }
    }

    fn download(&mut self, tensor: &Tensor, rows: usize) -> Vec<f32> {
        tensor.values[..rows * tensor.features].to_vec()
    }

    fn begin_step(&mut self, batch: &Batch) -> Result<StepShape, BackendError> {
        self.batch.clone_from(batch);
        self.sampled.clear();
        Ok(batch.shape())
    }

    fn embed(&mut self, table: &Matrix, out: &mut Tensor) {
        for (row, &token) in self.batch.token_ids.iter().enumerate() {
            out.set_row(row, table.row(token as usize).iter().copied());
        }
    }

    fn add(&mut self, x: &mut Tensor, y: &Tensor, rows: usize) {
        assert_eq!(x.features, y.features);
        let elements = rows * x.features;
        x.values[..elements].iter_mut().zip(&y.values).for_each(|(x, y)| *x += y);
    }

    fn rms_norm(&mut self, x: &Tensor, weight: &Vec<f32>, eps: f32, out: &mut Tensor, rows: usize) {
        for row in 0..rows {
            let x = x.row(row);
            let mean_square = dot(x, x) / x.len() as f32;
            let scale = 1.0 / (mean_square + eps).sqrt();
            out.set_row(row, x.iter().zip(weight).map(|(x, weight)| x * scale * weight));
        }
    }

    fn linear(&mut self, x: &Tensor, weight: &Matrix, out: &mut Tensor, rows: usize) {
        for row in 0..rows {
            out.set_row(row, weight.apply(x.row(row)));
        }
    }

    fn rope_store_kv(&mut self, qkv: &Tensor, rope: &RopeTable, q_out: &mut Tensor, kv: &mut KvCache) {
        let AttentionShape { num_heads, num_kv_heads, head_dim, .. } = kv.shape;
        for (row, &position) in self.batch.positions.iter().enumerate() {
            let rotate = |head: &[f32]| rotate(head, rope, position as usize);
            let heads: Vec<&[f32]> = qkv.row(row).chunks_exact(head_dim).collect();
            let (queries, keys_and_values) = heads.split_at(num_heads);
            let (keys, values) = keys_and_values.split_at(num_kv_heads);

            q_out.set_row(row, queries.iter().flat_map(|head| rotate(head)));
            let start = kv.offset(self.batch.slot_mapping[row] as usize, 0);
            let rotated_keys = keys.iter().flat_map(|head| rotate(head)).map(round_bf16);
            kv.keys[start..].iter_mut().zip(rotated_keys).for_each(|(slot, x)| *slot = x);
            let values = values.iter().flat_map(|head| head.iter().copied()).map(round_bf16);
            kv.values[start..].iter_mut().zip(values).for_each(|(slot, x)| *slot = x);
        }
    }

    fn attention(&mut self, q: &Tensor, kv: &KvCache, out: &mut Tensor) {
        for seq_index in 0..self.batch.num_seqs() {
            let block_table = self.batch.block_table(seq_index);
            for row in self.batch.query_range(seq_index) {
                let position = self.batch.positions[row] as usize;
                let heads = q.row(row).chunks_exact(kv.shape.head_dim).enumerate();
                let attended: Vec<f32> =
                    heads.flat_map(|(head, query)| attend(query, head, position, block_table, kv)).collect();
                out.set_row(row, attended);
            }
        }
    }

    fn route(
        &mut self,
        x: &Tensor,
        router: Option<&Matrix>,
        routing: &mut Routing,
        layer: usize,
        rows: usize,
    ) {
        let logits = |row| match router {
            Some(router) => router.apply(x.row(row)).collect(),
            None => vec![0.0],
        };
        let logits: Vec<Vec<f32>> = (0..rows).map(logits).collect();
        routing.route(logits.iter().map(Vec::as_slice), &self.batch.steering, layer);
    }

    fn experts_gate_up(&mut self, x: &Tensor, experts: &Experts, routing: &Routing, act: &mut Tensor) {
        for expert in 0..routing.num_experts() {
            for row in routing.expert_range(expert) {
                let x = x.row(routing.permutation[row] as usize / routing.width);
                let gate = experts.gate[expert].apply(x);
                let up = experts.up[expert].apply(x);
                act.set_row(row, gate.zip(up).map(|(gate, up)| silu(gate) * up));
            }
        }
    }

    fn experts_down(&mut self, act: &Tensor, experts: &Experts, routing: &Routing, out: &mut Tensor) {
        let elements = routing.num_tokens() * out.features;
        out.values[..elements].fill(0.0);
        for expert in 0..routing.num_experts() {
            for row in routing.expert_range(expert) {
                let assignment = routing.permutation[row] as usize;
                let weight = routing.topk_weights[assignment];
                let token_row = assignment / routing.width * out.features;
                let down = experts.down[expert].apply(act.row(row));
                out.values[token_row..].iter_mut().zip(down).for_each(|(out, x)| *out += weight * x);
            }
        }
    }

    fn gather_rows(&mut self, x: &Tensor, out: &mut Tensor) {
        for (row, &index) in self.batch.logits_indices.iter().enumerate() {
            out.set_row(row, x.row(index as usize).iter().copied());
        }
    }

    fn sample(&mut self, logits: &Tensor, rows: &[SampleRow<'_>]) {
        self.sampled = rows.iter().enumerate().map(|(i, row)| sample_row(logits.row(i), row)).collect();
    }

    fn finish_step(&mut self) -> Result<Vec<Result<Sampled, NonFiniteLogits>>, BackendError> {
        Ok(std::mem::take(&mut self.sampled))
    }

    fn read_routing(&mut self, routing: &Routing) -> Routing {
        routing.clone()
    }
}

/// Turns one head `[head_dim]` by its position's angles.
fn rotate(head: &[f32], rope: &RopeTable, position: usize) -> Vec<f32> {
    let half = rope.half_dim;
    let angles = position * half..(position + 1) * half;
    let (cos, sin) = (&rope.cos[angles.clone()], &rope.sin[angles]);
    let (first, second) = head.split_at(half);
    let turned_first = (0..half).map(|i| first[i] * cos[i] - second[i] * sin[i]);
    let turned_second = (0..half).map(|i| second[i] * cos[i] + first[i] * sin[i]);
    turned_first.chain(turned_second).collect()
}

/// One query head over the positions it may see, `[head_dim]`.
fn attend(query: &[f32], head: usize, position: usize, block_table: &[u32], kv: &KvCache) -> Vec<f32> {
    let shape = &kv.shape;
    let kv_head = head / (shape.num_heads / shape.num_kv_heads);
    let window = shape.sliding_window.map_or(usize::MAX, |window| window as usize);
    let visible = (position + 1).saturating_sub(window)..position + 1;
    let offsets: Vec<usize> = visible
        .map(|p| block_table[p / kv.block_size] as usize * kv.block_size + p % kv.block_size)
        .map(|slot| kv.offset(slot, kv_head))
        .collect();

    let scale = 1.0 / (shape.head_dim as f32).sqrt();
    let scores: Vec<f32> =
        offsets.iter().map(|&offset| dot(query, &kv.keys[offset..][..shape.head_dim]) * scale).collect();
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f64> = scores.iter().map(|score| f64::from(score - max).exp()).collect();
    let sum: f64 = weights.iter().sum();

    let mut out = vec![0.0; shape.head_dim];
    for (&offset, weight) in offsets.iter().zip(&weights) {
        let value = &kv.values[offset..][..shape.head_dim];
        out.iter_mut().zip(value).for_each(|(out, &x)| *out += weight / sum * f64::from(x));
    }
    out.into_iter().map(|x| x as f32).collect()
}
