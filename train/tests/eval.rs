//! `m1-train eval` on an untrained model: the table, the file, repeatability and the lines that mistakes get.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use burn::module::Module;
use burn::tensor::Device;
use m1_model::checkpoint::{self, Bits, Quantization, QuantizeOptions, SaveOptions};
use m1_model::config::ModelConfig;
use m1_model::model::M1;
use m1_train::data::DataConfig;
use m1_train::tokenizer;

/// A tiny model with a tokenizer, as `pretrain` leaves one.
fn write_model(dir: &Path) -> M1 {
    let made = tokenizer::train(&DataConfig::default(), 500, 400).unwrap();
    tokenizer::save(&made, dir).unwrap();
    let mut config = ModelConfig::preset("nano").unwrap();
    config.num_hidden_layers = 2;
    config.attn_type_list = vec![0, 1];
    config.hidden_size = 32;
    config.num_attention_heads = 2;
    config.num_key_value_heads = 1;
    config.head_dim = 8;
    config.rotary_dim = 4;
    config.intermediate_size = 32;
    config.vocab_size = tokenizer::vocab_size(&made);
    let end = tokenizer::special_id(&made, "<end_of_sentence>").unwrap();
    config.extra.insert("eos_token_id".into(), end.into());
    let model = M1::new(&config, &Device::flex()).materialize();
    checkpoint::save(dir, &model, &SaveOptions::default()).unwrap();
    model
}

fn eval(dir: &Path, more: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_m1-train"))
        .args(["eval", "--device", "cpu", "--max-new-tokens", "6"])
        .args(["--overlap", "50", "--model"])
        .arg(dir)
        .args(more)
        .output()
        .unwrap()
}

#[test]
fn a_table_a_file_and_the_same_again() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let vocab = write_model(dir).config().vocab_size as f64;
    let json = dir.join("scores.json");
    let asked = ["--tasks", "addition,clock", "--difficulty", "2..3", "--n", "5", "--json"];
    let more: Vec<&str> = asked.into_iter().chain([json.to_str().unwrap()]).collect();
    let first = eval(dir, &more);
    let text = String::from_utf8(first.stdout).unwrap();
    assert!(first.status.success(), "{}", String::from_utf8_lossy(&first.stderr));
    // Six tokens answer nothing, and a reply that is cut counts as wrong.
    assert_eq!(text.matches("| addition | 0 | 0 | 10 |").count(), 2, "{text}");
    assert_eq!(text.matches("| clock | 0 | 0 | 10 |").count(), 2, "{text}");
    assert!(text.contains("20 different questions; 0 of them occur in the first 50"), "{text}");
    let report: serde_json::Value = serde_json::from_str(&fs::read_to_string(&json).unwrap()).unwrap();
    assert_eq!(report["scores"].as_array().unwrap().len(), 2 * 2 * 2);
    assert_eq!(report["scores"][1]["mode"], "sampled");
    // An untrained model finds every token about equally likely.
    let perplexity = report["perplexity"].as_f64().unwrap();
    assert!((perplexity / vocab - 1.0).abs() < 0.1, "{perplexity} with {vocab} ids");
    assert!(
        text.contains(&format!("Perplexity {perplexity:.4} over the {} tokens", report["solution_tokens"])),
        "{text}"
    );

    let again = eval(dir, &[&more[..], &["--rows", "2", "--threads", "1"]].concat());
    assert_eq!(String::from_utf8(again.stdout).unwrap(), text);
}

#[test]
fn a_quantized_directory_scores_as_the_same_while_loading() {
    let dir = tempfile::tempdir().unwrap();
    let (plain, quantized) = (dir.path().join("plain"), dir.path().join("quantized"));
    fs::create_dir(&plain).unwrap();
    write_model(&plain);
    let options = QuantizeOptions {
        quantization: Quantization::new(Bits::Int4, 32, false).unwrap(),
        max_shard_bytes: u64::MAX,
        rotary_dim: None,
        beside: ["tokenizer.json", "tokenizer_config.json", "generation_config.json"].map(String::from).into(),
        progress: false,
    };
    checkpoint::quantize(&plain, &quantized, &options).unwrap();
    let asked = ["--tasks", "sort_words", "--difficulty", "1", "--n", "4", "--show", "4"];
    let text = |output: Output| {
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let written = text(eval(&quantized, &asked));
    let loading = text(eval(&plain, &[&asked[..], &["--quantize", "int4"]].concat()));
    assert_eq!(written, loading);
    assert_ne!(written, text(eval(&plain, &asked)));
}

#[test]
fn mistakes_get_one_line_that_says_what_would_be_right() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    write_model(dir);
    for (more, says) in [
        (["--difficulty", "11"], "--difficulty 11: expected 1 to 10"),
        (["--tasks", "chess"], "--tasks chess: no such task; there are addition, "),
        (["--temperature", "-1"], "temperature"),
        (["--json", "/no/such/folder/x"], "--json /no/such/folder/x"),
    ] {
        let more = [&more[..], &["--n", "1"]].concat();
        let output = eval(dir, &more);
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success(), "{more:?}");
        assert!(text.contains(says), "{more:?}: {text}");
    }
    let output = eval(dir, &["--quantize", "int8", "--quantize-all"]);
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("blocks of 32 weights do not divide num_attention_heads · head_dim = 16"), "{text}");
    let text = String::from_utf8(eval(&dir.join("none"), &[]).stderr).unwrap();
    assert!(text.contains("none") && text.contains("config.json"), "{text}");
}
