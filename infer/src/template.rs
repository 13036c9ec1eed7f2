//! The chat template of a checkpoint, rendered as Python's Jinja renders it. Where minijinja differs from Jinja the
//! difference is made up here: `tojson` is Python's `json.dumps(ensure_ascii=False)`, and neighbouring string literals
//! join into one, which M1's template does by accident (`'{''name'': …'` in its wording for tools).

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, ErrorKind};
use serde::Serialize;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// File that goes before `tokenizer_config.json`.
const FILE: &str = "chat_template.jinja";

/// The tools' format as M1's template renders it, and as it was meant.
const SLIP: (&str, &str) = (
    "{name: <tool-name-1>, arguments: <args-json-object-1>}",
    "{\"name\": <tool-name-1>, \"arguments\": <args-json-object-1>}",
);

/// Why a conversation can't be rendered.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The checkpoint brings no template.
    #[error("{dir}: no chat template (neither {FILE} nor chat_template in tokenizer_config.json); use `m1 generate`")]
    Missing {
        /// The checkpoint's directory.
        dir: PathBuf,
    },
    /// A template that can't be read.
    #[error("{path}: {reason}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The template refuses these messages.
    #[error("the chat template refuses the messages: {0}")]
    Render(String),
}

/// A compiled chat template.
#[derive(Debug, Clone)]
pub struct Template {
    env: Environment<'static>,
    corrected: Option<Environment<'static>>,
    /// Whether content has to be a list of parts (M1's does) or a string.
    parts: bool,
    tokens: Value,
}

impl Template {
    /// The template of the checkpoint in `dir`, whose `tokenizer_config.json` is `config`.
    pub fn from_dir(dir: &Path, config: &Value) -> Result<Self, TemplateError> {
        let path = dir.join(FILE);
        let invalid = |path: &Path, reason: String| TemplateError::Invalid { path: path.to_path_buf(), reason };
        let (path, source) = match std::fs::read_to_string(&path) {
            Ok(source) => (path, source),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                let path = dir.join("tokenizer_config.json");
                let source = match config.get("chat_template") {
                    None | Some(Value::Null) => {
                        return Err(TemplateError::Missing { dir: dir.to_path_buf() });
                    }
                    Some(value) => default_of(value).ok_or_else(|| {
                        invalid(&path, "chat_template must be a string, or a list with one named \"default\"".into())
                    })?,
                };
                (path, source.to_string())
            }
            Err(e) => return Err(invalid(&path, e.to_string())),
        };
        let mut template = Self::new(&source).map_err(|e| invalid(&path, e.to_string()))?;
        for key in ["bos_token", "eos_token", "unk_token", "pad_token"] {
            if let Some(token) = config.get(key).and_then(|v| v.as_str().or_else(|| v.get("content")?.as_str())) {
                template.tokens[key] = token.into();
            }
        }
        Ok(template)
    }

    /// Compiles a template's text.
    pub fn new(source: &str) -> Result<Self, TemplateError> {
        let joined = join_literals(source, false);
        let mended = join_literals(source, true);
        let corrected = if mended == joined { None } else { Some(environment(mended)?) };
        let parts = ["['text']", "[\"text\"]", ".text"].iter().any(|text| source.contains(text));
        Ok(Self { env: environment(joined)?, corrected, parts, tokens: json!({}) })
    }

    /// Renders messages (`{"role", "content", …}`; content a string or a list of parts). `tools` are JSON schemas.
    /// `corrected` quotes `"name"` and `"arguments"` in M1's wording for tools, which it was trained without.
    pub fn render(
        &self,
        messages: &[Value],
        tools: &[Value],
        add_generation_prompt: bool,
        corrected: bool,
    ) -> Result<String, TemplateError> {
        let env = self.corrected.as_ref().filter(|_| corrected).unwrap_or(&self.env);
        let messages: Vec<Value> = messages.iter().map(|m| self.adapt(m)).collect();
        let tools = if tools.is_empty() { Value::Null } else { tools.into() };
        let mut values = self.tokens.clone();
        values["messages"] = messages.into();
        values["tools"] = tools;
        values["add_generation_prompt"] = add_generation_prompt.into();
        let refused = |e: minijinja::Error| TemplateError::Render(one_line(&e));
        env.get_template("chat").and_then(|t| t.render(Serde(values))).map_err(refused)
    }

    /// Gives content the form the template reads.
    fn adapt(&self, message: &Value) -> Value {
        let mut message = message.clone();
        let content = match message.get("content") {
            Some(Value::String(text)) if self.parts => {
                let mut part = json!({"type": "text", "text": text});
                if let (Some("tool"), Some(name)) = (message["role"].as_str(), message.get("name")) {
                    part["name"] = name.clone(); // M1's template reads a tool's name from the part
                }
                json!([part])
            }
            // An assistant that only called tools said nothing.
            None | Some(Value::Null) if self.parts && message["role"] == "assistant" => json!([]),
            Some(Value::Array(parts)) if !self.parts => {
                parts.iter().filter_map(|p| p.get("text")?.as_str()).collect::<String>().into()
            }
            _ => return message,
        };
        message["content"] = content;
        message
    }
}

/// The string itself, or of a list of `{"name", "template"}` the one named "default" or the only one.
fn default_of(value: &Value) -> Option<&str> {
    let list = match value {
        Value::Array(list) => list,
        other => return other.as_str(),
    };
    let named = list.iter().find(|t| t["name"] == "default");
    named.or(list.first().filter(|_| list.len() == 1))?.get("template")?.as_str()
}

fn environment(source: String) -> Result<Environment<'static>, TemplateError> {
    let mut env = Environment::new();
    // Hugging Face's apply_chat_template sets these two.
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    env.set_syntax(syntax.map_err(|e| TemplateError::Render(one_line(&e)))?);
    env.add_filter("tojson", |value: minijinja::Value, kwargs: Kwargs| {
        let indent: Option<usize> = kwargs.get("indent")?;
        // Other arguments of Python's (ensure_ascii, separators) ask for what is done here anyway.
        Ok::<_, minijinja::Error>(python_json(&value, indent))
    });
    env.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    env.add_template_owned("chat", source).map_err(|e| TemplateError::Render(one_line(&e)))?;
    Ok(env)
}

fn one_line(error: &minijinja::Error) -> String {
    error.to_string().replace('\n', " ")
}

/// Joins neighbouring string literals inside `{{ }}` and `{% %}` into one, as Jinja's parser does; `mend` also
/// corrects the wording that suffers from it in M1's template.
fn join_literals(source: &str, mend: bool) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(open) = ["{{", "{%", "{#"].iter().filter_map(|tag| rest.find(tag)).min() {
        let close = match &rest[open..open + 2] {
            "{{" => "}}",
            "{%" => "%}",
            _ => "#}",
        };
        out.push_str(&rest[..open + 2]);
        rest = &rest[open + 2..];
        while !rest.is_empty() && !rest.starts_with(close) {
            if close != "#}" && rest.starts_with(['\'', '"']) {
                let (literal, after) = literals(rest, mend);
                out.push_str(&literal);
                rest = after;
            } else {
                let n = rest.chars().next().map_or(0, char::len_utf8);
                out.push_str(&rest[..n]);
                rest = &rest[n..];
            }
        }
    }
    out + rest
}

/// Reads one string literal and those that follow it directly; returns one literal and what comes after.
fn literals(source: &str, mend: bool) -> (String, &str) {
    let mut rest = source;
    let quote = &rest[..1];
    let mut body = String::new();
    loop {
        let here = &rest[..1];
        let mut end = rest.len();
        let mut escaped = false;
        for (i, c) in rest.char_indices().skip(1) {
            if !escaped && c == here.chars().next().unwrap_or(c) {
                end = i;
                break;
            }
            escaped = c == '\\' && !escaped;
        }
        if end == rest.len() {
            return (source.to_string(), ""); // never closed: minijinja will say so
        }
        let text = &rest[1..end];
        body.push_str(&if here == quote { text.to_string() } else { text.replace(quote, &format!("\\{quote}")) });
        rest = &rest[end + 1..];
        match rest.trim_start() {
            next if next.starts_with(['\'', '"']) => rest = next,
            _ => break,
        }
    }
    if mend {
        body = body.replace(SLIP.0, &SLIP.1.replace(quote, &format!("\\{quote}")));
    }
    (format!("{quote}{body}{quote}"), rest)
}

/// Python's `json.dumps(value, ensure_ascii=False)`: ", " and ": ", keys in their order, nothing escaped for HTML.
fn python_json(value: &minijinja::Value, indent: Option<usize>) -> String {
    let mut out = Vec::new();
    let format = PythonFormat { indent, depth: 0, empty: true };
    let mut serializer = serde_json::Serializer::with_formatter(&mut out, format);
    match value.serialize(&mut serializer) {
        Ok(()) => String::from_utf8(out).unwrap_or_default(),
        Err(_) => "null".to_string(),
    }
}

struct PythonFormat {
    indent: Option<usize>,
    depth: usize,
    empty: bool,
}

type Written = std::io::Result<()>;

impl PythonFormat {
    fn open<W: std::io::Write + ?Sized>(&mut self, w: &mut W, bracket: &[u8]) -> Written {
        self.depth += 1;
        self.empty = true;
        w.write_all(bracket)
    }

    fn close<W: std::io::Write + ?Sized>(&mut self, w: &mut W, bracket: &[u8]) -> Written {
        self.depth -= 1;
        if !self.empty {
            self.line(w)?;
        }
        self.empty = false;
        w.write_all(bracket)
    }

    fn item<W: std::io::Write + ?Sized>(&mut self, w: &mut W, first: bool) -> Written {
        if !first {
            w.write_all(if self.indent.is_some() { b"," } else { b", " })?;
        }
        self.line(w)
    }

    fn line<W: std::io::Write + ?Sized>(&self, w: &mut W) -> Written {
        match self.indent {
            Some(n) => write!(w, "\n{:1$}", "", n * self.depth),
            None => Ok(()),
        }
    }
}

impl serde_json::ser::Formatter for PythonFormat {
    fn begin_array<W: std::io::Write + ?Sized>(&mut self, w: &mut W) -> Written {
        self.open(w, b"[")
    }
    fn end_array<W: std::io::Write + ?Sized>(&mut self, w: &mut W) -> Written {
        self.close(w, b"]")
    }
    fn begin_array_value<W: std::io::Write + ?Sized>(&mut self, w: &mut W, first: bool) -> Written {
        self.item(w, first)
    }
    fn end_array_value<W: std::io::Write + ?Sized>(&mut self, _: &mut W) -> Written {
        self.empty = false;
        Ok(())
    }
    fn begin_object<W: std::io::Write + ?Sized>(&mut self, w: &mut W) -> Written {
        self.open(w, b"{")
    }
    fn end_object<W: std::io::Write + ?Sized>(&mut self, w: &mut W) -> Written {
        self.close(w, b"}")
    }
    fn begin_object_key<W: std::io::Write + ?Sized>(&mut self, w: &mut W, first: bool) -> Written {
        self.item(w, first)
    }
    fn begin_object_value<W: std::io::Write + ?Sized>(&mut self, w: &mut W) -> Written {
        w.write_all(b": ")
    }
    fn end_object_value<W: std::io::Write + ?Sized>(&mut self, _: &mut W) -> Written {
        self.empty = false;
        Ok(())
    }
    fn write_f64<W: std::io::Write + ?Sized>(&mut self, w: &mut W, value: f64) -> Written {
        w.write_all(python_float(value).as_bytes())
    }
}

/// Python's `repr` of a float: the shortest digits, with an exponent below 1e-4 and from 1e16 on.
fn python_float(value: f64) -> String {
    let scientific = format!("{value:e}");
    let exponent = scientific.split_once('e').and_then(|(_, e)| e.parse::<i32>().ok()).unwrap_or(0);
    if value == 0.0 || (-4..16).contains(&exponent) {
        return format!("{value:?}");
    }
    let digits = scientific.split('e').next().unwrap_or_default();
    format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    const M1: &str = include_str!("../tests/data/chat_template.jinja");
    const CASES: &str = include_str!("../tests/data/chat_template_cases.json");

    fn render(input: &Value, corrected: bool) -> Result<String, TemplateError> {
        let list = |key| input[key].as_array().cloned().unwrap_or_default();
        let gen_prompt = input["add_generation_prompt"].as_bool().unwrap();
        Template::new(M1).unwrap().render(&list("messages"), &list("tools"), gen_prompt, corrected)
    }

    #[test]
    fn the_recorded_cases_to_the_byte() {
        let cases: Value = serde_json::from_str(CASES).unwrap();
        let rendered: Vec<_> = cases.as_object().unwrap().iter().filter(|(_, c)| c["rendered"].is_string()).collect();
        assert_eq!(rendered.len(), 5);
        for (name, case) in rendered {
            assert_eq!(render(&case["input"], false).unwrap(), case["rendered"].as_str().unwrap(), "{name}");
        }
    }

    #[test]
    fn plain_strings_render_as_if_wrapped() {
        let cases: Value = serde_json::from_str(CASES).unwrap();
        let wanted = "<begin_of_document><beginning_of_sentence>user name=user\nplain<end_of_sentence>\n<beginning_of_sentence>ai name=assistant\n";
        assert_eq!(render(&cases["string_content"]["input"], false).unwrap(), wanted);
        let tool =
            json!({"messages": [{"role": "tool", "name": "f", "content": "25C"}], "add_generation_prompt": false});
        assert!(render(&tool, false).unwrap().contains("tool name: f\ntool result: 25C\n\n<end_of_sentence>"));
    }

    #[test]
    fn the_corrected_wording_differs_in_the_quotes_only() {
        let cases: Value = serde_json::from_str(CASES).unwrap();
        let shipped = render(&cases["tools"]["input"], false).unwrap();
        let corrected = render(&cases["tools"]["input"], true).unwrap();
        assert_ne!(shipped, corrected);
        assert_eq!(corrected, shipped.replace(SLIP.0, SLIP.1));
        assert_eq!(render(&cases["user_only"]["input"], true).unwrap(), cases["user_only"]["rendered"]);
    }

    #[test]
    fn literals_join_as_in_jinja_and_nothing_else_changes() {
        for (source, joined) in [
            ("{{ 'a''b' }}", "{{ 'ab' }}"),
            ("{{ 'a' \n 'b' ~ \"c\"'d' }}", "{{ 'ab' ~ \"cd\" }}"),
            (r#"{{ 'it\'s' "'x'" }}"#, r#"{{ 'it\'s\'x\'' }}"#),
            ("it''s {# 'a''b' #} {{ f('a', 'b') }}", "it''s {# 'a''b' #} {{ f('a', 'b') }}"),
            ("{{ '}}' '%}' }} ''", "{{ '}}%}' }} ''"),
            ("{{ 'open", "{{ 'open"),
        ] {
            assert_eq!(join_literals(source, false), joined);
        }
        assert_eq!(Template::new("{{ 'it\\'s' \"'x'\" }}").unwrap().render(&[], &[], false, false).unwrap(), "it's'x'");
    }

    #[test]
    fn json_is_pythons() {
        let value = json!({"b": [1, 2.5, 1e16, 1e-5, 1e22, 123456.0, -0.0], "a": {"<&'>": "é\n\"\u{7f}\u{1}"}, "e": [], "n": null, "t": true});
        let python = "{\"b\": [1, 2.5, 1e+16, 1e-05, 1e+22, 123456.0, -0.0], \"a\": {\"<&'>\": \"é\\n\\\"\u{7f}\\u0001\"}, \"e\": [], \"n\": null, \"t\": true}";
        assert_eq!(python_json(&minijinja::Value::from(Serde(&value)), None), python);
        let nested = minijinja::Value::from(Serde(json!({"a": [1, {}], "b": {"c": 2}})));
        assert_eq!(
            python_json(&nested, Some(2)),
            "{\n  \"a\": [\n    1,\n    {}\n  ],\n  \"b\": {\n    \"c\": 2\n  }\n}"
        );
    }

    #[test]
    fn other_templates_get_the_content_they_read() {
        let chatml = "{% for m in messages %}\n<{{ m.role }}>{{ m['content'] }}{{ eos_token }}\n{% endfor %}\n{{ raise_exception('no') if tools }}";
        let dir = tempfile::tempdir().unwrap();
        let config = json!({"chat_template": [{"name": "rag", "template": "x"}, {"name": "default", "template": chatml}], "eos_token": {"content": "<e>"}});
        let template = Template::from_dir(dir.path(), &config).unwrap();
        let messages =
            [json!({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]})];
        assert_eq!(template.render(&messages, &[], false, false).unwrap(), "<user>ab<e>\n");
        let error = template.render(&messages, &[json!({})], false, false).unwrap_err().to_string();
        assert!(error.contains("refuses the messages") && error.contains("no"), "{error}");
    }

    #[test]
    fn where_the_template_comes_from() {
        let dir = tempfile::tempdir().unwrap();
        let error = Template::from_dir(dir.path(), &Value::Null).unwrap_err().to_string();
        assert!(error.contains("no chat template"), "{error}");
        let error = Template::from_dir(dir.path(), &json!({"chat_template": 5})).unwrap_err().to_string();
        assert!(error.contains("must be a string"), "{error}");
        let error = Template::from_dir(dir.path(), &json!({"chat_template": "{{ 'x"})).unwrap_err().to_string();
        assert!(error.contains("tokenizer_config.json: ") && !error.contains('\n'), "{error}");
        std::fs::write(dir.path().join(FILE), "from the file").unwrap();
        let template = Template::from_dir(dir.path(), &json!({"chat_template": "x"})).unwrap();
        assert_eq!(template.render(&[], &[], true, false).unwrap(), "from the file");
    }
}
