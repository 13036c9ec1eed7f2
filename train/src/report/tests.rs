//! The page as a whole; how it looks is for eyes: `m1-train report RUN…`.

use std::fs;

use super::*;
use crate::metrics::RlMetrics;

/// The JSON within a page.
fn embedded(html: &str) -> serde_json::Value {
    let (_, rest) = html.split_once("id=\"data\">").unwrap();
    let (json, _) = rest.split_once("</script>").unwrap();
    serde_json::from_str(json).unwrap()
}

#[test]
fn runs_are_grouped_measured_and_put_on_one_page() {
    let dir = tempfile::tempdir().unwrap();
    let mut runs: Vec<PathBuf> =
        [1, 2].iter().map(|&s| sample_runs::write(dir.path(), "cispo", s, 120, 1.5, true)).collect();
    runs.push(sample_runs::write(dir.path(), "dapo", 1, 100, 0.8, false));
    let out = dir.path().join("report.html");
    let options = Options { title: "A & <b>".into(), ..Options::default() };
    assert_eq!(write(&out, &runs, &options).unwrap(), Vec::<String>::new());
    let html = fs::read_to_string(&out).unwrap();
    assert!(html.contains("<title>A &amp; &lt;b&gt;</title>"));

    let data = embedded(&html);
    let arms: Vec<&str> = data["runs"].as_array().unwrap().iter().map(|r| r["arm"].as_str().unwrap()).collect();
    assert_eq!(arms, ["cispo", "cispo", "dapo"]);
    let run = &data["runs"][0];
    assert_eq!(run["step"], 120);
    assert_eq!(run["reached_by"], "eval_pass_rate");
    assert_eq!(run["config"]["loss.ratio_max"], "5.0");
    assert_eq!(run["config"]["seed"], "1");
    assert!(data["runs"][2]["config"].is_null(), "without a config.toml");
    assert_eq!(run["curves"]["series"]["reward"].as_array().unwrap().len(), 120);
    assert!(run["curves"]["series"]["eval_pass_rate"][1].is_null(), "no evaluation, no point");
    let rows: Vec<RlMetrics> = crate::metrics::read(&runs[0].join("metrics.jsonl")).unwrap();
    let first = rows.iter().find(|m| m.eval_pass_rate.is_some_and(|r| r >= 0.5)).unwrap();
    assert_eq!(run["reached"][1]["step"], first.step);
    assert_eq!(run["reached"][1]["seconds"].as_f64(), Some(first.elapsed_s));
    let rewards: f64 = rows[110..].iter().map(|m| m.reward).sum::<f64>() / 10.0;
    assert!((run["end"]["reward"].as_f64().unwrap() - rewards).abs() < 1e-12);
    assert_eq!(run["tasks"]["clock"]["after"].as_f64(), rows[119].eval_pass_rate_by_task.get("clock").copied());
    let steps: std::collections::BTreeSet<u64> =
        run["samples"].as_array().unwrap().iter().map(|s| s["step"].as_u64().unwrap()).collect();
    assert!(steps.len() == 8 && steps.contains(&1) && steps.contains(&120), "{steps:?}");
}

#[test]
fn nothing_that_a_model_wrote_is_markup_and_nothing_is_fetched() {
    let dir = tempfile::tempdir().unwrap();
    let run = sample_runs::write(dir.path(), "a", 1, 20, 1.0, true);
    let (html, _) = page(&[run], &Options::default()).unwrap();
    let prompt = embedded(&html)["runs"][0]["samples"][0]["prompt"].as_str().unwrap().to_owned();
    assert!(prompt.contains("</script><script>"), "the text itself is whole: {prompt}");
    assert_eq!(html.matches("</script>").count(), 2, "the page's own");
    for outside in ["src=", "@import", "url(", "fetch(", "href=", "innerHTML", "outerHTML", "insertAdjacentHTML"] {
        assert!(!html.contains(outside), "{outside}");
    }
}

#[test]
fn the_names_that_the_page_draws_are_those_of_the_metrics() {
    let row = RlMetrics { eval_pass_rate: Some(0.5), ..RlMetrics::default() };
    let row = serde_json::to_value(row).unwrap();
    let (_, lists) = JS.split_once("const CURVES = [").unwrap();
    let (lists, _) = lists.split_once("const DASHES").unwrap();
    let names: Vec<&str> = lists.split("[\"").skip(1).map(|part| part.split('"').next().unwrap()).collect();
    assert!(names.len() > 20, "{names:?}");
    for name in names {
        assert!(row.get(name).is_some(), "{name}");
    }
}

#[test]
fn long_runs_are_thinned() {
    let dir = tempfile::tempdir().unwrap();
    let runs: Vec<PathBuf> = (1..=3).map(|s| sample_runs::write(dir.path(), "long", s, 4000, 1.0, true)).collect();
    let (html, _) = page(&runs, &Options::default()).unwrap();
    assert!(html.len() < 5_000_000, "{} bytes", html.len());
    let data = embedded(&html);
    assert!(data["runs"][0]["curves"]["stride"].as_u64().unwrap() >= 4);
    assert_eq!(data["runs"][0]["step"], 4000);
}

#[test]
fn what_is_wrong_is_told_in_a_line() {
    let dir = tempfile::tempdir().unwrap();
    let told = |run: &Path| page(&[run.to_owned()], &Options::default()).unwrap_err().to_string();
    let missing = dir.path().join("missing");
    assert_eq!(told(&missing), format!("{}: not the directory of a run, it has no metrics.jsonl", missing.display()));

    let run = sample_runs::write(dir.path(), "a", 1, 20, 1.0, true);
    let metrics = run.join("metrics.jsonl");
    let whole = fs::read_to_string(&metrics).unwrap();
    fs::write(&metrics, "").unwrap();
    assert_eq!(told(&run), format!("{}: no step in it yet", metrics.display()));
    fs::write(&metrics, "step,reward\n1,0.5\n").unwrap();
    assert!(told(&run).starts_with(&format!("{}: line 1 is not", metrics.display())));

    // A run that is being written, and a configuration that someone has edited.
    fs::write(&metrics, format!("{whole}{{\"step\":21,\"rew")).unwrap();
    fs::write(run.join("config.toml"), "name = ").unwrap();
    let (html, warnings) = page(std::slice::from_ref(&run), &Options::default()).unwrap();
    assert_eq!(warnings.len(), 2, "{warnings:?}");
    assert!(warnings[0].contains("metrics.jsonl: line 21 is broken"), "{warnings:?}");
    assert!(warnings[1].contains("config.toml") && !warnings[1].contains('\n'), "{warnings:?}");
    assert_eq!(embedded(&html)["runs"][0]["step"], 20);
    assert_eq!(embedded(&html)["runs"][0]["arm"], "a");

    let options = Options { names: vec!["x".into(), "y".into()], ..Options::default() };
    assert_eq!(page(&[run], &options).unwrap_err().to_string(), "2 names for 1 runs: give one for each, or none");
}
