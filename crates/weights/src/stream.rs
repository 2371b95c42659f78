//! Parameters that are made while a model takes them: the next few ahead of it, so that the host holds little of a model at
//! any time. Knows neither files nor formats; those are behind [`Source`].

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

use crate::error::{Error, Result};
use crate::load::lock;
use crate::params::Param;

/// Most bytes that the host holds: being made, waiting to be taken, and what was taken last. A parameter that is larger is made when
/// nothing else is held. With the buffers of the reads (`read/pieces.rs`) and what conversion takes, that stays under 2 GiB
/// also for a model with 1.3 GB of experts in a layer (235B).
const AHEAD: u64 = 1 << 30;
/// Bytes that are made in one go, unless one parameter is larger: enough for reads of full speed.
const BATCH: u64 = 256 << 20;

/// Called with each parameter that is complete: its index and value.
pub(crate) type Give<'a> = &'a (dyn Fn(usize, Param) -> Result<()> + Sync);

/// What makes parameters. Each has an index; they are asked for in ascending order, mostly.
pub(crate) trait Source: Send + Sync + 'static {
    /// Bytes of each parameter, about.
    fn sizes(&self) -> Vec<u64>;

    /// Makes the parameters of `indices` and gives each once, from any thread.
    fn make(&self, indices: std::ops::Range<usize>, give: Give<'_>) -> Result<()>;

    /// Ends [`Source::make`] of other threads where it waits for other ranks, with an error: nobody will take anything more.
    fn stop(&self) {}
}

/// A parameter on its way.
#[derive(Debug)]
enum Slot {
    Waiting,
    Making,
    Ready(Param),
    Failed(Error),
    Taken,
}

#[derive(Debug)]
struct State {
    slots: Vec<Slot>,
    /// No slot before this one is waiting.
    next: usize,
    /// Bytes that are ready, being made, or in use.
    held: u64,
    /// The bytes of `held` that are in use: of the parameter that was taken last, which its owner gives to a device before
    /// it asks for another.
    used: u64,
    /// Nothing more is made ahead.
    is_closed: bool,
}

struct Shared {
    source: Box<dyn Source>,
    sizes: Vec<u64>,
    ahead: u64,
    state: Mutex<State>,
    changed: Condvar,
}

/// Parameters by name, made ahead of being taken.
pub(crate) struct Stream {
    names: HashMap<String, usize>,
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stream").field("num_params", &self.names.len()).finish_non_exhaustive()
    }
}

impl Stream {
    /// The parameters `names` (no name twice) of `source`, made ahead by `num_workers` threads.
    pub(crate) fn new(
        names: HashMap<String, usize>,
        source: Box<dyn Source>,
        num_workers: usize,
    ) -> Result<Self> {
        Self::with_ahead(names, source, num_workers, AHEAD)
    }

    fn with_ahead(
        names: HashMap<String, usize>,
        source: Box<dyn Source>,
        num_workers: usize,
        ahead: u64,
    ) -> Result<Self> {
        let sizes = source.sizes();
        let slots = sizes.iter().map(|_| Slot::Waiting).collect();
        let state = Mutex::new(State { slots, next: 0, held: 0, used: 0, is_closed: false });
        let shared = Arc::new(Shared { source, sizes, ahead, state, changed: Condvar::new() });
        let mut stream = Self { names, shared, workers: Vec::new() };
        for _ in 0..num_workers {
            let shared = Arc::clone(&stream.shared);
            let worker = std::thread::Builder::new().name("weights".to_owned()).spawn(move || shared.work());
            stream.workers.push(worker.map_err(|source| Error::Thread { source })?);
        }
        Ok(stream)
    }

    /// Takes the parameter `name`: waits for it, or makes it now. `None` when there is none, or it was taken before.
    pub(crate) fn take(&self, name: &str) -> Option<Result<Param>> {
        self.names.get(name).and_then(|&index| self.shared.take(index))
    }

    /// Names of the parameters that have not been taken, and their bytes, about.
    pub(crate) fn left(&self) -> (Vec<String>, u64) {
        let state = self.shared.lock();
        let is_left = |index: usize| !matches!(state.slots[index], Slot::Taken);
        let left = self.names.iter().filter(|&(_, &index)| is_left(index));
        let (names, bytes): (Vec<_>, Vec<_>) =
            left.map(|(name, &index)| (name.clone(), self.shared.sizes[index])).unzip();
        (names, bytes.iter().sum())
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.shared.lock().is_closed = true;
        self.shared.changed.notify_all();
        self.shared.source.stop();
        for worker in self.workers.drain(..) {
            // A worker that panicked has said so; what it was making has failed.
            let _ = worker.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn take(&self, index: usize) -> Option<Result<Param>> {
        let mut state = self.lock();
        state.held -= std::mem::take(&mut state.used);
        self.changed.notify_all();
        loop {
            match &state.slots[index] {
                Slot::Taken => return None,
                Slot::Making => state = self.wait(state),
                Slot::Waiting => {
                    self.begin(&mut state, index..index + 1);
                    drop(state);
                    self.make(index..index + 1);
                    state = self.lock();
                }
                Slot::Ready(_) | Slot::Failed(_) => {
                    state.used += self.sizes[index];
                    let slot = std::mem::replace(&mut state.slots[index], Slot::Taken);
                    drop(state);
                    return match slot {
                        Slot::Ready(param) => Some(Ok(param)),
                        Slot::Failed(error) => Some(Err(error)),
                        Slot::Waiting | Slot::Making | Slot::Taken => None,
                    };
                }
            }
        }
    }

    /// Makes batches until there is nothing left to make.
    fn work(&self) {
        let mut state = self.lock();
        while !state.is_closed {
            let Some(batch) = self.next_batch(&mut state) else { return };
            let size: u64 = self.sizes[batch.clone()].iter().sum();
            if state.held > 0 && state.held.saturating_add(size) > self.ahead {
                state = self.wait(state);
                continue;
            }
            self.begin(&mut state, batch.clone());
            drop(state);
            self.make(batch);
            state = self.lock();
        }
    }

    /// The next parameters that are waiting, neighbours, of a batch's size.
    fn next_batch(&self, state: &mut State) -> Option<std::ops::Range<usize>> {
        let is_waiting = |slot: &Slot| matches!(slot, Slot::Waiting);
        state.next += state.slots[state.next..].iter().position(is_waiting)?;
        let (mut end, mut size) = (state.next, 0);
        while end < state.slots.len() && is_waiting(&state.slots[end]) && (size == 0 || size < BATCH) {
            size += self.sizes[end];
            end += 1;
        }
        Some(state.next..end)
    }

    fn begin(&self, state: &mut State, indices: std::ops::Range<usize>) {
        for index in indices {
            state.slots[index] = Slot::Making;
            state.held += self.sizes[index];
        }
    }

    /// Makes `indices`, which have begun. What is not made for an error waits again, but for the first, which holds the error.
    fn make(&self, indices: std::ops::Range<usize>) {
        let unfinished = Unfinished { shared: self, indices: indices.clone() };
        let give = |index: usize, param| {
            self.lock().slots[index] = Slot::Ready(param);
            self.changed.notify_all();
            Ok(())
        };
        let error = match self.source.make(indices.clone(), &give) {
            Ok(()) => Error::Param { name: "a parameter".to_owned(), reason: "was not made".to_owned() },
            Err(error) => error,
        };
        let mut state = self.lock();
        if let Some(index) = indices.clone().find(|&index| matches!(state.slots[index], Slot::Making)) {
            state.slots[index] = Slot::Failed(error);
        }
        drop(state);
        drop(unfinished);
    }
}

/// Lets what is not made, because of an error or a panic, be made again by whoever takes it.
struct Unfinished<'a> {
    shared: &'a Shared,
    indices: std::ops::Range<usize>,
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        for index in self.indices.clone() {
            match state.slots[index] {
                Slot::Making => {
                    state.slots[index] = Slot::Waiting;
                    state.held -= self.shared.sizes[index];
                    state.is_closed = true;
                }
                Slot::Failed(_) => state.is_closed = true,
                Slot::Waiting | Slot::Ready(_) | Slot::Taken => {}
            }
        }
        drop(state);
        self.shared.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use spark_backend::VectorWeight;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Parameters of 100 bytes; number 5 cannot be made.
    struct Counted {
        len: usize,
        made: Arc<AtomicUsize>,
    }

    impl Source for Counted {
        fn sizes(&self) -> Vec<u64> {
            // A batch each.
            vec![BATCH; self.len]
        }

        fn make(&self, indices: std::ops::Range<usize>, give: Give<'_>) -> Result<()> {
            for index in indices {
                if index == 5 {
                    return Err(Error::Param { name: "5".to_owned(), reason: "is broken".to_owned() });
                }
                self.made.fetch_add(1, Ordering::SeqCst);
                give(index, Param::Vector(VectorWeight { values: vec![index as f32], shape: [1, 1] }))?;
            }
            Ok(())
        }
    }

    fn stream(len: usize, num_workers: usize, ahead: u64) -> (Stream, Arc<AtomicUsize>) {
        let made = Arc::new(AtomicUsize::new(0));
        let names = (0..len).map(|index| (index.to_string(), index)).collect();
        let source = Box::new(Counted { len, made: Arc::clone(&made) });
        (Stream::with_ahead(names, source, num_workers, ahead).unwrap(), made)
    }

    fn value(stream: &Stream, index: usize) -> Option<Result<f32>> {
        let param = stream.take(&index.to_string())?;
        Some(param.map(|param| match param {
            Param::Vector(vector) => vector.values[0],
            _ => f32::NAN,
        }))
    }

    #[test]
    fn parameters_come_in_any_order_and_once() {
        for num_workers in [0, 1, 3] {
            let (stream, _) = stream(5, num_workers, 2 * BATCH);
            for index in [3, 0, 4, 1, 2] {
                assert_eq!(value(&stream, index).unwrap().unwrap(), index as f32);
                assert!(value(&stream, index).is_none(), "taken before");
            }
            assert!(stream.take("another").is_none());
            assert_eq!(stream.left(), (Vec::new(), 0));
        }
    }

    #[test]
    fn no_more_is_made_ahead_than_allowed() {
        let (stream, made) = stream(5, 1, 2 * BATCH);
        // The worker makes two, then waits until one is taken. What is asked for is made past the bound.
        while made.load(Ordering::SeqCst) < 2 {
            std::thread::yield_now();
        }
        assert_eq!(value(&stream, 4).unwrap().unwrap(), 4.0);
        let state = stream.shared.lock();
        assert!(state.used == BATCH && state.held == 3 * BATCH && matches!(state.slots[2], Slot::Waiting));
        drop(state);
        assert_eq!(stream.left().1, 4 * BATCH);
        // What was taken before is no longer in use when the next is asked for.
        assert_eq!(value(&stream, 0).unwrap().unwrap(), 0.0);
        let state = stream.shared.lock();
        assert!(state.used == BATCH && state.held == 2 * BATCH && matches!(state.slots[2], Slot::Waiting));
        drop(state);
        assert_eq!(value(&stream, 1).unwrap().unwrap(), 1.0);
        while made.load(Ordering::SeqCst) < 4 {
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_failure_is_told_to_whoever_takes_the_parameter() {
        for num_workers in [0, 2] {
            let (stream, _) = stream(8, num_workers, 100 * BATCH);
            for index in [0, 7, 6] {
                assert_eq!(value(&stream, index).unwrap().unwrap(), index as f32, "{num_workers}");
            }
            assert!(value(&stream, 5).unwrap().unwrap_err().to_string().contains("is broken"));
            assert_eq!(stream.left().0.len(), 4);
        }
    }
}
