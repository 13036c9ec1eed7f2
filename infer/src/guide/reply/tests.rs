use super::*;
use crate::guide::Grammars;
use crate::guide::grammar::tests::{bytes, draw, nano, satisfies, vocabularies};
use crate::reply::{Delta, Parts, Reply, ReplySettings};
use crate::sampler::{Sampler, SamplingOptions};
use crate::think::NO_THINKING;
use crate::tools::Tool;
use serde_json::{Value, json};

fn guide(tokenizer: &Arc<Tokenizer>, thinking: Thinking, answer: Answer) -> ReplyGuide {
    ReplyGuide::new(tokenizer, thinking, answer).unwrap()
}

/// Lets the guide go over what a model would like to say: where it is not allowed, the first id that is is taken.
/// Returns the text and how many ids were the model's own.
fn follow(guide: &mut ReplyGuide, tokenizer: &Tokenizer, wish: &str, steps: usize) -> (String, usize) {
    let mut wish = tokenizer.encode(wish, false).unwrap().into_iter().peekable();
    let (mut ids, mut own) = (Vec::new(), 0);
    for _ in 0..steps {
        let wanted = wish.peek().copied();
        let id = match (guide.next().unwrap(), wanted) {
            (Next::Only(id), wanted) if wanted != Some(id) => id,
            (Next::Among(mask), Some(id)) if !mask[id as usize] => mask.iter().position(|&m| m).unwrap() as u32,
            (_, Some(id)) => {
                wish.next();
                own += 1;
                id
            }
            (_, None) => break,
        };
        guide.take(id).unwrap();
        ids.push(id);
    }
    (tokenizer.decode(&ids), own)
}

fn schema() -> Value {
    let n = json!({"type": "integer", "minimum": 0, "maximum": 99});
    json!({"type": "object", "properties": {"n": n}, "required": ["n"], "additionalProperties": false})
}

fn tools() -> Vec<Tool> {
    let function = json!({"name": "f", "parameters": schema(), "strict": true});
    Tool::list(&json!([{"type": "function", "function": function}])).unwrap()
}

#[test]
fn the_budget_is_counted_to_the_id() {
    let tokenizer = nano();
    for budget in [0, 1, 2, 7, 30] {
        let thinking = Thinking { budget: Some(budget), ..Thinking::default() };
        let mut g = guide(&tokenizer, thinking, Answer::Free);
        let mut reply = Reply::new(tokenizer.clone(), ReplySettings::default());
        let id = |text: &str| tokenizer.encode(text, false).unwrap()[0];
        let (mut free, mut forced, mut text) = (0, 0, Vec::new());
        // The model opens the block itself and thinks "a" for ever.
        for step in 0..60 {
            let id = match g.next().unwrap() {
                Next::Only(id) => {
                    forced += 1;
                    id
                }
                Next::Any => {
                    free += usize::from(step > 0 && forced == 0);
                    id(if step == 0 { "<think>" } else { "a" })
                }
                Next::Among(_) => panic!(),
            };
            g.take(id).unwrap();
            reply.push(id);
            text.push(id);
        }
        assert_eq!((free, reply.reasoning_tokens()), (budget, budget));
        let text = tokenizer.decode(&text);
        let thought =
            if budget == 0 { NO_THINKING.to_string() } else { format!("<think>{}\n</think>\n\n", "a".repeat(budget)) };
        assert!(text.starts_with(&thought), "{text}");
        assert_eq!(text[thought.len()..].trim_matches('a'), "");
    }
}

#[test]
fn a_thought_that_ends_itself_in_time_is_left_alone() {
    let tokenizer = nano();
    let wish = "<think>\nab\n</think>\n\n7";
    for (budget, wanted) in [(Some(100), wish), (None, wish), (Some(3), "<think>\nab\n</think>\n\n")] {
        let mut g = guide(&tokenizer, Thinking { budget, ..Thinking::default() }, Answer::Free);
        let text = follow(&mut g, &tokenizer, wish, 60).0;
        assert!(text.starts_with(wanted), "{text:?}");
    }
    // The prompt ends inside, with a line break.
    let inside = Thinking { start: Start::Inside, open: true, budget: Some(0) };
    assert_eq!(follow(&mut guide(&tokenizer, inside, Answer::Free), &tokenizer, "7", 9).0, "\n</think>\n\n7");
    // Forced open, and shut at once: what switches thinking off, in the same ids.
    let none = Thinking { open: true, budget: Some(0), ..Thinking::default() };
    let text = follow(&mut guide(&tokenizer, none, Answer::Free), &tokenizer, "7", 20).0;
    assert_eq!(text, format!("{NO_THINKING}7"));
    // A prompt that holds a closed block leaves nothing to force.
    let after = Thinking { start: Start::After, open: true, budget: Some(0) };
    assert_eq!(
        follow(&mut guide(&tokenizer, after, Answer::Free), &tokenizer, "<think>", 9),
        ("<think>".into(), tokenizer.encode("<think>", false).unwrap().len())
    );
    assert!(
        !ReplyGuide::is_needed(&after, &Answer::Free) && !ReplyGuide::is_needed(&Thinking::default(), &Answer::Free)
    );
    assert!(ReplyGuide::is_needed(&inside, &Answer::Free) && ReplyGuide::is_needed(&none, &Answer::Free));
}

#[test]
fn a_thought_and_then_json() {
    for (tokenizer, end) in vocabularies() {
        let grammars = Grammars::new(&tokenizer, &[end]).unwrap();
        let only = Answer::Only(grammars.json_schema(&schema()).unwrap());
        let starts = [Start::Before, Start::Inside, Start::After];
        for (i, (start, budget)) in
            starts.iter().flat_map(|&s| [(s, Some(0)), (s, Some(5)), (s, Some(40)), (s, None)]).enumerate()
        {
            let thinking = Thinking { start, open: false, budget };
            for seed in 0..15 {
                let mut g = guide(&tokenizer, thinking, only.clone());
                let (ids, text) = if budget.is_some() || start == Start::After {
                    draw(&mut g, &tokenizer, end, seed + 100 * i as u64)
                } else {
                    // Without a budget random thoughts do not end: let it end by itself, after a while.
                    let wish = if start == Start::Before {
                        "<think>\nhm {\n</think>\n\n{\"n\": 7}"
                    } else {
                        "hm {\n</think>\n\n{\"n\":7}"
                    };
                    let (text, _) = follow(&mut g, &tokenizer, wish, 200);
                    (tokenizer.encode(&text, false).unwrap(), text)
                };
                let settings = ReplySettings { start, ..ReplySettings::default() };
                let mut reply = Reply::new(tokenizer.clone(), settings);
                let mut parts = Parts::default();
                ids.iter().flat_map(|&id| reply.push(id)).collect::<Vec<_>>().into_iter().for_each(|d| parts.take(d));
                reply.finish().into_iter().for_each(|d| parts.take(d));
                let value: Value = serde_json::from_str(&parts.content).unwrap_or_else(|e| panic!("{e}: {text:?}"));
                assert!(satisfies(&value, &schema()), "{text}");
                assert!(budget.is_none_or(|budget| reply.reasoning_tokens() <= budget), "{text:?}");
                if start == Start::Before {
                    assert!(text.starts_with("<think>\n") && text.contains("</think>\n\n{"), "{text:?}");
                }
            }
        }
    }
}

#[test]
fn tools_are_free_until_the_model_calls() {
    for (tokenizer, end) in vocabularies() {
        let grammars = Grammars::new(&tokenizer, &[end]).unwrap();
        let calls = Answer::Tools(grammars.tool_calls(&tools(), true).unwrap());
        let lazy = || guide(&tokenizer, Thinking::default(), calls.clone());
        // No call, no constraint: also not of the tag inside a thought.
        let free = "<think>\nI could <tool_calls> now\n</think>\n\nNo: a < b, <tool_call> {\"n\": oops}";
        let (text, own) = follow(&mut lazy(), &tokenizer, free, 300);
        assert_eq!((text.as_str(), own), (free, tokenizer.encode(free, false).unwrap().len()));
        // From the tag on it goes its way, however the model would like it.
        for wish in [
            "<think>\nx\n</think>\n\n<tool_calls>\nno, rather not",
            "Well: <tool_calls>{\"name\": \"g\"}",
            "<tool_calls>",
        ] {
            let mut g = lazy();
            let (said, _) =
                follow(&mut g, &tokenizer, &wish[..wish.find(tools::OPEN).unwrap() + tools::OPEN.len()], 200);
            let rest = draw(&mut g, &tokenizer, end, 5).1;
            let (outside, calls) = tools::parse(&(said.clone() + &rest));
            assert!(!calls.is_empty() && rest.ends_with("}\n</tool_calls>"), "{said}{rest}");
            assert!(calls.iter().all(
                |(name, arguments)| name == "f" && satisfies(&serde_json::from_str(arguments).unwrap(), &schema())
            ));
            assert!(!outside.contains("name"));
        }
    }
}

/// Ids that run over the end of a tag must not carry anything past the grammar.
#[test]
fn an_id_that_runs_over_a_tag_is_not_drawn_where_a_grammar_begins() {
    let dir = tempfile::tempdir().unwrap();
    let added = ["<end_of_sentence>", "s>{", "k>\n\n", "k>\n{", "x</think>y", "q<tool_calls>{", "none"];
    // As plain tokens, not special ones.
    crate::tokenizer::tests::byte_level(dir.path(), &added);
    let path = dir.path().join("tokenizer.json");
    let mut json: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    json["added_tokens"].as_array_mut().unwrap().iter_mut().skip(1).for_each(|t| t["special"] = false.into());
    std::fs::write(&path, json.to_string()).unwrap();
    let tokenizer = Arc::new(Tokenizer::from_dir(dir.path()).unwrap());
    let grammars = Grammars::new(&tokenizer, &[256]).unwrap();
    let id = |text: &str| tokenizer.id(text).unwrap() as usize;
    let say = |g: &mut ReplyGuide, text: &str| text.bytes().for_each(|b| g.take(u32::from(b)).unwrap());

    let only = Answer::Only(grammars.json_object().unwrap());
    let mut g = guide(&tokenizer, Thinking { start: Start::Inside, ..Thinking::default() }, only);
    let mask = |g: &mut ReplyGuide| match g.next().unwrap() {
        Next::Among(mask) => mask.to_vec(),
        Next::Any => vec![true; tokenizer.size()],
        Next::Only(_) => panic!(),
    };
    let m = mask(&mut g);
    assert!(m[id("k>\n{")] && m[id("k>\n\n")] && !m[id("x</think>y")] && !m[256] && m[id("q<tool_calls>{")]);
    say(&mut g, "so </thin");
    let m = mask(&mut g);
    assert!(!m[id("k>\n{")] && m[id("k>\n\n")] && m[usize::from(b'k')]);
    g.take(id("k>\n\n") as u32).unwrap();
    assert_eq!(g.next(), Ok(Next::Only(u32::from(b'{'))));

    let lazy = Answer::Tools(grammars.tool_calls(&tools(), true).unwrap());
    let mut g = guide(&tokenizer, Thinking::default(), lazy);
    let m = mask(&mut g);
    assert!(m[id("s>{")] && !m[id("q<tool_calls>{")] && m[256]);
    say(&mut g, "<tool_call");
    assert!(!mask(&mut g)[id("s>{")]);
    say(&mut g, "s>");
    assert_eq!(g.next(), Ok(Next::Only(u32::from(b'\n'))));
}

#[test]
fn forced_ids_are_checked_and_samplers_obey() {
    let tokenizer = bytes();
    let grammars = Grammars::new(&tokenizer, &[256]).unwrap();
    let mut g = guide(&tokenizer, Thinking::default(), Answer::Only(grammars.json_object().unwrap()));
    assert!(g.clone().take(5).unwrap_err().0.contains("only 258 was allowed"));
    let mut sampler = Sampler::new(SamplingOptions::default(), None).unwrap();
    let drawn = sampler.sample_next(&vec![0.0; 300], &[], g.next().unwrap()).unwrap().id;
    assert_eq!(drawn, 258);
    // Every delta of a guided reply is of the reasoning or of the answer.
    let (ids, _) = draw(
        &mut guide(
            &tokenizer,
            Thinking { budget: Some(9), ..Thinking::default() },
            Answer::Only(grammars.json_object().unwrap()),
        ),
        &tokenizer,
        256,
        11,
    );
    let mut reply = Reply::new(tokenizer.clone(), ReplySettings::default());
    for delta in ids.iter().flat_map(|&id| reply.push(id)).collect::<Vec<_>>() {
        match delta {
            Delta::Reasoning(text) | Delta::Content(text) => assert!(!text.is_empty() && !text.contains("think>")),
            other => panic!("{other:?}"),
        }
    }
}
