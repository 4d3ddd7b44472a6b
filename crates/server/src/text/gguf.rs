//! The text files of a model in GGUF, made from the file's metadata.
//!
//! GGUF has a vocabulary and a template, but not Hugging Face's files. They are written here from what it has, so
//! that there is one way from words to tokens:
//!
//! ```text
//! tokenizer.ggml.model = "llama"   tokens, scores, types ─► BPE with byte fallback, merges derived from the scores
//!                        "gpt2"    tokens, merges, types ─► byte-level BPE, split by the expression of …ggml.pre
//! tokenizer.chat_template, bos, eos                      ─► tokenizer_config.json, generation_config.json
//! ```
//!
//! A SentencePiece vocabulary has a score per piece instead of merges. Its encoder joins the two neighbours that make
//! the best piece, so every way to make a piece of two others is a merge, and the best piece's merges come first; this
//! is how Hugging Face converts such vocabularies (`generate_merges` in `convert_slow_tokenizer.py`).
//!
//! What GGUF does not say is whether a space goes before words that follow a control token without one. In the words of
//! Llama 2 and the first Mixtral it does, whose templates write `<s>[INST]` or, later, `<s> [INST]` and mean the same;
//! in those of Mistral models whose `[INST]` is itself a control token it does not.

use std::cmp::Reverse;
use std::collections::HashMap;

use model::Metadata;
use serde_json::{Value, json};

use super::model::{TextError, TextFiles};

/// Longest piece of a SentencePiece vocabulary: splitting one at every place takes its length squared.
const MAX_PIECE_BYTES: usize = 1024;

/// Numbers in `tokenizer.ggml.token_type`.
const NORMAL: f64 = 1.0;
const UNKNOWN: f64 = 2.0;
const CONTROL: f64 = 3.0;
const USER_DEFINED: f64 = 4.0;

/// Tokens that end an answer: of the text, of a turn, of a message.
const END_TOKENS: [&str; 3] = ["eos_token_id", "eot_token_id", "eom_token_id"];

/// How Llama 3 splits text before merging.
const LLAMA_3_SPLIT: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
/// How Mistral Nemo and later models of Mistral do.
const TEKKEN_SPLIT: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// A file's vocabulary.
struct Words<'a> {
    metadata: &'a Metadata,
    tokens: Vec<String>,
    /// As many as tokens.
    types: Vec<f64>,
}

impl TextFiles {
    /// Writes the text files of a model in GGUF; `None` if the file has no vocabulary.
    ///
    /// # Errors
    /// [`TextError::Gguf`] names the key and what is wrong with it.
    pub fn from_gguf(metadata: &Metadata) -> Result<Option<Self>, TextError> {
        let Some(kind) = metadata.text("tokenizer.ggml.model").map_err(broken)? else { return Ok(None) };
        let words = Words::read(metadata)?;
        let tokenizer = match kind.as_str() {
            "llama" => words.sentence_piece()?,
            "gpt2" => words.byte_level()?,
            other => {
                let reason = format!("tokenizer.ggml.model is \"{other}\", expected \"llama\" or \"gpt2\"");
                return Err(TextError::Gguf(reason));
            }
        };
        Ok(Some(Self {
            tokenizer_json: tokenizer.to_string().into_bytes(),
            tokenizer_config_json: Some(words.tokenizer_config()?.to_string().into_bytes()),
            chat_template: None,
            generation_config_json: Some(words.generation_config()?.to_string().into_bytes()),
        }))
    }
}

impl<'a> Words<'a> {
    fn read(metadata: &'a Metadata) -> Result<Self, TextError> {
        let tokens = metadata.texts("tokenizer.ggml.tokens").map_err(broken)?;
        let tokens = tokens.ok_or_else(|| TextError::Gguf("tokenizer.ggml.tokens is missing".to_owned()))?;
        let words = Self { metadata, types: Vec::new(), tokens };
        let types = words.numbers("token_type")?.unwrap_or_else(|| vec![NORMAL; words.tokens.len()]);
        Ok(Self { types, ..words })
    }

    /// A `tokenizer.json` for a SentencePiece vocabulary.
    fn sentence_piece(&self) -> Result<Value, TextError> {
        let adds_space = self.flag("add_space_prefix")?.unwrap_or(true);
        let inst = self.tokens.iter().position(|token| token == "[INST]");
        let prepend_scheme = match (adds_space, inst) {
            (false, _) => "never",
            (true, Some(id)) if self.types[id] == CONTROL => "first",
            (true, _) => "always",
        };
        let mut decoders = vec![
            json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        if adds_space {
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        let unknown = self.types.iter().position(|&kind| kind == UNKNOWN).map(|id| &self.tokens[id]);
        Ok(json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": self.added_tokens()?,
            "normalizer": null,
            "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": prepend_scheme,
                "split": false},
            "post_processor": self.post_processor(true)?,
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": {"type": "BPE", "unk_token": unknown, "fuse_unk": true, "byte_fallback": true,
                "vocab": self.vocabulary(), "merges": self.merges_by_score()?},
        }))
    }

    /// A `tokenizer.json` for a vocabulary of byte strings.
    fn byte_level(&self) -> Result<Value, TextError> {
        let pre = self.metadata.text("tokenizer.ggml.pre").map_err(broken)?.unwrap_or_default();
        let split = match pre.as_str() {
            "llama-bpe" | "llama3" | "llama-v3" => Some(LLAMA_3_SPLIT),
            "tekken" => Some(TEKKEN_SPLIT),
            "gpt-2" => None,
            other => {
                let known = "\"llama-bpe\", \"tekken\" or \"gpt-2\"";
                return Err(TextError::Gguf(format!("tokenizer.ggml.pre is \"{other}\", expected {known}")));
            }
        };
        let by_split = split.map(|regex| {
            let pattern = json!({"Regex": regex});
            json!({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": false})
        });
        // GPT-2's own expression is a part of the next step.
        let use_regex = split.is_none();
        let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
            "use_regex": use_regex});
        let steps: Vec<Value> = by_split.into_iter().chain([bytes]).collect();
        Ok(json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": self.added_tokens()?,
            "normalizer": null, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
            "post_processor": self.post_processor(split.is_some())?,
            "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "unk_token": null, "fuse_unk": false, "byte_fallback": false,
                "ignore_merges": split.is_some(), "vocab": self.vocabulary(), "merges": self.written_merges()?},
        }))
    }

    fn vocabulary(&self) -> Value {
        self.tokens.iter().zip(0..).map(|(token, id)| (token.clone(), Value::from(id))).collect()
    }

    /// Tokens that are found in a text before anything else; the special ones add nothing to an answer.
    fn added_tokens(&self) -> Result<Vec<Value>, TextError> {
        let ends = [self.id("bos_token_id")?, self.id("eos_token_id")?];
        let added = (0..self.tokens.len()).filter_map(|id| {
            let special = ends.contains(&Some(id)) || [UNKNOWN, CONTROL].contains(&self.types[id]);
            (special || self.types[id] == USER_DEFINED).then(|| {
                json!({"id": id, "content": self.tokens[id], "single_word": false, "lstrip": false,
                    "rstrip": false, "normalized": false, "special": special})
            })
        });
        Ok(added.collect())
    }

    /// What goes around a prompt: the start token, and the end token for the rare model that wants it.
    fn post_processor(&self, adds_bos: bool) -> Result<Value, TextError> {
        let adds_bos = self.flag("add_bos_token")?.unwrap_or(adds_bos);
        let adds_eos = self.flag("add_eos_token")?.unwrap_or(false);
        let bos = self.id("bos_token_id")?.filter(|_| adds_bos);
        let eos = self.id("eos_token_id")?.filter(|_| adds_eos);
        let special = |id: usize| json!({"SpecialToken": {"id": self.tokens[id], "type_id": 0}});
        let sequence = |name: &str| json!({"Sequence": {"id": name, "type_id": 0}});
        let around = |sequences: &[Value]| {
            let start = bos.map(special).into_iter();
            start.chain(sequences.iter().cloned()).chain(eos.map(special)).collect::<Vec<_>>()
        };
        let named = |id: usize| {
            let token = &self.tokens[id];
            (token.clone(), json!({"id": token, "ids": [id], "tokens": [token]}))
        };
        let tokens: Value = bos.into_iter().chain(eos).map(named).collect();
        Ok(json!({"type": "TemplateProcessing", "single": around(&[sequence("A")]),
            "pair": around(&[sequence("A"), sequence("B")]), "special_tokens": tokens}))
    }

    /// Every pair of pieces that makes a piece, the best piece's first. Equal scores, which some converters write for
    /// all pieces, leave the order of ids, which is that of a SentencePiece vocabulary's scores.
    fn merges_by_score(&self) -> Result<Vec<Value>, TextError> {
        let scores = self.numbers("scores")?.unwrap_or_else(|| vec![0.0; self.tokens.len()]);
        let normal = (0..self.tokens.len()).filter(|&id| self.types[id] == NORMAL);
        let ids: HashMap<&str, usize> = normal.clone().map(|id| (self.tokens[id].as_str(), id)).collect();
        let mut merges = Vec::new();
        for id in normal {
            let piece = self.tokens[id].as_str();
            if piece.len() > MAX_PIECE_BYTES {
                let reason =
                    format!("token {id} has {} bytes, expected at most {MAX_PIECE_BYTES}", piece.len());
                return Err(TextError::Gguf(reason));
            }
            for (middle, _) in piece.char_indices().skip(1) {
                let (left, right) = piece.split_at(middle);
                if ids.contains_key(left) && ids.contains_key(right) {
                    merges.push((id, left, right));
                }
            }
        }
        merges.sort_by(|a, b| {
            let rest = |&(id, left, _): &(usize, &str, &str)| (id, Reverse(left.len()));
            scores[b.0].total_cmp(&scores[a.0]).then(rest(a).cmp(&rest(b)))
        });
        Ok(merges.into_iter().map(|(_, left, right)| json!([left, right])).collect())
    }

    /// The merges that the file lists, each as two tokens with a space between.
    fn written_merges(&self) -> Result<Vec<Value>, TextError> {
        let merges = self.metadata.texts("tokenizer.ggml.merges").map_err(broken)?;
        let merges = merges.ok_or_else(|| TextError::Gguf("tokenizer.ggml.merges is missing".to_owned()))?;
        let pair = |merge: String| match merge.split_once(' ') {
            Some((left, right)) => Ok(json!([left, right])),
            None => Err(TextError::Gguf(format!("tokenizer.ggml.merges has {merge:?}, expected two tokens"))),
        };
        merges.into_iter().map(pair).collect()
    }

    fn tokenizer_config(&self) -> Result<Value, TextError> {
        let name = |id: Option<usize>| id.map(|id| self.tokens[id].as_str());
        let template = |key: &str| self.metadata.text(key).map_err(broken);
        let default = template("tokenizer.chat_template")?;
        let templates = match template("tokenizer.chat_template.tool_use")? {
            None => json!(default),
            Some(for_tools) => {
                let default = default.map(|template| json!({"name": "default", "template": template}));
                let for_tools = json!({"name": "tool_use", "template": for_tools});
                default.into_iter().chain([for_tools]).collect()
            }
        };
        let (bos, eos) = (name(self.id("bos_token_id")?), name(self.id("eos_token_id")?));
        Ok(json!({"bos_token": bos, "eos_token": eos, "chat_template": templates}))
    }

    fn generation_config(&self) -> Result<Value, TextError> {
        let ids: Result<Vec<_>, _> = END_TOKENS.iter().map(|key| self.id(key)).collect();
        let mut ids: Vec<usize> = ids?.into_iter().flatten().collect();
        ids.dedup();
        Ok(json!({"eos_token_id": ids}))
    }

    /// The id under a key, which must be that of a token.
    fn id(&self, key: &str) -> Result<Option<usize>, TextError> {
        let id = self.metadata.size(&format!("tokenizer.ggml.{key}")).map_err(broken)?;
        match id {
            Some(id) if id >= self.tokens.len() => {
                let reason =
                    format!("tokenizer.ggml.{key} is {id}, expected one of {} tokens", self.tokens.len());
                Err(TextError::Gguf(reason))
            }
            id => Ok(id),
        }
    }

    fn flag(&self, key: &str) -> Result<Option<bool>, TextError> {
        self.metadata.flag(&format!("tokenizer.ggml.{key}")).map_err(broken)
    }

    /// A list of one number for each token.
    fn numbers(&self, key: &str) -> Result<Option<Vec<f64>>, TextError> {
        let numbers = self.metadata.numbers(&format!("tokenizer.ggml.{key}")).map_err(broken)?;
        match numbers {
            Some(numbers) if numbers.len() != self.tokens.len() => Err(TextError::Gguf(format!(
                "tokenizer.ggml.{key} has {} numbers, expected one for each of {} tokens",
                numbers.len(),
                self.tokens.len()
            ))),
            numbers => Ok(numbers),
        }
    }
}

fn broken(error: model::ModelError) -> TextError {
    TextError::Gguf(error.to_string())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use model::{Gguf, ModelError};

    use super::*;
    use crate::text::model::TextModel;

    fn fixture(name: &str) -> Result<Gguf, ModelError> {
        Gguf::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/gguf").join(name))
    }

    fn load(name: &str) -> (Gguf, TextModel) {
        let gguf = fixture(name).unwrap();
        let files = TextFiles::from_gguf(gguf.metadata()).unwrap().expect("a file with a vocabulary");
        let text = TextModel::new(&files).unwrap();
        (gguf, text)
    }

    /// The prompts of the demo model's evaluation, with the ids that its own tokenizer.json makes of them.
    fn demo_prompts() -> Vec<Value> {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../demo/eval");
        let files = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
        let texts = files.filter(|file| file.extension().is_some_and(|e| e == "jsonl"));
        let texts: Vec<String> = texts.map(|file| std::fs::read_to_string(file).unwrap()).collect();
        texts.iter().flat_map(|text| text.lines()).map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[test]
    fn the_demo_models_words_from_gguf_are_those_of_its_own_files() {
        let (_, text) = load("demo-words.gguf");
        assert_eq!(text.eos_token_ids, [2]);
        let prompts = demo_prompts();
        assert!(prompts.len() > 1000);
        for prompt in prompts {
            let ids = match prompt["prompt"].as_str() {
                Some(plain) => text.tokenizer.encode(plain),
                None => {
                    let tools = prompt["tools"].as_array().map(Vec::as_slice);
                    text.encode_chat(prompt["messages"].as_array().unwrap(), tools, 1 << 20)
                }
            };
            assert_eq!(json!(ids.unwrap()), prompt["prompt_ids"], "{}", prompt["id"]);
        }
    }

    #[test]
    fn words_after_a_control_token_get_a_space_unless_inst_is_one() {
        let (_, plain) = load("plain-words.gguf");
        let (_, demo) = load("demo-words.gguf");
        let shown = |text: &TextModel, source: &str| {
            text.tokenizer.whole_decode(&text.tokenizer.encode_bare(source).unwrap()[1..])
        };
        let ids = |text: &TextModel, source: &str| text.tokenizer.encode_bare(source).unwrap();
        assert_eq!(ids(&plain, "<s>hi"), ids(&plain, "<s> hi"));
        assert_ne!(ids(&demo, "<s>hi"), ids(&demo, "<s> hi"));
        assert_eq!(ids(&plain, "hi")[..], ids(&plain, "<s>hi")[1..]);
        assert_eq!(shown(&plain, "<s>[INST] hi [/INST]"), "[INST] hi [/INST]");
    }

    /// The fixtures carry texts and the ids that the tokenizer they were made of gives them.
    fn check_byte_level(name: &str) {
        let (gguf, text) = load(name);
        let texts = gguf.metadata().texts("test.texts").unwrap().unwrap();
        for (index, source) in texts.iter().enumerate() {
            let expected = gguf.metadata().numbers(&format!("test.ids.{index}")).unwrap().unwrap();
            let ids = text.tokenizer.encode(source).unwrap();
            assert_eq!(
                ids.iter().copied().map(f64::from).collect::<Vec<_>>(),
                expected,
                "{name}: {source:?}"
            );
            assert_eq!(text.tokenizer.whole_decode(&ids), source.replace("<|end|>", ""), "{name}");
        }
    }

    #[test]
    fn byte_level_vocabularies_are_split_as_their_models_split() {
        for name in ["llama-bpe-words.gguf", "tekken-words.gguf"] {
            check_byte_level(name);
        }
    }

    #[test]
    fn a_file_without_a_vocabulary_has_no_words() {
        let gguf = fixture("llama-dense-f16.gguf").unwrap();
        assert!(TextFiles::from_gguf(gguf.metadata()).unwrap().is_none());
    }
}
