//! An answer as a row of blocks, one after the other: what the dialects with blocks and items have in common. No JSON.

use crate::Delta;
use crate::parts::ToolCallStart;

/// One block, as far as it has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Block {
    Reasoning(String),
    Text(String),
    Call {
        start: ToolCallStart,
        /// A JSON text, as the model writes it.
        arguments: String,
    },
}

/// What a delta does to the row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Step {
    /// The block of this index begins, empty.
    Begin(usize),
    /// The last block grows by this text.
    Grow(usize, String),
    /// The last block is complete.
    End(usize),
}

/// The row.
#[derive(Debug, Default)]
pub(crate) struct Blocks {
    row: Vec<Block>,
    is_open: bool,
}

impl Blocks {
    /// The blocks so far.
    pub(crate) fn row(&self) -> &[Block] {
        &self.row
    }

    /// Adds what a delta brings.
    pub(crate) fn push(&mut self, delta: &Delta) -> Vec<Step> {
        let mut steps = Vec::new();
        if !delta.reasoning.is_empty() {
            let begins = !matches!(self.open_block(), Some(Block::Reasoning(_)));
            self.grow(begins.then(|| Block::Reasoning(String::new())), &delta.reasoning, &mut steps);
        }
        if !delta.text.is_empty() {
            let begins = !matches!(self.open_block(), Some(Block::Text(_)));
            self.grow(begins.then(|| Block::Text(String::new())), &delta.text, &mut steps);
        }
        for call in &delta.tool_calls {
            let start = call.start.clone();
            let begins = start.map(|start| Block::Call { start, arguments: String::new() });
            self.grow(begins, &call.arguments, &mut steps);
        }
        steps
    }

    /// Ends the last block.
    pub(crate) fn finish(&mut self) -> Option<Step> {
        let was_open = std::mem::replace(&mut self.is_open, false);
        was_open.then(|| Step::End(self.row.len() - 1))
    }

    fn open_block(&self) -> Option<&Block> {
        self.row.last().filter(|_| self.is_open)
    }

    /// Grows the open block, or a new one behind it.
    fn grow(&mut self, begins: Option<Block>, text: &str, steps: &mut Vec<Step>) {
        if let Some(block) = begins {
            steps.extend(self.finish());
            self.row.push(block);
            self.is_open = true;
            steps.push(Step::Begin(self.row.len() - 1));
        }
        let index = self.row.len().saturating_sub(1);
        if let Some(Block::Reasoning(whole) | Block::Text(whole) | Block::Call { arguments: whole, .. }) =
            self.row.last_mut()
            && !text.is_empty()
        {
            whole.push_str(text);
            steps.push(Step::Grow(index, text.to_owned()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parts::ToolCallDelta;

    #[test]
    fn blocks_follow_each_other_and_end_once() {
        let mut blocks = Blocks::default();
        let start = ToolCallStart { id: "c".into(), name: "f".into() };
        let call = |start: Option<ToolCallStart>, arguments: &str| Delta {
            tool_calls: vec![ToolCallDelta { index: 0, start, arguments: arguments.into() }],
            ..Delta::default()
        };
        let mut steps = Vec::new();
        for delta in [
            Delta { reasoning: "a".into(), ..Delta::default() },
            Delta { reasoning: "b".into(), text: "c".into(), ..Delta::default() },
            call(Some(start.clone()), ""),
            call(None, "{}"),
            call(Some(start.clone()), ""),
            Delta { text: "d".into(), ..Delta::default() },
            Delta::default(),
        ] {
            steps.extend(blocks.push(&delta));
        }
        steps.extend(blocks.finish());
        assert_eq!(blocks.finish(), None);
        let grow = |i: usize, text: &str| Step::Grow(i, text.into());
        let expected = [
            Step::Begin(0),
            grow(0, "a"),
            grow(0, "b"),
            Step::End(0),
            Step::Begin(1),
            grow(1, "c"),
            Step::End(1),
            Step::Begin(2),
            grow(2, "{}"),
            Step::End(2),
            Step::Begin(3),
            Step::End(3),
            Step::Begin(4),
            grow(4, "d"),
            Step::End(4),
        ];
        assert_eq!(steps, expected);
        assert_eq!(blocks.row()[0], Block::Reasoning("ab".into()));
        assert_eq!(blocks.row()[2], Block::Call { start, arguments: "{}".into() });
    }
}
