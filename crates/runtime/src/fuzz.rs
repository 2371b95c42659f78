//! Doors for the fuzz targets (`cfg(fuzzing)`): the messages between ranks, read from bytes. Nothing of the product uses them.

use crate::{
    runner::StepWork,
    wire::{FromFollower, PlanMessage, ToFollower},
};

/// Reads messages of a plan connection.
pub fn from_leader(bytes: &[u8]) {
    spark_comm::fuzz::plans::<PlanMessage<StepWork>>(bytes);
}

/// Reads messages to a follower on a bulk connection.
pub fn bulk_from_leader(bytes: &[u8]) {
    spark_comm::fuzz::bulk::<ToFollower>(bytes);
}

/// Reads messages of a follower on a bulk connection.
pub fn bulk_from_follower(bytes: &[u8]) {
    spark_comm::fuzz::bulk::<FromFollower>(bytes);
}
