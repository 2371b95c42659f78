//! Random prompts through an engine of token ids, and when their tokens came. Prints nothing.

use std::time::{Duration, Instant};

use anyhow::{bail, ensure};
use futures_util::{StreamExt, TryStreamExt, stream};
use spark_engine::{
    EngineHandle,
    api::{Engine, Event, FinishReason, Limits, Request, SamplingParams},
};

/// Random token ids, without any that mean a picture or an end.
pub(super) struct Prompts {
    random: fastrand::Rng,
    vocab_size: u32,
    special: Vec<u32>,
}

impl Prompts {
    /// Equal seeds give equal prompts.
    pub(super) fn new(limits: &Limits, seed: u64) -> Self {
        let mut special = limits.eos_token_ids.clone();
        special.extend(limits.image_token_id);
        special.extend(limits.video_token_id);
        Self { random: fastrand::Rng::with_seed(seed), vocab_size: limits.vocab_size as u32, special }
    }

    /// `count` prompts of `len` tokens, different from all before.
    pub(super) fn take(&mut self, count: usize, len: usize) -> Vec<Vec<u32>> {
        (0..count).map(|_| (0..len).map(|_| self.token()).collect()).collect()
    }

    fn token(&mut self) -> u32 {
        loop {
            let token = self.random.u32(0..self.vocab_size);
            if !self.special.contains(&token) {
                return token;
            }
        }
    }
}

/// When the tokens of one request came.
pub(super) struct Answer {
    submitted: Instant,
    tokens: Vec<Instant>,
}

impl Answer {
    /// Seconds to the first token.
    pub(super) fn ttft(&self) -> f64 {
        self.tokens.first().map_or(0.0, |first| (*first - self.submitted).as_secs_f64())
    }

    /// Seconds a token after the first; `None` of a single one.
    pub(super) fn tpot(&self) -> Option<f64> {
        let (first, last) = (self.tokens.first()?, self.tokens.last()?);
        let later = self.tokens.len() - 1;
        (later > 0).then(|| (*last - *first).as_secs_f64() / later as f64)
    }
}

/// What happened when prompts were answered.
pub(super) struct Run {
    pub(super) answers: Vec<Answer>,
    pub(super) elapsed: Duration,
    began: Instant,
    num_prompt_tokens: usize,
    /// Steps that the engine took.
    pub(super) num_steps: u64,
}

impl Run {
    /// Generated tokens.
    pub(super) fn num_output_tokens(&self) -> usize {
        self.answers.iter().map(|answer| answer.tokens.len()).sum()
    }

    /// Tokens of all prompts.
    pub(super) fn num_prompt_tokens(&self) -> usize {
        self.num_prompt_tokens
    }

    /// Prompt tokens a second, until every request had its first token.
    pub(super) fn prefill_speed(&self) -> f64 {
        let seconds = self.last_first_token().map_or(0.0, |at| (at - self.began).as_secs_f64());
        self.num_prompt_tokens as f64 / seconds.max(1e-9)
    }

    /// Generated tokens a second once every request had its first token: decode alone. `None` if all were at their ends by
    /// then.
    pub(super) fn decode_speed(&self) -> Option<f64> {
        let from = self.last_first_token()?;
        let later = self.answers.iter().flat_map(|answer| &answer.tokens).filter(|at| **at > from);
        let (count, end) = later.fold((0, from), |(count, end), at| (count + 1, end.max(*at)));
        (count > 0).then(|| f64::from(count) / (end - from).as_secs_f64().max(1e-9))
    }

    /// Generated tokens a second over all of it, prefill included.
    pub(super) fn output_speed(&self) -> f64 {
        self.num_output_tokens() as f64 / self.elapsed.as_secs_f64().max(1e-9)
    }

    fn last_first_token(&self) -> Option<Instant> {
        self.answers.iter().filter_map(|answer| answer.tokens.first()).max().copied()
    }
}

/// Answers `prompts` greedily with `output_len` tokens each, at most `max_concurrency` at once. Blocks.
pub(super) fn drive(
    engine: &EngineHandle,
    prompts: Vec<Vec<u32>>,
    output_len: usize,
    max_concurrency: usize,
) -> anyhow::Result<Run> {
    ensure!(!prompts.is_empty(), "no prompts to answer");
    let limits = &engine.info().limits;
    let num_prompt_tokens = prompts.iter().map(Vec::len).sum();
    let sampling = SamplingParams { ignore_eos: true, ..SamplingParams::greedy(output_len) };
    let requests =
        prompts.into_iter().map(|prompt| Request::new(prompt, Vec::new(), sampling.clone(), limits));
    let requests = requests.collect::<Result<Vec<_>, _>>()?;
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    let (began, steps_before) = (Instant::now(), engine.stats().num_steps);
    let answers = stream::iter(requests).map(|request| answer(engine, request));
    let answers = answers.buffer_unordered(max_concurrency.max(1));
    let answers: Vec<Answer> = runtime.block_on(answers.try_collect())?;
    let elapsed = began.elapsed();
    let num_steps = engine.stats().num_steps - steps_before;
    Ok(Run { answers, elapsed, began, num_prompt_tokens, num_steps })
}

async fn answer(engine: &EngineHandle, request: Request) -> anyhow::Result<Answer> {
    let mut answer = Answer { submitted: Instant::now(), tokens: Vec::new() };
    let mut events = engine.submit(request)?;
    loop {
        match events.recv().await {
            Some(Event::Prompt { .. }) => {}
            Some(Event::Token(_)) => answer.tokens.push(Instant::now()),
            Some(Event::Finished(finished)) => match finished.reason {
                FinishReason::Length => return Ok(answer),
                FinishReason::EngineFailed(message) => bail!("the engine has failed: {message}"),
                other => bail!("a request ended early: {other:?}"),
            },
            None => bail!("the engine has ended"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers that begin at 0; tokens at the given milliseconds.
    fn run(tokens: &[&[u64]], elapsed: u64) -> Run {
        let began = Instant::now();
        let at = |ms: &u64| began + Duration::from_millis(*ms);
        let answers = tokens.iter();
        let answers =
            answers.map(|times| Answer { submitted: began, tokens: times.iter().map(at).collect() });
        let elapsed = Duration::from_millis(elapsed);
        Run { answers: answers.collect(), elapsed, began, num_prompt_tokens: 200, num_steps: 4 }
    }

    #[test]
    fn speeds_are_of_their_phases() {
        let run = run(&[&[100, 150, 200, 250], &[120, 170, 220, 270]], 300);
        assert!((run.prefill_speed() - 200.0 / 0.12).abs() < 1e-6);
        // 3 + 3 tokens from 120 to 270 ms.
        assert!((run.decode_speed().unwrap() - 6.0 / 0.15).abs() < 1e-6);
        assert!((run.output_speed() - 8.0 / 0.3).abs() < 1e-6);
        assert!((run.answers[1].ttft() - 0.12).abs() < 1e-9);
        assert!((run.answers[1].tpot().unwrap() - 0.05).abs() < 1e-9);
    }

    #[test]
    fn a_single_token_is_no_decode() {
        let run = run(&[&[100]], 100);
        assert_eq!((run.decode_speed(), run.answers[0].tpot()), (None, None));
    }

    #[test]
    fn prompts_are_repeatable_and_have_no_special_tokens() {
        let limits = Limits { vocab_size: 20, eos_token_ids: vec![3], image_token_id: Some(7), ..limits() };
        let tokens = Prompts::new(&limits, 5).take(3, 50);
        assert!(tokens.iter().flatten().all(|&token| token < 20 && token != 3 && token != 7));
        assert_eq!(tokens, Prompts::new(&limits, 5).take(3, 50));
        assert_ne!(tokens[0], tokens[1]);
    }

    fn limits() -> Limits {
        Limits {
            max_model_len: 100,
            vocab_size: 20,
            max_logprobs: 0,
            max_media_tokens: 0,
            media_geometry: None,
            max_media: 0,
            image_token_id: None,
            video_token_id: None,
            eos_token_ids: Vec::new(),
        }
    }
}
