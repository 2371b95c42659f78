//! `spark-engine batch`: a file of OpenAI batch requests through the engine, in order, resumable.

use std::path::PathBuf;

use clap::Args;
use futures_util::StreamExt;
use serde_json::{Value, json};
use spark_engine::server::FrontEnd;

use super::{
    args::ModelArgs,
    batch_file::{Line, Output, count_lines, lines},
    progress,
};

/// Run a file of OpenAI batch requests.
///
/// Each input line is {"custom_id", "method", "url", "body"} with url /v1/chat/completions or /v1/completions; each
/// output line {"id", "custom_id", "response", "error"}, in the order of the input. A run that was stopped goes on after
/// its last whole line when it is started again.
#[derive(Args)]
#[command(args_override_self = true)]
pub(crate) struct BatchArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Requests, one JSON object a line.
    #[arg(long, help_heading = "Files", short = 'i', value_name = "FILE")]
    input_file: PathBuf,
    /// Answers; lines that are there already are kept and not asked again.
    #[arg(long, help_heading = "Files", short = 'o', value_name = "FILE")]
    output_file: PathBuf,
    /// Most requests at work at once.
    #[arg(long, help_heading = "Files", default_value_t = 64, value_name = "N")]
    max_inflight: usize,
}

pub(crate) fn run(args: BatchArgs) -> anyhow::Result<()> {
    anyhow::ensure!(args.max_inflight > 0, "--max-inflight 0: at least one request must be at work");
    let total = count_lines(&args.input_file)?;
    let mut output = Output::open(&args.output_file, &args.input_file)?;
    let done = output.num_done();
    if done > 0 {
        tracing::info!("{}: {done} of {total} lines are done already", args.output_file.display());
    }
    if done == total {
        return Ok(());
    }
    let engine = args.model.build()?;
    let front_end = engine.front_end().clone();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let bar = progress::request_bar(total as u64, done as u64);
    let mut num_failed = 0usize;
    runtime.block_on(async {
        let requests = lines(&args.input_file)?.skip(done);
        let answers = futures_util::stream::iter(requests).map(|line| {
            let front_end = front_end.clone();
            async move { anyhow::Ok(answer(&front_end, line?).await) }
        });
        let mut answers = std::pin::pin!(answers.buffered(args.max_inflight));
        while let Some(line) = answers.next().await {
            let line = line?;
            num_failed += usize::from(!line["error"].is_null());
            output.append(&line)?;
            bar.inc(1);
        }
        anyhow::Ok(())
    })?;
    bar.finish_and_clear();
    output.sync()?;
    tracing::info!(
        "{total} lines in {}, {num_failed} of this run's with an error",
        args.output_file.display()
    );
    Ok(())
}

async fn answer(front_end: &FrontEnd, line: Line) -> Value {
    let id = format!("batch_req_{}", line.number);
    let (custom_id, status, body) = match line.request {
        Ok(request) => {
            let (status, body) = front_end.handle(&request.url, request.body).await;
            (Value::String(request.custom_id), status, body)
        }
        Err(problem) => {
            let message = format!("line {}: {problem}", line.number);
            let error =
                json!({"message": message, "type": "invalid_request_error", "param": null, "code": null});
            (line.custom_id, 400, json!({"error": error}))
        }
    };
    let request_id = body.get("id").cloned().unwrap_or_else(|| id.clone().into());
    if status == 200 {
        let response = json!({"status_code": status, "request_id": request_id, "body": body});
        return json!({"id": id, "custom_id": custom_id, "response": response, "error": null});
    }
    let error = body.get("error").cloned().unwrap_or(body.clone());
    let response = json!({"status_code": status, "request_id": request_id, "body": body});
    json!({"id": id, "custom_id": custom_id, "response": response, "error": error})
}
