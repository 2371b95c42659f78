//! When requests are sent: a gamma process of a rate, or a rate that grows. Numbers only.

use clap::ValueEnum;

/// How the rate changes over the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum RampUp {
    Linear,
    Exponential,
}

/// The process that requests arrive by.
#[derive(Debug, Clone, Copy)]
pub(super) struct Arrivals {
    /// Requests a second; infinite sends all at once.
    pub(super) rate: f64,
    /// Shape of the gamma distribution of the gaps: 1 is a Poisson process, less is burstier, more is more even.
    pub(super) burstiness: f64,
    /// A rate that grows from the first to the second number of requests a second.
    pub(super) ramp_up: Option<(RampUp, f64, f64)>,
}

impl Arrivals {
    /// Seconds from the start at which each of `count` requests is sent.
    pub(super) fn times(&self, count: usize, random: &mut fastrand::Rng) -> Vec<f64> {
        if self.ramp_up.is_none() && self.rate.is_infinite() {
            return vec![0.0; count];
        }
        let mut at = 0.0;
        let times = (0..count).map(|idx| {
            at += self.gap(self.rate_at(idx, count), random);
            at
        });
        let mut times: Vec<f64> = times.collect();
        // As vLLM: the last request is sent when the rate says so, whatever the gaps added up to.
        if let (None, Some(&last)) = (self.ramp_up, times.last())
            && last > 0.0
        {
            let scale = count as f64 / self.rate / last;
            times.iter_mut().for_each(|time| *time *= scale);
        }
        times
    }

    fn rate_at(&self, idx: usize, count: usize) -> f64 {
        let part = idx as f64 / (count.saturating_sub(1)).max(1) as f64;
        match self.ramp_up {
            None => self.rate,
            Some((RampUp::Linear, from, to)) => from + (to - from) * part,
            Some((RampUp::Exponential, from, to)) => from * (to / from).powf(part),
        }
    }

    fn gap(&self, rate: f64, random: &mut fastrand::Rng) -> f64 {
        match self.burstiness.is_infinite() {
            true => 1.0 / rate,
            false => gamma(self.burstiness, random) / (self.burstiness * rate),
        }
    }
}

/// A sample of the gamma distribution with scale 1 (Marsaglia and Tsang, "A simple method for generating gamma variables",
/// 2000).
fn gamma(shape: f64, random: &mut fastrand::Rng) -> f64 {
    if shape < 1.0 {
        // Their section 6: from the next higher shape.
        return gamma(shape + 1.0, random) * open_unit(random).powf(1.0 / shape);
    }
    let d = shape - 1.0 / 3.0;
    let c = 1.0 / (9.0 * d).sqrt();
    loop {
        let x = normal(random);
        let v = (1.0 + c * x).powi(3);
        if v > 0.0 && open_unit(random).ln() < 0.5 * x * x + d - d * v + d * v.ln() {
            return d * v;
        }
    }
}

/// Box and Muller's transform.
fn normal(random: &mut fastrand::Rng) -> f64 {
    (-2.0 * open_unit(random).ln()).sqrt() * (std::f64::consts::TAU * random.f64()).cos()
}

/// In (0, 1], so that it has a logarithm.
fn open_unit(random: &mut fastrand::Rng) -> f64 {
    1.0 - random.f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gaps(arrivals: Arrivals) -> Vec<f64> {
        let times = arrivals.times(20_000, &mut fastrand::Rng::with_seed(1));
        std::iter::once(times[0]).chain(times.windows(2).map(|pair| pair[1] - pair[0])).collect()
    }

    #[test]
    fn gaps_have_the_mean_and_the_spread_that_were_asked_for() {
        for burstiness in [0.25, 1.0, 4.0, f64::INFINITY] {
            let gaps = gaps(Arrivals { rate: 50.0, burstiness, ramp_up: None });
            let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
            let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
            assert!((mean - 0.02).abs() < 1e-9, "{mean}");
            // Of a gamma distribution with this shape and mean.
            let expected = 0.02 * 0.02 / burstiness;
            assert!(
                (variance - expected).abs() <= 0.1 * expected + 1e-15,
                "{burstiness}: {variance} {expected}"
            );
        }
    }

    #[test]
    fn a_ramp_begins_and_ends_at_its_rates() {
        for kind in [RampUp::Linear, RampUp::Exponential] {
            let ramp_up = Some((kind, 10.0, 100.0));
            let gaps = gaps(Arrivals { rate: f64::INFINITY, burstiness: f64::INFINITY, ramp_up });
            assert!((gaps[0] - 0.1).abs() < 1e-3 && (gaps[19_999] - 0.01).abs() < 1e-6, "{kind:?}");
        }
        let all_at_once = Arrivals { rate: f64::INFINITY, burstiness: 1.0, ramp_up: None };
        assert_eq!(all_at_once.times(3, &mut fastrand::Rng::with_seed(1)), [0.0; 3]);
    }
}
