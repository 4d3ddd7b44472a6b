//! Words for schemas that are shorter than their builders.

use std::ops::RangeInclusive;

use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{
    AdditionalProperties, ArrayBuilder, ObjectBuilder, OneOfBuilder, Schema, Type,
};

/// A field's schema.
pub(super) type Field = RefOr<Schema>;
/// A name and its schema.
pub(super) type Named = (&'static str, Field);

pub(super) fn integer(range: RangeInclusive<i64>, about: &str) -> Field {
    let (min, max) = (*range.start(), *range.end());
    typed(Type::Integer, about).minimum(Some(min)).maximum(Some(max)).into()
}

pub(super) fn number(range: RangeInclusive<f64>, about: &str) -> Field {
    let (min, max) = (*range.start(), *range.end());
    typed(Type::Number, about).minimum(Some(min)).maximum(Some(max)).into()
}

pub(super) fn boolean(about: &str) -> Field {
    typed(Type::Boolean, about).into()
}

pub(super) fn string(about: &str) -> Field {
    typed(Type::String, about).into()
}

/// An object with any fields.
pub(super) fn open_object(about: &str) -> Field {
    typed(Type::Object, about).into()
}

/// An object with these fields and no others.
pub(super) fn object(about: &str, fields: Vec<Named>) -> Field {
    closed(about, fields).into()
}

pub(super) fn closed(about: &str, fields: Vec<Named>) -> ObjectBuilder {
    let object = typed(Type::Object, about);
    let object = fields.into_iter().fold(object, |object, (name, field)| object.property(name, field));
    object.additional_properties(Some(AdditionalProperties::FreeForm(false)))
}

pub(super) fn list(items: Field, max_items: usize, about: &str) -> Field {
    ArrayBuilder::new().items(items).max_items(Some(max_items)).description(Some(about)).into()
}

pub(super) fn one_of<const N: usize>(about: &str, variants: [Field; N]) -> Field {
    let one_of = OneOfBuilder::new().description(Some(about));
    variants.into_iter().fold(one_of, OneOfBuilder::item).into()
}

fn typed(kind: Type, about: &str) -> ObjectBuilder {
    ObjectBuilder::new().schema_type(kind).description(Some(about))
}
