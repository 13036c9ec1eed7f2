//! The model on the CPU (Flex, f32) against float64, over shapes and over every path through the cache.

use std::path::PathBuf;

use burn::tensor::{Device, Tensor};
use m1_model::{Batch, Cache, M1, Trace};
use m1_tests::golden::{Golden, check_logits};
use m1_tests::paths::{self, logits};
use m1_tests::{relative_l2, values};

/// Everything that small goldens are asked on any device: whole, in chunks and token by token.
fn shape(name: &str) {
    let golden = Golden::open(name);
    let model = golden.model(&Device::flex());
    let n = golden.tokens.len();
    paths::whole(&model, &golden, n);
    paths::chunks(&model, &golden, n, &[1]);
    paths::chunks(&model, &golden, n, &[7, 1, 2, 16]);
}

macro_rules! shapes {
    ($($name:ident: $what:literal,)*) => {$(
        #[doc = $what]
        #[test]
        fn $name() {
            shape(stringify!($name));
        }
    )*};
}

shapes! {
    heads6: "6 heads, 3 kv heads: slopes off the powers of two.",
    heads3: "3 heads on 1 kv head.",
    one_lightning: "One lightning layer: its decay factor is 1 + 1e-5.",
    one_softmax: "One softmax layer.",
    all_lightning: "No softmax layer.",
    all_softmax: "No lightning layer.",
    kv_one: "One kv head for all.",
    kv_all: "As many kv heads as heads.",
    top1: "One expert a token.",
    top3: "Three of five experts.",
    prenorm: "The residual is the input of the norm.",
    unequal: "Six different alphas and betas.",
    rotary_full: "The whole head rotates.",
    wide: "Heads together wider than the model.",
    length1: "A text of one token.",
}

fn hybrid() -> (Golden, M1) {
    let golden = Golden::open("hybrid");
    let model = golden.model(&Device::flex());
    (golden, model)
}

#[test]
fn whole() {
    let (golden, model) = hybrid();
    paths::whole(&model, &golden, 640);
    paths::chosen_outputs(&model, &golden, 640);
}

#[test]
fn token_by_token() {
    let (golden, model) = hybrid();
    paths::chunks(&model, &golden, 640, &[1]);
}

#[test]
fn chunks() {
    let (golden, model) = hybrid();
    for sizes in [&[7][..], &[256], &[300], &[1, 2, 64, 3, 255, 128, 5, 65], &[257, 1, 63, 2]] {
        paths::chunks(&model, &golden, 640, sizes);
    }
}

#[test]
fn decode_after_prefill() {
    let (golden, model) = hybrid();
    paths::decode_after_prefill(&model, &golden, 640, 600, 256);
    paths::decode_after_prefill(&model, &golden, 300, 255, 100);
}

#[test]
fn rows_of_different_lengths() {
    let (golden, model) = hybrid();
    paths::uneven_rows(&model, &golden, 640);
}

#[test]
fn rows_at_different_depths() {
    let (golden, model) = hybrid();
    paths::different_depths(&model, &golden, 640);
}

#[test]
fn rows_that_come_and_go() {
    let (golden, model) = hybrid();
    paths::changing_rows(&model, &golden, 640);
}

#[test]
fn snapshots() {
    let (golden, model) = hybrid();
    paths::snapshots(&model, &golden, 640);
    paths::snapshots(&model, &golden, 48);
}

/// 4,000 tokens: in one piece and in uneven chunks; the last tokens depend on all before.
#[test]
fn long() {
    let golden = Golden::open("long");
    let model = golden.model(&Device::flex());
    let (n, first) = (golden.tokens.len(), golden.first_recorded());
    let tail: Vec<usize> = (first..n).collect();
    let whole = logits(&model, Batch::new(vec![golden.tokens.clone()]).at(vec![tail]), None);
    let error = golden.check_logits(first, &whole, "whole");
    eprintln!("long: largest logit error {error:.1e}, bound {:.1e}", golden.bound);
    let mut cache = Cache::new(&model, 1);
    for part in golden.tokens[..first].chunks(1001) {
        model.forward(&Batch::new(vec![part.to_vec()]).none(), Some(&mut cache), &mut Trace::none());
    }
    golden.check_logits(
        first,
        &logits(&model, Batch::new(vec![golden.tokens[first..].to_vec()]), Some(&mut cache)),
        "in chunks",
    );
    golden.check_cache(&cache, 0, "in chunks");
}

/// A larger checkpoint with what MiniMax's own code gives for it, where it is at hand: `../shared` beside the
/// repository, or wherever `M1_SHARED` says.
#[test]
fn minimax_own_code() {
    let shared = std::env::var_os("M1_SHARED")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared"), PathBuf::from);
    let dir = shared.join("m1/golden");
    if !dir.join("golden.safetensors").exists() {
        eprintln!("SKIPPED: no {}", dir.display());
        return;
    }
    let device = Device::flex();
    let mut golden = Golden::at(&dir, "logits_f64");
    golden.cache_after = 40;
    let model = golden.model(&device);
    let vocab = golden.config.vocab_size;
    paths::whole(&model, &golden, 640);
    paths::chunks(&model, &golden, 640, &[300, 7, 256, 1]);
    paths::uneven_rows(&model, &golden, 640);
    paths::different_depths(&model, &golden, 640);

    // Its results are f32 themselves: each side may be one bound from the truth.
    let own = |name: &str, got: &Tensor<2>| {
        check_logits(&values(got), &golden.recorded[name].values, vocab, 2.0 * golden.bound, name)
    };
    let mut cache = Cache::new(&model, 1);
    let prefill =
        own("prefill_logits", &logits(&model, Batch::new(vec![golden.tokens[..600].to_vec()]), Some(&mut cache)));
    let steps: Vec<Tensor<2>> =
        golden.tokens[600..].iter().map(|&t| logits(&model, Batch::new(vec![vec![t]]), Some(&mut cache))).collect();
    let decode = own("decode_logits", &Tensor::cat(steps, 0));
    let rows = vec![golden.tokens[..70].to_vec(), golden.tokens[100..150].to_vec()];
    let padded = own("leftpad_row1_logits", &logits(&model, Batch::new(rows), None).narrow(0, 70, 50));
    eprintln!("MiniMax's own code: prefill {prefill:.1e}, decode {decode:.1e}, padded row {padded:.1e}");

    let mut cache = Cache::new(&model, 1);
    let mut trace = Trace::hidden();
    model.forward(&Batch::new(vec![golden.tokens[..40].to_vec()]), Some(&mut cache), &mut trace);
    golden.check_cache_names(&cache, 0, "first 40 tokens", ["state", "kcache", "vcache"]);
    assert_eq!(trace.hidden.len(), 9);
    for (i, hidden) in trace.hidden.iter().enumerate() {
        let error = relative_l2(&values(hidden), &golden.recorded[&format!("hidden_{i}")].values);
        assert!(error <= 1e-4, "hidden_{i} is off by {error:.1e}");
    }
}
