//! What can be wrong with a checkpoint. Every message is one line that names the file, the tensor and what would be
//! right.

use std::path::{Path, PathBuf};

use crate::config::ConfigError;

/// See the module.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// `config.json` is absent, unreadable or absurd.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A Hugging Face `minimax` configuration that does not say how much of a head RoPE turns.
    #[error(
        "{}: neither `rotary_dim` nor `rope_parameters.partial_rotary_factor` is there (MiniMax-M1 has 64): give `--rotary-dim`",
        .0.display()
    )]
    RotaryDim(PathBuf),
    /// The system refused to read, write or rename.
    #[error("{}: cannot {action}: {error}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the system said.
        error: std::io::Error,
    },
    /// A directory without weights.
    #[error("{}: no weights: expected model.safetensors or model.safetensors.index.json", .0.display())]
    NoWeights(PathBuf),
    /// A file that is not a sound safetensors container.
    #[error("{}: not a sound safetensors file: {problem}", path.display())]
    Container {
        /// The file.
        path: PathBuf,
        /// What is wrong in it.
        problem: String,
    },
    /// An index that can't be used.
    #[error("{}: {problem}", path.display())]
    Index {
        /// The index.
        path: PathBuf,
        /// What is wrong in it.
        problem: String,
    },
    /// Tensors that the configuration asks for are not there.
    #[error("{}: {} missing: {}", path.display(), count(tensors), few(tensors))]
    Missing {
        /// File, index or directory.
        path: PathBuf,
        /// Their names.
        tensors: Vec<String>,
    },
    /// Tensors that the configuration does not know.
    #[error("{}: {} not expected by config.json: {}", path.display(), count(tensors), few(tensors))]
    Unexpected {
        /// File, index or directory.
        path: PathBuf,
        /// Their names.
        tensors: Vec<String>,
    },
    /// A tensor of the wrong shape.
    #[error("{}: tensor `{tensor}` has shape {found:?}: config.json asks for {expected:?}", path.display())]
    Shape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its shape.
        found: Vec<usize>,
        /// The right one.
        expected: Vec<usize>,
    },
    /// A tensor of numbers that weights are not stored in.
    #[error("{}: tensor `{tensor}` is {found}: expected {expected}", path.display())]
    Dtype {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its dtype.
        found: String,
        /// The right one.
        expected: &'static str,
    },
    /// What is to be quantized already is.
    #[error("{}: is quantized already ({found}): quantize the checkpoint that it was made from", path.display())]
    Quantized {
        /// The directory.
        path: PathBuf,
        /// How.
        found: String,
    },
    /// Blocks that would not fill a row.
    #[error("blocks of {block} weights do not divide {key} = {width}")]
    Block {
        /// Weights of a block.
        block: usize,
        /// The configuration's key.
        key: &'static str,
        /// Its value.
        width: usize,
    },
    /// A place for a new checkpoint that holds something.
    #[error("{}: exists and is not an empty directory: a quantized checkpoint gets one of its own", .0.display())]
    Occupied(PathBuf),
    /// bf16 was asked for on a device that can't compute in it.
    #[error("this device does not compute in bf16: {0} as f32")]
    NoBf16(&'static str),
    /// A tensor could not be moved between file and device.
    #[error("{}: tensor `{tensor}`: {problem}", path.display())]
    Transfer {
        /// File or directory.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What went wrong.
        problem: String,
    },
}

impl CheckpointError {
    pub(crate) fn io(path: &Path, action: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |error| Self::Io { path, action, error }
    }
}

fn count(tensors: &[String]) -> String {
    if tensors.len() == 1 { "1 tensor".into() } else { format!("{} tensors", tensors.len()) }
}

/// The first names; thousands help nobody (`m1 inspect` lists them all).
fn few(tensors: &[String]) -> String {
    let shown = tensors.iter().take(3).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    if tensors.len() > 3 { shown + ", …" } else { shown }
}
