//! `m1 serve` from the outside: what it answers, what it refuses, and how it ends.

mod client;
mod common;

use client::{Choice, Collected, Response, Server, until};
use common::{bare, checkpoint, m1, run, tokenizer};
use serde_json::{Value, json};
use std::io::{BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, Weak};

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

/// The checkpoint of random weights, whose model never ends its turn, behind one server for all tests that change nothing.
/// It ends with the last test that holds it.
fn tiny() -> Arc<Server> {
    static SERVER: Mutex<Weak<Server>> = Mutex::new(Weak::new());
    let names = ["--served-model-name", "tiny", "--served-model-name", "org/tiny"];
    shared(&SERVER, || Server::start(checkpoint(), &names))
}

/// The same with an end of its turns, which grammars need.
fn ending() -> Arc<Server> {
    static SERVER: Mutex<Weak<Server>> = Mutex::new(Weak::new());
    shared(&SERVER, || {
        let dir = tempfile::tempdir().unwrap();
        for file in std::fs::read_dir(checkpoint()).unwrap().map(|file| file.unwrap()) {
            std::fs::copy(file.path(), dir.path().join(file.file_name())).unwrap();
        }
        let end = tokenizer().token_to_id("<end_of_sentence>").unwrap();
        let config = json!({"eos_token_id": end}).to_string();
        std::fs::write(dir.path().join("generation_config.json"), config).unwrap();
        Server::start(dir.path(), &[])
    })
}

/// The model that ships.
fn nano() -> Arc<Server> {
    static SERVER: Mutex<Weak<Server>> = Mutex::new(Weak::new());
    shared(&SERVER, || Server::start(nano_dir(), &[]))
}

fn shared(server: &Mutex<Weak<Server>>, start: impl FnOnce() -> Server) -> Arc<Server> {
    let mut server = server.lock().unwrap_or_else(PoisonError::into_inner);
    server.upgrade().unwrap_or_else(|| {
        let started = Arc::new(start());
        *server = Arc::downgrade(&started);
        started
    })
}

fn nano_dir() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/m1-nano"))
}

/// A request to chat, greedy, with `more` fields.
fn ask(text: &str, max_tokens: usize, more: Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": max_tokens});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

fn streamed(body: &Value) -> Value {
    let mut body = body.clone();
    body["stream"] = true.into();
    body["stream_options"] = json!({"include_usage": true});
    body
}

#[test]
fn whole_stream_and_m1_chat_say_the_same() {
    let nano = nano();
    let question = "What is 17 + 25?";
    let body = ask(question, 300, json!({}));
    let answer = nano.chat(&body);
    let whole = Collected::whole(&answer);
    let choice = &whole.choices[0];
    assert_eq!((choice.role.as_str(), choice.finish.as_str()), ("assistant", "stop"));
    assert!(choice.content.contains("42") && !choice.reasoning.is_empty(), "{choice:?}");
    let stream = nano.stream(CHAT, &streamed(&body)).collect();
    assert_eq!(stream.choices, whole.choices);
    assert!(stream.events > 20, "token by token");
    for (key, of) in [("prompt_tokens", 0), ("completion_tokens", 1), ("total_tokens", 2)] {
        assert_eq!(stream.usage[key], whole.usage[key], "{of}");
    }
    let usage = |path: &str| answer["usage"].pointer(path).and_then(Value::as_u64).unwrap();
    assert_eq!(usage("/total_tokens"), usage("/prompt_tokens") + usage("/completion_tokens"));
    let thought = usage("/completion_tokens_details/reasoning_tokens");
    assert!(thought > 0 && thought < usage("/completion_tokens"));
    // The second time the beginning of the prompt was known.
    assert!(stream.usage["prompt_tokens_details"]["cached_tokens"].is_u64());

    let dir = nano_dir().to_str().unwrap();
    let chat = |args: &[&str]| {
        let args =
            [&["chat", "--model", dir, "--device", "cpu", "--temperature", "0", "--prompt", question], args].concat();
        run(bare(&args), "").ok().stdout
    };
    assert_eq!(chat(&["--hide-thinking"]).trim(), choice.content.trim());
    let written = format!("<think>\n{}\n</think>\n\n{}", choice.reasoning, choice.content);
    assert_eq!(chat(&[]).trim_end(), written.trim_end());
}

#[test]
fn the_next_turn_finds_what_was_said_in_the_cache() {
    let nano = nano();
    let mut messages = vec![json!({"role": "user", "content": "Sort these numbers: 5 3 9 1 7 2 8 6 4 10"})];
    let body = |messages: &[Value]| json!({"messages": messages, "temperature": 0, "max_tokens": 200});
    let first = nano.chat(&body(&messages));
    // Its reply goes back as it came, as clients do it.
    messages.push(first["choices"][0]["message"].clone());
    messages.push(json!({"role": "user", "content": "What is 2 + 3?"}));
    let second = nano.chat(&body(&messages));
    let tokens = |answer: &Value, path: &str| answer["usage"].pointer(path).and_then(Value::as_u64).unwrap();
    let cached = tokens(&second, "/prompt_tokens_details/cached_tokens");
    let (prompt, made) = (tokens(&first, "/prompt_tokens"), tokens(&first, "/completion_tokens"));
    assert!(cached + 2 >= prompt + made, "{cached} cached of {prompt} and {made}");
    assert!(second["choices"][0]["message"]["content"].as_str().unwrap().contains('5'), "{second}");
}

#[test]
fn seeds_choices_and_stop_strings() {
    let tiny = tiny();
    let body = |more: Value| {
        let mut body = ask("Hi", 40, json!({"temperature": 1, "seed": 5}));
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    let choices = |more: Value| Collected::whole(&tiny.chat(&body(more))).choices;
    let three = choices(json!({"n": 3}));
    assert_eq!(three.len(), 3);
    assert!(three[0] != three[1] && three[1] != three[2]);
    for (i, choice) in three.iter().enumerate() {
        assert_eq!(choices(json!({"seed": 5 + i}))[0], *choice, "choice {i} is that of the seed alone");
        assert_eq!(choice.finish, "length");
    }
    assert_eq!(tiny.stream(CHAT, &streamed(&body(json!({"n": 3})))).collect().choices, three);
    // A piece from the middle of the first answer ends it there, and leaves the others alone.
    let text: Vec<char> = three[0].content.chars().collect();
    let stop: String = text[text.len() / 2..text.len() / 2 + 3].iter().collect();
    let cut = choices(json!({"n": 3, "stop": [stop, "never said, surely"]}));
    let before = three[0].content.split(&stop).next().unwrap();
    assert_eq!((cut[0].content.as_str(), cut[0].finish.as_str()), (before, "stop"));
    let alone = choices(json!({"stop": stop}));
    assert_eq!(alone[0], cut[0]);
    assert_eq!(tiny.stream(CHAT, &streamed(&body(json!({"stop": stop})))).collect().choices, alone);
    // Without a seed they differ.
    let unseeded = || choices(json!({"seed": null}))[0].content.clone();
    assert_ne!(unseeded(), unseeded());
}

#[test]
fn many_streams_at_once_are_as_alone() {
    let tiny = tiny();
    let body = |i: usize| {
        let text = "word ".repeat(1 + i * 7 % 40);
        ask(&text, 30 + i, json!({"temperature": 1, "seed": i, "logprobs": true, "top_logprobs": 2}))
    };
    let alone: Vec<Collected> = (0..8).map(|i| Collected::whole(&tiny.chat(&body(i)))).collect();
    std::thread::scope(|scope| {
        for (i, alone) in alone.iter().enumerate() {
            let tiny = &tiny;
            scope.spawn(move || {
                for _ in 0..3 {
                    let got = tiny.stream(CHAT, &streamed(&body(i))).collect();
                    assert_eq!(got.choices, alone.choices, "stream {i}");
                    assert_eq!(got.usage["completion_tokens"], alone.usage["completion_tokens"]);
                }
            });
        }
    });
}

#[test]
fn log_probabilities_belong_to_the_text() {
    let tiny = tiny();
    let off = json!({"logprobs": true, "top_logprobs": 4, "thinking": {"type": "disabled"}, "max_completion_tokens": 30,
        "max_tokens": null});
    let answer = tiny.chat(&ask("上海", 1, off));
    let choice = &answer["choices"][0];
    let list = choice["logprobs"]["content"].as_array().unwrap();
    assert_eq!(list.len(), 30);
    let text = |list: &[Value]| {
        let bytes = list.iter().flat_map(|token| token["bytes"].as_array().into_iter().flatten());
        let bytes: Vec<u8> = bytes.map(|byte| byte.as_u64().unwrap() as u8).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    let said = text(list);
    // Line breaks at the ends belong to no part of a reply.
    assert_eq!(said.trim_matches('\n'), choice["message"]["content"].as_str().unwrap().trim_matches('\n'));
    for token in list {
        let top = token["top_logprobs"].as_array().unwrap();
        // Ids that only pad the model's vocabulary are left out.
        assert!((1..=4).contains(&top.len()));
        assert_eq!((&top[0]["token"], &top[0]["logprob"]), (&token["token"], &token["logprob"]), "greedy");
        let all: Vec<f64> = top.iter().map(|t| t["logprob"].as_f64().unwrap()).collect();
        assert!(all.is_sorted_by(|a, b| a >= b) && all[0] <= 0.0);
    }
    let without = tiny.chat(&ask("上海", 30, json!({"thinking": {"type": "disabled"}})));
    assert_eq!(without["choices"][0]["message"], choice["message"]);
    assert_eq!(without["choices"][0]["logprobs"], Value::Null);
    // Thinking has a list of its own; the tags stand in the other.
    let nano = nano();
    let answer = nano.chat(&ask("What is 17 + 25?", 300, json!({"logprobs": true})));
    let choice = &answer["choices"][0];
    let [thought, said] = ["reasoning_content", "content"].map(|key| choice["logprobs"][key].as_array().unwrap());
    assert_eq!(text(thought).trim_matches('\n'), choice["message"]["reasoning_content"].as_str().unwrap());
    let content = choice["message"]["content"].as_str().unwrap();
    assert_eq!(text(said).replace("<think>", "").replace("</think>", "").trim_matches('\n'), content);
}

#[test]
fn completions_go_on_from_texts_and_ids() {
    let tiny = tiny();
    let body = |prompt: Value, more: Value| {
        let mut body = json!({"prompt": prompt, "temperature": 0, "max_tokens": 12});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    let answer = |prompt: Value, more: Value| tiny.post(TEXT, &body(prompt, more)).ok();
    let text = |answer: &Value, i: usize| answer["choices"][i]["text"].as_str().unwrap().to_string();
    let once = answer(json!("Once"), json!({}));
    let generated = m1("generate", &["--prompt", "Once", "-n", "12", "--temperature", "0"], "").ok().stdout;
    assert!(generated.trim_end_matches('\n').ends_with(text(&once, 0).trim_end_matches('\n')), "{generated:?} {once}");
    assert_eq!(once["choices"][0]["finish_reason"], "length");
    assert_eq!(once["object"], "text_completion");
    let ids: Vec<u32> = tokenizer().encode("Once", false).unwrap().get_ids().to_vec();
    assert_eq!(text(&answer(json!(ids), json!({})), 0), text(&once, 0));
    assert_eq!(text(&answer(json!("Once"), json!({"echo": true})), 0), "Once".to_string() + &text(&once, 0));
    assert_eq!(text(&answer(json!("Once"), json!({"echo": true, "max_tokens": 0})), 0), "Once");
    // Several prompts with two answers each: in order, each as alone.
    let sampled = json!({"n": 2, "temperature": 1, "seed": 3});
    let many = answer(json!(["Once", "Twice"]), sampled.clone());
    let (one, two) = (answer(json!("Once"), sampled.clone()), answer(json!("Twice"), sampled.clone()));
    let all: Vec<String> = (0..4).map(|i| text(&many, i)).collect();
    assert_eq!(all, [text(&one, 0), text(&one, 1), text(&two, 0), text(&two, 1)]);
    assert_eq!(many["usage"]["completion_tokens"], 48);
    let stream = tiny.stream(TEXT, &streamed(&body(json!(["Once", "Twice"]), sampled))).collect();
    assert_eq!(stream.choices.iter().map(|c| c.content.clone()).collect::<Vec<_>>(), all);
    assert_eq!(stream.usage["completion_tokens"], 48);
    let scored = answer(json!("Once"), json!({"logprobs": 2}));
    let lists = &scored["choices"][0]["logprobs"];
    for key in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(lists[key].as_array().unwrap().len(), 12, "{key}");
    }
    assert_eq!(lists["top_logprobs"][0].as_object().unwrap().len(), 2);
    assert_eq!(lists["text_offset"][0], 0);
}

/// What an evaluation harness asks for: how likely a text is that nobody drew.
#[test]
fn a_prompts_own_tokens_are_scored() {
    let nano = nano();
    let ids = |text: &str| nano.post("/tokenize", &json!({"prompt": text})).ok()["tokens"].clone();
    let prompt = "12 + 3 = 15\n12 + 4 = 16\n12 + 5 =";
    let ask = |prompt: &Value, max: usize, more: Value| {
        let mut body = json!({"prompt": prompt, "temperature": 0, "max_tokens": max, "echo": true, "logprobs": 3});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    let count = ids(prompt).as_array().unwrap().len();
    let drawn = nano.post(TEXT, &ask(&ids(prompt), 9, json!({}))).ok();
    let (text, lists) = (drawn["choices"][0]["text"].as_str().unwrap(), &drawn["choices"][0]["logprobs"]);
    let numbers = |choice: &Value| -> Vec<Option<f64>> {
        choice["logprobs"]["token_logprobs"].as_array().unwrap().iter().map(Value::as_f64).collect()
    };
    let (scores, tokens) = (numbers(&drawn["choices"][0]), lists["tokens"].as_array().unwrap());
    assert_eq!((scores.len(), tokens.len(), scores[0]), (count + 9, count + 9, None));
    assert!(lists["top_logprobs"][0].is_null() && scores[1..].iter().all(|s| s.is_some_and(|s| s <= 0.0)));
    // The offsets are those of the tokens in the whole text.
    for (token, offset) in tokens.iter().zip(lists["text_offset"].as_array().unwrap()) {
        assert!(text[offset.as_u64().unwrap() as usize..].starts_with(token.as_str().unwrap()), "{lists}");
    }
    // The answer sent as a prompt has the scores that it was drawn with.
    let body = ask(&ids(text), 0, json!({"n": 2}));
    let again = nano.post(TEXT, &body).ok();
    for choice in again["choices"].as_array().unwrap() {
        let again = numbers(choice);
        let near = |(a, b): (&Option<f64>, &Option<f64>)| (a.unwrap_or(0.0) - b.unwrap_or(0.0)).abs() < 1e-3;
        assert!(again.len() == scores.len() && again.iter().zip(&scores).all(near), "{again:?} {scores:?}");
    }
    // Twice the same although the text may be in the cache now; and in a stream.
    assert_eq!(nano.post(TEXT, &body).ok()["choices"], again["choices"]);
    let mut stream = nano.stream(TEXT, &streamed(&body));
    let events: Vec<Value> = std::iter::from_fn(|| stream.next()).collect();
    let first = events.iter().find(|event| event["choices"][0]["index"] == 1).unwrap();
    assert_eq!(first["choices"][0]["text"], again["choices"][1]["text"]);
    assert_eq!(first["choices"][0]["logprobs"], again["choices"][1]["logprobs"]);
    // Of a single token there is nothing to say.
    let one = nano.post(TEXT, &ask(&json!([ids(prompt)[0]]), 0, json!({}))).ok();
    assert_eq!(numbers(&one["choices"][0]), [None]);
}

#[test]
fn an_answer_in_json_is_json_after_its_schema() {
    let server = ending();
    let off = |format: Value| json!({"thinking": {"type": "disabled"}, "temperature": 1, "response_format": format});
    let schema = json!({"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99},
        "s": {"enum": ["left", "right"]}}, "required": ["n", "s"], "additionalProperties": false});
    let format = json!({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}});
    for seed in 0..6 {
        let mut body = ask("Hi", 200, off(format.clone()));
        body["seed"] = seed.into();
        let answer = Collected::whole(&server.chat(&body));
        let content = &answer.choices[0].content;
        let value: Value = serde_json::from_str(content).unwrap_or_else(|e| panic!("{e}: {content:?}"));
        assert!(value["n"].as_u64().is_some_and(|n| n < 100), "{value}");
        assert!(value["s"] == "left" || value["s"] == "right", "{value}");
        assert_eq!(value.as_object().unwrap().len(), 2);
        assert_eq!(answer.choices[0].finish, "stop");
        assert_eq!(server.stream(CHAT, &streamed(&body)).collect().choices, answer.choices);
    }
    let bad = json!({"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}});
    let (status, param, message) = server.post(CHAT, &ask("Hi", 5, off(bad))).error();
    assert_eq!((status, param.as_str()), (400, "response_format.json_schema.schema"), "{message}");
}

#[test]
fn tools_that_must_be_called_are_called() {
    let server = ending();
    let tool = |name: &str| {
        let parameters = json!({"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"], "additionalProperties": false});
        json!({"type": "function", "function": {"name": name, "parameters": parameters}})
    };
    let tools = json!([tool("weather"), tool("time")]);
    let body = |choice: Value| {
        let more = json!({"tools": tools, "tool_choice": choice, "parallel_tool_calls": false, "temperature": 1,
            "seed": 2, "thinking": {"type": "disabled"}});
        ask("Hi", 300, more)
    };
    for choice in [json!("required"), json!({"type": "function", "function": {"name": "time"}})] {
        let answer = server.chat(&body(choice.clone()));
        let message = &answer["choices"][0]["message"];
        assert_eq!(message["content"], Value::Null);
        assert!(message["tool_calls"][0]["id"].as_str().unwrap().starts_with("call_"));
        let whole = Collected::whole(&answer);
        assert_eq!(whole.choices[0].finish, "tool_calls");
        let [(name, arguments)] = &whole.choices[0].calls[..] else { panic!("{answer}") };
        assert!(name == "time" || choice == "required" && name == "weather");
        let city = serde_json::from_str::<Value>(arguments).unwrap()["city"].clone();
        assert!(city == "Paris" || city == "Rome", "{arguments}");
        assert_eq!(server.stream(CHAT, &streamed(&body(choice.clone()))).collect().choices, whole.choices);
        // Cut off in the middle of it, the call is told as far as it came.
        let tokens = answer["usage"]["completion_tokens"].as_u64().unwrap();
        let mut partial = 0;
        for limit in (1..tokens).step_by(3) {
            let mut body = body(choice.clone());
            body["max_tokens"] = limit.into();
            let cut = Collected::whole(&server.chat(&body));
            assert_eq!(server.stream(CHAT, &streamed(&body)).collect().choices, cut.choices, "{limit}");
            assert_eq!(cut.choices[0].finish, "length");
            if let [(cut_name, cut_arguments)] = &cut.choices[0].calls[..] {
                assert!(cut_name == name && arguments.starts_with(cut_arguments), "{cut_arguments} of {arguments}");
                partial += usize::from(cut_arguments.len() < arguments.len());
            }
        }
        assert!(partial > 1, "{partial}");
        // The call and its result go back. Its id is drawn, and with it what the reply begins with: not with its end.
        let end = tokenizer().token_to_id("<end_of_sentence>").unwrap().to_string();
        let back = json!({"messages": [{"role": "user", "content": "Hi"}, message,
            {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "sunny"}],
            "tools": tools, "max_tokens": 3, "logit_bias": {end: -100}, "thinking": {"type": "disabled"}});
        assert_eq!(server.chat(&back)["usage"]["completion_tokens"], 3);
    }
}

#[test]
fn thinking_can_be_capped_and_switched_off() {
    let nano = nano();
    let parts = |more: Value| Collected::whole(&nano.chat(&ask("What is 17 + 25?", 300, more))).choices[0].clone();
    let Choice { reasoning, content, .. } = parts(json!({"thinking": {"type": "disabled"}}));
    assert!(reasoning.is_empty() && !content.contains("think"), "{content}");
    let answer = nano.chat(&ask("What is 17 + 25?", 300, json!({"thinking": {"budget_tokens": 5}})));
    assert!(answer["usage"]["completion_tokens_details"]["reasoning_tokens"].as_u64().unwrap() <= 5, "{answer}");
    assert!(!answer["choices"][0]["message"]["content"].as_str().unwrap().contains("<think>"));
}

#[test]
fn tokens_there_and_back() {
    let tiny = tiny();
    let text = "Once 上海 <end_of_sentence>";
    let tokens = tiny.post("/tokenize", &json!({"content": text})).ok();
    assert_eq!(tokens["count"], tokens["tokens"].as_array().unwrap().len());
    assert_eq!(tiny.post("/tokenize", &json!({"prompt": text, "add_special": true})).ok()["tokens"], tokens["tokens"]);
    assert_eq!(tiny.post("/detokenize", &json!({"tokens": tokens["tokens"]})).ok()["content"], text);
    // In a message a special token is plain text: the same conversation without it is as long but for its letters.
    let length = |text: &str| {
        let body = json!({"messages": [{"role": "user", "content": text}]});
        tiny.post("/tokenize", &body).ok()["count"].as_u64().unwrap()
    };
    assert_eq!(length("a<end_of_sentence>"), length("a") + "<end_of_sentence>".len() as u64);
    let models = tiny.get("/v1/models").ok();
    assert_eq!(models["data"][0]["id"], "tiny");
    assert_eq!(models["data"].as_array().unwrap().len(), 2);
    assert_eq!(tiny.get("/v1/models/org/tiny").ok()["id"], "org/tiny");
    assert_eq!(tiny.get("/health").ok(), json!({"status": "ok"}));
    let page = tiny.get("/");
    assert!(page.status == 200 && page.headers.contains("content-type: text/html") && page.body.contains("<html"));
    assert!(page.headers.contains("x-request-id: "));
    for wanted in ["cache-control: no-cache", "x-content-type-options: nosniff", "referrer-policy: no-referrer"] {
        assert!(page.headers.contains(wanted), "{wanted}: {}", page.headers);
    }
    let policy = |page: &Response| {
        let line = page.headers.lines().find_map(|line| line.strip_prefix("content-security-policy: "));
        line.unwrap_or_default().to_string()
    };
    let found = policy(&page);
    assert!(found.contains("default-src 'none'") && found.contains("frame-ancestors 'none'"), "{found}");
    // The page's own script and style, and no others.
    let nonce = found.split("script-src 'nonce-").nth(1).and_then(|rest| rest.split('\'').next()).unwrap();
    assert!(!found.contains("unsafe") && found.contains(&format!("style-src 'nonce-{nonce}'")), "{found}");
    for tag in ["script", "style"] {
        assert_eq!(page.body.matches(&format!("<{tag}")).count(), 1, "{tag}");
        assert!(page.body.contains(&format!("<{tag} nonce=\"{nonce}\">")), "{tag}");
    }
    assert_ne!(policy(&tiny.get("/")), found);
}

#[test]
fn mistakes_are_told_in_openais_form() {
    let tiny = tiny();
    let s = &*tiny;
    let json_type = [("Content-Type", "application/json")];
    let post = |path: &str, body: Value| s.post(path, &body).error();
    let message = |content: Value| json!({"messages": [{"role": "user", "content": content}]});
    for (found, status, name, wanted) in [
        (s.send("POST", CHAT, &json_type, b"{\"a\":\n 1,}").error(), 400, "invalid_json", "line 2 column 4"),
        (s.send("POST", CHAT, &json_type, b"[]").error(), 400, "invalid_json", "must be a JSON object"),
        (s.send("POST", CHAT, &json_type, b"").error(), 400, "invalid_json", "not JSON"),
        (s.send("POST", CHAT, &[], b"{}").error(), 415, "unsupported_media_type", "Content-Type: application/json"),
        (s.get("/v1/chat").error(), 404, "unknown_url", "GET /v1/chat: no such route"),
        (s.get(CHAT).error(), 405, "method_not_allowed", "not for GET"),
        (post("/v1/models", json!({})), 405, "method_not_allowed", "not for POST"),
        (s.get("/v1/models/gpt-4").error(), 404, "model", "\"gpt-4\" is not here"),
        (post(CHAT, ask("a", 1, json!({"model": "gpt-4"}))), 404, "model", "this server has \"tiny\""),
        (post(CHAT, json!({"model": "tiny"})), 400, "messages", "messages is missing"),
        (post(CHAT, message(json!([{"type": "image_url"}]))), 400, "messages[0].content[0].type", "text only"),
        (post(CHAT, json!({"messages": [{"role": "robot", "content": ""}]})), 400, "messages[0].role", "must be"),
        (post(CHAT, ask("a", 1, json!({"temperature": 101}))), 400, "temperature", "between 0 (greedy) and 100"),
        (post(CHAT, ask("a", 1, json!({"n": 129}))), 400, "n", "from 1 to 128"),
        (post(CHAT, ask("a", 1, json!({"best_of": 2}))), 400, "best_of", "unknown field"),
        (post(CHAT, ask("a", 1, json!({"functions": []}))), 400, "functions", "not supported"),
        (post(CHAT, ask("a", 1, json!({"logit_bias": {"320": 1}}))), 400, "logit_bias.320", "from 0 to 319"),
        (post(TEXT, json!({"prompt": ""})), 400, "prompt", "at least one"),
        (post(TEXT, json!({"prompt": [320]})), 400, "prompt", "id 320"),
        (post(TEXT, json!({"prompt": "a", "suffix": "b"})), 400, "suffix", "not supported"),
        (post("/detokenize", json!({"tokens": [319]})), 400, "tokens[0]", "the id of a token"),
        (post("/tokenize", json!({"content": "a", "x": 1})), 400, "x", "unknown field"),
    ] {
        assert_eq!((found.0, found.1.as_str()), (status, name), "{}", found.2);
        assert!(found.2.contains(wanted), "{wanted}: {}", found.2);
    }
    let allow = s.get(CHAT).headers;
    assert!(allow.contains("allow: post"), "{allow}");
}

#[test]
fn a_conversation_beyond_the_context_and_one_beyond_the_memory_are_refused_with_the_numbers() {
    let server = Server::start(checkpoint(), &["--context", "100", "--memory", "64KiB", "--parallel", "2"]);
    let long = ask(&"x".repeat(100), 1, json!({}));
    for body in [&long, &streamed(&long)] {
        let (status, param, message) = server.post(CHAT, body).error();
        assert_eq!((status, param.as_str()), (400, "messages"));
        assert!(message.contains("the context holds 100"), "{message}");
    }
    assert_eq!(server.post(CHAT, &long).json()["error"]["code"], "context_length_exceeded");
    // A reply that fills the context ends there.
    let full = server.post(TEXT, &json!({"prompt": [1, 2, 3], "max_tokens": 1000})).json();
    if full["error"].is_null() {
        assert_eq!(
            (&full["choices"][0]["finish_reason"], &full["usage"]["total_tokens"]),
            (&json!("length"), &json!(100))
        );
    }
    let small = Server::start(checkpoint(), &["--memory", "1KiB"]);
    let body = ask("Hi", 5, json!({}));
    for body in [&body, &streamed(&body)] {
        let (status, _, message) = small.post(CHAT, body).error();
        assert!(status == 400 && message.contains("there are 0 MiB"), "{status} {message}");
    }
    assert_eq!(small.post(CHAT, &body).json()["error"]["code"], "memory_exceeded");
}

#[test]
fn keys_origins_and_bodies_are_checked() {
    let args = ["--api-key", "one", "--api-key", "two", "--cors", "http://here.test", "--max-body", "1KiB"];
    let server = Server::start(checkpoint(), &args);
    let with = |key: &str| server.send("GET", "/v1/models", &[("Authorization", key)], b"");
    for key in ["", "one", "Bearer", "Bearer ", "Bearer on", "Bearer onee", "Basic one"] {
        let refused = with(key);
        assert_eq!(refused.error().0, 401, "{key}");
        assert!(refused.headers.contains("www-authenticate: bearer"));
    }
    assert!(with("Bearer one").status == 200 && with("bearer two").status == 200);
    assert_eq!((server.get("/health").status, server.get("/").status, server.get("/metrics").status), (200, 200, 401));
    // A browser asks first, without a key.
    let asks = [
        ("Origin", "http://here.test"),
        ("Access-Control-Request-Method", "POST"),
        ("Access-Control-Request-Headers", "authorization,content-type"),
    ];
    let allowed = server.send("OPTIONS", CHAT, &asks, b"");
    assert_eq!(allowed.status, 200);
    assert!(allowed.headers.contains("access-control-allow-origin: http://here.test"), "{}", allowed.headers);
    assert!(allowed.headers.contains("access-control-allow-headers: authorization,content-type"));
    let other = server.send("GET", "/health", &[("Origin", "http://there.test")], b"");
    assert!(!other.headers.contains("access-control-allow-origin"), "{}", other.headers);
    let here = server.send("GET", "/v1/models", &[("Origin", "http://here.test")], b"");
    assert!(here.status == 401 && here.headers.contains("access-control-allow-origin: http://here.test"));
    let headers = [("Content-Type", "application/json"), ("Authorization", "Bearer one")];
    let large = vec![b' '; 5000];
    assert_eq!(server.send("POST", CHAT, &headers, &large).error().0, 413);
    // One that does not tell its length.
    let chunked = [&headers[..], &[("Transfer-Encoding", "chunked"), ("Content-Length", "")]].concat();
    let chunked: Vec<_> = chunked.into_iter().filter(|(name, _)| *name != "Content-Length").collect();
    let body = [b"1388\r\n", &large[..], b"\r\n0\r\n\r\n"].concat();
    let mut socket = TcpStream::connect(server.address).unwrap();
    let head: String = chunked.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    socket
        .write_all(format!("POST {CHAT} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n{head}\r\n").as_bytes())
        .unwrap();
    let _ = socket.write_all(&body);
    assert_eq!(Response::read(BufReader::new(socket)).error().0, 413);
}

#[test]
fn a_client_that_goes_away_cancels_its_reply() {
    let server = Server::start(checkpoint(), &["--parallel", "2", "--max-queue", "1", "--timeout", "0"]);
    let endless = ask("Hi", 1_000_000, json!({"stream": true}));
    let mut streams: Vec<_> = (0..2).map(|_| server.stream(CHAT, &endless)).collect();
    streams.iter_mut().for_each(|stream| (0..5).for_each(|_| drop(stream.next().unwrap())));
    // One more waits for its whole answer, and there is no room for another.
    let body = endless.to_string().replace("true", "false");
    let length = format!("Content-Length: {}\r\n", body.len());
    let mut waiting = TcpStream::connect(server.address).unwrap();
    let head = format!("POST {CHAT} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n{length}\r\n{body}");
    waiting.write_all(head.as_bytes()).unwrap();
    server.until_metric("m1_queue_size", 1.0);
    let refused = server.post(CHAT, &endless);
    assert_eq!((refused.error().0, refused.error().1.as_str()), (429, "queue_full"));
    assert!(refused.headers.contains("retry-after: 1"));
    assert_eq!(server.metric("m1_batch_size"), 2.0);
    drop(waiting);
    server.until_metric("m1_queue_size", 0.0);
    drop(streams);
    server.until_metric("m1_batch_size", 0.0);
    server.until_metric("m1_sequence_bytes", 0.0);
    server.until_metric(&format!("m1_requests_total{{route=\"{CHAT}\",status=\"499\"}}"), 3.0);
    // And there is room again.
    assert_eq!(server.chat(&ask("Hi", 3, json!({"n": 3})))["usage"]["completion_tokens"], 9);
    assert!(server.metric("m1_generated_tokens_total") >= 19.0);
    assert_eq!(server.metric("m1_requests_in_flight"), 1.0, "the one that asks");
}

#[test]
fn a_reply_that_takes_too_long_is_ended() {
    let server = Server::start(checkpoint(), &["--timeout", "1"]);
    let endless = ask("Hi", 1_000_000, json!({}));
    let (status, code, message) = server.post(CHAT, &endless).error();
    assert_eq!((status, code.as_str()), (504, "timeout"), "{message}");
    let stream = server.stream(CHAT, &streamed(&endless)).collect();
    assert_eq!(stream.error["code"], "timeout");
    assert!(!stream.choices[0].content.is_empty() && stream.choices[0].finish.is_empty());
    server.until_metric("m1_batch_size", 0.0);
}

#[cfg(unix)]
#[test]
fn a_signal_lets_replies_finish_and_then_all_ends() {
    let mut server = Server::start(checkpoint(), &["--log", "json", "--parallel", "4"]);
    let body = ask("Hi", 400, json!({"stream": true}));
    let wanted = Collected::whole(&server.chat(&ask("Hi", 400, json!({})))).choices;
    let mut streams: Vec<_> = (0..3).map(|_| server.stream(CHAT, &body)).collect();
    streams.iter_mut().for_each(|stream| drop(stream.next().unwrap()));
    server.signal("TERM");
    server.until_logged("shutting down");
    until("refusal", || TcpStream::connect(server.address).is_err().then_some(()));
    for stream in streams {
        let got = stream.collect();
        assert_eq!(got.error, Value::Null);
        assert_eq!((&got.choices[0].content, &got.choices[0].finish), (&wanted[0].content, &wanted[0].finish));
    }
    assert_eq!(server.wait().code(), Some(0));
    let log = server.log();
    let lines: Vec<Value> = log.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let requests: Vec<&Value> = lines.iter().filter(|line| line["message"] == "request").collect();
    assert_eq!(requests.len(), 4, "{log}");
    for line in requests {
        assert_eq!((&line["route"], &line["status"], &line["completion"]), (&json!(CHAT), &json!(200), &json!(400)));
        assert!(line["ms"].as_f64() >= line["ms_first"].as_f64() && line["prompt"].as_u64() > Some(10), "{line}");
    }
}

#[cfg(unix)]
#[test]
fn replies_that_do_not_finish_in_time_are_cancelled() {
    for second in [false, true] {
        let patience = if second { "3600" } else { "1" };
        let mut server = Server::start(checkpoint(), &["--shutdown-timeout", patience]);
        let mut stream = server.stream(CHAT, &ask("Hi", 1_000_000, json!({"stream": true})));
        // Another that never reads: it must not hold up the end.
        let stuck = server.stream(CHAT, &ask("Hi", 1_000_000, json!({"stream": true})));
        stream.next().unwrap();
        server.signal("INT");
        server.until_logged("shutting down");
        if second {
            server.signal("INT");
        }
        let got = stream.collect();
        assert_eq!(got.error["code"], "unavailable", "{:?}", got.choices.len());
        assert_eq!(server.wait().code(), Some(0));
        drop(stuck);
    }
}

#[test]
fn odd_connections_do_no_harm() {
    let server = Server::start(checkpoint(), &[]);
    let connect = |text: &[u8]| {
        let mut socket = TcpStream::connect(server.address).unwrap();
        socket.write_all(text).unwrap();
        socket
    };
    let read = |mut socket: TcpStream| {
        let mut text = Vec::new();
        let _ = socket.read_to_end(&mut text);
        String::from_utf8_lossy(&text).into_owned()
    };
    assert!(read(connect(b"\x16\x03\x01\x02\x00\x01\x00\n\r\n\r\n")).starts_with("HTTP/1.1 400"));
    assert!(read(connect(b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n\r\n")).contains("HTTP/1.1"));
    // A body that ends too early, and a head that never comes.
    let short =
        format!("POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{{");
    let socket = connect(short.as_bytes());
    socket.shutdown(std::net::Shutdown::Write).unwrap();
    drop(read(socket));
    let hanging = connect(b"POST /v1/chat/com");
    // Two requests on one connection.
    let both = "GET /health HTTP/1.1\r\nHost: a\r\n\r\nGET /v1/models HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    assert_eq!(read(connect(both.as_bytes())).matches("HTTP/1.1 200 OK").count(), 2);
    assert_eq!(server.get("/health").status, 200);
    drop(hanging);
}

#[test]
fn mistakes_in_flags_are_one_line_each() {
    let mistake = |args: &[&str]| m1("serve", args, "").mistake().to_string();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    assert!(mistake(&["--port", &port]).contains(&format!("--host 127.0.0.1 --port {port}: cannot listen there")));
    assert!(mistake(&["--port", "70000"]).contains("--port"));
    assert!(mistake(&["--host", "here"]).contains("'here' for '--host <ADDRESS>'"));
    assert!(mistake(&["--api-key", ""]).contains("--api-key"));
    assert!(mistake(&["--cors", "here"]).contains("--cors here: an origin is wanted"));
    assert!(mistake(&["--parallel", "0"]).contains("--parallel"));
    assert!(mistake(&["--cache-memory", "lots"]).contains("a size is wanted"));
    assert!(mistake(&["--log-level", "loud"]).contains("--log-level"));
    assert!(mistake(&["--served-model-name", ""]).contains("--served-model-name: the name is empty"));
    let gone = run(bare(&["serve", "--port", "0", "--model", "/no/such", "--device", "cpu"]), "");
    assert!(gone.mistake().contains("/no/such: no such directory"));
    let help = run(bare(&["serve", "--help"]), "").ok().stdout;
    assert!(help.contains("Examples:") && help.contains("--shutdown-timeout"));
}
