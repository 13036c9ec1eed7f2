//! Flex: f32 through `gemm`, which packs blocks of both operands per call; bf16 tensors panel by panel; packed weights as they are.

use std::cell::RefCell;

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::{DType, TensorData, bf16};

use super::{LinearBackend, LinearPairBackend, check};
use crate::base::buffer::SendPtr;
use crate::base::flex::{contiguous, matrix, tensor, values};
use crate::base::gemm::{Mat, par_gemm};
use crate::base::masked::transpose;
use crate::base::memory::arbitrary;
use crate::base::packed::{Acts, Format, Packed, multiply_bf16_block, par_multiply, par_multiply_each};
use crate::base::tile::{PANEL, Target};
use crate::base::{pool, simd};

impl LinearBackend for Flex {
    fn linear(x: FlexTensor, w: FlexTensor) -> FlexTensor {
        let ([n, input], [out, _]) = (dims(&x), dims(&w));
        assert_eq!(dims(&w)[1], input, "x [{n}, {input}] · w {:?}ᵀ", dims(&w));
        let mut y = arbitrary(n * out);
        if w.dtype() == DType::F32 {
            let (x, w) = (viewable(x), viewable(w));
            par_gemm(n, out, input, view(&x), view(&w).transposed(), &mut y, out, false);
            return tensor(y, [n, out]);
        }
        let exact = x.dtype() == DType::F32;
        let x = contiguous(x);
        product_bf16(&Acts::new(Format::Bf16, exact, n, input, &values(&x)), &contiguous(w), &mut y);
        if exact { tensor(y, [n, out]) } else { tensor_bf16(&y, [n, out]) }
    }

    fn linear_backward(x: FlexTensor, w: FlexTensor, d_y: FlexTensor) -> (FlexTensor, FlexTensor) {
        let ([n, input], [out, _]) = (dims(&x), dims(&w));
        let kinds = [x.dtype(), w.dtype()];
        let (x, w, d_y) = (viewable(x), viewable(w), viewable(d_y));
        let mut d_x = arbitrary(n * input);
        par_gemm(n, input, out, view(&d_y), view(&w), &mut d_x, input, false);
        let mut d_w = arbitrary(out * input);
        par_gemm(out, input, n, view(&d_y).transposed(), view(&x), &mut d_w, input, false);
        let give = |values: Vec<f32>, shape, dtype| match dtype {
            DType::BF16 => tensor_bf16(&values, shape),
            _ => tensor(values, shape),
        };
        (give(d_x, [n, input], kinds[0]), give(d_w, [out, input], kinds[1]))
    }

    fn linear_packed(x: FlexTensor, w: Packed, exact: bool) -> FlexTensor {
        let ([n, input], out) = (dims(&x), w.out());
        check_packed([n, input], &w);
        let x = contiguous(x);
        let mut y = arbitrary(n * out);
        par_multiply(&Acts::new(w.format(), exact, n, input, &values(&x)), &w, 0, &mut y);
        tensor(y, [n, out])
    }

    fn linear_packed_backward(w: Packed, d_y: FlexTensor) -> FlexTensor {
        const ROWS: usize = 256; // of the weight, dequantised at a time
        let ([n, out], input) = (dims(&d_y), w.input());
        let d_y = viewable(d_y);
        let d_y = view(&d_y);
        let mut d_x = vec![0.0; n * input];
        let mut rows = vec![0.0; ROWS.min(out) * input];
        for first in (0..out).step_by(ROWS) {
            let count = ROWS.min(out - first);
            for (i, row) in rows.chunks_exact_mut(input.max(1)).enumerate().take(count) {
                w.row(0, first + i, row);
            }
            let from = Mat { data: d_y.data.get(first * d_y.col_stride..).unwrap_or_default(), ..d_y };
            par_gemm(n, input, count, from, Mat::row_major(&rows, input), &mut d_x, input, first > 0);
        }
        tensor(d_x, [n, input])
    }
}

impl LinearPairBackend for Flex {
    fn linear_pair(x: FlexTensor, first: Packed, second: Packed) -> (FlexTensor, FlexTensor) {
        let [n, input] = dims(&x);
        for w in [&first, &second] {
            check_packed([n, input], w);
        }
        let x = contiguous(x);
        let (mut y, mut z) = (arbitrary(n * first.out()), arbitrary(n * second.out()));
        let acts = Acts::new(first.format(), false, n, input, &values(&x));
        par_multiply_each(&acts, [(&first, 0, &mut y), (&second, 0, &mut z)]);
        (tensor(y, [n, first.out()]), tensor(z, [n, second.out()]))
    }
}

/// # Panics
/// If `w` is several matrices, or its rows are not as long as those of `x`.
fn check_packed(x: [usize; 2], w: &Packed) {
    assert_eq!(w.count(), 1, "one matrix, not those of several experts");
    check(x, [w.out(), w.input()]);
}

fn dims(x: &FlexTensor) -> [usize; 2] {
    x.layout().shape().dims()
}

/// `x` as a tensor of f32 that [`view`] can look at.
fn viewable(x: FlexTensor) -> FlexTensor {
    if matrix(&x).is_some() {
        return x;
    }
    let shape = dims(&x);
    let x = contiguous(x);
    if x.dtype() == DType::F32 { x } else { tensor(values(&x).into_owned(), shape) }
}

fn view(x: &FlexTensor) -> Mat<'_> {
    matrix(x).unwrap_or_else(|| unreachable!("made viewable"))
}

fn tensor_bf16(values: &[f32], shape: [usize; 2]) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values.iter().map(|&v| bf16::from_f32(v)).collect::<Vec<_>>(), shape))
}

/// `y = acts · wᵀ` for a contiguous bf16 tensor, whose pairs along `in` are the units of a panel: each job brings its panels
/// into order, block by block, as it multiplies.
fn product_bf16(acts: &Acts, w: &FlexTensor, y: &mut [f32]) {
    thread_local! {
        static PANEL_BLOCK: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    }
    const BLOCK: usize = 256; // units
    let [out, input] = dims(w);
    let stored = w.as_slice::<bf16>().unwrap_or_else(|| unreachable!("contiguous bf16"));
    let pairs = bytemuck::try_cast_slice::<bf16, f32>(stored);
    let (Ok(words), 0) = (pairs, input % 2) else {
        // Pairs that straddle rows or words: packed for this call.
        let row = |_: usize, r: usize, to: &mut [f32]| {
            to.iter_mut().zip(&stored[r * input..]).for_each(|(to, v)| *to = v.to_f32());
        };
        let packed = Packed::pack(Format::Bf16, 1, out, input, &row).unwrap_or_else(|error| panic!("{error}"));
        return par_multiply(acts, &packed, 0, y);
    };
    let (units, level) = (input / 2, simd::level());
    let y = SendPtr(y.as_mut_ptr());
    pool::run(out.div_ceil(PANEL), |p| {
        PANEL_BLOCK.with_borrow_mut(|block| {
            block.resize(BLOCK * PANEL, 0.0);
            let (first, columns) = (p * PANEL, PANEL.min(out - p * PANEL));
            let mut from = 0;
            loop {
                let count = BLOCK.min(units - from);
                if count > 0 {
                    let source = &words[first * units + from..];
                    transpose(level, columns, count, source, units, block, PANEL);
                }
                // SAFETY: these columns of the result are this job's alone.
                unsafe {
                    let start = y.get().add(first);
                    let target = Target { start, stride: out, columns, add: from > 0 };
                    multiply_bf16_block(level, acts, from, count, block, target);
                }
                from += count;
                if from >= units {
                    break;
                }
            }
        });
    });
}
