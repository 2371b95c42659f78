//! Written steps before the answer: the questions of `arithmetic` and `lists`, with `enable_thinking`.

use fastrand::Rng;
use serde_json::{Map, Value, json};

use super::arithmetic::{Operation, Problem};
use super::lists::{Counting, Sorting};
use super::phrase::{chance, pick};
use super::{exercise, greeting};
use crate::Sample;

/// Reasoning where there is nothing to work out.
const NO_STEPS: &str = "No steps are needed.";

pub(super) fn thinking(rng: &mut Rng) -> Sample {
    let (mut sample, steps) = match rng.u32(..100) {
        0..55 => arithmetic(rng),
        55..75 => sorting(rng),
        75..92 => counting(rng),
        _ => (greeting::greeting(rng), NO_STEPS.to_owned()),
    };
    sample.answer["reasoning_content"] = Value::String(steps);
    Sample { template_kwargs: Map::from_iter([("enable_thinking".to_owned(), json!(true))]), ..sample }
}

fn arithmetic(rng: &mut Rng) -> (Sample, String) {
    let operation = pick(rng, &[Operation::Add, Operation::Subtract, Operation::Multiply]);
    let digits = if operation == Operation::Multiply { 3 } else { 4 };
    let problem = Problem::draw(rng, operation, digits);
    let question = problem.question(rng);
    (exercise(problem.content(), &question, &problem.result().to_string()), written(problem))
}

/// As taught at school: column by column from the right, then the result.
fn written(problem: Problem) -> String {
    let Problem { operation, mut a, mut b } = problem;
    let mut lines = Vec::new();
    let mut carry = 0;
    while a > 0 || b > 0 && operation != Operation::Multiply {
        let (digit, other) = (a % 10, b % 10);
        let (line, written, next) = match operation {
            Operation::Add => {
                let sum = digit + other + carry;
                (format!("{digit} + {other} + {carry} = {sum}"), sum % 10, sum / 10)
            }
            Operation::Subtract if digit >= other + carry => {
                let left = digit - other - carry;
                (format!("{digit} - {other} - {carry} = {left}"), left, 0)
            }
            Operation::Subtract => {
                let left = digit + 10 - other - carry;
                (format!("{} - {other} - {carry} = {left}", digit + 10), left, 1)
            }
            Operation::Multiply => {
                let product = digit * problem.b + carry;
                (format!("{digit} * {} + {carry} = {product}", problem.b), product % 10, product / 10)
            }
        };
        lines.push(format!("{line}: {written}, carry {next}"));
        carry = next;
        a /= 10;
        if operation != Operation::Multiply {
            b /= 10;
        }
    }
    lines.push(format!("Result: {}", problem.result()));
    lines.join("\n")
}

/// The next entry of the answer, again and again, from what is left.
fn sorting(rng: &mut Rng) -> (Sample, String) {
    let words = chance(rng, 30);
    let sorting = Sorting::draw(rng, words);
    let mut left = sorting.entries.clone();
    let mut lines = Vec::new();
    for entry in &sorting.sorted {
        lines.push(format!("{entry} from {}", left.join(", ")));
        left.retain(|other| other != entry);
    }
    (exercise(sorting.content, &sorting.question, &sorting.sorted.join(", ")), lines.join("\n"))
}

/// Every letter with the count so far.
fn counting(rng: &mut Rng) -> (Sample, String) {
    let counting = Counting::draw(rng);
    let question = counting.question(rng, false);
    let mut count = 0;
    let steps: Vec<String> = counting
        .word
        .chars()
        .map(|letter| {
            count += usize::from(letter == counting.letter);
            format!("{letter} {count}")
        })
        .collect();
    (exercise(counting.content(), &question, &counting.count.to_string()), steps.join(", "))
}
