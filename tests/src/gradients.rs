//! The derivative of the training loss, weight by weight, against central differences in float64
//! (`reference/make_gradients.py`).

use std::collections::BTreeMap;
use std::path::Path;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::activation::log_softmax;
use burn::tensor::{Device, Gradients, Int, Tensor, TensorData};
use m1_model::checkpoint::{self, LoadOptions, WeightDtype};
use m1_model::model::router_aux_loss;
use m1_model::{Batch, M1, Trace};

use crate::golden::read;
use crate::{largest, values};

/// Error of a derivative, relative to the weight's largest recorded one: f32 keeps about 3e-5.
const TOLERANCE: f64 = 3e-4;

/// Holds the loss and the gradient of every weight against the golden `gradients`, on `device` with autodiff.
pub fn check(device: &Device) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens/gradients");
    let recorded = read(&dir.join("golden.safetensors"));
    let device = device.clone().autodiff();
    let options = LoadOptions { dtype: Some(WeightDtype::F32), ..LoadOptions::default() };
    let model = checkpoint::load(&dir, &device, &options).unwrap_or_else(|e| panic!("{e}"));
    let row = |i: usize| recorded[&format!("tokens_{i}")].values.iter().map(|&t| t as u32).collect();
    let rows: Vec<Vec<u32>> = vec![row(0), row(1)];

    let mut trace = Trace::router();
    let predicting = rows.iter().map(|row| (0..row.len() - 1).collect()).collect();
    let hidden = model.forward(&Batch::new(rows.clone()).at(predicting), None, &mut trace);
    let targets: Vec<i32> = rows.iter().flat_map(|row| &row[1..]).map(|&t| t as i32).collect();
    let count = targets.len();
    let targets = Tensor::<2, Int>::from_data(TensorData::new(targets, [count, 1]), &device);
    let cross_entropy = log_softmax(model.logits(hidden), 1).gather(1, targets).mean().neg();
    let auxiliary = router_aux_loss(&trace, model.config());
    for (name, got) in [("cross_entropy", &cross_entropy), ("auxiliary", &auxiliary)] {
        let (got, want) = (values(got)[0], recorded[name].values[0]);
        assert!((got - want).abs() <= 1e-5 * want, "{name}: {got} instead of {want}");
    }

    let gradients = (cross_entropy + auxiliary).backward();
    let got = by_name(&model, &gradients);
    let mut worst = (0.0, String::new());
    let mut checked = 0;
    for (key, indices) in &recorded {
        let Some(name) = key.strip_prefix("index:") else {
            continue;
        };
        let gradient = got.get(name).unwrap_or_else(|| panic!("{name}: no gradient; there are {:?}", got.keys()));
        let want = &recorded[&format!("value:{name}")].values;
        let scale = largest(want.iter().copied());
        let along: f64 = gradient.iter().enumerate().map(|(i, g)| g * (i as f64).cos()).sum();
        let want_along = recorded[&format!("along:{name}")].values[0];
        // A sum over all entries: its rounding grows with the norm of the gradient.
        let norm = gradient.iter().map(|g| g * g).sum::<f64>().sqrt();
        let entries = indices.values.iter().zip(want).map(|(&i, w)| (gradient[i as usize] - w) / scale);
        let error = largest(entries).max((along - want_along).abs() / norm);
        assert!(scale > 1e-6, "{name}: the golden's derivatives are all zero");
        assert!(error <= TOLERANCE, "{name}: off by {error:.1e}, relative");
        if error > worst.0 {
            worst = (error, name.to_string());
        }
        checked += 1;
    }
    assert_eq!(checked, got.len(), "every weight is checked");
    eprintln!("gradients of {checked} weights, worst relative error {:.1e} ({})", worst.0, worst.1);
}

/// Gradients under the checkpoint's names.
fn by_name(model: &M1, gradients: &Gradients) -> BTreeMap<String, Vec<f64>> {
    let mut visitor = ByName { path: Vec::new(), gradients, found: BTreeMap::new() };
    model.visit(&mut visitor);
    visitor.found
}

struct ByName<'a> {
    path: Vec<String>,
    gradients: &'a Gradients,
    found: BTreeMap<String, Vec<f64>>,
}

impl ModuleVisitor for ByName<'_> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        // The variant of an enum is no part of a name.
        let parts = self.path.iter().filter(|p| !matches!(p.as_str(), "Lightning" | "Softmax"));
        let name = parts.map(String::as_str).collect::<Vec<_>>().join(".");
        let Some(gradient) = param.val().grad(self.gradients) else {
            return;
        };
        // A layer's experts are one parameter here, and each has a name of its own there.
        match name.split_once(".block_sparse_moe.w") {
            None => _ = self.found.insert(name, values(&gradient)),
            Some((layer, number)) => {
                let experts = gradient.dims()[0];
                let all = values(&gradient);
                for (expert, one) in all.chunks(all.len() / experts).enumerate() {
                    let name = format!("{layer}.block_sparse_moe.experts.{expert}.w{number}.weight");
                    self.found.insert(name, one.to_vec());
                }
            }
        }
    }
}
