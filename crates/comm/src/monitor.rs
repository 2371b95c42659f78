//! Whether the peers of a team live: heartbeats, the first loss, and how it ends every blocked call. Not what to do next.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use spark_backend::Rank;

use crate::{Error, HEARTBEAT, Result, SILENCE};

/// Bytes of a liveness connection below [`crate::MAX_WORLD`] name a lost rank, those below twice of it a lost [`LINK`].
const ALIVE: u8 = 0xff;
const GOODBYE: u8 = 0xfe;
const STOP: u8 = 0xfd;
/// With a rank in the lower bits: the team is lost because of data connections to it alone.
const LINK: u8 = 0x40;
const _: () = assert!(crate::MAX_WORLD <= LINK as usize);

/// A broken connection waits so long for the liveness connection to say why: both break at the same moment when a
/// process ends, and a rank that tells of another's loss does so before it shuts its own sockets.
const VERDICT_WAIT: Duration = Duration::from_millis(150);

/// A data connection breaks with its rank's process as well: after this time every loss of a process has shown.
const LINK_WAIT: Duration = SILENCE.saturating_add(HEARTBEAT);

/// A rank of the team is gone, and with it the team.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("rank {rank} is lost: {reason}")]
pub struct PeerLost {
    /// Which one.
    pub rank: usize,
    /// How it was noticed.
    pub reason: LossReason,
}

/// How the loss of a rank was noticed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LossReason {
    /// It said goodbye: an orderly end.
    #[error("it left in order")]
    Left,
    /// Its connection ended: the process has ended, or the network broke the connection.
    #[error("its connection ended")]
    Closed,
    /// Nothing came for [`SILENCE`]: the process is stopped or its machine cannot be reached.
    #[error("it was silent for {:.1} s", SILENCE.as_secs_f64())]
    Silent,
    /// What it sent is not of this protocol.
    #[error("it sent what is not of the protocol ({0})")]
    Garbage(&'static str),
    /// It called other collectives than this rank.
    #[error("it calls other collectives than this rank")]
    Diverged,
    /// Another rank noticed it.
    #[error("rank {0} says so")]
    ReportedBy(usize),
    /// Data do not reach it, or do not come from it, while its heart beats: a connection or a rail broke, and no process.
    #[error("it lives, but data between it and other ranks do not arrive")]
    Link,
    /// [`Monitor::abort`] or [`crate::AbortHandle::abort`] was called.
    #[error("the team was given up here")]
    Aborted,
}

type Watcher = Box<dyn FnOnce(PeerLost) + Send>;
type StopWatcher = Box<dyn FnOnce(usize) + Send>;

/// Knows whether the team lives; clones are the same monitor. The goodbye is said when the last one is dropped, and each
/// part of a team holds one.
#[derive(Clone)]
pub struct Monitor {
    shared: Arc<Shared>,
}

struct Shared {
    rank: Rank,
    /// Liveness connections, by peer.
    voices: Vec<(usize, TcpStream)>,
    state: Mutex<State>,
    changed: Condvar,
    /// Its end stops the heart.
    _heart: Sender<()>,
}

#[derive(Default)]
struct State {
    lost: Option<PeerLost>,
    watchers: Vec<Watcher>,
    /// Who is told that a rank wants the team to end in order.
    stop_watchers: Vec<StopWatcher>,
    /// The first rank that does.
    asks_to_stop: Option<usize>,
    /// All sockets on which a call of this team may block.
    sockets: Vec<TcpStream>,
    /// Looks at each heartbeat whether data reach the other ranks, and says why not.
    link: Option<LinkCheck>,
}

type LinkCheck = Arc<dyn Fn() -> Option<String> + Send + Sync>;

impl Monitor {
    /// Begins to listen to `peers` (rank, liveness connection) and to send heartbeats.
    pub(crate) fn start(rank: Rank, peers: Vec<(usize, TcpStream)>) -> io::Result<Self> {
        let mut ears = Vec::new();
        for (peer, stream) in &peers {
            stream.set_read_timeout(Some(SILENCE))?;
            // One byte fits unless the peer has not read for days; then it is lost anyway.
            stream.set_write_timeout(Some(HEARTBEAT))?;
            ears.push((*peer, stream.try_clone()?));
        }
        let (heart, stopped) = channel();
        let shared = Arc::new(Shared {
            rank,
            voices: peers,
            state: Mutex::default(),
            changed: Condvar::new(),
            _heart: heart,
        });
        for (peer, stream) in ears {
            let shared = Arc::downgrade(&shared);
            let name = format!("hear rank {peer}");
            std::thread::Builder::new().name(name).spawn(move || listen(&shared, peer, stream))?;
        }
        let beating = Arc::downgrade(&shared);
        std::thread::Builder::new().name("heartbeat".into()).spawn(move || beat(&beating, &stopped))?;
        Ok(Monitor { shared })
    }

    /// Which rank this is.
    pub fn rank(&self) -> Rank {
        self.shared.rank
    }

    /// Calls `on_lost` once, with the first loss: from a thread of the monitor, or from this call if it has happened. All
    /// sockets of the team are shut by then.
    pub fn watch(&self, on_lost: impl FnOnce(PeerLost) + Send + 'static) {
        let mut state = self.shared.state();
        if let Some(lost) = state.lost.clone() {
            drop(state);
            on_lost(lost);
        } else {
            state.watchers.push(Box::new(on_lost));
        }
    }

    /// The first loss, if there was one.
    pub fn lost(&self) -> Option<PeerLost> {
        self.shared.state().lost.clone()
    }

    /// Asks the other side of this rank's connections to end the team in order: a follower that is told to stop asks the leader.
    pub fn ask_to_stop(&self) {
        self.shared.say(STOP);
    }

    /// Calls `on_request` with the first rank that asks for an orderly end: from a thread of the monitor, or from this call if one has
    /// asked.
    pub fn watch_for_stop(&self, on_request: impl FnOnce(usize) + Send + 'static) {
        let mut state = self.shared.state();
        if let Some(rank) = state.asks_to_stop {
            drop(state);
            on_request(rank);
        } else {
            state.stop_watchers.push(Box::new(on_request));
        }
    }

    /// Asks `check` with every heartbeat whether data reach the other ranks. When it says why not, and no rank turns out to be lost
    /// meanwhile, the team is lost for [`LossReason::Link`].
    pub fn watch_link(&self, check: impl Fn() -> Option<String> + Send + Sync + 'static) {
        self.shared.state().link = Some(Arc::new(check));
    }

    /// Ends the team here and tells the other ranks: every blocked call returns. For a rank that hangs while its heart
    /// beats.
    pub fn abort(&self) {
        self.report(&PeerLost { rank: self.shared.rank.index(), reason: LossReason::Aborted });
    }

    pub(crate) fn report(&self, lost: &PeerLost) {
        self.shared.report(lost);
    }

    /// Sockets to be shut at a loss; shut now if it has happened.
    pub(crate) fn attach(&self, sockets: Vec<TcpStream>) {
        let mut state = self.shared.state();
        if state.lost.is_some() {
            shut(&sockets);
        } else {
            state.sockets.extend(sockets);
        }
    }

    /// What a failed read or write on a connection to `rank` is called: the loss that the liveness connections tell of
    /// within a moment, else this one, which is reported.
    pub(crate) fn explain(&self, rank: usize, reason: LossReason) -> Error {
        let wait = if reason == LossReason::Link { LINK_WAIT } else { VERDICT_WAIT };
        let state = self.shared.state();
        let (state, _) = self
            .shared
            .changed
            .wait_timeout_while(state, wait, |state| state.lost.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        let known = state.lost.clone();
        drop(state);
        let lost = known.unwrap_or_else(|| {
            let lost = PeerLost { rank, reason };
            self.report(&lost);
            self.lost().unwrap_or(lost)
        });
        Error::Lost(lost)
    }

    /// Nothing if the team lives.
    pub(crate) fn check(&self) -> Result<()> {
        self.lost().map_or(Ok(()), |lost| Err(Error::Lost(lost)))
    }
}

impl Shared {
    /// A watcher that panicked does not change what is known.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn report(&self, lost: &PeerLost) {
        let mut state = self.state();
        if state.lost.is_some() {
            return;
        }
        state.lost = Some(lost.clone());
        // Told first, so that peers hear the reason before they see their connections end.
        let is_link = lost.reason == LossReason::Link;
        self.say(lost.rank as u8 | if is_link { LINK } else { 0 });
        shut(&state.sockets);
        state.sockets.clear();
        let watchers = std::mem::take(&mut state.watchers);
        state.link = None;
        drop(state);
        self.changed.notify_all();
        for watcher in watchers {
            watcher(lost.clone());
        }
    }

    /// Reports the link when it has been broken for so long that a lost process would have shown.
    fn look_at_link(&self, broken_since: &mut Option<Instant>) {
        let link = self.state().link.clone();
        let Some(problem) = link.and_then(|check| check()) else { return *broken_since = None };
        if broken_since.get_or_insert_with(Instant::now).elapsed() < LINK_WAIT || self.state().lost.is_some()
        {
            return;
        }
        tracing::error!("data do not reach the other ranks, which live: {problem}");
        self.report(&PeerLost { rank: self.rank.index(), reason: LossReason::Link });
    }

    /// Who cannot be told is noticed by its silence.
    fn say(&self, word: u8) {
        for (_, voice) in &self.voices {
            let _ = (&mut &*voice).write(&[word]);
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if self.state().lost.is_none() {
            self.say(GOODBYE);
        }
        for (_, voice) in &self.voices {
            let _ = voice.shutdown(Shutdown::Both);
        }
    }
}

fn shut(sockets: &[TcpStream]) {
    for socket in sockets {
        // It may have ended already.
        let _ = socket.shutdown(Shutdown::Both);
    }
}

fn beat(shared: &Weak<Shared>, stopped: &Receiver<()>) {
    let mut broken_since = None;
    while let Some(shared) = shared.upgrade() {
        shared.say(ALIVE);
        shared.look_at_link(&mut broken_since);
        drop(shared);
        if stopped.recv_timeout(HEARTBEAT) != Err(RecvTimeoutError::Timeout) {
            return;
        }
    }
}

fn listen(shared: &Weak<Shared>, peer: usize, mut stream: TcpStream) {
    let mut words = [0; 64];
    loop {
        let heard = stream.read(&mut words);
        let Some(shared) = shared.upgrade() else { return };
        let lost = match heard {
            Ok(0) => Some(PeerLost { rank: peer, reason: LossReason::Closed }),
            Ok(count) => words[..count].iter().find_map(|&word| meaning(&shared, peer, word)),
            Err(error) => match error.kind() {
                io::ErrorKind::Interrupted => None,
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                    Some(PeerLost { rank: peer, reason: LossReason::Silent })
                }
                _ => Some(PeerLost { rank: peer, reason: LossReason::Closed }),
            },
        };
        if let Some(lost) = lost {
            return shared.report(&lost);
        }
    }
}

/// The loss that a byte from `peer` tells of, if it does.
fn meaning(shared: &Shared, peer: usize, word: u8) -> Option<PeerLost> {
    match word {
        ALIVE => None,
        GOODBYE => Some(PeerLost { rank: peer, reason: LossReason::Left }),
        STOP => {
            let mut state = shared.state();
            state.asks_to_stop.get_or_insert(peer);
            let watchers = std::mem::take(&mut state.stop_watchers);
            drop(state);
            watchers.into_iter().for_each(|watcher| watcher(peer));
            None
        }
        link if link & LINK != 0 && usize::from(link & !LINK) < shared.rank.world() => {
            Some(PeerLost { rank: usize::from(link & !LINK), reason: LossReason::Link })
        }
        rank if usize::from(rank) < shared.rank.world() => {
            Some(PeerLost { rank: usize::from(rank), reason: LossReason::ReportedBy(peer) })
        }
        _ => Some(PeerLost { rank: peer, reason: LossReason::Garbage("liveness") }),
    }
}
