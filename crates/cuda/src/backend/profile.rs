//! Where the time of a step goes: microseconds of every operation, measured with events between them. It hinders kernels
//! from overlapping, so the sum is more than a step takes without it. Or, of recorded steps, how long the device has nothing of
//! a step to do between them.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc as Shared, Mutex, MutexGuard, PoisonError};

use crate::{Event, Result, Stream};

/// Names of what [`Profile::of_steps`] measures.
const RECORDED: &str = "recorded steps";
const BETWEEN: &str = "between recorded steps";

/// Times of operations, summed by name. Clones are the same profile.
#[derive(Debug, Clone, Default)]
pub struct Profile {
    inner: Shared<Mutex<Inner>>,
    of_steps: bool,
}

#[derive(Debug, Default)]
struct Inner {
    times: BTreeMap<String, Time>,
    /// Operations whose end the device may not have reached.
    pending: Vec<(String, Event, Event)>,
    /// Start and end of recorded steps in turn, `None` where something else came between.
    steps: Vec<Option<(Event, Event)>>,
}

/// Calls of an operation and their time.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Time {
    /// How many.
    pub count: u64,
    /// Microseconds of all of them.
    pub micros: f64,
}

impl Profile {
    /// A profile of recorded steps as a whole and of the time between them, in which the device copies a step's inputs and
    /// results, or waits for the host; steps are as fast as without it. Read it when the engine is idle.
    pub fn of_steps() -> Self {
        Self { of_steps: true, ..Self::default() }
    }

    /// Whether operations are measured: they cannot be in recorded steps.
    pub(super) fn is_of_operations(&self) -> bool {
        !self.of_steps
    }

    /// Share of the time from the first recorded step to the last that lay between steps; `None` for fewer than two in a row.
    pub fn idle_share(&self) -> Option<f64> {
        let times = self.times();
        let micros = |name| times.get(name).map(|time| time.micros);
        let (busy, idle) = (micros(RECORDED)?, micros(BETWEEN)?);
        Some(idle / (busy + idle))
    }

    /// Runs `launch`, which puts a recorded step into `stream`, or what is not recorded.
    pub(super) fn step(
        &self,
        stream: &Stream,
        is_recorded: bool,
        launch: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        if !self.of_steps {
            return launch();
        }
        if !is_recorded {
            self.inner().steps.push(None);
            return launch();
        }
        let (start, end) = (Event::new(stream.device())?, Event::new(stream.device())?);
        start.record(stream)?;
        launch()?;
        end.record(stream)?;
        self.inner().steps.push(Some((start, end)));
        Ok(())
    }

    fn collect_steps(inner: &mut Inner) -> Result<()> {
        let steps = std::mem::take(&mut inner.steps);
        let mut add = |name: &str, from: &Event, to: &Event| -> Result<()> {
            to.synchronize()?;
            let time = inner.times.entry(name.to_owned()).or_default();
            time.count += 1;
            time.micros += to.micros_since(from)?;
            Ok(())
        };
        for (i, step) in steps.iter().enumerate() {
            let Some((start, end)) = step else { continue };
            add(RECORDED, start, end)?;
            if let Some(Some((_, before))) = i.checked_sub(1).and_then(|i| steps.get(i)) {
                add(BETWEEN, before, start)?;
            }
        }
        Ok(())
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // Nothing panics while it is changed.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `work`, which puts the operation `name` into `stream`, between two events.
    pub(super) fn measure<T>(
        &self,
        stream: &Stream,
        name: String,
        work: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let (start, end) = (Event::new(stream.device())?, Event::new(stream.device())?);
        start.record(stream)?;
        let result = work()?;
        end.record(stream)?;
        self.inner().pending.push((name, start, end));
        Ok(result)
    }

    /// Sums what was measured; everything put in must be done.
    pub(super) fn collect(&self) -> Result<()> {
        let mut inner = self.inner();
        for (name, start, end) in std::mem::take(&mut inner.pending) {
            end.synchronize()?;
            let time = inner.times.entry(name).or_default();
            time.count += 1;
            time.micros += end.micros_since(&start)?;
        }
        Ok(())
    }

    /// Forgets what was measured so far, such as a warm-up.
    pub fn clear(&self) {
        *self.inner() = Inner::default();
    }

    /// By operation. What a device that failed has not ended is left out.
    pub fn times(&self) -> BTreeMap<String, Time> {
        let mut inner = self.inner();
        if let Err(error) = Self::collect_steps(&mut inner) {
            tracing::warn!("steps cannot be measured: {error}");
        }
        inner.times.clone()
    }
}

/// One line for each operation, the longest first.
impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let times = self.times();
        let total: f64 = times.values().map(|time| time.micros).sum();
        let width = times.keys().map(String::len).max().unwrap_or(0).max(5);
        let mut lines: Vec<_> = times.iter().collect();
        lines.sort_by(|a, b| b.1.micros.total_cmp(&a.1.micros));
        writeln!(f, "{:width$} {:>8} {:>12} {:>10} {:>6}", "", "calls", "us", "us/call", "share")?;
        for (name, time) in lines {
            let (per_call, share) = (time.micros / time.count.max(1) as f64, 100.0 * time.micros / total);
            writeln!(
                f,
                "{name:width$} {:>8} {:>12.0} {per_call:>10.1} {share:>5.1}%",
                time.count, time.micros
            )?;
        }
        write!(f, "{:width$} {:>8} {total:>12.0}", "total", "")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_operation_is_first() {
        let profile = Profile::default();
        for (name, count, micros) in [("norm", 4, 8.0), ("linear 2048x2048", 2, 24.0)] {
            profile.inner().times.insert(name.into(), Time { count, micros });
        }
        let text = profile.to_string();
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[1], ["linear", "2048x2048", "2", "24", "12.0", "75.0%"]);
        assert_eq!(lines[2], ["norm", "4", "8", "2.0", "25.0%"]);
        assert_eq!(lines[3], ["total", "32"]);
        profile.clear();
        assert!(profile.times().is_empty());
    }

    #[test]
    fn the_idle_share_is_what_lies_between_steps() {
        let profile = Profile::of_steps();
        assert!(!profile.is_of_operations() && Profile::default().is_of_operations());
        assert_eq!(profile.idle_share(), None);
        for (name, count, micros) in [(RECORDED, 4, 90.0), (BETWEEN, 3, 10.0)] {
            profile.inner().times.insert(name.into(), Time { count, micros });
        }
        assert_eq!(profile.idle_share(), Some(0.1));
    }
}
