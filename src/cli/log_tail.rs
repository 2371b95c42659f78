//! The last of the log, kept in memory for the report of a crash. Everything still goes to stderr.

use std::{collections::VecDeque, io, sync::LazyLock};

use parking_lot::Mutex;
use tracing_subscriber::fmt::MakeWriter;

/// Most bytes that are kept.
const MAX_BYTES: usize = 128 << 10;

/// The log of a process is one.
static TAIL: LazyLock<Mutex<VecDeque<u8>>> = LazyLock::new(|| Mutex::new(VecDeque::with_capacity(MAX_BYTES)));

/// Writes to stderr, and keeps the last of it.
#[derive(Clone, Copy)]
pub(crate) struct TeeStderr;

impl<'a> MakeWriter<'a> for TeeStderr {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        Self
    }
}

impl io::Write for TeeStderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        keep(bytes);
        io::stderr().write_all(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

/// Adds what does not go through the log.
pub(crate) fn keep(bytes: &[u8]) {
    let bytes = &bytes[bytes.len().saturating_sub(MAX_BYTES)..];
    let mut tail = TAIL.lock();
    let excess = (tail.len() + bytes.len()).saturating_sub(MAX_BYTES);
    tail.drain(..excess);
    tail.extend(bytes);
}

/// What is kept, in whole lines and without colours.
pub(crate) fn text() -> String {
    let tail = TAIL.lock();
    let bytes: Vec<u8> = tail.iter().copied().collect();
    let is_cut = tail.len() == MAX_BYTES;
    drop(tail);
    let text = without_colours(&String::from_utf8_lossy(&bytes));
    match text.split_once('\n') {
        Some((_, whole)) if is_cut => whole.to_owned(),
        _ => text,
    }
}

/// Without the escape sequences by which terminals change colours.
pub(crate) fn without_colours(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut pieces = text.split('\u{1b}');
    out.push_str(pieces.next().unwrap_or_default());
    for piece in pieces {
        let end = piece.find(|c: char| c.is_ascii_alphabetic()).map_or(piece.len(), |end| end + 1);
        out.push_str(&piece[end..]);
    }
    out
}

/// Also keeps the words of panics, which do not go through the log.
pub(crate) fn keep_panics() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        keep(format!("{panic}\n").as_bytes());
        before(panic);
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_whole_lines_are_kept_without_colours() {
        keep(b"first\n");
        for i in 0..20_000 {
            keep(format!("line {i} \u{1b}[32mINFO\u{1b}[0m\n").as_bytes());
        }
        let text = text();
        assert!(text.len() <= MAX_BYTES && text.ends_with("line 19999 INFO\n"), "{}", text.len());
        assert!(text.lines().all(|line| line.starts_with("line ") && line.ends_with(" INFO")));
        keep(&vec![b'x'; 2 * MAX_BYTES]);
        assert_eq!(TAIL.lock().len(), MAX_BYTES);
    }
}
