use burn::tensor::{Device, Tensor};

use super::{reference, silu};
use crate::base::testing::{
    assert_close, assert_threads_do_not_matter, at_every_level, bits, random, strided, values, window,
};

#[test]
fn equal_to_the_definition() {
    let device = Device::flex();
    at_every_level(|| {
        for shape in [[0, 4], [1, 1], [3, 15], [2, 16], [5, 17], [300, 257]] {
            let x = random::<2>(shape, 1, &device) * 5.0;
            let expected = reference::silu(x.clone());
            // Shared, then the only owner, which is overwritten.
            assert_close(silu(x.clone()), expected.clone(), 1e-6, "shared");
            assert_close(silu(strided(x.clone())), expected.clone(), 1e-6, "strided");
            assert_close(silu(window(x.clone())), expected.clone(), 1e-6, "window");
            assert_close(silu(x), expected, 1e-6, "unique");
        }
        let x = Tensor::<1>::from_floats([0.0, -100.0, 100.0, 1e30, -1e30, f32::NAN, f32::INFINITY], &device);
        let y = values(silu(x));
        assert_eq!(y[0], 0.0);
        assert!(y[1].abs() < 1e-30 && y[4] == 0.0);
        assert_eq!((y[2], y[3], y[6]), (100.0, 1e30, f32::INFINITY));
        assert!(y[5].is_nan());
    });
}

#[test]
fn an_input_that_others_hold_stays() {
    let device = Device::flex();
    let x = random::<2>([3, 40], 1, &device);
    let before = bits(x.clone());
    let part = x.clone().narrow(0, 1, 1);
    silu(part);
    silu(x.clone());
    assert_eq!(bits(x), before);
}

#[test]
fn bits_depend_on_the_element_alone() {
    let device = Device::flex();
    let x = random::<2>([203, 257], 1, &device);
    at_every_level(|| {
        assert_threads_do_not_matter(|| silu(x.clone()));
        let all = bits(silu(x.clone()));
        for row in [0, 1, 100, 202] {
            assert_eq!(bits(silu(x.clone().narrow(0, row, 1))), all[row * 257..(row + 1) * 257]);
        }
        assert_eq!(bits(silu(strided(x.clone()))), all);
    });
}

#[test]
fn gradients() {
    let device = Device::flex().autodiff();
    at_every_level(|| {
        for shape in [[1, 1], [3, 15], [5, 17], [300, 257]] {
            for (view, name) in [((|x| x) as fn(Tensor<2>) -> Tensor<2>, "plain"), (|x| x.transpose(), "transposed")] {
                let run = |fast: bool| {
                    let x = (random::<2>(shape, 1, &device) * 3.0).detach().require_grad();
                    let y = view(x.clone());
                    let y = if fast { silu(y) } else { reference::silu(y) };
                    let weights = random(y.dims(), 2, &device);
                    // The sum hands down a gradient that others hold, the product one of its own.
                    let grads = (y.clone() * weights).sum().add(y.sum()).backward();
                    x.grad(&grads).unwrap()
                };
                assert_close(run(true), run(false), 2e-6, name);
            }
        }
    });
}
