//! `spark-engine support-bundle`: what somebody needs to know to help, in one archive without secrets. Looks and copies; changes
//! nothing.

use std::{
    fs,
    io::{Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, SystemTime},
};

use anyhow::Context;
use clap::Args;
use flate2::{Compression, write::GzEncoder};
use serde_json::{Value, json};

use super::{crash, log_tail, redact::Redactor, trust};

/// Most of a file that is taken: its end.
const MAX_FILE: u64 = 1 << 20;
/// Newest reports of crashes that are taken.
const MAX_REPORTS: usize = 4;
/// Longest that the server may take for an answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Collect what somebody needs to know to help, in one archive. Keys, tokens and passwords are taken out; look into it all the same
/// before you send it: it has names of machines and models, addresses and ids of requests.
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    spark-engine support-bundle\n  \
    journalctl -u spark-engine -n 5000 > engine.log; spark-engine support-bundle --log engine.log -o bundle.tar.gz")]
pub(crate) struct SupportArgs {
    /// The running server; without one, the rest is collected.
    #[arg(long, default_value = "http://127.0.0.1:8000", value_name = "URL")]
    url: String,
    /// Its key, if it wants one: the admin's, if there is one.
    #[arg(long, env = "SPARK_ADMIN_API_KEY", value_name = "KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// Where the archive goes; by default spark-engine-support-TIME.tar.gz in this folder.
    #[arg(long, short, value_name = "FILE.tar.gz")]
    output: Option<PathBuf>,
    /// Logs whose ends are put in; several may be given.
    #[arg(long, value_name = "FILE", num_args = 1..)]
    log: Vec<PathBuf>,
    /// The server's file of settings.
    #[arg(long, env = "SPARK_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where the server writes reports of crashes.
    #[arg(long, env = "SPARK_CRASH_DIR", value_name = "FOLDER")]
    crash_dir: Option<PathBuf>,
}

pub(crate) fn run(args: &SupportArgs) -> anyhow::Result<()> {
    let stamp = crash::time_stamp(SystemTime::now());
    let name = format!("spark-engine-support-{stamp}");
    let path = args.output.clone().unwrap_or_else(|| PathBuf::from(format!("{name}.tar.gz")));
    let mut bundle = Bundle::new(&name, args.redactor());
    args.collect(&mut bundle);
    let (archive, notes) = bundle.finish();
    let mut options = fs::OpenOptions::new();
    let place = || format!("-o {}", path.display());
    let file = options.write(true).create(true).truncate(true).open(&path).with_context(place)?;
    let mut encoder = GzEncoder::new(file, Compression::default());
    encoder.write_all(&archive).with_context(place)?;
    encoder.finish().with_context(place)?;
    let mut stdout = std::io::stdout().lock();
    write!(stdout, "{notes}")?;
    writeln!(
        stdout,
        "written to {}: secrets are taken out, but look into it before you send it",
        path.display()
    )?;
    Ok(())
}

impl SupportArgs {
    /// Knows the key too, should something repeat it.
    fn redactor(&self) -> Redactor {
        Redactor::from_environment_and(self.api_key.iter().cloned())
    }

    fn collect(&self, bundle: &mut Bundle) {
        bundle.add_json("version.json", Ok(versions()));
        bundle.add_json("environment.json", Ok(crash::environment()));
        for (name, route) in [
            ("server/info.json", "/server_info"),
            ("server/models.json", "/v1/models"),
            ("server/version.json", "/version"),
            ("server/health.txt", "/health"),
            ("server/load.json", "/load"),
            ("server/metrics.txt", "/metrics"),
        ] {
            bundle.add_any(name, &self.ask(route));
        }
        if let Some(path) = &self.config {
            bundle.add_json("config.json", read_config(path));
        }
        for (i, path) in self.log.iter().enumerate() {
            let text = read_end(path).map(|text| log_tail::without_colours(&text));
            bundle.add(&format!("logs/{i}-{}", file_name(path)), &text);
        }
        self.collect_crashes(bundle);
        bundle.add_any("doctor.json", &own(&["doctor", "--json"]));
        bundle.add("nvidia-smi.txt", &program("nvidia-smi", &["-q"]));
        for path in [
            "/etc/nccl.conf",
            "/proc/driver/nvidia/version",
            "/proc/meminfo",
            "/proc/cpuinfo",
            "/proc/loadavg",
            "/etc/os-release",
        ] {
            if Path::new(path).exists() {
                bundle.add(&format!("system{path}"), &read_end(Path::new(path)));
            }
        }
        if let Some(path) = std::env::var_os("HOME")
            .map(|home| PathBuf::from(home).join(".nccl.conf"))
            .filter(|path| path.exists())
        {
            bundle.add("system/home-nccl.conf", &read_end(&path));
        }
    }

    fn collect_crashes(&self, bundle: &mut Bundle) {
        let Some(folder) = self.crash_dir.clone().or_else(crash::default_folder) else { return };
        let reports = crash::reports(&folder);
        for report in reports.iter().rev().take(MAX_REPORTS) {
            for entry in fs::read_dir(report).into_iter().flatten().flatten() {
                let path = entry.path();
                let name = format!("crashes/{}/{}", file_name(report), file_name(&path));
                match path.extension().is_some_and(|kind| kind == "json") {
                    true => bundle.add_any(&name, &read_end(&path)),
                    false => bundle.add(&name, &read_end(&path)),
                }
            }
        }
    }

    /// What the server answers, whatever its status.
    fn ask(&self, route: &str) -> Result<String, String> {
        let config = ureq::Agent::config_builder()
            .tls_config(trust::for_requests_to(&self.url).map_err(|error| format!("{error:#}"))?)
            .proxy(None)
            .timeout_global(Some(PATIENCE))
            .http_status_as_error(false);
        let agent: ureq::Agent = config.build().into();
        let mut request = agent.get(format!("{}{route}", self.url.trim_end_matches('/')));
        if let Some(key) = &self.api_key {
            request = request.header("Authorization", format!("Bearer {key}"));
        }
        let mut response = request.call().map_err(|error| error.to_string())?;
        let status = response.status();
        let text = response.body_mut().read_to_string().map_err(|error| error.to_string())?;
        match status.is_success() {
            true if text.is_empty() => Ok(format!("{status}\n")),
            true => Ok(text),
            false => Err(format!("{status} {text}")),
        }
    }
}

fn versions() -> Value {
    json!({
        "program": env!("CARGO_PKG_VERSION"),
        "architecture": std::env::consts::ARCH,
        "kernel": fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim(),
        "cores": std::thread::available_parallelism().map_or(0, usize::from),
    })
}

/// A file of settings as JSON, whose names say what is a secret.
fn read_config(path: &Path) -> Result<Value, String> {
    let text = fs::read_to_string(path).map_err(|error| error.to_string())?;
    let table: toml::Table = text.parse().map_err(|_| "it is no TOML".to_owned())?;
    serde_json::to_value(table).map_err(|error| error.to_string())
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// The end of a file, from the beginning of a line.
fn read_end(path: &Path) -> Result<String, String> {
    let read = || -> std::io::Result<String> {
        let mut file = fs::File::open(path)?;
        let skipped = file.metadata()?.len().saturating_sub(MAX_FILE);
        file.seek(SeekFrom::Start(skipped))?;
        let mut bytes = Vec::new();
        file.take(MAX_FILE).read_to_end(&mut bytes)?;
        let text = String::from_utf8_lossy(&bytes).into_owned();
        Ok(match text.split_once('\n') {
            Some((_, whole)) if skipped > 0 => whole.to_owned(),
            _ => text,
        })
    };
    read().map_err(|error| error.to_string())
}

/// What this program says to other arguments.
fn own(arguments: &[&str]) -> Result<String, String> {
    let path = std::env::current_exe().map_err(|error| error.to_string())?;
    program(&path.to_string_lossy(), arguments)
}

fn program(name: &str, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new(name)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| error.to_string())?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    // The doctor says by its code what it has found.
    if text.is_empty() { Err(String::from_utf8_lossy(&output.stderr).into_owned()) } else { Ok(text) }
}

/// An archive in the making: a tar file in memory, whose every text has lost its secrets.
struct Bundle {
    folder: String,
    redactor: Redactor,
    tar: Vec<u8>,
    /// One line a file.
    notes: String,
}

impl Bundle {
    fn new(folder: &str, redactor: Redactor) -> Self {
        Self { folder: folder.to_owned(), redactor, tar: Vec::new(), notes: String::new() }
    }

    /// A text, or why there is none.
    fn add(&mut self, name: &str, text: &Result<String, String>) {
        let clean = text.as_ref().map(|text| self.redactor.text(text));
        self.add_clean(name, &clean.map_err(Clone::clone));
    }

    fn add_clean(&mut self, name: &str, text: &Result<String, String>) {
        match text {
            Ok(text) => {
                self.push(name, text);
                self.notes.push_str(&format!("  {name}\n"));
            }
            Err(problem) => {
                let problem = self.redactor.text(problem.trim());
                self.notes.push_str(&format!("- {name}: {problem}\n"));
            }
        }
    }

    fn add_json(&mut self, name: &str, value: Result<Value, String>) {
        let text = value.map(|value| format!("{:#}\n", self.redactor.json(value)));
        self.add_clean(name, &text);
    }

    /// A text that may be JSON.
    fn add_any(&mut self, name: &str, text: &Result<String, String>) {
        match text.as_ref().map(|text| serde_json::from_str(text)) {
            Ok(Ok(value)) => self.add_json(name, Ok(value)),
            _ => self.add(name, text),
        }
    }

    /// One file in the form of POSIX ustar.
    fn push(&mut self, name: &str, text: &str) {
        // A name has 100 bytes; ours are shorter unless a file of the user's is not.
        let mut name = format!("{}/{name}", self.folder);
        while name.len() > 99 {
            name.pop();
        }
        let time =
            SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let mut header = [0u8; 512];
        let mut put = |place: usize, bytes: &[u8]| header[place..place + bytes.len()].copy_from_slice(bytes);
        put(0, name.as_bytes());
        put(100, b"0000600\0");
        put(108, b"0000000\0");
        put(116, b"0000000\0");
        put(124, format!("{:011o}\0", text.len()).as_bytes());
        put(136, format!("{time:011o}\0").as_bytes());
        put(148, b"        ");
        put(156, b"0");
        put(257, b"ustar\x0000");
        let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.tar.extend_from_slice(&header);
        self.tar.extend_from_slice(text.as_bytes());
        self.tar.resize(self.tar.len().next_multiple_of(512), 0);
    }

    /// The archive, and one line for every file that is or could not be in it.
    fn finish(mut self) -> (Vec<u8>, String) {
        let notes = self.notes.clone();
        self.push("contents.txt", &notes);
        self.tar.resize(self.tar.len() + 1024, 0);
        (self.tar, self.notes)
    }
}
