//! `POST /v1/routing/analyze`: how a model's routers take one or more given texts.
//!
//! A text is teacher-forced: it is read, not continued, so that its tokens are the same whatever is changed about the
//! routers. Each ablation reads it once more under overrides (`moe` of a chat), and shows what they cost in loss.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use engine::RecordRouting;
use model::{SampleParams, Steering};
use serde::Serialize;

use super::chat::Conversation;
use super::fields::{Fields, missing, string_at, wrong_value};
use super::params::{check_model, indexed};
use super::prompts::decode;
use super::routing::take_steering;
use crate::body::read_json;
use crate::choice_text::{Delta, TextOptions};
use crate::config::limits;
use crate::error::ApiError;
use crate::generation::{Arrival, Generation};
use crate::random;
use crate::routing::analysis::{LayerAnalysis, LayerDivergence};
use crate::routing::wire;
use crate::state::AppState;
use crate::text::model::{TextError, TextModel};

/// Most texts of a request, and most ablations.
pub(crate) const MAX_TEXTS: usize = 64;
pub(crate) const MAX_ABLATIONS: usize = 8;

#[derive(Serialize)]
pub(crate) struct Analysis {
    object: &'static str,
    model: String,
    num_experts: usize,
    top_k: usize,
    texts: Vec<TextAnalysis>,
    /// Per layer, how far the texts are from each other; empty for one text.
    divergence: Vec<LayerDivergence>,
}

#[derive(Serialize)]
struct TextAnalysis {
    name: String,
    num_tokens: usize,
    /// Mean negative log-likelihood of the tokens behind the first, in nats; null for a text of one token.
    loss: Option<f64>,
    perplexity: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tokens: Option<Vec<TokenLoss>>,
    layers: Vec<LayerAnalysis>,
    ablations: Vec<AblationLoss>,
}

#[derive(Serialize)]
struct TokenLoss {
    token: String,
    /// Null for the first token, which nothing precedes.
    loss: Option<f32>,
}

#[derive(Serialize)]
struct AblationLoss {
    name: String,
    loss: Option<f64>,
    perplexity: Option<f64>,
}

/// Analyses one or more texts.
pub(crate) async fn analyze(
    State(state): State<AppState>,
    request: Request,
) -> Result<Json<Analysis>, ApiError> {
    let arrival = Arrival::of(&request);
    let fields = read_json(&state, request).await?;
    let AnalysisRequest { texts, layers, shows_tokens, ablations } = AnalysisRequest::take(fields, &state)?;
    let (names, sources): (Vec<String>, Vec<Source>) = texts.into_iter().unzip();
    let max_bytes = state.config.max_prompt_bytes;
    let encode =
        move |text: &TextModel| sources.into_iter().map(|source| source.encode(text, max_bytes)).collect();
    let prompts: Vec<Vec<u32>> = state.with_text("texts", encode).await?;

    let record = RecordRouting { layers, prompt: true };
    let mut requests: Vec<engine::Request> =
        prompts.iter().map(|prompt| scored(&state, prompt, Some(record.clone()), None)).collect();
    for (_, steering) in &ablations {
        requests
            .extend(prompts.iter().map(|prompt| scored(&state, prompt, None, Some(Arc::clone(steering)))));
    }
    let mut generation = Generation::start(&state, requests, &TextOptions::default(), arrival, "texts")?;
    let mut answers = generation.finish().await?.into_iter();

    let num_experts = state.engine.limits().num_experts;
    let plain: Vec<Delta> = answers.by_ref().take(names.len()).collect();
    let mut texts: Vec<TextAnalysis> = Vec::with_capacity(names.len());
    for ((name, prompt), answer) in names.into_iter().zip(&prompts).zip(plain) {
        texts.push(TextAnalysis::new(&state, name, prompt, answer, num_experts, shows_tokens));
    }
    for (name, _) in &ablations {
        for (text, answer) in texts.iter_mut().zip(answers.by_ref()) {
            let loss = mean_loss(&answer);
            text.ablations.push(AblationLoss { name: name.clone(), loss, perplexity: loss.map(f64::exp) });
        }
    }
    let num_layers = texts.first().map_or(0, |text| text.layers.len());
    let divergence = |index: usize| {
        LayerDivergence::new(&texts.iter().map(|text| &text.layers[index]).collect::<Vec<_>>())
    };
    let divergence = if texts.len() > 1 { (0..num_layers).map(divergence).collect() } else { Vec::new() };
    Ok(Json(Analysis {
        object: "routing.analysis",
        model: state.config.model_name.clone(),
        num_experts,
        top_k: state.engine.limits().top_k,
        texts,
        divergence,
    }))
}

struct AnalysisRequest {
    texts: Vec<(String, Source)>,
    layers: Vec<u32>,
    shows_tokens: bool,
    ablations: Vec<(String, Arc<Steering>)>,
}

/// What a text is made of.
enum Source {
    Text(String),
    Messages(Conversation),
}

impl Source {
    /// Takes `text`, as completions read it, or `messages`, as chat does.
    fn take(fields: &mut Fields, state: &AppState) -> Result<Self, ApiError> {
        let path = fields.path("text");
        match fields.take("text") {
            Some(text) => Ok(Self::Text(string_at(&path, text, state.config.max_prompt_bytes)?)),
            None => Ok(Self::Messages(Conversation::take(fields, state)?.0)),
        }
    }

    fn encode(self, text: &TextModel, max_bytes: usize) -> Result<Vec<u32>, TextError> {
        match self {
            Self::Text(words) => text.tokenizer.encode(&words),
            Self::Messages(conversation) => conversation.encode(text, max_bytes),
        }
    }
}

impl AnalysisRequest {
    fn take(mut fields: Fields, state: &AppState) -> Result<Self, ApiError> {
        let limits = state.engine.limits();
        check_model(&mut fields, &state.config.model_name)?;
        if limits.num_experts == 1 {
            return Err(wrong_value("model", "it is dense: it has no experts to route to"));
        }
        let layers = wire::take_layers(&mut fields, "layers", limits.num_layers)?;
        let shows_tokens = fields.boolean("tokens")?.unwrap_or(false);
        let ablations = take_ablations(&mut fields, state)?;
        let texts = take_texts(&mut fields, state)?;
        fields.finish()?;
        let layers = layers.unwrap_or_else(|| (0..limits.num_layers as u32).collect());
        Ok(Self { texts, layers, shows_tokens, ablations })
    }
}

/// Takes `texts`, or the one text that stands in the body itself.
fn take_texts(fields: &mut Fields, state: &AppState) -> Result<Vec<(String, Source)>, ApiError> {
    let Some(texts) = fields.list("texts", MAX_TEXTS)? else {
        return Ok(vec![("text".to_owned(), Source::take(fields, state)?)]);
    };
    if texts.is_empty() {
        return Err(wrong_value("texts", "expected at least one text"));
    }
    let text = |(path, text)| {
        let mut fields = Fields::of(text, path)?;
        let path = fields.path("name");
        let name = fields.string("name", limits::MAX_LABEL_BYTES)?.ok_or_else(|| missing(path))?;
        let source = Source::take(&mut fields, state)?;
        fields.finish().map(|()| (name, source))
    };
    indexed("texts", texts).into_iter().map(text).collect()
}

/// Takes `ablations`, each a name and the overrides that it stands for.
fn take_ablations(fields: &mut Fields, state: &AppState) -> Result<Vec<(String, Arc<Steering>)>, ApiError> {
    let ablations = fields.list("ablations", MAX_ABLATIONS)?.unwrap_or_default();
    let ablation = |(path, ablation)| {
        let mut fields = Fields::of(ablation, path)?;
        let [name_path, moe_path] = ["name", "moe"].map(|name| fields.path(name));
        let name = fields.string("name", limits::MAX_LABEL_BYTES)?.ok_or_else(|| missing(name_path))?;
        let steering = take_steering(&mut fields, "moe", state.engine.limits())?;
        let steering = steering.ok_or_else(|| missing(moe_path))?;
        fields.finish().map(|()| (name, Arc::new(steering)))
    };
    indexed("ablations", ablations).into_iter().map(ablation).collect()
}

/// A request that reads a text and generates nothing.
fn scored(
    state: &AppState,
    prompt: &[u32],
    record_routing: Option<RecordRouting>,
    steering: Option<Arc<Steering>>,
) -> engine::Request {
    engine::Request {
        id: random::id("analysis-"),
        prompt: prompt.to_vec(),
        num_choices: 1,
        sampling: SampleParams::greedy(),
        max_tokens: 0,
        min_tokens: 0,
        eos_token_ids: state.text.eos_token_ids.clone(),
        ignore_eos: false,
        stop_token_ids: Vec::new(),
        num_logprobs: None,
        num_prompt_logprobs: Some(0),
        reports_progress: false,
        priority: 0,
        deadline: None,
        cache_salt: None,
        record_routing,
        steering,
    }
}

impl TextAnalysis {
    fn new(
        state: &AppState,
        name: String,
        prompt: &[u32],
        mut answer: Delta,
        num_experts: usize,
        shows_tokens: bool,
    ) -> Self {
        let loss = mean_loss(&answer);
        let scores = answer.prompt_scores.take().unwrap_or_default();
        let token = |(&id, score): (&u32, &crate::logprobs::TokenScore)| TokenLoss {
            token: if score.token.bytes.is_empty() { decode(&state.text, &[id]) } else { score.token.text() },
            loss: score.logprob.map(|logprob| -logprob),
        };
        let tokens = shows_tokens.then(|| prompt.iter().zip(&scores).map(token).collect());
        let record = answer.routing.unwrap_or_default();
        let layers = (0..record.layers.len()).map(|index| LayerAnalysis::new(&record, index, num_experts));
        Self {
            name,
            num_tokens: prompt.len(),
            loss,
            perplexity: loss.map(f64::exp),
            tokens,
            layers: layers.collect(),
            ablations: Vec::new(),
        }
    }
}

/// The mean over the tokens that have a loss.
fn mean_loss(answer: &Delta) -> Option<f64> {
    let losses = answer.prompt_scores.iter().flatten().filter_map(|score| score.logprob);
    let (sum, count) = losses.fold((0.0, 0), |(sum, count), logprob| (sum - f64::from(logprob), count + 1));
    (count > 0).then(|| sum / f64::from(count))
}
