//! Schemas of the request bodies: which fields they have is taken from the table of fields, never listed twice.

use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{ObjectBuilder, Schema, SchemaType, Type};

use super::schema::{
    Node, any, any_number, boolean, count, either, integer, integer_in, list, map, number, object, or_null,
    text, word,
};
use crate::fields::{self, Endpoint, Support};

/// The body of an endpoint; what is null is the same as absent, except for the fields that have to be there.
pub(super) fn body(endpoint: Endpoint, required: &[&'static str]) -> Node {
    let mut builder = ObjectBuilder::new().schema_type(SchemaType::Type(Type::Object));
    for (name, _) in fields::all(endpoint).filter(|(_, support)| *support == Support::Works) {
        // What has no schema shows as anything at all; a test says that there is nothing of that kind.
        let node = field(endpoint, name).unwrap_or_else(any);
        builder = match required.contains(&name) {
            true => builder.property(name, node).required(name),
            false => builder.property(name, or_null(node)),
        };
    }
    let is_refused = |support: &Support| matches!(support, Support::Refused(_) | Support::Replaced(_));
    let refused = fields::all(endpoint).filter(|(_, support)| is_refused(support));
    let refused: Vec<&str> = refused.map(|(name, _)| name).collect();
    let ignored = fields::all(endpoint).filter(|(_, support)| *support == Support::NoEffect);
    let ignored: Vec<&str> = ignored.map(|(name, _)| name).collect();
    let description = format!(
        "Accepted without effect: {}. A 400, unless it asks for what happens anyway: {}. Other fields are unknown: the \
         server's log names them once.",
        ignored.join(", "),
        refused.join(", ")
    );
    RefOr::T(Schema::Object(builder.description(Some(description)).build()))
}

/// What a field holds.
fn field(endpoint: Endpoint, name: &str) -> Option<Node> {
    Some(match name {
        "messages" if endpoint == Endpoint::Batch => list(list(message(endpoint))),
        "messages" => list(message(endpoint)),
        "system" => either(vec![text(), list(map(any()))]),
        "input" => either(vec![text(), list(map(any()))]),
        "prompt" if endpoint == Endpoint::Llama => llama_prompt(),
        "prompt" => prompt(),
        "logit_bias" if endpoint == Endpoint::Llama => either(vec![map(any()), list(list(any()))]),
        "logprobs" if endpoint == Endpoint::Llama => count(),
        "stop" => either(vec![text(), list(text())]),
        "logprobs" if endpoint == Endpoint::Completions => either(vec![boolean(), integer(-1)]),
        "tools" => list(map(any())),
        "tool_choice" if endpoint == Endpoint::Messages => map(any()),
        "tool_choice" => either(vec![word(&["none", "auto", "required"]), map(any())]),
        _ => return sampling(name).or_else(|| output(name)).or_else(|| other(name)),
    })
}

fn sampling(name: &str) -> Option<Node> {
    Some(match name {
        "temperature" => number(0.0, 2.0),
        "top_p" | "min_p" => number(0.0, 1.0),
        "top_k" => integer(-1),
        "presence_penalty" | "frequency_penalty" => number(-2.0, 2.0),
        "repetition_penalty" | "repeat_penalty" => number(0.0, 2.0),
        "logit_bias" => map(any_number()),
        "stop_token_ids" | "allowed_token_ids" | "logprob_token_ids" => list(count()),
        "stop_sequences" => list(text()),
        "seed" => integer(i64::MIN),
        "n" | "n_cmpl" => integer_in(1, 128),
        "n_probs" => count(),
        "repeat_last_n" => integer(-1),
        "samplers" => either(vec![text(), list(text())]),
        "max_tokens" | "max_completion_tokens" | "max_output_tokens" | "min_tokens" => count(),
        "thinking_token_budget" | "truncate_prompt_tokens" | "n_predict" => integer(-1),
        "truncation_side" => word(&["left", "right"]),
        _ => return None,
    })
}

fn output(name: &str) -> Option<Node> {
    Some(match name {
        "stream"
        | "return_progress"
        | "timings_per_token"
        | "logprobs"
        | "echo"
        | "include_stop_str_in_output"
        | "ignore_eos"
        | "return_token_ids"
        | "return_tokens"
        | "cache_prompt"
        | "return_tokens_as_token_ids"
        | "skip_special_tokens"
        | "add_special_tokens"
        | "add_generation_prompt"
        | "continue_final_message"
        | "parallel_tool_calls"
        | "include_reasoning"
        | "store"
        | "background" => boolean(),
        "stream_options" => object(
            Vec::new(),
            vec![("include_usage", or_null(boolean())), ("continuous_usage_stats", or_null(boolean()))],
        ),
        // -1: the whole vocabulary, where the operator allows that many.
        "top_logprobs" | "prompt_logprobs" => integer(-1),
        "response_fields" => list(text()),
        "include" => list(word(&["message.output_text.logprobs", "reasoning.encrypted_content"])),
        "json_schema" | "response_format" | "structured_outputs" | "output_config" | "output_format"
        | "text" => map(any()),
        _ => return None,
    })
}

fn other(name: &str) -> Option<Node> {
    Some(match name {
        "grammar" | "ebnf" | "regex" => text(),
        "model" | "cache_salt" | "request_id" | "previous_response_id" | "instructions" => text(),
        "priority" => integer_in(i64::from(i32::MIN), i64::from(i32::MAX)),
        "chat_template_kwargs" | "thinking" | "reasoning" => map(any()),
        "media_io_kwargs" => map(map(any())),
        "metadata" => map(text()),
        "reasoning_effort" => word(&["none", "minimal", "low", "medium", "high", "xhigh", "max"]),
        _ => return None,
    })
}

fn prompt() -> Node {
    either(vec![text(), list(text()), list(count()), list(list(count()))])
}

/// Texts, ids, both in one list, a text with pictures; a list without numbers is several prompts.
fn llama_prompt() -> Node {
    let with_media = object(vec![("prompt_string", text())], vec![("multimodal_data", list(text()))]);
    let mixed = list(either(vec![count(), text()]));
    let one = || either(vec![text(), mixed.clone(), with_media.clone()]);
    either(vec![one(), list(one())])
}

fn message(endpoint: Endpoint) -> Node {
    let content = either(vec![text(), list(map(any()))]);
    match endpoint {
        Endpoint::Messages => {
            object(vec![("role", word(&["user", "assistant"])), ("content", content)], Vec::new())
        }
        _ => object(
            vec![("role", word(&["system", "developer", "user", "assistant", "tool"]))],
            vec![("content", or_null(content)), ("tool_calls", or_null(list(map(any()))))],
        ),
    }
}

/// The body of `/tokenize`: a prompt (llama-server's `content`), or the fields of a chat that make one.
pub(super) fn tokenize() -> Node {
    let fields = [
        "model",
        "messages",
        "add_special_tokens",
        "tools",
        "chat_template_kwargs",
        "add_generation_prompt",
        "continue_final_message",
        "truncate_prompt_tokens",
        "truncation_side",
    ];
    let mut maybe: Vec<_> =
        fields.into_iter().filter_map(|name| Some((name, or_null(field(Endpoint::Chat, name)?)))).collect();
    maybe.push(("prompt", or_null(text())));
    maybe.push(("content", or_null(text())));
    for name in ["return_token_strs", "with_pieces", "add_special", "parse_special"] {
        maybe.push((name, or_null(boolean())));
    }
    object(Vec::new(), maybe)
}

/// The body of `/detokenize`.
pub(super) fn detokenize() -> Node {
    object(vec![("tokens", list(count()))], vec![("model", or_null(text()))])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_has_a_schema() {
        for endpoint in Endpoint::ALL {
            for (name, _) in fields::all(endpoint).filter(|(_, support)| *support == Support::Works) {
                assert!(field(endpoint, name).is_some(), "{endpoint:?}: {name}");
            }
        }
    }
}
