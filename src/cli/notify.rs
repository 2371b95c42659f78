//! What systemd is told about a service of `Type=notify`: that it is ready, alive, or stopping. Nothing without systemd.

use std::{
    ffi::OsStr,
    io,
    os::{
        linux::net::SocketAddrExt,
        unix::{
            ffi::OsStrExt,
            net::{SocketAddr, UnixDatagram},
        },
    },
    time::Duration,
};

/// Requests are taken from now on.
pub(crate) fn ready() {
    tell("READY=1");
}

/// Requests are taken no longer.
pub(crate) fn stopping() {
    tell("STOPPING=1");
}

/// Says again and again that the process is alive, where the unit has a `WatchdogSec`. Its timer needs a runtime that turns:
/// one that hangs says nothing.
pub(crate) async fn stay_alive() {
    let microseconds = std::env::var("WATCHDOG_USEC").ok().and_then(|text| text.parse().ok());
    let Some(microseconds) = microseconds.filter(|&microseconds| microseconds > 0) else {
        return std::future::pending().await;
    };
    // Twice as often as asked for, as sd_watchdog_enabled(3) recommends.
    let mut timer = tokio::time::interval(Duration::from_micros(microseconds) / 2);
    loop {
        timer.tick().await;
        tell("WATCHDOG=1");
    }
}

fn tell(state: &str) {
    let Some(socket) = std::env::var_os("NOTIFY_SOCKET").filter(|socket| !socket.is_empty()) else { return };
    if let Err(error) = send(&socket, state) {
        tracing::warn!("NOTIFY_SOCKET={}: {error}", socket.display());
    }
}

/// Sends `state` to a socket that is a path, or an abstract name after `@`.
fn send(socket: &OsStr, state: &str) -> io::Result<()> {
    let address = match socket.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(socket)?,
    };
    UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn received(socket: &UnixDatagram) -> String {
        let mut bytes = [0; 64];
        let len = socket.recv(&mut bytes).unwrap();
        String::from_utf8(bytes[..len].to_vec()).unwrap()
    }

    #[test]
    fn both_kinds_of_sockets_are_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        send(path.as_os_str(), "READY=1").unwrap();
        assert_eq!(received(&socket), "READY=1");
        let name = format!("spark-engine-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let socket = UnixDatagram::bind_addr(&address).unwrap();
        send(OsStr::new(&format!("@{name}")), "STOPPING=1").unwrap();
        assert_eq!(received(&socket), "STOPPING=1");
        assert!(send(folder.path().join("nobody").as_os_str(), "READY=1").is_err());
    }
}
