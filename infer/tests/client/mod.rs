//! `m1 serve` started on a free port, and HTTP spoken to it over a plain socket: nothing that could hide a fault.

use super::common::bare;
use serde_json::Value;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, ExitStatus};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// A server that ends with the test.
pub struct Server {
    child: Child,
    pub address: SocketAddr,
    stderr: Arc<Mutex<String>>,
}

impl Server {
    /// Serves the checkpoint in `dir`, once it is ready.
    pub fn start(dir: &Path, args: &[&str]) -> Self {
        let mut command = bare(&["serve", "--device", "cpu", "--port", "0", "--model"]);
        command.arg(dir).args(args).env_remove("RUST_LOG");
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap());
        let stderr = Arc::new(Mutex::new(String::new()));
        let mut address = None;
        let mut line = String::new();
        while address.is_none() {
            line.clear();
            assert_ne!(lines.read_line(&mut line).unwrap(), 0, "it ended: {}", stderr.lock().unwrap());
            stderr.lock().unwrap().push_str(&line);
            address = line.trim().strip_prefix("listening on http://").map(|address| address.parse().unwrap());
        }
        let kept = stderr.clone();
        std::thread::spawn(move || {
            let mut line = String::new();
            while lines.read_line(&mut line).is_ok_and(|n| n > 0) {
                kept.lock().unwrap().push_str(&line);
                line.clear();
            }
        });
        Self { child, address: address.unwrap(), stderr }
    }

    /// What it has said on standard error.
    pub fn log(&self) -> String {
        self.stderr.lock().unwrap().clone()
    }

    /// Waits until its log holds `wanted`.
    pub fn until_logged(&self, wanted: &str) {
        until(wanted, || self.log().contains(wanted).then_some(()));
    }

    /// Sends a signal, by its name.
    pub fn signal(&self, name: &str) {
        let status =
            std::process::Command::new("kill").args([&format!("-{name}"), &self.child.id().to_string()]).status();
        assert!(status.unwrap().success());
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> ExitStatus {
        until("the end", || self.child.try_wait().unwrap())
    }

    pub fn get(&self, path: &str) -> Response {
        self.send("GET", path, &[], b"")
    }

    pub fn post(&self, path: &str, body: &Value) -> Response {
        self.send("POST", path, &[("Content-Type", "application/json")], body.to_string().as_bytes())
    }

    /// A chat's answer, which must be one.
    pub fn chat(&self, body: &Value) -> Value {
        self.post("/v1/chat/completions", body).ok()
    }

    pub fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Response {
        Response::read(BufReader::new(self.open(method, path, headers, body)))
    }

    /// A stream's events, to be read one by one.
    pub fn stream(&self, path: &str, body: &Value) -> Stream {
        let body = body.to_string();
        let socket = self.open("POST", path, &[("Content-Type", "application/json")], body.as_bytes());
        let mut reader = BufReader::new(socket);
        let (status, headers) = head(&mut reader);
        assert_eq!(status, 200, "{}", Response { status, body: rest(&mut reader, &headers), headers }.body);
        assert!(headers.contains("content-type: text/event-stream"), "{headers}");
        Stream { reader }
    }

    fn open(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> TcpStream {
        let mut socket = TcpStream::connect(self.address).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut text = format!("{method} {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n");
        if !body.is_empty() && !headers.iter().any(|(name, _)| *name == "Content-Length") {
            text += &format!("Content-Length: {}\r\n", body.len());
        }
        headers.iter().for_each(|(name, value)| text += &format!("{name}: {value}\r\n"));
        socket.write_all((text + "\r\n").as_bytes()).unwrap();
        // A server that refuses a body may not wait for it.
        let _ = socket.write_all(body);
        socket
    }

    /// A counter or gauge of `/metrics`, 0 if it is not there yet.
    pub fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").body;
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.map_or(0.0, |number| number.parse().unwrap())
    }

    /// Waits until a metric has a value.
    pub fn until_metric(&self, name: &str, value: f64) {
        until(name, || (self.metric(name) == value).then_some(()));
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("{}", self.log());
        }
    }
}

/// Asks again and again.
pub fn until<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = ask() {
            return found;
        }
        assert!(start.elapsed() < PATIENCE, "no {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

pub struct Response {
    pub status: u16,
    /// In lower case, a line each.
    pub headers: String,
    pub body: String,
}

impl Response {
    pub fn read(mut reader: impl BufRead) -> Self {
        let (status, headers) = head(&mut reader);
        let body = rest(&mut reader, &headers);
        Self { status, headers, body }
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    pub fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.body);
        self.json()
    }

    /// (status, param or code, message) of an error.
    pub fn error(&self) -> (u16, String, String) {
        let error = self.json()["error"].clone();
        assert!(error.as_object().unwrap().keys().eq(["message", "type", "param", "code"]), "{error}");
        let text = |key: &str| error[key].as_str().unwrap_or_default().to_string();
        let name = if text("param").is_empty() { text("code") } else { text("param") };
        (self.status, name, text("message"))
    }
}

/// Status and headers (names and values in lower case).
fn head(reader: &mut impl BufRead) -> (u16, String) {
    let mut text = String::new();
    while !text.ends_with("\r\n\r\n") {
        assert_ne!(reader.read_line(&mut text).unwrap(), 0, "no answer: {text:?}");
    }
    (text.split(' ').nth(1).unwrap().parse().unwrap(), text.to_lowercase())
}

/// The body after these headers.
fn rest(reader: &mut impl BufRead, headers: &str) -> String {
    let length = headers.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
    let mut body = Vec::new();
    if headers.contains("transfer-encoding: chunked") {
        while let Some(chunk) = chunk(reader) {
            body.extend(chunk);
        }
    } else if let Some(length) = length {
        body.resize(length, 0);
        reader.read_exact(&mut body).unwrap();
    } else {
        reader.read_to_end(&mut body).unwrap();
    }
    String::from_utf8(body).unwrap()
}

/// The next chunk; `None` at the end, or where the server broke off.
fn chunk(reader: &mut impl BufRead) -> Option<Vec<u8>> {
    let mut line = String::new();
    if reader.read_line(&mut line).is_err() || line.is_empty() {
        return None;
    }
    let mut chunk = vec![0; usize::from_str_radix(line.trim(), 16).unwrap() + 2];
    reader.read_exact(&mut chunk).ok()?;
    chunk.truncate(chunk.len() - 2);
    (!chunk.is_empty()).then_some(chunk)
}

/// Events as they come.
pub struct Stream {
    reader: BufReader<TcpStream>,
}

impl Stream {
    /// The next event's data, as JSON; `None` after `[DONE]` or where the stream breaks off.
    pub fn next(&mut self) -> Option<Value> {
        loop {
            let event = String::from_utf8(chunk(&mut self.reader)?).unwrap();
            if event.starts_with(':') {
                continue;
            }
            let data = event.strip_prefix("data: ").and_then(|data| data.strip_suffix("\n\n"));
            let data = data.unwrap_or_else(|| panic!("no event: {event:?}"));
            if data == "[DONE]" {
                assert_eq!(chunk(&mut self.reader), None, "nothing comes after the end");
                return None;
            }
            return Some(serde_json::from_str(data).unwrap());
        }
    }

    /// All that comes, put together.
    pub fn collect(mut self) -> Collected {
        let mut all = Collected::default();
        while let Some(event) = self.next() {
            all.take(&event);
        }
        all
    }
}

/// A stream put together: for each choice its texts and why it ended.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Collected {
    pub choices: Vec<Choice>,
    pub usage: Value,
    pub error: Value,
    pub events: usize,
}

#[derive(Debug, Default, Clone, PartialEq)]
pub struct Choice {
    pub role: String,
    pub reasoning: String,
    pub content: String,
    /// (name, arguments).
    pub calls: Vec<(String, String)>,
    pub finish: String,
    pub log_probs: Vec<Value>,
}

impl Collected {
    fn take(&mut self, event: &Value) {
        self.events += 1;
        if !event["usage"].is_null() {
            self.usage = event["usage"].clone();
        }
        if !event["error"].is_null() {
            self.error = event["error"].clone();
        }
        for choice in event["choices"].as_array().into_iter().flatten() {
            let index = choice["index"].as_u64().unwrap() as usize;
            self.choices.resize(self.choices.len().max(index + 1), Choice::default());
            let (all, delta) = (&mut self.choices[index], &choice["delta"]);
            assert_eq!(all.finish, "", "nothing comes after the reason to end");
            let text = |value: &Value| value.as_str().unwrap_or_default().to_string();
            all.role += &text(&delta["role"]);
            all.reasoning += &text(&delta["reasoning_content"]);
            all.content += &text(&delta["content"]);
            all.content += &text(&choice["text"]);
            all.finish += &text(&choice["finish_reason"]);
            for call in delta["tool_calls"].as_array().into_iter().flatten() {
                let index = call["index"].as_u64().unwrap() as usize;
                all.calls.resize(all.calls.len().max(index + 1), Default::default());
                all.calls[index].0 += &text(&call["function"]["name"]);
                all.calls[index].1 += &text(&call["function"]["arguments"]);
            }
            for list in ["reasoning_content", "content"] {
                all.log_probs.extend(choice["logprobs"][list].as_array().into_iter().flatten().cloned());
            }
        }
    }

    /// The same of a whole answer.
    pub fn whole(answer: &Value) -> Self {
        let choices = answer["choices"].as_array().unwrap();
        let mut answer = answer.clone();
        for (i, choice) in choices.iter().enumerate() {
            let mut choice = choice.clone();
            choice["delta"] = choice["message"].take();
            let calls = choice["delta"]["tool_calls"].as_array_mut().into_iter().flatten().enumerate();
            calls.for_each(|(index, call)| call["index"] = index.into());
            answer["choices"][i] = choice;
        }
        let mut all = Self::default();
        all.take(&answer);
        all
    }
}
