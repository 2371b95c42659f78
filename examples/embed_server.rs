//! The OpenAI API inside one's own axum service, beside routes of one's own; stops at ctrl-c:
//! `cargo run --example embed_server -- [MODEL [ADDRESS]]`.
#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use std::{env, error::Error};

use axum::{Router, routing::get};
use spark_engine::{
    EngineBuilder, find_demo_model,
    server::{self, ApiKeys, HttpState},
};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut args = env::args().skip(1);
    let model = args.next().map_or_else(find_demo_model, |model| Ok(model.into()))?.display().to_string();
    let address = args.next().unwrap_or_else(|| "127.0.0.1:8001".into());
    let engine = EngineBuilder::new(model).served_names(vec!["my-model".into()]).build()?;

    let state = HttpState {
        front_end: engine.front_end().clone(),
        api_keys: ApiKeys::default(),
        max_body_bytes: server::DEFAULT_MAX_BODY_BYTES,
    };
    let load = {
        let engine = engine.clone();
        move || async move {
            let stats = engine.stats();
            format!("{} running, {} waiting\n", stats.num_running, stats.num_waiting)
        }
    };
    // /ai/v1/chat/completions, /ai/health and so on; `server::serve` is the shorter way for the API alone.
    let app = Router::new().nest("/ai", server::router(state)).route("/load", get(load));

    let listener = tokio::net::TcpListener::bind(address).await?;
    println!("curl http://{}/ai/v1/models", listener.local_addr()?);
    let stopped = async {
        // An error means that ctrl-c cannot be heard: then the service ends at once instead of never.
        let _ = tokio::signal::ctrl_c().await;
    };
    axum::serve(listener, app).with_graceful_shutdown(stopped).await?;
    engine.drain();
    engine.join();
    Ok(())
}
