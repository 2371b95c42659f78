//! Short words for the schemas of the document. They say nothing about any field.

use serde_json::Value;
use utoipa::openapi::schema::{AnyOfBuilder, ArrayBuilder, ObjectBuilder, SchemaType, Type};
use utoipa::openapi::{Ref, RefOr, Schema};

pub(super) type Node = RefOr<Schema>;

fn simple(builder: ObjectBuilder) -> Node {
    RefOr::T(Schema::Object(builder.build()))
}

fn typed(kind: Type) -> ObjectBuilder {
    ObjectBuilder::new().schema_type(SchemaType::Type(kind))
}

/// Any value.
pub(super) fn any() -> Node {
    simple(ObjectBuilder::new().schema_type(SchemaType::AnyValue))
}

/// A string.
pub(super) fn text() -> Node {
    simple(typed(Type::String))
}

/// One of these strings.
pub(super) fn word(words: &[&str]) -> Node {
    simple(typed(Type::String).enum_values(Some(words.iter().map(|word| Value::from(*word)))))
}

/// A boolean.
pub(super) fn boolean() -> Node {
    simple(typed(Type::Boolean))
}

/// A number in a closed range.
pub(super) fn number(low: f64, high: f64) -> Node {
    simple(typed(Type::Number).minimum(Some(low)).maximum(Some(high)))
}

/// Any number.
pub(super) fn any_number() -> Node {
    simple(typed(Type::Number))
}

/// An integer that is not less than `low`.
pub(super) fn integer(low: i64) -> Node {
    simple(typed(Type::Integer).minimum(Some(low as isize)))
}

/// An integer in a closed range.
pub(super) fn integer_in(low: i64, high: i64) -> Node {
    simple(typed(Type::Integer).minimum(Some(low as isize)).maximum(Some(high as isize)))
}

/// A count.
pub(super) fn count() -> Node {
    integer(0)
}

/// A list.
pub(super) fn list(item: Node) -> Node {
    RefOr::T(Schema::Array(ArrayBuilder::new().items(item).build()))
}

/// An object with other keys of this kind.
pub(super) fn map(value: Node) -> Node {
    simple(typed(Type::Object).additional_properties(Some(value)))
}

/// An object with keys that are always there and keys that may be; there may be others.
pub(super) fn object(always: Vec<(&'static str, Node)>, maybe: Vec<(&'static str, Node)>) -> Node {
    let mut builder = typed(Type::Object);
    for (name, node) in always {
        builder = builder.property(name, node).required(name);
    }
    for (name, node) in maybe {
        builder = builder.property(name, node);
    }
    simple(builder)
}

/// One of several kinds.
pub(super) fn either(nodes: Vec<Node>) -> Node {
    let builder = nodes.into_iter().fold(AnyOfBuilder::new(), AnyOfBuilder::item);
    RefOr::T(Schema::AnyOf(builder.build()))
}

/// This kind or null.
pub(super) fn or_null(node: Node) -> Node {
    either(vec![node, simple(typed(Type::Null))])
}

/// Null.
pub(super) fn null() -> Node {
    simple(typed(Type::Null))
}

/// A component.
pub(super) fn named(name: &str) -> Node {
    RefOr::Ref(Ref::from_schema_name(name))
}
