//! The fields about tools and reasoning: what a request wants of the answer's form. No rendering and no parsing.

use std::sync::Arc;

use serde_json::{Map, Value};
use spark_text::{
    AnswerOptions, ChatTemplate, Grammar, ReasoningStart, ToolCalls, ToolFormat, ToolFunction, ToolMode,
};

use crate::body::{Body, kind, wrong_type};
use crate::structured::Wanted;
use crate::{ApiError, Options, ReasoningParser, ToolCallParser};

/// Most bytes of a function's name.
const MAX_NAME_BYTES: usize = 256;

/// What the model's outputs can be taken apart into: the flags, resolved with the chat template.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Formats {
    pub(crate) tools: Option<ToolFormat>,
    pub(crate) reasoning: bool,
    /// The template has an argument that switches thinking on and off.
    pub(crate) thinking_switch: bool,
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
            thinking_switch: template.has_thinking_switch(),
        }
    }
}

/// `tool_choice`.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Choice {
    None,
    Auto,
    /// At least one call.
    Required,
    /// One call of this function.
    Named(String),
}

/// What a chat request wants its answer to be taken apart into.
#[derive(Debug, Clone)]
pub(crate) struct AnswerForm {
    /// The tools that the model is shown; null if it may call none.
    pub(crate) tools: Arc<Value>,
    tool_format: Option<ToolFormat>,
    choice: Choice,
    pub(crate) thinks: bool,
    /// `parallel_tool_calls: false`: calls after the first are dropped.
    pub(crate) only_first_call: bool,
    /// `include_reasoning: false`: reasoning is dropped.
    pub(crate) include_reasoning: bool,
    /// Most tokens of reasoning, if there is a bound.
    pub(crate) thinking_budget: Option<usize>,
}

impl AnswerForm {
    /// Reads `tools`, `tool_choice`, `parallel_tool_calls` and `include_reasoning`; the budget is read elsewhere.
    ///
    /// # Errors
    /// Names the place in `tools` that is wrong, or the choice that makes no sense.
    pub(crate) fn read(body: &mut Body, formats: Formats) -> Result<Self, ApiError> {
        let tools = read_tools(body)?;
        let choice = read_choice(body, &tools)?;
        // With `none` the model is not shown them either.
        let tools = if choice == Choice::None { Vec::new() } else { tools };
        if !tools.is_empty() && formats.tools.is_none() {
            let message = "tools: this server finds no tool calls in the model's outputs (its chat template shows none, or \
                 --tool-call-parser is none); leave tools out";
            return Err(ApiError::field("tools", message));
        }
        Ok(Self {
            tool_format: formats.tools.filter(|_| !tools.is_empty()),
            choice,
            tools: Arc::new(if tools.is_empty() { Value::Null } else { Value::Array(tools) }),
            thinks: formats.reasoning,
            only_first_call: !body.boolean("parallel_tool_calls", true)?,
            include_reasoning: body.boolean("include_reasoning", true)?,
            thinking_budget: None,
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

    /// The grammar of the answer: `structured` is what it has to be where it calls no tools.
    ///
    /// Forced calls leave no room for anything else. Free to choose, the model may write calls or what was wanted; and
    /// where nothing was, text in which the calls alone have a form, if a function asks to be strict.
    pub(crate) fn grammar(&self, structured: Option<Wanted>) -> Option<Wanted> {
        let (Some(format), Value::Array(tools)) = (self.tool_format, &*self.tools) else { return structured };
        let name = match &self.choice {
            Choice::Named(name) => Some(name.as_str()),
            Choice::None | Choice::Auto | Choice::Required => None,
        };
        let functions: Vec<ToolFunction> = tools
            .iter()
            .enumerate()
            .map(|(i, tool)| tool_function(i, tool))
            .filter(|function| name.is_none_or(|name| function.name == name))
            .collect();
        let is_strict = functions.iter().any(|function| function.strict);
        let (mode, field) = match (&self.choice, structured) {
            (Choice::None, structured) => return structured,
            (Choice::Named(_), _) => (ToolMode::One, "tools"),
            (Choice::Required, _) if self.only_first_call => (ToolMode::One, "tools"),
            (Choice::Required, _) => (ToolMode::Some, "tools"),
            (Choice::Auto, Some(wanted)) => (ToolMode::Or(Box::new(wanted.grammar)), wanted.field),
            (Choice::Auto, None) if is_strict => (ToolMode::InText, "tools"),
            (Choice::Auto, None) => return None,
        };
        Some(Wanted { grammar: Grammar::ToolCalls(ToolCalls { format, functions, mode }), field })
    }
}

/// A tool that was checked before.
fn tool_function(index: usize, tool: &Value) -> ToolFunction {
    let get = |name: &str| tool.get("function").and_then(|function| function.get(name));
    ToolFunction {
        name: get("name").and_then(Value::as_str).unwrap_or_default().to_owned(),
        parameters: get("parameters").cloned().unwrap_or_default(),
        strict: get("strict").and_then(Value::as_bool).unwrap_or(false),
        place: format!("tools[{index}].function"),
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
        Value::Null | Value::Bool(_) => Ok(()),
        other => refuse(&format!("{place}.strict"), format!("must be a boolean, not {}", kind(other))),
    }
}

/// A name can stand in both formats of calls, and in a log.
fn is_name(name: &str) -> bool {
    let is_odd = |char: char| char.is_whitespace() || char.is_control() || matches!(char, '<' | '>');
    (1..=MAX_NAME_BYTES).contains(&name.len()) && !name.contains(is_odd)
}

/// Reads `tool_choice`.
fn read_choice(body: &mut Body, tools: &[Value]) -> Result<Choice, ApiError> {
    let refuse = |message: String| Err(ApiError::field("tool_choice", message));
    let choice = match body.take("tool_choice") {
        None => return Ok(Choice::Auto),
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
            return match is_known {
                true => Ok(Choice::Named(name)),
                false => {
                    refuse(format!("tool_choice names the function {name:?}, which is not among the tools"))
                }
            };
        }
        Some(other) => return Err(wrong_type("tool_choice", "a string or an object", &other)),
    };
    match choice.as_str() {
        "none" => Ok(Choice::None),
        "auto" => Ok(Choice::Auto),
        "required" if tools.is_empty() => {
            refuse("tool_choice is \"required\", but there are no tools".into())
        }
        "required" => Ok(Choice::Required),
        _ => refuse("tool_choice must be \"none\", \"auto\", \"required\" or a function".into()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const ALL: Formats = Formats { tools: Some(ToolFormat::Hermes), reasoning: true, thinking_switch: true };

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
            (tool(&json!({"name": "f", "strict": 1})), "tools[0].function.strict must be a boolean"),
        ] {
            let error = read(json!({"tools": tools}), ALL).expect_err(rule);
            assert!(error.to_string().contains(rule), "{error} / {rule}");
            assert_eq!(error.to_json()["error"]["param"], "tools");
        }
        let good = tool(
            &json!({"name": "ärger.b-1", "description": null, "parameters": {"type": "object"}, "strict": true}),
        );
        assert_eq!(*read(json!({"tools": good}), ALL).unwrap().tools, good);
    }

    #[test]
    fn choices_are_read_or_refused_by_name() {
        let tools = tool(&json!({"name": "f"}));
        let named = |name: &str| json!({"type": "function", "function": {"name": name}});
        for (choice, rule) in [
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
        let chosen =
            |choice: Value| read(json!({"tools": tools, "tool_choice": choice}), ALL).unwrap().choice;
        assert_eq!(chosen(json!("required")), Choice::Required);
        assert_eq!(chosen(named("f")), Choice::Named("f".into()));
        let none = read(json!({"tools": tools, "tool_choice": "none"}), ALL).unwrap();
        assert_eq!((&*none.tools, none.tool_format), (&Value::Null, None));
    }

    #[test]
    fn forced_and_strict_calls_have_a_grammar() {
        let object = || Some(Wanted { grammar: Grammar::json_object(), field: "response_format" });
        let named = json!({"type": "function", "function": {"name": "g"}});
        let mode = |strict: bool, more: Value, structured: Option<Wanted>| {
            let mut body = json!({"tools": [{"type": "function", "function": {"name": "f"}},
                {"type": "function", "function": {"name": "g", "strict": strict}}]});
            more.as_object().unwrap().iter().for_each(|(name, value)| body[name] = value.clone());
            read(body, ALL).unwrap().grammar(structured).map(|wanted| match wanted.grammar {
                Grammar::ToolCalls(calls) => (Some(calls.mode), calls.functions.len(), wanted.field),
                _ => (None, 0, wanted.field),
            })
        };
        let required = json!({"tool_choice": "required"});
        let single = json!({"tool_choice": "required", "parallel_tool_calls": false});
        let none = json!({"tool_choice": "none"});
        assert_eq!(mode(false, json!({}), None), None);
        assert_eq!(mode(true, json!({}), None), Some((Some(ToolMode::InText), 2, "tools")));
        let or = ToolMode::Or(Box::new(Grammar::json_object()));
        assert_eq!(mode(false, json!({}), object()), Some((Some(or), 2, "response_format")));
        assert_eq!(mode(false, required.clone(), None), Some((Some(ToolMode::Some), 2, "tools")));
        assert_eq!(mode(false, required, object()), Some((Some(ToolMode::Some), 2, "tools")));
        assert_eq!(mode(false, single, None), Some((Some(ToolMode::One), 2, "tools")));
        assert_eq!(mode(false, json!({"tool_choice": named}), None), Some((Some(ToolMode::One), 1, "tools")));
        assert_eq!(mode(true, none.clone(), object()), Some((None, 0, "response_format")));
        assert_eq!(mode(true, none, None), None);
    }

    #[test]
    fn a_model_without_tools_refuses_them_and_needs_no_parser() {
        let none = Formats { tools: None, reasoning: false, thinking_switch: false };
        let tools = tool(&json!({"name": "f"}));
        assert_eq!(read(json!({"tools": tools}), none).unwrap_err().to_json()["error"]["param"], "tools");
        read(json!({"tools": tools, "tool_choice": "none"}), none).unwrap();
        assert!(read(json!({"tools": []}), none).unwrap().options(ReasoningStart::Outside).is_none());
        assert!(read(json!({}), ALL).unwrap().options(ReasoningStart::Inside).is_some());
    }
}
