//! `m1 inspect`: what a checkpoint is and what running it takes, from its configuration and names alone. A directory
//! with only a `config.json` and an index will do.

use std::io::Write;
use std::path::PathBuf;

use super::common::HubArgs;
use crate::hub::{self, Need};
use anyhow::bail;
use m1_model::checkpoint::{Bits, Comparison, Directory, Quantization, WeightDtype};
use m1_model::config::{AttentionKind, ModelConfig};
use m1_model::device::DeviceChoice;
use m1_model::flops;
use serde_json::{Map, Value, json};

/// Options of `m1 inspect`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  m1 inspect --model examples/m1-nano
  m1 inspect --model MiniMaxAI/MiniMax-M1-40k      (fetches configuration and index, no shard)
  m1 inspect --model DIR --context 131072 --json | jq .fits

Reads no weights. Where the directory lists its tensors (an index or model.safetensors), the exit
status is 1 if any is missing or unexpected, if only some of the files are there or, with all there,
if a header is wrong. A bare config.json, or an index without any of its files, is fine.")]
pub struct Args {
    /// Checkpoint directory (config.json and model.safetensors.index.json will do), or a Hugging Face id, owner/name
    #[arg(short, long, value_name = "DIR|ID")]
    model: PathBuf,
    #[command(flatten)]
    hub: HubArgs,
    /// Accepted as by every command; nothing is opened or run
    #[arg(long, value_name = "DEVICE", default_value_t = DeviceChoice::Auto, hide = true)]
    device: DeviceChoice,
    /// One JSON object on stdout, every number a plain integer, names in full
    #[arg(long)]
    json: bool,
    /// Tokens of context at which cache, memory and FLOPs are given
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = clap::value_parser!(u64).range(..=1_000_000_000))]
    context: u64,
    /// Dimensions of a head that RoPE turns, above what the configuration says
    #[arg(long, value_name = "N")]
    rotary_dim: Option<usize>,
}

/// Prints the report; an error if the checkpoint is not what its configuration says.
pub fn run(args: Args) -> anyhow::Result<()> {
    let path = hub::directory(&args.model, Need::Description, args.hub.offline)?;
    let directory = Directory::open(&path, args.rotary_dim)?;
    let comparison = directory.compare();
    // With every shard there, their headers are checked too; an index may also stand alone.
    let (listed, present) = (directory.files().len(), present(&directory));
    let complete = directory.has_weights() && present == listed;
    let sound = comparison.missing.is_empty() && comparison.unexpected.is_empty();
    let stored = if complete && sound { Some(directory.verify()?) } else { None };

    let report = report(&args, &directory, &comparison, stored);
    let text = if args.json { format!("{report:#}\n") } else { table(&report) };
    std::io::stdout().write_all(text.as_bytes())?;
    if directory.has_weights() && !sound {
        let (missing, unexpected) = (comparison.missing.len(), comparison.unexpected.len());
        let tensors = if missing == 1 { "tensor" } else { "tensors" };
        bail!("{}: {missing} {tensors} missing, {unexpected} unexpected", directory.listed_in().display());
    }
    if present > 0 && present < listed {
        let files = directory.files();
        let absent: Vec<_> = files.iter().filter(|file| !file.exists()).filter_map(|file| file.file_name()).collect();
        let mut names: Vec<_> = absent.iter().take(5).map(|name| name.to_string_lossy()).collect();
        if absent.len() > names.len() {
            names.push(format!("{} more", absent.len() - names.len()).into());
        }
        let (listed_in, names) = (directory.listed_in().display(), names.join(", "));
        bail!("{listed_in}: only {present} of {listed} files are there; missing: {names}");
    }
    Ok(())
}

/// How many of the listed files are there.
fn present(directory: &Directory) -> usize {
    directory.files().iter().filter(|file| file.exists()).count()
}

/// Memory that people have: devices of one kind, and gigabytes (10⁹ bytes, which leaves a little of it to the runtime).
const MACHINES: [(&str, u64, u64); 9] = [
    ("1 × 16 GB", 1, 16),
    ("1 × 24 GB (RTX 4090)", 1, 24),
    ("1 × 80 GB (H800, H100)", 1, 80),
    ("1 × 141 GB (H200)", 1, 141),
    ("4 × 80 GB", 4, 80),
    ("8 × 80 GB", 8, 80),
    ("8 × 96 GB (H20)", 8, 96),
    ("8 × 141 GB", 8, 141),
    ("16 × 80 GB", 16, 80),
];

/// Weights that share a scale in the sizes given here, as in `m1 quantize` without `--block`.
const BLOCK: usize = super::common::DEFAULT_BLOCK;

/// Every form that weights can be held in, with its bytes.
fn forms(config: &ModelConfig) -> Vec<(&'static str, u64)> {
    let mut forms = vec![
        ("f32", integer(flops::weight_bytes(config, WeightDtype::F32))),
        ("bf16", integer(flops::weight_bytes(config, WeightDtype::Bf16))),
    ];
    for (key, bits, all) in [
        ("int8_experts", Bits::Int8, false),
        ("int8_all", Bits::Int8, true),
        ("int4_experts", Bits::Int4, false),
        ("int4_all", Bits::Int4, true),
    ] {
        let quantization = Quantization::new(bits, BLOCK, all).ok().filter(|q| q.undivided(config).is_none());
        if let Some(quantization) = quantization {
            forms.push((key, integer(flops::quantized_bytes(config, WeightDtype::Bf16, &quantization))));
        }
    }
    forms
}

fn report(args: &Args, directory: &Directory, comparison: &Comparison, stored: Option<u64>) -> Value {
    let config = directory.config();
    let context = args.context as usize;
    let cache = flops::cache_bytes(config, context, WeightDtype::F32);
    let kind = if directory.is_hugging_face() { m1_model::checkpoint::HF_MODEL_TYPE } else { &config.model_type };
    let both = |bytes: &dyn Fn(WeightDtype) -> u128| json!({ "f32": integer(bytes(WeightDtype::F32)), "bf16": integer(bytes(WeightDtype::Bf16)) });
    let forms = forms(config);
    let weights: Map<String, Value> = forms.iter().map(|(key, bytes)| (key.to_string(), json!(bytes))).collect();
    let fits = MACHINES.map(|(name, devices, gigabytes)| {
        let room = u128::from(devices * gigabytes) * 1_000_000_000;
        let fitting = forms.iter().filter(|(_, bytes)| u128::from(*bytes) + cache <= room);
        let fitting: Vec<_> = fitting.map(|(key, _)| *key).collect();
        json!({ "name": name, "devices": devices, "bytes": integer(room), "weights": fitting })
    });
    json!({
        "model": args.model.display().to_string(),
        "model_type": kind,
        "layers": {
            "lightning": config.layers_of(AttentionKind::Lightning),
            "softmax": config.layers_of(AttentionKind::Softmax),
        },
        "parameters": integer(flops::parameters(config)),
        "active_parameters": integer(flops::active_parameters(config)),
        "tensors": {
            "listed": directory.has_weights(),
            "expected": comparison.expected,
            "found": comparison.found,
            "missing": comparison.missing,
            "unexpected": comparison.unexpected,
        },
        "files": { "listed": directory.files().len(), "present": present(directory) },
        "quantization": directory.quantization().map(|quantization| quantization.to_json()),
        "weight_bytes": with(json!({ "stored": stored }), weights),
        "cache_bytes_per_sequence": integer(flops::state_bytes(config)),
        "cache_bytes_per_token": both(&|dtype| flops::kv_bytes_per_token(config, dtype)),
        "context": context,
        // The engine keeps keys and values in f32, whatever the weights are in.
        "cache_bytes_at_context": integer(cache),
        "flops_per_token": integer(flops::flops_per_token(config, context)),
        "device_memory_bytes": both(&|dtype| {
            flops::weight_bytes(config, dtype) + cache
        }),
        "fits": fits,
    })
}

/// An object with more keys.
fn with(mut object: Value, more: Map<String, Value>) -> Value {
    if let Some(keys) = object.as_object_mut() {
        keys.extend(more);
    }
    object
}

/// JSON's integers are 64 bits wide; no valid configuration reaches their end at a context that `--context` takes.
fn integer(n: u128) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
}

/// The report for people.
fn table(report: &Value) -> String {
    let n = |path: &str| report.pointer(path).and_then(Value::as_u64).unwrap_or(0);
    let count = |path: &str| grouped(n(path));
    let size = |path: &str| bytes(n(path));
    let names = |path: &str| report.pointer(path).and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let (missing, unexpected) = (names("/tensors/missing"), names("/tensors/unexpected"));

    let mut text = String::new();
    let mut line = |key: &str, value: String| text.push_str(&format!("{key:<12}{value}\n"));
    let text_of = |key: &str| report[key].as_str().unwrap_or_default().to_string();
    line("model", format!("{} ({})", text_of("model"), text_of("model_type")));
    line("layers", format!("{} lightning, {} softmax", n("/layers/lightning"), n("/layers/softmax")));
    line("parameters", format!("{} in all", count("/parameters")));
    line("", format!("{} active per token, without embedding and head", count("/active_parameters")));
    if report["tensors"]["listed"] == true {
        let (expected, found) = (count("/tensors/expected"), count("/tensors/found"));
        let (lacking, beyond) = (grouped(missing.len() as u64), grouped(unexpected.len() as u64));
        line("tensors", format!("{expected} expected, {found} found, {lacking} missing, {beyond} unexpected"));
        line("files", format!("{} listed, {} present", count("/files/listed"), count("/files/present")));
    } else {
        line("tensors", format!("{} expected; no weights here", count("/tensors/expected")));
    }
    line("weights", format!("{} in bf16, {} in f32", size("/weight_bytes/bf16"), size("/weight_bytes/f32")));
    for bits in ["int8", "int4"] {
        if report["weight_bytes"][format!("{bits}_all")].is_u64() {
            let (experts, all) =
                (size(&format!("/weight_bytes/{bits}_experts")), size(&format!("/weight_bytes/{bits}_all")));
            line(
                "",
                format!("{experts} with the experts in {bits}, {all} with every matrix ({BLOCK} weights a scale)"),
            );
        }
    }
    if report["weight_bytes"]["stored"].is_u64() {
        let how = match Value::as_u64(&report["quantization"]["bits"]) {
            Some(bits) => {
                let modules = report["quantization"]["modules"].as_object().into_iter().flatten();
                let modules: Vec<_> = modules.map(|(name, bits)| format!("{name} {bits}")).collect();
                format!(", quantized: {bits} bits ({})", modules.join(", "))
            }
            None => String::new(),
        };
        line("", format!("{} as stored{how}", size("/weight_bytes/stored")));
    }
    let per_token = (count("/cache_bytes_per_token/bf16"), count("/cache_bytes_per_token/f32"));
    line("cache", format!("{} a sequence", size("/cache_bytes_per_sequence")));
    line("", format!("and a token {} bytes in f32, as `m1` keeps it ({} in bf16)", per_token.1, per_token.0));
    line("", format!("{} at a context of {}", size("/cache_bytes_at_context"), count("/context")));
    line("compute", format!("{} FLOPs a token at a context of {}", count("/flops_per_token"), count("/context")));
    let memory = (size("/device_memory_bytes/bf16"), size("/device_memory_bytes/f32"));
    let what = "weights and one sequence at that context";
    line("memory", format!("{} with weights in bf16, {} in f32: {what}", memory.0, memory.1));
    // A machine that takes no more than a smaller one says nothing new.
    let (mut before, mut several) = (0, false);
    for machine in report["fits"].as_array().into_iter().flatten() {
        let taken: Vec<_> = machine["weights"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        if taken.len() > before {
            before = taken.len();
            several |= machine["devices"].as_u64() > Some(1);
            let taken = taken.join(", ").replace("_all", "").replace('_', " ");
            line("fits", format!("{}: {taken}", machine["name"].as_str().unwrap_or_default()));
        }
    }
    if before == 0 {
        line("fits", "none of the machines known here".into());
    }
    if several {
        line("", "of several devices the sum counts; `m1` itself runs on one".into());
    }
    if report["tensors"]["listed"] == true {
        for (kind, names) in [("missing", missing), ("unexpected", unexpected)] {
            for name in names.iter().take(10).filter_map(Value::as_str) {
                line(kind, name.to_string());
            }
            if names.len() > 10 {
                line("", format!("… and {} more (--json lists them all)", names.len() - 10));
            }
        }
    }
    text
}

/// Digits in threes.
fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A size for people.
pub(super) fn bytes(n: u64) -> String {
    let units = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let step = if n == 0 { 0 } else { (n.ilog2() / 10) as usize };
    match step {
        0 => format!("{n} bytes"),
        _ => format!("{:.1} {}", n as f64 / (1u64 << (10 * step)) as f64, units[step.min(units.len() - 1)]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_for_people() {
        assert_eq!(grouped(0), "0");
        assert_eq!(grouped(999), "999");
        assert_eq!(grouped(456_089_655_296), "456,089,655,296");
        assert_eq!(bytes(1023), "1023 bytes");
        assert_eq!(bytes(280 << 20), "280.0 MiB");
        assert_eq!(bytes(3 << 39), "1.5 TiB");
    }

    fn args(model: &std::path::Path) -> Args {
        Args {
            model: model.into(),
            hub: HubArgs::default(),
            device: DeviceChoice::Auto,
            json: true,
            context: 100,
            rotary_dim: None,
        }
    }

    #[test]
    fn a_bare_configuration_is_enough() {
        let folder = tempfile::tempdir().unwrap();
        let config = m1_model::config::ModelConfig::preset("nano").unwrap();
        std::fs::write(folder.path().join("config.json"), config.to_json()).unwrap();
        let args = args(folder.path());
        let directory = Directory::open(&args.model, None).unwrap();
        let report = report(&args, &directory, &directory.compare(), None);
        assert_eq!(report["tensors"]["found"], 0);
        assert_eq!(report["tensors"]["missing"].as_array().unwrap().len() as u64, report["tensors"]["expected"]);
        // 7 lightning layers of 4 heads · 32 · 32 in f32; 1 softmax layer of 2 kv heads · 32, k and v
        assert_eq!(report["cache_bytes_per_sequence"], 7 * 4 * 32 * 32 * 4);
        assert_eq!(report["cache_bytes_per_token"]["f32"], 2 * 2 * 32 * 4);
        assert_eq!(report["cache_bytes_at_context"], 7 * 4 * 32 * 32 * 4 + 100 * 2 * 2 * 32 * 4);
        let table = table(&report);
        assert!(table.contains("no weights here") && !table.contains("several devices"), "{table}");
        run(args).unwrap();
    }

    #[test]
    fn the_released_model_and_the_machines_that_hold_it() {
        let folder = tempfile::tempdir().unwrap();
        let text = include_str!("../../../model/tests/data/config.json");
        std::fs::write(folder.path().join("config.json"), text).unwrap();
        let args = args(folder.path());
        let directory = Directory::open(&args.model, None).unwrap();
        let report = report(&args, &directory, &directory.compare(), None);
        let bytes = |key: &str| report["weight_bytes"][key].as_u64().unwrap();
        assert_eq!(bytes("f32"), 4 * 456_089_655_296);
        // 434,865,438,720 weights of experts; 8 bits and 16 for every 32 of them, against 16.
        assert_eq!(bytes("bf16") - bytes("int8_experts"), 434_865_438_720 / 16 * 15);
        assert_eq!(bytes("bf16") - bytes("int4_experts"), 434_865_438_720 / 16 * 23);
        assert!(bytes("int8_all") < bytes("int8_experts") && bytes("int4_all") < bytes("int4_experts"));
        let holds = |machine: &str| -> Vec<&str> {
            let all = report["fits"].as_array().unwrap();
            let one = all.iter().find(|m| m["name"] == machine).unwrap();
            one["weights"].as_array().unwrap().iter().map(|w| w.as_str().unwrap()).collect()
        };
        assert!(holds("1 × 141 GB (H200)").is_empty());
        assert_eq!(holds("4 × 80 GB"), ["int4_experts", "int4_all"]);
        assert_eq!(holds("8 × 80 GB"), ["int8_experts", "int8_all", "int4_experts", "int4_all"]);
        assert_eq!(holds("8 × 141 GB")[0], "bf16");
        let table = table(&report);
        assert!(table.contains("4 × 80 GB: int4 experts, int4\n"), "{table}");
        assert!(table.contains("`m1` itself runs on one\n"), "{table}");
    }

    #[test]
    fn an_index_that_lacks_a_tensor_fails() {
        let folder = tempfile::tempdir().unwrap();
        let config = m1_model::config::ModelConfig::preset("nano").unwrap();
        std::fs::write(folder.path().join("config.json"), config.to_json()).unwrap();
        let mut names = m1_model::checkpoint::tensors(&config);
        names.retain(|tensor| tensor.name != "lm_head.weight");
        let map: serde_json::Map<_, _> =
            names.into_iter().map(|t| (t.name, json!("model-00001-of-00001.safetensors"))).collect();
        let index = json!({ "weight_map": map }).to_string();
        std::fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
        let args = args(folder.path());
        let said = run(args).unwrap_err().to_string();
        assert!(said.contains("1 tensor missing, 0 unexpected"), "{said}");
    }
}
