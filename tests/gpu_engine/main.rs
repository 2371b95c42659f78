//! The whole engine on a GPU against the CPU backend. Not part of a plain test run (`.config/nextest.toml`): these tests need
//! a GPU and fail without one. `cargo xtask gpu-test` builds this program and its kernels; it runs where the repository's
//! files are, or where SPARK_ROOT names their folder.
#![allow(clippy::unwrap_used, reason = "all of this is test code: a panic is a failed test")]
#![expect(clippy::print_stdout, reason = "what was compared is part of the result")]

#[path = "../support/chats.rs"]
mod chats;
mod demo;
mod encoder;
mod greedy;
mod idle;
mod invariance;
#[path = "../support/questions.rs"]
mod questions;
mod soak;
mod soak_large;
#[path = "../support/taught.rs"]
mod taught;
#[expect(dead_code, reason = "some of it is for the tests of kernels")]
#[path = "../../crates/cuda/tests/gpu/team.rs"]
mod team;
mod two_gpus;

use std::{
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
};

use serde_json::Value;
use spark_engine::{Device, Dtype, EngineBuilder, EngineOptions, SparkEngine};
use spark_testing::{
    Oracle, model_dir, repository,
    tolerance::{BFLOAT16, BFLOAT16_MOE_LOGPROB},
};

/// Names a folder of compiled kernels, for machines without NVIDIA's compiler.
const KERNEL_DIR_VARIABLE: &str = "SPARK_KERNEL_DIR";

/// One test after the other: they share the GPU, and each compares times and memory of its own.
fn alone() -> MutexGuard<'static, ()> {
    static GPU: Mutex<()> = Mutex::new(());
    GPU.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A checkpoint to run.
#[derive(Debug, Clone)]
struct Model {
    name: String,
    folder: PathBuf,
}

impl Model {
    fn fixture(name: &str) -> Self {
        Self { name: name.into(), folder: model_dir(name) }
    }

    fn demo(format: &str) -> Self {
        let folder = repository().join("models/spark-tiny-vl").join(format);
        Self { name: format!("spark-tiny-vl/{format}"), folder }
    }

    /// How far a log-probability may be off between two runs in bf16. The fixtures' differ by 0.23 at most (along their texts,
    /// on an H100); in the deeper demo model a rounding may change an expert choice more than once.
    fn tolerance(&self) -> f32 {
        if self.is_demo() { BFLOAT16_MOE_LOGPROB } else { BFLOAT16.logprob }
    }

    fn is_demo(&self) -> bool {
        self.name.contains("tiny")
    }

    /// `answer` up to its end, if it has one: what a trained model is made to say behind that means nothing. The fixtures' random
    /// weights know no end.
    fn said(&self, answer: &Answer) -> Answer {
        let files = spark_engine::ModelFiles::open(&self.folder.display().to_string(), None).unwrap();
        let is_end = |id: &u32| self.is_demo() && files.config.eos_token_ids.contains(id);
        let len = answer.ids.iter().position(is_end).map_or(answer.ids.len(), |end| end + 1);
        let Answer { ids, margins, text } = answer.clone();
        Answer { ids: ids[..len].to_vec(), margins: margins[..len].to_vec(), text }
    }

    /// Chats with pictures and without: the oracle's, or questions that the demo model was made for. Elsewhere a trained model is
    /// as unsure as a random one, and roundings that swap experts decide what it says.
    fn bodies(&self, max_tokens: usize) -> Vec<(String, Value)> {
        if self.is_demo() {
            return demo::bodies(max_tokens);
        }
        let oracle = Oracle::load(&self.name).unwrap();
        let bodies = oracle.cases.values().map(|case| {
            let mut body = chats::chat_body(case, max_tokens);
            body["logprobs"] = true.into();
            body["top_logprobs"] = 2.into();
            (case.name.clone(), body)
        });
        bodies.collect()
    }

    fn engine(
        &self,
        device: Device,
        change: impl FnOnce(&mut EngineOptions),
    ) -> spark_engine::Result<SparkEngine> {
        self.builder(device).engine(change).build()
    }

    fn builder(&self, device: Device) -> EngineBuilder {
        let builder = EngineBuilder::new(self.folder.display().to_string());
        let builder = builder.dtype(Dtype::Bf16).device(device).engine(|options| {
            options.max_model_len = Some(1024);
            options.max_num_seqs = 16;
            options.kv_cache_memory_bytes = Some(64 << 20);
        });
        match std::env::var_os(KERNEL_DIR_VARIABLE) {
            Some(folder) => builder.kernel_dir(folder),
            None => builder,
        }
    }
}

/// A greedy answer.
#[derive(Debug, Clone, PartialEq)]
struct Answer {
    ids: Vec<u32>,
    /// Log-probability of the best token less that of the second, at each.
    margins: Vec<f32>,
    text: String,
}

impl Answer {
    fn of(body: &Value) -> Self {
        let choice = &body["choices"][0];
        let steps = choice["logprobs"]["content"].as_array().expect("log-probabilities were asked for");
        let margin = |step: &Value| {
            let top = step["top_logprobs"].as_array().expect("two alternatives were asked for");
            let logprob = |i: usize| top[i]["logprob"].as_f64().expect("a number") as f32;
            logprob(0) - logprob(1)
        };
        Self {
            ids: chats::ids(&choice["token_ids"]),
            margins: steps.iter().map(margin).collect(),
            text: choice["message"]["content"].as_str().unwrap_or_default().to_owned(),
        }
    }
}

/// The answer of `engine` to `body`, alone.
fn ask(engine: &SparkEngine, body: &Value) -> Answer {
    Answer::of(&chats::block_on(chats::answer(engine, body.clone())))
}

/// The first step at which `got` is not `reference`; an answer that has ended before its reference differs there.
fn left_at(reference: &Answer, got: &Answer) -> Option<usize> {
    let ended = (got.ids.len() < reference.ids.len()).then_some(got.ids.len());
    reference.ids.iter().zip(&got.ids).position(|(a, b)| a != b).or(ended)
}

/// How answers compare with their references: equal up to the first near tie, or not at all.
#[derive(Debug, Default)]
struct Comparison {
    /// Ids up to the ends of answers, or to where they left their reference.
    num_compared: usize,
    num_ids: usize,
    num_answers: usize,
    /// Answers that leave their reference at some near tie.
    num_early: usize,
    /// The widest margin at which that happened.
    widest: f32,
    /// Whether sums are rounded otherwise than the reference's, in a mixture of experts.
    may_reroute: bool,
    /// Answers that leave their reference because a rounding has changed an expert.
    num_rerouted: usize,
    /// Answers that differ where they must not.
    wrong: Vec<String>,
}

/// Steps that have to agree before it is believed that a rounding has changed an expert, and nothing else.
const STEPS_BEFORE: usize = 8;
/// One answer of so many may leave its reference so. Of the CPU backend's own in bf16, cut over two ranks, one of twenty does, at
/// margins up to 1.6; over four ranks one of 2.2 becomes one of 0.07 (`text_moe_nvfp4_modelopt`).
const ANSWERS_OF_A_REROUTED_ONE: usize = 20;

/// Whether everything before `step`, where they part at a margin that is no near tie, is the same to within roundings: what was
/// computed is right until an expert is another one.
fn is_rerouted(reference: &Answer, got: &Answer, step: usize, tolerance: f32) -> bool {
    let both = reference.margins.iter().zip(&got.margins).take(step);
    let num_alike = both.filter(|(a, b)| (*a - *b).abs() < 2.0 * tolerance).count();
    step >= STEPS_BEFORE && 4 * num_alike >= 3 * step
}

impl Comparison {
    /// As `first_divergence` demands, and more: what is equal at a near tie is compared on.
    fn add(&mut self, name: &str, reference: &Answer, got: &Answer, tolerance: f32) {
        self.num_answers += 1;
        self.num_ids += reference.ids.len();
        let step = left_at(reference, got);
        self.num_compared += step.unwrap_or(reference.ids.len());
        let Some(step) = step else { return };
        let margin = reference.margins[step];
        if margin < 2.0 * tolerance {
            self.num_early += 1;
            self.widest = self.widest.max(margin);
        } else if self.may_reroute && is_rerouted(reference, got, step, tolerance) {
            self.num_rerouted += 1;
        } else {
            let (expected, got) = (reference.ids[step], got.ids.get(step));
            self.wrong.push(format!("{name}: step {step}: {got:?} instead of {expected}, margin {margin}"));
        }
    }

    /// Adds what another one has counted.
    fn join(&mut self, other: Self) {
        self.num_compared += other.num_compared;
        self.num_ids += other.num_ids;
        self.num_answers += other.num_answers;
        self.num_early += other.num_early;
        self.widest = self.widest.max(other.widest);
        self.num_rerouted += other.num_rerouted;
        self.wrong.extend(other.wrong);
    }

    /// Prints the counts and fails if something differs that must not.
    fn finish(&self, title: &str) {
        println!("{title}: {}", self.line());
        assert!(self.wrong.is_empty(), "{title}: {:#?}", self.wrong);
        let most = self.num_answers.div_ceil(ANSWERS_OF_A_REROUTED_ONE);
        assert!(self.num_rerouted <= most, "{title}: {} answers have changed experts", self.num_rerouted);
    }

    fn line(&self) -> String {
        let Self { num_compared, num_ids, num_answers, num_early, widest, num_rerouted, wrong, .. } = self;
        let rerouted = match num_rerouted {
            0 => String::new(),
            _ => format!("{num_rerouted} by another expert, "),
        };
        format!(
            "{num_answers} answers, {num_compared} of {num_ids} ids equal, {num_early} answers left their reference at a \
             near tie (widest margin {widest:.3}), {rerouted}{} wrong",
            wrong.len()
        )
    }
}
