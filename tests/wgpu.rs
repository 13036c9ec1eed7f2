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

    // Past one block, so that states and blocks of keys and values are carried over. Few lengths: each new one autotunes.
    paths::whole(&model, &golden, 260);
    paths::chunks(&model, &golden, 260, &[130]);
    note("whole and chunks");
    paths::chunks(&model, &golden, 24, &[1]);
    paths::decode_after_prefill(&model, &golden, 265, 260, 130);
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
        "one_softmax",
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
