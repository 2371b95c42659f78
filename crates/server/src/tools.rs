//! The fields about tools and reasoning: what a request wants of the answer's form. No rendering and no parsing.

use std::sync::Arc;

use serde_json::{Map, Value};
use spark_text::{AnswerOptions, ChatTemplate, ReasoningStart, ToolFormat};

use crate::body::{Body, kind, wrong_type};
use crate::{ApiError, Options, ReasoningParser, ToolCallParser};

/// Most bytes of a function's name.
const MAX_NAME_BYTES: usize = 256;

/// What the model's outputs can be taken apart into: the flags, resolved with the chat template.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Formats {
    pub(crate) tools: Option<ToolFormat>,
    pub(crate) reasoning: bool,
}

impl Formats {
    pub(crate) fn new(options: &Options, template: &ChatTemplate) -> Self {
        Self {
            tools: match options.tool_call_parser {
                ToolCallParser::Auto => template.tool_format(),
                ToolCallParser::Format(format) => Some(format),
                ToolCallParser::None => None,
            },
            reasoning: match options.reasoning_parser {
                ReasoningParser::Auto => template.thinks(),
                ReasoningParser::Qwen3 => true,
                ReasoningParser::None => false,
            },
        }
    }
}

/// What a chat request wants its answer to be taken apart into.
#[derive(Debug, Clone)]
pub(crate) struct AnswerForm {
    /// The tools that the model is shown; null if it may call none.
    pub(crate) tools: Arc<Value>,
    tool_format: Option<ToolFormat>,
    pub(crate) thinks: bool,
    /// `parallel_tool_calls: false`: calls after the first are dropped.
    pub(crate) only_first_call: bool,
    /// `include_reasoning: false`: reasoning is dropped.
    pub(crate) include_reasoning: bool,
}

impl AnswerForm {
    /// Reads `tools`, `tool_choice`, `parallel_tool_calls` and `include_reasoning`.
    ///
    /// # Errors
    /// Names the place in `tools` that is wrong, or the choice that this version cannot hold the model to.
    pub(crate) fn read(body: &mut Body, formats: Formats) -> Result<Self, ApiError> {
        let tools = read_tools(body)?;
        let may_call = read_choice(body, &tools)?;
        let tools = if may_call { tools } else { Vec::new() };
        if !tools.is_empty() && formats.tools.is_none() {
            let message = "tools: this server finds no tool calls in the model's outputs (its chat template shows none, or \
                 --tool-call-parser is none); leave tools out";
            return Err(ApiError::field("tools", message));
        }
        Ok(Self {
            tool_format: formats.tools.filter(|_| !tools.is_empty()),
            tools: Arc::new(if tools.is_empty() { Value::Null } else { Value::Array(tools) }),
            thinks: formats.reasoning,
            only_first_call: !body.boolean("parallel_tool_calls", true)?,
            include_reasoning: body.boolean("include_reasoning", true)?,
        })
    }

    /// What to look for in an output; `None` if it is content and nothing else.
    pub(crate) fn options(&self, start: ReasoningStart) -> Option<AnswerOptions> {
        let reasoning = self.thinks.then_some(start);
        (reasoning.is_some() || self.tool_format.is_some()).then(|| AnswerOptions {
            tool_format: self.tool_format,
            reasoning,
            tools: self.tools.clone(),
        })
    }
}

fn read_tools(body: &mut Body) -> Result<Vec<Value>, ApiError> {
    let tools = match body.take("tools") {
        None => return Ok(Vec::new()),
        Some(Value::Array(tools)) => tools,
        Some(other) => return Err(wrong_type("tools", "a list of tools", &other)),
    };
    for (i, tool) in tools.iter().enumerate() {
        check_tool(tool, &format!("tools[{i}]"))?;
    }
    Ok(tools)
}

fn refuse<T>(place: &str, rule: impl std::fmt::Display) -> Result<T, ApiError> {
    Err(ApiError::field("tools", format!("{place} {rule}")))
}

fn check_tool(tool: &Value, place: &str) -> Result<(), ApiError> {
    let Value::Object(tool) = tool else {
        return refuse(place, format!("must be an object with type and function, not {}", kind(tool)));
    };
    match tool.get("type") {
        Some(Value::String(kind)) if kind == "function" => {}
        Some(Value::String(_)) => return refuse(place, "has another type than \"function\", the only one"),
        _ => return refuse(place, "must have the type \"function\""),
    }
    let function = match tool.get("function") {
        Some(Value::Object(function)) => function,
        other => {
            let kind = kind(other.unwrap_or(&Value::Null));
            return refuse(
                &format!("{place}.function"),
                format!("must be an object with a name, not {kind}"),
            );
        }
    };
    check_function(function, &format!("{place}.function"))
}

fn check_function(function: &Map<String, Value>, place: &str) -> Result<(), ApiError> {
    let null = Value::Null;
    let get = |name: &str| function.get(name).unwrap_or(&null);
    match get("name") {
        Value::String(name) if !is_name(name) => {
            let rule = format!(
                "must have 1 to {MAX_NAME_BYTES} bytes, and no white space, control characters, < or >"
            );
            return refuse(&format!("{place}.name"), rule);
        }
        Value::String(_) => {}
        other => return refuse(&format!("{place}.name"), format!("must be a string, not {}", kind(other))),
    }
    if !matches!(get("description"), Value::Null | Value::String(_)) {
        let kind = kind(get("description"));
        return refuse(&format!("{place}.description"), format!("must be a string, not {kind}"));
    }
    if !matches!(get("parameters"), Value::Null | Value::Object(_)) {
        let kind = kind(get("parameters"));
        return refuse(
            &format!("{place}.parameters"),
            format!("must be a JSON schema (an object), not {kind}"),
        );
    }
    match get("strict") {
        Value::Null | Value::Bool(false) => Ok(()),
        Value::Bool(true) => refuse(
            &format!("{place}.strict"),
            "is true, but this version cannot hold the model to a schema; leave strict out",
        ),
        other => refuse(&format!("{place}.strict"), format!("must be a boolean, not {}", kind(other))),
    }
}

/// A name can stand in both formats of calls, and in a log.
fn is_name(name: &str) -> bool {
    let is_odd = |char: char| char.is_whitespace() || char.is_control() || matches!(char, '<' | '>');
    (1..=MAX_NAME_BYTES).contains(&name.len()) && !name.contains(is_odd)
}

/// Whether the model may call tools. With `none` it is not shown them either.
fn read_choice(body: &mut Body, tools: &[Value]) -> Result<bool, ApiError> {
    let refuse = |message: String| Err(ApiError::field("tool_choice", message));
    let unsupported = "this version cannot force a tool call; use \"auto\"";
    let choice = match body.take("tool_choice") {
        None => return Ok(true),
        Some(Value::String(choice)) => choice,
        Some(Value::Object(choice)) => {
            let name =
                choice.get("function").and_then(|function| function.get("name")).and_then(Value::as_str);
            let is_function = choice.get("type").is_some_and(|kind| kind == "function");
            let Some(name) = name.filter(|_| is_function) else {
                return refuse(
                    "tool_choice must be \"none\", \"auto\", \"required\" or {\"type\": \"function\", \"function\": \
                     {\"name\": ...}}"
                        .into(),
                );
            };
            let name: String = name.chars().take(MAX_NAME_BYTES).collect();
            let is_known = tools
                .iter()
                .any(|tool| tool.pointer("/function/name").and_then(Value::as_str) == Some(&name));
            return refuse(match is_known {
                true => format!("tool_choice names the function {name:?}, but {unsupported}"),
                false => format!("tool_choice names the function {name:?}, which is not among the tools"),
            });
        }
        Some(other) => return Err(wrong_type("tool_choice", "a string or an object", &other)),
    };
    match choice.as_str() {
        "none" => Ok(false),
        "auto" => Ok(true),
        "required" if tools.is_empty() => {
            refuse("tool_choice is \"required\", but there are no tools".into())
        }
        "required" => refuse(format!("tool_choice is \"required\", but {unsupported}")),
        _ => refuse("tool_choice must be \"none\", \"auto\", \"required\" or a function".into()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const ALL: Formats = Formats { tools: Some(ToolFormat::Hermes), reasoning: true };

    fn read(body: Value, formats: Formats) -> Result<AnswerForm, ApiError> {
        AnswerForm::read(&mut Body::new(body)?, formats)
    }

    fn tool(function: &Value) -> Value {
        json!([{"type": "function", "function": function}])
    }

    #[test]
    fn tools_are_checked_and_their_place_is_named() {
        for (tools, rule) in [
            (json!({}), "tools must be a list of tools, not an object"),
            (json!([1]), "tools[0] must be an object"),
            (json!([{}]), "tools[0] must have the type"),
            (json!([{"type": "web_search"}]), "tools[0] has another type"),
            (json!([{"type": "function"}]), "tools[0].function must be an object with a name, not null"),
            (tool(&json!({})), "tools[0].function.name must be a string, not null"),
            (tool(&json!({"name": ""})), "tools[0].function.name must have"),
            (tool(&json!({"name": "a b"})), "tools[0].function.name must have"),
            (tool(&json!({"name": "x".repeat(257)})), "tools[0].function.name must have"),
            (tool(&json!({"name": "f", "description": 1})), "tools[0].function.description must be a string"),
            (
                tool(&json!({"name": "f", "parameters": []})),
                "tools[0].function.parameters must be a JSON schema",
            ),
            (tool(&json!({"name": "f", "strict": true})), "tools[0].function.strict is true"),
            (tool(&json!({"name": "f", "strict": 1})), "tools[0].function.strict must be a boolean"),
        ] {
            let error = read(json!({"tools": tools}), ALL).expect_err(rule);
            assert!(error.to_string().contains(rule), "{error} / {rule}");
            assert_eq!(error.to_json()["error"]["param"], "tools");
        }
        let good = tool(
            &json!({"name": "ärger.b-1", "description": null, "parameters": {"type": "object"}, "strict": false}),
        );
        assert_eq!(*read(json!({"tools": good}), ALL).unwrap().tools, good);
    }

    #[test]
    fn choices_that_need_force_are_refused_by_name() {
        let tools = tool(&json!({"name": "f"}));
        let named = |name: &str| json!({"type": "function", "function": {"name": name}});
        for (choice, rule) in [
            (json!("required"), "cannot force"),
            (named("f"), "cannot force"),
            (named("g"), "not among the tools"),
            (json!({"type": "allowed_tools"}), "must be"),
            (json!("any"), "must be"),
            (json!(1), "must be a string or an object"),
        ] {
            let error = read(json!({"tools": tools, "tool_choice": choice}), ALL).expect_err(rule);
            assert!(error.to_string().contains(rule), "{error} / {rule}");
            assert_eq!(error.to_json()["error"]["param"], "tool_choice");
        }
        assert!(read(json!({"tool_choice": "required"}), ALL).unwrap_err().to_string().contains("no tools"));
        let auto = read(json!({"tools": tools, "tool_choice": "auto"}), ALL).unwrap();
        assert_eq!((&*auto.tools, auto.tool_format), (&tools, ALL.tools));
        let none = read(json!({"tools": tools, "tool_choice": "none"}), ALL).unwrap();
        assert_eq!((&*none.tools, none.tool_format), (&Value::Null, None));
    }

    #[test]
    fn a_model_without_tools_refuses_them_and_needs_no_parser() {
        let none = Formats { tools: None, reasoning: false };
        let tools = tool(&json!({"name": "f"}));
        assert_eq!(read(json!({"tools": tools}), none).unwrap_err().to_json()["error"]["param"], "tools");
        read(json!({"tools": tools, "tool_choice": "none"}), none).unwrap();
        assert!(read(json!({"tools": []}), none).unwrap().options(ReasoningStart::Outside).is_none());
        assert!(read(json!({}), ALL).unwrap().options(ReasoningStart::Inside).is_some());
    }
}
