//! Weights as products read them: panels of 32 output columns, K-major, at their stored size.
//!
//! One layout serves one row and thousands: a lane is an output column, so each result is one sequential chain along
//! K, and a decode step streams each panel once, from end to end. A panel is a string of bytes that only its format
//! understands: [`Format::F32`] and [`Format::Bf16`] are here (units of four bytes, see `tile`), the quantised ones in `quant`.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use half::f16;

pub use super::acts::Acts;
use super::acts::{Form, round_to_pairs};
use super::buffer::{Buffer, SendPtr};
use super::masked::transpose;
use super::pool;
use super::quant::{self, Quant};
pub use super::quant::{QuantizeError, dequantize_row, quantize_row};
use super::simd::{self, Level};
use super::tile::{self, Kind, PANEL, Panels, Rows, Target};

/// How a weight is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// 32-bit floats.
    F32,
    /// The upper half of 32-bit floats.
    Bf16,
    /// Signed bytes with an f16 scale for each `block` (32 or 64) values along the input and each output.
    Int8 {
        /// Values that share a scale.
        block: usize,
    },
    /// Signed nibbles with an f16 scale for each `block` (32 or 64) values along the input and each output.
    Int4 {
        /// Values that share a scale.
        block: usize,
    },
}

impl Format {
    /// Bytes of a panel of 32 columns and `input` steps.
    fn panel_bytes(self, input: usize) -> Result<Option<usize>, PackError> {
        Ok(match self {
            Format::F32 => input.checked_mul(4 * PANEL),
            Format::Bf16 => input.div_ceil(2).checked_mul(4 * PANEL),
            Format::Int8 { .. } | Format::Int4 { .. } => {
                let quant = Quant::of(self).ok_or(PackError::Format(self))?;
                quant.blocks(input).checked_mul(quant.block_bytes())
            }
        })
    }
}

/// Why weights could not be packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PackError {
    /// A block is neither 32 nor 64, or the format is not quantised where it has to be.
    Format(Format),
    /// A weight has no place in a quantised format.
    Quantize {
        /// Its matrix.
        matrix: usize,
        /// Its row.
        row: usize,
        /// What is wrong with it.
        error: QuantizeError,
    },
    /// There is not so much memory (or address space).
    Memory {
        /// Matrices.
        count: usize,
        /// Rows of each.
        out: usize,
        /// Columns of each.
        input: usize,
    },
}

impl fmt::Display for PackError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Format(format) => write!(f, "weights can't be packed as {format:?}"),
            Self::Quantize { matrix, row, error } => write!(f, "matrix {matrix}, row {row}: {error}"),
            Self::Memory { count, out, input } => write!(f, "no memory for {count} weights of {out} × {input}"),
        }
    }
}

impl std::error::Error for PackError {}

/// `count` matrices `[out, in]` of one format, shared by reference count.
#[derive(Clone)]
pub struct Packed {
    inner: Arc<Inner>,
}

struct Inner {
    format: Format,
    count: usize,
    out: usize,
    input: usize,
    panel_bytes: usize,
    data: Buffer,
}

impl fmt::Debug for Packed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { format, count, out, input, .. } = &*self.inner;
        write!(f, "Packed({count} × [{out}, {input}] {format:?})")
    }
}

impl Packed {
    /// Packs `count` matrices `[out, input]`; `row(matrix, out_row, buffer)` writes one row into `buffer` (`input` floats). It is
    /// called from the pool, once per row, in any order. Values that are bf16 already are kept exactly by [`Format::Bf16`].
    ///
    /// # Errors
    /// If the format's block is neither 32 nor 64, there is not enough memory, or a weight can't be quantised.
    pub fn pack(
        format: Format,
        count: usize,
        out: usize,
        input: usize,
        row: &(dyn Fn(usize, usize, &mut [f32]) + Sync),
    ) -> Result<Packed, PackError> {
        let level = simd::level();
        Self::build(format, count, out, input, |matrix, first, panel| {
            if let Some(quant) = Quant::of(format) {
                let (mut x, mut values) = (vec![0.0; input], vec![0; input]);
                let mut scales = vec![f16::ZERO; quant.blocks(input)];
                quant.clear(panel);
                for r in first..out.min(first + PANEL) {
                    row(matrix, r, &mut x);
                    quant.quantize(&x, &mut values, &mut scales).map_err(|error| PackError::Quantize {
                        matrix,
                        row: r,
                        error,
                    })?;
                    quant.put(r - first, &values, &scales, panel);
                }
                return Ok(());
            }
            // 32 rows at a time, the missing ones zero.
            let rows = PANEL.checked_mul(input * 4).and_then(Buffer::try_zeroed);
            let mut rows = rows.ok_or(PackError::Memory { count, out, input })?;
            for (r, buffer) in rows.words_mut().chunks_exact_mut(input.max(1)).enumerate().take(out - first) {
                row(matrix, first + r, buffer);
            }
            pack_panel(level, format, input, rows.words_mut(), panel);
            Ok(())
        })
    }

    /// Packs matrices that are quantised already, as [`quantize_row`] does it: `row(matrix, out_row, values, scales)` writes
    /// one row, `input` values in blocks with one of `scales` each. It is called from the pool, once per row, in any order.
    ///
    /// # Errors
    /// If the format is not quantised, its block is neither 32 nor 64, or there is not enough memory.
    #[allow(clippy::type_complexity)]
    pub fn pack_quantized(
        format: Format,
        count: usize,
        out: usize,
        input: usize,
        row: &(dyn Fn(usize, usize, &mut [i8], &mut [f16]) + Sync),
    ) -> Result<Packed, PackError> {
        let quant = Quant::of(format).ok_or(PackError::Format(format))?;
        Self::build(format, count, out, input, |matrix, first, panel| {
            let (mut values, mut scales) = (vec![0; input], vec![f16::ZERO; quant.blocks(input)]);
            quant.clear(panel);
            for r in first..out.min(first + PANEL) {
                row(matrix, r, &mut values, &mut scales);
                quant.put(r - first, &values, &scales, panel);
            }
            Ok(())
        })
    }

    /// `fill(matrix, first_row, panel)` writes one panel, zero at first.
    fn build(
        format: Format,
        count: usize,
        out: usize,
        input: usize,
        fill: impl Fn(usize, usize, &mut [u8]) -> Result<(), PackError> + Sync,
    ) -> Result<Packed, PackError> {
        let memory = PackError::Memory { count, out, input };
        let panels = out.div_ceil(PANEL);
        let panel_bytes = format.panel_bytes(input)?.ok_or(memory)?;
        let bytes = count.checked_mul(panels).and_then(|n| n.checked_mul(panel_bytes)).ok_or(memory)?;
        let mut data = Buffer::try_shelved(bytes).ok_or(memory)?;
        let failed = OnceLock::new();
        // One panel after the other, whichever thread comes: the pages of a file are let go once all rows of a piece of it are
        // read, and with shares of their own a thread that waits for its core leaves one half-read piece after the other.
        let rest = Mutex::new(data.bytes_mut().chunks_exact_mut(panel_bytes.max(1)).enumerate());
        pool::run(count * panels, |_| {
            let next = rest.lock().unwrap_or_else(PoisonError::into_inner).next();
            if failed.get().is_none()
                && let Some((i, panel)) = next
                && let Err(error) = fill(i / panels, i % panels * PANEL, panel)
            {
                let _ = failed.set(error); // the first one is told
            }
        });
        if let Some(error) = failed.into_inner() {
            return Err(error);
        }
        Ok(Packed { inner: Arc::new(Inner { format, count, out, input, panel_bytes, data }) })
    }

    /// How the weights are stored.
    pub fn format(&self) -> Format {
        self.inner.format
    }

    /// Matrices.
    pub fn count(&self) -> usize {
        self.inner.count
    }

    /// Rows of each matrix: outputs.
    pub fn out(&self) -> usize {
        self.inner.out
    }

    /// Columns of each matrix: inputs.
    pub fn input(&self) -> usize {
        self.inner.input
    }

    /// Panels of each matrix: groups of 32 outputs, the last one perhaps not full.
    pub fn panels(&self) -> usize {
        self.inner.out.div_ceil(PANEL)
    }

    /// Bytes of memory that the weights take.
    pub fn bytes(&self) -> usize {
        self.inner.data.len()
    }

    /// Writes row `out_row` of a matrix into `buffer` (`input` floats), dequantised.
    ///
    /// # Panics
    /// If there is no such row, or `buffer` has another length.
    pub fn row(&self, matrix: usize, out_row: usize, buffer: &mut [f32]) {
        assert!(matrix < self.count() && out_row < self.out() && buffer.len() == self.input());
        let column = out_row % PANEL;
        let panel = self.panel(matrix, out_row / PANEL);
        match self.format() {
            Format::F32 => {
                for (x, unit) in buffer.iter_mut().zip(words(panel).chunks_exact(PANEL)) {
                    *x = unit[column];
                }
            }
            Format::Bf16 => {
                for (pair, unit) in buffer.chunks_mut(2).zip(words(panel).chunks_exact(PANEL)) {
                    let bits = unit[column].to_bits();
                    pair[0] = f32::from_bits(bits << 16);
                    if let Some(odd) = pair.get_mut(1) {
                        *odd = f32::from_bits(bits & 0xffff_0000);
                    }
                }
            }
            Format::Int8 { .. } | Format::Int4 { .. } => {
                let quant = Quant::of(self.format()).unwrap_or_else(|| unreachable!("refused by pack"));
                quant.row(column, panel, buffer);
            }
        }
    }

    /// The bytes of one panel.
    pub(crate) fn panel(&self, matrix: usize, panel: usize) -> &[u8] {
        assert!(matrix < self.count() && panel < self.panels());
        let at = matrix * self.panels() + panel;
        &self.inner.data.bytes()[at * self.inner.panel_bytes..][..self.inner.panel_bytes]
    }
}

fn words(bytes: &[u8]) -> &[f32] {
    bytemuck::cast_slice(bytes)
}

/// Writes one panel from 32 rows of `input` floats (which may be changed on the way).
fn pack_panel(level: Level, format: Format, input: usize, rows: &mut [f32], panel: &mut [u8]) {
    let panel: &mut [f32] = bytemuck::cast_slice_mut(panel);
    match format {
        Format::F32 => transpose(level, PANEL, input, rows, input, panel, PANEL),
        Format::Bf16 => {
            let units = input.div_ceil(2);
            let mut pairs = vec![0.0; units * PANEL];
            for (row, pairs) in rows.chunks_exact(input.max(1)).zip(pairs.chunks_exact_mut(units.max(1))) {
                round_to_pairs(level, row, pairs);
            }
            transpose(level, PANEL, units, &pairs, units, panel, PANEL);
        }
        Format::Int8 { .. } | Format::Int4 { .. } => unreachable!("packed elsewhere"),
    }
}

/// `c[i][32·p ..] = acts[rows[i]] · W[matrix]ᵀ` for the panels `p` asked for, on this thread; `c` holds whole rows of `ldc` floats.
/// A level that this machine has not is lowered to the best it has.
///
/// # Panics
/// If a row, a panel or `c` is not there, or the activations were made for another format or width.
#[allow(clippy::too_many_arguments)]
pub fn multiply(
    level: Level,
    acts: &Acts,
    rows: &[u32],
    w: &Packed,
    matrix: usize,
    panels: Range<usize>,
    c: &mut [f32],
    ldc: usize,
) {
    let columns = w.out().min(panels.end * PANEL);
    assert!(rows.is_empty() || (columns <= ldc && c.len() >= (rows.len() - 1) * ldc + columns));
    // SAFETY: the target lies inside `c`, which is borrowed.
    unsafe { multiply_into(level.here(), acts, Some(rows), w, matrix, panels, SendPtr(c.as_mut_ptr()), ldc) }
}

/// [`multiply`] where several threads write disjoint panels of one `c`; all rows in order if `rows` is not given.
///
/// # Safety
/// `c` must be valid for the columns of `panels` in each row of `ldc` floats, and nothing else may use these meanwhile.
#[allow(clippy::too_many_arguments)]
pub(crate) unsafe fn multiply_into(
    level: Level,
    acts: &Acts,
    rows: Option<&[u32]>,
    w: &Packed,
    matrix: usize,
    panels: Range<usize>,
    c: SendPtr<f32>,
    ldc: usize,
) {
    assert_eq!(acts.k, w.input(), "the activations are not as wide as the weight");
    assert!(matrix < w.count() && panels.end <= w.panels());
    assert!(rows.is_none_or(|rows| rows.iter().all(|&r| (r as usize) < acts.rows)));
    if panels.is_empty() {
        return;
    }
    if let Some(quant) = Quant::of(w.format()) {
        let (bytes, all) = (w.inner.panel_bytes, w.inner.data.bytes());
        let weights = &all[(matrix * w.panels() + panels.start) * bytes..][..panels.len() * bytes];
        let columns = w.out().min(panels.end * PANEL) - panels.start * PANEL;
        let count = rows.map_or(acts.rows, <[u32]>::len);
        let row = |i: usize| rows.map_or(i, |rows| rows[i] as usize);
        // SAFETY: the caller answers for `c`.
        unsafe {
            let start = c.get().wrapping_add(panels.start * PANEL); // what is before it need not be there
            let target = Target { start, stride: ldc, columns, add: false };
            match &acts.form {
                Form::Quantized(acts) => quant::multiply(level, quant, acts, count, row, weights, target),
                Form::F32 { stride, data } => {
                    quant::multiply_exact(level, quant, acts.k, data.words(), *stride, count, row, weights, target);
                }
                Form::Bf16 { .. } => panic!("activations that were not made for {:?}", w.format()),
            }
        }
        return;
    }
    let (kind, stride, data) = match (&acts.form, w.format()) {
        (Form::F32 { stride, data }, Format::F32) => (Kind::F32, *stride, data),
        (Form::F32 { stride, data }, Format::Bf16) => (Kind::WideBf16, *stride, data),
        (Form::Bf16 { stride, data }, Format::Bf16) => (Kind::Bf16, *stride, data),
        (_, format) => panic!("activations that were not made for {format:?}"),
    };
    let bytes = w.inner.panel_bytes;
    let first = (matrix * w.panels() + panels.start) * bytes;
    let weights = words(&w.inner.data.bytes()[first..][..panels.len() * bytes]);
    let columns = w.out().min(panels.end * PANEL) - panels.start * PANEL;
    let count = rows.map_or(acts.rows, <[u32]>::len);
    // SAFETY: the caller answers for `c`.
    unsafe {
        let start = c.get().wrapping_add(panels.start * PANEL); // what is before it need not be there
        let target = Target { start, stride: ldc, columns, add: false };
        let rows = Rows { data: data.words(), stride, count, index: rows };
        tile::product(
            level,
            kind,
            rows_units(kind, acts.k),
            rows,
            Panels { data: weights, stride: bytes / 4, following: None },
            target,
        );
    }
}

/// Units along K of `k` values.
fn rows_units(kind: Kind, k: usize) -> usize {
    if kind == Kind::F32 { k } else { k.div_ceil(2) }
}

/// The product of all rows with some steps of one panel that is brought into order as it is multiplied: `panel` holds the
/// units `from .. from + units` of bf16 weights.
///
/// # Safety
/// As [`tile::product`].
pub(crate) unsafe fn multiply_bf16_block(
    level: Level,
    acts: &Acts,
    from: usize,
    units: usize,
    panel: &[f32],
    target: Target,
) {
    let (kind, stride, data, first) = match &acts.form {
        Form::Bf16 { stride, data } => (Kind::Bf16, *stride, data, from),
        Form::F32 { stride, data } => (Kind::WideBf16, *stride, data, 2 * from),
        Form::Quantized(_) => panic!("activations that were not made for bf16"),
    };
    let data = data.words().get(first..).unwrap_or_default();
    let rows = Rows { data, stride, count: acts.rows, index: None };
    // SAFETY: the caller answers for the target.
    unsafe {
        tile::product(level, kind, units, rows, Panels { data: panel, stride: units * PANEL, following: None }, target)
    }
}

/// `acts · W[matrix]ᵀ` into `c [rows, out]`, on the pool.
///
/// # Panics
/// As [`multiply`].
pub fn par_multiply(acts: &Acts, w: &Packed, matrix: usize, c: &mut [f32]) {
    par_multiply_each(acts, [(w, matrix, c)]);
}

/// [`par_multiply`] with several weights `(w, matrix, c)` at once: one job of the pool, in which a thread's panels lie together.
///
/// # Panics
/// As [`multiply`].
pub fn par_multiply_each<const N: usize>(acts: &Acts, products: [(&Packed, usize, &mut [f32]); N]) {
    let level = simd::level();
    let products = products.map(|(w, matrix, c)| {
        assert_eq!(c.len(), acts.rows * w.out(), "c [{}, {}]", acts.rows, w.out());
        (w, matrix, SendPtr(c.as_mut_ptr()))
    });
    // Enough chunks that a thread which is held up costs little, each worth the hand-over.
    let all: usize = products.iter().map(|(w, ..)| w.panels()).sum();
    let work = acts.rows.max(4) * acts.k * PANEL;
    let each = all.div_ceil(8 * pool::threads()).max((1_usize << 17).div_ceil(work.max(1)));
    // Many rows go by two panels at a time.
    let each = if acts.rows > 24 { each.next_multiple_of(2) } else { each };
    let chunks = products.map(|(w, ..)| w.panels().div_ceil(each));
    pool::run(chunks.iter().sum(), |mut i| {
        for ((w, matrix, c), chunks) in products.iter().zip(chunks) {
            if i < chunks {
                let panels = i * each..w.panels().min((i + 1) * each);
                // SAFETY: the panels of this job are its alone; `c` has all columns of all rows.
                return unsafe { multiply_into(level, acts, None, w, *matrix, panels, *c, w.out()) };
            }
            i -= chunks;
        }
    });
}
