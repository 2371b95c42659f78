//! Stop strings over streamed text: an Aho-Corasick automaton, so the cost is linear whatever the strings are.
//!
//! The match that ends first wins (of those that end together, the longest), which does not depend on how the text is
//! cut into pieces. Stop tokens are not found here: the engine knows them.

use std::collections::HashMap;
use std::sync::Arc;

use crate::{Result, TextError};

/// Most stop strings of a request.
const MAX_STOP_STRINGS: usize = 256;
/// Most bytes of all stop strings of a request; the automaton has one state a byte.
const MAX_STOP_BYTES: usize = 64 << 10;

/// The stop strings of a request, checked and compiled once; shared by its choices.
pub struct StopStrings {
    strings: Vec<String>,
    /// Trie edges: state and byte to state. State 0 is the root.
    edges: HashMap<(u32, u8), u32>,
    states: Vec<State>,
}

#[derive(Clone, Copy, Default)]
struct State {
    /// State of the longest proper suffix that is also in the trie.
    fail: u32,
    /// Bytes from the root: how much of the text may still become a stop string.
    depth: u32,
    /// The longest stop string that ends here.
    hit: Option<u32>,
}

impl StopStrings {
    /// Compiles `strings`; none is fine.
    ///
    /// # Errors
    /// When a string is empty, or there are more strings or bytes than a request may have.
    pub fn new(strings: Vec<String>) -> Result<Arc<Self>> {
        let refuse = |rule: String| Err(TextError::Stop { rule });
        if strings.len() > MAX_STOP_STRINGS {
            return refuse(format!("{} stop strings; the limit is {MAX_STOP_STRINGS}", strings.len()));
        }
        if let Some(index) = strings.iter().position(String::is_empty) {
            return refuse(format!("stop string {index} is empty; each must have at least one character"));
        }
        let num_bytes: usize = strings.iter().map(String::len).sum();
        if num_bytes > MAX_STOP_BYTES {
            return refuse(format!("the stop strings have {num_bytes} bytes; the limit is {MAX_STOP_BYTES}"));
        }
        let mut stops = Self { strings, edges: HashMap::new(), states: vec![State::default()] };
        let parents = stops.insert_strings();
        stops.link_suffixes(&parents);
        Ok(Arc::new(stops))
    }

    /// The stop string at `index`.
    pub fn get(&self, index: usize) -> Option<&str> {
        self.strings.get(index).map(String::as_str)
    }

    /// Builds the trie and returns the parent and the byte of every state.
    fn insert_strings(&mut self) -> Vec<(u32, u8)> {
        let mut parents = vec![(0, 0)];
        for (index, string) in self.strings.iter().enumerate() {
            let mut state = 0;
            for byte in string.bytes() {
                let depth = self.states[state as usize].depth + 1;
                state = *self.edges.entry((state, byte)).or_insert_with(|| {
                    parents.push((state, byte));
                    self.states.push(State { depth, ..State::default() });
                    self.states.len() as u32 - 1
                });
            }
            self.states[state as usize].hit.get_or_insert(index as u32);
        }
        parents
    }

    /// Sets `fail` and `hit` of every state, shallow ones first.
    fn link_suffixes(&mut self, parents: &[(u32, u8)]) {
        let mut order: Vec<usize> = (1..self.states.len()).collect();
        order.sort_by_key(|&state| self.states[state].depth);
        for state in order {
            let (parent, byte) = parents[state];
            let fail = match parent {
                0 => 0,
                _ => self.next(self.states[parent as usize].fail, byte),
            };
            let suffix_hit = self.states[fail as usize].hit;
            let entry = &mut self.states[state];
            entry.fail = fail;
            entry.hit = entry.hit.or(suffix_hit);
        }
    }

    fn next(&self, mut state: u32, byte: u8) -> u32 {
        loop {
            if let Some(&next) = self.edges.get(&(state, byte)) {
                return next;
            }
            if state == 0 {
                return 0;
            }
            state = self.states[state as usize].fail;
        }
    }
}

/// What a piece of text led to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StopOutput {
    /// Text that is certainly part of the output, and not returned before.
    pub text: String,
    /// Index of the stop string that was found. Nothing follows.
    pub stop: Option<usize>,
}

/// Looks for stop strings in the text of one choice, piece by piece.
pub struct StopMatcher {
    stops: Arc<StopStrings>,
    include_stop: bool,
    state: u32,
    /// Text that may yet turn out to be the beginning of a stop string.
    held: String,
    stopped: bool,
}

impl StopMatcher {
    /// A matcher at the start of an output. With `include_stop` the stop string stays in the output, so that nothing
    /// has to be held back.
    pub fn new(stops: Arc<StopStrings>, include_stop: bool) -> Self {
        Self { stops, include_stop, state: 0, held: String::new(), stopped: false }
    }

    /// The next piece of text. After a stop everything is dropped.
    pub fn push(&mut self, text: &str) -> StopOutput {
        self.advance(text, true)
    }

    /// The next piece of text, in which no stop string can end (`min_tokens` is not reached); one may begin in it.
    pub fn push_unstoppable(&mut self, text: &str) -> StopOutput {
        self.advance(text, false)
    }

    /// The end of the text: what was held back is output after all.
    pub fn finish(&mut self) -> String {
        self.state = 0;
        std::mem::take(&mut self.held)
    }

    fn advance(&mut self, text: &str, may_stop: bool) -> StopOutput {
        if self.stopped {
            return StopOutput::default();
        }
        let old_len = self.held.len();
        self.held.push_str(text);
        for (i, byte) in text.bytes().enumerate() {
            self.state = self.stops.next(self.state, byte);
            let hit = self.stops.states[self.state as usize].hit;
            if let Some(index) = hit.filter(|_| may_stop).map(|index| index as usize) {
                let end = old_len + i + 1;
                let stop_len = self.stops.strings[index].len();
                self.held.truncate(if self.include_stop { end } else { end - stop_len });
                self.stopped = true;
                return StopOutput { text: self.finish(), stop: Some(index) };
            }
        }
        let depth = self.stops.states[self.state as usize].depth as usize;
        let num_held = if self.include_stop { 0 } else { depth };
        let rest = self.held.split_off(self.held.len() - num_held);
        StopOutput { text: std::mem::replace(&mut self.held, rest), stop: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matcher(stops: &[&str], include_stop: bool) -> StopMatcher {
        let stops = stops.iter().map(ToString::to_string).collect();
        StopMatcher::new(StopStrings::new(stops).unwrap(), include_stop)
    }

    fn output(text: &str, stop: Option<usize>) -> StopOutput {
        StopOutput { text: text.into(), stop }
    }

    #[test]
    fn holds_back_only_what_may_become_a_stop() {
        let mut stop = matcher(&["</end>"], false);
        assert_eq!(stop.push("a < b </"), output("a < b ", None));
        assert_eq!(stop.push("x </en"), output("</x ", None));
        assert_eq!(stop.push("d> more"), output("", Some(0)));
        assert_eq!(stop.push("more"), output("", None));
        assert_eq!(stop.finish(), "");
    }

    #[test]
    fn the_first_to_end_wins_and_then_the_longest() {
        assert_eq!(matcher(&["abcd", "bc"], false).push("xabcd"), output("xa", Some(1)));
        assert_eq!(matcher(&["c", "abc"], false).push("xabcd"), output("x", Some(1)));
        assert_eq!(matcher(&["c", "abc"], true).push("xabcd"), output("xabc", Some(1)));
    }

    #[test]
    fn the_end_releases_what_was_held() {
        let mut stop = matcher(&["ENDE", "é!"], false);
        assert_eq!(stop.push("caf\u{e9}"), output("caf", None));
        assert_eq!(stop.push("END"), output("é", None));
        assert_eq!(stop.finish(), "END");
    }

    #[test]
    fn an_unstoppable_piece_only_begins_a_stop() {
        let mut stop = matcher(&["ab"], false);
        assert_eq!(stop.push_unstoppable("abca"), output("abc", None));
        assert_eq!(stop.push("b"), output("", Some(0)));
    }

    #[test]
    fn limits_are_errors() {
        for strings in [vec![String::new()], vec!["x".into(); 257], vec!["x".repeat(MAX_STOP_BYTES + 1)]] {
            assert!(StopStrings::new(strings).is_err());
        }
    }
}
