//! Saving: the form that MiniMax's own code and this crate both load. Everything is written under temporary names and
//! renamed at the end, weights before the index and the configuration; a failure to write leaves what was there before.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use burn::tensor::DType;
use burn_store::ModuleSnapshot;
use burn_store::burn_pack::Tensor as Packed;
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::json;

use super::WeightDtype;
use super::convert::{Stored, to_bf16_bits, to_f32};
use super::directory::{CONFIG, INDEX, SINGLE};
use super::error::CheckpointError;
use super::names::{self, Role, TensorSpec};
use crate::model::M1;

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
/// What was loaded as stored and is saved in the same dtype has the same bits. Memory: one tensor.
pub fn save(path: &Path, model: &M1, options: &SaveOptions) -> Result<(), CheckpointError> {
    std::fs::create_dir_all(path).map_err(CheckpointError::io(path, "make the directory"))?;
    let mut held: HashMap<String, Packed> =
        model.collect(None, None, true).into_iter().map(|tensor| (tensor.name.clone(), tensor)).collect();

    let mut shards: Vec<Vec<(TensorSpec, Packed)>> = vec![Vec::new()];
    let (mut in_shard, mut total) = (0, 0);
    for spec in names::tensors(model.config()) {
        let Some(tensor) = held.remove(&spec.name) else {
            return Err(CheckpointError::Missing { path: path.into(), tensors: vec![spec.name] });
        };
        let bytes = stored_bytes(&spec, options.dtype);
        if in_shard > 0 && in_shard + bytes > options.max_shard_bytes {
            shards.push(Vec::new());
            in_shard = 0;
        }
        in_shard += bytes;
        total += bytes;
        if let Some(shard) = shards.last_mut() {
            shard.push((spec, tensor));
        }
    }

    let mut pending = Pending { folder: path, files: Vec::new() };
    let mut weight_map = BTreeMap::new();
    let count = shards.len();
    for (number, shard) in shards.into_iter().enumerate() {
        let name = match count {
            1 => SINGLE.to_string(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
        };
        weight_map.extend(shard.iter().map(|(spec, _)| (spec.name.clone(), name.clone())));
        pending.write(&name, |file, path| write_shard(file, path, shard, options.dtype))?;
    }
    if count > 1 {
        let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
        pending.write(INDEX, |file, path| writeln!(file, "{index:#}").map_err(CheckpointError::io(path, "write")))?;
    }
    let mut config = model.config().clone();
    let torch_dtype = match options.dtype {
        WeightDtype::F32 => "float32",
        WeightDtype::Bf16 => "bfloat16",
    };
    config.extra.shift_remove("dtype"); // newer transformers' name of the same key
    config.extra.insert("torch_dtype".into(), torch_dtype.into());
    pending.write(CONFIG, |file, path| {
        file.write_all(config.to_json().as_bytes()).map_err(CheckpointError::io(path, "write"))
    })?;
    pending.commit()
}

/// The dtype in which a tensor is written.
fn stored_as(spec: &TensorSpec, dtype: WeightDtype) -> WeightDtype {
    if spec.role == Role::Router { WeightDtype::F32 } else { dtype }
}

fn stored_bytes(spec: &TensorSpec, dtype: WeightDtype) -> u64 {
    (spec.shape.iter().product::<usize>() * stored_as(spec, dtype).size()) as u64
}

fn write_shard(
    file: &mut impl Write,
    path: &Path,
    mut shard: Vec<(TensorSpec, Packed)>,
    dtype: WeightDtype,
) -> Result<(), CheckpointError> {
    // Wider numbers first: then every tensor is aligned to its own.
    shard.sort_by_key(|(spec, _)| std::cmp::Reverse(stored_as(spec, dtype).size()));
    let mut end = 0;
    let infos = shard.iter().map(|(spec, _)| {
        let start = end;
        end += stored_bytes(spec, dtype) as usize;
        let dtype = match stored_as(spec, dtype) {
            WeightDtype::F32 => Dtype::F32,
            WeightDtype::Bf16 => Dtype::BF16,
        };
        (spec.name.clone(), TensorInfo { dtype, shape: spec.shape.clone(), data_offsets: (start, end) })
    });
    let about = HashMap::from([("format".to_string(), "pt".to_string())]);
    let header = Metadata::new(Some(about), infos.collect())
        .map_err(|error| error.to_string())
        .and_then(|metadata| serde_json::to_string(&metadata).map_err(|error| error.to_string()));
    let mut header = header.map_err(|problem| CheckpointError::Container { path: path.into(), problem })?.into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');

    let write = |file: &mut dyn Write, bytes: &[u8]| file.write_all(bytes).map_err(CheckpointError::io(path, "write"));
    write(file, &(header.len() as u64).to_le_bytes())?;
    write(file, &header)?;
    for (spec, tensor) in shard {
        let wrong =
            |problem: String| CheckpointError::Transfer { path: path.into(), tensor: spec.name.clone(), problem };
        let from = match tensor.dtype {
            DType::F32 => Stored::F32,
            DType::BF16 => Stored::Bf16,
            DType::F16 => Stored::F16,
            other => return Err(wrong(format!("cannot write {other:?}"))),
        };
        if tensor.shape.as_slice() != spec.shape {
            return Err(wrong(format!("has shape {:?}: config.json asks for {:?}", tensor.shape, spec.shape)));
        }
        let bytes = tensor.to_bytes().map_err(|error| wrong(format!("cannot read it back: {error}")))?;
        match (stored_as(&spec, dtype), from) {
            (WeightDtype::F32, Stored::F32) | (WeightDtype::Bf16, Stored::Bf16) => write(file, &bytes)?,
            (WeightDtype::F32, _) => write(file, bytemuck::cast_slice(&to_f32(&bytes, from)))?,
            (WeightDtype::Bf16, _) => write(file, bytemuck::cast_slice(&to_bf16_bits(&bytes, from)))?,
        }
    }
    Ok(())
}

/// Files under temporary names; dropped without `commit`, they go away again.
struct Pending<'a> {
    folder: &'a Path,
    files: Vec<(PathBuf, String)>,
}

impl Pending<'_> {
    fn write(
        &mut self,
        name: &str,
        fill: impl FnOnce(&mut BufWriter<File>, &Path) -> Result<(), CheckpointError>,
    ) -> Result<(), CheckpointError> {
        let temporary = self.folder.join(format!(".{name}.{}.tmp", std::process::id()));
        let file = File::create(&temporary).map_err(CheckpointError::io(&temporary, "create"))?;
        self.files.push((temporary.clone(), name.into()));
        let mut file = BufWriter::with_capacity(1 << 20, file);
        fill(&mut file, &temporary)?;
        file.flush().map_err(CheckpointError::io(&temporary, "write"))
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
