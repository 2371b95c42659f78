//! A body of llama-server's becomes one of a completion: its fields by their other names. Prompts, biases and the order of
//! samplers are read beside.

use serde_json::{Map, Value, json};

use super::samplers::{PENALTIES, Samplers, without_penalties};
use crate::ApiError;
use crate::body::{Body, as_float, strings, wrong_type};

/// Fields that mean the same in a completion.
const SAME: [&str; 17] = [
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "stop",
    "stream",
    "ignore_eos",
    "grammar",
    "json_schema",
    "cache_prompt",
    "timings_per_token",
    "return_progress",
    "request_id",
    "priority",
    "cache_salt",
];
/// Names of one thing, the first of which counts that is there; the completion's own is last.
const NUM_TOKENS: [&str; 3] = ["n_predict", "max_completion_tokens", "max_tokens"];
const NUM_PROBS: [&str; 2] = ["n_probs", "logprobs"];
const NUM_CHOICES: [&str; 2] = ["n_cmpl", "n"];
const PENALTY: [&str; 2] = ["repeat_penalty", "repetition_penalty"];
/// llama-server's seed for "any": -1 as it is without a sign.
const ANY_SEED: u64 = u32::MAX as u64;
/// Most entries of `response_fields`.
const MAX_RESPONSE_FIELDS: usize = 64;

/// What a body asks for.
pub(super) struct Asked {
    /// The fields of a completion.
    pub(super) fields: Map<String, Value>,
    /// Its names, where the body had others.
    pub(super) names: Vec<(&'static str, &'static str)>,
    pub(super) return_tokens: bool,
    pub(super) response_fields: Vec<String>,
    /// `grammar` and `json_schema`, as they were sent.
    pub(super) forms: Map<String, Value>,
}

impl Asked {
    /// Reads everything but the prompts. `bias` is what `logit_bias` says, in the form of a completion.
    ///
    /// # Errors
    /// Names the field with a wrong type, or with a value that cannot be obeyed.
    pub(super) fn read(body: &mut Body, bias: Option<Map<String, Value>>) -> Result<Self, ApiError> {
        let mut asked = Self {
            fields: body.take_all(&SAME),
            names: Vec::new(),
            return_tokens: body.boolean("return_tokens", false)?,
            response_fields: read_response_fields(body)?,
            forms: Map::new(),
        };
        // Below 0 is greedy too.
        if asked.fields.get("temperature").and_then(Value::as_f64).is_some_and(|value| value < 0.0) {
            asked.fields.insert("temperature".to_owned(), json!(0));
        }
        for name in ["grammar", "json_schema"] {
            if let Some(value) = asked.fields.get(name) {
                asked.forms.insert(name.to_owned(), value.clone());
            }
        }
        asked.rename(body, &NUM_CHOICES);
        asked.rename(body, &NUM_TOKENS);
        // -1 sets no bound, which is not the same as leaving it to the server.
        if asked.fields.get("max_tokens").is_some_and(|count| *count == -1) {
            asked.fields.insert("max_tokens".to_owned(), json!(i64::MAX));
        }
        asked.rename(body, &NUM_PROBS);
        if asked.fields.get("logprobs").is_some_and(|count| *count == 0) {
            asked.fields.remove("logprobs");
        }
        asked.read_seed(body);
        asked.fields.extend(bias.map(|bias| ("logit_bias".to_owned(), Value::Object(bias))));
        asked.rename(body, &PENALTY);
        asked.read_window(body)?;
        if let Some(samplers) = Samplers::read(body)? {
            samplers.switch_off_others(&mut asked.fields);
        }
        Ok(asked)
    }

    /// Takes the first of `names` that is there; the last is the completion's.
    fn rename(&mut self, body: &mut Body, names: &[&'static str]) {
        let Some((target, own)) = names.split_last() else { return };
        let mut found = own.iter().chain([target]).filter_map(|name| Some((*name, body.take(name)?)));
        if let Some((name, value)) = found.next() {
            self.fields.insert((*target).to_owned(), value);
            self.names.push((target, name));
        }
    }

    /// -1 draws a seed, as nothing does.
    fn read_seed(&mut self, body: &mut Body) {
        let seed = body.take("seed").filter(|seed| *seed != -1 && *seed != ANY_SEED);
        self.fields.extend(seed.map(|seed| ("seed".to_owned(), seed)));
    }

    /// `repeat_last_n`: over how many tokens penalties count. Here over all of them, or over none.
    fn read_window(&mut self, body: &mut Body) -> Result<(), ApiError> {
        const NAME: &str = "repeat_last_n";
        match body.integer(NAME, -1, i64::from(i32::MAX))? {
            None | Some(-1) => Ok(()),
            Some(0) => {
                without_penalties(&mut self.fields);
                Ok(())
            }
            Some(count) if self.has_penalties()? => {
                let message = format!(
                    "{NAME} is {count}, but penalties count over the whole text here: send -1, or 0 for no penalties"
                );
                Err(ApiError::field(NAME, message))
            }
            Some(_) => Ok(()),
        }
    }

    /// Whether the request has a penalty that is not switched off.
    fn has_penalties(&self) -> Result<bool, ApiError> {
        for (name, neutral) in PENALTIES {
            let value = self.fields.get(name).map(|value| as_float(name, value)).transpose();
            if value.map_err(|error| error.renamed(&self.names))?.is_some_and(|value| value != neutral) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

fn read_response_fields(body: &mut Body) -> Result<Vec<String>, ApiError> {
    const NAME: &str = "response_fields";
    let wrong = |value: &Value| wrong_type(NAME, "a list of strings", value);
    match body.take(NAME) {
        None => Ok(Vec::new()),
        Some(Value::Array(items)) if items.len() > MAX_RESPONSE_FIELDS => {
            let message = format!("{NAME} has {} entries; the limit is {MAX_RESPONSE_FIELDS}", items.len());
            Err(ApiError::field(NAME, message))
        }
        Some(Value::Array(items)) => strings(items, wrong),
        Some(other) => Err(wrong(&other)),
    }
}
