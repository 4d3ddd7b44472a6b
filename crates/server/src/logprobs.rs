//! Log-probabilities with words: which bytes each token stands for where it stands.

use std::collections::BTreeMap;
use std::sync::Arc;

use engine::PromptLogprob;
use model::{Sampled, TokenLogprob};
use serde::Serialize;

use crate::text::detokenizer::Detokenizer;
use crate::text::vocabulary::Vocabulary;

/// JSON has no infinity; OpenAI writes this for a token that cannot be.
const LEAST_LOGPROB: f32 = -9999.0;

/// A token that was taken, with the alternatives in its place.
#[derive(Debug, Clone)]
pub(crate) struct TokenScore {
    pub(crate) token: TokenText,
    /// `None` for a prompt's first token, which nothing precedes.
    pub(crate) logprob: Option<f32>,
    /// Likeliest first.
    pub(crate) top: Vec<(TokenText, f32)>,
    /// Characters of text before this token.
    pub(crate) text_offset: usize,
}

/// One entry per prompt token, as vLLM has them: null for the first, which nothing precedes, else by token id.
pub(crate) type PromptLogprobs = Vec<Option<BTreeMap<u32, RankedLogprob>>>;

/// A prompt token, or what could stand in its place.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct RankedLogprob {
    logprob: f32,
    rank: u32,
    decoded_token: String,
}

/// What a token adds to a text.
#[derive(Debug, Clone)]
pub(crate) struct TokenText {
    pub(crate) id: u32,
    pub(crate) bytes: Vec<u8>,
}

/// What tokens are called beside their log-probabilities.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TokenNames {
    /// Their texts.
    Texts,
    /// vLLM's `token_id:7`, which tells tokens of one text apart.
    Ids,
}

impl TokenText {
    pub(crate) fn name(&self, names: TokenNames) -> String {
        match names {
            TokenNames::Texts => self.text(),
            TokenNames::Ids => format!("token_id:{}", self.id),
        }
    }

    /// The token's text; a token that is a part of a character is spelled `bytes:\xe2\x82`.
    pub(crate) fn text(&self) -> String {
        let spell =
            || self.bytes.iter().fold("bytes:".to_owned(), |text, byte| format!("{text}\\x{byte:02x}"));
        std::str::from_utf8(&self.bytes).map_or_else(|_| spell(), str::to_owned)
    }
}

/// The score of a generated token, if the engine was asked for one; control tokens show nothing and have none.
pub(crate) fn token_score(sampled: &Sampled, place: &Detokenizer, text_offset: usize) -> Option<TokenScore> {
    let own = sampled.logprob.filter(|own| !place.is_control(own.token))?;
    Some(score(own, &sampled.top_logprobs, place, text_offset))
}

/// The scores of a prompt's tokens, control tokens included.
pub(crate) fn prompt_scores(
    vocabulary: &Arc<Vocabulary>,
    prompt: &[u32],
    scores: &[Option<PromptLogprob>],
) -> Vec<TokenScore> {
    let mut place = Detokenizer::new(Arc::clone(vocabulary));
    let mut text_offset = 0;
    let mut described = Vec::with_capacity(prompt.len());
    for (&token, scored) in prompt.iter().zip(scores) {
        described.push(match scored {
            Some(scored) => score(scored.logprob, &scored.top_logprobs, &place, text_offset),
            None => TokenScore { token: text_of(token, &place), logprob: None, top: Vec::new(), text_offset },
        });
        let mut decoded = String::new();
        place.push(token, &mut decoded);
        text_offset += decoded.chars().count();
    }
    described
}

/// The log-probabilities of a prompt's tokens, and of the `num` likeliest in the place of each.
pub(crate) fn prompt_logprobs(
    vocabulary: &Arc<Vocabulary>,
    prompt: &[u32],
    scores: &[Option<PromptLogprob>],
    num: u32,
) -> PromptLogprobs {
    let mut place = Detokenizer::new(Arc::clone(vocabulary));
    let mut described = Vec::with_capacity(prompt.len());
    for (&token, scored) in prompt.iter().zip(scores) {
        let ranked = |scored: &TokenLogprob| {
            let decoded_token = text_of(scored.token, &place).text();
            (
                scored.token,
                RankedLogprob { logprob: at_least(scored.logprob), rank: scored.rank, decoded_token },
            )
        };
        described.push(scored.as_ref().map(|scored| {
            let top = scored.top_logprobs.iter().take(num as usize);
            top.chain([&scored.logprob]).map(ranked).collect()
        }));
        place.push(token, &mut String::new());
    }
    described
}

fn score(own: TokenLogprob, top: &[TokenLogprob], place: &Detokenizer, text_offset: usize) -> TokenScore {
    let top = top.iter().map(|scored| (text_of(scored.token, place), at_least(scored.logprob)));
    TokenScore {
        token: text_of(own.token, place),
        logprob: Some(at_least(own.logprob)),
        top: top.collect(),
        text_offset,
    }
}

fn text_of(token: u32, place: &Detokenizer) -> TokenText {
    TokenText { id: token, bytes: place.bytes_here(token) }
}

fn at_least(logprob: f32) -> f32 {
    if logprob.is_nan() { LEAST_LOGPROB } else { logprob.max(LEAST_LOGPROB) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::tokenizer::test_tokenizers::LLAMA;

    #[test]
    fn tokens_are_spelled_by_their_bytes() {
        let spelled = |bytes: &[u8]| TokenText { id: 7, bytes: bytes.to_vec() }.text();
        assert_eq!(spelled("é".as_bytes()), "é");
        assert_eq!(spelled(&[0xE2, 0x82]), "bytes:\\xe2\\x82");
    }

    #[test]
    fn prompt_scores_have_the_offsets_of_the_decoded_prompt() {
        let prompt = LLAMA.encode("é ab").unwrap();
        let none: Vec<Option<PromptLogprob>> = vec![None; prompt.len()];
        let scores = prompt_scores(LLAMA.vocabulary(), &prompt, &none);
        let described: Vec<_> = scores.iter().map(|score| (score.token.text(), score.text_offset)).collect();
        let expected = [("<s>", 0), ("", 0), ("bytes:\\xc3", 0), ("bytes:\\xa9", 0), (" a", 1), ("b", 3)];
        assert_eq!(described, expected.map(|(text, offset)| (text.to_owned(), offset)));
    }

    #[test]
    fn no_logprob_is_infinite() {
        assert_eq!(at_least(f32::NEG_INFINITY), LEAST_LOGPROB);
        assert_eq!(at_least(-1.5), -1.5);
    }
}
