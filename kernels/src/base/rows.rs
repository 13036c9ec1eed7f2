//! The rows of f32 CPU tensors: read at any strides, written in parallel.

use burn::backend::flex::FlexTensor;

use super::pool;

/// A tensor of any rank and strides seen as `[n, dim]` in row-major order.
#[derive(Debug)]
pub(crate) struct Rows {
    tensor: FlexTensor,
    /// Number of rows.
    pub n: usize,
    /// Elements of a row.
    pub dim: usize,
    start: usize,
    /// Row i begins at `start + (i / inner) · outer_stride + (i % inner) · inner_stride`.
    inner: usize,
    outer_stride: usize,
    inner_stride: usize,
    /// A row is `dim / segment` runs of `segment` elements, `segment_stride` apart.
    segment: usize,
    segment_stride: usize,
}

impl Rows {
    /// `x` as rows of `dim` elements. Copies `x` only when its strides are wilder than [`Rows`] can say.
    ///
    /// # Panics
    /// If no number of trailing dimensions makes up `dim`.
    pub fn new(x: FlexTensor, dim: usize) -> Self {
        Self::view(&x, dim).unwrap_or_else(|| {
            let x = FlexTensor::from_data(x.into_data());
            Self::view(&x, dim).expect("a contiguous tensor has rows")
        })
    }

    fn view(x: &FlexTensor, dim: usize) -> Option<Self> {
        let layout = x.layout();
        let total = layout.num_elements();
        let n = total.checked_div(dim).unwrap_or(0);
        assert_eq!(n * dim, total, "{:?} has no rows of {dim}", layout.shape());
        let rows = |start, (inner, outer_stride, inner_stride), (segment, segment_stride)| Self {
            tensor: x.clone(),
            n,
            dim,
            start,
            inner,
            outer_stride,
            inner_stride,
            segment,
            segment_stride,
        };
        if let Some((start, _)) = layout.contiguous_offsets() {
            return Some(rows(start, (n.max(1), 0, dim), (dim, dim)));
        }
        let dims: Vec<usize> = layout.shape().iter().copied().collect();
        let strides: Option<Vec<usize>> = layout.strides().iter().map(|&s| usize::try_from(s).ok()).collect();
        let strides = strides?;
        // Where the trailing dimensions that make up a row begin.
        let mut at = dims.len();
        let mut product = 1;
        while at > 0 && product < dim {
            at -= 1;
            product *= dims[at];
        }
        assert_eq!(product, dim, "{dims:?} has no rows of {dim}");
        let (row, row_len) = collapse(&dims[at..], &strides[at..]);
        let (outer, outer_len) = collapse(&dims[..at], &strides[..at]);
        let (segment, segment_stride) = match row[..row_len] {
            [] => (1, 1),
            [(len, 1)] => (len, len),
            [(_, stride), (len, 1)] => (len, stride),
            _ => return None,
        };
        let order = match outer[..outer_len] {
            [] => (1, 0, 0),
            [(len, stride)] => (len, 0, stride),
            [(_, outer_stride), (inner, inner_stride)] => (inner, outer_stride, inner_stride),
            _ => return None,
        };
        Some(rows(layout.start_offset(), order, (segment, segment_stride)))
    }

    /// Row `i`: in place where it is one run, else gathered into `scratch`.
    pub fn get<'a>(&'a self, i: usize, scratch: &'a mut Vec<f32>) -> &'a [f32] {
        let data: &[f32] = self.tensor.storage();
        let start = self.start + i / self.inner * self.outer_stride + i % self.inner * self.inner_stride;
        if self.segment == self.dim {
            return &data[start..start + self.dim];
        }
        scratch.clear();
        for s in 0..self.dim / self.segment {
            let start = start + s * self.segment_stride;
            scratch.extend_from_slice(&data[start..start + self.segment]);
        }
        scratch
    }
}

/// The most collapsed dimensions that are told apart.
const MOST: usize = 3;

/// Merges dimensions that lie in one run; `(length, stride)`, outermost first, and how many (at most [`MOST`]).
fn collapse(dims: &[usize], strides: &[usize]) -> ([(usize, usize); MOST], usize) {
    let mut out = [(0, 0); MOST];
    let mut count = 0;
    for (&len, &stride) in dims.iter().zip(strides) {
        if len == 1 {
            continue;
        }
        if count > 0 && out[count - 1].1 == len * stride {
            out[count - 1] = (out[count - 1].0 * len, stride);
        } else if count == MOST {
            break;
        } else {
            out[count] = (len, stride);
            count += 1;
        }
    }
    (out, count)
}

/// The elements of a contiguous f32 tensor that nobody else holds, to be overwritten.
pub(crate) fn unique(x: &mut FlexTensor) -> Option<&mut [f32]> {
    let (start, end) = x.layout().contiguous_offsets()?;
    x.try_storage_mut::<f32>().map(|data| &mut data[start..end])
}

/// Rows of `dim` elements per chunk of parallel work: several chunks for each thread, each worth handing over (about a
/// microsecond); a small whole is one chunk.
pub(crate) fn rows_per_chunk(n: usize, dim: usize) -> usize {
    const LEAST: usize = 2 * 1024;
    const MOST: usize = 16 * 1024;
    if n * dim <= 2 * LEAST {
        return n.max(1);
    }
    (n * dim / (8 * pool::threads())).clamp(LEAST, MOST).div_ceil(dim.max(1))
}

/// Cuts each of `outs` into consecutive chunks of its own size (the last may be shorter) and calls `job(i, chunks)` with
/// the i-th chunk of each, on the pool.
///
/// # Panics
/// If they do not have the same number of chunks, or a job panics.
pub(crate) fn par_chunks<const K: usize>(outs: [(&mut [f32], usize); K], job: impl Fn(usize, [&mut [f32]; K]) + Sync) {
    struct Out {
        start: *mut f32,
        len: usize,
        size: usize,
    }
    // SAFETY: the pointer is used for the chunk of one job only, and the jobs' chunks are disjoint.
    unsafe impl Sync for Out {}

    let count = outs.first().map_or(0, |(out, size)| out.len().div_ceil((*size).max(1)));
    let outs = outs.map(|(out, size)| {
        assert_eq!(out.len().div_ceil(size.max(1)), count, "outputs differ in their number of chunks");
        Out { start: out.as_mut_ptr(), len: out.len(), size }
    });
    let outs = &outs;
    pool::run(count, |i| {
        let chunks = outs.each_ref().map(|out| {
            let start = i * out.size;
            // SAFETY: `start < len` because `i < count`; every `i` runs once, so no other chunk overlaps this one, and
            // the exclusive borrow outlives the call of `run`, which returns after all jobs.
            unsafe { std::slice::from_raw_parts_mut(out.start.add(start), out.size.min(out.len - start)) }
        });
        job(i, chunks);
    });
}

#[cfg(test)]
mod tests {
    use burn::tensor::Shape;

    use super::super::flex::tensor;
    use super::*;

    fn counting(shape: &[usize]) -> FlexTensor {
        let n = shape.iter().product::<usize>();
        tensor((0..n).map(|i| i as f32).collect(), Shape::from(shape.to_vec()))
    }

    /// Rows equal the rows of the contiguous copy.
    fn check(x: FlexTensor, dim: usize) {
        let copy = FlexTensor::from_data(x.clone().into_data());
        let expected: &[f32] = copy.storage();
        let rows = Rows::new(x, dim);
        let mut scratch = Vec::new();
        let got: Vec<f32> = (0..rows.n).flat_map(|i| rows.get(i, &mut scratch).to_vec()).collect();
        assert_eq!(got, expected);
    }

    #[test]
    fn rows_of_any_strides() {
        check(counting(&[5, 7]), 7);
        check(counting(&[5, 7]).narrow(1, 2, 3), 3);
        check(counting(&[5, 7]).narrow(0, 1, 3), 7);
        check(counting(&[5, 7]).transpose(0, 1), 5);
        check(counting(&[2, 3, 4, 5]).transpose(1, 2), 15);
        check(counting(&[2, 3, 4, 5]).transpose(1, 2).narrow(3, 1, 3), 9);
        check(counting(&[2, 3, 4, 5]).permute(&[3, 1, 0, 2]), 8);
        check(counting(&[1, 3, 1, 5]).transpose(1, 2), 15);
        check(counting(&[2, 3, 1, 5]).transpose(1, 2), 15);
        check(counting(&[0, 7]), 7);
        check(counting(&[4, 1]), 1);
        let flipped = counting(&[3, 4]);
        let layout = flipped.layout().flip(&[1]);
        check(flipped.with_layout(layout), 4);
    }

    #[test]
    fn chunks_cover_all_once() {
        for (n, size, other) in [(0, 4, 1), (1, 4, 2), (9, 4, 3), (8, 4, 1), (100, 1, 1)] {
            let mut a = vec![0.0; n];
            let mut b = vec![0.0; n.div_ceil(size) * other];
            par_chunks([(&mut a, size), (&mut b, other)], |i, [a, b]| {
                a.iter_mut().for_each(|a| *a += 1.0 + i as f32);
                b.iter_mut().for_each(|b| *b += 1.0);
            });
            assert!(a.iter().enumerate().all(|(j, &a)| a == 1.0 + (j / size) as f32));
            assert!(b.iter().all(|&b| b == 1.0));
        }
    }
}
