//! The settings that a command runs with, and where each is from: flag, environment, or default. For people and reports; without
//! secrets.

use clap::{ArgMatches, Command, parser::ValueSource};
use serde_json::{Map, Value, json};

use super::redact::is_secret_name;

/// Every flag of the subcommand that has a value: `{"name": {"value", "from"}}`. A file of settings counts as flags. A flag with a
/// secret name has none of its value.
pub(crate) fn settings(program: &Command, matches: &ArgMatches) -> Value {
    let Some((name, matches)) = matches.subcommand() else { return Value::Null };
    let Some(command) = program.find_subcommand(name) else { return Value::Null };
    let mut settings = Map::new();
    for arg in command.get_arguments() {
        let id = arg.get_id().as_str();
        let (Ok(Some(values)), Some(source)) = (matches.try_get_raw(id), matches.value_source(id)) else {
            continue;
        };
        let values: Vec<String> = values.map(|value| value.to_string_lossy().into_owned()).collect();
        let value = match values.as_slice() {
            _ if is_secret_name(id) => json!("[redacted]"),
            [one] => json!(one),
            several => json!(several),
        };
        let from = match source {
            ValueSource::CommandLine => "flag",
            ValueSource::EnvVariable => "environment",
            _ => "default",
        };
        settings.insert(arg.get_long().unwrap_or(id).to_owned(), json!({"value": value, "from": from}));
    }
    json!({"command": name, "settings": settings})
}

#[cfg(test)]
mod tests {
    use clap::{Arg, ArgAction};

    use super::*;

    #[test]
    fn every_setting_says_where_it_is_from_and_no_key_is_told() {
        let program = Command::new("p").subcommand(
            Command::new("serve")
                .arg(Arg::new("port").long("port").default_value("8000"))
                .arg(Arg::new("host").long("host"))
                .arg(Arg::new("api_key").long("api-key").action(ArgAction::Append)),
        );
        let matches = program.clone().get_matches_from(["p", "serve", "--host", "h", "--api-key", "s3cr3t"]);
        let settings = settings(&program, &matches);
        let expected = json!({"command": "serve", "settings": {
            "port": {"value": "8000", "from": "default"},
            "host": {"value": "h", "from": "flag"},
            "api-key": {"value": "[redacted]", "from": "flag"},
        }});
        assert_eq!(settings, expected);
    }
}
