//! The first bytes of every connection: who speaks, and whether both know the token. Not which ranks are still missing.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use rustix::net::sockopt;
use serde::{Deserialize, Serialize};

use crate::{Refusal, UNREACHABLE};

/// Version of the protocol. Its first 12 bytes (name, version) stay as they are in all versions.
pub const PROTOCOL: u32 = 1;

const MAGIC: [u8; 8] = *b"SPKRANKS";
/// Magic, version, 32 random bytes.
pub(crate) const KNOCK_BYTES: usize = 44;
/// A version string and a few numbers; far below this.
const MESSAGE_LIMIT: u32 = 4096;

/// What must be equal on all ranks, compared before anything else they say is used.
#[derive(Clone, PartialEq, Eq)]
pub struct Hello {
    /// Secret that all ranks were started with.
    pub token: String,
    /// Version of the program.
    pub version: String,
    /// Hash of the model: config, tensor names and shapes, sizes of its files.
    pub model: [u8; 32],
    /// Hash of the settings that all ranks must share.
    pub settings: [u8; 32],
}

impl std::fmt::Debug for Hello {
    /// All but the token.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hello").field("version", &self.version).finish_non_exhaustive()
    }
}

/// Key that both sides derive from the token.
#[derive(Clone, Copy)]
pub(crate) struct Key([u8; 32]);

impl Key {
    pub(crate) fn new(token: &str) -> Self {
        Key(blake3::derive_key("spark-engine ranks 2026 token", token.as_bytes()))
    }

    /// Keyed hash; the parts before the last have fixed lengths. Its `==` takes constant time.
    pub(crate) fn proof(&self, who: [u8; 8], knocks: &[[u8; KNOCK_BYTES]; 2], said: &[u8]) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        hasher.update(&who).update(&knocks[0]).update(&knocks[1]).update(said);
        hasher.finalize()
    }
}

pub(crate) const JOINER: [u8; 8] = *b"joiner  ";
const LEADER: [u8; 8] = *b"leader  ";

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Purpose {
    /// The first connection of a follower: begins a session.
    Plan,
    /// Second connection of this session.
    Bulk([u8; 32]),
    /// Third connection of this session.
    Liveness([u8; 32]),
    /// Connection between two ranks of this collective.
    Mesh([u8; 32]),
}

/// What a joiner says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Introduction {
    pub(crate) version: String,
    pub(crate) model: [u8; 32],
    pub(crate) settings: [u8; 32],
    pub(crate) world: u64,
    pub(crate) rank: u64,
    pub(crate) purpose: Purpose,
}

impl Introduction {
    pub(crate) fn new(hello: &Hello, rank: usize, world: usize, purpose: Purpose) -> Self {
        Introduction {
            version: hello.version.clone(),
            model: hello.model,
            settings: hello.settings,
            world: world as u64,
            rank: rank as u64,
            purpose,
        }
    }

    /// First item that differs from the leader's, in the order of the protocol.
    pub(crate) fn check(&self, hello: &Hello, world: usize) -> Result<(), Refusal> {
        let world = world as u64;
        if self.version != hello.version {
            let (leader, joiner) = (hello.version.clone(), self.version.clone());
            return Err(Refusal::Version { leader, joiner });
        }
        if self.model != hello.model {
            return Err(Refusal::Model);
        }
        if self.settings != hello.settings {
            return Err(Refusal::Settings);
        }
        if self.world != world {
            return Err(Refusal::World { leader: world, joiner: self.world });
        }
        if self.rank == 0 || self.rank >= world {
            return Err(Refusal::Rank { rank: self.rank, world });
        }
        Ok(())
    }
}

#[derive(Serialize, Deserialize)]
enum Verdict {
    Welcome { proof: [u8; 32], session: [u8; 32] },
    Refused(Refusal),
}

/// Why a handshake did not succeed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The connection broke or was too slow.
    Io(io::Error),
    /// The other side does not speak this protocol or does not know the token.
    Stranger(&'static str),
    /// Listening side: this is to be answered; joining side: this was answered.
    Refused(Refusal),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Failure::Io(error)
    }
}

/// Joining side: introduces this process and returns the session that it is given.
pub(crate) fn introduce(
    stream: &TcpStream,
    key: &Key,
    introduction: &Introduction,
    until: Instant,
) -> Result<[u8; 32], Failure> {
    let mut wire = Timed { stream, until };
    let mine = knock()?;
    wire.write_all(&mine)?;
    let mut theirs = [0; KNOCK_BYTES];
    wire.read_exact(&mut theirs[..MAGIC.len()])?;
    if theirs[..MAGIC.len()] != MAGIC {
        return Err(Failure::Stranger("it answered something else"));
    }
    wire.read_exact(&mut theirs[MAGIC.len()..])?;
    let leader = version_of(&theirs);
    if leader != PROTOCOL {
        return Err(Failure::Refused(Refusal::Protocol { leader, joiner: PROTOCOL }));
    }
    let knocks = [mine, theirs];
    let said = encode(introduction)?;
    let mut message = key.proof(JOINER, &knocks, &said).as_bytes().to_vec();
    message.extend((said.len() as u32).to_le_bytes());
    message.extend(&said);
    wire.write_all(&message)?;
    match postcard::from_bytes(&read_message(&mut wire)?) {
        Ok(Verdict::Welcome { proof, session }) if key.proof(LEADER, &knocks, &session) == proof => {
            Ok(session)
        }
        Ok(Verdict::Welcome { .. }) => Err(Failure::Stranger("it does not know the token")),
        Ok(Verdict::Refused(refusal)) => Err(Failure::Refused(refusal)),
        Err(_) => Err(Failure::Stranger("its verdict cannot be read")),
    }
}

/// A joiner that knows the token and waits for the verdict.
pub(crate) struct Waiting {
    pub(crate) stream: TcpStream,
    pub(crate) introduction: Introduction,
    key: Key,
    knocks: [[u8; KNOCK_BYTES]; 2],
}

impl Waiting {
    /// Listening side: reads who is there. A [`Failure::Refused`] has already been answered.
    pub(crate) fn receive(stream: TcpStream, key: Key, until: Instant) -> Result<Self, Failure> {
        let mut wire = Timed { stream: &stream, until };
        let mut theirs = [0; KNOCK_BYTES];
        wire.read_exact(&mut theirs[..MAGIC.len()])?;
        if theirs[..MAGIC.len()] != MAGIC {
            return Err(Failure::Stranger("its first bytes are not of this protocol"));
        }
        wire.read_exact(&mut theirs[MAGIC.len()..])?;
        let mine = knock()?;
        wire.write_all(&mine)?;
        let joiner = version_of(&theirs);
        if joiner != PROTOCOL {
            return Err(Failure::Refused(Refusal::Protocol { leader: PROTOCOL, joiner }));
        }
        let knocks = [theirs, mine];
        let mut proof = [0; 32];
        wire.read_exact(&mut proof)?;
        let said = read_message(&mut wire)?;
        if key.proof(JOINER, &knocks, &said) != proof {
            return Err(Failure::Refused(answer_refusal(&stream, Refusal::Token)));
        }
        match postcard::from_bytes(&said) {
            Ok(introduction) => Ok(Waiting { stream, introduction, key, knocks }),
            Err(_) => Err(Failure::Refused(answer_refusal(&stream, Refusal::Malformed))),
        }
    }

    /// Lets it in; the stream has no timeouts from here on.
    pub(crate) fn welcome(self, session: [u8; 32]) -> io::Result<TcpStream> {
        let proof = *self.key.proof(LEADER, &self.knocks, &session).as_bytes();
        answer(&self.stream, &Verdict::Welcome { proof, session })?;
        settle(&self.stream)?;
        Ok(self.stream)
    }

    /// Turns it away with the reason.
    pub(crate) fn refuse(self, refusal: Refusal) -> Refusal {
        answer_refusal(&self.stream, refusal)
    }
}

/// Reads a verdict and drops it.
#[cfg(fuzzing)]
pub(crate) fn read_verdict(bytes: &[u8]) {
    drop(postcard::from_bytes::<Verdict>(bytes));
}

/// No timeouts, no delay of small messages, and an error once the other machine has answered nothing for [`UNREACHABLE`]: one that
/// loses its power closes no connection.
pub(crate) fn settle(stream: &TcpStream) -> io::Result<()> {
    const BEGIN_AFTER: Duration = Duration::from_secs(2);
    const INTERVAL: Duration = Duration::from_secs(1);
    const QUESTIONS: u32 = 3;
    const _: () = assert!(
        BEGIN_AFTER.as_secs() + INTERVAL.as_secs() * QUESTIONS as u64 == UNREACHABLE.as_secs(),
        "the last question is waited for as long as the others"
    );
    sockopt::set_tcp_keepidle(stream, BEGIN_AFTER)?;
    sockopt::set_tcp_keepintvl(stream, INTERVAL)?;
    sockopt::set_tcp_keepcnt(stream, QUESTIONS)?;
    sockopt::set_socket_keepalive(stream, true)?;
    stream.set_read_timeout(None)?;
    stream.set_write_timeout(None)?;
    stream.set_nodelay(true)
}

/// 32 random bytes.
pub(crate) fn random() -> io::Result<[u8; 32]> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).map_err(io::Error::other)?;
    Ok(bytes)
}

pub(crate) fn knock() -> io::Result<[u8; KNOCK_BYTES]> {
    let mut bytes = [0; KNOCK_BYTES];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..12].copy_from_slice(&PROTOCOL.to_le_bytes());
    bytes[12..].copy_from_slice(&random()?);
    Ok(bytes)
}

fn version_of(knock: &[u8; KNOCK_BYTES]) -> u32 {
    u32::from_le_bytes([knock[8], knock[9], knock[10], knock[11]])
}

fn encode(value: &impl Serialize) -> io::Result<Vec<u8>> {
    postcard::to_stdvec(value).map_err(io::Error::other)
}

fn read_message(wire: &mut Timed<'_>) -> Result<Vec<u8>, Failure> {
    let mut length = [0; 4];
    wire.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length);
    if length > MESSAGE_LIMIT {
        return Err(Failure::Stranger("its message is longer than this protocol allows"));
    }
    let mut message = vec![0; length as usize];
    wire.read_exact(&mut message)?;
    Ok(message)
}

/// A verdict is small and the first thing of its size that is sent, so it always fits the socket's buffer.
fn answer(stream: &TcpStream, verdict: &Verdict) -> io::Result<()> {
    let said = encode(verdict)?;
    let mut message = (said.len() as u32).to_le_bytes().to_vec();
    message.extend(said);
    Timed { stream, until: Instant::now() + Duration::from_secs(1) }.write_all(&message)
}

/// The answer is a courtesy: whether it arrives changes nothing here.
fn answer_refusal(stream: &TcpStream, refusal: Refusal) -> Refusal {
    let _ = answer(stream, &Verdict::Refused(refusal.clone()));
    refusal
}

/// A stream whose reads and writes together end at `until`.
struct Timed<'a> {
    stream: &'a TcpStream,
    until: Instant,
}

impl Timed<'_> {
    fn left(&self) -> io::Result<Option<Duration>> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the handshake took too long"));
        }
        Ok(Some(left))
    }
}

/// Expired socket timeouts come as `WouldBlock`, which reads badly in a message.
fn named(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock => io::Error::new(io::ErrorKind::TimedOut, "the handshake took too long"),
        _ => error,
    }
}

impl Read for Timed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(self.left()?)?;
        self.stream.read(buffer).map_err(named)
    }
}

impl Write for Timed<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(self.left()?)?;
        self.stream.write(buffer).map_err(named)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
