//! A checkpoint directory before any weight is read: its configuration, which tensors it should hold and which it
//! does. A directory with only a `config.json` and an index will do.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::Dtype;
use serde_json::{Map, Value};

use super::container::Container;
use super::convert::Number;
use super::error::CheckpointError;
use super::hugging_face::{self, Found, HF_MODEL_TYPE};
use super::names::{self, TensorSpec};
use super::quantization::{self, Bits, Blocks, Quantization};
use super::rows::{Place, Rows, Stored};
use crate::config::{ConfigError, ModelConfig, invalid};

/// Names of the files, as Hugging Face's own.
pub const CONFIG: &str = "config.json";
/// The file of a checkpoint that is not sharded.
pub const SINGLE: &str = "model.safetensors";
/// Which tensor is in which shard.
pub const INDEX: &str = "model.safetensors.index.json";

/// See the module.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    config: ModelConfig,
    quantization: Option<Quantization>,
    hugging_face: bool,
    /// Where the list of tensors came from: index, single file, or (without any) the directory.
    listed_in: PathBuf,
    /// Every stored tensor and its file.
    stored: BTreeMap<String, PathBuf>,
}

/// What a directory holds beside what its configuration asks for.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Comparison {
    /// How many tensors the configuration asks for; a quantized matrix is two.
    pub expected: usize,
    /// How many of these are listed.
    pub found: usize,
    /// Those that are not.
    pub missing: Vec<String>,
    /// Those that are listed and not asked for.
    pub unexpected: Vec<String>,
}

impl Directory {
    /// Reads the configuration and the list of tensors. `rotary_dim`, if given, stands above the configuration's.
    pub fn open(path: &Path, rotary_dim: Option<usize>) -> Result<Self, CheckpointError> {
        let (mut config, hugging_face) = read_config(&path.join(CONFIG), rotary_dim)?;
        // It is about the files: in memory the model may be held in any form.
        let quantization = match config.extra.shift_remove(quantization::KEY) {
            None | Some(Value::Null) => None,
            Some(value) => Some(Quantization::from_json(&value, &config)?),
        };
        let (single, index) = (path.join(SINGLE), path.join(INDEX));
        let (listed_in, stored) = if single.exists() {
            let names = Container::open(&single)?.names();
            (single.clone(), names.into_iter().map(|name| (name, single.clone())).collect())
        } else if index.exists() {
            let stored = read_index(&index)?;
            (index, stored)
        } else {
            (path.to_path_buf(), BTreeMap::new())
        };
        Ok(Self { path: path.into(), config, quantization, hugging_face, listed_in, stored })
    }

    /// The configuration; of a Hugging Face conversion, in M1's keys. Without how the files are quantized.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// How the files are quantized, if they are.
    pub fn quantization(&self) -> Option<Quantization> {
        self.quantization
    }

    /// Whether this is Hugging Face's own conversion (`model_type: minimax`).
    pub fn is_hugging_face(&self) -> bool {
        self.hugging_face
    }

    /// Whether there is any list of tensors, be it an index without its shards.
    pub fn has_weights(&self) -> bool {
        self.listed_in != self.path
    }

    /// The file that lists the tensors, or the directory if there is none.
    pub fn listed_in(&self) -> &Path {
        &self.listed_in
    }

    /// Every file that holds tensors.
    pub fn files(&self) -> Vec<&Path> {
        let distinct: HashSet<&Path> = self.stored.values().map(PathBuf::as_path).collect();
        let mut files: Vec<&Path> = distinct.into_iter().collect();
        files.sort();
        files
    }

    /// Expected and listed tensors, compared by name.
    pub fn compare(&self) -> Comparison {
        let specs = names::tensors(&self.config);
        let mut used = HashSet::new();
        let mut missing = Vec::new();
        let mut expected = 0;
        for spec in &specs {
            expected += 1;
            match self.locate(spec) {
                Some(found) => _ = used.insert(found.stored),
                None => missing.push(spec.name.clone()),
            }
            if self.blocks(spec).is_some() {
                expected += 1;
                let name = quantization::scales_of(&spec.name);
                if self.stored.contains_key(&name) { _ = used.insert(name) } else { missing.push(name) }
            }
        }
        let derived = |name: &str| self.hugging_face && hugging_face::is_derived(name);
        let unexpected = self.stored.keys().filter(|name| !used.contains(*name) && !derived(name)).cloned().collect();
        Comparison { expected, found: expected - missing.len(), missing, unexpected }
    }

    fn blocks(&self, spec: &TensorSpec) -> Option<Blocks> {
        self.quantization.and_then(|quantization| quantization.of(spec.role))
    }

    /// Where a tensor of the model is stored, if it is listed.
    fn locate(&self, spec: &TensorSpec) -> Option<Found> {
        let has = |name: &str| self.stored.contains_key(name);
        if self.hugging_face {
            hugging_face::locate(&spec.name, &spec.shape, self.config.num_local_experts, has)
        } else {
            has(&spec.name).then(|| Found { stored: spec.name.clone(), shape: spec.shape.clone(), first: 0 })
        }
    }

    /// Opens every file and holds it against the list: shards that are absent, tensors that the list puts in the
    /// wrong file, or that it leaves out.
    fn open_files(&self) -> Result<BTreeMap<PathBuf, Container>, CheckpointError> {
        if !self.has_weights() {
            return Err(CheckpointError::NoWeights(self.path.clone()));
        }
        let sharded = self.listed_in.ends_with(INDEX);
        let mut files = BTreeMap::new();
        for file in self.files() {
            if sharded && !file.exists() {
                let shard = file.file_name().unwrap_or_default().to_string_lossy();
                let problem = format!("names shard `{shard}`, which is not there");
                return Err(CheckpointError::Index { path: self.listed_in.clone(), problem });
            }
            files.insert(file.to_path_buf(), Container::open(file)?);
        }
        for (tensor, file) in &self.stored {
            if files[file].info(tensor).is_none() {
                return Err(CheckpointError::Missing { path: file.clone(), tensors: vec![tensor.clone()] });
            }
        }
        for (path, container) in &files {
            let stray = |name: &String| self.stored.get(name) != Some(path);
            let unlisted: Vec<String> = container.names().into_iter().filter(stray).collect();
            if let Some(name) = unlisted.first() {
                let file = path.file_name().unwrap_or_default().to_string_lossy();
                let problem = format!("`{file}` holds tensor `{name}`, which the index does not list there");
                return Err(CheckpointError::Index { path: self.listed_in.clone(), problem });
            }
        }
        Ok(files)
    }

    /// Reads every header and holds it against the configuration: exactly the tensors that it asks for, in the right
    /// shapes, as F32, BF16 or F16 or in the blocks that it says. Returns where each of the model's tensors is.
    pub(crate) fn check(&self) -> Result<Vec<Checked>, CheckpointError> {
        let files: BTreeMap<_, _> =
            self.open_files()?.into_iter().map(|(path, container)| (path, Arc::new(container))).collect();
        let Comparison { missing, unexpected, .. } = self.compare();
        if !missing.is_empty() {
            return Err(CheckpointError::Missing { path: self.listed_in.clone(), tensors: missing });
        }
        if !unexpected.is_empty() {
            return Err(CheckpointError::Unexpected { path: self.listed_in.clone(), tensors: unexpected });
        }
        names::tensors(&self.config).into_iter().map(|spec| self.check_tensor(spec, &files)).collect()
    }

    fn check_tensor(
        &self,
        spec: TensorSpec,
        files: &BTreeMap<PathBuf, Arc<Container>>,
    ) -> Result<Checked, CheckpointError> {
        let place = self.locate(&spec).ok_or_else(|| self.lacks(&spec.name))?;
        let numbers = "F32, BF16 or F16";
        let [rows, width] = match spec.shape[..] {
            [width] => [1, width],
            [rows, width] => [rows, width],
            _ => unreachable!("tensors of a model are vectors and matrices"),
        };
        let Some(blocks) = self.blocks(&spec) else {
            let (mut at, dtype) = self.find(&place.stored, &place.shape, files)?;
            let number = match dtype {
                Dtype::F32 => Number::F32,
                Dtype::BF16 => Number::Bf16,
                Dtype::F16 => Number::F16,
                other => return Err(wrong_dtype(&at, place.stored, other, numbers)),
            };
            at.start += place.first * number.size();
            let rows = Rows::new(spec.name.clone(), at, Stored::Numbers(number), rows, width);
            return Ok(Checked { spec, rows });
        };
        let (dtype, shape) = match blocks.bits {
            Bits::Int8 => (Dtype::I8, [rows, width]),
            Bits::Int4 => (Dtype::U8, [rows, width / 2]),
        };
        let (at, found) = self.find(&spec.name, &shape, files)?;
        if found != dtype {
            let expected =
                if dtype == Dtype::I8 { "I8, as quantization_config says" } else { "U8, as quantization_config says" };
            return Err(wrong_dtype(&at, spec.name, found, expected));
        }
        let name = quantization::scales_of(&spec.name);
        let (scales, found) = self.find(&name, &[rows, width / blocks.block], files)?;
        if found != Dtype::F16 {
            return Err(wrong_dtype(&scales, name, found, "F16"));
        }
        let rows = Rows::new(spec.name.clone(), at, Stored::Blocks(blocks, scales), rows, width);
        Ok(Checked { spec, rows })
    }

    fn lacks(&self, name: &str) -> CheckpointError {
        CheckpointError::Missing { path: self.listed_in.clone(), tensors: vec![name.into()] }
    }

    /// A stored tensor that must have this shape, and its dtype.
    fn find(
        &self,
        name: &str,
        shape: &[usize],
        files: &BTreeMap<PathBuf, Arc<Container>>,
    ) -> Result<(Place, Dtype), CheckpointError> {
        let container = self.stored.get(name).and_then(|file| files.get(file)).ok_or_else(|| self.lacks(name))?;
        let info = container.info(name).ok_or_else(|| self.lacks(name))?;
        if info.shape != shape {
            let (found, expected) = (info.shape.clone(), shape.to_vec());
            return Err(CheckpointError::Shape { path: container.path().into(), tensor: name.into(), found, expected });
        }
        Ok((Place { container: container.clone(), start: info.data_offsets.0 }, info.dtype))
    }

    /// Checks every header as loading does, without reading a weight; returns the bytes of all tensors as stored.
    pub fn verify(&self) -> Result<u64, CheckpointError> {
        Ok(self.check()?.iter().map(|tensor| tensor.rows.bytes()).sum())
    }
}

fn wrong_dtype(at: &Place, tensor: String, found: Dtype, expected: &'static str) -> CheckpointError {
    CheckpointError::Dtype { path: at.container.path().into(), tensor, found: found.to_string(), expected }
}

/// One of the model's tensors, found and of the right kind.
pub(crate) struct Checked {
    pub spec: TensorSpec,
    /// A norm is one row.
    pub rows: Rows,
}

/// Reads a `config.json` of either kind; true if it was Hugging Face's.
fn read_config(path: &Path, rotary_dim: Option<usize>) -> Result<(ModelConfig, bool), CheckpointError> {
    let text = std::fs::read_to_string(path).map_err(|error| ConfigError::Read { path: path.to_path_buf(), error })?;
    let named = |error| ConfigError::File { path: path.to_path_buf(), error: Box::new(error) };
    let mut keys: Map<String, Value> =
        serde_json::from_str(&text).map_err(|e| named(ConfigError::Json(e.to_string())))?;
    if keys.get("model_type").is_some_and(|kind| kind == HF_MODEL_TYPE) {
        if let Some(value) = keys.get(quantization::KEY).filter(|value| !value.is_null()) {
            let found: String = value.to_string().chars().take(60).collect();
            return Err(named(invalid(quantization::KEY, found, "null with model_type \"minimax\"")).into());
        }
        return Ok((hugging_face::translate(keys, rotary_dim, path)?, true));
    }
    if let Some(dim) = rotary_dim {
        keys.insert("rotary_dim".into(), dim.into());
    }
    Ok((ModelConfig::try_from(keys).map_err(named)?, false))
}

fn read_index(path: &Path) -> Result<BTreeMap<String, PathBuf>, CheckpointError> {
    let wrong = |problem: String| CheckpointError::Index { path: path.into(), problem };
    let text = std::fs::read_to_string(path).map_err(CheckpointError::io(path, "read"))?;
    let index: Value = serde_json::from_str(&text).map_err(|error| wrong(format!("not JSON: {error}")))?;
    let Some(map) = index.get("weight_map").and_then(Value::as_object) else {
        return Err(wrong("no object `weight_map`: expected tensor names with their shards".into()));
    };
    let folder = path.parent().unwrap_or(Path::new("."));
    map.iter()
        .map(|(tensor, shard)| {
            // A plain name only: an index must not reach outside its directory.
            let name = shard.as_str().filter(|name| Path::new(name).file_name().is_some_and(|plain| plain == *name));
            let name = name.ok_or_else(|| wrong(format!("tensor `{tensor}` is in {shard}: expected a file name")))?;
            Ok((tensor.clone(), folder.join(name)))
        })
        .collect()
}
