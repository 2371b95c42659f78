//! The events of an answer, and which white space next to markers belongs to the text. Finds no markers.

use super::{AnswerEvent, is_space};

/// Collects events. White space is held back until it is known what follows.
#[derive(Default)]
pub(super) struct Output {
    events: Vec<AnswerEvent>,
    /// White space that nothing visible has followed yet.
    held: String,
    has_reasoning: bool,
    has_content: bool,
    /// Whether the last thing written was a block: reasoning or a call.
    after_block: bool,
    num_calls: usize,
}

impl Output {
    /// The events since the last time.
    pub(super) fn take(&mut self) -> Vec<AnswerEvent> {
        std::mem::take(&mut self.events)
    }

    /// Text inside the thinking block, without the white space at its ends.
    pub(super) fn reasoning(&mut self, text: &str) {
        let Some(text) = self.visible(text) else { return };
        let text = if self.has_reasoning { text.as_str() } else { text.trim_start_matches(is_space) };
        self.has_reasoning = true;
        match self.events.last_mut() {
            Some(AnswerEvent::Reasoning(last)) => last.push_str(text),
            _ => self.events.push(AnswerEvent::Reasoning(text.to_owned())),
        }
    }

    /// The thinking block has ended.
    pub(super) fn end_reasoning(&mut self) {
        self.drop_held();
        self.after_block = true;
    }

    /// Text for the user. The lines between a block and the first text are not part of it; white space around a call
    /// that has text on both sides is.
    pub(super) fn content(&mut self, text: &str) {
        let Some(text) = self.visible(text) else { return };
        let text = match self.after_block && !self.has_content {
            true => {
                let indent = text.len() - text.trim_start_matches(is_space).len();
                &text[text[..indent].rfind('\n').map_or(0, |newline| newline + 1)..]
            }
            false => text.as_str(),
        };
        self.has_content = true;
        self.after_block = false;
        match self.events.last_mut() {
            Some(AnswerEvent::Content(last)) => last.push_str(text),
            _ => self.events.push(AnswerEvent::Content(text.to_owned())),
        }
    }

    /// White space whose meaning depends on what follows.
    pub(super) fn hold(&mut self, space: &str) {
        self.held.push_str(space);
    }

    /// The white space belonged to a marker.
    pub(super) fn drop_held(&mut self) {
        self.held.clear();
    }

    /// What was held and `text`, less the white space at its end; `None` if that is nothing.
    fn visible(&mut self, text: &str) -> Option<String> {
        let body = text.trim_end_matches(is_space);
        let visible = (!body.is_empty()).then(|| {
            let mut visible = std::mem::take(&mut self.held);
            visible.push_str(body);
            visible
        });
        self.held.push_str(&text[body.len()..]);
        visible
    }

    /// A call begins; its index.
    pub(super) fn start_call(&mut self, name: String) -> usize {
        let index = self.num_calls;
        self.num_calls += 1;
        self.after_block = true;
        self.events.push(AnswerEvent::ToolCallStart { index, name });
        index
    }

    /// Arguments of a call that has begun.
    pub(super) fn arguments(&mut self, index: usize, text: &str) {
        if text.is_empty() {
            return;
        }
        match self.events.last_mut() {
            Some(AnswerEvent::ToolCallArguments { index: last, delta }) if *last == index => {
                delta.push_str(text);
            }
            _ => self.events.push(AnswerEvent::ToolCallArguments { index, delta: text.to_owned() }),
        }
    }

    /// A call has ended.
    pub(super) fn end_call(&mut self, index: usize) {
        self.events.push(AnswerEvent::ToolCallEnd { index });
    }

    /// The end of the text: white space at the end of content is content, behind a block it is not.
    pub(super) fn finish(&mut self, in_reasoning: bool) {
        let held = std::mem::take(&mut self.held);
        if held.is_empty() || in_reasoning || self.after_block {
            return;
        }
        match self.events.last_mut() {
            Some(AnswerEvent::Content(last)) => last.push_str(&held),
            _ => self.events.push(AnswerEvent::Content(held)),
        }
    }
}
