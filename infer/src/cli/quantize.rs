//! `m1 quantize`: a checkpoint in fewer bits, written as a directory that loads like any other.

use super::common::{DEFAULT_BLOCK, HubArgs, block};
use super::inspect::bytes;
use m1_model::checkpoint::{Bits, Quantization, QuantizeOptions, quantize};
use m1_model::device::DeviceChoice;
use std::path::PathBuf;

/// Flags of `m1 quantize`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  m1 quantize --model DIR --to int8 --out DIR-int8
  m1 quantize --model DIR --to int4 --all --out DIR-int4

The experts are nearly all of M1's weights, and they alone are quantized unless --all is given: then attention,
embedding and head are too (embedding and head in int8 at least). Norms and routers keep their numbers. Every block of
weights along a row gets a scale in f16. Tokenizer files go along. No model is made: any machine with room for the
result will do.")]
pub struct Args {
    /// Checkpoint in Hugging Face form, not quantized: its directory, or an id of the hub, owner/name[@revision]
    #[arg(long, short, value_name = "DIR|ID")]
    model: PathBuf,
    #[command(flatten)]
    hub: HubArgs,
    /// int8 or int4
    #[arg(long, value_name = "FORMAT")]
    to: Bits,
    /// Where the result goes: a new or an empty directory
    #[arg(long, short, value_name = "DIR")]
    out: PathBuf,
    /// Weights that share a scale: 32 or 64
    #[arg(long, value_name = "N", default_value_t = DEFAULT_BLOCK, value_parser = block)]
    block: usize,
    /// Attention, embedding and head too
    #[arg(long)]
    all: bool,
    /// Accepted as by every command; nothing is opened or run
    #[arg(long, value_name = "DEVICE", default_value_t = DeviceChoice::Auto, hide = true)]
    device: DeviceChoice,
    /// Rotated dimensions of a head, for a `minimax` checkpoint whose config does not tell
    #[arg(long, value_name = "N")]
    rotary_dim: Option<usize>,
    /// A file is closed before it would hold more bytes of tensors than this
    #[arg(long, value_name = "BYTES", default_value_t = 5_000_000_000, value_parser = clap::value_parser!(u64).range(1..))]
    max_shard_bytes: u64,
}

/// What goes along: all that is text or about it.
const BESIDE: [&str; 10] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE",
];

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let options = QuantizeOptions {
        quantization: Quantization::new(args.to, args.block, args.all).map_err(anyhow::Error::msg)?,
        max_shard_bytes: args.max_shard_bytes,
        rotary_dim: args.rotary_dim,
        beside: BESIDE.map(String::from).into(),
        progress: true,
    };
    let model = args.hub.directory(&args.model)?;
    let [before, after] = quantize(&model, &args.out, &options)?;
    let share = 100.0 * after as f64 / before as f64;
    note!("{}: {} instead of {} ({share:.0} %)", args.out.display(), bytes(after), bytes(before));
    Ok(())
}
