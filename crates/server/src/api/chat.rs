//! `POST /v1/chat/completions`.
//!
//! The answer is a text of its own: the space that a Llama or Mistral tokenizer puts before its first word
//! is not shown, as in Hugging Face's decode of the generated tokens alone.

use axum::extract::{Request, State};
use axum::response::Response;
use serde::Serialize;
use serde_json::Value;

use super::fields::{Fields, wrong_value};
use super::messages;
use super::params::{Generate, Params, token_budget};
use super::routing::WrittenRouting;
use super::structured::{self, Format};
use super::tools::{self, Tools};
use crate::answer::{Aside, Meta, Wording, respond};
use crate::body::read_json;
use crate::choice_text::{Delta, Ending, TextOptions};
use crate::config::limits;
use crate::constraint::Bound;
use crate::error::ApiError;
use crate::generation::{Arrival, Generation};
use crate::logprobs::{TokenNames, TokenScore, TokenText};
use crate::routing::wire::RoutingBody;
use crate::state::AppState;
use crate::text::model::{TextError, TextModel};
use crate::tool_calls::ToolCall;

/// Answers a conversation.
pub(crate) async fn chat_completions(
    State(state): State<AppState>,
    request: Request,
) -> Result<Response, ApiError> {
    let arrival = Arrival::of(&request);
    let fields = read_json(&state, request).await?;
    let mut chat = ChatRequest::take(fields, &state)?;
    let meta = Meta::new(&state, "chatcmpl-", chat.params.service_tier);
    let (generation, prompt) = chat.start(&state, meta.id(), arrival).await?;
    let wording = ChatWording {
        num_choices: chat.params.n as usize,
        has_logprobs: chat.top_logprobs.is_some(),
        token_names: chat.params.token_names,
        returns_token_ids: chat.params.returns_token_ids,
        prompt_token_ids: Some(prompt).filter(|_| chat.params.returns_token_ids),
        routing: chat.params.routing.written,
    };
    respond(generation, wording, meta, &chat.params, &state).await
}

/// Messages and tools, as chat templates read them.
#[derive(Default)]
pub(crate) struct Conversation {
    messages: Vec<Value>,
    tools: Vec<Value>,
}

impl Conversation {
    pub(crate) fn take(fields: &mut Fields, state: &AppState) -> Result<(Self, Tools), ApiError> {
        let messages = messages::take(fields, state.config.max_prompt_bytes)?;
        let mut tools = tools::take(fields, &state.text)?;
        Ok((Self { messages, tools: std::mem::take(&mut tools.offered) }, tools))
    }

    pub(crate) fn has_tools(&self) -> bool {
        !self.tools.is_empty()
    }

    pub(crate) fn encode(&self, text: &TextModel, max_bytes: usize) -> Result<Vec<u32>, TextError> {
        text.encode_chat(&self.messages, self.has_tools().then_some(&self.tools[..]), max_bytes)
    }
}

/// A chat as it was asked for. Endpoints with other words for one translate them into a chat's.
pub(crate) struct ChatRequest {
    conversation: Conversation,
    pub(crate) params: Params,
    max_tokens: Option<u32>,
    /// `None` if no log-probabilities are asked for.
    pub(crate) top_logprobs: Option<u32>,
    has_tools: bool,
    tools: Tools,
    format: Option<Format>,
}

impl ChatRequest {
    pub(crate) fn take(mut fields: Fields, state: &AppState) -> Result<Self, ApiError> {
        let params = Params::take(&mut fields, state)?;
        let (conversation, tools) = Conversation::take(&mut fields, state)?;
        let max_tokens = take_max_tokens(&mut fields)?;
        let top_logprobs = take_top_logprobs(&mut fields)?;
        let format = structured::take(&mut fields, true, state.engine.limits().vocab_size)?;
        check_modalities(&mut fields)?;
        fields.finish()?;
        let has_tools = conversation.has_tools();
        Ok(Self { conversation, params, max_tokens, top_logprobs, has_tools, tools, format })
    }

    /// Begins to answer under the name `id`; returns the prompt too. To be called once.
    pub(crate) async fn start(
        &mut self,
        state: &AppState,
        id: &str,
        arrival: Arrival,
    ) -> Result<(Generation, Vec<u32>), ApiError> {
        let prompt = self.encode(state).await?;
        let max_model_len = state.engine.limits().max_model_len;
        let generate = Generate {
            id: id.to_owned(),
            max_tokens: token_budget(prompt.len(), self.max_tokens, u32::MAX, max_model_len, "messages")?,
            prompt: prompt.clone(),
            num_choices: self.params.n,
            num_logprobs: self.top_logprobs,
            num_prompt_logprobs: None,
        };
        let mut options = TextOptions {
            continues_prompt: false,
            stops: self.params.stops.clone(),
            tool_calls_token: state.text.tool_calls_token.filter(|_| self.has_tools),
            single_tool_call: self.tools.single_call,
            returns_token_ids: self.params.returns_token_ids,
            num_prompt_logprobs: self.params.num_prompt_logprobs,
            calls_are_expected: self.tools.is_named,
            bound: Bound::default(),
        };
        let hides_space = options.detokenizer(state.text.tokenizer.vocabulary(), &[]).hides_space();
        options.bound = structured::compile(state, self.format.take(), &self.tools, &[hides_space]).await?;
        let request = self.params.request(state, generate)?;
        let generation = Generation::start(state, vec![request], &options, arrival, "messages")?;
        Ok((generation, prompt))
    }

    /// Counts the conversation's tokens and does nothing more. To be called once.
    pub(crate) async fn count_tokens(&mut self, state: &AppState) -> Result<usize, ApiError> {
        Ok(self.encode(state).await?.len())
    }

    async fn encode(&mut self, state: &AppState) -> Result<Vec<u32>, ApiError> {
        let conversation = std::mem::take(&mut self.conversation);
        let max_bytes = state.config.max_prompt_bytes;
        state.with_text("messages", move |text| conversation.encode(text, max_bytes)).await
    }
}

fn take_max_tokens(fields: &mut Fields) -> Result<Option<u32>, ApiError> {
    let range = 1..=i64::from(u32::MAX);
    let old = fields.integer("max_tokens", range.clone())?;
    let new = fields.integer("max_completion_tokens", range)?;
    if old.is_some() && new.is_some() && old != new {
        return Err(wrong_value(
            "max_tokens",
            "it contradicts 'max_completion_tokens'; set only one of them",
        ));
    }
    Ok(new.or(old).map(|max_tokens| max_tokens as u32))
}

fn take_top_logprobs(fields: &mut Fields) -> Result<Option<u32>, ApiError> {
    let wanted = fields.boolean("logprobs")?.unwrap_or(false);
    let top = fields.integer("top_logprobs", 0..=limits::MAX_CHAT_LOGPROBS)?;
    match top {
        Some(_) if !wanted => Err(wrong_value("top_logprobs", "it is only allowed when 'logprobs' is true")),
        top => Ok(wanted.then_some(top.unwrap_or(0) as u32)),
    }
}

/// The answer is text.
fn check_modalities(fields: &mut Fields) -> Result<(), ApiError> {
    match fields.take("modalities") {
        Some(modalities) if modalities != serde_json::json!(["text"]) => {
            Err(wrong_value("modalities", "only [\"text\"] is supported"))
        }
        _ => Ok(()),
    }
}

/// How a chat words its answers.
struct ChatWording {
    num_choices: usize,
    has_logprobs: bool,
    token_names: TokenNames,
    returns_token_ids: bool,
    prompt_token_ids: Option<Vec<u32>>,
    routing: WrittenRouting,
}

#[derive(Serialize)]
struct Choice {
    index: usize,
    message: Message,
    logprobs: Option<Logprobs>,
    finish_reason: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    routing: Option<RoutingBody>,
}

#[derive(Serialize)]
struct Message {
    role: &'static str,
    content: Option<String>,
    refusal: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<Call>,
}

#[derive(Serialize)]
struct ChunkChoice {
    index: usize,
    delta: DeltaMessage,
    logprobs: Option<Logprobs>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    token_ids: Vec<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    routing: Option<RoutingBody>,
}

#[derive(Default, Serialize)]
struct DeltaMessage {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<Call>,
}

#[derive(Serialize)]
struct Call {
    /// Only in a stream.
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<usize>,
    /// This and the next only in a call's first part.
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
    function: Function,
}

#[derive(Serialize)]
struct Function {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    arguments: String,
}

#[derive(Serialize)]
struct Logprobs {
    content: Vec<TokenLogprob>,
    refusal: Option<()>,
}

/// A token of an answer, with what could stand in its place.
#[derive(Serialize)]
pub(crate) struct TokenLogprob {
    #[serde(flatten)]
    own: Scored,
    top_logprobs: Vec<Scored>,
}

#[derive(Serialize)]
struct Scored {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

impl Wording for ChatWording {
    const OBJECT: &'static str = "chat.completion";
    const CHUNK_OBJECT: &'static str = "chat.completion.chunk";
    type Choice = Choice;
    type ChunkChoice = ChunkChoice;

    fn opening(&self) -> Vec<ChunkChoice> {
        let begins = || DeltaMessage {
            role: Some("assistant"),
            content: Some(String::new()),
            ..DeltaMessage::default()
        };
        let choice = |index| ChunkChoice { delta: begins(), ..self.silence(index) };
        (0..self.num_choices).map(choice).collect()
    }

    fn chunk(&self, index: usize, delta: Delta) -> Option<ChunkChoice> {
        let is_empty = delta.text.is_empty() && delta.scores.is_empty() && delta.tool_calls.is_empty();
        if is_empty && delta.token_ids.is_empty() && delta.routing.is_none() {
            return None;
        }
        let tool_calls: Vec<Call> = delta.tool_calls.into_iter().map(|call| worded(call, true)).collect();
        let content = Some(delta.text).filter(|text| !text.is_empty() || tool_calls.is_empty());
        let delta_message = DeltaMessage { role: None, content, tool_calls };
        Some(ChunkChoice {
            index,
            delta: delta_message,
            logprobs: self.logprobs(delta.scores),
            finish_reason: None,
            token_ids: delta.token_ids,
            routing: self.routing.body(delta.routing),
        })
    }

    fn closing(&self, index: usize, ending: Ending) -> ChunkChoice {
        ChunkChoice { finish_reason: Some(ending.as_str()), ..self.silence(index) }
    }

    fn silence(&self, index: usize) -> ChunkChoice {
        let delta = DeltaMessage::default();
        ChunkChoice {
            index,
            delta,
            logprobs: None,
            finish_reason: None,
            token_ids: Vec::new(),
            routing: None,
        }
    }

    fn aside(&mut self, answers: &mut [Delta]) -> Aside {
        Aside {
            prompt_token_ids: self.prompt_token_ids.take(),
            prompt_logprobs: answers.iter_mut().find_map(|answer| answer.prompt_logprobs.take()),
            ..Aside::default()
        }
    }

    fn whole(&self, answers: Vec<Delta>) -> Vec<Choice> {
        answers.into_iter().enumerate().map(|(index, answer)| self.choice(index, answer)).collect()
    }
}

impl ChatWording {
    fn choice(&self, index: usize, answer: Delta) -> Choice {
        let tool_calls: Vec<Call> = answer.tool_calls.into_iter().map(|call| worded(call, false)).collect();
        let content = Some(answer.text).filter(|text| !text.is_empty() || tool_calls.is_empty());
        Choice {
            index,
            message: Message { role: "assistant", content, refusal: None, tool_calls },
            logprobs: self.logprobs(answer.scores),
            finish_reason: answer.ending.unwrap_or(Ending::Stop).as_str(),
            token_ids: self.returns_token_ids.then_some(answer.token_ids),
            routing: self.routing.body(answer.routing),
        }
    }

    fn logprobs(&self, scores: Vec<TokenScore>) -> Option<Logprobs> {
        let content = || scores.into_iter().map(|score| described(score, self.token_names)).collect();
        self.has_logprobs.then(|| Logprobs { content: content(), refusal: None })
    }
}

/// A call, or a part of one as a stream has it.
fn worded(call: ToolCall, is_streamed: bool) -> Call {
    let is_first = !call.id.is_empty();
    let function = Function { name: is_first.then_some(call.name), arguments: call.arguments };
    Call {
        index: is_streamed.then_some(call.index),
        id: is_first.then_some(call.id),
        kind: is_first.then_some("function"),
        function,
    }
}

pub(crate) fn described(score: TokenScore, names: TokenNames) -> TokenLogprob {
    let scored =
        |token: TokenText, logprob: f32| Scored { token: token.name(names), logprob, bytes: token.bytes };
    let top_logprobs = score.top.into_iter().map(|(token, logprob)| scored(token, logprob)).collect();
    // Generated tokens all have one; only a prompt's first token has none.
    TokenLogprob { own: scored(score.token, score.logprob.unwrap_or(0.0)), top_logprobs }
}
