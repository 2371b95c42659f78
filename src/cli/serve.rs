//! `spark-engine serve`: the HTTP server, its signals and its end.

use std::{net::IpAddr, time::Duration};

use anyhow::Context;
use clap::Args;
use spark_engine::{SparkEngine, server};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
};

use super::args::ModelArgs;

/// What clients have to read their last bytes once the engine has nothing left to do.
const LAST_BYTES: Duration = Duration::from_secs(2);

/// Serve an OpenAI-compatible HTTP API.
#[derive(Args)]
#[command(args_override_self = true)]
pub(crate) struct ServeArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Address to listen on; 0.0.0.0 for all.
    #[arg(long, help_heading = "Server", default_value = "127.0.0.1")]
    host: IpAddr,
    /// Port to listen on; 0 takes a free one and prints it.
    #[arg(long, help_heading = "Server", default_value_t = 8000)]
    port: u16,
    /// Keys that clients must send as `Authorization: Bearer KEY`; several may be given.
    #[arg(long, help_heading = "Server", env = "SPARK_API_KEY", value_name = "KEY", num_args = 1.., hide_env_values = true)]
    api_key: Vec<String>,
    /// Largest request body, in bytes.
    #[arg(long, help_heading = "Server", default_value_t = server::DEFAULT_MAX_BODY_BYTES, value_name = "BYTES")]
    max_body_bytes: usize,
    /// After SIGTERM: how long running requests may take to finish, in seconds.
    #[arg(long, help_heading = "Server", default_value_t = 30, value_name = "SECONDS")]
    shutdown_timeout: u64,
}

pub(crate) fn run(args: ServeArgs) -> anyhow::Result<()> {
    let ServeArgs { model, host, port, api_key, max_body_bytes, shutdown_timeout } = args;
    anyhow::ensure!(!api_key.iter().any(String::is_empty), "--api-key: an empty key would let everybody in");
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    // Bound before loading, so that a taken port is known at once and not after minutes.
    let listener = runtime
        .block_on(TcpListener::bind((host, port)))
        .with_context(|| format!("--host {host} --port {port}: cannot listen there"))?;
    let engine = model.build()?;
    let address = listener.local_addr()?;
    announce(&engine, &format!("http://{address}"));
    let state = server::HttpState {
        front_end: engine.front_end().clone(),
        api_keys: server::ApiKeys::new(api_key),
        max_body_bytes,
    };
    runtime.block_on(serve(engine, listener, state, Duration::from_secs(shutdown_timeout)))
}

fn announce(engine: &SparkEngine, url: &str) {
    let info = engine.info();
    tracing::info!(
        "{} ready: up to {} tokens a sequence, KV cache of {} tokens",
        info.architecture,
        info.limits.max_model_len,
        info.num_kv_tokens
    );
    tracing::info!("listening on {url} (try: curl {url}/v1/models)");
}

/// Serves until the first SIGTERM or SIGINT, then drains; a second signal or the deadline ends what is left. A connection
/// that waits for a request which never becomes whole holds nothing up: it is dropped soon after the last answer is made.
async fn serve(
    engine: SparkEngine,
    listener: TcpListener,
    state: server::HttpState,
    deadline: Duration,
) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let shutdown = async move {
        // An error means that the sender is gone, which is a stop as well.
        let _ = stopped.await;
    };
    let mut serving = tokio::spawn(server::serve(listener, state, shutdown));
    tokio::select! {
        result = &mut serving => return Ok(result??),
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("shutting down: running requests have {} s to finish", deadline.as_secs());
    engine.drain();
    let _ = stop.send(());
    let draining = engine.clone();
    let drained = tokio::task::spawn_blocking(move || draining.join());
    let last_bytes = async {
        // The engine has ended also when the task that waited for it has panicked.
        let _ = drained.await;
        tokio::time::sleep(LAST_BYTES).await;
    };
    tokio::select! {
        result = &mut serving => result??,
        () = last_bytes => {
            tracing::info!("all requests are finished: dropping the connections that are left");
            serving.abort();
        }
        () = tokio::time::sleep(deadline) => {
            tracing::warn!("the shutdown timeout has passed: cancelling what is left");
            finish_now(&engine, serving).await;
        }
        _ = terminate.recv() => finish_now(&engine, serving).await,
        _ = interrupt.recv() => finish_now(&engine, serving).await,
    }
    Ok(())
}

/// Ends all requests, gives their last bytes a moment to leave, then drops the connections that are left (idle ones of
/// clients that keep them open, for example).
async fn finish_now(engine: &SparkEngine, serving: tokio::task::JoinHandle<std::io::Result<()>>) {
    engine.abort();
    let abort = serving.abort_handle();
    if tokio::time::timeout(Duration::from_millis(500), serving).await.is_err() {
        abort.abort();
    }
}
