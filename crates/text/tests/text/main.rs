//! Tests of spark-text through its public interface: goldens of Hugging Face, properties, hostile input.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod answers;
mod golden;
mod grammar;
mod hostile;
mod properties;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use spark_text::{ChatTemplate, Tokenizer};

/// Folder of the text fixtures; `tests/fixtures/make/text_golden.py` writes them.
fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/text")
}

fn read_json(name: &str) -> serde_json::Value {
    serde_json::from_str(&fs::read_to_string(fixtures().join(name)).unwrap()).unwrap()
}

/// A checkpoint folder with the fixture tokenizer `kind` (`bytes` or `merges`) and further files.
fn checkpoint(kind: &str, files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(fixtures().join(format!("tokenizer_{kind}.json")), dir.path().join("tokenizer.json")).unwrap();
    for (name, text) in files {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    dir
}

fn tokenizer(kind: &str) -> Arc<Tokenizer> {
    Arc::new(Tokenizer::from_dir(checkpoint(kind, &[]).path()).unwrap())
}

/// The oracle: the same file through Hugging Face's own crate.
fn oracle(kind: &str) -> tokenizers::Tokenizer {
    tokenizers::Tokenizer::from_file(fixtures().join(format!("tokenizer_{kind}.json"))).unwrap()
}

fn template(source: &str) -> spark_text::Result<ChatTemplate> {
    let dir = checkpoint("merges", &[("chat_template.jinja", source)]);
    ChatTemplate::from_dir(dir.path(), &tokenizer("merges"))
}
