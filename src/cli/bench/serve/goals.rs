//! Goals of service: which requests count for the goodput. Numbers only.

use std::str::FromStr;

use clap::ValueEnum;

use super::{answer::Answer, report::Metric};

/// Limits in milliseconds. A request is good if it keeps all of them.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Goals(Vec<(Metric, f64)>);

impl Goals {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All of several flags.
    pub(super) fn joined(goals: &[Self]) -> Self {
        Self(goals.iter().flat_map(|goals| goals.0.clone()).collect())
    }

    /// Whether `answer` keeps them. A metric that it has no value of (the time of later tokens, of a single one) is kept.
    pub(super) fn are_met(&self, answer: &Answer) -> bool {
        self.0.iter().all(|(metric, limit)| metric.of(answer).iter().all(|value| value <= limit))
    }
}

impl FromStr for Goals {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let goal = |word: &str| {
            let (name, limit) = word.split_once(':')?;
            let metric = Metric::from_str(name, true).ok().filter(|metric| *metric != Metric::Itl)?;
            Some((metric, limit.parse().ok().filter(|limit| *limit > 0.0)?))
        };
        let goals = text.split_whitespace().map(|word| {
            goal(word)
                .ok_or_else(|| format!("`{word}` is not ttft:MS, tpot:MS or e2el:MS with a number above 0"))
        });
        goals.collect::<Result<_, _>>().map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_goals_must_be_met() {
        let answer =
            Answer { ttft: 0.1, latency: 0.5, itl: vec![0.2, 0.2], output_len: 3, ..Answer::default() };
        for (goals, is_met) in
            [("ttft:100", true), ("ttft:99", false), ("ttft:100 e2el:400", false), ("tpot:201", true)]
        {
            assert_eq!(goals.parse::<Goals>().unwrap().are_met(&answer), is_met, "{goals}");
        }
        let single = Answer { output_len: 1, ..answer };
        assert!("tpot:1".parse::<Goals>().unwrap().are_met(&single));
    }

    #[test]
    fn other_words_are_refused() {
        for text in ["ttft", "ttft:", "ttft:-1", "itl:5", "x:1", "ttft:nan"] {
            assert!(text.parse::<Goals>().is_err(), "{text}");
        }
    }
}
