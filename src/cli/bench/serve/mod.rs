//! `spark-engine bench serve`: load on an OpenAI-compatible server, ours or another, seen from its client. Flags, table and
//! JSON as `vllm bench serve`.

mod answer;
mod arrivals;
mod client;
mod dataset;
mod goals;
mod load;
mod report;
mod sweep;
mod tokens;

use std::{
    future::Future,
    io::Write,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, ensure};
use clap::Args;
use serde_json::{Map, Value, json};

use self::{
    arrivals::{Arrivals, RampUp},
    client::Client,
    dataset::{DatasetArgs, DatasetName},
    goals::Goals,
    load::{Backend, Load, Target, drive},
    report::{Metric, Plan, Report},
    tokens::Tokens,
};
use super::{output, save};

/// Measure a server as its clients see it.
#[derive(Args, Clone)]
#[command(
    args_override_self = true,
    after_help = "Examples:\n  \
    spark-engine bench serve --num-prompts 200 --input-len 512 --output-len 128 --max-concurrency 16\n  \
    spark-engine bench serve --base-url http://spark-1:8000 --request-rate 4 --goodput \"ttft:500 tpot:50\"\n  \
    spark-engine bench serve --backend openai-chat --dataset-name random-mm --random-mm-size 1024x1024\n  \
    spark-engine bench serve --sweep-max-concurrency 1,4,16,64 --output-json sweep.json"
)]
pub(super) struct ServeBenchArgs {
    #[command(flatten)]
    server: ServerArgs,
    #[command(flatten)]
    dataset: DatasetArgs,
    #[command(flatten)]
    traffic: TrafficArgs,
    #[command(flatten)]
    results: ResultArgs,
}

#[derive(Args, Clone)]
#[command(next_help_heading = "Server")]
struct ServerArgs {
    /// API that is spoken.
    #[arg(long, visible_alias = "endpoint-type", value_enum, default_value = "openai")]
    backend: Backend,
    /// Address of the server; instead of --host and --port.
    #[arg(long, value_name = "URL", conflicts_with_all = ["host", "port"])]
    base_url: Option<String>,
    /// Host of the server.
    #[arg(long, default_value = "127.0.0.1")]
    host: String,
    /// Port of the server.
    #[arg(long, default_value_t = 8000)]
    port: u16,
    /// Path of the API; by default that of the backend.
    #[arg(long, value_name = "PATH")]
    endpoint: Option<String>,
    /// Name of the model; by default the first that the server lists.
    #[arg(short, long, visible_alias = "served-model-name", value_name = "NAME")]
    model: Option<String>,
    /// Folder or Hugging Face id of a tokenizer; by default that of the model, if it is on this machine, else the server's
    /// own through /tokenize.
    #[arg(long, value_name = "FOLDER")]
    tokenizer: Option<String>,
    /// Key of the server.
    #[arg(long, env = "OPENAI_API_KEY", hide_env_values = true, value_name = "KEY")]
    api_key: Option<String>,
    /// Answers may end before their length. By default they do not: --ignore-eos is sent.
    #[arg(long)]
    no_ignore_eos: bool,
    /// Sent with every request, as vLLM's flag; it is the default here.
    #[arg(long, conflicts_with = "no_ignore_eos")]
    ignore_eos: bool,
    /// Further fields of every request, such as '{"temperature": 0}'.
    #[arg(long, value_name = "JSON")]
    extra_body: Option<String>,
    /// Most seconds for one answer.
    #[arg(long, default_value_t = 21_600, value_name = "SECONDS")]
    request_timeout: u64,
}

#[derive(Args, Clone)]
#[command(next_help_heading = "Traffic")]
struct TrafficArgs {
    /// Requests a second; `inf` sends all at once.
    #[arg(long, default_value_t = f64::INFINITY, value_name = "RPS")]
    request_rate: f64,
    /// How even the arrivals are: 1 is a Poisson process, less is burstier, `inf` is a metronome.
    #[arg(long, default_value_t = 1.0, value_name = "SHAPE")]
    burstiness: f64,
    /// Most requests at once.
    #[arg(long, value_name = "N")]
    max_concurrency: Option<usize>,
    /// The rate grows from --ramp-up-start-rps to --ramp-up-end-rps.
    #[arg(long, value_enum, requires_all = ["ramp_up_start_rps", "ramp_up_end_rps"])]
    ramp_up_strategy: Option<RampUp>,
    /// Requests a second at the start.
    #[arg(long, requires = "ramp_up_strategy", value_name = "RPS")]
    ramp_up_start_rps: Option<f64>,
    /// Requests a second at the end.
    #[arg(long, requires = "ramp_up_strategy", value_name = "RPS")]
    ramp_up_end_rps: Option<f64>,
    /// Requests before the measurement that do not count.
    #[arg(long, default_value_t = 1, value_name = "N")]
    num_warmups: usize,
    /// Runs one after the other with these numbers of requests at once.
    #[arg(long, value_delimiter = ',', value_name = "N,...", conflicts_with = "max_concurrency")]
    sweep_max_concurrency: Vec<usize>,
    /// Runs one after the other with these rates.
    #[arg(long, value_delimiter = ',', value_name = "RPS,...", conflicts_with = "request_rate")]
    sweep_request_rate: Vec<f64>,
    /// Equal seeds give equal prompts and arrivals.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

#[derive(Args, Clone)]
#[command(next_help_heading = "Results")]
struct ResultArgs {
    /// Goals of service in milliseconds, such as "ttft:500 tpot:50 e2el:10000": requests that meet all are the goodput.
    #[arg(long, num_args = 1.., value_name = "METRIC:MS")]
    goodput: Vec<Goals>,
    /// Metrics to report.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "ttft,tpot,itl,e2el")]
    percentile_metrics: Vec<Metric>,
    /// Percentiles of them.
    #[arg(long, value_delimiter = ',', default_value = "99", value_name = "PERCENT,...")]
    metric_percentiles: Vec<f64>,
    /// A word for the results.
    #[arg(long)]
    label: Option<String>,
    /// Write a file of results, named after backend, rate, model and time.
    #[arg(long)]
    save_result: bool,
    /// With the numbers and texts of every request.
    #[arg(long)]
    save_detailed: bool,
    /// Folder of that file.
    #[arg(long, value_name = "FOLDER", requires = "save_result")]
    result_dir: Option<PathBuf>,
    /// Name of that file.
    #[arg(long, value_name = "NAME", requires = "save_result")]
    result_filename: Option<String>,
    /// Write the results as JSON; of a sweep, those of all its runs.
    #[arg(long, value_name = "FILE")]
    output_json: Option<PathBuf>,
}

pub(super) fn run(args: &ServeBenchArgs) -> anyhow::Result<()> {
    args.check()?;
    args.results.check_file()?;
    block_on(measure(args))?
}

/// Runs a future on a runtime of its own.
fn block_on<T>(future: impl Future<Output = T>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    Ok(runtime.block_on(future))
}

async fn measure(args: &ServeBenchArgs) -> anyhow::Result<()> {
    let target = args.target().await?;
    let tokens = Tokens::open(args.server.tokenizer.as_deref(), &target.model, &target.client).await?;
    let prompts = args.dataset.prompts(&tokens, args.traffic.seed).await?;
    for idx in 0..args.traffic.num_warmups {
        target.try_once(&prompts[idx % prompts.len()]).await?;
    }
    // Not locked: tables are shown as they come.
    let mut out = std::io::stdout();
    let mut reports = Vec::new();
    for load in args.traffic.loads() {
        let plan = args.plan(&target, &tokens, load)?;
        let (answers, duration) = drive(&target, &prompts, load).await?;
        warn_of_failures(&answers);
        let report = Report::new(plan, &answers, duration);
        write!(out, "{}", report.table())?;
        args.results.save(&report)?;
        reports.push(report);
    }
    let detailed = args.results.save_detailed;
    let results = match &reports[..] {
        [single] => single.json(detailed),
        several => {
            write!(out, "\n{}", sweep::table(several))?;
            json!({"sweep": several.iter().map(|report| report.json(detailed)).collect::<Vec<_>>()})
        }
    };
    save(args.results.output_json.as_deref(), &results)?;
    let failed: f64 = reports.iter().map(|report| report.number("failed")).sum();
    ensure!(
        reports.iter().any(|report| report.number("completed") > 0.0),
        "all {failed} requests have failed"
    );
    Ok(())
}

/// One line for each kind of failure.
fn warn_of_failures(answers: &[answer::Answer]) {
    let mut kinds: Vec<(&str, usize)> = Vec::new();
    for error in answers.iter().filter(|answer| !answer.is_success()).map(|answer| answer.error.as_str()) {
        match kinds.iter_mut().find(|(kind, _)| *kind == error) {
            Some((_, count)) => *count += 1,
            None => kinds.push((error, 1)),
        }
    }
    for (kind, count) in kinds.iter().take(5) {
        tracing::warn!("{count} requests have failed: {kind}");
    }
}

impl ServeBenchArgs {
    /// The file of `--output-json`.
    pub(super) fn output_json(&self) -> Option<&Path> {
        self.results.output_json.as_deref()
    }

    /// What clap cannot check.
    fn check(&self) -> anyhow::Result<()> {
        let Self { server, dataset, traffic, results } = self;
        let is_positive = |value: f64| value > 0.0;
        let rates = traffic.sweep_request_rate.iter().chain([&traffic.request_rate]);
        let rates = rates.chain(&traffic.ramp_up_start_rps).chain(&traffic.ramp_up_end_rps);
        ensure!(rates.copied().all(is_positive), "rates of requests must be above 0");
        ensure!(is_positive(traffic.burstiness), "--burstiness must be above 0");
        let limits = traffic.sweep_max_concurrency.iter().chain(&traffic.max_concurrency);
        ensure!(limits.copied().all(|limit| limit > 0), "--max-concurrency must be at least 1");
        let in_range = |percent: &f64| (0.0..=100.0).contains(percent);
        ensure!(results.metric_percentiles.iter().all(in_range), "--metric-percentiles are from 0 to 100");
        ensure!(
            dataset.dataset_name != DatasetName::RandomMm || server.backend == Backend::OpenaiChat,
            "--dataset-name random-mm: pictures need --backend openai-chat"
        );
        ensure!(server.request_timeout > 0, "--request-timeout must be at least 1");
        Ok(())
    }

    /// Where requests go. Asks the server for its model if none is named.
    async fn target(&self) -> anyhow::Result<Target> {
        let ServerArgs { backend, base_url, host, port, endpoint, model, api_key, .. } = &self.server;
        let bracketed = if host.contains(':') { format!("[{host}]") } else { host.clone() };
        let url = base_url.clone().unwrap_or_else(|| format!("http://{bracketed}:{port}"));
        let client = Client::new(&url, api_key.clone().filter(|key| !key.is_empty()))?;
        let model = match model {
            Some(model) => model.clone(),
            None => {
                let models = client.get_json("/v1/models").await;
                let models = models.with_context(|| format!("{url}: asking for its models"))?;
                let first = models["data"][0]["id"].as_str();
                first.with_context(|| format!("{url} lists no model; name one with --model"))?.to_owned()
            }
        };
        let path = endpoint.clone().unwrap_or_else(|| backend.default_path().to_owned());
        ensure!(path.starts_with('/'), "--endpoint {path}: a path begins with a slash");
        let extra_body = match &self.server.extra_body {
            None => Map::new(),
            Some(text) => serde_json::from_str(text).context("--extra-body: not a JSON object")?,
        };
        Ok(Target {
            client,
            backend: *backend,
            path,
            model,
            ignore_eos: !self.server.no_ignore_eos,
            extra_body,
            timeout: Duration::from_secs(self.server.request_timeout),
        })
    }

    fn plan(&self, target: &Target, tokens: &Tokens, load: Load) -> anyhow::Result<Plan> {
        Ok(Plan {
            backend: target.backend.name(),
            label: self.results.label.clone(),
            model: target.model.clone(),
            tokenizer: tokens.name.clone(),
            request_rate: load.arrivals.rate,
            burstiness: load.arrivals.burstiness,
            max_concurrency: load.max_concurrency,
            metrics: self.results.percentile_metrics.clone(),
            percentiles: self.results.metric_percentiles.clone(),
            goals: Goals::joined(&self.results.goodput),
            date: date(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs()),
        })
    }
}

impl TrafficArgs {
    /// One load, or all of a sweep.
    fn loads(&self) -> Vec<Load> {
        let ramp_up = self.ramp_up_strategy.zip(self.ramp_up_start_rps).zip(self.ramp_up_end_rps);
        let ramp_up = ramp_up.map(|((kind, from), to)| (kind, from, to));
        let limits: Vec<Option<usize>> = match &self.sweep_max_concurrency[..] {
            [] => vec![self.max_concurrency],
            several => several.iter().copied().map(Some).collect(),
        };
        let rates = match &self.sweep_request_rate[..] {
            [] => &[self.request_rate],
            several => several,
        };
        let mut loads = Vec::new();
        for &max_concurrency in &limits {
            for &rate in rates {
                let arrivals = Arrivals { rate, burstiness: self.burstiness, ramp_up };
                loads.push(Load { arrivals, max_concurrency, seed: self.seed });
            }
        }
        loads
    }
}

impl ResultArgs {
    /// Fails if the file of `--save-result` could not be written.
    fn check_file(&self) -> anyhow::Result<()> {
        if !self.save_result {
            return Ok(());
        }
        // Its own name is known with its results; any name that nobody has used shows whether the folder takes files.
        let name = self.result_filename.as_deref().unwrap_or(".spark-engine.json");
        output::check(self.flag_of_file(), &self.result_dir.clone().unwrap_or_default().join(name))
    }

    /// What says where that file is.
    fn flag_of_file(&self) -> &'static str {
        if self.result_dir.is_some() { "--result-dir" } else { "--save-result" }
    }

    /// The file of `--save-result`, by vLLM's name for it.
    fn save(&self, report: &Report) -> anyhow::Result<()> {
        if !self.save_result {
            return Ok(());
        }
        let text = |name: &str| match &report.fields[name] {
            Value::String(text) => text.replace('/', "_"),
            value => value.to_string(),
        };
        let name = self.result_filename.clone().unwrap_or_else(|| {
            let limit = match &report.fields["max_concurrency"] {
                Value::Null => String::new(),
                limit => format!("-concurrency{limit}"),
            };
            let first = self.label.clone().unwrap_or_else(|| text("backend"));
            let (rate, model, date) = (text("request_rate"), text("model_id"), text("date"));
            format!("{first}-{rate}qps{limit}-{model}-{date}.json")
        });
        let path = self.result_dir.clone().unwrap_or_default().join(name);
        output::write(self.flag_of_file(), &path, &report.json(self.save_detailed))
    }
}

/// `YYYYMMDD-HHMMSS` in UTC of seconds since 1970.
fn date(seconds: u64) -> String {
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Days from 1 March of year 0, in which leap days are the last of their year; an era is 400 years.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}{month:02}{day:02}-{hour:02}{minute:02}{second:02}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: ServeBenchArgs,
    }

    fn parse(flags: &[&str]) -> anyhow::Result<ServeBenchArgs> {
        let args = Line::try_parse_from([&["x"], flags].concat())?.args;
        args.check()?;
        Ok(args)
    }

    #[test]
    fn a_sweep_is_every_limit_with_every_rate() {
        let args = parse(&["--sweep-max-concurrency", "1,4", "--sweep-request-rate", "2,inf"]).unwrap();
        let loads: Vec<_> =
            args.traffic.loads().iter().map(|load| (load.max_concurrency, load.arrivals.rate)).collect();
        let inf = f64::INFINITY;
        assert_eq!(loads, [(Some(1), 2.0), (Some(1), inf), (Some(4), 2.0), (Some(4), inf)]);
        assert_eq!(parse(&["--max-concurrency", "3"]).unwrap().traffic.loads()[0].max_concurrency, Some(3));
    }

    #[test]
    fn flags_that_mean_nothing_are_refused() {
        for flags in [
            &["--request-rate", "0"][..],
            &["--request-rate", "nan"],
            &["--burstiness", "-1"],
            &["--max-concurrency", "0"],
            &["--metric-percentiles", "101"],
            &["--dataset-name", "random-mm"],
            &["--ramp-up-strategy", "linear"],
            &["--goodput", "ttft"],
            &["--sweep-request-rate", "1,0"],
            &["--base-url", "http://x", "--port", "1"],
        ] {
            assert!(parse(flags).is_err(), "{flags:?}");
        }
        assert!(parse(&["--goodput", "ttft:1", "tpot:2"]).is_ok());
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, expected) in [
            (0, "19700101-000000"),
            (951_782_400, "20000229-000000"),
            (1_704_067_199, "20231231-235959"),
            (1_795_262_400, "20261121-120000"),
        ] {
            assert_eq!(date(seconds), expected);
        }
    }
}
