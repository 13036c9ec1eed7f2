//! Kernel launches of one decoded token on a device: what a small model on a GPU waits for. Counted as they are issued, so
//! a software driver counts as well as any.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use cubecl::logging::{LaunchObservation, LaunchObserver};
use m1_model::config::{AttentionKind, ModelConfig};
use m1_model::{Batch, Cache, M1, Trace};

#[derive(Default)]
struct Counts(Mutex<BTreeMap<String, usize>>);

impl LaunchObserver for Counts {
    fn launched(&self, kernel: &'static str) {
        // `a::b::Kernel<c::D>` is told by its last name
        let name = kernel.split('<').next().unwrap_or(kernel).rsplit("::").next().unwrap_or(kernel);
        *self.0.lock().unwrap().entry(name.to_owned()).or_default() += 1;
    }
}

/// Launches by kernel while `work` runs.
fn counted(work: impl FnOnce()) -> BTreeMap<String, usize> {
    let counts = Arc::new(Counts::default());
    let observation = LaunchObservation::new(counts.clone());
    work();
    drop(observation);
    std::mem::take(&mut counts.0.lock().unwrap())
}

/// The launches of one decode step of `rows` rows after `depth` tokens.
fn of_a_step(model: &M1, rows: usize, depth: usize) -> BTreeMap<String, usize> {
    let mut cache = Cache::new(model, rows);
    let mut step = |ids: Vec<u32>| {
        let hidden = model.forward(&Batch::new(vec![ids; rows]).last(), Some(&mut cache), &mut Trace::none());
        let logits = model.logits(hidden).into_data();
        assert_eq!(logits.shape().as_slice(), [rows, model.config().vocab_size]);
    };
    step((0..depth as u32).map(|i| i % 500).collect());
    step(vec![7]); // whatever is tuned at the first call of a shape is done
    let counts = counted(|| step(vec![8]));
    let all: usize = counts.values().sum();
    eprintln!("{all} launches for a step of {rows} rows after {depth} tokens");
    counts.iter().for_each(|(kernel, count)| eprintln!("{count:6}  {kernel}"));
    counts
}

#[test]
fn of_a_decoded_token() {
    let Some(device) = m1_tests::wgpu() else {
        return;
    };
    let config = ModelConfig { vocab_size: 512, ..ModelConfig::preset("nano").unwrap() };
    let model = M1::new(&config, &device);
    let layers = config.num_hidden_layers;
    let softmax = (0..layers).filter(|&i| config.kind(i) == AttentionKind::Softmax).count();
    let lightning = layers - softmax;

    // A layer: two norms, the router's product, its choice, two products of the experts and their sum. A lightning layer: three
    // products and one pass over the state. A softmax layer: four products, two rotations, keys and values put away, and its
    // attention. Beside the layers: the embedding, the last norm, the head.
    let attention = |launches: usize| layers * 7 + lightning * 4 + softmax * (8 + launches) + 3;
    let of = |rows, depth| of_a_step(&model, rows, depth).values().sum::<usize>();
    assert_eq!(of(1, 20), attention(1));
    // A row attends to its own keys, and rows are put together again.
    assert!(of(3, 20) <= attention(1) + softmax * (2 * 3 + 3));
    // Blocks of 256, 256, 512 and 1,024 tokens: two launches, and one to join their pieces.
    assert_eq!(of(1, 1300), attention(3));
    // What still runs when the process ends brings a software driver down.
    device.sync().unwrap();
}
