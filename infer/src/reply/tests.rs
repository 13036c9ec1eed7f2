use super::*;
use crate::think::NO_THINKING;
use crate::tokenizer::tests::byte_level;
use std::path::Path;

fn nano() -> Arc<Tokenizer> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/m1-nano");
    Arc::new(Tokenizer::from_dir(&dir).unwrap())
}

fn bytes() -> Arc<Tokenizer> {
    let dir = tempfile::tempdir().unwrap();
    Arc::new(byte_level(dir.path(), &["<end_of_sentence>", "<tool_calls>"]))
}

fn settings(start: Start, tools: bool, stops: &[&str]) -> ReplySettings {
    let stops = stops.iter().map(|s| s.to_string()).collect();
    ReplySettings { start, tools, stops, call_ids: CallIds::seeded(1) }
}

/// Pieces of the same kind joined.
fn joined(deltas: Vec<Delta>) -> Vec<Delta> {
    let mut all: Vec<Delta> = Vec::new();
    for delta in deltas {
        match (all.last_mut(), delta) {
            (Some(Delta::Reasoning(last)), Delta::Reasoning(text)) => last.push_str(&text),
            (Some(Delta::Content(last)), Delta::Content(text)) => last.push_str(&text),
            (Some(Delta::ToolArguments { index: i, fragment: last }), Delta::ToolArguments { index, fragment })
                if *i == index =>
            {
                last.push_str(&fragment)
            }
            (_, delta) => all.push(delta),
        }
    }
    all
}

fn from_ids(tokenizer: &Arc<Tokenizer>, ids: &[u32], settings: ReplySettings) -> (Vec<Delta>, Reply) {
    let mut reply = Reply::new(tokenizer.clone(), settings);
    let mut deltas: Vec<Delta> = ids.iter().flat_map(|&id| reply.push(id)).collect();
    deltas.extend(reply.finish());
    assert!(!deltas.iter().any(|d| matches!(d, Delta::Reasoning(t) | Delta::Content(t) if t.is_empty())));
    (joined(deltas), reply)
}

/// As if the text came in these pieces, whatever the tokens.
fn from_texts(tokenizer: &Arc<Tokenizer>, texts: &[&str], settings: ReplySettings) -> Vec<Delta> {
    let mut reply = Reply::new(tokenizer.clone(), settings);
    for text in texts {
        if !reply.stopped() {
            reply.take(text);
        }
    }
    let mut deltas = std::mem::take(&mut reply.deltas);
    deltas.extend(reply.finish());
    joined(deltas)
}

fn parts(deltas: Vec<Delta>) -> Parts {
    let mut parts = Parts::default();
    deltas.into_iter().for_each(|delta| parts.take(delta));
    parts
}

/// What follows a block: without the tags that close it again.
fn after_block(mut rest: &str) -> &str {
    while let Some(more) = rest.trim_start().strip_prefix(think::CLOSE) {
        rest = more;
    }
    rest
}

/// The definition, on the whole text.
fn by_definition(text: &str, start: Start, tools: bool) -> (Option<String>, String, Vec<(String, String)>) {
    let thought = match start {
        Start::After => None,
        Start::Inside => Some(("", text)),
        Start::Before => text.split_once(think::OPEN).filter(|(before, _)| !(tools && before.contains(tools::OPEN))),
    };
    let mut beside = start != Start::Before;
    let (mut content, mut reasoning, mut rest) = (String::new(), None, text);
    if start == Start::After {
        rest = after_block(text);
    }
    if let Some((before, inside)) = thought {
        content = before.trim_end_matches('\n').to_string();
        let (thought, after) = inside.split_once(think::CLOSE).unwrap_or((inside, ""));
        let thought = thought.trim_matches('\n');
        reasoning = (!thought.is_empty()).then(|| thought.to_string());
        (beside, rest) = (true, after_block(after));
    }
    let trim =
        |text: &str, beside: bool| if beside { text.trim_start_matches('\n').to_string() } else { text.to_string() };
    match rest.split_once(tools::OPEN).filter(|_| tools) {
        None => (reasoning, content + &trim(rest, beside), vec![]),
        Some((before, _)) => {
            let (outside, calls) = tools::parse(rest);
            content += trim(before, beside).trim_end_matches('\n');
            (reasoning, content + &trim(&outside[before.len()..], true), calls)
        }
    }
}

/// How many ids have a byte in the reasoning.
fn ids_of_reasoning(tokenizer: &Tokenizer, ids: &[u32], start: Start, tools: bool) -> usize {
    let bytes: Vec<u8> = ids.iter().flat_map(|&id| tokenizer.bytes(id).unwrap()).copied().collect();
    let find =
        |tag: &str, from: usize| Some(from + bytes[from..].windows(tag.len()).position(|w| w == tag.as_bytes())?);
    let mut begin = match start {
        Start::After => return 0,
        Start::Inside => 0,
        Start::Before => match (find(think::OPEN, 0), find(tools::OPEN, 0)) {
            (None, _) => return 0,
            (Some(at), Some(calls)) if tools && calls < at => return 0,
            (Some(at), _) => at + think::OPEN.len(),
        },
    };
    let mut end = find(think::CLOSE, begin).unwrap_or(bytes.len());
    while begin < end && bytes[begin] == b'\n' {
        begin += 1;
    }
    while begin < end && bytes[end - 1] == b'\n' {
        end -= 1;
    }
    let mut at = 0;
    let inside = |&&id: &&u32| {
        let from = at;
        at += tokenizer.bytes(id).unwrap().len();
        from < end && at > begin && from < at
    };
    ids.iter().filter(inside).count()
}

const USUAL: &str = "<think>\nI need it.\n\nSo: <tool_calls>?\n</think>\n\nLet me look.\n<tool_calls>\n\
    {\"name\": \"f\", \"arguments\": {\"s\": \"<think>\"}}\n\
    {\"name\": \"g\", \"arguments\": {}}\n</tool_calls>";

#[test]
fn a_reply_in_its_usual_form_and_back() {
    for tokenizer in [nano(), bytes()] {
        let ids = tokenizer.encode(USUAL, false).unwrap();
        let (deltas, reply) = from_ids(&tokenizer, &ids, settings(Start::Before, true, &[]));
        assert!(reply.called_tools() && !reply.stopped());
        let parts = parts(deltas);
        assert_eq!(parts.reasoning.as_deref(), Some("I need it.\n\nSo: <tool_calls>?"));
        assert_eq!(parts.content, "Let me look.");
        let arguments: Vec<_> = parts.calls.iter().map(|c| (c.name.as_str(), c.arguments.as_str())).collect();
        assert_eq!(arguments, [("f", "{\"s\": \"<think>\"}"), ("g", "{}")]);
        let ids: Vec<_> = parts.calls.iter().map(|c| c.id.clone()).collect();
        assert!(ids[0] != ids[1] && ids.iter().all(|id| id.len() == 29 && id.starts_with("call_")));
        assert_eq!(rebuild(parts.reasoning.as_deref(), &parts.content, &parts.calls), USUAL);
    }
}

#[test]
fn what_was_said_comes_back_as_it_was_written() {
    let tokenizer = nano();
    for text in [
        "42",
        "<think>\nx\n</think>\n\n42",
        "<think>\na\n\nb\n</think>\n\n",
        "\n\nnot thought of\n",
        "<think>\nc\n</think>\n\n1\n\n2\n",
    ] {
        let ids = tokenizer.encode(text, false).unwrap();
        let parts = parts(from_ids(&tokenizer, &ids, settings(Start::Before, true, &[])).0);
        assert_eq!(rebuild(parts.reasoning.as_deref(), &parts.content, &parts.calls), text);
    }
    assert_eq!(rebuild(Some(""), "42", &[]), format!("{NO_THINKING}42"));
}

#[test]
fn every_split_in_two_and_three_gives_the_same() {
    let tokenizer = nano();
    let samples = [
        (USUAL, Start::Before, true),
        (USUAL, Start::Before, false),
        ("\nhm </thin\n\n</think>\n\n\n1 < 2, <think>\n", Start::Inside, true),
        ("ab\n<think>\n\n</think>\n<tool_calls>oops</tool_calls>\n\nc<tool_calls>\n", Start::Before, true),
        (
            "<tool_calls>\n{\"name\":\"f\",\"arguments\":{\"t\":\"<think></tool_calls>\"}}\n</tool_calls>\n<think>",
            Start::Before,
            true,
        ),
        ("\n\nx\n<think>", Start::After, true),
        ("a\n</think>\n\n</think>\n </think>\n\nb</think>", Start::Inside, true),
        ("\n</think>\n<tool_calls>\n</tool_calls>", Start::After, true),
        ("é<think>é", Start::Before, false),
    ];
    for (text, start, tools) in samples {
        let settings = || settings(start, tools, &["END"]);
        let whole = from_texts(&tokenizer, &[text], settings());
        let found = parts(whole.clone());
        let calls: Vec<_> = found.calls.iter().map(|c| (c.name.clone(), c.arguments.clone())).collect();
        assert_eq!((found.reasoning, found.content, calls), by_definition(text, start, tools), "{text:?}");
        let cuts: Vec<usize> = text.char_indices().map(|(i, _)| i).chain([text.len()]).collect();
        for (i, &at) in cuts.iter().enumerate() {
            for &then in &cuts[i..] {
                let got = from_texts(&tokenizer, &[&text[..at], &text[at..then], &text[then..]], settings());
                assert_eq!(got, whole, "{text:?} at {at}, {then}");
            }
        }
    }
}

#[test]
fn stop_strings_end_the_content_only() {
    let tokenizer = nano();
    let run = |text: &str, stops: &[&str]| {
        let ids = tokenizer.encode(text, false).unwrap();
        let mut reply = Reply::new(tokenizer.clone(), settings(Start::Before, true, stops));
        let mut deltas = Vec::new();
        for &id in &ids {
            deltas.extend(reply.push(id));
        }
        let stopped = reply.stopped();
        deltas.extend(reply.finish());
        (parts(deltas), stopped)
    };
    let (found, stopped) = run("<think>\nEND\n</think>\n\none\n\nEND two", &["END"]);
    assert_eq!((found.reasoning.as_deref(), found.content.as_str(), stopped), (Some("END"), "one\n\n", true));
    // The breaks after the thought are no content: "\n\n" does not stop there.
    let (found, stopped) = run("<think>\nx\n</think>\n\none\n\ntwo", &["\n\n"]);
    assert_eq!((found.content.as_str(), stopped), ("one", true));
    // What may be a stop string's beginning comes in the end, or before a call.
    assert_eq!(run("the EN", &["END"]).0.content, "the EN");
    let (found, stopped) =
        run("EN<tool_calls>{\"name\": \"f\", \"arguments\": {\"a\": \"END\"}}</tool_calls>D", &["END"]);
    assert_eq!((found.content.as_str(), found.calls.len(), stopped), ("END", 1, false));
    let (found, stopped) = run("a END<tool_calls>{\"name\": \"f\", \"arguments\": {}}</tool_calls>", &["END"]);
    assert_eq!((found.content.as_str(), found.calls.len(), stopped), ("a ", 0, true));
}

#[test]
fn reasoning_tokens_are_those_of_the_reasoning() {
    let tokenizer = nano();
    let count = |text: &str, start| {
        let ids = tokenizer.encode(text, false).unwrap();
        from_ids(&tokenizer, &ids, settings(start, false, &[])).1.reasoning_tokens()
    };
    let of = |text: &str| tokenizer.encode(text, false).unwrap().len();
    let thought = "Sort 3, 1:\n\n1, 3.";
    assert_eq!(count(&format!("<think>\n{thought}\n</think>\n\n1, 3"), Start::Before), of(thought));
    assert_eq!(count(&format!("{thought}</think>1"), Start::Inside), of(thought));
    assert_eq!(count(&format!("<think>\n{thought}\n"), Start::Before), of(thought));
    assert_eq!(count(&format!("{NO_THINKING}12"), Start::Before), 0);
    assert_eq!(count("<think>is a tag", Start::After), 0);
    // Tags of several ids count no more than those of one; of characters every id counts.
    let bytes = bytes();
    let ids = bytes.encode("<think>\n上\n</think>\n\nx", false).unwrap();
    assert_eq!(from_ids(&bytes, &ids, settings(Start::Before, false, &[])).1.reasoning_tokens(), 3);
}

#[test]
fn broken_calls_are_left_out_of_the_whole() {
    let tokenizer = nano();
    let text = "<tool_calls>\n{\"name\": \"f\", \"arguments\": {\"a\": oops}}\n\
        {\"name\": \"g\", \"arguments\": {}}\n{\"name\": \"h\", \"arguments\": {\"b";
    let (deltas, reply) =
        from_ids(&tokenizer, &tokenizer.encode(text, false).unwrap(), settings(Start::Before, true, &[]));
    assert!(deltas.contains(&Delta::ToolBroken { index: 0 }) && deltas.contains(&Delta::ToolBroken { index: 2 }));
    let calls = parts(deltas).calls;
    assert_eq!(calls.iter().map(|c| c.name.as_str()).collect::<Vec<_>>(), ["g"]);
    assert!(reply.called_tools());
}

/// Wherever a limit cuts a sound reply off: its parts are what a client makes of the stream.
#[test]
fn a_reply_that_is_cut_off_is_the_sum_of_its_stream() {
    for tokenizer in [nano(), bytes()] {
        let ids = tokenizer.encode(USUAL, false).unwrap();
        let mut partial = 0;
        for end in 0..=ids.len() {
            let mut reply = Reply::new(tokenizer.clone(), settings(Start::Before, true, &[]));
            let mut deltas: Vec<Delta> = ids[..end].iter().flat_map(|&id| reply.push(id)).collect();
            deltas.extend(reply.cut());
            let mut calls: Vec<(String, String)> = Vec::new();
            for delta in &deltas {
                match delta {
                    Delta::ToolCall { name, .. } => calls.push((name.clone(), String::new())),
                    Delta::ToolArguments { index, fragment } => calls[*index].1.push_str(fragment),
                    Delta::ToolBroken { .. } => panic!("{:?}", tokenizer.decode(&ids[..end])),
                    Delta::Reasoning(_) | Delta::Content(_) => (),
                }
            }
            let found = parts(deltas).calls.into_iter().map(|call| (call.name, call.arguments));
            assert_eq!(found.collect::<Vec<_>>(), calls);
            partial += usize::from(calls.iter().any(|(_, a)| serde_json::from_str::<serde_json::Value>(a).is_err()));
        }
        assert!(partial > 3, "{partial}");
    }
}

#[test]
fn call_ids_are_their_seeds() {
    let ids = |seed| {
        let mut ids = CallIds::seeded(seed);
        [ids.draw(), ids.draw()]
    };
    assert_eq!(ids(1), ids(1));
    assert_ne!(ids(1), ids(2));
    assert_ne!(CallIds::random().draw(), CallIds::random().draw());
}

/// Random ids of the shipped vocabulary and of bytes alone, with all that matters among them. Streamed id by id,
/// character by character and as one text it is the same, and what the definition says.
#[test]
fn fuzz_over_tokens() {
    const PIECES: [&str; 25] = [
        "<think>",
        "</think>",
        "</think>\n\n</think>",
        "<tool_calls>",
        "</tool_calls>",
        "<think>\n",
        "\n</think>\n\n",
        "<tool_calls>\n",
        "\n</tool_calls>",
        "\n",
        "\n\n",
        "<",
        "</",
        "<th",
        "ink>",
        "{\"name\": \"f\", \"arguments\": {}}\n",
        "{\"name\": \"g\", \"arguments\": {\"k\": [1, \"上\"]}}\n",
        "{\"name\": \"h\", ",
        "}",
        "\"",
        "上海",
        "text",
        " ",
        "END",
        "tool_calls>",
    ];
    for tokenizer in [nano(), bytes()] {
        let mut rng = ChaCha8Rng::seed_from_u64(9);
        let size = tokenizer.size() as u32;
        let (mut reasoned, mut called, mut stopped, mut closed_again) = (0, 0, 0, 0);
        for case in 0..4000 {
            let mut ids = Vec::new();
            for _ in 0..rng.random_range(1..12) {
                match rng.random_range(0..5) {
                    0 => ids.extend((0..rng.random_range(1..4)).map(|_| rng.random_range(0..size))),
                    // The same text in ids that no tokenizer would choose.
                    1 => {
                        let piece = PIECES[rng.random_range(0..PIECES.len())];
                        for c in piece.chars() {
                            ids.extend(tokenizer.encode(&c.to_string(), false).unwrap());
                        }
                    }
                    _ => ids.extend(tokenizer.encode(PIECES[rng.random_range(0..PIECES.len())], false).unwrap()),
                }
            }
            let text = tokenizer.decode(&ids);
            let start = [Start::Before, Start::Before, Start::Inside, Start::After][case % 4];
            let tools = case % 3 > 0;
            let stops: &[&str] = if case % 5 == 0 { &["END", "海t"] } else { &[] };
            let settings = || settings(start, tools, stops);
            let (streamed, reply) = from_ids(&tokenizer, &ids, settings());
            assert_eq!(streamed, from_texts(&tokenizer, &[&text], settings()), "{text:?}");
            let characters: Vec<String> = text.chars().map(String::from).collect();
            let characters: Vec<&str> = characters.iter().map(String::as_str).collect();
            assert_eq!(streamed, from_texts(&tokenizer, &characters, settings()), "{text:?}");
            stopped += usize::from(reply.stopped());
            let found = parts(streamed);
            if !reply.stopped() {
                let (reasoning, content, calls) = by_definition(&text, start, tools);
                assert_eq!((&found.reasoning, &found.content), (&reasoning, &content), "{text:?}");
                let pairs: Vec<_> = found.calls.iter().map(|c| (c.name.clone(), c.arguments.clone())).collect();
                assert_eq!(pairs, calls, "{text:?}");
            }
            if !reply.stopped() {
                assert_eq!(reply.reasoning_tokens(), ids_of_reasoning(&tokenizer, &ids, start, tools), "{text:?}");
            }
            reasoned += usize::from(found.reasoning.is_some());
            called += usize::from(!found.calls.is_empty());
            assert!(!found.reasoning.is_some_and(|text| text.contains(think::CLOSE)), "{text:?}");
            let after = match start {
                Start::Inside => text.split_once(think::CLOSE).map(|(_, after)| after),
                Start::After => Some(text.as_str()),
                Start::Before => None,
            };
            if after.is_some_and(|after| after.trim_start().starts_with(think::CLOSE)) {
                closed_again += 1;
                // (Behind calls it is text.)
                assert!(tools || !found.content.trim_start().starts_with(think::CLOSE), "{text:?}");
            }
        }
        assert!(reasoned > 500 && called > 30 && stopped > 30, "{reasoned} {called} {stopped}");
        assert!(closed_again > 100, "{closed_again}");
    }
}

/// Well-formed replies of random words, cut into random ids: no piece of a tag in any delta.
#[test]
fn no_part_of_a_tag_leaks() {
    for tokenizer in [nano(), bytes()] {
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        for case in 0..600u64 {
            let mut words = || {
                (0..rng.random_range(1..6))
                    .map(|_| ["a", "3 > 2", "上\n", "b. ", "is{}"][rng.random_range(0..5)])
                    .collect::<String>()
            };
            let call = format!("{{\"name\": \"f\", \"arguments\": {{\"x\": {:?}}}}}\n", words());
            let closed = ["", "</think>\n\n", "\n</think> </think>\n"][case as usize % 3];
            let (thought, said) = (words(), words());
            let text =
                format!("<think>\n{thought}\n</think>\n\n{closed}{said}\n<tool_calls>\n{call}{call}</tool_calls>");
            // Every character by itself, or as the tokenizer likes it, in turn.
            let mut ids = Vec::new();
            let mut rest = text.as_str();
            while !rest.is_empty() {
                let n = rng.random_range(1..12);
                let end = rest.char_indices().nth(n).map_or(rest.len(), |(at, _)| at);
                ids.extend(tokenizer.encode(&rest[..end], false).unwrap());
                rest = &rest[end..];
            }
            let mut reply = Reply::new(tokenizer.clone(), settings(Start::Before, true, &["zzz"]));
            let mut deltas: Vec<Delta> = ids.iter().flat_map(|&id| reply.push(id)).collect();
            deltas.extend(reply.finish());
            for delta in &deltas {
                let (Delta::Reasoning(text) | Delta::Content(text) | Delta::ToolArguments { fragment: text, .. }) =
                    delta
                else {
                    continue;
                };
                assert!(
                    !text.contains(['<', '/']) && !text.contains("think") && !text.contains("calls"),
                    "case {case}: {delta:?}"
                );
            }
            let found = parts(deltas);
            assert_eq!(found.calls.len(), 2);
            let rebuilt = rebuild(found.reasoning.as_deref(), &found.content, &found.calls);
            let usual = text.replacen(closed, "", usize::from(!closed.is_empty()));
            assert_eq!(rebuilt.replace('\n', ""), usual.replace('\n', ""));
        }
    }
}
