//! What the engine thread drives: the scheduler, and the runner thread behind its channels. Made anew when the group is.

use std::{
    collections::VecDeque,
    sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    thread,
    time::Duration,
};

use spark_comm::{LossReason, Monitor};
use spark_scheduler::{Scheduler, StepId};

use crate::{
    Failure, Result, Running,
    group::{Upload, run_uploads},
    handle::Command,
    pipeline::Order,
    runner::{StepResult, StepWork},
    running::spawn,
};

/// The scheduler, and the runner that does what it plans. Made anew when the group is.
pub(crate) struct Link {
    pub(crate) scheduler: Scheduler,
    pub(crate) in_flight: VecDeque<StepId>,
    /// Steps whose results were passed on.
    pub(crate) num_completed: u64,
    pub(crate) runner: Runner,
    pub(crate) uploads: Option<Sender<Upload>>,
    pub(crate) monitor: Option<Monitor>,
    pub(crate) generation: u64,
}

/// The runner thread. Dropping it waits for the step that it is in.
pub(crate) struct Runner {
    orders: Option<Sender<Order<StepWork>>>,
    pub(crate) results: Receiver<spark_backend::Result<StepResult>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Link {
    pub(crate) fn new(running: Running, commands: &Sender<Command>, generation: u64) -> Result<Self> {
        let Running { orders, results, runner, group, scheduler, .. } = running;
        let runner = Runner { orders: Some(orders), results, thread: Some(runner) };
        let (mut uploads, mut monitor) = (None, None);
        if let Some((bulk, watched)) = group {
            let (sender, queue) = channel();
            let done = commands.clone();
            let ended = watched.clone();
            spawn("spark-uploads", move || run_uploads(bulk, &queue, &done, generation, &ended))?;
            let lost = commands.clone();
            watched.watch(move |_| {
                // An engine that has ended needs no word.
                let _ = lost.send(Command::Lost { generation });
            });
            (uploads, monitor) = (Some(sender), Some(watched));
        }
        let scheduler = Scheduler::new(scheduler)?;
        let in_flight = VecDeque::new();
        Ok(Self { scheduler, in_flight, num_completed: 0, runner, uploads, monitor, generation })
    }

    /// Why the group is lost, if it is.
    pub(crate) fn loss(&self) -> Option<Failure> {
        let lost = self.monitor.as_ref()?.lost()?;
        Some(Failure::Group(lost.to_string()))
    }

    /// How the loss was noticed, if there is one.
    pub(crate) fn lost_reason(&self) -> Option<LossReason> {
        Some(self.monitor.as_ref()?.lost()?.reason)
    }

    /// Nothing runs and nothing waits.
    pub(crate) fn is_idle(&self) -> bool {
        self.in_flight.is_empty() && !self.scheduler.has_work()
    }
}

impl Runner {
    /// A runner that is gone shows in [`receive`](Self::receive), where its last words are.
    pub(crate) fn send(&self, order: Order<StepWork>) {
        if let Some(orders) = &self.orders {
            let _ = orders.send(order);
        }
    }

    /// The next result, within `timeout` if there is one.
    pub(crate) fn receive(
        &self,
        timeout: Option<Duration>,
    ) -> std::result::Result<spark_backend::Result<StepResult>, RecvTimeoutError> {
        match timeout {
            Some(timeout) => self.results.recv_timeout(timeout),
            None => Ok(self.results.recv()?),
        }
    }

    /// Tells it to end after the step that it is in; who gets it waits for that.
    pub(crate) fn detach(&mut self) -> Self {
        let (_, none) = channel();
        Self {
            orders: self.orders.take().and(None),
            results: std::mem::replace(&mut self.results, none),
            thread: self.thread.take(),
        }
    }

    /// Nobody waits for its end any more: the device is stuck.
    pub(crate) fn abandon(&mut self) {
        self.orders = None;
        self.thread = None;
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        self.orders = None;
        if let Some(thread) = self.thread.take() {
            // If it has panicked, the engine has said so.
            let _ = thread.join();
        }
    }
}
