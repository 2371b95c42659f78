//! A folder for every failure of the engine: what ran, what had run, on what. No prompts, no answers, no keys. Old folders go.

use std::{
    collections::VecDeque,
    fmt::Write as _,
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use parking_lot::Mutex;
use serde_json::{Value, json};
use spark_engine::{
    FailureReport, SequenceRecord, StepRecord, fingerprint,
    server::{Observer, RequestReport},
};

use super::{log_tail, redact::Redactor};

/// How far back requests are told of.
const REMEMBERED: Duration = Duration::from_secs(300);
/// Most requests that are remembered: some hundred bytes each.
const MAX_REQUESTS: usize = 4096;
/// Most folders that are kept.
const MAX_REPORTS: usize = 16;
/// Most bytes of one file of a report.
const MAX_FILE_BYTES: usize = 4 << 20;
/// How names of reports begin; nothing else in the folder is touched.
const PREFIX: &str = "crash-";

/// Remembers what reports need, and writes them.
pub(crate) struct CrashReporter {
    folder: PathBuf,
    started: Instant,
    requests: Mutex<VecDeque<RequestReport>>,
    /// What this process was told to do and with which model, without secrets.
    facts: Value,
}

/// Where reports go unless said: what systemd or XDG give for state, else below the home folder.
pub(crate) fn default_folder() -> Option<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    // systemd separates several by colons; the first is the unit's.
    let systemd =
        variable("STATE_DIRECTORY").and_then(|paths| Some(PathBuf::from(paths.to_str()?.split(':').next()?)));
    systemd
        .or_else(|| Some(variable("XDG_STATE_HOME")?.join("spark-engine")))
        .or_else(|| Some(variable("HOME")?.join(".local/state/spark-engine")))
        .map(|folder| folder.join("crashes"))
}

/// Whether reports could be written below `folder`, which need not be there yet. Makes nothing.
pub(crate) fn try_folder(folder: &Path) -> io::Result<()> {
    let Some(place) = folder.ancestors().find(|place| place.exists()) else { return Ok(()) };
    if !place.is_dir() {
        return Err(io::ErrorKind::NotADirectory.into());
    }
    Ok(rustix::fs::access(place, rustix::fs::Access::WRITE_OK)?)
}

impl CrashReporter {
    /// Writes into `folder`, which is made when the first report is written.
    pub(crate) fn new(folder: PathBuf, facts: Value) -> Arc<Self> {
        let started = Instant::now();
        Arc::new(Self { folder, started, requests: Mutex::default(), facts })
    }

    /// Writes what an engine says of its failure. Runs beside the engine's thread, so that no defect here ends that one.
    pub(crate) fn engine_failed(self: &Arc<Self>, report: &FailureReport) {
        let (own, report) = (self.clone(), report.clone());
        let writer = std::thread::Builder::new().name("spark-crash".into()).spawn(move || {
            let failure = json!({"kind": kind(&report), "message": report.failure.message(),
                "may_recover": report.may_recover});
            let requests = requests(&own.requests.lock(), &report.sequences);
            own.write(&failure, &own.stats(&report), &steps(&report.steps), &requests);
        });
        // Whoever cannot start a thread has no time for a report either.
        drop(writer.map(std::thread::JoinHandle::join));
    }

    /// Writes that a rank which is not the first has failed: it has steps of others only.
    pub(crate) fn rank_failed(&self, message: &str) {
        self.write(&json!({"kind": "rank", "message": message, "may_recover": false}), &Value::Null, "", "");
    }

    fn stats(&self, report: &FailureReport) -> Value {
        let stats = &report.stats;
        json!({
            "uptime_s": self.started.elapsed().as_secs_f64(),
            "running": stats.num_running,
            "waiting": stats.num_waiting,
            "kv_cache_usage": stats.kv_cache_usage,
            "steps": stats.num_steps,
            "preemptions": stats.num_preemptions,
            "prompt_tokens": stats.num_prompt_tokens,
            "generation_tokens": stats.num_generation_tokens,
            "rebuilt": stats.num_rebuilt,
        })
    }

    fn write(&self, failure: &Value, stats: &Value, steps: &str, requests: &str) {
        let redactor = Redactor::from_environment();
        let name = format!("{PREFIX}{}-{}", time_stamp(SystemTime::now()), std::process::id());
        let folder = free_name(&self.folder.join(name));
        let report = redactor.json(json!({
            "program": env!("CARGO_PKG_VERSION"),
            "program_fingerprint": fingerprint::program().ok().map(hex),
            "time": seconds_since_epoch(SystemTime::now()),
            "pid": std::process::id(),
            "failure": failure,
            "engine": stats,
            "facts": self.facts,
            "environment": environment(),
        }));
        let memory = ["/proc/self/status", "/proc/meminfo", "/proc/driver/nvidia/version", "/proc/loadavg"]
            .into_iter()
            .filter_map(|path| Some(format!("{path}\n{}\n", fs::read_to_string(path).ok()?)))
            .collect::<String>();
        let files = [
            ("report.json", format!("{report:#}\n")),
            ("steps.jsonl", steps.to_owned()),
            ("requests.jsonl", redactor.text(requests)),
            ("log.txt", redactor.text(&log_tail::text())),
            ("system.txt", memory),
        ];
        match write_files(&folder, &files) {
            Ok(()) => tracing::error!("a report of the failure is in {}", folder.display()),
            Err(error) => {
                tracing::error!("cannot write a report to {} (--crash-dir): {error}", folder.display())
            }
        }
        prune(&self.folder);
    }
}

impl Observer for CrashReporter {
    fn request(&self, report: &RequestReport) {
        let mut requests = self.requests.lock();
        requests.push_back(report.clone());
        while requests.len() > MAX_REQUESTS
            || requests.front().is_some_and(|old| old.ended.elapsed() > REMEMBERED)
        {
            requests.pop_front();
        }
    }
}

fn kind(report: &FailureReport) -> &'static str {
    use spark_engine::Failure::{Defect, Device, Group};
    match report.failure {
        Device(_) => "device",
        Group(_) => "group",
        Defect(_) => "defect",
    }
}

/// One line a step: how long ago it was planned, and what it was.
fn steps(steps: &[StepRecord]) -> String {
    let line = |step: &StepRecord| {
        json!({
            "step": step.step,
            "ago_ms": milliseconds(step.planned.elapsed()),
            "took_ms": step.took.map(milliseconds),
            "sequences": step.num_seqs,
            "prefills": step.num_prefills,
            "tokens": step.num_tokens,
            "encoded": step.num_encoded,
        })
    };
    steps.iter().map(|step| format!("{}\n", line(step))).collect()
}

/// One line a request: those that were there first, then those that had ended, newest first.
fn requests(ended: &VecDeque<RequestReport>, running: &[SequenceRecord]) -> String {
    let mut lines = String::new();
    for sequence in running {
        let line = json!({
            "id": sequence.name,
            "state": if sequence.is_scheduled { "running" } else { "waiting" },
            "age_ms": milliseconds(sequence.age),
            "prompt_tokens": sequence.num_prompt_tokens,
            "output_tokens": sequence.num_output_tokens,
            "images": sequence.num_media,
            "preemptions": sequence.num_preemptions,
        });
        let _ = writeln!(lines, "{line}");
    }
    for report in ended.iter().rev().filter(|report| report.ended.elapsed() <= REMEMBERED) {
        let line = json!({
            "id": report.id,
            "state": "ended",
            "ended_ago_ms": milliseconds(report.ended.elapsed()),
            "total_ms": milliseconds(report.ended.saturating_duration_since(report.arrived)),
            "ttft_ms": report.time_to_first_token.map(milliseconds),
            "queued_ms": report.phases.map(|phases| milliseconds(phases.queued)),
            "prompt_tokens": report.num_prompt_tokens,
            "cached_tokens": report.num_cached_tokens,
            "output_tokens": report.num_output_tokens,
            "images": report.num_images,
            "sequences": report.num_sequences,
            "max_tokens": report.max_tokens,
            "finish": report.ends,
        });
        let _ = writeln!(lines, "{line}");
    }
    lines
}

/// Variables that change what the engine, CUDA or NCCL do.
pub(crate) fn environment() -> Value {
    let prefixes = [
        "SPARK_",
        "NCCL_",
        "CUDA_",
        "HF_",
        "OMP_",
        "RAYON_",
        "MALLOC_",
        "MIMALLOC_",
        "OTEL_",
        "SLURM_",
        "OMPI_",
        "UCX_",
    ];
    let names = [
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "LD_LIBRARY_PATH",
        "LD_PRELOAD",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "http_proxy",
        "https_proxy",
    ];
    let wanted = |name: &str| names.contains(&name) || prefixes.iter().any(|prefix| name.starts_with(prefix));
    let mut found: Vec<(String, Value)> = std::env::vars_os()
        .map(|(name, value)| {
            (name.to_string_lossy().into_owned(), value.to_string_lossy().into_owned().into())
        })
        .filter(|(name, _)| wanted(name))
        .collect();
    found.sort_by(|a, b| a.0.cmp(&b.0));
    Value::Object(found.into_iter().collect())
}

fn write_files(folder: &Path, files: &[(&str, String)]) -> std::io::Result<()> {
    // Ids of requests are in there: for the server's user alone.
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    for (name, text) in files {
        let mut end = text.len().min(MAX_FILE_BYTES);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        fs::write(folder.join(name), &text[..end])?;
    }
    Ok(())
}

/// `path`, or with a number if there is such a folder already.
fn free_name(path: &Path) -> PathBuf {
    let numbered = (2..1000).map(|i| PathBuf::from(format!("{}-{i}", path.display())));
    std::iter::once(path.to_owned())
        .chain(numbered)
        .find(|path| !path.exists())
        .unwrap_or_else(|| path.to_owned())
}

/// The reports in a folder, oldest first.
pub(crate) fn reports(folder: &Path) -> Vec<PathBuf> {
    let is_report = |path: &PathBuf| {
        path.is_dir() && path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(PREFIX))
    };
    let entries = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut reports: Vec<PathBuf> = entries.filter(is_report).collect();
    let age = |path: &PathBuf| fs::metadata(path).and_then(|data| data.modified()).unwrap_or(UNIX_EPOCH);
    reports.sort_by_cached_key(|path| (age(path), path.clone()));
    reports
}

/// Removes the oldest reports.
fn prune(folder: &Path) {
    let reports = reports(folder);
    for old in &reports[..reports.len().saturating_sub(MAX_REPORTS)] {
        if let Err(error) = fs::remove_dir_all(old) {
            tracing::warn!("cannot remove the old report {}: {error}", old.display());
        }
    }
}

fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e4).round() / 10.0
}

fn seconds_since_epoch(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// `20261121-154501`, in UTC.
pub(crate) fn time_stamp(time: SystemTime) -> String {
    let seconds = seconds_since_epoch(time);
    let (mut days, of_day) = (seconds / 86_400, seconds % 86_400);
    let is_leap =
        |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let mut year = 1970;
    while days >= 365 + u64::from(is_leap(year)) {
        days -= 365 + u64::from(is_leap(year));
        year += 1;
    }
    let mut month = 1;
    for length in [31, 28 + u64::from(is_leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
    format!("{year:04}{month:02}{:02}-{hour:02}{minute:02}{second:02}", days + 1)
}

fn hex(bytes: [u8; 32]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_those_of_the_calendar() {
        for (seconds, text) in
            [(0, "19700101-000000"), (951_782_400, "20000229-000000"), (1_795_275_901, "20261121-154501")]
        {
            assert_eq!(time_stamp(UNIX_EPOCH + Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn a_folder_that_takes_no_report_is_known_before_there_is_one() {
        let folder = tempfile::tempdir().unwrap();
        let deep = folder.path().join("state/crashes");
        assert!(try_folder(&deep).is_ok() && !deep.exists(), "it is not made");
        fs::write(folder.path().join("state"), "a file").unwrap();
        assert_eq!(try_folder(&deep).unwrap_err().kind(), io::ErrorKind::NotADirectory);
    }

    #[test]
    fn only_the_newest_reports_are_kept_and_nothing_else_is_touched() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("mine")).unwrap();
        let reporter = CrashReporter::new(folder.path().to_owned(), json!({"api_key": "s3cr3t"}));
        for _ in 0..MAX_REPORTS + 3 {
            reporter.rank_failed("Bearer s3cr3t was lost");
        }
        let reports = reports(folder.path());
        assert_eq!(reports.len(), MAX_REPORTS);
        assert!(folder.path().join("mine").is_dir());
        let text = fs::read_to_string(reports[0].join("report.json")).unwrap();
        assert!(!text.contains("s3cr3t") && text.contains("was lost"), "{text}");
    }
}
