//! `m1 bench`: tokens a second, in the table that llama-bench made familiar.
//!
//! A test runs through the same forward pass as the engine: a prompt in the engine's chunks, then tokens one at a time.
//! Logits are made where the engine makes them (after a prompt's last token, after every token of a decode) and
//! read back to the host, which also waits for a device that works asynchronously.

mod subject;

use self::subject::{Layers, Subject};
use super::common::{HubArgs, WeightArgs, whole};
use crate::batching::lanes::Most;
use crate::engine::{EngineError, PREFILL_CHUNK, to_host};
use crate::interrupt::{self, Busy};
use crate::parallel::on_pool;
use crate::statistics::{deviation, mean};
use anyhow::ensure;
use m1_kernels::base::pool;
use m1_model::checkpoint::WeightDtype;
use m1_model::device::OpenDevice;
use m1_model::{Batch, Cache, M1, ModelConfig, Snapshot, Trace, flops};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

/// Tokens of a decode's warm-up.
const WARM_UP: usize = 8;

/// Flags of `m1 bench`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  m1 bench --model DIR
  m1 bench --model DIR -p 512,2048,8192 -n 128 -d 0,4096,16384
  m1 bench --model DIR --dtype bf16 -p 0 -n 64 -r 5        (decode only)
  m1 bench --model DIR -p 0 --parallel 1,4,16              (what batching brings)
  m1 bench --model DIR --json | jq '.[] | [.test, .avg_ts]'
  m1 bench --random base --quantize int8                   (no checkpoint: random weights of these sizes)
  m1 bench --random M1 --layers lightning -p 0 -n 16       (M1: the directory of MiniMax-M1's config.json)

pp512 reads a prompt of 512 tokens; tg128 feeds 128 tokens one at a time; @ d4096 does so behind 4096 others; x16 to 16
texts at once. Token ids are random. A depth is filled once and taken up again for every repetition. t/s, of all texts
together, is the mean over the repetitions ± their standard deviation; GB/s is that of the weights a token reads alone
(embedding: one row; experts: those it visits) and GFLOP/s counts 2 a multiply-add, without embedding and head. Ctrl-C ends with what has been measured.

--random holds bf16 unless --dtype or --quantize says otherwise. With --layers the vocabulary is cut to 1024 ids: what is
left to time is layers, and layer-t/s is t/s times their number. One lightning layer of M1 takes 11.4 GB in bf16.")]
pub struct Args {
    /// Checkpoint in Hugging Face form: its directory, or an id of the hub, owner/name[@revision]
    #[arg(long, short, value_name = "DIR|ID", required_unless_present = "random")]
    model: Option<PathBuf>,
    #[command(flatten)]
    hub: HubArgs,
    /// Instead of --model: random weights of a configuration: nano, small, base, a config.json or a directory with one
    #[arg(long, value_name = "CONFIG", conflicts_with = "model")]
    random: Option<PathBuf>,
    /// With --random: so many of its layers from the first on, or one of each kind named (lightning,softmax,…)
    #[arg(long, value_name = "N|KIND,…", requires = "random")]
    layers: Option<Layers>,
    #[command(flatten)]
    weights: WeightArgs,
    /// Tokens of the prompts to read; 0 leaves this test out
    #[arg(long = "n-prompt", short = 'p', value_name = "N,…", default_value = "512", value_delimiter = ',',
        allow_negative_numbers = true, value_parser = whole::<usize>)]
    prompts: Vec<usize>,
    /// Tokens to decode; 0 leaves this test out
    #[arg(long = "n-gen", short = 'n', value_name = "N,…", default_value = "128", value_delimiter = ',',
        allow_negative_numbers = true, value_parser = whole::<usize>)]
    decodes: Vec<usize>,
    /// Tokens that stand in the cache before each test
    #[arg(long = "n-depth", short = 'd', value_name = "N,…", default_value = "0", value_delimiter = ',',
        allow_negative_numbers = true, value_parser = whole::<usize>)]
    depths: Vec<usize>,
    /// Texts that are decoded together
    #[arg(long, value_name = "N,…", default_value = "1", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..))]
    parallel: Vec<u16>,
    /// Repetitions of each test
    #[arg(long, short, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..))]
    repetitions: u16,
    /// Tokens of a prompt read in one pass [default: as the engine does]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    chunk: Option<u32>,
    /// Threads on the CPU [default: one a core]
    #[arg(long, short, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Start each test cold
    #[arg(long)]
    no_warmup: bool,
    /// What to write to standard output: a Markdown table, a JSON array or one JSON object a line
    #[arg(long, short, value_enum, default_value_t = Output::Md)]
    output: Output,
    /// The same as --output json
    #[arg(long)]
    json: bool,
}

impl Args {
    /// Threads on the CPU.
    pub fn threads(&self) -> usize {
        self.threads.map_or_else(pool::threads, usize::from)
    }
}

/// Forms of the results.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Output {
    Md,
    Json,
    Jsonl,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let tests = tests(&args.prompts, &args.decodes, &args.depths, &args.parallel);
    ensure!(!tests.is_empty(), "nothing to measure: give -p or -n a number above 0");
    let (model, random) = (args.model.as_deref(), args.random.as_deref());
    let subject = Subject::new(model, &args.hub, random, args.layers.as_ref(), &args.weights)?;
    let device = args.weights.open_device()?;
    if !device.is_cpu {
        ensure!(args.threads.is_none(), "--threads counts on the CPU only; add --device cpu");
        return measure(args, subject, tests, device, None);
    }
    let threads = args.threads();
    pool::with_threads(threads, || measure(args, subject, tests, device, Some(threads)))
}

/// Measures with so many threads, where they are the CPU's.
fn measure(
    args: Args,
    subject: Subject,
    tests: Vec<Test>,
    device: OpenDevice,
    threads: Option<usize>,
) -> anyhow::Result<()> {
    let model = subject.load(&device, &args.weights.settings(None))?;
    let about = About {
        model: subject.name(),
        random: subject.is_random(),
        layers: model.config().num_hidden_layers,
        cut: args.layers.is_some(),
        size: model.weight_bytes().into(),
        parameters: flops::parameters(model.config()),
        dtype: model.form(),
        kv_dtype: model.kv_dtype(),
        device: if device.is_cpu { "CPU".into() } else { device.name },
        threads,
        chunk: args.chunk.map_or(PREFILL_CHUNK, |n| n as usize),
        token_bytes: model.token_bytes().into(),
    };

    let output = if args.json { Output::Json } else { args.output };
    let mut report = Report::begin(output, &about)?;
    let mut bench = Bench {
        model: &model,
        chunk: about.chunk,
        // Every chunk size of a prompt is another kernel to be made ready on a GPU; on the CPU two of them warm all.
        warm_up: if args.no_warmup {
            0
        } else if device.is_cpu {
            2 * about.chunk
        } else {
            usize::MAX
        },
        repetitions: args.repetitions.into(),
        random: ChaCha8Rng::seed_from_u64(1),
        busy: Busy::begin(),
    };
    let (mut filled, mut stopped) = (None, false);
    for (i, &test) in tests.iter().enumerate() {
        note!("[{}/{}] {}", i + 1, tests.len(), test.name());
        let mut seconds = Vec::new();
        let halt = bench.measure(test, &mut filled, &mut seconds).err();
        if !seconds.is_empty() {
            report.add(&Measured::new(model.config(), test, seconds))?;
        }
        match halt {
            None => {}
            Some(Halt::Failed(error)) => return Err(error.into()),
            Some(Halt::Stopped) => {
                stopped = true;
                break;
            }
        }
    }
    report.end()?;
    if stopped {
        std::process::exit(interrupt::EXIT_STATUS);
    }
    Ok(())
}

/// What is timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Test {
    /// Tokens of each text that are timed.
    tokens: usize,
    /// Whether they come one at a time.
    decode: bool,
    /// Texts.
    rows: usize,
    /// Tokens before them.
    depth: usize,
}

impl Test {
    /// As llama-bench calls it, and how many texts there are where it is not one.
    fn name(self) -> String {
        let kind = if self.decode { "tg" } else { "pp" };
        let rows = if self.rows == 1 { String::new() } else { format!(" x{}", self.rows) };
        let depth = if self.depth == 0 { String::new() } else { format!(" @ d{}", self.depth) };
        format!("{kind}{}{rows}{depth}", self.tokens)
    }

    /// Tokens that are timed, of all texts.
    fn all_tokens(self) -> usize {
        self.tokens * self.rows
    }
}

/// All tests, depth by depth.
fn tests(prompts: &[usize], decodes: &[usize], depths: &[usize], parallel: &[u16]) -> Vec<Test> {
    let mut all = Vec::new();
    for &depth in depths {
        let prompts = prompts.iter().map(|&tokens| Test { tokens, decode: false, rows: 1, depth });
        let decodes = (parallel.iter()).flat_map(|&rows| {
            decodes.iter().map(move |&tokens| Test { tokens, decode: true, rows: rows.into(), depth })
        });
        all.extend(prompts.chain(decodes).filter(|test| test.tokens > 0));
    }
    all
}

/// Why a measurement ended early.
enum Halt {
    /// Ctrl-C.
    Stopped,
    /// The device.
    Failed(EngineError),
}

/// The model under test.
struct Bench<'a> {
    model: &'a M1,
    chunk: usize,
    /// The most tokens of a prompt's warm-up.
    warm_up: usize,
    repetitions: usize,
    random: ChaCha8Rng,
    busy: Busy,
}

impl Bench<'_> {
    /// Adds the seconds of each repetition. `filled` is the cache at the last test's depth, and then at this one's.
    fn measure(&mut self, test: Test, filled: &mut Option<Snapshot>, seconds: &mut Vec<f64>) -> Result<(), Halt> {
        let start = self.fill(test.depth, filled)?;
        // As the engine would share the rows out.
        let lanes = Most::of(self.model).lanes_for(test.rows);
        let rows = |lane: usize| test.rows * (lane + 1) / lanes - test.rows * lane / lanes;
        let new = |lane| Cache::new(self.model, rows(lane));
        let mut caches: Vec<Cache> = (0..lanes).map(new).collect();
        let again = |caches: &mut [Cache]| {
            caches.iter_mut().for_each(|cache| (0..cache.rows()).for_each(|row| cache.restore(row, &start)));
        };
        let warm_up = if test.decode { WARM_UP } else { usize::MAX }.min(self.warm_up).min(test.tokens);
        if warm_up > 0 {
            again(&mut caches);
            self.read(&mut caches, warm_up, test.decode)?;
        }
        for repetition in 1..=self.repetitions {
            again(&mut caches);
            let taken = self.read(&mut caches, test.tokens, test.decode)?;
            note!("    {repetition}/{}: {:.2} t/s", self.repetitions, test.all_tokens() as f64 / taken);
            seconds.push(taken);
        }
        Ok(())
    }

    /// The cache with `depth` random tokens in it, going on from `filled` where that is not deeper.
    fn fill(&mut self, depth: usize, filled: &mut Option<Snapshot>) -> Result<Snapshot, Halt> {
        let mut cache = Cache::new(self.model, 1);
        if let Some(before) = filled.as_ref().filter(|before| before.tokens().len() <= depth) {
            cache.restore(0, before);
        }
        let missing = depth - cache.len(0);
        if missing > 0 {
            note!("    filling the cache: {missing} tokens");
            self.read(std::slice::from_mut(&mut cache), missing, false)?;
        }
        Ok(filled.insert(cache.snapshot(0)).clone())
    }

    /// Runs `tokens` random tokens a row through the model as the engine would, each cache on a thread where there are several,
    /// and says how many seconds that took.
    fn read(&mut self, caches: &mut [Cache], tokens: usize, decode: bool) -> Result<f64, Halt> {
        let vocab = self.model.config().vocab_size as u32;
        let mut random = || (0..tokens).map(|_| self.random.random_range(0..vocab)).collect::<Vec<u32>>();
        let ids: Vec<Vec<Vec<u32>>> =
            caches.iter().map(|cache| (0..cache.rows()).map(|_| random()).collect()).collect();
        let start = Instant::now();
        let mut read = 0;
        while read < tokens {
            if self.busy.stopped() {
                return Err(Halt::Stopped);
            }
            let piece = read..tokens.min(read + if decode { 1 } else { self.chunk });
            read = piece.end;
            let wants_logits = decode || read == tokens;
            let model = self.model;
            let step = |cache: &mut Cache, ids: &[Vec<u32>]| {
                let batch = Batch::new(ids.iter().map(|ids| ids[piece.clone()].to_vec()).collect());
                let batch = if wants_logits { batch.last() } else { batch.none() };
                let hidden = model.forward(&batch, Some(cache), &mut Trace::none());
                if wants_logits { to_host(model.logits(hidden)).map(drop) } else { Ok(()) }
            };
            let steps = on_pool(caches.iter_mut().zip(&ids), |(cache, ids)| step(cache, ids));
            steps.into_iter().collect::<Result<(), _>>().map_err(Halt::Failed)?;
        }
        Ok(start.elapsed().as_secs_f64())
    }
}

/// What all rows of the table share.
struct About {
    model: String,
    random: bool,
    layers: usize,
    /// Whether the layers are not all that the configuration has.
    cut: bool,
    size: u128,
    parameters: u128,
    dtype: String,
    kv_dtype: WeightDtype,
    device: String,
    /// None off the CPU.
    threads: Option<usize>,
    chunk: usize,
    token_bytes: u128,
}

/// One row of the table.
struct Measured {
    test: Test,
    seconds: Vec<f64>,
    /// Tokens a second, of each repetition.
    rates: Vec<f64>,
    /// FLOPs of one repetition.
    flops: u128,
}

impl Measured {
    fn new(config: &ModelConfig, test: Test, seconds: Vec<f64>) -> Self {
        let contexts = test.depth..test.depth + test.tokens;
        Self {
            test,
            rates: seconds.iter().map(|s| test.all_tokens() as f64 / s).collect(),
            seconds,
            flops: contexts.map(|context| flops::flops_per_token(config, context)).sum(),
        }
    }

    /// Decode of one text: GB/s of weights. Several share some of them.
    fn gigabytes(&self, about: &About) -> Option<f64> {
        (self.test.decode && self.test.rows == 1).then(|| mean(&self.rates) * about.token_bytes as f64 / 1e9)
    }

    /// Prefill: GFLOP/s.
    fn gigaflops(&self) -> Option<f64> {
        let per_token = self.flops as f64 / self.test.tokens as f64;
        (!self.test.decode).then(|| mean(&self.rates) * per_token / 1e9)
    }

    /// With llama-bench's keys where it has one.
    fn json(&self, about: &About) -> Value {
        let nanoseconds: Vec<f64> = self.seconds.iter().map(|s| (s * 1e9).round()).collect();
        let (prompt, generated) = if self.test.decode { (0, self.test.tokens) } else { (self.test.tokens, 0) };
        json!({
            "model_filename": about.model,
            "model_size": u64::try_from(about.size).unwrap_or(u64::MAX),
            "model_n_params": u64::try_from(about.parameters).unwrap_or(u64::MAX),
            "random_weights": about.random,
            "layers": about.layers,
            "dtype": about.dtype,
            "type_k": about.kv_dtype.to_string(),
            "type_v": about.kv_dtype.to_string(),
            "device": about.device,
            "n_threads": about.threads,
            "n_ubatch": about.chunk,
            "test": self.test.name(),
            "n_prompt": prompt,
            "n_gen": generated,
            "n_parallel": self.test.rows,
            "n_depth": self.test.depth,
            "avg_ns": mean(&nanoseconds).round(),
            "stddev_ns": deviation(&nanoseconds).round(),
            "avg_ts": mean(&self.rates),
            "stddev_ts": deviation(&self.rates),
            "avg_layer_ts": mean(&self.rates) * about.layers as f64,
            "samples_ns": nanoseconds,
            "samples_ts": self.rates,
            "weight_bytes_per_token": u64::try_from(about.token_bytes).unwrap_or(u64::MAX),
            "weight_gb_per_s": self.gigabytes(about),
            "gflop_per_s": self.gigaflops(),
        })
    }
}

/// Writes results to standard output as they come.
struct Report<'a> {
    output: Output,
    about: &'a About,
    rows: usize,
}

/// Heads of the table and the least width of a column; a negative width is aligned to the left.
const COLUMNS: [(&str, i32); 12] = [
    ("model", -12),
    ("size", 10),
    ("params", 9),
    ("dtype", -5),
    ("device", -6),
    ("threads", 7),
    ("test", -14),
    ("t/s", 18),
    ("MB/token", 9),
    ("GB/s", 7),
    ("GFLOP/s", 9),
    ("layer-t/s", 9), // of a model with less than all its layers
];

impl<'a> Report<'a> {
    fn begin(output: Output, about: &'a About) -> std::io::Result<Self> {
        let report = Self { output, about, rows: 0 };
        match output {
            Output::Md => {
                report.line(&COLUMNS.map(|(head, _)| head.to_string()))?;
                let rule = |(head, width): (&str, i32)| {
                    let dashes = "-".repeat(report.wide(head, width));
                    if width < 0 { dashes } else { dashes[1..].to_string() + ":" }
                };
                report.line(&COLUMNS.map(rule))?;
            }
            Output::Json => print("[")?,
            Output::Jsonl => {}
        }
        Ok(report)
    }

    /// Characters of a column: a model's name is known before the first line.
    fn wide(&self, head: &str, width: i32) -> usize {
        let least = if head == "model" { self.about.model.chars().count() } else { 0 };
        least.max(width.unsigned_abs() as usize)
    }

    fn line(&self, cells: &[String; COLUMNS.len()]) -> std::io::Result<()> {
        let mut text = String::from("|");
        let shown = if self.about.cut { COLUMNS.len() } else { COLUMNS.len() - 1 };
        for (cell, (head, width)) in cells[..shown].iter().zip(COLUMNS) {
            let wide = self.wide(head, width);
            text += &if width < 0 { format!(" {cell:<wide$} |") } else { format!(" {cell:>wide$} |") };
        }
        print(&(text + "\n"))
    }

    fn add(&mut self, measured: &Measured) -> std::io::Result<()> {
        let about = self.about;
        self.rows += 1;
        match self.output {
            Output::Json => print(&format!("{}\n {}", if self.rows == 1 { "" } else { "," }, measured.json(about))),
            Output::Jsonl => print(&format!("{}\n", measured.json(about))),
            Output::Md => {
                let or_dash = |x: Option<f64>, digits| x.map_or("-".into(), |x| format!("{x:.digits$}"));
                let mb = measured.test.decode.then_some(about.token_bytes as f64 / 1e6);
                self.line(&[
                    about.model.clone(),
                    format!("{:.2} MiB", about.size as f64 / (1 << 20) as f64),
                    format!("{:.2} M", about.parameters as f64 / 1e6),
                    about.dtype.clone(),
                    about.device.clone(),
                    about.threads.map_or("-".into(), |n| n.to_string()),
                    measured.test.name(),
                    format!("{:.2} ± {:.2}", mean(&measured.rates), deviation(&measured.rates)),
                    or_dash(mb, 2),
                    or_dash(measured.gigabytes(about), 2),
                    or_dash(measured.gigaflops(), 1),
                    format!("{:.2}", mean(&measured.rates) * about.layers as f64),
                ])
            }
        }
    }

    fn end(self) -> std::io::Result<()> {
        if self.output == Output::Json { print("\n]\n") } else { Ok(()) }
    }
}

/// To standard output at once: rows are waited for.
fn print(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_reads_what_the_configuration_counts() {
        // Active parameters with the head, and one row of the embedding.
        for (name, active, hidden) in
            [("nano", 2_268_160, 128), ("small", 74_276_352, 512), ("base", 312_916_992, 1024)]
        {
            let model = M1::new(&ModelConfig::preset(name).unwrap(), &burn::tensor::Device::flex());
            assert_eq!(model.token_bytes(), 4 * (active + hidden), "{name}");
        }
        // M1 itself, the head included, as `flops` counts it from the configuration; nothing is drawn for this.
        let m1 = ModelConfig::from_json(include_str!("../../../model/tests/data/config.json")).unwrap();
        let weights = flops::active_parameters(&m1) + 200_064 * 6144 + 6144;
        let model = M1::new(&m1, &burn::tensor::Device::flex());
        assert_eq!(u128::from(model.token_bytes()), 4 * weights);
        assert_eq!(u128::from(model.weight_bytes()), 4 * flops::parameters(&m1));
    }

    #[test]
    fn names_and_order() {
        let names: Vec<String> = tests(&[512, 0], &[128], &[0, 4096], &[1]).into_iter().map(Test::name).collect();
        assert_eq!(names, ["pp512", "tg128", "pp512 @ d4096", "tg128 @ d4096"]);
        let together: Vec<String> = tests(&[8], &[64], &[0, 9], &[1, 16]).into_iter().map(Test::name).collect();
        assert_eq!(together, ["pp8", "tg64", "tg64 x16", "pp8 @ d9", "tg64 @ d9", "tg64 x16 @ d9"]);
        assert!(tests(&[0], &[0], &[0], &[1]).is_empty());
    }

    #[test]
    fn prefill_counts_the_context_of_every_token() {
        let config = ModelConfig::preset("nano").unwrap();
        let test = Test { tokens: 3, decode: false, rows: 1, depth: 10 };
        let measured = Measured::new(&config, test, vec![0.5]);
        let at = |context| flops::flops_per_token(&config, context);
        assert_eq!(measured.flops, at(10) + at(11) + at(12));
        assert!((measured.gigaflops().unwrap() - measured.flops as f64 / 0.5 / 1e9).abs() < 1e-9);
    }
}
