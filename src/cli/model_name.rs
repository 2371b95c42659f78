//! Which model a command works on: the argument, `--model`, SPARK_MODEL, or the demo model. Opens nothing.

use std::path::Path;

use clap::Args;
use spark_engine::{DEMO_MODEL, find_demo_model};

/// Names the model of commands that got none. Not a default of the flag: an argument counts more.
const VARIABLE: &str = "SPARK_MODEL";

/// The folder of the model for a rank on another machine, where rank 0 knows that it is another one than the command line names.
pub(crate) const OF_RANK: &str = "SPARK_RANK_MODEL";

/// The name of a model, in its two spellings.
#[derive(Args, Default)]
pub(crate) struct ModelName {
    /// A checkpoint folder, or a Hugging Face id in the local cache; by default the environment variable SPARK_MODEL, or
    /// the demo model spark-tiny-vl.
    #[arg(id = "MODEL", value_name = "MODEL")]
    pub(crate) argument: Option<String>,
    /// MODEL as a flag.
    #[arg(id = "model", short = 'm', long, value_name = "MODEL")]
    pub(crate) flag: Option<String>,
}

/// What to open.
#[derive(Debug, PartialEq)]
pub(crate) struct ChosenModel {
    /// A folder or a Hugging Face id.
    pub(crate) model: String,
    /// Its name for clients, if it has a better one than `model`.
    pub(crate) served_name: Option<String>,
}

impl ModelName {
    /// The model to open. Says which one if the command line does not.
    pub(crate) fn choose(self) -> anyhow::Result<ChosenModel> {
        if let Some(model) = std::env::var(OF_RANK).ok().filter(|model| !model.is_empty()) {
            return Ok(ChosenModel { model, served_name: None });
        }
        if let Some(model) = self.given()? {
            return Ok(ChosenModel { model, served_name: None });
        }
        if let Some(model) = std::env::var(VARIABLE).ok().filter(|model| !model.is_empty()) {
            tracing::info!("no MODEL given: using {model} of {VARIABLE}");
            return Ok(ChosenModel { model, served_name: None });
        }
        let folder = find_demo_model()?;
        tracing::info!("no MODEL given: using the demo model {DEMO_MODEL} (AWQ) at {}", folder.display());
        Ok(ChosenModel { model: folder.display().to_string(), served_name: Some(DEMO_MODEL.into()) })
    }

    /// What the command line names.
    pub(crate) fn given(self) -> anyhow::Result<Option<String>> {
        match (self.argument, self.flag) {
            (Some(argument), Some(flag)) if argument != flag => {
                anyhow::bail!("MODEL is given twice: `{argument}` and --model {flag}; leave one out")
            }
            (argument, flag) => Ok(flag.or(argument)),
        }
    }

    /// Divides the arguments of a command that takes `[MODEL] [PROMPT]`; returns the prompt. With `--model` the first
    /// argument is the prompt; without, a single one is the prompt unless it [names a model](looks_like_a_model).
    pub(crate) fn take_prompt(&mut self, second: Option<String>) -> anyhow::Result<Option<String>> {
        match (self.argument.take(), second) {
            (Some(first), Some(second)) => {
                anyhow::ensure!(
                    self.flag.is_none(),
                    "`{second}`: one argument too many: with --model there is only the prompt (quote it)"
                );
                self.argument = Some(first);
                Ok(Some(second))
            }
            (Some(only), None) if self.flag.is_none() && looks_like_a_model(&only) => {
                self.argument = Some(only);
                Ok(None)
            }
            (only, _) => Ok(only),
        }
    }
}

/// An existing folder, or a text without white space and with a slash, as paths and Hugging Face ids have one.
fn looks_like_a_model(argument: &str) -> bool {
    let is_name = argument.contains('/') && !argument.contains(char::is_whitespace);
    is_name || Path::new(argument).is_dir()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Model and prompt of `[FIRST] [SECOND] [--model FLAG]`.
    fn divide(
        first: Option<&str>,
        second: Option<&str>,
        flag: Option<&str>,
    ) -> anyhow::Result<(Option<String>, Option<String>)> {
        let mut name = ModelName { argument: first.map(Into::into), flag: flag.map(Into::into) };
        let prompt = name.take_prompt(second.map(Into::into))?;
        Ok((name.given()?, prompt))
    }

    #[test]
    fn model_and_prompt_are_told_apart() {
        let folder = spark_testing::model_dir("moe_vl_awq").display().to_string();
        let folder = folder.as_str();
        for (given, model, prompt) in [
            ((Some(folder), Some("Hi"), None), Some(folder), Some("Hi")),
            ((Some("name"), Some("Hi"), None), Some("name"), Some("Hi")),
            ((Some(folder), None, None), Some(folder), None),
            ((Some("Qwen/Qwen3-VL-8B"), None, None), Some("Qwen/Qwen3-VL-8B"), None),
            ((Some("src"), None, None), Some("src"), None),
            ((Some("./no/such/folder"), None, None), Some("./no/such/folder"), None),
            ((Some("Hi"), None, None), None, Some("Hi")),
            ((Some("km/h or mph?"), None, None), None, Some("km/h or mph?")),
            ((Some("-"), None, None), None, Some("-")),
            ((None, None, None), None, None),
            ((Some("Hi"), None, Some("name")), Some("name"), Some("Hi")),
            ((Some(folder), None, Some("name")), Some("name"), Some(folder)),
            ((None, None, Some("name")), Some("name"), None),
        ] {
            let (first, second, flag) = given;
            let divided = divide(first, second, flag).unwrap();
            assert_eq!((divided.0.as_deref(), divided.1.as_deref()), (model, prompt), "{given:?}");
        }
        assert!(divide(Some("a"), Some("b"), Some("c")).is_err());
    }

    #[test]
    fn two_models_are_an_error() {
        let name = |argument: &str, flag: &str| ModelName {
            argument: Some(argument.into()),
            flag: Some(flag.into()),
        };
        assert!(name("a", "b").given().unwrap_err().to_string().contains("--model b"));
        assert_eq!(name("a", "a").given().unwrap(), Some("a".into()));
    }
}
