//! Takes secrets out of text and JSON that leave the machine: reports of crashes and support bundles. Too much is taken rather than
//! too little; it knows names and forms of secrets, and the values that this process has in its environment.

use serde_json::Value;

/// What stands in place of a secret.
const REDACTED: &str = "[redacted]";
/// Words that make the value of a name a secret. `tokens` is a count, and no such word.
const SECRET_WORDS: [&str; 14] = [
    "apikey",
    "auth",
    "authorization",
    "cookie",
    "credential",
    "credentials",
    "key",
    "keys",
    "passwd",
    "password",
    "pwd",
    "secret",
    "secrets",
    "token",
];
/// How keys of known services begin.
const PREFIXES: [&str; 6] = ["hf_", "sk-", "ghp_", "github_pat_", "nvapi-", "xox"];
/// Shortest value from the environment that is looked for everywhere: a shorter one is part of other words.
const MIN_KNOWN: usize = 6;

/// Takes secrets out.
pub(crate) struct Redactor {
    /// Values that are secret wherever they stand, longest first.
    known: Vec<String>,
}

impl Redactor {
    /// Knows the secrets in this process's environment.
    pub(crate) fn from_environment() -> Self {
        Self::from_environment_and([])
    }

    /// Knows them and `more`.
    pub(crate) fn from_environment_and(more: impl IntoIterator<Item = String>) -> Self {
        let variables = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
        Self::with(variables.filter(|(name, _)| is_secret_name(name)).map(|(_, value)| value).chain(more))
    }

    /// Knows `secrets`, beside all that can be told by its name or form.
    pub(crate) fn with(secrets: impl IntoIterator<Item = String>) -> Self {
        let mut known: Vec<String> = secrets.into_iter().filter(|secret| secret.len() >= MIN_KNOWN).collect();
        known.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
        Self { known }
    }

    /// `text` without secrets, line by line.
    pub(crate) fn text(&self, text: &str) -> String {
        let lines: Vec<String> = text.split('\n').map(|line| self.line(line)).collect();
        lines.join("\n")
    }

    /// `value` without secrets: those of secret names whole, texts as text.
    pub(crate) fn json(&self, value: Value) -> Value {
        match value {
            Value::String(text) => Value::String(self.text(&text)),
            Value::Array(items) => items.into_iter().map(|item| self.json(item)).collect(),
            Value::Object(fields) => {
                let clean = |(name, value): (String, Value)| {
                    let is_empty = matches!(&value, Value::Null | Value::Bool(_) | Value::Number(_));
                    match is_secret_name(&name) && !is_empty {
                        true => (name, REDACTED.into()),
                        false => (name, self.json(value)),
                    }
                };
                Value::Object(fields.into_iter().map(clean).collect())
            }
            other => other,
        }
    }

    fn line(&self, line: &str) -> String {
        let mut line = line.to_owned();
        for secret in &self.known {
            line = line.replace(secret, REDACTED);
        }
        prefixed(&user_info(&named(&line)))
    }
}

/// Whether what has this name is a secret: one of its words says so.
pub(crate) fn is_secret_name(name: &str) -> bool {
    name.split(|c: char| !c.is_ascii_alphanumeric())
        .any(|word| SECRET_WORDS.iter().any(|secret| word.eq_ignore_ascii_case(secret)))
}

fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_' || c == '-'
}

/// Takes the values of secret names: `NAME=value`, `name: value`, `"name": "value"`, `--name value value`.
fn named(line: &str) -> String {
    let mut out = String::with_capacity(line.len());
    let mut rest = line;
    while let Some(start) = rest.find(is_name) {
        let end = rest[start..].find(|c| !is_name(c)).map_or(rest.len(), |length| start + length);
        let name = &rest[start..end];
        out.push_str(&rest[..end]);
        rest = &rest[end..];
        if name.eq_ignore_ascii_case("bearer") || name.eq_ignore_ascii_case("basic") {
            rest = take_word(&mut out, rest);
        } else if is_secret_name(name) {
            rest = take_value(&mut out, rest, name.starts_with("--"));
        }
    }
    out.push_str(rest);
    out
}

/// Takes the word after a scheme of HTTP.
fn take_word<'a>(out: &mut String, rest: &'a str) -> &'a str {
    let value = rest.trim_start_matches(' ');
    let length =
        value.find(|c: char| c.is_whitespace() || matches!(c, '"' | '\'' | ',')).unwrap_or(value.len());
    if length == 0 || value.len() == rest.len() {
        return rest;
    }
    out.push(' ');
    out.push_str(REDACTED);
    &value[length..]
}

/// Takes what follows a secret name, if that is a value; gives what is left.
fn take_value<'a>(out: &mut String, rest: &'a str, is_flag: bool) -> &'a str {
    let after_quote = rest.trim_start_matches(['"', '\'']);
    let unspaced = after_quote.trim_start();
    let (value, separator) = match unspaced.strip_prefix(['=', ':']) {
        Some(value) => (value.trim_start(), &unspaced[..1]),
        None if is_flag && unspaced.len() < rest.len() && !unspaced.starts_with('-') => (unspaced, " "),
        None => return rest,
    };
    let length = match value.chars().next() {
        None => 0,
        Some(quote @ ('"' | '\'')) => value[1..].find(quote).map_or(value.len(), |end| end + 2),
        Some('[') => value.find(']').map_or(value.len(), |end| end + 1),
        // A header: all of the line.
        _ if separator == ":" => value.find([',', '}']).unwrap_or(value.len()),
        // Flags that take several values.
        _ if is_flag => value.find(" -").unwrap_or(value.len()),
        _ => value
            .find(|c: char| c.is_whitespace() || matches!(c, ',' | ';' | '&' | '}'))
            .unwrap_or(value.len()),
    };
    if length == 0 {
        return rest;
    }
    let quote = if value.starts_with('"') { "\"" } else { "" };
    out.push_str(&rest[..rest.len() - after_quote.len()]);
    out.push_str(separator);
    out.push_str(quote);
    out.push_str(REDACTED);
    out.push_str(quote);
    &value[length..]
}

/// Takes the user and the password of addresses.
fn user_info(line: &str) -> String {
    let mut out = String::with_capacity(line.len());
    let mut rest = line;
    while let Some(place) = rest.find("://") {
        let (before, after) = rest.split_at(place + 3);
        out.push_str(before);
        let end = after
            .find(|c: char| c.is_whitespace() || matches!(c, '/' | '"' | '\'' | '?' | '#'))
            .unwrap_or(after.len());
        rest = match after[..end].rfind('@') {
            Some(at) => {
                out.push_str(REDACTED);
                &after[at..]
            }
            None => after,
        };
    }
    out.push_str(rest);
    out
}

/// Takes words that begin as keys of known services do.
fn prefixed(line: &str) -> String {
    let mut out = String::with_capacity(line.len());
    let mut rest = line;
    while let Some(start) = rest.find(is_name) {
        let end = rest[start..].find(|c| !is_name(c)).map_or(rest.len(), |length| start + length);
        let word = &rest[start..end];
        let is_key = word.len() >= 12 && PREFIXES.iter().any(|prefix| word.starts_with(prefix));
        out.push_str(&rest[..start]);
        out.push_str(if is_key { REDACTED } else { word });
        rest = &rest[end..];
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn secrets_go_whatever_form_they_have() {
        let redactor = Redactor::with(["plainvalue".to_owned(), "abc".to_owned()]);
        for line in [
            "HF_TOKEN=s3cr3t",
            "export SPARK_API_KEY='s3cr3t'",
            "api-key = [\"s3cr3t\", \"s3cr3t2\"]",
            "{\"api_key\": \"s3cr3t\", \"port\": 8000}",
            "{\"api_key\": [\"s3cr3t\"]}",
            "spark-engine serve --api-key s3cr3t s3cr3t2 --port 8000",
            "spark-engine serve --api-key=s3cr3t --port 8000",
            "Authorization: Bearer s3cr3t",
            "sent authorization: Basic s3cr3t",
            "x-api-key: s3cr3t",
            "Bearer s3cr3t",
            "curl https://me:s3cr3t@example.org/x",
            "proxy http://s3cr3t@[::1]:80",
            "GET /x?token=s3cr3t&n=1",
            "password: s3cr3t",
            "the value plainvalue again: s3cr3t plainvalue".replace("s3cr3t", "").as_str(),
            "found hf_s3cr3tS3cr3t in a file",
            "sk-s3cr3t-s3cr3t",
        ] {
            let clean = redactor.text(line);
            assert!(!clean.contains("s3cr3t") && !clean.contains("plainvalue"), "{line} -> {clean}");
            assert!(clean.contains(REDACTED), "{line} -> {clean}");
        }
    }

    #[test]
    fn what_is_no_secret_stays() {
        let redactor = Redactor::with(["abc".to_owned()]);
        for line in [
            "prompt_tokens=12 tokens_per_s=4.5 id=cmpl-1",
            "max-num-queued-tokens = 7",
            "http://127.0.0.1:8000/v1/models",
            "a keyboard: 3, monkey=4, tokenizer: x",
            "ssl-keyfile = \"/etc/key.pem\"",
            "abcdef",
            "sk-1",
        ] {
            assert_eq!(redactor.text(line), line);
        }
        let value = json!({"token": null, "api_keys": ["a"], "n": {"hf-token": "x", "eos": 3}, "t": "a=1"});
        let clean =
            json!({"token": null, "api_keys": REDACTED, "n": {"hf-token": REDACTED, "eos": 3}, "t": "a=1"});
        assert_eq!(redactor.json(value), clean);
    }
}
