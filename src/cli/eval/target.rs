//! Who answers: an engine in this process, or an OpenAI endpoint over HTTP. Both get the same bodies. Judges nothing.

use std::time::Duration;

use anyhow::Context;
use serde_json::Value;
use spark_engine::SparkEngine;
use ureq::{
    Agent, Body, Proxy,
    http::{Response, Uri},
};

use crate::cli::trust;

const CHAT: &str = "/v1/chat/completions";
/// Most time for an answer, or for any part of it to arrive.
const SILENCE: Duration = Duration::from_secs(600);

/// Answers chats.
#[derive(Clone)]
pub(crate) enum Target {
    /// In this process, through the same front end as `serve`.
    Engine(SparkEngine),
    /// Somewhere else.
    Endpoint(Endpoint),
}

/// An OpenAI-compatible server.
#[derive(Clone)]
pub(crate) struct Endpoint {
    agent: Agent,
    /// Without a slash and `/v1` at its end.
    base: String,
    api_key: Option<String>,
    model: String,
}

impl Target {
    /// The name of the model, for reports.
    pub(crate) fn model(&self) -> String {
        match self {
            Self::Engine(engine) => first_model(&engine.front_end().models()).unwrap_or_default(),
            Self::Endpoint(endpoint) => endpoint.model.clone(),
        }
    }

    /// The name that bodies must carry.
    pub(crate) fn model_field(&self) -> Option<&str> {
        match self {
            Self::Engine(_) => None,
            Self::Endpoint(endpoint) => Some(&endpoint.model),
        }
    }

    /// The whole answer to a chat.
    ///
    /// # Errors
    /// One line: the status and what the server says, or why there is no answer.
    pub(crate) async fn ask(&self, body: Value) -> Result<Value, String> {
        match self {
            Self::Engine(engine) => match engine.front_end().handle(CHAT, body).await {
                (200, answer) => Ok(answer),
                (status, answer) => Err(refusal(status, &answer)),
            },
            Self::Endpoint(endpoint) => {
                let endpoint = endpoint.clone();
                let answer = tokio::task::spawn_blocking(move || endpoint.post(&body)).await;
                answer.unwrap_or_else(|error| Err(format!("the request has broken off: {error}")))
            }
        }
    }
}

impl Endpoint {
    /// Connects to `url`, with or without `/v1` at its end, and asks for its models unless `model` is named.
    ///
    /// # Errors
    /// When `url` is no address, or the server does not list its models.
    pub(crate) fn connect(url: &str, api_key: Option<String>, model: Option<String>) -> anyhow::Result<Self> {
        let base = url.trim().trim_end_matches('/');
        let base = base.strip_suffix("/v1").unwrap_or(base).to_owned();
        let address: Uri = base.parse().with_context(|| format!("--url {url}: not an address"))?;
        anyhow::ensure!(
            matches!(address.scheme_str(), Some("http" | "https")) && address.query().is_none(),
            "--url {url}: expected an address such as http://localhost:8000"
        );
        let is_local = matches!(address.host(), Some("localhost" | "127.0.0.1" | "[::1]"));
        let config = Agent::config_builder()
            .tls_config(trust::for_requests_to(&base)?)
            .user_agent(concat!("spark-engine/", env!("CARGO_PKG_VERSION")))
            .http_status_as_error(false)
            .timeout_connect(Some(Duration::from_secs(30)))
            .timeout_recv_response(Some(SILENCE))
            .timeout_recv_body(Some(SILENCE))
            // What runs on this machine is behind no proxy.
            .proxy(if is_local { None } else { Proxy::try_from_env() })
            .build();
        let mut endpoint = Self { agent: config.new_agent(), base, api_key, model: String::new() };
        endpoint.model = match model {
            Some(model) => model,
            None => endpoint.first_model().with_context(|| format!("--url {url}: asking for its models"))?,
        };
        Ok(endpoint)
    }

    fn first_model(&self) -> anyhow::Result<String> {
        let mut request = self.agent.get(format!("{}/v1/models", self.base));
        if let Some(key) = &self.api_key {
            request = request.header("Authorization", format!("Bearer {key}"));
        }
        let models = read(request.call()).map_err(anyhow::Error::msg)?;
        first_model(&models).with_context(|| format!("no model in {models}; name one with --model"))
    }

    fn post(&self, body: &Value) -> Result<Value, String> {
        let mut request = self.agent.post(format!("{}{CHAT}", self.base)).content_type("application/json");
        if let Some(key) = &self.api_key {
            request = request.header("Authorization", format!("Bearer {key}"));
        }
        read(request.send(body.to_string()))
    }
}

/// The body of an answer.
fn read(response: Result<Response<Body>, ureq::Error>) -> Result<Value, String> {
    let mut response = response.map_err(|error| error.to_string())?;
    let status = response.status().as_u16();
    let text = response.body_mut().read_to_string().map_err(|error| format!("HTTP {status}: {error}"))?;
    let body = serde_json::from_str(&text);
    match (status, body) {
        (200, Ok(body)) => Ok(body),
        (200, Err(error)) => Err(format!("HTTP 200 with a body that is not JSON: {error}")),
        (_, body) => Err(refusal(status, &body.unwrap_or(Value::String(text)))),
    }
}

/// `HTTP 400: ...` with the server's message, or the beginning of what it sent instead.
fn refusal(status: u16, body: &Value) -> String {
    let text = match body["error"]["message"].as_str().or(body.as_str()) {
        Some(message) => message.to_owned(),
        None => body.to_string(),
    };
    let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(300).collect();
    format!("HTTP {status}: {text}")
}

fn first_model(models: &Value) -> Option<String> {
    models["data"][0]["id"].as_str().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn refusals_are_one_line() {
        let body = json!({"error": {"message": "no\ntools"}});
        assert_eq!(refusal(400, &body), "HTTP 400: no tools");
        assert_eq!(refusal(502, &Value::String("<html>".into())), "HTTP 502: <html>");
        assert_eq!(refusal(500, &json!({"detail": 1})), r#"HTTP 500: {"detail":1}"#);
    }

    #[test]
    fn addresses_may_end_with_v1() {
        let connect = |url| Endpoint::connect(url, None, Some("m".into())).map(|endpoint| endpoint.base);
        for url in
            ["http://localhost:1", "http://localhost:1/", "http://localhost:1/v1", "http://localhost:1/v1/"]
        {
            assert_eq!(connect(url).unwrap(), "http://localhost:1");
        }
        assert_eq!(connect("https://example.com/api/v1").unwrap(), "https://example.com/api");
        for url in ["localhost:8000", "ftp://localhost", "", "http://localhost?x=1"] {
            assert!(connect(url).is_err_and(|error| error.to_string().contains("--url")), "{url}");
        }
    }
}
