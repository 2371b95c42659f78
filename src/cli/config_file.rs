//! `serve --config FILE`: flags from a TOML file, under the names they have on the command line. What is said on the command line
//! counts more. Knows no flag by name: the command line's own description says which there are.

use std::{ffi::OsString, fs, path::Path};

use anyhow::{Context, bail, ensure};
use clap::{ArgAction, Command};

/// Name of the flag, and of the variable that may name the file instead.
const FLAG: &str = "--config";
const VARIABLE: &str = "SPARK_CONFIG";
/// Key of the positional argument.
const MODEL: &str = "model";

/// `args` (the program's name first) with the settings of the file that they name put before the flags of `subcommand`; as they
/// are when they name none or are of another subcommand.
///
/// # Errors
/// The file cannot be read, is no TOML, or has a key that is no flag or a value that is none of a flag; the message names it.
pub(crate) fn expand(
    args: Vec<OsString>,
    program: &Command,
    subcommand: &str,
) -> anyhow::Result<Vec<OsString>> {
    let Some(place) = args.iter().position(|arg| arg == subcommand) else { return Ok(args) };
    let (mut expanded, rest) = (args[..=place].to_vec(), &args[place + 1..]);
    let (file, rest) = take_flag(rest)?;
    let Some(file) = file.or_else(|| std::env::var_os(VARIABLE).filter(|path| !path.is_empty())) else {
        return Ok(args);
    };
    let path = Path::new(&file);
    let text = fs::read_to_string(path).with_context(|| format!("{FLAG} {}", path.display()))?;
    let command = program.find_subcommand(subcommand).context("the subcommand is described")?;
    // A model on the command line replaces that of the file: clap takes one.
    let has_model = has_positional(command, &rest);
    let settings = settings(&text, command, has_model).with_context(|| path.display().to_string())?;
    expanded.extend(settings.into_iter().map(OsString::from));
    expanded.extend(rest);
    Ok(expanded)
}

/// The value of the flag, and the other arguments.
fn take_flag(args: &[OsString]) -> anyhow::Result<(Option<OsString>, Vec<OsString>)> {
    let (mut file, mut rest) = (None, Vec::new());
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        match arg.to_str() {
            Some(FLAG) => file = Some(args.next().context("--config: name a TOML file")?.clone()),
            Some(text) if text.starts_with("--config=") => file = Some(text["--config=".len()..].into()),
            _ => rest.push(arg.clone()),
        }
    }
    Ok((file, rest))
}

/// Whether `args` have a word that is no flag and no flag's value.
fn has_positional(command: &Command, args: &[OsString]) -> bool {
    let takes_value = |flag: &str| {
        let found = command.get_arguments().find(|arg| is_named(arg, flag));
        found.is_some_and(|arg| arg.get_action().takes_values())
    };
    let mut is_value = false;
    for arg in args {
        let text = arg.to_string_lossy();
        match text.strip_prefix("--") {
            Some(flag) => is_value = !flag.contains('=') && takes_value(flag),
            None if text.starts_with('-') => is_value = true,
            None if is_value => is_value = false,
            None => return true,
        }
    }
    false
}

fn is_named(arg: &clap::Arg, name: &str) -> bool {
    arg.get_long() == Some(name) || arg.get_all_aliases().is_some_and(|aliases| aliases.contains(&name))
}

/// The words of the command line that say what `text` says.
fn settings(text: &str, command: &Command, has_model: bool) -> anyhow::Result<Vec<String>> {
    let table: toml::Table = text.parse()?;
    let mut words = Vec::new();
    for (key, value) in table {
        let name = key.replace('_', "-");
        if name == MODEL {
            let model = value.as_str().context("model: has to be a text")?;
            if !has_model {
                words.insert(0, model.to_owned());
            }
            continue;
        }
        let arg = command.get_arguments().find(|arg| is_named(arg, &name));
        let Some(arg) = arg else {
            bail!(
                "{key}: `{}` has no flag --{name} (see `{} --help`)",
                command.get_name(),
                command.get_name()
            )
        };
        let is_switch = matches!(arg.get_action(), ArgAction::SetTrue | ArgAction::SetFalse);
        match (value, is_switch) {
            (toml::Value::Boolean(true), true) => words.push(format!("--{name}")),
            (toml::Value::Boolean(false), true) => {}
            (toml::Value::Array(values), false) => {
                for value in &values {
                    words.push(format!("--{name}={}", scalar(&key, value)?));
                }
            }
            (value, false) => words.push(format!("--{name}={}", scalar(&key, &value)?)),
            (_, true) => bail!("{key}: has to be true or false"),
        }
    }
    Ok(words)
}

fn scalar(key: &str, value: &toml::Value) -> anyhow::Result<String> {
    Ok(match value {
        toml::Value::String(text) => text.clone(),
        toml::Value::Integer(number) => number.to_string(),
        toml::Value::Float(number) => number.to_string(),
        toml::Value::Boolean(answer) => answer.to_string(),
        _ => {
            ensure!(false, "{key}: has to be a text, a number, true or false, or a list of these");
            String::new()
        }
    })
}

#[cfg(test)]
mod tests {
    use clap::{Arg, ArgAction, Command};

    use super::*;

    fn program() -> Command {
        Command::new("p").subcommand(
            Command::new("serve")
                .arg(Arg::new("model"))
                .arg(Arg::new("port").long("port"))
                .arg(Arg::new("api_key").long("api-key").action(ArgAction::Append))
                .arg(Arg::new("eager").long("enforce-eager").action(ArgAction::SetTrue))
                .arg(Arg::new("tp").long("tensor-parallel-size").visible_alias("tp")),
        )
    }

    fn expanded(text: &str, args: &[&str]) -> anyhow::Result<Vec<String>> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("serve.toml");
        fs::write(&file, text).unwrap();
        let given = ["p", "serve", "--config", file.to_str().unwrap()];
        let args = given.iter().chain(args).map(OsString::from).collect();
        let words = expand(args, &program(), "serve")?;
        Ok(words[2..].iter().map(|word| word.to_str().unwrap().to_owned()).collect())
    }

    #[test]
    fn keys_become_flags_before_those_of_the_command_line() {
        let text = "model = \"m\"\nport = 9000\napi_key = [\"a\", \"b c\"]\nenforce-eager = true\ntp = 2\n";
        let words = expanded(text, &["--port", "1"]).unwrap();
        assert_eq!(words[0], "m");
        assert_eq!(words[words.len() - 2..], ["--port", "1"]);
        for word in ["--port=9000", "--api-key=a", "--api-key=b c", "--enforce-eager", "--tp=2"] {
            assert!(words.iter().any(|w| w == word), "{words:?}");
        }
    }

    #[test]
    fn a_model_of_the_command_line_replaces_that_of_the_file() {
        let words = expanded("model = \"m\"\n", &["--port", "1", "other"]).unwrap();
        assert_eq!(words, ["--port", "1", "other"]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, problem) in [
            ("prot = 1", "prot: `serve` has no flag --prot"),
            ("enforce-eager = 3", "enforce-eager: has to be true or false"),
            ("port = { a = 1 }", "port: has to be a text"),
            ("port = ", "port ="),
        ] {
            let error = format!("{:#}", expanded(text, &[]).unwrap_err());
            assert!(error.contains(problem) && error.contains("serve.toml"), "{error}");
        }
    }

    #[test]
    fn other_commands_are_left_alone() {
        let args: Vec<OsString> = ["p", "bench", "--config", "qwen3-30b-a3b"].map(OsString::from).to_vec();
        assert_eq!(expand(args.clone(), &program(), "serve").unwrap(), args);
    }
}
