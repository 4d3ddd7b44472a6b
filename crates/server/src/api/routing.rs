//! The fields `routing` and `moe`: see to which experts tokens go, and decide it.
//!
//! `routing` is true, or says which layers, whether from the prompt's first token on, and how it is written. `moe` is
//! one object of overrides, for all layers or some, and perhaps with a record to repeat; or it is several such objects,
//! each for other `layers`. Both are checked here to the last number: a request that gets through can be steered.

use std::ops::RangeInclusive;
use std::sync::Arc;

use engine::RecordRouting;
use model::{LayerSteering, MAX_STEERED_EXPERTS, RouteShape, RoutingRecord, RunnerLimits, Steering};
use serde_json::Value;

use super::fields::{Fields, wrong_type, wrong_value};
use super::params::indexed;
use crate::error::ApiError;
use crate::routing::wire::{self, Encoding, RoutingBody};

/// Temperatures of a router's softmax.
pub(crate) const GATE_TEMPERATURE: RangeInclusive<f64> = 0.01..=100.0;

/// What a request says about routing.
#[derive(Debug, Default)]
pub(crate) struct RoutingParams {
    pub(crate) record: Option<RecordRouting>,
    pub(crate) steering: Option<Arc<Steering>>,
    pub(crate) written: WrittenRouting,
}

/// How an answer shows its routing; `None`: not at all.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct WrittenRouting(Option<Encoding>);

impl WrittenRouting {
    /// A record as the client wants it, if it wants one and there is one.
    pub(crate) fn body(self, record: Option<RoutingRecord>) -> Option<RoutingBody> {
        self.0.zip(record).map(|(encoding, record)| RoutingBody::new(record, encoding))
    }
}

impl RoutingParams {
    pub(crate) fn take(fields: &mut Fields, limits: &RunnerLimits) -> Result<Self, ApiError> {
        let (record, written) = take_record(fields, limits)?.unzip();
        let steering = take_steering(fields, "moe", limits)?.map(Arc::new);
        Ok(Self { record, steering, written: WrittenRouting(written) })
    }
}

fn take_record(
    fields: &mut Fields,
    limits: &RunnerLimits,
) -> Result<Option<(RecordRouting, Encoding)>, ApiError> {
    let path = fields.path("routing");
    let all_layers = || (0..limits.num_layers as u32).collect();
    let wanted = match fields.take("routing") {
        None | Some(Value::Bool(false)) => return Ok(None),
        Some(Value::Bool(true)) => (RecordRouting { layers: all_layers(), prompt: false }, Encoding::Json),
        Some(object @ Value::Object(_)) => {
            let mut fields = Fields::of(object, path.clone())?;
            let layers = wire::take_layers(&mut fields, "layers", limits.num_layers)?;
            let prompt = fields.boolean("prompt")?.unwrap_or(false);
            let encoding_path = fields.path("encoding");
            let encoding = match fields.string("encoding", 16)?.as_deref() {
                None | Some("json") => Encoding::Json,
                Some("base64") => Encoding::Base64,
                Some(_) => return Err(wrong_value(&encoding_path, "expected 'json' or 'base64'")),
            };
            fields.finish()?;
            (RecordRouting { layers: layers.unwrap_or_else(all_layers), prompt }, encoding)
        }
        Some(other) => return Err(wrong_type(&path, "a boolean or an object", &other)),
    };
    check_has_experts(&path, limits)?;
    Ok(Some(wanted))
}

fn check_has_experts(path: &str, limits: &RunnerLimits) -> Result<(), ApiError> {
    if limits.num_experts == 1 {
        return Err(wrong_value(path, "this model is dense: it has no experts to route to"));
    }
    Ok(())
}

/// Takes overrides: an object, or an array of objects for different layers.
pub(crate) fn take_steering(
    fields: &mut Fields,
    name: &str,
    limits: &RunnerLimits,
) -> Result<Option<Steering>, ApiError> {
    let path = fields.path(name);
    let mut replay = None;
    let objects = match fields.take(name) {
        None => return Ok(None),
        Some(object @ Value::Object(_)) => {
            let mut object = Fields::of(object, path.clone())?;
            if let Some(record) = object.object("replay")? {
                check_steerable(&path, limits)?;
                replay = Some(Arc::new(wire::read(record, limits.num_layers, limits.route())?));
            }
            vec![object]
        }
        Some(Value::Array(objects)) if objects.len() <= limits.num_layers => {
            let object = |(path, object)| Fields::of(object, path);
            indexed(&path, objects).into_iter().map(object).collect::<Result<_, _>>()?
        }
        Some(other) => {
            let expected = format!("an object, or an array of at most {} objects", limits.num_layers);
            return Err(wrong_type(&path, &expected, &other));
        }
    };
    check_steerable(&path, limits)?;
    let mut layers = vec![None; limits.num_layers];
    for mut fields in objects {
        let layers_path = fields.path("layers");
        let of_layers = wire::take_layers(&mut fields, "layers", limits.num_layers)?;
        let layer = take_layer(&mut fields, limits)?;
        fields.finish()?;
        for index in of_layers.unwrap_or_else(|| (0..limits.num_layers as u32).collect()) {
            if layers[index as usize].replace(layer.clone()).is_some() {
                return Err(wrong_value(&layers_path, &format!("layer {index} is steered twice")));
            }
        }
    }
    let plain = LayerSteering::new(limits.top_k);
    let layers = layers.into_iter().map(|layer| layer.unwrap_or_else(|| plain.clone())).collect();
    Ok(Some(Steering::new(limits.route(), layers, replay)))
}

fn check_steerable(path: &str, limits: &RunnerLimits) -> Result<(), ApiError> {
    check_has_experts(path, limits)?;
    if limits.num_experts > MAX_STEERED_EXPERTS {
        let expected = format!("layers of more than {MAX_STEERED_EXPERTS} experts cannot be steered");
        return Err(wrong_value(path, &expected));
    }
    Ok(())
}

/// The overrides of one layer, which leave it something to choose from.
fn take_layer(fields: &mut Fields, limits: &RunnerLimits) -> Result<LayerSteering, ApiError> {
    let RouteShape { num_experts, top_k } = limits.route();
    let max_top_k = limits.max_steered_experts();
    let (top_k_path, ban_path, force_path) = (fields.path("top_k"), fields.path("ban"), fields.path("force"));
    let asked = fields.integer("top_k", 1..=max_top_k as i64)?;
    let banned = take_experts(fields, "ban", num_experts)?;
    let forced = take_experts(fields, "force", num_experts)?;
    if banned & forced != 0 {
        let expert = (banned & forced).trailing_zeros();
        return Err(wrong_value(&force_path, &format!("expert {expert} is banned")));
    }
    let num_open = num_experts - banned.count_ones() as usize;
    let top_k = asked.map_or(top_k, |top_k| top_k as usize);
    if top_k > num_open {
        let expected = format!("{top_k} experts per token are needed, and it leaves {num_open}");
        return Err(wrong_value(if banned == 0 { &top_k_path } else { &ban_path }, &expected));
    }
    if forced.count_ones() as usize > top_k {
        let num_forced = forced.count_ones();
        let expected = format!("it names {num_forced} experts, and a token has {top_k}; raise 'top_k'");
        return Err(wrong_value(&force_path, &expected));
    }
    let temperature = fields.number("temperature", GATE_TEMPERATURE)?.unwrap_or(1.0) as f32;
    let random_seed = match fields.object("random")? {
        None => None,
        Some(mut random) => {
            let seed = random.integer("seed", i64::MIN..=i64::MAX)?.unwrap_or(0);
            random.finish()?;
            Some(seed as u64)
        }
    };
    Ok(LayerSteering { top_k: top_k as u32, banned, forced, temperature, random_seed })
}

/// A list of experts as a mask.
fn take_experts(fields: &mut Fields, name: &str, num_experts: usize) -> Result<u64, ApiError> {
    let path = fields.path(name);
    let Some(ids) = fields.take(name) else { return Ok(0) };
    let ids = wire::expert_ids(&path, ids, num_experts)?;
    Ok(ids.into_iter().fold(0, |mask, id| mask | 1 << id))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Two layers of eight experts, of which a token may visit up to four.
    const LIMITS: RunnerLimits = RunnerLimits {
        vocab_size: 16,
        max_model_len: 16,
        num_layers: 2,
        num_experts: 8,
        top_k: 2,
        block_size: 4,
        num_blocks: 4,
        max_num_batched_tokens: 16,
        max_num_seqs: 8,
        max_num_logits: 8,
    };

    fn take(json: Value) -> Result<RoutingParams, ApiError> {
        let mut fields = Fields::of(json, String::new()).unwrap();
        let params = RoutingParams::take(&mut fields, &LIMITS)?;
        fields.finish().map(|()| params)
    }

    #[test]
    fn nonsense_is_refused_by_path() {
        let check = |json: Value, path: &str| {
            assert_eq!(take(json.clone()).unwrap_err().body.param.as_deref(), Some(path), "{json}");
        };
        check(json!({"routing": 1}), "routing");
        check(json!({"routing": {"layers": [2]}}), "routing.layers");
        check(json!({"routing": {"encoding": "x"}}), "routing.encoding");
        check(json!({"routing": {"x": 1}}), "routing.x");
        check(json!({"moe": 1}), "moe");
        check(json!({"moe": [{}, {}, {}]}), "moe");
        check(json!({"moe": {"top_k": 0}}), "moe.top_k");
        check(json!({"moe": {"top_k": 5}}), "moe.top_k");
        check(json!({"moe": {"ban": [0, 1, 2, 3, 4, 5, 6, 7]}}), "moe.ban");
        check(json!({"moe": {"ban": [0, 1, 2, 3, 4, 5, 6]}}), "moe.ban");
        check(json!({"moe": {"ban": [8]}}), "moe.ban");
        check(json!({"moe": {"force": [1, 2, 3]}}), "moe.force");
        check(json!({"moe": {"force": [1], "ban": [1]}}), "moe.force");
        check(json!({"moe": {"temperature": 0}}), "moe.temperature");
        check(json!({"moe": {"random": {"x": 1}}}), "moe.random.x");
        check(json!({"moe": [{"layers": [0]}, {}]}), "moe[1].layers");
        check(json!({"moe": [{"replay": {}}]}), "moe[0].replay");
        check(json!({"moe": {"replay": {"experts": [], "weights": 1}}}), "moe.replay.weights");
    }

    #[test]
    fn layers_may_be_steered_apart() {
        let params =
            take(json!({"moe": [{"layers": [1], "top_k": 4}], "routing": {"prompt": true}})).unwrap();
        assert_eq!(params.steering.unwrap().experts_per_token(), 4);
        assert_eq!(params.record.unwrap(), RecordRouting { layers: vec![0, 1], prompt: true });
        assert!(take(json!({"routing": false, "moe": null})).unwrap().record.is_none());
    }
}
