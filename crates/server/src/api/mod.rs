//! OpenAI's endpoints: what each takes, checked field by field, and how it words its answers.

pub(crate) mod anthropic;
pub(crate) mod chat;
pub(crate) mod completions;
pub(crate) mod responses;

pub(crate) mod messages;
pub(crate) mod prompts;
pub(crate) mod structured;
pub(crate) mod tools;

pub(crate) mod params;
pub(crate) mod routing;
pub(crate) mod routing_analysis;

pub(crate) mod cancel;
pub(crate) mod models;
pub(crate) mod tokenize;

pub(crate) mod fields;
pub(crate) mod record;
