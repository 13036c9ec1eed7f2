//! Checkpoints in and out: directories in Hugging Face form.
//!
//! `names` says which tensors a model has, `directory` what a directory claims to hold, `container` opens one
//! safetensors file, `rows` reads a matrix where it lies, `slots` are the places for weights in a model; `read` and
//! `write` go between the two, `random` draws weights where no file is, `quantization` and `quantize` know blocks of small
//! integers, `hugging_face` how Hugging Face's own conversion names things.

mod container;
mod convert;
mod directory;
mod error;
mod hugging_face;
mod names;
mod quantization;
mod quantize;
mod random;
mod read;
mod rows;
mod slots;
mod write;

use burn::tensor::DType;

pub use container::Container;
pub use directory::{CONFIG, Comparison, Directory, INDEX, SINGLE};
pub use error::CheckpointError;
pub use hugging_face::HF_MODEL_TYPE;
pub use names::{Role, TensorSpec, tensors};
pub use quantization::{Bits, Blocks, Quantization};
pub use quantize::{QuantizeOptions, quantize};
pub use random::random;
pub use read::{LoadOptions, load};
pub use rows::Rows;
pub(crate) use slots::{Slot, slots};
pub use write::{SaveOptions, save};

/// The dtype of matrices in memory and in files. Norms and the router are f32 in memory whatever this says, and the
/// router is f32 in files too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightDtype {
    /// 4 bytes a weight.
    F32,
    /// 2 bytes a weight.
    Bf16,
}

impl WeightDtype {
    /// As tensors name it.
    pub fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
        }
    }

    /// Bytes of one weight.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

impl std::str::FromStr for WeightDtype {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "f32" => Ok(Self::F32),
            "bf16" => Ok(Self::Bf16),
            other => Err(format!("`{other}` is not a dtype: expected f32 or bf16")),
        }
    }
}

impl std::fmt::Display for WeightDtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        })
    }
}
