//! `--model owner/name` against a hub on loopback.

mod common;
#[path = "common/fake_hub.rs"]
mod fake_hub;

use common::{Run, bare, checkpoint, m1};
use fake_hub::{FakeHub, ID};
use std::collections::BTreeMap;
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// What every command of a test is run with.
struct Home {
    dir: tempfile::TempDir,
    endpoint: String,
}

impl Home {
    fn of(hub: &FakeHub) -> Self {
        Self { dir: tempfile::tempdir().unwrap(), endpoint: format!("http://{}", hub.address) }
    }

    /// Where nobody listens.
    fn without_network() -> Self {
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        Self { dir: tempfile::tempdir().unwrap(), endpoint: format!("http://{free}") }
    }

    /// The same cache, without a network.
    fn unplugged(self) -> Self {
        Self { dir: self.dir, ..Self::without_network() }
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = bare(args);
        for name in ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN", "HF_TOKEN_PATH", "HF_HUB_OFFLINE"] {
            command.env_remove(name);
        }
        for proxy in ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"] {
            command.env_remove(proxy);
        }
        command.env("HF_HOME", self.dir.path()).env("HF_ENDPOINT", &self.endpoint);
        command
    }

    fn run(&self, args: &[&str]) -> Run {
        common::run(self.command(args), "")
    }

    /// A greedy text of the model.
    fn generate(&self, id: &str, more: &[&str]) -> Run {
        let args =
            ["generate", "--model", id, "--device", "cpu", "--prompt", "What is", "-n", "8", "--temperature", "0"];
        self.run(&[&args, more].concat())
    }

    fn inspect(&self, id: &str, more: &[&str]) -> Run {
        self.run(&[&["inspect", "--model", id][..], more].concat())
    }

    fn model(&self) -> PathBuf {
        self.dir.path().join("hub").join(format!("models--{}", ID.replace('/', "--")))
    }

    fn snapshot(&self, commit: &str) -> PathBuf {
        self.model().join("snapshots").join(commit)
    }
}

fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_string();
    entries.map(|path| (name(&path), fs::read(&path).unwrap())).collect()
}

fn nano() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/m1-nano")
}

/// The line that tells of a mistake, after what was said of the fetching before it.
fn mistake(run: &Run) -> &str {
    assert_eq!((run.code, &*run.stdout), (Some(1), ""), "{}", run.stderr);
    let lines: Vec<&str> = run.stderr.lines().filter(|line| !line.contains(": fetching ")).collect();
    assert_eq!(lines.len(), 1, "{}", run.stderr);
    lines[0]
}

#[test]
fn the_model_that_ships_is_fetched_once_and_then_lives_in_the_cache() {
    let hub = FakeHub::new(files(&nano()));
    let home = Home::of(&hub);
    let wanted = home.generate(nano().to_str().unwrap(), &[]).ok().stdout;
    assert_eq!(hub.requests(), Vec::<String>::new());

    let first = home.generate(ID, &[]).ok();
    assert_eq!(first.stdout, wanted);
    assert!(first.stderr.contains(&format!("{ID}: fetching 5 files, 7.92 MiB\n")), "{}", first.stderr);
    assert!(hub.requests().iter().all(|request| !request.contains("README") && !request.contains("svg")));
    let snapshot = home.snapshot("c0ffee");
    for name in
        ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
    {
        let path = snapshot.join(name);
        assert!(path.is_symlink() && fs::read(&path).unwrap() == fs::read(nano().join(name)).unwrap(), "{name}");
    }
    assert_eq!(fs::read_dir(&snapshot).unwrap().count(), 5);
    assert_eq!(fs::read_to_string(home.model().join("refs/main")).unwrap(), "c0ffee");

    // Once more: the commit is asked for, nothing is fetched.
    let second = home.generate(ID, &[]).ok();
    assert_eq!((second.stdout, hub.requests().len()), (wanted.clone(), 1));
    assert!(!second.stderr.contains("fetching"), "{}", second.stderr);
    // Not even asked: by the flag, or by the variable.
    assert_eq!(home.generate(ID, &["--offline"]).ok().stdout, wanted);
    let mut command = home.command(&["inspect", "--model", ID]);
    command.env("HF_HUB_OFFLINE", "1");
    let inspected = common::run(command, "").ok();
    assert!(inspected.stdout.starts_with(&format!("model       {ID} (minimax_m1)\n")), "{}", inspected.stdout);
    let bench = ["bench", "--model", ID, "--offline", "--device", "cpu", "-p", "8", "-n", "0", "-r", "1"];
    assert!(home.run(&bench).ok().stdout.contains(&format!("| {ID} ")));
    assert_eq!(hub.requests(), Vec::<String>::new());
    // Without a network it is said that the cache was taken.
    let home = home.unplugged();
    let unplugged = home.generate(ID, &[]).ok();
    assert_eq!(unplugged.stdout, wanted);
    assert!(
        unplugged.stderr.contains("can't be reached") && unplugged.stderr.contains("cache"),
        "{}",
        unplugged.stderr
    );

    // A directory of that name wins.
    let here = tempfile::tempdir().unwrap();
    let directory = here.path().join(ID);
    fs::create_dir_all(&directory).unwrap();
    fs::copy(nano().join("config.json"), directory.join("config.json")).unwrap();
    let mut command = home.command(&["inspect", "--model", ID]);
    command.current_dir(here.path());
    assert!(common::run(command, "").ok().stdout.contains("no weights here"));
}

#[test]
fn what_was_cut_off_is_gone_on_with() {
    let hub = FakeHub::new(files(&nano()));
    let home = Home::of(&hub);
    let weights = fs::read(nano().join("model.safetensors")).unwrap();
    let offsets = |hub: &FakeHub| -> Vec<usize> {
        let of_weights = |request: &String| request.starts_with("/cdn/model.safetensors") && request.ends_with('-');
        let requests: Vec<String> = hub.requests().into_iter().filter(of_weights).collect();
        let offset = |request: &String| request.split("bytes=").nth(1)?.trim_end_matches('-').parse().ok();
        requests.iter().map(|request| offset(request).unwrap()).collect()
    };
    // Connections that end too early are taken up again within one run.
    hub.state().cut = Some(3_000_000);
    home.inspect(ID, &[]).ok();
    assert_eq!(offsets(&hub), [0, 3_000_000, 6_000_000]);
    assert!(fs::read(home.snapshot("c0ffee").join("model.safetensors")).unwrap() == weights);

    // A run that is killed leaves a part and no link; the next one goes on behind it.
    let home = Home::of(&hub);
    hub.state().stall = true;
    let mut child = home.command(&["inspect", "--model", ID]).spawn().unwrap();
    let blobs = home.model().join("blobs");
    let part = || {
        let names = fs::read_dir(&blobs).ok()?.map(|entry| entry.unwrap().path());
        names
            .filter(|path| path.extension().is_some_and(|e| e == "part"))
            .find(|path| path.metadata().unwrap().len() > 2_000_000)
    };
    let start = Instant::now();
    let part = loop {
        if let Some(part) = part() {
            break part;
        }
        assert!(start.elapsed() < Duration::from_secs(60), "no part of the weights appeared");
        sleep(Duration::from_millis(20));
    };
    child.kill().unwrap();
    child.wait().unwrap();
    let there = part.metadata().unwrap().len() as usize;
    assert!(!home.snapshot("c0ffee").join("model.safetensors").exists());
    let offline = home.generate(ID, &["--offline"]);
    assert!(offline.mistake().contains("model.safetensors"), "{}", offline.stderr);
    (hub.state().cut, hub.state().stall) = (None, false);
    hub.requests();
    home.inspect(ID, &[]).ok();
    assert_eq!(offsets(&hub), [there]);
    assert!(fs::read(home.snapshot("c0ffee").join("model.safetensors")).unwrap() == weights);

    // A part that is whole (killed before it got its name) or too long, and a blob of the wrong length, begin anew.
    for length in [weights.len(), weights.len() + 1] {
        let home = Home::of(&hub);
        fs::create_dir_all(home.model().join("blobs")).unwrap();
        let part = home.model().join("blobs").join(part.file_name().unwrap());
        fs::write(&part, vec![0; length]).unwrap();
        home.inspect(ID, &[]).ok();
        let path = home.snapshot("c0ffee").join("model.safetensors");
        assert!(fs::read(&path).unwrap() == weights && !part.exists());
        fs::write(path.canonicalize().unwrap(), "damaged").unwrap();
        home.inspect(ID, &[]).ok();
        assert!(fs::read(&path).unwrap() == weights);
    }
    hub.requests();

    // A server that sends the whole file where its end was asked for.
    let home = Home::of(&hub);
    hub.state().ignore_ranges = true;
    fs::create_dir_all(home.model().join("blobs")).unwrap();
    fs::write(home.model().join("blobs").join(part.file_name().unwrap()), &weights[..1000]).unwrap();
    home.inspect(ID, &[]).ok();
    assert_eq!(offsets(&hub), [1000, 0]);
    assert!(fs::read(home.snapshot("c0ffee").join("model.safetensors")).unwrap() == weights);
}

#[test]
fn a_new_commit_brings_what_has_changed() {
    let hub = FakeHub::new(files(checkpoint()));
    let home = Home::of(&hub);
    home.inspect(ID, &[]).ok();
    hub.requests();
    {
        let mut state = hub.state();
        state.commit = "decade".into();
        state.files.insert("generation_config.json".into(), b"{\"eos_token_id\": 3}".to_vec());
    }
    // As long as it has not come whole, the old one is what the cache has.
    hub.state().refuse_files = Some(403);
    mistake(&home.inspect(ID, &[]));
    assert_eq!(fs::read_to_string(home.model().join("refs/main")).unwrap(), "c0ffee");
    home.inspect(ID, &["--offline"]).ok();
    hub.state().refuse_files = None;
    hub.requests();
    home.inspect(ID, &[]).ok();
    let fetched: Vec<String> = hub.requests().into_iter().filter(|request| request.ends_with('-')).collect();
    assert_eq!(fetched, [format!("/{ID}/resolve/decade/generation_config.json bytes=0-")]);
    assert_eq!(fs::read_to_string(home.model().join("refs/main")).unwrap(), "decade");
    // The new snapshot is whole, and the old one still there under its own name.
    home.generate(ID, &["--offline"]).ok();
    home.generate(&format!("{ID}@c0ffee"), &["--offline"]).ok();
    let absent = home.generate(&format!("{ID}@v9"), &[]);
    assert!(mistake(&absent).contains("no revision `v9`"), "{}", absent.stderr);
}

#[test]
fn of_shards_only_those_who_compute_take_any() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("sharded");
    let to = out.to_str().unwrap();
    m1("quantize", &["--to", "int8", "--out", to, "--max-shard-bytes", "20000"], "").ok();
    let hub = FakeHub::new(files(&out));
    let home = Home::of(&hub);
    let report = home.inspect(ID, &["--json"]).ok().stdout;
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    assert!(report["files"]["listed"].as_u64().unwrap() > 2 && report["files"]["present"] == 0, "{report}");
    assert!(hub.requests().iter().all(|request| !request.contains("-of-")));
    let lacking = home.generate(ID, &["--offline"]);
    assert!(mistake(&lacking).contains("model-00001-of-"), "{}", lacking.stderr);

    let wanted = home.generate(to, &[]).ok().stdout;
    assert_eq!(home.generate(ID, &[]).ok().stdout, wanted);
    assert_eq!(home.generate(ID, &["--offline"]).ok().stdout, wanted);
    let again = dir.path().join("again");
    let quantize = ["quantize", "--model", ID, "--offline", "--to", "int4", "--out", again.to_str().unwrap()];
    assert!(mistake(&home.run(&quantize)).contains("is quantized already"));

    // A shard that the model does not have.
    let home = Home::of(&hub);
    let shard = hub.state().files.keys().find(|name| name.contains("-of-")).unwrap().clone();
    hub.state().files.remove(&shard);
    let run = home.generate(ID, &[]);
    assert!(mistake(&run).contains(&format!("there is no {shard} at")), "{}", run.stderr);
    hub.state().ghosts.push(shard.clone());
    let run = home.generate(ID, &[]);
    assert!(mistake(&run).contains(&format!("there is no {shard} at")), "{}", run.stderr);
}

#[test]
fn tokens_are_shown_and_refusals_told_in_one_line() {
    let hub = FakeHub::new(files(checkpoint()));
    let home = Home::of(&hub);
    fs::write(home.dir.path().join("token"), "from-file\n").unwrap();
    home.inspect(ID, &[]).ok();
    assert!(hub.requests().iter().all(|request| request.ends_with(" Bearer from-file")));
    let home = Home::of(&hub);
    let mut command = home.command(&["inspect", "--model", ID]);
    command.env("HF_TOKEN", "from-variable");
    common::run(command, "").ok();
    assert!(hub.requests().iter().all(|request| request.ends_with(" Bearer from-variable")));

    let endpoint = &home.endpoint;
    let refused = |status: u16| {
        format!(
            "error: {ID}: {endpoint} refuses config.json (status {status}): accept the model's terms at {endpoint}/{ID}, \
             and set HF_TOKEN to a token that may read it"
        )
    };
    for status in [401, 403] {
        let home = Home::of(&hub);
        hub.state().refuse_files = Some(status);
        assert_eq!(mistake(&home.generate(ID, &[])), refused(status));
        hub.state().refuse_files = None;
    }
    for (listing, wanted) in [
        (
            (401, ""),
            format!("error: {ID}: no such directory, and no such model at {endpoint} (status 401): mind the spelling"),
        ),
        (
            (404, "RepoNotFound"),
            format!("error: {ID}: no such directory, and no such model at {endpoint} (status 404)"),
        ),
        ((403, "GatedRepo"), refused(403)),
        (
            (503, ""),
            format!("error: {ID}: config.json could not be fetched from {endpoint} (status 503): --model DIR takes"),
        ),
    ] {
        let home = Home::of(&hub);
        hub.state().refuse_listing = Some(listing);
        let run = home.generate(ID, &[]);
        assert!(mistake(&run).starts_with(&wanted), "{}", run.stderr);
    }
    hub.state().refuse_listing = None;

    let (config, weights) = (&["config.json"][..], &["model.safetensors"][..]);
    for (names, wanted) in [(config, "config.json"), (weights, "model.safetensors or model.safetensors.index.json")] {
        let home = Home::of(&hub);
        let all = hub.state().files.clone();
        hub.state().files.retain(|name, _| !names.contains(&name.as_str()));
        let run = home.generate(ID, &[]);
        assert!(
            mistake(&run).starts_with(&format!("error: {ID}: there is no {wanted} at {endpoint}: ")),
            "{}",
            run.stderr
        );
        hub.state().files = all;
    }
}

#[test]
fn without_a_network_one_line_says_what_to_do() {
    let home = Home::without_network();
    let endpoint = &home.endpoint;
    let run = home.generate(ID, &[]);
    let line = run.mistake();
    let wanted = format!("error: {ID}: config.json could not be fetched from {endpoint} (");
    assert!(line.starts_with(&wanted), "{line}");
    assert!(line.ends_with("): --model DIR takes a directory, --offline what is in the cache"), "{line}");
    let cache = home.dir.path().join("hub").display().to_string();
    let offline = home.generate(ID, &["--offline"]);
    assert_eq!(
        offline.mistake(),
        format!(
            "error: {ID}: config.json is not in the cache {cache} and was not to be fetched: leave --offline \
             (HF_HUB_OFFLINE) out, or give --model DIR"
        )
    );
    // What is no id is asked for nowhere.
    for text in ["nano", "a/b/c", "./a/b", "runs/nano/"] {
        let run = home.generate(text, &[]);
        assert!(
            run.mistake().starts_with(&format!("error: {text}: no such directory (--model takes")),
            "{}",
            run.stderr
        );
    }
    assert!(!home.dir.path().join("hub").exists(), "nothing was written");
}
