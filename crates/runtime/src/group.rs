//! Rank 0's side of a group: the sizes that all ranks agree on, plans before they run here, pixels before they are planned.
//! The followers' side is `follower`.

use std::{
    collections::VecDeque,
    sync::mpsc::{Receiver, Sender},
};

use spark_backend::{Backend, Result as BackendResult};
use spark_comm::{BulkLeader, Leader, Monitor, PlanSender};

use crate::{
    Error, MemoryPlan, ModelRunner, Result,
    digest::Digest,
    handle::Command,
    pipeline::Steps,
    runner::{StepResult, StepWork},
    wire::{Agreement, FromFollower, Pixels, PlanMessage, Results, ToFollower},
};

/// The followers of this process, all of them connected.
pub struct LeaderGroup {
    pub(crate) plans: PlanSender,
    pub(crate) bulk: BulkLeader,
    pub(crate) monitor: Monitor,
}

impl LeaderGroup {
    /// Over the connections of a gathered team.
    pub fn new(leader: Leader) -> Self {
        let (plans, bulk, monitor) = leader.split();
        Self { plans, bulk, monitor }
    }

    /// Makes `plan` the smallest of all ranks'. Every rank has as many KV blocks then.
    ///
    /// # Errors
    /// A follower is gone.
    pub(crate) fn agree(&mut self, plan: &MemoryPlan, vocab_size: usize) -> Result<MemoryPlan> {
        let mut agreed = *plan;
        for (i, answer) in
            self.bulk.gather::<FromFollower>("that their weights are loaded")?.into_iter().enumerate()
        {
            let FromFollower::Offer { num_blocks } = answer else {
                return Err(unexpected(i + 1, &answer, "its memory"));
            };
            agreed.kv.num_blocks = agreed.kv.num_blocks.min(num_blocks);
        }
        agreed.max_model_len = agreed.max_model_len.min(agreed.kv.num_blocks * agreed.kv.block_size);
        let (num_blocks, max_model_len) = (agreed.kv.num_blocks, agreed.max_model_len);
        self.bulk.send(&ToFollower::Agreement(Agreement { num_blocks, max_model_len, vocab_size }))?;
        Ok(agreed)
    }

    /// Waits until every follower can run steps.
    ///
    /// # Errors
    /// A follower is gone.
    pub(crate) fn wait_until_ready(&mut self) -> Result<()> {
        for (i, answer) in
            self.bulk.gather::<FromFollower>("that they can run steps")?.into_iter().enumerate()
        {
            if answer != FromFollower::Ready {
                return Err(unexpected(i + 1, &answer, "that it is ready"));
            }
        }
        Ok(())
    }
}

fn unexpected(rank: usize, answer: &FromFollower, expected: &'static str) -> Error {
    let got = match answer {
        FromFollower::Offer { .. } => "its memory",
        FromFollower::Ready => "that it is ready",
        FromFollower::Uploaded(_) => "that it has pixels",
    };
    Error::Protocol { from: format!("rank {rank}"), got, expected }
}

/// Pixels that all followers must have before their sequence is scheduled.
pub(crate) struct Upload {
    pub(crate) id: u64,
    pub(crate) media: Vec<Pixels>,
}

/// Brings each upload to all followers and says so to the engine. Ends with the channel, or when the group is lost, which
/// the monitor reports; what else goes wrong ends the group, because sequences wait for their pixels.
pub(crate) fn run_uploads(
    mut bulk: BulkLeader,
    uploads: &Receiver<Upload>,
    commands: &Sender<Command>,
    generation: u64,
    monitor: &Monitor,
) {
    while let Ok(upload) = uploads.recv() {
        let id = upload.id;
        if let Err(error) = bring(&mut bulk, upload) {
            if monitor.lost().is_none() {
                tracing::error!("bringing pixels to the other ranks: {error}");
                monitor.abort();
            }
            return;
        }
        if commands.send(Command::Uploaded { generation, id }).is_err() {
            return;
        }
    }
}

/// Returns when all followers have it.
fn bring(bulk: &mut BulkLeader, Upload { id, media }: Upload) -> Result<()> {
    let count = media.len();
    for (before, pixels) in media.into_iter().enumerate() {
        bulk.send(&ToFollower::Upload { id, pixels, is_last: before + 1 == count })?;
    }
    for (i, answer) in bulk.gather::<FromFollower>("that they have the pixels")?.into_iter().enumerate() {
        if answer != FromFollower::Uploaded(id) {
            return Err(unexpected(i + 1, &answer, "that it has the pixels that were sent last"));
        }
    }
    Ok(())
}

/// A runner whose results are hashed, so that ranks can be compared.
pub(crate) struct HashedRunner<B: Backend> {
    runner: ModelRunner<B>,
    /// Plans in flight, oldest first.
    plans: VecDeque<Digest>,
    results: Results,
}

impl<B: Backend> HashedRunner<B> {
    pub(crate) fn new(runner: ModelRunner<B>) -> Self {
        let results = Results { num_steps: 0, digest: Digest::default() };
        Self { runner, plans: VecDeque::new(), results }
    }

    /// Of all steps collected so far.
    pub(crate) fn results(&self) -> Results {
        self.results
    }

    /// Steps that are launched and not collected.
    pub(crate) fn num_in_flight(&self) -> usize {
        self.plans.len()
    }
}

impl<B: Backend> Steps for HashedRunner<B> {
    type Work = StepWork;
    type Output = StepResult;

    fn most_in_flight(&self) -> usize {
        self.runner.most_in_flight()
    }

    fn launch(&mut self, work: StepWork) -> BackendResult<()> {
        self.plans.push_back(Digest::of_plan(&work.plan));
        self.runner.launch(work)
    }

    fn collect(&mut self) -> BackendResult<StepResult> {
        let result = self.runner.collect()?;
        let plan = self.plans.pop_front().expect("only what was launched is collected");
        self.results.digest.add_step(plan, &result);
        self.results.num_steps += 1;
        Ok(result)
    }
}

/// The steps of rank 0: each goes to the followers first, because they take part in it.
pub(crate) struct LeaderSteps<B: Backend> {
    pub(crate) steps: HashedRunner<B>,
    pub(crate) plans: PlanSender,
}

impl<B: Backend> Steps for LeaderSteps<B> {
    type Work = StepWork;
    type Output = StepResult;

    fn most_in_flight(&self) -> usize {
        self.steps.most_in_flight()
    }

    fn launch(&mut self, work: StepWork) -> BackendResult<()> {
        let message = PlanMessage::Step { work: &work, results: self.steps.results() };
        self.plans.send(&message).map_err(|error| spark_backend::Error::Device {
            op: "sending a plan to the other ranks",
            message: error.to_string(),
        })?;
        self.steps.launch(work)
    }

    fn collect(&mut self) -> BackendResult<StepResult> {
        self.steps.collect()
    }
}

impl<B: Backend> Drop for LeaderSteps<B> {
    fn drop(&mut self) {
        // Followers that are gone already need no word.
        let _ = self.plans.send(&PlanMessage::<StepWork>::End);
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc::channel, thread, time::Duration};

    use spark_comm::{BulkFollower, Hello, Listener, LossReason, PeerLost, join};

    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    /// A leader that uploads two media as number 7 to one follower, which does `work`; what the engine is told, and how the group ended.
    fn upload(work: impl FnOnce(BulkFollower) + Send + 'static) -> (Option<u64>, Option<PeerLost>) {
        let hello = Hello { token: "t".into(), version: "1".into(), model: [0; 32], settings: [0; 32] };
        let listener = Listener::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let (address, theirs) = (listener.local_addr(), hello.clone());
        let (over, end) = channel::<()>();
        let follower = thread::spawn(move || {
            let (plans, bulk, monitor) = join(address, 1, 2, &theirs, SOON).unwrap().split();
            work(bulk);
            // It stays until the other side has seen what it did.
            let _ = end.recv_timeout(SOON);
            drop((plans, monitor));
        });
        let LeaderGroup { plans, bulk, monitor } =
            LeaderGroup::new(listener.gather(2, &hello, SOON, &mut |_| {}).unwrap());
        let (uploads, queue) = channel();
        let media = [1, 2].map(|value| Pixels(vec![value; 3].into())).to_vec();
        uploads.send(Upload { id: 7, media }).unwrap();
        drop(uploads);
        let (commands, told) = channel();
        run_uploads(bulk, &queue, &commands, 0, &monitor);
        let lost = monitor.lost();
        drop((over, plans, monitor));
        follower.join().unwrap();
        let told = told.try_iter().map(|command| match command {
            Command::Uploaded { generation: 0, id } => id,
            _ => panic!("only uploads are told"),
        });
        (told.last(), lost)
    }

    #[test]
    fn each_medium_is_a_message_and_all_are_confirmed_together() {
        let outcome = upload(|mut bulk| {
            for expected in [1, 2] {
                let ToFollower::Upload { id: 7, pixels, is_last } = bulk.recv().unwrap() else { panic!() };
                assert_eq!((&pixels.0[..], is_last), (&[expected; 3][..], expected == 2));
            }
            bulk.send(&FromFollower::Uploaded(7)).unwrap();
        });
        assert_eq!(outcome, (Some(7), None));
    }

    #[test]
    fn a_rank_that_confirms_something_else_does_not_leave_sequences_waiting() {
        let outcome = upload(|mut bulk| bulk.send(&FromFollower::Uploaded(8)).unwrap());
        assert_eq!(outcome, (None, Some(PeerLost { rank: 0, reason: LossReason::Aborted })));
    }
}
