//! Elementary functions on 16 lanes of f32, for the elementwise loops of every operation.
//!
//! Each is plain arithmetic without branches or tables, `#[inline(always)]`, so that LLVM turns it into vector
//! instructions at whatever level of SIMD the caller is compiled for. `FMA` says whether that level has fused
//! multiply-add: without it `f32::mul_add` would be a library call. A lane's result depends on that lane alone.

use super::simd::Level;
use crate::simd;

/// The lanes that elementwise code works on: one AVX-512 register, two of AVX2, four of SSE2.
pub type Lanes = [f32; LANES];

/// Width of [`Lanes`].
pub const LANES: usize = 16;

/// `f` of every lane.
#[inline(always)]
pub fn map(x: Lanes, f: impl Fn(f32) -> f32) -> Lanes {
    let mut y = [0.0; LANES];
    for (y, x) in y.iter_mut().zip(x) {
        *y = f(x);
    }
    y
}

/// `a · b + c`, fused where `FMA`.
#[inline(always)]
pub fn fma<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// `e^x` within 1.1 ulp over the whole range, subnormal results included; 0 of -inf, inf above 88.73, NaN of NaN.
///
/// Cody and Waite: `x = n·ln 2 + r` with |r| ≤ ln 2 / 2, then a polynomial in r (minimax, 3e-9 relative) and the scale
/// 2^n in two halves, because 2^128 and 2^-149 are not normal numbers themselves.
#[inline(always)]
pub fn exp<const FMA: bool>(x: Lanes) -> Lanes {
    map(x, exp1::<FMA>)
}

/// One lane of [`exp`].
#[inline(always)]
pub fn exp1<const FMA: bool>(x: f32) -> f32 {
    // Adding 1.5·2^23 leaves the nearest integer in the low bits of the mantissa.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts; the first is 355/512, so its product with n is exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Beyond these the result is 0 or inf anyway. clamp keeps NaN.
    let x = x.clamp(-104.0, 89.0);
    let shifted = fma::<FMA>(x, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = fma::<FMA>(n, -LN2_LOW, fma::<FMA>(n, -LN2_HIGH, x));
    let p = fma::<FMA>(r, 1.381_454_2e-3, 8.368_745e-3);
    let p = fma::<FMA>(r, p, 4.166_839e-2);
    let p = fma::<FMA>(r, p, 1.666_652e-1);
    let p = fma::<FMA>(r, p, 4.999_999_3e-1);
    let p = fma::<FMA>(r * r, p, r) + 1.0;
    let n = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let half = n >> 1;
    p * power_of_two(half) * power_of_two(n.wrapping_sub(half))
}

/// 2^n for -126 ≤ n ≤ 127; anything otherwise, but no trap.
#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) << 23) as u32)
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub fn sigmoid<const FMA: bool>(x: Lanes) -> Lanes {
    map(x, sigmoid1::<FMA>)
}

/// One lane of [`sigmoid`].
#[inline(always)]
pub fn sigmoid1<const FMA: bool>(x: f32) -> f32 {
    1.0 / (1.0 + exp1::<FMA>(-x))
}

/// `x · sigmoid(x)`. Of -inf it is NaN, as in plain tensor operations (-inf · 0).
#[inline(always)]
pub fn silu<const FMA: bool>(x: Lanes) -> Lanes {
    map(x, |x| x / (1.0 + exp1::<FMA>(-x)))
}

/// Derivative of [`silu`]: `s + x·s·(1 - s)` with s = sigmoid(x).
#[inline(always)]
pub fn silu_derivative<const FMA: bool>(x: Lanes) -> Lanes {
    map(x, |x| {
        let s = sigmoid1::<FMA>(x);
        s * fma::<FMA>(x, 1.0 - s, 1.0)
    })
}

/// `y[i] = e^(x[i] - shift)`, and their sum in f64. The bits of a value depend on nothing beside it; those of the sum on all
/// values and their places. A level that this machine has not is lowered to the best it has.
///
/// # Panics
/// If `y` is shorter than `x`.
pub fn exps(level: Level, x: &[f32], shift: f32, y: &mut [f32]) -> f64 {
    exps_at(level.here(), x, shift, y)
}

simd! {
    fn exps_at(x: &[f32], shift: f32, y: &mut [f32]) -> f64 = exps_body;
}

#[inline(always)]
fn exps_body<const FMA: bool>(x: &[f32], shift: f32, y: &mut [f32]) -> f64 {
    let (x, x_rest) = x.as_chunks();
    let (y, y_rest) = y[..x.len() * LANES + x_rest.len()].as_chunks_mut();
    let mut sums = [0.0_f64; LANES];
    for (x, y) in x.iter().zip(y) {
        *y = map(*x, |x| exp1::<FMA>(x - shift));
        sums.iter_mut().zip(y).for_each(|(sum, y)| *sum += f64::from(*y));
    }
    for ((x, y), sum) in x_rest.iter().zip(y_rest).zip(&mut sums) {
        *y = exp1::<FMA>(x - shift);
        *sum += f64::from(*y);
    }
    sums.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::simd::levels;

    simd! {
        fn exp_of(x: &[f32], y: &mut [f32]) = exp_body;
    }
    #[inline(always)]
    fn exp_body<const FMA: bool>(x: &[f32], y: &mut [f32]) {
        for (x, y) in x.as_chunks().0.iter().zip(y.as_chunks_mut().0) {
            *y = exp::<FMA>(*x);
        }
    }

    simd! {
        fn others_of(x: f32, y: &mut [f32]) = others_body;
    }
    #[inline(always)]
    fn others_body<const FMA: bool>(x: f32, y: &mut [f32]) {
        let x = [x; LANES];
        let (s, si, d) = (sigmoid::<FMA>(x), silu::<FMA>(x), silu_derivative::<FMA>(x));
        y.copy_from_slice(&[s[3], si[3], d[3]]);
    }

    #[test]
    fn exp_is_within_an_ulp_or_so_everywhere() {
        // Every 61st float, and all that matter most: prime, so that all mantissas and exponents come by.
        let x: Vec<f32> = (0..u32::MAX / 61).map(|i| f32::from_bits(i * 61)).collect();
        let mut y = vec![0.0; x.len()];
        for level in levels() {
            exp_of(level, &x, &mut y);
            for (&x, &y) in x.iter().zip(&y).take(x.len() / LANES * LANES) {
                let exact = f64::from(x).exp();
                let rounded = exact as f32;
                if x.is_nan() || rounded.is_infinite() || y.is_infinite() {
                    assert!(x.is_nan() && y.is_nan() || exact > 3.402_82e38 && y > 3.402_82e38, "{level:?} {x}: {y}");
                    continue;
                }
                let ulp = f64::from(f32::from_bits(rounded.to_bits() + 1)) - f64::from(rounded);
                assert!((f64::from(y) - exact).abs() <= 1.1 * ulp, "{level:?} {x}: {y}, not {exact}");
            }
        }
    }

    #[test]
    fn exps_are_those_of_each_value_alone_at_any_length() {
        for level in levels() {
            for n in [0, 1, 15, 16, 17, 1009] {
                let x: Vec<f32> = (0..n).map(|i| (i * 37 % 101) as f32 / 3.0 - 30.0).collect();
                let mut y = vec![f32::NAN; n];
                let sum = exps(level, &x, 1.5, &mut y);
                let mut alone = [0.0];
                let same = x.iter().zip(&y).all(|(x, y)| {
                    exps(level, &[*x], 1.5, &mut alone);
                    alone[0].to_bits() == y.to_bits()
                });
                assert!(same, "{level:?} {n}");
                let exact: f64 = x.iter().map(|x| (f64::from(*x) - 1.5).exp()).sum();
                assert!((sum - exact).abs() <= 2e-7 * exact, "{level:?} {n}: {sum}, not {exact}");
            }
        }
    }

    #[test]
    fn special_values() {
        let x = [f32::NEG_INFINITY, f32::INFINITY, f32::NAN, 0.0, -0.0, 88.8, -104.1, -1e30, 1e30];
        let mut padded = [0.0; LANES];
        padded[..x.len()].copy_from_slice(&x);
        let mut y = [0.0; LANES];
        for level in levels() {
            exp_of(level, &padded, &mut y);
            assert!(y[2].is_nan());
            y[2] = 0.0;
            let inf = f32::INFINITY;
            assert_eq!(y[..9], [0.0, inf, 0.0, 1.0, 1.0, inf, 0.0, 0.0, inf], "{level:?}");
        }
    }

    #[test]
    fn sigmoid_and_its_kin() {
        for level in levels() {
            for i in -4000..4000 {
                let x = i as f32 / 40.0;
                let mut y = [0.0; 3];
                others_of(level, x, &mut y);
                let wide = f64::from(x);
                let s = 1.0 / (1.0 + (-wide).exp());
                // Below -88 e^-x overflows and the result is 0, 1e-38 off.
                for (y, exact) in y.iter().zip([s, wide * s, s + wide * s * (1.0 - s)]) {
                    let error = (f64::from(*y) - exact).abs();
                    assert!(
                        error <= 4e-7 * exact.abs() + 3e-7 * s * wide.abs() + 1e-36,
                        "{level:?} {x}: {y}, not {exact}"
                    );
                }
            }
        }
    }
}
