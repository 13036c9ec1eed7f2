//! `m1 generate` and `m1 logits` from the outside.

mod common;

use common::{VOCAB, checkpoint, command, m1, tokenizer};
use m1_model::checkpoint::{LoadOptions, load};
use m1_model::{Batch, Trace};
use serde_json::Value;
use std::io::Read;
use std::path::Path;

fn generate(args: &[&str]) -> Value {
    serde_json::from_str(&m1("generate", &[args, &["--json"]].concat(), "").ok().stdout).unwrap()
}

/// Logits `[tokens][vocab]` of a row alone, computed in one pass without a cache.
fn alone(row: &[u32]) -> Vec<Vec<f32>> {
    let options = LoadOptions::default();
    let model = load(checkpoint(), &burn::tensor::Device::flex(), &options).unwrap();
    let hidden = model.forward(&Batch::new(vec![row.to_vec()]), None, &mut Trace::none());
    let logits = model.logits(hidden).into_data().try_to_vec::<f32>().unwrap();
    logits.chunks(VOCAB).map(<[f32]>::to_vec).collect()
}

#[test]
fn a_completion_is_what_the_model_says() {
    let got = generate(&["--prompt", "Once upon", "-n", "20", "--temperature", "0"]);
    let prompt = tokenizer().encode("Once upon", false).unwrap().get_ids().to_vec();
    let ids: Vec<u32> = got["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
    assert_eq!((got["prompt_tokens"].as_u64(), ids.len()), (Some(prompt.len() as u64), 20));
    assert_eq!(got["finish_reason"], "length");
    assert_eq!(got["text"], tokenizer().decode(&ids, true).unwrap());
    // Each id is the likeliest of those that the tokenizer knows, and its log-probability the model's own.
    let known = tokenizer().get_vocab_size(true);
    let logits = alone(&[prompt.clone(), ids.clone()].concat());
    for (i, &id) in ids.iter().enumerate() {
        let row = &logits[prompt.len() + i - 1];
        assert!(row[..known].iter().all(|&l| l <= row[id as usize] + 1e-4));
        let norm = row.iter().map(|l| f64::from(*l).exp()).sum::<f64>().ln();
        let wanted = f64::from(row[id as usize]) - norm;
        assert!((got["log_probs"][i].as_f64().unwrap() - wanted).abs() < 1e-3);
    }
}

#[test]
fn seeds_stops_and_masks() {
    let flags = ["--prompt", "a", "-n", "400", "--temperature", "3", "--top-p", "1"];
    let with = |more: &[&str]| generate(&[&flags, more].concat());
    let (a, b, c) = (with(&["--seed", "4"]), with(&["--seed", "4"]), with(&["--seed", "5"]));
    assert_eq!(a["ids"], b["ids"]);
    assert_ne!(a["ids"], c["ids"]);
    // The vocabulary has 58 ids that the tokenizer does not know; at this temperature they would come.
    let known = tokenizer().get_vocab_size(true) as u64;
    assert!(a["ids"].as_array().unwrap().iter().all(|id| id.as_u64().unwrap() < known));
    // A seed that was not given is told, and repeats the text.
    let random = with(&[]);
    assert_eq!(with(&["--seed", &random["seed"].to_string()])["ids"], random["ids"]);
    // Stop before the second ASCII character of the text.
    let text = a["text"].as_str().unwrap();
    let at = text.char_indices().filter(|(_, c)| c.is_ascii_graphic()).nth(1).unwrap().0;
    let stop = &text[at..at + 1];
    let stopped = with(&["--seed", "4", "--stop", stop]);
    assert_eq!(stopped["text"], text[..text.find(stop).unwrap()]);
    assert_eq!(stopped["finish_reason"], "stop");
    // Plain output is the same text and a line end; --raw is what it does anyway.
    let plain = m1("generate", &[&flags[..], &["--seed", "4", "--raw"]].concat(), "").ok();
    assert_eq!(plain.stdout, format!("{text}\n"));
}

#[test]
fn prompts_come_from_files_and_standard_input() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("prompt.txt");
    std::fs::write(&path, "Tell me\n").unwrap();
    let flags = ["-n", "5", "--temperature", "0", "--prompt-file"];
    let file = m1("generate", &[&flags[..], &[path.to_str().unwrap()]].concat(), "").ok();
    let stdin = m1("generate", &[&flags[..], &["-"]].concat(), "Tell me\n").ok();
    assert_eq!(file.stdout, stdin.stdout);
    assert!(
        m1("generate", &[&flags[..], &["-"]].concat(), "").mistake().contains("standard input: the prompt is empty")
    );
    assert!(m1("generate", &["--prompt-file", "/no/such"], "").mistake().contains("/no/such"));
    assert!(m1("generate", &["--prompt", "a", "--stop", ""], "").mistake().contains("--stop: the text is empty"));
    assert!(m1("generate", &[], "").mistake().contains("--prompt"));
    assert!(m1("generate", &["--prompt", "abc", "--context", "3"], "").mistake().contains("the context holds 3"));
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let mut child = command("generate", &["--prompt", "Hi", "-n", "3000"]).spawn().unwrap();
    child.stdout.take().unwrap().read_exact(&mut [0; 4]).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
}

fn logits(dir: &Path, ids: &str, args: &[&str]) -> common::Run {
    let tokens = dir.join("ids.json");
    std::fs::write(&tokens, ids).unwrap();
    let out = dir.join("out.safetensors");
    let files = ["--tokens", tokens.to_str().unwrap(), "--out", out.to_str().unwrap()];
    m1("logits", &[&files, args].concat(), "")
}

#[test]
fn logits_are_those_of_each_row_alone_however_they_are_run() {
    let dir = tempfile::tempdir().unwrap();
    let row = |n: u32, salt: u32| (0..n).map(|i| (i * 31 + salt + i * i % 11) % VOCAB as u32).collect::<Vec<u32>>();
    let rows = [row(37, 1), row(0, 0), row(300, 2), row(1, 3)];
    let wanted: Vec<Vec<Vec<f32>>> = rows.iter().map(|r| if r.is_empty() { vec![] } else { alone(r) }).collect();
    let ids = serde_json::to_string(&rows).unwrap();
    for args in [
        &[][..],
        &["--chunk", "7"],
        &["--decode-from", "30"],
        &["--chunk", "256", "--decode-from", "290"],
        &["--decode-from", "0"],
    ] {
        assert_eq!(logits(dir.path(), &ids, args).ok().stdout, "");
        let bytes = std::fs::read(dir.path().join("out.safetensors")).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(file.len(), rows.len());
        for (r, wanted) in wanted.iter().enumerate() {
            let view = file.tensor(&format!("logits_{r}")).unwrap();
            assert_eq!((view.shape(), view.dtype()), (&[rows[r].len(), VOCAB][..], safetensors::Dtype::F32));
            let got = view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
            let worst = got.zip(wanted.iter().flatten()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < 1e-3, "{args:?}, row {r}: {worst}");
        }
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "no temporary file is left");
}

#[test]
fn logits_that_are_not_finite_are_written_and_told_by_their_place() {
    let dir = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(checkpoint()).unwrap().map(|f| f.unwrap()) {
        std::fs::copy(file.path(), dir.path().join(file.file_name())).unwrap();
    }
    let weights = dir.path().join("model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let head = file.tensor("lm_head.weight").unwrap().data();
    let row_5 = head.as_ptr() as usize - bytes.as_ptr() as usize + 5 * (head.len() / VOCAB);
    bytes[row_5..row_5 + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&weights, bytes).unwrap();
    let (tokens, out) = (dir.path().join("ids.json"), dir.path().join("out"));
    std::fs::write(&tokens, "[[], [1, 2], [3]]").unwrap();
    let mut command = common::bare(&["logits", "--device", "cpu", "--model"]);
    command.arg(dir.path()).arg("--tokens").arg(tokens).arg("--out").arg(&out);
    let got = common::run(command, "");
    assert!(got.mistake().contains("the logit of id 5 after row 1, token 0 is NaN"), "{}", got.stderr);
    assert!(out.is_file());
}

#[test]
fn logits_mistakes_are_one_line_each_and_leave_no_file() {
    let dir = tempfile::tempdir().unwrap();
    for (ids, args, wanted) in [
        ("[[1, 320]]", &[][..], "row 0, token 1: id 320 is outside the vocabulary (0 to 319)"),
        ("[[1], 5]", &[], "row 1 is 5"),
        ("[", &[], "not JSON"),
        ("[]", &[], "no rows"),
        ("[[1]]", &["--chunk", "0"], "0 is not in 1.."),
    ] {
        let got = logits(dir.path(), ids, args);
        assert!(got.mistake().contains(wanted), "{}", got.stderr);
    }
    assert!(!dir.path().join("out.safetensors").exists());
    let tokens = dir.path().join("ids.json");
    std::fs::write(&tokens, "[[1]]").unwrap();
    let got = m1("logits", &["--tokens", tokens.to_str().unwrap(), "--out", "/no/such/out"], "");
    assert!(got.mistake().contains("/no/such/out"));
    let got = m1("logits", &["--tokens", tokens.to_str().unwrap(), "--out", dir.path().to_str().unwrap()], "");
    assert!(got.mistake().contains("not a regular file"));
    assert!(m1("logits", &["--tokens", "/no/such", "--out", "x"], "").mistake().contains("/no/such"));
}
