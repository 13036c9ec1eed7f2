use burn::tensor::{DType, Device, Tensor};

use super::{Quantized, Weight, linear, linear_f32, linear_pair, reference};
use crate::base::packed::{Format, Packed};
use crate::base::pool;
use crate::base::testing::{
    assert_close, assert_panics, assert_threads_do_not_matter, at_every_level, bits, flipped, random, strided, values,
    window,
};

const FORMATS: [Format; 6] = [
    Format::F32,
    Format::Bf16,
    Format::Int8 { block: 32 },
    Format::Int8 { block: 64 },
    Format::Int4 { block: 32 },
    Format::Int4 { block: 64 },
];

fn device() -> Device {
    Device::flex()
}

fn pack(format: Format, w: &Tensor<2>) -> Weight<2> {
    let [out, input] = w.dims();
    let all = values(w.clone());
    let row = |_: usize, r: usize, to: &mut [f32]| to.copy_from_slice(&all[r * input..][..input]);
    Packed::pack(format, 1, out, input, &row).unwrap().into()
}

/// Values that bf16 holds.
fn coarse<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    x.cast(DType::BF16).cast(DType::F32)
}

const SHAPES: [[usize; 3]; 11] = [
    [1, 1, 1],
    [1, 33, 7],
    [2, 31, 64],
    [3, 130, 255],
    [5, 32, 257],
    [7, 97, 31],
    [12, 64, 96],
    [13, 129, 300],
    [37, 65, 513],
    [250, 530, 261],
    [61, 40, 4111], // longer than a block of the packed products along `in`, more rows than go together
];

#[test]
fn equals_the_reference_in_every_format() {
    at_every_level(|| {
        for (i, [n, out, input]) in SHAPES.into_iter().enumerate() {
            let x = random([n, input], i as u64, &device());
            let w = random([out, input], 100 + i as u64, &device());
            let close = |got, x: &Tensor<2>, w: &Tensor<2>, what: &str| {
                let what = format!("{what} {n} × {out} × {input}");
                assert_close(got, reference::linear(x.clone(), w.clone()), 3e-5 * (1.0 + (input as f32).sqrt()), &what);
            };
            let plain = linear(x.clone(), &w.clone().into());
            close(plain.clone(), &x, &w, "f32 tensor");
            assert_eq!(bits(plain.clone()), bits(linear_f32(x.clone(), &w.clone().into())));
            assert_eq!(bits(plain), bits(linear(x.clone(), &pack(Format::F32, &w))), "a tensor is its f32 packing");

            let (xc, wc) = (coarse(x.clone()), coarse(w.clone()));
            let half: Weight<2> = wc.clone().cast(DType::BF16).into();
            let in_pack = linear(x.clone(), &pack(Format::Bf16, &w));
            close(in_pack.clone(), &xc, &wc, "packed bf16");
            let tensor = linear(x.clone(), &half);
            assert_eq!(tensor.dtype(), DType::BF16);
            assert_eq!(bits(tensor), bits(in_pack.cast(DType::BF16)), "a bf16 tensor is its packing, rounded");
            let exact = linear_f32(x.clone(), &pack(Format::Bf16, &w));
            close(exact.clone(), &x, &wc, "exact bf16");
            assert_eq!(bits(exact), bits(linear_f32(x.clone(), &half)), "exact: a tensor is its packing");

            for format in &FORMATS[2..] {
                let weight = pack(*format, &w);
                let dense = weight.dense(0, &device());
                close(linear_f32(x.clone(), &weight), &x, &dense, &format!("exact {format:?}"));
                // Values of x are up to 1/254 of their block's largest off, each in its own direction.
                let expected = reference::linear(x.clone(), dense);
                let what = format!("{format:?} {n} × {out} × {input}");
                assert_close(linear(x.clone(), &weight), expected, 0.05 * (1.0 + (input as f32).sqrt()), &what);
            }
        }
    });
}

#[test]
fn a_row_is_the_same_alone_and_in_any_batch() {
    at_every_level(|| {
        let (out, input) = (161, 523);
        let x = random([512, input], 1, &device());
        let w = random([out, input], 2, &device());
        let weights: [Weight<2>; 4] = [
            w.clone().into(),
            pack(Format::F32, &w),
            pack(Format::Bf16, &w),
            w.slice([0..out, 0..input - 1]).cast(DType::BF16).into(),
        ];
        for (i, weight) in weights.iter().enumerate() {
            let x = x.clone().narrow(1, 0, weight.dims()[1]);
            for f in [linear, linear_f32] {
                let all = f(x.clone(), weight);
                for rows in [1, 2, 11, 12, 13, 37] {
                    let some = f(x.clone().narrow(0, 512 - rows, rows), weight);
                    let same = bits(some) == bits(all.clone().narrow(0, 512 - rows, rows));
                    assert!(same, "weight {i}: {rows} rows of 512 have other bits");
                }
            }
        }
    });
}

#[test]
fn threads_do_not_matter() {
    let x = random([70, 300], 1, &device());
    let w = random([333, 300], 2, &device());
    let half = w.clone().cast(DType::BF16);
    for weight in [w.clone().into(), pack(Format::F32, &w), pack(Format::Bf16, &w), half.into()] {
        assert_threads_do_not_matter(|| linear(x.clone(), &weight));
        assert_threads_do_not_matter(|| linear_f32(x.clone(), &weight));
    }
}

#[test]
fn a_pair_has_the_bits_of_each() {
    let formats = [Format::F32, Format::Bf16, Format::Int8 { block: 32 }, Format::Int4 { block: 64 }];
    at_every_level(|| {
        for (i, [n, out, input]) in [[0, 5, 9]].into_iter().chain(SHAPES).enumerate() {
            let x = random([n, input], i as u64, &device());
            let v = random([out, input], 100 + i as u64, &device());
            let w = random([(out * 3).next_multiple_of(37), input], 200 + i as u64, &device());
            for format in formats {
                // Of one format, of two, and with a tensor.
                for other in [pack(format, &w), pack(Format::Bf16, &w), w.clone().into()] {
                    let v = pack(format, &v);
                    let (y, z) = linear_pair(x.clone(), &v, &other);
                    assert_eq!(bits(y), bits(linear(x.clone(), &v)), "{format:?} {n} × {out} × {input}");
                    assert_eq!(bits(z), bits(linear(x.clone(), &other)), "{format:?} {n} × {out} × {input}");
                }
            }
        }
    });
    let (x, v, w) =
        (random([70, 300], 1, &device()), random([333, 300], 2, &device()), random([95, 300], 3, &device()));
    for format in formats {
        let (v, w) = (pack(format, &v), pack(format, &w));
        assert_threads_do_not_matter(|| linear_pair(strided(x.clone()), &v, &w).0);
        assert_threads_do_not_matter(|| linear_pair(x.clone(), &v, &w).1);
    }
    // Under autodiff each has its gradient.
    let (v, w) = (pack(Format::F32, &v), pack(Format::F32, &w));
    let x = random([70, 300], 1, &device().autodiff()).require_grad();
    let gradient = |y: Tensor<2>, z: Tensor<2>| bits(x.grad(&(y.sum() + z.sum()).backward()).unwrap());
    let (y, z) = linear_pair(x.clone(), &v, &w);
    assert_eq!(gradient(y, z), gradient(linear(x.clone(), &v), linear(x.clone(), &w)));
}

#[test]
fn strides_do_not_matter() {
    let x = random([29, 71], 1, &device());
    let w = random([43, 71], 2, &device());
    let expected = bits(linear(x.clone(), &w.clone().into()));
    for x in [strided(x.clone()), window(x.clone()), flipped(x.clone())] {
        for w in [w.clone(), strided(w.clone()), window(w.clone()), flipped(w.clone())] {
            assert!(bits(linear(x.clone(), &w.into())) == expected);
        }
        let packed = pack(Format::F32, &w);
        assert!(bits(linear(x, &packed)) == expected);
    }
    let half = w.clone().cast(DType::BF16);
    let expected = bits(linear(x.clone(), &half.clone().into()));
    let inside = Tensor::cat(vec![half.clone(), half.clone()], 1).narrow(1, 0, 71);
    for half in [inside, flipped(half.clone()), half.transpose().mul_scalar(1.0).transpose()] {
        assert!(bits(linear(strided(x.clone()), &half.into())) == expected);
    }
}

#[test]
fn shapes_that_do_not_agree_are_named() {
    let (x, w) = (random([3, 32], 1, &device()), random([5, 64], 2, &device()));
    let format = Format::Int8 { block: 32 };
    let zeros = |_: usize, _: usize, values: &mut [i8], _: &mut [half::f16]| values.fill(0);
    let stored = Quantized::new(format, [1, 5, 64], &device(), &zeros).unwrap();
    for weight in [w.clone().into(), w.clone().cast(DType::BF16).into(), pack(format, &w), stored.into()] {
        let told = "x [3, 32] does not go through a weight [out, in] of [5, 64]";
        assert_panics(told, || linear(x.clone(), &weight));
        assert_panics(told, || linear_f32(x.clone(), &weight));
        let fits = pack(format, &random([5, 32], 3, &device()));
        assert_panics(told, || linear_pair(x.clone(), &fits, &weight));
        assert_panics(told, || linear_pair(x.clone(), &weight, &fits));
    }
}

#[test]
fn what_the_kernels_cannot_number_is_left_to_the_reference() {
    use super::indexable;
    assert!(indexable([8, 6144], [200_064, 6144]) && indexable([1 << 15, 1 << 15], [1 << 16, 1 << 15]));
    for (x, w) in [([1 << 16, 1 << 16], [1, 1 << 16]), ([1, 1 << 16], [1 << 16, 1 << 16]), ([1 << 16, 1], [1 << 16, 1])]
    {
        assert!(!indexable(x, w), "x {x:?}, w {w:?}");
    }
}

#[test]
fn no_rows_and_no_inputs() {
    for (n, out, input) in [(0, 5, 7), (3, 5, 0), (0, 0, 0), (3, 0, 7)] {
        let (x, w) = (Tensor::<2>::ones([n, input], &device()), Tensor::<2>::ones([out, input], &device()));
        let half = w.clone().cast(DType::BF16);
        for weight in [w.clone().into(), pack(Format::F32, &w), pack(Format::Bf16, &w), half.into()] {
            let y = linear(x.clone(), &weight);
            assert_eq!(y.dims(), [n, out]);
            assert!(values(y).iter().all(|&y| y == 0.0), "{n} × {out} × {input}");
        }
    }
}

#[test]
fn nan_stays_in_its_row() {
    at_every_level(|| {
        let (n, out, input) = (14, 50, 90);
        let w = random([out, input], 2, &device());
        let clean = random([n, input], 1, &device());
        let row = Tensor::full([1, input], f32::NAN, &device());
        let x = Tensor::cat(vec![clean.clone().narrow(0, 0, 6), row, clean.clone().narrow(0, 7, 7)], 0);
        let half = w.clone().cast(DType::BF16);
        for weight in [w.clone().into(), pack(Format::F32, &w), pack(Format::Bf16, &w), half.into()] {
            let (y, clean) = (values(linear(x.clone(), &weight)), values(linear(clean.clone(), &weight)));
            for (i, (y, clean)) in y.iter().zip(&clean).enumerate() {
                assert!(if i / out == 6 { y.is_nan() } else { y == clean }, "element {i}: {y}, {clean}");
            }
        }
    });
}

#[test]
fn gradients_are_those_of_the_reference() {
    let device = device().autodiff();
    at_every_level(|| {
        for (i, [n, out, input]) in SHAPES.into_iter().enumerate() {
            let x = random([n, input], i as u64, &device).require_grad();
            let w = random([out, input], 50 + i as u64, &device).require_grad();
            let d_y = random([n, out], 90 + i as u64, &device);
            let grads = |y: Tensor<2>| {
                let grads = (y * d_y.clone()).sum().backward();
                (x.grad(&grads).unwrap(), w.grad(&grads).unwrap())
            };
            let ours = grads(linear(x.clone(), &w.clone().into()));
            let theirs = grads(reference::linear(x.clone(), w.clone()));
            assert_close(ours.0, theirs.0, 1e-4 * (out as f32).sqrt(), "dx");
            assert_close(ours.1, theirs.1, 1e-4 * (n as f32).sqrt(), "dw");

            for format in FORMATS {
                let packed = pack(format, &w.clone().inner());
                let gradient = |y: Tensor<2>| x.grad(&(y * d_y.clone()).sum().backward()).unwrap();
                let theirs = gradient(reference::linear(x.clone(), packed.dense(0, &device)));
                let ours = gradient(linear(x.clone(), &packed));
                assert_close(ours, theirs, 1e-4 * (out as f32).sqrt(), &format!("dx through {format:?}"));
            }
        }
    });
}

#[test]
fn gradients_of_strided_operands_have_the_same_bits() {
    let device = device().autodiff();
    let x = random([31, 77], 1, &device);
    let w = random([45, 77], 2, &device);
    let d_y = random([31, 45], 3, &device);
    let grads = |x: &Tensor<2>, w: &Tensor<2>, d_y: &Tensor<2>| {
        let (x, w) = (x.clone().require_grad(), w.clone().require_grad());
        let grads = (linear(strided(x.clone()) + 0.0, &w.clone().into()) * d_y.clone()).sum().backward();
        w.grad(&grads).map(bits)
    };
    let expected = grads(&x, &w, &d_y);
    assert!(expected.is_some());
    assert_eq!(grads(&strided(x.clone()), &strided(w.clone()), &strided(d_y.clone())), expected);
    assert_eq!(grads(&window(x), &window(w), &window(d_y)), expected);
}

#[test]
fn bf16_gradients_keep_their_dtypes() {
    let device = device().autodiff();
    let x = random([5, 40], 1, &device).cast(DType::BF16).detach().require_grad();
    let w = random([9, 40], 2, &device).cast(DType::BF16).detach().require_grad();
    let grads = |y: Tensor<2>| {
        let grads = y.sum().backward();
        (x.grad(&grads).unwrap(), w.grad(&grads).unwrap())
    };
    let ours = grads(linear(x.clone(), &w.clone().into()));
    let theirs = grads(reference::linear(x.clone(), w.clone()));
    assert_close(ours.0, theirs.0, 0.02, "dx");
    assert_close(ours.1, theirs.1, 0.02, "dw");
}

#[test]
fn concurrent_callers_get_the_same_bits() {
    let x = random([64, 200], 1, &device());
    let w: Weight<2> = random([300, 200], 2, &device()).into();
    let expected = bits(linear(x.clone(), &w));
    std::thread::scope(|scope| {
        for threads in 1..5 {
            let (x, w, expected) = (x.clone(), w.clone(), &expected);
            scope.spawn(move || {
                pool::with_threads(threads, || {
                    for _ in 0..30 {
                        assert_eq!(&bits(linear(x.clone(), &w)), expected);
                    }
                });
            });
        }
    });
}
