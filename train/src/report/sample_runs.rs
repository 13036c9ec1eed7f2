//! Runs to look at, written by the real writers: learning curves with noise, evaluations, samples, configurations.

use std::fs;
use std::path::{Path, PathBuf};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::metrics::{EventWriter, MetricsLog, Response, RlMetrics, SampleLog, SampleRecord};

/// Tasks of the runs.
pub(super) const TASKS: [&str; 6] = ["addition", "boolean", "brackets", "clock", "sort_numbers", "word_problem"];

/// Writes a run of `steps` steps that learns at `speed`, with an evaluation every 20 steps.
pub(super) fn write(folder: &Path, arm: &str, seed: u64, steps: u64, speed: f64, config: bool) -> PathBuf {
    let run = folder.join(format!("{arm}-seed{seed}"));
    fs::create_dir_all(&run).unwrap();
    if config {
        let bound =
            if arm == "cispo" { "ratio_max = 5.0\nloss = \"cispo\"" } else { "clip_high = 0.28\nloss = \"dapo\"" };
        let text =
            format!("name = \"{arm}\"\nseed = {seed}\nlr = 1e-5\n\n[loss]\n{bound}\n\n[rollout]\ntemperature = 1.0\n");
        fs::write(run.join("config.toml"), text.replace("loss = ", "kind = ")).unwrap();
    }
    let mut rng = ChaCha8Rng::seed_from_u64(seed * 1000 + arm.len() as u64);
    let mut log = MetricsLog::open(&run.join("metrics.jsonl"), 0).unwrap();
    let mut samples = SampleLog::open(&run.join("samples.jsonl"), 0).unwrap();
    let mut events = EventWriter::create(&run, "rl", 0).unwrap();
    for step in 1..=steps {
        let row = row(step, steps, speed, &mut rng);
        events.push(&row).unwrap();
        if step.is_multiple_of(10) || step == 1 {
            for task in &TASKS[..3] {
                samples.push(record(step, task, row.pass_rate, &mut rng)).unwrap();
            }
        }
        log.push(row).unwrap();
        if step == steps / 2 {
            // Killed a step later and resumed.
            let lost = RlMetrics { step: step + 1, reward: -9.0, ..RlMetrics::default() };
            events.push(&lost).unwrap();
            log.push(lost).unwrap();
            log = MetricsLog::open(&run.join("metrics.jsonl"), step).unwrap();
            events = EventWriter::create(&run, "rl", step).unwrap();
        }
    }
    run
}

fn row(step: u64, steps: u64, speed: f64, rng: &mut ChaCha8Rng) -> RlMetrics {
    let mut noise = |size: f64| (rng.random::<f64>() + rng.random::<f64>() - 1.0) * size;
    let part = step as f64 / steps as f64;
    let learned = 0.1 + 0.8 * (1.0 - (-3.0 * speed * part).exp());
    let tasks = |shift: f64| {
        let rate = |(n, task): (usize, &&str)| ((*task).to_owned(), (learned - 0.1 * n as f64 + shift).clamp(0.0, 1.0));
        TASKS.iter().enumerate().map(rate).collect()
    };
    let evaluated = step.is_multiple_of(20) || step == 1;
    RlMetrics {
        step,
        tokens: step * 26_000,
        reward: learned + 0.05 + noise(0.1),
        reward_std: 0.3 * (1.0 - learned) + 0.05,
        frac_reward_zero_std: (0.2 + 0.4 * learned + noise(0.1)).clamp(0.0, 1.0),
        correctness: learned,
        format: 0.1 * learned,
        pass_rate: (learned + noise(0.12)).clamp(0.0, 1.0),
        pass_rate_by_task: tasks(noise(0.1)),
        difficulty_by_task: TASKS.iter().map(|t| ((*t).to_owned(), 1.0 + (4.0 * part).floor())).collect(),
        eval_pass_rate: evaluated.then(|| learned + noise(0.03)),
        eval_pass_rate_by_task: if evaluated { tasks(noise(0.04)) } else { Default::default() },
        entropy: 0.8 * (-2.0 * part).exp() + 0.1 + noise(0.03),
        ratio_min: 0.2 + noise(0.1),
        ratio_mean: 1.0 + noise(0.002),
        ratio_max: 2.0 * (1.0 + noise(0.5)).exp() * if step.is_multiple_of(97) { 8.0 } else { 1.0 },
        clip_frac_pos: 0.002 + noise(0.001),
        clip_frac_neg: 0.001 + noise(0.0005),
        approx_kl: 0.001 * (1.0 + noise(0.5)),
        loss: if step.is_multiple_of(50) { f64::NAN } else { noise(0.2) },
        aux_loss: 0.01,
        grad_norm: 0.3 * (noise(1.5)).exp() * if step.is_multiple_of(111) { 40.0 } else { 1.0 },
        lr: 1e-5,
        response_length_mean: 90.0 + 160.0 * part + noise(20.0),
        response_length_max: 400.0,
        response_length_clipped: (0.1 * (1.0 - part) + noise(0.02)).max(0.0),
        truncated: (0.12 * (1.0 - part) + noise(0.02)).max(0.0),
        repetition_stopped: 0.01,
        length_window: 400 + 100 * (4.0 * part) as u64,
        rollout_train_prob_diff_mean: 1e-6 * (1.0 + noise(0.5)),
        rollout_train_prob_diff_max: 3e-5,
        rollout_train_prob_corr: 1.0 - 1e-7 * noise(3.0).exp(),
        groups: 16,
        groups_dropped: 5,
        refills: 1,
        skipped_updates: 0,
        staleness: 16.0,
        expert_load_min: 0.4,
        expert_load_max: 1.8,
        rollout_tokens_per_s: 3000.0 + noise(300.0),
        train_tokens_per_s: 9000.0 + noise(500.0),
        rollout_s: 8.0,
        reward_s: 0.02,
        train_s: 4.0,
        eval_s: if evaluated { 6.0 } else { 0.0 },
        checkpoint_s: 0.0,
        elapsed_s: step as f64 * 12.0 * (1.1 - 0.1 * speed) + (step / 20) as f64 * 6.0,
    }
}

fn record(step: u64, task: &str, rate: f64, rng: &mut ChaCha8Rng) -> SampleRecord {
    let mut response = |n: u64| {
        let correct = rng.random::<f64>() < rate;
        Response {
            text: format!(
                "<think>\n17 + {n} is {}, as <b>anyone</b> sees.\n</think>\n\n{}",
                17 + n,
                20 + u64::from(!correct)
            ),
            reward: if correct { 1.1 } else { 0.1 },
            correct,
            finish: if n == 3 { "length".into() } else { "stop".into() },
            tokens: 30 + n,
        }
    };
    SampleRecord {
        step,
        task: task.to_owned(),
        difficulty: 2.0,
        prompt: "What is 17 + 3? </script><script>document.title = 'broken'</script> & so on".into(),
        responses: (0..4).map(&mut response).collect(),
        answer: "20".into(),
    }
}
