//! What comes over the connections between ranks: messages of plans and bulk, and the handshake, also of somebody who
//! knows the token. Each is read, or is why a peer counts as lost.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::LazyLock;
use std::thread;
use std::time::Duration;

use spark_comm::{Hello, Listener, fuzz};

const TOKEN: &str = "secret";
/// A leader that waits longer than any run.
const FOREVER: Duration = Duration::from_secs(1 << 24);

/// A leader that waits for a rank which never comes to stay.
static LEADER: LazyLock<SocketAddr> = LazyLock::new(|| {
    let any = "127.0.0.1:0".parse().expect("an address");
    let listener = Listener::bind(any).expect("this machine can talk to itself");
    let address = listener.local_addr();
    let hello = Hello { token: TOKEN.into(), version: "1".into(), model: [0; 32], settings: [0; 32] };
    thread::spawn(move || {
        let ended = listener.gather(3, &hello, FOREVER, &mut |_| {}).map(|_| ());
        panic!("the leader has ended: {ended:?}");
    });
    address
});

/// Byte 0: what the rest is.
pub fn run(data: &[u8]) {
    let [kind, rest @ ..] = data else { return };
    match kind & 7 {
        0 => spark_runtime::fuzz::from_leader(rest),
        1 => spark_runtime::fuzz::bulk_from_leader(rest),
        2 => spark_runtime::fuzz::bulk_from_follower(rest),
        // Connections take ports, of which a system has some ten thousand: not every input gets one.
        3 if rest.len() % 8 == 0 => with_leader(|stream| stream.write_all(rest)),
        4 if rest.len() % 8 == 0 => with_leader(|stream| fuzz::introduce(stream, TOKEN, rest)),
        _ => fuzz::verdict(rest),
    }
}

/// Speaks to the leader and hears it out.
fn with_leader(speak: impl FnOnce(&mut TcpStream) -> std::io::Result<()>) {
    // Without a port there is nothing to test.
    let Ok(mut stream) = TcpStream::connect(*LEADER) else { return };
    let _ = stream.set_read_timeout(Some(Duration::from_millis(20)));
    if speak(&mut stream).is_ok() && stream.shutdown(Shutdown::Write).is_ok() {
        let _ = stream.read_to_end(&mut Vec::new());
    }
}
