//! Mixtral behind Seam A: one backend, one model, one workspace, one step at a time.

use backend::{Backend, BackendError, Batch, ExpertLoad, SampleRow};

use crate::mixtral::{Mixtral, Workspace, workspace_bytes};
use crate::weights::Weights;
use crate::{ModelConfig, ModelError, ModelFiles, ModelRunner, RunnerLimits, StepOutput};

/// What the owner of the machine decides about a model's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunnerOptions {
    /// Most tokens a sequence may have.
    pub max_model_len: usize,
    /// Most tokens in a batch.
    pub max_num_batched_tokens: usize,
    /// Most sequences in a batch, and most rows of logits.
    pub max_num_seqs: usize,
    /// Tokens per cache block.
    pub block_size: usize,
    /// Cache blocks, the padding block included.
    pub num_blocks: usize,
}

impl RunnerOptions {
    /// Bytes of everything that a step writes, beside the cache and what a backend needs for itself.
    pub fn workspace_bytes(&self, config: &ModelConfig) -> u64 {
        workspace_bytes(config, self.max_num_batched_tokens, self.max_num_seqs)
    }
}

/// Where the weights come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightSource {
    /// The checkpoint beside the configuration.
    Checkpoint,
    /// Seeded random values of the configuration's shapes.
    Dummy {
        /// The seed.
        seed: u64,
    },
}

/// Mixtral on a backend.
pub struct MixtralRunner<B: Backend> {
    backend: B,
    model: Mixtral<B>,
    workspace: Workspace<B>,
    limits: RunnerLimits,
}

impl<B: Backend> MixtralRunner<B> {
    /// Loads a model; `progress` is called with the number of layers loaded so far, after each.
    ///
    /// # Errors
    /// [`ModelError`], one readable sentence, if the checkpoint is not sound or does not fit.
    pub fn load(
        mut backend: B,
        files: &ModelFiles,
        config: &ModelConfig,
        source: WeightSource,
        options: RunnerOptions,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Self, ModelError> {
        let limits = RunnerLimits {
            vocab_size: config.vocab_size,
            max_model_len: options.max_model_len,
            num_layers: config.num_layers,
            num_experts: config.route.num_experts,
            top_k: config.route.top_k,
            block_size: options.block_size,
            num_blocks: options.num_blocks,
            max_num_batched_tokens: options.max_num_batched_tokens,
            max_num_seqs: options.max_num_seqs,
            max_num_logits: options.max_num_seqs,
        };
        let mut weights = match source {
            WeightSource::Checkpoint => Weights::stored(files, config)?,
            WeightSource::Dummy { seed } => Weights::Dummy { seed },
        };
        let model = Mixtral::load(&mut backend, config, &mut weights, options.max_model_len, progress)?;
        let workspace = Workspace::new(&mut backend, config, &limits)?;
        Ok(Self { backend, model, workspace, limits })
    }

    /// What the model runs on, for people.
    pub fn describe_backend(&self) -> String {
        self.backend.describe()
    }

    /// Bits that the weights of products take on average.
    pub fn weight_bits(&self) -> f64 {
        self.backend.weight_bits()
    }

    /// The logits `[num_logits, vocab]` of one step, for tests and tools; the cache advances as in
    /// [`ModelRunner::execute`].
    ///
    /// # Errors
    /// If the device failed.
    pub fn logits(&mut self, batch: &Batch) -> Result<Vec<f32>, BackendError> {
        self.forward(batch)?;
        self.backend.finish_step()?;
        Ok(self.backend.download(&self.workspace.logits, batch.logits_indices.len()))
    }

    fn forward(&mut self, batch: &Batch) -> Result<(), BackendError> {
        let limits = &self.limits;
        batch.assert_valid(limits.block_size as u32, limits.num_blocks as u32);
        assert!(batch.num_tokens() <= limits.max_num_batched_tokens);
        assert!(batch.num_seqs() <= limits.max_num_seqs);
        assert!(batch.logits_indices.len() <= limits.max_num_logits);
        assert!(batch.seq_lens.iter().all(|&len| len as usize <= limits.max_model_len));
        let experts_per_token = batch.steering.experts_per_token.max(limits.top_k);
        assert!(batch.num_tokens() * experts_per_token <= limits.max_expert_rows());
        assert!(batch.token_ids.iter().all(|&token| (token as usize) < limits.vocab_size));

        let shape = self.backend.begin_step(batch)?;
        let (model, workspace) = (&self.model, &mut self.workspace);
        self.backend.run(shape, |backend, shape| model.forward(backend, shape, workspace));
        Ok(())
    }
}

impl<B: Backend> ModelRunner for MixtralRunner<B> {
    fn limits(&self) -> &RunnerLimits {
        &self.limits
    }

    fn execute(&mut self, batch: &Batch, rows: &[SampleRow<'_>]) -> Result<StepOutput, BackendError> {
        assert_eq!(rows.len(), batch.logits_indices.len());
        self.forward(batch)?;
        self.backend.sample(&self.workspace.logits, rows);
        let sampled = self.backend.finish_step()?;

        let mut expert_loads = vec![ExpertLoad::default(); self.limits.num_layers * self.limits.num_experts];
        let loads_by_layer = expert_loads.chunks_exact_mut(self.limits.num_experts);
        for (routing, loads) in self.workspace.routings.iter().zip(loads_by_layer) {
            self.backend.add_expert_loads(routing, loads);
        }
        let choices = match batch.records_routing {
            true => self.backend.read_choices(&self.workspace.routings),
            false => Vec::new(),
        };
        let device_seconds = self.backend.device_seconds();
        Ok(StepOutput { sampled, expert_loads, choices, device_seconds })
    }
}
