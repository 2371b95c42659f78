//! From the body of a message to that of a chat. Reads Anthropic's own fields; the rest goes on as it is.

use serde_json::{Map, Value, json};
use spark_text::THINKING_SWITCH;

use crate::ApiError;
use crate::body::{Body, kind};
use crate::dialect::node::{Node, function_tool, nodes};
use crate::fields::PASSED;
use crate::tools::Formats;

/// Fields that mean the same in a chat.
const SAME: [&str; 7] = ["model", "max_tokens", "stream", "temperature", "top_p", "top_k", "request_id"];

/// The chat that a message asks for.
///
/// # Errors
/// Names the field and the place that is wrong.
pub(super) fn to_chat(body: &mut Body, formats: Option<Formats>) -> Result<Map<String, Value>, ApiError> {
    let mut chat = body.take_all(SAME.iter().chain(PASSED));
    if let Some(stops) = body.take("stop_sequences") {
        match &stops {
            Value::Array(items) if items.iter().all(Value::is_string) => chat.insert("stop".into(), stops),
            _ => return Err(ApiError::field("stop_sequences", "stop_sequences must be a list of strings")),
        };
    }
    read_thinking(body, formats, &mut chat)?;
    read_output(body, &mut chat)?;
    read_tools(body, &mut chat)?;
    let mut messages = Vec::new();
    if let Some(system) = body.take("system") {
        messages.push(json!({"role": "system", "content": read_system(system)?}));
    }
    let turns = body.take("messages").ok_or_else(|| ApiError::field("messages", "messages is missing"))?;
    for turn in nodes(turns, "messages", "messages")? {
        read_turn(turn, &mut messages)?;
    }
    // A last turn of the assistant is the beginning of its answer.
    let begins_answer = |last: &Value| {
        last["role"] == "assistant" && last["content"] != "" && last.get("tool_calls").is_none()
    };
    if messages.last().is_some_and(begins_answer) {
        chat.insert("continue_final_message".into(), json!(true));
    }
    chat.insert("messages".into(), Value::Array(messages));
    Ok(chat)
}

fn read_thinking(
    body: &mut Body,
    formats: Option<Formats>,
    chat: &mut Map<String, Value>,
) -> Result<(), ApiError> {
    let Some(value) = body.take("thinking") else { return Ok(()) };
    let mut thinking = Node::new(value, "thinking".into(), "thinking")?;
    let on = match thinking.need_text("type")?.as_str() {
        "enabled" => {
            let budget = thinking.take("budget_tokens").and_then(|budget| budget.as_u64());
            let Some(budget) = budget.filter(|budget| *budget > 0) else {
                return Err(thinking.refusal("must have budget_tokens, an integer of at least 1"));
            };
            // More than any context has room for is no bound.
            chat.entry("thinking_token_budget").or_insert(json!(budget.min(1 << 30)));
            true
        }
        "adaptive" => true,
        "disabled" => false,
        _ => return Err(thinking.refusal("must have the type \"enabled\", \"adaptive\" or \"disabled\"")),
    };
    // How thoughts are shown is the client's choice between all of them and none.
    match thinking.text("display")?.as_deref() {
        None | Some("summarized") => {}
        Some("omitted") => drop(chat.insert("include_reasoning".into(), json!(false))),
        Some(_) => return Err(thinking.refusal("has another display than \"summarized\" and \"omitted\"")),
    }
    let (thinks, has_switch) = formats.map_or((false, false), |f| (f.reasoning, f.thinking_switch));
    match (on, thinks, has_switch) {
        (true, false, _) => return Err(thinking.refusal("is on, but this model does not think")),
        (false, true, false) => return Err(thinking.refusal("is off, but this model always thinks")),
        (_, _, true) => {
            let kwargs = chat.entry("chat_template_kwargs").or_insert_with(|| json!({}));
            if let Value::Object(kwargs) = kwargs {
                kwargs.entry(THINKING_SWITCH).or_insert(Value::Bool(on));
            }
        }
        _ => {}
    }
    Ok(())
}

/// `output_config`, and `output_format`, which was its `format` before.
fn read_output(body: &mut Body, chat: &mut Map<String, Value>) -> Result<(), ApiError> {
    let mut format = None;
    if let Some(value) = body.take("output_config") {
        let mut config = Node::new(value, "output_config".into(), "output_config")?;
        config.only(&["format", "effort"])?;
        format = config.node("format")?;
        if let Some(effort) = config.text("effort")? {
            chat.insert("reasoning_effort".into(), json!(effort));
        }
    }
    if let Some(value) = body.take("output_format") {
        format = Some(Node::new(value, "output_format".into(), "output_format")?);
    }
    let Some(mut format) = format else { return Ok(()) };
    format.only(&["type", "schema", "name"])?;
    if format.need_text("type")? != "json_schema" {
        return Err(format.refusal("must have the type \"json_schema\""));
    }
    let schema = format.take("schema").ok_or_else(|| format.refusal("must have a schema"))?;
    let json_schema = json!({"name": "output", "schema": schema, "strict": true});
    chat.insert("response_format".into(), json!({"type": "json_schema", "json_schema": json_schema}));
    Ok(())
}

fn read_tools(body: &mut Body, chat: &mut Map<String, Value>) -> Result<(), ApiError> {
    if let Some(tools) = body.take("tools") {
        let tools = nodes(tools, "tools", "tools")?.into_iter().map(read_tool).collect::<Result<_, _>>()?;
        chat.insert("tools".into(), Value::Array(tools));
    }
    let Some(value) = body.take("tool_choice") else { return Ok(()) };
    let mut choice = Node::new(value, "tool_choice".into(), "tool_choice")?;
    let chosen = match choice.need_text("type")?.as_str() {
        "auto" => json!("auto"),
        "any" => json!("required"),
        "none" => json!("none"),
        "tool" => json!({"type": "function", "function": {"name": choice.need_text("name")?}}),
        _ => return Err(choice.refusal("must have the type \"auto\", \"any\", \"tool\" or \"none\"")),
    };
    chat.insert("tool_choice".into(), chosen);
    if let Some(is_single) = choice.boolean("disable_parallel_tool_use")? {
        chat.insert("parallel_tool_calls".into(), json!(!is_single));
    }
    Ok(())
}

fn read_tool(mut tool: Node) -> Result<Value, ApiError> {
    if let Some(kind) = tool.text("type")?
        && kind != "custom"
    {
        return Err(tool.refusal(format!("has the type {kind:?}; only \"custom\" is supported")));
    }
    let schema = tool.take("input_schema").ok_or_else(|| tool.refusal("must have an input_schema"))?;
    Ok(function_tool([
        ("name", Some(tool.need_text("name")?.into())),
        ("description", tool.text("description")?.map(Value::from)),
        ("parameters", Some(schema)),
        ("strict", tool.boolean("strict")?.map(Value::from)),
    ]))
}

/// A text, or a list of text blocks.
fn read_system(system: Value) -> Result<Value, ApiError> {
    if system.is_string() {
        return Ok(system);
    }
    let mut texts = Vec::new();
    for mut block in nodes(system, "system", "system")? {
        if block.need_text("type")? != "text" {
            return Err(block.refusal("must have the type \"text\""));
        }
        texts.push(block.need_text("text")?);
    }
    Ok(json!(texts.join("\n\n")))
}

fn read_turn(mut turn: Node, messages: &mut Vec<Value>) -> Result<(), ApiError> {
    let role = turn.need_text("role")?;
    if !["user", "assistant"].contains(&role.as_str()) {
        return Err(turn.refusal("must have the role \"user\" or \"assistant\""));
    }
    let blocks = match turn.take("content") {
        Some(Value::String(text)) => {
            messages.push(json!({"role": role, "content": text}));
            return Ok(());
        }
        Some(blocks @ Value::Array(_)) => nodes(blocks, &format!("{}.content", turn.place()), "messages")?,
        other => {
            let other = other.unwrap_or_default();
            return Err(turn.wrong("content", "a string or a list of blocks", &other));
        }
    };
    match role == "user" {
        true => read_user(blocks, messages),
        false => read_assistant(blocks, messages),
    }
}

/// Results of tools are messages of their own in a chat; what stands between them stays in order.
fn read_user(blocks: Vec<Node>, messages: &mut Vec<Value>) -> Result<(), ApiError> {
    let mut parts = Vec::new();
    let flush = |parts: &mut Vec<Value>, messages: &mut Vec<Value>| {
        if !parts.is_empty() {
            messages.push(json!({"role": "user", "content": std::mem::take(parts)}));
        }
    };
    for mut block in blocks {
        let kind = block.need_text("type")?;
        if kind == "tool_result" {
            flush(&mut parts, messages);
            messages.push(read_tool_result(block)?);
        } else {
            parts.push(read_part(block, &kind)?);
        }
    }
    flush(&mut parts, messages);
    Ok(())
}

fn read_tool_result(mut block: Node) -> Result<Value, ApiError> {
    let id = block.need_text("tool_use_id")?;
    let is_error = block.boolean("is_error")?.unwrap_or(false);
    let mut parts = match block.take("content") {
        None => Vec::new(),
        Some(Value::String(text)) => vec![json!({"type": "text", "text": text})],
        Some(blocks) => {
            let place = format!("{}.content", block.place());
            let parts = nodes(blocks, &place, "messages")?.into_iter().map(|mut part| {
                let kind = part.need_text("type")?;
                read_part(part, &kind)
            });
            parts.collect::<Result<_, _>>()?
        }
    };
    if is_error {
        // Templates have no other way to say so.
        parts.insert(0, json!({"type": "text", "text": "Error: "}));
    }
    let is_text = parts.iter().all(|part| part["type"] == "text");
    let content = match is_text {
        true => Value::String(parts.iter().filter_map(|part| part["text"].as_str()).collect()),
        false => Value::Array(parts),
    };
    Ok(json!({"role": "tool", "tool_call_id": id, "content": content}))
}

/// Text or an image.
fn read_part(mut block: Node, kind: &str) -> Result<Value, ApiError> {
    match kind {
        "text" => return Ok(json!({"type": "text", "text": block.need_text("text")?})),
        "image" => {}
        other => {
            return Err(block.refusal(format!("has the type {other:?}, which is not supported here")));
        }
    }
    let mut source = block.node("source")?.ok_or_else(|| block.refusal("must have a source"))?;
    let url = match source.need_text("type")?.as_str() {
        "base64" => {
            let media_type = source.need_text("media_type")?;
            if !media_type.starts_with("image/") {
                return Err(source.refusal(format!("has the media_type {media_type:?}, which is no image")));
            }
            format!("data:{media_type};base64,{}", source.need_text("data")?)
        }
        "url" => source.need_text("url")?,
        _ => return Err(source.refusal("must have the type \"base64\" or \"url\"")),
    };
    Ok(json!({"type": "image_url", "image_url": {"url": url}}))
}

fn read_assistant(blocks: Vec<Node>, messages: &mut Vec<Value>) -> Result<(), ApiError> {
    let (mut text, mut reasoning, mut calls) = (String::new(), String::new(), Vec::new());
    for mut block in blocks {
        match block.need_text("type")?.as_str() {
            "text" => text.push_str(&block.need_text("text")?),
            "thinking" => reasoning.push_str(&block.need_text("thinking")?),
            "tool_use" => {
                let input = block.take("input").unwrap_or_else(|| json!({}));
                if !input.is_object() {
                    return Err(block.refusal(format!("must have an object input, not {}", kind(&input))));
                }
                calls.push(json!({"id": block.need_text("id")?, "type": "function",
                    "function": {"name": block.need_text("name")?, "arguments": input}}));
            }
            other => {
                return Err(block.refusal(format!("has the type {other:?}, which is not supported here")));
            }
        }
    }
    let mut message = json!({"role": "assistant", "content": text});
    if !reasoning.is_empty() {
        message["reasoning"] = json!(reasoning);
    }
    if !calls.is_empty() {
        message["tool_calls"] = Value::Array(calls);
    }
    messages.push(message);
    Ok(())
}
