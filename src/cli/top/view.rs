//! What `top` shows, as rows of a name and a text: the same for the terminal, for one plain frame and for JSON. Asks nobody.

use serde_json::{Value, json};

use super::{
    machine::{Gpu, Rails},
    scrape::Page,
};

/// All that is known at one moment.
pub(super) struct Sample {
    /// `None` while the server does not answer.
    pub(super) page: Option<Page>,
    /// Of `/health`, or why there is none.
    pub(super) health: String,
    /// Answers at work.
    pub(super) load: Option<f64>,
    pub(super) gpus: Vec<Gpu>,
    pub(super) rails: Rails,
}

/// A group of rows.
pub(super) struct Section {
    pub(super) title: &'static str,
    pub(super) rows: Vec<(String, String)>,
}

/// Share of the KV cache in use, 0 to 1.
pub(super) fn kv_use(sample: &Sample) -> Option<f64> {
    sample.page.as_ref()?.value("vllm:kv_cache_usage_perc")
}

/// Everything in groups; rates are those since `before`.
pub(super) fn sections(url: &str, now: &Sample, before: Option<&Sample>) -> Vec<Section> {
    let mut sections = vec![server(url, now)];
    if let Some(page) = &now.page {
        let old = before.and_then(|before| before.page.as_ref());
        sections.extend([work(page, old), latencies(page, old), caches(page, old)]);
    }
    sections.extend(machine(now, before));
    sections
}

fn server(url: &str, now: &Sample) -> Section {
    let mut rows = vec![row("server", url), row("health", &now.health)];
    if let Some(page) = &now.page {
        rows.push(row("model", &page.model));
        if let Some(bytes) = page.value("spark_process_resident_memory_bytes") {
            rows.push(row("memory", &format!("{:.2} GiB", bytes / f64::from(1 << 30))));
        }
        if let Some(count) = page.value("spark_engine_rebuilt_total").filter(|&count| count > 0.0) {
            rows.push(row("ranks lost and made anew", &format!("{count:.0}")));
        }
    }
    Section { title: "server", rows }
}

fn work(page: &Page, old: Option<&Page>) -> Section {
    let rate = |name: &str| shown(page.rate(old, name), 1, "/s");
    let rows = vec![
        row("generated tokens", &rate("vllm:generation_tokens_total")),
        row("prompt tokens", &rate("vllm:prompt_tokens_total")),
        row("requests ended", &rate("vllm:request_success_total")),
        row("running", &shown(page.value("vllm:num_requests_running"), 0, "")),
        row("waiting", &shown(page.value("vllm:num_requests_waiting"), 0, "")),
        row("preemptions", &shown(page.value("vllm:num_preemptions_total"), 0, "")),
        row("turned away", &shown(page.value("vllm:admission_rejections_total"), 0, "")),
    ];
    Section { title: "work", rows }
}

fn latencies(page: &Page, old: Option<&Page>) -> Section {
    let of = |name: &str| {
        let at = |share: f64| shown(page.quantile(old, name, share).map(|seconds| seconds * 1e3), 1, "");
        format!("{} / {} / {} ms", at(0.5), at(0.9), at(0.99))
    };
    let rows = vec![
        row("first token p50/p90/p99", &of("vllm:time_to_first_token_seconds")),
        row("between tokens", &of("vllm:inter_token_latency_seconds")),
        row("waiting", &of("vllm:request_queue_time_seconds")),
        row("whole request", &of("vllm:e2e_request_latency_seconds")),
        row("step on rank 0", &of("spark_step_seconds")),
        row("steps", &shown(page.rate(old, "spark_steps_total"), 1, "/s")),
    ];
    Section { title: "latency", rows }
}

fn caches(page: &Page, old: Option<&Page>) -> Section {
    // Of what came since then, else of all.
    let share = |hits: &str, queries: &str| {
        let recent = page.rate(old, hits).zip(page.rate(old, queries)).filter(|(_, queries)| *queries > 0.0);
        let (hits, queries) = recent.or_else(|| page.value(hits).zip(page.value(queries)))?;
        (queries > 0.0).then(|| 100.0 * hits / queries)
    };
    let rows = vec![
        row(
            "KV cache used",
            &shown(page.value("vllm:kv_cache_usage_perc").map(|share| share * 100.0), 1, " %"),
        ),
        row(
            "prefix found",
            &shown(share("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"), 1, " %"),
        ),
        row(
            "images found",
            &shown(share("vllm:mm_cache_hits_total", "vllm:mm_cache_queries_total"), 1, " %"),
        ),
    ];
    Section { title: "caches", rows }
}

fn machine(now: &Sample, before: Option<&Sample>) -> Option<Section> {
    let gpu = |(i, gpu): (usize, &Gpu)| {
        let text = format!(
            "{}  {}  {}  {}  {}",
            gpu.name,
            shown(gpu.busy, 0, " %"),
            shown(gpu.watts, 0, " W"),
            shown(gpu.megahertz, 0, " MHz"),
            shown(gpu.celsius, 0, " °C")
        );
        row(&format!("GPU {i}"), &text)
    };
    let rail = |(name, received, sent): (String, f64, f64)| {
        row(&name, &format!("{received:.1} Gb/s in, {sent:.1} Gb/s out"))
    };
    let rails = now.rails.rates(before.map(|before| &before.rails));
    let rows: Vec<_> = now.gpus.iter().enumerate().map(gpu).chain(rails.into_iter().map(rail)).collect();
    (!rows.is_empty()).then_some(Section { title: "this machine", rows })
}

/// A number with so many decimals and its unit; a dash if it is not known.
fn shown(value: Option<f64>, decimals: usize, unit: &str) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.decimals$}{unit}"))
}

fn row(name: &str, text: &str) -> (String, String) {
    // What a server says may not move the cursor.
    (name.to_owned(), text.chars().map(|c| if c.is_control() { '?' } else { c }).collect())
}

/// One frame without colours or moves of the cursor.
pub(super) fn plain(sections: &[Section]) -> String {
    let mut text = String::new();
    for section in sections {
        text.push_str(&format!("{}\n", section.title));
        for (name, value) in &section.rows {
            text.push_str(&format!("  {name:<26}{value}\n"));
        }
    }
    text
}

/// The numbers of a frame, for programs.
pub(super) fn to_json(url: &str, now: &Sample, before: Option<&Sample>) -> Value {
    let page = now.page.as_ref();
    let old = before.and_then(|before| before.page.as_ref());
    let value = |name: &str| page.and_then(|page| page.value(name));
    let rate = |name: &str| page.and_then(|page| page.rate(old, name));
    let quantiles = |name: &str| {
        let at = |share: f64| page.and_then(|page| page.quantile(old, name, share));
        json!({"p50": at(0.5), "p90": at(0.9), "p99": at(0.99)})
    };
    let gpus = now.gpus.iter().map(|gpu| {
        json!({"name": gpu.name, "busy_percent": gpu.busy, "watts": gpu.watts, "mhz": gpu.megahertz,
            "celsius": gpu.celsius})
    });
    let rails = now.rails.rates(before.map(|before| &before.rails)).into_iter().map(
        |(name, received, sent)| json!({"name": name, "gbit_in_per_s": received, "gbit_out_per_s": sent}),
    );
    json!({
        "url": url,
        "health": now.health,
        "load": now.load,
        "generation_tokens_per_s": rate("vllm:generation_tokens_total"),
        "prompt_tokens_per_s": rate("vllm:prompt_tokens_total"),
        "steps_per_s": rate("spark_steps_total"),
        "running": value("vllm:num_requests_running"),
        "waiting": value("vllm:num_requests_waiting"),
        "kv_cache_usage": value("vllm:kv_cache_usage_perc"),
        "preemptions": value("vllm:num_preemptions_total"),
        "ttft_s": quantiles("vllm:time_to_first_token_seconds"),
        "itl_s": quantiles("vllm:inter_token_latency_seconds"),
        "step_s": quantiles("spark_step_seconds"),
        "gpus": gpus.collect::<Vec<_>>(),
        "rails": rails.collect::<Vec<_>>(),
    })
}
