//! `POST /v1/completions`: prompts continued as they are, without a chat template.
//!
//! The client owns the whole prompt and could as well send token ids, so control tokens in it are control
//! tokens, as with Hugging Face. The answer goes on where the prompt ends and keeps its leading space.

use axum::extract::{Request, State};
use axum::response::Response;
use serde::Serialize;
use serde_json::{Map, Value};

use super::fields::{Fields, wrong_value};
use super::params::{Generate, Params, token_budget};
use super::prompts::{self, EncodedPrompt, Prompt};
use super::routing::WrittenRouting;
use super::structured::{self, Format};
use super::tools::Tools;
use crate::answer::{Meta, Wording, respond};
use crate::body::read_json;
use crate::choice_text::{Delta, Ending, TextOptions};
use crate::config::limits;
use crate::constraint::Bound;
use crate::error::ApiError;
use crate::generation::{Arrival, Generation};
use crate::logprobs::{PromptLogprobs, TokenNames, TokenScore};
use crate::routing::wire::RoutingBody;
use crate::state::AppState;
use crate::text::model::TextModel;

/// OpenAI's default for completions.
const DEFAULT_MAX_TOKENS: u32 = 16;

/// Continues one or more prompts.
pub(crate) async fn completions(
    State(state): State<AppState>,
    request: Request,
) -> Result<Response, ApiError> {
    let arrival = Arrival::of(&request);
    let fields = read_json(&state, request).await?;
    let completion = CompletionRequest::take(fields, &state)?;
    let (prompts, echo) = (completion.prompts, completion.echo);
    let encode =
        move |text: &TextModel| prompts.into_iter().map(|prompt| prompt.encode(text, echo)).collect();
    let encoded: Vec<EncodedPrompt> = state.with_text("prompt", encode).await?;
    let meta = Meta::new(&state, "cmpl-", completion.params.service_tier);
    let mut echoes = Vec::with_capacity(encoded.len());
    let mut requests = Vec::with_capacity(encoded.len());
    let mut prompts = Vec::new();
    for prompt in encoded {
        if completion.params.returns_token_ids {
            prompts.push(prompt.ids.clone());
        }
        let generate =
            completion.options.generate(meta.id(), prompt.ids, state.engine.limits().max_model_len)?;
        requests.push(completion.params.request(&state, generate)?);
        echoes.push(prompt.echo);
    }
    let mut text = TextOptions {
        continues_prompt: true,
        stops: completion.params.stops.clone(),
        tool_calls_token: None,
        single_tool_call: false,
        returns_token_ids: completion.params.returns_token_ids,
        num_prompt_logprobs: completion.params.num_prompt_logprobs,
        calls_are_expected: false,
        bound: Bound::default(),
    };
    let vocabulary = state.text.tokenizer.vocabulary();
    let hides_space =
        requests.iter().map(|request| text.detokenizer(vocabulary, &request.prompt).hides_space());
    let hides_space: Vec<bool> = hides_space.collect();
    text.bound = structured::compile(&state, completion.format, &Tools::default(), &hides_space).await?;
    let generation = Generation::start(&state, requests, &text, arrival, "prompt")?;
    let wording = CompletionWording {
        n: completion.params.n as usize,
        options: completion.options,
        token_names: completion.params.token_names,
        echoes,
        prompts,
        routing: completion.params.routing.written,
    };
    respond(generation, wording, meta, &completion.params, &state).await
}

struct CompletionRequest {
    prompts: Vec<Prompt>,
    params: Params,
    echo: bool,
    options: Options,
    format: Option<Format>,
}

/// What a completion says beyond what it shares with a chat.
#[derive(Debug, Clone)]
struct Options {
    best_of: u32,
    max_tokens: Option<u32>,
    logprobs: Option<u32>,
    scores_prompt: bool,
    n: u32,
}

impl CompletionRequest {
    fn take(mut fields: Fields, state: &AppState) -> Result<Self, ApiError> {
        let params = Params::take(&mut fields, state)?;
        let prompts = prompts::take(&mut fields, state)?;
        let echo = fields.boolean("echo")?.unwrap_or(false);
        let max_tokens = fields.integer("max_tokens", 0..=i64::from(u32::MAX))?.map(|max| max as u32);
        let logprobs = fields.integer("logprobs", 0..=limits::MAX_COMPLETION_LOGPROBS)?.map(|num| num as u32);
        let best_of = fields.integer("best_of", 1..=i64::from(state.config.max_choices))?;
        let best_of = best_of.map_or(params.n, |best_of| best_of as u32);
        let format = structured::take(&mut fields, false, state.engine.limits().vocab_size)?;
        fields.finish()?;
        let options =
            Options { best_of, max_tokens, logprobs, scores_prompt: echo && logprobs.is_some(), n: params.n };
        options.check(&params, prompts.len(), state)?;
        Ok(Self { prompts, params, echo, options, format })
    }
}

impl Options {
    /// Refuses what does not go together.
    fn check(&self, params: &Params, num_prompts: usize, state: &AppState) -> Result<(), ApiError> {
        let is_streamed = params.streamed.is_some();
        if self.best_of < params.n {
            return Err(wrong_value("best_of", "it must not be below 'n'"));
        }
        if self.best_of > params.n && is_streamed {
            return Err(wrong_value("best_of", "the best of more than 'n' choices cannot be streamed"));
        }
        if self.scores_prompt && is_streamed && params.n > 1 {
            return Err(wrong_value("echo", "with 'logprobs' and 'n' above 1 it cannot be streamed"));
        }
        let max_choices = state.config.max_choices_per_request;
        if num_prompts * self.best_of as usize > max_choices {
            let expected = format!(
                "{num_prompts} prompts with {} choices each are more than {max_choices}",
                self.best_of
            );
            return Err(wrong_value(if self.best_of > params.n { "best_of" } else { "n" }, &expected));
        }
        Ok(())
    }

    fn generate(&self, id: &str, prompt: Vec<u32>, max_model_len: usize) -> Result<Generate, ApiError> {
        // Choosing the best needs to know how likely each choice was.
        let ranks = (self.best_of > self.n).then_some(0);
        Ok(Generate {
            id: id.to_owned(),
            max_tokens: token_budget(
                prompt.len(),
                self.max_tokens,
                DEFAULT_MAX_TOKENS,
                max_model_len,
                "prompt",
            )?,
            prompt,
            num_choices: self.best_of,
            num_logprobs: self.logprobs.or(ranks),
            num_prompt_logprobs: self.logprobs.filter(|_| self.scores_prompt),
        })
    }
}

/// How completions word their answers.
struct CompletionWording {
    n: usize,
    options: Options,
    token_names: TokenNames,
    /// One per prompt.
    echoes: Vec<String>,
    /// One per prompt if token ids are wanted, else none.
    prompts: Vec<Vec<u32>>,
    routing: WrittenRouting,
}

#[derive(Serialize)]
struct Choice<Finish> {
    index: usize,
    text: String,
    logprobs: Option<Logprobs>,
    finish_reason: Finish,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<PromptLogprobs>,
    #[serde(skip_serializing_if = "Option::is_none")]
    routing: Option<RoutingBody>,
}

#[derive(Default, Serialize)]
struct Logprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<Option<f32>>,
    /// Null for a prompt's first token.
    top_logprobs: Vec<Option<Map<String, Value>>>,
    text_offset: Vec<usize>,
}

impl Wording for CompletionWording {
    const OBJECT: &'static str = "text_completion";
    const CHUNK_OBJECT: &'static str = "text_completion";
    type Choice = Choice<&'static str>;
    type ChunkChoice = Choice<Option<&'static str>>;

    fn opening(&self) -> Vec<Self::ChunkChoice> {
        // With scores, the echo waits until the prompt is scored.
        let echo = |index: usize| if self.options.scores_prompt { "" } else { &self.echoes[index / self.n] };
        let opening = |index| {
            let text = echo(index).to_owned();
            Choice { text, prompt_token_ids: self.prompt_token_ids(index / self.n), ..self.silence(index) }
        };
        let is_shown =
            |choice: &Self::ChunkChoice| !choice.text.is_empty() || choice.prompt_token_ids.is_some();
        (0..self.echoes.len() * self.n).map(opening).filter(is_shown).collect()
    }

    fn chunk(&self, index: usize, mut delta: Delta) -> Option<Self::ChunkChoice> {
        let echo = if delta.prompt_scores.is_some() { self.echoes[index / self.n].as_str() } else { "" };
        let prompt_scores = delta.prompt_scores.take().unwrap_or_default();
        let is_empty = delta.text.is_empty() && delta.scores.is_empty() && prompt_scores.is_empty();
        if is_empty && delta.token_ids.is_empty() && delta.routing.is_none() {
            return None;
        }
        let logprobs = self.logprobs(prompt_scores, delta.scores, self.num_echoed_chars(index / self.n));
        let token_ids = Some(delta.token_ids).filter(|ids| !ids.is_empty());
        let routing = self.routing.body(delta.routing);
        let text = format!("{echo}{}", delta.text);
        Some(Choice { text, logprobs, token_ids, routing, ..self.silence(index) })
    }

    fn closing(&self, index: usize, ending: Ending) -> Self::ChunkChoice {
        Choice { finish_reason: Some(ending.as_str()), ..self.silence(index) }
    }

    fn silence(&self, index: usize) -> Self::ChunkChoice {
        Choice {
            index,
            text: String::new(),
            logprobs: None,
            finish_reason: None,
            prompt_token_ids: None,
            token_ids: None,
            prompt_logprobs: None,
            routing: None,
        }
    }

    fn whole(&self, answers: Vec<Delta>) -> Vec<Self::Choice> {
        let mut choices = Vec::with_capacity(self.echoes.len() * self.n);
        let mut answers = answers.into_iter();
        for prompt_index in 0..self.echoes.len() {
            let mut of_prompt: Vec<Delta> = answers.by_ref().take(self.options.best_of as usize).collect();
            let prompt_scores =
                of_prompt.iter_mut().find_map(|answer| answer.prompt_scores.take()).unwrap_or_default();
            let prompt_logprobs = of_prompt.iter_mut().find_map(|answer| answer.prompt_logprobs.take());
            for answer in best(of_prompt, self.n) {
                let answer = Delta { prompt_logprobs: prompt_logprobs.clone(), ..answer };
                choices.push(self.choice(choices.len(), prompt_index, answer, prompt_scores.clone()));
            }
        }
        choices
    }
}

impl CompletionWording {
    fn choice(
        &self,
        index: usize,
        prompt_index: usize,
        answer: Delta,
        prompt_scores: Vec<TokenScore>,
    ) -> Choice<&'static str> {
        Choice {
            index,
            text: format!("{}{}", self.echoes[prompt_index], answer.text),
            logprobs: self.logprobs(prompt_scores, answer.scores, self.num_echoed_chars(prompt_index)),
            finish_reason: answer.ending.unwrap_or(Ending::Stop).as_str(),
            prompt_token_ids: self.prompt_token_ids(prompt_index),
            token_ids: (!self.prompts.is_empty()).then_some(answer.token_ids),
            prompt_logprobs: answer.prompt_logprobs,
            routing: self.routing.body(answer.routing),
        }
    }

    fn prompt_token_ids(&self, prompt_index: usize) -> Option<Vec<u32>> {
        self.prompts.get(prompt_index).cloned()
    }

    fn num_echoed_chars(&self, prompt_index: usize) -> usize {
        self.echoes[prompt_index].chars().count()
    }

    fn logprobs(
        &self,
        prompt: Vec<TokenScore>,
        answer: Vec<TokenScore>,
        num_echoed_chars: usize,
    ) -> Option<Logprobs> {
        let num = self.options.logprobs? as usize;
        let mut logprobs = Logprobs::default();
        // `prompt_logprobs` may have asked for scores too, and for more of them.
        let mut prompt = if self.options.scores_prompt { prompt } else { Vec::new() };
        prompt.iter_mut().for_each(|score| score.top.truncate(num));
        prompt.into_iter().for_each(|score| logprobs.push(score, self.token_names, 0));
        answer.into_iter().for_each(|score| logprobs.push(score, self.token_names, num_echoed_chars));
        Some(logprobs)
    }
}

impl Logprobs {
    /// Appends a token; the one that was taken is among its alternatives, as with OpenAI.
    fn push(&mut self, score: TokenScore, names: TokenNames, first_offset: usize) {
        let token = score.token.name(names);
        let mut top: Map<String, Value> = Map::new();
        for (alternative, logprob) in score.top {
            top.entry(alternative.name(names)).or_insert(logprob.into());
        }
        if let Some(logprob) = score.logprob {
            top.entry(token.clone()).or_insert(logprob.into());
        }
        self.tokens.push(token);
        self.token_logprobs.push(score.logprob);
        self.top_logprobs.push(Some(top).filter(|top| !top.is_empty()));
        self.text_offset.push(first_offset + score.text_offset);
    }
}

/// The `n` answers with the highest log-probability per token, best first; all of them in their own order.
fn best(answers: Vec<Delta>, n: usize) -> Vec<Delta> {
    let mean = |answer: &Delta| answer.sum_logprobs / answer.num_tokens.max(1) as f64;
    let mut ranked: Vec<(usize, Delta)> = answers.into_iter().enumerate().collect();
    if ranked.len() > n {
        ranked.sort_by(|(_, a), (_, b)| mean(b).total_cmp(&mean(a)));
        ranked.truncate(n);
    }
    ranked.into_iter().map(|(_, answer)| answer).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_answers_have_the_highest_mean_logprob() {
        let answer = |text: &str, sum_logprobs, num_tokens| Delta {
            text: text.into(),
            sum_logprobs,
            num_tokens,
            ..Delta::default()
        };
        let answers = || vec![answer("a", -4.0, 2), answer("b", -3.0, 3), answer("c", -1.0, 4)];
        let texts = |n| best(answers(), n).into_iter().map(|answer| answer.text).collect::<Vec<_>>();
        assert_eq!(texts(1), ["c"]);
        assert_eq!(texts(2), ["c", "b"]);
        assert_eq!(texts(3), ["a", "b", "c"]);
    }
}
