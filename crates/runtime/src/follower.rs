//! A rank that is not rank 0: runs the steps it is sent, with the same runner. It has no scheduler and no clients.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    thread,
};

use spark_api::MediaItem;
use spark_backend::Backend;
use spark_comm::{BulkFollower, Follower, LossReason, PlanReceiver};
use spark_models::Qwen3Vl;

use crate::{
    EngineOptions, Error, MemoryPlan, ModelRunner, Result,
    admission::Admission,
    group::HashedRunner,
    handle::lock,
    pipeline::Steps,
    runner::StepWork,
    wire::{Agreement, FromFollower, Pixels, PlanMessage, Results, ToFollower},
};

/// Pixels that arrived, by upload.
type Uploads = Arc<Mutex<HashMap<u64, Vec<Pixels>>>>;

/// Allocates what the group agrees on and runs steps until rank 0 says that it ends. Blocks for as long.
///
/// # Errors
/// Rank 0 is gone, the device has failed, or this rank's results differ from rank 0's.
pub fn follow<B: Backend>(
    backend: B,
    model: Qwen3Vl<B>,
    options: &EngineOptions,
    plan: &MemoryPlan,
    follower: Follower,
) -> Result<()> {
    let (plans, mut bulk, monitor) = follower.split();
    bulk.send(&FromFollower::Offer { num_blocks: plan.kv.num_blocks })?;
    let awaited = "that the weights of all ranks are loaded";
    let ToFollower::Agreement(agreement) = bulk.recv_awaited(awaited)? else {
        return Err(protocol("pixels", "the sizes of the state"));
    };
    let Agreement { num_blocks, max_model_len, vocab_size } = agreement;
    let mut agreed = *plan;
    agreed.kv.num_blocks = num_blocks;
    agreed.max_model_len = max_model_len;
    let mut runner = ModelRunner::new(backend, model, agreed.state(options, vocab_size))?;
    runner.prepare()?;
    bulk.send(&FromFollower::Ready)?;
    let uploads = Uploads::default();
    let kept = uploads.clone();
    thread::Builder::new()
        .name("spark-uploads".into())
        // It ends with the connection.
        .spawn(move || receive_uploads(bulk, &kept))
        .map_err(|source| Error::Io { what: "starting a thread", source })?;
    let result = run_plans(HashedRunner::new(runner), plans, &uploads);
    let Err(error) = result else { return Ok(()) };
    match monitor.lost() {
        // Rank 0 has ended in order, and this rank was still at its last step.
        Some(lost) if lost.reason == LossReason::Left => Ok(()),
        // Whatever failed did so because of that.
        Some(lost) => Err(spark_comm::Error::Lost(lost).into()),
        None => {
            // The others must not wait for a rank that does nothing any more, even while its process lives.
            monitor.abort();
            Err(error)
        }
    }
}

/// Keeps what comes and confirms what is whole, until the connection ends: the plan connection says why.
fn receive_uploads(mut bulk: BulkFollower, uploads: &Uploads) {
    while let Ok(ToFollower::Upload { id, pixels, is_last }) = bulk.recv() {
        lock(uploads).entry(id).or_default().push(pixels);
        if is_last && bulk.send(&FromFollower::Uploaded(id)).is_err() {
            return;
        }
    }
}

fn run_plans<B: Backend>(
    mut steps: HashedRunner<B>,
    mut plans: PlanReceiver,
    uploads: &Uploads,
) -> Result<()> {
    let most = steps.most_in_flight().max(1);
    loop {
        let PlanMessage::Step { mut work, results } = plans.recv::<PlanMessage<StepWork>>()? else {
            return Ok(());
        };
        // What rank 0 has collected before this step, this rank collects before it: both launch in the same order.
        while steps.results().num_steps < results.num_steps && steps.num_in_flight() > 0 {
            steps.collect()?;
        }
        check(results, steps.results())?;
        if steps.num_in_flight() >= most {
            return Err(protocol("more steps than fit in flight", "results of earlier steps first"));
        }
        for admission in &mut work.admissions {
            fill_pixels(admission, uploads)?;
        }
        let forget = std::mem::take(&mut work.forget);
        steps.launch(work)?;
        let mut uploads = lock(uploads);
        forget.iter().for_each(|id| drop(uploads.remove(id)));
    }
}

fn check(leader: Results, ours: Results) -> Result<()> {
    if leader == ours {
        return Ok(());
    }
    Err(Error::Diverged { num_steps: leader.num_steps })
}

/// Puts the pixels that were uploaded before into the media of a sequence.
fn fill_pixels(admission: &mut Admission, uploads: &Uploads) -> Result<()> {
    let Some(id) = admission.upload else { return Ok(()) };
    let uploads = lock(uploads);
    let media = uploads.get(&id).filter(|media| media.len() == admission.media.len());
    let Some(media) = media else {
        return Err(protocol("a sequence whose pixels are not here", "pixels before their sequence"));
    };
    let filled = admission
        .media
        .iter()
        .zip(media)
        .map(|(item, pixels)| MediaItem { patches: pixels.0.clone(), ..item.clone() });
    admission.media = filled.collect();
    Ok(())
}

fn protocol(got: &'static str, expected: &'static str) -> Error {
    Error::Protocol { from: "rank 0".into(), got, expected }
}
