//! How long the GPU has nothing to compute between the decode steps of a model of a published size with random weights.

use spark_engine::{
    Device, Dtype, EngineBuilder, EngineHandle, LoadFormat, Profile, Quantization,
    api::{Engine, Event, Request, SamplingParams},
};

use crate::{KERNEL_DIR_VARIABLE, alone, chats};

const CONFIG: &str = "qwen3-30b-a3b";
const MAX_SEQS: usize = 64;
const LEN: usize = 256;

/// Answers `num_seqs` prompts of 128 tokens at once.
fn answer(engine: &EngineHandle, num_seqs: usize) {
    let limits = &engine.info().limits;
    let sampling = SamplingParams { ignore_eos: true, ..SamplingParams::greedy(LEN) };
    let streams = (0..num_seqs).map(|seq| {
        let prompt = (0..128).map(|i| (7919 * seq + 31 * i) as u32 % 100_000).collect();
        engine.submit(Request::new(prompt, Vec::new(), sampling.clone(), limits).unwrap()).unwrap()
    });
    let streams: Vec<_> = streams.collect();
    chats::block_on(async {
        for mut events in streams {
            loop {
                match events.recv().await.expect("an answer has an end") {
                    Event::Finished(_) => break,
                    Event::Prompt { .. } | Event::Token(_) => {}
                }
            }
        }
    });
}

#[test]
fn measurements_of_idle_time_between_steps() {
    let _gpu = alone();
    let profile = Profile::of_steps();
    let builder = EngineBuilder::new(CONFIG)
        .dtype(Dtype::Bf16)
        .device(Device::Cuda)
        .load_format(LoadFormat::Dummy)
        .quantization(Quantization::Awq)
        .profile(profile.clone())
        .engine(|options| {
            options.max_num_seqs = MAX_SEQS;
            options.max_model_len = Some(1024);
            options.kv_cache_memory_bytes = Some(8 << 30);
        });
    let builder = match std::env::var_os(KERNEL_DIR_VARIABLE) {
        Some(folder) => builder.kernel_dir(folder),
        None => builder,
    };
    let engine = builder.start().unwrap().engine;
    for num_seqs in [1, 8, MAX_SEQS] {
        answer(&engine, num_seqs);
        profile.clear();
        answer(&engine, num_seqs);
        let share = profile.idle_share().expect("recorded steps follow each other");
        println!(
            "{num_seqs} sequences: {:.2} % of the time from step to step lies between steps\n{profile}",
            100.0 * share
        );
        assert!(share < 0.2, "{num_seqs} sequences: {share}");
    }
}
