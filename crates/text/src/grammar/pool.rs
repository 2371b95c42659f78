//! Threads that compute masks ahead: from when a token is known until the engine asks for the next mask.
//!
//! The engine goes through its sequences one by one, twice a step: first all of them learn their token, then all of them
//! say what may follow. What lies between is enough for other cores to do most of the second round. A mask that no thread
//! has begun is computed by whoever asks for it, so nothing depends on these threads.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;

use super::constraint::Sequence;

/// Most threads: masks are short, and the engine's own work needs cores too.
const MAX_THREADS: usize = 8;

/// A queue of sequences whose next mask will be wanted. Its threads end with it.
pub(super) struct MaskPool {
    wanted: Sender<Weak<Mutex<Sequence>>>,
}

impl MaskPool {
    /// Starts the threads: some of the machine's cores. They sleep until there is work.
    pub(super) fn new() -> Self {
        let (wanted, queue) = channel::<Weak<Mutex<Sequence>>>();
        let queue = Arc::new(Mutex::new(queue));
        let cores = thread::available_parallelism().map_or(1, usize::from);
        for _ in 0..(cores / 2).clamp(1, MAX_THREADS) {
            let queue = queue.clone();
            let work = move || {
                while let Some(sequence) = next(&queue) {
                    // A sequence that has ended needs no mask.
                    if let Some(sequence) = sequence.upgrade() {
                        lock(&sequence).prepare();
                    }
                }
            };
            // Without a thread the masks are computed where they are asked for.
            let _ = thread::Builder::new().name("grammar-mask".into()).spawn(work);
        }
        Self { wanted }
    }

    /// Has the next mask of a sequence computed.
    pub(super) fn prepare(&self, sequence: &Arc<Mutex<Sequence>>) {
        let _ = self.wanted.send(Arc::downgrade(sequence));
    }
}

fn next(queue: &Mutex<Receiver<Weak<Mutex<Sequence>>>>) -> Option<Weak<Mutex<Sequence>>> {
    queue.lock().unwrap_or_else(PoisonError::into_inner).recv().ok()
}

/// A sequence keeps what its matcher says of a panic, so a poisoned lock tells nothing new.
pub(super) fn lock(sequence: &Mutex<Sequence>) -> MutexGuard<'_, Sequence> {
    sequence.lock().unwrap_or_else(PoisonError::into_inner)
}
