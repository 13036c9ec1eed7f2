//! AdamW with M1's constants: β 0.9 and 0.95, ε 1e-15 (arXiv 2506.13585: most gradients lie below 1e-14, where the usual ε
//! of 1e-8 would swallow the update).
//!
//! Different here: the step is one pass over memory, on the flat list of [`crate::parameters`]; the moments are kept by
//! parameter name in a safetensors file, so a resumed run continues to the bit. Clipping is by the norm over *all* gradients,
//! which Burn does not offer (it clips tensor by tensor).

use std::collections::HashMap;
use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData};
use m1_kernels::adamw::{AdamWStep, adamw};
use safetensors::tensor::{Dtype, TensorView};
use serde::{Deserialize, Serialize};

use crate::parameters::ParameterInfo;

/// Settings of the optimizer; the defaults are M1's where the report gives them.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct OptimizerSettings {
    /// Decay of the first moment.
    pub beta_1: f32,
    /// Decay of the second moment.
    pub beta_2: f32,
    /// Added to the root of the second moment.
    pub epsilon: f32,
    /// Decoupled weight decay, on matrices other than the embedding.
    pub weight_decay: f32,
    /// Largest global norm of the gradient; larger ones are scaled down to it. 0 never clips.
    pub clip: f64,
}

impl Default for OptimizerSettings {
    fn default() -> Self {
        Self { beta_1: 0.9, beta_2: 0.95, epsilon: 1e-15, weight_decay: 0.1, clip: 1.0 }
    }
}

/// Why saved moments could not be taken up.
#[derive(Debug, thiserror::Error)]
pub enum OptimizerError {
    /// The file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// It is no safetensors file.
    #[error("{path}: {source}")]
    Format {
        /// The file.
        path: String,
        /// What is wrong with it.
        source: safetensors::SafeTensorError,
    },
    /// It belongs to another model.
    #[error("{path}: {tensor}: {found}, expected {expected}")]
    Mismatch {
        /// The file.
        path: String,
        /// The tensor.
        tensor: String,
        /// What was there.
        found: String,
        /// What this model needs.
        expected: String,
    },
}

/// What the optimizer keeps of one parameter's gradients.
#[derive(Debug, Clone)]
struct Moments {
    /// Steps taken.
    time: u32,
    /// Mean of the gradients, `[n]`.
    first: Tensor<1>,
    /// Mean of their squares, `[n]`.
    second: Tensor<1>,
}

/// The optimizer of one model: settings and moments.
#[derive(Debug, Clone)]
pub struct Optimizer {
    settings: OptimizerSettings,
    infos: Vec<ParameterInfo>,
    moments: Vec<Option<Moments>>,
}

impl Optimizer {
    /// An optimizer without any moments yet.
    pub fn new(settings: OptimizerSettings, infos: Vec<ParameterInfo>) -> Self {
        Self { settings, moments: vec![None; infos.len()], infos }
    }

    /// The factor of all gradients in a step whose global norm is `norm`.
    pub fn scale(&self, norm: f64) -> f64 {
        clip_scale(norm, self.settings.clip)
    }

    /// Parameter `index` of [`crate::parameters::infos`], flattened, after one step.
    ///
    /// `gradient` is multiplied by `scale` (see [`Optimizer::scale`]); `None` is a gradient of zero.
    pub fn update(
        &mut self,
        index: usize,
        lr: f64,
        scale: f64,
        value: Tensor<1>,
        gradient: Option<Tensor<1>>,
    ) -> Tensor<1> {
        let gradient = match gradient {
            Some(gradient) => gradient,
            // The moments go on decaying as they would for any other step.
            None if self.moments[index].is_none() => return value,
            None => value.zeros_like(),
        };
        let Moments { time, first, second } = self.moments[index].take().unwrap_or_else(|| {
            let zeros = value.zeros_like();
            Moments { time: 0, first: zeros.clone(), second: zeros }
        });
        let time = time + 1;
        let OptimizerSettings { beta_1, beta_2, epsilon, weight_decay, .. } = self.settings;
        let weight_decay = if decays(&self.infos[index]) { weight_decay } else { 0.0 };
        let step = AdamWStep { lr, beta_1, beta_2, epsilon, weight_decay, time, scale };
        let (value, first, second) = adamw(value, gradient, first, second, step);
        self.moments[index] = Some(Moments { time, first, second });
        value
    }

    /// Writes the moments (f32) and step counts to a safetensors file.
    pub fn save(&self, path: &Path) -> Result<(), OptimizerError> {
        let mut steps = HashMap::new();
        let mut tensors: Vec<(String, Vec<u8>, usize)> = Vec::new();
        for (info, moments) in self.infos.iter().zip(&self.moments) {
            let Some(Moments { time, first, second }) = moments else {
                continue;
            };
            steps.insert(info.path.clone(), time.to_string());
            for (kind, moment) in [("m", first), ("v", second)] {
                let data = moment.to_data().convert::<f32>();
                let len = moment.dims()[0];
                tensors.push((format!("{}.{kind}", info.path), data.as_bytes().to_vec(), len));
            }
        }
        let format = |source| OptimizerError::Format { path: path.display().to_string(), source };
        let views = tensors
            .iter()
            .map(|(name, bytes, len)| Ok((name, TensorView::new(Dtype::F32, vec![*len], bytes)?)))
            .collect::<Result<Vec<_>, _>>()
            .map_err(format)?;
        safetensors::serialize_to_file(views, Some(steps), path).map_err(format)
    }

    /// Takes up the moments that [`Optimizer::save`] wrote for the same model.
    pub fn load(&mut self, path: &Path, device: &Device) -> Result<(), OptimizerError> {
        let name = path.display().to_string();
        let format = |source| OptimizerError::Format { path: name.clone(), source };
        let mismatch = |tensor: &str, found: String, expected: String| OptimizerError::Mismatch {
            path: name.clone(),
            tensor: tensor.to_owned(),
            found,
            expected,
        };
        let bytes = std::fs::read(path).map_err(|source| OptimizerError::Io { path: name.clone(), source })?;
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).map_err(format)?;
        let steps = header.metadata().clone().unwrap_or_default();
        let file = safetensors::SafeTensors::deserialize(&bytes).map_err(format)?;
        if let Some(other) = steps.keys().filter(|path| !self.infos.iter().any(|info| info.path == **path)).min() {
            return Err(mismatch(other, "moments of a parameter".into(), "only this model's parameters".into()));
        }
        for (info, moments) in self.infos.iter().zip(&mut self.moments) {
            let Some(time) = steps.get(&info.path) else {
                *moments = None;
                continue;
            };
            let time = time.parse().map_err(|_| mismatch(&info.path, format!("step {time:?}"), "a number".into()))?;
            let len: usize = info.shape.iter().product();
            let read = |kind: &str| {
                let tensor = format!("{}.{kind}", info.path);
                let view = file.tensor(&tensor).map_err(format)?;
                if view.dtype() != Dtype::F32 || view.shape() != [len] {
                    let found = format!("{:?} {:?}", view.dtype(), view.shape());
                    return Err(mismatch(&tensor, found, format!("F32 [{len}]")));
                }
                let values: Vec<f32> =
                    view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
                Ok(Tensor::from_data(TensorData::new(values, [len]), device))
            };
            *moments = Some(Moments { time, first: read("m")?, second: read("v")? });
        }
        Ok(())
    }
}

/// The factor that brings a gradient of this norm down to `clip`; 1 below it or when clipping is off.
pub fn clip_scale(norm: f64, clip: f64) -> f64 {
    if clip > 0.0 && norm > clip { clip / norm } else { 1.0 }
}

/// Norms are scales and the embedding's rows are looked up, not multiplied: neither is pulled towards zero.
fn decays(info: &ParameterInfo) -> bool {
    info.shape.len() >= 2 && !info.path.contains("embed_tokens")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parameters;

    fn tensor(values: &[f32]) -> Tensor<1> {
        Tensor::from_data(values, &Device::flex())
    }

    /// One step on all parameters.
    fn step(
        optimizer: &mut Optimizer,
        lr: f64,
        values: Vec<Tensor<1>>,
        gradients: Vec<Option<Tensor<1>>>,
    ) -> Vec<Tensor<1>> {
        let scale = optimizer.scale(parameters::global_norm(&gradients));
        let all = values.into_iter().zip(gradients).enumerate();
        all.map(|(i, (value, gradient))| optimizer.update(i, lr, scale, value, gradient)).collect()
    }

    fn host(tensor: &Tensor<1>) -> Vec<f32> {
        tensor.to_data().iter::<f32>().collect()
    }

    fn infos() -> Vec<ParameterInfo> {
        let info = |path: &str, shape: &[usize]| ParameterInfo { path: path.into(), shape: shape.into() };
        vec![info("a.weight", &[2, 1]), info("norm.weight", &[2])]
    }

    #[test]
    fn clips_by_the_norm_over_all_tensors() {
        // Norms 3 and 4 apart, 5 together: clipped to 1, everything shrinks by 5 and keeps its direction.
        let gradients = [Some(tensor(&[3.0, 0.0])), Some(tensor(&[0.0, 4.0]))];
        let norm = parameters::global_norm(&gradients);
        assert!((norm - 5.0).abs() < 1e-6);
        assert!((clip_scale(norm, 1.0) - 0.2).abs() < 1e-7);
        assert_eq!(clip_scale(norm, 6.0), 1.0);
        assert_eq!(clip_scale(norm, 0.0), 1.0);
    }

    #[test]
    fn the_first_step_is_the_rate_in_the_gradients_direction_however_small_it_is() {
        // m/(1-β1) = g and v/(1-β2) = g², so the update is lr·g/(|g| + 1e-15); only the matrix decays, by lr·0.1.
        let mut optimizer = Optimizer::new(OptimizerSettings::default(), infos());
        let values = vec![tensor(&[1.0, 1.0]), tensor(&[1.0, 1.0])];
        let gradients = vec![Some(tensor(&[1e-9, -0.5])), Some(tensor(&[0.5, 1e-9]))];
        let new = step(&mut optimizer, 0.01, values, gradients);
        let close = |found: &[f32], expected: [f32; 2]| found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 2e-6);
        assert!(close(&host(&new[0]), [0.999 - 0.01, 0.999 + 0.01]), "{:?}", host(&new[0]));
        assert!(close(&host(&new[1]), [0.99, 0.99]), "{:?}", host(&new[1]));
    }

    #[test]
    fn saved_moments_continue_to_the_bit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("optimizer.safetensors");
        let mut whole = Optimizer::new(OptimizerSettings::default(), infos());
        let mut values = vec![tensor(&[1.0, -2.0]), tensor(&[0.3, 0.7])];
        for i in 1..=3 {
            let g = 0.1 * i as f32;
            // The second parameter has no gradient in the first step and no state then.
            let second = (i > 1).then(|| tensor(&[g, 2.0 * g]));
            values = step(&mut whole, 0.01, values, vec![Some(tensor(&[g, -g])), second]);
        }
        whole.save(&path).unwrap();
        let mut resumed = Optimizer::new(OptimizerSettings::default(), infos());
        resumed.load(&path, &Device::flex()).unwrap();
        let gradients = || vec![Some(tensor(&[0.7, 0.1])), None];
        let a = step(&mut whole, 0.02, values.clone(), gradients());
        let b = step(&mut resumed, 0.02, values, gradients());
        assert_eq!(host(&a[0]), host(&b[0]));
        assert_eq!(host(&a[1]), host(&b[1]));
    }

    #[test]
    fn moments_of_another_model_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("optimizer.safetensors");
        let mut one = Optimizer::new(OptimizerSettings::default(), infos());
        let values = vec![tensor(&[1.0, 1.0]), tensor(&[1.0, 1.0])];
        step(&mut one, 0.1, values, vec![Some(tensor(&[1.0, 1.0])), Some(tensor(&[1.0, 1.0]))]);
        one.save(&path).unwrap();
        let mut other = infos();
        other[0].shape = vec![3, 1];
        let error =
            Optimizer::new(OptimizerSettings::default(), other).load(&path, &Device::flex()).unwrap_err().to_string();
        assert!(error.contains("a.weight.m") && error.contains("F32 [3]"), "{error}");
        // As they were called when each expert was a parameter of its own.
        let mut other = infos();
        other[0].path = "experts.w1".into();
        let error =
            Optimizer::new(OptimizerSettings::default(), other).load(&path, &Device::flex()).unwrap_err().to_string();
        assert!(error.contains("a.weight: moments of a parameter, expected only this model's parameters"), "{error}");
    }
}
