//! Calibration prompts as token ids and patches: from a file of JSON lines, or from the demo model's training samples.
//! What is done with them is `spark-quantize`'s.

use std::io::{BufRead, BufReader};
use std::path::Path;

use anyhow::{Context, bail, ensure};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Map, Value, json};
use spark_engine::ModelFiles;
use spark_quantize::{CalibrationMedium, CalibrationPrompt};
use spark_suite::{Sample, Split, tasks};
use spark_text::{
    ChatTemplate, MediaKind, MediaPart, RenderInput, TextError, Tokenizer, expand_placeholders,
    prepare_messages,
};
use spark_vision::{
    Alpha, DecodeOptions, ImageProcessor, ImageProcessorConfig, ImageProcessorOverrides, RgbImage,
};

/// Tokens after which a prompt is cut: a few hundred show a layer all it needs.
const MAX_TOKENS: usize = 2048;
/// Most pixels of an image; larger ones are made smaller. 1024 tokens of 32 x 32 pixels.
const MAX_PIXELS: u64 = 1 << 20;
/// Built-in prompts.
const NUM_BUILT_IN: usize = 128;
/// Most samples that are drawn for them: some may be of a kind that the model does not take.
const MAX_DRAWN: usize = 4 * NUM_BUILT_IN;

/// Patches of an image and its size in patches.
type Patches = (Vec<u8>, [usize; 3]);

/// Turns conversations and texts into calibration prompts for one model.
pub(crate) struct Calibrator {
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    /// With the placeholder; `None` for a text-only model.
    images: Option<(ImageProcessor, u32)>,
}

/// A conversation as a chat template takes it.
struct Chat {
    messages: Value,
    tools: Value,
    kwargs: Map<String, Value>,
    add_generation_prompt: bool,
}

impl Calibrator {
    /// For the tokenizer, template and image processor of a checkpoint.
    pub(crate) fn open(files: &ModelFiles) -> anyhow::Result<Self> {
        let dir = files.checkpoint.dir();
        let tokenizer = Tokenizer::from_dir(dir)?;
        let template = match ChatTemplate::from_dir(dir, &tokenizer) {
            Ok(template) => Some(template),
            Err(TextError::NoTemplate { .. }) => None,
            Err(error) => return Err(error.into()),
        };
        let images = match (&files.config.vision, files.config.image_token_id) {
            (Some(_), Some(placeholder)) => {
                let mut config = ImageProcessorConfig::from_folder(dir, &ImageProcessorOverrides::default())?;
                config.max_pixels = config.max_pixels.min(MAX_PIXELS.max(config.min_pixels));
                // Nothing is cached, so the key of its hashes keeps no secret.
                Some((
                    ImageProcessor::new(config, DecodeOptions::new(Alpha::OverWhite), [0; 32]),
                    placeholder,
                ))
            }
            _ => None,
        };
        Ok(Self { tokenizer, template, images })
    }

    /// Mean and standard deviation of the image processor.
    pub(crate) fn image_mean_std(&self) -> Option<([f32; 3], [f32; 3])> {
        self.images
            .as_ref()
            .map(|(processor, _)| (processor.config().image_mean, processor.config().image_std))
    }

    /// The prompts in a file: a JSON object a line, empty lines left out.
    pub(crate) fn read(&self, path: &Path) -> anyhow::Result<Vec<CalibrationPrompt>> {
        let place = || format!("--calibration {}", path.display());
        let folder = path.parent().unwrap_or(Path::new("."));
        let file = BufReader::new(std::fs::File::open(path).with_context(place)?);
        let mut prompts = Vec::new();
        for (number, line) in file.lines().enumerate() {
            let line = line.with_context(place)?;
            if line.trim().is_empty() {
                continue;
            }
            let prompt = self.line(&line, folder);
            prompts.push(prompt.with_context(|| format!("{}, line {}", place(), number + 1))?);
        }
        ensure!(!prompts.is_empty(), "{}: has no prompts", place());
        Ok(prompts)
    }

    fn line(&self, line: &str, folder: &Path) -> anyhow::Result<CalibrationPrompt> {
        let mut fields: Map<String, Value> = serde_json::from_str(line)?;
        let known = ["messages", "text", "tools", "chat_template_kwargs"];
        if let Some(name) = fields.keys().find(|name| !known.contains(&name.as_str())) {
            bail!(
                "the field `{name}` is not known; a line has messages (with tools, chat_template_kwargs) or text"
            );
        }
        if let Some(text) = fields.get("text") {
            let text = text.as_str().context("`text` is not a string")?;
            return self.text(text);
        }
        let messages = fields.remove("messages").context("has neither messages nor text")?;
        let kwargs = match fields.remove("chat_template_kwargs") {
            Some(Value::Object(kwargs)) => kwargs,
            None => Map::new(),
            Some(other) => bail!("`chat_template_kwargs` is {other}, not an object"),
        };
        // A conversation that ends with the assistant is complete; any other waits for an answer.
        let last = messages.as_array().and_then(|messages| messages.last());
        let add_generation_prompt = last.is_none_or(|message| message["role"] != "assistant");
        let tools = fields.remove("tools").unwrap_or(Value::Null);
        let chat = Chat { messages, tools, kwargs, add_generation_prompt };
        self.chat(chat, |media| media.iter().map(|part| self.image(part, folder)).collect())
    }

    /// A text as it is.
    fn text(&self, text: &str) -> anyhow::Result<CalibrationPrompt> {
        let mut ids = self.tokenizer.encode_ordinary(text)?;
        ids.truncate(MAX_TOKENS);
        Ok(CalibrationPrompt { ids, media: Vec::new() })
    }

    /// A conversation through the chat template. `patches` gives those of its images.
    fn chat(
        &self,
        chat: Chat,
        patches: impl FnOnce(&[MediaPart]) -> anyhow::Result<Vec<Patches>>,
    ) -> anyhow::Result<CalibrationPrompt> {
        let Some(template) = &self.template else {
            bail!("the model has no chat template; give texts instead of messages");
        };
        let conversation = prepare_messages(chat.messages, template.accepts_parts())?;
        let tools = (!chat.tools.is_null()).then_some(&chat.tools);
        let segments = template.render(RenderInput {
            messages: &conversation.messages,
            tools,
            kwargs: &chat.kwargs,
            add_generation_prompt: chat.add_generation_prompt,
        })?;
        let ids = self.tokenizer.encode(&segments)?;
        let Some((processor, placeholder)) = self.images.as_ref().filter(|_| !conversation.media.is_empty())
        else {
            ensure!(conversation.media.is_empty(), "the model does not take images");
            return Ok(cut(CalibrationPrompt { ids, media: Vec::new() }));
        };
        let patches = patches(&conversation.media)?;
        let merge = processor.config().merge_size;
        let tokens = |grid: &[usize; 3]| grid.iter().product::<usize>() / (merge * merge);
        let counts: Vec<usize> = patches.iter().map(|(_, grid)| tokens(grid)).collect();
        let (ids, offsets) = expand_placeholders(&ids, *placeholder, &counts)?;
        let end = offsets.iter().zip(&counts).map(|(offset, count)| offset + count).max().unwrap_or(0);
        ensure!(
            end <= MAX_TOKENS,
            "its images reach to token {end}; the limit is {MAX_TOKENS}: leave some out"
        );
        let medium = |((patches, grid), offset): (Patches, usize)| CalibrationMedium {
            patches: patches.into(),
            grid,
            offset,
        };
        let media = patches.into_iter().zip(offsets).map(medium).collect();
        Ok(cut(CalibrationPrompt { ids, media }))
    }

    /// Reads the image of a part: a `data:` URL, a `file:` URL, or a path beside the prompts.
    fn image(&self, part: &MediaPart, folder: &Path) -> anyhow::Result<Patches> {
        let place = || format!("messages{}", part.place);
        ensure!(part.kind == MediaKind::Image, "{}: videos are not supported", place());
        let field = ["image_url", "image", "url"].into_iter().find_map(|name| part.part.get(name));
        let field = field.with_context(|| format!("{}: image_url is missing", place()))?;
        let url = field.get("url").unwrap_or(field).as_str();
        let url = url.with_context(|| format!("{}: the URL of an image must be a string", place()))?;
        let bytes = if let Some(data) = url.strip_prefix("data:") {
            let (_, data) =
                data.split_once(";base64,").with_context(|| format!("{}: not base64", place()))?;
            STANDARD.decode(data).with_context(place)?
        } else {
            ensure!(
                !url.contains("://") || url.starts_with("file://"),
                "{}: {url} is not a local file",
                place()
            );
            let path = folder.join(url.strip_prefix("file://").unwrap_or(url));
            std::fs::read(&path).with_context(|| format!("{}: {}", place(), path.display()))?
        };
        let (processor, _) = self.images.as_ref().context("the model does not take images")?;
        let image = processor.process(&bytes).with_context(place)?;
        Ok((image.patches.to_vec(), image.grid_thw))
    }

    /// Training samples over all tasks, with their answers, as far as the model takes them.
    pub(crate) fn built_in(&self) -> anyhow::Result<Vec<CalibrationPrompt>> {
        let tasks: Vec<_> = tasks().collect();
        let mut prompts = Vec::new();
        let mut first_error = None;
        for number in 0..MAX_DRAWN {
            if prompts.len() == NUM_BUILT_IN || tasks.is_empty() {
                break;
            }
            let sample = tasks[number % tasks.len()].sample(Split::Train, (number / tasks.len()) as u64);
            match self.sample(sample) {
                Ok(prompt) => prompts.push(prompt),
                Err(error) => first_error = first_error.or(Some(error)),
            }
        }
        match first_error {
            Some(error) if prompts.is_empty() => {
                Err(error.context("no built-in prompt fits the model: give --calibration FILE"))
            }
            _ => Ok(prompts),
        }
    }

    fn sample(&self, sample: Sample) -> anyhow::Result<CalibrationPrompt> {
        ensure!(self.images.is_some() || sample.pictures.is_empty(), "the model does not take images");
        let messages: Vec<Value> = sample.messages.into_iter().chain([sample.answer]).collect();
        if self.template.is_none() {
            let texts: Vec<&str> =
                messages.iter().filter_map(|message| message["content"].as_str()).collect();
            return self.text(&texts.join("\n"));
        }
        let tools = if sample.tools.is_empty() { Value::Null } else { json!(sample.tools) };
        let chat = Chat {
            messages: messages.into(),
            tools,
            kwargs: sample.template_kwargs,
            add_generation_prompt: false,
        };
        self.chat(chat, |_| {
            let (processor, _) = self.images.as_ref().context("the model does not take images")?;
            let cut = |picture: spark_suite::Picture| {
                let image = RgbImage::new(picture.height, picture.width, picture.rgb);
                Ok(processor.cut(&image.context("a picture of a sample is empty")?)?)
            };
            sample.pictures.into_iter().map(cut).collect()
        })
    }
}

/// Leaves out what is after the last token that is wanted.
fn cut(mut prompt: CalibrationPrompt) -> CalibrationPrompt {
    prompt.ids.truncate(MAX_TOKENS);
    prompt
}
