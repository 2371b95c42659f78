//! How many experts the rows of a decode step choose together: what decides how many bytes of weights a step reads. For benchmarks; nothing
//! is counted unless it is switched on.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicBool, Ordering},
};

/// A count that a backend adds to while it is switched on. Clones are the same count.
#[derive(Debug, Clone, Default)]
pub struct ExpertTally {
    inner: Arc<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    is_on: AtomicBool,
    count: Mutex<Count>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Count {
    /// Layers of steps.
    layers: u64,
    /// Distinct experts of all of them.
    distinct: u64,
}

impl ExpertTally {
    /// Switches the counting on from zero, or off.
    pub fn switch(&self, is_on: bool) {
        if is_on {
            *self.count() = Count::default();
        }
        self.inner.is_on.store(is_on, Ordering::SeqCst);
    }

    /// Whether choices of decode steps are to be added.
    pub fn is_on(&self) -> bool {
        self.inner.is_on.load(Ordering::SeqCst)
    }

    /// Adds the choice of a layer in a decode step: an expert for each row and place. Those that are not below `num_experts` stand for none.
    pub fn add(&self, chosen: &[u32], num_experts: usize) {
        let mut is_chosen = vec![false; num_experts];
        for &expert in chosen {
            if let Some(is_chosen) = is_chosen.get_mut(expert as usize) {
                *is_chosen = true;
            }
        }
        self.add_number(is_chosen.into_iter().filter(|&is_chosen| is_chosen).count());
    }

    /// The same where it is known how many experts were chosen.
    pub fn add_number(&self, num_distinct: usize) {
        let mut count = self.count();
        count.layers += 1;
        count.distinct += num_distinct as u64;
    }

    /// Distinct experts of a layer in a decode step, in the mean; `None` if nothing was counted since it was switched on.
    pub fn mean(&self) -> Option<f64> {
        let Count { layers, distinct } = *self.count();
        (layers > 0).then(|| distinct as f64 / layers as f64)
    }

    fn count(&self) -> std::sync::MutexGuard<'_, Count> {
        // Nothing panics while it is changed.
        self.inner.count.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn experts_count_once_a_layer_and_those_that_do_not_exist_not_at_all() {
        let tally = ExpertTally::default();
        assert_eq!((tally.is_on(), tally.mean()), (false, None));
        let other = tally.clone();
        other.switch(true);
        assert!(tally.is_on());
        tally.add(&[3, 1, 3, u32::MAX, 1, 8], 8);
        tally.add(&[0, 1, 2, 7, u32::MAX, u32::MAX], 8);
        tally.add_number(3);
        assert_eq!(other.mean(), Some(3.0));
        tally.switch(false);
        assert_eq!((other.is_on(), other.mean()), (false, Some(3.0)));
        tally.switch(true);
        assert_eq!(tally.mean(), None);
    }
}
