//! `m1 chat` from the outside: what is read again and what is not, limits, Ctrl-C, pipes.

mod common;

use common::{bare, checkpoint, command, m1, run, tokenizer};
use std::io::{BufRead, BufReader, Read, Write};
use tokenizers::AddedToken;

/// (cached, read, made) of every line of statistics.
fn stats(stderr: &str) -> Vec<[usize; 3]> {
    let number = |line: &str, before: &str, after: &str| -> usize {
        let rest = line.split_once(before).unwrap().1;
        rest.split_once(after).unwrap().0.parse().unwrap()
    };
    let lines = stderr.lines().filter(|l| l.starts_with("prompt "));
    lines
        .map(|l| [number(l, "(", " cached"), number(l, " cached, ", " read"), number(l, "reply ", " tokens")])
        .collect()
}

fn tokens(text: &str) -> usize {
    tokenizer().encode(text, false).unwrap().len()
}

#[test]
fn a_turn_reads_only_what_is_new() {
    let got = m1("chat", &["--stats", "-n", "9", "--seed", "5", "--system", "Be brief."], "Hello\nAnd now?\n").ok();
    let first = "<begin_of_document><beginning_of_sentence>system ai_setting=assistant\nBe brief.<end_of_sentence>\n\
        <beginning_of_sentence>user name=user\nHello<end_of_sentence>\n<beginning_of_sentence>ai name=assistant\n";
    let between = "<end_of_sentence>\n<beginning_of_sentence>user name=user\nAnd now?<end_of_sentence>\n\
        <beginning_of_sentence>ai name=assistant\n";
    // The reply's last token was never fed back: it is read with the second turn.
    let wanted = [[0, tokens(first), 9], [tokens(first) + 8, 1 + tokens(between), 9]];
    assert_eq!(stats(&got.stderr), wanted, "{}", got.stderr);
}

#[test]
fn a_loaded_conversation_goes_on_as_the_one_that_was_saved() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("talk.json");
    let file = file.to_str().unwrap();
    let flags = ["--stats", "-n", "12", "--temperature", "0"];
    let going_on = m1("chat", &flags, &format!("Hello\n上海?\n/save {file}\nThird\n")).ok();
    let loaded = m1("chat", &flags, &format!("/load {file}\nThird\n")).ok();
    let (a, b) = (stats(&going_on.stderr), stats(&loaded.stderr));
    assert!(a[2][0] > 0 && b[0][0] == 0);
    assert_eq!(a[2][0] + a[2][1], b[0][0] + b[0][1], "the same ids whether kept or loaded");
    assert!(!loaded.stdout.trim().is_empty());
    assert!(going_on.stdout.ends_with(&loaded.stdout), "{:?} {:?}", going_on.stdout, loaded.stdout);
}

#[test]
fn one_shot_prints_the_reply_only_and_a_seed_repeats_it() {
    let ask = |seed: &str| m1("chat", &["--prompt", "Hi", "-n", "40", "--seed", seed], "").ok();
    let (a, b, c) = (ask("1"), ask("1"), ask("2"));
    assert_eq!(a.stdout, b.stdout);
    assert_ne!(a.stdout, c.stdout);
    assert!(a.stdout.ends_with('\n') && !a.stdout.contains("\x1b[2m") && !a.stdout.contains("device"));
    assert_eq!(a.stderr, "device: CPU (2 threads)\n[cut after 40 tokens]\n".replace("2 threads", &threads()));
}

fn threads() -> String {
    let n = std::thread::available_parallelism().unwrap().get();
    format!("{n} thread{}", if n == 1 { "" } else { "s" })
}

#[test]
fn thinking_off_begins_the_turn_with_an_empty_block() {
    let flags = ["--stats", "-n", "3", "--seed", "1"];
    let got = m1("chat", &flags, "a\n/clear\n/think off\na\nb\n").ok();
    let s = stats(&got.stderr);
    let block = tokens("<think>\n\n</think>\n\n");
    assert_eq!(block, 6);
    assert_eq!(s[1][0] + s[1][1], s[0][1] + block);
    // The block stays in the conversation.
    assert_eq!(s[1][2], 3);
    assert_eq!(s[2][0], s[1][0] + s[1][1] + 2);
}

#[test]
fn a_conversation_that_outgrows_the_context_says_so_and_stays() {
    let long = "x".repeat(200);
    let got = m1("chat", &["--stats", "-n", "4", "--context", "160"], &format!("a\n{long}\nb\n"));
    assert_eq!(got.code, Some(1), "a turn of a pipe failed");
    assert!(got.stderr.ends_with("error: 1 of the turns failed, as told above\n"), "{}", got.stderr);
    let lines: Vec<&str> = got.stderr.lines().filter(|l| l.contains("the context holds 160")).collect();
    assert_eq!(lines.len(), 1, "{}", got.stderr);
    let s = stats(&got.stderr);
    assert_eq!(s.len(), 2);
    assert_eq!(s[1][0], s[0][1] + 3, "the turn after it continues from the first");
    // One question alone: an error.
    let got = m1("chat", &["--context", "160", "--prompt", &long], "");
    assert!(got.mistake().contains("the context holds 160"));
    // A reply that fills it ends with a word about it.
    let got = m1("chat", &["--context", "100", "--stats", "--prompt", "a"], "").ok();
    assert!(got.stderr.contains("the context of 100 tokens is full"), "{}", got.stderr);
    let s = stats(&got.stderr);
    assert_eq!(s[0][1] + s[0][2], 100);
}

#[test]
fn commands_answer_and_mistakes_do_not_end_the_chat() {
    let lines = "/help\n/temperature 0.5\n/temperature hot\n/top_p 7\n/topk 3\n/nonsense\n/system Be kind.\n/think\n/stats\n\
        /load /no/such/file\n\"\"\"\ntwo\nlines\n\"\"\"\n/exit\nnever said\n";
    let got = m1("chat", &["--stats", "-n", "2"], lines).ok();
    for wanted in [
        "Ctrl-C",
        "temperature 0.5, top_p 0.95, top_k 0",
        "/temperature hot: a number is wanted",
        "top_p is 7, and must be",
        "temperature 0.5, top_p 0.95, top_k 3",
        "/nonsense: no such command",
        "system prompt: Be kind.",
        "thinking is on and shown",
        "nothing was said yet",
        "/no/such/file: ",
    ] {
        assert!(got.stderr.contains(wanted), "{wanted}: {}", got.stderr);
    }
    let s = stats(&got.stderr);
    assert_eq!(s.len(), 1);
    let prompt = "<begin_of_document><beginning_of_sentence>system ai_setting=assistant\nBe kind.<end_of_sentence>\n\
        <beginning_of_sentence>user name=user\ntwo\nlines<end_of_sentence>\n<beginning_of_sentence>ai name=assistant\n";
    assert_eq!(s[0][1], tokens(prompt));
}

#[cfg(unix)]
#[test]
fn ctrl_c_stops_the_reply_and_the_next_turn_goes_on_from_it() {
    let mut child = command("chat", &["--stats", "--seed", "3", "--context", "1000000"]).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    stdin.write_all(b"Hello\n").unwrap();
    stdout.read_exact(&mut [0; 20]).unwrap(); // it speaks
    let shown = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counter = shown.clone();
    let drain = std::thread::spawn(move || {
        let mut buffer = [0; 64];
        while let Ok(n @ 1..) = stdout.read(&mut buffer) {
            counter.fetch_add(n, std::sync::atomic::Ordering::SeqCst);
        }
    });
    let interrupt = || {
        let status = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status();
        assert!(status.unwrap().success());
    };
    let mut until = |wanted: &str| loop {
        let mut line = String::new();
        assert_ne!(stderr.read_line(&mut line).unwrap(), 0, "no {wanted:?}");
        if line.starts_with(wanted) {
            return line;
        }
    };
    interrupt();
    until("[stopped]");
    let first = stats(&until("prompt "))[0];
    assert!(first[2] >= 5 && first[2] < 100_000);
    let pause = || std::thread::sleep(std::time::Duration::from_millis(100));
    pause(); // the rest of the first reply
    let before = shown.load(std::sync::atomic::Ordering::SeqCst);
    stdin.write_all(b"Again\n").unwrap();
    while shown.load(std::sync::atomic::Ordering::SeqCst) < before + 20 {
        pause();
    }
    interrupt();
    until("[stopped]");
    let second = stats(&until("prompt "))[0];
    assert_eq!(second[0], first[1] + first[2] - 1, "prompt and reply are still there");
    drop(stdin);
    assert!(child.wait().unwrap().success());
    drain.join().unwrap();
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let mut child = command("chat", &["--prompt", "Hi", "-n", "3000"]).spawn().unwrap();
    child.stdout.take().unwrap().read_exact(&mut [0; 4]).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn mistakes_are_one_line_each() {
    let mistake = |args: &[&str]| m1("chat", args, "").mistake().to_string();
    assert!(mistake(&["--temperature", "-1"]).contains("temperature is -1, and must be"));
    assert!(mistake(&["--top-p", "x"]).contains("'x' for '--top-p <X>'"));
    assert!(mistake(&["--nonsense"]).contains("'--nonsense'"));
    assert!(mistake(&["--prompt", " "]).contains("--prompt: the text is empty"));
    assert!(mistake(&["-n", "-1"]).contains("'-1' for '--max-tokens <N>': a whole number from 0 on is wanted"));
    assert!(mistake(&["--seed", "-1"]).contains("'--seed <N>': a whole number"));
    let bare = |args: &[&str]| run(bare(args), "");
    assert!(bare(&["chat", "--model", "x", "--device", "tpu"]).mistake().contains("use auto, cpu, wgpu"));
    assert!(bare(&["chat"]).mistake().contains("--model <DIR|ID>"));
    let got = bare(&["chat", "--model", "/no/such", "--device", "cpu"]);
    assert_eq!(got.code, Some(1));
    assert!(got.mistake().contains("/no/such: no such directory"));
    // A checkpoint without a tokenizer, and one without a template.
    let dir = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(checkpoint()).unwrap().map(|f| f.unwrap()) {
        std::fs::copy(file.path(), dir.path().join(file.file_name())).unwrap();
    }
    let chat = || bare(&["chat", "--model", dir.path().to_str().unwrap(), "--device", "cpu", "--prompt", "a"]);
    std::fs::remove_file(dir.path().join("tokenizer_config.json")).unwrap();
    assert!(chat().mistake().contains("no chat template"));
    for (file, end) in [("generation_config.json", 320), ("config.json", 321)] {
        let path = dir.path().join(file);
        let kept = std::fs::read(&path).unwrap();
        let mut config: serde_json::Value = serde_json::from_slice(&kept).unwrap();
        config["eos_token_id"] = end.into();
        std::fs::write(&path, config.to_string()).unwrap();
        let wanted = format!("{file}: eos_token_id is {end}, and must be");
        assert!(chat().mistake().contains(&wanted));
        std::fs::write(&path, kept).unwrap();
        std::fs::rename(&path, dir.path().join("kept")).unwrap(); // config.json counts where the other is silent
    }
    std::fs::write(dir.path().join("generation_config.json"), r#"{"eos_token_id": 319}"#).unwrap();
    std::fs::rename(dir.path().join("kept"), dir.path().join("config.json")).unwrap();
    let mut large = tokenizer();
    large.add_tokens(&std::array::from_fn::<_, 70, _>(|i| AddedToken::from(format!("<{i}>"), false)));
    large.save(dir.path().join("tokenizer.json"), false).unwrap();
    assert!(chat().mistake().contains("ids up to 331, and config.json's vocab_size is 320"));
    std::fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
    assert!(chat().mistake().contains("tokenizer.json: not found"));
    let help = bare(&["chat", "--help"]).ok();
    assert!(help.stdout.contains("Examples:") && help.stderr.is_empty());
}
