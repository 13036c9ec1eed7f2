use super::*;
use crate::sampler::{Sampler, SamplingOptions};
use crate::tokenizer::tests::byte_level;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::path::Path;

pub(crate) fn nano() -> Arc<Tokenizer> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/m1-nano");
    Arc::new(Tokenizer::from_dir(&dir).unwrap())
}

/// 256 bytes, an end and a token that no grammar wants.
pub(crate) fn bytes() -> Arc<Tokenizer> {
    let dir = tempfile::tempdir().unwrap();
    Arc::new(byte_level(dir.path(), &["<end_of_sentence>", "<other>", "<think>"]))
}

/// Both vocabularies, with the id that ends.
pub(crate) fn vocabularies() -> [(Arc<Tokenizer>, u32); 2] {
    let ends = |t: Arc<Tokenizer>| (t.clone(), t.id("<end_of_sentence>").unwrap());
    [ends(nano()), ends(bytes())]
}

/// Draws from random logits until an end id; what would make strings and lists endless becomes unlikelier with time.
pub(crate) fn draw(guide: &mut dyn Guide, tokenizer: &Tokenizer, end: u32, seed: u64) -> (Vec<u32>, String) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let options = SamplingOptions { seed: Some(seed), top_p: 1.0, ..SamplingOptions::default() };
    let vocab = tokenizer.size() + 3;
    let mut sampler = Sampler::new(options, Some(tokenizer.known(vocab))).unwrap();
    let closing: Vec<bool> = (0..vocab as u32)
        .map(|id| {
            let bytes = tokenizer.bytes(id).unwrap();
            id == end || !bytes.is_empty() && bytes.iter().all(|b| b"\"}]\n".contains(b)) || bytes.starts_with(b"</")
        })
        .collect();
    let mut ids = Vec::new();
    for step in 0..2000 {
        let urge = (step as f32 * 0.15).min(25.0);
        let logits: Vec<f32> =
            closing.iter().map(|&c| rng.random_range(-6.0..6.0) + if c { urge } else { 0.0 }).collect();
        let id = sampler.sample_next(&logits, &ids, guide.next().unwrap()).unwrap().id;
        guide.take(id).unwrap();
        if id == end {
            return (ids.clone(), tokenizer.decode(&ids));
        }
        ids.push(id);
    }
    panic!("seed {seed} never ends: {}", tokenizer.decode(&ids));
}

/// Whether `value` satisfies `schema`, for the keywords that these tests use.
pub(crate) fn satisfies(value: &Value, schema: &Value) -> bool {
    let root = schema;
    fn check(value: &Value, schema: &Value, root: &Value) -> bool {
        if let Some(path) = schema["$ref"].as_str() {
            return check(value, root.pointer(path.strip_prefix('#').unwrap()).unwrap(), root);
        }
        if let Some(any) = schema["anyOf"].as_array() {
            return any.iter().any(|s| check(value, s, root));
        }
        let kind = |kind: &str| match kind {
            "object" => value.is_object(),
            "array" => value.is_array(),
            "string" => value.is_string(),
            "integer" => {
                value.is_i64()
                    || value.is_u64()
                    || value.is_number()
                        && value.to_string().bytes().all(|b| b.is_ascii_digit() || b"-e+.".contains(&b))
            }
            "number" => value.is_number(),
            "boolean" => value.is_boolean(),
            "null" => value.is_null(),
            other => panic!("{other}"),
        };
        let typed = match &schema["type"] {
            Value::Null => true,
            Value::String(one) => kind(one),
            several => several.as_array().unwrap().iter().any(|k| kind(k.as_str().unwrap())),
        };
        let listed = schema["enum"].as_array().is_none_or(|list| list.contains(value));
        let number = value.as_f64().is_none_or(|n| {
            schema["minimum"].as_f64().is_none_or(|min| n >= min)
                && schema["maximum"].as_f64().is_none_or(|max| n <= max)
        });
        let length = value.as_str().is_none_or(|text| {
            let max = schema["maxLength"].as_u64();
            max.is_none_or(|max| text.chars().count() as u64 <= max)
        });
        let items = value.as_array().is_none_or(|items| {
            let n = items.len() as u64;
            schema["minItems"].as_u64().is_none_or(|min| n >= min)
                && schema["maxItems"].as_u64().is_none_or(|max| n <= max)
                && items.iter().all(|item| check(item, &schema["items"], root))
        });
        let members = value.as_object().is_none_or(|object| {
            let required = schema["required"].as_array();
            required.is_none_or(|keys| keys.iter().all(|key| object.contains_key(key.as_str().unwrap())))
                && object.iter().all(|(key, value)| match schema["properties"].get(key) {
                    Some(property) => check(value, property, root),
                    None => schema["additionalProperties"] != false,
                })
        });
        typed && listed && number && length && items && members
    }
    check(value, schema, root)
}

/// JSON's numbers have no bounds; those of serde_json do.
fn short_exponents(text: &str) -> String {
    let (mut short, mut in_string, mut exponent) = (String::new(), false, 0);
    for c in text.chars() {
        if c == '"' && (short.len() - short.trim_end_matches('\\').len()) % 2 == 0 {
            in_string = !in_string;
        }
        exponent = match c {
            'e' | 'E' if !in_string && short.ends_with(|last: char| last.is_ascii_digit()) => 1,
            '+' | '-' if exponent == 1 => 1,
            '0'..='9' if exponent > 0 => exponent + 1,
            _ => 0,
        };
        if exponent < 3 {
            short.push(c);
        }
    }
    short
}

fn closed(properties: Value, required: Value) -> Value {
    json!({"type": "object", "properties": properties, "required": required, "additionalProperties": false})
}

fn schemas() -> Vec<Value> {
    let point = closed(json!({"x": {"type": "number"}, "y": {"type": "number"}}), json!(["x", "y"]));
    let next = json!({"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]});
    let node = closed(json!({"value": {"type": "integer"}, "next": next}), json!(["value", "next"]));
    let units = json!(["°C", "°F", null, 7]);
    let note = json!({"type": ["string", "null"], "maxLength": 8});
    let tags = json!(["<think>", "</tool_calls>"]);
    vec![
        closed(
            json!({"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0, "maximum": 150}}),
            json!(["name", "age"]),
        ),
        closed(json!({"unit": {"enum": units}, "ok": {"type": "boolean"}, "note": note}), json!(["unit"])),
        closed(json!({"points": {"type": "array", "minItems": 1, "maxItems": 3, "items": point}}), json!(["points"])),
        json!({"type": "array", "items": {"anyOf": [{"type": "integer"}, {"enum": tags}]}, "maxItems": 4}),
        json!({"$defs": {"node": node}, "$ref": "#/$defs/node"}),
        json!({"type": "object"}),
        json!({"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}),
    ]
}

#[test]
fn whatever_is_drawn_is_json_of_the_schema() {
    for (tokenizer, end) in vocabularies() {
        let grammars = Grammars::new(&tokenizer, &[end]).unwrap();
        for (i, schema) in schemas().iter().enumerate() {
            let fresh = grammars.json_schema(schema).unwrap();
            let mut different = std::collections::HashSet::new();
            for seed in 0..60 {
                let (_, text) = draw(&mut fresh.clone(), &tokenizer, end, seed * 31 + i as u64);
                let value = serde_json::from_str(&short_exponents(&text)).unwrap_or_else(|e| panic!("{e}: {text}"));
                assert!(satisfies(&value, schema), "{text} is not {schema}");
                // Blanks are bounded, at the ends there are none.
                let plain = text.replace("\\\\", "").replace("\\\"", "");
                let outside = plain.split('"').step_by(2).collect::<Vec<_>>().join("\"\"");
                assert!(!outside.contains("  \n") && !outside.contains("\n\n") && text.trim() == text, "{text:?}");
                assert!(!outside.contains(&" ".repeat(17)) && !outside.contains(['\t', '\r']), "{text:?}");
                different.insert(text);
            }
            assert!(different.len() > 10, "{} of {schema}", different.len());
        }
    }
}

#[test]
fn an_object_begins_at_once_and_then_only_an_end_id_is_left() {
    let tokenizer = bytes();
    // Two ids that end.
    let mut grammar = Grammars::new(&tokenizer, &[256, 257]).unwrap().json_object().unwrap();
    assert_eq!(grammar.next(), Ok(Next::Only(u32::from(b'{'))));
    grammar.take(u32::from(b'{')).unwrap();
    grammar.take(u32::from(b'}')).unwrap();
    let Ok(Next::Among(mask)) = grammar.next() else { panic!() };
    let allowed: Vec<usize> = (0..mask.len()).filter(|&id| mask[id]).collect();
    assert_eq!(allowed, [256, 257]);
    assert!(grammar.clone().take(u32::from(b' ')).unwrap_err().0.contains("complete"));
    grammar.take(257).unwrap();
}

fn tools(strict: bool) -> Vec<Tool> {
    let function = |name: &str, parameters: Value| {
        let function = json!({"name": name, "parameters": parameters, "strict": strict});
        json!({"type": "function", "function": function})
    };
    let weather = json!({"city": {"type": "string"}, "unit": {"enum": ["C", "F"]}});
    let f = closed(weather, json!(["city", "unit"]));
    let list = [
        function("get_weather", f.clone()),
        function(
            "get",
            json!({"properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": false}),
        ),
        function("now", Value::Null),
    ];
    Tool::list(&list.into_iter().collect()).unwrap()
}

#[test]
fn whatever_is_drawn_is_calls_of_the_tools() {
    for (tokenizer, end) in vocabularies() {
        let grammars = Grammars::new(&tokenizer, &[end]).unwrap();
        let tools = tools(true);
        let (mut most, mut seen) = (0, std::collections::HashSet::new());
        for parallel in [true, false] {
            let fresh = grammars.tool_calls(&tools, parallel).unwrap();
            for seed in 0..80 {
                let (_, text) = draw(&mut fresh.clone(), &tokenizer, end, seed);
                let (outside, calls) = tools::parse(&text);
                assert!(text.starts_with("<tool_calls>\n") && text.ends_with("\n</tool_calls>") && outside.is_empty());
                assert_eq!(text.trim().lines().count(), calls.len() + 2, "{text}");
                assert!(parallel || calls.len() == 1);
                most = most.max(calls.len());
                for (name, arguments) in calls {
                    let tool = tools.iter().find(|t| t.name == name).unwrap();
                    let schema = super::arguments(tool, false).unwrap();
                    assert!(satisfies(&serde_json::from_str(&arguments).unwrap(), &schema), "{name} {arguments}");
                    seen.insert(name);
                }
            }
        }
        assert!(most > 1 && seen.len() == 3, "{most} {seen:?}");
        let one = grammars.tool_calls(&tools[1..2], false).unwrap();
        assert!(draw(&mut one.clone(), &tokenizer, end, 1).1.contains("{\"name\": \"get\", \"arguments\": {"));
    }
}

#[test]
fn there_is_a_last_call() {
    for (tokenizer, end) in vocabularies() {
        let grammars = Grammars::new(&tokenizer, &[end]).unwrap();
        let call = "\n{\"name\": \"now\", \"arguments\": {}}";
        let schema = &schemas()[0];
        for mut guide in [
            grammars.tool_calls(&tools(true), true).unwrap(),
            grammars.json_schema_or_tool_calls(schema, &tools(true), true).unwrap(),
        ] {
            let say = |guide: &mut Grammar, text: &str| {
                for id in tokenizer.encode(text, false).unwrap() {
                    match guide.next().unwrap() {
                        Next::Only(only) if only != id => return Err(tokenizer.decode(&[only])),
                        Next::Among(mask) if !mask[id as usize] => return Err("another".into()),
                        _ => guide.take(id).unwrap(),
                    }
                }
                Ok(())
            };
            assert_eq!(say(&mut guide, tools::OPEN), Ok(()));
            (0..MOST_CALLS).for_each(|i| assert_eq!(say(&mut guide, call), Ok(()), "call {i}"));
            assert!(say(&mut guide.clone(), call).is_err());
            assert_eq!(say(&mut guide, &format!("\n{}", tools::CLOSE)), Ok(()));
            let Ok(Next::Among(mask)) = guide.next() else { panic!() };
            assert!(mask[end as usize] && mask.iter().filter(|&&m| m).count() == 1);
        }
    }
}

#[test]
fn either_an_answer_or_calls() {
    let (tokenizer, end) = (nano(), 1275);
    let schema = &schemas()[0];
    let fresh =
        Grammars::new(&tokenizer, &[end]).unwrap().json_schema_or_tool_calls(schema, &tools(false), true).unwrap();
    let texts: Vec<String> = (0..40).map(|seed| draw(&mut fresh.clone(), &tokenizer, end, seed).1).collect();
    let (calls, answers): (Vec<_>, Vec<_>) = texts.iter().partition(|text| text.starts_with("<tool_calls>"));
    assert!(!calls.is_empty() && calls.iter().all(|text| !tools::parse(text).1.is_empty()));
    assert!(!answers.is_empty() && answers.iter().all(|t| satisfies(&serde_json::from_str(t).unwrap(), schema)));
}

#[test]
fn what_is_forced_is_written_as_the_tokenizer_does() {
    let (tokenizer, end) = (nano(), 1275);
    let grammars = Grammars::new(&tokenizer, &[end]).unwrap();
    let mut guide = grammars.tool_calls(&tools(true)[..1], false).unwrap();
    let wanted =
        tokenizer.encode("<tool_calls>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": ", false).unwrap();
    // Up to where the model has a choice: a blank or none, here.
    for &id in wanted.iter().take(wanted.len() - 8) {
        assert_eq!(guide.next(), Ok(Next::Only(id)), "{:?}", tokenizer.decode(&[id]));
        guide.take(id).unwrap();
    }
    // The tags' ids are in no string.
    let mut guide = grammars.json_schema(&json!({"type": "string"})).unwrap();
    let quote = tokenizer.encode("\"", false).unwrap()[0];
    guide.take(quote).unwrap();
    let Ok(Next::Among(mask)) = guide.next() else { panic!() };
    assert!(TAGS.iter().all(|tag| !mask[tokenizer.id(tag).unwrap() as usize]));
    assert!(mask.iter().filter(|&&m| m).count() > 500);
}

#[test]
fn schemas_that_cannot_be_kept_are_refused_in_one_line() {
    let tokenizer = bytes();
    let grammars = Grammars::new(&tokenizer, &[256]).unwrap();
    let bad = [
        json!([]),
        json!("object"),
        json!({"type": "objekt"}),
        json!({"type": 3}),
        json!({"type": "object", "properties": {"a": {"$ref": "https://example.com/schema.json"}}}),
        json!({"$ref": "#/$defs/none"}),
        json!({"type": "string", "pattern": "(?=a)b"}),
        json!({"type": "string", "pattern": "("}),
        json!({"type": "string", "format": "no-such-format"}),
        json!({"type": "integer", "minimum": 5, "maximum": 3}),
        json!({"not": {"type": "string"}}),
        json!({"enum": []}),
        json!({"type": "object", "properties": {"a": false}, "required": ["a"]}),
        json!({"oneOf": [{"type": "integer"}, {"type": "number"}]}),
        json!({"type": "array", "uniqueItems": true}),
        json!({"x-guidance": {"whitespace_flexible": "?"}, "type": "objekt"}),
    ];
    for schema in bad {
        let error = grammars.json_schema(&schema).map(|_| ()).expect_err(&schema.to_string()).0;
        assert!(
            error.starts_with("the JSON schema can't be used: ") && !error.contains(['\n', '<']),
            "{schema}: {error}"
        );
        assert!(error.len() < 300, "{error}");
    }
    // Of two forms that exclude each other one is allowed.
    let tagged = |kind: &str| closed(json!({"k": {"const": kind}}), json!(["k"]));
    grammars.json_schema(&json!({"oneOf": [tagged("a"), tagged("b")]})).unwrap();

    let tool = |strict: bool, parameters: Value| Tool {
        name: "f".into(),
        description: None,
        parameters: Some(parameters),
        strict,
    };
    let mut odd = closed(json!({"a": {"type": "integer"}}), json!(["a"]));
    odd["dependentRequired"] = json!({});
    let good = tools(false).remove(0);
    let error = grammars.tool_calls(&[good.clone(), tool(true, odd.clone())], true).map(|_| ()).unwrap_err().0;
    assert!(error.starts_with("tools[1].function.parameters can't be used: "), "{error}");
    // Not strict: what can be kept is, and else it is any object.
    let lenient = grammars.tool_calls(&[tool(false, odd)], false).unwrap();
    let text = draw(&mut lenient.clone(), &tokenizer, 256, 3).1;
    assert!(
        text.contains("\"arguments\": {\"a\":")
            || text.contains("\"arguments\": {\"a\" :")
            || text.contains("\"arguments\": { \"a\""),
        "{text}"
    );
    let any = grammars
        .tool_calls(&[tool(false, json!({"type": "object", "properties": {"a": {"$ref": "x"}}}))], false)
        .unwrap();
    assert_eq!(tools::parse(&draw(&mut any.clone(), &tokenizer, 256, 4).1).1.len(), 1);
    assert!(grammars.tool_calls(&[tool(true, json!({"type": "string"}))], false).is_err());
    assert!(grammars.tool_calls(&[], false).is_err());
}

#[test]
fn vocabularies_that_will_not_do_say_so() {
    let dir = tempfile::tempdir().unwrap();
    let words = r#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,
        "pre_tokenizer":{"type":"Whitespace"},"post_processor":null,
        "decoder":{"type":"WordPiece","prefix":"","cleanup":false},
        "model":{"type":"WordLevel","vocab":{"one":0,"[UNK]":1},"unk_token":"[UNK]"}}"#;
    std::fs::write(dir.path().join("tokenizer.json"), words).unwrap();
    let words = Arc::new(Tokenizer::from_dir(dir.path()).unwrap());
    assert!(Grammars::new(&words, &[0]).unwrap_err().0.contains("not byte-level"));
    assert!(Grammars::new(&bytes(), &[]).unwrap_err().0.contains("no end id"));
    assert!(Grammars::new(&bytes(), &[99_999]).unwrap_err().0.contains("no end id"));
}
