//! Closed forms: every expected number here was worked out by hand from the formulas of the module's head.

use burn::tensor::{Device, Tensor};

use super::*;

const ALL: [Algorithm; 5] = [Algorithm::Cispo, Algorithm::Grpo, Algorithm::Dapo, Algorithm::Ppo, Algorithm::Reinforce];

/// ln r of seven tokens: both signs of the advantage, far and near, below and above.
const RATIOS: [f32; 7] = [1.0, 1.25, 6.0, 0.5, 1.25, 6.0, 0.5];
const ADVANTAGES: [f32; 7] = [2.0, 2.0, 2.0, 2.0, -1.0, -1.0, -1.0];
const SCALES: [f32; 7] = [0.5, 0.25, 0.125, 0.5, 0.25, 0.125, 0.5];

/// log π and log π_old of [`RATIOS`].
fn log_probs() -> (Vec<f32>, Vec<f32>) {
    let new: Vec<f32> = (1..=7).map(|i| -0.25 * i as f32).collect();
    let old = new.iter().zip(RATIOS).map(|(new, r)| new - r.ln()).collect();
    (new, old)
}

fn objective(algorithm: Algorithm) -> Objective {
    LossSettings::from(algorithm).objective().unwrap()
}

/// Loss, gradient with respect to log π, and statistics.
fn run(o: &Objective, new: &[f32], old: &[f32], a: &[f32], s: &[f32]) -> (f32, Vec<f32>, Statistics) {
    let x = Tensor::<1>::from_floats(new, &Device::flex().autodiff()).require_grad();
    let out = policy_loss(o, x.clone(), old, a, s).unwrap();
    assert_eq!(out.log_probs, new);
    let gradients = out.loss.backward();
    let gradient = x.grad(&gradients).unwrap().into_data().iter::<f32>().collect();
    (out.loss.inner().into_scalar::<f32>(), gradient, out.statistics)
}

fn close(a: &[f32], b: &[f32]) {
    assert_eq!(a.len(), b.len());
    for (x, y) in a.iter().zip(b) {
        assert!((x - y).abs() <= 2e-6 * y.abs().max(1.0), "{a:?} {b:?}");
    }
}

#[test]
fn each_preset_gives_the_gradient_of_its_formula() {
    let (new, old) = log_probs();
    // M · w of the seven tokens. PPO's mask: positive tokens stop above 1.2 (1.28), negative ones below 0.8.
    let expected: [(Algorithm, [f32; 7], (u64, u64)); 5] = [
        (Algorithm::Cispo, [1.0, 1.25, 5.0, 0.5, 1.25, 5.0, 0.5], (1, 1)),
        (Algorithm::Grpo, [1.0, 0.0, 0.0, 0.5, 1.25, 6.0, 0.0], (2, 1)),
        (Algorithm::Dapo, [1.0, 1.25, 0.0, 0.5, 1.25, 6.0, 0.0], (1, 1)),
        (Algorithm::Ppo, [1.0, 0.0, 0.0, 0.5, 1.25, 6.0, 0.0], (2, 1)),
        (Algorithm::Reinforce, [1.0; 7], (0, 0)),
    ];
    for (algorithm, weights, clipped) in expected {
        let (loss, gradient, seen) = run(&objective(algorithm), &new, &old, &ADVANTAGES, &SCALES);
        let want: Vec<f32> = (0..7).map(|i| -SCALES[i] * weights[i] * ADVANTAGES[i]).collect();
        close(&gradient, &want);
        let value: f32 = (0..7).map(|i| want[i] * new[i]).sum();
        close(&[loss, seen.loss as f32], &[value, value]);
        assert_eq!((seen.positive, seen.negative, seen.tokens), (4, 3, 7));
        assert_eq!((seen.positive_clipped, seen.negative_clipped), clipped, "{algorithm:?}");
        assert_eq!(seen.positive_clip_fraction(), clipped.0 as f64 / 4.0);
        assert_eq!(seen.negative_clip_fraction(), clipped.1 as f64 / 3.0);
        close(&[seen.ratio_min, seen.ratio_max, seen.ratio_mean() as f32], &[0.5, 6.0, 16.5 / 7.0]);
        // r - 1 - ln r: 0; 0.25 - ln 1.25 twice; 5 - ln 6 twice; -0.5 + ln 2 twice.
        let kl = 2.0 * (0.25 - 1.25f64.ln() + 5.0 - 6f64.ln() - 0.5 + 2f64.ln()) / 7.0;
        assert!((seen.approx_kl() - kl).abs() < 1e-6, "{} {kl}", seen.approx_kl());
    }
}

#[test]
fn the_mask_is_the_gradient_of_ppos_minimum() {
    let (new, old) = log_probs();
    let device = Device::flex().autodiff();
    for (low, high, algorithm) in [(0.8, 1.2, Algorithm::Ppo), (0.8, 1.28, Algorithm::Dapo)] {
        let x = Tensor::<1>::from_floats(&new[..], &device).require_grad();
        let constant = |values: &[f32]| Tensor::<1>::from_floats(values, &device);
        let ratio = (x.clone() - constant(&old)).exp();
        let plain = ratio.clone() * constant(&ADVANTAGES);
        let clipped = ratio.clamp(low, high) * constant(&ADVANTAGES);
        let loss = (plain.min_pair(clipped) * constant(&SCALES)).sum().neg();
        let gradients = loss.backward();
        let want: Vec<f32> = x.grad(&gradients).unwrap().into_data().iter::<f32>().collect();
        let o = objective(algorithm);
        // At r = 1 (the first token) both sides of the minimum are equal; the derivative is r A either way.
        close(&run(&o, &new, &old, &ADVANTAGES, &SCALES).1[1..], &want[1..]);
    }
}

#[test]
fn on_policy_cispo_is_reinforce_to_the_bit() {
    let new: Vec<f32> = (0..64).map(|i| -(i as f32 * 0.37 + 0.011).sin().abs() * 9.0).collect();
    let advantages: Vec<f32> = (0..64).map(|i| (i as f32 * 1.7).cos() * 1.3).collect();
    let scales: Vec<f32> = (0..64).map(|i| 1.0 / (3.0 + i as f32)).collect();
    let cispo = run(&objective(Algorithm::Cispo), &new, &new, &advantages, &scales);
    let reinforce = run(&objective(Algorithm::Reinforce), &new, &new, &advantages, &scales);
    assert_eq!((cispo.2.ratio_min, cispo.2.ratio_max, cispo.2.ratio_mean()), (1.0, 1.0, 1.0));
    assert_eq!(cispo.2.approx_kl(), 0.0);
    let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert_eq!(cispo.0.to_bits(), reinforce.0.to_bits());
    assert_eq!(bits(&cispo.1), bits(&reinforce.1));
    assert_eq!(cispo.2, reinforce.2);
    // And the gradient is that of the formula to the bit: nothing flows through the weight.
    let want: Vec<f32> = scales.iter().zip(&advantages).map(|(s, a)| -s * a).collect();
    assert_eq!(bits(&cispo.1), bits(&want));
}

#[test]
fn off_policy_nothing_flows_through_the_weight() {
    let (new, old) = log_probs();
    let o = LossSettings { ratio_max: Some(1.2), ratio_min: Some(0.9), ..LossSettings::default() }.objective().unwrap();
    let (_, gradient, seen) = run(&o, &new, &old, &ADVANTAGES, &SCALES);
    let ratio = |i: usize| (new[i] - old[i]).exp().clamp(0.9, 1.2);
    let want: Vec<u32> = (0..7).map(|i| (-SCALES[i] * (ratio(i) * ADVANTAGES[i])).to_bits()).collect();
    assert_eq!(gradient.iter().map(|g| g.to_bits()).collect::<Vec<_>>(), want);
    assert_eq!((seen.positive_clipped, seen.negative_clipped), (3, 3), "both bounds count");
}

#[test]
fn a_mask_may_be_put_on_any_weight() {
    let (new, old) = log_probs();
    let settings =
        LossSettings { mask: Some(MaskKind::Ppo), eps_low: Some(1.0), eps_high: Some(1.0), ..LossSettings::default() };
    let (_, gradient, _) = run(&settings.objective().unwrap(), &new, &old, &ADVANTAGES, &SCALES);
    // Only the positive token at r = 6 is masked; the negative one there is clipped to 5.
    close(&gradient, &[-1.0, -0.625, 0.0, -0.5, 0.3125, 0.625, 0.25]);
}

#[test]
fn far_ratios_stay_finite() {
    let new = [-1e3, -1.0, -1e3, -1.0];
    let old = [-1.0, -1e3, -1.0, -1e3];
    let advantages = [1.0, 1.0, -1.0, -1.0];
    for algorithm in ALL {
        let (loss, gradient, seen) = run(&objective(algorithm), &new, &old, &advantages, &[0.25; 4]);
        assert!(loss.is_finite() && gradient.iter().all(|g| g.is_finite()), "{algorithm:?} {gradient:?}");
        assert!(seen.approx_kl().is_finite() && seen.ratio_mean().is_finite());
        close(&[seen.ratio_max, seen.ratio_min], &[LOG_RATIO_BOUND.exp(), (-LOG_RATIO_BOUND).exp()]);
    }
    // CISPO's weight stops at its bound, and has none below.
    let (_, gradient, _) = run(&objective(Algorithm::Cispo), &new, &old, &advantages, &[0.25; 4]);
    close(&gradient, &[0.0, -1.25, 0.0, 1.25]);
}

#[test]
fn what_cannot_be_is_named() {
    let loss = |new: &[f32], old: &[f32], a: &[f32], s: &[f32]| {
        let x = Tensor::<1>::from_floats(new, &Device::flex());
        policy_loss(&objective(Algorithm::Cispo), x, old, a, s).map(|out| out.loss.into_scalar::<f32>())
    };
    let error = |r: Result<f32, LossError>| r.unwrap_err().to_string();
    assert!(error(loss(&[-1.0, f32::NAN], &[-1.0; 2], &[1.0; 2], &[1.0; 2])).contains("log_prob[1] is NaN"));
    let infinite = error(loss(&[-1.0; 2], &[f32::NEG_INFINITY, -1.0], &[1.0; 2], &[1.0; 2]));
    assert!(infinite.contains("old_log_probs[0] is -inf"), "{infinite}");
    assert!(error(loss(&[-1.0; 2], &[-1.0; 2], &[1.0; 3], &[1.0; 2])).contains("advantages has 3 entries"));
    assert!(error(loss(&[-1.0], &[-1.0], &[1.0], &[f32::NAN])).contains("scales[0]"));
    // Without autodiff the value is there all the same.
    assert_eq!(loss(&[-2.0], &[-2.0], &[3.0], &[0.5]), Ok(3.0));
    assert!(advantages(&[1.0, f64::NAN], &[0, 0], Advantage::GroupStd, Deviation::Sample).is_err());
    assert!(advantages(&[1.0], &[0, 0], Advantage::GroupStd, Deviation::Sample).is_err());
    assert!(scales(Aggregation::BatchTokens, &[1], &[0, 0]).is_err());
    assert!(per_token(&[1.0], &[1, 2]).is_err());
}

#[test]
fn a_part_without_tokens_is_zero() {
    let x = Tensor::<1>::zeros([0], &Device::flex());
    let out = policy_loss(&objective(Algorithm::Grpo), x, &[], &[], &[]).unwrap();
    assert_eq!(out.loss.into_scalar::<f32>(), 0.0);
    assert_eq!(out.statistics, Statistics::default());
    assert_eq!((out.statistics.ratio_mean(), out.statistics.approx_kl()), (1.0, 0.0));
    assert_eq!(out.statistics.positive_clip_fraction(), 0.0);
}

#[test]
fn advantages_in_closed_form() {
    use Advantage::*;
    use Deviation::*;
    let close = |a: Vec<f64>, b: &[f64]| {
        assert!(a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-12), "{a:?} {b:?}");
    };
    // Group 7: 0, 0, 1, 1 (mean 0.5; std 0.5, as a sample 1/√3). Group 3: 2, 4 (mean 3; std 1 and √2). Mixed order.
    let rewards = [0.0, 2.0, 1.0, 0.0, 4.0, 1.0];
    let groups = [7, 3, 7, 7, 3, 7];
    let of = |kind, std| advantages(&rewards, &groups, kind, std).unwrap();
    close(of(GroupStd, Population), &[-1.0, -1.0, 1.0, -1.0, 1.0, 1.0]);
    let (a, b) = (0.75f64.sqrt(), 0.5f64.sqrt());
    close(of(GroupStd, Sample), &[-a, -b, a, -a, b, a]);
    close(of(GroupMean, Sample), &[-0.5, -1.0, 0.5, -0.5, 1.0, 0.5]);
    // The differences' squares add up to 4 · 0.25 + 2 · 1 = 3, over 6 or 5.
    let c = (3.0f64 / 6.0).sqrt();
    close(of(BatchStd, Population), &[-0.5 / c, -1.0 / c, 0.5 / c, -0.5 / c, 1.0 / c, 0.5 / c]);
    let c = (3.0f64 / 5.0).sqrt();
    close(of(BatchStd, Sample), &[-0.5 / c, -1.0 / c, 0.5 / c, -0.5 / c, 1.0 / c, 0.5 / c]);
}

#[test]
fn groups_that_teach_nothing_get_zero() {
    for kind in [Advantage::GroupStd, Advantage::GroupMean, Advantage::BatchStd] {
        for std in [Deviation::Sample, Deviation::Population] {
            // 0.1 three times has a deviation of 1e-17 in floating point.
            let of = |rewards: &[f64], groups: &[usize]| advantages(rewards, groups, kind, std).unwrap();
            assert_eq!(of(&[0.1, 0.1, 0.1], &[0; 3]), [0.0; 3], "{kind:?}");
            assert_eq!(of(&[5.0], &[1]), [0.0], "a group of one");
            assert_eq!(of(&[], &[]), [0.0; 0]);
            let mixed = of(&[1.0, 1.0, 0.0, 1.0, 9.0], &[0, 0, 1, 1, 2]);
            assert_eq!((mixed[0], mixed[1], mixed[4]), (0.0, 0.0, 0.0));
            assert!(mixed[2] < 0.0 && mixed[3] == -mixed[2], "{mixed:?}");
        }
    }
    assert!(is_uniform(&[0.3]) && is_uniform(&[]) && is_uniform(&[1.0, 1.0]) && !is_uniform(&[1.0, 1.1]));
}

#[test]
fn scales_in_closed_form() {
    use Aggregation::*;
    // Group 4 has 1 and 3 tokens and one empty response, group 9 has 4; group 5 is all empty.
    let lengths = [1, 4, 3, 0, 0];
    let groups = [4, 9, 4, 4, 5];
    let of = |aggregation| scales(aggregation, &lengths, &groups).unwrap();
    let eq = |a: Vec<f64>, b: [f64; 5]| {
        assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-15), "{a:?} {b:?}");
    };
    eq(of(GroupTokens), [1.0 / 8.0, 1.0 / 8.0, 1.0 / 8.0, 0.0, 0.0]);
    eq(of(BatchTokens), [1.0 / 8.0, 1.0 / 8.0, 1.0 / 8.0, 0.0, 0.0]);
    eq(of(SequenceMean), [1.0 / 3.0, 1.0 / 12.0, 1.0 / 9.0, 0.0, 0.0]);
    // Group 4: 4 of 8 tokens, two responses; group 9: 4 of 8 tokens, one.
    eq(of(SequenceMeanTokenNormalised), [1.0 / 4.0, 1.0 / 8.0, 1.0 / 12.0, 0.0, 0.0]);
    // Where the groups differ in tokens, so do their shares.
    let uneven = |aggregation| scales(aggregation, &[2, 6], &[0, 1]).unwrap();
    assert_eq!(uneven(GroupTokens), [0.25, 1.0 / 12.0]);
    assert_eq!(uneven(BatchTokens), [0.125, 0.125]);
    assert_eq!(uneven(SequenceMean), [0.25, 1.0 / 12.0]);
    assert_eq!(uneven(SequenceMeanTokenNormalised), [0.125, 0.125]);
    for aggregation in [GroupTokens, BatchTokens, SequenceMean, SequenceMeanTokenNormalised] {
        assert_eq!(scales(aggregation, &[0, 0], &[0, 1]).unwrap(), [0.0, 0.0]);
        assert_eq!(scales(aggregation, &[], &[]).unwrap(), [0.0; 0]);
        // Every aggregation is a mean: equal losses of all tokens give that loss.
        let total: f64 = of(aggregation).iter().zip(lengths).map(|(s, n)| s * n as f64).sum();
        assert!((total - 1.0).abs() < 1e-12, "{aggregation:?} {total}");
    }
}

#[test]
fn splitting_changes_nothing() {
    let (lengths, groups) = ([3usize, 1, 0, 5, 2, 7], [0usize, 0, 0, 1, 1, 2]);
    let rewards = [1.0, 0.0, 0.5, 0.0, 1.0, 0.3];
    let count: usize = lengths.iter().sum();
    let new: Vec<f32> = (0..count).map(|i| -0.1 - (i as f32 * 0.7).sin().abs()).collect();
    let old: Vec<f32> = (0..count).map(|i| -0.1 - (i as f32 * 0.9).sin().abs()).collect();
    for algorithm in ALL {
        let o = objective(algorithm);
        let advantage = advantages(&rewards, &groups, o.advantage, o.std).unwrap();
        let advantage = per_token(&advantage, &lengths).unwrap();
        let scale = per_token(&scales(o.aggregation, &lengths, &groups).unwrap(), &lengths).unwrap();
        let (loss, gradient, seen) = run(&o, &new, &old, &advantage, &scale);
        for borders in [vec![0, 3, 4, 18], vec![0, 9, 18], (0..=count).collect::<Vec<_>>()] {
            let (mut sum, mut gradients, mut merged) = (0.0, Vec::new(), Statistics::default());
            for part in borders.windows(2) {
                let part = part[0]..part[1];
                let at = |v: &[f32]| v[part.clone()].to_vec();
                let one = run(&o, &at(&new), &at(&old), &at(&advantage), &at(&scale));
                sum += f64::from(one.0);
                gradients.extend(one.1);
                merged.merge(&one.2);
            }
            assert_eq!(gradients, gradient, "to the bit");
            assert!((sum - f64::from(loss)).abs() < 1e-6, "{sum} {loss}");
            assert!((merged.loss - seen.loss).abs() < 1e-12 && (merged.kl_sum - seen.kl_sum).abs() < 1e-12);
            assert!((merged.ratio_sum - seen.ratio_sum).abs() < 1e-12);
            let sums = |s: &Statistics| Statistics { loss: 0.0, kl_sum: 0.0, ratio_sum: 0.0, ..*s };
            assert_eq!(sums(&merged), sums(&seen));
        }
    }
}

#[test]
fn settings_as_a_file_has_them() {
    let read = |json: &str| serde_json::from_str::<LossSettings>(json);
    assert_eq!(read("{}").unwrap().objective().unwrap(), objective(Algorithm::Cispo));
    assert_eq!(objective(Algorithm::Cispo).weight, Weight::ClippedRatio { min: 0.0, max: 5.0 });
    let dapo = read(r#"{"algorithm": "dapo", "aggregation": "sequence_mean_token_normalised", "std": "population"}"#);
    let dapo = dapo.unwrap().objective().unwrap();
    assert_eq!(dapo.mask, Mask::Ppo { low: 0.8, high: 1.28 });
    assert_eq!(dapo.aggregation, Aggregation::SequenceMeanTokenNormalised);
    assert_eq!(dapo.std, Deviation::Population);
    assert!(read(r#"{"ratio_maximum": 3}"#).unwrap_err().to_string().contains("unknown field `ratio_maximum`"));
    assert!(read(r#"{"algorithm": "gspo"}"#).unwrap_err().to_string().contains("cispo"));
    // What is left out stays out: a checkpoint says what the user said.
    let text = r#"{"algorithm":"cispo","ratio_max":4.0}"#;
    assert_eq!(serde_json::to_string(&read(text).unwrap()).unwrap(), text);
}

#[test]
fn traps_are_refused_with_their_reason() {
    let error = |settings: LossSettings| settings.objective().unwrap_err().to_string();
    let cispo = LossSettings::default;
    // The field's own trap: an epsilon in the place of the bound.
    let told = error(LossSettings { ratio_max: Some(0.2), ..cispo() });
    assert!(told.contains("loss.ratio_max = 0.2") && told.contains("not an epsilon"), "{told}");
    assert!(told.contains("1 or above") && !told.contains('\n'), "{told}");
    for bad in [f64::NAN, f64::INFINITY, -5.0, 0.999, 1e300] {
        assert!(error(LossSettings { ratio_max: Some(bad), ..cispo() }).contains("ratio_max"));
    }
    for bad in [f64::NAN, 1.1, -0.1] {
        assert!(error(LossSettings { ratio_min: Some(bad), ..cispo() }).contains("ratio_min"));
    }
    for bad in [f64::NAN, -0.2, f64::INFINITY] {
        let grpo = || LossSettings::from(Algorithm::Grpo);
        assert!(error(LossSettings { eps_high: Some(bad), ..grpo() }).contains("eps_high"));
        assert!(error(LossSettings { eps_low: Some(bad), ..grpo() }).contains("eps_low"));
    }
    assert!(error(LossSettings { eps_low: Some(1.5), ..LossSettings::from(Algorithm::Ppo) }).contains("0 to 1"));
    // A knob that would be read by nothing.
    let told = error(LossSettings { eps_high: Some(0.2), ..cispo() });
    assert!(told.contains("no effect") && told.contains("ratio_max"), "{told}");
    assert!(error(LossSettings { ratio_max: Some(5.0), ..LossSettings::from(Algorithm::Dapo) }).contains("no effect"));
    assert!(error(LossSettings { ratio_min: Some(0.0), ..LossSettings::from(Algorithm::Reinforce) }).contains("one"));
    let settings = LossSettings { advantage: Some(Advantage::GroupMean), std: Some(Deviation::Sample), ..cispo() };
    assert!(error(settings).contains("loss.std"));
    assert!(LossSettings { ratio_max: Some(1.0), ratio_min: Some(1.0), ..cispo() }.objective().is_ok());
}
