//! `serve --config FILE`: flags from a TOML file, under the names they have on the command line. What is said on the command line
//! counts more. Knows no flag by name: the command line's own description says which there are.

use std::{collections::HashSet, ffi::OsString, fs, path::Path};

use anyhow::{Context, bail, ensure};
use clap::{Arg, ArgAction, Command, error::ErrorKind, parser::ValueSource};

/// The flag that names the file.
const FLAG: &str = "config";
/// Key of the positional argument, and name of the flag that says the same.
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
    // What is wrong on the command line is said when it is read in earnest.
    let Ok(matches) = program.clone().ignore_errors(true).try_get_matches_from(&args) else {
        return Ok(args);
    };
    let Some((name, matches)) = matches.subcommand() else { return Ok(args) };
    let place = args.iter().position(|arg| arg == subcommand);
    let (Some(place), true) = (place, name == subcommand) else { return Ok(args) };
    let file = matches.try_get_raw(FLAG).ok().flatten().and_then(|mut files| files.next());
    // A variable that is empty is one that is not set.
    let from_variable = matches.value_source(FLAG) == Some(ValueSource::EnvVariable);
    let Some(file) = file.filter(|file| !(file.is_empty() && from_variable)) else { return Ok(args) };
    let path = Path::new(file);
    let text = fs::read_to_string(path).with_context(|| format!("--{FLAG} {}", path.display()))?;
    let flags = Flags::of(program, subcommand)?;
    let is_given = |arg: &&Arg| matches.value_source(arg.get_id().as_str()) == Some(ValueSource::CommandLine);
    let given = flags.0.iter().copied().filter(is_given).map(|arg| arg.get_id().as_str()).collect();
    let check = |words: &[String]| check(words, program, subcommand);
    let settings = flags.words(&text, &given, check).with_context(|| path.display().to_string())?;
    let mut expanded = args[..=place].to_vec();
    expanded.extend(settings.into_iter().map(OsString::from));
    expanded.extend_from_slice(&args[place + 1..]);
    Ok(expanded)
}

/// Whether the value is one of the flag's. What only the whole command line can say, such as a flag that needs another, is not asked.
fn check(words: &[String], program: &Command, subcommand: &str) -> anyhow::Result<()> {
    let line = [program.get_name(), subcommand].into_iter().chain(words.iter().map(String::as_str));
    match program.clone().try_get_matches_from(line) {
        Err(error) if matches!(error.kind(), ErrorKind::InvalidValue | ErrorKind::ValueValidation) => {
            let text = error.to_string();
            let said = text.split("\n\nFor more").next().unwrap_or_default().trim_start_matches("error: ");
            bail!("{}", said.trim_end())
        }
        _ => Ok(()),
    }
}

/// What a subcommand takes: its own flags and the program's.
struct Flags<'a>(Vec<&'a Arg>);

impl<'a> Flags<'a> {
    fn of(program: &'a Command, subcommand: &str) -> anyhow::Result<Self> {
        let command = program.find_subcommand(subcommand).context("the subcommand is described")?;
        let global = program.get_arguments().filter(|arg| arg.is_global_set());
        Ok(Self(command.get_arguments().chain(global).collect()))
    }

    fn find(&self, name: &str) -> Option<&'a Arg> {
        let is_named = |arg: &&Arg| {
            arg.get_long() == Some(name)
                || arg.get_all_aliases().is_some_and(|aliases| aliases.contains(&name))
        };
        self.0.iter().copied().find(is_named)
    }

    /// The words of the command line that say what `text` says, without the flags that are `given` there; each flag's have to
    /// pass `check`.
    fn words(
        &self,
        text: &str,
        given: &HashSet<&str>,
        check: impl Fn(&[String]) -> anyhow::Result<()>,
    ) -> anyhow::Result<Vec<String>> {
        let table: toml::Table = text.parse()?;
        let mut words = Vec::new();
        for (key, value) in table {
            let name = key.replace('_', "-");
            ensure!(name != FLAG, "{key}: a file of settings names no other");
            if name == MODEL {
                let model = value.as_str().context("model: has to be a text")?;
                let is_model = |arg: &&Arg| arg.is_positional() || arg.get_long() == Some(MODEL);
                if !self.0.iter().filter(|arg| is_model(arg)).any(|arg| given.contains(arg.get_id().as_str()))
                {
                    words.insert(0, model.to_owned());
                }
                continue;
            }
            let arg = self.find(&name).with_context(|| {
                format!("{key}: `serve` has no flag --{name} (see `spark-engine serve --help`)")
            })?;
            let of_key = self.flag(&key, &name, arg, &value)?;
            check(&of_key).with_context(|| key.clone())?;
            if !given.contains(arg.get_id().as_str()) {
                words.extend(of_key);
            }
        }
        Ok(words)
    }

    /// The words for one key.
    fn flag(&self, key: &str, name: &str, arg: &Arg, value: &toml::Value) -> anyhow::Result<Vec<String>> {
        let is_switch = matches!(arg.get_action(), ArgAction::SetTrue | ArgAction::SetFalse);
        Ok(match (value, is_switch) {
            (toml::Value::Boolean(true), true) => vec![format!("--{name}")],
            // Off is what a switch is when it is not given, unless another one says it: --no-enable-prefix-caching.
            (toml::Value::Boolean(false), true) => {
                let opposite = format!("no-{name}");
                self.find(&opposite).map(|_| format!("--{opposite}")).into_iter().collect()
            }
            (_, true) => bail!("{key}: has to be true or false"),
            (toml::Value::Array(values), false) => {
                let words = values.iter().map(|value| Ok(format!("--{name}={}", scalar(key, value)?)));
                words.collect::<anyhow::Result<_>>()?
            }
            (value, false) => vec![format!("--{name}={}", scalar(key, value)?)],
        })
    }
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
        let switch = |name: &'static str| Arg::new(name).long(name).action(ArgAction::SetTrue);
        let level = Arg::new("level").long("log-level").global(true);
        let other = Command::new("bench").subcommand(Command::new("serve"));
        Command::new("p").arg(level).subcommand(other).subcommand(
            Command::new("serve")
                .args_override_self(true)
                .arg(Arg::new("MODEL"))
                .arg(Arg::new("model").long("model").short('m'))
                .arg(Arg::new("config").long("config"))
                .arg(Arg::new("port").long("port").value_parser(clap::value_parser!(u16)))
                .arg(Arg::new("api_key").long("api-key").action(ArgAction::Append).num_args(1..))
                .args([switch("enforce-eager"), switch("caching"), switch("no-caching")])
                .arg(Arg::new("tp").long("tensor-parallel-size").visible_alias("tp")),
        )
    }

    fn expanded(text: &str, args: &[&str]) -> anyhow::Result<Vec<String>> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("serve.toml");
        fs::write(&file, text).unwrap();
        let given = ["p", "serve", "--config", file.to_str().unwrap()];
        let args = given.iter().chain(args).map(OsString::from).collect();
        let words = expand(args, &program(), "serve")?.into_iter();
        let words: Vec<String> = words.skip(2).map(|word| word.into_string().unwrap()).collect();
        // Without the file's own name.
        let place = words.iter().position(|word| word == "--config").unwrap();
        Ok([&words[..place], &words[place + 2..]].concat())
    }

    #[test]
    fn keys_become_flags_before_those_of_the_command_line() {
        let text = "model = \"m\"\nport = 9000\napi_key = [\"a\", \"b c\"]\nenforce-eager = true\ntp = 2\n";
        let words = expanded(text, &["--log-level", "warn"]).unwrap();
        assert_eq!(words[0], "m");
        assert_eq!(words[words.len() - 2..], ["--log-level", "warn"]);
        for word in ["--port=9000", "--api-key=a", "--api-key=b c", "--enforce-eager", "--tp=2"] {
            assert!(words.iter().any(|w| w == word), "{words:?}");
        }
    }

    #[test]
    fn a_model_of_the_command_line_replaces_that_of_the_file() {
        for given in
            [&["--port", "1", "other"][..], &["-m", "other"], &["--model=other"], &["other", "--port", "1"]]
        {
            assert_eq!(expanded("model = \"m\"\n", given).unwrap(), given);
        }
        // The second key is none.
        let given = ["--api-key", "a", "b"];
        assert_eq!(expanded("model = \"m\"\n", &given).unwrap(), ["m", "--api-key", "a", "b"]);
    }

    #[test]
    fn a_flag_of_the_command_line_replaces_that_of_the_file() {
        let words = expanded("api-key = [\"a\", \"b\"]\ntp = 2\n", &["--api-key", "c", "--tp=4"]).unwrap();
        assert_eq!(words, ["--api-key", "c", "--tp=4"]);
    }

    #[test]
    fn false_is_the_switch_that_says_so() {
        assert_eq!(expanded("caching = false\nenforce-eager = false\n", &[]).unwrap(), ["--no-caching"]);
        assert_eq!(expanded("caching = false\n", &["--caching"]).unwrap(), ["--caching"]);
        assert!(expanded("no-caching = false\n", &[]).unwrap().is_empty());
    }

    #[test]
    fn flags_of_the_program_may_stand_in_the_file() {
        assert_eq!(expanded("log-level = \"warn\"\n", &[]).unwrap(), ["--log-level=warn"]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, problem) in [
            ("prot = 1", "prot: `serve` has no flag --prot"),
            ("enforce-eager = 3", "enforce-eager: has to be true or false"),
            ("port = { a = 1 }", "port: has to be a text"),
            ("port = 70000", "port: invalid value '70000' for '--port <port>': 70000 is not in 0..=65535"),
            ("config = \"other.toml\"", "config: a file of settings names no other"),
            ("port = ", "port ="),
        ] {
            let error = format!("{:#}", expanded(text, &[]).unwrap_err());
            assert!(error.contains(problem) && error.contains("serve.toml"), "{error}");
        }
    }

    #[test]
    fn other_commands_are_left_alone() {
        for args in
            [&["p", "bench", "--config", "qwen3-30b-a3b"][..], &["p", "bench", "serve", "--config", "x"]]
        {
            let args: Vec<OsString> = args.iter().map(OsString::from).collect();
            assert_eq!(expand(args.clone(), &program(), "serve").unwrap(), args);
        }
    }
}
