//! Streams the answer to a question about a picture: `cargo run --example generate -- [MODEL [PICTURE [QUESTION]]]`.
#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use std::{env, error::Error, io::Write, path::Path};

use serde_json::json;
use spark_engine::{EngineBuilder, find_demo_model, image_data_url};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut args = env::args().skip(1);
    let model = args.next().map_or_else(find_demo_model, |model| Ok(model.into()))?;
    let picture = args.next().unwrap_or_else(|| "tests/fixtures/media/demo.png".into());
    let question = args.next().unwrap_or_else(|| "Describe the picture.".into());

    // Loading blocks. A service that answers others meanwhile builds inside `tokio::task::spawn_blocking`.
    let engine = EngineBuilder::new(model.display().to_string()).build()?;
    let mut answer = engine
        .chat(json!({
            "messages": [{"role": "user", "content": [
                {"type": "image_url", "image_url": {"url": image_data_url(Path::new(&picture))?}},
                {"type": "text", "text": question},
            ]}],
            "max_tokens": 64,
            "temperature": 0,
        }))
        .await?;

    let mut num_tokens = 0;
    while let Some(delta) = answer.next().await {
        let delta = delta?;
        print!("{}", delta.text);
        std::io::stdout().flush()?;
        num_tokens += delta.tokens.len();
        if let Some(finish) = delta.finish {
            println!(
                "\n[{num_tokens} tokens after a prompt of {}: {}]",
                answer.num_prompt_tokens(),
                finish.reason
            );
        }
    }
    Ok(())
}
