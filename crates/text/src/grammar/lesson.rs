//! What sequences learn about a grammar, kept for those that come later. A matcher works out the states of its lexer as
//! texts come to them, which is most of what a mask costs: one that has been used is several times as fast as a new one.
//! Masks are the same with it and without.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use llguidance::Matcher;

/// Work of a lexer after which nothing more is kept, in the compiler's units. For strings of bounded length, which cost the
/// most, that is some 3 MB.
const MAX_COST: u64 = 250_000;
/// Share of work by which a matcher must be ahead to be kept instead of the one that is there.
const MIN_GAIN: u64 = 8;

/// The matcher from which sequences begin, at the start of the grammar.
pub(super) struct Template(Mutex<Kept>);

struct Kept {
    matcher: Matcher,
    /// Work that its lexer has done since the compilation.
    cost: u64,
}

impl Kept {
    fn is_behind(&self, cost: u64) -> bool {
        cost > self.cost + self.cost / MIN_GAIN
    }
}

impl Template {
    pub(super) fn new(matcher: Matcher) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Kept { matcher, cost: 0 })))
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        // What is in it is exchanged whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a matcher that has learned this much is worth keeping.
    fn is_behind(&self, cost: u64) -> bool {
        self.lock().is_behind(cost)
    }

    fn keep(&self, cost: u64, matcher: Matcher) {
        let mut kept = self.lock();
        if kept.is_behind(cost) {
            *kept = Kept { matcher, cost };
        }
    }

    /// A matcher for a sequence, which shares nothing that changes with others, and where to put what it learns.
    pub(super) fn begin(self: &Arc<Self>) -> (Matcher, Arc<Lesson>) {
        let kept = self.lock();
        let matcher = kept.matcher.deep_clone();
        drop(kept);
        // Clones that are not deep share a lexer.
        let lesson = Lesson {
            start: Some(matcher.clone()),
            cost: AtomicU64::new(0),
            has_failed: AtomicBool::new(false),
            is_full: AtomicBool::new(false),
            template: self.clone(),
        };
        (matcher, Arc::new(lesson))
    }
}

/// What one sequence and its clones learn, handed in when the last of them is gone.
pub(super) struct Lesson {
    /// At the start of the grammar, with the lexer of the sequence. `None` only while it is handed in.
    start: Option<Matcher>,
    cost: AtomicU64,
    /// The lexer may be broken.
    has_failed: AtomicBool,
    /// It has learned as much as is kept, and has been handed in.
    is_full: AtomicBool,
    template: Arc<Template>,
}

impl Lesson {
    /// A mask has been computed. `cost` is the work of the lexer as this matcher knows it, which begins at nothing: with
    /// its first mask it learns what was done before.
    pub(super) fn note(&self, matcher: &Matcher, cost: &mut u64) {
        *cost += matcher.last_step_stats().map_or(0, |stats| stats.lexer_cost);
        self.cost.fetch_max(*cost, Relaxed);
        if *cost > MAX_COST
            && !self.is_full.swap(true, Relaxed)
            && self.template.is_behind(*cost)
            && let Some(start) = &self.start
        {
            // A copy: the sequence goes on, and what it learns from here on goes with it. A clone beside may have broken the
            // lexer in this moment, which a mask shows.
            let mut copy = start.deep_clone();
            if copy.compute_mask().is_ok() {
                self.template.keep(*cost, copy);
            }
        }
    }

    /// A matcher of this lexer has given up.
    pub(super) fn fail(&self) {
        self.has_failed.store(true, Relaxed);
    }
}

impl Drop for Lesson {
    fn drop(&mut self) {
        let cost = *self.cost.get_mut();
        let is_kept = !*self.has_failed.get_mut() && !*self.is_full.get_mut();
        if let Some(matcher) = self.start.take().filter(|_| is_kept) {
            self.template.keep(cost, matcher);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;
    use crate::{Grammar, GrammarCompiler, SchemaOptions, Tokenizer};

    const TEXT: &str = "{\"a\": \"some text, and more of it\"}";

    /// Writes the text; returns all masks.
    fn write(matcher: &mut Matcher, lesson: &Lesson, tokens: &[u32]) -> Vec<Vec<u32>> {
        let mut cost = 0;
        let step = |&token: &u32| {
            let mask = matcher.compute_mask().unwrap();
            lesson.note(matcher, &mut cost);
            matcher.consume_token(token).unwrap();
            mask.as_slice().to_vec()
        };
        tokens.iter().map(step).collect()
    }

    fn template() -> (Arc<Template>, Vec<u32>) {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/spark-tiny-vl/awq");
        let tokenizer = Arc::new(Tokenizer::from_dir(&folder).unwrap());
        let schema = json!({"type": "object", "properties": {"a": {"type": "string", "maxLength": 40}}});
        let grammar = Grammar::JsonSchema { schema, options: SchemaOptions::default() };
        let compiled = GrammarCompiler::new(&tokenizer, &[258]).unwrap().compile(&grammar).unwrap();
        (compiled.template.clone(), tokenizer.encode_ordinary(TEXT).unwrap())
    }

    #[test]
    fn a_sequence_learns_from_the_one_before() {
        let (template, tokens) = template();
        let (mut matcher, lesson) = template.begin();
        let first = write(&mut matcher, &lesson, &tokens);
        // Nothing is handed in while a clone is left.
        let clone = lesson.clone();
        drop((matcher, lesson));
        assert_eq!(template.lock().cost, 0);
        drop(clone);
        let learned = template.lock().cost;
        assert!(learned > 0);

        let (mut matcher, lesson) = template.begin();
        let second = write(&mut matcher, &lesson, &tokens);
        assert!(first == second, "masks are the same");
        assert_eq!(lesson.cost.load(Relaxed), learned, "there was nothing left to learn");
    }

    #[test]
    fn a_lexer_that_is_broken_is_not_kept() {
        let (template, tokens) = template();
        let (mut matcher, lesson) = template.begin();
        write(&mut matcher, &lesson, &tokens);
        lesson.fail();
        drop((matcher, lesson));
        assert_eq!(template.lock().cost, 0);
    }

    #[test]
    fn what_is_learned_is_bounded() {
        let (template, tokens) = template();
        let (mut matcher, lesson) = template.begin();
        write(&mut matcher, &lesson, &tokens[..4]);
        lesson.note(&matcher, &mut MAX_COST.clone());
        let full = template.lock().cost;
        assert!(full > MAX_COST, "it is handed in at once, as far as it has come");
        write(&mut matcher, &lesson, &tokens[4..]);
        lesson.cost.store(10 * MAX_COST, Relaxed);
        drop((matcher, lesson));
        assert_eq!(template.lock().cost, full);
    }
}
