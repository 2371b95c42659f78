//! The items of a response's `input` as they are shown again (`GET /v1/responses/{id}/input_items`). Shapes them and turns pages;
//! what an item means is read beside.

use serde_json::{Map, Value, json};

use crate::ApiError;
use crate::ids::random_id;

/// Most items of a page, and how many there are unless said.
const MAX_LIMIT: usize = 100;
const DEFAULT_LIMIT: usize = 20;

/// `input` as a list of whole items with ids. Call it with what `read_input` takes.
pub(super) fn shown(input: &Value) -> Vec<Value> {
    match input {
        Value::String(text) => vec![shown_item(&Map::from_iter([
            ("role".to_owned(), json!("user")),
            ("content".to_owned(), json!(text)),
        ]))],
        Value::Array(items) => items.iter().filter_map(Value::as_object).map(shown_item).collect(),
        _ => Vec::new(),
    }
}

fn shown_item(item: &Map<String, Value>) -> Value {
    let kind = item.get("type").and_then(Value::as_str).unwrap_or("message").to_owned();
    let prefix = match kind.as_str() {
        "reasoning" => "rs",
        "function_call" => "fc",
        "function_call_output" => "fco",
        _ => "msg",
    };
    let id = item.get("id").filter(|id| id.is_string()).cloned();
    let mut shown =
        json!({"id": id.unwrap_or_else(|| json!(format!("{prefix}_{}", random_id()))), "type": kind});
    if let Value::Object(shown) = &mut shown {
        let is_assistant = item.get("role").is_some_and(|role| role == "assistant");
        for (key, value) in item.iter().filter(|(key, _)| !matches!(key.as_str(), "id" | "type")) {
            let value = match key.as_str() {
                "content" | "output" => shown_content(value, kind == "message", is_assistant),
                _ => value.clone(),
            };
            shown.insert(key.clone(), value);
        }
        if kind != "reasoning" {
            shown.entry("status").or_insert_with(|| json!("completed"));
        }
    }
    shown
}

/// A text is a list of one part where a message has it. Pictures in `data:` addresses are left out: they may be large, and who asks
/// has sent them.
fn shown_content(content: &Value, is_message: bool, is_assistant: bool) -> Value {
    match content {
        Value::String(text) if is_message && is_assistant => {
            json!([{"type": "output_text", "text": text, "annotations": []}])
        }
        Value::String(text) if is_message => json!([{"type": "input_text", "text": text}]),
        Value::Array(parts) => parts.iter().map(shown_part).collect(),
        other => other.clone(),
    }
}

fn shown_part(part: &Value) -> Value {
    let mut part = part.clone();
    if let Some(url) = part.get_mut("image_url")
        && url.as_str().is_some_and(|text| text.starts_with("data:"))
    {
        *url = Value::Null;
    }
    part
}

/// Which items of a list to show.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Page {
    limit: Option<usize>,
    is_ascending: bool,
    after: Option<String>,
}

impl Page {
    /// Reads the parameters of a GET.
    ///
    /// # Errors
    /// Names the parameter that is wrong or not known.
    pub(crate) fn read(query: &[(String, String)]) -> Result<Self, ApiError> {
        let mut page = Self::default();
        for (name, value) in query {
            match name.as_str() {
                "limit" => {
                    let limit = value.parse().ok().filter(|limit| (1..=MAX_LIMIT).contains(limit));
                    let rule =
                        || ApiError::field("limit", format!("limit must be between 1 and {MAX_LIMIT}"));
                    page.limit = Some(limit.ok_or_else(rule)?);
                }
                "order" if value == "asc" || value == "desc" => page.is_ascending = value == "asc",
                "order" => return Err(ApiError::field("order", "order must be \"asc\" or \"desc\"")),
                "after" => page.after = Some(value.clone()),
                other => {
                    let name: String = other.chars().take(100).collect();
                    let message = format!("{name} is not supported here: only limit, order and after are");
                    return Err(ApiError::field(name, message));
                }
            }
        }
        Ok(page)
    }

    /// The items of the page, as OpenAI's list.
    ///
    /// # Errors
    /// When there is no item `after`.
    pub(super) fn of(&self, items: &[Value]) -> Result<Value, ApiError> {
        let mut ordered: Vec<&Value> = items.iter().collect();
        if !self.is_ascending {
            ordered.reverse();
        }
        let start = match &self.after {
            None => 0,
            Some(id) => {
                let place = ordered.iter().position(|item| item["id"] == id.as_str());
                1 + place.ok_or_else(|| ApiError::field("after", "after: there is no item of this id"))?
            }
        };
        let rest = ordered.get(start..).unwrap_or_default();
        let shown = rest.get(..self.limit.unwrap_or(DEFAULT_LIMIT)).unwrap_or(rest);
        let id = |item: Option<&&Value>| item.map_or(Value::Null, |item| item["id"].clone());
        Ok(
            json!({"object": "list", "data": shown, "first_id": id(shown.first()), "last_id": id(shown.last()),
            "has_more": shown.len() < rest.len()}),
        )
    }
}
