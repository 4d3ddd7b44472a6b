//! Masks from a vocabulary whose bytes are told apart only where a grammar does.
//!
//! ```text
//! [A-Za-z ]{10,200}\.     a..zA..Z and space ► ' '     '.' ► '.'     all others ► '\0'
//! tokens                  "the", "Dog", "a b" ► "   "    "x." ► " ."    "été", "x=1" ► ...
//! ```
//!
//! To a lexer many bytes are one. Tokens that are the same string of such classes are allowed together or not at all,
//! so a grammar's own trie has each string once, spelt with the first byte of each class, and a mask is a walk over far
//! fewer nodes. That is worth much to regular expressions of wide classes, and nothing to JSON, whose names tell most
//! letters apart and whose strings llguidance's slices take whole: strings that are not few are not kept.

use std::collections::BTreeMap;
use std::sync::Arc;

use llguidance::TokenParser;
use llguidance::earley::{BiasComputer, ParserRecognizer};
use llguidance::toktrie::{INVALID_TOKEN, SimpleVob, TokRxInfo, TokTrie};

/// Tokens of the vocabulary for each string, at the least.
const MIN_TOKENS_PER_STRING: usize = 4;
/// What a node of a trie takes, with its share of the rest.
const NODE_BYTES: usize = 32;

/// Computes the masks of one grammar.
struct ByteClasses {
    /// Computes them token by token, where a mask is asked for behind bytes that are forced.
    of_tokens: Arc<dyn BiasComputer>,
    strings: TokTrie,
    /// Tokens by their strings: those of string `s` are `starts[s]..starts[s + 1]`.
    tokens: Vec<u32>,
    starts: Vec<u32>,
}

/// Lets a parser compute its masks by strings of classes, if they are few. Returns the bytes that these take.
pub(super) fn use_byte_classes(parser: &mut TokenParser) -> usize {
    let Some(classes) = ByteClasses::new(parser) else { return 0 };
    let num_bytes = classes.num_bytes();
    parser.bias_computer = Arc::new(classes);
    num_bytes
}

impl ByteClasses {
    fn new(parser: &TokenParser) -> Option<Self> {
        let lexer = parser.parser.grammar().lexer_spec().to_regex_vec(&mut parser.limits.clone()).ok()?;
        let mut first_bytes = [None; 256];
        let spelt: Vec<u8> =
            (0..=u8::MAX).map(|byte| *first_bytes[lexer.alpha().map(byte)].get_or_insert(byte)).collect();
        let vocabulary = parser.token_env.tok_trie();
        let max_strings = vocabulary.vocab_size() / MIN_TOKENS_PER_STRING;
        let mut tokens_of: BTreeMap<Vec<u8>, Vec<u32>> = BTreeMap::new();
        for token in 0..vocabulary.vocab_size() as u32 {
            let string: Vec<u8> = vocabulary.token(token).iter().map(|&byte| spelt[byte as usize]).collect();
            if !string.is_empty() {
                tokens_of.entry(string).or_default().push(token);
            }
            if tokens_of.len() > max_strings {
                return None;
            }
        }
        let (strings, tokens): (Vec<_>, Vec<_>) = tokens_of.into_iter().unzip();
        let ends = tokens.iter().scan(0, |end, tokens| {
            *end += tokens.len() as u32;
            Some(*end)
        });
        Some(Self {
            of_tokens: Arc::clone(&parser.bias_computer),
            strings: TokTrie::from(&TokRxInfo::new(strings.len() as u32, INVALID_TOKEN), &strings),
            starts: std::iter::once(0).chain(ends).collect(),
            tokens: tokens.concat(),
        })
    }

    fn num_bytes(&self) -> usize {
        size_of_val(&*self.tokens) + self.strings.root().subtree_size() * NODE_BYTES
    }
}

impl BiasComputer for ByteClasses {
    fn compute_bias(&self, recognizer: &mut ParserRecognizer<'_>, start: &[u8]) -> SimpleVob {
        if !start.is_empty() {
            return self.of_tokens.compute_bias(recognizer, start);
        }
        let mut strings = self.strings.alloc_token_set();
        self.strings.add_bias(recognizer, &mut strings, start);
        let mut mask = self.trie().alloc_token_set();
        strings.iter_set_entries(|string| {
            let tokens = self.starts[string] as usize..self.starts[string + 1] as usize;
            self.tokens[tokens].iter().for_each(|&token| mask.allow_token(token));
        });
        mask
    }

    fn trie(&self) -> &TokTrie {
        self.of_tokens.trie()
    }
}
