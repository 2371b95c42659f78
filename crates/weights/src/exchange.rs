//! Ranks that read for each other (`--load-exchange`): what several of them want, because their parts of it lie too close together
//! to be read apart, one of them reads and sends to the others. Every rank then reads about its share of a checkpoint. How
//! bytes travel is the business of [`Exchange`].
//!
//! All ranks load the same parameters, each in its own time. A rank says when it begins with a parameter, and nobody reads or sends
//! what is common of a parameter before all ranks have begun with it. So what arrives is of parameters whose bytes a rank
//! counts as held already: memory is bounded as without an exchange. It cannot come to a standstill either: of the parameters
//! that some rank still lacks, take the one that the models ask for first. Every rank begins with it at the latest when
//! its model asks for it, all then read their ranges of it at once, whatever else they wait for, and a rank's receiving
//! threads take what comes without waiting for anything.

pub(crate) mod table;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use spark_backend::Rank;

use self::table::Table;
use crate::error::{Error, Result};
use crate::load::lock;
use crate::read::{Deliver, Progress, Reader, Request, run_workers};

/// Tags that are no number of a range: what a rank is about to do, the parameters that it begins with, why it gives up, that it has
/// everything.
const HELLO: u32 = u32::MAX;
const BEGINS: u32 = u32::MAX - 1;
const FAILED: u32 = u32::MAX - 2;
const DONE: u32 = u32::MAX - 3;
/// Most bytes of a reason that is sent.
const MAX_REASON: usize = 4096;

/// So long the reason for which nothing can be sent may take to arrive.
const VERDICT_WAIT: Duration = Duration::from_millis(500);

/// After so long without a change the log says which ranks are waited for, and again after each further time. It ends nothing: a disk
/// may be slow.
const STILL_WAITING: Duration = Duration::from_secs(60);

/// Why nothing can be sent to a rank or received from it.
pub type ExchangeError = Box<dyn std::error::Error + Send + Sync>;

/// The way from this rank to the others while they load. Blocked calls end with an error when the other rank is lost.
pub trait Exchange: Send + Sync {
    /// Sends `bytes` to `rank`; messages arrive in the order of sending. May wait until the rank receives.
    ///
    /// # Errors
    /// The rank cannot be reached any more.
    fn send(&self, rank: usize, tag: u32, bytes: &[u8]) -> Result<(), ExchangeError>;

    /// Waits for the next message of `rank`: its tag and bytes.
    ///
    /// # Errors
    /// The rank is gone, or has sent what is no message.
    fn receive(&self, rank: usize) -> Result<(u32, Vec<u8>), ExchangeError>;

    /// Ends it on both sides: every call fails from now on.
    fn close(&self);
}

/// A load in which ranks read for each other.
pub(crate) struct Exchanging {
    shared: Arc<Shared>,
    receivers: Vec<JoinHandle<()>>,
}

struct Shared {
    rank: Rank,
    way: Arc<dyn Exchange>,
    table: Table,
    /// [`STILL_WAITING`].
    patience: Duration,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// For each parameter a bit for each rank that has begun with it.
    begun: Vec<u64>,
    /// Ranges that have come and were not taken yet.
    arrived: HashMap<u32, Bytes>,
    /// Whether a range has come, by its number.
    has_come: Vec<bool>,
    /// A bit for each rank that has everything.
    done: u64,
    /// When the log said last who is waited for.
    told: Instant,
    failure: Option<Failure>,
}

/// Why it ended early.
#[derive(Debug, Clone)]
struct Failure {
    rank: usize,
    reason: String,
}

impl Failure {
    fn error(&self) -> Error {
        Error::Exchange { rank: self.rank, reason: self.reason.clone() }
    }
}

impl fmt::Debug for Exchanging {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Exchanging").field("rank", &self.shared.rank).finish_non_exhaustive()
    }
}

impl Exchanging {
    /// Agrees with the other ranks of `rank`'s group, which all call this. `table` is `None` on a rank that does not take part, because
    /// it has its weights already or maps its files; then nobody does, and `None` comes back on every rank.
    ///
    /// # Errors
    /// A rank is lost, or has another checkpoint.
    pub(crate) fn agree(
        way: Arc<dyn Exchange>,
        rank: Rank,
        table: Option<Table>,
        num_specs: usize,
    ) -> Result<Option<Self>> {
        let peers: Vec<usize> = (0..rank.world()).filter(|&peer| peer != rank.index()).collect();
        let hello = table.as_ref().map_or(&[][..], |table| &table.hash);
        let lost = |rank| move |error: ExchangeError| Error::Exchange { rank, reason: error.to_string() };
        for &peer in &peers {
            way.send(peer, HELLO, hello).map_err(lost(peer))?;
        }
        let mut without = table.is_none().then_some(rank.index());
        for &peer in &peers {
            let (tag, theirs) = way.receive(peer).map_err(lost(peer))?;
            if tag != HELLO || !theirs.is_empty() && !hello.is_empty() && theirs != hello {
                let reason = "its checkpoint, or what it makes of it, differs from this rank's; give all ranks the same files";
                return Err(Error::Exchange { rank: peer, reason: reason.to_owned() });
            }
            without = without.or(theirs.is_empty().then_some(peer));
        }
        let Some(table) = table.filter(|_| without.is_none()) else {
            let rank = without.unwrap_or_default();
            tracing::info!("rank {rank} reads no checkpoint by ranges: every rank reads for itself");
            return Ok(None);
        };
        let state = State {
            begun: vec![0; num_specs],
            arrived: HashMap::new(),
            has_come: vec![false; table.len()],
            done: 0,
            told: Instant::now(),
            failure: None,
        };
        let (state, changed) = (Mutex::new(state), Condvar::new());
        let shared = Arc::new(Shared { rank, way, table, patience: STILL_WAITING, state, changed });
        let mut exchanging = Self { shared, receivers: Vec::new() };
        for peer in peers {
            let shared = Arc::clone(&exchanging.shared);
            let thread = std::thread::Builder::new().name(format!("weights of rank {peer}"));
            let receiver = thread.spawn(move || shared.receive(peer));
            exchanging.receivers.push(receiver.map_err(|source| Error::Thread { source })?);
        }
        Ok(Some(exchanging))
    }

    /// Which range is read by whom.
    pub(crate) fn table(&self) -> &Table {
        &self.shared.table
    }

    /// Tells all ranks that this one begins with the parameters `specs`.
    ///
    /// # Errors
    /// A rank is lost.
    pub(crate) fn begin(&self, specs: &Range<usize>) -> Result<()> {
        self.shared.has_begun(self.shared.rank.index(), specs.clone());
        let ends = [specs.start, specs.end].map(|spec| (spec as u64).to_le_bytes());
        self.shared.tell_all(BEGINS, ends.as_flattened())
    }

    /// Waits until all ranks have begun with some of `left`; takes neighbours out of it that all have begun with.
    ///
    /// # Errors
    /// A rank is lost.
    pub(crate) fn next_ready(&self, left: &mut Vec<usize>) -> Result<Range<usize>> {
        let all = self.shared.all();
        let mut state = self.shared.alive()?;
        loop {
            let is_ready = |spec: usize| state.begun[spec] == all;
            if let Some(first) = left.iter().position(|&spec| is_ready(spec)) {
                let begin = left[first];
                let ready = left[first..].iter().zip(begin..);
                let count = ready.take_while(|(spec, next)| *spec == next && is_ready(*next)).count();
                left.drain(first..first + count);
                return Ok(begin..begin + count);
            }
            let behind = |state: &State| left.first().map_or(0, |&spec| all & !state.begun[spec]);
            state = self.shared.wait(state, "begin with the next parameter", behind)?;
        }
    }

    /// Reads and sends what this rank reads of `requests`, takes the rest from the others, and delivers all of them once. All ranks
    /// have begun with the parameters, which `spec_of` gives for a request.
    ///
    /// # Errors
    /// Those of reading and of `deliver`, which end the load of every rank; a rank is lost.
    pub(crate) fn read(
        &self,
        requests: Vec<Request>,
        spec_of: &(dyn Fn(&Request) -> usize + Sync),
        (reader, threads): (&Reader, usize),
        progress: &Progress,
        deliver: Deliver<'_>,
    ) -> Result<()> {
        let Shared { table, rank, .. } = &*self.shared;
        let (mut own, mut awaited) = (Vec::new(), BTreeMap::<u32, Vec<Request>>::new());
        for request in requests {
            match table.find(spec_of(&request), &request) {
                Some((number, common)) if common.reader != rank.index() => {
                    awaited.entry(number).or_default().push(request);
                }
                _ => own.push(request),
            }
        }
        let sent = Mutex::new(HashSet::new());
        let send_and_deliver = |request: &Request, bytes: Bytes| {
            if let Some((number, common)) = table.find(spec_of(request), request)
                && lock(&sent).insert(number)
            {
                for peer in common.takers() {
                    self.shared.send(peer, number, &bytes)?;
                }
            }
            deliver(request, bytes)
        };
        let awaited: Vec<(u32, Vec<Request>)> = awaited.into_iter().collect();
        let fail = |error: &Error| self.give_up(&error.to_string());
        let (read, received) = std::thread::scope(|scope| {
            let read =
                scope.spawn(|| reader.read(own, threads, progress, &send_and_deliver).inspect_err(fail));
            let received = run_workers(threads, awaited.len(), |next| {
                while let Some(index) = next.take() {
                    let (number, requests) = &awaited[index];
                    let bytes = self.shared.take(*number)?;
                    progress.add_from_peers(bytes.len());
                    requests.iter().try_for_each(|request| deliver(request, bytes.clone()))?;
                }
                Ok(())
            });
            let received = received.inspect_err(fail);
            (read.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), received)
        });
        // What went wrong here ended both; that it did is what the other one says.
        match (read, received) {
            (Err(Error::Exchange { .. }), Err(error)) | (Err(error), _) => Err(error),
            (Ok(()), received) => received,
        }
    }

    /// Says that this rank has everything, and waits until all have: nothing is under way afterwards.
    ///
    /// # Errors
    /// A rank is lost.
    pub(crate) fn finish(&self) -> Result<()> {
        self.shared.tell_all(DONE, &[])?;
        let others = self.shared.all() & !(1 << self.shared.rank.index());
        let mut state = self.shared.alive()?;
        while state.done != others {
            state = self.shared.wait(state, "have all of their weights", |state| others & !state.done)?;
        }
        Ok(())
    }

    /// Ends the load on all ranks, unless it has ended.
    pub(crate) fn give_up(&self, reason: &str) {
        self.shared.fail(self.shared.rank.index(), reason);
    }
}

impl Drop for Exchanging {
    fn drop(&mut self) {
        self.shared.way.close();
        for receiver in self.receivers.drain(..) {
            // One that panicked has said so.
            let _ = receiver.join();
        }
    }
}

impl Shared {
    /// A bit for each rank.
    fn all(&self) -> u64 {
        u64::MAX >> (u64::BITS as usize - self.rank.world())
    }

    /// The state, unless it ended early.
    fn alive(&self) -> Result<MutexGuard<'_, State>> {
        let state = lock(&self.state);
        match &state.failure {
            Some(failure) => Err(failure.error()),
            None => Ok(state),
        }
    }

    /// Waits for a change, at most until it is time to say that `behind`, a bit for each rank, have yet to do `what`.
    fn wait<'a>(
        &self,
        state: MutexGuard<'a, State>,
        what: &str,
        behind: impl Fn(&State) -> u64,
    ) -> Result<MutexGuard<'a, State>> {
        let waited = self.changed.wait_timeout(state, self.patience);
        let (mut state, waited) = waited.unwrap_or_else(PoisonError::into_inner);
        // Several threads wait; one says it.
        if waited.timed_out() && state.failure.is_none() && state.told.elapsed() >= self.patience {
            state.told = Instant::now();
            tracing::warn!("{}", waiting(&state.begun, behind(&state), what, self.patience));
        }
        match &state.failure {
            Some(failure) => Err(failure.error()),
            None => Ok(state),
        }
    }

    /// Notes the first failure, tells the other ranks, and ends everything.
    fn fail(&self, rank: usize, reason: &str) {
        let mut state = lock(&self.state);
        if state.failure.is_some() {
            return;
        }
        state.failure = Some(Failure { rank, reason: reason.to_owned() });
        state.arrived.clear();
        drop(state);
        self.changed.notify_all();
        // Whoever hears first tells the others, before they see that this rank closes its connections.
        let text = &reason[..reason.floor_char_boundary(MAX_REASON)];
        let message = [&(rank as u64).to_le_bytes(), text.as_bytes()].concat();
        for peer in self.peers().filter(|&peer| peer != rank) {
            // Who cannot be told notices that the connection ends.
            let _ = self.way.send(peer, FAILED, &message);
        }
        self.way.close();
    }

    fn peers(&self) -> impl Iterator<Item = usize> + use<> {
        let rank = self.rank;
        (0..rank.world()).filter(move |&peer| peer != rank.index())
    }

    fn send(&self, peer: usize, tag: u32, bytes: &[u8]) -> Result<()> {
        let Err(error) = self.way.send(peer, tag, bytes) else { return Ok(()) };
        // The thread that receives of this rank sees the same, and before it perhaps why.
        let state = lock(&self.state);
        let waited = self.changed.wait_timeout_while(state, VERDICT_WAIT, |state| state.failure.is_none());
        drop(waited);
        self.fail(peer, &error.to_string());
        self.alive().map(drop)
    }

    fn tell_all(&self, tag: u32, bytes: &[u8]) -> Result<()> {
        self.peers().try_for_each(|peer| self.send(peer, tag, bytes))
    }

    fn has_begun(&self, rank: usize, specs: Range<usize>) {
        lock(&self.state).begun[specs].iter_mut().for_each(|begun| *begun |= 1 << rank);
        self.changed.notify_all();
    }

    /// Waits for range `number` and takes it.
    fn take(&self, number: u32) -> Result<Bytes> {
        let mut state = self.alive()?;
        loop {
            if let Some(bytes) = state.arrived.remove(&number) {
                return Ok(bytes);
            }
            let reader = self.table.get(number).map_or(0, |common| 1 << common.reader);
            state = self.wait(state, "send what they read for this rank", |_| reader)?;
        }
    }

    /// Takes what `peer` sends until it has everything.
    fn receive(&self, peer: usize) {
        loop {
            let heard = self.way.receive(peer).map_err(|error| error.to_string());
            match heard.and_then(|(tag, bytes)| self.hear(peer, tag, bytes)) {
                Ok(Next::More) => {}
                Ok(Next::Done) => return,
                Ok(Next::Failed(failure)) => return self.fail(failure.rank, &failure.reason),
                Err(reason) => return self.fail(peer, &reason),
            }
        }
    }

    /// What a message means; an error is why it cannot be one.
    fn hear(&self, peer: usize, tag: u32, bytes: Vec<u8>) -> Result<Next, String> {
        match tag {
            BEGINS => {
                let specs = specs(&bytes).filter(|specs| specs.end <= lock(&self.state).begun.len());
                self.has_begun(peer, specs.ok_or("it begins with parameters that there are not")?);
            }
            FAILED => {
                let Some((rank, text)) = bytes.split_first_chunk() else { return Err("it ended".to_owned()) };
                let rank = usize::try_from(u64::from_le_bytes(*rank)).ok();
                let rank = rank.filter(|&rank| rank < self.rank.world()).unwrap_or(peer);
                let reason = String::from_utf8_lossy(text).into_owned();
                return Ok(Next::Failed(Failure { rank, reason }));
            }
            DONE => {
                lock(&self.state).done |= 1 << peer;
                self.changed.notify_all();
                return Ok(Next::Done);
            }
            number => self.arrive(peer, number, bytes)?,
        }
        Ok(Next::More)
    }

    fn arrive(&self, peer: usize, number: u32, bytes: Vec<u8>) -> Result<(), String> {
        let me = self.rank.index();
        let common = self.table.get(number);
        let common = common.filter(|common| common.reader == peer && common.takers().any(|rank| rank == me));
        let common = common.ok_or_else(|| format!("it sent range {number}, which is not its to send"))?;
        if bytes.len() != common.len() {
            return Err(format!("it sent {} bytes of the {} of range {number}", bytes.len(), common.len()));
        }
        let mut state = lock(&self.state);
        if state.begun[common.spec()] >> me & 1 == 0 || state.has_come[number as usize] {
            return Err(format!("it sent range {number} too early or twice"));
        }
        state.has_come[number as usize] = true;
        if state.failure.is_none() {
            state.arrived.insert(number, bytes.into());
        }
        drop(state);
        self.changed.notify_all();
        Ok(())
    }
}

/// Whom a load waits for, and how far each of them says it is.
fn waiting(begun: &[u64], behind: u64, what: &str, patience: Duration) -> String {
    let ranks = (0..u64::BITS).filter(|rank| behind >> rank & 1 == 1);
    let ranks = ranks.map(|rank| {
        let count = begun.iter().filter(|&ranks| ranks >> rank & 1 == 1).count();
        format!("rank {rank} (has begun with {count} of {} parameters)", begun.len())
    });
    let ranks: Vec<String> = ranks.collect();
    let seconds = patience.as_secs();
    format!("loading: nothing new for {seconds} s; these live and have yet to {what}: {}", ranks.join(", "))
}

/// What follows a message.
enum Next {
    More,
    /// The rank has everything.
    Done,
    /// Some rank has given up.
    Failed(Failure),
}

/// The parameters of a message that a rank begins.
fn specs(bytes: &[u8]) -> Option<Range<usize>> {
    let [begin, end] = bytes.as_chunks::<8>().0 else { return None };
    let [begin, end] = [begin, end].map(|spec| usize::try_from(u64::from_le_bytes(*spec)));
    Some(begin.ok()?..end.ok()?).filter(|specs| specs.start <= specs.end && bytes.len() == 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Nowhere;

    impl Exchange for Nowhere {
        fn send(&self, _: usize, _: u32, _: &[u8]) -> Result<(), ExchangeError> {
            Ok(())
        }

        fn receive(&self, _: usize) -> Result<(u32, Vec<u8>), ExchangeError> {
            Err("nobody is there".into())
        }

        fn close(&self) {}
    }

    #[test]
    fn a_wait_is_told_of_and_ends_nothing() {
        let state = State {
            begun: vec![0b01],
            arrived: HashMap::new(),
            has_come: Vec::new(),
            done: 0,
            told: Instant::now(),
            failure: None,
        };
        let shared = Shared {
            rank: Rank::new(0, 2).unwrap(),
            way: Arc::new(Nowhere),
            table: Table::default(),
            patience: Duration::from_millis(5),
            state: Mutex::new(state),
            changed: Condvar::new(),
        };
        let mut state = shared.alive().unwrap();
        for _ in 0..2 {
            let before = state.told;
            while state.told == before {
                state = shared.wait(state, "begin", |state| !state.begun[0] & 0b11).unwrap();
            }
            assert!(state.told >= before + shared.patience, "once in that time");
        }
    }

    #[test]
    fn who_is_waited_for_is_said_with_how_far_it_is() {
        let said = waiting(&[0b111, 0b011, 0b001], 0b110, "have all of their weights", STILL_WAITING);
        assert_eq!(
            said,
            "loading: nothing new for 60 s; these live and have yet to have all of their weights: rank 1 (has begun with 2 of 3 \
             parameters), rank 2 (has begun with 1 of 3 parameters)"
        );
    }
}
