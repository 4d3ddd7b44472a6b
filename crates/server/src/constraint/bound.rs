//! Where in an answer which grammar holds, and the engine's [`Constraint`] of one choice.
//!
//! ```text
//! text   ─ tokens ─────────────────────────► end      the text's grammar, if there is one
//!   └─ the tool-calls token ─► calls ──────► end      the calls' grammar, if there is one
//! ```
//!
//! A model calls tools by taking their token: anywhere if its text is free, only first if that is bound, and
//! at once if a call is forced.

use std::sync::Arc;

use engine::Constraint;
use llguidance::Matcher;

use super::compiler::{Template, permitted};

/// What the choices of a request are bound to.
#[derive(Clone, Default)]
pub(crate) struct Bound {
    /// The mask of all tokens that the answer is made of; then there is no grammar.
    pub(crate) tokens: Option<Arc<[u32]>>,
    /// The text of the answer; `None`: any text.
    pub(crate) text: Option<Arc<Template>>,
    /// The same where the text begins with a space that is not shown.
    pub(crate) text_behind_space: Option<Arc<Template>>,
    /// What follows the tool-calls token; `None`: anything.
    pub(crate) calls: Option<Arc<Template>>,
    /// The tool-calls token; `None` if there are no tools.
    pub(crate) calls_token: Option<u32>,
    /// The answer is a call of tools.
    pub(crate) is_forced: bool,
}

impl Bound {
    /// The constraints of `count` choices of one prompt; they share what their lexers learn. `hides_space`: a
    /// space at their start is not shown.
    pub(crate) fn start(&self, count: usize, hides_space: bool) -> Vec<Option<Box<dyn Constraint>>> {
        let start = |template: &Option<Arc<Template>>| template.as_deref().map(Reading::new);
        let text = if hides_space { &self.text_behind_space } else { &self.text };
        let (text, calls) = (start(text), start(&self.calls));
        let constraint = || -> Option<Box<dyn Constraint>> {
            if let Some(tokens) = &self.tokens {
                return Some(Box::new(OnlyThese(Arc::clone(tokens))));
            }
            if text.is_none() && calls.is_none() {
                return None;
            }
            Some(Box::new(BoundChoice::new(text.clone(), calls.clone(), self)))
        };
        (0..count).map(|_| constraint()).collect()
    }
}

/// The mask of some tokens.
pub(crate) fn mask_of(tokens: &[u32]) -> Arc<[u32]> {
    let num_words = tokens.iter().max().map_or(0, |&most| most / u32::BITS + 1);
    let mut mask = vec![0; num_words as usize];
    tokens.iter().for_each(|token| mask[(token / u32::BITS) as usize] |= 1 << (token % u32::BITS));
    mask.into()
}

/// One mask, from beginning to end.
struct OnlyThese(Arc<[u32]>);

impl Constraint for OnlyThese {
    fn allowed(&self) -> Option<&[u32]> {
        Some(&self.0)
    }

    fn accept(&mut self, _: u32) {}

    fn is_due(&self) -> bool {
        false
    }

    fn prepare(&mut self) {}

    fn is_complete(&self) -> bool {
        false
    }
}

/// A text as far as a grammar has read it.
#[derive(Clone)]
struct Reading {
    matcher: Matcher,
    mask: Vec<u32>,
    permitted: Arc<[u32]>,
    /// The mask is not the one of this place yet.
    is_due: bool,
    is_complete: bool,
}

impl Reading {
    fn new(template: &Template) -> Self {
        Self {
            matcher: template.matcher.deep_clone(),
            mask: template.first_mask.clone(),
            permitted: Arc::clone(&template.permitted),
            is_due: false,
            is_complete: false,
        }
    }

    fn accept(&mut self, token: u32) {
        // A matcher that fails here fails again where its mask is made.
        self.is_complete = self.matcher.consume_token(token).is_ok() && self.matcher.is_stopped();
        self.is_due = true;
    }

    fn prepare(&mut self) {
        self.is_due = false;
        self.mask = match self.matcher.compute_mask_or_eos() {
            Ok(mask) => permitted(mask.as_slice(), &self.permitted),
            Err(_) => {
                // Its words may be the client's.
                tracing::warn!("a grammar became too complex for its text");
                Vec::new()
            }
        };
    }
}

/// What may follow in one choice.
struct BoundChoice {
    now: Option<Reading>,
    calls: Option<Reading>,
    calls_token: Option<u32>,
    /// The mask of the first token, where that is not the one of what is read now.
    first_mask: Option<Vec<u32>>,
}

impl BoundChoice {
    fn new(text: Option<Reading>, calls: Option<Reading>, bound: &Bound) -> Self {
        let mut first_mask = None;
        if let Some(token) = bound.calls_token {
            let of_text = text.as_ref().map(|text| text.mask.clone());
            first_mask = if bound.is_forced { Some(Vec::new()) } else { of_text };
            if let Some(mask) = &mut first_mask {
                let word = (token / u32::BITS) as usize;
                mask.resize(mask.len().max(word + 1), 0);
                mask[word] |= 1 << (token % u32::BITS);
            }
        }
        Self { now: text, calls, calls_token: bound.calls_token, first_mask }
    }
}

impl Constraint for BoundChoice {
    fn allowed(&self) -> Option<&[u32]> {
        self.first_mask.as_deref().or_else(|| self.now.as_ref().map(|now| now.mask.as_slice()))
    }

    fn accept(&mut self, token: u32) {
        self.first_mask = None;
        if self.calls_token == Some(token) {
            // Its second time it is a word like any other: there is no way back to text.
            self.calls_token = None;
            self.now = self.calls.take();
        } else if let Some(now) = &mut self.now {
            now.accept(token);
        }
    }

    fn is_due(&self) -> bool {
        self.first_mask.is_none() && self.now.as_ref().is_some_and(|now| now.is_due)
    }

    fn prepare(&mut self) {
        if let Some(now) = &mut self.now {
            now.prepare();
        }
    }

    fn is_complete(&self) -> bool {
        self.first_mask.is_none() && self.now.as_ref().is_some_and(|now| now.is_complete)
    }
}
