//! Everything that can go wrong with a request, with its HTTP status and its OpenAI error body. No HTTP types.

use std::borrow::Cow;

use serde_json::{Value, json};
use spark_api::{RequestError, SubmitError};

/// Why a request was not answered. The text is meant for the client: it names the rule, the value and what to do.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ApiError {
    /// A field breaks a rule (400).
    #[error("{message}")]
    Invalid {
        /// The field, by its API name; `None` when the body as a whole is at fault.
        param: Option<Cow<'static, str>>,
        /// Rule and value.
        message: String,
    },
    /// The body names a model that is not served here (404).
    #[error("the model {model:?} does not exist here; served: {}", served.join(", "))]
    ModelNotFound {
        /// What was asked for.
        model: String,
        /// What there is.
        served: Vec<String>,
    },
    /// No API key, or a wrong one (401).
    #[error("a valid API key is needed: send the header `Authorization: Bearer <key>`")]
    Unauthorized,
    /// No stored response has this id (404).
    #[error("there is no response {id:?}: it was never stored, or is forgotten")]
    ResponseNotFound {
        /// What was asked for.
        id: String,
    },
    /// No such route (404).
    #[error("there is no route {path:?}")]
    RouteNotFound {
        /// Path of the request.
        path: String,
    },
    /// The route exists for another method (405).
    #[error("{method} is not allowed on {path:?}")]
    MethodNotAllowed {
        /// Method of the request.
        method: String,
        /// Path of the request.
        path: String,
    },
    /// The body is larger than the limit (413).
    #[error("the body is over the limit of {limit} bytes")]
    BodyTooLarge {
        /// Largest body accepted, in bytes.
        limit: usize,
    },
    /// The body stopped coming, or came byte by byte (408).
    #[error("the body came too slowly: send it in one go")]
    BodyTooSlow,
    /// All bodies that are being read hold too much memory (503).
    #[error(
        "requests that are being read hold {limit} bytes, which is the limit of all together; try again in a moment"
    )]
    IntakeFull {
        /// Most bytes, over all requests.
        limit: usize,
    },
    /// A medium cannot be had (422): its address is allowed, but leads to nothing that could be used.
    #[error("{message}")]
    Unprocessable {
        /// The field.
        param: &'static str,
        /// Why, without addresses and without what a server said.
        message: String,
    },
    /// Media that were fetched and are not decoded yet hold too much memory (503).
    #[error(
        "media that are being fetched hold {limit} bytes, which is the limit of all together; try again in a moment"
    )]
    MediaFull {
        /// Most bytes, over all requests.
        limit: usize,
    },
    /// The prompts at work hold too many tokens (503).
    #[error(
        "the prompts at work hold {limit} tokens, which is the limit of all together; try again in a moment"
    )]
    TokensFull {
        /// Most tokens, over all requests.
        limit: usize,
    },
    /// A browser used a public name for a server that is open to this machine only (403).
    #[error(
        "the host {host:?} is not one of this server's; if it is, start it with --allowed-hosts or with an API key"
    )]
    HostNotAllowed {
        /// The name that was used.
        host: String,
    },
    /// The key is right, but not for this route (403).
    #[error("this route needs the admin API key")]
    AdminOnly,
    /// The body is not declared as JSON (415).
    #[error("the content type must be application/json")]
    NotJson,
    /// The engine did not take the request (503).
    #[error(transparent)]
    Submit(#[from] SubmitError),
    /// The engine stopped while it worked on the request (503).
    #[error("the engine is shutting down and has cancelled the request")]
    Cancelled,
    /// The engine failed while it worked on the request (500).
    #[error("the engine has failed: {0}")]
    EngineFailed(String),
    /// A defect of this program (500). The text tells the client nothing about it; the log does.
    #[error("internal error; the server's log has the details")]
    Internal,
}

impl ApiError {
    /// A refusal of one field.
    pub(crate) fn field(param: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Self {
        Self::Invalid { param: Some(param.into()), message: message.into() }
    }

    /// A refusal of the body as a whole.
    pub(crate) fn body(message: impl Into<String>) -> Self {
        Self::Invalid { param: None, message: message.into() }
    }

    /// The refusal with the names that another dialect has for the fields of a chat: pairs of the chat's and its own.
    pub(crate) fn renamed(self, names: &[(&'static str, &'static str)]) -> Self {
        let Self::Invalid { param: Some(param), message } = &self else { return self };
        match names.iter().find(|(name, _)| name == param) {
            None => self,
            Some((name, own)) => {
                // Most messages begin with the name of their field.
                let message = match message.strip_prefix(name) {
                    Some(rest) => format!("{own}{rest}"),
                    None => format!("{own}: {message}"),
                };
                Self::field(*own, message)
            }
        }
    }

    /// Logs what happened and hides it from the client.
    pub(crate) fn internal(detail: &dyn std::fmt::Display) -> Self {
        tracing::error!("internal error: {detail}");
        Self::Internal
    }

    /// HTTP status code.
    pub fn status(&self) -> u16 {
        match self {
            Self::Invalid { .. } => 400,
            Self::Unauthorized => 401,
            Self::HostNotAllowed { .. } | Self::AdminOnly => 403,
            Self::ModelNotFound { .. } | Self::ResponseNotFound { .. } | Self::RouteNotFound { .. } => 404,
            Self::MethodNotAllowed { .. } => 405,
            Self::BodyTooSlow => 408,
            Self::BodyTooLarge { .. } => 413,
            Self::NotJson => 415,
            Self::Unprocessable { .. } => 422,
            Self::Submit(_)
            | Self::Cancelled
            | Self::IntakeFull { .. }
            | Self::MediaFull { .. }
            | Self::TokensFull { .. } => 503,
            Self::EngineFailed(_) | Self::Internal => 500,
        }
    }

    /// Seconds after which another try makes sense, if one does.
    pub fn retry_after(&self) -> Option<u32> {
        let is_full = match self {
            Self::Submit(error) => matches!(error, SubmitError::QueueFull { .. }),
            Self::IntakeFull { .. } | Self::MediaFull { .. } | Self::TokensFull { .. } => true,
            _ => false,
        };
        is_full.then_some(1)
    }

    /// The OpenAI error body. Types and the numeric `code` are vLLM's.
    pub fn to_json(&self) -> Value {
        let kind = match self.status() {
            400 => "BadRequestError",
            401 => "AuthenticationError",
            403 => "PermissionDeniedError",
            404 => "NotFoundError",
            408 => "RequestTimeoutError",
            405 => "MethodNotAllowedError",
            413 => "RequestTooLargeError",
            415 => "UnsupportedMediaTypeError",
            422 => "UnprocessableEntityError",
            503 => "ServiceUnavailableError",
            _ => "InternalServerError",
        };
        let param = match self {
            Self::Invalid { param, .. } => param.as_deref(),
            Self::Unprocessable { param, .. } => Some(*param),
            Self::ModelNotFound { .. } => Some("model"),
            _ => None,
        };
        json!({"error": {"message": self.to_string(), "type": kind, "param": param, "code": self.status()}})
    }
}

impl From<RequestError> for ApiError {
    fn from(error: RequestError) -> Self {
        Self::field(error.param, error.message)
    }
}
