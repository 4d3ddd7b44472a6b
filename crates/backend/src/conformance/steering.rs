//! Checks of steered routing: rules are followed, and no row notices that another is steered.

use std::sync::Arc;

use super::{BF16_TOLERANCE, ExpertsCase, assert_close, filled, run_step};
use crate::reference::Reference;
use crate::{Backend, Batch, DType, LayerSteering, MatrixUse, RouteShape, Routing, RoutingRecord, Steering};

const SHAPE: RouteShape = RouteShape { num_experts: 8, top_k: 2 };
const BLOCK_SIZE: u32 = 4;
/// The layer that is run; layer 0 is only there to have other rules.
const LAYER: usize = 1;
/// Tokens of each sequence: the first is not steered.
const SEQUENCE_TOKENS: usize = 5;

/// What a step gave.
struct Outcome {
    routing: Routing,
    out: Vec<f32>,
}

pub(super) fn check_steering<B: Backend>(backend: &mut B, quantisation: f32) {
    let steerings = steerings();
    let num_tokens = SEQUENCE_TOKENS * steerings.len();
    let case = ExpertsCase::new(num_tokens, 40, 24, SHAPE);
    let row =
        |index: usize| index * SEQUENCE_TOKENS * case.hidden..(index + 1) * SEQUENCE_TOKENS * case.hidden;

    let got = run(backend, &case, &case.x, &steerings);
    let expected = run(&mut Reference::new(), &case, &case.x, &steerings);
    assert_eq!(got.routing.topk_ids, expected.routing.topk_ids, "steering: experts");
    assert_eq!(got.routing.expert_offsets, expected.routing.expert_offsets, "steering: offsets");
    assert_eq!(got.routing.permutation, expected.routing.permutation, "steering: permutation");
    let weights = &expected.routing.topk_weights;
    assert_close("steering: weights", &got.routing.topk_weights, weights, DType::F32);
    let rms = (expected.out.iter().map(|x| x * x).sum::<f32>() / expected.out.len() as f32).sqrt();
    let worst = got.out.iter().zip(&expected.out).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(
        worst <= (BF16_TOLERANCE + quantisation) * rms,
        "steering: {worst} off at root mean square {rms}"
    );

    for (index, steering) in steerings.iter().enumerate() {
        let alone = run(backend, &case, &case.x[row(index)], std::slice::from_ref(steering));
        assert_eq!(alone.out, got.out[row(index)], "steering: sequence {index} alone and in a batch");
    }
    let unsteered = run(backend, &case, &case.x, &vec![None; steerings.len()]);
    assert_eq!(unsteered.out[row(0)], got.out[row(0)], "steering: beside the steered rows the others");
    let neutral = vec![Some(Steering::new(SHAPE, vec![LayerSteering::new(2); 2], None)); steerings.len()];
    let neutral = run(backend, &case, &case.x, &neutral);
    assert_eq!(neutral.out, unsteered.out, "steering: rules that say what the model does anyway");

    // The experts of random routers are not what the logits say, so the same bits mean that they were repeated.
    let random = steerings.len() - 1;
    let record = Arc::new(record(&got.routing, random * SEQUENCE_TOKENS));
    let replay = Steering::new(SHAPE, vec![LayerSteering::new(2); 2], Some(record));
    let replayed = run(backend, &case, &case.x[row(random)], &[Some(replay)]);
    assert_eq!(replayed.out, got.out[row(random)], "steering: a record repeated");
}

/// No steering, and one of each kind; the last routes at random.
fn steerings() -> Vec<Option<Steering>> {
    let plain = LayerSteering::new(2);
    let layers = [
        LayerSteering { top_k: 5, ..plain.clone() },
        LayerSteering { top_k: 1, ..plain.clone() },
        LayerSteering { banned: 0b1011_0110, ..plain.clone() },
        LayerSteering { top_k: 3, banned: 1, forced: 0b1000_0010, temperature: 0.5, ..plain.clone() },
        LayerSteering { temperature: 3.0, ..plain.clone() },
        LayerSteering { top_k: 3, random_seed: Some(9), ..plain.clone() },
    ];
    let steering = |layer| Some(Steering::new(SHAPE, vec![plain.clone(), layer], None));
    std::iter::once(None).chain(layers.into_iter().map(steering)).collect()
}

/// Routes `x` `[sequences × SEQUENCE_TOKENS, hidden]` and runs its experts.
fn run<B: Backend>(
    backend: &mut B,
    case: &ExpertsCase,
    x: &[f32],
    steerings: &[Option<Steering>],
) -> Outcome {
    let tokens = x.len() / case.hidden;
    let mut batch = Batch::new();
    for steering in steerings {
        batch.push_sequence(&[0; SEQUENCE_TOKENS], 3, &[1, 2], BLOCK_SIZE);
        if let Some(steering) = steering {
            batch.steer_last_sequence(steering);
        }
    }
    // Room for as many rows of experts as the widest of the rules may need.
    let (max_tokens, width) = (tokens * SHAPE.num_experts / SHAPE.top_k, SHAPE.num_experts);
    let x = filled(backend, case.hidden, DType::Bf16, x);
    let router = backend.matrix(std::slice::from_ref(&case.router), MatrixUse::Exact).unwrap();
    let experts = backend.experts(&case.experts).unwrap();
    let mut routing = backend.routing(max_tokens, SHAPE).unwrap();
    let mut act = backend.tensor(tokens * width, case.ffn, DType::Bf16).unwrap();
    let mut out = backend.tensor(tokens, case.hidden, DType::F32).unwrap();
    run_step(backend, &batch, |backend| {
        backend.route(&x, Some(&router), &mut routing, LAYER, tokens);
        backend.experts_gate_up(&x, &experts, &routing, &mut act);
        backend.experts_down(&act, &experts, &routing, &mut out);
    });
    let choices = backend.read_choices(std::slice::from_ref(&routing)).remove(0);
    let mut loads = vec![Default::default(); SHAPE.num_experts];
    backend.add_expert_loads(&routing, &mut loads);
    let routing = backend.read_routing(&routing);
    assert_eq!((choices.ids, choices.weights), (routing.topk_ids.clone(), routing.topk_weights.clone()));
    let sum: f64 = loads.iter().map(|load| load.gate_weight).sum();
    assert!((sum - tokens as f64).abs() < 1e-3, "steering: each token's gate weights sum to one, not {sum}");
    let num_rows: u64 = loads.iter().map(|load| load.num_tokens).sum();
    assert_eq!(num_rows as usize, routing.num_rows(), "steering: every row is counted");
    Outcome { routing, out: backend.download(&out, tokens) }
}

/// The record of one sequence, whose first token is `first`.
fn record(routing: &Routing, first: usize) -> RoutingRecord {
    let mut record = RoutingRecord::new(3, vec![LAYER as u32], routing.width);
    let entries = first * routing.width..(first + SEQUENCE_TOKENS) * routing.width;
    record.ids = routing.topk_ids[entries.clone()].to_vec();
    record.weights = routing.topk_weights[entries].to_vec();
    record
}
