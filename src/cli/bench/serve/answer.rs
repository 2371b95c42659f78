//! One streamed answer: its text, how many tokens, and when they came. Reads the bodies of chat and of completions.

use std::time::{Duration, Instant};

use bytes::Bytes;
use serde_json::Value;

use super::client::{Client, refusal};

/// What became of a request. Times are in seconds.
#[derive(Debug, Clone, Default)]
pub(super) struct Answer {
    /// Why it failed; empty if it did not.
    pub(super) error: String,
    /// From the start of the run.
    pub(super) start: f64,
    /// Time to the first token.
    pub(super) ttft: f64,
    /// Times between tokens that arrived apart.
    pub(super) itl: Vec<f64>,
    /// From sending to the last token.
    pub(super) latency: f64,
    /// Tokens of the prompt, by the client's count.
    pub(super) input_len: usize,
    /// Tokens of the prompt as the server counts them (with template and pictures), if it says.
    pub(super) server_input_len: Option<usize>,
    pub(super) output_len: usize,
    pub(super) text: String,
}

impl Answer {
    pub(super) fn is_success(&self) -> bool {
        self.error.is_empty()
    }

    /// Seconds a token after the first; `None` of fewer than two.
    pub(super) fn tpot(&self) -> Option<f64> {
        let later = self.output_len.checked_sub(1).filter(|later| *later > 0)?;
        Some((self.latency - self.ttft) / later as f64)
    }
}

/// Sends `body` and reads its answer to the end. Never fails: what went wrong is in the answer.
pub(super) async fn ask(
    client: &Client,
    path: &str,
    body: Bytes,
    input_len: usize,
    timeout: Duration,
) -> Answer {
    let mut reading = Reading::new(input_len);
    let outcome = tokio::time::timeout(timeout, read(client, path, body, &mut reading)).await;
    let mut answer = reading.answer;
    answer.error = match outcome {
        Ok(Ok(())) => String::new(),
        // An empty text would count as success.
        Ok(Err(error)) => format!("{error:#}"),
        Err(_) => format!("no end after {} s (--request-timeout)", timeout.as_secs()),
    };
    if answer.output_len == 0 {
        // A server that sends no usage: pieces of text are the best count there is.
        answer.output_len = reading.num_pieces;
    }
    answer
}

async fn read(client: &Client, path: &str, body: Bytes, reading: &mut Reading) -> anyhow::Result<()> {
    let mut reply = client.post(path, body).await?;
    if reply.status() != 200 {
        let status = reply.status();
        anyhow::bail!("{}", refusal(status, &reply.text().await?));
    }
    let mut lines = Lines::default();
    while let Some(bytes) = reply.next().await? {
        let now = Instant::now();
        for line in lines.push(&bytes) {
            reading.line(&line, now)?;
        }
    }
    anyhow::ensure!(reading.is_done, "the stream ended without [DONE]");
    reply.finish();
    Ok(())
}

/// What has been read of an answer.
struct Reading {
    answer: Answer,
    sent: Instant,
    last: Instant,
    num_pieces: usize,
    is_done: bool,
}

impl Reading {
    fn new(input_len: usize) -> Self {
        let now = Instant::now();
        let answer = Answer { input_len, ..Answer::default() };
        Self { answer, sent: now, last: now, num_pieces: 0, is_done: false }
    }

    /// A line of the stream. Comments and other fields than `data` say nothing about tokens.
    fn line(&mut self, line: &str, now: Instant) -> anyhow::Result<()> {
        let Some(data) = line.strip_prefix("data:").map(str::trim) else { return Ok(()) };
        if data == "[DONE]" {
            self.is_done = true;
            return Ok(());
        }
        let chunk: Value = serde_json::from_str(data)?;
        if let Some(error) = chunk.get("error").filter(|error| !error.is_null()) {
            anyhow::bail!("{}", error["message"].as_str().unwrap_or("the answer broke off"));
        }
        if let Some(text) = token_text(&chunk["choices"][0]) {
            self.token(&text, now);
        }
        let usage = &chunk["usage"];
        let count = |name: &str| usage[name].as_u64().and_then(|count| usize::try_from(count).ok());
        self.answer.output_len = count("completion_tokens").unwrap_or(self.answer.output_len);
        self.answer.server_input_len = count("prompt_tokens").or(self.answer.server_input_len);
        Ok(())
    }

    fn token(&mut self, text: &str, now: Instant) {
        let answer = &mut self.answer;
        if self.num_pieces == 0 {
            answer.ttft = (now - self.sent).as_secs_f64();
        } else {
            answer.itl.push((now - self.last).as_secs_f64());
        }
        answer.latency = (now - self.sent).as_secs_f64();
        answer.text.push_str(text);
        self.num_pieces += 1;
        self.last = now;
    }
}

/// The text of a chunk that brings a token; empty where a token has no text of its own. `None` of chunks that only open or
/// end a choice.
fn token_text(choice: &Value) -> Option<String> {
    let delta = choice.get("delta").unwrap_or(choice);
    let text = |name: &str| delta[name].as_str().unwrap_or_default();
    let reasoning = if delta["reasoning"].is_string() { "reasoning" } else { "reasoning_content" };
    let whole = [text(reasoning), text("content"), text("text")].concat();
    let has_calls = delta["tool_calls"].as_array().is_some_and(|calls| !calls.is_empty());
    let opens = delta.get("role").is_some();
    let ends = choice["finish_reason"].is_string();
    let is_token = choice.is_object() && !opens && !ends;
    (!whole.is_empty() || has_calls || is_token).then_some(whole)
}

/// Bytes to whole lines.
#[derive(Default)]
struct Lines(Vec<u8>);

impl Lines {
    fn push(&mut self, bytes: &[u8]) -> Vec<String> {
        self.0.extend_from_slice(bytes);
        let Some(end) = self.0.iter().rposition(|byte| *byte == b'\n') else { return Vec::new() };
        let rest = self.0.split_off(end + 1);
        let whole = std::mem::replace(&mut self.0, rest);
        String::from_utf8_lossy(&whole).lines().map(str::to_owned).collect()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;
    use crate::cli::bench::serve::block_on;

    const STREAM: &str = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n";

    /// The answer of a server that sends `response` to whatever it is asked; then it closes the connection, or keeps it open
    /// and says nothing more.
    fn answer_of(response: String, closes: bool, timeout: Duration) -> Answer {
        let talk = async move {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let url = format!("http://{}", listener.local_addr().unwrap());
            let server = tokio::spawn(async move {
                let (mut stream, _) = listener.accept().await.unwrap();
                // A part of the request is enough: its body is small.
                assert!(stream.read(&mut [0; 4096]).await.unwrap() > 0, "a request comes");
                stream.write_all(response.as_bytes()).await.unwrap();
                if !closes {
                    std::future::pending::<()>().await;
                }
            });
            let client = Client::new(&url, None).unwrap();
            let answer = ask(&client, "/v1/completions", Bytes::from_static(b"{}"), 3, timeout).await;
            server.abort();
            answer
        };
        block_on(talk).unwrap()
    }

    fn chunk(text: &str) -> String {
        format!("data: {}\n\n", json!({"choices": [{"text": text, "finish_reason": null}]}))
    }

    #[test]
    fn every_way_to_end_badly_is_a_failed_answer() {
        let long = Duration::from_secs(30);
        let begun = format!("{STREAM}{}{}", chunk("a"), chunk("b"));
        let whole = answer_of(format!("{begun}data: [DONE]\n\n"), true, long);
        assert!(whole.is_success(), "{}", whole.error);
        // Without usage, pieces are counted.
        assert_eq!((whole.output_len, whole.text.as_str(), whole.input_len), (2, "ab", 3));
        for (response, closes, timeout, expected) in [
            (begun.clone(), true, long, "without [DONE]"),
            (begun, false, Duration::from_millis(100), "--request-timeout"),
            (format!("{STREAM}data: {{\n\n"), true, long, "EOF"),
            ("HTTP/1.1 503 x\r\nContent-Length: 4\r\n\r\nbusy".into(), true, long, "HTTP 503: busy"),
            (String::new(), true, long, "the connection broke"),
            ("nonsense\r\n\r\n".into(), true, long, "the connection broke"),
        ] {
            let answer = answer_of(response.clone(), closes, timeout);
            assert!(!answer.is_success() && answer.error.contains(expected), "{response}: {}", answer.error);
        }
    }

    #[test]
    fn lines_are_whole_whatever_the_pieces() {
        let text = "data: {\"a\": \"\u{e9}\"}\r\n\r\n: ping\ndata: [DONE]\n\n";
        for size in 1..text.len() {
            let mut lines = Lines::default();
            let all: Vec<String> = text.as_bytes().chunks(size).flat_map(|piece| lines.push(piece)).collect();
            assert_eq!(all.join("|"), "data: {\"a\": \"\u{e9}\"}||: ping|data: [DONE]|", "pieces of {size}");
        }
    }

    #[test]
    fn only_tokens_are_timed() {
        let mut reading = Reading::new(5);
        let sent = reading.sent;
        let mut line = |ms: u64, chunk: Value| {
            reading.line(&format!("data: {chunk}"), sent + Duration::from_millis(ms)).unwrap();
        };
        let delta = |delta: Value| json!({"choices": [{"delta": delta, "finish_reason": null}]});
        line(10, delta(json!({"role": "assistant", "content": ""})));
        line(20, delta(json!({"reasoning": "hm", "reasoning_content": "hm"})));
        line(30, delta(json!({"content": ""})));
        line(50, delta(json!({"content": "Yes"})));
        line(90, json!({"choices": [{"delta": {}, "finish_reason": "stop"}]}));
        line(95, json!({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}));
        reading.line("data: [DONE]", sent).unwrap();
        let Reading { answer, is_done, .. } = reading;
        assert!(is_done && answer.text == "hmYes");
        assert_eq!((answer.ttft, answer.latency), (0.02, 0.05));
        assert!((answer.itl[0] - 0.01).abs() < 1e-9 && (answer.itl[1] - 0.02).abs() < 1e-9);
        assert_eq!((answer.output_len, answer.server_input_len), (3, Some(7)));
        assert!((answer.tpot().unwrap() - 0.015).abs() < 1e-9);
    }

    #[test]
    fn an_error_in_the_stream_is_one() {
        let mut reading = Reading::new(1);
        let error = reading.line(r#"data: {"error": {"message": "out of luck"}}"#, Instant::now());
        assert_eq!(error.unwrap_err().to_string(), "out of luck");
        assert!(reading.line("data: {", Instant::now()).is_err());
        assert!(reading.line(": keep-alive", Instant::now()).is_ok());
    }
}
