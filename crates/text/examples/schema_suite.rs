//! `cargo run -p spark-text --example schema_suite -- [--every N] FOLDER...`: collections of JSON schemas against our grammars.
//!
//! FOLDER is one draft of the JSON-Schema-Test-Suite (`tests/draft2020-12`), or holds one schema a file (JSONSchemaBench), of
//! which every N-th is taken. Every schema is compiled. What is refused is counted by its reason. Of what is accepted, a
//! suite's invalid instances must not get through (each that does is shown), its valid ones should, and random texts under
//! the grammar must be valid. `SPARK_TOKENIZER` is the folder of another vocabulary than the demo model's. Ends with status 1
//! if an invalid text got through.
#![expect(clippy::print_stdout, reason = "a report is printed")]
#![allow(clippy::unwrap_used, reason = "a report that cannot be made has failed")]

#[allow(dead_code, reason = "the tests need more of it")]
#[path = "../tests/text/grammar/walk.rs"]
mod walk;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde_json::{Value, json};
use spark_text::CompiledGrammar;
use walk::{accepts, compile, is_exact, schema, try_generate};

/// Random texts of each schema.
const ROUNDS: usize = 20;

#[derive(Default)]
struct Report {
    num_schemas: usize,
    num_accepted: usize,
    refused: BTreeMap<String, usize>,
    num_valid: usize,
    num_valid_let_through: usize,
    num_invalid: usize,
    num_texts: usize,
    num_open: usize,
    /// Texts with numbers that a validator cannot hold.
    num_inexact: usize,
    /// Schemas that were accepted and turned out to be too much for a token.
    num_failed: usize,
    violations: Vec<String>,
    missed: Vec<String>,
}

fn main() -> ExitCode {
    let mut is_sound = true;
    let mut arguments = std::env::args().skip(1).peekable();
    let every = match arguments.next_if(|argument| argument == "--every") {
        Some(_) => arguments.next().and_then(|number| number.parse().ok()).expect("--every takes a number"),
        None => 1,
    };
    for folder in arguments.map(PathBuf::from) {
        let mut report = Report::default();
        let mut files: Vec<PathBuf> =
            fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        let is_json = |file: &&PathBuf| file.extension().is_some_and(|end| end == "json");
        for file in files.iter().filter(is_json).step_by(every) {
            report.file(file);
        }
        report.print(&folder);
        is_sound &= report.violations.is_empty();
    }
    if is_sound { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

impl Report {
    fn file(&mut self, file: &Path) {
        let name = file.file_stem().unwrap().to_string_lossy().into_owned();
        let value: Value = serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap();
        match value.as_array() {
            Some(groups) => groups.iter().for_each(|group| self.group(&name, group)),
            None => self.group(&name, &json!({"schema": value, "tests": []})),
        }
    }

    fn group(&mut self, file: &str, group: &Value) {
        self.num_schemas += 1;
        let source = &group["schema"];
        let grammar = match compile(&schema(source.clone())) {
            Ok(grammar) => grammar,
            Err(error) => {
                *self.refused.entry(reason(&error.to_string())).or_default() += 1;
                return;
            }
        };
        self.num_accepted += 1;
        self.instances(file, &grammar, group);
        self.texts(file, &grammar, source);
    }

    fn instances(&mut self, file: &str, grammar: &CompiledGrammar, group: &Value) {
        let source = &group["schema"];
        for test in group["tests"].as_array().unwrap() {
            let text = test["data"].to_string();
            let passes = accepts(grammar, &text);
            if test["valid"] == true {
                self.num_valid += 1;
                self.num_valid_let_through += usize::from(passes);
                if !passes {
                    self.missed.push(format!("{file}: {source}: {text}"));
                }
            } else {
                self.num_invalid += 1;
                if passes {
                    self.violations.push(format!("{file}: {text}: {source}"));
                }
            }
        }
    }

    /// Random texts.
    fn texts(&mut self, file: &str, grammar: &CompiledGrammar, source: &Value) {
        let Ok(validator) = jsonschema::validator_for(source) else { return };
        let mut random = fastrand::Rng::with_seed(1);
        for round in 0..ROUNDS {
            let text = match try_generate(grammar, &mut random, round * 2, "") {
                Ok(Some(text)) => text,
                Ok(None) => {
                    self.num_open += 1;
                    continue;
                }
                Err(_) => {
                    self.num_failed += 1;
                    return;
                }
            };
            match serde_json::from_str(&text) {
                Ok(value) if !is_exact(&value) => self.num_inexact += 1,
                Ok(value) if !validator.is_valid(&value) => {
                    self.violations.push(format!("{file}: {text}: {source}"));
                }
                Ok(_) => self.num_texts += 1,
                // JSON, but more than the validator's numbers hold.
                Err(error) if error.to_string().contains("number out of range") => self.num_inexact += 1,
                Err(error) => self.violations.push(format!("{file}: {error}: {text}")),
            }
        }
    }

    fn print(&self, folder: &Path) {
        println!("{}", folder.display());
        println!("  schemas {}, accepted {}", self.num_schemas, self.num_accepted);
        println!("  valid instances let through: {} of {}", self.num_valid_let_through, self.num_valid);
        println!(
            "  invalid instances refused: {}; random texts valid: {}, without an end: {}, with numbers over 53 bits: {}; \
             schemas too much for a token: {}",
            self.num_invalid, self.num_texts, self.num_open, self.num_inexact, self.num_failed
        );
        let mut refused: Vec<_> = self.refused.iter().collect();
        refused.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
        for (reason, count) in refused {
            println!("  refused {count:4}: {reason}");
        }
        for missed in &self.missed {
            println!("  missed {}", missed.chars().take(300).collect::<String>());
        }
        for violation in &self.violations {
            println!("  INVALID {}", violation.chars().take(1_000).collect::<String>());
        }
    }
}

/// A message without the place, and without what is particular in it.
fn reason(message: &str) -> String {
    let rule = message.split_once(": ").map_or(message, |(_, rule)| rule);
    let rule = rule.lines().next().unwrap_or_default();
    match rule.split_once('\'') {
        Some((before, _)) => format!("{before}..."),
        None => rule.chars().take(100).collect(),
    }
}
