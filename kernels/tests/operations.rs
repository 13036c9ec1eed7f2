//! Every operation with its operands behind strides of any kind, without tokens, with NaN in one token, in half precision and
//! alone: on Flex, and on the device of `common::device`.

mod common;

use std::ops::Range;

use burn::tensor::{DType, Device, Tensor};
use common::{device, dtypes, near, random, to, values};
use m1_kernels::experts::{self, ExpertsWeights, Routing};
use m1_kernels::lightning_attention::{self, lightning_attention};
use m1_kernels::rotary::Rotation;
use m1_kernels::softmax_attention::{self, KeyValues, softmax_attention};
use m1_kernels::{linear, log_prob, rms_norm, rotary, silu};

/// How an operand lies in memory.
#[derive(Debug, Clone, Copy, PartialEq)]
enum View {
    /// Row after row.
    Rows,
    /// The axes the other way round.
    Turned,
    /// From the last element to the first.
    Flipped,
    /// In the middle of rows that are wider.
    Inside,
}

impl View {
    /// The elements of `flat` as a tensor of this shape.
    fn of<const D: usize>(self, flat: Tensor<1>, shape: [usize; D]) -> Tensor<D> {
        let axes: [usize; D] = std::array::from_fn(|i| D - 1 - i);
        match self {
            View::Rows => match shape.iter().position(|&size| size == 0) {
                // To `reshape` a zero means the size that stands in its place already: here the first.
                Some(none) => {
                    let mut first = shape;
                    first.swap(0, none);
                    flat.reshape(first).swap_dims(0, none)
                }
                None => flat.reshape(shape),
            },
            View::Turned => flat.reshape(axes.map(|axis| shape[axis])).permute(axes),
            View::Flipped => flat.reshape(shape).flip(axes),
            View::Inside => {
                let x = flat.reshape(shape);
                let beside = x.clone().detach() * f32::NAN;
                Tensor::cat(vec![beside.clone(), x, beside], D - 1).narrow(D - 1, shape[D - 1], shape[D - 1])
            }
        }
    }

    /// All elements of a result, so that the gradient comes to it behind such strides.
    fn flat<const D: usize>(self, y: Tensor<D>) -> Tensor<1> {
        let axes: [usize; D] = std::array::from_fn(|i| D - 1 - i);
        let y = match self {
            View::Rows => y,
            View::Turned => y.permute(axes),
            View::Flipped => y.flip(axes),
            View::Inside => Tensor::cat(vec![y.zeros_like(), y], D - 1),
        };
        cast(y, DType::F32).flatten(0, D - 1)
    }
}

fn cast<const D: usize>(x: Tensor<D>, dtype: DType) -> Tensor<D> {
    if x.dtype() == dtype { x } else { x.cast(dtype) }
}

/// What an operation is given.
struct Operands<'a> {
    leaves: &'a [Tensor<1>],
    view: View,
    dtype: DType,
    /// Whether the definition is run.
    reference: bool,
}

impl Operands<'_> {
    /// Operand `i` in the dtype of the call.
    fn get<const D: usize>(&self, i: usize, shape: [usize; D]) -> Tensor<D> {
        self.view.of(cast(self.leaves[i].clone(), self.dtype), shape)
    }

    /// An operand that is f32 whatever the others are.
    fn wide<const D: usize>(&self, i: usize, shape: [usize; D]) -> Tensor<D> {
        self.view.of(self.leaves[i].clone(), shape)
    }
}

type Run = Box<dyn Fn(&Operands) -> Tensor<1>>;

struct Operation {
    name: &'static str,
    /// Elements of each operand.
    sizes: Vec<usize>,
    /// The first so many operands, and the result, have a row for each token.
    by_token: usize,
    /// An operand that is in the result as it is when there are no tokens.
    passes: Option<usize>,
    differentiable: bool,
    /// How far the result and the gradients may be off in f32.
    bound: f32,
    run: Run,
}

const SLOPES: [f64; 2] = [0.9, 0.02];

/// All operations on the tokens of a text at `tokens`.
fn operations(tokens: Range<usize>) -> Vec<Operation> {
    let n = tokens.len();
    let op = |name, sizes: &[usize], by_token, bound, run: Run| Operation {
        name,
        sizes: sizes.to_vec(),
        by_token,
        passes: None,
        differentiable: true,
        bound,
        run,
    };
    let positions: Vec<usize> = tokens.clone().map(|t| 1000 + 7 * t).collect();
    let targets: Vec<u32> = tokens.clone().map(|t| (t * 5 % 37) as u32).collect();
    let choices: Vec<u32> = tokens.clone().flat_map(|t| [t % 3, (t + 1) % 3].map(|e| e as u32)).collect();
    let mut all = vec![
        op(
            "silu",
            &[n * 21],
            1,
            1e-5,
            Box::new(move |x| {
                let f = if x.reference { silu::reference::silu } else { silu::silu };
                x.view.flat(f(x.get(0, [n, 3, 7])))
            }),
        ),
        op(
            "rms_norm",
            &[n * 33, 33],
            1,
            1e-5,
            Box::new(move |x| {
                let f = if x.reference { rms_norm::reference::rms_norm } else { rms_norm::rms_norm };
                x.view.flat(f(x.get(0, [n, 33]), x.wide(1, [33]), 1e-5))
            }),
        ),
        op(
            "add_rms_norm",
            &[n * 33, n * 33, 33],
            2,
            1e-5,
            Box::new(move |x| {
                let f = if x.reference { rms_norm::reference::add_rms_norm } else { rms_norm::add_rms_norm };
                let (sum, y) = f(x.get(0, [n, 33]), x.get(1, [n, 33]), x.wide(2, [33]), 1.5, 0.7, 1e-5);
                x.view.flat(Tensor::cat(vec![sum, y], 1))
            }),
        ),
        op(
            "gated_rms_norm",
            &[n * 33, n * 33, 33],
            2,
            1e-5,
            Box::new(move |x| {
                let f = if x.reference { rms_norm::reference::gated_rms_norm } else { rms_norm::gated_rms_norm };
                x.view.flat(f(x.wide(0, [1, n, 3, 11]), x.get(1, [n, 33]), x.wide(2, [33]), 1e-5))
            }),
        ),
        op(
            "rotary",
            &[n * 32],
            1,
            1e-5,
            Box::new(move |x| {
                let f = if x.reference { rotary::reference::rotary } else { rotary::rotary };
                let rotation = Rotation::new(&positions, 8, 1e4, &x.leaves[0].device());
                x.view.flat(f(x.get(0, [n, 2, 16]), &rotation))
            }),
        ),
        op(
            "linear",
            &[n * 40, 17 * 40],
            1,
            2e-5,
            Box::new(move |x| {
                let (a, w) = (x.get(0, [n, 40]), x.get(1, [17, 40]));
                x.view.flat(if x.reference { linear::reference::linear(a, w) } else { linear::linear(a, &w.into()) })
            }),
        ),
        op(
            "linear_f32",
            &[n * 40, 17 * 40],
            1,
            2e-5,
            Box::new(move |x| {
                let (a, w) = (x.wide(0, [n, 40]), x.get(1, [17, 40]));
                x.view.flat(if x.reference {
                    linear::reference::linear(a, w)
                } else {
                    linear::linear_f32(a, &w.into())
                })
            }),
        ),
        op(
            "experts",
            &[n * 24, n * 2, 3 * 20 * 24, 3 * 24 * 20, 3 * 20 * 24],
            2,
            1e-4,
            Box::new(move |x| {
                let f = if x.reference { experts::reference::experts } else { experts::experts };
                let weight = |i, out, input| (x.get(i, [3, out, input]) * 0.25).into();
                let weights = ExpertsWeights { w1: weight(2, 20, 24), w2: weight(3, 24, 20), w3: weight(4, 20, 24) };
                let routing = Routing { choices: choices.clone().into(), shares: x.wide(1, [n, 2]) };
                x.view.flat(f(x.get(0, [n, 24]), &routing, &weights))
            }),
        ),
        op(
            "log_prob",
            &[n * 12, 37 * 12],
            1,
            2e-5,
            Box::new(move |x| {
                let (hidden, head) = (x.get(0, [n, 12]), x.get(1, [37, 12]));
                let (log_p, entropy) = if x.reference {
                    log_prob::reference::log_prob(hidden, head, &targets, 0.8)
                } else {
                    log_prob::log_prob(hidden, &head.into(), &targets, 0.8)
                };
                x.view.flat(Tensor::stack::<2>(vec![log_p, entropy], 1))
            }),
        ),
        op(
            "softmax_attention",
            &[2 * 4 * n * 16, 2 * 2 * n * 16, 2 * 2 * n * 16],
            0,
            3e-5,
            Box::new(move |x| {
                let f = if x.reference { softmax_attention::reference::softmax_attention } else { softmax_attention };
                let kv = KeyValues { keys: x.get(1, [2, 2, n, 16]), values: x.get(2, [2, 2, n, 16]) };
                x.view.flat(f(x.get(0, [2, 4, n, 16]), &[kv], 0))
            }),
        ),
    ];
    for (name, has_state, want_state) in [
        ("lightning_attention", false, false),
        ("lightning_attention from a state", true, false),
        ("lightning_attention to a state", false, true),
        ("lightning_attention from state to state", true, true),
    ] {
        let sizes = [2 * 2 * n * 48, 2 * 2 * 16 * 16];
        let run: Run = Box::new(move |x| {
            let f = if x.reference { lightning_attention::reference::lightning_attention } else { lightning_attention };
            let state = has_state.then(|| x.wide(1, [2, 2, 16, 16]));
            let (o, after) = f(x.get(0, [2, 2, n, 48]), &SLOPES, state, Some(&[0, 61]), None, want_state);
            let o = x.view.flat(o);
            after.map_or(o.clone(), |after| Tensor::cat(vec![o, x.view.flat(after)], 0))
        });
        let passes = (has_state && want_state).then_some(1);
        all.push(Operation { passes, ..op(name, &sizes[..1 + usize::from(has_state)], 0, 3e-5, run) });
    }
    let run: Run = Box::new(move |x| {
        let (qkv, gate) = (x.get(0, [n, 2 * 48]), x.get(1, [n, 2 * 16]));
        let (state, norm) = (x.wide(2, [n, 2, 16, 16]), x.wide(3, [32]));
        let f = if x.reference { lightning_attention::reference::decode } else { lightning_attention::decode };
        let (y, state) = f(qkv, gate, state, &SLOPES, norm, 1e-5);
        x.view.flat(Tensor::cat(vec![cast(y, DType::F32), state.flatten(1, 3)], 1))
    });
    let decode = op("lightning_attention::decode", &[n * 96, n * 32, n * 512, 32], 3, 2e-5, run);
    all.push(Operation { differentiable: false, ..decode });
    all
}

impl Operation {
    fn operands(&self) -> Vec<Tensor<1>> {
        self.sizes.iter().map(|&size| random([size])).collect()
    }

    fn forward(&self, operands: &[Tensor<1>], device: &Device) -> Tensor<1> {
        let leaves: Vec<_> = operands.iter().map(|x| to(x, device)).collect();
        (self.run)(&Operands { leaves: &leaves, view: View::Rows, dtype: DType::F32, reference: false })
    }

    /// The result, and if there are any the gradients towards all operands of its sum, weighed.
    fn outcome(
        &self,
        operands: &[Tensor<1>],
        device: &Device,
        view: View,
        dtype: DType,
        reference: bool,
    ) -> Vec<Tensor<1>> {
        let device = if self.differentiable { device.clone().autodiff() } else { device.clone() };
        let leaf = |x| if self.differentiable { to(x, &device).require_grad() } else { to(x, &device) };
        let leaves: Vec<_> = operands.iter().map(leaf).collect();
        let y = (self.run)(&Operands { leaves: &leaves, view, dtype, reference });
        let mut all = vec![y.clone()];
        if self.differentiable {
            let weights: Vec<f32> = (0..y.dims()[0]).map(|i| ((i * 37 + 11) % 101) as f32 / 50.0 - 1.0).collect();
            let grads = (y * Tensor::from_floats(weights.as_slice(), &device)).sum().backward();
            all.extend(leaves.iter().map(|x| x.grad(&grads).expect("a gradient for every operand")));
        }
        all
    }

    /// Compares what [`Operation::outcome`] gives.
    #[track_caller]
    fn compare(&self, got: &[Tensor<1>], want: &[Tensor<1>], bound: f32, what: &str) {
        for (i, (got, want)) in got.iter().zip(want).enumerate() {
            let part = if i == 0 { "result".into() } else { format!("gradient {}", i - 1) };
            near(&format!("{}, {what}: {part}", self.name), got, want, bound);
        }
    }
}

/// Flex, and the device if there is one.
fn devices() -> Vec<Device> {
    std::iter::once(Device::flex()).chain(device()).collect()
}

#[test]
fn strides_of_any_kind_forward_and_backward() {
    for device in devices() {
        for tokens in if device == Device::flex() { vec![1, 5, 70] } else { vec![5] } {
            for op in operations(0..tokens) {
                let operands = op.operands();
                for view in [View::Rows, View::Turned, View::Flipped, View::Inside] {
                    let want = op.outcome(&operands, &Device::flex(), view, DType::F32, true);
                    let got = op.outcome(&operands, &device, view, DType::F32, false);
                    op.compare(&got, &want, op.bound, &format!("{device:?}, {tokens} tokens, {view:?}"));
                }
            }
        }
    }
}

#[test]
fn no_tokens_forward_and_backward() {
    for device in devices() {
        for op in operations(0..0) {
            let operands = op.operands();
            let y = op.forward(&operands, &device);
            let passed = op.passes.map_or(0, |i| op.sizes[i]);
            let state = if op.name.ends_with("to a state") { 2 * 2 * 16 * 16 } else { passed };
            assert_eq!(y.dims(), [state], "{} on {device:?}", op.name);
            assert!(passed > 0 || values(&y).iter().all(|&y| y == 0.0), "{} on {device:?}", op.name);
            if !op.differentiable {
                continue;
            }
            let device = device.clone().autodiff();
            let leaves: Vec<_> = operands.iter().map(|x| to(x, &device).require_grad()).collect();
            let y = (op.run)(&Operands { leaves: &leaves, view: View::Rows, dtype: DType::F32, reference: false });
            if op.name == "log_prob" {
                // Its two results are cut out of one, and what Burn cuts out of nothing hangs on nothing.
                assert!(!y.is_tracked());
                continue;
            }
            let grads = y.sum().backward();
            for (i, x) in leaves.iter().enumerate() {
                let grad = x.grad(&grads).unwrap_or_else(|| panic!("{}: no gradient {i} on {device:?}", op.name));
                let want = f32::from(op.passes == Some(i));
                assert_eq!(grad.dims(), x.dims(), "{} on {device:?}", op.name);
                assert!(values(&grad).iter().all(|&d| d == want), "{}, gradient {i} on {device:?}", op.name);
            }
        }
    }
}

#[test]
fn nan_stays_in_its_token() {
    let (tokens, at) = (5, 2);
    for device in devices() {
        for op in operations(0..tokens).iter().filter(|op| op.by_token > 0) {
            let operands = op.operands();
            let clean = values(&op.forward(&operands, &device));
            let width = clean.len() / tokens;
            for (i, operand) in operands.iter().enumerate().take(op.by_token) {
                let own = op.sizes[i] / tokens;
                // In a step's q, k and v of one head and another, among others.
                for place in [0, own / 3, 2 * own / 3, own - 1] {
                    let mut broken = operands.clone();
                    let place = at * own + place;
                    let range = place..place + 1;
                    broken[i] = operand.clone().slice_fill(range, f32::NAN);
                    let got = values(&op.forward(&broken, &device));
                    for (t, (got, clean)) in got.chunks(width).zip(clean.chunks(width)).enumerate() {
                        let what = format!("{} on {device:?}: element {place} of operand {i}, token {t}", op.name);
                        if t == at {
                            assert!(got.iter().any(|x| x.is_nan()), "{what} has no NaN");
                        } else {
                            assert!(got.iter().zip(clean).all(|(a, b)| a.to_bits() == b.to_bits()), "{what} changed");
                        }
                    }
                }
            }
        }
    }
}

/// What Flex promises of every operation that takes its tokens one by one.
#[test]
fn a_token_alone_has_the_bits_that_it_has_in_company() {
    let tokens = 37;
    let device = Device::flex();
    for (o, op) in operations(0..tokens).iter().enumerate().filter(|(_, op)| op.by_token > 0) {
        let operands = op.operands();
        let all = values(&op.forward(&operands, &device));
        let width = all.len() / tokens;
        for token in [0, 1, 17, tokens - 1] {
            let of_token = |(i, x): (usize, &Tensor<1>)| {
                let own = op.sizes[i] / tokens;
                if i < op.by_token { x.clone().narrow(0, token * own, own) } else { x.clone() }
            };
            let own: Vec<_> = operands.iter().enumerate().map(of_token).collect();
            let alone = values(&operations(token..token + 1)[o].forward(&own, &device));
            let same = alone.iter().zip(&all[token * width..]).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(alone.len() == width && same, "{}: token {token}", op.name);
        }
    }
}

/// Against the definition in f32 on operands that were rounded first: what is off is the rounding of results and of what lies
/// between.
#[test]
fn half_precision_forward_and_backward() {
    for device in devices() {
        for dtype in dtypes(&device).into_iter().filter(|&dtype| dtype != DType::F32) {
            let bound = if dtype == DType::F16 { 5e-3 } else { 4e-2 };
            for op in operations(0..9) {
                let operands: Vec<_> = op.operands().into_iter().map(|x| x.cast(dtype).cast(DType::F32)).collect();
                let want = op.outcome(&operands, &Device::flex(), View::Rows, DType::F32, true);
                let got = op.outcome(&operands, &device, View::Rows, dtype, false);
                op.compare(&got, &want, bound, &format!("{device:?} in {dtype:?}"));
            }
        }
    }
}
