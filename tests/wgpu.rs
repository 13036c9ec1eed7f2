//! The model on wgpu against float64: the same checks as on the CPU, on shorter texts, for a software driver is slow.
//!
//! One test, because the first matrix products of a process autotune for many seconds. How to run it without a GPU:
//! see `m1_tests::wgpu`.

use std::time::Instant;

use m1_tests::golden::Golden;
use m1_tests::{gradients, paths};

#[test]
fn wgpu() {
    let Some(device) = m1_tests::wgpu() else {
        return;
    };
    let start = Instant::now();
    let golden = Golden::open("hybrid");
    let model = golden.model(&device);
    let note = |what: &str| eprintln!("{:6.1} s: {what}", start.elapsed().as_secs_f64());

    // To where the state, keys and values are recorded. Few lengths: each new one autotunes.
    let all = golden.cache_after;
    paths::whole(&model, &golden, all);
    note("whole");
    paths::chunks(&model, &golden, all, &[256]);
    paths::chunks(&model, &golden, all, &[300]);
    note("large chunks");
    paths::chunks(&model, &golden, 24, &[1]);
    paths::chunks(&model, &golden, 48, &[7, 1, 16]);
    paths::decode_after_prefill(&model, &golden, 261, 256, 256);
    note("decode");
    paths::chosen_outputs(&model, &golden, 32);
    paths::uneven_rows(&model, &golden, 48);
    paths::different_depths(&model, &golden, 48);
    paths::changing_rows(&model, &golden, 48);
    note("rows");
    paths::snapshots(&model, &golden, 48);
    note("snapshots");

    for name in [
        "heads6",
        "heads3",
        "top1",
        "top3",
        "prenorm",
        "unequal",
        "rotary_full",
        "wide",
        "kv_all",
        "kv_one",
        "one_softmax",
        "one_lightning",
        "all_softmax",
        "all_lightning",
        "length1",
    ] {
        let golden = Golden::open(name);
        let model = golden.model(&device);
        paths::whole(&model, &golden, golden.tokens.len());
        note(name);
    }
    gradients::check(&device);
    note("gradients");
}
