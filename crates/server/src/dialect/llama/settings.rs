//! `generation_settings` of llama-server's answers: what a request was generated with. Samplers that are not here show the
//! values that switch them off.

use serde_json::{Map, Value, json};

use super::samplers::OURS;
use crate::about::decimal;
use crate::params::Params;

/// Everything but the seed. `forms` are the grammar and the schema of the request.
pub(super) fn settings(params: &Params, forms: &Map<String, Value>) -> Map<String, Value> {
    let sampling = &params.sampling;
    // -1 is no bound; whoever asked for more than can be counted asked for that too.
    let n_predict = params.max_tokens.filter(|count| *count < usize::MAX >> 1);
    let n_predict = n_predict.map_or(json!(-1), |count| json!(count));
    let bias = |(token, bias): &(u32, f32)| json!({"token": token, "bias": decimal(*bias)});
    let bias: Vec<_> = sampling.logit_bias.iter().map(bias).collect();
    let stop: Vec<_> = (0..).map_while(|i| params.output.stop.get(i)).collect();
    let settings = json!({
        "temperature": decimal(sampling.temperature),
        "top_k": sampling.top_k,
        "top_p": decimal(sampling.top_p),
        "min_p": decimal(sampling.min_p),
        "repeat_last_n": -1,
        "repeat_penalty": decimal(sampling.repetition_penalty),
        "presence_penalty": decimal(sampling.presence_penalty),
        "frequency_penalty": decimal(sampling.frequency_penalty),
        "samplers": OURS,
        "stop": stop,
        "max_tokens": n_predict,
        "n_predict": n_predict,
        "ignore_eos": sampling.ignore_eos,
        "stream": params.stream.stream,
        "logit_bias": bias,
        "n_probs": params.output.logprobs.unwrap_or(0),
        "timings_per_token": params.stream.timings,
        "grammar": forms.get("grammar").unwrap_or(&json!("")),
        "json_schema": forms.get("json_schema"),
        "dynatemp_range": 0.0,
        "typical_p": 1.0,
        "top_n_sigma": -1.0,
        "xtc_probability": 0.0,
        "dry_multiplier": 0.0,
        "mirostat": 0,
        "adaptive_target": -1.0,
        "adaptive_decay": 0.0,
        "min_keep": 0,
        "post_sampling_probs": false,
        "lora": [],
    });
    match settings {
        Value::Object(settings) => settings,
        _ => Map::new(),
    }
}
