//! Routing as clients see it: how a record is written and read ([`wire`]), and what texts say about a model's routers
//! ([`analysis`]).

pub(crate) mod analysis;
pub(crate) mod wire;
