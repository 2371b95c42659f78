//! `eval --gallery`: a page of examples with their pictures and what the model answers. Chooses and writes; asks nobody.

use std::{fmt::Write as _, fs, path::Path};

use anyhow::Context;
use serde_json::Value;
use spark_suite::{Answer, Split, Task};

use super::{
    answers::{Outcome, SampleId},
    question::png_bytes,
};

/// Examples with and without pictures.
const WITH_PICTURES: usize = 7;
const OF_TEXT: usize = 3;
/// The page, and the folder of its pictures beside it.
const PAGE: &str = "demo.md";
const IMAGES: &str = "images";

/// Held-out sample `index` of ten tasks, spread over the list.
pub(crate) fn choose(tasks: &[&'static Task], index: u64) -> Vec<SampleId> {
    let (with_pictures, of_text): (Vec<_>, Vec<_>) =
        tasks.iter().copied().partition(|task| !task.sample(Split::HeldOut, index).pictures.is_empty());
    let chosen = spread(&with_pictures, WITH_PICTURES).chain(spread(&of_text, OF_TEXT));
    chosen.map(|task| (task, index)).collect()
}

/// At most `num` entries at equal distances, the first among them.
fn spread<T: Copy>(all: &[T], num: usize) -> impl Iterator<Item = T> {
    let num = num.min(all.len());
    (0..num).map(move |i| all[i * all.len() / num])
}

/// Writes the page and its pictures into `folder`.
///
/// # Errors
/// When a file cannot be written.
pub(crate) fn write(folder: &Path, model: &str, outcomes: &[Outcome]) -> anyhow::Result<()> {
    let images = folder.join(IMAGES);
    fs::create_dir_all(&images).with_context(|| format!("--gallery {}", folder.display()))?;
    let num_right = outcomes.iter().filter(|outcome| outcome.is_right).count();
    let mut page = intro(model, num_right, outcomes);
    for (number, outcome) in outcomes.iter().enumerate() {
        // Drawn again: outcomes hold no pictures.
        let sample = outcome.task.sample(Split::HeldOut, outcome.index);
        let _ = write!(page, "\n## {}. {}\n\n{}\n\n", number + 1, outcome.task.name, outcome.task.about);
        for (i, picture) in sample.pictures.iter().enumerate() {
            let name = format!("demo-{}-{}.png", outcome.task.name, i + 1);
            let path = images.join(&name);
            fs::write(&path, png_bytes(picture)?).with_context(|| format!("writing {}", path.display()))?;
            let _ = writeln!(page, "![{} by {} pixels]({IMAGES}/{name})\n", picture.width, picture.height);
        }
        page += &conversation(outcome);
    }
    let path = folder.join(PAGE);
    fs::write(&path, page).with_context(|| format!("writing {}", path.display()))?;
    tracing::info!("{}: {} examples, {num_right} right", path.display(), outcomes.len());
    Ok(())
}

fn intro(model: &str, num_right: usize, outcomes: &[Outcome]) -> String {
    format!(
        "# What {model} answers\n\n\
         {} held-out samples, one of each task; the model has seen none of them in training. The answers are greedy and as\n\
         the model gave them: {num_right} of {} are right. Which share is right over many samples, `spark-engine eval`\n\
         measures (see [eval.md](eval.md)). Made by `spark-engine eval --gallery docs`.\n",
        outcomes.len(),
        outcomes.len(),
    )
}

/// What was said, in a block of plain text, and the verdict below.
fn conversation(outcome: &Outcome) -> String {
    let mut text = String::new();
    if !outcome.tools.is_empty() {
        let names: Vec<_> =
            outcome.tools.iter().filter_map(|tool| tool["function"]["name"].as_str()).collect();
        let _ = writeln!(text, "(tools: {})", names.join(", "));
    }
    for message in &outcome.messages {
        let role = message["role"].as_str().unwrap_or_default();
        let _ =
            writeln!(text, "{role}: {}", said(&text_of(&message["content"]), &Answer::of_message(message)));
    }
    let _ = writeln!(text);
    match &outcome.reply {
        Ok(reply) => {
            if let Some(reasoning) = &reply.reasoning {
                let _ = writeln!(text, "(thinks) {}", reasoning.trim());
            }
            let _ = writeln!(text, "answer: {}", said(&reply.answer.content, &reply.answer));
        }
        Err(error) => {
            let _ = writeln!(text, "(no answer: {error})");
        }
    }
    let verdict = if outcome.is_right {
        "Right.\n".to_owned()
    } else {
        let expected = Answer::of_message(&outcome.expected);
        format!("Wrong; right would be:\n\n{}", fenced(&said(&expected.content, &expected)))
    };
    format!("{}\n{verdict}", fenced(&text))
}

/// Text and calls of a message.
fn said(content: &str, answer: &Answer) -> String {
    let calls = answer.tool_calls.iter().map(|call| format!("{}({})", call.name, call.arguments));
    let parts = std::iter::once(content.trim().to_owned()).chain(calls).filter(|part| !part.is_empty());
    parts.collect::<Vec<_>>().join("\n")
}

/// The text of a message's content; pictures stand above the conversation.
fn text_of(content: &Value) -> String {
    match content {
        Value::String(text) => text.clone(),
        Value::Array(parts) => {
            let part = |part: &Value| part["text"].as_str().unwrap_or("[picture]").to_owned();
            parts.iter().map(part).collect::<Vec<_>>().join(" ")
        }
        _ => String::new(),
    }
}

/// A block of text, with a fence that is not in it. Control characters are shown as such.
fn fenced(text: &str) -> String {
    let shown = |c: char| if c.is_control() && c != '\n' { char::REPLACEMENT_CHARACTER } else { c };
    let text: String = text.chars().map(shown).collect();
    let mut fence = "```".to_owned();
    while text.contains(&fence) {
        fence.push('`');
    }
    format!("{fence}text\n{}\n{fence}\n", text.trim_end())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::answers::Reply;
    use super::*;

    #[test]
    fn entries_are_spread_over_the_list() {
        let spread = |num, of: usize| spread(&(0..of).collect::<Vec<_>>(), num).collect::<Vec<_>>();
        assert_eq!(spread(3, 9), [0, 3, 6]);
        assert_eq!(spread(7, 3), [0, 1, 2]);
        assert!(spread(3, 0).is_empty());
    }

    #[test]
    fn a_wrong_answer_is_shown_with_the_right_one() {
        let task = spark_suite::tasks().next().unwrap();
        let outcome = |content: &str, is_right| Outcome {
            task,
            index: 0,
            messages: vec![
                json!({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}),
            ],
            tools: Vec::new(),
            expected: json!({"role": "assistant", "content": "3"}),
            reply: Ok(Reply {
                answer: Answer { content: content.into(), tool_calls: Vec::new() },
                reasoning: None,
                finish_reason: "stop".into(),
                prompt_tokens: 1,
                output_tokens: 1,
            }),
            is_right,
            seconds: 0.1,
        };
        let right = conversation(&outcome("3", true));
        assert_eq!(right, "```text\nuser: [picture] How many?\n\nanswer: 3\n```\n\nRight.\n");
        let wrong = conversation(&outcome("```4```", false));
        assert!(wrong.contains("answer: ```4```\n````\n"), "{wrong}");
        assert_eq!(fenced("a\u{7}b"), "```text\na\u{fffd}b\n```\n");
        assert!(wrong.ends_with("Wrong; right would be:\n\n```text\n3\n```\n"), "{wrong}");
    }
}
