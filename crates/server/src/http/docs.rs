//! The OpenAPI document, and the page made of it: plain HTML without scripts, and without a request to anywhere else.

use std::fmt::Write as _;
use std::sync::LazyLock;

use axum::http::header;
use axum::response::{Html, IntoResponse, Response};
use serde_json::Value;

use crate::openapi;

static DOCUMENT: LazyLock<Value> = LazyLock::new(|| match serde_json::to_value(openapi()) {
    Ok(document) => document,
    Err(error) => {
        tracing::error!("the OpenAPI document is no JSON: {error}");
        Value::Null
    }
});

static PAGE: LazyLock<String> = LazyLock::new(|| page(&DOCUMENT));

const STYLE: &str = "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color-scheme:light \
    dark}code{font:0.9em ui-monospace,monospace}summary{cursor:pointer;padding:0.3rem 0}\
    td{padding:0.1rem 1rem 0.1rem 0;vertical-align:top}.m{display:inline-block;width:4.5rem;font-weight:600}";

/// GET /openapi.json
pub(super) async fn document() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], DOCUMENT.to_string()).into_response()
}

/// GET /docs
pub(super) async fn docs() -> Html<&'static str> {
    Html(PAGE.as_str())
}

fn page(document: &Value) -> String {
    let text = |pointer: &str| escaped(document.pointer(pointer).and_then(Value::as_str).unwrap_or_default());
    let mut page = format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><meta name=\"viewport\" \
         content=\"width=device-width\"><title>spark-engine API</title><style>{STYLE}</style><h1>spark-engine {}</h1>\
         <p>{}</p><p>The whole document: <a href=\"openapi.json\">openapi.json</a></p>",
        text("/info/version"),
        text("/info/description"),
    );
    let paths = document["paths"].as_object().into_iter().flatten();
    for (path, item) in paths {
        for (method, operation) in item.as_object().into_iter().flatten() {
            push_operation(&mut page, document, &format!("{}|{path}", method.to_uppercase()), operation);
        }
    }
    page
}

/// `route` is method and path with a bar between them.
fn push_operation(page: &mut String, document: &Value, route: &str, operation: &Value) {
    let (method, path) = route.split_once('|').unwrap_or_default();
    let summary = escaped(operation["summary"].as_str().unwrap_or_default());
    // Writing to a string cannot fail.
    let _ = write!(
        page,
        "<details><summary><span class=\"m\">{method}</span><code>{}</code> {summary}</summary><table>",
        escaped(path)
    );
    let body =
        operation.pointer("/requestBody/content/application~1json/schema/$ref").and_then(Value::as_str);
    if let Some(schema) = body.and_then(|reference| document.pointer(reference.trim_start_matches('#'))) {
        for (name, field) in schema["properties"].as_object().into_iter().flatten() {
            let _ = write!(page, "<tr><td><code>{}</code><td>{}", escaped(name), escaped(&kind(field)));
        }
        let _ = write!(
            page,
            "</table><p>{}</p><table>",
            escaped(schema["description"].as_str().unwrap_or_default())
        );
    }
    for (status, response) in operation["responses"].as_object().into_iter().flatten() {
        let description = escaped(response["description"].as_str().unwrap_or_default());
        let _ = write!(page, "<tr><td>{}<td>{description}", escaped(status));
    }
    page.push_str("</table></details>");
}

/// What a schema allows, in a few words.
fn kind(schema: &Value) -> String {
    if let Some(kinds) = schema["anyOf"].as_array() {
        let kinds: Vec<String> = kinds.iter().filter(|kind| kind["type"] != "null").map(kind_of).collect();
        return kinds.join(" or ");
    }
    kind_of(schema)
}

fn kind_of(schema: &Value) -> String {
    if let Some(words) = schema["enum"].as_array() {
        return words.iter().map(Value::to_string).collect::<Vec<_>>().join(", ");
    }
    if schema.get("anyOf").is_some() {
        return kind(schema);
    }
    let mut text = schema["type"].as_str().unwrap_or("any").to_owned();
    if text == "array" {
        let _ = write!(text, " of {}", kind(&schema["items"]));
    }
    for (key, words) in [("minimum", "at least"), ("maximum", "at most")] {
        if let Some(bound) = schema.get(key) {
            let _ = write!(text, ", {words} {bound}");
        }
    }
    text
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
