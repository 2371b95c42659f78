//! The runs of a sweep in one table. Measures nothing.

use std::fmt::Write as _;

use serde_json::Value;

use super::report::Report;

/// Columns: title, width, field.
const COLUMNS: [(&str, usize, &str); 9] = [
    ("at once", 7, "max_concurrency"),
    ("rate", 6, "request_rate"),
    ("req/s", 8, "request_throughput"),
    ("good/s", 8, "request_goodput"),
    ("out tok/s", 10, "output_throughput"),
    ("TTFT ms", 9, "median_ttft_ms"),
    ("TPOT ms", 9, "median_tpot_ms"),
    ("E2EL ms", 10, "median_e2el_ms"),
    ("failed", 6, "failed"),
];

/// One row a run; times are medians.
pub(super) fn table(reports: &[Report]) -> String {
    let mut text = String::new();
    let columns: Vec<_> =
        COLUMNS.iter().filter(|(.., field)| reports.iter().any(|report| !is_empty(report, field))).collect();
    let mut row = |cell: &dyn Fn(&str, usize, &str) -> String| {
        let cells: Vec<String> =
            columns.iter().map(|(title, width, field)| cell(title, *width, field)).collect();
        // Writing to a string cannot fail.
        let _ = writeln!(text, "| {} |", cells.join(" | "));
    };
    row(&|title, width, _| format!("{title:>width$}"));
    row(&|_, width, _| format!("{}:", "-".repeat(width - 1)));
    for report in reports {
        row(&|_, width, field| format!("{:>width$}", shown(report.fields.get(field))));
    }
    text
}

fn is_empty(report: &Report, field: &str) -> bool {
    report.fields.get(field).is_none_or(Value::is_null)
}

fn shown(value: Option<&Value>) -> String {
    match value {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Number(number)) if number.is_f64() => format!("{:.2}", number.as_f64().unwrap_or(0.0)),
        Some(Value::Number(number)) => number.to_string(),
        _ => "-".to_owned(),
    }
}
