//! Facts in a sentence or a short form, and the JSON object of those that are asked for.

use fastrand::Rng;

use super::exercise;
use super::phrase::{CITIES, COLORS, ITEMS, JOBS, NAMES, enumerated, fill, pick, say};
use crate::{Sample, Scoring};

/// Every gap is a field of [`draw_field`].
const SENTENCES: [&str; 32] = [
    "{name} is {age} years old and lives in {city}.",
    "{name}, {age}, from {city}.",
    "My name is {name}. I am {age} and I live in {city}.",
    "{name} works as a {job} in {city}.",
    "My name is {name}, I am {age} years old and I work as a {job} in {city}.",
    "In {city} lives a {job}, {age} years old. The name is {name}.",
    "The {job} {name} moved to {city} on {date}.",
    "{name} was born on {date} in {city} and is {age} now.",
    "{name} bought the {item} for {price} dollars in {city}.",
    "{name} paid {price} dollars for the {item} on {date}.",
    "The {color} {item} costs {price} dollars.",
    "In {city} the {color} {item} costs {price} dollars.",
    "{name} sold the {color} {item} on {date} for {price} dollars.",
    "On {date} the {item} was sent to {name} in {city}.",
    "The price of the {item} is {price}, the color is {color}, the code is {code}.",
    "{name} has code {code} and room {room}.",
    "{name} from {city} is in room {room} until {date}.",
    "The meeting with {name} is on {day} at {time} in room {room}.",
    "The train to {city} leaves on {day} at {time}.",
    "On {date} at {time} {name} flies to {city}.",
    "{name} will be in {city} on {day} at {time}.",
    "Please send {quantity} pieces of the {item} to {name} in {city}.",
    "{name} ordered {quantity} pieces of the {color} {item} for {price} dollars.",
    "Order {code}: {quantity} x {item}, {price} dollars, for {name}.",
    "Name: {name}\nAge: {age}\nCity: {city}",
    "Name: {name}\nJob: {job}\nCity: {city}\nAge: {age}",
    "Item: {item}\nPrice: {price}\nQuantity: {quantity}",
    "Item: {item}\nColor: {color}\nPrice: {price}\nCode: {code}",
    "name={name}; city={city}; date={date}",
    "code={code}; item={item}; quantity={quantity}; date={date}",
    "Guest {name}, room {room}, code {code}, arrives on {day} at {time}.",
    "The {color} {item} with code {code} belongs to {name}, the {job}.",
];
const QUESTIONS: [&str; 8] = [
    "{text}\nExtract {keys} as JSON.",
    "{text} Extract {keys} as JSON.",
    "{text}\nGive {keys} as JSON.",
    "{text}\nReturn {keys} as a JSON object.",
    "{text}\nWrite {keys} as JSON.",
    "Extract {keys} as JSON: {text}",
    "Extract {keys} as JSON.\n{text}",
    "Give me {keys} as JSON.\n{text}",
];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];

/// One fact.
struct Field {
    key: &'static str,
    value: String,
    is_number: bool,
}

impl Field {
    fn json(&self) -> String {
        let quote = if self.is_number { "" } else { "\"" };
        format!("\"{}\": {quote}{}{quote}", self.key, self.value)
    }
}

fn draw_field(rng: &mut Rng, key: &'static str) -> Field {
    let (value, is_number) = match key {
        "name" => (pick(rng, &NAMES).to_owned(), false),
        "city" => (pick(rng, &CITIES).to_owned(), false),
        "item" => (pick(rng, &ITEMS).to_owned(), false),
        "job" => (pick(rng, &JOBS).to_owned(), false),
        "color" => (pick(rng, &COLORS).to_owned(), false),
        "day" => (pick(rng, &DAYS).to_owned(), false),
        "date" => (format!("{} {}", rng.u32(1..=28), pick(rng, &MONTHS)), false),
        "time" => (format!("{}:{:02}", rng.u32(6..24), 5 * rng.u32(0..12)), false),
        "age" => (rng.u32(2..100).to_string(), true),
        "price" => (rng.u32(1..1000).to_string(), true),
        "quantity" => (rng.u32(2..100).to_string(), true),
        "room" => (rng.u32(1..500).to_string(), true),
        _ => (rng.u32(1000..10_000).to_string(), true),
    };
    Field { key, value, is_number }
}

/// The gaps of a sentence, in its order.
fn gaps(sentence: &'static str) -> impl Iterator<Item = &'static str> {
    sentence.split('{').skip(1).filter_map(|rest| rest.split_once('}')).map(|(gap, _)| gap)
}

pub(super) fn json_extract(rng: &mut Rng) -> Sample {
    let sentence = pick(rng, &SENTENCES);
    let mut fields: Vec<Field> = gaps(sentence).map(|gap| draw_field(rng, gap)).collect();
    let values: Vec<(&str, &str)> = fields.iter().map(|field| (field.key, field.value.as_str())).collect();
    let text = fill(sentence, &values);
    let facts: Vec<String> = fields.iter().map(Field::json).collect();

    rng.shuffle(&mut fields);
    fields.truncate(rng.usize(2..=fields.len().min(4)));
    let keys: Vec<&str> = fields.iter().map(|field| field.key).collect();
    let question = say(rng, &QUESTIONS, &[("text", &text), ("keys", &enumerated(&keys))]);
    let pairs: Vec<String> = fields.iter().map(Field::json).collect();
    let answer = format!("{{{}}}", pairs.join(", "));
    // Without the keys asked for: a fact that was seen is not held out because another part of it is asked.
    Sample { scoring: Scoring::Json, ..exercise(facts.join(", "), &question, &answer) }
}
