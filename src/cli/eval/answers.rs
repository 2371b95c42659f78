//! Asking: many questions in flight, what came back, and whether it is right. Prints nothing.

use std::{sync::Arc, time::Instant};

use futures_util::StreamExt;
use indicatif::ProgressBar;
use serde_json::Value;
use spark_suite::{Answer, Split, Task, ToolCall};
use spark_text::{AnswerOptions, ReasoningStart, ToolFormat, parse_answer};
use tokio::signal::unix::{SignalKind, signal};

use super::{question, target::Target};

/// A held-out sample: its task and its number.
pub(crate) type SampleId = (&'static Task, u64);

/// How to ask.
#[derive(Clone, Copy)]
pub(crate) struct Settings {
    /// Of an answer.
    pub(crate) max_tokens: usize,
    /// Requests that are at work at once.
    pub(crate) concurrency: usize,
}

/// What became of a question. Holds no pictures: there may be thousands of these.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) task: &'static Task,
    pub(crate) index: u64,
    /// The sample's messages, tools and right answer.
    pub(crate) messages: Vec<Value>,
    pub(crate) tools: Vec<Value>,
    pub(crate) expected: Value,
    /// What was answered, or why there is no answer.
    pub(crate) reply: Result<Reply, String>,
    pub(crate) is_right: bool,
    /// From the request to the whole answer.
    pub(crate) seconds: f64,
}

/// An answer.
#[derive(Debug, PartialEq)]
pub(crate) struct Reply {
    pub(crate) answer: Answer,
    pub(crate) reasoning: Option<String>,
    pub(crate) finish_reason: String,
    pub(crate) prompt_tokens: u64,
    pub(crate) output_tokens: u64,
}

/// Asks for all samples, in any order of completion. Ends early at Ctrl-C with what is done by then.
///
/// # Errors
/// When the system gives no signal handler, or a sample cannot be drawn.
pub(crate) async fn ask_all(
    target: &Target,
    samples: Vec<SampleId>,
    settings: Settings,
    bar: &ProgressBar,
) -> anyhow::Result<Vec<Outcome>> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut outcomes = Vec::with_capacity(samples.len());
    let asked = futures_util::stream::iter(samples).map(|id| ask(target, id, settings.max_tokens));
    let mut asked = std::pin::pin!(asked.buffer_unordered(settings.concurrency));
    loop {
        tokio::select! {
            outcome = asked.next() => match outcome {
                Some(outcome) => {
                    outcomes.push(outcome?);
                    bar.inc(1);
                }
                None => return Ok(outcomes),
            },
            _ = interrupt.recv() => return Ok(outcomes),
        }
    }
}

async fn ask(target: &Target, (task, index): SampleId, max_tokens: usize) -> anyhow::Result<Outcome> {
    let model = target.model_field().map(str::to_owned);
    // Drawing and packing a picture takes milliseconds, in which others must go on.
    let drawn = tokio::task::spawn_blocking(move || -> anyhow::Result<_> {
        let mut sample = task.sample(Split::HeldOut, index);
        let body = question::body(&sample, model.as_deref(), max_tokens)?;
        sample.pictures.clear();
        Ok((sample, body))
    });
    let (sample, body) = drawn.await??;
    let start = Instant::now();
    let reply = target.ask(body).await.and_then(|body| read_reply(&body));
    let seconds = start.elapsed().as_secs_f64();
    let is_right = reply.as_ref().is_ok_and(|reply| sample.is_right(&reply.answer));
    let (messages, tools, expected) = (sample.messages, sample.tools, sample.answer);
    Ok(Outcome { task, index, messages, tools, expected, reply, is_right, seconds })
}

/// Reads the body of an answer.
fn read_reply(body: &Value) -> Result<Reply, String> {
    let choice = &body["choices"][0];
    let message = &choice["message"];
    if !message.is_object() {
        let text: String = body.to_string().chars().take(300).collect();
        return Err(format!("the answer has no message: {text}"));
    }
    let reasoning = ["reasoning_content", "reasoning"].iter().find_map(|name| message[name].as_str());
    let mut reply = Reply {
        answer: Answer::of_message(message),
        reasoning: reasoning.map(str::to_owned),
        finish_reason: choice["finish_reason"].as_str().unwrap_or_default().to_owned(),
        prompt_tokens: body["usage"]["prompt_tokens"].as_u64().unwrap_or(0),
        output_tokens: body["usage"]["completion_tokens"].as_u64().unwrap_or(0),
    };
    read_markers(&mut reply);
    Ok(reply)
}

/// Takes reasoning and tool calls out of the content of a server that has left them there.
fn read_markers(reply: &mut Reply) {
    let content = &reply.answer.content;
    let opens = content.trim_start().starts_with("<think>");
    let reasoning = match content.contains("</think>") && !opens {
        true => ReasoningStart::Inside,
        false => ReasoningStart::Outside,
    };
    let format = if content.contains("<function=") { ToolFormat::Xml } else { ToolFormat::Hermes };
    let options =
        AnswerOptions { tool_format: Some(format), reasoning: Some(reasoning), tools: Arc::default() };
    let parsed = parse_answer(content, options);
    reply.reasoning = reply.reasoning.take().or(parsed.reasoning);
    reply.answer.content = parsed.content;
    if reply.answer.tool_calls.is_empty() {
        let call = |name, arguments: String| ToolCall {
            name,
            arguments: serde_json::from_str(&arguments).unwrap_or(Value::String(arguments)),
        };
        reply.answer.tool_calls =
            parsed.tool_calls.into_iter().map(|found| call(found.name, found.arguments)).collect();
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(message: &Value) -> Reply {
        let body = json!({"choices": [{"message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 5, "completion_tokens": 2}});
        read_reply(&body).unwrap()
    }

    fn weather() -> ToolCall {
        ToolCall { name: "weather".into(), arguments: json!({"city": "Oslo"}) }
    }

    #[test]
    fn a_server_may_separate_the_parts_or_not() {
        let arguments = r#"{"city": "Oslo"}"#;
        let parsed = json!({"content": null, "reasoning_content": "Hm.",
            "tool_calls": [{"function": {"name": "weather", "arguments": arguments}}]});
        let call =
            format!("<tool_call>\n{{\"name\": \"weather\", \"arguments\": {arguments}}}\n</tool_call>");
        let raw = |text: String| json!({"content": text});
        for message in [
            parsed,
            raw(format!("<think>\nHm.\n</think>\n\n{call}")),
            raw(format!("Hm.\n</think>\n\n{call}")),
        ] {
            let reply = read(&message);
            assert_eq!(reply.answer.tool_calls, [weather()], "{message}");
            assert_eq!(reply.answer.content.trim(), "", "{message}");
            assert_eq!(reply.reasoning.as_deref().map(str::trim), Some("Hm."), "{message}");
        }
    }

    #[test]
    fn plain_text_stays_as_it_is() {
        let reply = read(&json!({"content": "A red circle."}));
        assert_eq!(reply.answer, Answer { content: "A red circle.".into(), tool_calls: Vec::new() });
        assert_eq!((reply.reasoning, reply.prompt_tokens, reply.output_tokens), (None, 5, 2));
        assert_eq!(reply.finish_reason, "stop");
    }

    #[test]
    fn a_body_without_a_message_is_an_error() {
        assert!(read_reply(&json!({"choices": []})).unwrap_err().contains("choices"));
        assert!(read_reply(&Value::Null).is_err());
    }
}
