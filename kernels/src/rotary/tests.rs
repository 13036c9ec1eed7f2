use burn::tensor::{DType, Device, Tensor};

use super::{Rotation, reference, rotary};
use crate::base::testing::{
    assert_close, assert_panics, assert_threads_do_not_matter, at_every_level, bits, random, values,
};

fn positions(tokens: usize) -> Vec<usize> {
    (0..tokens).map(|i| i * i * 97 % 1_000_003).collect()
}

#[test]
fn equal_to_the_definition() {
    let device = Device::flex();
    at_every_level(|| {
        for (tokens, heads, head_dim, rotary_dim) in [
            (0, 2, 8, 4),
            (1, 1, 2, 2),
            (3, 2, 32, 32),
            (7, 3, 64, 32),
            (5, 4, 96, 48),
            (150, 5, 128, 64),
            (2, 3, 5, 4),
        ] {
            let what = format!("{tokens} tokens, {heads} heads of {head_dim}, {rotary_dim} turned");
            let x = random::<3>([tokens, heads, head_dim], 1, &device);
            let rotation = Rotation::new(&positions(tokens), rotary_dim, 1e7, &device);
            let expected = reference::rotary(x.clone(), &rotation);
            assert_close(rotary(x.clone(), &rotation), expected.clone(), 1e-6, &what);
            // A window of wider heads: strided in two dimensions.
            let wide = Tensor::cat(vec![x.clone() * f32::NAN, x.clone()], 2).narrow(2, head_dim, head_dim);
            assert_close(rotary(wide, &rotation), expected.clone(), 1e-6, &what);
            let swapped = Tensor::cat(vec![x.clone().swap_dims(0, 1)], 0).swap_dims(0, 1);
            assert_close(rotary(swapped, &rotation), expected.clone(), 1e-6, &what);
            assert_close(rotary(x, &rotation), expected, 1e-6, &what);
        }
    });
}

#[test]
fn shapes_that_do_not_agree_are_named() {
    let device = Device::flex();
    let x = random::<3>([3, 2, 8], 1, &device);
    let run = |rotation: Rotation| rotary(x.clone(), &rotation);
    assert_panics("cos is [tokens, 1, rotary_dim / 2] of 3 tokens", || run(Rotation::new(&[1, 2], 8, 1e4, &device)));
    assert_panics("10 dimensions turn, and a head has 8", || run(Rotation::new(&[1, 2, 3], 10, 1e4, &device)));
    let [mut long, short] = [8, 4].map(|dim| Rotation::new(&[1, 2, 3], dim, 1e4, &device));
    long.sin = short.sin;
    assert_panics("sin is [tokens, 1, rotary_dim / 2] of 3 tokens", || run(long));
}

#[test]
fn an_input_that_others_hold_stays() {
    let device = Device::flex();
    let x = random::<3>([3, 2, 8], 1, &device);
    let before = bits(x.clone());
    let rotation = Rotation::new(&[1, 2, 3], 8, 1e4, &device);
    rotary(x.clone(), &rotation);
    assert_eq!(bits(x), before);
}

#[test]
fn a_token_knows_no_other() {
    let device = Device::flex();
    let (tokens, heads, dim) = (203, 3, 64);
    let x = random::<3>([tokens, heads, dim], 1, &device);
    let rotation = Rotation::new(&positions(tokens), 32, 1e7, &device);
    at_every_level(|| {
        assert_threads_do_not_matter(|| rotary(x.clone(), &rotation));
        let all = bits(rotary(x.clone(), &rotation));
        let size = heads * dim;
        for token in [0, 1, 202] {
            let rotation = Rotation::new(&positions(tokens)[token..token + 1], 32, 1e7, &device);
            let alone = bits(rotary(x.clone().narrow(0, token, 1), &rotation));
            assert_eq!(alone, all[token * size..(token + 1) * size]);
        }
    });
    let mut broken = values(x.clone());
    broken[7 * heads * dim] = f32::NAN;
    let broken = Tensor::<1>::from_floats(&broken[..], &device).reshape([tokens, heads, dim]);
    let nan: Vec<usize> =
        values(rotary(broken, &rotation)).iter().enumerate().filter(|x| x.1.is_nan()).map(|x| x.0).collect();
    assert_eq!(nan, [7 * heads * dim, 7 * heads * dim + 16]);
}

#[test]
fn gradients() {
    let device = Device::flex().autodiff();
    at_every_level(|| {
        for (tokens, heads, head_dim, rotary_dim) in [(1, 1, 2, 2), (7, 3, 64, 32), (3, 2, 5, 4), (90, 4, 128, 128)] {
            let run = |fast: bool| {
                let x = random::<3>([tokens, heads, head_dim], 1, &device).require_grad();
                let rotation = Rotation::new(&positions(tokens), rotary_dim, 1e4, &device);
                let y = if fast { rotary(x.clone(), &rotation) } else { reference::rotary(x.clone(), &rotation) };
                let grads = (y.clone() * random(y.dims(), 2, &device)).sum().backward();
                x.grad(&grads).unwrap()
            };
            assert_close(run(true), run(false), 1e-6, "x");
        }
    });
}

#[test]
fn bf16_comes_back_in_f32() {
    let device = Device::flex();
    let x = random::<3>([3, 2, 8], 1, &device).cast(DType::BF16);
    let rotation = Rotation::new(&[1, 2, 3], 8, 1e4, &device);
    let expected = reference::rotary(x.clone(), &rotation);
    assert_close(rotary(x, &rotation), expected, 1e-6, "bf16");
}
