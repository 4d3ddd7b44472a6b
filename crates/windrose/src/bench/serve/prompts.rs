//! Prompts that are seeded, and all different from their first word on, so that no prefix cache helps unless a shared
//! prefix is asked for.

use std::fmt;

use model::mix64;
use serde::Serialize;
use serde_json::{Value, json};

use super::client::ApiClient;
use super::options::Options;

/// Common short words, which most tokenizers have as one token each.
const WORDS: [&str; 64] = [
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school",
    "state", "family", "student", "group", "country", "problem", "hand", "part", "place", "case", "week",
    "company", "system", "program", "question", "work", "number", "night", "point", "home", "water", "room",
    "mother", "area", "money", "story", "fact", "month", "lot", "right", "study", "book", "eye", "job",
    "word", "business", "issue", "side", "kind", "head", "house", "service", "friend", "father", "power",
    "hour", "game", "line", "end", "member", "law", "car",
];
/// Words that are tokenized to learn how many tokens a word is.
const SAMPLE_WORDS: usize = 512;

/// What lengths of prompts are counted in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Unit {
    Words,
    Tokens,
}

/// A source of prompts.
pub(super) struct Prompts {
    pub(super) unit: Unit,
    seed: u64,
    prefix: String,
    num_words: usize,
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Words => "words",
            Self::Tokens => "tokens",
        })
    }
}

impl Prompts {
    /// Finds out how many words make the tokens asked for, if the server tells.
    pub(super) async fn new(client: &ApiClient, model: &str, options: &Options) -> Self {
        let seed = mix64(options.seed);
        let tokens_per_word = tokens_per_word(client, model, seed).await;
        let num_words = |len: usize| (len as f64 / tokens_per_word.unwrap_or(1.0)).round() as usize;
        let mut prefix = words(mix64(seed), num_words(options.shared_prefix_len));
        if !prefix.is_empty() {
            prefix.push(' ');
        }
        Self {
            unit: if tokens_per_word.is_some() { Unit::Tokens } else { Unit::Words },
            seed,
            prefix,
            num_words: num_words(options.prompt_len).max(1),
        }
    }

    /// The prompt of one request.
    pub(super) fn prompt(&self, index: usize) -> String {
        // Numbered from 1, as 0 would be the shared prefix's own seed.
        self.prefix.clone() + &words(mix64(self.seed ^ (index as u64 + 1)), self.num_words)
    }
}

/// `None` if the server has no /tokenize, or another one.
async fn tokens_per_word(client: &ApiClient, model: &str, seed: u64) -> Option<f64> {
    let sample = words(seed, SAMPLE_WORDS);
    let body = json!({"model": model, "prompt": sample, "add_special_tokens": false});
    let answer = client.post("/tokenize", &body).await.ok()?;
    let count = answer.get("count").and_then(Value::as_u64).filter(|&count| count > 0)?;
    Some(count as f64 / SAMPLE_WORDS as f64)
}

fn words(seed: u64, count: usize) -> String {
    let word = |index: u64| WORDS[(mix64(seed ^ mix64(index)) % WORDS.len() as u64) as usize];
    (0..count as u64).map(word).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn prompts(seed: u64, prefix: &str) -> Prompts {
        Prompts { unit: Unit::Words, seed, prefix: prefix.to_owned(), num_words: 12 }
    }

    #[test]
    fn prompts_are_seeded_and_all_different() {
        let all: HashSet<String> = (0..2000).map(|index| prompts(1, "").prompt(index)).collect();
        assert_eq!(all.len(), 2000);
        assert!(all.iter().all(|prompt| prompt.split(' ').count() == 12));
        assert_eq!(prompts(1, "").prompt(5), prompts(1, "").prompt(5));
        assert_ne!(prompts(1, "").prompt(5), prompts(2, "").prompt(5));
    }

    #[test]
    fn a_shared_prefix_comes_first() {
        let prompts = prompts(1, "once upon ");
        assert!((0..9).all(|index| prompts.prompt(index).starts_with("once upon ")));
        assert_ne!(prompts.prompt(0), prompts.prompt(1));
    }
}
