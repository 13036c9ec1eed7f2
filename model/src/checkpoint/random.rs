//! Weights of no file: drawn row by row when they are read, so that they go into the form that computes as a checkpoint's
//! do, and are never in memory twice. What a model costs in time and memory does not depend on what it says.

use std::path::Path;

use burn::tensor::Device;

use super::directory::Checked;
use super::error::CheckpointError;
use super::names::{Role, tensors};
use super::read::{LoadOptions, build, check_bf16};
use super::rows::Rows;
use crate::config::ModelConfig;
use crate::model::M1;

/// A model of this configuration with random weights, as if they had been stored in bf16: matrices about normal with
/// deviation `1 / √in` (the embedding 1), norms 1. The same seed gives the same weights in every form, whatever the number of
/// threads.
///
/// # Errors
/// If the options ask for what the device or the sizes do not allow, or there is not enough memory for packed weights.
pub fn random(config: &ModelConfig, seed: u64, device: &Device, options: &LoadOptions) -> Result<M1, CheckpointError> {
    check_bf16(device, options)?;
    if let Some(quantization) = options.quantize
        && let Some((key, width)) = quantization.undivided(config)
    {
        return Err(CheckpointError::Block { block: quantization.block, key, width });
    }
    let draw = |(i, spec): (usize, super::TensorSpec)| {
        let (rows, width) = (spec.shape[..spec.shape.len() - 1].iter().product(), spec.shape[spec.shape.len() - 1]);
        let draw = match spec.role {
            Role::Norm => Draw::Ones,
            Role::Embedding => Draw::normal(seed, i, 1.0),
            _ => Draw::normal(seed, i, 1.0 / (width as f32).sqrt()),
        };
        Checked { rows: Rows::drawn(spec.name.clone(), draw, rows, width), spec }
    };
    let all = tensors(config).into_iter().enumerate().map(draw).collect();
    build(config, Path::new("random weights"), all, device, options)
}

/// How the numbers of one matrix are made.
#[derive(Debug, Clone, Copy)]
pub(super) enum Draw {
    /// Nothing is drawn.
    Ones,
    /// A sum of uniform numbers.
    Normal {
        /// Of this matrix.
        seed: u64,
        deviation: f32,
    },
}

impl Draw {
    fn normal(seed: u64, matrix: usize, deviation: f32) -> Self {
        Self::Normal { seed: mixed(seed ^ mixed(matrix as u64)), deviation }
    }

    /// Row `row`, in numbers that bf16 holds.
    pub fn row(self, row: usize, out: &mut [f32]) {
        let Self::Normal { seed, deviation } = self else {
            return out.fill(1.0);
        };
        // The sum of four numbers that are uniform in 0..2^16 has deviation 2^16 / √3.
        let scale = deviation * 3f32.sqrt() / 65536.0;
        let mut state = mixed(seed ^ mixed(row as u64));
        for out in out {
            state = state.wrapping_add(STEP);
            let bits = mixed(state);
            // Pairs of 16 bits that do not carry into each other, then the two sums.
            let pairs = (bits & 0x0000_ffff_0000_ffff) + (bits >> 16 & 0x0000_ffff_0000_ffff);
            let sum = (pairs as u32).wrapping_add((pairs >> 32) as u32) as i32 - 2 * 65535;
            *out = f32::from_bits((sum as f32 * scale).to_bits() & 0xffff_0000);
        }
    }
}

const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// The output function of SplitMix64 (Steele, Lea and Flood 2014): neighbouring numbers become unrelated ones.
fn mixed(x: u64) -> u64 {
    let x = x.wrapping_add(STEP);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use burn::tensor::Tensor;
    use m1_kernels::{base::pool, linear};

    use super::*;
    use crate::checkpoint::{Bits, Quantization, WeightDtype};
    use crate::config::AttentionKind;
    use crate::flops;
    use crate::{Batch, Trace};

    fn two_layers() -> ModelConfig {
        let nano = ModelConfig::preset("nano").unwrap();
        nano.with_layers(&[AttentionKind::Lightning, AttentionKind::Softmax]).unwrap()
    }

    fn logits(model: &M1) -> Vec<f32> {
        let hidden = model.forward(&Batch::new(vec![(0..40).collect()]), None, &mut Trace::none());
        model.logits(hidden).into_data().try_to_vec().unwrap()
    }

    #[test]
    fn numbers_are_about_normal_and_of_their_row_alone() {
        let mut row = vec![0f32; 100_000];
        for deviation in [1.0, 0.02f32] {
            let draw = Draw::normal(7, 3, deviation);
            draw.row(5, &mut row);
            let n = row.len() as f64;
            let moment = |k: i32| row.iter().map(|x| f64::from(x / deviation).powi(k)).sum::<f64>() / n;
            assert!(moment(1).abs() < 0.01 && (moment(2) - 1.0).abs() < 0.02 && moment(3).abs() < 0.03);
            assert!((moment(4) - 2.7).abs() < 0.06, "of a sum of four, {}", moment(4));
            assert!(row.iter().all(|x| x.to_bits() & 0xffff == 0), "bf16 holds them");
            let mut other = vec![0f32; 100_000];
            draw.row(5, &mut other);
            assert_eq!(row, other);
            for draw in [Draw::normal(7, 2, deviation), Draw::normal(8, 3, deviation)] {
                draw.row(5, &mut other);
                let shared = row.iter().zip(&other).map(|(a, b)| f64::from(a * b / deviation / deviation)).sum::<f64>();
                assert!((shared / n).abs() < 0.02, "unrelated");
            }
        }
    }

    #[test]
    fn sizes_are_those_that_the_configuration_says() {
        let config = two_layers();
        let device = Device::flex();
        for (dtype, all) in [(Some(WeightDtype::F32), false), (Some(WeightDtype::Bf16), false), (None, true)] {
            for bits in [None, Some(Bits::Int8), Some(Bits::Int4)] {
                let quantize = bits.map(|bits| Quantization::new(bits, 32, all).unwrap());
                let options = LoadOptions { dtype, quantize, ..Default::default() };
                let model = random(&config, 1, &device, &options).unwrap();
                // The embedding's rows are drawn when they are asked for, and count as if they were stored in bf16.
                let embedding = (config.vocab_size * config.hidden_size) as u64;
                let stored = dtype.unwrap_or(WeightDtype::Bf16);
                let (counted, held) = match quantize {
                    None => (flops::weight_bytes(&config, stored), stored.size() as u64 * embedding),
                    Some(quantization) => {
                        let blocks = quantization.of(Role::Embedding);
                        let bytes = blocks.map(|blocks| blocks.bytes(embedding.into()).iter().sum::<u128>() as u64);
                        let held = bytes.unwrap_or(stored.size() as u64 * embedding);
                        (flops::quantized_bytes(&config, stored, &quantization), held)
                    }
                };
                // Routers of 4 rows lie in panels of 32.
                let panels = (config.num_hidden_layers * (32 - 4) * config.hidden_size * 4) as u64;
                let expected = u64::try_from(counted).unwrap() - held + 2 * embedding + panels;
                assert_eq!(model.weight_bytes(), expected, "{dtype:?} {bits:?} {all}");
                assert!(logits(&model).iter().all(|x| x.is_finite()));
            }
        }
    }

    #[test]
    fn a_seed_says_every_weight() {
        let (config, device) = (two_layers(), Device::flex());
        let of = |seed, tensors, dtype| {
            let options = LoadOptions { dtype: Some(dtype), tensors, ..Default::default() };
            random(&config, seed, &device, &options).unwrap()
        };
        let packed = of(1, false, WeightDtype::F32);
        let same = pool::with_threads(1, || of(1, false, WeightDtype::F32));
        assert_eq!(logits(&packed), logits(&same));
        assert_ne!(logits(&packed), logits(&of(2, false, WeightDtype::F32)));
        // In every form: a row of the last expert from the tensor, and from what is packed.
        let (tensors, narrow) = (of(1, true, WeightDtype::F32), of(1, false, WeightDtype::Bf16));
        let stack = |model: &M1| model.model.layers[1].block_sparse_moe.w2.clone();
        let wanted: Vec<f32> =
            stack(&tensors).val().slice([3..4, 100..101]).reshape([256]).into_data().try_to_vec().unwrap();
        for model in [&packed, &narrow] {
            let linear::Weight::Packed(packed) = stack(model).value() else { panic!("packed") };
            let mut row = vec![0f32; 256];
            packed.row(3, 100, &mut row);
            assert_eq!(row, wanted);
        }
        let norm: Tensor<1> = narrow.model.norm.weight.val();
        assert_eq!(norm.into_data().try_to_vec::<f32>().unwrap(), [1.0; 128]);
    }

    #[test]
    fn every_expert_gets_tokens() {
        let config = two_layers();
        let model = random(&config, 1, &Device::flex(), &LoadOptions::default()).unwrap();
        let mut trace = Trace::router();
        model.forward(&Batch::new(vec![(0..256).collect()]), None, &mut trace);
        for choices in &trace.choices {
            for expert in 0..4 {
                let share = choices.iter().filter(|&&choice| choice == expert).count() as f64 / choices.len() as f64;
                assert!((0.05..0.5).contains(&share), "expert {expert} gets {share}");
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_told() {
        let mut config = two_layers();
        config.intermediate_size = 96;
        let options =
            LoadOptions { quantize: Some(Quantization::new(Bits::Int8, 64, false).unwrap()), ..Default::default() };
        let said = random(&config, 1, &Device::flex(), &options).unwrap_err().to_string();
        assert_eq!(said, "blocks of 64 weights do not divide intermediate_size = 96");
        // No processor has so many addresses; nothing is drawn for this.
        (config.hidden_size, config.num_attention_heads) = (1 << 31, 1 << 14);
        let said = random(&config, 1, &Device::flex(), &LoadOptions::default()).unwrap_err().to_string();
        assert!(said.starts_with("random weights: tensor `model.layers.0.self_attn.qkv_proj.weight`"), "{said}");
        assert!(said.ends_with("no memory for 1 weights of 1572864 × 2147483648"), "{said}");
    }
}
