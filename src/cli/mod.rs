//! The commands of the program and what they share.

mod agent;
mod answers;
mod args;
mod batch;
mod batch_file;
mod bench;
mod compat;
mod config_file;
mod crash;
mod decode_video;
mod device;
mod doctor;
mod effective;
mod eval;
mod generate;
mod head;
mod inspect;
mod kernels;
mod log_tail;
mod media;
mod model_name;
mod notify;
mod otlp;
mod parsers;
mod plan;
mod probe;
mod progress;
mod pull;
mod quantize;
mod ranks;
mod redact;
mod serve;
mod sharing;
mod signals;
mod sizes;
mod ssh;
mod support;
mod top;
mod trust;

use std::io::{IsTerminal, Write};

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use tracing_subscriber::{EnvFilter, filter::LevelFilter};

/// Exit code after Ctrl-C, as shells give it: 128 + SIGINT.
const INTERRUPTED: i32 = 130;

/// Exit code when nobody reads the output any more, as shells give it: 128 + SIGPIPE.
pub(crate) const OUTPUT_CLOSED: u8 = 141;

/// Native inference engine for Qwen3-VL mixture-of-experts models.
#[derive(Parser)]
#[command(name = "spark-engine", version, about, long_about = None, max_term_width = 110)]
#[command(after_help = "Examples:\n  \
    spark-engine serve QuantTrio/Qwen3-VL-30B-A3B-Instruct-AWQ --port 8000\n  \
    spark-engine generate --image photo.jpg \"What is in the picture?\"\n  \
    spark-engine generate ./model --image photo.jpg \"What is in the picture?\"\n  \
    spark-engine batch ./model -i prompts.jsonl -o answers.jsonl\n  \
    spark-engine eval --samples 20\n  \
    spark-engine inspect ./model --tp 2\n  \
    spark-engine pull Qwen/Qwen3-VL-30B-A3B-Instruct")]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Messages on stderr: error, warn, info, debug or trace; or a filter such as `spark_runtime=debug`.
    #[arg(long, global = true, env = "SPARK_LOG", default_value = "info", value_name = "LEVEL", value_parser = log_filter)]
    log_level: String,
    /// Messages as JSON lines.
    #[arg(long, global = true)]
    log_json: bool,
    /// What the command was told, and where from.
    #[arg(skip)]
    settings: serde_json::Value,
}

#[derive(Subcommand)]
enum Command {
    /// Work for another machine of `--nodes`; this program starts it over ssh.
    #[command(hide = true)]
    Agent(agent::AgentArgs),
    /// Serve an OpenAI-compatible HTTP API.
    Serve(serve::ServeArgs),
    /// Answer a prompt, or several, on the terminal.
    Generate(generate::GenerateArgs),
    /// Run a file of OpenAI batch requests; resumes where an earlier run was stopped.
    Batch(batch::BatchArgs),
    /// Measure speed: latency, throughput, a table of sizes, or the kernels alone.
    Bench(bench::BenchArgs),
    /// Become ffmpeg, in a sandbox; the server starts this for itself.
    #[command(hide = true)]
    DecodeVideo(decode_video::DecodeVideoArgs),
    /// Look for what would slow the engine down or stop it, on one machine or several.
    Doctor(doctor::DoctorArgs),
    /// Measure how many held-out samples a model answers right.
    Eval(eval::EvalArgs),
    /// Show architecture, quantisation, sizes and what each rank would hold.
    Inspect(inspect::InspectArgs),
    /// Compile the CUDA kernels for machines without a compiler.
    Kernels(kernels::KernelsArgs),
    /// Predict speed and memory on a machine that need not be here.
    Plan(plan::PlanArgs),
    /// Measure this machine's GPU, memory and disk, and write one JSON file.
    Probe(probe::ProbeArgs),
    /// Download a checkpoint from Hugging Face; continues where an earlier download was stopped.
    Pull(pull::PullArgs),
    /// Write a 4-bit or 8-bit version of a checkpoint.
    Quantize(quantize::QuantizeArgs),
    /// Collect what somebody needs to know to help: checks, settings, metrics, logs, reports of crashes; without secrets.
    SupportBundle(support::SupportArgs),
    /// Watch a running server in the terminal.
    Top(top::TopArgs),
}

impl Cli {
    /// The command line, and the file of settings that it may name. Ends the program with a message when either is wrong.
    pub(crate) fn from_arguments() -> Self {
        // vLLM's short form; a flag of one dash has one letter here.
        let args = std::env::args_os().map(|arg| if arg == "-tp" { "--tp".into() } else { arg });
        let args = config_file::expand(args.collect(), &Self::command(), "serve");
        let args = args.unwrap_or_else(|error| {
            print_error(&error);
            // What clap itself ends with.
            std::process::exit(2)
        });
        let command = Self::command();
        let matches = command.clone().get_matches_from(args);
        let mut cli = Self::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
        cli.settings = effective::settings(&command, &matches);
        cli
    }

    /// Sends messages to stderr; stdout is for results.
    pub(crate) fn init_logging(&self) {
        // Its parser has tried it.
        let filter = EnvFilter::try_new(&self.log_level).unwrap_or_else(|_| EnvFilter::new("info"));
        let is_plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let builder = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(log_tail::TeeStderr)
            // Otherwise the complaint about a reader that is gone goes to the same place, and panics there.
            .log_internal_errors(false)
            // Colours are for people who want them; a file or a journal gets plain text.
            .with_ansi(std::io::stderr().is_terminal() && !is_plain)
            .with_target(false);
        if self.log_json {
            builder.json().init();
        } else {
            builder.compact().init();
        }
    }

    pub(crate) fn run(self) -> anyhow::Result<()> {
        if let Some(ranks) = self.command.ranks() {
            ranks.prepare()?;
        }
        if let Command::Agent(args) = &self.command {
            args.prepare();
        }
        match self.command {
            Command::Agent(args) => agent::run(&args),
            Command::Serve(args) => serve::run(args, self.settings),
            Command::Generate(args) => generate::run(args),
            Command::Batch(args) => batch::run(args),
            Command::Bench(args) => bench::run(args),
            Command::DecodeVideo(args) => decode_video::run(&args),
            Command::Doctor(args) => doctor::run(&args),
            Command::Eval(args) => eval::run(args),
            Command::Inspect(args) => inspect::run(args),
            Command::Kernels(args) => kernels::run(args),
            Command::Plan(args) => plan::run(&args),
            Command::Probe(args) => probe::run(&args),
            Command::Pull(args) => pull::run(args),
            Command::Quantize(args) => quantize::run(&args),
            Command::SupportBundle(args) => support::run(&args),
            Command::Top(args) => top::run(&args),
        }
    }
}

impl Command {
    /// Of a command that may have several.
    fn ranks(&self) -> Option<&ranks::RankArgs> {
        match self {
            Self::Serve(args) => Some(args.ranks()),
            Self::Generate(args) => Some(args.ranks()),
            Self::Batch(args) => Some(args.ranks()),
            Self::Bench(args) => args.ranks(),
            Self::Eval(args) => Some(args.ranks()),
            _ => None,
        }
    }
}

/// `--log-level`: a level, or a filter. A word that is neither would be taken for a module and silence all others.
fn log_filter(text: &str) -> Result<String, String> {
    for directive in text.split(',').filter(|directive| !directive.contains(['=', '['])) {
        directive.trim().parse::<LevelFilter>().map_err(|_| {
            format!("`{directive}` is not error, warn, info, debug, trace or off; a filter names a module and its level, such as spark_runtime=debug")
        })?;
    }
    EnvFilter::try_new(text).map_err(|error| error.to_string())?;
    Ok(text.to_owned())
}

/// Whether it is that nobody reads the output any more, as in `spark-engine inspect | head -1`: nothing to complain about.
pub(crate) fn is_closed_output(error: &anyhow::Error) -> bool {
    // What has a context is about something else: a connection, a file.
    let is_bare = error.chain().count() == 1;
    let cause = error.downcast_ref::<std::io::Error>();
    is_bare && cause.is_some_and(|cause| cause.kind() == std::io::ErrorKind::BrokenPipe)
}

/// One line on stderr per link of the chain.
pub(crate) fn print_error(error: &anyhow::Error) {
    let mut stderr = std::io::stderr().lock();
    let _ = writeln!(stderr, "error: {error}");
    let mut last = error.to_string();
    for cause in error.chain().skip(1) {
        // Wrappers repeat their source, or end with it.
        let text = cause.to_string();
        if !last.ends_with(&text) {
            let _ = writeln!(stderr, "  caused by: {text}");
        }
        last = text;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_that_is_none_is_refused() {
        for text in ["info", "WARN", "off", "spark_runtime=debug", "warn,spark_runtime=trace"] {
            assert_eq!(log_filter(text).as_deref(), Ok(text));
        }
        for text in ["wrning", "spark_runtime", "warn,debgu", "a=b=c", "spark_runtime=loud"] {
            assert!(log_filter(text).is_err(), "{text}");
        }
    }

    #[test]
    fn only_the_reader_of_the_output_may_leave_without_a_word() {
        let closed = || anyhow::Error::from(std::io::Error::from(std::io::ErrorKind::BrokenPipe));
        assert!(is_closed_output(&closed()));
        assert!(!is_closed_output(&closed().context("http://127.0.0.1:8000")));
        assert!(!is_closed_output(&std::io::Error::from(std::io::ErrorKind::StorageFull).into()));
    }
}
