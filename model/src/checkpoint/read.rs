//! Loading: every tensor goes straight from the mapped file into its parameter, which was never initialised. A tensor
//! at a time, each read by all threads, so that memory peaks at the weights and one tensor.

use std::path::Path;

use burn::tensor::{Bytes, DType, Device, Shape, TensorData};
use burn_store::burn_pack::Tensor as Packed;
use burn_store::{ApplyError, ModuleSnapshot, bridge};
use indicatif::{ProgressBar, ProgressStyle};

use super::WeightDtype;
use super::convert::{Stored, to_bf16_bits, to_f32};
use super::directory::{Checked, Directory};
use super::error::CheckpointError;
use super::names::Role;
use crate::model::M1;

/// How to load.
#[derive(Debug, Clone, Default)]
pub struct LoadOptions {
    /// Dtype of the matrices. `None`: as stored, except that f16 becomes f32 (f16 can't hold what M1 computes), and
    /// that bf16 becomes f32 on a device that does not compute in bf16. `F32` widens; `Bf16` rounds to nearest even.
    pub dtype: Option<WeightDtype>,
    /// Stands above the configuration's `rotary_dim`; needed where a Hugging Face conversion has none.
    pub rotary_dim: Option<usize>,
    /// Show a progress bar on stderr, if that is a terminal.
    pub progress: bool,
}

/// Loads a checkpoint directory: MiniMax's own form or Hugging Face's conversion, one file or shards.
///
/// Everything is checked before any weight is read: the configuration, every header, and that exactly the tensors
/// that the configuration asks for are there in the right shapes.
pub fn load(path: &Path, device: &Device, options: &LoadOptions) -> Result<M1, CheckpointError> {
    let directory = Directory::open(path, options.rotary_dim)?;
    let bf16 = device.supports_dtype(DType::BF16);
    if options.dtype == Some(WeightDtype::Bf16) && !bf16 {
        return Err(CheckpointError::NoBf16);
    }
    let bar = ProgressBar::hidden();
    let tensors = plan(&directory, options.dtype, bf16, &bar)?;
    if options.progress {
        bar.set_length(tensors.iter().map(|tensor| tensor.bytes).sum());
        bar.set_draw_target(indicatif::ProgressDrawTarget::stderr());
        if let Ok(style) = ProgressStyle::with_template("loading {bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta}")
        {
            bar.set_style(style);
        }
    }
    let mut model = M1::new(directory.config(), device);
    let result = model.apply(tensors.into_iter().map(|tensor| tensor.packed).collect(), None, None, true);
    bar.finish_and_clear();

    if let Some(error) = result.errors.into_iter().next() {
        let (tensor, problem) = match error {
            ApplyError::LoadError { path, message } => (path, message),
            ApplyError::ShapeMismatch { path, .. }
            | ApplyError::DTypeMismatch { path, .. }
            | ApplyError::AdapterError { path, .. } => (path, "does not fit the model's parameter".to_string()),
        };
        return Err(CheckpointError::Transfer { path: path.into(), tensor, problem });
    }
    if !result.missing.is_empty() {
        let tensors = result.missing.into_iter().map(|(name, _)| name).collect();
        return Err(CheckpointError::Missing { path: path.into(), tensors });
    }
    if !result.unused.is_empty() {
        return Err(CheckpointError::Unexpected { path: path.into(), tensors: result.unused });
    }
    Ok(model)
}

/// A tensor that is yet to be read, and how much of a file it is.
struct Planned {
    packed: Packed,
    bytes: u64,
}

/// Checks the whole directory and says, for every parameter, how its data will be made.
fn plan(
    directory: &Directory,
    dtype: Option<WeightDtype>,
    bf16: bool,
    bar: &ProgressBar,
) -> Result<Vec<Planned>, CheckpointError> {
    let mut all = Vec::new();
    for Checked { spec, place, container, start, stored } in directory.check()? {
        let wide = spec.role != Role::Matrix
            || match dtype {
                Some(dtype) => dtype == WeightDtype::F32,
                None => stored != Stored::Bf16 || !bf16,
            };
        let elements: usize = spec.shape.iter().product();
        let start = start + place.first * stored.size();
        let range = start..start + elements * stored.size();
        let bytes = range.len() as u64;

        let bar = bar.clone();
        let shape = Shape::from(spec.shape);
        let dtype = if wide { DType::F32 } else { DType::BF16 };
        let packed = bridge::deferred(spec.name, dtype, shape.clone(), None, move || {
            let data = container.with_bytes(range.clone(), |bytes| match wide {
                true => TensorData::new(to_f32(bytes, stored), shape.clone()),
                false => {
                    let bits = Bytes::from_elems(to_bf16_bits(bytes, stored));
                    TensorData::from_bytes(bits, shape.clone(), DType::BF16)
                }
            });
            bar.inc(bytes);
            Ok(data)
        });
        all.push(Planned { packed, bytes });
    }
    Ok(all)
}
