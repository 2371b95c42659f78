//! The ranks of a group, connected; what they do together on a stream, and how a group is given up from outside. No waiting
//! for what is in a stream: that is the backend's.

use std::ffi::c_void;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use spark_backend::Rank;

use super::library::{Handle, RawId};
use super::{Error, Nccl, Result, UniqueId};

/// How often a thread that waits looks whether the group was given up.
const LOOK: Duration = Duration::from_millis(20);
/// How long [`Aborter::abort`] waits for a call that is under way.
const PATIENCE: Duration = Duration::from_secs(1);
/// `ncclSum`.
const SUM: i32 = 0;

/// Types of elements, with their numbers in nccl.h.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum ElementType {
    /// Bytes; not for sums.
    U8 = 1,
    /// float32.
    F32 = 7,
    /// bfloat16; sums are rounded after every addition.
    Bf16 = 9,
}

/// A rank that knows its group and is not connected yet. Needs no GPU.
#[derive(Debug, Clone)]
pub struct Group {
    id: UniqueId,
    rank: Rank,
    timeout: Duration,
    shared: Arc<Shared>,
}

impl Group {
    /// Rank `rank` of the group that `id` names. All its ranks must [connect](Self::connect) within `timeout`. A group is
    /// connected once; a new one needs a new id.
    pub fn new(nccl: &Nccl, id: UniqueId, rank: Rank, timeout: Duration) -> Self {
        let shared = Shared {
            nccl: nccl.clone(),
            handle: Mutex::new(Raw(std::ptr::null_mut())),
            given_up: OnceLock::new(),
            ends: Mutex::default(),
        };
        Self { id, rank, timeout, shared: Arc::new(shared) }
    }

    /// This rank.
    pub fn rank(&self) -> Rank {
        self.rank
    }

    /// Gives the group up, from any thread, before, while and after it is connected.
    pub fn aborter(&self) -> Aborter {
        Aborter { shared: Arc::clone(&self.shared) }
    }

    /// Connects with the other ranks, which must call this, too. `bind` makes this rank's GPU current in the thread that calls it.
    ///
    /// # Errors
    /// [`Error::Timeout`], [`Error::Aborted`], [`Error::Call`]; [`Error::Start`] with what `bind` says.
    pub fn connect(
        &self,
        bind: impl FnOnce() -> Result<(), String> + Send + 'static,
    ) -> Result<Communicator> {
        let (done, connected) = mpsc::channel();
        let Self { id, rank, .. } = *self;
        let nccl = self.shared.nccl.clone();
        // NCCL waits for ever for ranks that do not come: a thread waits for it that can be left behind.
        let thread = std::thread::Builder::new().name("nccl-connect".to_owned()).spawn(move || {
            let result = bind()
                .map_err(|message| Error::Start { what: "the GPU of this rank", message })
                .and_then(|()| connect(&nccl, id, rank));
            if let Err(mpsc::SendError(Ok(Raw(late)))) = done.send(result) {
                // SAFETY: connected here, and nobody else has it.
                unsafe { (nccl.functions().abort)(late) };
            }
        });
        thread.map_err(|error| Error::Start { what: "a thread for NCCL", message: error.to_string() })?;
        let start = Instant::now();
        loop {
            self.shared.expect_alive()?;
            match connected.recv_timeout(LOOK) {
                Ok(result) => {
                    *self.shared.lock() = result?;
                    break;
                }
                Err(RecvTimeoutError::Timeout) if start.elapsed() < self.timeout => {}
                Err(_) => {
                    let seconds = start.elapsed().as_secs_f64();
                    return Err(Error::Timeout { rank: rank.index(), world: rank.world(), seconds });
                }
            }
        }
        // Given up at the last moment: the other thread found no handle to end.
        if let Err(error) = self.shared.expect_alive() {
            self.shared.end();
            return Err(error);
        }
        Ok(Communicator { shared: Arc::clone(&self.shared), rank })
    }
}

fn connect(nccl: &Nccl, id: UniqueId, rank: Rank) -> Result<Raw> {
    let number = |value: usize| {
        i32::try_from(value)
            .map_err(|_| Error::Start { what: "a rank", message: format!("{value} is too many") })
    };
    let (world, index) = (number(rank.world())?, number(rank.index())?);
    let mut handle = std::ptr::null_mut();
    // SAFETY: the pointer is valid; the id is 128 bytes; the GPU is current in this thread (`bind`).
    let status = unsafe { (nccl.functions().init)(&raw mut handle, world, RawId(*id.bytes()), index) };
    nccl.check("ncclCommInitRank", status)?;
    Ok(Raw(handle))
}

/// A communicator of NCCL; null before it is connected and after it was ended.
#[derive(Debug)]
struct Raw(Handle);

// SAFETY: NCCL takes calls on a communicator from any thread, one at a time: it is used under a lock.
unsafe impl Send for Raw {}

#[derive(Debug)]
struct Shared {
    nccl: Nccl,
    handle: Mutex<Raw>,
    /// Why, once it is.
    given_up: OnceLock<String>,
    /// What else ends then.
    ends: Mutex<Ends>,
}

#[derive(Default)]
struct Ends(Vec<Box<dyn Fn() + Send>>);

impl std::fmt::Debug for Ends {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ends", self.0.len())
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Raw> {
        // Nothing panics while it is locked.
        self.handle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn expect_alive(&self) -> Result<()> {
        match self.given_up.get() {
            None => Ok(()),
            Some(reason) => Err(Error::Aborted { reason: reason.clone() }),
        }
    }

    fn run_ends(&self) {
        let ends = self.ends.lock().unwrap_or_else(PoisonError::into_inner);
        ends.0.iter().for_each(|end| end());
    }

    /// Runs `call` with the communicator.
    fn with<T>(&self, call: impl FnOnce(Handle) -> Result<T>) -> Result<T> {
        self.expect_alive()?;
        let handle = self.lock();
        if handle.0.is_null() {
            self.expect_alive()?;
            return Err(Error::Aborted { reason: "it was never connected".to_owned() });
        }
        call(handle.0)
    }

    /// Ends the communicator, if there is one, when nobody calls it; whether it is ended.
    fn end(&self) -> bool {
        let start = Instant::now();
        let mut handle = loop {
            match self.handle.try_lock() {
                Ok(handle) => break handle,
                Err(TryLockError::Poisoned(error)) => break error.into_inner(),
                Err(TryLockError::WouldBlock) if start.elapsed() < PATIENCE => std::thread::sleep(LOOK / 20),
                Err(TryLockError::WouldBlock) => return false,
            }
        };
        if !handle.0.is_null() {
            // SAFETY: connected, and gone after this. Its kernels end by themselves then. Nothing can be done about an error.
            unsafe { (self.nccl.functions().abort)(handle.0) };
            handle.0 = std::ptr::null_mut();
        }
        true
    }
}

/// Gives a group up. Clones are the same.
#[derive(Debug, Clone)]
pub struct Aborter {
    shared: Arc<Shared>,
}

impl Aborter {
    /// From now on every call of this rank's communicator fails with `reason` (the first one stays), and what it has in a stream
    /// ends, with useless results. Returns whether that was done within a second; if not, a call hangs inside NCCL, and only the
    /// end of the process ends it.
    pub fn abort(&self, reason: &str) -> bool {
        // Whoever was first said why.
        let _ = self.shared.given_up.set(reason.to_owned());
        self.shared.run_ends();
        self.shared.end()
    }

    /// Runs `end` when the group is given up, at once if it was; perhaps more than once, and in another thread: for what waits for
    /// other ranks without NCCL.
    pub fn on_abort(&self, end: impl Fn() + Send + 'static) {
        self.shared.ends.lock().unwrap_or_else(PoisonError::into_inner).0.push(Box::new(end));
        if self.shared.given_up.get().is_some() {
            self.shared.run_ends();
        }
    }

    /// What NCCL found out in the background since it was connected, such as a peer that closed its connection.
    ///
    /// # Errors
    /// [`Error::Call`], [`Error::Aborted`].
    pub fn check(&self) -> Result<()> {
        self.shared.expect_alive()?;
        // A call that is under way will say itself what is wrong.
        let Ok(handle) = self.shared.handle.try_lock() else { return Ok(()) };
        if handle.0.is_null() {
            return Ok(());
        }
        let nccl = &self.shared.nccl;
        let mut found = 0;
        // SAFETY: the communicator is connected; the pointer is valid.
        let status = unsafe { (nccl.functions().async_error)(handle.0, &raw mut found) };
        nccl.check("ncclCommGetAsyncError", status)?;
        /// `ncclInProgress`.
        const IN_PROGRESS: i32 = 7;
        if found == IN_PROGRESS { Ok(()) } else { nccl.check("NCCL", found) }
    }
}

/// The ranks of a group, connected. Every rank must call the same operations with the same sizes in the same order.
#[derive(Debug)]
pub struct Communicator {
    shared: Arc<Shared>,
    rank: Rank,
}

impl Communicator {
    /// This rank.
    pub fn rank(&self) -> Rank {
        self.rank
    }

    /// Gives the group up from any thread.
    pub fn aborter(&self) -> Aborter {
        Aborter { shared: Arc::clone(&self.shared) }
    }

    /// Puts into `stream`: `values` of every rank become the sum over the ranks, the same bits on all.
    ///
    /// # Safety
    /// `values` must be the device address of `count` elements of `element` on this rank's GPU, valid until it has run; `stream` a
    /// CUDA stream of that GPU, which is current in this thread.
    ///
    /// # Errors
    /// [`Error::Call`], [`Error::Aborted`].
    pub unsafe fn all_reduce(
        &self,
        values: u64,
        count: usize,
        element: ElementType,
        stream: *mut c_void,
    ) -> Result<()> {
        let at = values as *mut c_void;
        self.shared.with(|handle| {
            let nccl = &self.shared.nccl;
            // SAFETY: the communicator is connected; the rest is the caller's promise. In place is allowed.
            let status =
                unsafe { (nccl.functions().all_reduce)(at, at, count, element as i32, SUM, handle, stream) };
            nccl.check("ncclAllReduce", status)
        })
    }

    /// Puts into `stream`: part `r` of `parts` (of `count` elements each) becomes that of rank `r`. This rank's part is in place.
    ///
    /// # Safety
    /// As for [`Self::all_reduce`], with `world * count` elements.
    ///
    /// # Errors
    /// [`Error::Call`], [`Error::Aborted`].
    pub unsafe fn all_gather(
        &self,
        parts: u64,
        count: usize,
        element: ElementType,
        stream: *mut c_void,
    ) -> Result<()> {
        let size = match element {
            ElementType::U8 => 1,
            ElementType::Bf16 => 2,
            ElementType::F32 => 4,
        };
        let mine = parts + (self.rank.index() * count * size) as u64;
        self.shared.with(|handle| {
            let nccl = &self.shared.nccl;
            // SAFETY: as above; what is sent lies where NCCL expects it of a gathering in place.
            let status = unsafe {
                let (mine, parts) = (mine as *const c_void, parts as *mut c_void);
                (nccl.functions().all_gather)(mine, parts, count, element as i32, handle, stream)
            };
            nccl.check("ncclAllGather", status)
        })
    }

    /// Puts into `stream`: `values` of every rank become those of rank `root`.
    ///
    /// # Safety
    /// As for [`Self::all_reduce`].
    ///
    /// # Errors
    /// [`Error::Call`], also for a `root` that is no rank; [`Error::Aborted`].
    pub unsafe fn broadcast(
        &self,
        values: u64,
        count: usize,
        element: ElementType,
        root: usize,
        stream: *mut c_void,
    ) -> Result<()> {
        let (at, root) = (values as *mut c_void, i32::try_from(root).unwrap_or(-1));
        self.shared.with(|handle| {
            let nccl = &self.shared.nccl;
            // SAFETY: as above.
            let status =
                unsafe { (nccl.functions().broadcast)(at, at, count, element as i32, root, handle, stream) };
            nccl.check("ncclBroadcast", status)
        })
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        let mut handle = self.shared.lock();
        if !handle.0.is_null() {
            // SAFETY: connected and not ended, gone after this. Nothing can be done about an error.
            unsafe { (self.shared.nccl.functions().destroy)(handle.0) };
            handle.0 = std::ptr::null_mut();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::{c_char, c_int};
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::super::library::{Functions, Status};
    use super::*;

    /// A library whose communicators of one rank connect at once, those of two only when `GATE` opens; calls are counted in what
    /// the handle points to.
    #[derive(Default)]
    struct Counters {
        calls: AtomicUsize,
        ended: AtomicUsize,
    }

    static GATE: Mutex<()> = Mutex::new(());

    unsafe extern "C" fn text(_: Status) -> *const c_char {
        c"the reason".as_ptr()
    }
    unsafe extern "C" fn last(_: Handle) -> *const c_char {
        c"more".as_ptr()
    }
    unsafe extern "C" fn id(id: *mut RawId) -> Status {
        // SAFETY: the caller's pointer is valid.
        unsafe { (*id).0[0] = 9 };
        0
    }
    /// The id holds the address of the counters.
    unsafe extern "C" fn init(handle: *mut Handle, world: c_int, id: RawId, _: c_int) -> Status {
        if world > 2 {
            return 3;
        }
        if world == 2 {
            drop(GATE.lock());
        }
        let counters = usize::from_le_bytes(id.0[..8].try_into().unwrap());
        // SAFETY: the caller's pointer is valid.
        unsafe { *handle = counters as Handle };
        0
    }
    fn counters(handle: Handle) -> &'static Counters {
        // SAFETY: handles are the addresses of leaked counters.
        unsafe { &*handle.cast::<Counters>() }
    }
    unsafe extern "C" fn end(handle: Handle) -> Status {
        counters(handle).ended.fetch_add(1, Ordering::SeqCst);
        0
    }
    unsafe extern "C" fn async_error(_: Handle, found: *mut Status) -> Status {
        // SAFETY: the caller's pointer is valid.
        unsafe { *found = 6 };
        0
    }
    unsafe extern "C" fn reduce(
        _: *const c_void,
        _: *mut c_void,
        count: usize,
        element: c_int,
        _: c_int,
        handle: Handle,
        _: *mut c_void,
    ) -> Status {
        assert_eq!(element, 9);
        counters(handle).calls.fetch_add(count, Ordering::SeqCst);
        0
    }
    unsafe extern "C" fn gather(
        mine: *const c_void,
        parts: *mut c_void,
        count: usize,
        _: c_int,
        handle: Handle,
        _: *mut c_void,
    ) -> Status {
        counters(handle).calls.fetch_add(mine as usize - parts as usize + count, Ordering::SeqCst);
        0
    }
    unsafe extern "C" fn broadcast(
        _: *const c_void,
        _: *mut c_void,
        _: usize,
        _: c_int,
        _: c_int,
        _: Handle,
        _: *mut c_void,
    ) -> Status {
        4
    }

    fn group(index: usize, world: usize, timeout: Duration) -> (Group, &'static Counters) {
        let nccl = Nccl::of(Functions {
            error_string: text,
            last_error: last,
            unique_id: id,
            init,
            destroy: end,
            abort: end,
            async_error,
            all_reduce: reduce,
            all_gather: gather,
            broadcast,
        });
        assert_eq!(nccl.unique_id().unwrap().bytes()[0], 9);
        let counters: &'static Counters = Box::leak(Box::default());
        let mut bytes = [0; UniqueId::LEN];
        bytes[..8].copy_from_slice(&(std::ptr::from_ref(counters) as usize).to_le_bytes());
        (Group::new(&nccl, bytes.into(), Rank::new(index, world).unwrap(), timeout), counters)
    }

    const LONG: Duration = Duration::from_secs(60);

    fn sum(communicator: &Communicator) -> Result<()> {
        // SAFETY: the library of this test does not touch the memory.
        unsafe { communicator.all_reduce(0, 5, ElementType::Bf16, std::ptr::null_mut()) }
    }

    #[test]
    fn calls_reach_the_library_and_the_last_owner_ends_it_once() {
        let (group, counters) = group(1, 2, LONG);
        let communicator = group.connect(|| Ok(())).unwrap();
        sum(&communicator).unwrap();
        assert_eq!(counters.calls.load(Ordering::SeqCst), 5);
        // SAFETY: the library of this test does not touch the memory.
        unsafe { communicator.all_gather(64, 10, ElementType::F32, std::ptr::null_mut()) }.unwrap();
        assert_eq!(counters.calls.load(Ordering::SeqCst), 5 + 4 * 10 + 10);
        // SAFETY: as above.
        let error = unsafe { communicator.broadcast(0, 1, ElementType::U8, 0, std::ptr::null_mut()) };
        assert_eq!(error.unwrap_err().to_string(), "ncclBroadcast: the reason: more (4)");
        let error = communicator.aborter().check().unwrap_err().to_string();
        assert_eq!(error, "NCCL: the reason: more (6)");
        drop(communicator);
        assert!(group.aborter().abort("late"));
        assert_eq!(counters.ended.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn after_giving_up_every_call_says_the_first_reason() {
        let (group, counters) = group(0, 1, LONG);
        let communicator = group.connect(|| Ok(())).unwrap();
        let ends = Arc::new(AtomicUsize::new(0));
        let count = |ends: &Arc<AtomicUsize>| {
            let ends = Arc::clone(ends);
            move || _ = ends.fetch_add(1, Ordering::SeqCst)
        };
        communicator.aborter().on_abort(count(&ends));
        assert_eq!(ends.load(Ordering::SeqCst), 0);
        assert!(group.aborter().abort("rank 1 is gone"));
        assert_eq!(ends.load(Ordering::SeqCst), 1);
        let late = Arc::new(AtomicUsize::new(0));
        communicator.aborter().on_abort(count(&late));
        assert_eq!(late.load(Ordering::SeqCst), 1);
        assert!(communicator.aborter().abort("another"));
        let error = sum(&communicator).unwrap_err().to_string();
        assert_eq!(error, "the group of ranks was given up: rank 1 is gone");
        assert!(group.aborter().check().is_err());
        drop(communicator);
        assert_eq!(counters.ended.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn nobody_waits_for_ever_and_a_late_connection_is_ended() {
        let gate = GATE.lock().unwrap();
        let (late, counters) = group(0, 2, Duration::from_millis(30));
        let error = late.connect(|| Ok(())).unwrap_err().to_string();
        assert!(error.starts_with("rank 0 of 2 waited 0 s for NCCL"), "{error}");
        let (given_up, _) = group(0, 2, LONG);
        let aborter = given_up.aborter();
        let other = std::thread::spawn(move || aborter.abort("a rank left"));
        let error = given_up.connect(|| Ok(())).unwrap_err().to_string();
        assert!(error.ends_with("a rank left") && other.join().unwrap(), "{error}");
        drop(gate);
        let start = Instant::now();
        while counters.ended.load(Ordering::SeqCst) == 0 && start.elapsed() < LONG {
            std::thread::yield_now();
        }
        assert_eq!(counters.ended.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn what_hinders_connecting_is_said() {
        let (group, _) = group(0, 1, LONG);
        let error = group.connect(|| Err("no such GPU".to_owned())).unwrap_err().to_string();
        assert_eq!(error, "the GPU of this rank: no such GPU");
        let (many, _) = self::group(0, 3, LONG);
        let error = many.connect(|| Ok(())).unwrap_err().to_string();
        assert_eq!(error, "ncclCommInitRank: the reason: more (3)");
    }
}
