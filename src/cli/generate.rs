//! `spark-engine generate`: answers to one prompt or several, streamed to the terminal.

use std::{
    io::{IsTerminal, Read, Write},
    path::PathBuf,
    time::Instant,
};

use anyhow::Context;
use clap::Args;
use serde_json::{Value, json};
use spark_engine::{Generation, SparkEngine, image_data_url};
use tokio::signal::unix::{SignalKind, signal};

use super::{INTERRUPTED, args::ModelArgs, ranks::RankArgs};

/// Most tokens with `--raw` unless said: what continues a text without a template seldom ends by itself.
const DEFAULT_RAW_TOKENS: usize = 512;

/// Answer a prompt on the terminal.
#[derive(Args)]
#[command(args_override_self = true)]
#[command(after_help = "Examples:\n  \
    spark-engine generate \"What is 123 + 456?\"\n  \
    spark-engine generate ./model --image photo.jpg \"What is in the picture?\"\n  \
    spark-engine generate --image table.png -p \"How many rows are there?\" -p \"What does tea cost?\"")]
pub(crate) struct GenerateArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// The prompt; `-` or nothing reads it from standard input. A single argument is MODEL if it is a folder, or has a
    /// slash and no white space; else it is the prompt.
    #[arg(value_name = "PROMPT", help_heading = clap::builder::Resettable::Reset)]
    argument: Option<String>,
    /// PROMPT as a flag; repeat for several questions about the same pictures, each asked on its own.
    #[arg(short = 'p', long, help_heading = "Prompt and sampling", value_name = "PROMPT")]
    prompt: Vec<String>,
    /// Picture to ask about; repeat for several.
    #[arg(long, help_heading = "Prompt and sampling", value_name = "FILE")]
    image: Vec<PathBuf>,
    /// System prompt.
    #[arg(long, help_heading = "Prompt and sampling", value_name = "TEXT")]
    system: Option<String>,
    /// Continue the prompt as it is, without the chat template.
    #[arg(long, help_heading = "Prompt and sampling", conflicts_with_all = ["image", "system"])]
    raw: bool,
    /// Most tokens to generate; by default what the context has room for, with --raw at most 512.
    #[arg(long, help_heading = "Prompt and sampling", short = 'n', value_name = "TOKENS")]
    max_tokens: Option<usize>,
    /// 0 is greedy; by default the model's own setting.
    #[arg(long, help_heading = "Prompt and sampling", allow_negative_numbers = true)]
    temperature: Option<f32>,
    /// Keep the smallest set of tokens whose probability reaches this.
    #[arg(long, help_heading = "Prompt and sampling")]
    top_p: Option<f32>,
    /// Keep this many most likely tokens.
    #[arg(long, help_heading = "Prompt and sampling")]
    top_k: Option<u32>,
    /// Stop before this text; repeat for several.
    #[arg(long, help_heading = "Prompt and sampling", value_name = "TEXT")]
    stop: Vec<String>,
    /// Go on past the end-of-sequence token.
    #[arg(long, help_heading = "Prompt and sampling")]
    ignore_eos: bool,
    /// Print times and speed on stderr.
    #[arg(long, help_heading = "Prompt and sampling", short)]
    verbose: bool,
}

impl GenerateArgs {
    pub(crate) fn ranks(&self) -> &RankArgs {
        &self.model.ranks
    }
}

pub(crate) fn run(mut args: GenerateArgs) -> anyhow::Result<()> {
    if args.prompt.is_empty() {
        args.prompt.extend(args.model.model.take_prompt(args.argument.take())?);
    } else if let Some(argument) = &args.argument {
        anyhow::bail!("`{argument}`: the prompt is given twice: leave --prompt or this argument out");
    }
    if args.model.ranks.is_follower()? {
        return args.model.follow();
    }
    let bodies = args.bodies()?;
    let (raw, verbose) = (args.raw, args.verbose);
    let engine = args.model.build()?;
    anyhow::ensure!(
        raw || engine.front_end().has_chat_template(),
        "this model has no chat template, so it takes no conversations; --raw continues the prompt as it is"
    );
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let interrupted = runtime.block_on(async {
        // One listener for all of it: a signal between two pieces is not lost.
        let mut interrupt = signal(SignalKind::interrupt())?;
        let show_prompts = bodies.len() > 1;
        let whole = async {
            for (prompt, body) in bodies {
                if show_prompts {
                    writeln!(std::io::stderr(), "> {}", printable(&prompt))?;
                }
                answer(&engine, body, raw, verbose).await?;
            }
            anyhow::Ok(())
        };
        // The answer is dropped on a signal, which cancels it.
        tokio::select! {
            result = whole => result.map(|()| false),
            _ = interrupt.recv() => {
                writeln!(std::io::stdout())?;
                Ok(true)
            }
        }
    })?;
    if interrupted {
        // Threads end before the process does.
        drop((runtime, engine));
        std::process::exit(INTERRUPTED);
    }
    Ok(())
}

async fn answer(engine: &SparkEngine, mut body: Value, raw: bool, verbose: bool) -> anyhow::Result<()> {
    if raw && body.get("max_tokens").is_none() {
        body["max_tokens"] = default_raw_tokens(engine, body["prompt"].as_str().unwrap_or_default())?.into();
    }
    let start = Instant::now();
    let answer = if raw { engine.completion(body).await } else { engine.chat(body).await }?;
    print(answer, start, verbose).await
}

fn default_raw_tokens(engine: &SparkEngine, prompt: &str) -> anyhow::Result<usize> {
    let num_prompt_tokens = engine.tokenizer().encode_trusted(prompt)?.len();
    let room = engine.info().limits.max_model_len.saturating_sub(num_prompt_tokens);
    // Without room the request is refused, with the numbers.
    Ok(DEFAULT_RAW_TOKENS.min(room).max(1))
}

/// Streams an answer to stdout.
async fn print(mut answer: Generation, start: Instant, verbose: bool) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout();
    let to_terminal = stdout.is_terminal();
    let (mut first, mut num_tokens, mut was_thinking) = (None, 0, false);
    while let Some(piece) = answer.next().await {
        let piece = piece?;
        num_tokens += piece.tokens.len();
        if !piece.tokens.is_empty() {
            first.get_or_insert_with(Instant::now);
        }
        // Thoughts are shown and are no part of the answer.
        let mut stderr = std::io::stderr();
        stderr.write_all(printable(&piece.reasoning).as_bytes())?;
        if was_thinking && piece.reasoning.is_empty() && !piece.text.is_empty() {
            stderr.write_all(b"\n\n")?;
        }
        was_thinking = (was_thinking || !piece.reasoning.is_empty()) && piece.text.is_empty();
        let text = if to_terminal { printable(&piece.text) } else { piece.text };
        stdout.write_all(text.as_bytes())?;
        stdout.flush()?;
    }
    writeln!(stdout)?;
    if verbose {
        report(start, first, answer.num_prompt_tokens(), num_tokens)?;
    }
    Ok(())
}

/// Without control characters: what a model writes must not move the cursor or reprogram the terminal.
fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).collect()
}

fn report(
    start: Instant,
    first: Option<Instant>,
    num_prompt_tokens: usize,
    num_tokens: usize,
) -> anyhow::Result<()> {
    let Some(first) = first else { return Ok(()) };
    let decode = first.elapsed().as_secs_f64();
    let speed = if num_tokens > 1 { (num_tokens - 1) as f64 / decode.max(1e-9) } else { 0.0 };
    writeln!(
        std::io::stderr(),
        "{num_prompt_tokens} prompt tokens, first token after {:.0} ms; {num_tokens} tokens, {speed:.1} tok/s",
        (first - start).as_secs_f64() * 1e3
    )?;
    Ok(())
}

fn read_prompt() -> anyhow::Result<String> {
    anyhow::ensure!(
        !std::io::stdin().is_terminal(),
        "no prompt: give it as an argument or on standard input"
    );
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text).context("reading the prompt from standard input")?;
    // What filled the pipe has most likely failed.
    anyhow::ensure!(!text.trim().is_empty(), "the prompt on standard input is empty");
    Ok(text)
}

impl GenerateArgs {
    /// Each prompt with its request.
    fn bodies(&self) -> anyhow::Result<Vec<(String, Value)>> {
        let given = if self.prompt.is_empty() { &["-".to_owned()][..] } else { &self.prompt };
        let prompts = given.iter().map(|text| if text == "-" { read_prompt() } else { Ok(text.clone()) });
        let prompts = prompts.collect::<anyhow::Result<Vec<_>>>()?;
        prompts.into_iter().map(|prompt| Ok((prompt.clone(), self.body(prompt)?))).collect()
    }

    fn body(&self, prompt: String) -> anyhow::Result<Value> {
        let mut body = json!({"stream": true});
        let fields = [
            ("max_tokens", self.max_tokens.map(Value::from)),
            ("temperature", self.temperature.map(Value::from)),
            ("top_p", self.top_p.map(Value::from)),
            ("top_k", self.top_k.map(Value::from)),
            ("stop", (!self.stop.is_empty()).then(|| json!(self.stop))),
            ("ignore_eos", self.ignore_eos.then_some(Value::Bool(true))),
        ];
        for (name, value) in fields {
            if let Some(value) = value {
                body[name] = value;
            }
        }
        if self.raw {
            body["prompt"] = prompt.into();
            return Ok(body);
        }
        let mut parts = Vec::new();
        for path in &self.image {
            let url = image_data_url(path).with_context(|| format!("--image {}", path.display()))?;
            parts.push(json!({"type": "image_url", "image_url": {"url": url}}));
        }
        parts.push(json!({"type": "text", "text": prompt}));
        let mut messages = Vec::new();
        if let Some(system) = &self.system {
            messages.push(json!({"role": "system", "content": system}));
        }
        messages.push(json!({"role": "user", "content": parts}));
        body["messages"] = messages.into();
        Ok(body)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_do_not_reach_a_terminal() {
        assert_eq!(printable("a\u{1b}[31mb\tc\n\u{9b}d"), "a[31mb\tc\nd");
    }
}
