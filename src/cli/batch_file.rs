//! The two files of a batch: reading requests line by line, and an output that can be taken up again after a kill.

use std::{
    fs::{File, OpenOptions, TryLockError},
    io::{BufRead, BufReader, ErrorKind, Seek, SeekFrom, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use anyhow::Context;
use serde::Deserialize;
use serde_json::Value;

/// What some editors put at the start of a text.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// A line of the input.
pub(crate) struct Line {
    /// In the file, counted from 1.
    pub(crate) number: usize,
    /// As far as it can be read, for the answer to a line that is not a request.
    pub(crate) custom_id: Value,
    /// The request, or what is wrong with the line.
    pub(crate) request: Result<BatchRequest, String>,
}

/// One request of a batch.
#[derive(Deserialize)]
pub(crate) struct BatchRequest {
    pub(crate) custom_id: String,
    #[serde(default = "post")]
    method: String,
    pub(crate) url: String,
    pub(crate) body: Value,
}

fn post() -> String {
    "POST".into()
}

/// Lines that hold something.
pub(crate) fn count_lines(input: &Path) -> anyhow::Result<usize> {
    let mut count = 0;
    for text in texts(input)? {
        text?;
        count += 1;
    }
    Ok(count)
}

/// The requests of `input`, in order, read as they are asked for.
pub(crate) fn lines(input: &Path) -> anyhow::Result<impl Iterator<Item = anyhow::Result<Line>>> {
    Ok(texts(input)?.map(|text| text.map(|(number, text)| parse(number, &text))))
}

/// Lines that hold something, with their numbers. Bytes: a line that is not UTF-8 is a wrong request, not the end.
fn texts(input: &Path) -> anyhow::Result<impl Iterator<Item = anyhow::Result<(usize, Vec<u8>)>>> {
    let path = input.to_owned();
    let context = || format!("--input-file {}", input.display());
    // It is read more than once. Asked before it is opened, because opening a pipe waits for its writer.
    let metadata = std::fs::metadata(input).with_context(context)?;
    anyhow::ensure!(metadata.is_file(), "--input-file {}: it is not a regular file", input.display());
    let file = File::open(input).with_context(context)?;
    let texts = BufReader::new(file).split(b'\n').enumerate().map(move |(i, text)| {
        let mut text = text.with_context(|| format!("reading {}", path.display()))?;
        if i == 0 && text.starts_with(BYTE_ORDER_MARK) {
            text.drain(..BYTE_ORDER_MARK.len());
        }
        Ok((i + 1, text))
    });
    Ok(texts.filter(|text| !text.as_ref().is_ok_and(|(_, text)| text.trim_ascii().is_empty())))
}

fn parse(number: usize, text: &[u8]) -> Line {
    let text = std::str::from_utf8(text).map_err(|error| format!("not UTF-8: {error}"));
    let value = text
        .and_then(|text| serde_json::from_str::<Value>(text).map_err(|error| format!("not JSON: {error}")));
    let value = match value {
        Ok(value) => value,
        Err(problem) => return Line { number, custom_id: Value::Null, request: Err(problem) },
    };
    let custom_id = value.get("custom_id").cloned().unwrap_or_default();
    let request = serde_json::from_value::<BatchRequest>(value).map_err(|error| error.to_string());
    let request = request.and_then(|request| match request.method.as_str() {
        "POST" => Ok(request),
        other => Err(format!("method is {other:?}; only POST is supported")),
    });
    Line { number, custom_id, request }
}

/// The output file: whole lines only, in the order of the input. Locked against other processes while it is open.
pub(crate) struct Output {
    file: File,
    path: PathBuf,
    num_done: usize,
}

impl Output {
    /// Opens or creates `path`. What is there must be the beginning of this batch's answers; the file is not touched
    /// before all of it has been checked. A last line without its newline is what a kill left: it is cut off.
    pub(crate) fn open(path: &Path, input: &Path) -> anyhow::Result<Self> {
        let context = || format!("--output-file {}", path.display());
        let mut options = OpenOptions::new();
        let mut file =
            options.read(true).write(true).create(true).truncate(false).open(path).with_context(context)?;
        check_file(&file, path, input)?;
        lock(&file, path)?;
        let (num_done, num_bytes) = check_answers(&mut BufReader::new(&mut file), path, input)?;
        if num_bytes < file.metadata().with_context(context)?.len() {
            file.set_len(num_bytes).with_context(context)?;
        }
        file.seek(SeekFrom::Start(num_bytes)).with_context(context)?;
        Ok(Self { file, path: path.to_owned(), num_done })
    }

    /// Lines that are done.
    pub(crate) fn num_done(&self) -> usize {
        self.num_done
    }

    /// Writes one line with one call, so that a kill leaves at most one incomplete line: the last.
    pub(crate) fn append(&mut self, line: &Value) -> anyhow::Result<()> {
        let text = format!("{line}\n");
        self.file.write_all(text.as_bytes()).with_context(|| format!("writing {}", self.path.display()))?;
        self.num_done += 1;
        Ok(())
    }

    /// Waits until the disk has it.
    pub(crate) fn sync(&self) -> anyhow::Result<()> {
        self.file.sync_all().with_context(|| format!("writing {}", self.path.display()))
    }
}

/// The output must be a file of its own: not a device or a pipe, and not the input, whatever it is called.
fn check_file(output: &File, path: &Path, input: &Path) -> anyhow::Result<()> {
    let metadata = output.metadata().with_context(|| format!("--output-file {}", path.display()))?;
    anyhow::ensure!(metadata.is_file(), "--output-file {}: it is not a regular file", path.display());
    let asked = std::fs::metadata(input).with_context(|| format!("--input-file {}", input.display()))?;
    anyhow::ensure!(
        (metadata.dev(), metadata.ino()) != (asked.dev(), asked.ino()),
        "--output-file {}: it is the input file; name another output file",
        path.display()
    );
    Ok(())
}

/// Two processes that write into one file would mix their lines.
fn lock(file: &File, path: &Path) -> anyhow::Result<()> {
    match file.try_lock() {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => {
            anyhow::bail!("--output-file {}: another process is writing it", path.display())
        }
        Err(TryLockError::Error(error)) if error.kind() == ErrorKind::Unsupported => {
            tracing::warn!(
                "{}: its file system has no locks; do not run two batches into it",
                path.display()
            );
            Ok(())
        }
        Err(TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("locking --output-file {}", path.display()))
        }
    }
}

/// Compares an output file with the beginning of `input`; returns how many lines are answered, and their bytes.
fn check_answers(output: &mut impl BufRead, path: &Path, input: &Path) -> anyhow::Result<(usize, u64)> {
    let refuse = |number: usize, problem: &str| {
        let (path, input) = (path.display(), input.display());
        anyhow::anyhow!(
            "{path}: line {number} {problem} of {input}; nothing was changed: name another output file"
        )
    };
    let mut requests = lines(input)?;
    let (mut num_done, mut num_bytes) = (0, 0);
    let mut text = Vec::new();
    loop {
        text.clear();
        output.read_until(b'\n', &mut text).with_context(|| format!("reading {}", path.display()))?;
        if text.is_empty() {
            return Ok((num_done, num_bytes));
        }
        let number = num_done + 1;
        let Some(asked) = requests.next().transpose()? else {
            return Err(refuse(number, "comes after the answer to the last line"));
        };
        if text.last() != Some(&b'\n') {
            return match is_torn_answer(&text, &asked) {
                true => Ok((num_done, num_bytes)),
                false => Err(refuse(number, "has no end, and is not the beginning of an answer to a line")),
            };
        }
        match serde_json::from_slice::<Value>(&text) {
            Ok(answer) if is_answer(&answer) && answer["custom_id"] == asked.custom_id => {}
            Ok(answer) if is_answer(&answer) => {
                let problem =
                    format!("belongs to another batch: its custom_id is not that of line {}", asked.number);
                return Err(refuse(number, &problem));
            }
            _ => return Err(refuse(number, "is not an answer to a line")),
        }
        num_done = number;
        num_bytes += text.len() as u64;
    }
}

fn is_answer(value: &Value) -> bool {
    let Value::Object(fields) = value else { return false };
    ["custom_id", "response", "error"].iter().all(|name| fields.contains_key(*name))
}

/// Whether `text` can be what a kill left of the answer to `asked`.
fn is_torn_answer(text: &[u8], asked: &Line) -> bool {
    let start = answer_start(asked.number, &asked.custom_id);
    let num_bytes = text.len().min(start.len());
    text[..num_bytes] == start.as_bytes()[..num_bytes]
}

/// How every answer begins.
fn answer_start(number: usize, custom_id: &Value) -> String {
    format!("{{\"id\":\"{}\",\"custom_id\":{custom_id},", answer_id(number))
}

/// `id` of the answer to a line.
pub(crate) fn answer_id(number: usize) -> String {
    format!("batch_req_{number}")
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str =
        r#"{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}"#;

    #[test]
    fn lines_that_are_no_requests_keep_their_place() {
        assert!(parse(1, LINE.as_bytes()).request.is_ok());
        assert!(parse(1, b"{").request.is_err_and(|e| e.contains("not JSON")));
        assert!(parse(1, b"{\"custom_id\": \"\xff\"}").request.is_err_and(|e| e.contains("not UTF-8")));
        let get = parse(2, LINE.replace("POST", "GET").as_bytes());
        assert!(get.request.is_err_and(|e| e.contains("GET")));
        assert_eq!(get.custom_id, "a");
        assert!(parse(3, br#"{"custom_id": "b", "url": "u"}"#).request.is_err_and(|e| e.contains("body")));
    }
}
