//! Prefill holds no score matrix of all tokens by all tokens: its peak memory, as Linux counts it for this process.
//!
//! Its own binary with one test, because the peak is the process's.

#![cfg(target_os = "linux")]

use burn::tensor::Device;
use m1_infer::memory;
use m1_model::{Batch, M1, Trace};
use m1_tests::golden::Golden;

#[test]
fn prefill_is_not_quadratic_in_memory() {
    let golden = Golden::open("long");
    let model: M1 = golden.model(&Device::flex());
    let text = |n: usize| Batch::new(vec![golden.tokens.iter().cycle().take(n).copied().collect()]).last();
    model.forward(&text(300), None, &mut Trace::none());
    let peak = || memory::peak().expect("Linux tells");
    let before = peak();
    let tokens = 12_000;
    model.forward(&text(tokens), None, &mut Trace::none());
    let grown = peak() - before;
    // One [tokens, tokens] matrix for each of 4 heads would be 2.3 GB.
    let quadratic = 4 * golden.config.num_attention_heads as u64 * (tokens as u64).pow(2);
    eprintln!(
        "prefill of {tokens} tokens: peak grew by {} MB; all scores at once: {} MB",
        grown >> 20,
        quadratic >> 20
    );
    assert!(grown < quadratic / 8, "peak memory grew by {grown} bytes");
}
