//! A run that is killed with -9 and resumed ends with the weights, to the bit, of one that was left alone.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use m1_model::config::ModelConfig;

const STEPS: &str = "14";

fn write_config(dir: &Path) -> std::path::PathBuf {
    let mut config = ModelConfig::preset("nano").unwrap();
    config.num_hidden_layers = 2;
    config.attn_type_list = vec![0, 1];
    config.hidden_size = 32;
    config.num_attention_heads = 2;
    config.num_key_value_heads = 1;
    config.head_dim = 16;
    config.rotary_dim = 8;
    config.intermediate_size = 48;
    let path = dir.join("micro.json");
    fs::write(&path, config.to_json()).unwrap();
    path
}

fn command(steps: &str, dir: &Path, out: &str, more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_m1-train"));
    command
        .args(["pretrain", "--steps", steps, "--batch-tokens", "600", "--micro-tokens", "200"])
        .args(["--save-every", "4", "--warmup", "3", "--device", "cpu", "--config"])
        .arg(write_config(dir))
        .arg("--out")
        .arg(dir.join(out))
        .args(more)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

fn run(dir: &Path, out: &str, more: &[&str]) -> Output {
    command(STEPS, dir, out, more).output().unwrap()
}

fn succeed(dir: &Path, out: &str, more: &[&str]) {
    let output = run(dir, out, more);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Lets the run go on until its metrics have `lines` lines.
fn wait_for_lines(child: &mut Child, metrics: &Path, lines: usize) {
    let start = Instant::now();
    while fs::read_to_string(metrics).map_or(0, |text| text.lines().count()) < lines {
        assert!(start.elapsed() < Duration::from_secs(240), "no {lines} steps in time");
        assert!(child.try_wait().unwrap().is_none(), "ended by itself");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The metrics without what a clock decides.
fn curve(path: &Path) -> Vec<(u64, u64, f64, f64)> {
    let metrics = m1_train::metrics::read::<m1_train::metrics::StepMetrics>(path).unwrap();
    metrics.iter().map(|m| (m.step, m.tokens, m.loss, m.grad_norm)).collect()
}

#[test]
fn killed_and_resumed_equals_uninterrupted() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    succeed(dir, "whole", &[]);

    // Killed between two checkpoints, so that steps done have to be done again; then once more, with other threads.
    let metrics = dir.join("pieces/metrics.jsonl");
    for (lines, threads) in [(6, "2"), (10, "1")] {
        let resume: &[&str] = if lines == 6 { &[] } else { &["--resume"] };
        let mut child = command(STEPS, dir, "pieces", resume).args(["--threads", threads]).spawn().unwrap();
        wait_for_lines(&mut child, &metrics, lines);
        child.kill().unwrap(); // SIGKILL
        child.wait().unwrap();
    }
    succeed(dir, "pieces", &["--resume"]);

    let model = |out: &str| fs::read(dir.join(out).join("model.safetensors")).unwrap();
    assert!(model("whole") == model("pieces"), "bf16 weights");
    let f32_weights = |out: &str| {
        let folder = dir.join(out).join("checkpoints").join(format!("step-{STEPS:0>8}"));
        fs::read(folder.join("model.safetensors")).unwrap()
    };
    assert!(f32_weights("whole") == f32_weights("pieces"), "f32 weights");
    assert_eq!(curve(&dir.join("whole/metrics.jsonl")), curve(&metrics));
    assert_eq!(curve(&metrics).len(), STEPS.parse::<usize>().unwrap());

    // What a finished run leaves: a model directory, the plot, one checkpoint, nothing half-written.
    for file in ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "loss.svg"] {
        assert!(dir.join("pieces").join(file).is_file(), "{file}");
    }
    let names = |folder: &str| {
        let entries = fs::read_dir(dir.join(folder)).unwrap();
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(names("pieces/checkpoints").len(), 1);
    assert!(names("pieces").iter().all(|n| !n.contains("partial")), "{:?}", names("pieces"));

    // A finished run can be resumed and stays what it was.
    succeed(dir, "pieces", &["--resume"]);
    assert!(model("whole") == model("pieces"));
    assert_eq!(names("pieces/checkpoints"), [format!("step-{STEPS:0>8}")]);

    // Mistakes get one line each.
    let past = command("3", dir, "pieces", &["--resume"]).output().unwrap();
    let text = String::from_utf8_lossy(&past.stderr).into_owned();
    assert_eq!(past.status.code(), Some(1), "{text}");
    assert!(text.contains("--steps 3: the run") && text.contains("at step 14"), "{text}");
    for (more, says) in [
        (&[][..], "add --resume"),
        (&["--resume", "--lr", "0.5"], "--lr 0.5: the run"),
        (&["--resume", "--seed", "9"], "--seed 9: the run"),
        (&["--resume", "--seed", "-1"], "--seed <N>': expected a whole number, 0 or above"),
        (&["--lr", "-1"], "--lr <RATE>': expected a number above 0"),
    ] {
        let output = run(dir, "pieces", more);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success());
        assert!(text.contains(says), "{more:?}: {text}");
        assert_eq!(text.matches("error").count(), 1, "{text}");
    }
}

/// Names and contents of a folder's files.
fn contents(dir: &Path) -> BTreeMap<OsString, Vec<u8>> {
    let entries = fs::read_dir(dir).unwrap().map(|e| e.unwrap());
    entries.map(|e| (e.file_name(), fs::read(e.path()).unwrap())).collect()
}

#[test]
fn a_model_that_is_no_run_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let model = dir.join("model");
    for name in ["config.json", "model.safetensors", "model-00001-of-00002.safetensors"] {
        fs::create_dir_all(&model).unwrap();
        fs::write(model.join("tokenizer_config.json"), "{}").unwrap();
        fs::write(model.join(name), "precious").unwrap();
        let before = contents(&model);
        for more in [&[][..], &["--resume"]] {
            let output = run(dir, "model", more);
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(output.status.code(), Some(1), "{text}");
            assert!(text.contains(name) && text.contains("name another directory"), "{text}");
            assert!(contents(&model) == before, "{more:?}");
        }
        fs::remove_dir_all(&model).unwrap();
    }
}

#[test]
fn a_wrong_size_leaves_no_folder() {
    let dir = tempfile::tempdir().unwrap();
    for (flag, value) in [("--preset", "huge"), ("--config", "/no/such/file")] {
        let out = dir.path().join("run");
        let command = &mut Command::new(env!("CARGO_BIN_EXE_m1-train"));
        let output = command.args(["pretrain", "--device", "cpu", flag, value, "--out"]).arg(&out).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains(flag) && text.contains(value), "{text}");
        assert!(!out.exists());
    }
}

#[cfg(unix)]
#[test]
fn an_interrupted_run_saves_and_says_how_to_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let mut child = command("100000", dir, "run", &[]).spawn().unwrap();
    wait_for_lines(&mut child, &dir.join("run/metrics.jsonl"), 3);
    let id = child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &id]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(130), "{text}");
    assert!(text.contains("with --resume goes on"), "{text}");
    assert_eq!(fs::read_dir(dir.join("run/checkpoints")).unwrap().count(), 1);
}
