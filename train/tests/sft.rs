//! `m1-train sft`: the loss falls, a killed run ends as an uninterrupted one, mistakes get one line, and only what the
//! assistant says is learned.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use burn::module::Module;
use burn::tensor::Device;
use m1_model::checkpoint::{self, SaveOptions};
use m1_model::config::ModelConfig;
use m1_model::model::M1;
use m1_train::data::DataConfig;
use m1_train::run::Evaluated;
use m1_train::{metrics, tokenizer};

/// A tiny model with a tokenizer, as `pretrain` leaves one, and with a setting of generation that is its own.
fn write_model(dir: &Path) {
    fs::create_dir_all(dir).unwrap();
    let made = tokenizer::train(&DataConfig::default(), 500, 400).unwrap();
    tokenizer::save(&made, dir).unwrap();
    fs::write(dir.join("generation_config.json"), r#"{"temperature": 0.625}"#).unwrap();
    let mut config = ModelConfig::preset("nano").unwrap();
    config.num_hidden_layers = 2;
    config.attn_type_list = vec![0, 1];
    config.hidden_size = 32;
    config.num_attention_heads = 2;
    config.num_key_value_heads = 1;
    config.head_dim = 16;
    config.rotary_dim = 8;
    config.intermediate_size = 48;
    config.vocab_size = tokenizer::vocab_size(&made);
    let end = tokenizer::special_id(&made, "<end_of_sentence>").unwrap();
    config.extra.insert("eos_token_id".into(), end.into());
    let device = Device::flex();
    device.seed(3);
    checkpoint::save(dir, &M1::new(&config, &device).materialize(), &SaveOptions::default()).unwrap();
}

/// Problems by the command itself.
fn problems(path: &Path, more: &[&str]) {
    let command = &mut Command::new(env!("CARGO_BIN_EXE_m1-train"));
    let output = command.args(["problems", "--out"]).arg(path).args(more).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn command(dir: &Path, out: &str, more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_m1-train"));
    command
        .args(["sft", "--batch-tokens", "600", "--micro-tokens", "200", "--warmup", "2"])
        .args(["--save-every", "4", "--eval-every", "5", "--device", "cpu", "--model"])
        .arg(dir.join("model"))
        .arg("--data")
        .arg(dir.join("set.jsonl"))
        .arg("--out")
        .arg(dir.join(out))
        .args(more)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

fn run(dir: &Path, out: &str, more: &[&str]) -> Output {
    command(dir, out, more).output().unwrap()
}

fn succeed(dir: &Path, out: &str, more: &[&str]) {
    let output = run(dir, out, more);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// The one line that a mistake gets.
fn told(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert_eq!(text.lines().filter(|line| line.starts_with("error")).count(), 1, "{text}");
    text.lines().last().unwrap().to_string()
}

fn wait_for_lines(child: &mut Child, metrics: &Path, lines: usize) {
    let start = Instant::now();
    while fs::read_to_string(metrics).map_or(0, |text| text.lines().count()) < lines {
        assert!(start.elapsed() < Duration::from_secs(240), "no {lines} steps in time");
        assert!(child.try_wait().unwrap().is_none(), "ended by itself");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn evaluations(path: &Path) -> Vec<Evaluated> {
    fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn killed_and_resumed_equals_uninterrupted_and_the_loss_falls() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    write_model(&dir.join("model"));
    problems(&dir.join("set.jsonl"), &["--tasks", "boolean", "--difficulties", "1", "--n", "40"]);
    problems(&dir.join("test.jsonl"), &["--tasks", "boolean", "--difficulties", "1", "--n", "10", "--seed", "5"]);
    let test = dir.join("test.jsonl");
    let asked = ["--epochs", "12", "--lr", "0.01", "--eval", test.to_str().unwrap()];
    succeed(dir, "whole", &asked);

    let log = dir.join("pieces/metrics.jsonl");
    for (lines, threads, resume) in [(6, "2", None), (10, "1", Some("--resume"))] {
        let mut child = command(dir, "pieces", &asked).args(["--threads", threads]).args(resume).spawn().unwrap();
        wait_for_lines(&mut child, &log, lines);
        child.kill().unwrap(); // SIGKILL
        child.wait().unwrap();
    }
    succeed(dir, "pieces", &[&asked[..], &["--resume"]].concat());

    let read = |out: &str, file: &str| fs::read(dir.join(out).join(file)).unwrap();
    assert!(read("whole", "model.safetensors") == read("pieces", "model.safetensors"), "bf16 weights");
    let steps = metrics::read::<metrics::StepMetrics>(&log).unwrap();
    let last = format!("checkpoints/step-{:08}/model.safetensors", steps.len());
    assert!(read("whole", &last) == read("pieces", &last), "f32 weights");
    let curve = |out: &str| {
        let steps = metrics::read::<metrics::StepMetrics>(&dir.join(out).join("metrics.jsonl")).unwrap();
        steps.iter().map(|m| (m.step, m.tokens, m.loss, m.grad_norm)).collect::<Vec<_>>()
    };
    assert_eq!(curve("whole"), curve("pieces"));
    assert_eq!(read("whole", "eval.jsonl"), read("pieces", "eval.jsonl"));

    // Twelve times 40 conversations were read, and the loss fell, on what was not trained on too.
    let (first, end) = (&steps[0], &steps[steps.len() - 1]);
    assert!(steps.len() > 12 && end.loss < 0.5 * first.loss, "{} steps: {} to {}", steps.len(), first.loss, end.loss);
    let evaluated = evaluations(&dir.join("pieces/eval.jsonl"));
    let at: Vec<u64> = evaluated.iter().map(|e| e.step).collect();
    let mut expected: Vec<u64> = (0..=end.step).filter(|step| step % 5 == 0).collect();
    expected.extend((end.step % 5 != 0).then_some(end.step));
    assert_eq!(at, expected);
    assert!(evaluated[at.len() - 1].loss < 0.5 * evaluated[0].loss, "{evaluated:?}");
    assert!((evaluated[0].loss - first.loss).abs() < 0.3, "{evaluated:?} {}", first.loss);

    // The model's own files go along.
    for file in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        assert_eq!(read("model", file), read("pieces", file), "{file}");
    }
    for file in ["config.json", "loss.svg"] {
        assert!(dir.join("pieces").join(file).is_file(), "{file}");
    }
    let names = fs::read_dir(dir.join("pieces")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    assert!(names.into_iter().all(|name| !name.contains("partial")));

    // What a resumption cannot change.
    let resumed = |out: &str, more: &[&str]| told(&run(dir, out, &[&["--resume"], more].concat()));
    assert!(resumed("pieces", &["--epochs", "1"]).contains("--epochs 1: the run in"));
    assert!(resumed("pieces", &["--steps", "2"]).contains("--steps 2: the run in"));
    assert!(resumed("pieces", &["--seed", "9"]).contains("--seed 9: the run in"));
    assert!(resumed("pieces", &["--beta-2", "0.5"]).contains("--beta-2 0.5: the run in"));
    assert!(told(&run(dir, "pieces", &[])).contains("add --resume"));
    fs::copy(&test, dir.join("set.jsonl")).unwrap();
    assert!(resumed("pieces", &[]).contains("not the 40 conversations"));
    // A run of pretraining is none of fine-tuning.
    let pretrain = &mut Command::new(env!("CARGO_BIN_EXE_m1-train"));
    let pretrain = pretrain.args(["pretrain", "--device", "cpu", "--resume", "--out"]).arg(dir.join("pieces"));
    assert!(told(&pretrain.output().unwrap()).contains("run.json: not a run of this command"));
}

#[test]
fn only_what_the_assistant_says_is_learned() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    write_model(&dir.join("model"));
    // The users' texts never repeat, the answer is always the same: its loss can go to zero, that of all tokens cannot.
    let word = |i: u64| {
        (0..12).map(|j| char::from(b'a' + ((i * 7919 + j * j * 31 + i * j * 17) % 26) as u8)).collect::<String>()
    };
    let line = |i: u64| {
        let says = |role, text: &str| serde_json::json!({"role": role, "content": text});
        format!("{}\n", serde_json::json!({"messages": [says("user", &word(i)), says("assistant", "Yes.")]}))
    };
    fs::write(dir.join("set.jsonl"), (0..200).map(line).collect::<String>()).unwrap();
    succeed(dir, "run", &["--steps", "60", "--lr", "0.01"]);
    let steps = metrics::read::<metrics::StepMetrics>(&dir.join("run/metrics.jsonl")).unwrap();
    assert_eq!(steps.len(), 60);
    assert!(steps[0].loss > 4.0 && steps[59].loss < 0.05, "{} to {}", steps[0].loss, steps[59].loss);
}

#[test]
fn mistakes_get_one_line_and_leave_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    write_model(&dir.join("model"));
    let good = r#"{"messages":[{"role":"user","content":"Hi"},{"role":"assistant","content":"Hey"}]}"#;
    let set = dir.join("set.jsonl");
    for (bad, says) in [
        ("{\"messages\": 3}", "invalid type"),
        (r#"{"messages":[{"role":"robot","content":"x"}]}"#, "unknown variant `robot`"),
        (r#"{"messages":[{"role":"user","content":"x"}]}"#, "no message of role assistant"),
    ] {
        fs::write(&set, format!("{good}\n{bad}\n")).unwrap();
        let line = told(&run(dir, "run", &[]));
        assert!(line.contains("--data: ") && line.contains("set.jsonl: line 2: ") && line.contains(says), "{line}");
    }
    fs::write(&set, "").unwrap();
    assert!(told(&run(dir, "run", &[])).contains("holds no conversation"));
    fs::write(&set, good).unwrap();
    assert!(told(&run(dir, "run", &["--eval", "/no/such/file"])).contains("--eval: /no/such/file: "));
    assert!(told(&run(dir, "model", &[])).contains("holds a model"));
    // A template of another kind: what is trained would not be what is asked.
    let config = dir.join("model/tokenizer_config.json");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text.replace("user name=user", "human")).unwrap();
    assert!(told(&run(dir, "other", &[])).contains("its chat template is not MiniMax-M1's"));
    assert!(!dir.join("other").exists());
    fs::remove_dir_all(dir.join("model")).unwrap();
    assert!(told(&run(dir, "other", &[])).contains("--model "));
    assert!(!dir.join("other").exists());
}

#[test]
fn problems_are_the_training_sides_and_repeatable() {
    let ask = |more: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_m1-train")).arg("problems").args(more).output().unwrap();
        (output.status.success(), String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    let (ok, text, _) = ask(&["--n", "300", "--tasks", "clock,equation", "--difficulties", "2..3"]);
    assert!(ok && text.lines().count() == 300);
    assert_eq!(ask(&["--n", "300", "--tasks", "clock,equation", "--difficulty", "2..3"]).1, text);
    assert_ne!(ask(&["--n", "300", "--tasks", "clock,equation", "--difficulty", "2..3", "--seed", "1"]).1, text);
    // None of them is one that evaluation asks.
    let made = tokenizer::train(&DataConfig::default(), 500, 400).unwrap();
    let data = m1_train::data::Data::new(DataConfig::default(), made).unwrap();
    for name in ["clock", "equation"] {
        let task = m1_train::tasks::by_name(name).unwrap();
        for (difficulty, index) in (2..=3).flat_map(|d| (0..200).map(move |i| (d, i))) {
            let problem = data.eval_problem(task, difficulty, index).unwrap().unwrap();
            let question = serde_json::to_string(&problem.question).unwrap();
            assert!(!text.contains(&question), "{question}");
        }
    }
    for (more, says) in [
        (["--difficulties", "11"], "--difficulties 11: expected 1 to 10"),
        (["--tasks", "chess"], "--tasks chess: no such task; there are addition, "),
        (["--n", "0"], "--n <N>': expected a whole number"),
        (["--out", "/no/such/folder/x"], "--out /no/such/folder/x"),
    ] {
        let (ok, _, told) = ask(&more);
        assert!(!ok && told.contains(says), "{told}");
    }
}
