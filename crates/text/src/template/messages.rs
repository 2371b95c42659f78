//! OpenAI chat messages into the form that templates are written for. Media are taken out; their pixels go elsewhere.

use serde_json::{Map, Value, json};

use crate::{Result, TextError};

/// What a content part shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MediaKind {
    /// One image.
    Image,
    /// A video.
    Video,
}

/// A medium of the conversation, as the request gave it.
#[derive(Debug, Clone, PartialEq)]
pub struct MediaPart {
    /// What it shows.
    pub kind: MediaKind,
    /// The whole content part, for example `{"type": "image_url", "image_url": {"url": ...}}`.
    pub part: Value,
    /// Where it stood, for error messages: `[2].content[0]`.
    pub place: String,
}

/// A conversation ready for [`ChatTemplate::render`](crate::ChatTemplate::render).
#[derive(Debug, Clone, PartialEq)]
pub struct Conversation {
    /// The messages; media are reduced to `{"type": "image"}`.
    pub messages: Value,
    /// The media in reading order: the order of their placeholders in the rendering.
    pub media: Vec<MediaPart>,
}

/// Brings the `messages` of a chat request into template form. What is not named here stays as it is.
///
/// - The role `developer` becomes `system`.
/// - Content parts: text stays, media become `{"type": "image"}` or `{"type": "video"}`. With `accepts_parts` false (see
///   [`ChatTemplate::accepts_parts`](crate::ChatTemplate::accepts_parts)) text parts are joined by newlines, as vLLM does.
/// - `arguments` of tool calls, a JSON text in the API, become the object that templates print or walk.
/// - An assistant's message without content has an empty one.
/// - `reasoning` is also given as `reasoning_content`, the name that templates use.
///
/// # Errors
/// When the messages are not chat messages; the place is named.
pub fn prepare_messages(messages: Value, accepts_parts: bool) -> Result<Conversation> {
    let Value::Array(messages) = messages else {
        return refuse("", "must be a list of messages");
    };
    if messages.is_empty() {
        return refuse("", "must have at least one message");
    }
    let mut media = Vec::new();
    let prepared = messages
        .into_iter()
        .enumerate()
        .map(|(i, message)| prepare_message(message, &format!("[{i}]"), accepts_parts, &mut media))
        .collect::<Result<Value>>()?;
    Ok(Conversation { messages: prepared, media })
}

fn refuse<T>(place: &str, rule: impl Into<String>) -> Result<T> {
    Err(TextError::Messages { place: place.to_owned(), rule: rule.into() })
}

fn prepare_message(
    message: Value,
    place: &str,
    accepts_parts: bool,
    media: &mut Vec<MediaPart>,
) -> Result<Value> {
    let Value::Object(mut message) = message else {
        return refuse(place, "must be an object with `role` and `content`");
    };
    match message.get("role").and_then(Value::as_str) {
        Some("system" | "user" | "assistant" | "tool" | "function") => {}
        Some("developer") => message["role"] = json!("system"),
        Some(role) => {
            let rule = format!("`{role}` is not one of system, developer, user, assistant, tool");
            return refuse(&format!("{place}.role"), rule);
        }
        None => return refuse(&format!("{place}.role"), "must be a string"),
    }
    if let Some(content) = message.get_mut("content") {
        let prepared = prepare_content(content.take(), &format!("{place}.content"), accepts_parts, media)?;
        *content = prepared;
    }
    // An answer of calls alone has no content in the API; templates walk or print what they find there.
    if message.get("role").is_some_and(|role| role == "assistant")
        && message.get("content").is_none_or(Value::is_null)
    {
        message.insert("content".into(), json!(""));
    }
    if let Some(calls) = message.get_mut("tool_calls") {
        parse_arguments(calls, &format!("{place}.tool_calls"))?;
    }
    if let Some(reasoning) = message.get("reasoning").filter(|text| text.is_string()).cloned() {
        message.entry("reasoning_content").or_insert(reasoning);
    }
    Ok(Value::Object(message))
}

fn prepare_content(
    content: Value,
    place: &str,
    accepts_parts: bool,
    media: &mut Vec<MediaPart>,
) -> Result<Value> {
    let parts = match content {
        Value::Null | Value::String(_) => return Ok(content),
        Value::Array(parts) => parts,
        _ => return refuse(place, "must be a string, a list of parts, or null"),
    };
    let num_media = media.len();
    let parts = parts
        .into_iter()
        .enumerate()
        .map(|(i, part)| prepare_part(part, format!("{place}[{i}]"), media))
        .collect::<Result<Vec<Value>>>()?;
    if accepts_parts {
        return Ok(Value::Array(parts));
    }
    if media.len() > num_media {
        return refuse(place, "has media, but this model's chat template takes text only");
    }
    let texts: Vec<&str> = parts.iter().filter_map(|part| part["text"].as_str()).collect();
    Ok(Value::String(texts.join("\n")))
}

fn prepare_part(part: Value, place: String, media: &mut Vec<MediaPart>) -> Result<Value> {
    if let Value::String(text) = part {
        return Ok(json!({"type": "text", "text": text}));
    }
    let Value::Object(fields) = &part else {
        return refuse(&place, "must be an object with `type`");
    };
    let kind = match fields.get("type").and_then(Value::as_str) {
        Some("text" | "input_text" | "output_text" | "refusal") => return text_part(fields, &place),
        Some("image_url" | "image" | "input_image") => MediaKind::Image,
        Some("video_url" | "video" | "input_video") => MediaKind::Video,
        Some(other) => return refuse(&format!("{place}.type"), format!("`{other}` is not supported")),
        None => return refuse(&format!("{place}.type"), "must be a string"),
    };
    media.push(MediaPart { kind, part, place });
    Ok(match kind {
        MediaKind::Image => json!({"type": "image"}),
        MediaKind::Video => json!({"type": "video"}),
    })
}

fn text_part(fields: &Map<String, Value>, place: &str) -> Result<Value> {
    match fields.get("text").or_else(|| fields.get("refusal")).and_then(Value::as_str) {
        Some(text) => Ok(json!({"type": "text", "text": text})),
        None => refuse(&format!("{place}.text"), "must be a string"),
    }
}

fn parse_arguments(calls: &mut Value, place: &str) -> Result<()> {
    let calls = match calls {
        Value::Null => return Ok(()),
        Value::Array(calls) => calls,
        _ => return refuse(place, "must be a list"),
    };
    for (i, call) in calls.iter_mut().enumerate() {
        let place = format!("{place}[{i}].function");
        let Some(function) = call.get_mut("function").and_then(Value::as_object_mut) else {
            return refuse(&place, "must be an object with `name` and `arguments`");
        };
        if !function.get("name").is_some_and(Value::is_string) {
            return refuse(&format!("{place}.name"), "must be a string");
        }
        let parsed = match function.get("arguments") {
            None | Some(Value::Null) => json!({}),
            Some(Value::String(text)) if text.trim().is_empty() => json!({}),
            Some(Value::String(text)) => match serde_json::from_str::<Value>(text) {
                Ok(value @ Value::Object(_)) => value,
                Ok(_) => return refuse(&format!("{place}.arguments"), "must be a JSON object"),
                Err(error) => return refuse(&format!("{place}.arguments"), format!("is not JSON: {error}")),
            },
            Some(value @ Value::Object(_)) => value.clone(),
            Some(_) => return refuse(&format!("{place}.arguments"), "must be a JSON text"),
        };
        function.insert("arguments".into(), parsed);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn media_are_taken_out_in_order() {
        let image = json!({"type": "image_url", "image_url": {"url": "data:,a"}});
        let video = json!({"type": "video_url", "video_url": {"url": "data:,b"}});
        let messages = json!([
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "x"}, image, "y", video], "name": "kept"},
        ]);
        let got = prepare_messages(messages, true).unwrap();
        let parts = json!([{"type": "text", "text": "x"}, {"type": "image"}, {"type": "text", "text": "y"}, {"type": "video"}]);
        let expected = json!([
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": parts, "name": "kept"},
        ]);
        assert_eq!(got.messages, expected);
        let kinds: Vec<_> = got.media.iter().map(|medium| (medium.kind, medium.place.as_str())).collect();
        assert_eq!(kinds, [(MediaKind::Image, "[1].content[1]"), (MediaKind::Video, "[1].content[3]")]);
        assert_eq!(got.media[0].part, image);
    }

    #[test]
    fn text_templates_get_strings() {
        let messages = json!([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]);
        let got = prepare_messages(messages, false).unwrap();
        assert_eq!(got.messages, json!([{"role": "user", "content": "a\nb"}]));
    }

    #[test]
    fn tool_calls_and_reasoning() {
        let call = |arguments: Value| json!({"function": {"name": "f", "arguments": arguments}});
        let messages = json!([{"role": "assistant", "content": null, "reasoning": "r",
            "tool_calls": [call(json!("{\"b\": 1, \"a\": 2}")), call(json!("")), call(json!({"c": 3}))]}]);
        let got = prepare_messages(messages, true).unwrap().messages;
        assert_eq!(got[0]["tool_calls"][0]["function"]["arguments"].to_string(), r#"{"b":1,"a":2}"#);
        assert_eq!(got[0]["tool_calls"][1]["function"]["arguments"], json!({}));
        assert_eq!(got[0]["tool_calls"][2]["function"]["arguments"], json!({"c": 3}));
        assert_eq!((&got[0]["reasoning_content"], &got[0]["content"]), (&json!("r"), &json!("")));
    }

    #[test]
    fn broken_messages_name_their_place() {
        let cases = [
            (json!({}), "messages must be a list"),
            (json!([]), "messages must have at least one"),
            (json!([1]), "messages[0] must be an object"),
            (json!([{"content": "x"}]), "messages[0].role must be a string"),
            (json!([{"role": "root", "content": "x"}]), "messages[0].role `root` is not one of"),
            (json!([{"role": "user", "content": 1}]), "messages[0].content must be a string"),
            (
                json!([{"role": "user", "content": [{"type": "text"}]}]),
                "messages[0].content[0].text must be a string",
            ),
            (
                json!([{"role": "user", "content": [{"type": "audio"}]}]),
                "messages[0].content[0].type `audio`",
            ),
            (
                json!([{"role": "assistant", "tool_calls": [{}]}]),
                "messages[0].tool_calls[0].function must be",
            ),
            (
                json!([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]),
                "messages[0].tool_calls[0].function.arguments is not JSON",
            ),
        ];
        for (messages, expected) in cases {
            let error = prepare_messages(messages, true).unwrap_err().to_string();
            let error = error.replacen("messages: ", "messages ", 1).replacen("]: ", "] ", 1);
            assert!(
                error.replace(": ", " ").starts_with(&expected.replace(": ", " ")),
                "{error} / {expected}"
            );
        }
    }
}
