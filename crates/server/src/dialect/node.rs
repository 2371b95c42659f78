//! Objects inside a body, read key by key, with messages that name the place. What they mean is decided elsewhere.

use serde_json::{Map, Value, json};

use crate::ApiError;
use crate::body::kind;

/// An object somewhere in a field.
pub(crate) struct Node {
    map: Map<String, Value>,
    /// Such as `messages[0].content[1]`.
    place: String,
    /// The field of the body, as errors name it.
    field: &'static str,
}

impl Node {
    /// Takes an object apart.
    ///
    /// # Errors
    /// When it is not an object.
    pub(crate) fn new(value: Value, place: String, field: &'static str) -> Result<Self, ApiError> {
        match value {
            Value::Object(map) => Ok(Self { map, place, field }),
            other => Err(ApiError::field(field, format!("{place} must be an object, not {}", kind(&other)))),
        }
    }

    /// Such as `messages[0].content[1]`.
    pub(crate) fn place(&self) -> &str {
        &self.place
    }

    /// The refusal of this object.
    pub(crate) fn refusal(&self, rule: impl std::fmt::Display) -> ApiError {
        ApiError::field(self.field, format!("{} {rule}", self.place))
    }

    /// Takes the value of a key out; null is the same as none.
    pub(crate) fn take(&mut self, key: &str) -> Option<Value> {
        self.map.get_mut(key).map(Value::take).filter(|value| !value.is_null())
    }

    /// A string, if there is one.
    ///
    /// # Errors
    /// When the value is something else.
    pub(crate) fn text(&mut self, key: &str) -> Result<Option<String>, ApiError> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.wrong(key, "a string", &other)),
        }
    }

    /// A string.
    ///
    /// # Errors
    /// When there is none.
    pub(crate) fn need_text(&mut self, key: &str) -> Result<String, ApiError> {
        self.text(key)?.ok_or_else(|| self.refusal(format!("must have a string {key}")))
    }

    /// A boolean, if there is one.
    ///
    /// # Errors
    /// When the value is something else.
    pub(crate) fn boolean(&mut self, key: &str) -> Result<Option<bool>, ApiError> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(flag)),
            Some(other) => Err(self.wrong(key, "a boolean", &other)),
        }
    }

    /// An object, if there is one.
    ///
    /// # Errors
    /// When the value is something else.
    pub(crate) fn node(&mut self, key: &str) -> Result<Option<Self>, ApiError> {
        let place = format!("{}.{key}", self.place);
        self.take(key).map(|value| Self::new(value, place, self.field)).transpose()
    }

    /// Refuses keys that are not among `known`; those with null are not there.
    ///
    /// # Errors
    /// Names the first.
    pub(crate) fn only(&self, known: &[&str]) -> Result<(), ApiError> {
        match self.map.iter().find(|(key, value)| !value.is_null() && !known.contains(&key.as_str())) {
            None => Ok(()),
            Some((key, _)) => {
                let key: String = key.chars().take(64).collect();
                Err(self.refusal(format!("has the key {key:?}; known here: {}", known.join(", "))))
            }
        }
    }

    /// The refusal of a value of the wrong type.
    pub(crate) fn wrong(&self, key: &str, wanted: &str, value: &Value) -> ApiError {
        let message = format!("{}.{key} must be {wanted}, not {}", self.place, kind(value));
        ApiError::field(self.field, message)
    }
}

/// A function's tool as a chat has it. Keys that were not sent are not there: models are shown tools as they are.
pub(crate) fn function_tool(fields: [(&str, Option<Value>); 4]) -> Value {
    let fields = fields.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?)));
    json!({"type": "function", "function": fields.collect::<Map<_, _>>()})
}

/// The objects of a list.
///
/// # Errors
/// When it is no list, or holds something else.
pub(crate) fn nodes(value: Value, place: &str, field: &'static str) -> Result<Vec<Node>, ApiError> {
    match value {
        Value::Array(items) => {
            let node = |(i, item)| Node::new(item, format!("{place}[{i}]"), field);
            items.into_iter().enumerate().map(node).collect()
        }
        other => Err(ApiError::field(field, format!("{place} must be a list, not {}", kind(&other)))),
    }
}
