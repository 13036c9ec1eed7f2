//! Weights in bf16 against f32 on the CPU, packed (operands of products are rounded, hidden states stay f32) and as tensors
//! (hidden states are bf16 too, as on a GPU): each layer for the same input and the same routing, and what that comes to
//! over a whole model, where a few tokens also take other experts.

use burn::tensor::{DType, Device};
use m1_kernels::rotary::Rotation;
use m1_model::batch::Layout;
use m1_model::checkpoint::WeightDtype;
use m1_model::{Batch, Trace};
use m1_tests::golden::Golden;
use m1_tests::{largest, relative_l2, values};

/// Relative L2 error that one layer's output may have.
const LAYER_TOLERANCE: f64 = 1e-2;

/// Whether weights are tensors, and what hidden states then are.
const FORMS: [(bool, DType); 2] = [(false, DType::F32), (true, DType::BF16)];

#[test]
fn one_layer_at_a_time() {
    let device = Device::flex();
    for name in ["hybrid", "heads6", "top3", "prenorm", "unequal", "wide", "all_softmax", "all_lightning"] {
        let golden = Golden::open(name);
        let exact = golden.model(&device);
        let text = golden.tokens[..golden.tokens.len().min(300)].to_vec();
        let batch = Batch::new(vec![text]);
        let mut trace = Trace::hidden();
        exact.forward(&batch, None, &mut trace);
        let layout = Layout::new(&batch, &[0], &device);
        let rotation = Rotation::new(&layout.positions, golden.config.rotary_dim, golden.config.rope_theta, &device);
        for (tensors, dtype) in FORMS {
            let rounded = golden.model_as(WeightDtype::Bf16, tensors, &device);
            for (i, (exact, rounded)) in exact.model.layers.iter().zip(&rounded.model.layers).enumerate() {
                let input = trace.hidden[i].clone().cast(dtype);
                let replay = || Trace::none().replaying(trace.choices.clone());
                let want =
                    exact.forward(input.clone().cast(DType::F32).into(), &layout, &rotation, None, &mut replay()).sum();
                let got = rounded.forward(input.into(), &layout, &rotation, None, &mut replay()).sum();
                assert_eq!(got.dtype(), dtype, "{name}: activations keep their dtype");
                let error = relative_l2(&values(&got), &values(&want));
                eprintln!("{name:14} layer {i}, hidden states in {dtype:?}: relative L2 error {error:.1e}");
                assert!(error < LAYER_TOLERANCE, "{name}: layer {i} is off by {error:.1e}");
            }
        }
    }
}

#[test]
fn the_whole_model() {
    let device = Device::flex();
    let golden = Golden::open("hybrid");
    let batch = Batch::new(vec![golden.tokens.clone()]);
    let run = |dtype, tensors, mut trace: Trace| {
        let model = golden.model_as(dtype, tensors, &device);
        let logits = model.logits(model.forward(&batch, None, &mut trace));
        assert_eq!(logits.dtype(), DType::F32, "logits are f32 always");
        (values(&logits), trace.choices)
    };
    let (want, choices) = run(WeightDtype::F32, false, Trace::router());
    let replaying = || Trace::router().replaying(choices.clone());
    for (routing, tensors, trace) in [
        ("its own", false, Trace::router()),
        ("f32's", false, replaying()),
        ("its own", true, Trace::router()),
        ("f32's", true, replaying()),
    ] {
        let (got, chosen) = run(WeightDtype::Bf16, tensors, trace);
        let vocab = golden.config.vocab_size;
        let best = |row: &[f64]| (0..vocab).fold(0, |best, i| if row[i] > row[best] { i } else { best });
        let rows = want.len() / vocab;
        let same = want.chunks(vocab).zip(got.chunks(vocab)).filter(|(w, g)| best(w) == best(g)).count();
        let experts: usize = choices.iter().map(Vec::len).sum();
        let kept = choices.iter().flatten().zip(chosen.iter().flatten()).filter(|(a, b)| a == b).count();
        let error = relative_l2(&got, &want);
        eprintln!(
            "bf16 ({}) with {routing} routing: logits off by {error:.1e} (relative L2), at most {:.2}; argmax equal in {same} of {rows}; experts equal in {kept} of {experts}",
            if tensors { "tensors" } else { "packed" },
            largest(got.iter().zip(&want).map(|(g, w)| g - w)),
        );
        if routing == "f32's" {
            assert_eq!(kept, experts, "replayed choices are the ones taken");
            assert!(error < 0.1, "the whole model is off by {error:.1e}");
        }
    }
}
