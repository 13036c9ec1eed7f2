//! What is measured of a run, on every one of its steps: its end, the way to a pass rate, tasks before and after; and
//! the curves, thinned.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::run::Run;

/// The end of a run is the mean over its last steps, so many.
pub(super) const LAST: usize = 10;

/// Where a run first had a pass rate.
#[derive(Debug, PartialEq, Serialize)]
pub(super) struct Reached {
    pub(super) step: u64,
    pub(super) seconds: Option<f64>,
}

/// A task's pass rates.
#[derive(Debug, PartialEq, Serialize)]
pub(super) struct TaskChange {
    pub(super) before: Option<f64>,
    pub(super) after: Option<f64>,
    /// Whether on held-out problems or on those trained on.
    pub(super) held_out: bool,
}

/// Thinned columns; what is not finite is null.
#[derive(Debug, PartialEq, Serialize)]
pub(super) struct Curves {
    /// Steps that a point stands for.
    pub(super) stride: usize,
    pub(super) step: Vec<u64>,
    pub(super) series: BTreeMap<String, Vec<f64>>,
}

/// At most `points` points: means over as many steps as that takes, but the largest of a `…_max` and the smallest of a
/// `…_min`, which a mean would hide. A point stands at its last step.
pub(super) fn thin(run: &Run, points: usize) -> Curves {
    let stride = run.steps.len().div_ceil(points);
    let column = |(name, values): (&String, &Vec<f64>)| {
        let point = |part: &[f64]| {
            let finite = || part.iter().copied().filter(|v| v.is_finite());
            rounded(
                name,
                match () {
                    // A clock is read at the point, not before it.
                    () if matches!(&**name, "elapsed_s" | "tokens") => finite().next_back().unwrap_or(f64::NAN),
                    () if name.ends_with("_max") => finite().reduce(f64::max).unwrap_or(f64::NAN),
                    () if name.ends_with("_min") => finite().reduce(f64::min).unwrap_or(f64::NAN),
                    () => mean(part).unwrap_or(f64::NAN),
                },
            )
        };
        (name.clone(), values.chunks(stride).map(point).collect())
    };
    Curves {
        stride,
        step: run.steps.chunks(stride).map(|part| part[part.len() - 1]).collect(),
        series: run.series.iter().map(column).collect(),
    }
}

/// A metric at the end of its run: the mean over the last steps; of an evaluation the last.
pub(super) fn end(name: &str, values: &[f64]) -> Option<f64> {
    if name.starts_with("eval_pass_rate") || matches!(name, "elapsed_s" | "tokens") {
        return values.iter().copied().rfind(|v| v.is_finite());
    }
    mean(&values[values.len().saturating_sub(LAST)..])
}

/// The pass rate to judge a run by: on held-out problems if it was evaluated, else on those it trained on.
pub(super) fn pass_rate(run: &Run) -> &'static str {
    if run.series.contains_key("eval_pass_rate") { "eval_pass_rate" } else { "pass_rate" }
}

/// The first step at which a metric is at least `threshold`. One of training problems is averaged over the last steps:
/// a lucky batch is no ability.
pub(super) fn reached(run: &Run, metric: &str, threshold: f64) -> Option<Reached> {
    let values = run.series.get(metric)?;
    let window = if metric.starts_with("eval") { 1 } else { LAST.min(values.len()) };
    let first = values.windows(window).position(|w| mean(w).is_some_and(|m| m >= threshold))? + window - 1;
    let seconds = run.series.get("elapsed_s").map(|s| s[first]).filter(|s| s.is_finite());
    Some(Reached { step: run.steps[first], seconds })
}

/// Every task's pass rate at the run's first and last evaluation, or else over its first and last steps.
pub(super) fn tasks(run: &Run) -> BTreeMap<String, TaskChange> {
    let of = |prefix: &'static str| run.series.iter().filter_map(move |(n, s)| Some((n.strip_prefix(prefix)?, s)));
    let held_out: BTreeMap<&str, &Vec<f64>> = of("eval_pass_rate_by_task/").collect();
    let trained: BTreeMap<&str, &Vec<f64>> = of("pass_rate_by_task/").collect();
    let names: BTreeSet<&str> = held_out.keys().chain(trained.keys()).copied().collect();
    let change = |name: &str| match held_out.get(name) {
        Some(values) => {
            let finite = || values.iter().copied().filter(|v| v.is_finite());
            TaskChange { before: finite().next(), after: finite().next_back(), held_out: true }
        }
        None => {
            // Problems of a task are not drawn at every step.
            let drawn: Vec<f64> = trained[name].iter().copied().filter(|v| v.is_finite()).collect();
            let n = LAST.min(drawn.len());
            TaskChange { before: mean(&drawn[..n]), after: mean(&drawn[drawn.len() - n..]), held_out: false }
        }
    };
    names.into_iter().map(|name| (name.to_owned(), change(name))).collect()
}

/// The mean of what is finite.
fn mean(values: &[f64]) -> Option<f64> {
    let finite = || values.iter().filter(|v| v.is_finite());
    let n = finite().count();
    (n > 0).then(|| finite().sum::<f64>() / n as f64)
}

/// Five digits, what a curve shows; a correlation, whose distance from 1 is shown, keeps them all.
fn rounded(name: &str, value: f64) -> f64 {
    if value.is_finite() && value.fract() != 0.0 && !name.ends_with("_corr") {
        format!("{value:.4e}").parse().expect("a number as it was just written")
    } else {
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(series: &[(&str, Vec<f64>)]) -> Run {
        let n = series[0].1.len();
        Run {
            folder: String::new(),
            name: String::new(),
            arm: String::new(),
            steps: (1..=n as u64).collect(),
            series: series.iter().map(|(name, values)| ((*name).to_owned(), values.clone())).collect(),
            config: None,
            samples: Vec::new(),
            warnings: Vec::new(),
        }
    }

    #[test]
    fn thinning_keeps_extremes_means_and_gaps() {
        let mut values = vec![1.0; 100];
        values[37] = 9.0;
        let mut sparse = vec![f64::NAN; 100];
        sparse[99] = 0.5;
        let elapsed = (1..=100).map(f64::from).collect();
        let run = run(&[("a", values.clone()), ("a_max", values), ("e", sparse), ("elapsed_s", elapsed)]);
        let curves = thin(&run, 10);
        assert_eq!((curves.stride, curves.step.len(), curves.step[9]), (10, 10, 100));
        assert_eq!(curves.series["a_max"][3], 9.0);
        assert_eq!(curves.series["a"][3], 1.8);
        assert_eq!(curves.series["elapsed_s"][3], 40.0);
        assert!(curves.series["e"][8].is_nan() && curves.series["e"][9] == 0.5);
        assert_eq!(thin(&run, 1000).step.len(), 100);
    }

    #[test]
    fn a_threshold_is_reached_by_evaluations_or_by_a_mean() {
        let nan = f64::NAN;
        let evaluated = run(&[
            ("eval_pass_rate", vec![nan, 0.2, nan, 0.6, nan, 0.9]),
            ("elapsed_s", vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
        ]);
        assert_eq!(pass_rate(&evaluated), "eval_pass_rate");
        let found = reached(&evaluated, "eval_pass_rate", 0.5);
        assert_eq!(found, Some(Reached { step: 4, seconds: Some(4.0) }));
        assert_eq!(reached(&evaluated, "eval_pass_rate", 0.95), None);
        assert_eq!(end("eval_pass_rate", &evaluated.series["eval_pass_rate"]), Some(0.9));

        // A single step of 1 among zeros is not half; ten of twenty are, and the tenth is the one.
        let mut rates = vec![0.0; 30];
        rates[3] = 1.0;
        rates[20..].fill(1.0);
        let trained = run(&[("pass_rate", rates)]);
        assert_eq!(pass_rate(&trained), "pass_rate");
        assert_eq!(reached(&trained, "pass_rate", 0.5), Some(Reached { step: 25, seconds: None }));
        assert_eq!(end("pass_rate", &trained.series["pass_rate"]), Some(1.0));
    }

    #[test]
    fn tasks_before_and_after() {
        let nan = f64::NAN;
        let run = run(&[
            ("eval_pass_rate_by_task/clock", vec![0.1, nan, 0.7, nan]),
            ("pass_rate_by_task/clock", vec![0.0; 4]),
            ("pass_rate_by_task/words", vec![nan, 0.5, nan, 1.0]),
        ]);
        let found = tasks(&run);
        assert_eq!(found["clock"], TaskChange { before: Some(0.1), after: Some(0.7), held_out: true });
        assert_eq!(found["words"], TaskChange { before: Some(0.75), after: Some(0.75), held_out: false });
    }
}
