//! `logit_bias` of llama-server: a list of pairs or an object, of ids or texts. It becomes the object of ids that a completion
//! has.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};
use spark_api::TokenId;
use spark_text::Tokenizer;

use crate::body::{Body, as_float, as_token_id, wrong_type};
use crate::params::MAX_TOKEN_ENTRIES;
use crate::prompts::refuse_text;
use crate::{ApiError, FrontEnd};

const NAME: &str = "logit_bias";
const PAIRS: &str = "an object, or a list of pairs of a token id or a text and a number or false";
/// What stands for never; the engine takes no less.
const NEVER: f32 = -100.0;
/// Most bytes of all texts: each of them is tokenised.
const MAX_TEXT_BYTES: usize = 64 << 10;

impl FrontEnd {
    /// Reads `logit_bias`. Texts are tokenised beside everything else.
    ///
    /// # Errors
    /// When it has another form, or is too long.
    pub(super) async fn read_bias(&self, body: &mut Body) -> Result<Option<Map<String, Value>>, ApiError> {
        let Some(value) = body.take(NAME) else { return Ok(None) };
        let tokenizer = self.tokenizer.clone();
        self.pool.run(move || read(value, &tokenizer)).await.map(Some)
    }
}

/// Biases by id. What is said of an id more than once adds up, within what the engine takes.
fn read(value: Value, tokenizer: &Tokenizer) -> Result<Map<String, Value>, ApiError> {
    let pairs: Vec<(Value, Value)> = match value {
        Value::Object(map) => map.into_iter().map(|(key, value)| (by_key(key), value)).collect(),
        Value::Array(items) => items.into_iter().map(pair).collect::<Result<_, _>>()?,
        other => return Err(wrong_type(NAME, PAIRS, &other)),
    };
    let num_bytes: usize = pairs.iter().filter_map(|(token, _)| token.as_str()).map(str::len).sum();
    if pairs.len() > MAX_TOKEN_ENTRIES || num_bytes > MAX_TEXT_BYTES {
        let message = format!(
            "{NAME} has {} entries and {num_bytes} bytes of text; the limits are {MAX_TOKEN_ENTRIES} and {MAX_TEXT_BYTES}",
            pairs.len()
        );
        return Err(ApiError::field(NAME, message));
    }
    let mut biases: BTreeMap<TokenId, f32> = BTreeMap::new();
    for (token, bias) in pairs {
        let bias = if bias == false { NEVER } else { as_float(NAME, &bias)? };
        for id in ids(&token, tokenizer)? {
            let sum = |before: &mut f32| *before = (*before + bias).clamp(NEVER, -NEVER);
            biases.entry(id).and_modify(sum).or_insert(bias);
        }
    }
    Ok(biases.into_iter().map(|(id, bias)| (id.to_string(), json!(bias))).collect())
}

/// Keys of an object are texts; those that are numbers are ids.
fn by_key(key: String) -> Value {
    key.parse::<TokenId>().map_or(Value::String(key), Value::from)
}

fn pair(item: Value) -> Result<(Value, Value), ApiError> {
    let Value::Array(items) = item else { return Err(wrong_type(NAME, PAIRS, &item)) };
    match <[Value; 2]>::try_from(items) {
        Ok([token, bias]) => Ok((token, bias)),
        Err(items) => {
            let message = format!("{NAME} has an entry of {} values; it must be {PAIRS}", items.len());
            Err(ApiError::field(NAME, message))
        }
    }
}

fn ids(token: &Value, tokenizer: &Tokenizer) -> Result<Vec<TokenId>, ApiError> {
    match token {
        Value::String(text) => tokenizer.encode_ordinary(text).map_err(|error| refuse_text(NAME, &error)),
        Value::Number(_) => Ok(vec![as_token_id(NAME, token)?]),
        other => Err(wrong_type(NAME, PAIRS, other)),
    }
}
