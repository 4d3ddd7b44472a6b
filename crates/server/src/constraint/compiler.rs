//! From a [`Source`] to a [`Template`], at a bounded price.
//!
//! A grammar comes from a client and may be made to hurt. Each is compiled on a thread of its own, off the
//! engine and off the async threads, with a deep stack for what recurses over schemas; llguidance counts its
//! work and gives up; a client waits no longer than the deadline, and few threads run at a time. What was
//! compiled is kept in a cache that is bounded in bytes. Templates are never matched with: a matcher's lexer
//! grows as it reads, and what grows belongs to one request.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use llguidance::api::{GrammarInit, ParserLimits};
use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::InferenceCapabilities;
use llguidance::{Logger, Matcher, ParserFactory};
use serde_json::Value;
use thiserror::Error;
use tokio::sync::{Semaphore, oneshot};
use tokio::time::timeout;

use super::byte_classes::use_byte_classes;
use super::location::locate;
use super::source::{Calls, Source, Tool};
use super::vocabulary_trie::VocabularyTrie;
use crate::text::model::TextModel;

/// Time in which a grammar is compiled, and in which it gets its turn.
const DEADLINE: Duration = Duration::from_secs(3);
/// Grammars that are compiled at the same time.
const MAX_THREADS: usize = 2;
/// Schemas refer to others, and are descended into.
const STACK_BYTES: usize = 64 << 20;
/// Bytes of templates that are kept.
const CACHE_BYTES: usize = 64 << 20;
/// What a template takes: so much, and so many times its source, and its classes of bytes. Estimated from schemas of 1 to
/// 100 kB.
const TEMPLATE_BYTES: usize = 64 << 10;
const TEMPLATE_BYTES_PER_BYTE: usize = 64;
/// Tokens that are taken whole where a grammar takes all of them, besides llguidance's own slices, which are those of
/// JSON's strings: half of the pieces of words. A class that is counted takes them while it has room for so many.
const SLICES: [&str; 2] = ["[a-z]{1,5}", "[a-z]{1,10}"];
/// Longest message of llguidance that is passed on.
const MAX_MESSAGE_CHARS: usize = 300;

/// Why there is no template.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(crate) enum GrammarError {
    /// It means nothing, or too much.
    #[error("{message}")]
    Invalid {
        /// The tool whose schema it is, by its place among those that may be called.
        tool: Option<usize>,
        /// Path of what is wrong within the schema; empty if it is the whole, or is not known.
        at: String,
        /// What is wrong.
        message: String,
    },
    /// It takes too long.
    #[error("it is too complex to be compiled in {} s", DEADLINE.as_secs())]
    TooSlow,
    /// Others are compiled, and it did not get its turn.
    #[error("too many grammars are being compiled")]
    Busy,
    /// This server is at fault.
    #[error("the compiler failed")]
    Failed,
}

/// A grammar, ready to be matched.
pub(crate) struct Template {
    pub(super) matcher: Matcher,
    /// The tokens that a text may begin with.
    pub(super) first_mask: Vec<u32>,
    pub(super) permitted: Arc<[u32]>,
    /// Bytes of what only some have.
    num_class_bytes: usize,
}

/// Compiles grammars for one vocabulary.
pub(crate) struct Compiler {
    /// `None` if the vocabulary cannot be walked; the log says why.
    tokens: Option<Arc<Tokens>>,
    permits: Arc<Semaphore>,
    cache: Mutex<Cache>,
}

struct Tokens {
    factory: ParserFactory,
    permitted: Arc<[u32]>,
}

impl Tokens {
    fn new(text: &TextModel, vocab_size: usize) -> Option<Self> {
        let VocabularyTrie { env, permitted } =
            VocabularyTrie::new(text.tokenizer.vocabulary(), &text.eos_token_ids, vocab_size);
        let slices = [SlicedBiasComputer::general_slices(), SLICES.map(str::to_owned).to_vec()].concat();
        let factory = ParserFactory::new(&env, InferenceCapabilities::default(), &slices)
            .inspect_err(|error| tracing::error!(%error, "the vocabulary cannot be constrained"))
            .ok()?;
        Some(Self { factory, permitted })
    }
}

/// Fuel for a start of 20 ms and for a mask of about 10 at most; a grammar that needs more has become too complex, and
/// its choice ends. Of a mask the lexer has about 4 ms. The parser's items are worth 0.5 µs each, and several times
/// that where a text can be read in many ways, which a schema and a regular expression hardly allow.
fn limits(source: &Source) -> ParserLimits {
    let step_max_items = if matches!(source, Source::Lark(_)) { 8_000 } else { 20_000 };
    ParserLimits {
        initial_lexer_fuel: 1_000_000,
        step_lexer_fuel: 50_000,
        step_max_items,
        max_lexer_states: 20_000,
        max_grammar_size: 200_000,
        verbose_errors: false,
        ..ParserLimits::default()
    }
}

impl Compiler {
    /// Builds the trie of a model's vocabulary.
    pub(crate) fn new(text: &TextModel, vocab_size: usize) -> Self {
        let tokens = Tokens::new(text, vocab_size).map(Arc::new);
        Self { tokens, permits: Arc::new(Semaphore::new(MAX_THREADS)), cache: Mutex::default() }
    }

    /// Compiles a grammar, or finds it in the cache. `begins_with_space`: its text begins with the space
    /// that is not shown.
    ///
    /// # Errors
    /// [`GrammarError`].
    pub(crate) async fn compile(
        &self,
        source: Source,
        begins_with_space: bool,
    ) -> Result<Arc<Template>, GrammarError> {
        let key = serde_json::to_string(&(&source, begins_with_space)).map_err(|_| GrammarError::Failed)?;
        if let Some(template) = self.lock().get(&key) {
            return Ok(template);
        }
        let tokens = Arc::clone(self.tokens.as_ref().ok_or(GrammarError::Failed)?);
        let permit = timeout(DEADLINE, Arc::clone(&self.permits).acquire_owned()).await;
        let permit = permit.map_err(|_| GrammarError::Busy)?.map_err(|_| GrammarError::Failed)?;
        let (sender, receiver) = oneshot::channel();
        let compile = move || {
            // Whoever waited may be gone; a thread that is late still counts.
            let _ = sender.send(tokens.compile(&source, begins_with_space));
            drop(permit);
        };
        let thread = std::thread::Builder::new().name("windrose-grammar".to_owned()).stack_size(STACK_BYTES);
        thread.spawn(compile).map_err(|_| GrammarError::Failed)?;
        let compiled = timeout(DEADLINE, receiver).await.map_err(|_| GrammarError::TooSlow)?;
        let template = Arc::new(compiled.map_err(|_| GrammarError::Failed)??);
        self.lock().insert(key, &template);
        Ok(template)
    }

    fn lock(&self) -> MutexGuard<'_, Cache> {
        // Nothing under the lock leaves the cache half changed.
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tokens {
    fn compile(&self, source: &Source, begins_with_space: bool) -> Result<Template, GrammarError> {
        let message = match self.template(source, begins_with_space) {
            Ok(template) => return Ok(template),
            Err(message) => message,
        };
        Err(match source {
            Source::Schema(schema) => self.locate(None, schema, message),
            Source::Calls(Calls { tools, .. }) => {
                let faulty = |(index, tool): (usize, &Tool)| {
                    let schema = tool.parameters.as_ref()?;
                    let message = self.template(&Source::Schema(schema.clone()), false).err()?;
                    Some(self.locate(Some(index), schema, message))
                };
                let together = || GrammarError::Invalid { tool: None, at: String::new(), message };
                tools.iter().enumerate().find_map(faulty).unwrap_or_else(together)
            }
            Source::Regex(_) => {
                // Its own position within the expression follows behind that in the grammar around it.
                let message = message.rsplit("regex parse error:\n").next().unwrap_or_default().to_owned();
                GrammarError::Invalid { tool: None, at: String::new(), message }
            }
            _ => GrammarError::Invalid { tool: None, at: String::new(), message },
        })
    }

    fn locate(&self, tool: Option<usize>, schema: &Value, message: String) -> GrammarError {
        let mut compile = |part: &Value| self.template(&Source::Schema(part.clone()), false).map(|_| ());
        let (at, message) = locate(schema, message, &mut compile);
        GrammarError::Invalid { tool, at, message }
    }

    /// A template, or what is wrong.
    fn template(&self, source: &Source, begins_with_space: bool) -> Result<Template, String> {
        let grammar = GrammarInit::Serialized(source.grammar(begins_with_space)?);
        let (silence, capabilities) = (Logger::new(0, 0), InferenceCapabilities::default());
        let parser = self.factory.create_parser_from_init_ext(grammar, silence, capabilities, limits(source));
        let mut parser = parser.map_err(|error| words(&error.to_string()))?;
        let num_class_bytes = use_byte_classes(&mut parser);
        let mut matcher = Matcher::new(Ok(parser));
        let first_mask = self.first_mask(&mut matcher)?;
        if begins_with_space {
            // What comes behind the space is looked at too.
            let space =
                self.factory.tok_env().tok_trie().token_id(b" ").ok_or("it needs a token for a space")?;
            let mut behind = matcher.deep_clone();
            behind.consume_token(space).map_err(|error| words(&error.to_string()))?;
            self.first_mask(&mut behind)?;
        }
        Ok(Template { matcher, first_mask, permitted: Arc::clone(&self.permitted), num_class_bytes })
    }

    fn first_mask(&self, matcher: &mut Matcher) -> Result<Vec<u32>, String> {
        let mask = matcher.compute_mask_or_eos().map_err(|error| words(&error.to_string()))?;
        let mask = permitted(mask.as_slice(), &self.permitted);
        let is_possible = mask.iter().any(|&word| word != 0);
        if is_possible { Ok(mask) } else { Err("no text can satisfy it".to_owned()) }
    }
}

/// What a mask allows of what is permitted.
pub(super) fn permitted(mask: &[u32], permitted: &[u32]) -> Vec<u32> {
    mask.iter().zip(permitted).map(|(allowed, permitted)| allowed & permitted).collect()
}

/// llguidance's words, unless they speak of itself.
fn words(message: &str) -> String {
    // What follows are its state, the grammar that this server made, and options that no client has.
    let ends = ["\n<", "\n   1 |", " Enable '"].map(|end| message.find(end).unwrap_or(message.len()));
    let message = &message[..ends.into_iter().min().unwrap_or_default()];
    if message.contains("panic") || message.contains(".rs:") {
        return "it is not supported".to_owned();
    }
    if message.is_empty() || message == "NoExtensionBias" {
        return "no text can satisfy it".to_owned();
    }
    let is_shown = |c: &char| !c.is_control() || *c == '\n';
    message.trim_end_matches(['.', '\n']).chars().filter(is_shown).take(MAX_MESSAGE_CHARS).collect()
}

/// Templates by their sources; the one unused for longest goes first.
#[derive(Default)]
struct Cache {
    entries: HashMap<String, Entry>,
    num_bytes: usize,
    num_uses: u64,
}

struct Entry {
    template: Arc<Template>,
    last_use: u64,
}

impl Cache {
    fn get(&mut self, key: &str) -> Option<Arc<Template>> {
        self.num_uses += 1;
        let entry = self.entries.get_mut(key)?;
        entry.last_use = self.num_uses;
        Some(Arc::clone(&entry.template))
    }

    fn insert(&mut self, key: String, template: &Arc<Template>) {
        let num_bytes = template_bytes(&key, template);
        if num_bytes > CACHE_BYTES || self.entries.contains_key(&key) {
            return;
        }
        while self.num_bytes + num_bytes > CACHE_BYTES {
            let oldest = self.entries.iter().min_by_key(|(_, entry)| entry.last_use);
            let Some(oldest) = oldest.map(|(key, _)| key.clone()) else { break };
            let Some(entry) = self.entries.remove(&oldest) else { break };
            self.num_bytes -= template_bytes(&oldest, &entry.template);
        }
        self.num_uses += 1;
        self.num_bytes += num_bytes;
        self.entries.insert(key, Entry { template: Arc::clone(template), last_use: self.num_uses });
    }
}

fn template_bytes(key: &str, template: &Template) -> usize {
    TEMPLATE_BYTES + TEMPLATE_BYTES_PER_BYTE * key.len() + template.num_class_bytes
}
