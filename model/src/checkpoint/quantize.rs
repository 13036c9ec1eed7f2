//! From a checkpoint to a quantized one, file to file: no model is made, and no more than some rows are held.

use std::path::Path;

use half::f16;
use indicatif::ProgressBar;
use rayon::prelude::*;
use safetensors::Dtype;

use super::convert::Number;
use super::directory::{Checked, Directory};
use super::error::CheckpointError;
use super::quantization::{self, Bits, Blocks, Quantization};
use super::read::{check_quantization, progress};
use super::rows::{Once, Rows, pack};
use super::write::{Output, Part, Pending, Planned};

/// How to quantize.
#[derive(Debug, Clone)]
pub struct QuantizeOptions {
    /// What, and into what.
    pub quantization: Quantization,
    /// As in [`super::SaveOptions`].
    pub max_shard_bytes: u64,
    /// As in [`super::LoadOptions`].
    pub rotary_dim: Option<usize>,
    /// Names of other files that go along as they are, if they are there: the tokenizer's.
    pub beside: Vec<String>,
    /// Show a progress bar on stderr, if that is a terminal.
    pub progress: bool,
}

/// Reads the checkpoint in `from` and writes it, quantized, to `to`: a new or an empty directory. Gives the bytes of all
/// tensors before and after.
///
/// Everything that is not quantized keeps its bits. Loading the result is to the bit the same as loading `from` with
/// [`super::LoadOptions::quantize`].
pub fn quantize(from: &Path, to: &Path, options: &QuantizeOptions) -> Result<[u64; 2], CheckpointError> {
    let directory = Directory::open(from, options.rotary_dim)?;
    check_quantization(&directory, from, Some(options.quantization))?;
    let checked = directory.check()?;
    let before: u64 = checked.iter().map(|tensor| tensor.rows.bytes()).sum();
    let bar = if options.progress { progress("quantizing", before) } else { ProgressBar::hidden() };
    let made = make_folder(to)?;
    let result = write(from, to, &directory, checked, options, &bar);
    bar.finish_and_clear();
    if result.is_err() && made {
        let _ = std::fs::remove_dir(to); // what was written is gone already
    }
    Ok([before, result?])
}

/// Whether the directory had to be made.
fn make_folder(to: &Path) -> Result<bool, CheckpointError> {
    match std::fs::read_dir(to) {
        Ok(mut entries) => match entries.next() {
            None => Ok(false),
            Some(_) => Err(CheckpointError::Occupied(to.into())),
        },
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            std::fs::create_dir_all(to).map_err(CheckpointError::io(to, "make the directory"))?;
            Ok(true)
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => Err(CheckpointError::Occupied(to.into())),
        Err(error) => Err(CheckpointError::io(to, "list")(error)),
    }
}

fn write(
    from: &Path,
    to: &Path,
    directory: &Directory,
    checked: Vec<Checked>,
    options: &QuantizeOptions,
    bar: &ProgressBar,
) -> Result<u64, CheckpointError> {
    let mut pending = Pending::new(to);
    for name in &options.beside {
        let source = from.join(name);
        if source.is_file() {
            let bytes = std::fs::read(&source).map_err(CheckpointError::io(&source, "read"))?;
            pending.write(name, |file| file.write(&bytes))?;
        }
    }
    let planned: Vec<Planned> = checked
        .into_iter()
        .map(|Checked { spec, rows }| {
            let (bar, name) = (bar.clone(), spec.name);
            match options.quantization.of(spec.role) {
                None => Planned {
                    parts: vec![Part { name, dtype: dtype(&rows), shape: spec.shape }],
                    write: Box::new(move |file| copy(&rows, file, &bar)),
                },
                Some(blocks) => Planned {
                    parts: parts(name, &rows, blocks),
                    write: Box::new(move |file| write_blocks(rows.quantized(Some(blocks)), blocks, file, &bar)),
                },
            }
        })
        .collect();
    let after = planned.iter().map(Planned::bytes).sum();
    let mut config = directory.config().clone();
    config.extra.insert(quantization::KEY.into(), options.quantization.to_json());
    pending.write_all(planned, &config, options.max_shard_bytes)?;
    Ok(after)
}

fn dtype(rows: &Rows) -> Dtype {
    match rows.number() {
        Some(Number::F32) => Dtype::F32,
        Some(Number::Bf16) => Dtype::BF16,
        Some(Number::F16) => Dtype::F16,
        None => unreachable!("a checkpoint that is quantized already was refused"),
    }
}

fn parts(name: String, rows: &Rows, blocks: Blocks) -> Vec<Part> {
    let (dtype, width) = match blocks.bits {
        Bits::Int8 => (Dtype::I8, rows.width()),
        Bits::Int4 => (Dtype::U8, rows.width() / 2),
    };
    let scales = quantization::scales_of(&name);
    vec![
        Part { name, dtype, shape: vec![rows.rows(), width] },
        Part { name: scales, dtype: Dtype::F16, shape: vec![rows.rows(), rows.width() / blocks.block] },
    ]
}

/// Numbers that are handled before they are written.
const PIECE: usize = 1 << 20;

/// The same bits.
fn copy(rows: &Rows, file: &mut Output, bar: &ProgressBar) -> Result<(), CheckpointError> {
    let once = Once::new(rows, bar);
    let mut result = Ok(());
    for row in 0..rows.rows() {
        once.row(row, |rows| {
            if result.is_ok() {
                result = file.write(rows.raw(row..row + 1));
            }
            Ok(())
        });
    }
    result
}

/// The integers of all rows, then all scales.
fn write_blocks(rows: Rows, blocks: Blocks, file: &mut Output, bar: &ProgressBar) -> Result<(), CheckpointError> {
    let width = rows.width();
    let step = PIECE.div_ceil(width).min(rows.rows());
    let per_row = width / blocks.block;
    let (mut values, mut scales) = (vec![0i8; step * width], vec![f16::ZERO; rows.rows() * per_row]);
    let once = Once::new(&rows, bar);
    for (piece, scales) in scales.chunks_mut(step * per_row).enumerate() {
        let values = &mut values[..scales.len() / per_row * width];
        let all = values.par_chunks_mut(width).zip(scales.par_chunks_mut(per_row));
        all.enumerate().for_each(|(i, (values, scales))| {
            let row = piece * step + i;
            once.row(row, |rows| rows.read_blocks(row, values, scales));
        });
        match blocks.bits {
            Bits::Int8 => file.write(bytemuck::cast_slice(values))?,
            Bits::Int4 => {
                let pairs = values.as_chunks().0;
                file.write(&pairs.iter().map(|pair| pack(*pair)).collect::<Vec<u8>>())?;
            }
        }
    }
    once.finish()?;
    file.write(bytemuck::cast_slice(&scales))
}
