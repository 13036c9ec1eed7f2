//! What a step of decoding allocates on the CPU, counted: activations of one token. Neither a state nor keys and values nor weights
//! are copied.
//!
//! Its own binary with one test, because the allocator is the process's.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use burn::tensor::Device;
use m1_model::checkpoint::{self, Bits, LoadOptions, Quantization, WeightDtype};
use m1_model::{Batch, Cache, ModelConfig, Trace};

/// The system's allocator, counting blocks, their bytes and the largest.
struct Counting;

static BLOCKS: AtomicUsize = AtomicUsize::new(0);
static BYTES: AtomicUsize = AtomicUsize::new(0);
static LARGEST: AtomicUsize = AtomicUsize::new(0);

fn count(bytes: usize) {
    BLOCKS.fetch_add(1, Ordering::Relaxed);
    BYTES.fetch_add(bytes, Ordering::Relaxed);
    LARGEST.fetch_max(bytes, Ordering::Relaxed);
}

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size);
        // SAFETY: the caller's promise.
        unsafe { System.realloc(block, layout, size) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn a_step_copies_no_state_no_keys_and_no_weights() {
    let config = ModelConfig {
        vocab_size: 512,
        hidden_size: 256,
        num_hidden_layers: 4,
        attn_type_list: vec![0, 1, 0, 0],
        num_attention_heads: 8,
        num_key_value_heads: 2,
        head_dim: 64,
        rotary_dim: 32,
        num_local_experts: 4,
        intermediate_size: 512,
        ..ModelConfig::preset("nano").expect("a preset")
    };
    let (state, block) = (8 * 64 * 64 * 4, 2 * 256 * 64 * 2);
    // The smallest matrices at their smallest: k and v in int4.
    let weights = 2 * 64 * 256 / 2;
    let int4 = Some(Quantization::new(Bits::Int4, 32, true).expect("a format"));
    for (dtype, quantize, kv_dtype) in [
        (Some(WeightDtype::F32), None, None),
        (Some(WeightDtype::Bf16), None, Some(WeightDtype::Bf16)),
        (None, int4, None),
    ] {
        let options = LoadOptions { dtype, quantize, kv_dtype, ..LoadOptions::default() };
        let model = checkpoint::random(&config, 1, &Device::flex(), &options).expect("random weights");
        let mut cache = Cache::new(&model, 1);
        let mut step = |ids: Vec<u32>| {
            let hidden = model.forward(&Batch::new(vec![ids]).last(), Some(&mut cache), &mut Trace::none());
            model.logits(hidden)
        };
        // Past the first block of keys, and with threads and their scratch memory there.
        step((0..300).collect());
        (0..8).for_each(|id| drop(step(vec![id])));

        let steps = 32;
        [&BLOCKS, &BYTES, &LARGEST].iter().for_each(|n| n.store(0, Ordering::Relaxed));
        (0..steps).for_each(|id| drop(step(vec![id])));
        let [blocks, bytes, largest] = [&BLOCKS, &BYTES, &LARGEST].map(|n| n.load(Ordering::Relaxed));
        let (blocks, bytes) = (blocks / steps as usize / 4, bytes / steps as usize / 4);
        eprintln!(
            "{}: a step makes {blocks} blocks a layer, {bytes} bytes in all, the largest of {largest}",
            model.form()
        );
        assert!(largest < weights.min(state).min(block), "a block of {largest} bytes in a step");
        assert!(blocks < 128 && bytes < state / 2, "{blocks} blocks, {bytes} bytes a layer");
    }
}
