//! The checkpoint's byte-level BPE tokenizer. Merging is the `fastokens` crate's; trust and limits are ours.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use fastokens::AddedTokenPolicy;
use serde_json::{Value, json};

use crate::vocabulary::{MAX_TOKEN_ID, Vocabulary};
use crate::{Result, TextError};

/// A piece of a prompt with the trust that its text has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Segment {
    /// Written by the template or the operator: all added tokens are recognised.
    Trusted(String),
    /// Contains what a user wrote: special tokens in it are plain text. Added tokens that are not special (around tool
    /// calls and reasoning) are recognised, as conversations that are sent back contain them.
    Ordinary(String),
}

impl Segment {
    /// The text, whatever its trust.
    pub fn text(&self) -> &str {
        match self {
            Self::Trusted(text) | Self::Ordinary(text) => text,
        }
    }
}

/// Text to ids and back. Immutable and shared by all requests.
pub struct Tokenizer {
    inner: fastokens::Tokenizer,
    vocabulary: Vocabulary,
    special_tokens: Vec<String>,
    normalizes: bool,
    /// `tokenizer_config.json`, for those who ask for it.
    config: Value,
}

impl Tokenizer {
    /// Reads `tokenizer.json` of a checkpoint folder. Tokens that only `tokenizer_config.json` adds
    /// (`added_tokens_decoder`) are added too, with the flags given there, as transformers does.
    ///
    /// # Errors
    /// When a file is missing, is not a byte-level BPE tokenizer, or has ids that are not plausible.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        let refuse = |reason: String| TextError::Checkpoint { path: path.clone(), reason };
        let mut json = read_json(&path)?;
        let config_path = dir.join("tokenizer_config.json");
        let mut config = json!({});
        if config_path.exists() {
            config = read_json(&config_path)?;
            add_configured_tokens(&mut json, &config)
                .map_err(|reason| TextError::Checkpoint { path: config_path, reason })?;
        }
        let num_ids = check_ids(&json).map_err(refuse)?;
        check_byte_level(&json).map_err(refuse)?;
        let normalizes = json.get("normalizer").is_some_and(|normalizer| !normalizer.is_null());
        for key in ["truncation", "padding", "post_processor"] {
            json[key] = Value::Null;
        }
        let inner = fastokens::Tokenizer::from_json(json).map_err(|error| refuse(error.to_string()))?;
        let vocabulary = Vocabulary::new(num_ids, |id| {
            inner.id_to_token(id).map(|text| (text, inner.is_special_token(id)))
        });
        let special_tokens = (0..num_ids as u32)
            .filter(|&id| inner.is_special_token(id))
            .filter_map(|id| inner.id_to_token(id).map(str::to_owned))
            .collect();
        Ok(Self { inner, vocabulary, special_tokens, normalizes, config })
    }

    /// What `tokenizer_config.json` says; an empty object without that file.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// Ids of a prompt. Segments are tokenised one by one; no merge crosses from one to the next.
    ///
    /// # Errors
    /// When the tokenizer's pattern gives up on a text.
    pub fn encode(&self, segments: &[Segment]) -> Result<Vec<u32>> {
        let mut ids = Vec::new();
        for segment in segments {
            let (text, policy) = match segment {
                Segment::Trusted(text) => (text, AddedTokenPolicy::All),
                Segment::Ordinary(text) => (text, AddedTokenPolicy::SkipSpecial),
            };
            ids.append(&mut self.encode_with(text, policy)?);
        }
        Ok(ids)
    }

    /// Ids of a text in which all added tokens are recognised. Adds nothing at its ends.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_trusted(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_with(text, AddedTokenPolicy::All)
    }

    /// Ids of a text that a user wrote: see [`Segment::Ordinary`].
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_ordinary(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_with(text, AddedTokenPolicy::SkipSpecial)
    }

    fn encode_with(&self, text: &str, policy: AddedTokenPolicy) -> Result<Vec<u32>> {
        self.inner
            .encode_with_policy(text, false, policy)
            .map_err(|error| TextError::Encode { reason: error.to_string() })
    }

    /// Text of `ids`; bytes that are not UTF-8 become U+FFFD. Ids outside the vocabulary have no text.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> String {
        let mut bytes = Vec::new();
        for &id in ids {
            if !(skip_special_tokens && self.is_special(id)) {
                bytes.extend_from_slice(self.token_bytes(id));
            }
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Bytes that a token stands for; not always whole characters, empty outside the vocabulary.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.vocabulary.token_bytes(id)
    }

    /// The id of a token by its spelling in the vocabulary (`Ġthe`, `<|im_end|>`).
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// One past the highest id that a token has, added tokens included. A model's embedding may have more rows.
    pub fn vocab_size(&self) -> usize {
        self.vocabulary.num_ids()
    }

    /// Whether a token is special: never recognised in a user's text, and left out by `skip_special_tokens`.
    pub fn is_special(&self, id: u32) -> bool {
        self.vocabulary.is_special(id)
    }

    /// Texts of the special tokens, by id.
    pub fn special_tokens(&self) -> &[String] {
        &self.special_tokens
    }

    /// Most bytes of text that one token can stand for. A text of more than `n` times as many bytes has more than `n`
    /// tokens, which is known without tokenising it.
    pub fn max_token_bytes(&self) -> usize {
        // NFC shortens a text at most threefold: three conjoining jamo (9 bytes) become one Hangul syllable (3 bytes).
        self.vocabulary.max_token_bytes() * if self.normalizes { 3 } else { 1 }
    }
}

pub(crate) fn read_text(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(|source| TextError::Io { path: path.to_owned(), source })
}

pub(crate) fn read_json(path: &Path) -> Result<Value> {
    serde_json::from_str(&read_text(path)?)
        .map_err(|error| TextError::Checkpoint { path: path.to_owned(), reason: error.to_string() })
}

/// Merges `added_tokens_decoder` of `tokenizer_config.json` into `added_tokens` of `tokenizer.json`.
fn add_configured_tokens(json: &mut Value, config: &Value) -> Result<(), String> {
    let Some(decoder) = config.get("added_tokens_decoder").and_then(Value::as_object) else {
        return Ok(());
    };
    let mut by_id = BTreeMap::new();
    for token in json.get("added_tokens").and_then(Value::as_array).into_iter().flatten() {
        let id = token.get("id").and_then(Value::as_u64).ok_or("an entry of added_tokens has no id")?;
        by_id.insert(id, token.clone());
    }
    for (id, token) in decoder {
        let id: u64 = id.parse().map_err(|_| format!("added_tokens_decoder: `{id}` is not a token id"))?;
        let mut token = token.clone();
        let content = token.get("content").cloned();
        if content.as_ref().and_then(Value::as_str).is_none() {
            return Err(format!("added_tokens_decoder: token {id} has no content"));
        }
        if let Some(other) = by_id.get(&id).filter(|other| other.get("content") != content.as_ref()) {
            let other = other.get("content").unwrap_or(&Value::Null);
            return Err(format!(
                "added_tokens_decoder: token {id} is {}, but tokenizer.json says {other}",
                content.unwrap_or_default()
            ));
        }
        token["id"] = json!(id);
        by_id.insert(id, token);
    }
    json["added_tokens"] = by_id.into_values().collect();
    Ok(())
}

/// One past the highest id, after checking that tables by id stay small.
fn check_ids(json: &Value) -> Result<usize, String> {
    let added =
        json.get("added_tokens").and_then(Value::as_array).into_iter().flatten().map(|token| token.get("id"));
    let vocab = json
        .pointer("/model/vocab")
        .and_then(Value::as_object)
        .ok_or("model.vocab is not a table of tokens")?;
    let mut num_ids = 0;
    for id in vocab.values().map(Some).chain(added) {
        let id = id.and_then(Value::as_u64).ok_or("a token has no id")?;
        if id > u64::from(MAX_TOKEN_ID) {
            return Err(format!("token id {id} is over {MAX_TOKEN_ID}, the most that is supported"));
        }
        num_ids = num_ids.max(id as usize + 1);
    }
    Ok(num_ids)
}

/// Token bytes join to text only in byte-level vocabularies: nothing else is served.
fn check_byte_level(json: &Value) -> Result<(), String> {
    let decoder = json.pointer("/decoder/type").and_then(Value::as_str);
    match decoder {
        Some("ByteLevel") => Ok(()),
        other => Err(format!("the decoder is {other:?}; only byte-level BPE (ByteLevel) is supported")),
    }
}
