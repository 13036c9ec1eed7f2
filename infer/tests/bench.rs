//! `m1 bench` from the outside.

mod common;

use common::{bare, m1};
use serde_json::Value;

fn rows(args: &[&str]) -> Vec<Value> {
    serde_json::from_str::<Value>(&m1("bench", &[args, &["--json"]].concat(), "").ok().stdout)
        .unwrap()
        .as_array()
        .unwrap()
        .clone()
}

#[test]
fn each_test_at_each_depth_has_a_row_that_adds_up() {
    let rows = rows(&["-p", "5,9", "-n", "3", "-d", "0,7", "-r", "2", "--chunk", "4"]);
    let names: Vec<&str> = rows.iter().map(|row| row["test"].as_str().unwrap()).collect();
    assert_eq!(names, ["pp5", "pp9", "tg3", "pp5 @ d7", "pp9 @ d7", "tg3 @ d7"]);
    for row in &rows {
        let tokens = row["n_prompt"].as_f64().unwrap() + row["n_gen"].as_f64().unwrap();
        let samples: Vec<f64> = row["samples_ns"].as_array().unwrap().iter().map(|ns| ns.as_f64().unwrap()).collect();
        let rates: Vec<f64> = row["samples_ts"].as_array().unwrap().iter().map(|ts| ts.as_f64().unwrap()).collect();
        assert_eq!((samples.len(), rates.len()), (2, 2));
        for (ns, rate) in samples.iter().zip(&rates) {
            // A pass through three layers of 32 takes more than a microsecond and less than a minute.
            assert!((1e3..6e10).contains(ns), "{row}");
            assert!((tokens / ns * 1e9 / rate - 1.0).abs() < 1e-3, "{row}");
        }
        let mean = row["avg_ts"].as_f64().unwrap();
        assert!((mean / ((rates[0] + rates[1]) / 2.0) - 1.0).abs() < 1e-9, "{row}");
        let deviation = row["stddev_ts"].as_f64().unwrap();
        assert!((deviation - (rates[0] - rates[1]).abs() / 2f64.sqrt()).abs() < 1e-6 * mean, "{row}");
        let decode = row["n_gen"] != 0;
        let bytes = row["weight_bytes_per_token"].as_f64().unwrap();
        assert_eq!(
            row["weight_gb_per_s"].as_f64().map(|x| (x * 1e9 / bytes / mean - 1.0).abs() < 1e-9),
            decode.then_some(true)
        );
        assert_eq!(row["gflop_per_s"].is_f64(), !decode);
        assert!(bytes > 0.0 && bytes < row["model_size"].as_f64().unwrap(), "two of three experts are read: {row}");
    }
}

#[test]
fn the_table_is_markdown_and_the_lines_are_json() {
    let table = m1("bench", &["-p", "4", "-n", "0", "-r", "1", "--threads", "1"], "").ok();
    let lines: Vec<Vec<&str>> = table.stdout.lines().map(|line| line.split('|').map(str::trim).collect()).collect();
    assert_eq!(lines.len(), 3, "{}", table.stdout);
    assert_eq!(
        lines[0][1..12],
        ["model", "size", "params", "dtype", "device", "threads", "test", "t/s", "MB/token", "GB/s", "GFLOP/s"]
    );
    assert!(lines[1][1..12].iter().all(|rule| rule.trim_end_matches(':').chars().all(|c| c == '-')));
    assert_eq!(lines[2][4..8], ["f32", "CPU", "1", "pp4"]);
    assert!(lines[2][8].contains(" ± 0.00"), "{}", table.stdout);
    assert!(table.stderr.contains("[1/1] pp4"), "progress is on standard error: {}", table.stderr);

    let lines = m1("bench", &["-p", "4", "-n", "2", "-r", "1", "-o", "jsonl", "--dtype", "bf16"], "").ok();
    let tests: Vec<Value> = lines.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((&tests[0]["test"], &tests[1]["test"], tests.len()), (&"pp4".into(), &"tg2".into(), 2));
    assert_eq!((&tests[0]["dtype"], &tests[0]["random_weights"]), (&"bf16".into(), &false.into()));
    assert_eq!((&tests[0]["type_k"], &tests[0]["type_v"]), (&"f32".into(), &"f32".into()));

    let halves = ["-p", "4", "-n", "2", "-r", "1", "-o", "jsonl", "--kv-cache-dtype", "bf16"];
    let line: Value = serde_json::from_str(m1("bench", &halves, "").ok().stdout.lines().next().unwrap()).unwrap();
    assert_eq!((&line["type_k"], &line["dtype"]), (&"bf16".into(), &"f32".into()));
    let refused = m1("bench", &["--kv-cache-dtype", "f16"], "");
    assert!(refused.stderr.contains("`f16` is not a dtype: expected f32 or bf16"), "{}", refused.stderr);
}

fn random(args: &[&str]) -> common::Run {
    common::run(bare(&[&["bench", "--device", "cpu", "-p", "4", "-n", "2", "-r", "1"], args].concat()), "")
}

#[test]
fn random_weights_need_no_checkpoint() {
    let run = random(&["--random", "nano", "--json"]).ok();
    let rows: Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!(rows.as_array().unwrap().len(), 2);
    for row in rows.as_array().unwrap() {
        assert_eq!((&row["model_filename"], &row["random_weights"]), (&"nano, random".into(), &true.into()));
        assert_eq!(
            (&row["dtype"], &row["layers"], &row["model_n_params"]),
            (&"bf16".into(), &8.into(), &3_906_560.into())
        );
        assert!((row["avg_layer_ts"].as_f64().unwrap() / row["avg_ts"].as_f64().unwrap() - 8.0).abs() < 1e-9);
    }
    // A configuration by its file or its directory; less than all layers, of few ids.
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("config.json");
    std::fs::write(&file, m1_model::ModelConfig::preset("base").unwrap().to_json()).unwrap();
    for (config, layers, name) in
        [(folder.path(), "lightning,softmax", "1 lightning + 1 softmax"), (&file, "1", "1 lightning")]
    {
        let options =
            ["--random", config.to_str().unwrap(), "--layers", layers, "--quantize", "int4", "--quantize-all"];
        let table = random(&options).ok().stdout;
        let lines: Vec<Vec<&str>> = table.lines().map(|line| line.split('|').map(str::trim).collect()).collect();
        assert!(lines[0].contains(&"layer-t/s") && lines.len() == 4, "{table}");
        assert!(lines[2][1].ends_with(&format!(", random, {name}")), "{table}");
        assert_eq!(lines[2][4], "int4", "{table}");
    }
}

#[test]
fn mistakes_with_random_weights() {
    for (args, wanted) in [
        (&["--random", "huge"][..], "--random huge: expected nano, small, base, a config.json or a directory with one"),
        (&["--random", "nano", "--layers", "9"], "--layers 9: nano has 8"),
        (&["--random", "nano", "--layers", "linear"], "lightning and softmax"),
        (&["--random", "nano", "--model", "nano"], "cannot be used with"),
        (&["--layers", "1"], "required arguments"),
        (&[], "required arguments"),
    ] {
        let run = random(args);
        assert!(run.mistake().contains(wanted), "{args:?}: {}", run.stderr);
    }
}

#[test]
fn mistakes_are_told_in_one_line() {
    for (args, wanted) in [
        (&["-p", "0", "-n", "0"][..], "nothing to measure"),
        (&["-p", "-3"], "whole number"),
        (&["-p", "3,x"], "whole number"),
        (&["-r", "0"], "repetitions"),
        (&["--output", "csv"], "csv"),
    ] {
        let run = m1("bench", args, "");
        assert!(run.mistake().contains(wanted), "{args:?}: {}", run.stderr);
    }
    let run = common::run(bare(&["bench", "--model", "/no/such", "--device", "cpu"]), "");
    assert!(run.mistake().contains("/no/such"), "{}", run.stderr);
    let help = common::run(bare(&["bench", "--help"]), "").ok();
    assert!(help.stdout.contains("m1 bench --model DIR -p 512,2048,8192"), "{}", help.stdout);
}

/// Ctrl-C ends the run; the rows measured before are complete.
#[test]
#[cfg(unix)]
fn ctrl_c_leaves_what_was_measured() {
    use std::io::{BufRead, BufReader, Read};
    // The second test would take hours.
    let args = ["-p", "4", "-n", "100000000", "-r", "1", "--json"];
    let mut child = common::command("bench", &args).spawn().unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("[2/2]") {
        line.clear();
        assert_ne!(stderr.read_line(&mut line).unwrap(), 0, "ended before the second test");
    }
    let id = child.id().to_string();
    assert!(std::process::Command::new("kill").args(["-INT", &id]).status().unwrap().success());
    let mut text = String::new();
    child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let rows: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(rows.as_array().unwrap().len(), 1);
    assert_eq!(rows[0]["test"], "pp4");
}
