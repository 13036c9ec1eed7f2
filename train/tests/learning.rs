//! The trainer learns, and the number of threads and the split into parts change nothing.

use burn::module::Module;
use burn::tensor::Device;
use m1_model::config::ModelConfig;
use m1_model::model::M1;
use m1_model::trace::Trace;
use m1_train::data::Example;
use m1_train::optimizer::OptimizerSettings;
use m1_train::parameters;
use m1_train::trainer::{TrainError, Trainer, cross_entropy_sum};

/// Two layers, one of each kind, a few thousand parameters.
fn micro() -> ModelConfig {
    let mut config = ModelConfig::preset("nano").unwrap();
    config.num_hidden_layers = 2;
    config.attn_type_list = vec![0, 1];
    config.vocab_size = 32;
    config.hidden_size = 16;
    config.num_attention_heads = 2;
    config.num_key_value_heads = 1;
    config.head_dim = 8;
    config.rotary_dim = 4;
    config.intermediate_size = 24;
    config.extra.insert("bos_token_id".into(), 0.into());
    config.extra.insert("eos_token_id".into(), 1.into());
    config.validate().unwrap();
    config
}

/// The same weights for every test.
fn model() -> M1 {
    // Drawn once: the generator is the process's, and tests that draw at once would share its stream.
    static MODEL: std::sync::OnceLock<M1> = std::sync::OnceLock::new();
    let draw = || {
        let device = Device::flex();
        device.seed(7);
        M1::new(&micro(), &device).materialize()
    };
    MODEL.get_or_init(draw).clone()
}

fn trainer(micro_tokens: usize, threads: usize) -> Trainer {
    Trainer::new(model(), OptimizerSettings::default(), micro_tokens, threads, 0).unwrap()
}

/// Copy tasks: a few ids, a separator, the same ids again; only the copy is to be learned.
fn examples(count: u32) -> Vec<Example> {
    let example = |i: u32| {
        let len = 3 + i % 4;
        let word: Vec<u32> = (0..len).map(|j| 4 + (i * 7 + j * j * 3 + j) % 24).collect();
        let mut ids = vec![0];
        ids.extend(&word);
        ids.push(2);
        let prompt = ids.len();
        ids.extend(&word);
        ids.push(1);
        let loss = (0..ids.len()).map(|t| t >= prompt).collect();
        Example { ids, loss }
    };
    (0..count).map(example).collect()
}

fn weights(trainer: &Trainer) -> Vec<Vec<u32>> {
    let bits = |v: burn::tensor::Tensor<1>| v.into_data().iter::<f32>().map(f32::to_bits).collect();
    parameters::values(trainer.model()).into_iter().map(bits).collect()
}

#[test]
fn one_batch_is_learned_by_heart() {
    let mut trainer = trainer(64, 2);
    let batch = examples(6);
    let first = trainer.step(&batch, 5e-3).unwrap().loss;
    // Nothing is known yet: the loss is that of a uniform guess, ln 32 = 3.47.
    assert!((first - 32f64.ln()).abs() < 0.35, "{first}");
    let mut last = first;
    for _ in 0..300 {
        last = trainer.step(&batch, 5e-3).unwrap().loss;
    }
    assert!(last < 0.05, "from {first} to {last}");
}

#[test]
fn threads_change_no_bit_and_parts_only_the_rounding() {
    let batch = examples(24);
    let run = |micro_tokens, threads| {
        let mut trainer = trainer(micro_tokens, threads);
        let losses: Vec<f64> = (0..3).map(|_| trainer.step(&batch, 1e-3).unwrap().loss).collect();
        (losses, weights(&trainer))
    };
    let (losses, one) = run(64, 1);
    assert_eq!(run(64, 1).1, one, "the same run twice");
    assert_eq!(run(64, 3).1, one, "three threads");
    let whole = run(1 << 20, 1).0;
    for (a, b) in losses.iter().zip(&whole) {
        assert!((a - b).abs() < 2e-4, "{losses:?} {whole:?}");
    }
}

#[test]
fn the_loss_is_the_mean_over_the_tokens_to_be_learned() {
    // Two examples alone, weighted by their tokens, against both in one step.
    let batch = examples(2);
    let count = |e: &Example| e.loss.iter().filter(|&&l| l).count() as f64;
    let model = model();
    let sum = |examples: &[&Example]| {
        let loss = cross_entropy_sum(&model, examples, &mut Trace::none());
        f64::from(loss.into_scalar::<f32>())
    };
    let apart = (sum(&[&batch[0]]) + sum(&[&batch[1]])) / (count(&batch[0]) + count(&batch[1]));
    let together = trainer(1 << 20, 1).step(&batch, 1e-3).unwrap().loss;
    assert!((apart - together).abs() < 1e-4, "{apart} {together}");
}

#[test]
fn nothing_to_learn_is_an_error_that_names_the_step() {
    let mut batch = examples(1);
    batch[0].loss.fill(false);
    let error = trainer(64, 1).step(&batch, 1e-3).unwrap_err();
    assert!(matches!(error, TrainError::NothingToLearn { step: 1, examples: 1 }), "{error}");
}

/// Layers run again in the backward pass: the same loss and gradients to rounding, on texts of different lengths.
#[test]
fn gradient_checkpointing_changes_only_the_rounding() {
    let batch = examples(24);
    let run = |on: bool| {
        let mut trainer = trainer(64, 2).with_gradient_checkpointing(on);
        let first = trainer.step(&batch, 1e-3).unwrap();
        let weights: Vec<f32> = weights(&trainer).concat().into_iter().map(f32::from_bits).collect();
        (first, weights, trainer.step(&batch, 1e-3).unwrap().loss)
    };
    let ((plain, weights, after), (again, weights_again, after_again)) = (run(false), run(true));
    assert!((plain.loss - again.loss).abs() < 1e-5 && (plain.aux_loss - again.aux_loss).abs() < 1e-6);
    assert!((plain.grad_norm / again.grad_norm - 1.0).abs() < 1e-4, "{plain:?} {again:?}");
    assert_eq!(plain.expert_load_max, again.expert_load_max);
    // AdamW's first step moves every weight by lr or not at all, so a gradient of nearly zero may go the other way.
    let differ = weights.iter().zip(&weights_again).filter(|(a, b)| (*a - *b).abs() > 2e-5).count();
    assert!(differ * 200 < weights.len(), "{differ} of {} weights", weights.len());
    assert!((after - after_again).abs() < 1e-4, "{after} {after_again}");
}

/// Computed in bf16 with masters in f32: the loss is that of f32 to bf16's rounding, and steps too small for a bf16 add up.
#[test]
fn bf16_has_masters_in_f32() {
    let batch = examples(24);
    let mut plain = trainer(64, 2);
    let mut rounded = trainer(64, 2).with_bf16(true);
    let (f32, bf16) = (plain.step(&batch, 1e-6).unwrap(), rounded.step(&batch, 1e-6).unwrap());
    assert!((f32.loss - bf16.loss).abs() < 0.02 && f32.loss != bf16.loss, "{} {}", f32.loss, bf16.loss);
    assert!((f32.grad_norm / bf16.grad_norm - 1.0).abs() < 0.1, "{} {}", f32.grad_norm, bf16.grad_norm);
    let values = |trainer: &Trainer| weights(trainer).concat().into_iter().map(f32::from_bits).collect::<Vec<_>>();
    let start = values(&trainer(64, 1));
    // A bf16 near 0.2 tells 0.001 apart; a step of 1e-6 is kept all the same.
    let moved = values(&rounded).iter().zip(&start).filter(|(a, b)| a != b).count();
    assert!(moved * 2 > start.len(), "{moved} of {}", start.len());
    assert!(values(&rounded).iter().zip(&start).all(|(a, b)| (a - b).abs() < 1e-5));
    let mut last = 0.0;
    for _ in 0..300 {
        last = rounded.step(&batch[..6], 5e-3).unwrap().loss;
    }
    assert!(last < 0.1, "{last}");
}
