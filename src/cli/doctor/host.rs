//! What checks may look at: files, folders, programs, the environment. Everything goes through [`Host`], so that the machine may
//! as well be a recording of another one.

use std::{
    collections::BTreeMap,
    fs::{self, OpenOptions},
    process::{Command, Stdio},
    sync::Mutex,
};

use serde_json::{Value, json};

/// A machine to be looked at. Nothing is changed on it.
pub(super) trait Host {
    /// The text of a file; `None` if it is not there or may not be read.
    fn read(&self, path: &str) -> Option<String>;
    /// The names in a folder, sorted; none if there is no such folder.
    fn list(&self, path: &str) -> Vec<String>;
    /// What a program prints when it ends well; `None` if it is not there or fails.
    fn run(&self, command: &[&str]) -> Option<String>;
    /// A variable of the environment; an empty one counts as set.
    fn var(&self, name: &str) -> Option<String>;
    /// All variables that begin with `prefix`, by name.
    fn vars(&self, prefix: &str) -> Vec<(String, String)>;
    /// Whether a device may be opened for reading and writing.
    fn can_open(&self, path: &str) -> bool;
    /// Bytes free for this user on the file system of `path`.
    fn free_bytes(&self, path: &str) -> Option<u64>;
    /// The version of the NCCL that would be used, such as `2.30.4`; `Err` says why there is none.
    fn nccl_version(&self) -> Result<String, String>;
    /// `aarch64` or `x86_64`.
    fn architecture(&self) -> String;

    /// [`read`](Self::read) without white space at its ends.
    fn value(&self, path: &str) -> Option<String> {
        self.read(path).map(|text| text.trim().to_owned())
    }
}

/// The machine that this runs on.
pub(super) struct ThisHost;

impl Host for ThisHost {
    fn read(&self, path: &str) -> Option<String> {
        Some(String::from_utf8_lossy(&fs::read(path).ok()?).into_owned())
    }

    fn list(&self, path: &str) -> Vec<String> {
        let Ok(entries) = fs::read_dir(path) else { return Vec::new() };
        let mut names: Vec<String> =
            entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    fn run(&self, command: &[&str]) -> Option<String> {
        let (program, args) = command.split_first()?;
        let output =
            Command::new(program).args(args).stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn var(&self, name: &str) -> Option<String> {
        std::env::var_os(name).map(|value| value.to_string_lossy().into_owned())
    }

    fn vars(&self, prefix: &str) -> Vec<(String, String)> {
        let mut all: Vec<_> = std::env::vars_os()
            .map(|(name, value)| (name.to_string_lossy().into_owned(), value.to_string_lossy().into_owned()))
            .filter(|(name, _)| name.starts_with(prefix))
            .collect();
        all.sort();
        all
    }

    fn can_open(&self, path: &str) -> bool {
        OpenOptions::new().read(true).write(true).open(path).is_ok()
    }

    fn free_bytes(&self, path: &str) -> Option<u64> {
        let stat = rustix::fs::statvfs(path).ok()?;
        Some(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    fn nccl_version(&self) -> Result<String, String> {
        super::nccl::installed()
    }

    fn architecture(&self) -> String {
        std::env::consts::ARCH.to_owned()
    }
}

/// Everything that a run has looked at, as a file that [`Recorded`] plays back: who has the machine sends it to who has not.
pub(super) struct Recording<H> {
    host: H,
    seen: Mutex<BTreeMap<&'static str, BTreeMap<String, Value>>>,
}

impl<H: Host> Recording<H> {
    pub(super) fn new(host: H) -> Self {
        Self { host, seen: Mutex::default() }
    }

    pub(super) fn into_json(self) -> Value {
        json!(self.seen.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner))
    }

    fn note(&self, kind: &'static str, name: &str, value: impl Into<Value>) {
        let mut seen = self.seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        seen.entry(kind).or_default().insert(name.to_owned(), value.into());
    }
}

impl<H: Host> Host for Recording<H> {
    fn read(&self, path: &str) -> Option<String> {
        let text = self.host.read(path);
        self.note("files", path, text.clone());
        text
    }

    fn list(&self, path: &str) -> Vec<String> {
        let names = self.host.list(path);
        self.note("folders", path, names.clone());
        names
    }

    fn run(&self, command: &[&str]) -> Option<String> {
        let text = self.host.run(command);
        self.note("commands", &command.join(" "), text.clone());
        text
    }

    fn var(&self, name: &str) -> Option<String> {
        let value = self.host.var(name);
        self.note("environment", name, value.clone());
        value
    }

    fn vars(&self, prefix: &str) -> Vec<(String, String)> {
        let all = self.host.vars(prefix);
        for (name, value) in &all {
            self.note("environment", name, value.clone());
        }
        all
    }

    fn can_open(&self, path: &str) -> bool {
        let can = self.host.can_open(path);
        self.note("devices", path, can);
        can
    }

    fn free_bytes(&self, path: &str) -> Option<u64> {
        let bytes = self.host.free_bytes(path);
        self.note("free_bytes", path, bytes);
        bytes
    }

    fn nccl_version(&self) -> Result<String, String> {
        let version = self.host.nccl_version();
        self.note("libraries", "nccl", version.clone().ok());
        version
    }

    fn architecture(&self) -> String {
        let architecture = self.host.architecture();
        self.note("libraries", "architecture", architecture.clone());
        architecture
    }
}

/// A machine of which only a recording is here.
#[cfg(test)]
pub(super) struct Recorded(Value);

#[cfg(test)]
impl Recorded {
    /// A recording as [`Recording::into_json`] gives it.
    pub(super) fn new(recording: Value) -> Self {
        Self(recording)
    }

    fn text(&self, kind: &str, name: &str) -> Option<String> {
        self.0[kind][name].as_str().map(str::to_owned)
    }
}

#[cfg(test)]
impl Host for Recorded {
    fn read(&self, path: &str) -> Option<String> {
        self.text("files", path)
    }

    fn list(&self, path: &str) -> Vec<String> {
        let names = self.0["folders"][path].as_array();
        names.into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
    }

    fn run(&self, command: &[&str]) -> Option<String> {
        self.text("commands", &command.join(" "))
    }

    fn var(&self, name: &str) -> Option<String> {
        self.text("environment", name)
    }

    fn vars(&self, prefix: &str) -> Vec<(String, String)> {
        let all = self.0["environment"].as_object();
        let text = |(name, value): (&String, &Value)| Some((name.clone(), value.as_str()?.to_owned()));
        all.into_iter().flatten().filter_map(text).filter(|(name, _)| name.starts_with(prefix)).collect()
    }

    fn can_open(&self, path: &str) -> bool {
        self.0["devices"][path].as_bool().unwrap_or(false)
    }

    fn free_bytes(&self, path: &str) -> Option<u64> {
        self.0["free_bytes"][path].as_u64()
    }

    fn nccl_version(&self) -> Result<String, String> {
        self.text("libraries", "nccl").ok_or_else(|| "not in the recording".to_owned())
    }

    fn architecture(&self) -> String {
        self.text("libraries", "architecture").unwrap_or_default()
    }
}
