//! From the body of a response to that of a chat. Reads the fields of responses; the items of `input` are read beside.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::input::read_input;
use super::input_items::shown;
use super::store::ResponseStore;
use crate::ApiError;
use crate::body::{Body, kind};
use crate::dialect::node::{Node, function_tool, nodes};
use crate::fields::PASSED;

/// Fields that mean the same in a chat.
const SAME: [&str; 7] = ["model", "stream", "temperature", "top_p", "top_k", "parallel_tool_calls", "stop"];
/// Most bytes of an id.
const MAX_ID_BYTES: usize = 256;

/// What a body asks for.
pub(super) struct Asked {
    /// The chat that gives the answer.
    pub(super) chat: Map<String, Value>,
    /// What the response object repeats.
    pub(super) echo: Map<String, Value>,
    /// The conversation up to the answer, without instructions.
    pub(super) history: Vec<Value>,
    /// The same as items, to be shown again.
    pub(super) items: Vec<Value>,
    pub(super) is_stored: bool,
    pub(super) is_background: bool,
}

/// Reads the body of a response.
///
/// # Errors
/// Names the field and the place that is wrong.
pub(super) fn to_chat(body: &mut Body, store: &Arc<ResponseStore>) -> Result<Asked, ApiError> {
    let mut chat = body.take_all(SAME.iter().chain(PASSED));
    let mut echo = Map::new();
    echo.insert(
        "parallel_tool_calls".into(),
        chat.get("parallel_tool_calls").cloned().unwrap_or(json!(true)),
    );
    if let Some(count) = body.count("max_output_tokens", 1, usize::MAX)? {
        chat.insert("max_tokens".into(), json!(count));
    }
    let is_stored = body.boolean("store", true)?;
    let is_background = body.boolean("background", false)?;
    if is_background && !is_stored {
        return Err(ApiError::field("background", "background needs store: true, to be asked for later"));
    }
    echo.insert("store".into(), json!(is_stored));
    echo.insert("metadata".into(), read_metadata(body)?);
    read_include(body, &mut chat, &mut echo)?;
    read_text(body, &mut chat, &mut echo)?;
    read_reasoning(body, &mut chat, &mut echo)?;
    read_tools(body, &mut chat, &mut echo)?;

    let previous = body.string("previous_response_id", MAX_ID_BYTES)?;
    let mut history = match &previous {
        Some(id) => store.conversation(id)?.to_vec(),
        None => Vec::new(),
    };
    echo.insert("previous_response_id".into(), json!(previous));
    let input = body.take("input").ok_or_else(|| ApiError::field("input", "input is missing"))?;
    // What will be shown again, if anybody may ask.
    let items = match is_stored {
        true => {
            let before = previous.as_deref().map(|id| store.items_after(id)).unwrap_or_default();
            before.into_iter().chain(shown(&input)).collect()
        }
        false => Vec::new(),
    };
    read_input(input, &mut history)?;
    let instructions = body.string("instructions", usize::MAX)?;
    let messages = with_instructions(&history, instructions.as_deref());
    echo.insert("instructions".into(), json!(instructions));
    chat.insert("messages".into(), Value::Array(messages));
    Ok(Asked { chat, echo, history, items, is_stored, is_background })
}

/// Instructions go before all; templates know one system message, so one that is already there joins them.
fn with_instructions(history: &[Value], instructions: Option<&str>) -> Vec<Value> {
    let Some(instructions) = instructions else { return history.to_vec() };
    let (first, rest) = match history.split_first() {
        Some((first, rest)) if first["role"] == "system" && first["content"].is_string() => {
            (Some(first), rest)
        }
        _ => (None, history),
    };
    let own = first.and_then(|first| first["content"].as_str());
    let whole = own.map_or_else(|| instructions.to_owned(), |own| format!("{instructions}\n\n{own}"));
    std::iter::once(json!({"role": "system", "content": whole})).chain(rest.iter().cloned()).collect()
}

fn read_metadata(body: &mut Body) -> Result<Value, ApiError> {
    let metadata = body.object("metadata")?.unwrap_or_default();
    let is_small = metadata.len() <= 16
        && metadata.iter().all(|(key, value)| {
            key.chars().count() <= 64 && value.as_str().is_some_and(|text| text.chars().count() <= 512)
        });
    match is_small {
        true => Ok(Value::Object(metadata)),
        false => {
            let rule = "metadata must have at most 16 keys of 64 characters, with strings of 512 characters";
            Err(ApiError::field("metadata", rule))
        }
    }
}

/// What is to be included, and `top_logprobs`, which is about one such thing.
fn read_include(
    body: &mut Body,
    chat: &mut Map<String, Value>,
    echo: &mut Map<String, Value>,
) -> Result<(), ApiError> {
    let top = body.count("top_logprobs", 0, usize::MAX)?;
    let mut has_logprobs = top.is_some_and(|top| top > 0);
    match body.take("include") {
        None => {}
        Some(Value::Array(names)) => {
            for name in names {
                match name.as_str() {
                    Some("message.output_text.logprobs") => has_logprobs = true,
                    // Reasoning is in plain view, and taken back so: nothing has to be encrypted to come back.
                    Some("reasoning.encrypted_content") => {}
                    _ => {
                        let name: String = name.to_string().chars().take(64).collect();
                        return Err(ApiError::field(
                            "include",
                            format!("include has {name}, which is not supported"),
                        ));
                    }
                }
            }
        }
        Some(other) => {
            return Err(ApiError::field("include", format!("include must be a list, not {}", kind(&other))));
        }
    }
    if has_logprobs {
        chat.insert("logprobs".into(), json!(true));
        chat.insert("top_logprobs".into(), json!(top.unwrap_or(0)));
    }
    echo.insert("top_logprobs".into(), json!(top.unwrap_or(0)));
    Ok(())
}

fn read_text(
    body: &mut Body,
    chat: &mut Map<String, Value>,
    echo: &mut Map<String, Value>,
) -> Result<(), ApiError> {
    let mut shown = json!({"type": "text"});
    if let Some(value) = body.take("text") {
        let mut text = Node::new(value, "text".into(), "text")?;
        text.only(&["format", "verbosity"])?;
        if text.text("verbosity")?.is_some_and(|verbosity| verbosity != "medium") {
            return Err(text.refusal("has another verbosity than \"medium\", which is not supported"));
        }
        if let Some(format) = text.take("format") {
            shown = format.clone();
            let mut format = Node::new(format, "text.format".into(), "text")?;
            match format.need_text("type")?.as_str() {
                "text" => {}
                "json_object" => drop(chat.insert("response_format".into(), json!({"type": "json_object"}))),
                "json_schema" => {
                    format.only(&["type", "name", "description", "schema", "strict"])?;
                    let json_schema = json!({"name": format.text("name")?, "schema": format.take("schema"),
                        "strict": format.boolean("strict")?});
                    let wrapper = json!({"type": "json_schema", "json_schema": json_schema});
                    chat.insert("response_format".into(), wrapper);
                }
                _ => {
                    return Err(
                        format.refusal("must have the type \"text\", \"json_object\" or \"json_schema\"")
                    );
                }
            }
        }
    }
    echo.insert("text".into(), json!({"format": shown, "verbosity": "medium"}));
    Ok(())
}

fn read_reasoning(
    body: &mut Body,
    chat: &mut Map<String, Value>,
    echo: &mut Map<String, Value>,
) -> Result<(), ApiError> {
    let mut effort = None;
    if let Some(value) = body.take("reasoning") {
        let mut reasoning = Node::new(value, "reasoning".into(), "reasoning")?;
        reasoning.only(&["effort", "summary", "generate_summary"])?;
        effort = reasoning.text("effort")?;
        for key in ["summary", "generate_summary"] {
            // The reasoning itself is shown; "auto" is the best summary there is, which is none.
            if reasoning.text(key)?.is_some_and(|summary| summary != "auto") {
                return Err(reasoning
                    .refusal(format!("has another {key} than \"auto\": reasoning is shown as it is")));
            }
        }
    }
    if let Some(effort) = &effort {
        chat.insert("reasoning_effort".into(), json!(effort));
    }
    echo.insert("reasoning".into(), json!({"effort": effort, "summary": null}));
    Ok(())
}

fn read_tools(
    body: &mut Body,
    chat: &mut Map<String, Value>,
    echo: &mut Map<String, Value>,
) -> Result<(), ApiError> {
    let tools = body.take("tools").unwrap_or_else(|| json!([]));
    echo.insert("tools".into(), tools.clone());
    let tools = nodes(tools, "tools", "tools")?.into_iter().map(read_tool).collect::<Result<Vec<_>, _>>()?;
    if !tools.is_empty() {
        chat.insert("tools".into(), Value::Array(tools));
    }
    let choice = body.take("tool_choice").unwrap_or_else(|| json!("auto"));
    echo.insert("tool_choice".into(), choice.clone());
    let choice = match choice {
        Value::Object(_) => {
            let mut choice = Node::new(choice, "tool_choice".into(), "tool_choice")?;
            if choice.need_text("type")? != "function" {
                return Err(choice.refusal("must have the type \"function\""));
            }
            json!({"type": "function", "function": {"name": choice.need_text("name")?}})
        }
        other => other,
    };
    chat.insert("tool_choice".into(), choice);
    Ok(())
}

fn read_tool(mut tool: Node) -> Result<Value, ApiError> {
    let kind = tool.need_text("type")?;
    if kind != "function" {
        return Err(tool.refusal(format!("has the type {kind:?}; only \"function\" is supported")));
    }
    Ok(function_tool([
        ("name", Some(tool.need_text("name")?.into())),
        ("description", tool.text("description")?.map(Value::from)),
        ("parameters", tool.take("parameters")),
        ("strict", tool.boolean("strict")?.map(Value::from)),
    ]))
}
