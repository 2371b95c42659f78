//! `spark-engine eval`: held-out samples of the suite through an engine or an endpoint, and how many answers are right.

mod answers;
mod compare;
mod gallery;
mod plot;
mod question;
mod report;
mod save;
mod target;

use std::{
    io::Write,
    path::PathBuf,
    time::{Duration, Instant},
};

use clap::Args;
use spark_suite::Task;

use self::{
    answers::{Outcome, SampleId, Settings, ask_all},
    report::{Report, SUITE, TaskResult},
    target::{Endpoint, Target},
};
use super::{INTERRUPTED, args::ModelArgs, progress, ranks::RankArgs};

/// Measure how many held-out samples a model answers right.
#[derive(Args)]
#[command(args_override_self = true)]
#[command(after_help = "\
The model is MODEL, in this process, or what an OpenAI-compatible server at --url serves. All samples are asked greedily. Prints a \
table with a line per task; with --json the last line on stdout is one JSON object.\n\n\
Examples:\n  \
    spark-engine eval --suite tiny-vl --samples 500 --json > awq.json\n  \
    spark-engine eval --suite tiny-vl --url http://localhost:8000 --tasks add,sort\n  \
    spark-engine eval --compare bf16.json awq.json --plot formats.svg\n  \
    spark-engine eval --gallery docs")]
pub(crate) struct EvalArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Which tasks.
    #[arg(long, help_heading = "Evaluation", value_parser = [SUITE], default_value = SUITE)]
    suite: String,
    /// Ask the server at this address; MODEL is then a name that it serves, by default the first one.
    #[arg(long, help_heading = "Evaluation", value_name = "URL")]
    url: Option<String>,
    /// Key for the server at --url.
    #[arg(
        long,
        help_heading = "Evaluation",
        env = "OPENAI_API_KEY",
        value_name = "KEY",
        hide_env_values = true
    )]
    api_key: Option<String>,
    /// Tasks, with commas between them; by default all.
    #[arg(long, help_heading = "Evaluation", value_delimiter = ',', value_name = "NAME")]
    tasks: Vec<String>,
    /// Samples of each task.
    #[arg(long, help_heading = "Evaluation", default_value_t = 100, value_name = "N",
          value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    samples: u64,
    /// Number of the first held-out sample of each task.
    #[arg(long, help_heading = "Evaluation", default_value_t = 0, value_name = "N",
          value_parser = clap::value_parser!(u64).range(..1 << 48))]
    offset: u64,
    /// Most requests at work at once.
    #[arg(long, help_heading = "Evaluation", default_value_t = 32, value_name = "N",
          value_parser = clap::value_parser!(u16).range(1..=512))]
    concurrency: u16,
    /// Most tokens of an answer; longer ones are cut, and wrong.
    #[arg(long, help_heading = "Evaluation", default_value_t = 512, value_name = "TOKENS",
          value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: u32,
    /// One JSON object as the last line on stdout.
    #[arg(long, help_heading = "Evaluation")]
    json: bool,
    /// Write every question, its answer and the verdict, a line of JSON each.
    #[arg(long, help_heading = "Evaluation", value_name = "FILE.jsonl")]
    save: Option<PathBuf>,
    /// Run nothing: compare what --json has printed (the last line of each file counts).
    #[arg(long, help_heading = "Evaluation", num_args = 1.., value_name = "FILE",
          conflicts_with_all = ["url", "save", "gallery"])]
    compare: Vec<PathBuf>,
    /// With --compare: draw a bar chart.
    #[arg(long, help_heading = "Evaluation", value_name = "FILE.svg", requires = "compare")]
    plot: Option<PathBuf>,
    /// Write FOLDER/demo.md instead: examples with pictures and what the model answers, one of each of ten tasks or of
    /// those in --tasks.
    #[arg(long, help_heading = "Evaluation", value_name = "FOLDER", conflicts_with = "save")]
    gallery: Option<PathBuf>,
}

/// What has been asked, and how long it took.
struct Run {
    model: String,
    /// In the order of the suite.
    outcomes: Vec<Outcome>,
    elapsed: Duration,
    is_complete: bool,
}

impl EvalArgs {
    pub(crate) fn ranks(&self) -> &RankArgs {
        &self.model.ranks
    }
}

pub(crate) fn run(args: EvalArgs) -> anyhow::Result<()> {
    if !args.compare.is_empty() {
        return compare::run(&args.compare, args.plot.as_deref());
    }
    if args.url.is_none() && args.model.ranks.is_follower()? {
        return args.model.follow();
    }
    let tasks = choose_tasks(&args.tasks)?;
    let (offset, json) = (args.offset, args.json);
    // Opened before the work, so that a wrong path is known at once.
    let saved = match &args.save {
        Some(path) => Some((save::create(path)?, path.clone())),
        None => None,
    };
    let gallery = args.gallery.clone();
    let samples = match &gallery {
        Some(_) if args.tasks.is_empty() => gallery::choose(&tasks, offset),
        Some(_) => tasks.iter().map(|task| (*task, offset)).collect(),
        // The tasks in turn, so that a run that is stopped knows something about each of them.
        None => (0..args.samples).flat_map(|i| tasks.iter().map(move |task| (*task, offset + i))).collect(),
    };
    let run = ask(args, samples)?;
    if let Some((file, path)) = &saved {
        save::write(file, path, &run.outcomes)?;
    }
    check_any(&run.outcomes)?;
    match &gallery {
        Some(folder) if run.is_complete => gallery::write(folder, &run.model, &run.outcomes)?,
        Some(_) => {}
        None => print(&report(&run, &tasks, offset), json)?,
    }
    if !run.is_complete {
        std::process::exit(INTERRUPTED);
    }
    Ok(())
}

/// The tasks of these names, or all, in the order of the suite.
fn choose_tasks(names: &[String]) -> anyhow::Result<Vec<&'static Task>> {
    let all: Vec<_> = spark_suite::tasks().collect();
    if let Some(name) = names.iter().find(|name| all.iter().all(|task| task.name != name.as_str())) {
        let known: Vec<_> = all.iter().map(|task| task.name).collect();
        anyhow::bail!("--tasks {name}: no such task; there are {}", known.join(", "));
    }
    let chosen =
        all.into_iter().filter(|task| names.is_empty() || names.iter().any(|name| name == task.name));
    Ok(chosen.collect())
}

fn ask(args: EvalArgs, samples: Vec<SampleId>) -> anyhow::Result<Run> {
    let settings =
        Settings { max_tokens: args.max_tokens as usize, concurrency: usize::from(args.concurrency) };
    let target = match &args.url {
        Some(url) => Target::Endpoint(Endpoint::connect(url, args.api_key, args.model.model.given()?)?),
        None => Target::Engine(args.model.without_queue_limit().build()?),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let num_samples = samples.len();
    let bar = progress::request_bar(num_samples as u64, 0);
    bar.set_prefix("eval");
    let start = Instant::now();
    let outcomes = runtime.block_on(ask_all(&target, samples, settings, &bar));
    let elapsed = start.elapsed();
    bar.finish_and_clear();
    // What is still under way after Ctrl-C is not waited for.
    runtime.shutdown_background();
    let mut outcomes = outcomes?;
    let is_complete = outcomes.len() == num_samples;
    let places: Vec<_> = spark_suite::tasks().map(|task| task.name).collect();
    outcomes
        .sort_by_key(|outcome| (places.iter().position(|name| *name == outcome.task.name), outcome.index));
    Ok(Run { model: target.model(), outcomes, elapsed, is_complete })
}

/// Without any answer there is no result. Says what went wrong first in any case.
fn check_any(outcomes: &[Outcome]) -> anyhow::Result<()> {
    let errors = || outcomes.iter().filter_map(|outcome| Some((outcome, outcome.reply.as_ref().err()?)));
    let num_errors = errors().count();
    let Some((first, error)) = errors().next() else { return Ok(()) };
    let first = format!("the first: task {}, sample {}: {error}", first.task.name, first.index);
    anyhow::ensure!(num_errors < outcomes.len(), "none of {num_errors} requests was answered; {first}");
    tracing::warn!(
        "{num_errors} of {} requests were not answered and count as wrong; {first}",
        outcomes.len()
    );
    Ok(())
}

fn report(run: &Run, tasks: &[&'static Task], offset: u64) -> Report {
    let count = |task: &&'static Task| {
        let outcomes = || run.outcomes.iter().filter(|outcome| outcome.task.name == task.name);
        TaskResult {
            name: task.name.to_owned(),
            samples: outcomes().count() as u64,
            right: outcomes().filter(|outcome| outcome.is_right).count() as u64,
            errors: outcomes().filter(|outcome| outcome.reply.is_err()).count() as u64,
        }
    };
    let replies = || run.outcomes.iter().filter_map(|outcome| outcome.reply.as_ref().ok());
    Report {
        model: run.model.clone(),
        tasks: tasks.iter().map(count).collect(),
        offset,
        elapsed: run.elapsed,
        prompt_tokens: replies().map(|reply| reply.prompt_tokens).sum(),
        output_tokens: replies().map(|reply| reply.output_tokens).sum(),
        is_complete: run.is_complete,
    }
}

fn print(report: &Report, json: bool) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout().lock();
    report.write_table(&mut stdout)?;
    if json {
        writeln!(stdout, "{}", report.to_json())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_are_chosen_by_name_in_the_order_of_the_suite() {
        let all: Vec<_> = choose_tasks(&[]).unwrap().iter().map(|task| task.name).collect();
        let [first, .., last] = all[..] else { panic!("{all:?}") };
        let chosen = choose_tasks(&[last.to_owned(), first.to_owned(), last.to_owned()]).unwrap();
        assert_eq!(chosen.iter().map(|task| task.name).collect::<Vec<_>>(), [first, last]);
        let message = choose_tasks(&["sing".into()]).unwrap_err().to_string();
        assert!(message.contains("sing") && message.contains(first), "{message}");
    }
}
