//! Means, spreads and percentiles of measurements. Numbers only.

use serde_json::{Map, Value, json};

/// Arithmetic mean; 0 of nothing.
pub(super) fn mean(values: &[f64]) -> f64 {
    if values.is_empty() { 0.0 } else { values.iter().sum::<f64>() / values.len() as f64 }
}

/// Standard deviation of a sample; 0 of fewer than two.
pub(super) fn deviation(values: &[f64]) -> f64 {
    if values.len() < 2 {
        return 0.0;
    }
    let mean = mean(values);
    let sum: f64 = values.iter().map(|value| (value - mean) * (value - mean)).sum();
    (sum / (values.len() - 1) as f64).sqrt()
}

/// The value below which `percent` of all lie, interpolated between neighbours as numpy does; 0 of nothing.
pub(super) fn percentile(values: &[f64], percent: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else { return 0.0 };
    let at = percent / 100.0 * last as f64;
    let (low, part) = (at.floor() as usize, at.fract());
    sorted[low] + (sorted[(low + 1).min(last)] - sorted[low]) * part
}

/// Percentiles by their names.
pub(super) fn percentiles(values: &[f64], percents: &[u32]) -> Value {
    let entry = |&percent: &u32| (percent.to_string(), json!(percentile(values, f64::from(percent))));
    Value::Object(percents.iter().map(entry).collect::<Map<_, _>>())
}

/// How many experts a step's rows share, for people; nothing where there are none.
pub(super) fn experts_line(distinct: Option<f64>) -> String {
    distinct
        .map_or_else(String::new, |mean| format!("Distinct experts of a layer in a decode step: {mean:.1}\n"))
}

/// `{mean,median,std,p99}_NAME_ms` of seconds, in the words of vLLM's benchmarks.
pub(super) fn summary_ms(name: &str, seconds: &[f64]) -> Map<String, Value> {
    let millis: Vec<f64> = seconds.iter().map(|value| 1e3 * value).collect();
    let entries = [
        ("mean", mean(&millis)),
        ("median", percentile(&millis, 50.0)),
        ("std", deviation(&millis)),
        ("p99", percentile(&millis, 99.0)),
    ];
    entries.into_iter().map(|(kind, value)| (format!("{kind}_{name}_ms"), json!(value))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_interpolated() {
        let values = [4.0, 1.0, 3.0, 2.0];
        assert_eq!(percentile(&values, 0.0), 1.0);
        assert_eq!(percentile(&values, 50.0), 2.5);
        assert_eq!(percentile(&values, 100.0), 4.0);
        assert_eq!(percentile(&[7.0], 99.0), 7.0);
        assert_eq!(percentile(&[], 50.0), 0.0);
    }

    #[test]
    fn mean_and_deviation() {
        assert_eq!(mean(&[1.0, 2.0, 6.0]), 3.0);
        assert!((deviation(&[1.0, 2.0, 6.0]) - 7f64.sqrt()).abs() < 1e-12);
        assert_eq!(deviation(&[5.0]), 0.0);
    }

    #[test]
    fn a_summary_is_in_milliseconds() {
        let summary = summary_ms("ttft", &[0.001, 0.003]);
        assert_eq!(summary["mean_ttft_ms"], 2.0);
        assert_eq!(summary["median_ttft_ms"], 2.0);
    }
}
