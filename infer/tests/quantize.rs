//! `m1 quantize` and `--quantize` from the outside.

mod common;

use common::{bare, checkpoint, m1, run};
use std::path::Path;

/// `m1 COMMAND --model DIR ARGS`.
fn on(dir: &Path, name: &str, args: &[&str]) -> common::Run {
    let mut command = bare(&[name, "--device", "cpu", "--model"]);
    command.arg(dir).args(args);
    run(command, "")
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The bytes that `m1 logits` writes for some tokens.
fn logits(dir: &Path, args: &[&str]) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let (tokens, out) = (folder.path().join("ids.json"), folder.path().join("out.safetensors"));
    std::fs::write(&tokens, "[[1, 2, 3, 250, 7], [], [9]]").unwrap();
    let got = on(dir, "logits", &[&["--tokens", text(&tokens), "--out", text(&out)], args].concat());
    got.ok();
    std::fs::read(out).unwrap()
}

#[test]
fn a_quantized_directory_is_a_checkpoint_like_any_other() {
    let folder = tempfile::tempdir().unwrap();
    for (flags, way) in [
        (&["--to", "int8"][..], &["--quantize", "int8"][..]),
        (
            &["--to", "int4", "--all", "--block", "32"],
            &["--quantize", "int4", "--quantize-all", "--quantize-block", "32"],
        ),
    ] {
        let out = folder.path().join(flags[1]);
        let got = m1("quantize", &[flags, &["--out", text(&out), "--max-shard-bytes", "20000"]].concat(), "").ok();
        assert!(got.stderr.contains(" KiB instead of ") && got.stdout.is_empty(), "{}", got.stderr);
        let plain = logits(checkpoint(), &[]);
        let quantized = logits(&out, &[]);
        assert!(quantized == logits(checkpoint(), way), "{flags:?}");
        assert!(quantized != plain, "{flags:?}");
        // Tokenizer and end ids went along.
        let chat = on(&out, "chat", &["--prompt", "Hello", "-n", "5", "--seed", "3"]).ok();
        let straight = m1("chat", &[&["--prompt", "Hello", "-n", "5", "--seed", "3"], way].concat(), "").ok();
        assert_eq!(chat.stdout, straight.stdout);
        let report: serde_json::Value = serde_json::from_str(&on(&out, "inspect", &["--json"]).ok().stdout).unwrap();
        let bits = if flags[1] == "int8" { 8 } else { 4 };
        assert_eq!(report["quantization"]["bits"], bits);
        assert_eq!(report["tensors"]["missing"].as_array().unwrap().len(), 0);
        let stored = report["weight_bytes"]["stored"].as_u64().unwrap();
        assert!(stored < report["weight_bytes"]["f32"].as_u64().unwrap());
        assert!(on(&out, "inspect", &[]).ok().stdout.contains(&format!("quantized: {bits} bits (experts {bits}")));
    }
}

#[test]
fn mistakes_are_one_line_each() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let new = text(&out);
    let says = |args: &[&str], wanted: &str| {
        let got = m1("quantize", args, "");
        assert!(got.mistake().contains(wanted), "{}", got.stderr);
        assert!(!out.exists());
    };
    says(&["--to", "int3", "--out", new], "`int3` is not a quantized format: expected int8 or int4");
    says(&["--to", "int8", "--out", new, "--block", "16"], "32 or 64 is wanted");
    says(&["--to", "int8", "--out", new, "--block", "64"], "blocks of 64 weights do not divide hidden_size = 32");
    says(&["--to", "int8"], "--out");
    says(&["--to", "int8", "--out", text(checkpoint())], "exists and is not an empty directory");
    let absent = on(Path::new("/no/such"), "quantize", &["--to", "int8", "--out", new]);
    assert!(absent.mistake().contains("/no/such: no such directory"), "{}", absent.stderr);

    m1("quantize", &["--to", "int8", "--out", new], "").ok();
    let again = folder.path().join("again");
    let got = on(&out, "quantize", &["--to", "int4", "--out", text(&again)]);
    assert!(got.mistake().contains("is quantized already (experts int8)"), "{}", got.stderr);
    let got = on(&out, "generate", &["--prompt", "a", "--quantize", "int8"]);
    assert!(got.mistake().contains("is quantized already (experts int8)"), "{}", got.stderr);
    let got = m1("generate", &["--prompt", "a", "--quantize-all"], "");
    assert!(got.mistake().contains("--quantize"), "{}", got.stderr);
}
