//! Reading Flex tensors of any strides.

use burn::backend::flex::FlexTensor;
use burn::tensor::{DType, bf16};

use super::simd::Level;

/// Values as they are stored.
#[derive(Clone, Copy)]
enum Stored<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
}

/// A tensor `[a, b, tokens, dim]` in f32 or bf16, whatever its strides; `[b, tokens, dim]` is the same for every `a`.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    stored: Stored<'a>,
    start: usize,
    strides: [usize; 4],
}

/// `x` itself, or a copy where a stride is negative (a flipped view).
pub(crate) fn forward_strides(x: FlexTensor) -> FlexTensor {
    if x.layout().strides().iter().all(|&s| s >= 0) { x } else { x.to_contiguous() }
}

/// `x` with its values in order from the beginning of a buffer of just its size; copied only where it is not so already.
pub(crate) fn whole(x: FlexTensor) -> FlexTensor {
    let already = x.is_contiguous()
        && x.layout().start_offset() == 0
        && x.bytes().len() == x.layout().num_elements() * x.dtype().size();
    // The old handle goes first: whoever writes asks whether the buffer has one owner.
    if already { x } else { x.to_contiguous() }
}

/// `[a, b, c, d]` seen as `[a, c, b, d]`.
pub(crate) fn swapped(x: FlexTensor) -> FlexTensor {
    let layout = x.layout().transpose(1, 2);
    x.with_layout(layout)
}

impl<'a> View<'a> {
    /// # Panics
    /// If `x` has another rank than 4 or 3, another dtype, or a negative stride ([`forward_strides`]).
    pub(crate) fn new(x: &'a FlexTensor) -> Self {
        let stored = match x.dtype() {
            DType::BF16 => Stored::Bf16(x.storage()),
            _ => Stored::F32(x.storage()),
        };
        let strides = x.layout().strides();
        assert!([3, 4].contains(&strides.len()), "three or four dimensions");
        let skipped = 4 - strides.len();
        let strides = std::array::from_fn(|i| match i.checked_sub(skipped) {
            Some(i) => usize::try_from(strides[i]).expect("strides that go forward"),
            None => 0,
        });
        View { stored, start: x.layout().start_offset(), strides }
    }

    pub(crate) fn is_bf16(&self) -> bool {
        matches!(self.stored, Stored::Bf16(_))
    }

    /// The same from column `from` on.
    pub(crate) fn columns(self, from: usize) -> Self {
        View { start: self.start + from * self.strides[3], ..self }
    }

    /// Tokens `from .. from + count` of `(a, b)` as f32 rows of `dim` values, filled up with zeros to `width`; row i begins at
    /// `to[i * row]`.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn rows(
        &self,
        level: Level,
        (a, b): (usize, usize),
        from: usize,
        count: usize,
        dim: usize,
        to: &mut [f32],
        row: usize,
        width: usize,
    ) {
        let [sa, sb, st, sd] = self.strides;
        let start = self.start + a * sa + b * sb + from * st;
        if let (Stored::Bf16(x), 1) = (self.stored, sd)
            && dim == width
            && count > 0
        {
            return widen(level, &x[start..], st, count, dim, to, row);
        }
        for i in 0..count {
            let (line, padding) = to[i * row..][..width].split_at_mut(dim);
            padding.fill(0.0);
            let at = start + i * st;
            match self.stored {
                Stored::F32(x) if sd == 1 => line.copy_from_slice(&x[at..at + dim]),
                Stored::F32(x) => line.iter_mut().enumerate().for_each(|(c, y)| *y = x[at + c * sd]),
                Stored::Bf16(x) => line.iter_mut().enumerate().for_each(|(c, y)| *y = x[at + c * sd].to_f32()),
            }
        }
    }

    /// `rows` rows of `dim` values to be asked for, if they lie in order.
    pub(crate) fn ahead(&self, (a, b): (usize, usize), from: usize, rows: usize, dim: usize) -> Option<Ahead> {
        let [sa, sb, st, sd] = self.strides;
        if sd != 1 {
            return None;
        }
        let start = self.start + a * sa + b * sb + from * st;
        let (base, size) = match self.stored {
            Stored::F32(x) => (x.as_ptr().cast::<u8>(), 4),
            Stored::Bf16(x) => (x.as_ptr().cast::<u8>(), 2),
        };
        Some(Ahead { start: base.wrapping_add(start * size), row: st * size, width: dim * size, rows })
    }

    /// Tokens of `(a, b)` from `from` on where they lie, and the distance of their rows: f32 whose rows are in order.
    pub(crate) fn in_place(&self, (a, b): (usize, usize), from: usize) -> Option<(&'a [f32], usize)> {
        let [sa, sb, st, sd] = self.strides;
        match self.stored {
            Stored::F32(x) if sd == 1 => Some((&x[self.start + a * sa + b * sb + from * st..], st)),
            _ => None,
        }
    }

    /// The same as pairs of bf16, the even one in the lower half, and the distance of their rows in words.
    pub(crate) fn pairs_in_place(&self, (a, b): (usize, usize), from: usize) -> Option<(&'a [f32], usize)> {
        let [sa, sb, st, sd] = self.strides;
        let Stored::Bf16(x) = self.stored else { return None };
        let x = &x[self.start + a * sa + b * sb + from * st..];
        let pairs = bytemuck::try_cast_slice(&x[..x.len() & !1]).ok()?;
        (sd == 1 && st.is_multiple_of(2) && cfg!(target_endian = "little")).then_some((pairs, st / 2))
    }
}

/// Bytes of a cache line.
const LINE: usize = 64;

/// Rows that are read soon, to be brought near meanwhile.
#[derive(Clone, Copy)]
pub(crate) struct Ahead {
    /// The first row; nothing of it is read here.
    start: *const u8,
    /// Bytes from row to row.
    row: usize,
    /// Bytes of a row.
    width: usize,
    rows: usize,
}

impl Ahead {
    /// Where they begin, if they lie one behind the other.
    pub(crate) fn in_one_piece(self) -> Option<*const f32> {
        (self.row == self.width).then_some(self.start.cast())
    }

    /// Asks for all of them, into the second-level cache.
    pub(crate) fn ask_all(self) {
        for row in 0..self.rows {
            let row = self.start.wrapping_add(row * self.row);
            (0..self.width).step_by(LINE).for_each(|at| prefetch(row.wrapping_add(at)));
        }
    }
}

/// Into the second-level cache.
#[inline(always)]
pub(crate) fn prefetch(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE is part of x86-64, and a prefetch reads nothing that a program could see: any address will do.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(at.cast());
    }
    let _ = at;
}

crate::simd! {
    /// `count` rows of `dim` bf16 to f32, exactly.
    fn widen(from: &[bf16], from_row: usize, count: usize, dim: usize, to: &mut [f32], to_row: usize) = widen_body;
}

#[inline(always)]
fn widen_body<const FMA: bool>(
    from: &[bf16],
    from_row: usize,
    count: usize,
    dim: usize,
    to: &mut [f32],
    to_row: usize,
) {
    for i in 0..count {
        for (to, from) in to[i * to_row..][..dim].iter_mut().zip(&from[i * from_row..][..dim]) {
            *to = f32::from_bits((from.to_bits() as u32) << 16);
        }
    }
}
