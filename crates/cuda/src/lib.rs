//! The CUDA backend: the verbs of [`Backend`] as launches of the kernels in `kernels/`, through cudarc.
//!
//! [`probe`] says whether there is a device, without ever panicking; [`Cuda::new`] opens it. Everything runs on one
//! stream. What a layer needs beside its tensors (rows in the order of their experts, partial results of attention) is
//! the backend's own, made when handles are, so that no verb allocates.
//!
//! What is deliberately not here: Mixtral, policy, and any kernel; those are in `kernels/`, each a file with its reasons.

mod attention;
mod device;
mod graphs;
mod images;
mod kernels;
mod probe;
mod products;
mod quantized;
mod sample;
mod step;
mod tensor;
mod weights;

use std::path::PathBuf;

use backend::{
    AttentionShape, Backend, BackendError, Batch, DType, ExpertLoad, ExpertsView, LayerChoices, MatrixUse,
    NonFiniteLogits, RopeTable, RouteShape, SampleRow, Sampled, StepShape, WeightView,
};
use cudarc::driver::CudaEvent;
use half::bf16;

use crate::attention::{MAX_PARTIALS, Plan, PlanShape};
use crate::device::{Buffer, Device, Grid};
use crate::graphs::{Graphs, RecordedShape};
use crate::kernels::{AttentionArguments, Epilogue, KvArguments, NormShape, RouteArguments, RoutingTables};
use crate::products::{Rows, multiply, tile_rows};
use crate::quantized::{QuantizedRows, Source};
use crate::sample::Sampler;
use crate::step::StepBuffers;
use crate::tensor::{element_bytes, stride, stride_e4m3};
use crate::weights::Uploader;

pub use crate::images::{KernelOrigin, embedded_targets, nvrtc_version};
pub use crate::probe::{Capability, DeviceInfo, NoDevice, devices, driver_version, probe, probe_or_skip};
pub use crate::tensor::{Experts, KvCache, KvFormat, Matrix, Rope, Routing, Tensor, Vector};
pub use crate::weights::WeightFormat;

/// Features of the widest head that attention is compiled for.
const MAX_HEAD: usize = 128;
/// Most experts and most experts per token that `route.cu` and `combine_experts.cu` have shared memory for.
const MAX_EXPERTS: usize = 256;
const MAX_TOP_K: usize = 64;
/// Numbers that the offsets of all layers' experts may take: 128 layers of 256 experts twice over.
const MAX_COUNTS: usize = 1 << 16;
/// Sweeps over memory, of which the fastest counts.
const SWEEPS: usize = 5;
/// A window that no context reaches.
const NO_WINDOW: u32 = 1 << 30;

/// What the owner of the device decides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CudaOptions {
    /// How the weights of products are kept.
    pub weights: WeightFormat,
    /// How keys and values are kept.
    pub kv_cache: KvFormat,
    /// Whether steps that only decode are recorded as CUDA graphs and replayed. No bit depends on it.
    pub graphs: bool,
    /// Whether a kernel may start while the one before it still runs, where the device can. No bit depends on it.
    pub dependent_launches: bool,
    /// Where kernels are kept that are not in the binary and were compiled for this device.
    pub kernel_cache: Option<PathBuf>,
}

impl Default for CudaOptions {
    fn default() -> Self {
        Self {
            weights: WeightFormat::Bf16,
            kv_cache: KvFormat::Bf16,
            graphs: true,
            dependent_launches: true,
            kernel_cache: None,
        }
    }
}

/// The CUDA backend.
pub struct Cuda {
    info: DeviceInfo,
    device: Device,
    uploader: Uploader,
    step: StepBuffers,
    plan: Plan,
    plan_shape: Option<PlanShape>,
    /// `None` if every step is launched kernel by kernel.
    graphs: Option<Graphs>,
    partials: Option<Partials>,
    experts_scratch: ExpertsScratch,
    /// What products with e4m3 weights take; nothing is reserved for others.
    quantized: QuantizedRows,
    weights: WeightFormat,
    kv_format: KvFormat,
    /// Where experts' rows begin, and what their gate weights sum to: of all layers, so that a step reads them at once.
    counts: Buffer,
    num_counts: usize,
    host_counts: Vec<u32>,
    batch_logits: usize,
    /// Most experts that a token of the step visits in a layer, if some are steered; else 0.
    steered_width: usize,
    sampler: Sampler,
    /// Where the step begins and ends on the device, and what lay between.
    timer: [CudaEvent; 2],
    device_seconds: Option<f64>,
    /// What kept a verb from being launched, until the step is finished.
    failure: Option<BackendError>,
}

/// Maxima and sums, and outputs, of chunks of attention.
struct Partials {
    softmax: Buffer,
    output: Buffer,
}

/// What experts compute from and into, rows in the order of their experts.
#[derive(Default)]
struct ExpertsScratch {
    max_rows: usize,
    hidden: usize,
    /// bf16 `[max_rows, stride]`: the layer's input, unless it is quantised.
    permuted: Option<Buffer>,
    /// f32 `[max_rows, stride]`: the layer's output before it is weighted.
    products: Option<Buffer>,
}

impl ExpertsScratch {
    fn products(&self) -> u64 {
        self.products.as_ref().expect("experts and routing were made").address
    }
}

impl Cuda {
    /// Opens a device.
    ///
    /// # Errors
    /// [`BackendError::Device`] if it fails, [`BackendError::Unsupported`] if it does not have the formats.
    ///
    /// # Panics
    /// If `info` did not come from [`probe`].
    pub fn new(info: DeviceInfo, options: CudaOptions) -> Result<Self, BackendError> {
        if options.weights == WeightFormat::E4m3 && !info.capability.has_e4m3() {
            return Err(BackendError::Unsupported(format!("{} does not multiply fp8", info.name)));
        }
        if options.kv_cache == KvFormat::E4m3 && !info.capability.has_e4m3() {
            return Err(BackendError::Unsupported(format!("{} does not convert fp8", info.name)));
        }
        let mut device = Device::open(&info, &options)?;
        let counts = device.allocate("offsets of experts", MAX_COUNTS * size_of::<u32>())?;
        Ok(Self {
            info,
            timer: device.timer()?,
            device_seconds: None,
            device,
            uploader: Uploader::new(options.weights),
            step: StepBuffers::default(),
            plan: Plan::default(),
            plan_shape: None,
            graphs: options.graphs.then(Graphs::default),
            partials: None,
            experts_scratch: ExpertsScratch::default(),
            quantized: QuantizedRows::default(),
            weights: options.weights,
            kv_format: options.kv_cache,
            counts,
            num_counts: 0,
            host_counts: Vec::new(),
            batch_logits: 0,
            steered_width: 0,
            sampler: Sampler::default(),
            failure: None,
        })
    }

    /// Memory that the backend takes beside its handles, for steps of `max_tokens` tokens.
    pub fn scratch_bytes(
        weights: WeightFormat,
        max_tokens: usize,
        hidden: usize,
        ffn: usize,
        route: RouteShape,
    ) -> u64 {
        // Inputs of experts in their order, or the widest of what is quantised: the inputs of their last product.
        let input_bytes = match weights {
            WeightFormat::Bf16 => stride(hidden) * element_bytes(DType::Bf16),
            WeightFormat::E4m3 => stride_e4m3(hidden.max(ffn)) + element_bytes(DType::F32),
        };
        let row_bytes = input_bytes + stride(hidden) * element_bytes(DType::F32);
        let partials = MAX_PARTIALS * (MAX_HEAD + 2) * size_of::<f32>();
        (max_tokens * route.top_k * row_bytes + partials + weights::STAGING_BYTES) as u64
    }

    /// Memory of the device that nothing has taken yet.
    ///
    /// # Errors
    /// If the device failed.
    pub fn free_bytes(&self) -> Result<u64, BackendError> {
        self.device.free_bytes()
    }

    /// Bytes per second that the device reads, the best of a few sweeps over `num_bytes` of memory.
    ///
    /// # Errors
    /// If there is not so much memory, or the device failed.
    pub fn read_bandwidth(&mut self, num_bytes: usize) -> Result<f64, BackendError> {
        let memory = self.device.allocate("memory to be read", num_bytes)?;
        let blocks = 8 * self.device.num_multiprocessors as usize;
        let sums = self.device.allocate("sums of what was read", blocks * size_of::<f32>())?;
        let quads = (num_bytes / 16) as i64;
        let sweep = |device: &mut Device| {
            device.launch("read_sweep", Grid::new(blocks, 256), &[&memory.address, &quads, &sums.address]);
        };
        let seconds: Vec<f64> = (0..SWEEPS).map_while(|_| self.device.seconds(sweep)).collect();
        self.device.check()?;
        Ok(num_bytes as f64 / seconds.into_iter().fold(f64::INFINITY, f64::min))
    }

    /// Steps that were replayed from a recording.
    pub fn num_replays(&self) -> u64 {
        self.graphs.as_ref().map_or(0, Graphs::num_replays)
    }

    /// What a recording of this step would depend on; `None` if it is not worth one, as a step with prompts in it, whose
    /// launches are long enough and whose shape will hardly come back.
    fn recorded_shape(&self, shape: StepShape) -> Option<RecordedShape> {
        let is_steered = shape.steered_experts_per_token > 0;
        let decodes = shape.num_tokens == shape.num_logits && shape.num_tokens > 0 && !is_steered;
        (self.graphs.is_some() && decodes).then(|| RecordedShape {
            num_tokens: shape.num_tokens,
            num_decode_items: self.plan.decode_items.len(),
            num_prefill_items: self.plan.prefill_items.len(),
            num_folds: self.plan.folds.len(),
            step_address: self.step.sections().token_ids,
        })
    }

    /// Makes room for so many rows of experts of so many features, as soon as both are known.
    fn reserve_experts(&mut self, max_rows: usize, hidden: usize) -> Result<(), BackendError> {
        let scratch = &mut self.experts_scratch;
        let grows = max_rows > scratch.max_rows || hidden > scratch.hidden;
        (scratch.max_rows, scratch.hidden) = (scratch.max_rows.max(max_rows), scratch.hidden.max(hidden));
        let (max_rows, hidden) = (scratch.max_rows, scratch.hidden);
        if !grows || max_rows == 0 || hidden == 0 {
            return Ok(());
        }
        let what = "rows in the order of their experts";
        let bytes = |dtype| max_rows * stride(hidden) * element_bytes(dtype);
        match self.weights {
            WeightFormat::Bf16 => scratch.permuted = Some(self.device.allocate(what, bytes(DType::Bf16))?),
            WeightFormat::E4m3 => self.quantized.reserve(&mut self.device, max_rows, hidden)?,
        }
        scratch.products = Some(self.device.allocate(what, bytes(DType::F32))?);
        Ok(())
    }

    /// The first rows of a tensor as a product with `weight` takes them.
    fn right_operand(&mut self, weight: &Matrix, x: &Tensor, num_rows: usize) -> Rows {
        let address = x.rows(num_rows, DType::Bf16);
        if weight.scales.is_none() {
            return Rows::bf16(address, x.max_rows);
        }
        let source = Source { x: address, features: x.features, stride: x.stride, indices: None };
        Rows::quantized(self.quantized.launch(&mut self.device, source, num_rows))
    }

    /// The rows of a tensor's tokens in the order of their experts.
    fn grouped_operand(&mut self, weight: &Matrix, x: &Tensor, routing: &Routing) -> Rows {
        let (from, permutation) = (x.rows(routing.num_tokens, DType::Bf16), routing.table(2));
        if weight.scales.is_some() {
            let indices = Some((permutation, routing.width));
            let source = Source { x: from, features: x.features, stride: x.stride, indices };
            return Rows::quantized(self.quantized.launch(&mut self.device, source, routing.num_rows()));
        }
        let permuted = self.experts_scratch.permuted.as_ref().expect("experts and routing were made").address;
        let (divisor, row_quads) = (routing.width as i32, (x.stride * size_of::<bf16>() / 16) as i32);
        let gather = Grid::over_rows(&self.device, routing.num_rows(), row_quads as usize, 128);
        self.device.launch("gather_rows", gather, &[&from, &permutation, &divisor, &permuted, &row_quads]);
        Rows::bf16(permuted, self.experts_scratch.max_rows)
    }

    fn norm_shape(weight: &Vector, x: &Tensor, out: &Tensor, eps: f32) -> (NormShape, u32) {
        assert_eq!((x.features, out.features), (weight.features, weight.features));
        let shape = NormShape { features: x.features as i32, stride: x.stride as i32, eps };
        (shape, (x.stride * size_of::<f32>()) as u32)
    }

    /// The experts and weights of all tokens of a layer.
    fn read_layer(&mut self, routing: &Routing) -> LayerChoices {
        let num_entries = self.num_rows_read(routing);
        let width = if self.steered_width == 0 { routing.top_k } else { routing.width };
        let (mut ids, mut weights) = (vec![0; num_entries], vec![0.0; num_entries]);
        self.device.read(&routing.tables, 0, &mut ids);
        self.device.read(&routing.tables, routing.table_bytes(), &mut weights);
        LayerChoices { width, ids, weights }
    }

    /// Rows of the layer's products in the step just finished. The handle knows its tokens only if the step was not a
    /// replay; a replayed step has no empty entries.
    fn num_rows_read(&self, routing: &Routing) -> usize {
        match self.steered_width {
            0 => self.host_counts[routing.first_count + routing.num_experts] as usize,
            _ => routing.num_rows(),
        }
    }

    fn offsets_of(&self, routing: &Routing) -> u64 {
        self.counts.address + (routing.first_count * size_of::<u32>()) as u64
    }
}

impl Backend for Cuda {
    type Tensor = Tensor;
    type Vector = Vector;
    type Matrix = Matrix;
    type Experts = Experts;
    type KvCache = KvCache;
    type Routing = Routing;
    type Rope = Rope;

    fn describe(&self) -> String {
        let Capability { major, minor } = self.info.capability;
        let cache = match self.kv_format {
            KvFormat::Bf16 => "",
            KvFormat::E4m3 => ", keys and values in fp8",
        };
        format!("cuda {}, compute capability {major}.{minor}{cache}", self.info.name)
    }

    fn weight_bits(&self) -> f64 {
        self.weights.bits()
    }

    fn tensor(&mut self, max_rows: usize, features: usize, dtype: DType) -> Result<Tensor, BackendError> {
        let stride = stride(features);
        let buffer = self.device.allocate("activations", max_rows * stride * element_bytes(dtype))?;
        if dtype == DType::Bf16 && self.weights == WeightFormat::E4m3 {
            self.quantized.reserve(&mut self.device, max_rows, features)?;
        }
        Ok(Tensor { buffer, max_rows, features, stride, dtype })
    }

    fn vector(&mut self, view: &WeightView) -> Result<Vector, BackendError> {
        let values: Vec<f32> = view.to_bf16().into_iter().map(bf16::to_f32).collect();
        let buffer = self.device.allocate("a norm", stride(values.len()) * size_of::<f32>())?;
        self.device.write(&buffer, 0, &values);
        self.device.check()?;
        Ok(Vector { buffer, features: values.len() })
    }

    fn matrix(&mut self, parts: &[WeightView], usage: MatrixUse) -> Result<Matrix, BackendError> {
        self.uploader.matrix(&mut self.device, parts, usage)
    }

    fn experts(&mut self, view: &ExpertsView) -> Result<Experts, BackendError> {
        let gate_up = self.uploader.gate_up(&mut self.device, &view.gate, &view.up)?;
        let down = self.uploader.down(&mut self.device, &view.down)?;
        self.reserve_experts(0, gate_up.cols)?;
        Ok(Experts { gate_up, down })
    }

    fn rope(&mut self, table: &RopeTable) -> Result<Rope, BackendError> {
        let mut upload = |values: &[f32]| {
            let buffer = self.device.allocate("the angles of positions", size_of_val(values))?;
            self.device.write(&buffer, 0, values);
            self.device.check()?;
            Ok(buffer)
        };
        Ok(Rope { cos: upload(&table.cos)?, sin: upload(&table.sin)?, half_dim: table.half_dim })
    }

    fn kv_cache(
        &mut self,
        shape: AttentionShape,
        num_blocks: usize,
        block_size: usize,
    ) -> Result<KvCache, BackendError> {
        let format = self.kv_format;
        let mut widths = kernels::attention(format, self.device.has_wgmma).iter();
        let kernels = widths.find(|kernels| kernels.head_stride >= shape.head_dim).ok_or_else(|| {
            BackendError::Unsupported(format!("heads of {} features, 128 at most", shape.head_dim))
        })?;
        let head_stride = kernels.head_stride;
        let group = shape.num_heads / shape.num_kv_heads;
        let (decode_rows, prefill_rows) = (kernels.decode.rows, kernels.prefill.rows);
        if group > prefill_rows {
            return Err(BackendError::Unsupported(format!(
                "{group} query heads for each kv head, {prefill_rows} at most"
            )));
        }
        if self
            .partials
            .as_ref()
            .is_none_or(|partials| partials.output.num_bytes() < MAX_PARTIALS * head_stride * 4)
        {
            let mut allocate =
                |width| self.device.allocate("partial results of attention", MAX_PARTIALS * width * 4);
            self.partials = Some(Partials { softmax: allocate(2)?, output: allocate(head_stride)? });
        }
        self.plan_shape = Some(PlanShape {
            num_heads: shape.num_heads,
            num_kv_heads: shape.num_kv_heads,
            decode_rows,
            prefill_rows,
            enough_blocks: self.device.num_multiprocessors as usize,
        });
        let num_rows = num_blocks * 2 * shape.num_kv_heads * block_size;
        let num_bytes = num_rows * (format.row_bytes(head_stride) + format.scale_bytes());
        Ok(KvCache {
            buffer: self.device.allocate("the cache of keys and values", num_bytes)?,
            num_rows,
            format,
            kv: KvArguments {
                num_heads: shape.num_heads as i32,
                num_kv_heads: shape.num_kv_heads as i32,
                head_dim: shape.head_dim as i32,
                head_stride: head_stride as i32,
                block_size: block_size as i32,
            },
            window: shape.sliding_window.map_or(NO_WINDOW, |window| window.min(NO_WINDOW)) as i32,
            scale: std::f32::consts::LOG2_E / (shape.head_dim as f32).sqrt(),
            kernels,
        })
    }

    fn routing(&mut self, max_tokens: usize, shape: RouteShape) -> Result<Routing, BackendError> {
        let RouteShape { num_experts, top_k } = shape;
        if num_experts > MAX_EXPERTS || top_k > MAX_TOP_K {
            let limits = format!("{MAX_EXPERTS} and {MAX_TOP_K} at most");
            return Err(BackendError::Unsupported(format!(
                "{num_experts} experts, {top_k} per token: {limits}"
            )));
        }
        let first_count = self.num_counts;
        self.num_counts += 2 * num_experts + 1;
        if self.num_counts > MAX_COUNTS {
            return Err(BackendError::Unsupported(format!(
                "{} or more experts in all layers together",
                MAX_COUNTS / 2
            )));
        }
        self.reserve_experts(max_tokens * top_k, 0)?;
        let tables = self.device.allocate("routing", (4 * max_tokens * top_k + 1) * size_of::<u32>())?;
        Ok(Routing { tables, max_tokens, num_experts, top_k, first_count, num_tokens: 0, width: top_k })
    }

    fn upload(&mut self, tensor: &mut Tensor, values: &[f32]) {
        let rows = values.chunks_exact(tensor.features);
        assert!(rows.len() <= tensor.max_rows);
        for (row, values) in rows.enumerate() {
            let first_byte = row * tensor.stride * tensor.element_bytes();
            match tensor.dtype {
                DType::F32 => self.device.write(&tensor.buffer, first_byte, values),
                DType::Bf16 => {
                    let rounded: Vec<bf16> = values.iter().map(|&x| bf16::from_f32(x)).collect();
                    self.device.write(&tensor.buffer, first_byte, &rounded);
                }
            }
        }
    }

    fn download(&mut self, tensor: &Tensor, rows: usize) -> Vec<f32> {
        let elements = rows * tensor.stride;
        let padded = match tensor.dtype {
            DType::F32 => {
                let mut values = vec![0.0; elements];
                self.device.read(&tensor.buffer, 0, &mut values);
                values
            }
            DType::Bf16 => {
                let mut values = vec![bf16::ZERO; elements];
                self.device.read(&tensor.buffer, 0, &mut values);
                values.into_iter().map(bf16::to_f32).collect()
            }
        };
        padded.chunks_exact(tensor.stride).flat_map(|row| &row[..tensor.features]).copied().collect()
    }

    fn begin_step(&mut self, batch: &Batch) -> Result<StepShape, BackendError> {
        match &self.plan_shape {
            Some(shape) => self.plan.make(shape, batch),
            None => self.plan = Plan::default(),
        }
        self.batch_logits = batch.logits_indices.len();
        self.steered_width = batch.steering.experts_per_token;
        self.device.mark(&self.timer[0]);
        self.step.write(&mut self.device, batch, &self.plan)?;
        Ok(batch.shape())
    }

    fn run(&mut self, shape: StepShape, mut forward: impl FnMut(&mut Self, StepShape)) {
        let Some(recorded) = self.recorded_shape(shape) else { return forward(self, shape) };
        let graphs = self.graphs.as_mut().expect("there is a shape only if steps are recorded");
        if graphs.replay(&mut self.device, &recorded) {
            return;
        }
        if !graphs.is_due(&recorded) {
            return forward(self, shape);
        }
        self.device.begin_recording();
        forward(self, shape);
        if let (Some(graph), Some(graphs)) = (self.device.end_recording(), &mut self.graphs) {
            graphs.insert(recorded, graph);
            graphs.replay(&mut self.device, &recorded);
        }
    }

    fn embed(&mut self, table: &Matrix, out: &mut Tensor) {
        let rows = self.step.num_tokens();
        let to = out.rows(rows, DType::F32);
        let [features, table_stride, out_stride] = [table.cols, table.stride, out.stride].map(|n| n as i32);
        let ids = self.step.sections().token_ids;
        let arguments: [&dyn kernels::Argument; 6] =
            [&ids, &table.buffer.address, &to, &features, &table_stride, &out_stride];
        let grid = Grid::over_rows(&self.device, rows, table.stride / 8, 256);
        self.device.launch("embed", grid, &arguments);
    }

    fn add(&mut self, x: &mut Tensor, y: &Tensor, rows: usize) {
        assert_eq!(x.features, y.features);
        let quads = rows * x.stride / 4;
        let (to, from) = (x.rows(rows, DType::F32), y.rows(rows, DType::F32));
        self.device.launch("add", Grid::new(quads.div_ceil(256), 256), &[&to, &from, &(quads as i64)]);
    }

    fn rms_norm(&mut self, x: &Tensor, weight: &Vector, eps: f32, out: &mut Tensor, rows: usize) {
        let (shape, shared_bytes) = Self::norm_shape(weight, x, out, eps);
        let (from, to) = (x.rows(rows, DType::F32), out.rows(rows, DType::Bf16));
        let grid = Grid { shared_bytes, ..Grid::new(rows, 256) };
        self.device.launch("rms_norm", grid, &[&from, &weight.buffer.address, &to, &shape]);
    }

    fn add_rms_norm(
        &mut self,
        residual: &mut Tensor,
        delta: &Tensor,
        weight: &Vector,
        eps: f32,
        out: &mut Tensor,
        rows: usize,
    ) {
        assert_eq!(residual.features, delta.features);
        let (shape, shared_bytes) = Self::norm_shape(weight, residual, out, eps);
        let (sum, delta) = (residual.rows(rows, DType::F32), delta.rows(rows, DType::F32));
        let to = out.rows(rows, DType::Bf16);
        let grid = Grid { shared_bytes, ..Grid::new(rows, 256) };
        self.device.launch("add_rms_norm", grid, &[&sum, &delta, &weight.buffer.address, &to, &shape]);
    }

    fn linear(&mut self, x: &Tensor, weight: &Matrix, out: &mut Tensor, rows: usize) {
        assert_eq!((x.features, out.features), (weight.cols, weight.features));
        let epilogue = if out.dtype == DType::F32 { Epilogue::F32 } else { Epilogue::Bf16 };
        let right = self.right_operand(weight, x, rows);
        let rows = Rows {
            num_rows: rows,
            offsets: None,
            out: out.rows(rows, out.dtype),
            out_stride: out.stride,
            ..right
        };
        multiply(&mut self.device, weight, rows, epilogue);
    }

    fn rope_store_kv(&mut self, qkv: &Tensor, rope: &Rope, q_out: &mut Tensor, kv: &mut KvCache) {
        let (rows, sections) = (self.step.num_tokens(), self.step.sections());
        assert_eq!(2 * rope.half_dim, kv.kv.head_dim as usize);
        let (from, to) = (qkv.rows(rows, DType::F32), q_out.rows(rows, DType::Bf16));
        let [qkv_stride, q_stride] = [qkv.stride, q_out.stride].map(|n| n as i32);
        let arguments: [&dyn kernels::Argument; 10] = [
            &from,
            &qkv_stride,
            &rope.cos.address,
            &rope.sin.address,
            &sections.positions,
            &sections.slots,
            &to,
            &q_stride,
            &kv.addresses(),
            &kv.kv,
        ];
        // A warp has a head.
        let num_lanes = 32 * (kv.kv.num_heads + 2 * kv.kv.num_kv_heads) as usize;
        let grid = Grid::over_rows(&self.device, rows, num_lanes, 256);
        self.device.launch(kv.kernels.rope_store_kv, grid, &arguments);
    }

    fn attention(&mut self, q: &Tensor, kv: &KvCache, out: &mut Tensor) {
        let (rows, sections) = (self.step.num_tokens(), self.step.sections());
        let shape = AttentionArguments {
            kv: kv.kv,
            q_stride: q.stride as i32,
            out_stride: out.stride as i32,
            window: kv.window,
            scale: kv.scale,
        };
        let planned = self.plan_shape.as_ref().map(|shape| (shape.num_heads, shape.num_kv_heads));
        assert_eq!(
            planned,
            Some((kv.kv.num_heads as usize, kv.kv.num_kv_heads as usize)),
            "one shape per model"
        );
        let partials = self.partials.as_ref().expect("a cache was made");
        let (from, to) = (q.rows(rows, DType::Bf16), out.rows(rows, DType::Bf16));
        let (softmax, output) = (partials.softmax.address, partials.output.address);
        let cache = kv.addresses();
        for (kernel, items, num_items) in [
            (kv.kernels.decode, sections.decode_items, self.plan.decode_items.len()),
            (kv.kernels.prefill, sections.prefill_items, self.plan.prefill_items.len()),
        ] {
            let blocks = [num_items, kv.kv.num_kv_heads as usize];
            let grid = Grid { blocks, threads: kernel.threads, shared_bytes: kernel.shared_bytes };
            let arguments: [&dyn kernels::Argument; 8] =
                [&from, &cache, &sections.block_tables, &items, &shape, &to, &softmax, &output];
            self.device.launch(kernel.name, grid, &arguments);
        }
        let folds =
            Grid { blocks: [self.plan.folds.len(), kv.kv.num_heads as usize], threads: 128, shared_bytes: 0 };
        self.device.launch("attention_fold", folds, &[&sections.folds, &softmax, &output, &shape, &to]);
    }

    fn route(
        &mut self,
        x: &Tensor,
        router: Option<&Matrix>,
        routing: &mut Routing,
        layer: usize,
        rows: usize,
    ) {
        routing.num_tokens = rows;
        routing.width = self.steered_width.max(routing.top_k);
        assert!(routing.num_rows() <= routing.max_tokens * routing.top_k);
        let expert_offsets = self.offsets_of(routing);
        let tables = RoutingTables {
            topk_ids: routing.table(0),
            topk_weights: routing.table(1),
            expert_offsets,
            gate_sums: expert_offsets + ((routing.num_experts + 1) * size_of::<u32>()) as u64,
            permutation: routing.table(2),
            rows: routing.table(3),
            finished_blocks: routing.table(4),
        };
        let shape = RouteArguments {
            num_tokens: rows as i32,
            num_experts: routing.num_experts as i32,
            top_k: routing.top_k as i32,
            width: routing.width as i32,
            stride: x.stride as i32,
        };
        let (from, router) = (x.rows(rows, DType::Bf16), router.map_or(0, |router| router.buffer.address));
        let steering = self.step.steering(layer);
        let arguments: [&dyn kernels::Argument; 5] = [&from, &router, &tables, &shape, &steering];
        // Without tokens a block is still needed, to say that no expert has any.
        self.device.launch("route", Grid::new(rows.max(1), 256), &arguments);
    }

    fn experts_gate_up(&mut self, x: &Tensor, experts: &Experts, routing: &Routing, act: &mut Tensor) {
        let (gate_up, num_rows) = (&experts.gate_up, routing.num_rows());
        assert_eq!((x.features, act.features), (gate_up.cols, gate_up.features));
        let right = self.grouped_operand(gate_up, x, routing);
        let rows = Rows {
            num_rows,
            offsets: Some(self.offsets_of(routing)),
            out: act.rows(num_rows, DType::Bf16),
            out_stride: act.stride,
            ..right
        };
        multiply(&mut self.device, gate_up, rows, Epilogue::Swiglu);
    }

    fn experts_down(&mut self, act: &Tensor, experts: &Experts, routing: &Routing, out: &mut Tensor) {
        let (down, num_rows) = (&experts.down, routing.num_rows());
        assert_eq!((act.features, out.features), (down.cols, down.features));
        let right = self.right_operand(down, act, num_rows);
        let products = self.experts_scratch.products();
        let rows = Rows {
            num_rows,
            offsets: Some(self.offsets_of(routing)),
            out: products,
            out_stride: out.stride,
            ..right
        };
        multiply(&mut self.device, down, rows, Epilogue::F32);
        let (to, width) = (out.rows(routing.num_tokens, DType::F32), routing.width as i32);
        let row_quads = (out.stride / 4) as i32;
        let arguments: [&dyn kernels::Argument; 6] =
            [&products, &routing.table(3), &routing.table(1), &width, &to, &row_quads];
        let grid = Grid::over_rows(&self.device, routing.num_tokens, row_quads as usize, 256);
        self.device.launch("combine_experts", grid, &arguments);
    }

    fn gather_rows(&mut self, x: &Tensor, out: &mut Tensor) {
        assert_eq!((x.features, x.dtype), (out.features, out.dtype));
        let (indices, divisor) = (self.step.sections().logits_indices, 1);
        let (from, to) = (x.rows(self.step.num_tokens(), x.dtype), out.rows(self.batch_logits, x.dtype));
        let row_quads = (x.stride * x.element_bytes() / 16) as i32;
        let grid = Grid::over_rows(&self.device, self.batch_logits, row_quads as usize, 128);
        self.device.launch("gather_rows", grid, &[&from, &indices, &divisor, &to, &row_quads]);
    }

    fn sample(&mut self, logits: &Tensor, rows: &[SampleRow<'_>]) {
        assert_eq!(rows.len(), self.batch_logits);
        let launched = self.sampler.launch(&mut self.device, logits, rows);
        self.failure = launched.err();
    }

    fn finish_step(&mut self) -> Result<Vec<Result<Sampled, NonFiniteLogits>>, BackendError> {
        self.device.mark(&self.timer[1]);
        let sampled = self.sampler.read(&mut self.device);
        self.host_counts.resize(self.num_counts, 0);
        self.device.read(&self.counts, 0, &mut self.host_counts);
        self.device_seconds = self.device.seconds_between(&self.timer);
        self.device.check()?;
        self.failure.take().map_or(Ok(sampled), Err)
    }

    fn device_seconds(&self) -> Option<f64> {
        self.device_seconds
    }

    fn read_routing(&mut self, routing: &Routing) -> backend::Routing {
        let expert_offsets = self.host_counts[routing.first_count..][..=routing.num_experts].to_vec();
        let mut permutation = vec![0; expert_offsets[routing.num_experts] as usize];
        self.device.read(&routing.tables, 2 * routing.table_bytes(), &mut permutation);
        let LayerChoices { width, ids, weights } = self.read_layer(routing);
        let (topk_ids, topk_weights, top_k) = (ids, weights, routing.top_k);
        backend::Routing { top_k, width, topk_ids, topk_weights, expert_offsets, permutation }
    }

    fn read_choices(&mut self, routings: &[Routing]) -> Vec<LayerChoices> {
        routings.iter().map(|routing| self.read_layer(routing)).collect()
    }

    fn add_expert_loads(&mut self, routing: &Routing, loads: &mut [ExpertLoad]) {
        let counts = &self.host_counts[routing.first_count..][..2 * routing.num_experts + 1];
        let (offsets, gate_sums) = counts.split_at(routing.num_experts + 1);
        let num_rows = self.num_rows_read(routing);
        let num_tokens = offsets.windows(2).map(|ends| ends[1] - ends[0]);
        let tile_rows = tile_rows(&self.device, num_rows, num_tokens.clone());
        for (((load, num_tokens), tile_rows), &gate_sum) in
            loads.iter_mut().zip(num_tokens).zip(tile_rows).zip(gate_sums)
        {
            let gate_weight = f64::from(f32::from_bits(gate_sum));
            *load += ExpertLoad { num_tokens: u64::from(num_tokens), gate_weight, tile_rows };
        }
    }
}
