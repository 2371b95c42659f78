//! Masks of constrained sequences, computed beside the engine loop: what a sequence may sample next is worked out on threads
//! of their own as soon as its last token is known. A mask that is late makes its own sequence sit out, and nobody else.
//! Grammars are elsewhere: here a constraint is anything that gives masks.

use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex,
        mpsc::{Receiver, Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};

use spark_api::{ConstraintError, FinishReason, TokenConstraint, TokenId};
use spark_scheduler::SeqId;

use crate::{
    engine::Engine,
    handle::{Command, lock},
    running::spawn,
};

/// Bounds on how long a plan waits for masks that have just been ordered: an eighth of a step, within these. Usual masks take
/// some ten microseconds, so their sequences miss no step; a slow one costs the others this much once, not once a step.
const GRACE: (Duration, Duration) = (Duration::from_micros(500), Duration::from_millis(5));
/// Bounds on the number of threads. With two, one slow constraint leaves a thread to the others.
const THREADS: (usize, usize) = (2, 8);

/// The constraint of a sequence, and what was last made of it.
pub(crate) enum Constraint {
    /// Everything is allowed.
    None,
    /// No mask is there, and nobody computes one.
    Idle(Box<dyn TokenConstraint>),
    /// The order with this number is being worked on.
    AtWork(u64),
    /// An order has been carried out.
    Done(Outcome),
}

/// What came of an order.
pub(crate) enum Outcome {
    /// What the next token may be, one bit a token.
    Mask(Box<dyn TokenConstraint>, Vec<u32>),
    /// The output is complete.
    Complete,
    /// The constraint is of no more use.
    Failed(ConstraintError),
}

/// An order that has been carried out.
pub(crate) struct Masked {
    ticket: u64,
    outcome: Outcome,
}

struct Order {
    ticket: u64,
    constraint: Box<dyn TokenConstraint>,
    /// Sampled since the last mask.
    tokens: Vec<TokenId>,
    num_words: usize,
}

/// The threads, and the orders that they have.
pub(crate) struct Masks {
    /// Started by the first order: most engines never need them.
    threads: Option<Sender<Order>>,
    done: Sender<Command>,
    num_words: usize,
    /// With fewer sequences than this, a new one will run at once.
    num_slots: usize,
    next_ticket: u64,
    /// Whose mask is being computed, by ticket.
    at_work: BTreeMap<u64, SeqId>,
    /// From this ticket on orders are waited for.
    first_fresh: u64,
    /// When the first of them was sent.
    fresh_since: Option<Instant>,
    completed_at: Instant,
    step_time: Duration,
}

impl Masks {
    /// For a vocabulary of `vocab_size` tokens and as many sequences at once as there are slots; results go to `done`.
    pub(crate) fn new(done: Sender<Command>, vocab_size: usize, num_slots: usize) -> Self {
        Self {
            threads: None,
            done,
            num_words: vocab_size.div_ceil(32),
            num_slots,
            next_ticket: 0,
            at_work: BTreeMap::new(),
            first_fresh: 0,
            fresh_since: None,
            completed_at: Instant::now(),
            step_time: Duration::ZERO,
        }
    }

    /// Whether any sequence waits for a mask.
    pub(crate) fn any_at_work(&self) -> bool {
        !self.at_work.is_empty()
    }

    /// The scheduler that gave the sequences their names is gone.
    pub(crate) fn forget_names(&mut self) {
        self.at_work.clear();
    }

    /// A step has completed.
    pub(crate) fn note_step(&mut self) {
        let now = Instant::now();
        self.step_time = now.duration_since(self.completed_at);
        self.completed_at = now;
    }

    /// How much longer the next plan waits; `None` if there is nothing to wait for.
    fn patience(&self) -> Option<Duration> {
        self.at_work.range(self.first_fresh..).next()?;
        let grace = (self.step_time / 8).clamp(GRACE.0, GRACE.1);
        grace.checked_sub(self.fresh_since?.elapsed())
    }

    /// What is still at work was waited for.
    fn stop_waiting(&mut self) {
        self.first_fresh = self.next_ticket;
        self.fresh_since = None;
    }

    fn order(&mut self, id: SeqId, constraint: Box<dyn TokenConstraint>, tokens: Vec<TokenId>) -> u64 {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.at_work.insert(ticket, id);
        self.fresh_since.get_or_insert_with(Instant::now);
        let order = Order { ticket, constraint, tokens, num_words: self.num_words };
        let done = &self.done;
        if let Err(refused) = self.threads.get_or_insert_with(|| start(done)).send(order) {
            // No thread could be started: then here.
            let _ = self.done.send(Command::Masked(refused.0.run()));
        }
        ticket
    }
}

/// Starts the threads. They end when the queue is dropped.
fn start(done: &Sender<Command>) -> Sender<Order> {
    let (orders, queue) = channel::<Order>();
    let queue = Arc::new(Mutex::new(queue));
    let cores = thread::available_parallelism().map_or(1, usize::from);
    for _ in 0..(cores / 2).clamp(THREADS.0, THREADS.1) {
        let (queue, done) = (queue.clone(), done.clone());
        let work = move || {
            while let Some(order) = next(&queue) {
                if done.send(Command::Masked(order.run())).is_err() {
                    return;
                }
            }
        };
        if let Err(error) = spawn("spark-masks", work) {
            tracing::warn!("a thread for masks could not be started: {error}");
        }
    }
    orders
}

fn next(queue: &Mutex<Receiver<Order>>) -> Option<Order> {
    lock(queue).recv().ok()
}

impl Order {
    /// Constraints are code of the embedding program: a panic there ends one request, not the engine.
    fn run(self) -> Masked {
        let Self { ticket, constraint, tokens, num_words } = self;
        let outcome = catch_unwind(AssertUnwindSafe(|| outcome(constraint, &tokens, num_words)))
            .unwrap_or_else(|_| Outcome::Failed(ConstraintError("the constraint has panicked".into())));
        Masked { ticket, outcome }
    }
}

fn outcome(mut constraint: Box<dyn TokenConstraint>, tokens: &[TokenId], num_words: usize) -> Outcome {
    for &token in tokens {
        match constraint.commit(token) {
            Ok(false) => {}
            Ok(true) => return Outcome::Complete,
            Err(error) => return Outcome::Failed(error),
        }
    }
    let mut allowed = vec![u32::MAX; num_words];
    match constraint.mask(&mut allowed) {
        Ok(()) => Outcome::Mask(constraint, allowed),
        Err(error) => Outcome::Failed(error),
    }
}

impl Constraint {
    pub(crate) fn new(constraint: Option<Box<dyn TokenConstraint>>) -> Self {
        constraint.map_or(Self::None, Self::Idle)
    }

    pub(crate) fn is_some(&self) -> bool {
        !matches!(self, Self::None)
    }

    /// The mask, for one step.
    pub(crate) fn take_mask(&mut self) -> Option<Vec<u32>> {
        match std::mem::replace(self, Self::None) {
            Self::Done(Outcome::Mask(constraint, mask)) => {
                *self = Self::Idle(constraint);
                Some(mask)
            }
            other => {
                *self = other;
                None
            }
        }
    }

    fn is_at_work(&self, ticket: u64) -> bool {
        matches!(self, Self::AtWork(own) if *own == ticket)
    }
}

impl Engine {
    /// Has the next mask of a sequence computed, after `tokens`. Nothing happens if that is being done or has been.
    pub(crate) fn order_mask(&mut self, id: SeqId, tokens: Vec<TokenId>) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        match std::mem::replace(&mut sequence.constraint, Constraint::None) {
            Constraint::Idle(constraint) => {
                sequence.constraint = Constraint::AtWork(self.masks.order(id, constraint, tokens));
            }
            other => sequence.constraint = other,
        }
    }

    /// Begins with the mask of a sequence that the scheduler has just taken, or takes up what was begun under another name.
    pub(crate) fn begin_mask(&mut self, id: SeqId) {
        match self.sequences.get(&id).map(|sequence| &sequence.constraint) {
            // A long queue holds no masks: its sequences get theirs when they are admitted.
            Some(Constraint::Idle(_)) if self.sequences.len() <= self.masks.num_slots => {
                self.order_mask(id, Vec::new());
            }
            Some(&Constraint::AtWork(ticket)) => drop(self.masks.at_work.insert(ticket, id)),
            Some(Constraint::Done(_)) => self.settle(id),
            Some(Constraint::Idle(_) | Constraint::None) | None => {}
        }
    }

    /// Takes the result of an order; of a sequence that has ended it is dropped.
    pub(crate) fn masked(&mut self, masked: Masked) {
        let Masked { ticket, outcome } = masked;
        match self.masks.at_work.remove(&ticket) {
            Some(id) => {
                if let Some(sequence) = self.sequences.get_mut(&id) {
                    sequence.constraint = Constraint::Done(outcome);
                    self.settle(id);
                }
            }
            None => {
                let mut waiting = self.kept.iter_mut().chain(self.uploading.values_mut());
                if let Some(sequence) = waiting.find(|sequence| sequence.constraint.is_at_work(ticket)) {
                    sequence.constraint = Constraint::Done(outcome);
                }
            }
        }
    }

    /// Lets a sequence sample, or ends it.
    fn settle(&mut self, id: SeqId) {
        let reason = match self.sequences.get(&id).map(|sequence| &sequence.constraint) {
            Some(Constraint::Done(Outcome::Mask(..))) => return self.link.scheduler.allow_sample(id),
            Some(Constraint::Done(Outcome::Complete)) => FinishReason::ConstraintComplete,
            Some(Constraint::Done(Outcome::Failed(error))) => FinishReason::ConstraintFailed(error.clone()),
            _ => return,
        };
        self.link.scheduler.finish(id);
        self.remove(id, reason);
    }

    /// Waits a moment for masks that were ordered since the last plan.
    pub(crate) fn await_masks(&mut self) {
        while let Some(patience) = self.masks.patience() {
            match self.commands.recv_timeout(patience) {
                Ok(Command::Masked(masked)) => self.masked(masked),
                Ok(command) => self.deferred.push_back(command),
                Err(_) => break,
            }
        }
        self.masks.stop_waiting();
    }
}
