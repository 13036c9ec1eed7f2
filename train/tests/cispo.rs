//! `m1-train cispo` from the outside, on the model that ships: a killed run equals one that was left alone, the first update's
//! ratios are 1, and what is no number stops a run with its state saved.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use m1_train::metrics::{RlMetrics, read};
use serde_json::Value;

fn nano() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/m1-nano")
}

/// A small run: 4 problems × 4 responses of at most 80 tokens, 2 updates a step.
fn command(out: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_m1-train"));
    command.args(["cispo", "--device", "cpu", "--out"]).arg(out);
    command.args(more).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn start(out: &Path, more: &[&str]) -> Command {
    let mut command = command(out, &[]);
    command.arg("--model").arg(nano());
    for set in [
        "rollout.prompts=4",
        "rollout.samples=4",
        "rollout.rows=8",
        "window.lengths=[80]",
        "train.updates=2",
        "train.lr=1e-4",
        "train.micro_tokens=400",
        "eval.every=3",
        "eval.problems=2",
        "output.save_every=2",
        "output.samples_every=2",
        "curriculum.tasks={ sort_numbers = { min = 3 }, counting = { min = 5 }, clock = { min = 4, weight = 0.5 } }",
    ] {
        command.args(["--set", set]);
    }
    command.args(more);
    command
}

fn succeed(mut command: Command) -> Output {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output
}

fn fail(mut command: Command) -> String {
    let output = command.output().unwrap();
    assert!(!output.status.success());
    String::from_utf8(output.stderr).unwrap()
}

fn wait_for_lines(child: &mut Child, file: &Path, lines: usize) {
    let start = Instant::now();
    while fs::read_to_string(file).map_or(0, |text| text.lines().count()) < lines {
        assert!(start.elapsed() < Duration::from_secs(240), "no {lines} lines in time");
        assert!(child.try_wait().unwrap().is_none(), "ended by itself");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The metrics without what a clock decides.
fn curve(run: &Path) -> Vec<Value> {
    let clock = |key: &String| key.ends_with("_s");
    let line = |m: RlMetrics| match serde_json::to_value(m).unwrap() {
        Value::Object(fields) => fields.into_iter().filter(|(key, _)| !clock(key)).collect(),
        other => other,
    };
    read::<RlMetrics>(&run.join("metrics.jsonl")).unwrap().into_iter().map(line).collect()
}

fn weights(run: &Path) -> Vec<u8> {
    fs::read(run.join("model.safetensors")).unwrap()
}

fn f32_weights(run: &Path) -> Vec<u8> {
    let folder = fs::read_dir(run.join("checkpoints")).unwrap().next().unwrap().unwrap().path();
    fs::read(folder.join("model.safetensors")).unwrap()
}

#[test]
fn killed_and_resumed_equals_uninterrupted() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, pieces) = (dir.path().join("whole"), dir.path().join("pieces"));
    succeed(start(&whole, &["--steps", "7"]));

    // Killed between two checkpoints; then stopped by Ctrl-C, with other threads; then done.
    let metrics = pieces.join("metrics.jsonl");
    let mut child = start(&pieces, &["--steps", "7", "--threads", "2"]).spawn().unwrap();
    wait_for_lines(&mut child, &metrics, 5); // the evaluation of the start, and four steps
    child.kill().unwrap(); // SIGKILL
    child.wait().unwrap();
    let mut child = command(&pieces, &["--resume", "--threads", "1"]).spawn().unwrap();
    wait_for_lines(&mut child, &metrics, 6);
    Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    let status = child.wait().unwrap();
    assert!(status.success() || status.code() == Some(130), "{status}");
    succeed(command(&pieces, &["--resume"]));

    assert!(f32_weights(&whole) == f32_weights(&pieces), "f32 weights");
    assert!(weights(&whole) == weights(&pieces), "bf16 weights");
    for (one, other) in curve(&whole).iter().zip(curve(&pieces)) {
        assert_eq!(one.to_string(), other.to_string());
    }
    let text = |run: &Path, name: &str| fs::read_to_string(run.join(name)).unwrap();
    assert_eq!(text(&whole, "samples.jsonl"), text(&pieces, "samples.jsonl"));
    assert_eq!(text(&whole, "config.toml"), text(&pieces, "config.toml"));

    // What a run says of itself.
    let steps = read::<RlMetrics>(&pieces.join("metrics.jsonl")).unwrap();
    assert_eq!(steps.iter().map(|m| m.step).collect::<Vec<_>>(), (0..=7).collect::<Vec<_>>());
    let evaluated: Vec<u64> = steps.iter().filter(|m| m.eval_pass_rate.is_some()).map(|m| m.step).collect();
    assert_eq!(evaluated, [0, 3, 6, 7]);
    for m in steps.iter().filter(|m| m.step > 0 && m.groups > 0) {
        assert!(m.rollout_train_prob_corr >= 0.9999 && m.rollout_train_prob_diff_max < 1e-3, "{m:?}");
        assert!(m.entropy > 0.0 && m.grad_norm > 0.0 && m.reward_std.is_finite(), "{m:?}");
    }
    for file in ["rl.svg", "report.html", "config.json", "tokenizer.json", "generation_config.json"] {
        assert!(pieces.join(file).is_file(), "{file}");
    }

    // It is refused to begin anew there, or to go on with other settings; more steps are welcome.
    let told = fail(start(&pieces, &[]));
    assert!(told.contains("holds a run at step 7; add --resume"), "{told}");
    let told = fail(command(&pieces, &["--resume", "--seed", "2"]));
    assert!(told.contains("--resume: ") && told.contains("is not what the run began with"), "{told}");
    succeed(command(&pieces, &["--resume", "--steps", "8"]));
    assert_eq!(curve(&pieces).len(), 9);
}

/// One update a step: the policy that is trained is the one that drew the tokens.
#[test]
fn on_the_first_update_every_ratio_is_one_and_cispo_is_reinforce() {
    let dir = tempfile::tempdir().unwrap();
    let run = |name: &str, more: &[&str]| {
        let out = dir.path().join(name);
        let mut command = start(&out, &["--steps", "2", "--set", "train.updates=1", "--set", "eval.every=0"]);
        more.iter().for_each(|set| {
            command.args(["--set", set]);
        });
        succeed(command);
        let ratios: Vec<[f64; 2]> = read::<RlMetrics>(&out.join("metrics.jsonl"))
            .unwrap()
            .iter()
            .filter(|m| m.groups > 0)
            .map(|m| [m.ratio_min, m.ratio_max])
            .collect();
        assert_eq!(ratios.len(), 2);
        (ratios.concat(), f32_weights(&out))
    };
    // To the training forward, to the bit; also when layers are run again.
    let (exact, cispo) = run("cispo", &["train.old_log_probs=training"]);
    assert_eq!(exact, [1.0; 4]);
    let (again, _) = run("checkpointed", &["train.old_log_probs=training", "train.gradient_checkpointing=true"]);
    assert_eq!(again, [1.0; 4]);
    let (_, reinforce) = run("reinforce", &["loss.algorithm=reinforce"]);
    assert!(cispo == reinforce, "the weights of CISPO and REINFORCE");
    // To the probabilities recorded when the tokens were drawn.
    let (recorded, _) = run("recorded", &[]);
    assert!(recorded.iter().all(|ratio| (ratio - 1.0).abs() < 1e-3), "{recorded:?}");
}

#[test]
fn updates_without_a_number_are_skipped_and_stop_the_run_with_its_state() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    // The first update throws the weights beyond all bounds; the others see what is no number any more.
    let more = ["train.updates=4", "train.lr=1e30", "train.warmup=0", "train.max_skipped=2", "train.weight_decay=0"];
    let mut command =
        start(&out, &["--steps", "3", "--set", "eval.every=0", "--set", "rollout.dynamic_sampling=false"]);
    more.iter().for_each(|set| {
        command.args(["--set", set]);
    });
    let told = fail(command);
    let last = told.lines().last().unwrap();
    assert!(last.contains("step 1: 2 updates in a row had a loss or a gradient that is no number"), "{told}");
    assert!(told.matches("an update is skipped").count() == 2, "{told}");
    assert!(out.join("checkpoints/step-00000000/run.json").is_file());
}

#[test]
fn mistakes_are_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let nano = nano();
    let model = nano.to_str().unwrap();
    let config = dir.path().join("bad.toml");
    fs::write(&config, "steps = 3\n[loss]\nepsilon_high = 0.2\n").unwrap();
    for (args, wanted) in [
        (vec![], "--model: which model is to be trained?"),
        (vec!["--model", "/nowhere"], "/nowhere: no such directory"),
        (vec!["--model", model, "--config", config.to_str().unwrap()], "unknown field `epsilon_high`"),
        (vec!["--model", model, "--set", "loss.ratio_max=0.2"], "must leave the ratio 1 as it is"),
        (vec!["--model", model, "--set", "window.lengths=[9999999]"], "max_position_embeddings"),
        (vec!["--model", model, "--set", "train.updates=7"], "train.updates = 7: must be a divisor of rollout.prompts"),
    ] {
        let told = fail(command(&out, &args));
        let lines: Vec<&str> = told.lines().filter(|line| !line.starts_with("device: ")).collect();
        assert!(lines.len() == 1 && lines[0].contains(wanted), "{args:?}: {told}");
        assert!(!out.exists(), "nothing is written");
    }
    let mut show = Command::new(env!("CARGO_BIN_EXE_m1-train"));
    show.args(["cispo", "--show-config", "--set", "loss.algorithm=dapo", "--steps", "9"]);
    let shown = String::from_utf8(succeed(show).stdout).unwrap();
    assert!(
        shown.contains("steps = 9")
            && shown.contains("algorithm = \"dapo\"")
            && shown.contains("[curriculum.tasks.clock]")
    );
}
