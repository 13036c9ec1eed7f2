//! Packing, activations and products of the quantised formats, at every level of SIMD.

use super::*;
use crate::base::packed::{PackError, Packed};

struct Draw(u64);

impl Draw {
    fn uniform(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    fn normal(&mut self) -> f32 {
        let (a, b) = (self.uniform(), self.uniform());
        (-2.0 * (1.0 - a.abs()).ln()).sqrt() * (b * std::f32::consts::PI).cos()
    }

    fn many(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.normal()).collect()
    }
}

const ALL: [Quant; 4] = [
    Quant { bits: 8, block: 32 },
    Quant { bits: 8, block: 64 },
    Quant { bits: 4, block: 32 },
    Quant { bits: 4, block: 64 },
];

/// Panels of `w [out, input]`, and the same dequantised.
fn pack(quant: Quant, out: usize, input: usize, w: &[f32]) -> (Vec<u8>, Vec<f32>) {
    let bytes = quant.panel_bytes(input);
    let mut panels = vec![0xee_u8; out.div_ceil(PANEL) * bytes];
    let mut back = vec![0.0; out * input];
    panels.chunks_mut(bytes).for_each(|panel| quant.clear(panel));
    for row in 0..out {
        let (mut values, mut scales) = (vec![0; input], vec![f16::ZERO; quant.blocks(input)]);
        quant.quantize(&w[row * input..][..input], &mut values, &mut scales).unwrap();
        quant.put(row % PANEL, &values, &scales, &mut panels[row / PANEL * bytes..][..bytes]);
    }
    for row in 0..out {
        quant.row(row % PANEL, &panels[row / PANEL * bytes..][..bytes], &mut back[row * input..][..input]);
    }
    (panels, back)
}

fn target(c: &mut [f32], columns: usize) -> Target {
    Target { start: c.as_mut_ptr(), stride: columns, columns, add: false }
}

fn product(level: Level, acts: &QuantActs, rows: &[u32], panels: &[u8], columns: usize) -> Vec<f32> {
    let mut c = vec![f32::NAN; rows.len() * columns];
    // SAFETY: the target is all of `c`.
    unsafe {
        multiply(level, acts.quant, acts, rows.len(), |i| rows[i] as usize, panels, target(&mut c, columns));
    }
    c
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn rows_come_back_as_they_were_put() {
    let mut draw = Draw(1);
    for quant in ALL {
        for (out, input) in [(1_usize, 1), (5, 31), (32, 32), (33, 65), (70, 200)] {
            let bytes = quant.panel_bytes(input);
            assert_eq!(bytes % 64, 0);
            let rows: Vec<_> = (0..out)
                .map(|_| {
                    let most = quant.zero() - 1;
                    let values: Vec<i8> = (0..input).map(|_| (draw.uniform() * (most as f32 + 0.99)) as i8).collect();
                    let scales: Vec<f16> = (0..quant.blocks(input)).map(|_| f16::from_f32(draw.normal())).collect();
                    (values, scales)
                })
                .collect();
            let mut panels = vec![0xee_u8; out.div_ceil(PANEL) * bytes];
            panels.chunks_mut(bytes).for_each(|panel| quant.clear(panel));
            for (i, (values, scales)) in rows.iter().enumerate() {
                quant.put(i % PANEL, values, scales, &mut panels[i / PANEL * bytes..][..bytes]);
            }
            for (i, (values, scales)) in rows.iter().enumerate() {
                let (mut v, mut s) = (vec![0; input], vec![f16::ZERO; scales.len()]);
                quant.take(i % PANEL, &panels[i / PANEL * bytes..][..bytes], &mut v, &mut s);
                assert_eq!((&v, &s), (values, scales), "{quant:?} {out}×{input} row {i}");
            }
        }
    }
}

/// Root mean square of the error over that of `x`.
fn relative_error(quant: Quant, x: &[f32]) -> f64 {
    let (mut values, mut scales) = (vec![0; x.len()], vec![f16::ZERO; quant.blocks(x.len())]);
    quant.quantize(x, &mut values, &mut scales).unwrap();
    let mut back = vec![0.0; x.len()];
    quant.dequantize(&values, &scales, &mut back);
    let square = |x: f32| f64::from(x) * f64::from(x);
    let error: f64 = x.iter().zip(&back).map(|(x, b)| square(x - b)).sum();
    (error / x.iter().map(|&x| square(x)).sum::<f64>()).sqrt()
}

#[test]
fn the_error_is_small_and_the_search_for_a_scale_pays() {
    let mut draw = Draw(2);
    let normal = draw.many(1 << 16);
    let heavy: Vec<f32> = normal.iter().map(|x| x * x * x).collect();
    for (x, most8, most4, gain) in [(&normal, 0.0056, 0.082, 0.95), (&heavy, 0.0095, 0.109, 0.98)] {
        let [e8, _, e4, _] = ALL.map(|quant| relative_error(quant, x));
        // What the largest magnitude at −8 gives without a search.
        let (mut error, mut whole) = (0.0, 0.0);
        for block in x.chunks(32) {
            let top = block.iter().fold(0.0_f32, |top, &x| if x.abs() > top.abs() { x } else { top });
            let scale = f16::from_f32(top / -8.0).to_f32();
            for &x in block {
                let q = (x / scale).round().clamp(-8.0, 7.0);
                error += f64::from(x - q * scale).powi(2);
                whole += f64::from(x).powi(2);
            }
        }
        let plain = f64::sqrt(error / whole);
        eprintln!("int8 {e8:.5}, int4 {e4:.4} (without a search {plain:.4})");
        assert!(e8 < most8 && e4 < most4 && e4 < gain * plain);
    }
}

#[test]
fn magnitudes_at_the_edges() {
    for quant in ALL {
        // The largest magnitude is met, whatever its sign and size.
        for scale in [1.0, -1.0, 1e-4, 3e4] {
            let x: Vec<f32> = (0..quant.block).map(|i| if i == 7 { scale } else { 0.0 }).collect();
            assert!(relative_error(quant, &x) < 2e-3, "{quant:?} {scale}");
        }
        let mut x = vec![0.0; quant.block + 3];
        let (mut values, mut scales) = (vec![1; x.len()], vec![f16::ONE; 2]);
        quant.quantize(&x, &mut values, &mut scales).unwrap();
        let mut back = vec![1.0; x.len()];
        quant.dequantize(&values, &scales, &mut back);
        assert!(back.iter().all(|&x| x == 0.0));
        for tiny in [1e-8, 1e-6, 1e-5, -3e-5] {
            x.fill(tiny);
            quant.quantize(&x, &mut values, &mut scales).unwrap();
            quant.dequantize(&values, &scales, &mut back);
            assert!(back.iter().all(|b| (b - tiny).abs() <= 6.1e-8), "{quant:?} {tiny}: {}", back[0]);
        }
        for (bad, error) in [
            (f32::NAN, QuantizeError::NotFinite),
            (f32::NEG_INFINITY, QuantizeError::NotFinite),
            (1e9, QuantizeError::TooLarge),
        ] {
            x[quant.block + 1] = bad;
            assert_eq!(quant.quantize(&x, &mut values, &mut scales), Err(error));
        }
    }
}

#[test]
fn products_are_right_and_rows_do_not_depend_on_each_other() {
    let mut draw = Draw(3);
    for quant in ALL {
        for (rows, out, input) in
            [(1, 1, 1), (2, 31, 33), (3, 32, 64), (5, 65, 127), (6, 64, 96), (7, 33, 160), (13, 70, 257), (29, 96, 320)]
        {
            let (x, w) = (draw.many(rows * input), draw.many(out * input));
            let (panels, back) = pack(quant, out, input, &w);
            let all: Vec<u32> = (0..rows as u32).rev().collect();
            let mut fused: Option<Vec<f32>> = None;
            for level in simd::levels() {
                let acts = simd::with_level(level, || QuantActs::new(quant, rows, input, &x));
                let c = product(level, &acts, &all, &panels, out);
                for (i, &row) in all.iter().enumerate() {
                    let own = product(level, &acts, &[row], &panels, out);
                    assert_eq!(bits(&own), bits(&c[i * out..][..out]), "{quant:?} {level:?} row {row} alone");
                    let single = QuantActs::new(quant, 1, input, &x[row as usize * input..][..input]);
                    assert_eq!(bits(&product(level, &single, &[0], &panels, out)), bits(&own));
                    for j in 0..out {
                        let (mut sum, mut size) = (0.0, 0.0);
                        for k in 0..input {
                            let at = row as usize * acts.blocks * quant.block + k;
                            let meta = acts.meta[row as usize * acts.blocks + k / quant.block];
                            let x = f64::from(acts.values[at]) * f64::from(meta.scale);
                            sum += x * f64::from(back[j * input + k]);
                            size += (x * f64::from(back[j * input + k])).abs();
                        }
                        let error = (f64::from(c[i * out + j]) - sum).abs();
                        assert!(error <= 1e-6 * size + 1e-30, "{quant:?} {level:?} {rows}×{out}×{input}: {error:e}");
                    }
                }
                if level >= Level::Avx2 {
                    assert_eq!(bits(fused.get_or_insert_with(|| c.clone())), bits(&c), "{quant:?} {level:?}");
                }
            }
        }
    }
}

/// The largest sums there are: every weight and every activation as far from zero as it can be, also a -128 (or -8) of a file
/// that was not written here.
#[test]
fn no_sum_is_too_large_for_its_register() {
    for quant in ALL {
        let (input, least) = (2 * quant.block, -quant.zero());
        for (w, x) in [(least, 1.0), (least, -1.0), (-least - 1, 1.0), (-least - 1, -1.0)] {
            let bytes = quant.panel_bytes(input);
            let mut panels = vec![0; bytes];
            quant.clear(&mut panels);
            let scales = vec![f16::ONE; quant.blocks(input)];
            (0..PANEL).for_each(|column| quant.put(column, &vec![w as i8; input], &scales, &mut panels));
            for rows in [1, 2, 3, 4, 6, 7] {
                let acts = QuantActs::new(quant, rows, input, &vec![x; rows * input]);
                let wanted = (w as f32) * x * input as f32;
                for level in simd::levels() {
                    let got = product(level, &acts, &(0..rows as u32).collect::<Vec<_>>(), &panels, PANEL);
                    assert!(
                        got.iter().all(|y| (y - wanted).abs() < 1e-5 * wanted.abs()),
                        "{level:?} {quant:?} {w} {x}: {got:?}"
                    );
                }
            }
        }
    }
}

#[test]
fn exact_products_are_one_chain_over_dequantised_weights() {
    let mut draw = Draw(4);
    for quant in ALL {
        for (rows, out, input) in [(1, 1, 1), (2, 33, 31), (8, 64, 96), (9, 65, 130), (17, 40, 257)] {
            let (panels, back) = pack(quant, out, input, &draw.many(out * input));
            let stride = quant.blocks(input) * quant.block;
            let mut x = vec![0.0; rows * stride];
            for row in x.chunks_mut(stride) {
                row[..input].copy_from_slice(&draw.many(input));
            }
            for level in simd::levels() {
                let mut c = vec![f32::NAN; rows * out];
                // SAFETY: the target is all of `c`.
                unsafe {
                    multiply_exact(level, quant, input, &x, stride, rows, |i| i, &panels, target(&mut c, out));
                }
                for (i, c) in c.iter().enumerate() {
                    let (x, w) = (&x[i / out * stride..][..input], &back[i % out * input..][..input]);
                    let step = |sum: f32, (x, w): (&f32, &f32)| {
                        if level == Level::Portable { sum + x * w } else { x.mul_add(*w, sum) }
                    };
                    let expected = x.iter().zip(w).fold(0.0, step);
                    assert_eq!(c.to_bits(), expected.to_bits(), "{quant:?} {level:?} {rows}×{out}×{input} at {i}");
                }
            }
        }
    }
}

#[test]
fn what_is_not_finite_stays_in_its_row_and_is_not_hidden() {
    let mut draw = Draw(5);
    let (rows, out, input) = (7, 40, 100);
    for quant in ALL {
        let (panels, _) = pack(quant, out, input, &draw.many(out * input));
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = draw.many(rows * input);
            let all: Vec<u32> = (0..rows as u32).collect();
            let good = QuantActs::new(quant, rows, input, &x);
            x[3 * input + 97] = bad;
            for level in simd::levels() {
                let good = product(level, &good, &all, &panels, out);
                let acts = simd::with_level(level, || QuantActs::new(quant, rows, input, &x));
                let c = product(level, &acts, &all, &panels, out);
                for (i, (c, good)) in c.chunks(out).zip(good.chunks(out)).enumerate() {
                    if i == 3 {
                        assert!(c.iter().all(|c| c.is_nan()));
                    } else {
                        assert_eq!(bits(c), bits(good));
                    }
                }
            }
        }
    }
}

#[test]
fn tiny_and_huge_activations_and_no_rows() {
    for quant in ALL {
        let (panels, back) = pack(quant, 3, 40, &Draw(6).many(120));
        for size in [0.0, 1e-44, 1e-30, 1e30] {
            let x: Vec<f32> = Draw(7).many(40).iter().map(|x| x * size).collect();
            let c = product(simd::level(), &QuantActs::new(quant, 1, 40, &x), &[0], &panels, 3);
            for (c, w) in c.iter().zip(back.chunks(40)) {
                let expected: f32 = x.iter().zip(w).map(|(x, w)| x * w).sum();
                assert!((c - expected).abs() <= 0.1 * size + 1e-36, "{quant:?} {size}: {c} {expected}");
            }
        }
        assert!(product(simd::level(), &QuantActs::new(quant, 0, 40, &[]), &[], &panels, 3).is_empty());
    }
}

#[test]
fn many_activations_are_shared_out_with_the_same_bits() {
    let (rows, k) = (300, 130);
    let x = Draw(8).many(rows * k);
    for quant in ALL {
        let make = |threads| pool::with_threads(threads, || QuantActs::new(quant, rows, k, &x));
        let (one, two) = (make(1), make(2));
        assert_eq!(one.values, two.values);
        let same = |(a, b): (&Meta, &Meta)| a.scale.to_bits() == b.scale.to_bits() && a.bias == b.bias;
        assert!(one.meta.iter().zip(&two.meta).all(same));
    }
}

#[test]
fn packed_weights_of_floats_and_of_quantised_rows_are_the_same() {
    let (count, out, input) = (2, 45, 100);
    let w = Draw(9).many(count * out * input);
    let row = |matrix: usize, row: usize| &w[(matrix * out + row) * input..][..input];
    for format in [Format::Int8 { block: 32 }, Format::Int4 { block: 64 }] {
        let floats = Packed::pack(format, count, out, input, &|m, r, to| to.copy_from_slice(row(m, r))).unwrap();
        let ready = Packed::pack_quantized(format, count, out, input, &|m, r, values, scales| {
            quantize_row(format, row(m, r), values, scales).unwrap();
        })
        .unwrap();
        for matrix in 0..count {
            for panel in 0..floats.panels() {
                assert_eq!(floats.panel(matrix, panel), ready.panel(matrix, panel));
            }
        }
    }
    let bad = |m: usize, r: usize, to: &mut [f32]| to.fill(if (m, r) == (1, 7) { f32::NAN } else { 1.0 });
    let error = Packed::pack(Format::Int8 { block: 32 }, count, out, input, &bad).unwrap_err();
    assert_eq!(error, PackError::Quantize { matrix: 1, row: 7, error: QuantizeError::NotFinite });
    let odd = Format::Int8 { block: 48 };
    assert_eq!(Packed::pack(odd, 1, 1, 1, &bad).unwrap_err(), PackError::Format(odd));
    assert!(Packed::pack_quantized(Format::Bf16, 1, 1, 1, &|_, _, _, _| ()).is_err());
}
