//! The conversation of a chat request: messages, media, tools, template arguments. What templates do is `spark-text`'s.

use serde_json::{Map, Value};
use spark_text::{
    ChatTemplate, Conversation, GrammarStart, MediaKind, MediaPart, ReasoningStart, RenderInput, Segment,
    THINK_CLOSE, THINK_OPEN, THINKING_SWITCH, prepare_messages,
};
use spark_vision::SampleRate;

use crate::ApiError;
use crate::body::{Body, kind};
use crate::media::{Kind, MediaUrl, VideoOptions};
use crate::parts::AnswerPlan;
use crate::prompts::refuse_text;
use crate::structured::Wanted;
use crate::thinking;
use crate::tools::{AnswerForm, Formats};

/// A conversation that can be rendered once its media are known.
pub(crate) struct ChatPrompt {
    messages: Value,
    kwargs: Map<String, Value>,
    form: AnswerForm,
    add_generation_prompt: bool,
    continue_final_message: bool,
    /// In the order of their placeholders.
    pub(crate) media: Vec<MediaUrl>,
}

/// Reads `messages`, the fields about their rendering, and those about the form of the answer.
///
/// # Errors
/// Names the field, and the place in `messages` or `tools`, that is wrong.
pub(crate) fn read_chat(
    body: &mut Body,
    accepts_parts: bool,
    formats: Formats,
) -> Result<ChatPrompt, ApiError> {
    let continue_final_message = body.boolean("continue_final_message", false)?;
    let add_generation_prompt = body.boolean("add_generation_prompt", !continue_final_message)?;
    if continue_final_message && add_generation_prompt {
        let message = "continue_final_message and add_generation_prompt cannot both be true";
        return Err(ApiError::field("continue_final_message", message));
    }
    let mut kwargs = body.object("chat_template_kwargs")?.unwrap_or_default();
    let thinking_budget = thinking::read(body, formats, &mut kwargs)?;
    let mut form = AnswerForm::read(body, formats)?;
    form.thinking_budget = thinking_budget;
    let messages = body.take("messages").ok_or_else(|| ApiError::field("messages", "messages is missing"))?;
    let conversation =
        prepare_messages(messages, accepts_parts).map_err(|error| refuse_text("messages", &error))?;
    let Conversation { messages, media } = conversation;
    let video = video_options(body)?;
    let media = media.into_iter().map(|part| media_url(part, video)).collect::<Result<_, _>>()?;
    Ok(ChatPrompt { messages, kwargs, form, add_generation_prompt, continue_final_message, media })
}

/// The address of a medium. Other media are refused by the name of their field.
fn media_url(medium: MediaPart, video: VideoOptions) -> Result<MediaUrl, ApiError> {
    let MediaPart { kind: media_kind, mut part, place } = medium;
    let (media_kind, names) = match media_kind {
        MediaKind::Image => (Kind::Image, ["image_url", "image", "url"]),
        MediaKind::Video => (Kind::Video, ["video_url", "video", "url"]),
    };
    let param = media_kind.param();
    let refuse = |rule: String| Err(ApiError::field(param, format!("messages{place}: {rule}")));
    let uuid = match part.get_mut("uuid").map(Value::take) {
        None | Some(Value::Null) => None,
        Some(Value::String(uuid)) if !uuid.is_empty() => Some(uuid),
        Some(other) => {
            return refuse(format!("uuid must be a string that is not empty, not {}", kind(&other)));
        }
    };
    let Some(name) = names.into_iter().find(|name| part.get(name).is_some()) else {
        return match uuid {
            Some(_) => Ok(MediaUrl { kind: media_kind, url: None, uuid, video }),
            None => refuse(format!("{param} is missing")),
        };
    };
    if let Some(detail) = part[name].get("detail").or_else(|| part.get("detail"))
        && !(detail.is_null() || detail == "auto" || detail == "high")
    {
        return refuse(format!("detail is {detail}; only \"auto\" and \"high\" are supported"));
    }
    let url = match part[name].take() {
        Value::Object(mut fields) => fields.get_mut("url").map(Value::take).unwrap_or_default(),
        other => other,
    };
    match url {
        Value::String(url) => Ok(MediaUrl { kind: media_kind, url: Some(url), uuid, video }),
        Value::Null if uuid.is_some() => Ok(MediaUrl { kind: media_kind, url: None, uuid, video }),
        other => refuse(format!("{param} must be a URL in a string, not {}", kind(&other))),
    }
}

/// `media_io_kwargs`, as far as vLLM's clients set it: `{"video": {"fps": F}}` or `{"video": {"num_frames": N}}`.
fn video_options(body: &mut Body) -> Result<VideoOptions, ApiError> {
    const FIELD: &str = "media_io_kwargs";
    let refuse = |rule: String| Err(ApiError::field(FIELD, format!("{FIELD}{rule}")));
    let mut rate = SampleRate::Default;
    for (kind, settings) in body.object(FIELD)?.unwrap_or_default() {
        let Value::Object(settings) = settings else { return refuse(format!(".{kind} must be an object")) };
        if kind != "video" && !settings.is_empty() {
            return refuse(format!(".{kind} has no settings here; video has fps and num_frames"));
        }
        for (name, value) in settings.into_iter().filter(|(_, value)| !value.is_null()) {
            let wanted = match (&*name, value.as_f64(), value.as_u64()) {
                ("fps", Some(fps), _) if fps > 0.0 && fps <= 1000.0 => SampleRate::PerSecond(fps),
                ("num_frames", _, Some(count)) if count > 0 => {
                    SampleRate::Frames(usize::try_from(count).unwrap_or(usize::MAX))
                }
                // vLLM's word for "as many as there are".
                ("num_frames", ..) if value == -1 => continue,
                ("fps", ..) => return refuse(".video.fps must be above 0 and at most 1000".into()),
                ("num_frames", ..) => {
                    return refuse(".video.num_frames must be a number from 1, or -1".into());
                }
                _ => return refuse(format!(".video.{name} is not supported; fps and num_frames are")),
            };
            if rate != SampleRate::Default {
                return refuse(".video has both fps and num_frames: choose one".into());
            }
            rate = wanted;
        }
    }
    Ok(VideoOptions { rate })
}

impl ChatPrompt {
    /// Text for the tokenizer, with one placeholder token per image.
    ///
    /// # Errors
    /// When the template refuses the conversation.
    pub(crate) fn render(&self, template: &ChatTemplate) -> Result<Vec<Segment>, ApiError> {
        self.render_with(template, &self.kwargs)
    }

    fn render_with(
        &self,
        template: &ChatTemplate,
        kwargs: &Map<String, Value>,
    ) -> Result<Vec<Segment>, ApiError> {
        let input = RenderInput {
            messages: &self.messages,
            tools: Some(&*self.form.tools).filter(|tools| !tools.is_null()),
            kwargs,
            add_generation_prompt: self.add_generation_prompt,
        };
        let segments = template.render(input).map_err(|error| refuse_text("messages", &error))?;
        match self.continue_final_message {
            true => self.cut_after_final_message(segments),
            false => Ok(segments),
        }
    }

    /// How the outputs of the rendered prompt are taken apart.
    pub(crate) fn answer_plan(&self, segments: &[Segment]) -> Option<AnswerPlan> {
        let start = match self.begins_inside_reasoning(segments) {
            true => ReasoningStart::Inside,
            false => ReasoningStart::Outside,
        };
        let options = self.form.options(start)?;
        Some(AnswerPlan { options, form: self.form.clone() })
    }

    /// The grammar of the answer, if it has one: see [`AnswerForm::grammar`].
    pub(crate) fn grammar(&self, structured: Option<Wanted>) -> Option<Wanted> {
        self.form.grammar(structured)
    }

    /// Where in the output a grammar begins: it governs the answer, not the thoughts before it. There are none in a
    /// message that is continued, nor where the prompt is the one without thinking.
    ///
    /// # Errors
    /// When the template fails on the conversation without thinking.
    pub(crate) fn grammar_start(
        &self,
        template: &ChatTemplate,
        segments: &[Segment],
    ) -> Result<GrammarStart, ApiError> {
        if self.form.thinks && self.begins_inside_reasoning(segments) {
            return Ok(GrammarStart::Thinking);
        }
        let is_closed = self.continue_final_message || prompt_end(segments).ends_with(THINK_CLOSE);
        if !self.form.thinks || is_closed {
            return Ok(GrammarStart::Answer);
        }
        if template.has_thinking_switch() {
            let mut kwargs = self.kwargs.clone();
            kwargs.insert(THINKING_SWITCH.to_owned(), Value::Bool(false));
            if self.render_with(template, &kwargs)? == segments {
                return Ok(GrammarStart::Answer);
            }
        }
        Ok(GrammarStart::MayThink)
    }

    /// Whether the prompt ends in an open thinking block. Templates end with its opening; a message that is continued
    /// may have been cut inside one.
    fn begins_inside_reasoning(&self, segments: &[Segment]) -> bool {
        if self.continue_final_message {
            let opened = self.final_text().and_then(|text| text.rsplit_once(THINK_OPEN));
            return opened.is_some_and(|(_, rest)| !rest.contains(THINK_CLOSE));
        }
        self.add_generation_prompt && prompt_end(segments).ends_with(THINK_OPEN)
    }

    /// The text of the last message, or of its last part.
    fn final_text(&self) -> Option<&str> {
        match self.messages.as_array()?.last()?.get("content")? {
            Value::String(text) => Some(text),
            Value::Array(parts) => parts.iter().rev().find_map(|part| part.get("text")?.as_str()),
            _ => None,
        }
    }

    /// Drops what the template writes after the last message, so that the model goes on with it. As transformers'
    /// `continue_final_message`: the template may have trimmed the text.
    fn cut_after_final_message(&self, segments: Vec<Segment>) -> Result<Vec<Segment>, ApiError> {
        let refuse = |message| Err(ApiError::field("continue_final_message", message));
        let Some(text) = self.final_text().map(str::trim_start).filter(|text| !text.is_empty()) else {
            return refuse("the last message has no text to continue");
        };
        let whole: String = segments.iter().map(segment_text).collect();
        let Some(start) = whole.rfind(text.trim_end()) else {
            return refuse("the chat template does not show the last message, so it cannot be continued");
        };
        let kept = if whole[start..].starts_with(text) { text } else { text.trim_end() };
        Ok(truncate(segments, start + kept.len()))
    }
}

/// The last segment with text, without the white space at its end.
fn prompt_end(segments: &[Segment]) -> &str {
    let texts = segments.iter().rev().map(|segment| segment_text(segment).trim_end());
    texts.into_iter().find(|text| !text.is_empty()).unwrap_or_default()
}

/// The text of a segment, whatever its trust.
pub(crate) fn segment_text(segment: &Segment) -> &str {
    match segment {
        Segment::Trusted(text) | Segment::Ordinary(text) => text,
    }
}

/// The first `num_bytes` bytes of the joined text, which end on a character.
fn truncate(segments: Vec<Segment>, num_bytes: usize) -> Vec<Segment> {
    let mut room = num_bytes;
    let mut kept = Vec::new();
    for mut segment in segments {
        let (Segment::Trusted(text) | Segment::Ordinary(text)) = &mut segment;
        text.truncate(room.min(text.len()));
        room -= text.len();
        if !text.is_empty() {
            kept.push(segment);
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(body: Value) -> Result<ChatPrompt, ApiError> {
        read_chat(
            &mut Body::new(body)?,
            true,
            Formats { tools: None, reasoning: false, thinking_switch: false },
        )
    }

    fn image(part: &Value) -> Result<String, ApiError> {
        read(json!({"messages": [{"role": "user", "content": [part]}]}))
            .map(|chat| chat.media[0].url.clone().unwrap())
    }

    #[test]
    fn images_come_in_three_forms() {
        let url = "data:image/png;base64,AA==";
        for part in [
            json!({"type": "image_url", "image_url": {"url": url, "detail": "auto"}}),
            json!({"type": "image_url", "image_url": url}),
            json!({"type": "input_image", "image_url": url, "detail": "high"}),
        ] {
            assert_eq!(image(&part).unwrap(), url);
        }
    }

    #[test]
    fn other_media_are_refused_by_name() {
        for (part, param, rule) in [
            (json!({"type": "image_url"}), "image_url", "missing"),
            (json!({"type": "image_url", "image_url": 7}), "image_url", "not a number"),
            (json!({"type": "image_url", "image_url": "x", "uuid": 7}), "image_url", "uuid must be a string"),
            (json!({"type": "image_url", "uuid": ""}), "image_url", "uuid must be a string"),
            (json!({"type": "video_url"}), "video_url", "missing"),
            (json!({"type": "image_url", "image_url": {}}), "image_url", "not null"),
            (json!({"type": "image_url", "image_url": {"url": "x", "detail": "low"}}), "image_url", "detail"),
            (json!({"type": "video_url", "video_url": {"url": ["x"]}}), "video_url", "not a list"),
            (json!({"type": "input_audio", "input_audio": {}}), "messages", "input_audio"),
        ] {
            let error = image(&part).unwrap_err();
            assert!(error.to_string().contains(rule), "{error}");
            assert_eq!(error.to_json()["error"]["param"], param);
        }
    }

    #[test]
    fn settings_of_videos_are_read_or_refused() {
        let read = |kwargs: Value| video_options(&mut Body::new(json!({"media_io_kwargs": kwargs}))?);
        let rate = |kwargs: Value| read(kwargs).unwrap().rate;
        assert_eq!(rate(json!({})), SampleRate::Default);
        assert_eq!(rate(json!({"video": {"num_frames": -1}, "image": {}})), SampleRate::Default);
        assert_eq!(rate(json!({"video": {"fps": 0.5}})), SampleRate::PerSecond(0.5));
        assert_eq!(rate(json!({"video": {"num_frames": 8, "fps": null}})), SampleRate::Frames(8));
        for wrong in [
            json!({"video": {"fps": 0}}),
            json!({"video": {"fps": "2"}}),
            json!({"video": {"fps": 1e9}}),
            json!({"video": {"num_frames": 0}}),
            json!({"video": {"num_frames": 2.5}}),
            json!({"video": {"fps": 1, "num_frames": 2}}),
            json!({"video": {"backend": "opencv"}}),
            json!({"audio": {"rate": 1}}),
            json!({"video": 1}),
        ] {
            let error = read(wrong.clone()).err().unwrap_or_else(|| panic!("{wrong} was taken"));
            assert_eq!(error.to_json()["error"]["param"], "media_io_kwargs");
        }
    }

    #[test]
    fn continuing_and_opening_a_turn_exclude_each_other() {
        let messages = json!([{"role": "user", "content": "x"}]);
        let chat = read(json!({"messages": messages, "continue_final_message": true})).unwrap();
        assert!(!chat.add_generation_prompt);
        let both =
            json!({"messages": messages, "continue_final_message": true, "add_generation_prompt": true});
        assert!(read(both).is_err());
    }

    #[test]
    fn the_final_message_is_cut_after_its_text() {
        let cut = |content: &str, rendered: &[Segment]| {
            let messages = json!([{"role": "assistant", "content": content}]);
            let chat = read(json!({"messages": messages, "continue_final_message": true})).unwrap();
            chat.cut_after_final_message(rendered.to_vec())
        };
        let trusted = |text: &str| Segment::Trusted(text.into());
        let rendered = [trusted("<a>"), Segment::Ordinary("Höh <b".into()), trusted("> </a>\n")];
        assert_eq!(cut("Höh", &rendered).unwrap(), [trusted("<a>"), Segment::Ordinary("Höh".into())]);
        assert_eq!(cut(" Höh ", &rendered).unwrap(), [trusted("<a>"), Segment::Ordinary("Höh ".into())]);
        assert_eq!(cut("<b>  ", &rendered).unwrap()[2], trusted(">"));
        assert!(cut("absent", &rendered).is_err());
        assert!(cut("  ", &rendered).is_err());
    }
}
