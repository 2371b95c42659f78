//! The checkpoint's chat template, rendered byte for byte as transformers renders it.
//!
//! A template is the operator's (it comes with the model); conversations are not. Fuel and an output limit bound the
//! time of a rendering. They do not bound its memory against a hostile template, so none is taken from a request.

mod clock;
mod load;
mod mask;
mod messages;
mod python;

use std::io;
use std::path::Path;

use minijinja::{Environment, Error, ErrorKind, Value as JinjaValue};
use serde_json::{Map, Value, json};

use self::load::TemplateSources;
use self::mask::SpecialGuard;
pub use self::messages::{Conversation, MediaKind, MediaPart, prepare_messages};
use crate::answer::{CALL_OPEN, THINK_CLOSE, THINK_OPEN, XML_FUNCTION};
use crate::{Result, Segment, TextError, Tokenizer, ToolFormat};

/// The argument of a template that switches thinking on and off.
pub const THINKING_SWITCH: &str = "enable_thinking";
/// Instructions of one rendering. A message costs some hundred; this is a few seconds at the very most.
const MAX_INSTRUCTIONS: u64 = 20_000_000;
/// Bytes of one rendering: far more than any model's context.
const MAX_RENDERED_BYTES: usize = 64 << 20;
/// Bytes of a template's source. Published ones have about ten thousand.
const MAX_SOURCE_BYTES: usize = 256 << 10;
/// The parser recurses on nested source; this much stack (reserved, not touched) is enough for `MAX_SOURCE_BYTES`.
const PARSER_STACK_BYTES: usize = 512 << 20;

/// Names that a request must not set: the renderer's own and the arguments of `apply_chat_template` that are no
/// template variables.
const RESERVED: [&str; 21] = [
    "messages",
    "tools",
    "add_generation_prompt",
    "conversation",
    "chat_template",
    "continue_final_message",
    "tokenize",
    "tokenizer_kwargs",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "raise_exception",
    "strftime_now",
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "additional_special_tokens",
];

/// What a rendering is made from.
#[derive(Debug, Clone, Copy)]
pub struct RenderInput<'a> {
    /// The conversation, a list of messages: see [`prepare_messages`].
    pub messages: &'a Value,
    /// The tools of the request.
    pub tools: Option<&'a Value>,
    /// The request's `chat_template_kwargs`.
    pub kwargs: &'a Map<String, Value>,
    /// Whether to end with the opening of an assistant's turn.
    pub add_generation_prompt: bool,
}

/// A compiled chat template. Immutable and shared by all requests.
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// Variables from the tokenizer's configuration, such as `eos_token`.
    special_variables: Vec<(String, String)>,
    guard: SpecialGuard,
    accepts_parts: bool,
    tool_format: Option<ToolFormat>,
    thinks: bool,
    has_thinking_switch: bool,
}

impl ChatTemplate {
    /// Loads the template of a checkpoint folder: `chat_template.jinja` (with `additional_chat_templates/*.jinja`), else
    /// `chat_template.json`, else `chat_template` of `tokenizer_config.json`, which may be a list of named templates.
    ///
    /// # Errors
    /// When there is none, or it is not valid.
    pub fn from_dir(dir: &Path, tokenizer: &Tokenizer) -> Result<Self> {
        let sources = TemplateSources::from_dir(dir)?;
        Self::compile(sources, load::special_variables(dir)?, tokenizer)
    }

    /// Loads the template in `path` for the checkpoint in `dir` (`--chat-template`).
    ///
    /// # Errors
    /// When the file cannot be read or is not a template.
    pub fn from_file(path: &Path, dir: &Path, tokenizer: &Tokenizer) -> Result<Self> {
        Self::compile(TemplateSources::from_file(path)?, load::special_variables(dir)?, tokenizer)
    }

    fn compile(
        sources: TemplateSources,
        special_variables: Vec<(String, String)>,
        tokenizer: &Tokenizer,
    ) -> Result<Self> {
        let guard = SpecialGuard::new(tokenizer.special_tokens(), sources.texts());
        let mentions = |marker: &str| sources.texts().any(|text| text.contains(marker));
        let tool_format = mentions(CALL_OPEN).then(|| match mentions(XML_FUNCTION) {
            true => ToolFormat::Xml,
            false => ToolFormat::Hermes,
        });
        // A template that only cuts old reasoning out of a conversation knows its end alone.
        let thinks = mentions(THINK_OPEN) && mentions(THINK_CLOSE);
        let has_thinking_switch = thinks && mentions(THINKING_SWITCH);
        let environment = compile_on_large_stack(sources)?;
        let mut template = Self {
            environment,
            special_variables,
            guard,
            accepts_parts: true,
            tool_format,
            thinks,
            has_thinking_switch,
        };
        template.accepts_parts = template.probe_parts();
        Ok(template)
    }

    /// The source of the template, of several the one without tools.
    pub fn source(&self) -> Option<String> {
        Some(self.environment.get_template(load::DEFAULT).ok()?.source().to_owned())
    }

    /// Whether a message's content may be a list of parts. Templates of text models take a string only.
    pub fn accepts_parts(&self) -> bool {
        self.accepts_parts
    }

    /// How the model writes tool calls, by what the template shows it; `None` if it shows none.
    pub fn tool_format(&self) -> Option<ToolFormat> {
        self.tool_format
    }

    /// Whether the model may think before it answers, by the markers in the template.
    pub fn thinks(&self) -> bool {
        self.thinks
    }

    /// Whether the template's argument [`THINKING_SWITCH`] decides if the model thinks.
    pub fn has_thinking_switch(&self) -> bool {
        self.has_thinking_switch
    }

    /// Renders a conversation into segments for [`Tokenizer::encode`].
    ///
    /// If nothing in the input looks like a special token this is one trusted segment, tokenised as transformers does.
    /// Otherwise the text around a suspect place, up to the template's next special tokens, is ordinary.
    ///
    /// # Errors
    /// When the template refuses the conversation or an argument has a reserved name: the request is at fault.
    pub fn render(&self, input: RenderInput<'_>) -> Result<Vec<Segment>> {
        if let Some(name) = input.kwargs.keys().find(|name| RESERVED.contains(&name.as_str())) {
            return Err(TextError::ReservedArgument { name: name.clone() });
        }
        let kwargs = json!(input.kwargs);
        let tools = input.tools.unwrap_or(&Value::Null);
        let Some(mask) = self.guard.mask(&[input.messages, tools, &kwargs])? else {
            let text = self.execute(input.messages, tools, &kwargs, input.add_generation_prompt)?;
            return Ok(vec![Segment::Trusted(text)]);
        };
        let [messages, tools, kwargs] = [input.messages, tools, &kwargs].map(|value| mask.apply(value));
        match self.execute(&messages, &tools, &kwargs, input.add_generation_prompt) {
            Ok(text) => Ok(mask.segments(&text)),
            Err(TextError::Template { reason }) => Err(TextError::Template { reason: mask.remove(&reason) }),
            Err(error) => Err(error),
        }
    }

    fn execute(&self, messages: &Value, tools: &Value, kwargs: &Value, generate: bool) -> Result<String> {
        let special =
            self.special_variables.iter().map(|(name, text)| (name.clone(), JinjaValue::from(text)));
        let given = kwargs
            .as_object()
            .into_iter()
            .flatten()
            .map(|(name, value)| (name.clone(), JinjaValue::from_serialize(value)));
        let own = [
            ("messages".to_owned(), JinjaValue::from_serialize(messages)),
            ("tools".to_owned(), JinjaValue::from_serialize(tools)),
            ("add_generation_prompt".to_owned(), JinjaValue::from(generate)),
        ];
        let documents = std::iter::once(("documents".to_owned(), JinjaValue::from(())));
        let context: JinjaValue = documents.chain(special).chain(given).chain(own).collect();

        let name = if tools.is_null() { load::DEFAULT } else { load::TOOL_USE };
        let template = self
            .environment
            .get_template(name)
            .or_else(|_| self.environment.get_template(load::DEFAULT))
            .map_err(|error| TextError::Template { reason: error.to_string() })?;
        let mut output = LimitedOutput::default();
        match template.render_captured_to(context, &mut output) {
            Ok(_) => Ok(String::from_utf8_lossy(&output.bytes).into_owned()),
            Err(_) if output.full => Err(TextError::RenderedTooLong { limit: MAX_RENDERED_BYTES }),
            Err(error) => Err(TextError::Template { reason: describe(&error) }),
        }
    }

    /// Renders a content list with a mark in it and looks for the mark, printed as text and not as a Python list.
    fn probe_parts(&self) -> bool {
        let mark = "content-part-probe";
        let messages = json!([{"role": "user", "content": [{"type": "text", "text": mark}]}]);
        self.execute(&messages, &Value::Null, &json!({}), true)
            .is_ok_and(|text| text.contains(mark) && !text.contains(&format!("'text': '{mark}'")))
    }
}

/// The message of `raise_exception` as it is; other errors with their kind and place.
fn describe(error: &Error) -> String {
    match (error.kind(), error.detail()) {
        (ErrorKind::OutOfFuel, _) => format!("it took more than {MAX_INSTRUCTIONS} instructions"),
        (ErrorKind::InvalidOperation, Some(detail)) => detail.to_owned(),
        _ => error.to_string(),
    }
}

fn compile_on_large_stack(sources: TemplateSources) -> Result<Environment<'static>> {
    let path = sources.path.clone();
    let refuse = |reason: String| TextError::Checkpoint { path: path.clone(), reason };
    if let Some(text) = sources.texts().find(|text| text.len() > MAX_SOURCE_BYTES) {
        return Err(refuse(format!(
            "the chat template has {} bytes; the limit is {MAX_SOURCE_BYTES}",
            text.len()
        )));
    }
    let parser = std::thread::Builder::new().name("template-parser".into()).stack_size(PARSER_STACK_BYTES);
    let thread = parser
        .spawn(move || new_environment(sources))
        .map_err(|error| refuse(format!("no thread to parse the chat template: {error}")))?;
    match thread.join() {
        Ok(compiled) => compiled.map_err(|error| refuse(format!("the chat template is not valid: {error}"))),
        Err(_) => Err(refuse("the template engine failed on the chat template".into())),
    }
}

/// Jinja as transformers sets it up (`utils/chat_template_utils.py`, `_compile_jinja_template`).
fn new_environment(sources: TemplateSources) -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_debug(false);
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_formatter(python::format_output);
    environment.set_fuel(Some(MAX_INSTRUCTIONS));
    environment.add_filter("tojson", python::tojson);
    environment.add_filter("string", python::string);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", clock::strftime_now);
    for (name, source) in sources.templates {
        environment.add_template_owned(name, source)?;
    }
    Ok(environment)
}

fn raise_exception(message: &JinjaValue) -> Result<JinjaValue, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message.to_string()))
}

/// Collects a rendering and fails when it grows past `MAX_RENDERED_BYTES`.
#[derive(Default)]
struct LimitedOutput {
    bytes: Vec<u8>,
    full: bool,
}

impl io::Write for LimitedOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > MAX_RENDERED_BYTES {
            self.full = true;
            return Err(io::Error::other("the rendering is too long"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
