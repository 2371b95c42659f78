//! One run: every prompt at its time, over the network, and what came back. Prints nothing but a bar.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use bytes::Bytes;
use serde_json::{Map, Value, json};
use tokio::{sync::Semaphore, task::JoinSet};

use super::{
    answer::{Answer, ask},
    arrivals::Arrivals,
    client::Client,
    dataset::Prompt,
};
use crate::cli::progress::count_bar;

/// Which API is spoken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Backend {
    /// Completions.
    #[value(alias = "vllm", alias = "openai-completions")]
    Openai,
    /// Chat completions.
    OpenaiChat,
}

impl Backend {
    /// Its name in vLLM's reports.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Openai => "openai",
            Self::OpenaiChat => "openai-chat",
        }
    }

    pub(super) fn default_path(self) -> &'static str {
        match self {
            Self::Openai => "/v1/completions",
            Self::OpenaiChat => "/v1/chat/completions",
        }
    }
}

/// Where requests go, and what is the same in all of them.
#[derive(Clone)]
pub(super) struct Target {
    pub(super) client: Client,
    pub(super) backend: Backend,
    pub(super) path: String,
    pub(super) model: String,
    /// Answers run to their full length.
    pub(super) ignore_eos: bool,
    /// Further fields of every body; they win.
    pub(super) extra_body: Map<String, Value>,
    pub(super) timeout: Duration,
}

impl Target {
    /// The body of a request, in the form that `vllm bench serve` sends.
    fn body(&self, prompt: &Prompt) -> Bytes {
        let mut body = match self.backend {
            Backend::Openai => {
                json!({"model": self.model, "prompt": prompt.text, "max_tokens": prompt.output_len})
            }
            Backend::OpenaiChat => {
                let image = |url: &String| json!({"type": "image_url", "image_url": {"url": url}});
                let mut parts = vec![json!({"type": "text", "text": prompt.text})];
                parts.extend(prompt.images.iter().map(image));
                json!({"model": self.model, "messages": [{"role": "user", "content": parts}],
                    "max_completion_tokens": prompt.output_len})
            }
        };
        body["stream"] = json!(true);
        body["stream_options"] = json!({"include_usage": true});
        if self.ignore_eos {
            body["ignore_eos"] = json!(true);
        }
        for (name, value) in &self.extra_body {
            body[name] = value.clone();
        }
        Bytes::from(body.to_string())
    }

    /// One request that does not count: a server that refuses it would refuse all.
    ///
    /// # Errors
    /// What the server says.
    pub(super) async fn try_once(&self, prompt: &Prompt) -> anyhow::Result<()> {
        let answer = ask(&self.client, &self.path, self.body(prompt), prompt.input_len, self.timeout).await;
        ensure!(answer.is_success(), "the first request has failed, so no other is sent: {}", answer.error);
        Ok(())
    }
}

/// How requests are spread over time.
#[derive(Debug, Clone, Copy)]
pub(super) struct Load {
    pub(super) arrivals: Arrivals,
    /// Most requests at once; others wait, and their clock does not run yet.
    pub(super) max_concurrency: Option<usize>,
    pub(super) seed: u64,
}

/// Sends all `prompts`; returns their answers in order, and how many seconds it took.
///
/// # Errors
/// When a task breaks off, which is a defect.
pub(super) async fn drive(
    target: &Target,
    prompts: &[Prompt],
    load: Load,
) -> anyhow::Result<(Vec<Answer>, f64)> {
    let times = load.arrivals.times(prompts.len(), &mut fastrand::Rng::with_seed(load.seed));
    // Made before the clock starts: pictures are megabytes of text.
    let bodies: Vec<Bytes> = prompts.iter().map(|prompt| target.body(prompt)).collect();
    let limit = load.max_concurrency.map(|limit| Arc::new(Semaphore::new(limit)));
    let bar = count_bar("bench serve");
    bar.set_length(prompts.len() as u64);
    let began = Instant::now();
    let mut tasks = JoinSet::new();
    for (idx, (body, at)) in bodies.into_iter().zip(times).enumerate() {
        tokio::time::sleep_until((began + Duration::from_secs_f64(at)).into()).await;
        let (target, limit, bar) = (target.clone(), limit.clone(), bar.clone());
        let input_len = prompts[idx].input_len;
        tasks.spawn(async move {
            let _permit = match &limit {
                Some(limit) => limit.acquire().await.ok(),
                None => None,
            };
            let start = began.elapsed().as_secs_f64();
            let answer = ask(&target.client, &target.path, body, input_len, target.timeout).await;
            bar.inc(1);
            (idx, Answer { start, ..answer })
        });
    }
    let mut answers = vec![Answer::default(); prompts.len()];
    while let Some(done) = tasks.join_next().await {
        let (idx, answer) = done.context("a request has broken off")?;
        answers[idx] = answer;
    }
    bar.finish_and_clear();
    Ok((answers, began.elapsed().as_secs_f64()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_are_those_of_vllm() {
        let target = |backend, ignore_eos| Target {
            client: Client::new("http://localhost:1", None).unwrap(),
            backend,
            path: String::new(),
            model: "m".into(),
            ignore_eos,
            extra_body: json!({"temperature": 0}).as_object().cloned().unwrap(),
            timeout: Duration::from_secs(1),
        };
        let prompt =
            Prompt { text: "a b".into(), images: vec!["data:x".into()], input_len: 2, output_len: 9 };
        let body = |target: Target| serde_json::from_slice::<Value>(&target.body(&prompt)).unwrap();
        let options = json!({"include_usage": true});
        assert_eq!(
            body(target(Backend::Openai, true)),
            json!({"model": "m", "prompt": "a b", "max_tokens": 9, "stream": true, "stream_options": options,
                "ignore_eos": true, "temperature": 0})
        );
        assert_eq!(
            body(target(Backend::OpenaiChat, false)),
            json!({"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "a b"},
                {"type": "image_url", "image_url": {"url": "data:x"}}]}], "max_completion_tokens": 9,
                "stream": true, "stream_options": options, "temperature": 0})
        );
    }
}
