//! Text of as many tokens as asked for, with the tokenizer of the model: from its folder, or the server's own through
//! `/tokenize` and `/detokenize`.

use std::path::Path;

use anyhow::{Context, ensure};
use serde_json::{Value, json};
use spark_engine::{DEMO_MODEL, Tokenizer, find_demo_model};
use spark_weights::{Checkpoint, OpenOptions};

use super::client::Client;

/// Text to tokens and back.
pub(super) struct Tokens {
    source: Source,
    /// Tokens of whole words if there are enough: a text of them has as many tokens when it is tokenised again.
    words: Vec<u32>,
    /// Shown in reports.
    pub(super) name: String,
}

enum Source {
    Local(Box<Tokenizer>),
    Server { client: Client, model: String },
}

/// Common words, for a server whose vocabulary cannot be listed.
const WORDS: &str = " the of and to in is was for on are with they at be this from have or by one had not but what all were \
    when we there can an your which their said if do will each about how up out them then she many some so these would \
    other into has more her two like him see time could no make than first been its who now people my made over did down \
    only way find use may water long little very after words called just where most know get through back much before go \
    good new write our used me man too any day same right look think also around another came come work three word must \
    because does part even place well such here take why things help put years different away again off went old number \
    great tell men say small every found still between name should home big give air line set own under read last never us";

/// With fewer words, pieces of words are taken too: a small vocabulary has little else.
const LEAST_WORDS: usize = 64;

impl Tokens {
    /// The tokenizer in `folder_or_id`; by default that of `model`, if it is on this machine, else the server's.
    ///
    /// # Errors
    /// When there is none.
    pub(super) async fn open(
        folder_or_id: Option<&str>,
        model: &str,
        client: &Client,
    ) -> anyhow::Result<Self> {
        if let Some(name) = folder_or_id {
            return Self::local(name).with_context(|| format!("--tokenizer {name}"));
        }
        if let Ok(tokens) = Self::local(model) {
            return Ok(tokens);
        }
        let source = Source::Server { client: client.clone(), model: model.to_owned() };
        let mut tokens = Self { source, words: Vec::new(), name: format!("/tokenize of {model}") };
        let words = tokens.encode(WORDS).await;
        let mut words = words.with_context(|| {
            format!(
                "{model} is not on this machine and the server's /tokenize does not answer; name its folder with --tokenizer"
            )
        })?;
        words.sort_unstable();
        words.dedup();
        ensure!(!words.is_empty(), "the server's /tokenize found no token in a text");
        tokens.words = words;
        Ok(tokens)
    }

    fn local(name: &str) -> anyhow::Result<Self> {
        let folder = match name {
            DEMO_MODEL => find_demo_model()?,
            // A folder with nothing but a tokenizer will do.
            _ if Path::new(name).join("tokenizer.json").is_file() => name.into(),
            _ => Checkpoint::open(name, &OpenOptions::default())?.dir().to_owned(),
        };
        let tokenizer = Tokenizer::from_dir(&folder)?;
        let words = words(&tokenizer);
        ensure!(!words.is_empty(), "{}: no token is plain text", folder.display());
        Ok(Self { source: Source::Local(Box::new(tokenizer)), words, name: name.to_owned() })
    }

    /// Ids of a text that a user wrote.
    ///
    /// # Errors
    /// When the tokenizer or the server refuses it.
    pub(super) async fn encode(&self, text: &str) -> anyhow::Result<Vec<u32>> {
        match &self.source {
            Source::Local(tokenizer) => Ok(tokenizer.encode_ordinary(text)?),
            Source::Server { client, model } => {
                let body = json!({"model": model, "prompt": text, "add_special_tokens": false});
                let answer = client.post_json("/tokenize", &body).await?;
                let ids = answer["tokens"].as_array().context("/tokenize: its answer has no `tokens`")?;
                let id = |id: &Value| id.as_u64().and_then(|id| u32::try_from(id).ok());
                ids.iter().map(id).collect::<Option<_>>().context("/tokenize: an id is no number")
            }
        }
    }

    async fn decode(&self, ids: &[u32]) -> anyhow::Result<String> {
        match &self.source {
            Source::Local(tokenizer) => Ok(tokenizer.decode(ids, true)),
            Source::Server { client, model } => {
                let body = json!({"model": model, "tokens": ids});
                let answer = client.post_json("/detokenize", &body).await?;
                answer["prompt"]
                    .as_str()
                    .map(str::to_owned)
                    .context("/detokenize: its answer has no `prompt`")
            }
        }
    }

    /// `len` random words.
    pub(super) fn random(&self, len: usize, random: &mut fastrand::Rng) -> Vec<u32> {
        (0..len).map(|_| self.words[random.usize(..self.words.len())]).collect()
    }

    /// A text of `ids`, and how many tokens it has when it is tokenised again: as many, unless the tokenizer joins words.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub(super) async fn text(&self, ids: &[u32]) -> anyhow::Result<(String, usize)> {
        let text = self.decode(ids).await?;
        let len = self.encode(&text).await?.len();
        Ok((text, len))
    }
}

/// Tokens of lower-case words with the space before them; of any visible ASCII text if these are few.
fn words(tokenizer: &Tokenizer) -> Vec<u32> {
    let ids = 0..u32::try_from(tokenizer.vocab_size()).unwrap_or(u32::MAX);
    let plain: Vec<u32> = ids.filter(|id| !tokenizer.is_special(*id)).collect();
    let chosen = |is_chosen: &dyn Fn(&[u8]) -> bool| -> Vec<u32> {
        plain.iter().copied().filter(|id| is_chosen(tokenizer.token_bytes(*id))).collect()
    };
    let is_word = |bytes: &[u8]| {
        bytes.split_first().is_some_and(|(first, rest)| {
            *first == b' ' && !rest.is_empty() && rest.iter().all(u8::is_ascii_lowercase)
        })
    };
    let words = chosen(&is_word);
    match words.len() {
        LEAST_WORDS.. => words,
        _ => chosen(&|bytes| !bytes.is_empty() && bytes.iter().all(u8::is_ascii_graphic)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::bench::serve::block_on;

    #[test]
    fn random_words_have_the_length_that_was_asked_for() {
        let client = Client::new("http://localhost:1", None).unwrap();
        let tokens = block_on(Tokens::open(None, DEMO_MODEL, &client)).unwrap().unwrap();
        let mut random = fastrand::Rng::with_seed(3);
        for len in [1, 17, 200] {
            let (text, found) = block_on(tokens.text(&tokens.random(len, &mut random))).unwrap().unwrap();
            assert_eq!(found, len, "{text}");
        }
    }

    #[test]
    fn a_missing_tokenizer_is_named() {
        let client = Client::new("http://localhost:1", None).unwrap();
        let error = block_on(Tokens::open(Some("no/such"), "x", &client)).unwrap().err().unwrap();
        assert!(format!("{error:#}").contains("--tokenizer no/such"), "{error:#}");
        let error = block_on(Tokens::open(None, "no/such", &client)).unwrap().err().unwrap();
        assert!(format!("{error:#}").contains("name its folder with --tokenizer"), "{error:#}");
    }
}
