use super::*;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::Value;

/// Runs the parser over `parts` and joins what belongs together.
fn run(parts: &[&str]) -> Vec<ToolEvent> {
    let mut parser = ToolParser::default();
    let mut all: Vec<ToolEvent> = Vec::new();
    let mut events: Vec<ToolEvent> = parts.iter().flat_map(|p| parser.push(p)).collect();
    events.extend(parser.finish());
    for event in events {
        match (all.last_mut(), event) {
            (Some(ToolEvent::Text(last)), ToolEvent::Text(text)) => last.push_str(&text),
            (Some(ToolEvent::Arguments { index: last, fragment: to }), ToolEvent::Arguments { index, fragment })
                if *last == index =>
            {
                to.push_str(&fragment)
            }
            (_, event) => all.push(event),
        }
    }
    all
}

fn call(index: usize, name: &str, arguments: &str) -> [ToolEvent; 2] {
    [ToolEvent::Call { index, name: name.into() }, ToolEvent::Arguments { index, fragment: arguments.into() }]
}

fn calls(text: &str) -> Vec<(String, String)> {
    parse(text).1
}

/// The definition, line by line on the whole text, without the parser: the block's text, then each line by serde_json.
/// (For texts that have no closing tag inside a string.)
fn by_lines(text: &str) -> (String, Vec<(String, String)>) {
    let Some((before, rest)) = text.split_once(OPEN) else { return (text.into(), vec![]) };
    // Where the block is not closed, its tag may have begun.
    let (block, after) = rest.split_once(CLOSE).unwrap_or((&rest[..rest.len() - overlap(rest, CLOSE)], ""));
    let mut calls = Vec::new();
    for line in block.split('\n') {
        let Ok(Value::Object(call)) = serde_json::from_str(line) else { continue };
        if let (Some(Value::String(name)), Some(arguments @ Value::Object(_))) =
            (call.get("name"), call.get("arguments"))
        {
            calls.push((name.clone(), arguments.to_string()));
        }
    }
    (before.to_string() + after, calls)
}

const SAMPLES: [&str; 11] = [
    "Hi <tool_calls>\n{\"name\": \"f\", \"arguments\": {\"a\": [1, {\"b\": \"}\\\"\"}]}}\n\
     {\"name\": \"g\", \"arguments\": {}}\n</tool_calls> <b>",
    "<tool_calls>{\"arguments\":{\"x\":\"上\"},\"name\":\"f\"}</tool_calls>",
    "a<tool_calls>\nno\n{\"name\": \"f\"}\n{\"name\": \"h\", \"arguments\": {\"k\": nope}}\n\
     {\"name\": \"g\", \"arguments\": {}}",
    "<tool_calls>{\"name\":\"f\",\"arguments\":{\"t\":\"</tool_calls>\"}}\n</tool_calls>z",
    "<tool_calls>{\"name\":\"f\",\"arguments\":{\"t\":\"u</tool_calls>then\nmore",
    "<tool_calls>\n{\"name\": \"f\", \"arguments\": {}} x\n</tool_cal\n{\"name\":\"g\",\"arguments\":{}}</tool_call",
    "no calls, <tool_call> <too",
    "<tool_calls></tool_calls><tool_calls>{\"name\":\"f\",\"arguments\":{}}</tool_calls>",
    "<tool_calls>{\"name\":\"f\",\"arguments\":{\"t\":\"</tool_calls>\"<上海上海上海上海",
    "<tool_calls>{\"name\":\"f\",\"arguments\":{\"t\":\"</tool_calls>\"</tool_calls>x",
    "x\n<tool_calls>\r\n {\"id\": 7, \"name\" : \"f\" ,\"arguments\" :{ } } \r\n<<</tool_calls>\n",
];

#[test]
fn calls_come_as_they_are_written() {
    let wanted = [
        vec![ToolEvent::Text("Hi ".into())],
        call(0, "f", "{\"a\": [1, {\"b\": \"}\\\"\"}]}").to_vec(),
        call(1, "g", "{}").to_vec(),
        vec![ToolEvent::Text(" <b>".into())],
    ];
    assert_eq!(run(&[SAMPLES[0]]), wanted.concat());
    assert_eq!(run(&[SAMPLES[1]]), call(0, "f", "{\"x\":\"上\"}"));
    assert_eq!(calls(SAMPLES[10]), [("f".into(), "{ }".into())]);
    assert_eq!(parse(SAMPLES[6]), (SAMPLES[6].into(), vec![]));
}

#[test]
fn arguments_stream_before_their_line_ends() {
    let mut parser = ToolParser::default();
    assert_eq!(parser.push("<tool_calls>\n{\"name\": \"f\", \"argu"), []);
    assert_eq!(parser.push("ments\": {\"a\""), call(0, "f", "{\"a\""));
    assert!(parser.in_block());
    let fragment = |text: &str| vec![ToolEvent::Arguments { index: 0, fragment: text.into() }];
    assert_eq!(parser.push(": 1"), fragment(": 1"));
    assert_eq!(parser.push("}"), fragment("}"));
    assert_eq!(parser.push("}\n</tool_calls>"), []);
    assert!(!parser.in_block());
    assert_eq!(parser.push("<tool_calls>"), [ToolEvent::Text("<tool_calls>".into())]);
    // Arguments before the name wait for it.
    let mut parser = ToolParser::default();
    assert_eq!(parser.push("<tool_calls>{\"arguments\": {\"a\": 1}, \"name\": \"f"), []);
    assert_eq!(parser.push("\""), call(0, "f", "{\"a\": 1}"));
}

#[test]
fn bad_lines_are_skipped() {
    let bad = [
        "",
        "  ",
        "text",
        "[]",
        "\"x\"",
        "7",
        "{}",
        "{\"name\": \"f\"}",
        "{\"arguments\": {}}",
        "{name: f, arguments: {}}",
        "{\"name\": \"f\", \"arguments\": []}",
        "{\"name\": \"f\", \"arguments\": \"{}\"}",
        "{\"name\": 1, \"arguments\": {}}",
        "{\"name\": \"\", \"arguments\": {}}",
        "{\"name\": \"f\", \"arguments\": {}",
        "{\"name\": \"f\", \"arguments\": {}}}",
        "{\"name\": \"f\", \"name\": \"g\", \"arguments\": {}}",
        "{\"name\": \"f\", \"arguments\": {}, \"arguments\": {}}",
        "{\"name\": \"f\", \"arguments\": {\"a\": 01}}",
        "{\"name\": \"f\", \"arguments\": {}} // done",
        "<tool_calls>",
        "{\"x\": {\"name\": \"f\", \"arguments\": {}}}",
        "- {\"name\": \"f\", \"arguments\": {}}",
        "{\"name\": \"f\"; \"arguments\": {}}",
    ];
    for line in bad {
        let text = format!("<tool_calls>\n{line}\n{{\"name\": \"last\", \"arguments\": {{}}}}\n</tool_calls>");
        assert_eq!(parse(&text), ("".into(), vec![("last".into(), "{}".into())]), "{line}");
    }
}

#[test]
fn a_call_that_turns_bad_while_streaming_is_broken() {
    let events =
        run(&["<tool_calls>{\"name\": \"f\", \"arguments\": {\"a\": 1, oops}}\n{\"name\": \"g\", \"arguments\": {}}"]);
    let wanted =
        [call(0, "f", "{\"a\": 1, ").to_vec(), vec![ToolEvent::Broken { index: 0 }], call(1, "g", "{}").to_vec()];
    assert_eq!(events, wanted.concat());
    // A line cut off at the end of the text is one too.
    let events = run(&["<tool_calls>{\"name\": \"f\", \"arguments\": {\"a\": 1}"]);
    assert_eq!(events, [call(0, "f", "{\"a\": 1}").to_vec(), vec![ToolEvent::Broken { index: 0 }]].concat());
}

#[test]
fn a_call_that_a_limit_cut_off_stays_as_far_as_it_came() {
    let cut = |text: &str| {
        let mut parser = ToolParser::default();
        let mut events: Vec<ToolEvent> = text.chars().flat_map(|c| parser.push(&c.to_string())).collect();
        events.extend(parser.cut());
        let (mut outside, mut calls) = (String::new(), Vec::new());
        for event in events {
            match event {
                ToolEvent::Text(text) => outside += &text,
                ToolEvent::Call { name, .. } => calls.push((name, String::new(), true)),
                ToolEvent::Arguments { index, fragment } => calls[index].1 += &fragment,
                ToolEvent::Broken { index } => calls[index].2 = false,
            }
        }
        (outside, calls)
    };
    let f = |arguments: &str, whole: bool| (String::new(), vec![("f".to_string(), arguments.to_string(), whole)]);
    let begun = "<tool_calls>\n{\"name\": \"f\", \"arguments\": ";
    for arguments in
        ["{", "{\"a\": 1", "{\"a\": 1}", "{\"a\": \"x</to", "{\"a\": \"x</tool_calls>y", "{\"a\": \"</tool_calls>\"}"]
    {
        assert_eq!(cut(&format!("{begun}{arguments}")), f(arguments, true), "{arguments}");
    }
    // What no text could mend is broken, and what is whole is whole.
    assert_eq!(cut(&format!("{begun}{{\"a\": oops")), f("{\"a\": ", false));
    assert_eq!(cut(&format!("{begun}{{\"a\": 1</tool")), f("{\"a\": 1", false));
    assert_eq!(cut(&format!("{begun}{{\"a\": \"x</tool_calls>\ny")), ("\ny".into(), f("{\"a\": \"x", false).1));
    for end in ["}", "}\n", "}\n</tool", "}</tool_calls>"] {
        assert_eq!(cut(&format!("{begun}{{}}{end}")), f("{}", true), "{end:?}");
    }
    // Nothing was said of a call without a name.
    assert_eq!(cut("a<tool_calls>{\"arguments\": {\"a\": 1}, \"name\": \"f"), ("a".into(), vec![]));
    assert_eq!(cut("a<tool_"), ("a<tool_".into(), vec![]));
}

#[test]
fn a_closing_tag_in_a_string_is_text_only_of_a_whole_call() {
    assert_eq!(parse(SAMPLES[3]), ("z".into(), vec![("f".into(), "{\"t\":\"</tool_calls>\"}".into())]));
    let events = run(&[SAMPLES[4]]);
    let wanted = [
        call(0, "f", "{\"t\":\"u").to_vec(),
        vec![ToolEvent::Broken { index: 0 }, ToolEvent::Text("then\nmore".into())],
    ];
    assert_eq!(events, wanted.concat());
    // Whatever turns its line bad, the tag in the string was the block's.
    let begun = |after: &str| {
        let broken = vec![ToolEvent::Broken { index: 0 }, ToolEvent::Text(after.into())];
        [call(0, "f", "{\"t\":\"").to_vec(), broken].concat()
    };
    assert_eq!(run(&[SAMPLES[8]]), begun("\"<上海上海上海上海"));
    assert_eq!(run(&[SAMPLES[9]]), begun("\"</tool_calls>x"));
    // Before the call was given out it is simply not there.
    assert_eq!(run(&["<tool_calls>{\"name\": \"f</tool_calls> yes"]), [ToolEvent::Text(" yes".into())]);
    assert_eq!(run(&["<tool_calls>{\"x\": \"f</tool_calls>\"} yes"]), [ToolEvent::Text("\"} yes".into())]);
}

#[test]
fn every_split_in_two_and_three_gives_the_same() {
    for text in SAMPLES {
        let whole = run(&[text]);
        let cuts: Vec<usize> = text.char_indices().map(|(i, _)| i).chain([text.len()]).collect();
        for (i, &at) in cuts.iter().enumerate() {
            for &then in &cuts[i..] {
                assert_eq!(run(&[&text[..at], &text[at..then], &text[then..]]), whole, "{text:?} at {at}, {then}");
            }
        }
        let singly: Vec<&str> = cuts.windows(2).map(|w| &text[w[0]..w[1]]).collect();
        assert_eq!(run(&singly), whole);
    }
}

/// Random texts of the pieces that matter: any way of cutting them gives the same, and the same as line by line on the
/// whole text.
#[test]
fn fuzz_against_the_definition() {
    const PIECES: [&str; 31] = [
        "<tool_calls>",
        "</tool_calls>",
        "<tool_calls>\n",
        "\n</tool_calls>",
        "<",
        "</",
        "</tool_",
        "calls>",
        "\"</tool_calls>\"",
        "\n",
        " ",
        "{",
        "}",
        "}}",
        "[",
        "]",
        ",",
        ":",
        "{\"name\": \"f\", \"arguments\": {",
        "{\"arguments\": {\"a\": 1}, \"name\": \"g\"",
        "\"a\": ",
        "\"b\"",
        "\"",
        "\\",
        "1",
        "-0.5",
        "null",
        "上",
        "{\"name\": \"h\", \"arguments\": {}}\n",
        "x",
        "{\"name\": \"f\", \"arguments\": {\"q\": [true]}}",
    ];
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let (mut with_calls, mut compared) = (0, 0);
    for _ in 0..50_000 {
        let n = rng.random_range(1..14);
        let open = rng.random_bool(0.5).then_some(OPEN);
        let pieces = (0..n).map(|_| PIECES[rng.random_range(0..PIECES.len())]);
        let parts: Vec<&str> = open.into_iter().chain(pieces).collect();
        let text = parts.concat();
        let whole = run(&[&text]);
        assert_eq!(run(&parts), whole, "{parts:?}");
        let singly: Vec<String> = text.chars().map(String::from).collect();
        assert_eq!(run(&singly.iter().map(String::as_str).collect::<Vec<_>>()), whole, "{text:?}");
        let (outside, found) = parse(&text);
        for (name, arguments) in &found {
            assert!(!name.is_empty() && serde_json::from_str::<serde_json::Map<String, Value>>(arguments).is_ok());
        }
        with_calls += usize::from(!found.is_empty());
        // A closing tag inside a string is where this parser is wiser than the definition.
        let block = text.split_once(OPEN).map_or("", |(_, rest)| rest);
        let last = block.split(CLOSE).next().unwrap_or("").rsplit('\n').next().unwrap_or("");
        let in_string = block.contains(CLOSE) && last.matches('"').count() % 2 == 1;
        if !in_string && !twice(block) {
            compared += 1;
            let plain: Vec<(String, String)> = found
                .iter()
                .map(|(name, a)| (name.clone(), serde_json::from_str::<Value>(a).unwrap().to_string()))
                .collect();
            assert_eq!((outside, plain), by_lines(&text), "{text:?}");
        }
    }
    assert!(with_calls > 500 && compared > 10_000, "{with_calls} {compared}");
}

/// Whether a line may hold a key of the outer object twice, which serde_json takes and the parser does not.
fn twice(block: &str) -> bool {
    block.split('\n').any(|line| line.matches("\"name\"").count() > 1 || line.matches("\"arguments\"").count() > 1)
}
