//! Saving: the form that MiniMax's own code and this crate both load. Everything is written under temporary names and
//! renamed at the end, weights before the index and the configuration; a failure to write leaves what was there before.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::module::Param;
use burn::tensor::{DType, Tensor, TensorData};
use burn_store::bridge;
use burn_store::burn_pack::Tensor as Snapshot;
use rayon::prelude::*;
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::json;

use super::WeightDtype;
use super::convert::narrow;
use super::directory::{CONFIG, INDEX, SINGLE};
use super::error::CheckpointError;
use super::names::{self, Role, TensorSpec};
use super::rows::Rows;
use super::slots::{Slot, of_expert, slots};
use crate::config::ModelConfig;
use crate::model::M1;
use crate::weight::{Constant, Held, Weight};

/// How to save.
#[derive(Debug, Clone)]
pub struct SaveOptions {
    /// Dtype of matrices and norms in the files; the router is f32, as in the released M1.
    pub dtype: WeightDtype,
    /// A file is closed before it would hold more bytes of tensors than this (a single larger tensor gets its own).
    pub max_shard_bytes: u64,
}

impl Default for SaveOptions {
    /// bf16 in files of 5 GB.
    fn default() -> Self {
        Self { dtype: WeightDtype::Bf16, max_shard_bytes: 5_000_000_000 }
    }
}

/// Writes a model as a checkpoint directory, which is made if needed; weights of an older checkpoint there are
/// replaced. Tokenizer files are left alone.
///
/// What was loaded as stored and is saved in the same dtype has the same bits; what was quantized is written as the
/// numbers that it stands for (`quantize` makes quantized checkpoints). Memory: one tensor.
pub fn save(path: &Path, model: &M1, options: &SaveOptions) -> Result<(), CheckpointError> {
    let mut held = values(model);
    let planned = names::tensors(model.config()).into_iter().map(|spec| {
        let Some(values) = held.remove(&spec.name) else {
            return Err(CheckpointError::Missing { path: path.into(), tensors: vec![spec.name] });
        };
        let dtype = if spec.role == Role::Router { WeightDtype::F32 } else { options.dtype };
        Ok(Planned {
            parts: vec![Part::of(&spec, dtype)],
            write: Box::new(move |file| values.write(&spec, dtype, file)),
        })
    });
    let planned = planned.collect::<Result<Vec<_>, _>>()?;
    let mut config = model.config().clone();
    let torch_dtype = match options.dtype {
        WeightDtype::F32 => "float32",
        WeightDtype::Bf16 => "bfloat16",
    };
    config.extra.shift_remove("dtype"); // newer transformers' name of the same key
    config.extra.insert("torch_dtype".into(), torch_dtype.into());
    std::fs::create_dir_all(path).map_err(CheckpointError::io(path, "make the directory"))?;
    Pending::new(path).write_all(planned, &config, options.max_shard_bytes)
}

/// Where a tensor's numbers are now.
#[allow(clippy::large_enum_variant)] // one a tensor
enum Values {
    /// In a parameter; read back from its device when it is written.
    Tensor(Snapshot),
    /// One of those held together.
    Constant(Constant, usize),
    File(Arc<Rows>),
}

/// The numbers of every tensor of the model, under the checkpoint's names.
fn values(model: &M1) -> HashMap<String, Values> {
    let mut model = model.clone(); // shares every weight
    let mut all = HashMap::new();
    for (name, slot) in slots(&mut model) {
        match slot {
            Slot::Norm(param) => _ = all.insert(name, of(param)),
            Slot::Matrix(Held::Tensor(param)) => _ = all.insert(name, of(param)),
            Slot::Matrix(Held::Constant(constant)) => _ = all.insert(name, Values::Constant(constant.clone(), 0)),
            Slot::Table(Held::Tensor(param)) => _ = all.insert(name, of(param)),
            Slot::Table(Held::Constant(table)) => _ = all.insert(name, Values::File(table.rows.clone())),
            Slot::Experts(weight) => all.extend(experts(&name, weight)),
        }
    }
    all
}

/// The whole of a parameter; files have the name that it goes by.
fn of<const D: usize>(param: &Param<Tensor<D>>) -> Values {
    Values::Tensor(bridge::from_tensor(&param.val(), String::new(), None))
}

/// One matrix of a stack, cut out when it is read back.
fn of_stack(stack: Tensor<3>, expert: usize) -> Values {
    let (dtype, [_, out, input]) = (stack.dtype(), stack.dims());
    let cut = move || Ok(stack.clone().narrow(0, expert, 1).reshape([out, input]).into_data());
    Values::Tensor(bridge::deferred(String::new(), dtype, [out, input].into(), None, cut))
}

fn experts(name: &str, weight: &Weight<3>) -> Vec<(String, Values)> {
    let one: Box<dyn Fn(usize) -> Values> = match weight {
        Held::Tensor(param) => {
            let stack = param.val();
            Box::new(move |expert| of_stack(stack.clone(), expert))
        }
        Held::Constant(constant) => Box::new(|expert| Values::Constant(constant.clone(), expert)),
    };
    (0..weight.value().dims()[0]).map(|expert| (of_expert(name, expert), one(expert))).collect()
}

impl Values {
    fn write(self, spec: &TensorSpec, dtype: WeightDtype, file: &mut Output) -> Result<(), CheckpointError> {
        let shape = match &self {
            Self::Tensor(tensor) => tensor.shape.to_vec(),
            Self::Constant(constant, _) => constant.shape().to_vec(),
            Self::File(rows) => vec![rows.rows(), rows.width()],
        };
        if shape != spec.shape {
            return Err(file.wrong(&spec.name, format!("has shape {shape:?}: config.json asks for {:?}", spec.shape)));
        }
        match self {
            Self::Tensor(tensor) => {
                let unread = |error| file.wrong(&spec.name, format!("cannot read it back: {error}"));
                write_data(bridge::into_data(tensor).map_err(unread)?, &spec.name, dtype, file)
            }
            Self::Constant(constant, matrix) => {
                let (packed, matrix) = constant.on_cpu(matrix);
                write_rows(spec, dtype, file, |row, out| {
                    packed.row(matrix, row, out);
                    Ok(())
                })
            }
            Self::File(rows) => write_rows(spec, dtype, file, |row, out| rows.read(row, out)),
        }
    }
}

fn write_data(data: TensorData, name: &str, dtype: WeightDtype, file: &mut Output) -> Result<(), CheckpointError> {
    match (data.dtype(), dtype) {
        (DType::F32, WeightDtype::F32) | (DType::BF16, WeightDtype::Bf16) => return file.write(data.as_bytes()),
        (DType::F32 | DType::BF16 | DType::F16, _) => {}
        (other, _) => return Err(file.wrong(name, format!("cannot write {other:?}"))),
    }
    let data = data.convert::<f32>();
    let numbers: &[f32] =
        data.as_slice().map_err(|error| file.wrong(name, format!("cannot read it back: {error:?}")))?;
    numbers.chunks(PIECE).try_for_each(|piece| file.numbers(piece, dtype))
}

/// Numbers that are converted before they are written.
const PIECE: usize = 1 << 20;

/// Some rows at a time, read by all threads.
fn write_rows(
    spec: &TensorSpec,
    dtype: WeightDtype,
    file: &mut Output,
    read: impl Fn(usize, &mut [f32]) -> Result<(), &'static str> + Sync,
) -> Result<(), CheckpointError> {
    let (rows, width) = (spec.shape[0], spec.shape[1]);
    let step = PIECE.div_ceil(width);
    let mut numbers = vec![0f32; step.min(rows) * width];
    for start in (0..rows).step_by(step) {
        let numbers = &mut numbers[..step.min(rows - start) * width];
        let result = numbers.par_chunks_mut(width).enumerate().try_for_each(|(i, out)| read(start + i, out));
        result.map_err(|what| file.wrong(&spec.name, what.into()))?;
        file.numbers(numbers, dtype)?;
    }
    Ok(())
}

/// One tensor of a file to be.
pub(super) struct Part {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
}

impl Part {
    fn of(spec: &TensorSpec, dtype: WeightDtype) -> Self {
        let dtype = match dtype {
            WeightDtype::F32 => Dtype::F32,
            WeightDtype::Bf16 => Dtype::BF16,
        };
        Self { name: spec.name.clone(), dtype, shape: spec.shape.clone() }
    }

    fn bytes(&self) -> u64 {
        (self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8) as u64
    }
}

/// Writes the parts of a [`Planned`], one after the other.
pub(super) type WriteParts = Box<dyn FnOnce(&mut Output) -> Result<(), CheckpointError>>;

/// Tensors that are written together, and how.
pub(super) struct Planned {
    pub parts: Vec<Part>,
    pub write: WriteParts,
}

impl Planned {
    pub fn bytes(&self) -> u64 {
        self.parts.iter().map(Part::bytes).sum()
    }
}

/// A file being written, under its temporary name.
pub(super) struct Output {
    file: BufWriter<File>,
    path: PathBuf,
}

impl Output {
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), CheckpointError> {
        self.file.write_all(bytes).map_err(CheckpointError::io(&self.path, "write"))
    }

    fn numbers(&mut self, numbers: &[f32], dtype: WeightDtype) -> Result<(), CheckpointError> {
        match dtype {
            WeightDtype::F32 => self.write(bytemuck::cast_slice(numbers)),
            WeightDtype::Bf16 => {
                let mut bits = vec![0u16; numbers.len()];
                bits.par_chunks_mut(1 << 16).zip(numbers.par_chunks(1 << 16)).for_each(|(out, x)| narrow(x, out));
                self.write(bytemuck::cast_slice(&bits))
            }
        }
    }

    fn wrong(&self, tensor: &str, problem: String) -> CheckpointError {
        CheckpointError::Transfer { path: self.path.clone(), tensor: tensor.into(), problem }
    }

    /// Header and tensors of one safetensors file.
    fn shard(&mut self, mut shard: Vec<Planned>) -> Result<(), CheckpointError> {
        // Wider numbers first: then every tensor is aligned to its own. Integers in blocks come in multiples of 16 bytes,
        // so that the scales behind them are aligned too.
        shard.sort_by_key(|planned| std::cmp::Reverse(planned.parts[0].dtype.bitsize()));
        let mut end = 0;
        let infos = shard.iter().flat_map(|planned| &planned.parts).map(|part| {
            let start = end;
            end += part.bytes() as usize;
            let info = TensorInfo { dtype: part.dtype, shape: part.shape.clone(), data_offsets: (start, end) };
            (part.name.clone(), info)
        });
        let about = HashMap::from([("format".to_string(), "pt".to_string())]);
        let header = Metadata::new(Some(about), infos.collect())
            .map_err(|error| error.to_string())
            .and_then(|metadata| serde_json::to_string(&metadata).map_err(|error| error.to_string()));
        let wrong = |problem| CheckpointError::Container { path: self.path.clone(), problem };
        let mut header = header.map_err(wrong)?.into_bytes();
        header.resize(header.len().next_multiple_of(8), b' ');
        self.write(&(header.len() as u64).to_le_bytes())?;
        self.write(&header)?;
        shard.into_iter().try_for_each(|planned| (planned.write)(self))
    }
}

/// Files under temporary names; dropped without being renamed, they go away again.
pub(super) struct Pending<'a> {
    folder: &'a Path,
    files: Vec<(PathBuf, String)>,
}

impl<'a> Pending<'a> {
    pub fn new(folder: &'a Path) -> Self {
        Self { folder, files: Vec::new() }
    }

    /// Writes a whole checkpoint and gives everything its name.
    pub fn write_all(
        mut self,
        planned: Vec<Planned>,
        config: &ModelConfig,
        max_shard_bytes: u64,
    ) -> Result<(), CheckpointError> {
        let mut shards: Vec<Vec<Planned>> = vec![Vec::new()];
        let (mut in_shard, mut total) = (0, 0);
        for planned in planned {
            let bytes = planned.bytes();
            if in_shard > 0 && in_shard + bytes > max_shard_bytes {
                shards.push(Vec::new());
                in_shard = 0;
            }
            in_shard += bytes;
            total += bytes;
            if let Some(shard) = shards.last_mut() {
                shard.push(planned);
            }
        }
        let mut weight_map = BTreeMap::new();
        let count = shards.len();
        for (number, shard) in shards.into_iter().enumerate() {
            let name = match count {
                1 => SINGLE.to_string(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
            };
            weight_map.extend(shard.iter().flat_map(|p| &p.parts).map(|part| (part.name.clone(), name.clone())));
            self.write(&name, |file| file.shard(shard))?;
        }
        if count > 1 {
            let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
            self.write(INDEX, |file| file.write(format!("{index:#}\n").as_bytes()))?;
        }
        self.write(CONFIG, |file| file.write(config.to_json().as_bytes()))?;
        self.commit()
    }

    pub fn write(
        &mut self,
        name: &str,
        fill: impl FnOnce(&mut Output) -> Result<(), CheckpointError>,
    ) -> Result<(), CheckpointError> {
        let path = self.folder.join(format!(".{name}.{}.tmp", std::process::id()));
        let file = File::create(&path).map_err(CheckpointError::io(&path, "create"))?;
        self.files.push((path.clone(), name.into()));
        let mut output = Output { file: BufWriter::with_capacity(1 << 20, file), path };
        fill(&mut output)?;
        output.file.flush().map_err(CheckpointError::io(&output.path, "write"))
    }

    /// Renames in the order of writing, then removes weights of an older checkpoint that the new one does not replace:
    /// a reader would take a stale single file for the newer one.
    fn commit(mut self) -> Result<(), CheckpointError> {
        let files = std::mem::take(&mut self.files);
        for (i, (temporary, name)) in files.iter().enumerate() {
            let target = self.folder.join(name);
            if let Err(error) = std::fs::rename(temporary, &target) {
                self.files = files[i..].to_vec();
                return Err(CheckpointError::Io { path: target, action: "rename a finished file to it", error });
            }
        }
        let entries = std::fs::read_dir(self.folder).map_err(CheckpointError::io(self.folder, "list"))?;
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let shard = name.starts_with("model-") && name.contains("-of-") && name.ends_with(".safetensors");
            let weights = shard || name == SINGLE || name == INDEX;
            if weights && !files.iter().any(|(_, new)| *new == name) {
                std::fs::remove_file(entry.path()).map_err(CheckpointError::io(&entry.path(), "remove"))?;
            }
        }
        Ok(())
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        for (temporary, _) in &self.files {
            let _ = std::fs::remove_file(temporary);
        }
    }
}
