//! cargo run --release --example tools
//!
//! A round trip with a tool: the model is offered one, calls it, gets its result and answers. It goes over the wire of any
//! server that speaks OpenAI's API: one started here with the model that ships in the repository, or `--url HOST:PORT`.
//! The model that ships was not trained on tools; the grammar still makes every call valid (`tool_choice: required`).

use anyhow::{Context, bail};
use clap::Parser;
use m1_infer::batching::{BatchSettings, SchedulerSettings};
use m1_infer::server::{self, state::Settings};
use m1_infer::{Assets, DeviceChoice, LoadSettings, cli};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

/// A round trip with a tool.
#[derive(Parser)]
struct Args {
    /// A server that runs already, as localhost:8000
    #[arg(long)]
    url: Option<String>,
    /// What to ask
    #[arg(long, default_value = "What is 23 + 45?")]
    prompt: String,
}

/// The tool itself.
fn add(arguments: &Value) -> Value {
    let number = |key: &str| arguments[key].as_i64().unwrap_or(0);
    json!({"sum": number("a") + number("b")})
}

fn round_trip(args: Args) -> anyhow::Result<()> {
    let address = args.url.map_or_else(start, Ok)?;
    let number = json!({"type": "integer", "minimum": 0, "maximum": 99});
    let tools = json!([{"type": "function", "function": {
        "name": "add", "description": "Adds two numbers",
        "parameters": {"type": "object", "properties": {"a": number, "b": number}, "required": ["a", "b"], "additionalProperties": false},
    }}]);
    let mut messages = vec![json!({"role": "user", "content": args.prompt})];
    let ask = json!({"messages": messages, "tools": tools, "tool_choice": "required", "parallel_tool_calls": false, "temperature": 0,
        "thinking": {"type": "disabled"}});
    let said = post(&address, "/v1/chat/completions", &ask)?["choices"][0]["message"].take();
    messages.push(said.clone());
    for call in said["tool_calls"].as_array().context("no tool was called")? {
        let function = &call["function"];
        let arguments: Value = serde_json::from_str(function["arguments"].as_str().unwrap_or("null"))?;
        let result = add(&arguments);
        println!("{}({arguments}) = {result}", function["name"].as_str().unwrap_or("?"));
        messages.push(json!({"role": "tool", "tool_call_id": call["id"], "content": result.to_string()}));
    }
    let answer =
        json!({"messages": messages, "tools": tools, "tool_choice": "none", "max_tokens": 200, "temperature": 0});
    let answer = post(&address, "/v1/chat/completions", &answer)?;
    println!("{}", answer["choices"][0]["message"]["content"].as_str().unwrap_or("").trim());
    Ok(())
}

/// Starts a server in this process, and returns its address once it answers.
fn start() -> anyhow::Result<String> {
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let limits = |assets: &Assets| SchedulerSettings::new(BatchSettings::new(1, assets.engine.context()), 64 << 20);
    let load = || {
        let model = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/m1-nano"));
        Ok(Assets::load(model, &DeviceChoice::Cpu.open()?, &LoadSettings::default())?)
    };
    std::thread::spawn(move || server::run(Settings { port, ..Settings::default() }, limits, load));
    let address = format!("127.0.0.1:{port}");
    for _ in 0..600 {
        if request(&address, "GET /health", "").is_ok() {
            return Ok(address);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    bail!("the server does not answer")
}

fn post(address: &str, path: &str, body: &Value) -> anyhow::Result<Value> {
    request(address, &format!("POST {path}"), &body.to_string())
}

/// One HTTP request, and the JSON that comes back.
fn request(address: &str, what: &str, body: &str) -> anyhow::Result<Value> {
    let mut stream = TcpStream::connect(address).with_context(|| address.to_string())?;
    write!(stream, "{what} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Type: application/json\r\n")?;
    write!(stream, "Content-Length: {}\r\n\r\n{body}", body.len())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
    if !head.starts_with("HTTP/1.1 200") {
        bail!("{}: {body}", head.lines().next().unwrap_or_default());
    }
    Ok(serde_json::from_str(body)?)
}

fn main() -> ExitCode {
    match cli::parse() {
        Ok(args) => cli::exit(round_trip(args)),
        Err(status) => status,
    }
}
