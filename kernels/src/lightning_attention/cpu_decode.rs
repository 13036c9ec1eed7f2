//! Flex: one token for many rows. The state is read once and written once; that traffic is the floor.

use std::cell::Cell;

use burn::backend::Flex;
use burn::backend::TensorMetadata;
use burn::backend::tensor::FloatTensor;

use crate::base::buffer::SendPtr;
use crate::base::flex::tensor;
use crate::base::math::{LANES, Lanes, fma, sigmoid, silu};
use crate::base::pool;
use crate::base::simd::{Level, Plain, Vector, level};
#[cfg(target_arch = "x86_64")]
use crate::base::simd::{Ymm, Zmm};
use crate::base::view::whole;
use crate::simd;

type T = FloatTensor<Flex>;

/// Below so many bytes of state, and below so many outputs, waking another thread costs more than it saves.
const FEW_BYTES: usize = 64 << 10;
const FEW_OUTPUTS: usize = 16 << 10;

/// See [`super::decode`].
pub(super) fn step(qkv: T, gate: T, state: T, norm: T, slopes: &[f64], eps: f64) -> (T, T) {
    let [rows, heads, dim, _] = state.shape().dims();
    let (qkv, gate, norm) = (whole(qkv), whole(gate), whole(norm));
    let mut state = whole(state);
    let mut y = vec![0.0_f32; rows * heads * dim];
    // In place where nobody else holds the state; else what others hold is read and a new one is written. Asked once: a
    // holder on another thread may let go at any time.
    let mut fresh = None;
    {
        let (old, new) = match state.try_storage_mut::<f32>().map(<[f32]>::as_mut_ptr) {
            Some(own) => (SendPtr(own), SendPtr(own)),
            None => {
                let new = fresh.insert(vec![0.0_f32; rows * heads * dim * dim]).as_mut_ptr();
                (SendPtr(state.storage::<f32>().as_ptr().cast_mut()), SendPtr(new))
            }
        };
        let decays: Vec<f32> = slopes.iter().map(|slope| (-slope).exp() as f32).collect();
        let (qkv, gate, norm) = (qkv.storage::<f32>(), gate.storage::<f32>(), norm.storage::<f32>());
        assert!(qkv.len() >= rows * heads * 3 * dim && gate.len() >= rows * heads * dim && norm.len() >= heads * dim);
        let level = level();
        let outputs = SendPtr(y.as_mut_ptr());
        let head = |task: usize| {
            // SAFETY: `y` and the states hold `rows · heads` parts; each task is run once and touches its own. Where old and
            // new are the same memory, `recur` reads each value before it writes it.
            unsafe {
                let o = std::slice::from_raw_parts_mut(outputs.get().add(task * dim), dim);
                let at = task * dim * dim;
                let own = &qkv[task * 3 * dim..][..3 * dim];
                recur(level, own, decays[task % heads], old.get().add(at), new.get().add(at), o);
            }
        };
        let row = |row: usize| {
            // SAFETY: each row is run once, after its heads.
            let y = unsafe { std::slice::from_raw_parts_mut(outputs.get().add(row * heads * dim), heads * dim) };
            gated_norm(level, y, norm, &gate[row * heads * dim..][..heads * dim], eps as f32);
        };
        if rows >= 4 * pool::threads() {
            pool::run(rows, |r| {
                (r * heads..(r + 1) * heads).for_each(head);
                row(r);
            });
        } else {
            if rows * heads * dim * dim * 4 < FEW_BYTES {
                (0..rows * heads).for_each(head);
            } else {
                pool::run(rows * heads, head);
            }
            if rows * heads * dim < FEW_OUTPUTS {
                (0..rows).for_each(row);
            } else {
                pool::run(rows, row);
            }
        }
    }
    let state = fresh.map_or(state, |fresh| tensor(fresh, [rows, heads, dim, dim]));
    (tensor(y, [rows, heads * dim]), state)
}

/// One head: SiLU, `new = decay·old + kᵀv`, `o = q·new`.
///
/// # Safety
/// `old` must be valid for reads and `new` for writes of dim² floats (they may be the same memory, or not overlap), with
/// nobody else using `new`.
unsafe fn recur(level: Level, qkv: &[f32], decay: f32, old: *const f32, new: *mut f32, o: &mut [f32]) {
    thread_local! {
        static ACTIVATED: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    }
    let mut activated = ACTIVATED.take();
    activated.resize(qkv.len(), 0.0);
    activate(level, qkv, &mut activated);
    let dim = o.len();
    let (q, kv) = activated.split_at(dim);
    let (k, v) = kv.split_at(dim);
    let head = Head { q, k, v, decay, old, new };
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
        unsafe fn avx512(head: &Head, o: &mut [f32]) {
            // SAFETY: the caller of `recur` answers for the states.
            unsafe { strips::<Zmm, true>(head, o) }
        }
        #[target_feature(enable = "avx2,fma")]
        unsafe fn avx2(head: &Head, o: &mut [f32]) {
            // SAFETY: as above.
            unsafe { strips::<Ymm, true>(head, o) }
        }
        // SAFETY: the level says what the processor has; the caller answers for the states.
        unsafe {
            if level >= Level::Avx512 {
                avx512(&head, o);
            } else if level >= Level::Avx2 {
                avx2(&head, o);
            } else {
                strips::<Plain, false>(&head, o);
            }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    // SAFETY: the caller answers for the states.
    unsafe {
        strips::<Plain, false>(&head, o);
    }
    ACTIVATED.set(activated);
}

struct Head<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    decay: f32,
    old: *const f32,
    new: *mut f32,
}

#[inline(always)]
unsafe fn strips<V: Vector, const FMA: bool>(head: &Head, o: &mut [f32]) {
    let dim = o.len();
    let mut column = 0;
    // SAFETY: strips inside the `dim` columns; the states are the caller's.
    unsafe {
        while dim - column >= 4 * V::LANES {
            strip::<V, 4>(head, column, o);
            column += 4 * V::LANES;
        }
        while dim - column >= V::LANES {
            strip::<V, 1>(head, column, o);
            column += V::LANES;
        }
        for (column, o) in o.iter_mut().enumerate().skip(column) {
            let mut sum = 0.0;
            for c in 0..dim {
                let at = c * dim + column;
                let s = fma::<FMA>(head.k[c], head.v[column], fma::<FMA>(head.decay, *head.old.add(at), 0.0));
                *head.new.add(at) = s;
                sum = fma::<FMA>(head.q[c], s, sum);
            }
            *o = sum;
        }
    }
}

#[inline(always)]
unsafe fn strip<V: Vector, const N: usize>(head: &Head, column: usize, o: &mut [f32]) {
    let dim = o.len();
    // SAFETY: the strip lies inside the `dim` columns; the states are the caller's.
    unsafe {
        let decay = V::splat(&head.decay);
        let v: [V; N] = std::array::from_fn(|n| V::load(head.v.as_ptr().add(column + n * V::LANES)));
        let mut sum = [V::zero(); N];
        for c in 0..dim {
            let (k, q) = (V::splat(head.k.as_ptr().add(c)), V::splat(head.q.as_ptr().add(c)));
            let at = c * dim + column;
            for n in 0..N {
                let old = V::load(head.old.add(at + n * V::LANES));
                let s = V::zero().fma(decay, old).fma(k, v[n]);
                s.store(head.new.add(at + n * V::LANES));
                sum[n] = sum[n].fma(q, s);
            }
        }
        for (n, sum) in sum.into_iter().enumerate() {
            sum.store(o.as_mut_ptr().add(column + n * V::LANES));
        }
    }
}

/// The first of up to [`LANES`] values.
#[inline(always)]
fn load(x: &[f32]) -> Lanes {
    let mut lanes = [0.0; LANES];
    lanes[..x.len()].copy_from_slice(x);
    lanes
}

simd! {
    /// `y = silu(x)`.
    fn activate(x: &[f32], y: &mut [f32]) = activate_body;
}

#[inline(always)]
fn activate_body<const FMA: bool>(x: &[f32], y: &mut [f32]) {
    let ((x, x_rest), (y, y_rest)) = (x.as_chunks(), y.as_chunks_mut());
    for (x, y) in x.iter().zip(y) {
        *y = silu::<FMA>(*x);
    }
    if !x_rest.is_empty() {
        y_rest.copy_from_slice(&silu::<FMA>(load(x_rest))[..x_rest.len()]);
    }
}

simd! {
    /// `y ← y · rsqrt(mean(y²) + eps) · weight · sigmoid(gate)`.
    fn gated_norm(y: &mut [f32], weight: &[f32], gate: &[f32], eps: f32) = gated_norm_body;
}

#[inline(always)]
fn gated_norm_body<const FMA: bool>(y: &mut [f32], weight: &[f32], gate: &[f32], eps: f32) {
    let n = y.len();
    let mut sums = [0.0_f32; LANES];
    let mut add = |x: &Lanes| {
        for (sum, x) in sums.iter_mut().zip(x) {
            *sum = fma::<FMA>(*x, *x, *sum);
        }
    };
    let (whole, rest) = y.as_chunks();
    whole.iter().for_each(&mut add);
    if !rest.is_empty() {
        add(&load(rest));
    }
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            sums[i] += sums[i + half];
        }
        half /= 2;
    }
    let scale = 1.0 / (sums[0] / n as f32 + eps).sqrt();
    let scaled = |y: &Lanes, weight: &Lanes, gate: &Lanes| -> Lanes {
        let gate = sigmoid::<FMA>(*gate);
        std::array::from_fn(|i| y[i] * scale * weight[i] * gate[i])
    };
    let ((y, y_rest), (weight, weight_rest), (gate, gate_rest)) =
        (y.as_chunks_mut(), weight.as_chunks(), gate.as_chunks());
    for ((y, weight), gate) in y.iter_mut().zip(weight).zip(gate) {
        *y = scaled(y, weight, gate);
    }
    if !y_rest.is_empty() {
        let last = scaled(&load(y_rest), &load(weight_rest), &load(gate_rest));
        y_rest.copy_from_slice(&last[..y_rest.len()]);
    }
}
