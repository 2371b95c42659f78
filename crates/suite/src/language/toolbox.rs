//! The two tools of the demo model: their definitions, requests that need them, calls and results.

use fastrand::Rng;
use serde_json::{Value, json};

use super::phrase::{CITIES, chance, pick, say};

const CALCULATE: [&str; 6] = [
    "What is {expression}?",
    "Calculate {expression}.",
    "Compute {expression}.",
    "How much is {expression}?",
    "Use the calculator: {expression}",
    "Please calculate {expression}.",
];
const IN_WORDS: [(&str, &[&str]); 4] = [
    ("+", &["What is {a} plus {b}?", "Add {a} and {b}.", "What is the sum of {a} and {b}?"]),
    ("-", &["What is {a} minus {b}?", "Subtract {b} from {a}.", "Take {b} away from {a}."]),
    ("*", &["What is {a} times {b}?", "Multiply {a} by {b}.", "What is the product of {a} and {b}?"]),
    ("/", &["What is {a} divided by {b}?", "Divide {a} by {b}.", "Split {a} into {b} equal parts."]),
];
const WEATHER: [&str; 8] = [
    "What is the weather in {city}?",
    "How is the weather in {city}?",
    "What is the weather like in {city} now?",
    "Tell me the weather in {city}.",
    "Is it raining in {city}?",
    "How warm is it in {city}?",
    "Do I need a coat in {city} today?",
    "Weather in {city}?",
];
const WEATHER_IN_UNIT: [&str; 6] = [
    "What is the weather in {city} in {unit}?",
    "How warm is it in {city} in {unit}?",
    "Tell me the weather in {city} in {unit}.",
    "What is the temperature in {city}? Use {unit}.",
    "How cold is it in {city}? Answer in {unit}.",
    "Weather in {city} in {unit}?",
];
const SKIES: [&str; 8] = ["sunny", "cloudy", "rainy", "windy", "foggy", "snowy", "stormy", "clear"];

/// Something a tool can find out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Need {
    /// The calculator, for two numbers.
    Number { a: u32, operator: &'static str, b: u32 },
    /// The weather; without a unit the tool chooses.
    Weather { city: &'static str, unit: Option<&'static str> },
}

impl Need {
    pub(super) fn draw(rng: &mut Rng) -> Self {
        if chance(rng, 50) { Self::draw_number(rng) } else { Self::draw_weather(rng) }
    }

    fn draw_number(rng: &mut Rng) -> Self {
        let limit = pick(rng, &[100, 1000, 10_000]);
        let (a, b) = (rng.u32(2..limit), rng.u32(2..limit.min(1000)));
        match pick(rng, &["+", "-", "*", "/"]) {
            "-" => Self::Number { a: a.max(b), operator: "-", b: a.min(b) },
            "/" => {
                let (quotient, divisor) = (rng.u32(2..200), rng.u32(2..50));
                Self::Number { a: quotient * divisor, operator: "/", b: divisor }
            }
            operator => Self::Number { a, operator, b },
        }
    }

    fn draw_weather(rng: &mut Rng) -> Self {
        let unit = chance(rng, 50).then(|| pick(rng, &["celsius", "fahrenheit"]));
        Self::Weather { city: pick(rng, &CITIES), unit }
    }

    /// What is asked, without its wording.
    pub(super) fn content(&self) -> String {
        match self {
            Self::Number { .. } => self.expression(),
            Self::Weather { city, unit } => format!("weather {city} {}", unit.unwrap_or("any")),
        }
    }

    fn expression(&self) -> String {
        match self {
            Self::Number { a, operator, b } => format!("{a} {operator} {b}"),
            Self::Weather { .. } => String::new(),
        }
    }

    /// A question of its own.
    pub(super) fn question(&self, rng: &mut Rng) -> String {
        match self {
            Self::Number { a, operator, b } => {
                let in_words = IN_WORDS.iter().find(|(sign, _)| sign == operator).filter(|_| chance(rng, 40));
                match in_words {
                    Some((_, wordings)) => {
                        say(rng, wordings, &[("a", &a.to_string()), ("b", &b.to_string())])
                    }
                    None => say(rng, &CALCULATE, &[("expression", &self.expression())]),
                }
            }
            Self::Weather { city, unit: None } => say(rng, &WEATHER, &[("city", city)]),
            Self::Weather { city, unit: Some(unit) } => {
                say(rng, &WEATHER_IN_UNIT, &[("city", city), ("unit", unit)])
            }
        }
    }

    /// A part of a question about several things.
    pub(super) fn noun(&self) -> String {
        match self {
            Self::Number { .. } => self.expression(),
            Self::Weather { city, unit: None } => format!("the weather in {city}"),
            Self::Weather { city, unit: Some(unit) } => format!("the weather in {city} in {unit}"),
        }
    }

    pub(super) fn tool(&self) -> &'static str {
        match self {
            Self::Number { .. } => "calculator",
            Self::Weather { .. } => "weather",
        }
    }

    /// The call in OpenAI's form, with `arguments` as an object.
    pub(super) fn call(&self, index: usize) -> Value {
        let arguments = match self {
            Self::Number { .. } => json!({ "expression": self.expression() }),
            Self::Weather { city, unit: None } => json!({ "city": city }),
            Self::Weather { city, unit: Some(unit) } => json!({ "city": city, "unit": unit }),
        };
        let function = json!({ "name": self.tool(), "arguments": arguments });
        json!({ "id": format!("call_{index}"), "type": "function", "function": function })
    }

    /// What the tool returns, and the sentence that says it.
    pub(super) fn outcome(&self, rng: &mut Rng) -> (String, String) {
        match self {
            Self::Number { a, operator, b } => {
                let result = match *operator {
                    "+" => a + b,
                    "-" => a - b,
                    "*" => a * b,
                    _ => a / b,
                };
                let text =
                    if chance(rng, 50) { result.to_string() } else { format!("{{\"result\": {result}}}") };
                (text, format!("{} is {result}.", self.expression()))
            }
            Self::Weather { city, unit } => {
                let unit = unit.unwrap_or_else(|| pick(rng, &["celsius", "fahrenheit"]));
                let degrees = if unit == "celsius" { rng.i32(-15..40) } else { rng.i32(5..105) };
                let sky = pick(rng, &SKIES);
                (
                    format!("{{\"sky\": \"{sky}\", \"temperature\": {degrees}, \"unit\": \"{unit}\"}}"),
                    format!("It is {sky} in {city}, {degrees} degrees {unit}."),
                )
            }
        }
    }
}

/// The assistant's message that calls the tools for `needs`.
pub(super) fn calls(needs: &[Need]) -> Value {
    let calls: Vec<Value> = needs.iter().enumerate().map(|(index, need)| need.call(index)).collect();
    json!({ "role": "assistant", "content": "", "tool_calls": calls })
}

/// The tools of a conversation, in any order: both, or sometimes only those that `needs` needs.
pub(super) fn definitions(rng: &mut Rng, needs: &[Need]) -> Vec<Value> {
    let mut names = vec!["calculator", "weather"];
    if !needs.is_empty() && chance(rng, 15) {
        names.retain(|name| needs.iter().any(|need| need.tool() == *name));
    }
    rng.shuffle(&mut names);
    names.into_iter().map(definition).collect()
}

fn definition(name: &str) -> Value {
    let (description, properties, required) = match name {
        "calculator" => {
            ("Calculates an expression.", json!({ "expression": { "type": "string" } }), "expression")
        }
        _ => (
            "The weather in a city.",
            json!({ "city": { "type": "string" }, "unit": { "type": "string", "enum": ["celsius", "fahrenheit"] } }),
            "city",
        ),
    };
    let parameters = json!({ "type": "object", "properties": properties, "required": [required] });
    json!({
        "type": "function",
        "function": { "name": name, "description": description, "parameters": parameters }
    })
}
