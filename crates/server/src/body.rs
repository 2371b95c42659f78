//! A JSON body read field by field, with messages that name field, rule and value. Knows types, not meanings.

use serde_json::{Map, Value};
use spark_api::TokenId;

use crate::ApiError;

/// The fields of a request. A null is the same as a field that is not there.
pub(crate) struct Body(Map<String, Value>);

impl Body {
    /// Takes a JSON object apart.
    ///
    /// # Errors
    /// When it is not an object.
    pub(crate) fn new(value: Value) -> Result<Self, ApiError> {
        match value {
            Value::Object(map) => Ok(Self(map)),
            other => Err(ApiError::body(format!("the body must be a JSON object, not {}", kind(&other)))),
        }
    }

    /// All fields.
    pub(crate) fn fields(&self) -> &Map<String, Value> {
        &self.0
    }

    /// A copy of what is left of the fields that `is_kept`, with `name` as well.
    pub(crate) fn with(&self, is_kept: impl Fn(&str) -> bool, name: &str, value: Value) -> Self {
        let fields = self.0.iter().filter(|(name, value)| is_kept(name) && !value.is_null());
        let mut fields: Map<String, Value> =
            fields.map(|(name, value)| (name.clone(), value.clone())).collect();
        fields.insert(name.to_owned(), value);
        Self(fields)
    }

    /// Takes those of `names` out that are there.
    pub(crate) fn take_all<'a>(
        &mut self,
        names: impl IntoIterator<Item = &'a &'a str>,
    ) -> Map<String, Value> {
        names.into_iter().filter_map(|name| Some(((*name).to_owned(), self.take(name)?))).collect()
    }

    /// Takes the value of a field out.
    pub(crate) fn take(&mut self, name: &str) -> Option<Value> {
        self.0.get_mut(name).map(Value::take).filter(|value| !value.is_null())
    }

    /// A boolean, or `default`.
    pub(crate) fn boolean(&mut self, name: &'static str, default: bool) -> Result<bool, ApiError> {
        match self.take(name) {
            None => Ok(default),
            Some(Value::Bool(value)) => Ok(value),
            Some(other) => Err(wrong_type(name, "a boolean", &other)),
        }
    }

    /// A number that is finite as an f32.
    pub(crate) fn float(&mut self, name: &'static str) -> Result<Option<f32>, ApiError> {
        self.take(name).map(|value| as_float(name, &value)).transpose()
    }

    /// An integer in `low..=high`.
    pub(crate) fn integer(
        &mut self,
        name: &'static str,
        low: i64,
        high: i64,
    ) -> Result<Option<i64>, ApiError> {
        self.take(name).map(|value| as_integer(name, &value, low, high)).transpose()
    }

    /// A count in `low..=high`.
    pub(crate) fn count(
        &mut self,
        name: &'static str,
        low: usize,
        high: usize,
    ) -> Result<Option<usize>, ApiError> {
        let clamp = |bound: usize| i64::try_from(bound).unwrap_or(i64::MAX);
        let value = self.integer(name, clamp(low), clamp(high))?;
        // The lower bound is not negative, so the value is not either.
        Ok(value.and_then(|value| usize::try_from(value).ok()))
    }

    /// A string of at most `max_bytes` bytes.
    pub(crate) fn string(
        &mut self,
        name: &'static str,
        max_bytes: usize,
    ) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) if text.len() > max_bytes => {
                let message = format!("{name} has {} bytes; the limit is {max_bytes}", text.len());
                Err(ApiError::field(name, message))
            }
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong_type(name, "a string", &other)),
        }
    }

    /// A list of at most `max` token ids; empty if absent.
    pub(crate) fn token_ids(&mut self, name: &'static str, max: usize) -> Result<Vec<TokenId>, ApiError> {
        match self.take(name) {
            None => Ok(Vec::new()),
            Some(Value::Array(items)) if items.len() > max => {
                let message = format!("{name} has {} entries; the limit is {max}", items.len());
                Err(ApiError::field(name, message))
            }
            Some(Value::Array(items)) => items.iter().map(|item| as_token_id(name, item)).collect(),
            Some(other) => Err(wrong_type(name, "a list of token ids", &other)),
        }
    }

    /// An object; `None` if absent.
    pub(crate) fn object(&mut self, name: &'static str) -> Result<Option<Map<String, Value>>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(map)),
            Some(other) => Err(wrong_type(name, "an object", &other)),
        }
    }
}

/// A token id: whether it is in the vocabulary is checked with the request.
pub(crate) fn as_token_id(name: &'static str, value: &Value) -> Result<TokenId, ApiError> {
    let id = as_integer(name, value, 0, i64::from(TokenId::MAX))?;
    TokenId::try_from(id).map_err(|_| wrong_type(name, "a token id", value))
}

/// A number that is finite as an f32.
#[allow(clippy::cast_possible_truncation, reason = "the rounded value is what is checked")]
pub(crate) fn as_float(name: &'static str, value: &Value) -> Result<f32, ApiError> {
    let number = value.as_f64().ok_or_else(|| wrong_type(name, "a number", value))? as f32;
    match number.is_finite() {
        true => Ok(number),
        false => Err(ApiError::field(name, format!("{name} is {value}; it is too large"))),
    }
}

/// An integer in `low..=high`; `2.0` counts as one.
#[allow(clippy::cast_possible_truncation, reason = "only integral values below 2^53 are converted")]
fn as_integer(name: &'static str, value: &Value, low: i64, high: i64) -> Result<i64, ApiError> {
    let Value::Number(number) = value else { return Err(wrong_type(name, "an integer", value)) };
    let integral = |float: f64| (float.fract() == 0.0 && float.abs() < 9.0e15).then_some(float as i64);
    let too_large = number.is_u64() || number.as_f64().is_some_and(|float| float.abs() >= 9.0e15);
    match number.as_i64().or_else(|| number.as_f64().filter(|_| !number.is_u64()).and_then(integral)) {
        Some(integer) if (low..=high).contains(&integer) => Ok(integer),
        None if !too_large => {
            Err(ApiError::field(name, format!("{name} is {number}; it must be an integer")))
        }
        _ => Err(ApiError::field(name, format!("{name} is {number}; it must be between {low} and {high}"))),
    }
}

/// The texts of a list.
///
/// # Errors
/// What `wrong` says of an item that is none.
pub(crate) fn strings(
    items: Vec<Value>,
    wrong: impl Fn(&Value) -> ApiError,
) -> Result<Vec<String>, ApiError> {
    let texts = items.into_iter().map(|item| match item {
        Value::String(text) => Ok(text),
        other => Err(wrong(&other)),
    });
    texts.collect()
}

/// The refusal of a value of the wrong type.
pub(crate) fn wrong_type(name: &'static str, wanted: &str, value: &Value) -> ApiError {
    ApiError::field(name, format!("{name} must be {wanted}, not {}", kind(value)))
}

/// What a JSON value is, in words.
pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn integer(value: impl Into<Value>) -> Result<Option<i64>, String> {
        Body::new(json!({"n": value.into()})).unwrap().integer("n", 1, 128).map_err(|error| error.to_string())
    }

    #[test]
    fn integers_are_bounded_and_typed() {
        assert_eq!(integer(json!(null)), Ok(None));
        assert_eq!(integer(json!(128)), Ok(Some(128)));
        assert_eq!(integer(json!(2.0)), Ok(Some(2)));
        assert!(integer(json!(0)).unwrap_err().contains("between 1 and 128"));
        assert!(integer(json!(u64::MAX)).unwrap_err().contains("between 1 and 128"));
        assert!(integer(json!(1e300)).unwrap_err().contains("between 1 and 128"));
        assert!(integer(json!(1.5)).unwrap_err().contains("must be an integer"));
        assert!(integer(json!("1")).unwrap_err().contains("not a string"));
        assert!(integer(json!(true)).unwrap_err().contains("not a boolean"));
    }

    #[test]
    fn floats_must_fit_an_f32() {
        let float = |value: Value| Body::new(json!({"top_p": value})).unwrap().float("top_p");
        assert_eq!(float(json!(0.5)), Ok(Some(0.5)));
        assert!(float(json!(1e300)).is_err());
        assert!(float(json!("0.5")).is_err());
        assert!(float(json!([])).is_err());
    }
}
