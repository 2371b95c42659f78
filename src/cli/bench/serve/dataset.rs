//! What is asked: random words, prefixes that repeat, random pictures, or the conversations of a file. Sends nothing.

use std::path::PathBuf;

use anyhow::{Context, bail, ensure};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use clap::{Args, ValueEnum};
use serde_json::Value;

use super::tokens::Tokens;

/// One request to send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Prompt {
    pub(super) text: String,
    /// `data:` addresses.
    pub(super) images: Vec<String>,
    /// Tokens of the text.
    pub(super) input_len: usize,
    /// Tokens to generate.
    pub(super) output_len: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum DatasetName {
    /// Random words.
    Random,
    /// Random words and random pictures; needs --backend openai-chat.
    RandomMm,
    /// A JSON file of conversations: the first message of each, and as many tokens as its answer has.
    Sharegpt,
    /// A file of JSON lines with `prompt` and perhaps `output_tokens`.
    Custom,
    /// Random words after one of a few prefixes.
    #[value(name = "prefix_repetition", alias = "prefix-repetition")]
    PrefixRepetition,
}

/// Flags about what is asked.
#[derive(Args, Clone)]
#[command(next_help_heading = "Dataset")]
pub(super) struct DatasetArgs {
    /// What is asked.
    #[arg(long, value_enum, default_value = "random", value_name = "NAME")]
    pub(super) dataset_name: DatasetName,
    /// File of a `sharegpt` or `custom` dataset.
    #[arg(long, value_name = "FILE")]
    dataset_path: Option<PathBuf>,
    /// Requests.
    #[arg(long, default_value_t = 1000, value_name = "N")]
    pub(super) num_prompts: usize,
    /// Tokens of a random prompt.
    #[arg(long, visible_alias = "input-len", default_value_t = 1024, value_name = "TOKENS")]
    random_input_len: usize,
    /// Tokens to generate for a random prompt.
    #[arg(long, visible_alias = "output-len", default_value_t = 128, value_name = "TOKENS")]
    random_output_len: usize,
    /// Lengths of random prompts and answers differ by up to this share of them.
    #[arg(long, default_value_t = 0.0, value_name = "SHARE")]
    random_range_ratio: f64,
    /// Tokens that all random prompts begin with, besides their own.
    #[arg(long, default_value_t = 0, value_name = "TOKENS")]
    random_prefix_len: usize,
    /// Pictures of each `random-mm` request.
    #[arg(long, visible_alias = "random-mm-base-items-per-request", default_value_t = 1, value_name = "N")]
    random_mm_images: usize,
    /// Sizes of the pictures, one of which is chosen for each.
    #[arg(long, value_delimiter = ',', default_value = "512x512", value_name = "WIDTHxHEIGHT,...")]
    random_mm_size: Vec<Size>,
    /// Tokens to generate for each `sharegpt` prompt, instead of the length of its answer.
    #[arg(long, value_name = "TOKENS")]
    sharegpt_output_len: Option<usize>,
    /// Tokens to generate for each `custom` prompt without `output_tokens`.
    #[arg(long, default_value_t = 256, value_name = "TOKENS")]
    custom_output_len: usize,
    /// Tokens of each prefix.
    #[arg(long, default_value_t = 256, value_name = "TOKENS")]
    prefix_repetition_prefix_len: usize,
    /// Tokens after the prefix.
    #[arg(long, default_value_t = 256, value_name = "TOKENS")]
    prefix_repetition_suffix_len: usize,
    /// Different prefixes.
    #[arg(long, default_value_t = 10, value_name = "N")]
    prefix_repetition_num_prefixes: usize,
    /// Tokens to generate after a prefix and its suffix.
    #[arg(long, default_value_t = 128, value_name = "TOKENS")]
    prefix_repetition_output_len: usize,
}

/// Width and height of a picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Size(u32, u32);

impl std::str::FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |part: &str| part.trim().parse().ok().filter(|side| (1..=8192).contains(side));
        let sides = text.split_once('x').and_then(|(width, height)| Some((number(width)?, number(height)?)));
        let (width, height) =
            sides.ok_or_else(|| format!("`{text}` is not WIDTHxHEIGHT with sides of 1 to 8192"))?;
        Ok(Self(width, height))
    }
}

impl DatasetArgs {
    /// All prompts. Equal seeds give equal ones.
    ///
    /// # Errors
    /// When a flag contradicts another, a file cannot be read, or a text cannot be tokenised.
    pub(super) async fn prompts(&self, tokens: &Tokens, seed: u64) -> anyhow::Result<Vec<Prompt>> {
        ensure!(self.num_prompts > 0, "--num-prompts must be at least 1");
        ensure!(
            (0.0..1.0).contains(&self.random_range_ratio),
            "--random-range-ratio {} must be from 0 to below 1",
            self.random_range_ratio
        );
        let mut random = fastrand::Rng::with_seed(seed);
        match self.dataset_name {
            DatasetName::Random => self.random(tokens, &mut random).await,
            DatasetName::RandomMm => {
                let mut prompts = self.random(tokens, &mut random).await?;
                for prompt in &mut prompts {
                    for _ in 0..self.random_mm_images {
                        prompt.images.push(self.picture(&mut random)?);
                    }
                }
                Ok(prompts)
            }
            DatasetName::PrefixRepetition => self.prefixes(tokens, &mut random).await,
            DatasetName::Sharegpt => self.sharegpt(tokens, &mut random).await,
            DatasetName::Custom => self.custom(tokens).await,
        }
    }

    async fn random(&self, tokens: &Tokens, random: &mut fastrand::Rng) -> anyhow::Result<Vec<Prompt>> {
        let prefix = tokens.random(self.random_prefix_len, random);
        let mut prompts = Vec::with_capacity(self.num_prompts);
        for _ in 0..self.num_prompts {
            let own = vary(self.random_input_len, self.random_range_ratio, random);
            let ids = [prefix.clone(), tokens.random(own, random)].concat();
            let output_len = vary(self.random_output_len, self.random_range_ratio, random);
            prompts.push(prompt(tokens, &ids, output_len).await?);
        }
        Ok(prompts)
    }

    async fn prefixes(&self, tokens: &Tokens, random: &mut fastrand::Rng) -> anyhow::Result<Vec<Prompt>> {
        let count = self.prefix_repetition_num_prefixes;
        ensure!(
            (1..=self.num_prompts).contains(&count),
            "--prefix-repetition-num-prefixes {count} must be from 1 to --num-prompts {}",
            self.num_prompts
        );
        let prefixes: Vec<_> =
            (0..count).map(|_| tokens.random(self.prefix_repetition_prefix_len, random)).collect();
        let mut prompts = Vec::with_capacity(self.num_prompts);
        for idx in 0..self.num_prompts {
            let suffix = tokens.random(self.prefix_repetition_suffix_len, random);
            let ids = [prefixes[idx % count].clone(), suffix].concat();
            prompts.push(prompt(tokens, &ids, self.prefix_repetition_output_len).await?);
        }
        random.shuffle(&mut prompts);
        Ok(prompts)
    }

    async fn sharegpt(&self, tokens: &Tokens, random: &mut fastrand::Rng) -> anyhow::Result<Vec<Prompt>> {
        let text = self.file()?;
        let conversations: Vec<Value> =
            serde_json::from_str(&text).context("--dataset-path: not a JSON list of conversations")?;
        let turns = |conversation: &Value| {
            let turn = |idx: usize| conversation["conversations"][idx]["value"].as_str().map(str::to_owned);
            Some((turn(0)?, turn(1)?))
        };
        let mut pairs: Vec<(String, String)> = conversations.iter().filter_map(turns).collect();
        random.shuffle(&mut pairs);
        let mut prompts = Vec::new();
        for (text, answer) in pairs {
            if prompts.len() == self.num_prompts {
                break;
            }
            let input_len = tokens.encode(&text).await?.len();
            let answer_len = tokens.encode(&answer).await?.len();
            // vLLM's bounds, so that the same file gives the same work.
            let is_usable = input_len >= 4
                && (answer_len >= 4 || self.sharegpt_output_len.is_some())
                && input_len <= 1024
                && input_len + answer_len <= 2048;
            if is_usable {
                let output_len = self.sharegpt_output_len.unwrap_or(answer_len);
                prompts.push(Prompt { text, images: Vec::new(), input_len, output_len });
            }
        }
        self.filled(prompts)
    }

    async fn custom(&self, tokens: &Tokens) -> anyhow::Result<Vec<Prompt>> {
        let mut prompts = Vec::new();
        let text = self.file()?;
        for (idx, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            if prompts.len() == self.num_prompts {
                break;
            }
            let place = || format!("--dataset-path: line {}", idx + 1);
            let entry: Value = serde_json::from_str(line).with_context(place)?;
            let text = entry["prompt"].as_str().with_context(|| format!("{}: no `prompt`", place()))?;
            let output_len = match &entry["output_tokens"] {
                Value::Null => self.custom_output_len,
                value => value
                    .as_u64()
                    .and_then(|len| usize::try_from(len).ok())
                    .with_context(|| format!("{}: `output_tokens` is no whole number", place()))?,
            };
            let input_len = tokens.encode(text).await?.len();
            prompts.push(Prompt { text: text.to_owned(), images: Vec::new(), input_len, output_len });
        }
        self.filled(prompts)
    }

    fn file(&self) -> anyhow::Result<String> {
        let Some(path) = &self.dataset_path else {
            bail!("--dataset-path: this dataset is read from a file; name it")
        };
        std::fs::read_to_string(path).with_context(|| format!("--dataset-path {}", path.display()))
    }

    /// As many prompts as asked for: those of a short file again, from its beginning.
    fn filled(&self, mut prompts: Vec<Prompt>) -> anyhow::Result<Vec<Prompt>> {
        ensure!(
            !prompts.is_empty(),
            "--dataset-path: no usable prompt in the file (of sharegpt, as in vLLM: two turns, a prompt of 4 to 1024 tokens, and an answer \
             of at least 4 unless --sharegpt-output-len is given, 2048 together)"
        );
        let found = prompts.len();
        if found < self.num_prompts {
            tracing::warn!(
                "the file has {found} usable prompts: they are sent again to make {}",
                self.num_prompts
            );
        }
        for idx in 0..self.num_prompts.saturating_sub(found) {
            prompts.push(prompts[idx].clone());
        }
        Ok(prompts)
    }

    /// Noise, so that no two pictures are equal and none compresses.
    fn picture(&self, random: &mut fastrand::Rng) -> anyhow::Result<String> {
        let Size(width, height) =
            *random.choice(&self.random_mm_size).context("--random-mm-size: no size")?;
        let mut pixels = vec![0; width as usize * height as usize * 3];
        random.fill(&mut pixels);
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, width, height);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        encoder.set_compression(png::Compression::Fastest);
        encoder.write_header()?.write_image_data(&pixels)?;
        Ok(format!("data:image/png;base64,{}", STANDARD.encode(bytes)))
    }
}

async fn prompt(tokens: &Tokens, ids: &[u32], output_len: usize) -> anyhow::Result<Prompt> {
    let (text, input_len) = tokens.text(ids).await?;
    Ok(Prompt { text, images: Vec::new(), input_len, output_len })
}

/// A length within `ratio` of `len`, at least 1.
fn vary(len: usize, ratio: f64, random: &mut fastrand::Rng) -> usize {
    let spread = (len as f64 * ratio) as usize;
    random.usize(len.saturating_sub(spread)..=len + spread).max(1)
}

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, io::Write as _};

    use clap::Parser;
    use spark_engine::DEMO_MODEL;

    use super::*;
    use crate::cli::bench::serve::{block_on, client::Client};

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: DatasetArgs,
    }

    fn prompts(flags: &[&str]) -> anyhow::Result<Vec<Prompt>> {
        let line = Line::try_parse_from([&["x"], flags].concat())?;
        block_on(async {
            let client = Client::new("http://localhost:1", None)?;
            let tokens = Tokens::open(None, DEMO_MODEL, &client).await?;
            line.args.prompts(&tokens, 7).await
        })?
    }

    #[test]
    fn random_prompts_are_repeatable_and_as_long_as_asked_for() {
        let flags = ["--num-prompts", "30", "--input-len", "40", "--output-len", "8"];
        let found = prompts(&flags).unwrap();
        assert!(found.iter().all(|prompt| (prompt.input_len, prompt.output_len) == (40, 8)));
        assert_eq!(found, prompts(&flags).unwrap());
        assert_ne!(found[0].text, found[1].text);
        let varied = prompts(&[&flags[..], &["--random-range-ratio", "0.5"]].concat()).unwrap();
        assert!(varied.iter().all(|prompt| (20..=60).contains(&prompt.input_len)));
        assert!(varied.iter().any(|prompt| prompt.input_len != 40));
        assert!(prompts(&["--random-range-ratio", "1"]).is_err());
    }

    #[test]
    fn prefixes_repeat() {
        let flags = ["--dataset-name", "prefix_repetition", "--num-prompts", "12"];
        let sizes = ["--prefix-repetition-num-prefixes", "3", "--prefix-repetition-prefix-len", "20"];
        let found = prompts(&[&flags[..], &sizes].concat()).unwrap();
        let mut counts: HashMap<String, usize> = HashMap::new();
        for prompt in &found {
            *counts.entry(prompt.text.chars().take(30).collect()).or_default() += 1;
        }
        assert_eq!(counts.into_values().collect::<Vec<_>>(), [4, 4, 4]);
        assert!(found.iter().all(|prompt| prompt.input_len == 20 + 256));
        assert!(prompts(&["--dataset-name", "prefix_repetition", "--num-prompts", "3"]).is_err());
    }

    #[test]
    fn pictures_are_of_the_sizes() {
        let flags = ["--dataset-name", "random-mm", "--num-prompts", "6", "--input-len", "5"];
        let sizes = ["--random-mm-images", "2", "--random-mm-size", "30x20,8x64"];
        let found = prompts(&[&flags[..], &sizes].concat()).unwrap();
        let mut seen: Vec<(u32, u32)> = Vec::new();
        for url in found.iter().flat_map(|prompt| &prompt.images) {
            let png = STANDARD.decode(url.strip_prefix("data:image/png;base64,").unwrap()).unwrap();
            let reader = png::Decoder::new(std::io::Cursor::new(png)).read_info().unwrap();
            seen.push(reader.info().size());
        }
        assert_eq!(seen.len(), 12);
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen, [(8, 64), (30, 20)]);
        for size in ["0x5", "5", "9000x5", "axb"] {
            assert!(size.parse::<Size>().is_err(), "{size}");
        }
    }

    #[test]
    fn files_are_read_and_what_is_wrong_in_them_is_named() {
        let file = |text: &str| {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            file.write_all(text.as_bytes()).unwrap();
            file
        };
        let read = |name: &str, text: &str, more: &[&str]| {
            let file = file(text);
            let path = file.path().to_str().unwrap();
            let flags = ["--dataset-name", name, "--dataset-path", path, "--num-prompts", "3"];
            prompts(&[&flags[..], more].concat())
        };
        let chats = r#"[{"conversations": [{"from": "human", "value": "one two three four five"},
            {"from": "gpt", "value": "six seven eight nine ten eleven"}]}, {"conversations": []}]"#;
        let found = read("sharegpt", chats, &[]).unwrap();
        assert_eq!((found.len(), found[0].text.as_str()), (3, "one two three four five"));
        assert!(found[0].output_len >= 6);
        assert_eq!(read("sharegpt", chats, &["--sharegpt-output-len", "2"]).unwrap()[0].output_len, 2);
        let lines = "{\"prompt\": \"a\", \"output_tokens\": 9}\n\n{\"prompt\": \"b\"}\n";
        let lens: Vec<usize> =
            read("custom", lines, &[]).unwrap().iter().map(|prompt| prompt.output_len).collect();
        assert_eq!(lens, [9, 256, 9]);
        for (name, text, expected) in [
            ("custom", "{\"prompt\": 1}", "line 1: no `prompt`"),
            ("custom", "{}\n{", "line 1"),
            ("custom", "{\"prompt\": \"a\", \"output_tokens\": -1}", "`output_tokens`"),
            ("custom", "", "no usable prompt"),
            ("sharegpt", "{}", "not a JSON list"),
        ] {
            let error = format!("{:#}", read(name, text, &[]).unwrap_err());
            assert!(error.contains(expected), "{error}");
        }
        assert!(prompts(&["--dataset-name", "custom"]).is_err());
    }
}
