//! Machines that end without a word while ranks gather: no connection of theirs is closed. Not what happens to a whole team.

use std::ffi::{c_int, c_ushort, c_void};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::time::Instant;

use super::{SOON, hello, join_thread, listener};
use crate::handshake::{Introduction, Key, Purpose};
use crate::{JoinEvent, UNREACHABLE};

/// The system's `struct sock_filter` and `struct sock_fprog`.
#[repr(C)]
struct Instruction(c_ushort, u8, u8, u32);
#[repr(C)]
struct Program(c_ushort, *const Instruction);

/// From here on nothing that is sent to `stream` arrives or is answered, as where the machine has lost its power.
#[allow(unsafe_code, reason = "a function of the system's library that no crate here wraps")]
fn fall_silent(stream: &TcpStream) {
    const SOL_SOCKET: c_int = 1;
    const SO_ATTACH_FILTER: c_int = 26;
    // "Return 0": keep no byte of a packet.
    const RETURN: c_ushort = 6;
    type SetOption = unsafe extern "C" fn(c_int, c_int, c_int, *const c_void, u32) -> c_int;
    let instruction = Instruction(RETURN, 0, 0, 0);
    let program = Program(1, &raw const instruction);
    let library = libloading::os::unix::Library::this();
    // SAFETY: the type is that of the function in every C library; the pointers are valid for the call, which copies.
    let status = unsafe {
        let set = library.get::<SetOption>(b"setsockopt\0").unwrap();
        let size = size_of::<Program>() as u32;
        set(stream.as_raw_fd(), SOL_SOCKET, SO_ATTACH_FILTER, (&raw const program).cast(), size)
    };
    assert_eq!(status, 0, "{}", std::io::Error::last_os_error());
}

#[test]
fn a_machine_that_ends_without_a_word_makes_room() {
    let listener = listener();
    let address = listener.local_addr();
    let open = |purpose| {
        let introduction = Introduction::new(&hello(), 1, 3, purpose);
        crate::join::open(address, &Key::new(&hello().token), &introduction, Instant::now() + SOON).unwrap()
    };
    let died = std::thread::scope(|scope| {
        let first = scope.spawn(|| {
            let (plan, session) = open(Purpose::Plan);
            let (bulk, liveness) = (open(Purpose::Bulk(session)).0, open(Purpose::Liveness(session)).0);
            let connections = [plan, bulk, liveness];
            connections.iter().for_each(fall_silent);
            connections
        });
        let mut again = None;
        let leader = listener.gather(3, &hello(), UNREACHABLE + 2 * SOON, &mut |event| {
            if event == (JoinEvent::Gone { rank: 1 }) {
                again = Some([1, 2].map(|rank| join_thread(address, rank, 3, hello())));
            }
        });
        leader.unwrap();
        assert!(again.unwrap().into_iter().all(|join| join.join().unwrap().is_ok()));
        first.join().unwrap()
    });
    drop(died);
}
