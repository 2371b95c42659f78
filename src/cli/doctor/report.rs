//! What a check says, and how a list of them is shown. Looks at nothing itself.

use std::fmt::{self, Write};

use serde_json::{Value, json};

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Status {
    /// As it should be.
    Pass,
    /// The engine runs, but slower or with less room than it could, or something was seen that often ends in trouble.
    Warn,
    /// The engine does not start, hangs, or falls back to something much slower.
    Fail,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pass => "PASS",
            Self::Warn => "WARN",
            Self::Fail => "FAIL",
        })
    }
}

/// One check. `id` never changes its meaning, so that scripts may look for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Check {
    pub(super) id: String,
    pub(super) status: Status,
    /// What was seen, with its number.
    pub(super) found: String,
    /// What to do; empty when there is nothing to do.
    pub(super) advice: String,
    /// A command that does it, where there is one.
    pub(super) fix: Option<String>,
}

impl Check {
    pub(super) fn pass(id: &str, found: impl Into<String>) -> Self {
        Self::new(id, Status::Pass, found, "")
    }

    pub(super) fn warn(id: &str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self::new(id, Status::Warn, found, advice)
    }

    pub(super) fn fail(id: &str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self::new(id, Status::Fail, found, advice)
    }

    pub(super) fn with_fix(mut self, command: impl Into<String>) -> Self {
        self.fix = Some(command.into());
        self
    }

    fn new(id: &str, status: Status, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { id: id.to_owned(), status, found: found.into(), advice: advice.into(), fix: None }
    }

    pub(super) fn to_json(&self) -> Value {
        json!({
            "id": self.id,
            "status": self.status.to_string(),
            "found": self.found,
            "advice": self.advice,
            "fix": self.fix,
        })
    }

    /// The check that [`to_json`](Self::to_json) wrote; `None` for anything else.
    pub(super) fn from_json(value: &Value) -> Option<Self> {
        let text = |name: &str| value[name].as_str().map(str::to_owned);
        let status = match value["status"].as_str()? {
            "PASS" => Status::Pass,
            "WARN" => Status::Warn,
            "FAIL" => Status::Fail,
            _ => return None,
        };
        Some(Self {
            id: text("id")?,
            status,
            found: text("found")?,
            advice: text("advice").unwrap_or_default(),
            fix: text("fix"),
        })
    }
}

/// The checks of one machine, or of what lies between machines, for people.
pub(super) fn table(checks: &[Check], with_fixes: bool) -> String {
    let width = checks.iter().map(|check| check.id.len()).max().unwrap_or(0);
    let mut out = String::new();
    for check in checks {
        // Writing to a string cannot fail.
        let _ = writeln!(out, "{} {:width$}  {}", check.status, check.id, check.found);
        if check.status != Status::Pass && !check.advice.is_empty() {
            let _ = writeln!(out, "     {:width$}  -> {}", "", check.advice);
        }
        if let (true, true, Some(fix)) = (with_fixes, check.status != Status::Pass, &check.fix) {
            let _ = writeln!(out, "     {:width$}     $ {fix}", "");
        }
    }
    out
}

/// How many passed, warned and failed, in words.
pub(super) fn summary(checks: &[Check]) -> String {
    let count = |status| checks.iter().filter(|check| check.status == status).count();
    format!(
        "{} passed, {} warnings, {} failed",
        count(Status::Pass),
        count(Status::Warn),
        count(Status::Fail)
    )
}
