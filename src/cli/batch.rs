//! `spark-engine batch`: a file of OpenAI batch requests through the engine, in order, resumable.

use std::path::{Path, PathBuf};

use clap::Args;
use futures_util::StreamExt;
use indicatif::ProgressBar;
use serde_json::{Value, json};
use spark_engine::{api::Health, server::FrontEnd};

use super::{
    args::ModelArgs,
    batch_file::{Line, Output, answer_id, count_lines, lines},
    progress,
    ranks::RankArgs,
};

/// Run a file of OpenAI batch requests.
#[derive(Args)]
#[command(args_override_self = true)]
#[command(after_help = "\
Each input line is a request: {\"custom_id\": NAME, \"method\": \"POST\", \"url\": URL, \"body\": {...}}, with the URL \
/v1/chat/completions, /v1/completions or /v1/responses and a body as the server takes it. Each output line is an answer: {\"id\", \
\"custom_id\", \"response\", \"error\"}, in the order of the input. What an answer took (`timings`) is told where a body has \
\"timings_per_token\": true. A run that was stopped goes on after its last whole line when it is started again.\n\n\
Exit code 0: every line has an answer, which may be an error (they are counted); 1: the batch could not be run, or all of this run's \
answers are errors.\n\n\
Example:\n  \
    spark-engine batch ./model -i prompts.jsonl -o answers.jsonl")]
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

impl BatchArgs {
    pub(crate) fn ranks(&self) -> &RankArgs {
        &self.model.ranks
    }
}

pub(crate) fn run(args: BatchArgs) -> anyhow::Result<()> {
    anyhow::ensure!(args.max_inflight > 0, "--max-inflight 0: at least one request must be at work");
    if args.model.ranks.is_follower()? {
        return args.model.follow();
    }
    let total = count_lines(&args.input_file)?;
    let mut output = Output::open(&args.output_file, &args.input_file)?;
    let done = output.num_done();
    if done > 0 {
        tracing::info!("{}: {done} of {total} lines are done already", args.output_file.display());
    }
    if done == total {
        return Ok(());
    }
    // A line has no client that could come back later.
    let engine = args.model.without_queue_limit().build()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let bar = progress::request_bar(total as u64, done as u64);
    let front_end = engine.front_end();
    let num_failed =
        runtime.block_on(answer_all(front_end, &args.input_file, &mut output, args.max_inflight, &bar))?;
    bar.finish_and_clear();
    output.sync()?;
    let file = args.output_file.display();
    tracing::info!("{total} lines in {file}, {num_failed} of this run's with an error");
    anyhow::ensure!(
        num_failed < total - done,
        "all {num_failed} lines of this run have an error, which {file} says; to ask them again, remove it"
    );
    Ok(())
}

/// Answers what `output` does not have yet; returns how many of these answers are errors.
///
/// An engine that stops is no answer: its line and those after it are left for the next run.
async fn answer_all(
    front_end: &FrontEnd,
    input: &Path,
    output: &mut Output,
    max_inflight: usize,
    bar: &ProgressBar,
) -> anyhow::Result<usize> {
    let requests = lines(input)?.skip(output.num_done());
    let answers = futures_util::stream::iter(requests)
        .map(|line| async move { anyhow::Ok(answer(front_end, line?).await) });
    let mut answers = std::pin::pin!(answers.buffered(max_inflight));
    let mut num_failed = 0;
    while let Some(line) = answers.next().await {
        let line = line?;
        if let Some(problem) = engine_stopped(&line, &front_end.health()) {
            let done = output.num_done();
            anyhow::bail!("{problem}; {done} lines are done, start the same command again for the others");
        }
        num_failed += usize::from(!line["error"].is_null());
        output.append(&line)?;
        bar.inc(1);
    }
    Ok(num_failed)
}

/// Whether an answer says nothing about its line, because the engine could not work on it.
fn engine_stopped(answer: &Value, health: &Health) -> Option<String> {
    match (answer["response"]["status_code"].as_u64()?, health) {
        (500.., Health::Failed(reason)) => Some(format!("the engine has failed: {reason}")),
        (500.., Health::Stopping) => Some("the engine was stopped".into()),
        // Refused, by an engine that is gone or full.
        (503, Health::Ready) => Some(format!("the engine takes no requests: {}", answer["error"]["message"])),
        _ => None,
    }
}

async fn answer(front_end: &FrontEnd, line: Line) -> Value {
    let id = answer_id(line.number);
    let (custom_id, status, body) = match line.request {
        Ok(request) => {
            let is_timed = request.body["timings_per_token"] == true;
            let (status, mut body) = front_end.handle(&request.url, request.body).await;
            // Files of answers are kept and compared: what is another number in every run is in them only where it was asked for.
            if let Some(body) = body.as_object_mut().filter(|_| !is_timed) {
                body.remove("timings");
            }
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

#[cfg(test)]
mod tests {
    use super::*;
    use spark_engine::{EngineBuilder, SparkEngine};

    const NUM_LINES: usize = 24;

    fn engine() -> SparkEngine {
        let folder = spark_testing::model_dir("text_moe_bf16").display().to_string();
        let small = |options: &mut spark_engine::EngineOptions| {
            options.max_model_len = Some(1024);
            options.kv_cache_memory_bytes = Some(16 << 20);
        };
        EngineBuilder::new(folder).threads(1).engine(small).build().unwrap()
    }

    fn requests() -> String {
        let line = |i| {
            let body = json!({"prompt": "x", "max_tokens": 300, "ignore_eos": true});
            json!({"custom_id": format!("r{i}"), "url": "/v1/completions", "body": body}).to_string()
        };
        (0..NUM_LINES).map(line).collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn an_engine_that_stops_is_no_answer() {
        let folder = tempfile::tempdir().unwrap();
        let [input, path] = ["in.jsonl", "out.jsonl"].map(|name| folder.path().join(name));
        std::fs::write(&input, requests()).unwrap();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let run = |engine: &SparkEngine| {
            let mut output = Output::open(&path, &input).unwrap();
            let bar = ProgressBar::hidden();
            runtime.block_on(answer_all(engine.front_end(), &input, &mut output, 2, &bar))
        };
        let written = || std::fs::read_to_string(&path).unwrap();

        let stopped = engine();
        std::thread::scope(|scope| {
            let running = scope.spawn(|| run(&stopped));
            while !path.exists() || written().lines().count() < 2 {
                assert!(!running.is_finished(), "it ended before it was stopped");
                std::thread::yield_now();
            }
            stopped.abort();
            let message = running.join().unwrap().unwrap_err().to_string();
            assert!(message.contains("the engine was stopped"), "{message}");
        });
        let before = written();
        assert!((2..NUM_LINES).contains(&before.lines().count()), "{before}");
        assert_eq!(before.matches("\"error\":null").count(), before.lines().count(), "{before}");

        assert!(run(&stopped).is_err());
        assert_eq!(written(), before, "an engine that takes nothing answers nothing");

        assert_eq!(run(&engine()).unwrap(), 0);
        assert!(written().starts_with(&before), "what was done is kept");
        assert_eq!(written().lines().count(), NUM_LINES);
    }

    #[test]
    fn only_an_engine_that_cannot_work_ends_a_batch() {
        let answer = |status| json!({"response": {"status_code": status}, "error": {"message": "m"}});
        let failed = Health::Failed("no memory".into());
        assert!(engine_stopped(&answer(500), &failed).is_some_and(|text| text.contains("no memory")));
        assert!(engine_stopped(&answer(503), &Health::Ready).is_some());
        for health in [Health::Ready, Health::Stopping, failed] {
            assert_eq!(engine_stopped(&answer(200), &health), None, "it was made before the engine stopped");
            assert_eq!(engine_stopped(&answer(400), &health), None);
        }
        assert_eq!(engine_stopped(&answer(500), &Health::Ready), None, "a defect that this line meets");
    }
}
