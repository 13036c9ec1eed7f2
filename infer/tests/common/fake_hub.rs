//! A Hugging Face hub of one model on loopback: its listing, its files by range, large ones behind a redirect.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

/// The model that the hub has.
pub const ID: &str = "some-owner/nano-1.0";

/// Files from this length on are redirected.
const LARGE: usize = 100_000;

/// What the hub does; may be changed at any time.
#[derive(Default)]
pub struct State {
    /// What `main` is.
    pub commit: String,
    pub files: BTreeMap<String, Vec<u8>>,
    /// Listed, but not there.
    pub ghosts: Vec<String>,
    /// The status of the listing and its error code, of every file.
    pub refuse_listing: Option<(u16, &'static str)>,
    pub refuse_files: Option<u16>,
    /// The connection ends after so many bytes of a file.
    pub cut: Option<usize>,
    /// Instead of ending the connection then, nothing more is said.
    pub stall: bool,
    /// A whole file is sent, whatever range was asked for.
    pub ignore_ranges: bool,
    /// Every request: path, range, authorization.
    pub requests: Vec<String>,
}

pub struct FakeHub {
    pub address: SocketAddr,
    state: Arc<Mutex<State>>,
}

impl FakeHub {
    pub fn new(files: BTreeMap<String, Vec<u8>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let state = State { commit: "c0ffee".into(), files, ..State::default() };
        let state = Arc::new(Mutex::new(state));
        let shared = state.clone();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let shared = shared.clone();
                thread::spawn(move || answer(stream.unwrap(), address, &shared));
            }
        });
        Self { address, state }
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// What has been asked since the last call.
    pub fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.state().requests)
    }
}

/// A name for the contents.
fn etag(bytes: &[u8]) -> String {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}

/// Answers one request; nobody who goes away is missed.
fn answer(stream: TcpStream, address: SocketAddr, state: &Mutex<State>) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
    let Some(request) = lines.next() else { return };
    let target = request.split(' ').nth(1).unwrap().to_string();
    let (mut range, mut authorization) = (String::new(), String::new());
    for line in lines.take_while(|line| !line.is_empty()) {
        let (name, value) = line.split_once(':').unwrap();
        match name.to_lowercase().as_str() {
            "range" => range = value.trim().into(),
            "authorization" => authorization = value.trim().into(),
            _ => {}
        }
    }
    let _ = respond(stream, &target, &range, &authorization, address, state);
}

fn respond(
    mut stream: TcpStream,
    target: &str,
    range: &str,
    authorization: &str,
    address: SocketAddr,
    state: &Mutex<State>,
) -> std::io::Result<()> {
    let mut hub = state.lock().unwrap();
    hub.requests.push(format!("{target} {range} {authorization}").trim_end().to_string());
    let listing = format!("/api/models/{ID}/revision/");
    if let Some(revision) = target.strip_prefix(&listing) {
        let revision = revision.strip_suffix("?blobs=true").expect("lengths are asked for");
        let (status, code) = hub.refuse_listing.unwrap_or(match revision == "main" || revision == hub.commit {
            true => (200, ""),
            false => (404, "RevisionNotFound"),
        });
        let ghosts = hub.ghosts.iter().map(|name| serde_json::json!({"rfilename": name}));
        let files = hub.files.iter().map(|(name, bytes)| serde_json::json!({"rfilename": name, "size": bytes.len()}));
        let body = serde_json::json!({"sha": hub.commit, "siblings": files.chain(ghosts).collect::<Vec<_>>()});
        drop(hub);
        let body = body.to_string();
        return write!(
            stream,
            "HTTP/1.1 {status} X\r\nX-Error-Code: {code}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        );
    }
    let resolve = format!("/{ID}/resolve/{}/", hub.commit);
    let (name, direct) = match (target.strip_prefix(&resolve), target.strip_prefix("/cdn/")) {
        (Some(name), _) => (name.to_string(), true),
        (None, Some(name)) => (name.to_string(), false),
        (None, None) => (String::new(), true),
    };
    let refused = hub.refuse_files.or((!hub.files.contains_key(&name)).then_some(404));
    if let Some(status) = refused {
        return write!(stream, "HTTP/1.1 {status} X\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    }
    let bytes = hub.files[&name].clone();
    let (commit, etag) = (hub.commit.clone(), etag(&bytes));
    let (cut, stall, ignore_ranges) = (hub.cut, hub.stall, hub.ignore_ranges);
    drop(hub);
    if direct && bytes.len() >= LARGE {
        return write!(
            stream,
            "HTTP/1.1 302 X\r\nLocation: http://{address}/cdn/{name}\r\nX-Repo-Commit: {commit}\r\nETag: \"other\"\r\n\
             X-Linked-ETag: \"{etag}\"\r\nX-Linked-Size: {}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
            bytes.len()
        );
    }
    let (from, to) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
    let whole = ignore_ranges && to.is_empty();
    let from: usize = if whole { 0 } else { from.parse().unwrap() };
    let end = to.parse::<usize>().map_or(bytes.len(), |last| (last + 1).min(bytes.len()));
    if from >= bytes.len() {
        return write!(stream, "HTTP/1.1 416 X\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    }
    let (status, body) = (if whole { 200 } else { 206 }, &bytes[from..end]);
    write!(
        stream,
        "HTTP/1.1 {status} X\r\nETag: \"{etag}\"\r\nX-Repo-Commit: {commit}\r\nContent-Range: bytes {from}-{}/{}\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n",
        end - 1,
        bytes.len(),
        body.len()
    )?;
    match cut.filter(|&cut| cut < body.len()) {
        None => stream.write_all(body),
        Some(cut) => {
            stream.write_all(&body[..cut])?;
            stream.flush()?;
            if stall {
                thread::sleep(Duration::from_secs(60));
            }
            Ok(())
        }
    }
}
