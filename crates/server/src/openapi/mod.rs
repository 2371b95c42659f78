//! The OpenAPI document of the server, made from the table of fields and from what is said here about routes and answers.
//! Serves nothing itself.

mod answers;
mod requests;
mod schema;

use utoipa::openapi::path::{HttpMethod, Operation, OperationBuilder, ParameterBuilder, ParameterIn};
use utoipa::openapi::request_body::RequestBodyBuilder;
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{
    ComponentsBuilder, ContentBuilder, Info, OpenApi, OpenApiBuilder, PathItem, Paths, Required, Response,
    ResponseBuilder,
};

use self::schema::{Node, named, text};
use crate::fields::Endpoint;

const JSON: &str = "application/json";
const EVENTS: &str = "text/event-stream";
const TEXT: &str = "text/plain";
/// Name of the scheme by which keys are sent.
const KEY: &str = "api_key";

/// A route of the document.
struct Route {
    method: HttpMethod,
    path: &'static str,
    summary: &'static str,
    /// Component of the body.
    body: Option<&'static str>,
    answer: Answer,
}

/// What a 200 carries.
enum Answer {
    /// A component.
    Json(&'static str),
    /// A component, or with `stream` events of another.
    Streamed(&'static str, &'static str),
    /// Text.
    Text(&'static str),
    /// Nothing, and a 503 with the reason otherwise.
    Health,
}

const fn get(path: &'static str, summary: &'static str, answer: Answer) -> Route {
    Route { method: HttpMethod::Get, path, summary, body: None, answer }
}

const fn post(path: &'static str, summary: &'static str, body: &'static str, answer: Answer) -> Route {
    Route { method: HttpMethod::Post, path, summary, body: Some(body), answer }
}

const ROUTES: &[Route] = &[
    post(
        "/v1/chat/completions",
        "Answer a conversation (OpenAI).",
        "ChatRequest",
        Answer::Streamed("ChatCompletion", "ChatCompletionChunk"),
    ),
    post(
        "/v1/chat/completions/batch",
        "Answer several conversations, one choice each (vLLM).",
        "ChatBatchRequest",
        Answer::Json("ChatCompletion"),
    ),
    post(
        "/v1/completions",
        "Go on with a text (OpenAI).",
        "CompletionRequest",
        Answer::Streamed("Completion", "Completion"),
    ),
    post(
        "/completion",
        "Go on with a text (llama-server, which has it at `/completions` too).",
        "LlamaRequest",
        Answer::Streamed("LlamaCompletion", "LlamaChunk"),
    ),
    post(
        "/v1/responses",
        "Answer a conversation that can be stored (OpenAI).",
        "ResponseRequest",
        Answer::Streamed("Response", "ResponseEvent"),
    ),
    post(
        "/v1/responses/input_tokens",
        "Count the tokens of a response's prompt.",
        "ResponseRequest",
        Answer::Json("ResponseTokens"),
    ),
    get(
        "/v1/responses/{id}",
        "A stored response; with `stream`, the events of one that was streamed in the background.",
        Answer::Streamed("Response", "ResponseEvent"),
    ),
    get(
        "/v1/responses/{id}/input_items",
        "The items that a stored response was asked with, a page of them.",
        Answer::Json("ResponseItems"),
    ),
    Route {
        method: HttpMethod::Delete,
        path: "/v1/responses/{id}",
        summary: "Forget a stored response.",
        body: None,
        answer: Answer::Json("ResponseDeleted"),
    },
    Route {
        method: HttpMethod::Post,
        path: "/v1/responses/{id}/cancel",
        summary: "Cancel a response in the background.",
        body: None,
        answer: Answer::Json("Response"),
    },
    post(
        "/v1/messages",
        "Answer a conversation (Anthropic).",
        "MessageRequest",
        Answer::Streamed("Message", "MessageEvent"),
    ),
    post(
        "/v1/messages/count_tokens",
        "Count the tokens of a message's prompt (Anthropic).",
        "MessageRequest",
        Answer::Json("MessageTokens"),
    ),
    post(
        "/v1/chat/completions/input_tokens",
        "Count the tokens of a chat's prompt (llama-server).",
        "ChatRequest",
        Answer::Json("ChatTokens"),
    ),
    get("/v1/models", "The models that are served.", Answer::Json("Models")),
    get("/v1/models/{name}", "One of them.", Answer::Json("Model")),
    post("/tokenize", "Tokens of a prompt or of a conversation.", "TokenizeRequest", Answer::Json("Tokens")),
    post("/apply-template", "The prompt of a conversation as text.", "ChatRequest", Answer::Json("Text")),
    get(
        "/tokenizer_info",
        "The tokenizer's settings, where the operator shows them.",
        Answer::Json("TokenizerInfo"),
    ),
    post("/detokenize", "The text of tokens.", "DetokenizeRequest", Answer::Json("Text")),
    get("/health", "Whether the engine can serve.", Answer::Health),
    get("/ready", "As /health.", Answer::Health),
    get("/ping", "As /health.", Answer::Health),
    get("/live", "Whether the process answers.", Answer::Health),
    get("/load", "How many requests are at work.", Answer::Json("Load")),
    get("/server_info", "What is served, and with which settings; no secrets.", Answer::Json("ServerInfo")),
    get("/props", "What is served, in llama-server's words.", Answer::Json("Props")),
    get("/version", "The server's version.", Answer::Json("Version")),
    get("/metrics", "Metrics in the Prometheus text format.", Answer::Text(TEXT)),
    get("/openapi.json", "This document.", Answer::Json("Document")),
    get("/docs", "This document as a page.", Answer::Text("text/html")),
];

/// The document.
pub fn openapi() -> OpenApi {
    let mut paths = Paths::new();
    for route in ROUTES {
        let item = PathItem::new(route.method.clone(), operation(route));
        match paths.paths.get_mut(route.path) {
            Some(known) => known.merge_operations(item),
            None => drop(paths.paths.insert(route.path.to_owned(), item)),
        }
    }
    let mut components = ComponentsBuilder::new()
        .security_scheme(KEY, SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer)));
    for (name, node) in bodies().into_iter().chain(answers::all()) {
        components = components.schema(name, node);
    }
    let mut info = Info::new("spark-engine", env!("CARGO_PKG_VERSION"));
    info.description = Some(
        "OpenAI's chat completions, completions and responses, Anthropic's messages, and what vLLM adds to them; \
         llama-server's completions. An accepted field works, or the request gets a 400 that names it."
            .into(),
    );
    OpenApiBuilder::new().info(info).paths(paths).components(Some(components.build())).build()
}

fn bodies() -> Vec<(&'static str, Node)> {
    vec![
        ("ChatRequest", requests::body(Endpoint::Chat, &["messages"])),
        ("ChatBatchRequest", requests::body(Endpoint::Batch, &["messages"])),
        ("CompletionRequest", requests::body(Endpoint::Completions, &["prompt"])),
        ("LlamaRequest", requests::body(Endpoint::Llama, &["prompt"])),
        ("ResponseRequest", requests::body(Endpoint::Responses, &["input"])),
        ("MessageRequest", requests::body(Endpoint::Messages, &["messages", "max_tokens"])),
        ("TokenizeRequest", requests::tokenize()),
        ("DetokenizeRequest", requests::detokenize()),
        ("Document", schema::map(schema::any())),
    ]
}

fn operation(route: &Route) -> Operation {
    let mut operation = OperationBuilder::new()
        .summary(Some(route.summary))
        .operation_id(Some(operation_id(route)))
        .response("200", success(&route.answer));
    if let Some(body) = route.body {
        let content = ContentBuilder::new().schema(Some(named(body))).build();
        let body = RequestBodyBuilder::new().content(JSON, content).required(Some(Required::True)).build();
        operation = operation.request_body(Some(body));
    }
    let parameters = route.path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'));
    for name in parameters {
        let parameter = ParameterBuilder::new().name(name).parameter_in(ParameterIn::Path);
        operation = operation.parameter(parameter.required(Required::True).schema(Some(text())));
    }
    for (name, schema) in query_parameters(route) {
        let parameter = ParameterBuilder::new().name(name).parameter_in(ParameterIn::Query);
        operation = operation.parameter(parameter.required(Required::False).schema(Some(schema)));
    }
    if let Answer::Health = route.answer {
        return operation.response("503", json("The engine cannot serve.", "Unhealthy")).build();
    }
    operation = operation.security(SecurityRequirement::new(KEY, [] as [&str; 0]));
    let error = if route.path.starts_with("/v1/messages") { "MessageError" } else { "Error" };
    let mut errors = vec![("401", "No valid key, where keys are needed."), ("500", "The engine has failed.")];
    if route.body.is_some() {
        errors.extend([
            ("400", "A field breaks a rule; the error names it."),
            ("404", "No such model."),
            ("413", "The body is too large."),
            ("415", "The body is not declared as JSON."),
            ("422", "A medium cannot be fetched or read."),
            ("503", "The engine is full, stopping or has failed; with Retry-After if it makes sense to come back."),
        ]);
    } else if route.path == "/tokenizer_info" {
        errors.push(("404", "The operator does not show it."));
    } else if route.path.contains('{') {
        errors.extend([("400", "The request makes no sense."), ("404", "There is nothing of that name.")]);
    }
    errors.sort_unstable();
    errors.into_iter().fold(operation, |op, (status, rule)| op.response(status, json(rule, error))).build()
}

/// What may stand after the `?` of a route.
fn query_parameters(route: &Route) -> Vec<(&'static str, Node)> {
    match (&route.method, route.path) {
        (HttpMethod::Get, "/v1/responses/{id}") => {
            vec![("stream", schema::boolean()), ("starting_after", schema::count())]
        }
        (HttpMethod::Get, "/v1/responses/{id}/input_items") => {
            vec![("limit", schema::count()), ("order", schema::word(&["asc", "desc"])), ("after", text())]
        }
        _ => Vec::new(),
    }
}

fn operation_id(route: &Route) -> String {
    let method = match route.method {
        HttpMethod::Get => "get",
        HttpMethod::Delete => "delete",
        _ => "post",
    };
    let words = route.path.split(['/', '{', '}', '.']).filter(|word| !word.is_empty());
    std::iter::once(method).chain(words).collect::<Vec<_>>().join("_")
}

fn json(description: &str, component: &str) -> Response {
    let content = ContentBuilder::new().schema(Some(named(component))).build();
    ResponseBuilder::new().description(description).content(JSON, content).build()
}

fn success(answer: &Answer) -> Response {
    match answer {
        Answer::Json(component) => json("The answer.", component),
        Answer::Streamed(component, event) => {
            let mut response = json(&format!("The answer, or with `stream` events of {event}."), component);
            // One event, as those read it who look at streams by their document; its data is the JSON of `event`.
            let one = schema::object(vec![("data", text())], vec![("event", text())]);
            let events = ContentBuilder::new().schema(Some(one)).build();
            response.content.insert(EVENTS.to_owned(), events.into());
            response
        }
        Answer::Text(media_type) => {
            let content = ContentBuilder::new().schema(Some(text())).build();
            ResponseBuilder::new().description("The answer.").content(*media_type, content).build()
        }
        Answer::Health => ResponseBuilder::new().description("Yes.").build(),
    }
}
