//! Sums, differences and products in the model's head. Written steps are in `thinking`.

use fastrand::Rng;

use super::exercise;
use super::phrase::{chance, say};
use crate::Sample;

const ADD: [&str; 8] = [
    "What is {a} + {b}?",
    "{a} + {b}",
    "{a} + {b} =",
    "{a} plus {b}",
    "What is {a} plus {b}?",
    "Add {a} and {b}.",
    "What is the sum of {a} and {b}?",
    "Calculate {a} + {b}.",
];
const SUBTRACT: [&str; 8] = [
    "What is {a} - {b}?",
    "{a} - {b}",
    "{a} - {b} =",
    "{a} minus {b}",
    "What is {a} minus {b}?",
    "Subtract {b} from {a}.",
    "Take {b} away from {a}.",
    "Calculate {a} - {b}.",
];
const MULTIPLY: [&str; 8] = [
    "What is {a} * {b}?",
    "{a} * {b}",
    "{a} x {b} =",
    "{a} times {b}",
    "What is {a} times {b}?",
    "Multiply {a} by {b}.",
    "What is the product of {a} and {b}?",
    "Calculate {a} * {b}.",
];

/// What is done with two numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    Add,
    Subtract,
    Multiply,
}

/// Two numbers and what is done with them. A difference is never negative; `b` of a product has one digit unless the
/// question turns it round.
#[derive(Debug, Clone, Copy)]
pub(super) struct Problem {
    pub(super) operation: Operation,
    pub(super) a: u32,
    pub(super) b: u32,
}

impl Problem {
    /// A problem with numbers of up to `digits` digits.
    pub(super) fn draw(rng: &mut Rng, operation: Operation, digits: u32) -> Self {
        let digits = match rng.u32(..100) {
            0..10 => 1,
            10..25 => digits - 1,
            _ => digits,
        };
        let (a, b) = match operation {
            Operation::Add => (number(rng, digits), number(rng, digits)),
            Operation::Subtract => {
                let (a, b) = (number(rng, digits), number(rng, digits));
                (a.max(b), a.min(b))
            }
            Operation::Multiply if chance(rng, 10) => (number(rng, digits), rng.u32(..2)),
            Operation::Multiply => (number(rng, digits), rng.u32(2..10)),
        };
        Self { operation, a, b }
    }

    pub(super) fn result(self) -> u32 {
        match self.operation {
            Operation::Add => self.a + self.b,
            Operation::Subtract => self.a - self.b,
            Operation::Multiply => self.a * self.b,
        }
    }

    /// The same for both orders of a sum and of a product.
    pub(super) fn content(self) -> String {
        let (low, high) = (self.a.min(self.b), self.a.max(self.b));
        match self.operation {
            Operation::Add => format!("{low} + {high}"),
            Operation::Subtract => format!("{} - {}", self.a, self.b),
            Operation::Multiply => format!("{low} * {high}"),
        }
    }

    pub(super) fn question(self, rng: &mut Rng) -> String {
        let (wordings, turned) = match self.operation {
            Operation::Add => (&ADD, false),
            Operation::Subtract => (&SUBTRACT, false),
            Operation::Multiply => (&MULTIPLY, chance(rng, 30)),
        };
        let (a, b) = if turned { (self.b, self.a) } else { (self.a, self.b) };
        say(rng, wordings, &[("a", &a.to_string()), ("b", &b.to_string())])
    }
}

/// More often a long number than a short one: there are more of them.
fn number(rng: &mut Rng, digits: u32) -> u32 {
    let shorter = (0..digits - 1).take_while(|_| chance(rng, 35)).count();
    let limit = (0..shorter).fold(10_u32.pow(digits), |limit, _| limit / 10);
    let least = if limit == 10 { 0 } else { limit / 10 };
    rng.u32(least..limit)
}

pub(super) fn add(rng: &mut Rng) -> Sample {
    sample(rng, Operation::Add)
}

pub(super) fn subtract(rng: &mut Rng) -> Sample {
    sample(rng, Operation::Subtract)
}

pub(super) fn multiply(rng: &mut Rng) -> Sample {
    sample(rng, Operation::Multiply)
}

fn sample(rng: &mut Rng, operation: Operation) -> Sample {
    let problem = Problem::draw(rng, operation, 3);
    let question = problem.question(rng);
    exercise(problem.content(), &question, &problem.result().to_string())
}
