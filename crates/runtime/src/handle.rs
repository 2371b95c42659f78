//! The client side of a running engine. Cheap to clone; the engine stops when the last handle is gone.

use std::{
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
        mpsc::Sender,
    },
    thread::JoinHandle,
    time::Instant,
};

use spark_api::{Engine, EngineInfo, EngineStats, Event, EventStream, Health, Request, SubmitError};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

use crate::masks::Masked;
use crate::running::{Rebuild, Running};

/// What a handle asks of the engine thread.
pub(crate) enum Command {
    Add {
        request: Box<Request>,
        events: UnboundedSender<Event>,
        arrived: Instant,
    },
    /// Finish what is there, take nothing new.
    Drain,
    /// Stop before the next step.
    Abort,
    /// All ranks have the pixels of this upload.
    Uploaded {
        generation: u64,
        id: u64,
    },
    /// A mask was computed.
    Masked(Masked),
    /// A rank is gone.
    Lost {
        generation: u64,
    },
    /// The attempt to bring a lost group back has ended.
    Rebuilt {
        rebuild: Rebuild,
        outcome: std::result::Result<Box<Running>, String>,
    },
}

/// Why an engine has stopped by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// The device or its driver: a new process is needed.
    Device(String),
    /// A rank of the group is gone and did not come back.
    Group(String),
    /// A defect.
    Defect(String),
}

impl Failure {
    /// What happened, for people.
    pub fn message(&self) -> &str {
        match self {
            Self::Device(message) | Self::Group(message) | Self::Defect(message) => message,
        }
    }
}

/// State that handles and the engine thread share.
pub(crate) struct Shared {
    pub(crate) stats: Mutex<EngineStats>,
    pub(crate) health: Mutex<Health>,
    /// Requests submitted and not ended.
    pub(crate) num_open: AtomicUsize,
    /// Set once, before the end.
    pub(crate) failure: Mutex<Option<Failure>>,
    /// The engine thread has ended.
    pub(crate) ended: (Mutex<bool>, Condvar),
}

impl Shared {
    pub(crate) fn new() -> Self {
        Self {
            stats: Mutex::new(EngineStats::default()),
            health: Mutex::new(Health::Ready),
            num_open: AtomicUsize::new(0),
            failure: Mutex::new(None),
            ended: (Mutex::new(false), Condvar::new()),
        }
    }

    pub(crate) fn set_ended(&self) {
        *lock(&self.ended.0) = true;
        self.ended.1.notify_all();
    }
}

/// A running engine.
#[derive(Clone)]
pub struct EngineHandle {
    inner: Arc<Inner>,
}

struct Inner {
    commands: Sender<Command>,
    shared: Arc<Shared>,
    info: EngineInfo,
    max_open: usize,
    max_num_seqs: usize,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl EngineHandle {
    pub(crate) fn new(
        commands: Sender<Command>,
        shared: Arc<Shared>,
        info: EngineInfo,
        (max_num_seqs, max_num_queued_reqs): (usize, Option<usize>),
        thread: JoinHandle<()>,
    ) -> Self {
        let max_open = max_num_queued_reqs.map_or(usize::MAX, |n| n.saturating_add(max_num_seqs));
        let thread = Mutex::new(Some(thread));
        let inner = Inner { commands, shared, info, max_open, max_num_seqs, thread };
        Self { inner: Arc::new(inner) }
    }

    /// Blocks of the KV pool.
    pub fn num_kv_blocks(&self) -> usize {
        let info = &self.inner.info;
        info.num_kv_tokens / info.block_size
    }

    /// Takes no new requests and lets the running ones finish. Returns at once; see [`EngineHandle::join`].
    pub fn drain(&self) {
        self.inner.stop(Command::Drain);
    }

    /// Ends all requests before the next step. Returns at once.
    pub fn abort(&self) {
        self.inner.stop(Command::Abort);
    }

    /// Why the engine has stopped by itself; `None` while it runs, and when it was told to stop.
    pub fn failure(&self) -> Option<Failure> {
        lock(&self.inner.shared.failure).clone()
    }

    /// Waits until the engine thread has ended: after [`drain`](Self::drain) or [`abort`](Self::abort), or when it has failed.
    /// Blocks.
    pub fn join(&self) {
        self.inner.join();
    }
}

impl Inner {
    fn stop(&self, command: Command) {
        let mut health = lock(&self.shared.health);
        if *health == Health::Ready {
            *health = Health::Stopping;
        }
        // A send fails only when the engine thread has ended, which is what was asked for.
        let _ = self.commands.send(command);
    }

    fn join(&self) {
        let (ended, changed) = &self.shared.ended;
        let mut ended = lock(ended);
        while !*ended {
            ended = changed.wait(ended).unwrap_or_else(PoisonError::into_inner);
        }
        drop(ended);
        if let Some(thread) = lock(&self.thread).take() {
            // If the engine thread panicked, it has set `health` on its way out.
            let _ = thread.join();
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.stop(Command::Abort);
        self.join();
    }
}

impl Engine for EngineHandle {
    fn submit(&self, request: Request) -> Result<EventStream, SubmitError> {
        let inner = &*self.inner;
        match self.health() {
            Health::Ready => {}
            Health::Stopping => return Err(SubmitError::Stopping),
            Health::Failed(reason) => return Err(SubmitError::Failed(reason)),
        }
        if inner.shared.num_open.fetch_add(1, Ordering::Relaxed) >= inner.max_open {
            inner.shared.num_open.fetch_sub(1, Ordering::Relaxed);
            let limit = inner.max_open - inner.max_num_seqs;
            return Err(SubmitError::QueueFull { num_waiting: limit, limit });
        }
        let (events, stream) = unbounded_channel();
        let command = Command::Add { request: Box::new(request), events, arrived: Instant::now() };
        if inner.commands.send(command).is_err() {
            inner.shared.num_open.fetch_sub(1, Ordering::Relaxed);
            return Err(SubmitError::Stopping);
        }
        Ok(stream)
    }

    fn info(&self) -> &EngineInfo {
        &self.inner.info
    }

    fn stats(&self) -> EngineStats {
        lock(&self.inner.shared.stats).clone()
    }

    fn health(&self) -> Health {
        lock(&self.inner.shared.health).clone()
    }
}

/// Locks; a poisoned lock still holds whole values here, because every critical section is one assignment.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
