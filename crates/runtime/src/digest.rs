//! A running hash of what ranks did. Finds ranks that went apart; keeps nobody from forging it.

use std::hash::{Hash, Hasher};

use serde::{Deserialize, Serialize};
use spark_scheduler::StepPlan;

use crate::runner::StepResult;

/// 64-bit FNV-1a over everything that was added. (Fowler, Noll, Vo: start value and prime are theirs.)
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Digest(u64);

impl Default for Digest {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Hasher for Digest {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}

impl Digest {
    /// Of a plan alone.
    pub(crate) fn of_plan(plan: &StepPlan) -> Self {
        let mut digest = Self::default();
        plan.hash(&mut digest);
        digest
    }

    /// Adds a step: its plan, and the tokens that it sampled.
    pub(crate) fn add_step(&mut self, plan: Self, result: &StepResult) {
        self.write_u64(plan.0);
        for (_, sampled) in &result.sampled {
            (sampled.slot, sampled.token).hash(self);
        }
    }
}
