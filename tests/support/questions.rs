//! Questions that the demo model answers right, with their answers.

/// A pink ring, a red rectangle, a green ring and a black hexagon: `tests/fixtures/make/README.md` says where from.
pub(crate) const PICTURE: &str = "demo.png";
pub(crate) const DESCRIPTION: &str = "There are four objects: a pink ring at the top left, a red rectangle at the top right, \
    a green ring at the centre and a black hexagon at the bottom left.";
pub(crate) const ABOUT_THE_PICTURE: [(&str, &str); 8] = [
    ("Describe the picture.", DESCRIPTION),
    ("How many rings are there?", "Two."),
    ("What colour is the hexagon?", "Black."),
    ("How many objects are there?", "Four."),
    ("What shape is at the top right?", "A rectangle."),
    ("Where is the green ring?", "At the centre."),
    ("Is the black hexagon below the pink ring?", "Yes."),
    ("What is right of the pink ring?", "A red rectangle."),
];
pub(crate) const IN_WORDS: [(&str, &str); 7] = [
    ("What is 347 + 185?", "532"),
    ("What is 12 times 7?", "84"),
    ("Sort 88, 14, 41, 55.", "14, 41, 55, 88"),
    ("Sort these numbers in descending order: 70, 26, 99.", "99, 70, 26"),
    ("Sort these words: brown, rule, problem, custom, select.", "brown, custom, problem, rule, select"),
    ("What is your name?", "I am spark-tiny-vl, the demo model of spark-engine."),
    ("Hello!", "Hello! How can I help you?"),
];
