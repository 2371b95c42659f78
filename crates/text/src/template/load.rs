//! Finds the template sources of a checkpoint. Compiles nothing.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::tokenizer::{read_json, read_text};
use crate::{Result, TextError};

/// Name of the template that serves everything that no other does.
pub(super) const DEFAULT: &str = "default";
/// Name of the template that transformers prefers when a request has tools.
pub(super) const TOOL_USE: &str = "tool_use";

/// Named template sources; one is called [`DEFAULT`].
pub(super) struct TemplateSources {
    /// Where they come from, for error messages.
    pub(super) path: PathBuf,
    /// Name and source of each template.
    pub(super) templates: Vec<(String, String)>,
}

impl TemplateSources {
    pub(super) fn from_dir(dir: &Path) -> Result<Self> {
        let path = dir.join("chat_template.jinja");
        if path.exists() {
            let mut sources = Self::from_file(&path)?;
            sources.add_folder(&dir.join("additional_chat_templates"))?;
            return Ok(sources);
        }
        for name in ["chat_template.json", "tokenizer_config.json"] {
            let path = dir.join(name);
            if !path.exists() {
                continue;
            }
            let json = read_json(&path)?;
            match json.get("chat_template") {
                None | Some(Value::Null) => {}
                Some(value) => {
                    let templates = named_templates(value)
                        .map_err(|reason| TextError::Checkpoint { path: path.clone(), reason })?;
                    return Ok(Self { path, templates });
                }
            }
        }
        Err(TextError::NoTemplate { dir: dir.to_owned() })
    }

    pub(super) fn from_file(path: &Path) -> Result<Self> {
        Ok(Self { path: path.to_owned(), templates: vec![(DEFAULT.to_owned(), read_text(path)?)] })
    }

    pub(super) fn texts(&self) -> impl Iterator<Item = &str> {
        self.templates.iter().map(|(_, source)| source.as_str())
    }

    fn add_folder(&mut self, folder: &Path) -> Result<()> {
        if !folder.is_dir() {
            return Ok(());
        }
        let io_error = |source| TextError::Io { path: folder.to_owned(), source };
        for entry in fs::read_dir(folder).map_err(io_error)? {
            let path = entry.map_err(io_error)?.path();
            let name = path.file_stem().and_then(|stem| stem.to_str());
            if let Some(name) =
                name.filter(|_| path.extension().is_some_and(|extension| extension == "jinja"))
            {
                self.templates.push((name.to_owned(), read_text(&path)?));
            }
        }
        Ok(())
    }
}

/// `chat_template` of a JSON file: a source, or a list of `{"name", "template"}`, or a table from name to source.
fn named_templates(value: &Value) -> Result<Vec<(String, String)>, String> {
    let pair = |name: Option<&str>, source: Option<&str>| match (name, source) {
        (Some(name), Some(source)) => Ok((name.to_owned(), source.to_owned())),
        _ => Err("an entry of chat_template has no name or no template".to_owned()),
    };
    let templates: Vec<_> = match value {
        Value::String(source) => vec![(DEFAULT.to_owned(), source.clone())],
        Value::Array(entries) => entries
            .iter()
            .map(|entry| pair(entry["name"].as_str(), entry["template"].as_str()))
            .collect::<Result<_, _>>()?,
        Value::Object(entries) => entries
            .iter()
            .map(|(name, source)| pair(Some(name), source.as_str()))
            .collect::<Result<_, _>>()?,
        _ => return Err("chat_template is neither a template nor a list of templates".into()),
    };
    match templates.iter().any(|(name, _)| name == DEFAULT) {
        true => Ok(templates),
        false => Err("chat_template is a list of templates without one named `default`".into()),
    }
}

/// `bos_token`, `eos_token` and the like of `tokenizer_config.json`, which templates can use as variables.
pub(super) fn special_variables(dir: &Path) -> Result<Vec<(String, String)>> {
    let path = dir.join("tokenizer_config.json");
    if !path.exists() {
        return Ok(Vec::new());
    }
    let json = read_json(&path)?;
    let names = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
    let text = |name: &str| {
        let value = json.get(name)?;
        value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
    };
    Ok(names.iter().filter_map(|&name| Some((name.to_owned(), text(name)?))).collect())
}
