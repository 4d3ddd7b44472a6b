//! Words for schemas that are shorter than their builders.

use std::ops::RangeInclusive;

use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{
    AdditionalProperties, ArrayBuilder, ObjectBuilder, OneOfBuilder, Schema, SchemaFormat, Type,
};

use crate::config::limits::*;

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

/// A boolean that may only be false.
pub(super) fn never(about: &str) -> Field {
    typed(Type::Boolean, about).enum_values(Some([false])).into()
}

pub(super) fn string(about: &str) -> Field {
    typed(Type::String, about).into()
}

/// A text whose bytes are limited. Schemas count characters, of which there are as many at most.
pub(super) fn text(num_bytes: RangeInclusive<usize>, about: &str) -> Field {
    let (min, max) = (Some(*num_bytes.start()).filter(|&min| min > 0), *num_bytes.end());
    typed(Type::String, about).min_length(min).max_length(Some(max)).into()
}

/// A text that says who or which.
pub(super) fn label(about: &str) -> Field {
    text(0..=MAX_LABEL_BYTES, about)
}

/// A name of a function or a schema.
pub(super) fn name(about: &str) -> Field {
    typed(Type::String, about).pattern(Some("^[A-Za-z0-9_-]+$")).max_length(Some(MAX_NAME_BYTES)).into()
}

/// A regular expression.
pub(super) fn expression(about: &str) -> Field {
    let format = SchemaFormat::Custom("regex".to_owned());
    typed(Type::String, about).max_length(Some(MAX_GRAMMAR_BYTES)).format(Some(format)).into()
}

/// One of these words.
pub(super) fn word(words: &[&str], about: &str) -> Field {
    typed(Type::String, about).enum_values(Some(words.iter().copied())).into()
}

/// An object with any fields.
pub(super) fn open_object(about: &str) -> Field {
    typed(Type::Object, about).into()
}

/// An object with at most so many fields of one kind; `names` is a pattern of theirs.
pub(super) fn map(names: Option<&str>, values: Field, max_len: usize, about: &str) -> Field {
    let names = names.map(|names| ObjectBuilder::new().pattern(Some(names)).build());
    let values = AdditionalProperties::RefOr(values);
    let map = typed(Type::Object, about).property_names(names).additional_properties(Some(values));
    map.max_properties(Some(max_len)).into()
}

/// An object with these fields and no others, of which some must be there.
pub(super) fn demanding(required: &[&str], about: &str, fields: Vec<Named>) -> Field {
    required.iter().fold(closed(about, fields), |object, name| object.required(*name)).into()
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

/// A list that is not empty.
pub(super) fn some(items: Field, max_items: usize, about: &str) -> Field {
    let list = ArrayBuilder::new().items(items).min_items(Some(1)).max_items(Some(max_items));
    list.description(Some(about)).into()
}

/// A list that has nothing twice.
pub(super) fn set(items: Field, max_items: usize, about: &str) -> Field {
    let list = ArrayBuilder::new().items(items).unique_items(true).max_items(Some(max_items));
    list.description(Some(about)).into()
}

pub(super) fn one_of<const N: usize>(about: &str, variants: [Field; N]) -> Field {
    let one_of = OneOfBuilder::new().description(Some(about));
    variants.into_iter().fold(one_of, OneOfBuilder::item).into()
}

fn typed(kind: Type, about: &str) -> ObjectBuilder {
    ObjectBuilder::new().schema_type(kind).description(Some(about))
}
