//! The leader's side of a gathering: waits until every rank has joined. Not the handshake itself.

use std::fmt;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use spark_backend::Rank;

use crate::acceptor::{Acceptor, Outcome};
use crate::handshake::{Hello, Key, Purpose, Waiting, random};
use crate::team::{Leader, Parts};
use crate::{Error, MAX_WORLD, Refusal, Result, deadline};

/// How often members that have joined are asked whether they are still there.
const CHECK_MEMBERS: Duration = Duration::from_millis(250);

/// Where ranks join. Stays for the life of the leader and gathers one team after the other.
pub struct Listener {
    socket: TcpListener,
    address: SocketAddr,
    stopper: Stopper,
}

/// Ends a gathering from another thread, which knows that a rank will not come. Clones are the same.
#[derive(Clone, Default)]
pub struct Stopper {
    reason: Arc<Mutex<Option<String>>>,
}

impl Stopper {
    /// Gatherings fail with `reason` until [`reset`](Self::reset); the first reason stays.
    pub fn stop(&self, reason: impl Into<String>) {
        self.lock().get_or_insert_with(|| reason.into());
    }

    /// Gatherings may go on.
    pub fn reset(&self) {
        *self.lock() = None;
    }

    fn check(&self) -> Result<()> {
        self.lock().clone().map_or(Ok(()), |reason| Err(Error::Stopped { reason }))
    }

    fn lock(&self) -> MutexGuard<'_, Option<String>> {
        self.reason.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What happens while ranks gather; for the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JoinEvent {
    /// A rank has joined with all its connections.
    Joined {
        /// Its number.
        rank: usize,
        /// Where it is.
        address: SocketAddr,
    },
    /// A process of this program was turned away.
    Refused {
        /// Where it is.
        address: SocketAddr,
        /// Why.
        refusal: Refusal,
    },
    /// Something that does not speak the protocol connected.
    Stranger {
        /// Where it is.
        address: SocketAddr,
        /// What it did.
        reason: String,
    },
    /// A rank ended before all were there; its number is free again.
    Gone {
        /// Its number.
        rank: usize,
    },
}

impl fmt::Display for JoinEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            JoinEvent::Joined { rank, address } => write!(f, "rank {rank} joined from {address}"),
            JoinEvent::Refused { address, refusal } => write!(f, "refused a rank from {address}: {refusal}"),
            JoinEvent::Stranger { address, reason } => {
                write!(f, "closed a connection from {address}, which is no rank: {reason}")
            }
            JoinEvent::Gone { rank } => write!(f, "rank {rank} ended while others were awaited"),
        }
    }
}

impl Listener {
    /// Listens on this address only: an interface between the ranks. Port 0 lets the system choose.
    ///
    /// # Errors
    /// [`Error::Bind`].
    pub fn bind(address: SocketAddr) -> Result<Self> {
        let bind = || {
            let socket = TcpListener::bind(address)?;
            let address = socket.local_addr()?;
            Ok(Listener { socket, address, stopper: Stopper::default() })
        };
        bind().map_err(|source| Error::Bind { address, source })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// What ends its gatherings early.
    pub fn stopper(&self) -> Stopper {
        self.stopper.clone()
    }

    /// Waits until ranks 1 to `world - 1` have joined and agree with `hello`; this process is rank 0.
    ///
    /// # Errors
    /// [`Error::Stopped`], [`Error::Missing`] after `timeout`, [`Error::World`], [`Error::System`].
    pub fn gather(
        &self,
        world: usize,
        hello: &Hello,
        timeout: Duration,
        on_event: &mut dyn FnMut(JoinEvent),
    ) -> Result<Leader> {
        let rank =
            Rank::new(0, world).filter(|_| world <= MAX_WORLD).ok_or(Error::World { rank: 0, world })?;
        let until = deadline(timeout);
        let key = Key::new(&hello.token);
        let acceptor = Acceptor::start(&self.socket, key)?;
        let mut roster = Roster { hello, members: (1..world).map(|_| None).collect() };
        loop {
            for rank in roster.forget_gone() {
                on_event(JoinEvent::Gone { rank });
            }
            let missing = roster.missing();
            if missing.is_empty() {
                break;
            }
            self.stopper.check()?;
            if Instant::now() >= until {
                return Err(Error::Missing { ranks: missing, world, waited: timeout });
            }
            let next = acceptor.next(until.min(Instant::now() + CHECK_MEMBERS));
            if let Some(event) = next.and_then(|outcome| roster.handle(outcome)) {
                on_event(event);
            }
        }
        drop(acceptor);
        Leader::assemble(rank, key, self.address, roster.into_parts())
    }
}

/// Who has joined so far.
struct Roster<'a> {
    hello: &'a Hello,
    /// `[rank - 1]`.
    members: Vec<Option<Member>>,
}

struct Member {
    address: SocketAddr,
    session: [u8; 32],
    plan: TcpStream,
    bulk: Option<TcpStream>,
    liveness: Option<TcpStream>,
}

impl Member {
    fn is_complete(&self) -> bool {
        self.bulk.is_some() && self.liveness.is_some()
    }

    /// Followers say nothing before all are there: anything to read is the end of the connection, or a wrong peer.
    fn is_gone(&self) -> bool {
        let peek = || {
            self.plan.set_nonblocking(true)?;
            let peeked = self.plan.peek(&mut [0]);
            self.plan.set_nonblocking(false)?;
            peeked
        };
        !matches!(peek(), Err(error) if error.kind() == std::io::ErrorKind::WouldBlock)
    }
}

impl Roster<'_> {
    fn missing(&self) -> Vec<usize> {
        let is_missing = |member: &Option<Member>| !member.as_ref().is_some_and(Member::is_complete);
        (1..).zip(&self.members).filter(|(_, member)| is_missing(member)).map(|(rank, _)| rank).collect()
    }

    fn forget_gone(&mut self) -> Vec<usize> {
        let mut gone = Vec::new();
        for (rank, member) in (1..).zip(&mut self.members) {
            if member.as_ref().is_some_and(Member::is_gone) {
                *member = None;
                gone.push(rank);
            }
        }
        gone
    }

    fn handle(&mut self, outcome: Outcome) -> Option<JoinEvent> {
        match outcome {
            Outcome::Introduced(address, waiting) => match self.verdict(&waiting) {
                Ok(()) => self.admit(address, *waiting),
                Err(refusal) => Some(JoinEvent::Refused { address, refusal: waiting.refuse(refusal) }),
            },
            Outcome::Refused(address, refusal) => Some(JoinEvent::Refused { address, refusal }),
            Outcome::Stranger(address, reason) => Some(JoinEvent::Stranger { address, reason }),
        }
    }

    fn verdict(&self, waiting: &Waiting) -> Result<(), Refusal> {
        let introduction = &waiting.introduction;
        introduction.check(self.hello, self.members.len() + 1)?;
        let member = self.members[introduction.rank as usize - 1].as_ref();
        match (introduction.purpose, member) {
            (Purpose::Plan, Some(member)) if !member.is_gone() => {
                Err(Refusal::Taken { rank: introduction.rank, holder: member.address })
            }
            (Purpose::Plan, _) => Ok(()),
            (Purpose::Bulk(session), Some(member)) if session == member.session && member.bulk.is_none() => {
                Ok(())
            }
            (Purpose::Liveness(session), Some(member))
                if session == member.session && member.liveness.is_none() =>
            {
                Ok(())
            }
            _ => Err(Refusal::Session),
        }
    }

    /// Welcomes a connection that passed [`Roster::verdict`]. One that breaks here is not added; its process tries again.
    fn admit(&mut self, address: SocketAddr, waiting: Waiting) -> Option<JoinEvent> {
        let (rank, purpose) = (waiting.introduction.rank as usize, waiting.introduction.purpose);
        let place = &mut self.members[rank - 1];
        if purpose == Purpose::Plan {
            let session = random().ok()?;
            let plan = waiting.welcome(session).ok()?;
            *place = Some(Member { address, session, plan, bulk: None, liveness: None });
            return None;
        }
        let member = place.as_mut()?;
        let stream = waiting.welcome(member.session).ok()?;
        match purpose {
            Purpose::Bulk(_) => member.bulk = Some(stream),
            _ => member.liveness = Some(stream),
        }
        member.is_complete().then_some(JoinEvent::Joined { rank, address: member.address })
    }

    fn into_parts(self) -> Vec<Parts> {
        let complete = self.members.into_iter().flatten().filter_map(|member| {
            Some(Parts { plan: member.plan, bulk: member.bulk?, liveness: member.liveness? })
        });
        complete.collect()
    }
}
