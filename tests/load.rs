//! Loading holds the weights and little more: its peak memory, as Linux counts it for this process.
//!
//! Its own binary with one test, because the peak is the process's. `M1_LOAD=DIR` measures a checkpoint of yours:
//! `M1_LOAD=DIR cargo test --release -p m1-tests --test load -- --nocapture`.

#![cfg(target_os = "linux")]

use std::path::{Path, PathBuf};
use std::time::Instant;

use burn::tensor::Device;
use m1_infer::memory;
use m1_model::checkpoint::{Bits, Directory, LoadOptions, Quantization, SaveOptions, WeightDtype, load, save};
use m1_model::{Batch, M1, ModelConfig, Trace};

/// 60 M weights, more than a quarter of them in the embedding, in shards of 16 MB.
fn sample(folder: &Path) {
    let mut config = ModelConfig::preset("small").unwrap();
    config.num_hidden_layers = 2;
    config.vocab_size = 32_768;
    config.attn_type_list = vec![0, 1];
    let model = M1::new(&config, &Device::flex());
    save(folder, &model, &SaveOptions { dtype: WeightDtype::Bf16, max_shard_bytes: 16 << 20 }).unwrap();
}

#[test]
fn loading_peaks_at_the_weights_and_one_shard() {
    let folder = tempfile::tempdir().unwrap();
    let path = match std::env::var_os("M1_LOAD") {
        Some(path) => PathBuf::from(path),
        None => {
            sample(folder.path());
            folder.path().to_path_buf()
        }
    };
    let directory = Directory::open(&path, None).unwrap();
    let stored = directory.verify().unwrap();
    let shard = directory.files().iter().map(|file| file.metadata().unwrap().len()).max().unwrap();

    let embedding = {
        let config = directory.config();
        (config.vocab_size * config.hidden_size) as u64
    };
    for (form, dtype, tensors, quantize) in [
        ("packed as stored", None, false, None),
        ("packed, int8", None, false, Some(Quantization::new(Bits::Int8, 32, false).unwrap())),
        ("packed, f32", Some(WeightDtype::F32), false, None),
        ("tensors as stored", None, true, None),
        ("tensors, f32", Some(WeightDtype::F32), true, None),
    ] {
        // Makes the kernel count the peak anew.
        std::fs::write("/proc/self/clear_refs", "5").unwrap();
        let before = memory::held().unwrap();
        let start = Instant::now();
        let options = LoadOptions { dtype, tensors, quantize, ..Default::default() };
        let model = load(&path, &Device::flex(), &options).unwrap();
        let seconds = start.elapsed().as_secs_f64();
        let (peak, after) = (memory::peak().unwrap() - before, memory::held().unwrap().saturating_sub(before));
        let mb = |bytes: u64| bytes as f64 / 1e6;
        eprintln!(
            "{form}: {:.1} MB stored, {seconds:.2} s ({:.0} MB/s), peak {:.1} MB, afterwards {:.1} MB, largest file {:.1} MB",
            mb(stored),
            mb(stored) / seconds,
            mb(peak),
            mb(after),
            mb(shard)
        );
        // Headers, names and threads take some megabytes of their own.
        let own = 16 << 20;
        assert!(
            peak < after + own + if tensors { shard } else { 0 },
            "the peak is {peak} bytes for {after} of weights"
        );
        assert!(after < 3 * stored, "{after} bytes in memory for {stored} stored");
        if form == "packed as stored" {
            // The embedding stays in its file (at least two bytes a weight) until its rows are asked for.
            assert!(after + 2 * embedding < stored + own, "{after} bytes in memory for {stored} stored");
            let wanted = Batch::new(vec![vec![0, 7, 3]]);
            let hidden = model.forward(&wanted, None, &mut Trace::none());
            assert!(hidden.into_data().iter::<f32>().all(f32::is_finite));
        }
        drop(model);
    }
}
