//! How many of the chosen experts the rank has that has most of them, where ranks hold whole experts. Chances, no bytes.

/// How many of `hit` experts are on the rank with most of them, in the mean, where each of `ranks` ranks holds `each` experts and any of
/// them are as likely to be hit as any others. `hit` may lie between two whole numbers.
pub(super) fn fullest(each: usize, ranks: usize, hit: f64) -> f64 {
    let below = hit.floor();
    let [low, high] = [below, hit.ceil()].map(|hit| of_whole(each, ranks, hit as usize));
    low + (hit - below) * (high - low)
}

/// The mean of the most is the sum over all limits of the chance that some rank has more. Hits are on a rank with the chances of as many
/// coins, given how many hits there are together.
fn of_whole(each: usize, ranks: usize, hit: usize) -> f64 {
    if hit >= each * ranks {
        return each as f64;
    }
    let coins = coins(each, hit as f64 / (each * ranks) as f64);
    let chance = |limit: usize| {
        let one = &coins[..=limit.min(each)];
        let others = (1..ranks).fold(vec![1.0], |all, _| product(&all, one, hit));
        let ways =
            others.iter().enumerate().filter_map(|(there, others)| Some(others * one.get(hit - there)?));
        ways.sum::<f64>()
    };
    let all = chance(each);
    (0..each.min(hit)).map(|limit| 1.0 - chance(limit) / all).sum()
}

/// The chances of 0 to `count` heads of as many coins, where each falls so with `chance`, which is below 1.
fn coins(count: usize, chance: f64) -> Vec<f64> {
    let odds = (chance / (1.0 - chance)).ln();
    let steps = (0..count).scan(count as f64 * (1.0 - chance).ln(), |log, heads| {
        *log += ((count - heads) as f64 / (heads + 1) as f64).ln() + odds;
        Some(log.exp())
    });
    std::iter::once((1.0 - chance).powf(count as f64)).chain(steps).collect()
}

/// The chances of a sum, up to `most`, of two numbers with these chances.
fn product(a: &[f64], b: &[f64], most: usize) -> Vec<f64> {
    let mut sum = vec![0.0; (a.len() + b.len() - 1).min(most + 1)];
    for (i, a) in a.iter().enumerate() {
        for (sum, b) in sum.iter_mut().skip(i).zip(b) {
            *sum += a * b;
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fuller_of_two_ranks_is_as_counted() {
        // Of 2 of 4 experts: in 2 of 6 ways both are on one rank.
        assert!((fullest(2, 2, 2.0) - 4.0 / 3.0).abs() < 1e-12);
        // Of 2 of 4, each on a rank of its own.
        assert!((fullest(1, 4, 2.0) - 1.0).abs() < 1e-12);
        // Of 3 of 6 on three ranks: 8 of 20 ways with one on each, else two on one.
        assert!((fullest(2, 3, 3.0) - 1.6).abs() < 1e-12);
        assert!((fullest(64, 2, 8.0) - 5.1).abs() < 0.05, "{}", fullest(64, 2, 8.0));
    }

    #[test]
    fn none_one_and_all_are_certain() {
        for ranks in [1, 2, 4] {
            assert_eq!(fullest(8, ranks, 0.0), 0.0);
            assert!((fullest(8, ranks, 1.0) - 1.0).abs() < 1e-12);
            assert_eq!(fullest(8, ranks, (8 * ranks) as f64), 8.0);
        }
        assert!((fullest(128, 1, 37.5) - 37.5).abs() < 1e-9, "a single rank has all");
        let many = fullest(2048, 2, 2000.0);
        assert!((1000.0..1030.0).contains(&many), "{many}");
    }
}
