//! Rollouts of the model that ships: the same whatever the batch, and with probabilities that the training forward finds
//! again.

use std::path::{Path, PathBuf};

use burn::tensor::{DType, Device, Tensor};
use m1_infer::sampler::SamplingOptions;
use m1_infer::tokenizer::Tokenizer;
use m1_kernels::log_prob::log_prob;
use m1_model::checkpoint::{self, LoadOptions, WeightDtype};
use m1_model::{Batch, M1, Trace};
use m1_train::data::{Data, DataConfig};
use m1_train::generate::{Ending, GenerateOptions, Repetition};
use m1_train::mismatch::{Mismatch, MismatchReport};
use m1_train::rollout::{Ask, Draws, Rollout, plain_sampling, rollouts};
use m1_train::{parameters, tasks};

fn nano() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/m1-nano")
}

/// The model as training holds it.
fn trained() -> M1 {
    let options = LoadOptions { dtype: Some(WeightDtype::F32), tensors: true, ..LoadOptions::default() };
    checkpoint::load(&nano(), &Device::flex(), &options).unwrap()
}

fn asks(problems: u64) -> Vec<Ask> {
    let data =
        Data::new(DataConfig::default(), tokenizers::Tokenizer::from_file(nano().join("tokenizer.json")).unwrap());
    let data = data.unwrap();
    let mut asks = Vec::new();
    // Hard ones of every kind, where the model is not sure of every token.
    for index in 0..problems {
        let task = tasks::all()[index as usize * 3 % tasks::all().len()];
        let problem = data.eval_problem(task, 7, index).unwrap().unwrap();
        asks.push(Ask { problem: 100 + index, prompt: data.prompt(&problem).unwrap() });
    }
    asks
}

fn options(rows: usize) -> GenerateOptions {
    let tokenizer = Tokenizer::from_dir(&nano()).unwrap();
    GenerateOptions {
        sampling: plain_sampling(),
        allowed: None,
        end_ids: vec![tokenizer.id("<end_of_sentence>").unwrap()],
        max_new_tokens: 120,
        repetition: None,
        rows,
        context: None,
        stop: None,
    }
}

fn draw(model: &M1, asks: &[Ask], draws: Draws, options: &GenerateOptions, threads: usize) -> Vec<Vec<Rollout>> {
    let pool = |_| rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let pools: Vec<rayon::ThreadPool> = (0..threads).map(pool).collect();
    rollouts(model, asks, draws, options, &pools, &|_, _| ()).unwrap()
}

const DRAWS: Draws = Draws { run_seed: 5, step: 3, samples: 5 };

#[test]
fn the_same_rollouts_whatever_the_rows_the_workers_and_the_neighbours() {
    let model = trained().packed().unwrap();
    let asks = asks(4);
    let wanted = draw(&model, &asks, DRAWS, &options(64), 1);
    for (rows, threads) in [(1, 0), (3, 2), (7, 1), (64, 3)] {
        assert_eq!(draw(&model, &asks, DRAWS, &options(rows), threads), wanted, "{rows} rows, {threads} workers");
    }
    // One problem alone (its group is then split over the workers), and a group of other size.
    assert_eq!(draw(&model, &asks[2..3], DRAWS, &options(8), 2)[0], wanted[2]);
    let fewer = draw(&model, &asks[..1], Draws { samples: 2, ..DRAWS }, &options(8), 1);
    assert_eq!(fewer[0], wanted[0][..2]);

    // Another step draws others; samples of a group differ.
    let other = draw(&model, &asks[..1], Draws { step: 4, ..DRAWS }, &options(8), 1);
    assert!(other[0].iter().zip(&wanted[0]).any(|(a, b)| a.response != b.response));
    for group in &wanted {
        assert!(group.iter().any(|rollout| rollout.response != group[0].response), "seeds of their own");
    }
    let end = options(1).end_ids[0];
    for (rollout, ask) in wanted.iter().flatten().zip(asks.iter().flat_map(|ask| [ask; DRAWS.samples])) {
        assert_eq!((rollout.problem, &rollout.prompt), (ask.problem, &ask.prompt));
        assert_eq!(rollout.response.len(), rollout.log_probs.len());
        assert_eq!(rollout.ending == Ending::End, rollout.response.last() == Some(&end));
        assert!(!rollout.text().contains(&end));
        assert!(rollout.ending == Ending::End || rollout.response.len() == 120);
    }
    assert!(wanted.iter().flatten().any(|rollout| rollout.ending == Ending::End));
}

#[test]
fn a_response_is_cut_at_the_window_at_the_context_and_where_it_is_too_certain() {
    let model = trained().packed().unwrap();
    let asks = asks(2);
    let whole = draw(&model, &asks, DRAWS, &options(10), 1);
    let cut = |change: &dyn Fn(&mut GenerateOptions)| {
        let mut options = options(10);
        change(&mut options);
        draw(&model, &asks, DRAWS, &options, 1)
    };
    let window = cut(&|o| o.max_new_tokens = 9);
    let repetition = Repetition { count: 4, threshold: 0.9 };
    let certain = cut(&|o| o.repetition = Some(repetition));
    let never = cut(&|o| o.repetition = Some(Repetition { threshold: 1.0, ..repetition }));
    let context = cut(&|o| o.context = Some(asks[0].prompt.len().max(asks[1].prompt.len()) + 5));
    assert_eq!(never, whole);
    let mut repeated = 0;
    for (i, whole) in whole.iter().flatten().enumerate() {
        let same = |other: &Rollout| {
            let n = other.response.len();
            assert_eq!((&other.response[..], &other.log_probs[..]), (&whole.response[..n], &whole.log_probs[..n]));
            n
        };
        let at = |groups: &[Vec<Rollout>]| groups[i / DRAWS.samples][i % DRAWS.samples].clone();
        let window = at(&window);
        assert_eq!(same(&window), whole.response.len().min(9));
        assert_eq!(window.ending, if whole.response.len() < 9 { whole.ending } else { window.ending });
        let context = at(&context);
        assert!(same(&context) <= 5 + asks[0].prompt.len().abs_diff(asks[1].prompt.len()));
        assert!(matches!(context.ending, Ending::Context | Ending::End));

        // The first four tokens in a row above 0.9, unless it ended before or with the last of them.
        let sure: Vec<bool> = whole.log_probs.iter().map(|l| l.exp() > 0.9).collect();
        let first = (4..=sure.len()).find(|&n| sure[n - 4..n].iter().all(|&s| s));
        let certain = at(&certain);
        match first {
            Some(n) if n < whole.response.len() => {
                assert_eq!((same(&certain), certain.ending), (n, Ending::Repetition));
                repeated += 1;
            }
            _ => assert_eq!(certain, *whole),
        }
    }
    assert!(repeated > 0);
}

#[test]
fn a_prompt_that_cannot_be_continued_is_named() {
    let model = trained();
    let mut asks = asks(2);
    let fails = |asks: &[Ask], options: &GenerateOptions| {
        rollouts(&model, asks, DRAWS, options, &[], &|_, _| ()).unwrap_err().to_string()
    };
    let n = asks[0].prompt.len().min(asks[1].prompt.len());
    let text = fails(&asks, &GenerateOptions { context: Some(n), ..options(4) });
    assert!(text.contains("prompt 0: the text has") && text.contains("no room for a reply"), "{text}");
    asks[1].prompt = vec![9999];
    assert_eq!(fails(&asks, &options(4)), "prompt 1: token 0 has id 9999, and the model's vocabulary ends at 1279");
    let sampling = SamplingOptions { top_p: 0.0, ..plain_sampling() };
    let stop = Some(std::sync::Arc::new(std::sync::atomic::AtomicBool::new(true)));
    assert_eq!(fails(&asks[..1], &GenerateOptions { stop, ..options(4) }), "interrupted");
    assert!(fails(&asks, &GenerateOptions { sampling, ..options(4) }).starts_with("top_p is 0"));
}

/// log π of every response token in the training forward, all rollouts in one micro-batch.
fn trained_log_probs(model: &M1, rollouts: &[&Rollout]) -> Vec<f32> {
    let model = parameters::tracked(model);
    let (mut rows, mut offsets, mut next) = (Vec::new(), Vec::new(), Vec::new());
    for rollout in rollouts {
        let text = [&rollout.prompt[..], &rollout.response].concat();
        offsets.push((rollout.prompt.len() - 1..text.len() - 1).collect());
        next.extend_from_slice(&rollout.response);
        rows.push(text[..text.len() - 1].to_vec());
    }
    let hidden = model.forward(&Batch::new(rows).at(offsets), None, &mut Trace::router());
    assert!(hidden.device().is_autodiff());
    let (log_probs, _) = log_prob(hidden, &model.lm_head.weight.value(), &next, 1.0);
    log_probs.inner().into_data().try_to_vec().unwrap()
}

/// log π at generation by an engine whose head is in bf16: hidden states, weights and logits are rounded to it.
fn bf16_head_log_probs(model: &M1, rollout: &Rollout) -> Vec<f32> {
    let bf16 = |x: Tensor<2>| x.cast(DType::BF16).cast(DType::F32);
    let text = [&rollout.prompt[..], &rollout.response].concat();
    let at = (rollout.prompt.len() - 1..text.len() - 1).collect();
    let batch = Batch::new(vec![text[..text.len() - 1].to_vec()]).at(vec![at]);
    let hidden = model.forward(&batch, None, &mut Trace::none());
    let head = bf16(model.lm_head.weight.val());
    let logits = bf16(bf16(hidden).matmul(head.transpose()));
    let logits: Vec<f32> = logits.into_data().try_to_vec().unwrap();
    let rows = logits.chunks_exact(model.config().vocab_size);
    rows.zip(&rollout.response).map(|(row, &id)| m1_infer::sampler::log_prob(row, id)).collect()
}

#[test]
fn generation_and_training_find_the_same_probabilities_and_a_bf16_head_does_not() {
    let model = trained();
    let engine = model.packed().unwrap();
    let groups = draw(&engine, &asks(8), Draws { samples: 4, ..DRAWS }, &options(32), 2);
    let rollouts: Vec<&Rollout> = groups.iter().flatten().collect();
    let training = trained_log_probs(&model, &rollouts);
    let (mut ours, mut bf16, mut from) = (Mismatch::default(), Mismatch::default(), 0);
    for rollout in &rollouts {
        let training = &training[from..from + rollout.response.len()];
        from += rollout.response.len();
        ours.add_log_probs(&rollout.log_probs, training);
        bf16.add_log_probs(&bf16_head_log_probs(&model, rollout), training);
    }
    assert_eq!(from, training.len());
    let [ours, bf16]: [MismatchReport; 2] = [ours.report(), bf16.report()];
    println!("f32 head: {ours:?}\nbf16 head: {bf16:?}");
    assert!(ours.tokens > 1000 && ours.invalid == 0 && bf16.invalid == 0);
    assert!(ours.pearson.unwrap() >= 0.9999, "{ours:?}");
    assert!(ours.max_difference < 1e-3, "{ours:?}");
    assert!(1.0 - bf16.pearson.unwrap() > 10.0 * (1.0 - ours.pearson.unwrap()), "{bf16:?} {ours:?}");
    assert!(bf16.max_difference > 10.0 * ours.max_difference, "{bf16:?} {ours:?}");
    assert!(bf16.mean_difference > 10.0 * ours.mean_difference, "{bf16:?} {ours:?}");
}
