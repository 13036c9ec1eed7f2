//! `m1 serve`: the model over OpenAI's API.

use super::common::{ModelArgs, whole};
use crate::batching::{BatchSettings, SchedulerSettings};
use crate::memory;
use crate::server;
use crate::server::state::Settings;
use anyhow::bail;
use burn::tensor::Tensor;
use m1_kernels::base::on_cpu;
use std::io::IsTerminal;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::time::Duration;
use tracing_subscriber::EnvFilter;

/// Environment variable with a key, or several with commas between.
const KEYS: &str = "M1_API_KEY";

/// Flags of `m1 serve`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  m1 serve --model examples/m1-nano
  curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{\"messages\": [{\"role\": \"user\", \"content\": \"What is 17 + 25?\"}]}'
  M1_API_KEY=secret m1 serve --model DIR --host 0.0.0.0 --port 8080 --parallel 16 --cache-memory 4GiB

Routes: /v1/chat/completions, /v1/completions, /v1/models, /tokenize, /detokenize, /health, /metrics, and a page to chat
at /. Beside OpenAI's fields requests may have top_k, min_p, repetition_penalty and thinking ({\"type\": \"disabled\"} or
{\"type\": \"enabled\", \"budget_tokens\": N}). A field that cannot be honoured is refused, never ignored.

A reply calls at most 16 tools. One that max_tokens cuts off in the middle of a call tells it as far as it came, with
finish_reason \"length\". Connections are closed when a request's head takes more than 30 seconds to come, or when two
minutes pass between an answer and the next request.

The model's thinking comes as reasoning_content. A signal to end (Ctrl-C, SIGTERM) lets the replies under way finish; a
second one cancels them. Log lines go to standard error; RUST_LOG, if set, goes before --log-level.")]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Address to listen on; 0.0.0.0 lets other machines in
    #[arg(long, value_name = "ADDRESS", default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    host: IpAddr,
    /// Port to listen on; 0 takes a free one
    #[arg(long, value_name = "N", default_value_t = 8000)]
    port: u16,
    /// The model's name for clients; given again: further names [default: the directory's name]
    #[arg(long, value_name = "NAME")]
    served_model_name: Vec<String>,
    /// Replies made at once; others wait
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..))]
    parallel: u16,
    /// The most tokens of a conversation [default: max_position_embeddings]
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = whole::<usize>)]
    context: Option<usize>,
    /// Tokens of prompts read between two steps of those who write
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    prefill_tokens: u32,
    /// What the caches of replies under way may hold, each counted at its longest: without room a request waits, and one
    /// that would never fit is refused [default: on the CPU three quarters of what is free when the model is loaded, less
    /// the prefix cache; elsewhere no limit]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    memory: Option<u64>,
    /// What the prefix cache may hold, as 512MiB or 4GiB; 0 keeps nothing
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = size)]
    cache_memory: u64,
    /// Read replies again before they serve as a beginning: the same bits as without a cache
    #[arg(long)]
    exact_cache: bool,
    /// A key that requests must bring as `Authorization: Bearer KEY`; may be given again. Better: M1_API_KEY=KEY[,KEY]
    #[arg(long, value_name = "KEY")]
    api_key: Vec<String>,
    /// An origin whose pages may use the API, or * for any; may be given again
    #[arg(long, value_name = "ORIGIN")]
    cors: Vec<String>,
    /// The largest body of a request
    #[arg(long, value_name = "SIZE", default_value = "16MiB", value_parser = size)]
    max_body: u64,
    /// Replies that may wait; more are refused with 429
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_queue: u32,
    /// Seconds that a request may take; 0: no limit
    #[arg(long, value_name = "SECONDS", default_value_t = 3600)]
    timeout: u32,
    /// Seconds that replies may go on after a signal to end
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    shutdown_timeout: u32,
    /// Form of the log's lines
    #[arg(long, value_name = "FORM", default_value = "text")]
    log: LogForm,
    /// What is logged: error, warn, info (a line for each request), debug or trace
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    log_level: LogLevel,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum LogForm {
    Text,
    Json,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    log(args.log, args.log_level)?;
    let api_keys = keys(args.api_key, std::env::var(KEYS).ok())?;
    if api_keys.is_empty() && !args.host.is_loopback() {
        note!("warning: --host {}: other machines may use this server, and no --api-key is asked for", args.host);
    }
    if let Some(origin) = args.cors.iter().find(|origin| !is_origin(origin)) {
        bail!("--cors {origin}: an origin is wanted, as https://example.org or http://localhost:3000, or *");
    }
    let settings = Settings {
        host: args.host,
        port: args.port,
        names: names(args.served_model_name, &args.model.model)?,
        api_keys,
        cors: args.cors,
        max_body: usize::try_from(args.max_body).unwrap_or(usize::MAX),
        parallel: args.parallel.into(),
        max_queue: args.max_queue as usize,
        timeout: (args.timeout > 0).then(|| Duration::from_secs(args.timeout.into())),
        shutdown_timeout: Duration::from_secs(args.shutdown_timeout.into()),
    };
    let (rows, prefill_tokens) = (usize::from(args.parallel), args.prefill_tokens as usize);
    let (memory, cache_bytes, exact_cache) = (args.memory, args.cache_memory, args.exact_cache);
    let worker = move |assets: &crate::Assets| {
        let on_cpu = on_cpu(&Tensor::<1>::zeros([1], &assets.engine.device()));
        let free = || memory::free().filter(|_| on_cpu).map(|free| (free / 4 * 3).saturating_sub(cache_bytes));
        let memory = memory.or_else(free);
        let batch = BatchSettings { prefill_tokens, memory, ..BatchSettings::new(rows, assets.engine.context()) };
        SchedulerSettings { exact_cache, ..SchedulerSettings::new(batch, cache_bytes) }
    };
    let (model, context) = (args.model, args.context);
    server::run(settings, worker, move || model.load(context))
}

/// Log lines to standard error.
fn log(form: LogForm, level: LogLevel) -> anyhow::Result<()> {
    let level = format!("{level:?}").to_lowercase();
    // What libraries have to say is for those who look for a fault in them.
    let own = format!("warn,m1_infer={level}");
    let wanted = std::env::var(EnvFilter::DEFAULT_ENV).unwrap_or(own);
    let filter = EnvFilter::try_new(&wanted).map_err(|e| anyhow::anyhow!("RUST_LOG {wanted:?}: {e}"))?;
    let ansi = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(ansi);
    let set = match form {
        LogForm::Text => builder.with_target(false).try_init(),
        LogForm::Json => builder.json().flatten_event(true).with_target(false).try_init(),
    };
    set.map_err(|e| anyhow::anyhow!("the log: {e}"))
}

/// All keys; an empty one would let everybody in.
fn keys(mut keys: Vec<String>, environment: Option<String>) -> anyhow::Result<Vec<String>> {
    keys.extend(environment.filter(|text| !text.is_empty()).iter().flat_map(|text| text.split(',')).map(String::from));
    for key in &mut keys {
        *key = key.trim().to_string();
        if key.is_empty() || !key.bytes().all(|b| b.is_ascii_graphic()) {
            bail!("--api-key ({KEYS}): a key is of printable ASCII without spaces, and not empty");
        }
    }
    Ok(keys)
}

/// The names given, or the model's: of a directory its name, of the hub's `owner/name@revision` what comes before `@`.
/// What `--model` says is a name too.
fn names(given: Vec<String>, model: &Path) -> anyhow::Result<Vec<String>> {
    if given.iter().any(|name| name.is_empty()) {
        bail!("--served-model-name: the name is empty");
    }
    if !given.is_empty() {
        return Ok(given);
    }
    let written = model.display().to_string();
    let name = match model.canonicalize() {
        Ok(path) => path.file_name().map(|name| name.to_string_lossy().into_owned()),
        Err(_) => written.split('@').next().map(str::to_string),
    };
    let mut names = vec![name.filter(|name| !name.is_empty()).unwrap_or_else(|| "m1".into())];
    if names[0] != written {
        names.push(written);
    }
    Ok(names)
}

fn is_origin(text: &str) -> bool {
    let host = text.strip_prefix("http://").or(text.strip_prefix("https://"));
    let plain = |host: &str| !host.is_empty() && host.bytes().all(|b| b.is_ascii_graphic() && b != b'/' && b != b',');
    text == "*" || host.is_some_and(plain)
}

/// Reads a size: a whole number of bytes, or with KB, MB, GB (1000), KiB, MiB, GiB (1024).
fn size(text: &str) -> Result<u64, &'static str> {
    const UNITS: [(&str, u64); 7] = [
        ("KiB", 1 << 10),
        ("MiB", 1 << 20),
        ("GiB", 1 << 30),
        ("KB", 1_000),
        ("MB", 1_000_000),
        ("GB", 1_000_000_000),
        ("", 1),
    ];
    let at = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(at);
    let unit = UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit.trim()));
    let bytes = number.parse::<u64>().ok().zip(unit).and_then(|(number, (_, unit))| number.checked_mul(*unit));
    bytes.ok_or("a size is wanted, as 1048576, 512MiB or 4GiB")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_bytes_or_have_a_unit() {
        assert_eq!((size("0"), size("123"), size("2KiB"), size("1 gb")), (Ok(0), Ok(123), Ok(2048), Ok(1_000_000_000)));
        for wrong in ["", "x", "-1", "1.5GiB", "1TiB", "99999999999999GiB"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn keys_come_from_both_places_and_none_is_empty() {
        assert_eq!(keys(vec!["a".into()], Some("b, c".into())).unwrap(), ["a", "b", "c"]);
        assert!(keys(Vec::new(), Some(String::new())).unwrap().is_empty());
        assert!(keys(vec![String::new()], None).is_err());
        assert!(keys(Vec::new(), Some("a,".into())).is_err());
        assert!(keys(vec!["a b".into()], None).is_err());
    }

    #[test]
    fn a_model_is_named_as_its_directory_or_as_on_the_hub() {
        let names = |model: &str| names(Vec::new(), Path::new(model)).unwrap();
        assert_eq!(names("owner/model"), ["owner/model"]);
        assert_eq!(names("owner/model@main"), ["owner/model", "owner/model@main"]);
        assert_eq!(names("src"), ["src"]);
        assert_eq!(names("src/../src"), ["src", "src/../src"]);
        assert_eq!(super::names(vec!["a".into()], Path::new("src")).unwrap(), ["a"]);
    }

    #[test]
    fn origins_are_origins() {
        assert!(["*", "https://example.org", "http://localhost:3000"].iter().all(|text| is_origin(text)));
        assert!(!["", "example.org", "https://", "https://a/b", "https://a,b"].iter().any(|text| is_origin(text)));
    }
}
