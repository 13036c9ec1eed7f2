//! The command line of `m1-train report`.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use m1_train::metrics::{MetricsLog, RlMetrics};

fn report(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_m1-train")).current_dir(dir).arg("report").args(args).output().unwrap()
}

fn run(dir: &Path, name: &str) {
    fs::create_dir(dir.join(name)).unwrap();
    let mut log = MetricsLog::open(&dir.join(name).join("metrics.jsonl"), 0).unwrap();
    (1..=5).for_each(|step| log.push(RlMetrics { step, pass_rate: 0.5, ..RlMetrics::default() }).unwrap());
}

#[test]
fn the_page_goes_where_it_is_said_to_and_mistakes_are_told_in_a_line() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    ["a-seed1", "a-seed2"].iter().for_each(|name| run(dir, name));

    let done = report(dir, &["a-seed1"]);
    assert!(done.status.success(), "{done:?}");
    assert_eq!(String::from_utf8(done.stdout).unwrap(), "a-seed1/report.html\n");
    assert!(dir.join("a-seed1/report.html").is_file());

    let done = report(dir, &["a-seed1", "a-seed2", "--name", "x", "--name", "<y>", "--out", "page.html"]);
    assert!(done.status.success() && done.stderr.is_empty(), "{done:?}");
    let page = fs::read_to_string(dir.join("page.html")).unwrap();
    assert!(page.contains("\"arm\":\"x\"") && page.contains("\"arm\":\"\\u003cy>\""));

    for (args, line) in [
        (&["b"][..], "error: b: not the directory of a run, it has no metrics.jsonl\n"),
        (&["a-seed1", "a-seed2", "--name", "x"], "error: --name: 1 of them for 2 runs; give one for each, or none\n"),
        (&["a-seed1", "--out", "no/page.html"], "error: no/page.html: No such file or directory (os error 2)\n"),
    ] {
        let done = report(dir, args);
        assert!(!done.status.success() && done.stdout.is_empty(), "{args:?}");
        assert_eq!(String::from_utf8(done.stderr).unwrap(), line);
    }
    let done = report(dir, &["a-seed1", "--thresholds", "0.5,50"]);
    let line = String::from_utf8(done.stderr).unwrap();
    assert!(line.contains("'50'") && line.contains("from 0 to 1") && line.lines().count() == 1, "{line}");
}
