//! Tasks about text and diagrams in a picture.

mod chart;
mod clock;
mod colors;
mod font;
mod page;
mod price;
mod table;
#[cfg(test)]
mod tests;
mod text;

use crate::Task;

pub(crate) const TASKS: &[Task] = &[
    Task {
        name: "read_text",
        about: "Reads a word, a number or a serial of one to eight characters.",
        weight: 1.0,
        generate: text::generate,
    },
    Task {
        name: "price_tag",
        about: "Reads the price of an item from a tag.",
        weight: 1.0,
        generate: price::generate,
    },
    Task {
        name: "clock",
        about: "Tells the time from a clock with two hands.",
        weight: 1.0,
        generate: clock::generate,
    },
    Task {
        name: "bar_chart",
        about: "Names the largest or the smallest bar of a chart, or reads a bar's value.",
        weight: 1.0,
        generate: chart::generate,
    },
    Task {
        name: "table_cell",
        about: "Reads the cell of a table that a row and a column name.",
        weight: 1.0,
        generate: table::generate,
    },
];

/// Things that are sold, counted and listed.
const ITEMS: &[&str] = &[
    "Tea", "Milk", "Bread", "Soap", "Pen", "Lamp", "Cake", "Rice", "Salt", "Jam", "Egg", "Hat", "Cup",
    "Ball", "Book", "Fish", "Soup", "Corn", "Plum", "Pear", "Nuts", "Wine", "Juice", "Honey", "Apple",
    "Lemon", "Bag", "Rope", "Map", "Kite", "Brush", "Chair", "Clock", "Shirt", "Sock", "Belt", "Bean",
    "Beef", "Candle", "Cheese",
];

/// People.
const NAMES: &[&str] = &[
    "Kim", "Ben", "Ann", "Max", "Eva", "Tom", "Zoe", "Leo", "Mia", "Sam", "Amy", "Dan", "Joe", "Ruth",
    "Nora", "Hugo", "Emma", "Paul", "Rosa", "Jack", "Lucy", "Omar", "Vera", "Carl", "Dora", "Finn", "Gina",
    "Hans", "Kate", "Noah",
];

/// The word with a capital first letter.
fn capitalised(word: &str) -> String {
    let mut letters = word.chars();
    letters.next().map(|first| first.to_uppercase().chain(letters).collect()).unwrap_or_default()
}

/// A name in the middle of a sentence: things lose their capital, people keep it.
fn in_sentence(name: &str) -> String {
    if NAMES.contains(&name) { name.to_owned() } else { format!("the {}", name.to_lowercase()) }
}
