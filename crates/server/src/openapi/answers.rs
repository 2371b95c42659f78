//! Schemas of the answers, by the names that they have in the document.

use super::schema::{
    Node, any, any_number, boolean, count, either, integer, list, map, named, null, object, or_null, text,
    word,
};

/// All of them.
pub(super) fn all() -> Vec<(&'static str, Node)> {
    let mut all = openai();
    all.extend(anthropic());
    all.extend(responses());
    all.extend(llama());
    all.extend(others());
    all
}

fn usage() -> Node {
    let details = |name| or_null(object(vec![(name, count())], Vec::new()));
    object(
        vec![("prompt_tokens", count()), ("completion_tokens", count()), ("total_tokens", count())],
        vec![
            ("prompt_tokens_details", details("cached_tokens")),
            ("completion_tokens_details", details("reasoning_tokens")),
        ],
    )
}

fn head(object: &'static str, choice: Node) -> Vec<(&'static str, Node)> {
    vec![
        ("id", text()),
        ("object", word(&[object])),
        ("created", count()),
        ("model", text()),
        ("system_fingerprint", text()),
        ("choices", list(choice)),
    ]
}

fn finish() -> Node {
    or_null(word(&["stop", "length", "tool_calls"]))
}

fn stop_reason() -> (&'static str, Node) {
    ("stop_reason", either(vec![text(), count(), null()]))
}

fn openai() -> Vec<(&'static str, Node)> {
    let call = object(
        vec![
            ("id", text()),
            ("type", word(&["function"])),
            ("function", object(vec![("name", text()), ("arguments", text())], Vec::new())),
        ],
        Vec::new(),
    );
    let message = object(
        vec![("role", word(&["assistant"])), ("content", or_null(text()))],
        vec![("reasoning", text()), ("reasoning_content", text()), ("tool_calls", list(call))],
    );
    let logprobs = or_null(object(vec![("content", list(map(any())))], Vec::new()));
    let chat_choice = object(
        vec![
            ("index", count()),
            ("message", message),
            ("logprobs", logprobs.clone()),
            ("finish_reason", finish()),
        ],
        vec![stop_reason(), ("token_ids", or_null(list(count())))],
    );
    let chunk_choice = object(
        vec![("index", count()), ("delta", map(any())), ("logprobs", logprobs), ("finish_reason", finish())],
        vec![stop_reason(), ("token_ids", list(count()))],
    );
    let lists = ["tokens", "token_logprobs", "top_logprobs", "text_offset"];
    let lists = lists.into_iter().map(|name| (name, list(any()))).collect();
    let text_choice = object(
        vec![
            ("index", count()),
            ("text", text()),
            ("logprobs", or_null(object(lists, Vec::new()))),
            ("finish_reason", finish()),
        ],
        vec![
            stop_reason(),
            ("token_ids", or_null(list(count()))),
            ("prompt_token_ids", or_null(list(count()))),
            ("prompt_logprobs", or_null(list(any()))),
        ],
    );
    let with_usage = |mut head: Vec<(&'static str, Node)>| {
        head.push(("usage", named("Usage")));
        head
    };
    let timings = || [("timings", map(any_number())), ("metrics", map(any_number()))];
    let mut of_chat =
        vec![("prompt_token_ids", or_null(list(count()))), ("prompt_logprobs", or_null(list(any())))];
    of_chat.extend(timings());
    let mut of_chunk =
        vec![("usage", named("Usage")), ("prompt_token_ids", list(count())), ("prompt_progress", progress())];
    of_chunk.extend(timings());
    vec![
        ("Usage", usage()),
        ("ChatCompletion", object(with_usage(head("chat.completion", chat_choice)), of_chat)),
        ("ChatCompletionChunk", object(head("chat.completion.chunk", chunk_choice), of_chunk)),
        ("Completion", object(with_usage(head("text_completion", text_choice)), timings().to_vec())),
        ("Error", error()),
    ]
}

fn progress() -> Node {
    let counts = ["total", "cache", "processed", "time_ms"].into_iter().map(|name| (name, count()));
    object(counts.collect(), Vec::new())
}

/// Nothing is always there: `response_fields` says what is.
fn llama() -> Vec<(&'static str, Node)> {
    let chunk = || {
        vec![
            ("index", count()),
            ("content", text()),
            ("tokens", list(count())),
            ("id_slot", integer(-1)),
            ("stop", boolean()),
            ("tokens_predicted", count()),
            ("tokens_evaluated", count()),
        ]
    };
    let extra = || [("timings", map(any_number())), ("completion_probabilities", list(map(any())))];
    let mut last = chunk();
    last.extend([
        ("model", text()),
        ("generation_settings", map(any())),
        ("prompt", text()),
        ("has_new_line", boolean()),
        ("truncated", boolean()),
        ("stop_type", word(&["eos", "limit", "word"])),
        ("stopping_word", text()),
        ("tokens_cached", count()),
    ]);
    last.extend(extra());
    let last = object(Vec::new(), last);
    let mut of_chunk = extra().to_vec();
    of_chunk.push(("prompt_progress", progress()));
    vec![
        ("LlamaCompletion", either(vec![last.clone(), list(last)])),
        ("LlamaChunk", object(chunk(), of_chunk)),
    ]
}

fn error() -> Node {
    let inner = vec![("message", text()), ("type", text()), ("param", or_null(text())), ("code", count())];
    object(vec![("error", object(inner, Vec::new()))], Vec::new())
}

fn anthropic() -> Vec<(&'static str, Node)> {
    let block = |kind: &'static str, mut fields: Vec<(&'static str, Node)>| {
        fields.insert(0, ("type", word(&[kind])));
        object(fields, Vec::new())
    };
    let blocks = either(vec![
        block("text", vec![("text", text())]),
        block("thinking", vec![("thinking", text()), ("signature", text())]),
        block("tool_use", vec![("id", text()), ("name", text()), ("input", map(any()))]),
    ]);
    let counts = ["input_tokens", "output_tokens", "cache_creation_input_tokens", "cache_read_input_tokens"];
    let usage = object(counts.into_iter().map(|name| (name, count())).collect(), Vec::new());
    let reasons = word(&["end_turn", "max_tokens", "stop_sequence", "tool_use"]);
    let message = object(
        vec![
            ("id", text()),
            ("type", word(&["message"])),
            ("role", word(&["assistant"])),
            ("model", text()),
            ("content", list(blocks)),
            ("stop_reason", or_null(reasons)),
            ("stop_sequence", or_null(text())),
            ("usage", usage),
        ],
        Vec::new(),
    );
    let error = object(
        vec![
            ("type", word(&["error"])),
            ("error", object(vec![("type", text()), ("message", text())], Vec::new())),
            ("request_id", or_null(text())),
        ],
        Vec::new(),
    );
    vec![
        ("Message", message),
        ("MessageEvent", object(vec![("type", text())], Vec::new())),
        ("MessageTokens", object(vec![("input_tokens", count())], Vec::new())),
        ("MessageError", error),
    ]
}

fn responses() -> Vec<(&'static str, Node)> {
    let part = object(vec![("type", word(&["output_text", "reasoning_text"])), ("text", text())], Vec::new());
    let item = |kind: &'static str, mut fields: Vec<(&'static str, Node)>| {
        fields.extend([("id", text()), ("type", word(&[kind])), ("status", text())]);
        object(fields, Vec::new())
    };
    let items = either(vec![
        item("message", vec![("role", word(&["assistant"])), ("content", list(part.clone()))]),
        item("reasoning", vec![("summary", list(any())), ("content", list(part))]),
        item("function_call", vec![("call_id", text()), ("name", text()), ("arguments", text())]),
    ]);
    let usage = object(
        vec![
            ("input_tokens", count()),
            ("input_tokens_details", object(vec![("cached_tokens", count())], Vec::new())),
            ("output_tokens", count()),
            ("output_tokens_details", object(vec![("reasoning_tokens", count())], Vec::new())),
            ("total_tokens", count()),
        ],
        Vec::new(),
    );
    let error = object(vec![("code", text()), ("message", text())], Vec::new());
    let response = object(
        vec![
            ("id", text()),
            ("object", word(&["response"])),
            ("created_at", count()),
            ("status", word(&["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"])),
            ("background", boolean()),
            ("completed_at", or_null(count())),
            ("error", or_null(error)),
            ("incomplete_details", or_null(object(vec![("reason", text())], Vec::new()))),
            ("model", text()),
            ("output", list(items)),
            ("usage", or_null(usage)),
            ("parallel_tool_calls", boolean()),
            ("previous_response_id", or_null(text())),
            ("tools", list(map(any()))),
            ("tool_choice", either(vec![text(), map(any())])),
            ("temperature", any_number()),
            ("top_p", any_number()),
        ],
        Vec::new(),
    );
    let deleted = vec![("id", text()), ("object", word(&["response"])), ("deleted", boolean())];
    let page = vec![
        ("object", word(&["list"])),
        ("data", list(map(any()))),
        ("first_id", or_null(text())),
        ("last_id", or_null(text())),
        ("has_more", boolean()),
    ];
    let tokens = vec![("object", word(&["response.input_tokens"])), ("input_tokens", count())];
    vec![
        ("Response", response),
        ("ResponseEvent", object(vec![("type", text()), ("sequence_number", count())], Vec::new())),
        ("ResponseItems", object(page, Vec::new())),
        ("ResponseDeleted", object(deleted, Vec::new())),
        ("ResponseTokens", object(tokens, Vec::new())),
    ]
}

fn props() -> Node {
    let modality = ["vision", "video", "audio"].into_iter().map(|name| (name, boolean())).collect();
    let settings = vec![("n_ctx", count()), ("params", map(any_number()))];
    object(
        vec![
            ("default_generation_settings", object(settings, Vec::new())),
            ("model_alias", text()),
            ("model_path", text()),
            ("modalities", object(modality, Vec::new())),
            ("media_marker", text()),
            ("build_info", text()),
        ],
        vec![("bos_token", or_null(text())), ("eos_token", or_null(text())), ("chat_template", text())],
    )
}

fn others() -> Vec<(&'static str, Node)> {
    let model = vec![
        ("id", text()),
        ("object", word(&["model"])),
        ("created", count()),
        ("owned_by", text()),
        ("root", text()),
        ("parent", null()),
        ("max_model_len", count()),
    ];
    let tokens = vec![
        ("count", count()),
        ("max_model_len", count()),
        (
            "tokens",
            either(vec![list(count()), list(object(vec![("id", count()), ("piece", any())], Vec::new()))]),
        ),
        ("token_strs", or_null(list(text()))),
    ];
    vec![
        ("Model", object(model, Vec::new())),
        ("Models", object(vec![("object", word(&["list"])), ("data", list(named("Model")))], Vec::new())),
        ("Tokens", object(tokens, Vec::new())),
        ("Text", object(vec![("prompt", text())], vec![("content", text())])),
        ("ChatTokens", object(vec![("input_tokens", count())], Vec::new())),
        ("TokenizerInfo", object(vec![("tokenizer_class", text())], vec![("chat_template", text())])),
        ("Props", props()),
        ("Version", object(vec![("version", text())], Vec::new())),
        ("ServerInfo", object(vec![("version", text()), ("max_model_len", count())], Vec::new())),
        ("Load", object(vec![("server_load", count())], Vec::new())),
        ("Unhealthy", object(vec![("status", text()), ("reason", text())], Vec::new())),
    ]
}
