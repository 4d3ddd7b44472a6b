//! Sampling on the device: what the rows ask for on its way there, the tokens and log-probabilities on their way back.

use backend::sampling::LogitEdit;
use backend::sampling::weights::{least_weight, weight_scale};
use backend::{BackendError, DType, NonFiniteLogits, SampleRow, Sampled, TokenLogprob};

use crate::device::{Buffer, Device, Grid};
use crate::kernels::{EditArguments, LogprobResult, SampleArguments};
use crate::tensor::Tensor;

/// Likeliest tokens that the kernel reports at most.
const MAX_TOP: usize = 32;
/// What the kernel knows as no token: none is forced, or none can be taken.
const NO_TOKEN: u32 = u32::MAX;
const NO_LOGPROBS: i32 = -1;
const NO_MASK: i32 = -1;
/// Threads of a block, for a vocabulary that gives each of them something to do, and for one that does not.
const THREADS: [u32; 2] = [1024, 128];
const LARGE_VOCAB: usize = 4096;

/// One step's rows, on the host and on the device; what is on the device grows while the first steps run.
#[derive(Default)]
pub(crate) struct Sampler {
    rows: Vec<SampleArguments>,
    edits: Vec<EditArguments>,
    /// Of the rows that have one, each as long as the vocabulary.
    masks: Vec<u32>,
    device: Option<Buffers>,
    tokens: Vec<u32>,
    logprobs: Vec<LogprobResult>,
}

struct Buffers {
    rows: Buffer,
    edits: Buffer,
    masks: Buffer,
    /// f32: the logits that were edited.
    originals: Buffer,
    tokens: Buffer,
    /// `[rows, 1 + MAX_TOP]`.
    logprobs: Buffer,
}

impl Buffers {
    fn allocate(
        device: &mut Device,
        num_rows: usize,
        num_edits: usize,
        num_mask_words: usize,
    ) -> Result<Self, BackendError> {
        let [num_rows, num_edits, num_mask_words] =
            [num_rows, num_edits, num_mask_words].map(usize::next_power_of_two);
        let logprob_bytes = (1 + MAX_TOP) * size_of::<LogprobResult>();
        let mut allocate = |count, bytes| device.allocate("sampling", count * bytes);
        Ok(Self {
            rows: allocate(num_rows, size_of::<SampleArguments>())?,
            edits: allocate(num_edits, size_of::<EditArguments>())?,
            masks: allocate(num_mask_words, size_of::<u32>())?,
            originals: allocate(num_edits, size_of::<f32>())?,
            tokens: allocate(num_rows, size_of::<u32>())?,
            logprobs: allocate(num_rows, logprob_bytes)?,
        })
    }

    fn have_room(&self, rows: &[SampleArguments], edits: &[EditArguments], masks: &[u32]) -> bool {
        self.rows.num_bytes() >= size_of_val(rows)
            && self.edits.num_bytes() >= size_of_val(edits)
            && self.masks.num_bytes() >= size_of_val(masks)
    }
}

impl Sampler {
    /// Launches the sampling of rows of logits, which must not be touched before [`Self::read`].
    ///
    /// # Errors
    /// If there is no memory for the largest step so far.
    pub(crate) fn launch(
        &mut self,
        device: &mut Device,
        logits: &Tensor,
        rows: &[SampleRow<'_>],
    ) -> Result<(), BackendError> {
        self.rows.clear();
        self.edits.clear();
        self.masks.clear();
        rows.iter().for_each(|row| self.push(row, logits.features));
        let buffers = match self.device.take() {
            Some(buffers) if buffers.have_room(&self.rows, &self.edits, &self.masks) => buffers,
            _ => Buffers::allocate(device, self.rows.len(), self.edits.len(), self.masks.len())?,
        };
        device.write_later(&buffers.rows, 0, &self.rows);
        device.write_later(&buffers.edits, 0, &self.edits);
        device.write_later(&buffers.masks, 0, &self.masks);
        let [vocab, stride] = [logits.features, logits.stride].map(|n| n as i32);
        let from = logits.rows(rows.len(), DType::F32);
        let Buffers { rows, edits, masks, originals, tokens, logprobs } = &buffers;
        let [rows, edits, masks, originals, tokens, logprobs] =
            [rows, edits, masks, originals, tokens, logprobs].map(|b| b.address);
        let threads = if logits.features >= LARGE_VOCAB { THREADS[0] } else { THREADS[1] };
        let grid = Grid::new(self.rows.len(), threads);
        device.launch(
            "sample",
            grid,
            &[&from, &vocab, &stride, &rows, &edits, &masks, &originals, &tokens, &logprobs],
        );
        self.device = Some(buffers);
        Ok(())
    }

    fn push(&mut self, row: &SampleRow<'_>, vocab: usize) {
        let (params, first_edit, max_top) = (row.params, self.edits.len(), MAX_TOP.min(vocab) as u32);
        let first_mask_word = row.allowed.map_or(NO_MASK, |_| self.masks.len() as i32);
        if let Some(allowed) = row.allowed {
            let num_words = vocab.div_ceil(u32::BITS as usize);
            self.masks.extend(allowed.iter().copied().chain(std::iter::repeat(0)).take(num_words));
        }
        self.edits.extend(row.edits().map(|LogitEdit { token, bias, repetition, subtracted }| {
            EditArguments { token, bias, repetition, subtracted }
        }));
        self.rows.push(SampleArguments {
            top_p: params.top_p.into(),
            uniform: row.uniform(),
            scale: if params.is_greedy() { 0.0 } else { weight_scale(params.temperature) },
            top_k: params.top_k,
            least_weight: least_weight(params.min_p),
            forced: row.forced.unwrap_or(NO_TOKEN),
            first_edit: first_edit as i32,
            num_edits: (self.edits.len() - first_edit) as i32,
            num_top: row.num_logprobs.map_or(NO_LOGPROBS, |count| count.min(max_top) as i32),
            first_mask_word,
        });
    }

    /// Waits, and returns what was taken since the last call.
    pub(crate) fn read(&mut self, device: &mut Device) -> Vec<Result<Sampled, NonFiniteLogits>> {
        let Some(buffers) = &self.device else { return Vec::new() };
        let wants_logprobs = self.rows.iter().any(|row| row.num_top != NO_LOGPROBS);
        self.tokens.resize(self.rows.len(), 0);
        self.logprobs.resize(
            if wants_logprobs { self.rows.len() * (1 + MAX_TOP) } else { 0 },
            LogprobResult::default(),
        );
        device.read(&buffers.logprobs, 0, &mut self.logprobs);
        device.read(&buffers.tokens, 0, &mut self.tokens);
        let rows = self.rows.drain(..).zip(&self.tokens).enumerate();
        rows.map(|(index, (row, &token))| {
            if token == NO_TOKEN {
                return Err(NonFiniteLogits);
            }
            let Ok(num_top) = usize::try_from(row.num_top) else {
                return Ok(Sampled { token, logprob: None, top_logprobs: Vec::new() });
            };
            let reported = self.logprobs[index * (1 + MAX_TOP)..][..=num_top].iter();
            let mut reported =
                reported.map(|&LogprobResult { token, logprob, rank }| TokenLogprob { token, logprob, rank });
            Ok(Sampled { token, logprob: reported.next(), top_logprobs: reported.collect() })
        })
        .collect()
    }
}
