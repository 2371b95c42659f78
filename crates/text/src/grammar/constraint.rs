//! A compiled grammar applied to one sequence, token by token, with the thinking before it left free.

use std::sync::Arc;

use llguidance::Matcher;
use llguidance::api::StopReason;
use spark_api::{ConstraintError, TokenConstraint};

use super::compiler::clean;
use super::lesson::Lesson;
use super::marker::Marker;
use crate::Tokenizer;

/// Most newline tokens between a thinking block and what the grammar governs: a template's, and no part of the answer.
const MAX_NEWLINES: u8 = 2;

/// What all constraints of a tokenizer share.
pub(super) struct Setup {
    pub(super) tokenizer: Arc<Tokenizer>,
    /// `<think>`, if that is one token.
    pub(super) think_open: Option<u32>,
    pub(super) think_close: Marker,
    /// Tokens of one or two newlines.
    pub(super) newlines: Vec<u32>,
    pub(super) eos: Vec<u32>,
}

/// Where the output of a sequence begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GrammarStart {
    /// With the first token that the grammar governs.
    Answer,
    /// The model may open a thinking block first; if it does not, the grammar governs the first token.
    MayThink,
    /// Inside a thinking block: the grammar begins behind `</think>`.
    Thinking,
}

/// The mask of one sequence. The rules for thinking and free text:
///
/// - Inside a thinking block every token may follow, except those that end the sequence, so that the answer is reached,
///   and those that run past `</think>`. Up to two newline tokens behind the block belong to it.
/// - A grammar for tool calls in free text begins behind `<tool_call>`; outside of calls every token may follow.
#[derive(Clone)]
pub struct GrammarConstraint {
    matcher: Matcher,
    lesson: Arc<Lesson>,
    /// Work of the lexer, as the matcher knows it.
    cost: u64,
    /// The matcher at the grammar's start, for its next use in free text.
    fresh: Option<Matcher>,
    setup: Arc<Setup>,
    trigger: Option<Arc<Marker>>,
    phase: Phase,
    /// The end of free text, as far as it may begin a marker.
    tail: Vec<u8>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    MayThink,
    Thinking,
    /// Behind a thinking block, so many newline tokens may still come.
    Newlines(u8),
    /// Outside of tool calls.
    Free,
    Grammar,
}

impl GrammarConstraint {
    pub(super) fn new(
        matcher: Matcher,
        lesson: Arc<Lesson>,
        setup: Arc<Setup>,
        trigger: Option<Arc<Marker>>,
        start: GrammarStart,
    ) -> Self {
        let fresh = trigger.is_some().then(|| matcher.clone());
        let phase = match (start, &trigger) {
            (GrammarStart::Thinking, _) => Phase::Thinking,
            (_, Some(_)) => Phase::Free,
            (GrammarStart::MayThink, None) if setup.think_open.is_some() => Phase::MayThink,
            (GrammarStart::MayThink | GrammarStart::Answer, None) => Phase::Grammar,
        };
        Self { matcher, lesson, cost: 0, fresh, setup, trigger, phase, tail: Vec::new() }
    }

    fn after_thinking(&self) -> Phase {
        if self.trigger.is_some() { Phase::Free } else { Phase::Newlines(MAX_NEWLINES) }
    }

    /// Clears what the grammar does not allow.
    fn grammar_mask(&mut self, allowed: &mut [u32]) -> Result<(), ConstraintError> {
        let mask = self.matcher.compute_mask().map_err(|error| self.failed(&error.to_string()))?;
        self.lesson.note(&self.matcher, &mut self.cost);
        let words = mask.as_slice();
        for (i, word) in allowed.iter_mut().enumerate() {
            // A model may have more rows than its tokenizer has tokens.
            *word &= words.get(i).copied().unwrap_or(0);
        }
        Ok(())
    }

    fn commit_to_grammar(&mut self, token: u32) -> Result<bool, ConstraintError> {
        self.matcher.consume_token(token).map_err(|error| self.failed(&error.to_string()))?;
        match self.matcher.stop_reason() {
            StopReason::NotStopped => Ok(false),
            StopReason::EndOfSentence | StopReason::NoExtension => match &self.fresh {
                // The end of one call.
                Some(fresh) => {
                    self.matcher = fresh.clone();
                    self.cost = 0;
                    self.phase = Phase::Free;
                    Ok(false)
                }
                None => Ok(true),
            },
            reason => Err(self.failed(&reason.to_string())),
        }
    }

    fn failed(&self, message: &str) -> ConstraintError {
        self.lesson.fail();
        ConstraintError(clean(message))
    }

    /// Takes a token outside of the grammar's reach. `true`: the marker that ends this stretch is complete.
    fn push_free(&mut self, token: u32) -> bool {
        let bytes = self.setup.tokenizer.token_bytes(token);
        match (self.phase, &self.trigger) {
            (Phase::Free, Some(trigger)) => trigger.push(&mut self.tail, bytes),
            _ => self.setup.think_close.push(&mut self.tail, bytes),
        }
    }
}

impl TokenConstraint for GrammarConstraint {
    fn mask(&mut self, allowed: &mut [u32]) -> Result<(), ConstraintError> {
        match self.phase {
            Phase::Grammar => self.grammar_mask(allowed),
            Phase::MayThink => {
                self.grammar_mask(allowed)?;
                set(allowed, self.setup.think_open.as_slice());
                Ok(())
            }
            Phase::Newlines(_) => {
                self.grammar_mask(allowed)?;
                set(allowed, &self.setup.newlines);
                Ok(())
            }
            Phase::Thinking => {
                self.setup.eos.iter().for_each(|&id| clear(allowed, id));
                self.setup.think_close.forbidden(&self.tail).for_each(|id| clear(allowed, id));
                Ok(())
            }
            Phase::Free => {
                let forbidden = self.trigger.iter().flat_map(|trigger| trigger.forbidden(&self.tail));
                forbidden.for_each(|id| clear(allowed, id));
                Ok(())
            }
        }
    }

    fn commit(&mut self, token: u32) -> Result<bool, ConstraintError> {
        match self.phase {
            Phase::Grammar => return self.commit_to_grammar(token),
            Phase::MayThink if self.setup.think_open == Some(token) => self.phase = Phase::Thinking,
            Phase::Newlines(left) if self.setup.newlines.contains(&token) => {
                self.phase = if left > 1 { Phase::Newlines(left - 1) } else { Phase::Grammar };
            }
            Phase::MayThink | Phase::Newlines(_) => {
                self.phase = Phase::Grammar;
                return self.commit_to_grammar(token);
            }
            Phase::Thinking => {
                if self.push_free(token) {
                    self.phase = self.after_thinking();
                }
            }
            Phase::Free => {
                if self.push_free(token) {
                    self.phase = Phase::Grammar;
                }
            }
        }
        Ok(false)
    }
}

fn set(allowed: &mut [u32], ids: &[u32]) {
    for &id in ids {
        if let Some(word) = allowed.get_mut(id as usize / 32) {
            *word |= 1 << (id % 32);
        }
    }
}

fn clear(allowed: &mut [u32], id: u32) {
    if let Some(word) = allowed.get_mut(id as usize / 32) {
        *word &= !(1 << (id % 32));
    }
}
