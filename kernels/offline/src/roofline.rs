//! What M1's layers must cost at least on an H800 or H100: bytes, FLOPs and the time that neither memory nor arithmetic
//! can beat, per operation and for all 80 layers. Arithmetic from the released configuration; nothing is measured here.

use std::fmt::Write;

/// A device's limits, from NVIDIA's data sheets. The H800 differs from the H100 in NVLink (400 instead of 900 GB/s) and
/// f64, which no kernel here uses: one table serves both.
struct Device {
    name: &'static str,
    /// Bytes a second of HBM3.
    memory: f64,
    /// FLOP/s of dense bf16 tensor cores.
    tensor: f64,
    /// FLOP/s of f32 without tensor cores.
    f32: f64,
}

const H800: Device = Device { name: "H800 / H100 SXM", memory: 3.35e12, tensor: 989e12, f32: 67e12 };

// The released model (config.json).
const HIDDEN: f64 = 6144.0;
const HEADS: f64 = 64.0;
const KV_HEADS: f64 = 8.0;
const DIM: f64 = 128.0;
const INNER: f64 = HEADS * DIM;
const FFN: f64 = 9216.0;
const EXPERTS: f64 = 32.0;
const CHOSEN: f64 = 2.0;
const VOCAB: f64 = 200_064.0;
const LIGHTNING_LAYERS: f64 = 70.0;
const SOFTMAX_LAYERS: f64 = 10.0;
/// Bytes of an activation or weight (bf16) and of a state or logit (f32).
const HALF: f64 = 2.0;
const FULL: f64 = 4.0;
/// Tokens per block of lightning attention on the device.
const BLOCK: f64 = 64.0;

#[derive(Clone, Copy, PartialEq)]
enum Arithmetic {
    Tensor,
    F32,
}

struct Op {
    name: &'static str,
    bytes: f64,
    flops: f64,
    arithmetic: Arithmetic,
    /// How often the 80 layers (and the head) run it.
    count: f64,
}

impl Op {
    fn floor_us(&self, device: &Device) -> (f64, &'static str) {
        let rate = if self.arithmetic == Arithmetic::Tensor { device.tensor } else { device.f32 };
        let (memory, arithmetic) = (self.bytes / device.memory * 1e6, self.flops / rate * 1e6);
        if memory >= arithmetic { (memory, "memory") } else { (arithmetic, "FLOPs") }
    }
}

/// What a step works on.
#[derive(Clone, Copy)]
enum Step {
    /// One token for each of `rows` sequences.
    Decode { rows: f64 },
    /// `tokens` of one sequence at once.
    Prefill { tokens: f64 },
}

/// A product with a weight `[out, in]` that is read once.
fn product(name: &'static str, count: f64, n: f64, input: f64, out: f64) -> Op {
    let bytes = (out * input + n * (input + out)) * HALF;
    Op { name, bytes, flops: 2.0 * n * input * out, arithmetic: Arithmetic::Tensor, count }
}

/// Experts of which at least one of `n` tokens asks, if every choice is equally likely.
fn touched(n: f64) -> f64 {
    EXPERTS * (1.0 - (1.0 - CHOSEN / EXPERTS).powf(n))
}

fn operations(step: Step, context: f64) -> Vec<Op> {
    let n = match step {
        Step::Decode { rows } => rows,
        Step::Prefill { tokens } => tokens,
    };
    let layers = LIGHTNING_LAYERS + SOFTMAX_LAYERS;
    let state = HEADS * DIM * DIM;
    let lightning = match step {
        // The state is read and written once; decay, k·v and q·S meet each entry.
        Step::Decode { rows } => Op {
            name: "lightning attention, decode (silu, norm, gate)",
            bytes: rows * (2.0 * state * FULL + 5.0 * INNER * HALF),
            flops: rows * state * 5.0,
            arithmetic: Arithmetic::F32,
            count: LIGHTNING_LAYERS,
        },
        // Per token and head: q·kᵀ and scores·v over the block, q·S and kᵀ·v over the state.
        Step::Prefill { tokens } => Op {
            name: "lightning attention, blocks of 64",
            bytes: tokens * 4.0 * INNER * HALF + 2.0 * state * FULL,
            flops: tokens * HEADS * (4.0 * BLOCK * DIM + 4.0 * DIM * DIM),
            arithmetic: Arithmetic::Tensor,
            count: LIGHTNING_LAYERS,
        },
    };
    let keys = match step {
        Step::Decode { .. } => context + 1.0,
        Step::Prefill { tokens } => context + (tokens + 1.0) / 2.0,
    };
    let (sequences, span) = match step {
        Step::Decode { rows } => (rows, context + 1.0),
        Step::Prefill { tokens } => (1.0, context + tokens),
    };
    let experts = touched(n);
    vec![
        Op {
            name: "norm, twice, with the residual",
            bytes: 2.0 * n * HIDDEN * 4.0 * HALF,
            flops: 2.0 * n * HIDDEN * 7.0,
            arithmetic: Arithmetic::F32,
            count: layers,
        },
        product("qkv_proj [24576, 6144]", LIGHTNING_LAYERS, n, HIDDEN, 3.0 * INNER),
        product("output_gate [8192, 6144]", LIGHTNING_LAYERS, n, HIDDEN, INNER),
        lightning,
        product("out_proj / o_proj [6144, 8192]", layers, n, INNER, HIDDEN),
        product("q_proj [8192, 6144]", SOFTMAX_LAYERS, n, HIDDEN, INNER),
        product("k_proj and v_proj [2048, 6144]", SOFTMAX_LAYERS, n, HIDDEN, 2.0 * KV_HEADS * DIM),
        Op {
            name: "softmax attention over the cache (with rotary)",
            bytes: sequences * span * 2.0 * KV_HEADS * DIM * HALF + n * 2.0 * INNER * HALF,
            flops: n * keys * 4.0 * INNER,
            arithmetic: Arithmetic::Tensor,
            count: SOFTMAX_LAYERS,
        },
        Op {
            name: "router [32, 6144], f32",
            bytes: EXPERTS * HIDDEN * FULL + n * (HIDDEN * HALF + EXPERTS * FULL),
            flops: 2.0 * n * HIDDEN * EXPERTS,
            arithmetic: Arithmetic::F32,
            count: layers,
        },
        Op {
            name: "experts, 2 of 32 × 3 × [9216, 6144]",
            bytes: (experts * 3.0 * FFN * HIDDEN + n * (HIDDEN + CHOSEN * (2.0 * FFN + HIDDEN))) * HALF,
            flops: 2.0 * n * CHOSEN * 3.0 * FFN * HIDDEN,
            arithmetic: Arithmetic::Tensor,
            count: layers,
        },
        Op {
            name: "head [200064, 6144], f32, for the last token of each sequence",
            bytes: VOCAB * HIDDEN * HALF + sequences * VOCAB * FULL,
            flops: 2.0 * sequences * VOCAB * HIDDEN,
            arithmetic: Arithmetic::F32,
            count: 1.0,
        },
    ]
}

fn quantity(value: f64, unit: &str) -> String {
    let scales = [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")];
    let (scale, prefix) = scales.into_iter().find(|(scale, _)| value >= *scale).unwrap_or((1.0, ""));
    format!("{:.3} {prefix}{unit}", value / scale)
}

/// The tables as Markdown.
pub fn tables() -> String {
    let mut text = String::new();
    let d = &H800;
    let _ = writeln!(
        text,
        "Limits of one {}: {:.2} TB/s, {:.0} TFLOP/s in bf16 tensor cores, {:.0} TFLOP/s in f32. Floor = the longer of bytes / \
         bandwidth and FLOPs / rate, as if one device held everything; over 8 devices divide by 8 (and add the links). Experts \
         touched by a batch: 32·(1 - (30/32)^tokens), 2 for one token.\n\nAssumed: weights, activations (q, k, v and attention's \
         output among them) and the cache of keys and values in bf16, multiplied on tensor cores; the lightning state, the router \
         and the logits in f32.\n",
        d.name,
        d.memory / 1e12,
        d.tensor / 1e12,
        d.f32 / 1e12
    );
    let steps = [
        ("decode, batch 1, context 16,384", Step::Decode { rows: 1.0 }, 16_384.0),
        ("decode, batch 16, context 16,384", Step::Decode { rows: 16.0 }, 16_384.0),
        ("decode, batch 64, context 16,384", Step::Decode { rows: 64.0 }, 16_384.0),
        ("prefill, a chunk of 4,096 after 16,384", Step::Prefill { tokens: 4096.0 }, 16_384.0),
    ];
    for (title, step, context) in steps {
        let _ = writeln!(text, "### {title}\n\n| operation | bytes | FLOPs | floor µs | bound by | times | all, µs |");
        let _ = writeln!(text, "|---|---|---|---|---|---|---|");
        let (mut bytes, mut flops, mut time) = (0.0, 0.0, 0.0);
        for op in operations(step, context) {
            let (floor, bound) = op.floor_us(d);
            let _ = writeln!(
                text,
                "| {} | {} | {} | {floor:.2} | {bound} | {} | {:.0} |",
                op.name,
                quantity(op.bytes, "B"),
                quantity(op.flops, "FLOP"),
                op.count,
                floor * op.count
            );
            bytes += op.bytes * op.count;
            flops += op.flops * op.count;
            time += floor * op.count;
        }
        let (all_bytes, all_flops) = (quantity(bytes, "B"), quantity(flops, "FLOP"));
        let _ = writeln!(text, "| **80 layers and head** | {all_bytes} | {all_flops} | | | | **{time:.0}** |\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_token_reads_the_active_weights_once() {
        let decode = operations(Step::Decode { rows: 1.0 }, 0.0);
        let weights: f64 = decode
            .iter()
            .filter(|op| op.name.contains("6144]") || op.name.contains("8192]"))
            .map(|op| op.bytes * op.count)
            .sum();
        // 45.9 B active parameters and the head's 1.23 B, in bf16; routers in f32; activations are the small rest.
        let expected = (45.945e9 + VOCAB * HIDDEN) * HALF;
        assert!((weights / expected - 1.0).abs() < 2e-3, "{weights} instead of {expected}");
        let flops: f64 = decode.iter().map(|op| op.flops * op.count).sum();
        assert!((flops / (2.0 * 45.945e9 + 2.0 * VOCAB * HIDDEN) - 1.0).abs() < 1e-2, "{flops}");
    }

    #[test]
    fn touched_experts_run_from_the_chosen_to_all() {
        assert!((touched(1.0) - CHOSEN).abs() < 1e-9);
        assert!(touched(64.0) > 31.0 && touched(4096.0) <= EXPERTS);
    }
}
