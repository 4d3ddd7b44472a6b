//! The text of one choice, token by token: detokenizer, stop strings, log-probabilities, tool calls.
//!
//! A pure state machine: tokens go in, and a [`Delta`] says what the client may now see. Text that may yet be a
//! stop string is held back, and so are the scores of its tokens.

use std::sync::Arc;

use model::{RoutingRecord, Sampled};

use crate::choice::PromptProgress;
use crate::constraint::Bound;
use crate::logprobs::{PromptLogprobs, TokenScore, token_score};
use crate::text::detokenizer::Detokenizer;
use crate::text::stop::StopMatcher;
use crate::text::vocabulary::Vocabulary;
use crate::tool_calls::{CallReader, Read, ToolCall};

/// Why an answer ended, in OpenAI's terms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    /// The model ended it, or a stop string or token did.
    Stop,
    /// A limit cut it: of tokens, of time (`deadline_ms`), or of the server's own life.
    Length,
    /// It calls tools.
    ToolCalls,
}

impl Ending {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::ToolCalls => "tool_calls",
        }
    }
}

/// What one or more events add to a choice.
#[derive(Debug, Default)]
pub(crate) struct Delta {
    pub(crate) text: String,
    /// Scores of the tokens whose text is shown, if they were asked for.
    pub(crate) scores: Vec<TokenScore>,
    /// Scores of the whole prompt, if they were asked for.
    pub(crate) prompt_scores: Option<Vec<TokenScore>>,
    /// Calls of tools, or parts of them.
    pub(crate) tool_calls: Vec<ToolCall>,
    pub(crate) ending: Option<Ending>,
    pub(crate) num_tokens: u64,
    pub(crate) num_cached_tokens: u64,
    pub(crate) sum_logprobs: f64,
    /// The stop string that ended it.
    pub(crate) stop_sequence: Option<String>,
    /// It was scheduled for the first time.
    pub(crate) has_started: bool,
    /// How far its prompt is, if that was asked for.
    pub(crate) progress: Option<PromptProgress>,
    /// Its tokens, shown or not, if they were asked for.
    pub(crate) token_ids: Vec<u32>,
    /// The prompt's tokens with their log-probabilities, if those were asked for by `prompt_logprobs`.
    pub(crate) prompt_logprobs: Option<PromptLogprobs>,
    /// Where the tokens went, if that was asked for.
    pub(crate) routing: Option<RoutingRecord>,
}

impl Delta {
    /// Appends what came later.
    pub(crate) fn append(&mut self, later: Delta) {
        self.text.push_str(&later.text);
        self.scores.extend(later.scores);
        self.prompt_scores = self.prompt_scores.take().or(later.prompt_scores);
        ToolCall::append(&mut self.tool_calls, later.tool_calls);
        self.ending = later.ending.or(self.ending);
        self.num_tokens += later.num_tokens;
        self.num_cached_tokens += later.num_cached_tokens;
        self.sum_logprobs += later.sum_logprobs;
        self.stop_sequence = later.stop_sequence.or(self.stop_sequence.take());
        self.has_started |= later.has_started;
        self.progress = later.progress.or(self.progress);
        self.token_ids.extend(later.token_ids);
        match (&mut self.routing, later.routing) {
            (Some(routing), Some(later)) => routing.append(&later),
            (routing, later) => *routing = routing.take().or(later),
        }
        self.prompt_logprobs = self.prompt_logprobs.take().or(later.prompt_logprobs);
    }

    /// Whether there is nothing in it that a client would see.
    pub(crate) fn is_silent(&self) -> bool {
        let is_empty = self.text.is_empty() && self.scores.is_empty() && self.tool_calls.is_empty();
        let has_asides =
            self.progress.is_some() || self.prompt_logprobs.is_some() || !self.token_ids.is_empty();
        let has_asides = has_asides || self.routing.is_some();
        is_empty && !has_asides && self.prompt_scores.is_none() && self.ending.is_none()
    }
}

/// How a choice's tokens become text, and which texts they may become.
#[derive(Clone, Default)]
pub(crate) struct TextOptions {
    /// The text goes on where the prompt ends, instead of being a message of its own.
    pub(crate) continues_prompt: bool,
    pub(crate) stops: Vec<String>,
    /// The token after which tool calls are read; `None` if tools were not offered.
    pub(crate) tool_calls_token: Option<u32>,
    /// Keeps only the first tool call (`parallel_tool_calls: false`).
    pub(crate) single_tool_call: bool,
    /// Reports the ids of the choice's tokens.
    pub(crate) returns_token_ids: bool,
    /// Alternatives to report of each prompt token.
    pub(crate) num_prompt_logprobs: Option<u32>,
    /// A whole call of a tool ends the answer like any other text (a named `tool_choice`).
    pub(crate) calls_are_expected: bool,
    /// What the text is bound to, as a message of its own or where it goes on with its prompt.
    pub(crate) bound: Bound,
}

impl TextOptions {
    /// A detokenizer at the start of a text behind `prompt`.
    pub(crate) fn detokenizer(&self, vocabulary: &Arc<Vocabulary>, prompt: &[u32]) -> Detokenizer {
        let vocabulary = Arc::clone(vocabulary);
        match self.continues_prompt {
            true => Detokenizer::after(vocabulary, prompt),
            false => Detokenizer::new(vocabulary),
        }
    }
}

/// The text of one choice so far.
pub(crate) struct ChoiceText {
    detokenizer: Detokenizer,
    stops: StopMatcher,
    tool_calls_token: Option<u32>,
    single_tool_call: bool,
    calls_are_expected: bool,
    /// Reads what the model writes after its tool-calls token.
    calls: Option<CallReader>,
    /// A stop string was met: there is no more text.
    is_stopped: bool,
    /// Scores whose text is still held back.
    waiting_scores: Vec<TokenScore>,
    num_decoded_chars: usize,
    num_released_chars: usize,
}

impl ChoiceText {
    pub(crate) fn new(vocabulary: &Arc<Vocabulary>, prompt: &[u32], options: &TextOptions) -> Self {
        Self {
            detokenizer: options.detokenizer(vocabulary, prompt),
            stops: StopMatcher::new(&options.stops),
            tool_calls_token: options.tool_calls_token,
            single_tool_call: options.single_tool_call,
            calls_are_expected: options.calls_are_expected,
            calls: None,
            is_stopped: false,
            waiting_scores: Vec::new(),
            num_decoded_chars: 0,
            num_released_chars: 0,
        }
    }

    /// Takes in a token; returns whether a stop string ends the text there.
    pub(crate) fn push(&mut self, sampled: &Sampled, delta: &mut Delta) -> bool {
        delta.num_tokens += 1;
        delta.sum_logprobs += sampled.logprob.map_or(0.0, |own| f64::from(own.logprob));
        if self.calls.is_none() && self.tool_calls_token == Some(sampled.token) {
            self.end_text(delta);
            self.calls = Some(CallReader::new(self.single_tool_call));
            return false;
        }
        self.waiting_scores.extend(token_score(sampled, &self.detokenizer, self.num_decoded_chars));
        let (mut decoded, mut released) = (String::new(), String::new());
        self.detokenizer.push(sampled.token, &mut decoded);
        self.num_decoded_chars += decoded.chars().count();
        self.is_stopped = self.stops.push(&decoded, &mut released);
        self.release(released, delta);
        self.is_stopped
    }

    /// Lets go of all that was held back: the choice has ended.
    pub(crate) fn finish(&mut self, ending: Ending, delta: &mut Delta) {
        self.end_text(delta);
        delta.ending = Some(ending);
        delta.stop_sequence = self.stops.met().map(str::to_owned);
        let Some(mut calls) = self.calls.take() else { return };
        let Read { calls: parts, text } = calls.finish();
        ToolCall::append(&mut delta.tool_calls, parts);
        delta.text.push_str(&text);
        if ending == Ending::Stop && calls.has_whole_calls() && !self.calls_are_expected {
            delta.ending = Some(Ending::ToolCalls);
        }
    }

    fn end_text(&mut self, delta: &mut Delta) {
        if self.is_stopped {
            return;
        }
        let (mut decoded, mut released) = (String::new(), String::new());
        self.detokenizer.finish(&mut decoded);
        self.num_decoded_chars += decoded.chars().count();
        if !self.stops.push(&decoded, &mut released) {
            self.stops.finish(&mut released);
        }
        self.release(released, delta);
    }

    /// Shows text, and the scores of the tokens that it begins to show.
    fn release(&mut self, released: String, delta: &mut Delta) {
        self.num_released_chars += released.chars().count();
        match &mut self.calls {
            Some(calls) => {
                let Read { calls: parts, text } = calls.push(&released);
                ToolCall::append(&mut delta.tool_calls, parts);
                delta.text.push_str(&text);
                self.waiting_scores.clear();
            }
            None => delta.text.push_str(&released),
        }
        let nothing_is_held = !self.is_stopped && self.stops.is_idle() && self.detokenizer.is_idle();
        let is_shown = |score: &TokenScore| nothing_is_held || score.text_offset < self.num_released_chars;
        let num_shown = self.waiting_scores.iter().take_while(|score| is_shown(score)).count();
        delta.scores.extend(self.waiting_scores.drain(..num_shown));
    }
}

#[cfg(test)]
mod tests {
    use model::TokenLogprob;

    use super::*;
    use crate::text::tokenizer::test_tokenizers::LLAMA;

    fn options(stops: &[&str]) -> TextOptions {
        TextOptions {
            continues_prompt: false,
            stops: stops.iter().map(|&stop| stop.to_owned()).collect(),
            tool_calls_token: LLAMA.token_to_id("[TOOL_CALLS]"),
            single_tool_call: false,
            returns_token_ids: false,
            num_prompt_logprobs: None,
            calls_are_expected: false,
            bound: Bound::default(),
        }
    }

    fn sampled(token: u32) -> Sampled {
        Sampled {
            token,
            logprob: Some(TokenLogprob { token, logprob: -1.0, rank: 1 }),
            top_logprobs: Vec::new(),
        }
    }

    /// Runs tokens to their end, and returns the deltas appended up and the text of each.
    fn run(tokens: &[u32], options: &TextOptions, ending: Ending) -> (Delta, Vec<String>) {
        let mut text = ChoiceText::new(LLAMA.vocabulary(), &[], options);
        let (mut whole, mut parts) = (Delta::default(), Vec::new());
        for &token in tokens {
            let mut delta = Delta::default();
            let is_stopped = text.push(&sampled(token), &mut delta);
            if is_stopped {
                text.finish(Ending::Stop, &mut delta);
            }
            parts.push(delta.text.clone());
            whole.append(delta);
            if is_stopped {
                return (whole, parts);
            }
        }
        let mut delta = Delta::default();
        text.finish(ending, &mut delta);
        parts.push(delta.text.clone());
        whole.append(delta);
        (whole, parts)
    }

    fn ids(text: &str) -> Vec<u32> {
        LLAMA.encode_bare(text).unwrap()
    }

    fn scored(delta: &Delta) -> String {
        let bytes: Vec<u8> = delta.scores.iter().flat_map(|score| score.token.bytes.clone()).collect();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn scores_join_to_the_text_that_is_shown() {
        for text in ["a b", "é€ x", "the end", "x\n\ny"] {
            let (whole, _) = run(&ids(text), &options(&[]), Ending::Length);
            assert_eq!((whole.text.as_str(), scored(&whole)), (text, text.to_owned()));
        }
        let with_end = [ids("a b"), vec![2]].concat();
        let (whole, _) = run(&with_end, &options(&[]), Ending::Stop);
        assert_eq!(
            (whole.text.as_str(), scored(&whole).as_str(), whole.num_tokens),
            ("a b", "a b", with_end.len() as u64)
        );
    }

    #[test]
    fn stop_strings_across_tokens_are_never_shown() {
        let (whole, parts) = run(&ids("x y END z"), &options(&[" END"]), Ending::Length);
        assert_eq!((whole.text.as_str(), whole.ending), ("x y", Some(Ending::Stop)));
        assert_eq!(scored(&whole), "x y");
        assert!(parts.iter().all(|part| !part.contains('E')), "{parts:?}");
        let (whole, parts) = run(&ids("x EN"), &options(&["END"]), Ending::Length);
        assert_eq!((whole.text.as_str(), parts.last().unwrap().as_str()), ("x EN", "EN"));
        assert_eq!(scored(&whole), "x EN");
    }

    #[test]
    fn tool_calls_are_read_after_their_token_and_other_words_are_shown() {
        let call = |written: &str| [ids("so "), vec![5], ids(written), vec![2]].concat();
        let (whole, _) = run(&call(r#"[{"name": "f", "arguments": {"a": 1}}]"#), &options(&[]), Ending::Stop);
        assert_eq!((whole.text.as_str(), whole.ending), ("so ", Some(Ending::ToolCalls)));
        assert_eq!(
            (whole.tool_calls[0].name.as_str(), whole.tool_calls[0].arguments.as_str()),
            ("f", r#"{"a": 1}"#)
        );
        let (whole, _) = run(&call(r#"[{"name": "f", "argu"#), &options(&[]), Ending::Length);
        assert!(whole.tool_calls.is_empty() && whole.text.ends_with("argu"), "{whole:?}");
        assert_eq!(whole.ending, Some(Ending::Length));
    }
}
