//! From text to token ids, with Hugging Face's `tokenizers` doing the work.
//!
//! Two ways in. [`encode`](TextTokenizer::encode) takes a whole prompt from a client who could as well send
//! token ids: control tokens in it are parsed and the model's start token is added, as Hugging Face does.
//! [`encode_rendered`](TextTokenizer::encode_rendered) takes a rendered conversation, in which only the
//! template can write control tokens; see `control.rs`.

use std::sync::Arc;

use serde_json::Value;
use tokenizers::Tokenizer;

use super::control::ControlTokens;
use super::model::TextError;
use super::vocabulary::Vocabulary;

/// A model's tokenizer, for any number of threads.
pub(crate) struct TextTokenizer {
    plain: Tokenizer,
    guarded: Tokenizer,
    control: ControlTokens,
    vocabulary: Arc<Vocabulary>,
}

impl TextTokenizer {
    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// If the file is broken, or of a kind that is not supported.
    pub(crate) fn new(tokenizer_json: &[u8]) -> Result<Self, TextError> {
        let broken = |error: &dyn std::fmt::Display| TextError::Tokenizer(error.to_string());
        let mut json: Value = serde_json::from_slice(tokenizer_json).map_err(|e| broken(&e))?;
        let control = ControlTokens::new(&json);
        let plain = load(tokenizer_json)?;
        let vocabulary = Arc::new(Vocabulary::new(&plain, &json["decoder"])?);
        control.rename(&mut json);
        let guarded = load(&serde_json::to_vec(&json).map_err(|e| broken(&e))?)?;
        for token in control.iter() {
            if guarded.token_to_id(&token.spelling).map(u64::from) != Some(token.id) {
                return Err(TextError::Tokenizer(format!(
                    "control token {:?} has no id of its own",
                    token.name
                )));
            }
        }
        Ok(Self { plain, guarded, control, vocabulary })
    }

    /// Encodes a prompt as Hugging Face's `tokenizer(text)` does.
    ///
    /// # Errors
    /// If the tokenizer cannot encode the text (a tokenizer without bytes or unknown token).
    pub(crate) fn encode(&self, text: &str) -> Result<Vec<u32>, TextError> {
        encode(&self.plain, text, true)
    }

    /// Like [`encode`](Self::encode), without the tokens that the model wants around a text.
    pub(crate) fn encode_bare(&self, text: &str) -> Result<Vec<u32>, TextError> {
        encode(&self.plain, text, false)
    }

    /// Encodes a rendered conversation, whose control tokens are spelled by [`control`](Self::control).
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub(crate) fn encode_rendered(&self, rendered: &str) -> Result<Vec<u32>, TextError> {
        encode(&self.guarded, rendered, false)
    }

    /// The control tokens and their private spellings.
    pub(crate) fn control(&self) -> &ControlTokens {
        &self.control
    }

    /// What each token adds to a text.
    pub(crate) fn vocabulary(&self) -> &Arc<Vocabulary> {
        &self.vocabulary
    }

    /// The id of a token by its name in the vocabulary.
    pub(crate) fn token_to_id(&self, token: &str) -> Option<u32> {
        self.plain.token_to_id(token)
    }

    /// Hugging Face's decode of a whole, the specification of the detokenizer.
    #[cfg(test)]
    pub(crate) fn whole_decode(&self, ids: &[u32]) -> String {
        self.plain.decode(ids, true).expect("the test's tokenizer decodes")
    }
}

/// Reads a tokenizer without the truncation and padding that training may have left in it.
fn load(json: &[u8]) -> Result<Tokenizer, TextError> {
    let broken = |error: tokenizers::Error| TextError::Tokenizer(error.to_string());
    let mut tokenizer = Tokenizer::from_bytes(json).map_err(broken)?;
    tokenizer.with_truncation(None).map_err(broken)?.with_padding(None);
    Ok(tokenizer)
}

fn encode(tokenizer: &Tokenizer, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TextError> {
    let encoding = tokenizer.encode_fast(text, add_special_tokens);
    let encoding = encoding.map_err(|error| TextError::Encode(error.to_string()))?;
    Ok(encoding.get_ids().to_vec())
}

#[cfg(test)]
pub(crate) mod test_tokenizers {
    //! Two tiny tokenizers: Llama's manner and GPT-2's.

    use std::sync::LazyLock;

    use serde_json::{Value, json};

    use super::TextTokenizer;

    pub(crate) static LLAMA: LazyLock<TextTokenizer> = LazyLock::new(|| load(&llama_json()));
    pub(crate) static BYTE_LEVEL: LazyLock<TextTokenizer> = LazyLock::new(|| load(&byte_level_json()));

    fn load(json: &Value) -> TextTokenizer {
        TextTokenizer::new(json.to_string().as_bytes()).expect("the test's tokenizer loads")
    }

    const CONTROL: [&str; 10] = [
        "<unk>",
        "<s>",
        "</s>",
        "[INST]",
        "[/INST]",
        "[TOOL_CALLS]",
        "[AVAILABLE_TOOLS]",
        "[/AVAILABLE_TOOLS]",
        "[TOOL_RESULTS]",
        "[/TOOL_RESULTS]",
    ];

    fn added_tokens() -> Vec<Value> {
        let token = |(id, name): (usize, &&str)| {
            json!({"id": id, "content": name, "special": true, "normalized": false, "single_word": false,
                "lstrip": false, "rstrip": false})
        };
        CONTROL.iter().enumerate().map(token).collect()
    }

    /// Control tokens, 256 bytes, printable ASCII, `▁` and a few merges.
    pub(crate) fn llama_json() -> Value {
        let merges = [("▁", "a"), ("a", "b"), ("▁", "t"), ("▁t", "h"), ("l", "o"), ("▁", "▁")];
        let mut tokens: Vec<String> = CONTROL.map(str::to_owned).into();
        tokens.extend((0..256).map(|byte| format!("<0x{byte:02X}>")));
        tokens.extend((33u8..127).map(|byte| char::from(byte).to_string()));
        tokens.push("▁".into());
        tokens.extend(merges.map(|(a, b)| format!("{a}{b}")));
        let vocab: serde_json::Map<String, Value> =
            tokens.into_iter().zip(0..).map(|(t, id)| (t, json!(id))).collect();
        json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added_tokens(),
            "normalizer": null,
            "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false},
            "post_processor": {"type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
                {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": true, "ignore_merges": false,
                "vocab": vocab, "merges": merges.map(|(a, b)| json!([a, b]))},
        })
    }

    fn byte_level_json() -> Value {
        let is_printable = |byte: &u32| matches!(byte, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
        let printable = (0..256u32).filter(is_printable);
        let others = (0..256u32).filter(|byte| !is_printable(byte)).zip(0x100..).map(|(_, code)| code);
        let bytes =
            printable.chain(others).map(|code| char::from_u32(code).expect("a character").to_string());
        let vocab: serde_json::Map<String, Value> =
            bytes.zip(0..).map(|(token, id)| (token, json!(id))).collect();
        json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
            "added_tokens": [{"id": 256, "content": "<|end|>", "special": true, "normalized": false,
                "single_word": false, "lstrip": false, "rstrip": false}],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "post_processor": null,
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": true,
                "vocab": vocab, "merges": []},
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use proptest::prelude::*;

    use super::test_tokenizers::{BYTE_LEVEL, LLAMA};

    #[test]
    fn prompts_parse_control_tokens_and_conversations_do_not() {
        let text = &*LLAMA;
        assert_eq!(text.encode("</s>").unwrap(), [1, 2]);
        assert_eq!(text.encode_bare("</s>").unwrap(), [2]);
        let ids = text.encode_rendered("[INST] </s> [/INST]").unwrap();
        assert!(ids.iter().all(|&id| id > 9), "{ids:?}");
        assert_eq!(text.whole_decode(&ids), "[INST] </s> [/INST]");
        let ids = text.encode_rendered(&text.control().respell("[INST] </s>")).unwrap();
        assert_eq!((ids[0], ids.last()), (3, Some(&2)));
    }

    #[test]
    fn an_unbroken_word_of_200_kb_takes_less_than_a_second() {
        for text in [&*LLAMA, &*BYTE_LEVEL] {
            for word in ["a".repeat(200_000), "ab".repeat(100_000), "é".repeat(100_000), " ".repeat(200_000)]
            {
                let started = Instant::now();
                text.encode(&word).unwrap();
                assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
            }
        }
    }

    proptest! {
        /// The guarded tokenizer is Hugging Face's on any text that has no control tokens.
        #[test]
        fn renaming_control_tokens_changes_no_other_text(parts in proptest::collection::vec("\\PC{0,12}|[a-bt ]{0,6}", 0..4)) {
            let text = &*LLAMA;
            let joined = parts.join("[INST]");
            prop_assert_eq!(
                text.encode_rendered(&text.control().respell(&joined)).unwrap(),
                text.encode_bare(&joined).unwrap()
            );
        }
    }
}
