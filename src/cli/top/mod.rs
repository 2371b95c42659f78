//! `spark-engine top`: a running server in the terminal, from `/metrics`, `/load` and `/health`; beside it GPU and rails of this
//! machine. Asks, changes nothing.

mod machine;
mod scrape;
mod view;

use std::{
    io::{IsTerminal, Write},
    path::Path,
    time::{Duration, Instant},
};

use clap::Args;
use ratatui::{
    DefaultTerminal, Frame,
    crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers},
    layout::{Constraint, Layout},
    style::{Modifier, Style},
    text::{Line, Span},
    widgets::{Block, Gauge, Paragraph},
};

use self::{
    scrape::Page,
    view::{Sample, Section},
};
use super::trust;

/// Longest that the server may take for an answer; it promises ten milliseconds.
const PATIENCE: Duration = Duration::from_secs(3);
/// Where the kernel shows ports of RDMA.
const RAILS: &str = "/sys/class/infiniband";

/// Watch a running server: tokens a second, who runs and waits, KV cache, latencies, GPU and rails of this machine. `q` ends it.
#[derive(Args)]
pub(crate) struct TopArgs {
    /// The server.
    #[arg(long, default_value = "http://127.0.0.1:8000", value_name = "URL")]
    url: String,
    /// Its key, if it wants one: the admin's, if there is one.
    #[arg(long, env = "SPARK_ADMIN_API_KEY", value_name = "KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// Seconds between two looks.
    #[arg(long, default_value_t = 1.0, value_name = "SECONDS", value_parser = interval)]
    interval: f64,
    /// Print one frame, of two looks, as text; also what happens where stdout is no terminal.
    #[arg(long)]
    once: bool,
    /// Print one frame as JSON.
    #[arg(long)]
    json: bool,
}

/// Between a tenth of a second and an hour.
fn interval(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_| "a number of seconds".to_owned())?;
    if (0.1..=3600.0).contains(&seconds) {
        Ok(seconds)
    } else {
        Err("between 0.1 and 3600 seconds".to_owned())
    }
}

pub(crate) fn run(args: &TopArgs) -> anyhow::Result<()> {
    let server = Server::new(args)?;
    let interval = Duration::from_secs_f64(args.interval);
    if args.once || args.json || !std::io::stdout().is_terminal() {
        return once(args, &server, interval);
    }
    let mut terminal = ratatui::try_init()?;
    let result = watch(&mut terminal, &server, interval);
    ratatui::restore();
    result
}

fn once(args: &TopArgs, server: &Server, interval: Duration) -> anyhow::Result<()> {
    let before = server.look();
    // Rates are those of the time between two looks.
    std::thread::park_timeout(interval);
    let now = server.look();
    let text = match args.json {
        true => format!("{:#}\n", view::to_json(&server.url, &now, Some(&before))),
        false => view::plain(&view::sections(&server.url, &now, Some(&before))),
    };
    std::io::stdout().write_all(text.as_bytes())?;
    anyhow::ensure!(now.page.is_some(), "{}: {}", server.url, now.health);
    Ok(())
}

fn watch(terminal: &mut DefaultTerminal, server: &Server, interval: Duration) -> anyhow::Result<()> {
    let mut before = None;
    loop {
        let now = server.look();
        let sections = view::sections(&server.url, &now, before.as_ref());
        terminal.draw(|frame| draw(frame, &sections, view::kv_use(&now)))?;
        before = Some(now);
        let deadline = Instant::now() + interval;
        while event::poll(deadline.saturating_duration_since(Instant::now()))? {
            match event::read()? {
                Event::Key(key) if key.kind == KeyEventKind::Press => {
                    let is_interrupt =
                        key.modifiers.contains(KeyModifiers::CONTROL) && key.code == KeyCode::Char('c');
                    if is_interrupt || matches!(key.code, KeyCode::Char('q') | KeyCode::Esc) {
                        return Ok(());
                    }
                }
                Event::Resize(..) => {
                    terminal.draw(|frame| draw(frame, &sections, None))?;
                }
                _ => {}
            }
        }
    }
}

/// A box a section, and the KV cache as a bar.
fn draw(frame: &mut Frame<'_>, sections: &[Section], kv_use: Option<f64>) {
    let rows = sections.iter().map(|section| section.rows.len() as u16 + 2);
    let mut heights: Vec<Constraint> = rows.map(Constraint::Length).collect();
    heights.extend([Constraint::Length(3), Constraint::Min(0)]);
    let areas = Layout::vertical(heights).split(frame.area());
    for (section, area) in sections.iter().zip(areas.iter()) {
        let line = |(name, text): &(String, String)| {
            Line::from(vec![
                Span::styled(format!(" {name:<26}"), Style::default().add_modifier(Modifier::DIM)),
                Span::raw(text.clone()),
            ])
        };
        let lines: Vec<Line<'_>> = section.rows.iter().map(line).collect();
        frame.render_widget(Paragraph::new(lines).block(Block::bordered().title(section.title)), *area);
    }
    if let (Some(share), Some(area)) = (kv_use, areas.get(sections.len())) {
        let gauge = Gauge::default().block(Block::bordered().title("KV cache")).ratio(share.clamp(0.0, 1.0));
        frame.render_widget(gauge, *area);
    }
}

/// The server that is watched.
struct Server {
    agent: ureq::Agent,
    url: String,
    key: Option<String>,
    /// Whether it is this machine, whose GPU and rails then belong to it.
    is_here: bool,
}

impl Server {
    fn new(args: &TopArgs) -> anyhow::Result<Self> {
        let has_scheme = ["http://", "https://"].iter().any(|scheme| args.url.starts_with(scheme));
        anyhow::ensure!(has_scheme, "--url {}: expected an address such as http://localhost:8000", args.url);
        let config = ureq::Agent::config_builder()
            .tls_config(trust::for_requests_to(&args.url)?)
            .proxy(None)
            .timeout_global(Some(PATIENCE))
            .http_status_as_error(false);
        let url = args.url.trim_end_matches('/').to_owned();
        let host = url.split("://").nth(1).unwrap_or(&url);
        let is_here = ["127.", "localhost", "[::1]"].iter().any(|name| host.starts_with(name));
        Ok(Self { agent: config.build().into(), key: args.api_key.clone(), is_here, url })
    }

    fn look(&self) -> Sample {
        let health = match self.get("/health") {
            Ok((200, _)) => "ready".to_owned(),
            Ok((status, text)) => format!("{status} {text}"),
            Err(problem) => problem,
        };
        let (page, health) = match self.get("/metrics") {
            Ok((200, text)) => (Some(Page::parse(&text, Instant::now())), health),
            Ok((status @ (401 | 403), _)) => {
                (None, format!("/metrics answers {status}: give its key with --api-key"))
            }
            Ok((status, _)) => (None, format!("/metrics answers {status}")),
            Err(problem) => (None, problem),
        };
        let load = self.get("/load").ok().and_then(|(_, text)| {
            serde_json::from_str::<serde_json::Value>(&text).ok()?["server_load"].as_f64()
        });
        let gpus = if self.is_here { machine::gpus() } else { Vec::new() };
        let root = if self.is_here { RAILS } else { "" };
        Sample { page, health, load, gpus, rails: machine::Rails::read(Path::new(root), Instant::now()) }
    }

    /// Status and body.
    fn get(&self, route: &str) -> Result<(u16, String), String> {
        let mut request = self.agent.get(format!("{}{route}", self.url));
        if let Some(key) = &self.key {
            request = request.header("Authorization", format!("Bearer {key}"));
        }
        let mut response = request.call().map_err(|error| error.to_string())?;
        let text = response.body_mut().read_to_string().map_err(|error| error.to_string())?;
        Ok((response.status().as_u16(), text))
    }
}

#[cfg(test)]
mod tests {
    use ratatui::{Terminal, backend::TestBackend};

    use super::*;

    #[test]
    fn a_frame_has_every_row_and_fits_a_small_terminal() {
        let text = "vllm:generation_tokens_total{model_name=\"m\"} 7\nvllm:num_requests_running{model_name=\"m\"} 3\n\
            vllm:kv_cache_usage_perc{model_name=\"m\"} 0.5\n";
        let sample = Sample {
            page: Some(Page::parse(text, Instant::now())),
            health: "ready\u{1b}[2J".to_owned(),
            load: None,
            gpus: Vec::new(),
            rails: machine::Rails::read(Path::new(""), Instant::now()),
        };
        let sections = view::sections("http://x", &sample, None);
        for (width, height) in [(100, 60), (20, 4)] {
            let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
            terminal.draw(|frame| draw(frame, &sections, view::kv_use(&sample))).unwrap();
            let shown = terminal.backend().to_string();
            assert!(!shown.contains('\u{1b}'));
            assert_eq!(
                height == 60,
                shown.contains("running                   3") && shown.contains("50%"),
                "{shown}"
            );
        }
        let plain = view::plain(&sections);
        assert!(
            plain.contains("running                   3")
                && plain.contains("KV cache used             50.0 %"),
            "{plain}"
        );
        assert!(interval("0").is_err() && interval("nan").is_err() && interval("2").is_ok());
    }
}
