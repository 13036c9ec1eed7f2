//! The curves of a run as an SVG, every step pale and a running mean dark: the loss of pretraining on a logarithmic scale
//! over tokens seen, or the four curves that reinforcement learning is watched by, over steps.

use std::path::Path;

use m1_infer::files;
use plotters::prelude::*;

use crate::metrics::{RlMetrics, StepMetrics};

const SIZE: (u32, u32) = (960, 540);
const RAW: RGBColor = RGBColor(158, 188, 218);
const SMOOTH: RGBColor = RGBColor(31, 78, 140);
const INK: RGBColor = RGBColor(60, 60, 60);
/// More points than this make the file large and the line no finer.
const POINTS: usize = 1500;

/// Why a plot could not be drawn or written.
#[derive(Debug, thiserror::Error)]
pub enum PlotError {
    /// The drawing library refused.
    #[error("plot: {0}")]
    Draw(String),
    /// The file could not be written.
    #[error("{path}: {source}")]
    Write {
        /// The file.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
}

/// Writes the plot to `path`; fewer than two steps draw nothing.
pub fn loss_svg(path: &Path, title: &str, history: &[StepMetrics]) -> Result<(), PlotError> {
    if history.len() < 2 {
        return Ok(());
    }
    let mut svg = String::new();
    draw(&mut svg, title, history).map_err(|e| PlotError::Draw(e.to_string()))?;
    write(path, &svg)
}

/// Writes reward, pass rate (held-out where there are evaluations), entropy and response length to `path`; fewer than two
/// steps draw nothing.
pub fn rl_svg(path: &Path, title: &str, history: &[RlMetrics]) -> Result<(), PlotError> {
    if history.len() < 2 {
        return Ok(());
    }
    let mut svg = String::new();
    draw_rl(&mut svg, title, history).map_err(|e| PlotError::Draw(e.to_string()))?;
    write(path, &svg)
}

fn write(path: &Path, svg: &str) -> Result<(), PlotError> {
    files::write(path, svg.as_bytes()).map_err(|source| PlotError::Write { path: path.display().to_string(), source })
}

fn draw_rl(svg: &mut String, title: &str, history: &[RlMetrics]) -> Result<(), Box<dyn std::error::Error>> {
    type Curve = (&'static str, fn(&RlMetrics) -> Option<f64>);
    let evaluated = history.iter().filter(|m| m.eval_pass_rate.is_some()).count() > 1;
    let pass_rate: Curve = match evaluated {
        true => ("held-out pass rate", |m| m.eval_pass_rate),
        false => ("pass rate in training", |m| Some(m.pass_rate)),
    };
    let curves: [Curve; 4] = [
        ("reward", |m| Some(m.reward)),
        pass_rate,
        ("entropy (nats per token)", |m| Some(m.entropy)),
        ("response length (tokens)", |m| Some(m.response_length_mean)),
    ];
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let root = root.titled(title, ("sans-serif", 20).into_font().color(&INK))?;
    let (first, last) = (history[0].step as f64, history[history.len() - 1].step as f64);
    for ((name, curve), area) in curves.into_iter().zip(root.split_evenly((2, 2))) {
        let value = |m: &RlMetrics| Some((m.step as f64, curve(m).filter(|v| v.is_finite())?));
        let raw: Vec<(f64, f64)> = history.iter().filter_map(value).collect();
        let low = raw.iter().map(|p| p.1).fold(f64::MAX, f64::min);
        let high = raw.iter().map(|p| p.1).fold(f64::MIN, f64::max);
        if raw.is_empty() {
            continue;
        }
        let room = if high > low { (high - low) * 0.05 } else { high.abs().max(1.0) * 0.05 };
        let mut chart = ChartBuilder::on(&area)
            .margin(12)
            .caption(name, ("sans-serif", 15).into_font().color(&INK))
            .x_label_area_size(26)
            .y_label_area_size(52)
            .build_cartesian_2d(first..last, low - room..high + room)?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(RGBColor(232, 232, 232))
            .axis_style(RGBColor(170, 170, 170))
            .label_style(("sans-serif", 12).into_font().color(&INK))
            .x_labels(6)
            .y_labels(5)
            .x_label_formatter(&|v| format!("{v:.0}"))
            .draw()?;
        let stride = raw.len().div_ceil(POINTS);
        // A few evaluations are a curve of their own; of many steps the mean is seen better.
        let smooth = if raw.len() > 100 { running_mean(&raw) } else { raw.clone() };
        let end = smooth[smooth.len() - 1];
        chart.draw_series(LineSeries::new(raw.iter().step_by(stride).copied(), RAW.stroke_width(1)))?;
        let line = smooth.iter().step_by(stride).copied().chain([end]);
        chart.draw_series(LineSeries::new(line, SMOOTH.stroke_width(2)))?;
    }
    root.present()?;
    Ok(())
}

fn draw(svg: &mut String, title: &str, history: &[StepMetrics]) -> Result<(), Box<dyn std::error::Error>> {
    let smooth = smoothed(history);
    let raw: Vec<(f64, f64)> = history.iter().map(point).collect();
    let stride = history.len().div_ceil(POINTS);
    let last = smooth[smooth.len() - 1];
    let finite = |v: &f64| v.is_finite() && *v > 0.0;
    let low = raw.iter().map(|p| p.1).filter(finite).fold(f64::MAX, f64::min);
    let high = raw.iter().map(|p| p.1).filter(finite).fold(f64::MIN, f64::max);
    let end = last.0.max(f64::EPSILON);

    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .margin(18)
        .caption(title, ("sans-serif", 20).into_font().color(&INK))
        .x_label_area_size(46)
        .y_label_area_size(58)
        .build_cartesian_2d(
            0.0..end,
            (low * 0.9..high * 1.1).log_scale().with_key_points(ticks(low * 0.9, high * 1.1)),
        )?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(RGBColor(232, 232, 232))
        .axis_style(RGBColor(170, 170, 170))
        .label_style(("sans-serif", 14).into_font().color(&INK))
        .axis_desc_style(("sans-serif", 15).into_font().color(&INK))
        .x_desc("tokens seen (millions)")
        .y_desc("cross-entropy of the reply (nats per token)")
        .x_label_formatter(&|v| {
            if end < 2.0 { format!("{v:.2}") } else { format!("{v:.0}") }
        })
        .y_label_formatter(&|v| v.to_string())
        .draw()?;
    chart
        .draw_series(LineSeries::new(raw.iter().step_by(stride).copied(), RAW.stroke_width(1)))?
        .label("each step")
        .legend(|(x, y)| PathElement::new([(x, y), (x + 22, y)], RAW.stroke_width(1)));
    chart
        .draw_series(LineSeries::new(smooth.iter().step_by(stride).copied().chain([last]), SMOOTH.stroke_width(2)))?
        .label(format!("running mean, last {:.4}", last.1))
        .legend(|(x, y)| PathElement::new([(x, y), (x + 22, y)], SMOOTH.stroke_width(2)));
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .margin(12)
        .border_style(RGBColor(210, 210, 210))
        .background_style(WHITE.mix(0.9))
        .label_font(("sans-serif", 15).into_font().color(&INK))
        .draw()?;
    root.present()?;
    Ok(())
}

fn point(m: &StepMetrics) -> (f64, f64) {
    (m.tokens as f64 / 1e6, m.loss)
}

/// 1, 2 and 5 times the powers of ten within a range: plotters marks only the powers, which a narrow range may lack.
fn ticks(low: f64, high: f64) -> Vec<f64> {
    let all = (-9..9).flat_map(|power| ["1", "2", "5"].map(|digit| format!("{digit}e{power}")));
    // By text, so that 2e-1 is the nearest number to 0.2 and prints as such.
    all.filter_map(|text| text.parse().ok()).filter(|v| (low..=high).contains(v)).collect()
}

fn smoothed(history: &[StepMetrics]) -> Vec<(f64, f64)> {
    running_mean(&history.iter().map(point).collect::<Vec<_>>())
}

/// An exponential mean over about 1 % of the run, unbiased at its start.
fn running_mean(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let keep = 1.0 - 1.0 / (points.len() as f64 / 100.0).max(5.0);
    let (mut sum, mut weight) = (0.0, 0.0);
    let mut line = Vec::with_capacity(points.len());
    for &(x, y) in points {
        sum = keep * sum + y;
        weight = keep * weight + 1.0;
        line.push((x, sum / weight));
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn history(n: u64, loss: impl Fn(u64) -> f64) -> Vec<StepMetrics> {
        let step = |step| StepMetrics {
            step,
            tokens: step * 4096,
            loss: loss(step),
            aux_loss: 0.0,
            lr: 0.0,
            grad_norm: 0.0,
            tokens_per_s: 0.0,
            elapsed_s: 0.0,
            expert_load_max: 1.0,
            expert_load_min: 1.0,
        };
        (1..=n).map(step).collect()
    }

    #[test]
    fn the_running_mean_of_a_constant_is_the_constant() {
        for (_, y) in smoothed(&history(400, |_| 0.7)) {
            assert!((y - 0.7).abs() < 1e-12);
        }
    }

    #[test]
    fn ticks_are_round_numbers() {
        let texts: Vec<String> = ticks(0.03, 3.0).iter().map(f64::to_string).collect();
        assert_eq!(texts, ["0.05", "0.1", "0.2", "0.5", "1", "2"]);
    }

    #[test]
    fn writes_an_svg_with_both_lines_and_no_temporary_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("loss.svg");
        loss_svg(&path, "a run", &history(5000, |s| 7.0 / (s as f64).sqrt())).unwrap();
        let svg = fs::read_to_string(&path).unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        assert!(svg.contains("running mean, last 0."), "legend");
        assert!(svg.matches("<polyline").count() >= 2, "two lines");
        assert!(svg.len() < 120_000, "{} bytes", svg.len());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn writes_four_charts_and_leaves_out_what_was_not_measured() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rl.svg");
        let row = |step| RlMetrics {
            step,
            reward: if step == 7 { f64::NAN } else { step as f64 / 3000.0 },
            pass_rate: 0.5,
            eval_pass_rate: step.is_multiple_of(50).then_some(step as f64 / 4000.0),
            response_length_mean: 100.0 + step as f64 / 10.0,
            ..RlMetrics::default()
        };
        rl_svg(&path, "a run", &(1..=3000).map(row).collect::<Vec<_>>()).unwrap();
        let svg = fs::read_to_string(&path).unwrap();
        assert!(svg.trim_end().ends_with("</svg>") && !svg.contains("NaN"));
        assert!(svg.contains("held-out pass rate") && svg.contains("response length"));
        assert!(!svg.contains("entropy"), "never measured");
        assert!(svg.len() < 400_000, "{} bytes", svg.len());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
