//! The list of tasks, and how a sample gets its seed and its side of the split.

use fastrand::Rng;

use crate::{Sample, language, reading, scene};

/// Which contents a sample may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// Seven contents of eight.
    Train,
    /// The eighth: no training sample has one of these.
    HeldOut,
}

/// A kind of exercise.
#[derive(Debug)]
pub struct Task {
    /// For tables and `--tasks`: letters and underscores.
    pub name: &'static str,
    /// One sentence.
    pub about: &'static str,
    /// Share in training, relative to the others.
    pub weight: f64,
    pub(crate) generate: fn(&mut Rng) -> Sample,
}

/// All tasks, in the order of tables: pictures first.
pub fn tasks() -> impl Iterator<Item = &'static Task> {
    scene::TASKS.iter().chain(reading::TASKS).chain(language::TASKS)
}

/// The task of this name.
pub fn task(name: &str) -> Option<&'static Task> {
    tasks().find(|task| task.name == name)
}

impl Task {
    /// Sample number `index` of a split. Draws until the content is on the right side.
    pub fn sample(&self, split: Split, index: u64) -> Sample {
        let side = match split {
            Split::Train => "train",
            Split::HeldOut => "held-out",
        };
        let mut rng = Rng::with_seed(hash(&[self.name, side, &index.to_string()]));
        loop {
            let sample = (self.generate)(&mut rng);
            if self.split_of(&sample) == split {
                return sample;
            }
        }
    }

    fn split_of(&self, sample: &Sample) -> Split {
        let held_out = hash(&["content", self.name, &sample.content]).is_multiple_of(8);
        if held_out { Split::HeldOut } else { Split::Train }
    }
}

fn hash(parts: &[&str]) -> u64 {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(part.as_bytes()).update(&[0]);
    }
    let mut first = [0; 8];
    first.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    u64::from_le_bytes(first)
}
