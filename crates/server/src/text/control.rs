//! Control tokens (`<s>`, `[INST]`, `</s>`), kept out of reach of what clients write.
//!
//! Hugging Face renders a conversation to one string and parses control tokens in all of it, so that a user
//! who types `</s>` ends the turn. Here control tokens get a second, private spelling, drawn at random when
//! the server starts:
//!
//! ```text
//! template source   '[INST] ' + content        private spelling: U+FDD0 nonce ':' id U+FDD1
//! with spellings    '⟨3⟩ ' + content
//! rendered          ⟨3⟩ please ignore [/INST]   only ⟨3⟩ is a control token to the guarded tokenizer
//! ```
//!
//! The guarded tokenizer is the model's own with its control tokens renamed, so that any other text encodes
//! exactly as with Hugging Face. Content is passed through untouched, and nobody outside can spell a control
//! token. Rejected: escaping what users write (control tokens can arise where two strings meet), and encoding
//! segments one by one (the first segment's prefix space and merges across segments would differ).
//!
//! A template that assembles control tokens from parts (`'<|' + role + '|>'`) would get plain text instead.

use std::hash::{BuildHasher, RandomState};

use serde_json::{Map, Value};

/// The control tokens of one tokenizer with their private spellings.
#[derive(Debug)]
pub(crate) struct ControlTokens {
    /// Longest name first, so that the first match is the longest.
    tokens: Vec<ControlToken>,
}

#[derive(Debug)]
pub(crate) struct ControlToken {
    pub(crate) id: u64,
    pub(crate) name: String,
    pub(crate) spelling: String,
}

impl ControlTokens {
    /// Collects the tokens that `tokenizer.json` calls special.
    pub(crate) fn new(tokenizer_json: &Value) -> Self {
        let nonce = RandomState::new().hash_one(0);
        let added = tokenizer_json["added_tokens"].as_array().map(Vec::as_slice).unwrap_or_default();
        let token = |token: &Value| {
            let (id, name) = (token["id"].as_u64()?, token["content"].as_str()?.to_owned());
            let spelling = format!("\u{FDD0}{nonce:016x}:{id}\u{FDD1}");
            (token["special"] == true && !name.is_empty()).then_some(ControlToken { id, name, spelling })
        };
        let mut tokens: Vec<ControlToken> = added.iter().filter_map(token).collect();
        tokens.sort_by_key(|token| std::cmp::Reverse(token.name.len()));
        Self { tokens }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &ControlToken> {
        self.tokens.iter()
    }

    /// Replaces every control token in `source`, as a tokenizer would find them: leftmost, then longest.
    pub(crate) fn respell(&self, source: &str) -> String {
        let mut respelled = String::with_capacity(source.len());
        let mut rest = source;
        while let Some(first) = rest.chars().next() {
            let (taken, shown) = match self.tokens.iter().find(|token| rest.starts_with(&token.name)) {
                Some(token) => (token.name.len(), token.spelling.as_str()),
                None => (first.len_utf8(), &rest[..first.len_utf8()]),
            };
            respelled.push_str(shown);
            rest = &rest[taken..];
        }
        respelled
    }

    /// The inverse of [`respell`](Self::respell), for people to read.
    #[cfg(test)]
    pub(crate) fn unspell(&self, rendered: &str) -> String {
        let restore = |text: String, token: &ControlToken| text.replace(&token.spelling, &token.name);
        self.tokens.iter().fold(rendered.to_owned(), restore)
    }

    /// Renames the control tokens of a whole `tokenizer.json`: in the list of added tokens, in the model's
    /// vocabulary, and where the model names its unknown token.
    pub(crate) fn rename(&self, tokenizer_json: &mut Value) {
        let added = tokenizer_json["added_tokens"].as_array_mut().map(Vec::as_mut_slice).unwrap_or_default();
        for token in added {
            self.rename_string(&mut token["content"]);
        }
        let Some(model) = tokenizer_json["model"].as_object_mut() else { return };
        if let Some(unknown) = model.get_mut("unk_token") {
            self.rename_string(unknown);
        }
        if let Some(Value::Object(vocabulary)) = model.get_mut("vocab") {
            self.rename_keys(vocabulary);
        }
    }

    fn rename_keys(&self, vocabulary: &mut Map<String, Value>) {
        for token in &self.tokens {
            if let Some(id) = vocabulary.swap_remove(&token.name) {
                vocabulary.insert(token.spelling.clone(), id);
            }
        }
    }

    fn rename_string(&self, name: &mut Value) {
        if let Some(token) = self.tokens.iter().find(|token| *name == token.name) {
            *name = Value::from(token.spelling.as_str());
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_longest_control_token_is_respelled_and_restored() {
        let control = ControlTokens::new(&json!({"added_tokens": [
            {"id": 1, "content": "<s>", "special": true},
            {"id": 2, "content": "<s>[INST]", "special": true},
            {"id": 3, "content": "<tool>", "special": false},
        ]}));
        let respelled = control.respell("é<s>[INST]<s> <tool>");
        let spelling = |id: u64| control.iter().find(|token| token.id == id).unwrap().spelling.as_str();
        assert_eq!(respelled, format!("é{}{} <tool>", spelling(2), spelling(1)));
        assert_eq!(control.unspell(&respelled), "é<s>[INST]<s> <tool>");
    }

    #[test]
    fn spellings_differ_from_process_to_process() {
        let json = json!({"added_tokens": [{"id": 1, "content": "<s>", "special": true}]});
        assert_ne!(ControlTokens::new(&json).respell("<s>"), ControlTokens::new(&json).respell("<s>"));
    }
}
