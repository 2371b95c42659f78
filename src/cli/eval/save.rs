//! The file of `--save`: every question, its answer and the verdict. Written at the end, in the order of the suite, so that
//! the files of two models can be compared line by line.

use std::{
    fs::File,
    io::{BufWriter, Write},
    path::Path,
};

use anyhow::Context;
use serde_json::{Value, json};
use spark_suite::Answer;

use super::answers::Outcome;

/// Creates or empties the file.
pub(crate) fn create(path: &Path) -> anyhow::Result<File> {
    File::create(path).with_context(|| format!("--save {}", path.display()))
}

/// Writes all lines.
pub(crate) fn write(file: &File, path: &Path, outcomes: &[Outcome]) -> anyhow::Result<()> {
    let mut out = BufWriter::new(file);
    let all = outcomes.iter().try_for_each(|outcome| writeln!(out, "{}", line(outcome)));
    all.and_then(|()| out.flush()).with_context(|| format!("writing {}", path.display()))
}

fn line(outcome: &Outcome) -> Value {
    let mut line = json!({
        "task": outcome.task.name,
        "index": outcome.index,
        "messages": outcome.messages,
        "tools": outcome.tools,
        "expected": outcome.expected,
        "right": outcome.is_right,
        "seconds": outcome.seconds,
    });
    match &outcome.reply {
        Ok(reply) => {
            line["answer"] = answer_json(&reply.answer);
            line["reasoning"] = json!(reply.reasoning);
            line["finish_reason"] = json!(reply.finish_reason);
            line["prompt_tokens"] = reply.prompt_tokens.into();
            line["output_tokens"] = reply.output_tokens.into();
        }
        Err(error) => line["error"] = json!(error),
    }
    line
}

fn answer_json(answer: &Answer) -> Value {
    let calls = answer.tool_calls.iter().map(|call| json!({"name": call.name, "arguments": call.arguments}));
    json!({"content": answer.content, "tool_calls": calls.collect::<Vec<_>>()})
}
