//! Tasks about scenes of coloured shapes: one module for each way of asking. No text in the picture.

mod change;
mod colour;
mod count;
mod describe;
mod object;
mod relation;
mod shape;
mod single;
mod stage;
#[cfg(test)]
mod tests;

use crate::Task;

pub(crate) const TASKS: &[Task] = &[
    Task {
        name: "shape_what",
        about: "Names a shape or an object: the only one, or the one of a colour or at a place.",
        weight: 1.0,
        generate: single::what,
    },
    Task {
        name: "shape_count",
        about: "Counts zero to five objects: all, or those of a shape, a colour or both.",
        weight: 1.0,
        generate: count::count,
    },
    Task {
        name: "shape_colour",
        about: "Names the colour of an object: the only one, or the one of a shape or at a place.",
        weight: 1.0,
        generate: single::colour,
    },
    Task {
        name: "shape_where",
        about: "Says at which of nine places an object is.",
        weight: 1.0,
        generate: single::place,
    },
    Task {
        name: "shape_relation",
        about: "Says whether an object is left of, right of, above or below another, or which object is.",
        weight: 1.0,
        generate: relation::relation,
    },
    Task {
        name: "scene_describe",
        about: "Lists one to four objects with colour, shape and place, row by row.",
        weight: 1.0,
        generate: describe::describe,
    },
    Task {
        name: "two_pictures",
        about: "Says what changed from the first picture to the second.",
        weight: 1.0,
        generate: change::change,
    },
];
