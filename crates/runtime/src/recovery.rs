//! What the engine thread does while its group is lost: it ends what has begun, keeps what has not, and waits for the ranks
//! to come back. Who starts them again is the program's.

use std::{sync::mpsc::RecvTimeoutError, time::Duration};

use spark_api::{FinishReason, Health};
use spark_comm::LossReason;

use crate::{
    Failure, Rebuild, Running,
    engine::Engine,
    handle::Command,
    link::{Link, Runner},
    running::spawn,
    sequence::Sequence,
};

/// How long the runner may take to notice that its group is lost. After that its device is stuck.
const RUNNER_ENDS_WITHIN: Duration = Duration::from_secs(20);

impl Engine {
    /// Brings the engine back after `failure`; `false` if that cannot be, or if it was told to stop meanwhile.
    pub(crate) fn recover(&mut self, failure: Failure) -> bool {
        let may_recover = matches!(failure, Failure::Group(_)) && self.rebuild.is_some();
        self.report(&failure, may_recover);
        let rebuild = match failure {
            Failure::Group(_) => self.rebuild.take(),
            Failure::Device(_) | Failure::Defect(_) => None,
        };
        let Some(rebuild) = rebuild else {
            self.fail(failure);
            return false;
        };
        let reason = failure.message();
        let is_link = self.link.lost_reason() == Some(LossReason::Link);
        let what =
            if is_link { "all requests go on" } else { "requests that have begun end, the others go on" };
        tracing::error!("{reason}; {what} when the ranks have come back");
        self.set_health(Health::Failed(format!("{reason}; waiting for the ranks to come back")));
        self.keep(reason, is_link);
        if let Err(error) = self.begin(rebuild) {
            self.fail(Failure::Defect(error.to_string()));
            return false;
        }
        match self.wait_for_rebuild() {
            None => false,
            Some(Ok(running)) => self.go_on(*running),
            Some(Err(problem)) => {
                self.fail(Failure::Group(format!("{reason}; {problem}")));
                false
            }
        }
    }

    /// Lets sequences wait, in their order. Those that somebody has seen something of end, with `keeps_all` not: what is known of
    /// them is right where no rank was lost, and is computed anew.
    fn keep(&mut self, reason: &str, keeps_all: bool) {
        let mut all: Vec<_> = std::mem::take(&mut self.sequences).into_iter().collect();
        all.sort_by_key(|(id, _)| *id);
        let uploading = std::mem::take(&mut self.uploading).into_values();
        let all: Vec<Sequence> = all.into_iter().map(|(_, sequence)| sequence).chain(uploading).collect();
        for mut sequence in all {
            if keeps_all || sequence.is_untouched {
                sequence.preempt();
                self.kept.push_back(sequence);
            } else {
                self.end(sequence, FinishReason::EngineFailed(reason.to_owned()));
            }
        }
        self.masks.forget_names();
        // The ranks that had pixels are gone.
        self.forget.clear();
    }

    /// Frees what the lost group holds and starts a thread that makes a new one.
    fn begin(&mut self, mut rebuild: Rebuild) -> crate::Result<()> {
        if let Some(monitor) = &self.link.monitor {
            monitor.abort();
        }
        self.link.uploads = None;
        let runner = self.link.runner.detach();
        let done = self.own_commands.clone();
        spawn("spark-rebuild", move || {
            let outcome = wait_for_end(runner).and_then(|()| rebuild()).map(Box::new);
            // An engine that was told to stop meanwhile needs no ranks.
            let _ = done.send(Command::Rebuilt { rebuild, outcome });
        })?;
        Ok(())
    }

    /// Keeps requests that come. `None` means stop.
    fn wait_for_rebuild(&mut self) -> Option<Result<Box<Running>, String>> {
        loop {
            if self.draining && self.kept.is_empty() {
                return None;
            }
            match self.next_command()? {
                Command::Add { request, events, arrived } => {
                    let sequence = self.sequence(*request, events, arrived);
                    self.kept.push_back(sequence);
                }
                Command::Rebuilt { rebuild, outcome } => {
                    self.rebuild = Some(rebuild);
                    return Some(outcome);
                }
                Command::Masked(masked) => self.masked(masked),
                Command::Drain => self.draining = true,
                Command::Abort => return None,
                // Of the group that is gone.
                Command::Uploaded { .. } | Command::Lost { .. } => {}
            }
        }
    }

    fn go_on(&mut self, running: Running) -> bool {
        match Link::new(running, &self.own_commands, self.link.generation + 1) {
            Ok(link) => self.link = link,
            Err(error) => {
                self.fail(Failure::Defect(error.to_string()));
                return false;
            }
        }
        tracing::info!("all ranks are back; {} requests have waited", self.kept.len());
        self.set_health(if self.draining { Health::Stopping } else { Health::Ready });
        for sequence in std::mem::take(&mut self.kept) {
            self.enqueue(sequence);
        }
        true
    }
}

/// Waits until a runner has given its device free.
fn wait_for_end(runner: Runner) -> Result<(), String> {
    loop {
        match runner.results.recv_timeout(RUNNER_ENDS_WITHIN) {
            Ok(_) => {}
            // Its thread has ended or is about to, which dropping it waits for.
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
            Err(RecvTimeoutError::Timeout) => {
                let mut runner = runner;
                runner.abandon();
                let limit = RUNNER_ENDS_WITHIN.as_secs();
                return Err(format!("this rank's device is still in a step after {limit} s: it hangs"));
            }
        }
    }
}
