//! A [`RoutingRecord`] in JSON, in one of two encodings that hold the same bits:
//!
//! ```text
//! json    {"start": 7, "layers": [0, 1], "experts": [[[2, 5], [0, 3]]], "weights": [[[0.7, 0.3], [0.9, 0.1]]]}
//! base64  {"start": 7, "layers": [0, 1], "shape": [1, 2, 2], "encoding": "base64", "experts": "...", "weights": "..."}
//! ```
//!
//! `experts` and `weights` are `[tokens, layers, experts per token]`, heaviest first; `start` is the position of the
//! first token. In base64 they are little-endian u16 and f32, and 65535 with weight 0 fills the entries of a token that
//! has fewer experts than the shape. A record that was written here is read here, so that it can be replayed.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use model::{RouteShape, RoutingRecord};
use serde::Serialize;
use serde_json::Value;

use crate::api::fields::{Fields, index_below, list_at, missing, number_at, wrong_type, wrong_value};
use crate::api::params::required;
use crate::error::ApiError;

/// Stands for no expert in base64.
const NO_EXPERT: u16 = u16::MAX;
/// Most tokens of a record that is read; longer than any context.
const MAX_TOKENS: usize = 1 << 24;

/// How records are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Encoding {
    Json,
    Base64,
}

/// A record as it is written.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(crate) enum RoutingBody {
    Json {
        start: u32,
        layers: Vec<u32>,
        experts: Vec<Vec<Vec<u32>>>,
        weights: Vec<Vec<Vec<f32>>>,
    },
    Base64 {
        start: u32,
        layers: Vec<u32>,
        shape: [usize; 3],
        encoding: &'static str,
        experts: String,
        weights: String,
    },
}

impl RoutingBody {
    pub(crate) fn new(record: RoutingRecord, encoding: Encoding) -> Self {
        let (num_tokens, num_layers) = (record.num_tokens(), record.layers.len());
        match encoding {
            Encoding::Json => Self::Json {
                start: record.start,
                experts: nested(num_tokens, num_layers, |token, index| {
                    record.choice(token, index).0.to_vec()
                }),
                weights: nested(num_tokens, num_layers, |token, index| {
                    record.choice(token, index).1.to_vec()
                }),
                layers: record.layers,
            },
            Encoding::Base64 => {
                let id = |&id: &u32| u16::try_from(id).unwrap_or(NO_EXPERT).to_le_bytes();
                let ids: Vec<u8> = record.ids.iter().flat_map(id).collect();
                let weights: Vec<u8> =
                    record.weights.iter().flat_map(|weight| weight.to_le_bytes()).collect();
                Self::Base64 {
                    start: record.start,
                    layers: record.layers,
                    shape: [num_tokens, num_layers, record.width],
                    encoding: "base64",
                    experts: BASE64_STANDARD.encode(ids),
                    weights: BASE64_STANDARD.encode(weights),
                }
            }
        }
    }
}

fn nested<T>(num_tokens: usize, num_layers: usize, entry: impl Fn(usize, usize) -> T) -> Vec<Vec<T>> {
    (0..num_tokens).map(|token| (0..num_layers).map(|index| entry(token, index)).collect()).collect()
}

/// Reads a record that is to be replayed in a model of `num_layers` layers of this shape.
pub(crate) fn read(
    mut fields: Fields,
    num_layers: usize,
    shape: RouteShape,
) -> Result<RoutingRecord, ApiError> {
    let start = fields.integer("start", 0..=i64::from(u32::MAX / 2))?.unwrap_or(0) as u32;
    let layers = take_layers(&mut fields, "layers", num_layers)?;
    let layers = layers.unwrap_or_else(|| (0..num_layers as u32).collect());
    let encoding_path = fields.path("encoding");
    let mut record = match fields.string("encoding", 16)?.as_deref() {
        None | Some("json") => read_json(&mut fields, RoutingRecord::new(start, layers, 0), shape)?,
        Some("base64") => read_base64(&mut fields, RoutingRecord::new(start, layers, 0), shape)?,
        Some(_) => return Err(wrong_value(&encoding_path, "expected 'json' or 'base64'")),
    };
    let path = fields.path("experts");
    fields.finish()?;
    record.width = record.width.max(1);
    for token in 0..record.num_tokens() {
        for index in 0..record.layers.len() {
            check_choice(record.choice(token, index), &path, token, index)?;
        }
    }
    Ok(record)
}

/// A list of layers, ascending, each once.
pub(crate) fn take_layers(
    fields: &mut Fields,
    name: &str,
    num_layers: usize,
) -> Result<Option<Vec<u32>>, ApiError> {
    let path = fields.path(name);
    let Some(values) = fields.list(name, num_layers)? else { return Ok(None) };
    let layers: Option<Vec<u32>> = values.iter().map(|value| index_below(value, num_layers)).collect();
    match layers.filter(|layers| !layers.is_empty() && layers.is_sorted_by(|a, b| a < b)) {
        Some(layers) => Ok(Some(layers)),
        None => Err(wrong_value(
            &path,
            &format!("expected layers from 0 to {}, in ascending order, each once", num_layers - 1),
        )),
    }
}

fn check_choice(
    (ids, weights): (&[u32], &[f32]),
    path: &str,
    token: usize,
    index: usize,
) -> Result<(), ApiError> {
    let at = format!("{path}[{token}][{index}]");
    if ids.is_empty() {
        return Err(wrong_value(&at, "every token needs at least one expert"));
    }
    if (1..ids.len()).any(|rank| ids[..rank].contains(&ids[rank])) {
        return Err(wrong_value(&at, "no expert may be named twice for a token"));
    }
    if !weights.iter().all(|weight| weight.is_finite()) {
        return Err(wrong_value(&at, "gate weights must be finite numbers"));
    }
    Ok(())
}

fn read_json(
    fields: &mut Fields,
    record: RoutingRecord,
    shape: RouteShape,
) -> Result<RoutingRecord, ApiError> {
    let (ids_path, weights_path) = (fields.path("experts"), fields.path("weights"));
    let ids = list_at(&ids_path, required(fields, "experts")?, MAX_TOKENS)?;
    let weights = list_at(&weights_path, required(fields, "weights")?, MAX_TOKENS)?;
    let num_layers = record.layers.len();
    let width = ids.iter().flat_map(Value::as_array).flatten().flat_map(Value::as_array).map(Vec::len).max();
    let width = width.unwrap_or(0).min(shape.num_experts);
    let mut record = RoutingRecord::new(record.start, record.layers, width);
    same_len(&weights_path, weights.len(), ids.len())?;
    for (token, (ids, weights)) in ids.into_iter().zip(weights).enumerate() {
        let at = format!("{ids_path}[{token}]");
        let ids = list_at(&at, ids, num_layers)?;
        let weights = list_at(&format!("{weights_path}[{token}]"), weights, num_layers)?;
        same_len(&at, ids.len(), num_layers)?;
        same_len(&format!("{weights_path}[{token}]"), weights.len(), num_layers)?;
        for (index, (ids, weights)) in ids.into_iter().zip(weights).enumerate() {
            let at = format!("{at}[{index}]");
            let weights_at = format!("{weights_path}[{token}][{index}]");
            let ids = expert_ids(&at, ids, shape.num_experts)?;
            let weights = list_at(&weights_at, weights, shape.num_experts)?;
            same_len(&weights_at, weights.len(), ids.len())?;
            let weight = |weight| number_at(&weights_at, weight, f64::from(f32::MIN)..=f64::from(f32::MAX));
            let weights: Vec<f32> = weights
                .iter()
                .map(|value| weight(value).map(|weight| weight as f32))
                .collect::<Result<_, _>>()?;
            record.push_choice(&ids, &weights);
        }
    }
    Ok(record)
}

fn same_len(path: &str, found: usize, expected: usize) -> Result<(), ApiError> {
    if found == expected {
        return Ok(());
    }
    Err(wrong_value(path, &format!("expected an array of {expected}, but it has {found}")))
}

/// Experts by their ids, each within the layer.
pub(crate) fn expert_ids(path: &str, ids: Value, num_experts: usize) -> Result<Vec<u32>, ApiError> {
    let ids = list_at(path, ids, num_experts)?;
    let ids: Option<Vec<u32>> = ids.iter().map(|id| index_below(id, num_experts)).collect();
    ids.ok_or_else(|| wrong_value(path, &format!("expected ids of experts from 0 to {}", num_experts - 1)))
}

fn read_base64(
    fields: &mut Fields,
    record: RoutingRecord,
    route: RouteShape,
) -> Result<RoutingRecord, ApiError> {
    let shape_path = fields.path("shape");
    let shape = fields.list("shape", 3)?.ok_or_else(|| missing(&shape_path))?;
    let shape: Vec<usize> = shape.iter().filter_map(Value::as_u64).map(|size| size as usize).collect();
    let &[num_tokens, num_layers, width] = shape.as_slice() else {
        return Err(wrong_value(&shape_path, "expected [tokens, layers, experts per token]"));
    };
    if num_tokens > MAX_TOKENS
        || num_layers != record.layers.len()
        || !(1..=route.num_experts).contains(&width)
    {
        let expected = format!(
            "expected [tokens, {}, experts per token], with 1 to {} experts per token",
            record.layers.len(),
            route.num_experts
        );
        return Err(wrong_value(&shape_path, &expected));
    }
    let num_entries = num_tokens * num_layers * width;
    let ids = take_bytes::<2>(fields, "experts", num_entries)?;
    let weights = take_bytes::<4>(fields, "weights", num_entries)?;
    let mut read = RoutingRecord::new(record.start, record.layers, width);
    let ids: Vec<u16> = ids.into_iter().map(u16::from_le_bytes).collect();
    let weights: Vec<f32> = weights.into_iter().map(f32::from_le_bytes).collect();
    for (ids, weights) in ids.chunks_exact(width).zip(weights.chunks_exact(width)) {
        let count = ids.iter().position(|&id| id == NO_EXPERT).unwrap_or(width);
        if ids[..count].iter().any(|&id| usize::from(id) >= route.num_experts) {
            let expected = format!("expected ids of experts from 0 to {}", route.num_experts - 1);
            return Err(wrong_value(&fields.path("experts"), &expected));
        }
        let ids: Vec<u32> = ids[..count].iter().map(|&id| id.into()).collect();
        read.push_choice(&ids, &weights[..count]);
    }
    Ok(read)
}

fn take_bytes<const N: usize>(
    fields: &mut Fields,
    name: &str,
    count: usize,
) -> Result<Vec<[u8; N]>, ApiError> {
    let path = fields.path(name);
    let text = match required(fields, name)? {
        Value::String(text) => text,
        other => return Err(wrong_type(&path, "a string in base64", &other)),
    };
    let bytes =
        BASE64_STANDARD.decode(text).map_err(|error| wrong_value(&path, &format!("{error} in base64")))?;
    let (entries, rest) = bytes.as_chunks::<N>();
    if entries.len() != count || !rest.is_empty() {
        let expected = format!("its shape needs {} bytes, but it has {}", count * N, bytes.len());
        return Err(wrong_value(&path, &expected));
    }
    Ok(entries.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: RouteShape = RouteShape { num_experts: 8, top_k: 2 };

    fn record() -> RoutingRecord {
        let mut record = RoutingRecord::new(7, vec![0, 2], 3);
        record.push_choice(&[3, 1], &[0.1 + 0.2, 1.0 / 3.0]);
        record.push_choice(&[7, 0, 4], &[f32::MIN_POSITIVE, 0.123_456_79, 1.0]);
        record
    }

    fn written(encoding: Encoding) -> Value {
        serde_json::to_value(RoutingBody::new(record(), encoding)).unwrap()
    }

    fn read_back(value: Value) -> Result<RoutingRecord, ApiError> {
        read(Fields::of(value, "moe.replay".to_owned())?, 3, SHAPE)
    }

    #[test]
    fn both_encodings_are_read_back_bit_for_bit() {
        for encoding in [Encoding::Json, Encoding::Base64] {
            let text = written(encoding).to_string();
            assert_eq!(read_back(serde_json::from_str(&text).unwrap()).unwrap(), record(), "{text}");
        }
    }

    #[test]
    fn weights_survive_json_bit_for_bit() {
        for seed in 0..200_000u64 {
            // Any number from 0 to 1.
            let weight = f32::from_bits((model::mix64(seed) % 0x3f80_0001) as u32);
            let text = serde_json::to_string(&weight).unwrap();
            let back: Value = serde_json::from_str(&text).unwrap();
            assert_eq!((back.as_f64().unwrap() as f32).to_bits(), weight.to_bits(), "{text}");
        }
    }

    #[test]
    fn nonsense_is_refused_by_path() {
        let check = |encoding, change: &dyn Fn(&mut Value), path: &str| {
            let mut value = written(encoding);
            change(&mut value);
            let error = read_back(value).unwrap_err();
            assert_eq!(error.body.param.as_deref(), Some(path));
        };
        use Encoding::{Base64, Json};
        check(Json, &|value| value["experts"][0][0][1] = 8.into(), "moe.replay.experts[0][0]");
        check(Json, &|value| value["experts"][0][0][1] = 3.into(), "moe.replay.experts[0][0]");
        check(Json, &|value| value["experts"][0][1] = serde_json::json!([]), "moe.replay.weights[0][1]");
        check(Json, &|value| value["weights"][0] = serde_json::json!([]), "moe.replay.weights[0]");
        check(Json, &|value| value["layers"] = serde_json::json!([2, 0]), "moe.replay.layers");
        check(Json, &|value| value["layers"] = serde_json::json!([0, 3]), "moe.replay.layers");
        check(Json, &|value| value["x"] = 1.into(), "moe.replay.x");
        check(Json, &|value| value["encoding"] = "hex".into(), "moe.replay.encoding");
        check(Base64, &|value| value["experts"] = "AAA".into(), "moe.replay.experts");
        check(Base64, &|value| value["experts"] = "AAAA".into(), "moe.replay.experts");
        check(Base64, &|value| value["shape"] = serde_json::json!([1, 2]), "moe.replay.shape");
        check(Base64, &|value| value["shape"] = serde_json::json!([1, 3, 3]), "moe.replay.shape");
        check(Base64, &|value| value["shape"] = serde_json::json!([1, 2, u64::MAX]), "moe.replay.shape");
    }
}
