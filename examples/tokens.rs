//! Token ids in, events out, no text in between; and a request cancelled by dropping its stream:
//! `cargo run --example tokens -- [MODEL]`.
#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use std::{env, error::Error};

use spark_engine::{
    EngineBuilder,
    api::{Event, SamplingParams},
    find_demo_model,
};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let model = env::args().nth(1).map_or_else(find_demo_model, |model| Ok(model.into()))?;
    let engine = EngineBuilder::new(model.display().to_string()).build()?;
    // A turn as the chat template writes it. `encode_ordinary` would read the markers as text: it is for what users write.
    let turn = "<|im_start|>user\nWhat is 347 + 185?<|im_end|>\n<|im_start|>assistant\n";
    let prompt = engine.tokenizer().encode_trusted(turn)?;

    // To its end: one `Prompt`, the tokens, one `Finished`.
    let sampling = SamplingParams { logprobs: Some(1), ..SamplingParams::greedy(8) };
    let mut events = engine.submit(engine.request(prompt.clone(), sampling)?)?;
    while let Some(event) = events.recv().await {
        match event {
            Event::Prompt { num_cached_tokens, .. } => {
                println!("prompt: {} tokens, {num_cached_tokens} cached", prompt.len());
            }
            Event::Token(token) => {
                let bytes = engine.tokenizer().token_bytes(token.token);
                let logprob = token.logprobs.map(|logprobs| logprobs.token.logprob);
                println!(
                    "token {:>6} {:<12} {logprob:?}",
                    token.token,
                    String::from_utf8_lossy(bytes).escape_debug()
                );
            }
            Event::Finished(end) => {
                println!("end: {:?} after {} tokens", end.reason, end.num_output_tokens);
            }
        }
    }

    // Without an end of its own: two events, then the drop. Its KV blocks are free again before the next step.
    let endless = SamplingParams { ignore_eos: true, ..SamplingParams::greedy(1000) };
    let mut events = engine.submit(engine.request(prompt, endless)?)?;
    for _ in 0..2 {
        println!("endless: {:?}", events.recv().await);
    }
    drop(events);

    engine.drain();
    engine.join();
    println!("{} tokens were generated in all", engine.stats().num_generation_tokens);
    Ok(())
}
