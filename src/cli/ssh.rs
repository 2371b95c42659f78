//! How a command is run on another machine: `ssh`, or what SPARK_SSH names. Knows no command of the engine.

use std::process::Command;

/// A command that runs `remote` on `node`, without asking for a password. `SPARK_SSH` (words between spaces) replaces `ssh` and its
/// options; it is called with the node and one string for the remote shell.
pub(crate) fn command(node: &str, remote: &[&str]) -> Command {
    let program = std::env::var("SPARK_SSH").ok().filter(|words| !words.trim().is_empty());
    let words = program.as_deref().unwrap_or("ssh -o BatchMode=yes -o ConnectTimeout=5");
    let mut words = words.split_whitespace();
    let mut command = Command::new(words.next().unwrap_or("ssh"));
    command.args(words).arg(node).arg(remote.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" "));
    command
}

/// `word` as a POSIX shell takes it for one word.
fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,@%+".contains(c);
    match !word.is_empty() && word.chars().all(is_plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_the_remote_shell() {
        assert_eq!(quoted("--port=8000"), "--port=8000");
        assert_eq!(quoted(""), "''");
        let hard = "a b $HOME `x` \"y\" it's; rm *";
        let output =
            Command::new("sh").arg("-c").arg(format!("printf %s {}", quoted(hard))).output().unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap(), hard);
    }
}
