//! The signals that ask this process to end in order. What is done then is the commands' matter.

use std::{fs, io};

use rustix::process::Signal as Number;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// SIGTERM, SIGINT (Ctrl-C) and SIGHUP (the terminal closes). Until they are taken they end the process at once.
pub(crate) struct Signals {
    terminate: Signal,
    interrupt: Signal,
    /// `None` where it was ignored when the process began, as `nohup` has it: it stays ignored.
    hangup: Option<Signal>,
}

impl Signals {
    /// Inside of a runtime only.
    ///
    /// # Errors
    /// The system does not let them be taken.
    pub(crate) fn take() -> io::Result<Self> {
        // Where the system does not tell, it is not ignored.
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let hangup = (!is_ignored(&status, Number::HUP)).then(|| signal(SignalKind::hangup()));
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: hangup.transpose()?,
        })
    }

    /// Waits for one of them, which may have come already.
    pub(crate) async fn next(&mut self) {
        let hangup = async {
            match &mut self.hangup {
                Some(hangup) => hangup.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
            _ = hangup => {}
        }
    }
}

/// Whether a process with this `/proc/PID/status` ignores a signal: bit N - 1 of its mask is signal N.
fn is_ignored(status: &str, signal: Number) -> bool {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal.as_raw() - 1) & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mask_of_ignored_signals_is_read() {
        let status =
            "Name:\tx\nSigBlk:\t0000000000000001\nSigIgn:\t0000000000001001\nSigCgt:\t0000000000000002\n";
        assert!(is_ignored(status, Number::HUP) && is_ignored(status, Number::PIPE));
        assert!(!is_ignored(status, Number::INT) && !is_ignored(status, Number::TERM));
        assert!(!is_ignored("", Number::HUP) && !is_ignored("SigIgn:\tnone", Number::HUP));
    }
}
