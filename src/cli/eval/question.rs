//! Held-out samples as bodies of `POST /v1/chat/completions`, as any client would write them. Sends nothing.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Value, json};
use spark_suite::{Picture, Sample};

/// The request for an answer to `sample`: greedy, pictures as PNG in `data:` URLs.
pub(crate) fn body(sample: &Sample, model: Option<&str>, max_tokens: usize) -> anyhow::Result<Value> {
    let mut body = json!({
        "messages": wire_messages(sample)?,
        "max_tokens": max_tokens,
        "temperature": 0,
    });
    if let Some(model) = model {
        body["model"] = model.into();
    }
    // Only where they say something: not every endpoint knows these fields.
    if !sample.tools.is_empty() {
        body["tools"] = json!(sample.tools);
    }
    if !sample.template_kwargs.is_empty() {
        body["chat_template_kwargs"] = json!(sample.template_kwargs);
    }
    Ok(body)
}

/// The messages in the form that the API has: a sample's are what a chat template takes.
fn wire_messages(sample: &Sample) -> anyhow::Result<Value> {
    let mut messages = sample.messages.clone();
    let mut pictures = sample.pictures.iter();
    // Results follow their calls, in their order.
    let mut call_ids = Vec::new().into_iter();
    let mut num_calls = 0;
    for message in &mut messages {
        for part in message["content"].as_array_mut().into_iter().flatten() {
            if part["type"] == "image" {
                let picture = pictures.next().ok_or_else(|| anyhow::anyhow!("a sample lacks a picture"))?;
                *part = json!({"type": "image_url", "image_url": {"url": data_url(picture)?}});
            }
        }
        if let Some(calls) = message.get_mut("tool_calls").and_then(Value::as_array_mut) {
            let mut ids = Vec::new();
            for call in calls {
                let id = format!("call_{num_calls}");
                num_calls += 1;
                *call = wire_call(call, &id);
                ids.push(id);
            }
            call_ids = ids.into_iter();
        }
        if message["role"] == "tool"
            && let Some(id) = call_ids.next()
        {
            message["tool_call_id"] = id.into();
        }
    }
    Ok(messages.into())
}

/// A call with its id, and its arguments as JSON text.
fn wire_call(call: &Value, id: &str) -> Value {
    let function = call.get("function").unwrap_or(call);
    let arguments = match &function["arguments"] {
        Value::String(text) => text.clone(),
        value => value.to_string(),
    };
    json!({"id": id, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
}

fn data_url(picture: &Picture) -> anyhow::Result<String> {
    Ok(format!("data:image/png;base64,{}", STANDARD.encode(png_bytes(picture)?)))
}

/// A picture as a PNG file.
pub(crate) fn png_bytes(picture: &Picture) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let (width, height) = (u32::try_from(picture.width)?, u32::try_from(picture.height)?);
    let mut encoder = png::Encoder::new(&mut bytes, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&picture.rgb)?;
    writer.finish()?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use serde_json::Map;
    use spark_suite::Scoring;

    use super::*;

    fn sample(messages: Vec<Value>, pictures: Vec<Picture>) -> Sample {
        Sample {
            content: String::new(),
            messages,
            tools: Vec::new(),
            template_kwargs: Map::new(),
            pictures,
            answer: json!({"role": "assistant", "content": ""}),
            scoring: Scoring::Text,
        }
    }

    #[test]
    fn pictures_keep_their_pixels_and_order() {
        let pictures: Vec<_> =
            [10, 20].map(|first| Picture { width: 2, height: 1, rgb: (first..first + 6).collect() }).into();
        let parts = json!([{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Same?"}]);
        let sample = sample(vec![json!({"role": "user", "content": parts})], pictures.clone());
        let messages = wire_messages(&sample).unwrap();
        let parts = messages[0]["content"].as_array().unwrap();
        assert_eq!(parts[2]["text"], "Same?");
        for (part, picture) in parts.iter().zip(&pictures) {
            let url = part["image_url"]["url"].as_str().unwrap();
            let png = STANDARD.decode(url.strip_prefix("data:image/png;base64,").unwrap()).unwrap();
            let mut reader = png::Decoder::new(std::io::Cursor::new(png)).read_info().unwrap();
            let mut rgb = vec![0; reader.output_buffer_size().unwrap()];
            reader.next_frame(&mut rgb).unwrap();
            assert_eq!((rgb, reader.info().width), (picture.rgb.clone(), 2));
        }
    }

    #[test]
    fn calls_and_results_get_the_same_ids() {
        let call = |a: i64| json!({"name": "add", "arguments": {"a": a}});
        let messages = vec![
            json!({"role": "user", "content": "?"}),
            json!({"role": "assistant", "tool_calls": [call(1), {"function": call(2)}]}),
            json!({"role": "tool", "content": "1"}),
            json!({"role": "tool", "content": "2"}),
        ];
        let messages = wire_messages(&sample(messages, Vec::new())).unwrap();
        let calls = messages[1]["tool_calls"].as_array().unwrap();
        assert_eq!(calls[1]["function"], json!({"name": "add", "arguments": r#"{"a":2}"#}));
        assert_eq!(messages[0].get("tool_call_id"), None);
        for (i, call) in calls.iter().enumerate() {
            assert_eq!(call["type"], "function");
            assert_eq!(messages[2 + i]["tool_call_id"], call["id"]);
        }
        assert_ne!(calls[0]["id"], calls[1]["id"]);
    }

    #[test]
    fn only_what_a_sample_has_is_sent() {
        let mut sample = sample(Vec::new(), Vec::new());
        assert_eq!(
            body(&sample, None, 7).unwrap(),
            json!({"messages": [], "max_tokens": 7, "temperature": 0})
        );
        sample.tools.push(json!({"type": "function"}));
        sample.template_kwargs.insert("enable_thinking".into(), true.into());
        let body = body(&sample, Some("m"), 7).unwrap();
        assert_eq!((&body["model"], &body["tools"]), (&json!("m"), &json!([{"type": "function"}])));
        assert_eq!(body["chat_template_kwargs"], json!({"enable_thinking": true}));
    }
}
