//! One line in the log for each request that reached the engine: what it took and how it ended, never what it said.

use std::{sync::Arc, time::Instant};

use parking_lot::Mutex;
use spark_api::Finished;

use crate::{
    Observers, Phases, RequestReport, TraceParent,
    metrics::{Metrics, Outcome},
};

/// What is known of a request before its first sequence.
pub(crate) struct About {
    /// The request's name: a client may have chosen it.
    pub(crate) id: String,
    pub(crate) model: String,
    pub(crate) arrived: Instant,
    pub(crate) n: usize,
    pub(crate) max_tokens: usize,
    pub(crate) temperature: f32,
    pub(crate) top_p: f32,
    pub(crate) num_images: usize,
    pub(crate) trace: Option<TraceParent>,
}

/// Who learns of it in the end.
pub(crate) struct Readers {
    /// Whether there is a line in the log.
    pub(crate) is_logged: bool,
    pub(crate) observers: Observers,
    pub(crate) metrics: Arc<Metrics>,
}

/// What all sequences of one request have in common; told when the last of them is gone.
pub(crate) struct Summary {
    about: About,
    readers: Readers,
    counts: Mutex<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    prompt_tokens: usize,
    cached_tokens: usize,
    output_tokens: usize,
    sequences: usize,
    longest: usize,
    first_token: Option<Instant>,
    phases: Option<Phases>,
    /// How sequences ended, each once.
    ends: Vec<&'static str>,
}

impl Summary {
    /// Of a request without sequences so far.
    pub(crate) fn new(mut about: About, readers: Readers) -> Self {
        about.id =
            about.id.chars().map(|char| if char.is_control() { '?' } else { char }).take(200).collect();
        Self { about, readers, counts: Mutex::default() }
    }

    /// The prompt of a sequence was looked up.
    pub(crate) fn prompt(&self, prompt_tokens: usize, cached_tokens: usize) {
        let mut counts = self.counts.lock();
        counts.prompt_tokens += prompt_tokens;
        counts.cached_tokens += cached_tokens;
    }

    /// The first token of a sequence came.
    pub(crate) fn first_token(&self, now: Instant) {
        self.counts.lock().first_token.get_or_insert(now);
    }

    /// A sequence has ended after `output_tokens`. `finished` is what the engine says about it, if it had the last word.
    pub(crate) fn ended(&self, outcome: Outcome, output_tokens: usize, finished: Option<&Finished>) {
        let mut counts = self.counts.lock();
        counts.sequences += 1;
        counts.output_tokens += output_tokens;
        counts.longest = counts.longest.max(output_tokens);
        if let Some(Finished { timings, .. }) = finished {
            let phases = Phases {
                queued: timings.queued,
                prefill: timings.prefill,
                decode: timings.decode,
                num_preemptions: timings.num_preemptions,
            };
            counts.phases = Some(counts.phases.unwrap_or_default().or_longer(phases));
        }
        if !counts.ends.contains(&outcome.label()) {
            counts.ends.push(outcome.label());
        }
    }
}

impl Counts {
    fn report(self, about: &About) -> RequestReport {
        RequestReport {
            id: about.id.clone(),
            model: about.model.clone(),
            arrived: about.arrived,
            ended: Instant::now(),
            n: about.n,
            max_tokens: about.max_tokens,
            temperature: about.temperature,
            top_p: about.top_p,
            num_images: about.num_images,
            num_sequences: self.sequences,
            num_prompt_tokens: self.prompt_tokens,
            num_cached_tokens: self.cached_tokens,
            num_output_tokens: self.output_tokens,
            time_to_first_token: self.first_token.map(|first| first.saturating_duration_since(about.arrived)),
            phases: self.phases,
            ends: self.ends,
            trace: about.trace.clone(),
        }
    }
}

impl Drop for Summary {
    fn drop(&mut self) {
        let counts = std::mem::take(self.counts.get_mut());
        if counts.sequences == 0 {
            return;
        }
        let (first_token, longest) = (counts.first_token, counts.longest);
        let report = counts.report(&self.about);
        self.readers.metrics.request(longest, &report);
        if self.readers.is_logged {
            log(&report, first_token);
        }
        self.readers.observers.tell(&report);
    }
}

fn log(report: &RequestReport, first_token: Option<Instant>) {
    let rate = first_token.map_or(0.0, |first| rate(report.num_output_tokens, first.elapsed().as_secs_f64()));
    let total = report.ended.saturating_duration_since(report.arrived);
    tracing::info!(
        id = %report.id,
        prompt_tokens = report.num_prompt_tokens,
        cached_tokens = report.num_cached_tokens,
        output_tokens = report.num_output_tokens,
        sequences = report.num_sequences,
        queued_ms = report.phases.map(|phases| rounded(phases.queued.as_secs_f64() * 1e3)),
        ttft_ms = report.time_to_first_token.map(|time| rounded(time.as_secs_f64() * 1e3)),
        total_ms = rounded(total.as_secs_f64() * 1e3),
        tokens_per_s = rounded(rate),
        finish = report.ends.join(","),
        "request"
    );
}

/// Tokens after the first, per second; 0 when there is none to measure.
#[allow(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
fn rate(output_tokens: usize, seconds: f64) -> f64 {
    if output_tokens > 1 && seconds > 0.0 { (output_tokens - 1) as f64 / seconds } else { 0.0 }
}

/// One decimal is what a person reads.
fn rounded(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use spark_api::{FinishReason, RequestTimings};

    use super::*;
    use crate::Observer;

    /// Keeps what it is told.
    #[derive(Default)]
    struct Kept(Mutex<Vec<RequestReport>>);

    impl Observer for Kept {
        fn request(&self, report: &RequestReport) {
            self.0.lock().push(report.clone());
        }
    }

    fn summary(id: &str, kept: &Arc<Kept>) -> Summary {
        let about = About {
            id: id.to_owned(),
            model: "m".to_owned(),
            arrived: Instant::now(),
            n: 3,
            max_tokens: 5,
            temperature: 0.5,
            top_p: 1.0,
            num_images: 0,
            trace: None,
        };
        let mut observers = Observers::default();
        observers.add(kept.clone());
        Summary::new(about, Readers { is_logged: false, observers, metrics: Arc::new(Metrics::new(16)) })
    }

    fn finished(queued: u64, num_preemptions: usize) -> Finished {
        let timings = RequestTimings {
            arrived: Instant::now(),
            queued: Duration::from_millis(queued),
            prefill: Duration::from_millis(1),
            decode: Duration::from_millis(2),
            num_preemptions,
        };
        Finished { reason: FinishReason::Eos, num_output_tokens: 1, timings }
    }

    #[test]
    fn a_name_cannot_write_lines() {
        assert_eq!(summary("a\r\n\u{1b}[31mINFO", &Arc::default()).about.id, "a???[31mINFO");
    }

    #[test]
    fn sequences_add_up_and_are_told_of_once() {
        let kept = Arc::new(Kept::default());
        let summary = summary("x", &kept);
        summary.prompt(10, 4);
        for (outcome, tokens, queued) in
            [(Outcome::Stop, 3, 7), (Outcome::Length, 5, 9), (Outcome::Stop, 1, 2)]
        {
            summary.ended(outcome, tokens, Some(&finished(queued, tokens)));
        }
        assert!(kept.0.lock().is_empty());
        drop(summary);
        let reports = kept.0.lock();
        let [report] = &reports[..] else { panic!("{reports:?}") };
        assert_eq!((report.num_output_tokens, report.num_sequences, report.num_cached_tokens), (9, 3, 4));
        assert_eq!(report.ends, ["stop", "length"]);
        let phases = report.phases.unwrap();
        assert_eq!((phases.queued, phases.num_preemptions), (Duration::from_millis(9), 5));
        assert_eq!((rate(11, 2.0), rate(1, 2.0)), (5.0, 0.0));
    }

    #[test]
    fn a_request_that_never_began_is_not_told_of() {
        let kept = Arc::new(Kept::default());
        drop(summary("x", &kept));
        assert!(kept.0.lock().is_empty());
    }
}
