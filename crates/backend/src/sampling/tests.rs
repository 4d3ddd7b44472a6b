//! What sampling does to small rows whose answer is known.

use super::*;

fn distribution(logits: &[f32], params: &SampleParams) -> Vec<f64> {
    let draws = 20_000;
    let mut counts = vec![0.0; logits.len()];
    for seed in 0..draws {
        let params = SampleParams { seed, ..params.clone() };
        counts[sample_row(logits, &SampleRow::new(&params)).unwrap().token as usize] += 1.0 / draws as f64;
    }
    counts
}

#[track_caller]
fn check_distribution(params: SampleParams, expected: [f64; 4]) {
    let logits = [0.4f32, 0.3, 0.2, 0.1].map(f32::ln);
    let got = distribution(&logits, &params);
    assert!(got.iter().zip(expected).all(|(a, b)| (a - b).abs() < 0.015), "{got:?} is not {expected:?}");
}

#[test]
fn draws_follow_the_filtered_distribution() {
    let default = SampleParams::default;
    check_distribution(default(), [0.4, 0.3, 0.2, 0.1]);
    check_distribution(SampleParams { top_k: 2, ..default() }, [4.0 / 7.0, 3.0 / 7.0, 0.0, 0.0]);
    check_distribution(SampleParams { top_p: 0.65, ..default() }, [4.0 / 7.0, 3.0 / 7.0, 0.0, 0.0]);
    check_distribution(SampleParams { min_p: 0.45, ..default() }, [4.0 / 9.0, 3.0 / 9.0, 2.0 / 9.0, 0.0]);
    check_distribution(
        SampleParams { temperature: 0.5, ..default() },
        [16. / 30., 9. / 30., 4. / 30., 1. / 30.],
    );
    check_distribution(SampleParams::greedy(), [1.0, 0.0, 0.0, 0.0]);
}

#[test]
fn bias_penalties_and_bans_move_the_choice() {
    let logits = [2.0, 1.9, -1.0, 0.0];
    let take = |params: SampleParams, output: &[u32], banned: &[u32]| {
        let row = SampleRow { output, banned, ..SampleRow::new(&params) };
        sample_row(&logits, &row).unwrap().token
    };
    let greedy = SampleParams::greedy;
    assert_eq!(take(greedy(), &[], &[]), 0);
    assert_eq!(take(greedy(), &[], &[0]), 1);
    assert_eq!(take(SampleParams { logit_bias: vec![(2, 10.0)], ..greedy() }, &[], &[]), 2);
    assert_eq!(take(SampleParams { presence_penalty: 0.2, ..greedy() }, &[0], &[]), 1);
    assert_eq!(take(SampleParams { frequency_penalty: 0.06, ..greedy() }, &[0, 0], &[]), 1);
    assert_eq!(take(SampleParams { repetition_penalty: 1.1, ..greedy() }, &[0], &[]), 1);
}

#[test]
fn logprobs_come_from_the_models_own_distribution() {
    let logits = [0.4f32, 0.3, 0.2, 0.1].map(f32::ln);
    let params = SampleParams { logit_bias: vec![(3, 100.0)], ..SampleParams::greedy() };
    let sampled =
        sample_row(&logits, &SampleRow { num_logprobs: Some(2), ..SampleRow::new(&params) }).unwrap();
    let own = sampled.logprob.unwrap();
    assert_eq!((sampled.token, own.rank), (3, 4));
    assert!((own.logprob - 0.1f32.ln()).abs() < 1e-6);
    assert_eq!(sampled.top_logprobs.iter().map(|t| t.token).collect::<Vec<_>>(), [0, 1]);

    let forced = SampleRow { forced: Some(2), num_logprobs: Some(0), ..SampleRow::new(&params) };
    let sampled = sample_row(&logits, &forced).unwrap();
    assert_eq!((sampled.token, sampled.top_logprobs.len()), (2, 0));
}

#[test]
fn only_allowed_tokens_are_taken_and_their_logprobs_stay_the_models_own() {
    let logits: Vec<f32> = (0..70).map(|token| token as f32 / 10.0).collect();
    let allowed = [1 << 3 | 1 << 9, 1 << 2];
    for (params, expected) in [
        (SampleParams::greedy(), 34),
        (SampleParams { logit_bias: vec![(9, 50.0), (69, 90.0)], ..SampleParams::greedy() }, 9),
        (SampleParams { top_k: 1, ..SampleParams::default() }, 34),
    ] {
        let row = SampleRow { allowed: Some(&allowed), num_logprobs: Some(1), ..SampleRow::new(&params) };
        let masked = sample_row(&logits, &row).unwrap();
        let forced = SampleRow { forced: Some(expected), allowed: None, ..row };
        assert_eq!(masked, sample_row(&logits, &forced).unwrap());
    }
    for seed in 0..200 {
        let params = SampleParams { temperature: 2.0, seed, ..SampleParams::default() };
        let row = SampleRow { allowed: Some(&allowed), banned: &[34], ..SampleRow::new(&params) };
        assert!([3, 9].contains(&sample_row(&logits, &row).unwrap().token));
    }
}

#[test]
fn broken_logits_are_an_error_and_not_a_token() {
    let params = SampleParams::greedy();
    for logits in [[f32::NAN, 1.0], [f32::INFINITY, 1.0], [f32::NEG_INFINITY; 2]] {
        assert_eq!(sample_row(&logits, &SampleRow::new(&params)), Err(NonFiniteLogits), "{logits:?}");
    }
    assert!(sample_row(&[f32::NEG_INFINITY, 1.0], &SampleRow::new(&params)).is_ok());
    let none_allowed = SampleRow { allowed: Some(&[]), ..SampleRow::new(&params) };
    assert_eq!(sample_row(&[0.0, 1.0], &none_allowed), Err(NonFiniteLogits));
    let all_banned = SampleRow { banned: &[0, 1], ..SampleRow::new(&params) };
    assert_eq!(sample_row(&[0.0, 1.0], &all_banned), Err(NonFiniteLogits));
}

#[test]
fn the_same_seed_and_index_draw_the_same_number() {
    assert_eq!(uniform(1, 2), uniform(1, 2));
    assert_ne!(uniform(1, 2), uniform(1, 3));
    assert_ne!(uniform(1, 2), uniform(2, 2));
    let mean = (0..10_000).map(|i| uniform(9, i)).sum::<f64>() / 10_000.0;
    assert!((mean - 0.5).abs() < 0.01, "{mean}");
}
