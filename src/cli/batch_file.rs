//! The two files of a batch: reading requests line by line, and an output that can be taken up again after a kill.

use std::{
    fs::{File, OpenOptions},
    io::{BufRead, BufReader, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use anyhow::Context;
use serde::Deserialize;
use serde_json::Value;

/// A line of the input.
pub(crate) struct Line {
    /// Counted from 1, blank lines left out.
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
    Ok(texts(input)?.enumerate().map(|(i, text)| Ok(parse(i + 1, &text?))))
}

fn texts(input: &Path) -> anyhow::Result<impl Iterator<Item = anyhow::Result<String>>> {
    let path = input.to_owned();
    let file = File::open(input).with_context(|| format!("--input-file {}", input.display()))?;
    let texts = BufReader::new(file).lines();
    let texts = texts.map(move |text| text.with_context(|| format!("reading {}", path.display())));
    Ok(texts.filter(|text| !text.as_ref().is_ok_and(|text| text.trim().is_empty())))
}

fn parse(number: usize, text: &str) -> Line {
    let value: Value = match serde_json::from_str(text) {
        Ok(value) => value,
        Err(error) => {
            return Line { number, custom_id: Value::Null, request: Err(format!("not JSON: {error}")) };
        }
    };
    let custom_id = value.get("custom_id").cloned().unwrap_or_default();
    let request = serde_json::from_value::<BatchRequest>(value).map_err(|error| error.to_string());
    let request = request.and_then(|request| match request.method.as_str() {
        "POST" => Ok(request),
        other => Err(format!("method is {other:?}; only POST is supported")),
    });
    Line { number, custom_id, request }
}

/// The output file: whole lines only, in the order of the input.
pub(crate) struct Output {
    file: File,
    path: PathBuf,
    num_done: usize,
}

impl Output {
    /// Opens or creates `path`. A last line without its newline is what a kill left: it is cut off. Lines that are
    /// there must answer the first lines of `input`.
    pub(crate) fn open(path: &Path, input: &Path) -> anyhow::Result<Self> {
        let context = || format!("--output-file {}", path.display());
        let mut options = OpenOptions::new();
        let mut file =
            options.read(true).write(true).create(true).truncate(false).open(path).with_context(context)?;
        let mut requests = lines(input)?;
        let (mut num_done, mut whole) = (0, 0u64);
        let mut reader = BufReader::new(&mut file);
        let mut text = Vec::new();
        loop {
            text.clear();
            let read = reader.read_until(b'\n', &mut text).with_context(context)?;
            if read == 0 || text.last() != Some(&b'\n') {
                break;
            }
            let answered: Value = serde_json::from_slice(&text)
                .with_context(|| format!("{}: line {} is not JSON", path.display(), num_done + 1))?;
            let asked = requests.next().transpose()?;
            anyhow::ensure!(
                asked.is_some_and(|line| line.custom_id == answered["custom_id"]),
                "{}: line {} does not answer line {} of {}: it belongs to another batch; name another output file",
                path.display(),
                num_done + 1,
                num_done + 1,
                input.display()
            );
            num_done += 1;
            whole += read as u64;
        }
        file.set_len(whole).with_context(context)?;
        file.seek(SeekFrom::End(0)).with_context(context)?;
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

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str =
        r#"{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}"#;

    #[test]
    fn lines_that_are_no_requests_keep_their_place() {
        assert!(parse(1, LINE).request.is_ok());
        assert!(parse(1, "{").request.is_err_and(|e| e.contains("not JSON")));
        let get = parse(2, &LINE.replace("POST", "GET"));
        assert!(get.request.is_err_and(|e| e.contains("GET")));
        assert_eq!(get.custom_id, "a");
        assert!(parse(3, r#"{"custom_id": "b", "url": "u"}"#).request.is_err_and(|e| e.contains("body")));
    }
}
