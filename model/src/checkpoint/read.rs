//! Loading: every tensor goes straight from the mapped file to where it is used, into a parameter that was never
//! initialised or into the form that products read. One tensor at a time (or the same one of all experts of a
//! layer), each by all threads, with pages let go behind: memory peaks at the weights and one tensor.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use burn::module::{Initializer, Param};
use burn::tensor::{Bytes, DType, Device, Tensor, TensorData};
use burn_store::{ModuleSnapshot, bridge, burn_pack::Error as PackError};
use half::f16;
use indicatif::{ProgressBar, ProgressStyle};
use m1_kernels::base::on_cpu;
use m1_kernels::base::packed::{Format, Packed};
use m1_kernels::linear::Quantized;
use rayon::prelude::*;

use super::WeightDtype;
use super::convert::{Number, bits, narrow};
use super::directory::{Checked, Directory};
use super::error::CheckpointError;
use super::quantization::{Blocks, Quantization};
use super::rows::{Once, Rows};
use super::slots::{Slot, of_expert, slots};
use crate::config::ModelConfig;
use crate::model::M1;
use crate::weight::{Constant, FileTable, Held, Weight};

/// How to load.
#[derive(Debug, Clone, Default)]
pub struct LoadOptions {
    /// Dtype of the matrices that are not quantized. `None`: as stored, except that f16 becomes f32 (f16 can't hold what
    /// M1 computes), and that bf16 becomes f32 on a device that does not compute in bf16, or where other matrices of the model are wider
    /// and all are to be tensors. `F32` widens; `Bf16` rounds to nearest even.
    pub dtype: Option<WeightDtype>,
    /// Quantize on the way, with the result of loading what [`super::quantize`] would have written. As any quantized
    /// checkpoint, it is dequantized again where weights are to be tensors.
    pub quantize: Option<Quantization>,
    /// Hold every weight as a tensor, as training and visitors need it, of `dtype` also where the file is quantized; under
    /// autodiff they always are. Otherwise weights are held for inference alone: on the CPU they are packed, and the
    /// embedding's rows stay in the file; on other devices so do those of an embedding that is quantized, other quantized
    /// weights are held as they are stored, and the rest are tensors.
    pub tensors: bool,
    /// What the cache keeps keys and values in. `None`: f32 on the CPU; on other devices what the embedding's rows are in, as the
    /// activations are.
    pub kv_dtype: Option<WeightDtype>,
    /// Stands above the configuration's `rotary_dim`; needed where a Hugging Face conversion has none.
    pub rotary_dim: Option<usize>,
    /// Show a progress bar on stderr, if that is a terminal.
    pub progress: bool,
}

/// Loads a checkpoint directory: MiniMax's own form or Hugging Face's conversion, one file or shards, quantized or not.
///
/// Everything is checked before any weight is read: the configuration, every header, and that exactly the tensors
/// that the configuration asks for are there in the right shapes.
pub fn load(path: &Path, device: &Device, options: &LoadOptions) -> Result<M1, CheckpointError> {
    let directory = Directory::open(path, options.rotary_dim)?;
    check_bf16(device, options)?;
    check_quantization(&directory, path, options.quantize)?;
    build(directory.config(), path, directory.check()?, device, options)
}

/// Refuses bf16 on a device that does not compute in it.
pub(super) fn check_bf16(device: &Device, options: &LoadOptions) -> Result<(), CheckpointError> {
    let bf16 = |dtype| dtype == Some(WeightDtype::Bf16) && !device.supports_dtype(DType::BF16);
    match (bf16(options.dtype), bf16(options.kv_dtype)) {
        (true, _) => Err(CheckpointError::NoBf16("load the weights")),
        (_, true) => Err(CheckpointError::NoBf16("keep keys and values")),
        _ => Ok(()),
    }
}

/// The model of these tensors, which are all that the configuration asks for.
pub(super) fn build(
    config: &ModelConfig,
    path: &Path,
    tensors: Vec<Checked>,
    device: &Device,
    options: &LoadOptions,
) -> Result<M1, CheckpointError> {
    let bf16 = device.supports_dtype(DType::BF16);
    let mut stored = HashMap::new();
    let (mut total, mut narrow) = (0, true);
    for Checked { spec, rows } in tensors {
        total += rows.bytes();
        let blocks = options.quantize.and_then(|quantization| quantization.of(spec.role));
        let rows = rows.quantized(blocks);
        narrow &= !spec.role.is_matrix() || is_narrow(&rows);
        stored.insert(spec.name, rows);
    }
    let bar = if options.progress { progress("loading", total) } else { ProgressBar::hidden() };
    let inference = !options.tensors && !device.is_autodiff();
    let cpu = on_cpu(&Tensor::<1>::zeros([1], device));
    let packed = inference && cpu;
    // Tensors meet each other and must be of one dtype; packed weights all meet activations in f32.
    let bf16 = bf16 && (packed || narrow);
    let reader = Reader { device, bar: &bar, dtype: options.dtype, bf16, inference, packed };
    let mut model = M1::new(config, device);
    let mut take = |name: &str| {
        let lacks = || CheckpointError::Missing { path: path.into(), tensors: vec![name.into()] };
        stored.remove(name).ok_or_else(lacks)
    };
    for (name, slot) in slots(&mut model) {
        match slot {
            Slot::Norm(param) => *param = reader.tensor([take(&name)?], |rows| [rows[0].width()], true)?,
            Slot::Table(table) => {
                let rows = take(&name)?;
                *table = match packed || inference && rows.blocks().is_some() {
                    true => {
                        rows.check_scales()?;
                        bar.inc(rows.bytes());
                        let wide = packed || reader.wide(std::slice::from_ref(&rows), false);
                        let dtype = if wide { DType::F32 } else { DType::BF16 };
                        Held::Constant(FileTable { rows: Arc::new(rows), dtype })
                    }
                    false => Held::Tensor(reader.tensor([rows], matrix, false)?),
                };
            }
            Slot::Matrix(weight) => {
                let (rows, router) = (take(&name)?, name.ends_with(".gate.weight"));
                *weight = reader.weight([rows], matrix, router)?;
            }
            Slot::Experts(weight) => {
                let count = config.num_local_experts;
                let all = (0..count).map(|e| take(&of_expert(&name, e))).collect::<Result<Vec<_>, _>>()?;
                *weight = reader.weight(all, |all| [all.len(), all[0].rows(), all[0].width()], false)?;
            }
        }
    }
    bar.finish_and_clear();
    let rows = model.model.embed_tokens.weight.dtype();
    let kv_dtype = if cpu || rows != DType::BF16 { WeightDtype::F32 } else { WeightDtype::Bf16 };
    Ok(model.with_kv_dtype(options.kv_dtype.unwrap_or(kv_dtype)))
}

/// A progress bar in bytes on stderr, if that is a terminal.
pub(super) fn progress(what: &str, total: u64) -> ProgressBar {
    let bar = ProgressBar::new(total);
    let template = format!("{what} {{bar:30}} {{bytes}}/{{total_bytes}} {{bytes_per_sec}} {{eta}}");
    if let Ok(style) = ProgressStyle::with_template(&template) {
        bar.set_style(style);
    }
    bar
}

/// Refuses to quantize what already is, or in blocks that do not fit.
pub(super) fn check_quantization(
    directory: &Directory,
    path: &Path,
    wanted: Option<Quantization>,
) -> Result<(), CheckpointError> {
    let Some(wanted) = wanted else {
        return Ok(());
    };
    if let Some(found) = directory.quantization() {
        return Err(CheckpointError::Quantized { path: path.into(), found: format!("experts {}", found.experts) });
    }
    match wanted.undivided(directory.config()) {
        Some((key, width)) => Err(CheckpointError::Block { block: wanted.block, key, width }),
        None => Ok(()),
    }
}

/// Where weights go, and as what.
struct Reader<'a> {
    device: &'a Device,
    bar: &'a ProgressBar,
    dtype: Option<WeightDtype>,
    /// Whether bf16 may stay what it is.
    bf16: bool,
    /// Whether weights may be constants.
    inference: bool,
    /// Whether they are the CPU's.
    packed: bool,
}

/// The shape of one matrix.
fn matrix(rows: &[Rows]) -> [usize; 2] {
    [rows[0].rows(), rows[0].width()]
}

impl Reader<'_> {
    /// Whether all of these become f32 rather than bf16.
    fn wide(&self, all: &[Rows], exact: bool) -> bool {
        exact
            || match self.dtype {
                Some(dtype) => dtype == WeightDtype::F32,
                None => !self.bf16 || !all.iter().all(is_narrow),
            }
    }

    /// What the operations take, made from one matrix after the other.
    fn weight<const D: usize>(
        &self,
        all: impl Into<Vec<Rows>>,
        shape: impl FnOnce(&[Rows]) -> [usize; D],
        exact: bool,
    ) -> Result<Weight<D>, CheckpointError> {
        let all = all.into();
        match (self.packed, all[0].blocks().filter(|_| self.inference)) {
            (false, None) => Ok(Held::Tensor(self.tensor(all, shape, exact)?)),
            (_, blocks) => Ok(Held::Constant(self.constant(&all, blocks, exact)?)),
        }
    }

    /// A parameter from one matrix after the other, which are read when burn-store puts them in.
    fn tensor<const D: usize>(
        &self,
        all: impl Into<Vec<Rows>>,
        shape: impl FnOnce(&[Rows]) -> [usize; D],
        exact: bool,
    ) -> Result<Param<Tensor<D>>, CheckpointError> {
        let all = all.into();
        let (first, shape) = (all[0].clone(), shape(&all));
        let wide = self.wide(&all, exact);
        let dtype = if wide { DType::F32 } else { DType::BF16 };
        let (bar, failed) = (self.bar.clone(), Arc::new(OnceLock::new()));
        let told = failed.clone();
        let snapshot = bridge::deferred(String::new(), dtype, shape.into(), None, move || {
            let data = match wide {
                true => fill(&all, &bar, Rows::read).map(|numbers| TensorData::new(numbers, shape)),
                false => fill(&all, &bar, read_bf16)
                    .map(|bits| TensorData::from_bytes(Bytes::from_elems(bits), shape, DType::BF16)),
            };
            data.map_err(|error| {
                let said = error.to_string();
                let _ = told.set(error);
                PackError::ValidationError(said)
            })
        });
        let mut param = Initializer::Zeros.init(shape, self.device); // not made: what is put in takes its place
        let result = param.apply(vec![snapshot], None, None, true);
        match (Arc::into_inner(failed).and_then(OnceLock::into_inner), result.errors.first()) {
            (Some(error), _) => Err(error),
            (None, Some(error)) => Err(first.flawed(&error.to_string())),
            (None, None) => Ok(param),
        }
    }

    /// The form that products read: from several matrices of one shape, a stack.
    fn constant(&self, all: &[Rows], blocks: Option<Blocks>, exact: bool) -> Result<Constant, CheckpointError> {
        let (count, out, input) = (all.len(), all[0].rows(), all[0].width());
        let once: Vec<Once> = all.iter().map(|rows| Once::new(rows, self.bar)).collect();
        let quantized = |matrix: usize, row: usize, values: &mut [i8], scales: &mut [f16]| {
            once[matrix].row(row, |rows| rows.read_blocks(row, values, scales));
        };
        let made = match blocks {
            Some(blocks) if self.packed => {
                Packed::pack_quantized(blocks.format(), count, out, input, &quantized).map(Constant::Packed)
            }
            Some(blocks) => {
                Quantized::new(blocks.format(), [count, out, input], self.device, &quantized).map(Constant::Quantized)
            }
            None => {
                let format = if self.wide(all, exact) { Format::F32 } else { Format::Bf16 };
                let row = |matrix: usize, row: usize, out: &mut [f32]| {
                    once[matrix].row(row, |rows| rows.read(row, out));
                };
                Packed::pack(format, count, out, input, &row).map(Constant::Packed)
            }
        };
        once.into_iter().try_for_each(Once::finish)?;
        made.map_err(|error| all[0].flawed(&error.to_string()))
    }
}

/// All rows of all matrices, read by all threads.
fn fill<T: Copy + Default + Send>(
    all: &[Rows],
    bar: &ProgressBar,
    read: impl Fn(&Rows, usize, &mut [T]) -> Result<(), &'static str> + Sync,
) -> Result<Vec<T>, CheckpointError> {
    let width = all[0].width();
    let mut out = vec![T::default(); all.iter().map(Rows::rows).sum::<usize>() * width];
    let mut rest = &mut out[..];
    // Enough numbers for a thread to be worth waking.
    let piece = (1usize << 16).div_ceil(width);
    for rows in all {
        let (these, others) = rest.split_at_mut(rows.rows() * width);
        rest = others;
        let once = Once::new(rows, bar);
        these.par_chunks_mut(piece * width).enumerate().for_each(|(chunk, out)| {
            for (i, out) in out.chunks_exact_mut(width).enumerate() {
                let i = chunk * piece + i;
                once.row(i, |rows| read(rows, i, out));
            }
        });
        once.finish()?;
    }
    Ok(out)
}

/// Whether bf16 is enough, as far as `None` for a dtype promises: for what is stored so, and for what is quantized.
fn is_narrow(rows: &Rows) -> bool {
    rows.blocks().is_some() || rows.number() == Some(Number::Bf16)
}

/// A row as the bits of bf16; those that are stored so are not touched.
fn read_bf16(rows: &Rows, row: usize, out: &mut [u16]) -> Result<(), &'static str> {
    if let Some(raw) = rows.raw_bf16(row) {
        bits(raw, out);
        return Ok(());
    }
    let mut wide = vec![0f32; out.len()];
    let result = rows.read(row, &mut wide);
    narrow(&wide, out);
    result
}
