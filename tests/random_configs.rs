//! Random shapes and random weights: a text in random chunks, among other rows, gives the logits of the text in one piece.
//!
//! Its own binary with one test: the device's random generator is shared by a process.

use burn::tensor::Device;
use burn::tensor::activation::softmax;
use m1_model::{Batch, Cache, M1, ModelConfig, Trace};
use m1_tests::{largest, values};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;

const CONFIGS: u64 = 40;

fn config(rng: &mut ChaCha8Rng) -> ModelConfig {
    let layers = rng.random_range(1..=4);
    let kinds: Vec<u8> = (0..layers).map(|_| rng.random_range(0..=1)).collect();
    let kv_heads = rng.random_range(1..=3);
    let heads = kv_heads * rng.random_range(1..=3);
    let head_dim = 2 * rng.random_range(2..=8);
    let experts = rng.random_range(2..=5);
    let mut factor = || f64::from(rng.random_range(5..=30)) / 10.0;
    let factors = [factor(), factor(), factor(), factor(), factor(), factor()];
    let text = json!({
        "model_type": "minimax_m1", "attn_type_list": kinds, "num_hidden_layers": layers,
        "vocab_size": rng.random_range(8..=70), "hidden_size": rng.random_range(8..=40),
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim,
        "rotary_dim": 2 * rng.random_range(1..=head_dim / 2), "rope_theta": 10000000, "rms_norm_eps": 1e-5,
        "intermediate_size": rng.random_range(4..=40), "num_local_experts": experts,
        "num_experts_per_tok": rng.random_range(1..=experts), "postnorm": rng.random_range(0..4) > 0,
        "layernorm_full_attention_alpha": factors[0], "layernorm_full_attention_beta": factors[1],
        "layernorm_linear_attention_alpha": factors[2], "layernorm_linear_attention_beta": factors[3],
        "layernorm_mlp_alpha": factors[4], "layernorm_mlp_beta": factors[5],
        "max_position_embeddings": 4096, "router_aux_loss_coef": 0.001, "tie_word_embeddings": false,
        "hidden_act": "silu", "initializer_range": 0.02, "shared_intermediate_size": 0,
    });
    ModelConfig::from_json(&text.to_string()).unwrap_or_else(|e| panic!("{e}: {text}"))
}

/// Smallest distance between the last probability chosen and the first left out.
fn narrowest_choice(trace: &Trace, config: &ModelConfig) -> f64 {
    let k = config.num_experts_per_tok;
    let mut gap = f64::INFINITY;
    for logits in &trace.router_logits {
        for row in values(&softmax(logits.clone(), 1)).chunks_mut(config.num_local_experts) {
            row.sort_by(|a, b| b.total_cmp(a));
            if k < row.len() {
                gap = gap.min(row[k - 1] - row[k]);
            }
        }
    }
    gap
}

#[test]
fn chunks_equal_the_whole() {
    let device = Device::flex();
    let (mut worst, mut compared) = (0f64, 0);
    for seed in 0..CONFIGS {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let config = config(&mut rng);
        device.seed(seed);
        let model = M1::new(&config, &device);
        let longest = if seed % 8 == 0 { 600 } else { 90 };
        let rows: Vec<Vec<u32>> = (0..rng.random_range(1..=3))
            .map(|_| {
                let n = rng.random_range(1..=longest);
                (0..n).map(|_| rng.random_range(0..config.vocab_size as u32)).collect()
            })
            .collect();

        let mut trace = Trace::router();
        let whole: Vec<Vec<f64>> = rows
            .iter()
            .map(|row| values(&model.logits(model.forward(&Batch::new(vec![row.clone()]), None, &mut trace))))
            .collect();
        // Where two experts are all but equal, rounding may choose either: that is no error.
        if narrowest_choice(&trace, &config) < 1e-5 {
            continue;
        }
        compared += 1;

        let mut cache = Cache::new(&model, rows.len());
        let mut got = vec![Vec::new(); rows.len()];
        let mut read = vec![0; rows.len()];
        while (0..rows.len()).any(|i| read[i] < rows[i].len()) {
            let take: Vec<usize> =
                (0..rows.len()).map(|i| rng.random_range(0..=longest / 3).min(rows[i].len() - read[i])).collect();
            let new = (0..rows.len()).map(|i| rows[i][read[i]..read[i] + take[i]].to_vec()).collect();
            let logits = values(&model.logits(model.forward(&Batch::new(new), Some(&mut cache), &mut Trace::none())));
            let mut logits = logits.chunks(config.vocab_size);
            for (i, &n) in take.iter().enumerate() {
                got[i].extend(logits.by_ref().take(n).flatten().copied());
                read[i] += n;
            }
        }
        for (i, (got, want)) in got.iter().zip(&whole).enumerate() {
            assert_eq!(got.len(), want.len(), "seed {seed}, row {i}");
            let error = largest(got.iter().zip(want).map(|(g, w)| g - w)) / largest(want.iter().copied());
            assert!(error <= 1e-4, "seed {seed}, row {i}: off by {error:.1e}, relative; {config:?}");
            worst = worst.max(error);
        }
    }
    eprintln!("{compared} of {CONFIGS} random configurations compared, worst relative error {worst:.1e}");
    assert!(compared >= CONFIGS / 2, "too few configurations were clear of ties: {compared}");
}
