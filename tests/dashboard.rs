//! What deploy/ tells Prometheus and Grafana to look at exists in a scrape.

use std::{collections::BTreeSet, fs};

use serde_json::{Value, json};

use crate::{
    server::{COMPLETIONS, MODEL},
    support::server::Server,
};

/// Names of metrics in a query: words that begin as ours do.
fn names(query: &str) -> BTreeSet<String> {
    let words = query.split(|c: char| !(c.is_ascii_alphanumeric() || c == ':' || c == '_'));
    words.filter(|word| word.starts_with("vllm:") || word.starts_with("spark_")).map(str::to_owned).collect()
}

fn read(path: &str) -> String {
    fs::read_to_string(format!("{}/{path}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

#[test]
fn every_metric_of_the_dashboard_and_the_alerts_is_scraped() {
    let server = Server::start(MODEL, &[]);
    server.ask(COMPLETIONS, &json!({"prompt": "a", "max_tokens": 3}));
    let page = String::from_utf8(server.get("/metrics").body).unwrap();
    let scraped: BTreeSet<&str> = page
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split(['{', ' ']).next())
        .collect();
    let dashboard: Value = serde_json::from_str(&read("deploy/grafana/spark-engine.json")).unwrap();
    let queries =
        dashboard["panels"].as_array().unwrap().iter().flat_map(|panel| panel["targets"].as_array());
    let queries: Vec<&str> = queries.flatten().map(|target| target["expr"].as_str().unwrap()).collect();
    assert!(queries.len() >= 20, "{}", queries.len());
    let wanted = names(&queries.join("\n"));
    let alerts = names(&read("deploy/prometheus/alerts.yml"));
    assert!(wanted.len() >= 12 && alerts.len() >= 6, "{wanted:?} {alerts:?}");
    let missing: Vec<_> = wanted.union(&alerts).filter(|name| !scraped.contains(name.as_str())).collect();
    assert!(missing.is_empty(), "{missing:?} of {scraped:?}");
}
