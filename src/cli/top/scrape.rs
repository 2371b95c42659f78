//! A page of Prometheus metrics as numbers, and what two of them say about the time between. Shows nothing.

use std::{collections::HashMap, time::Instant};

/// The samples of one page.
pub(super) struct Page {
    /// When it was read.
    pub(super) at: Instant,
    /// Sums over all labels but those of buckets.
    values: HashMap<String, f64>,
    /// Of histograms: bounds and counts up to them, ascending.
    buckets: HashMap<String, Vec<(f64, f64)>>,
    /// The name that answers carry.
    pub(super) model: String,
}

impl Page {
    /// Reads the text format; lines that are none of it are passed over.
    pub(super) fn parse(text: &str, at: Instant) -> Self {
        let mut page = Self { at, values: HashMap::new(), buckets: HashMap::new(), model: String::new() };
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let Some((series, value)) = line.rsplit_once(' ') else { continue };
            let Ok(value) = value.parse::<f64>() else { continue };
            let (name, labels) = series.split_once('{').unwrap_or((series, ""));
            if page.model.is_empty() {
                page.model = label(labels, "model_name").unwrap_or_default();
            }
            match (name.strip_suffix("_bucket"), label(labels, "le")) {
                (Some(histogram), Some(bound)) => {
                    let bound = bound.parse().unwrap_or(f64::INFINITY);
                    page.add_bucket(histogram, bound, value);
                }
                _ => *page.values.entry(name.to_owned()).or_default() += value,
            }
        }
        page.buckets.values_mut().for_each(|row| row.sort_by(|a, b| a.0.total_cmp(&b.0)));
        page
    }

    fn add_bucket(&mut self, histogram: &str, bound: f64, count: f64) {
        let row = self.buckets.entry(histogram.to_owned()).or_default();
        match row.iter_mut().find(|(known, _)| *known == bound) {
            Some((_, sum)) => *sum += count,
            None => row.push((bound, count)),
        }
    }

    /// A gauge or a counter; `None` if the page has none of this name.
    pub(super) fn value(&self, name: &str) -> Option<f64> {
        self.values.get(name).copied()
    }

    /// How much a counter grows a second since `before`.
    pub(super) fn rate(&self, before: Option<&Self>, name: &str) -> Option<f64> {
        let before = before?;
        let seconds = self.at.saturating_duration_since(before.at).as_secs_f64();
        let grown = self.value(name)? - before.value(name)?;
        // A counter that has shrunk is that of another process.
        (seconds > 0.0 && grown >= 0.0).then(|| grown / seconds)
    }

    /// Below which value `share` of what a histogram has seen lies, linear within a bucket: of what came since `before`, else of all.
    pub(super) fn quantile(&self, before: Option<&Self>, name: &str, share: f64) -> Option<f64> {
        let row = self.buckets.get(name)?;
        let old = before.and_then(|before| before.buckets.get(name)).filter(|old| old.len() == row.len());
        let since = |i: usize| row[i].1 - old.map_or(0.0, |old| old[i].1);
        let total = since(row.len().checked_sub(1)?);
        if total <= 0.0 {
            // Nothing since then: what there was before.
            return old.and_then(|_| self.quantile(None, name, share));
        }
        let place = (0..row.len()).find(|&i| since(i) >= share * total)?;
        let (low, below) = if place == 0 { (0.0, 0.0) } else { (row[place - 1].0, since(place - 1)) };
        let high = row[place].0;
        if high.is_infinite() {
            return Some(low);
        }
        let inside = since(place) - below;
        Some(low + (high - low) * if inside > 0.0 { (share * total - below) / inside } else { 0.0 })
    }
}

/// The value of a label.
fn label(labels: &str, name: &str) -> Option<String> {
    let start = labels.find(&format!("{name}=\""))? + name.len() + 2;
    let (mut value, mut chars) = (String::new(), labels[start..].chars());
    while let Some(c) = chars.next() {
        match c {
            '"' => return Some(value),
            '\\' => value.extend(chars.next()),
            c => value.push(c),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn page(tokens: u32, counts: [u32; 3], at: Instant) -> Page {
        let [a, b, c] = counts;
        let text = format!(
            "# HELP x y\nvllm:generation_tokens_total{{engine=\"0\",model_name=\"a\\\"b\"}} {tokens}\n\
             vllm:t_bucket{{le=\"1.0\"}} {a}\nvllm:t_bucket{{le=\"3.0\"}} {b}\nvllm:t_bucket{{le=\"+Inf\"}} {c}\n\
             vllm:r{{reason=\"a\"}} 1\nvllm:r{{reason=\"b\"}} 2\nnot a line\n"
        );
        Page::parse(&text, at)
    }

    #[test]
    fn rates_and_quantiles_are_of_the_time_between() {
        let start = Instant::now();
        let (first, second) =
            (page(10, [0, 4, 4], start), page(30, [2, 8, 8], start + Duration::from_secs(4)));
        assert_eq!(
            (first.model.as_str(), first.value("vllm:r"), first.value("vllm:none")),
            ("a\"b", Some(3.0), None)
        );
        assert_eq!(second.rate(Some(&first), "vllm:generation_tokens_total"), Some(5.0));
        assert_eq!((second.rate(None, "vllm:r"), first.rate(Some(&second), "vllm:r")), (None, None));
        // Since the first: two up to 1, two more up to 3.
        assert_eq!(second.quantile(Some(&first), "vllm:t", 0.5), Some(1.0));
        assert_eq!(second.quantile(Some(&first), "vllm:t", 0.75), Some(2.0));
        assert_eq!(first.quantile(None, "vllm:t", 0.5), Some(2.0));
        assert_eq!(second.quantile(Some(&second), "vllm:t", 0.5), second.quantile(None, "vllm:t", 0.5));
        assert_eq!(
            page(1, [0, 0, 5], start).quantile(None, "vllm:t", 0.5),
            Some(3.0),
            "beyond the last bound"
        );
        assert_eq!(page(1, [0, 0, 0], start).quantile(None, "vllm:t", 0.5), None);
    }
}
