//! The running state of one choice of a request.
//!
//! There is no prefill and no decode, only `num_computed_tokens` catching up with the tokens known so far:
//!
//! ```text
//! tokens   p p p p p p p p o o o          prompt, then output; the last token's successor is wanted
//!          └ computed ┘└ chunk ┘          num_computed_tokens, then num_scheduled_tokens
//! blocks   [  0  ][  1  ][  2  ]          block_table: room for all tokens known, once it runs
//! ```
//!
//! Waiting, running and finished are not flags: a sequence waits in the scheduler's `waiting`, runs in its
//! `running`, and is consumed by [`Sequence::finish`], so that it ends exactly once. This file does not
//! decide who runs, and owns no block: it only lists them.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use model::{Batch, LayerChoices, NonFiniteLogits, RouteShape, SampleParams, SampleRow, Sampled, mix64};

use crate::block_hash::{BlockHash, BlockHasher};
use crate::constraint::{Constraint, Left, is_allowed, left};
use crate::mask_turns::MaskAccount;
use crate::recording::Recording;
use crate::request::{Choice, Event, EventSink, FinishReason, PromptLogprob, Request};

/// A sequence's place in line: the order in which sequences are served. The last is preempted first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct SequenceKey {
    /// Of the request; lower runs earlier.
    pub(crate) priority: i32,
    /// Number of the submission.
    pub(crate) arrival: u64,
    /// Index of the choice within the submission.
    pub(crate) choice: u32,
}

/// When a sequence was submitted, and when it is too late for it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Times {
    pub(crate) submitted_at: Duration,
    pub(crate) deadline: Option<Duration>,
}

/// One choice of a request.
pub(crate) struct Sequence {
    pub(crate) key: SequenceKey,
    pub(crate) num_computed_tokens: usize,
    /// Tokens of the step in progress; 0 if it has no part in that.
    pub(crate) num_scheduled_tokens: usize,
    /// Blocks held; empty while it waits.
    pub(crate) block_table: Vec<u32>,
    request: Arc<Request>,
    params: SampleParams,
    sink: Box<dyn EventSink>,
    constraint: Option<Box<dyn Constraint>>,
    pub(crate) mask_account: MaskAccount,
    times: Times,
    /// Prompt, then output.
    tokens: Vec<u32>,
    /// Number of tokens, prompt and output, at which it ends.
    max_len: usize,
    /// Tokens that may not be taken before `min_tokens`.
    banned: Vec<u32>,
    /// The chain's root, then one hash per full block as far as was needed; empty if it shares no blocks.
    block_hashes: Vec<BlockHash>,
    /// Scores of prompt tokens `0..len` while they are being collected.
    prompt_logprobs: Option<Vec<Option<PromptLogprob>>>,
    recording: Option<Recording>,
    /// Most experts that a token visits in a layer.
    experts_per_token: usize,
    has_started: bool,
    /// The sink refused an event.
    sink_refused: bool,
}

impl Sequence {
    /// Makes choice `key.choice` of a request. It ends at `max_len` tokens if nothing else ends it; blocks
    /// are shared under `root`.
    pub(crate) fn new(
        key: SequenceKey,
        request: Arc<Request>,
        choice: Choice,
        times: Times,
        max_len: usize,
        root: Option<BlockHash>,
        route: RouteShape,
    ) -> Self {
        let mut params = request.sampling.clone();
        if key.choice > 0 {
            params.seed = mix64(params.seed.wrapping_add(u64::from(key.choice)));
        }
        let banned = match request.min_tokens {
            0 => Vec::new(),
            _ => [request.eos_token_ids.as_slice(), &request.stop_token_ids].concat(),
        };
        let is_scored = key.choice == 0 && request.num_prompt_logprobs.is_some();
        let steered = request.steering.as_ref().map(|steering| steering.experts_per_token());
        let experts_per_token = steered.unwrap_or(route.top_k);
        let recording = request.record_routing.as_ref().map(|wanted| {
            let start = if wanted.prompt && key.choice == 0 { 0 } else { request.prompt.len() - 1 };
            Recording::new(start, wanted.layers.clone(), experts_per_token)
        });
        Self {
            key,
            num_computed_tokens: 0,
            num_scheduled_tokens: 0,
            block_table: Vec::new(),
            params,
            sink: choice.sink,
            constraint: choice.constraint,
            mask_account: MaskAccount::default(),
            times,
            tokens: request.prompt.clone(),
            max_len,
            banned,
            block_hashes: root.into_iter().collect(),
            // Nothing precedes the first token, so it has no score.
            prompt_logprobs: is_scored.then(|| vec![None]),
            recording,
            experts_per_token,
            has_started: false,
            sink_refused: false,
            request,
        }
    }

    /// Number of tokens known, prompt and output.
    pub(crate) fn len(&self) -> usize {
        self.tokens.len()
    }

    pub(crate) fn prompt_len(&self) -> usize {
        self.request.prompt.len()
    }

    /// Whether it still computes blocks that other choices of its request could share.
    pub(crate) fn is_filling_shared_blocks(&self, block_size: usize) -> bool {
        let num_shared_blocks = (self.prompt_len() - 1) / block_size;
        self.request.num_choices > 1 && self.num_computed_tokens < num_shared_blocks * block_size
    }

    /// Whether prompt tokens still need their scores.
    pub(crate) fn is_scoring(&self) -> bool {
        self.prompt_logprobs.is_some()
    }

    /// Most experts that its tokens visit in a layer.
    pub(crate) fn experts_per_token(&self) -> usize {
        self.experts_per_token
    }

    /// Most leading tokens that may come from the cache instead of being computed: the last token's
    /// successor is wanted, and so are the scores and the routing not yet known.
    pub(crate) fn max_cached_tokens(&self) -> usize {
        let num_scored = self.prompt_logprobs.as_ref().map_or(usize::MAX, |known| known.len() - 1);
        let num_recorded = self.recording.as_ref().map_or(usize::MAX, Recording::next_position);
        num_scored.min(num_recorded).min(self.len() - 1)
    }

    /// Adds this step's chunk to the batch, with the rows of logits and the routing that are wanted of it.
    pub(crate) fn push_to(&self, batch: &mut Batch, block_size: u32) {
        let first_row = batch.num_tokens();
        let num_computed = self.num_computed_tokens;
        batch.push_sequence(self.chunk(), num_computed as u32, &self.block_table, block_size);
        let rows = self.logits_positions().map(|position| (first_row + position - num_computed) as u32);
        batch.logits_indices.extend(rows);
        if let Some(steering) = &self.request.steering {
            batch.steer_last_sequence(steering);
        }
        let end = self.chunk_range().end;
        batch.records_routing |=
            self.recording.as_ref().is_some_and(|recording| recording.next_position() < end);
    }

    /// The reason to end a sequence whose reader has left, or stopped reading.
    pub(crate) fn departure(&self) -> Option<FinishReason> {
        (self.sink_refused || self.sink.is_closed()).then_some(FinishReason::Cancelled)
    }

    /// The reason to end a sequence whose time is up.
    pub(crate) fn lateness(&self, now: Duration) -> Option<FinishReason> {
        self.times.deadline.is_some_and(|deadline| deadline <= now).then_some(FinishReason::Deadline)
    }

    /// Whether its next token cannot be taken yet, for want of a mask.
    pub(crate) fn is_mask_due(&self) -> bool {
        self.constraint.as_ref().is_some_and(|constraint| constraint.is_due())
    }

    /// Makes the mask that is due.
    pub(crate) fn make_mask(&mut self) {
        if let Some(constraint) = &mut self.constraint {
            constraint.prepare();
        }
    }

    /// The reason to end a sequence whose constraint leaves no token to take.
    pub(crate) fn dead_end(&self) -> Option<FinishReason> {
        if self.is_mask_due() {
            return None;
        }
        let allowed = self.constraint.as_ref()?.allowed()?;
        let Request { max_tokens, eos_token_ids, .. } = &*self.request;
        match left(allowed, self.banned()) {
            _ if *max_tokens == 0 => None,
            Left::Some => None,
            Left::Nothing => Some(FinishReason::Error),
            // It wants to end and is not let; or a stop token that it needs must wait.
            Left::Banned => {
                let may_end = eos_token_ids.iter().any(|&token| is_allowed(allowed, token));
                Some(if may_end { FinishReason::Stop } else { FinishReason::Length })
            }
        }
    }

    /// Tokens that may not be taken now.
    fn banned(&self) -> &[u32] {
        let num_generated = self.len() - self.prompt_len();
        if num_generated < self.request.min_tokens as usize {
            &self.banned
        } else if self.request.ignore_eos && self.constraint.is_some() {
            // Nothing can follow an end.
            &self.request.eos_token_ids
        } else {
            &[]
        }
    }

    /// Names of the full blocks `blocks`, computed as far as necessary; empty if it shares no blocks.
    pub(crate) fn block_hashes(
        &mut self,
        blocks: Range<usize>,
        block_size: usize,
        hasher: &BlockHasher,
    ) -> &[BlockHash] {
        let Some(&root) = self.block_hashes.first() else { return &[] };
        let mut parent = *self.block_hashes.last().unwrap_or(&root);
        for block in self.block_hashes.len() - 1..blocks.end {
            parent = hasher.child(parent, &self.tokens[block * block_size..(block + 1) * block_size]);
            self.block_hashes.push(parent);
        }
        &self.block_hashes[blocks.start + 1..blocks.end + 1]
    }

    /// Tells the reader that the sequence runs, the first time that it does; returns whether it was that.
    pub(crate) fn start(&mut self, num_cached_tokens: u32, now: Duration) -> bool {
        let is_first = !std::mem::replace(&mut self.has_started, true);
        if is_first {
            let queue_time = now.saturating_sub(self.times.submitted_at);
            self.emit(Event::Started { num_cached_tokens, queue_time });
            self.report_progress(num_cached_tokens);
        }
        is_first
    }

    /// The tokens of this step.
    pub(crate) fn chunk(&self) -> &[u32] {
        &self.tokens[self.chunk_range()]
    }

    fn chunk_range(&self) -> Range<usize> {
        self.num_computed_tokens..self.num_computed_tokens + self.num_scheduled_tokens
    }

    /// Positions of this step's chunk whose successors are prompt tokens to be scored.
    fn scored_positions(&self) -> Range<usize> {
        let Some(known) = &self.prompt_logprobs else { return 0..0 };
        let chunk = self.chunk_range();
        // Position p scores token p + 1.
        let start = chunk.start.max(known.len() - 1);
        start..chunk.end.min(self.prompt_len() - 1).max(start)
    }

    /// Position of this step's chunk whose successor is a new token to be taken.
    fn sampled_position(&self) -> Option<usize> {
        let reaches_end = self.num_scheduled_tokens > 0 && self.chunk_range().end == self.len();
        (reaches_end && self.request.max_tokens > 0).then(|| self.len() - 1)
    }

    /// Positions of this step's chunk whose logits are wanted, ascending.
    pub(crate) fn logits_positions(&self) -> impl Iterator<Item = usize> {
        self.scored_positions().chain(self.sampled_position())
    }

    /// What to do with the logits of each of [`Sequence::logits_positions`].
    pub(crate) fn sample_rows(&self) -> impl Iterator<Item = SampleRow<'_>> {
        let (prompt, output) = self.tokens.split_at(self.prompt_len());
        let scored = self.scored_positions().map(|position| SampleRow {
            params: &self.params,
            prompt: &[],
            output: &[],
            banned: &[],
            allowed: None,
            forced: Some(self.tokens[position + 1]),
            num_logprobs: self.request.num_prompt_logprobs,
        });
        let sampled = self.sampled_position().map(|_| SampleRow {
            params: &self.params,
            prompt,
            output,
            banned: self.banned(),
            allowed: self.constraint.as_ref().and_then(|constraint| constraint.allowed()),
            forced: None,
            num_logprobs: self.request.num_logprobs,
        });
        scored.chain(sampled)
    }

    /// Keeps where the step's tokens went, if that is wanted; the first of its own is the step's `first_token`. Comes
    /// before [`Sequence::advance`].
    pub(crate) fn record(&mut self, choices: &[LayerChoices], first_token: usize) {
        let chunk = self.chunk_range();
        if let Some(recording) = &mut self.recording {
            recording.extend(choices, first_token, chunk);
        }
    }

    /// Takes in what the step computed, one result per [`Sequence::logits_positions`]; returns the reason if
    /// that ended the sequence.
    pub(crate) fn advance(
        &mut self,
        results: &mut impl Iterator<Item = Result<Sampled, NonFiniteLogits>>,
    ) -> Option<FinishReason> {
        let num_scored = self.scored_positions().len();
        let is_sampled = self.sampled_position().is_some();
        self.num_computed_tokens += std::mem::take(&mut self.num_scheduled_tokens);
        self.report_progress(self.num_computed_tokens as u32);

        // All of the sequence's results are taken from the iterator, even after a bad one.
        let mut results = results.by_ref().take(num_scored + usize::from(is_sampled));
        let scores: Result<Vec<Sampled>, _> = results.by_ref().take(num_scored).collect();
        let sampled = results.last().transpose();
        let (Ok(scores), Ok(sampled)) = (scores, sampled) else { return Some(FinishReason::Error) };
        assert_eq!((scores.len(), sampled.is_some()), (num_scored, is_sampled), "one result per row");

        self.take_scores(scores);
        let is_scored = self.request.max_tokens == 0 && self.num_computed_tokens == self.prompt_len();
        if is_sampled || is_scored {
            let record = self.recording.as_mut().and_then(Recording::take);
            record.into_iter().for_each(|record| self.emit(Event::Routing(record)));
        }
        match sampled {
            Some(sampled) => self.take_token(sampled),
            None => is_scored.then_some(FinishReason::Length),
        }
    }

    /// Says how far the prompt is, while it is all that there is.
    fn report_progress(&mut self, num_computed_tokens: u32) {
        if self.request.reports_progress && self.key.choice == 0 && self.len() == self.prompt_len() {
            self.emit(Event::Progress { num_computed_tokens });
        }
    }

    fn take_scores(&mut self, scores: Vec<Sampled>) {
        let prompt_len = self.prompt_len();
        let Some(known) = &mut self.prompt_logprobs else { return };
        let score = |Sampled { logprob, top_logprobs, .. }| {
            logprob.map(|logprob| PromptLogprob { logprob, top_logprobs })
        };
        known.extend(scores.into_iter().map(score));
        if known.len() == prompt_len {
            let all = std::mem::take(known);
            self.prompt_logprobs = None;
            self.emit(Event::PromptLogprobs(all));
        }
    }

    fn take_token(&mut self, sampled: Sampled) -> Option<FinishReason> {
        let token = sampled.token;
        self.tokens.push(token);
        self.emit(Event::Token(sampled));
        let Request { eos_token_ids, stop_token_ids, ignore_eos, .. } = &*self.request;
        if stop_token_ids.contains(&token) || (!ignore_eos && eos_token_ids.contains(&token)) {
            return Some(FinishReason::Stop);
        }
        if let Some(constraint) = &mut self.constraint {
            constraint.accept(token);
            if constraint.is_complete() {
                return Some(FinishReason::Stop);
            }
        }
        (self.len() >= self.max_len).then_some(FinishReason::Length)
    }

    fn emit(&mut self, event: Event) {
        self.sink_refused |= self.sink.send(event).is_err();
    }

    /// Tells the reader how it ended. Its blocks have been given back before.
    pub(crate) fn finish(mut self: Box<Self>, reason: FinishReason) {
        assert!(self.block_table.is_empty(), "a finished sequence holds no block");
        self.emit(Event::Finished(reason));
    }
}
