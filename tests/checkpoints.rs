//! Checkpoints in and out: round trips to the bit, Hugging Face's own conversion, and one clear line for everything
//! that can be wrong with a directory.

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::Device;
use m1_model::checkpoint::{Directory, LoadOptions, SaveOptions, WeightDtype, load, save, tensors};
use m1_model::{Batch, M1, ModelConfig, Trace};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A model of 2 layers and some thousand weights.
fn micro() -> ModelConfig {
    let mut config = ModelConfig::preset("nano").unwrap();
    config.num_hidden_layers = 2;
    config.attn_type_list = vec![0, 1];
    config.vocab_size = 16;
    config.hidden_size = 12;
    config.num_attention_heads = 4;
    config.num_key_value_heads = 2;
    config.head_dim = 6;
    config.rotary_dim = 4;
    config.intermediate_size = 10;
    config.num_local_experts = 3;
    config.validate().unwrap();
    config
}

fn fresh() -> M1 {
    M1::new(&micro(), &Device::flex())
}

fn read(folder: &Path) -> Result<M1, String> {
    read_with(folder, &LoadOptions::default())
}

fn read_with(folder: &Path, options: &LoadOptions) -> Result<M1, String> {
    load(folder, &Device::flex(), options).map_err(|error| error.to_string())
}

fn write(folder: &Path, model: &M1, dtype: WeightDtype, max_shard_bytes: u64) {
    save(folder, model, &SaveOptions { dtype, max_shard_bytes }).unwrap();
}

/// A checkpoint of the fresh model in one f32 file.
fn written() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), &fresh(), WeightDtype::F32, u64::MAX);
    folder
}

fn logits(model: &M1) -> Vec<f32> {
    let batch = Batch::new(vec![(0..9).map(|i| i * 5 % 16).collect()]);
    model.logits(model.forward(&batch, None, &mut Trace::none())).into_data().try_to_vec().unwrap()
}

type Raw = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// All tensors of a file, as bytes.
fn raw(file: &Path) -> Raw {
    let bytes = std::fs::read(file).unwrap();
    let all = SafeTensors::deserialize(&bytes).unwrap();
    all.iter().map(|(name, t)| (name.into(), (t.dtype(), t.shape().to_vec(), t.data().to_vec()))).collect()
}

fn write_raw(file: &Path, tensors: &Raw) {
    let views = tensors
        .iter()
        .map(|(name, (dtype, shape, data))| (name, TensorView::new(*dtype, shape.clone(), data).unwrap()));
    std::fs::write(file, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// All tensors of a directory, shards together.
fn raw_all(folder: &Path) -> Raw {
    files(folder).iter().filter(|name| name.ends_with(".safetensors")).flat_map(|f| raw(&folder.join(f))).collect()
}

fn files(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn edit_json(file: &Path, edit: impl FnOnce(&mut Value)) {
    let mut value: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    edit(&mut value);
    std::fs::write(file, value.to_string()).unwrap();
}

#[test]
fn round_trips_are_exact() {
    let original = fresh();
    for dtype in [WeightDtype::F32, WeightDtype::Bf16] {
        for max_shard_bytes in [u64::MAX, 1500] {
            let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
            write(first.path(), &original, dtype, max_shard_bytes);
            let loaded = read(first.path()).unwrap();
            write(second.path(), &loaded, dtype, max_shard_bytes);

            assert_eq!(files(first.path()), files(second.path()));
            for name in files(first.path()) {
                let (a, b) = (std::fs::read(first.path().join(&name)), std::fs::read(second.path().join(&name)));
                assert!(a.unwrap() == b.unwrap(), "{name} differs after a {dtype} round trip");
            }
            if dtype == WeightDtype::F32 {
                assert_eq!(logits(&original), logits(&loaded));
            }
            let stored = raw_all(first.path());
            assert_eq!(stored.len(), tensors(&micro()).len());
            for (name, (found, ..)) in stored {
                let wide = dtype == WeightDtype::F32 || name.contains("gate.weight") && !name.contains("output");
                assert_eq!(found, if wide { Dtype::F32 } else { Dtype::BF16 }, "{name}");
            }
        }
    }
}

#[test]
fn shards_and_index_are_as_hugging_face_writes_them() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), &fresh(), WeightDtype::Bf16, 2000);
    let names = files(folder.path());
    let shards: Vec<_> = names.iter().filter(|name| name.ends_with(".safetensors")).collect();
    assert!(shards.len() > 3);
    for (i, name) in shards.iter().enumerate() {
        assert_eq!(**name, format!("model-{:05}-of-{:05}.safetensors", i + 1, shards.len()));
        let bytes = std::fs::read(folder.path().join(name)).unwrap();
        let (header, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
        assert_eq!(header % 8, 0);
        assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
        assert!(metadata.data_len() <= 2000 || metadata.tensors().len() == 1, "{name}");
        for (tensor, info) in metadata.tensors() {
            assert_eq!(info.data_offsets.0 % (info.dtype.bitsize() / 8), 0, "{tensor} is not aligned");
        }
    }
    let index: Value =
        serde_json::from_slice(&std::fs::read(folder.path().join("model.safetensors.index.json")).unwrap()).unwrap();
    let total: usize = raw_all(folder.path()).values().map(|(_, _, data)| data.len()).sum();
    assert_eq!(index["metadata"]["total_size"], total);
    let config: Value = serde_json::from_slice(&std::fs::read(folder.path().join("config.json")).unwrap()).unwrap();
    assert_eq!(config["architectures"][0], "MiniMaxM1ForCausalLM");
    assert_eq!(config["auto_map"]["AutoModelForCausalLM"], "modeling_minimax_m1.MiniMaxM1ForCausalLM");
    assert_eq!(config["torch_dtype"], "bfloat16");

    // A later save in one file leaves nothing of the shards, and the other way round.
    std::fs::write(folder.path().join("tokenizer.json"), "{}").unwrap();
    write(folder.path(), &fresh(), WeightDtype::F32, u64::MAX);
    assert_eq!(files(folder.path()), ["config.json", "model.safetensors", "tokenizer.json"]);
    write(folder.path(), &fresh(), WeightDtype::F32, 2000);
    assert!(!files(folder.path()).contains(&"model.safetensors".to_string()));
    read(folder.path()).unwrap();
}

#[test]
fn dtypes_are_widened_exactly_and_narrowed_to_nearest_even() {
    let folder = written();
    let file = folder.path().join("model.safetensors");
    let mut stored = raw(&file);
    let f32s =
        |data: &[u8]| -> Vec<f32> { data.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect() };
    let name = "model.layers.1.self_attn.q_proj.weight";
    let mut weights = f32s(&stored[name].2);
    weights[..3].copy_from_slice(&[1.0 + 2f32.powi(-8), 1.0 + 3.0 * 2f32.powi(-8), -1.0 - 1.01 * 2f32.powi(-8)]);
    stored.get_mut(name).unwrap().2 = weights.iter().flat_map(|x| x.to_le_bytes()).collect();
    write_raw(&file, &stored);

    let narrow = read_with(folder.path(), &LoadOptions { dtype: Some(WeightDtype::Bf16), ..Default::default() });
    write(folder.path(), &narrow.unwrap(), WeightDtype::F32, u64::MAX);
    let rounded = raw(&file);
    assert_eq!(f32s(&rounded[name].2)[..3], [1.0, 1.0 + 2f32.powi(-6), -1.0 - 2f32.powi(-7)]);
    // Norms and the router were f32 all the while.
    for exact in ["model.layers.0.self_attn.norm.weight", "model.layers.0.block_sparse_moe.gate.weight"] {
        assert_eq!(rounded[exact], stored[exact], "{exact}");
    }

    // f16 becomes f32: 0x3c01 is 1 + 2^-10, which bf16 does not have.
    let halves: Vec<u8> = (0..weights.len()).flat_map(|_| 0x3c01u16.to_le_bytes()).collect();
    let shape = stored[name].1.clone();
    stored.insert(name.into(), (Dtype::F16, shape, halves));
    write_raw(&file, &stored);
    write(folder.path(), &read(folder.path()).unwrap(), WeightDtype::F32, u64::MAX);
    assert!(f32s(&raw(&file)[name].2).iter().all(|&x| x == 1.0 + 2f32.powi(-10)));
}

#[test]
fn a_model_loads_for_training() {
    let folder = written();
    let model = load(folder.path(), &Device::flex().autodiff(), &LoadOptions::default()).unwrap();
    let batch = Batch::new(vec![vec![1, 2, 3]]);
    let loss = model.logits(model.forward(&batch, None, &mut Trace::none())).sum();
    let gradients = loss.backward();
    assert!(model.lm_head.weight.val().grad(&gradients).is_some());
    let before = raw_all(folder.path());
    write(folder.path(), &model, WeightDtype::F32, u64::MAX);
    assert!(raw_all(folder.path()) == before);
}

/// What loading says after `damage` was done to a sound checkpoint.
fn complaint(sharded: bool, damage: impl FnOnce(&Path)) -> String {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), &fresh(), WeightDtype::F32, if sharded { 4000 } else { u64::MAX });
    damage(folder.path());
    let said = read(folder.path()).expect_err("the damage went unnoticed");
    assert!(!said.contains('\n'), "{said}");
    said
}

fn edit_raw(folder: &Path, edit: impl FnOnce(&mut Raw)) {
    let file = folder.join("model.safetensors");
    let mut tensors = raw(&file);
    edit(&mut tensors);
    write_raw(&file, &tensors);
}

#[test]
fn every_complaint_names_file_and_tensor() {
    const GATE: &str = "model.layers.1.block_sparse_moe.gate.weight";
    let check = |said: String, parts: &[&str]| {
        for part in parts {
            assert!(said.contains(part), "`{said}` does not say `{part}`");
        }
    };
    check(complaint(false, |f| edit_raw(f, |t| _ = t.remove(GATE))), &["model.safetensors: 1 tensor missing", GATE]);
    check(
        complaint(false, |f| edit_raw(f, |t| t.retain(|name, _| !name.contains("experts")))),
        &["18 tensors missing", "model.layers.0.block_sparse_moe.experts.0.w1.weight", "…"],
    );
    let stray = |t: &mut Raw| _ = t.insert("model.layers.0.extra.weight".into(), (Dtype::F32, vec![1], vec![0; 4]));
    check(
        complaint(false, |f| edit_raw(f, stray)),
        &["model.safetensors: 1 tensor not expected by config.json: `model.layers.0.extra.weight`"],
    );
    check(
        complaint(false, |f| edit_raw(f, |t| t.get_mut(GATE).unwrap().1 = vec![12, 3])),
        &["model.safetensors", GATE, "has shape [12, 3]: config.json asks for [3, 12]"],
    );
    check(
        complaint(false, |f| edit_raw(f, |t| t.get_mut(GATE).unwrap().0 = Dtype::I32)),
        &["model.safetensors", GATE, "is I32: expected F32, BF16 or F16"],
    );
    let cut = |f: &Path| {
        let file = f.join("model.safetensors");
        let bytes = std::fs::read(&file).unwrap();
        std::fs::write(file, &bytes[..bytes.len() - 5]).unwrap();
    };
    check(complaint(false, cut), &["model.safetensors: not a sound safetensors file: truncated: the header describes"]);
    check(
        complaint(false, |f| std::fs::remove_file(f.join("model.safetensors")).unwrap()),
        &["no weights: expected model.safetensors or model.safetensors.index.json"],
    );

    let index = |f: &Path| f.join("model.safetensors.index.json");
    let shard = |f: &Path| f.join(files(f).into_iter().find(|name| name.starts_with("model-00002-of-")).unwrap());
    check(
        complaint(true, |f| std::fs::remove_file(shard(f)).unwrap()),
        &["model.safetensors.index.json: names shard `model-00002-of-", "which is not there"],
    );
    check(
        complaint(true, |f| {
            edit_json(&index(f), |i| i["weight_map"][GATE] = json!("model-00001-of-00009.safetensors"))
        }),
        &["model-00001-of-00009.safetensors"],
    );
    let misplace = |f: &Path| {
        let first = files(f).into_iter().find(|name| name.starts_with("model-00001-of-")).unwrap();
        edit_json(&index(f), |i| i["weight_map"]["lm_head.weight"] = json!(first));
    };
    check(complaint(true, misplace), &["model-00001-of-", "1 tensor missing: `lm_head.weight`"]);
    let forget = |f: &Path| edit_json(&index(f), |i| _ = i["weight_map"].as_object_mut().unwrap().remove(GATE));
    check(complaint(true, forget), &["model.safetensors.index.json", "holds tensor", GATE, "does not list"]);
    check(
        complaint(true, |f| edit_json(&index(f), |i| i["weight_map"][GATE] = json!("../x.safetensors"))),
        &["model.safetensors.index.json", GATE, "expected a file name"],
    );
    check(complaint(true, |f| std::fs::write(index(f), "{").unwrap()), &["model.safetensors.index.json: not JSON"]);
    check(complaint(true, |f| std::fs::write(index(f), "{}").unwrap()), &["no object `weight_map`"]);

    let config = |f: &Path| f.join("config.json");
    check(complaint(false, |f| std::fs::remove_file(config(f)).unwrap()), &["config.json: cannot read"]);
    check(
        complaint(false, |f| edit_json(&config(f), |c| _ = c.as_object_mut().unwrap().remove("head_dim"))),
        &["config.json: config key `head_dim` is missing"],
    );
    check(
        complaint(false, |f| edit_json(&config(f), |c| c["num_attention_heads"] = json!(0))),
        &["config.json: config key `num_attention_heads` is 0"],
    );
    check(complaint(false, |f| edit_json(&config(f), |c| c["hidden_size"] = json!(13))), &["has shape", "13"]);
}

#[test]
fn a_failed_save_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(folder.path().join("config.json/in-the-way")).unwrap();
    let options = SaveOptions { dtype: WeightDtype::F32, max_shard_bytes: u64::MAX };
    let said = save(folder.path(), &fresh(), &options).unwrap_err().to_string();
    assert!(said.contains("config.json: cannot rename"), "{said}");
    assert!(files(folder.path()).iter().all(|name| !name.ends_with(".tmp")), "{:?}", files(folder.path()));
}

/// Turns a checkpoint of ours into what transformers' `minimax` class writes: `fused` as from version 5 on.
fn as_hugging_face(folder: &Path, fused: bool) {
    edit_json(&folder.join("config.json"), |config| {
        let keys = config.as_object_mut().unwrap();
        keys["model_type"] = json!("minimax");
        keys["architectures"] = json!(["MiniMaxForCausalLM"]);
        for key in ["postnorm", "shared_intermediate_size", "auto_map", "rotary_dim", "rope_theta", "attn_type_list"] {
            keys.remove(key).unwrap();
        }
        for (ours, theirs) in [("full_attention", "full_attn"), ("linear_attention", "linear_attn"), ("mlp", "mlp")] {
            for part in ["alpha", "beta"] {
                let value = keys.remove(&format!("layernorm_{ours}_{part}")).unwrap();
                keys.insert(format!("{theirs}_{part}_factor"), value);
            }
        }
        keys.insert("block_size".into(), json!(256));
        keys.insert("layer_types".into(), json!(["linear_attention", "full_attention"]));
        keys.insert("rope_parameters".into(), json!({ "rope_type": "default", "rope_theta": 10000000.0 }));
    });
    edit_raw(folder, |tensors| {
        // The class saves what it derives from the configuration, too.
        tensors.insert("model.layers.0.self_attn.slope_rate".into(), (Dtype::F32, vec![4, 1, 1], vec![0; 16]));
        if !fused {
            return;
        }
        for layer in 0..2 {
            let moe = format!("model.layers.{layer}.block_sparse_moe");
            let gate = tensors.remove(&format!("{moe}.gate.weight")).unwrap();
            tensors.insert(format!("model.layers.{layer}.mlp.gate.weight"), gate);
            let mut take =
                |expert: usize, part: &str| tensors.remove(&format!("{moe}.experts.{expert}.{part}.weight")).unwrap().2;
            let (mut gate_up, mut down) = (Vec::new(), Vec::new());
            for expert in 0..3 {
                gate_up.extend(take(expert, "w1"));
                gate_up.extend(take(expert, "w3"));
                down.extend(take(expert, "w2"));
            }
            let experts = format!("model.layers.{layer}.mlp.experts");
            tensors.insert(format!("{experts}.gate_up_proj"), (Dtype::F32, vec![3, 20, 12], gate_up));
            tensors.insert(format!("{experts}.down_proj"), (Dtype::F32, vec![3, 12, 10], down));
        }
    });
}

#[test]
fn hugging_faces_conversion_loads_with_m1s_maths() {
    for fused in [false, true] {
        let folder = written();
        let expected = logits(&read(folder.path()).unwrap());
        as_hugging_face(folder.path(), fused);
        let config = folder.path().join("config.json");

        let said = read(folder.path()).unwrap_err();
        assert!(said.contains("config.json") && said.contains("--rotary-dim"), "{said}");
        let given = LoadOptions { rotary_dim: Some(4), ..Default::default() };
        assert_eq!(logits(&read_with(folder.path(), &given).unwrap()), expected, "fused: {fused}");
        let other = LoadOptions { rotary_dim: Some(6), ..Default::default() };
        assert_ne!(logits(&read_with(folder.path(), &other).unwrap()), expected);
        let odd = read_with(folder.path(), &LoadOptions { rotary_dim: Some(5), ..Default::default() }).unwrap_err();
        assert!(odd.contains("`rotary_dim` is 5"), "{odd}");

        edit_json(&config, |c| c["rope_parameters"]["partial_rotary_factor"] = json!(4.0 / 6.0));
        assert_eq!(logits(&read(folder.path()).unwrap()), expected);
        edit_json(&config, |c| c["rotary_dim"] = json!(4));
        let model = read(folder.path()).unwrap();
        assert_eq!(logits(&model), expected);

        // And out again in M1's own form.
        write(folder.path(), &model, WeightDtype::F32, u64::MAX);
        assert_eq!(ModelConfig::from_file(&config).unwrap().model_type, "minimax_m1");
        assert_eq!(logits(&read(folder.path()).unwrap()), expected);
    }
}

#[test]
fn hugging_faces_conversion_is_refused_by_name_too() {
    let complaint = |edit: fn(&Path)| {
        let folder = written();
        as_hugging_face(folder.path(), true);
        edit(folder.path());
        read_with(folder.path(), &LoadOptions { rotary_dim: Some(4), ..Default::default() }).unwrap_err()
    };
    let said = complaint(|f| edit_json(&f.join("config.json"), |c| c["layer_types"][1] = json!("sliding_attention")));
    assert!(said.contains("`layer_types` is sliding_attention"), "{said}");
    let said =
        complaint(|f| edit_json(&f.join("config.json"), |c| _ = c.as_object_mut().unwrap().remove("layer_types")));
    assert!(said.contains("`layer_types` is missing"), "{said}");
    let said =
        complaint(|f| edit_json(&f.join("config.json"), |c| _ = c.as_object_mut().unwrap().remove("mlp_alpha_factor")));
    assert!(said.contains("`mlp_alpha_factor` is missing"), "{said}");
    let said = complaint(|f| edit_json(&f.join("config.json"), |c| c["rope_parameters"]["rope_type"] = json!("yarn")));
    assert!(said.contains("`rope_parameters.rope_type` is \"yarn\""), "{said}");
    let said =
        complaint(|f| edit_raw(f, |t| t.get_mut("model.layers.0.mlp.experts.down_proj").unwrap().1 = vec![3, 10, 12]));
    assert!(said.contains("model.layers.0.mlp.experts.down_proj") && said.contains("[3, 12, 10]"), "{said}");
    let said = complaint(|f| edit_raw(f, |t| _ = t.remove("model.layers.1.mlp.experts.gate_up_proj")));
    assert!(said.contains("6 tensors missing: `model.layers.1.block_sparse_moe.experts.0.w1.weight`"), "{said}");
}

/// A loader that meets a damaged header says so or, where the damage is none, loads the same model.
#[test]
fn damaged_headers_never_panic() {
    let folder = written();
    let file = folder.path().join("model.safetensors");
    let sound = std::fs::read(&file).unwrap();
    let expected = logits(&read(folder.path()).unwrap());
    let header = 8 + u64::from_le_bytes(*sound.first_chunk().unwrap()) as usize;
    let mut seed = 88172645463325252u64;
    let mut below = |n: usize| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        (seed % n as u64) as usize
    };
    let mut loaded = 0;
    for _ in 0..2000 {
        let mut bytes = sound.clone();
        let at = if below(8) == 0 { below(8) } else { below(header) };
        match below(3) {
            0 => bytes[at] ^= 1 << below(8),
            1 => bytes[at] = b"0123456789[]{},:\" "[below(18)],
            _ => bytes.truncate(at + below(1000)),
        }
        // A new file each time: the old one may still be mapped.
        std::fs::remove_file(&file).unwrap();
        std::fs::write(&file, &bytes).unwrap();
        if let Ok(model) = read(folder.path()) {
            loaded += 1;
            if bytes == sound {
                assert_eq!(logits(&model), expected);
            }
        }
    }
    // Some bits do no harm: padding, the name of a metadata key, a dtype of the same width.
    assert!(loaded < 400, "{loaded} of 2000 damaged files were accepted");
}

/// MiniMax's own configuration and index, where the checkout has them: a directory without any weights.
#[test]
fn the_released_index_is_complete() {
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/m1/data"));
    if !folder.exists() {
        eprintln!("SKIPPED: no ../shared/m1/data");
        return;
    }
    let directory = Directory::open(folder, None).unwrap();
    let comparison = directory.compare();
    assert_eq!((comparison.expected, comparison.found), (8243, 8243));
    assert!(comparison.missing.is_empty() && comparison.unexpected.is_empty());
    assert_eq!(directory.files().len(), 413);
    let said = directory.verify().unwrap_err().to_string();
    assert!(said.contains("names shard `model-00000-of-00413.safetensors`, which is not there"), "{said}");
}
