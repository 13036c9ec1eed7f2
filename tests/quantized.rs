//! Quantized checkpoints: what is in the files, that loading them and quantizing while loading agree to the bit, and one
//! clear line for everything that can be wrong.

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::Device;
use half::f16;
use m1_kernels::base::packed::Format;
use m1_model::checkpoint::{
    Bits, Directory, LoadOptions, Quantization, QuantizeOptions, SaveOptions, WeightDtype, load, quantize, save,
    tensors,
};
use m1_model::{Batch, M1, ModelConfig, Trace};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A model of 2 layers whose widths blocks of 32 and 64 divide.
fn config() -> ModelConfig {
    let mut config = ModelConfig::preset("nano").unwrap();
    config.num_hidden_layers = 2;
    config.attn_type_list = vec![0, 1];
    config.vocab_size = 40;
    config.hidden_size = 64;
    config.num_attention_heads = 4;
    config.num_key_value_heads = 2;
    config.head_dim = 16;
    config.rotary_dim = 8;
    config.intermediate_size = 192;
    config.num_local_experts = 3;
    config.validate().unwrap();
    config
}

/// A fresh model, written in `dtype`.
fn written(dtype: WeightDtype) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let options = SaveOptions { dtype, max_shard_bytes: u64::MAX };
    save(folder.path(), &M1::new(&config(), &Device::flex()), &options).unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), "{}").unwrap();
    std::fs::write(folder.path().join("notes.txt"), "not a part of the checkpoint").unwrap();
    folder
}

fn options(bits: Bits, block: usize, all: bool) -> QuantizeOptions {
    QuantizeOptions {
        quantization: Quantization::new(bits, block, all).unwrap(),
        max_shard_bytes: u64::MAX,
        rotary_dim: None,
        beside: vec!["tokenizer.json".into(), "absent.json".into()],
        progress: false,
    }
}

/// The checkpoint in `from`, quantized.
fn quantized(from: &Path, options: &QuantizeOptions) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    quantize(from, folder.path(), options).unwrap();
    folder
}

fn read(folder: &Path, options: &LoadOptions) -> Result<M1, String> {
    load(folder, &Device::flex(), options).map_err(|error| error.to_string())
}

fn logits(model: &M1) -> Vec<f32> {
    let batch = Batch::new(vec![(0..19).map(|i| i * 7 % 40).collect()]);
    model.logits(model.forward(&batch, None, &mut Trace::none())).into_data().try_to_vec().unwrap()
}

type Raw = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// All tensors of a file, as bytes.
fn raw(file: &Path) -> Raw {
    let bytes = std::fs::read(file).unwrap();
    let all = SafeTensors::deserialize(&bytes).unwrap();
    all.iter().map(|(name, t)| (name.into(), (t.dtype(), t.shape().to_vec(), t.data().to_vec()))).collect()
}

fn raw_all(folder: &Path) -> Raw {
    files(folder).iter().filter(|name| name.ends_with(".safetensors")).flat_map(|f| raw(&folder.join(f))).collect()
}

fn files(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn floats(data: &[u8]) -> Vec<f32> {
    data.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
}

/// The numbers that integers and scales of a file stand for, by the documentation of the format alone.
fn by_hand(file: &Raw, name: &str, block: usize) -> Vec<f32> {
    let (dtype, _, data) = &file[name];
    let integers: Vec<i8> = match dtype {
        Dtype::I8 => data.iter().map(|&byte| byte as i8).collect(),
        Dtype::U8 => data.iter().flat_map(|byte| [(byte & 15) as i8 - 8, (byte >> 4) as i8 - 8]).collect(),
        other => panic!("{name} is {other:?}"),
    };
    let (dtype, _, scales) = &file[&format!("{name}_scale")];
    assert_eq!(*dtype, Dtype::F16);
    let scales: Vec<f32> = scales.as_chunks().0.iter().map(|&b| f16::from_le_bytes(b).to_f32()).collect();
    assert_eq!(integers.len(), scales.len() * block);
    integers.iter().enumerate().map(|(i, &q)| f32::from(q) * scales[i / block]).collect()
}

#[test]
fn the_files_hold_what_is_documented() {
    let folder = written(WeightDtype::F32);
    let before = raw_all(folder.path());
    for (bits, block, all) in
        [(Bits::Int8, 32, false), (Bits::Int8, 64, true), (Bits::Int4, 64, false), (Bits::Int4, 32, true)]
    {
        let out = quantized(folder.path(), &options(bits, block, all));
        assert_eq!(files(out.path()), ["config.json", "model.safetensors", "tokenizer.json"]);
        let after = raw_all(out.path());
        let mut changed = 0;
        for tensor in tensors(&config()) {
            let name = &tensor.name;
            let attention = name.contains("proj") || name.contains("output_gate");
            let end = name.contains("embed") || name.contains("lm_head");
            if !(name.contains("experts") || all && (attention || end)) {
                assert!(after[name] == before[name], "{name} is to be kept as it is");
                assert!(!after.contains_key(&format!("{name}_scale")));
                continue;
            }
            changed += 1;
            let int4 = bits == Bits::Int4 && !end;
            let (rows, width) = (tensor.shape[0], tensor.shape[1]);
            assert_eq!(after[name].0, if int4 { Dtype::U8 } else { Dtype::I8 }, "{name}");
            assert_eq!(after[name].1, [rows, if int4 { width / 2 } else { width }], "{name}");
            assert_eq!(after[&format!("{name}_scale")].1, [rows, width / block], "{name}");
            let (got, want) = (by_hand(&after, name, block), floats(&before[name].2));
            for (got, want) in got.chunks(block).zip(want.chunks(block)) {
                let largest = want.iter().fold(0f32, |most, x| most.max(x.abs()));
                let step = largest / if int4 { 7.0 } else { 127.0 };
                let error = got.iter().zip(want).map(|(g, w)| (g - w).abs()).fold(0f32, f32::max);
                // Four bits take the scale of the least squared error, which may cut the largest value short.
                assert!(error <= step * if int4 { 2.0 } else { 0.51 }, "{name}: off by {error}, a step is {step}");
            }
        }
        // 2 layers of 3 experts of 3 matrices; 3 + 4 of attention, embedding and head.
        assert_eq!(changed, if all { 18 + 7 + 2 } else { 18 });
        let config: Value = serde_json::from_slice(&std::fs::read(out.path().join("config.json")).unwrap()).unwrap();
        assert_eq!(config["quantization_config"]["bits"], bits.count());
        assert_eq!(config["quantization_config"]["block_size"], block);
        assert_eq!(config["quantization_config"]["modules"]["lm_head"], if all { json!(8) } else { Value::Null });
        let directory = Directory::open(out.path(), None).unwrap();
        let comparison = directory.compare();
        assert_eq!((comparison.expected, comparison.found), (after.len(), after.len()));
        let bytes: usize = after.values().map(|(_, _, data)| data.len()).sum();
        assert_eq!(directory.verify().unwrap(), bytes as u64);

        // As tensors, on any device: exactly those numbers.
        let plain =
            read(out.path(), &LoadOptions { dtype: Some(WeightDtype::F32), tensors: true, ..Default::default() });
        let dense = tempfile::tempdir().unwrap();
        save(dense.path(), &plain.unwrap(), &SaveOptions { dtype: WeightDtype::F32, max_shard_bytes: u64::MAX })
            .unwrap();
        let dense_files = raw_all(dense.path());
        for (name, (dtype, ..)) in &after {
            if matches!(dtype, Dtype::I8 | Dtype::U8) {
                assert_eq!(floats(&dense_files[name].2), by_hand(&after, name, block), "{name}");
            }
        }
        // A model that is saved is a plain checkpoint again, whatever it was loaded from.
        let saved = Directory::open(dense.path(), None).unwrap();
        assert!(saved.quantization().is_none() && saved.verify().is_ok());
    }
}

#[test]
fn written_and_while_loading_are_the_same_to_the_bit() {
    let same = |a: &M1, b: &M1| {
        assert_eq!(logits(a), logits(b));
        let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for (folder, model) in [(&first, a), (&second, b)] {
            save(folder.path(), model, &SaveOptions { dtype: WeightDtype::F32, max_shard_bytes: u64::MAX }).unwrap();
        }
        assert!(raw_all(first.path()) == raw_all(second.path()));
    };
    for stored in [WeightDtype::F32, WeightDtype::Bf16] {
        let folder = written(stored);
        for (bits, block, all) in
            [(Bits::Int8, 64, false), (Bits::Int8, 32, true), (Bits::Int4, 32, false), (Bits::Int4, 64, true)]
        {
            let mut written = options(bits, block, all);
            written.max_shard_bytes = 30_000;
            let out = quantized(folder.path(), &written);
            assert!(files(out.path()).len() > 4, "in shards");
            let from_files = read(out.path(), &LoadOptions::default()).unwrap();
            let quantize = Some(written.quantization);
            let on_the_way = read(folder.path(), &LoadOptions { quantize, ..Default::default() }).unwrap();
            let weight = |model: &M1| model.model.layers[0].block_sparse_moe.w1.value();
            for model in [&from_files, &on_the_way] {
                let m1_kernels::linear::Weight::Packed(packed) = weight(model) else { panic!("packed on the CPU") };
                let expected = if bits == Bits::Int8 { Format::Int8 { block } } else { Format::Int4 { block } };
                assert_eq!(packed.format(), expected);
                assert!(model.model.embed_tokens.weight.param().is_none(), "the embedding stays in its file");
            }
            same(&from_files, &on_the_way);
            let tensors = LoadOptions { tensors: true, ..Default::default() };
            let on_the_way = LoadOptions { quantize, ..tensors.clone() };
            same(&read(out.path(), &tensors).unwrap(), &read(folder.path(), &on_the_way).unwrap());
        }
    }
}

#[test]
fn on_a_device_they_are_held_as_they_are_stored() {
    let Some(device) = m1_tests::wgpu() else { return };
    let folder = written(WeightDtype::F32);
    let batch = Batch::new(vec![(0..19).map(|i| i * 7 % 40).collect()]);
    for (bits, block, all) in [(Bits::Int8, 32, true), (Bits::Int4, 64, false)] {
        let out = quantized(folder.path(), &options(bits, block, all));
        let tensors = LoadOptions { dtype: Some(WeightDtype::F32), tensors: true, ..Default::default() };
        let exact = logits(&read(out.path(), &tensors).unwrap());
        let quantize = Some(Quantization::new(bits, block, all).unwrap());
        for (from, quantize) in [(out.path(), None), (folder.path(), quantize)] {
            let model = load(from, &device, &LoadOptions { quantize, ..Default::default() }).unwrap();
            let moe = &model.model.layers[0].block_sparse_moe;
            assert!(matches!(moe.w2.value(), m1_kernels::linear::Weight::Quantized(_)));
            assert_eq!(model.form(), if all { bits.to_string() } else { format!("f32, experts {bits}") });
            // Integers and scales; these are f32 where the device has no f16.
            let weights = (3 * 64 * 192) as u64;
            let scale = if device.supports_dtype(burn::tensor::DType::F16) { 2 } else { 4 };
            assert_eq!(moe.w2.bytes(), weights * bits.count() as u64 / 8 + weights / block as u64 * scale);
            let got = model.logits(model.forward(&batch, None, &mut Trace::none()));
            let wide = |x: Vec<f32>| x.into_iter().map(f64::from).collect::<Vec<_>>();
            let error = m1_tests::relative_l2(&m1_tests::values(&got), &wide(exact.clone()));
            assert!(
                error < 1e-5,
                "{bits}: the logits are {error} from those of the same numbers as tensors on the CPU"
            );
            // Saved from the device: the same numbers.
            let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
            let as_f32 = SaveOptions { dtype: WeightDtype::F32, max_shard_bytes: u64::MAX };
            save(first.path(), &model, &as_f32).unwrap();
            save(second.path(), &read(out.path(), &LoadOptions::default()).unwrap(), &as_f32).unwrap();
            assert!(raw_all(first.path()) == raw_all(second.path()));
        }
        // For training they are tensors.
        let model = load(out.path(), &device, &tensors).unwrap();
        assert!(model.model.layers[0].block_sparse_moe.w1.param().is_some());
    }
}

#[test]
fn a_model_tells_its_bytes_and_form() {
    let folder = written(WeightDtype::Bf16);
    let stored = Directory::open(folder.path(), None).unwrap().verify().unwrap();
    let model = read(folder.path(), &LoadOptions::default()).unwrap();
    assert_eq!(model.form(), "bf16");
    // In memory norms are f32; panels of 32 outputs are filled up: 40 rows of the head are 64.
    let head = 24 * 64 * 2;
    let norms = 2 * (5 * 64 + 64);
    let router = 2 * (32 - 3) * 64 * 4;
    assert_eq!(model.weight_bytes(), stored + head + norms + router);
    let experts = |model: &M1| {
        let stacks: u64 = model
            .model
            .layers
            .iter()
            .map(|l| &l.block_sparse_moe)
            .map(|m| m.w1.bytes() + m.w2.bytes() + m.w3.bytes())
            .sum();
        stacks
    };
    assert_eq!(model.token_bytes(), model.weight_bytes() - experts(&model) / 3 - 39 * 64 * 2);
    let quantize =
        |bits, all| LoadOptions { quantize: Some(Quantization::new(bits, 32, all).unwrap()), ..Default::default() };
    let int8 = read(folder.path(), &quantize(Bits::Int8, false)).unwrap();
    assert_eq!(int8.form(), "bf16, experts int8");
    assert_eq!(model.weight_bytes() - int8.weight_bytes(), experts(&model) * 15 / 32);
    let int4 = read(folder.path(), &quantize(Bits::Int4, true)).unwrap();
    assert_eq!((int4.form(), experts(&int4)), ("int4".into(), experts(&model) * 9 / 32));
}

#[test]
fn the_model_stays_near_what_it_was() {
    let folder = written(WeightDtype::F32);
    let exact = logits(&read(folder.path(), &LoadOptions::default()).unwrap());
    let error = |bits, all| {
        let quantize = Some(Quantization::new(bits, 32, all).unwrap());
        let got = logits(&read(folder.path(), &LoadOptions { quantize, ..Default::default() }).unwrap());
        let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
        m1_tests::relative_l2(&wide(&got), &wide(&exact))
    };
    let errors = [error(Bits::Int8, false), error(Bits::Int8, true), error(Bits::Int4, false), error(Bits::Int4, true)];
    eprintln!("relative L2 error of the logits, int8 experts, int8, int4 experts, int4: {errors:?}");
    assert!(errors[..2].iter().all(|&e| 1e-4 < e && e < 5e-2), "{errors:?}");
    assert!(errors[2..].iter().all(|&e| 1e-2 < e && e < 0.5), "{errors:?}");
}

fn edit(folder: &Path, change: impl FnOnce(&mut Raw)) {
    let file = folder.join("model.safetensors");
    let mut all = raw(&file);
    change(&mut all);
    let views =
        all.iter().map(|(name, (dtype, shape, data))| (name, TensorView::new(*dtype, shape.clone(), data).unwrap()));
    let bytes = safetensors::serialize(views, None).unwrap();
    std::fs::remove_file(&file).unwrap();
    std::fs::write(file, bytes).unwrap();
}

fn edit_config(folder: &Path, change: impl FnOnce(&mut Value)) {
    let file = folder.join("config.json");
    let mut value: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    change(&mut value);
    std::fs::write(file, value.to_string()).unwrap();
}

#[test]
fn damage_is_told_in_one_line_with_the_tensors_name() {
    const EXPERT: &str = "model.layers.1.block_sparse_moe.experts.2.w2.weight";
    const SCALE: &str = "model.layers.1.block_sparse_moe.experts.2.w2.weight_scale";
    const EMBEDDING: &str = "model.embed_tokens.weight_scale";
    let folder = written(WeightDtype::Bf16);
    let check = |damage: &dyn Fn(&Path), parts: &[&str]| {
        for tensors in [false, true] {
            let out = quantized(folder.path(), &options(Bits::Int4, 32, true));
            damage(out.path());
            let said = read(out.path(), &LoadOptions { tensors, ..Default::default() }).expect_err("it went unnoticed");
            assert!(!said.contains('\n'), "{said}");
            for part in parts {
                assert!(said.contains(part), "`{said}` does not say `{part}`");
            }
        }
    };
    for (bits, which) in [(f16::NAN, SCALE), (f16::INFINITY, SCALE), (f16::NEG_INFINITY, EMBEDDING)] {
        let damage = move |t: &mut Raw| t.get_mut(which).unwrap().2[16..18].copy_from_slice(&bits.to_le_bytes());
        check(
            &|f| edit(f, damage),
            &[which.trim_end_matches("_scale"), "has a scale that is not finite: the file is damaged"],
        );
    }
    check(&|f| edit(f, |t| _ = t.remove(SCALE)), &["1 tensor missing", SCALE]);
    check(&|f| edit(f, |t| _ = t.remove(EXPERT)), &["1 tensor missing", EXPERT]);
    check(&|f| edit(f, |t| t.get_mut(SCALE).unwrap().0 = Dtype::BF16), &[SCALE, "is BF16: expected F16"]);
    check(&|f| edit(f, |t| t.get_mut(SCALE).unwrap().1 = vec![6, 64]), &[SCALE, "shape [6, 64]", "asks for [64, 6]"]);
    check(
        &|f| edit(f, |t| t.get_mut(EXPERT).unwrap().0 = Dtype::I8),
        &[EXPERT, "is I8: expected U8, as quantization_config says"],
    );
    check(&|f| edit_config(f, |c| c["quantization_config"] = Value::Null), &["27 tensors not expected by config.json"]);
    check(
        &|f| edit_config(f, |c| _ = c["quantization_config"]["modules"].as_object_mut().unwrap().remove("lm_head")),
        &["1 tensor not expected by config.json: `lm_head.weight_scale`"],
    );
    check(
        &|f| edit_config(f, |c| c["quantization_config"]["block_size"] = json!(64)),
        &["_scale` has shape", "config.json asks for"],
    );
    check(
        &|f| edit_config(f, |c| c["quantization_config"]["quant_method"] = json!("gptq")),
        &["config.json: config key `quantization_config.quant_method` is \"gptq\": expected null, or \"m1-blocks\""],
    );
    check(
        &|f| edit_config(f, |c| c["intermediate_size"] = json!(200)),
        &["config key `quantization_config.block_size` is 32: expected a divisor of intermediate_size = 200"],
    );
}

#[test]
fn what_cannot_be_quantized_is_refused_and_leaves_nothing() {
    let folder = written(WeightDtype::F32);
    let parent = tempfile::tempdir().unwrap();
    let out = parent.path().join("new/deep");
    let says = |from: &Path, options: &QuantizeOptions, parts: &[&str]| {
        let said = quantize(from, &out, options).expect_err("it was not refused").to_string();
        for part in parts {
            assert!(said.contains(part) && !said.contains('\n'), "`{said}` does not say `{part}`");
        }
        assert!(!out.exists());
    };
    let int8 = options(Bits::Int8, 64, false);
    // Once more: by the command, and while loading.
    let again = quantized(folder.path(), &int8);
    says(again.path(), &int8, &["is quantized already (experts int8): quantize the checkpoint that it was made from"]);
    let quantize_again = LoadOptions { quantize: Some(int8.quantization), ..Default::default() };
    assert!(read(again.path(), &quantize_again).unwrap_err().contains("is quantized already"));
    // Blocks that do not divide.
    let narrow = written(WeightDtype::F32);
    edit_config(narrow.path(), |c| c["intermediate_size"] = json!(96));
    says(narrow.path(), &int8, &["blocks of 64 weights do not divide intermediate_size = 96"]);
    assert!(read(narrow.path(), &quantize_again).unwrap_err().contains("do not divide intermediate_size = 96"));
    // Weights that no block can hold.
    for (x, problem) in
        [(f32::NAN, "not finite"), (f32::NEG_INFINITY, "not finite"), (3e38, "too large for a scale in f16")]
    {
        let broken = written(WeightDtype::F32);
        let name = "model.layers.0.block_sparse_moe.experts.1.w3.weight";
        edit(broken.path(), |t| t.get_mut(name).unwrap().2[400..404].copy_from_slice(&x.to_le_bytes()));
        says(broken.path(), &int8, &[name, problem, "they cannot be quantized"]);
        assert!(read(broken.path(), &quantize_again).unwrap_err().contains(problem));
        assert!(read(broken.path(), &LoadOptions::default()).is_ok());
    }
    // A place that is taken, or no place; what is there stays.
    std::fs::create_dir_all(&out).unwrap();
    std::fs::write(out.join("precious"), "mine").unwrap();
    let said = quantize(folder.path(), &out, &int8).unwrap_err().to_string();
    assert!(said.contains("new/deep: exists and is not an empty directory"), "{said}");
    let said = quantize(folder.path(), &out.join("precious"), &int8).unwrap_err().to_string();
    assert!(said.contains("precious: exists and is not an empty directory"), "{said}");
    assert_eq!(files(&out), ["precious"]);
    // An empty directory of the user's own stays, too, after a failure.
    let empty = tempfile::tempdir().unwrap();
    assert!(quantize(again.path(), empty.path(), &int8).is_err());
    assert!(empty.path().exists() && files(empty.path()).is_empty());
}
