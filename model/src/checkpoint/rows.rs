//! A matrix of a checkpoint: its rows, whatever they are stored as, read where they lie.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use half::f16;
use indicatif::ProgressBar;
use m1_kernels::base::packed::{QuantizeError, dequantize_row, quantize_row};

use super::container::Container;
use super::convert::{Number, widen};
use super::error::CheckpointError;
use super::quantization::{Bits, Blocks};
use super::random::Draw;

/// Where numbers lie in a mapped file.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub container: Arc<Container>,
    /// The first byte in the container's data.
    pub start: usize,
}

impl Place {
    fn bytes(&self, first: usize, len: usize) -> &[u8] {
        self.container.bytes(self.start + first..self.start + first + len)
    }
}

/// What a matrix is stored as.
#[derive(Debug, Clone)]
pub(crate) enum Stored {
    Numbers(Number),
    /// Integers, with their scales elsewhere.
    Blocks(Blocks, Place),
}

/// Where rows come from.
#[derive(Debug, Clone)]
enum Source {
    Mapped(Place),
    /// No file: numbers in bf16, drawn when they are read.
    Drawn(Draw),
}

/// A matrix `[rows, width]` in a mapped file (a vector is one row), or one that is drawn. Rows are read, and widened to f32
/// exactly, when they are asked for; nothing else is held.
#[derive(Debug, Clone)]
pub struct Rows {
    /// Its name in the file.
    name: String,
    source: Source,
    stored: Stored,
    rows: usize,
    width: usize,
    /// Quantize each row when it is read.
    quantize: Option<Blocks>,
}

impl Rows {
    pub(crate) fn new(name: String, place: Place, stored: Stored, rows: usize, width: usize) -> Self {
        Self { name, source: Source::Mapped(place), stored, rows, width, quantize: None }
    }

    /// Rows of no file.
    pub(super) fn drawn(name: String, draw: Draw, rows: usize, width: usize) -> Self {
        let stored = Stored::Numbers(Number::Bf16);
        Self { name, source: Source::Drawn(draw), stored, rows, width, quantize: None }
    }

    /// The same rows as if they were stored in these blocks. Those that are already must be in the same.
    pub(crate) fn quantized(mut self, blocks: Option<Blocks>) -> Self {
        if let Stored::Numbers(_) = self.stored {
            self.quantize = blocks;
        }
        self
    }

    /// The name it is stored under.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Numbers of a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Bytes in the file, scales included; those that random numbers would take there.
    pub fn bytes(&self) -> u64 {
        let scales = match &self.stored {
            Stored::Numbers(_) => 0,
            Stored::Blocks(blocks, _) => self.rows * self.width / blocks.block * 2,
        };
        (self.rows * self.row_bytes() + scales) as u64
    }

    /// The numbers' type; `None` if they are integers in blocks.
    pub(crate) fn number(&self) -> Option<Number> {
        match self.stored {
            Stored::Numbers(number) => Some(number),
            Stored::Blocks(..) => None,
        }
    }

    /// The blocks in which [`Rows::read_blocks`] gives the rows.
    pub(crate) fn blocks(&self) -> Option<Blocks> {
        match self.stored {
            Stored::Numbers(_) => self.quantize,
            Stored::Blocks(blocks, _) => Some(blocks),
        }
    }

    /// The file of some rows, and where they lie in its data, without scales.
    fn mapped(&self, rows: Range<usize>) -> Option<(&Container, Range<usize>)> {
        let Source::Mapped(place) = &self.source else {
            return None;
        };
        let each = self.row_bytes();
        Some((&place.container, place.start + rows.start * each..place.start + rows.end * each))
    }

    fn row_bytes(&self) -> usize {
        match &self.stored {
            Stored::Numbers(number) => self.width * number.size(),
            Stored::Blocks(blocks, _) => self.width * blocks.bits.count() / 8,
        }
    }

    /// The bytes of some rows as they are stored, without scales.
    ///
    /// # Panics
    /// If they are drawn.
    pub(crate) fn raw(&self, rows: Range<usize>) -> &[u8] {
        let (container, bytes) = self.mapped(rows).expect("rows of a file");
        container.bytes(bytes)
    }

    /// The bytes of a row that lies in a file in bf16 and is wanted as it is.
    pub(crate) fn raw_bf16(&self, row: usize) -> Option<&[u8]> {
        let bf16 =
            matches!((&self.source, self.number(), self.blocks()), (Source::Mapped(_), Some(Number::Bf16), None));
        bf16.then(|| self.raw(row..row + 1))
    }

    /// Row `row` of numbers, as f32.
    fn numbers(&self, row: usize, number: Number, out: &mut [f32]) {
        match &self.source {
            Source::Mapped(_) => widen(self.raw(row..row + 1), number, out),
            Source::Drawn(draw) => draw.row(row, out),
        }
    }

    /// Row `row` as f32.
    ///
    /// # Errors
    /// What is wrong with it; only rows in blocks can be wrong. `out` then holds what they would give.
    ///
    /// # Panics
    /// If there is no such row, or `out` is not one row wide.
    pub fn read(&self, row: usize, out: &mut [f32]) -> Result<(), &'static str> {
        assert!(row < self.rows && out.len() == self.width, "row {row} of {} in {} numbers", self.name, out.len());
        match (&self.stored, self.blocks()) {
            (Stored::Numbers(number), None) => {
                self.numbers(row, *number, out);
                Ok(())
            }
            (_, Some(blocks)) => {
                let mut values = vec![0; self.width];
                let mut scales = vec![f16::ZERO; self.width / blocks.block];
                let result = self.read_blocks(row, &mut values, &mut scales);
                dequantize_row(blocks.format(), &values, &scales, out);
                result
            }
            (Stored::Blocks(..), None) => unreachable!("what is stored in blocks has blocks"),
        }
    }

    /// Looks at the scales alone, if there are any: what can be wrong with rows that are not read now.
    pub(crate) fn check_scales(&self) -> Result<(), CheckpointError> {
        let Stored::Blocks(blocks, place) = &self.stored else {
            return Ok(());
        };
        let bytes = place.bytes(0, self.rows * self.width / blocks.block * 2);
        let sound = bytes.as_chunks().0.iter().all(|raw| f16::from_le_bytes(*raw).is_finite());
        if sound { Ok(()) } else { Err(self.flawed(BAD_SCALE)) }
    }

    /// The error for what is wrong with a row.
    pub(crate) fn flawed(&self, what: &str) -> CheckpointError {
        let path = match &self.source {
            Source::Mapped(place) => place.container.path().into(),
            Source::Drawn(_) => "random weights".into(),
        };
        let tensor = self.name.clone();
        CheckpointError::Transfer { path, tensor, problem: what.into() }
    }

    /// Row `row` in the blocks of [`Rows::blocks`].
    ///
    /// # Errors
    /// What is wrong with it: weights or scales that are not finite, or too large.
    pub(crate) fn read_blocks(&self, row: usize, values: &mut [i8], scales: &mut [f16]) -> Result<(), &'static str> {
        match &self.stored {
            Stored::Numbers(number) => {
                let mut numbers = vec![0f32; self.width];
                self.numbers(row, *number, &mut numbers);
                let blocks =
                    self.quantize.expect("rows of numbers are asked for blocks only when they are to have some");
                quantize_row(blocks.format(), &numbers, values, scales).map_err(|error| match error {
                    QuantizeError::NotFinite => "holds weights that are not finite: they cannot be quantized",
                    QuantizeError::TooLarge => "holds weights too large for a scale in f16: they cannot be quantized",
                })
            }
            Stored::Blocks(blocks, place) => {
                let bytes = self.raw(row..row + 1);
                match blocks.bits {
                    Bits::Int8 => values.iter_mut().zip(bytes).for_each(|(value, byte)| *value = *byte as i8),
                    Bits::Int4 => {
                        for (pair, byte) in values.as_chunks_mut().0.iter_mut().zip(bytes) {
                            *pair = unpack(*byte);
                        }
                    }
                }
                let raw = place.bytes(row * 2 * scales.len(), 2 * scales.len()).as_chunks().0;
                for (scale, raw) in scales.iter_mut().zip(raw) {
                    *scale = f16::from_le_bytes(*raw);
                }
                if scales.iter().all(|scale| scale.is_finite()) { Ok(()) } else { Err(BAD_SCALE) }
            }
        }
    }
}

const BAD_SCALE: &str = "has a scale that is not finite: the file is damaged";

/// Two weights of one byte, the earlier in the low half.
fn unpack(byte: u8) -> [i8; 2] {
    [(byte & 0xf) as i8 - 8, (byte >> 4) as i8 - 8]
}

/// The byte of two weights from -8 to 7.
pub(crate) fn pack(pair: [i8; 2]) -> u8 {
    (pair[0] + 8) as u8 | ((pair[1] + 8) as u8) << 4
}

/// Rows that are all read once, by any threads: pages come ahead and are let go behind, a piece at a time, so that mapped
/// pages never add up; the progress is told, and what is wrong remembered.
pub(crate) struct Once<'a> {
    rows: &'a Rows,
    /// Rows of a piece.
    piece: usize,
    /// Rows of each piece that are not read yet.
    left: Vec<AtomicUsize>,
    bar: &'a ProgressBar,
    flaw: OnceLock<&'static str>,
}

/// Bytes of a piece, about.
const PIECE: usize = 4 << 20;

impl<'a> Once<'a> {
    pub fn new(rows: &'a Rows, bar: &'a ProgressBar) -> Self {
        let piece = PIECE.div_ceil(rows.row_bytes());
        let left = (0..rows.rows).step_by(piece).map(|start| AtomicUsize::new(piece.min(rows.rows - start))).collect();
        Self { rows, piece, left, bar, flaw: OnceLock::new() }
    }

    /// Reads row `row` through `read`; call it once for each.
    pub fn row(&self, row: usize, read: impl FnOnce(&Rows) -> Result<(), &'static str>) {
        let piece = row / self.piece;
        let range = self.range(piece);
        if self.left[piece].load(Ordering::Relaxed) == range.len() {
            // Once, or twice if two threads begin: it is advice.
            let next = (piece + 1 < self.left.len()).then(|| self.range(piece + 1));
            for range in std::iter::once(range.clone()).chain(next) {
                if let Some((container, bytes)) = self.rows.mapped(range) {
                    container.fetch(bytes);
                }
            }
        }
        if let Err(flaw) = read(self.rows) {
            let _ = self.flaw.set(flaw);
        }
        if self.left[piece].fetch_sub(1, Ordering::AcqRel) == 1 {
            self.bar.inc(self.rows.bytes() * range.len() as u64 / self.rows.rows as u64);
            if let Some((container, bytes)) = self.rows.mapped(range) {
                container.release(bytes);
            }
        }
    }

    fn range(&self, piece: usize) -> Range<usize> {
        piece * self.piece..self.rows.rows.min((piece + 1) * self.piece)
    }

    /// What was wrong with a row, if anything was.
    pub fn finish(self) -> Result<(), CheckpointError> {
        self.flaw.get().map_or(Ok(()), |flaw| Err(self.rows.flawed(flaw)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nibbles_come_back() {
        for low in -8..8 {
            for high in -8..8 {
                assert_eq!(unpack(pack([low, high])), [low, high]);
            }
        }
        assert_eq!(pack([-8, 7]), 0xf0);
    }
}
