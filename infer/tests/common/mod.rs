//! A tiny checkpoint with random weights and a byte-level tokenizer, made anew, and the `m1` binary run on it.

use burn::tensor::Device;
use m1_model::checkpoint::{SaveOptions, WeightDtype, save};
use m1_model::{M1, ModelConfig};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer};

pub const VOCAB: usize = 320;

/// An id inside the vocabulary that the tokenizer does not know: as an end id it never ends anything.
const UNKNOWN: u32 = 319;

/// A checkpoint whose model never ends its turn. It lives as long as the test process.
pub fn checkpoint() -> &'static Path {
    static DIR: OnceLock<tempfile::TempDir> = OnceLock::new();
    DIR.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        write_checkpoint(dir.path());
        dir
    })
    .path()
}

fn write_checkpoint(dir: &Path) {
    let config = ModelConfig {
        vocab_size: VOCAB,
        hidden_size: 32,
        intermediate_size: 64,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 8,
        rotary_dim: 4,
        num_hidden_layers: 3,
        attn_type_list: vec![0, 1, 0],
        num_local_experts: 3,
        ..ModelConfig::preset("nano").unwrap()
    };
    let device = Device::flex();
    device.seed(11);
    let options = SaveOptions { dtype: WeightDtype::F32, max_shard_bytes: 1 << 30 };
    save(dir, &M1::new(&config, &device), &options).unwrap();
    tokenizer().save(dir.join("tokenizer.json"), false).unwrap();
    let template = include_str!("../data/chat_template.jinja");
    let tokens = serde_json::json!({"eos_token": "<end_of_sentence>", "chat_template": template});
    std::fs::write(dir.join("tokenizer_config.json"), tokens.to_string()).unwrap();
    std::fs::write(dir.join("generation_config.json"), format!("{{\"eos_token_id\": {UNKNOWN}}}")).unwrap();
}

/// The 256 bytes, M1's special tokens and the tags of thinking.
pub fn tokenizer() -> Tokenizer {
    let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    let vocab: [(String, u32); 256] = std::array::from_fn(|i| (alphabet[i].to_string(), i as u32));
    let bpe = BPE::builder().vocab_and_merges(vocab, Vec::new()).build().unwrap();
    let mut tokenizer = Tokenizer::new(bpe);
    tokenizer.with_pre_tokenizer(Some(ByteLevel::default().add_prefix_space(false)));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    let special = ["<begin_of_document>", "<end_of_document>", "<beginning_of_sentence>", "<end_of_sentence>"];
    tokenizer.add_special_tokens(&special.map(|t| AddedToken::from(t, true)));
    tokenizer.add_tokens(&["<think>", "</think>"].map(|t| AddedToken::from(t, false)));
    tokenizer
}

/// What a run of `m1` gave.
pub struct Run {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Run {
    /// The only line on standard error that tells of a mistake; nothing may stand on standard output.
    pub fn mistake(&self) -> &str {
        assert!(!matches!(self.code, Some(0) | None), "{} {}", self.stdout, self.stderr);
        assert_eq!(self.stdout, "");
        let lines: Vec<&str> = self.stderr.lines().filter(|l| !l.starts_with("device: ")).collect();
        assert_eq!(lines.len(), 1, "{}", self.stderr);
        lines[0]
    }

    pub fn ok(self) -> Self {
        assert_eq!(self.code, Some(0), "{}", self.stderr);
        self
    }
}

/// `m1 COMMAND --model CHECKPOINT --device cpu ARGS`, ready to be started.
pub fn command(name: &str, args: &[&str]) -> Command {
    let mut command = bare(&[name]);
    command.arg("--model").arg(checkpoint()).args(["--device", "cpu"]).args(args);
    command
}

/// `m1 ARGS` and nothing else.
pub fn bare(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_m1"));
    command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

pub fn run(mut command: Command, stdin: &str) -> Run {
    let mut child = command.spawn().unwrap();
    // A command that refuses its arguments does not wait for its input.
    let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
    let output = child.wait_with_output().unwrap();
    let text = |bytes| String::from_utf8(bytes).expect("output is UTF-8");
    Run { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

pub fn m1(name: &str, args: &[&str], stdin: &str) -> Run {
    run(command(name, args), stdin)
}
