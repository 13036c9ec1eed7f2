//! A golden: a checkpoint directory and what `reference.py` gives for it in float64.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor};
use m1_model::checkpoint::{self, LoadOptions, WeightDtype};
use m1_model::{Cache, M1, ModelConfig};
use safetensors::{Dtype, SafeTensors};

use crate::{largest, relative_l2, relative_max, values};

/// The recorded state, keys and values must agree to this, relative, by L2 norm and by largest magnitude.
pub const CACHE_TOLERANCE: f64 = 1e-4;

/// One tensor of a golden file, widened to f64.
#[derive(Debug, Clone)]
pub struct Recorded {
    /// Row-major sizes.
    pub shape: Vec<usize>,
    /// Row-major values.
    pub values: Vec<f64>,
}

/// A checkpoint with expected results.
#[derive(Debug)]
pub struct Golden {
    /// Name of the directory.
    pub name: String,
    /// Where the checkpoint is.
    pub dir: PathBuf,
    /// Its configuration.
    pub config: ModelConfig,
    /// The text.
    pub tokens: Vec<u32>,
    /// Everything recorded, by name.
    pub recorded: HashMap<String, Recorded>,
    /// Number of tokens after which the state, keys and values were recorded: all of them, unless set otherwise.
    pub cache_after: usize,
    /// Largest absolute error a logit may have.
    pub bound: f64,
    logits: Recorded,
}

impl Golden {
    /// One of `tests/goldens/`.
    pub fn open(name: &str) -> Self {
        Self::at(&Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens").join(name), "logits")
    }

    /// A directory in the form of `make_checkpoint.py`; `logits` names the float64 logits, of the text's last tokens.
    pub fn at(dir: &Path, logits: &str) -> Self {
        let recorded = read(&dir.join("golden.safetensors"));
        let config = ModelConfig::from_file(dir.join("config.json")).expect("a golden's config.json is valid");
        let tokens: Vec<u32> = recorded["tokens"].values.iter().map(|&t| t as u32).collect();
        let logits = recorded[logits].clone();
        let scalar = |name: &str| recorded.get(name).map(|r| r.values[0]);
        // 2e-3 at a deviation of 10, or four times what float32 costs the reference itself.
        let bound = (2e-3 * scalar("logit_std").unwrap_or_else(|| deviation(&logits.values)) / 10.0)
            .max(4.0 * scalar("f32_error").unwrap_or(0.0));
        let name = dir.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let cache_after = tokens.len();
        Self { name, dir: dir.to_path_buf(), config, tokens, recorded, cache_after, bound, logits }
    }

    /// The model in f32.
    pub fn model(&self, device: &Device) -> M1 {
        self.model_in(WeightDtype::F32, device)
    }

    /// The model with weights of `dtype`, as that device takes them by default.
    pub fn model_in(&self, dtype: WeightDtype, device: &Device) -> M1 {
        self.model_as(dtype, false, device)
    }

    /// The model with weights of `dtype`; with `tensors` they are tensors also where they would be packed.
    pub fn model_as(&self, dtype: WeightDtype, tensors: bool, device: &Device) -> M1 {
        let options = LoadOptions { dtype: Some(dtype), tensors, ..LoadOptions::default() };
        checkpoint::load(&self.dir, device, &options).unwrap_or_else(|e| panic!("{}: {e}", self.name))
    }

    /// First token whose logits are recorded.
    pub fn first_recorded(&self) -> usize {
        self.tokens.len() - self.logits.shape[0]
    }

    /// Holds logits `[n, vocab]` of the tokens from `first` on against float64's: every value within the bound, every
    /// argmax equal where float64's two best differ by more than twice the bound. Gives the largest error.
    pub fn check_logits(&self, first: usize, logits: &Tensor<2>, what: &str) -> f64 {
        let [rows, vocab] = logits.dims();
        assert_eq!(vocab, self.logits.shape[1], "{} {what}: size of the vocabulary", self.name);
        let start = (first - self.first_recorded()) * vocab;
        let want = &self.logits.values[start..start + rows * vocab];
        check_logits(&values(logits), want, vocab, self.bound, &format!("{} {what}", self.name))
    }

    /// Holds the state, keys and values of `row` against those recorded.
    pub fn check_cache(&self, cache: &Cache, row: usize, what: &str) {
        self.check_cache_names(cache, row, what, ["state", "k", "v"]);
    }

    /// As [`Golden::check_cache`] where the file has other names for the three.
    pub fn check_cache_names(&self, cache: &Cache, row: usize, what: &str, [state, k, v]: [&str; 3]) {
        let compare = |name: String, got: Vec<f64>| {
            let Some(want) = self.recorded.get(&name) else {
                return 0;
            };
            let (l2, max) = (relative_l2(&got, &want.values), relative_max(&got, &want.values));
            assert!(
                l2 <= CACHE_TOLERANCE && max <= CACHE_TOLERANCE,
                "{} {what}: {name} of row {row} is off by {l2:.1e} (L2) and {max:.1e} (largest), relative",
                self.name
            );
            1
        };
        let mut compared = 0;
        for layer in 0..self.config.num_hidden_layers {
            if let Some(all) = cache.lightning_state(layer) {
                compared += compare(format!("{state}_{layer}"), values(&all.narrow(0, row, 1)));
            }
            if let Some((keys, vals)) = cache.keys_values(layer, row) {
                // Recorded as [tokens, kv_heads, head_dim].
                compared += compare(format!("{k}_{layer}"), values(&keys.swap_dims(0, 1)));
                compared += compare(format!("{v}_{layer}"), values(&vals.swap_dims(0, 1)));
            }
        }
        assert!(compared > 0, "{} {what}: nothing was recorded to compare with", self.name);
    }
}

/// The rules of [`Golden::check_logits`] on plain values.
pub fn check_logits(got: &[f64], want: &[f64], vocab: usize, bound: f64, what: &str) -> f64 {
    assert_eq!(got.len(), want.len(), "{what}: number of logits");
    let mut worst = 0f64;
    for (i, (got, want)) in got.chunks(vocab).zip(want.chunks(vocab)).enumerate() {
        let error = largest(got.iter().zip(want).map(|(g, w)| g - w));
        assert!(error <= bound, "{what}: logits of token {i} are off by {error:.2e}, bound {bound:.2e}");
        worst = worst.max(error);
        let best = argmax(want);
        let second = want.iter().enumerate().filter(|&(j, _)| j != best).map(|(_, &w)| w).fold(f64::MIN, f64::max);
        if want[best] - second > 2.0 * bound {
            assert_eq!(argmax(got), best, "{what}: argmax of token {i}");
        }
    }
    worst
}

fn argmax(values: &[f64]) -> usize {
    (0..values.len()).fold(0, |best, i| if values[i] > values[best] { i } else { best })
}

fn deviation(values: &[f64]) -> f64 {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n).sqrt()
}

/// All tensors of a safetensors file, widened to f64.
pub fn read(path: &Path) -> HashMap<String, Recorded> {
    let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let file = SafeTensors::deserialize(&bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    file.iter()
        .map(|(name, tensor)| {
            let data = tensor.data();
            let values = match tensor.dtype() {
                Dtype::F64 => data.as_chunks().0.iter().map(|&b| f64::from_le_bytes(b)).collect(),
                Dtype::F32 => data.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b).into()).collect(),
                Dtype::I32 => data.as_chunks().0.iter().map(|&b| i32::from_le_bytes(b).into()).collect(),
                other => panic!("{}: {name} has the unexpected dtype {other:?}", path.display()),
            };
            (name.to_string(), Recorded { shape: tensor.shape().to_vec(), values })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::check_logits;

    #[test]
    fn the_bound_is_kept() {
        assert_eq!(check_logits(&[1.0, 2.0, 3.0, 0.5], &[1.0, 2.25, 3.0, 0.5], 2, 0.25, "x"), 0.25);
    }

    #[test]
    #[should_panic(expected = "token 1 are off")]
    fn past_the_bound_fails() {
        check_logits(&[1.0, 2.0, 3.0, 0.5], &[1.0, 2.0, 3.0, 0.8], 2, 0.25, "x");
    }

    #[test]
    #[should_panic(expected = "off by inf")]
    fn nan_fails() {
        check_logits(&[f64::NAN, 2.0], &[1.0, 2.0], 2, 0.25, "x");
    }

    #[test]
    fn a_near_tie_may_swap() {
        check_logits(&[2.1, 2.0], &[2.0, 2.05], 2, 0.25, "x");
    }
}
