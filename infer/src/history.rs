//! The messages of a request in OpenAI's form, made into those that a chat template takes: an assistant's reasoning and
//! calls become text as M1 writes it, and the results of one turn's calls become one message with their tools' names.

use crate::reply;
use crate::tools::{FieldError, ToolCall};
use serde_json::{Map, Value, json};

/// Reads `messages`: roles system (or developer), user, assistant and tool; content as a string or as parts of text,
/// which are joined. Each comes out as `{"role", "content": "…"}`, and results of tools that follow each other as
/// `{"role": "tool", "content": [{"type": "text", "name", "text"}, …]}`.
///
/// A tool's name is that of the call which `tool_call_id` names, in an assistant's message before it, or else `name`.
pub fn messages(messages: &[Value]) -> Result<Vec<Value>, FieldError> {
    let mut read: Vec<Value> = Vec::with_capacity(messages.len());
    let mut calls: Vec<ToolCall> = Vec::new();
    for (i, message) in messages.iter().enumerate() {
        let path = format!("messages[{i}]");
        let Some(message) = message.as_object() else {
            return Err(FieldError::new(path, "must be an object"));
        };
        let message = Fields { message, path };
        match message.text("role")?.unwrap_or("") {
            "system" | "developer" => read.push(json!({"role": "system", "content": message.needed_content()?})),
            "user" => read.push(json!({"role": "user", "content": message.needed_content()?})),
            "assistant" => {
                let own = message.calls()?;
                let content = match message.content()? {
                    Some(content) => content,
                    None if own.is_empty() && message.get("reasoning_content").is_none() => message.needed_content()?,
                    None => String::new(),
                };
                let text = reply::rebuild(message.text("reasoning_content")?, &content, &own);
                read.push(json!({"role": "assistant", "content": text}));
                calls.extend(own);
            }
            "tool" => {
                let part = json!({"type": "text", "name": message.tool(&calls)?, "text": message.needed_content()?});
                let last = read.last_mut().filter(|last| last["role"] == "tool");
                match last.and_then(|last| last["content"].as_array_mut()) {
                    Some(parts) => parts.push(part),
                    None => read.push(json!({"role": "tool", "content": [part]})),
                }
            }
            _ => {
                let reason = "must be \"system\", \"developer\", \"user\", \"assistant\" or \"tool\"";
                return Err(message.error("role", reason));
            }
        }
    }
    Ok(read)
}

struct Fields<'a> {
    message: &'a Map<String, Value>,
    path: String,
}

impl<'a> Fields<'a> {
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.message.get(key).filter(|value| !value.is_null())
    }

    fn error(&self, key: &str, reason: impl Into<String>) -> FieldError {
        FieldError::new(format!("{}.{key}", self.path), reason)
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>, FieldError> {
        let text = |value: &'a Value| value.as_str().ok_or_else(|| self.error(key, "must be a string"));
        self.get(key).map(text).transpose()
    }

    fn content(&self) -> Result<Option<String>, FieldError> {
        let parts = match self.get("content") {
            None => return Ok(None),
            Some(Value::String(text)) => return Ok(Some(text.clone())),
            Some(Value::Array(parts)) => parts,
            Some(_) => return Err(self.error("content", "must be a string or a list of parts")),
        };
        let mut text = String::new();
        for (i, part) in parts.iter().enumerate() {
            match (part["type"].as_str(), part["text"].as_str()) {
                (Some("text"), Some(part)) => text += part,
                (Some(kind), _) if kind != "text" => {
                    let reason = format!("is {kind:?}, and this model reads text only");
                    return Err(self.error(&format!("content[{i}].type"), reason));
                }
                _ => {
                    let reason = "must be {\"type\": \"text\", \"text\": \"…\"}";
                    return Err(self.error(&format!("content[{i}]"), reason));
                }
            }
        }
        Ok(Some(text))
    }

    fn needed_content(&self) -> Result<String, FieldError> {
        self.content()?.ok_or_else(|| self.error("content", "is missing"))
    }

    fn calls(&self) -> Result<Vec<ToolCall>, FieldError> {
        let list = match self.get("tool_calls") {
            None => return Ok(Vec::new()),
            Some(Value::Array(list)) => list,
            Some(_) => return Err(self.error("tool_calls", "must be a list")),
        };
        let call = |(i, call): (usize, &Value)| {
            let error = |key: &str, reason: &str| self.error(&format!("tool_calls[{i}]{key}"), reason);
            if !call["type"].is_null() && call["type"] != "function" {
                return Err(error(".type", "must be \"function\""));
            }
            let id = call["id"].as_str().ok_or_else(|| error(".id", "must be a string"))?;
            let function = &call["function"];
            let name = function["name"].as_str().ok_or_else(|| error(".function.name", "must be a string"))?;
            let arguments = match &function["arguments"] {
                Value::Null => String::new(),
                Value::String(text) => text.clone(),
                _ => return Err(error(".function.arguments", "must be a string of JSON")),
            };
            Ok(ToolCall { id: id.into(), name: name.into(), arguments })
        };
        list.iter().enumerate().map(call).collect()
    }

    /// The name of the tool whose result this is.
    fn tool(&self, calls: &[ToolCall]) -> Result<String, FieldError> {
        let id = self.text("tool_call_id")?;
        let call = id.and_then(|id| calls.iter().rev().find(|call| call.id == id));
        match (call, self.text("name")?, id) {
            (Some(call), ..) => Ok(call.name.clone()),
            (None, Some(name), _) => Ok(name.to_string()),
            (None, None, Some(id)) => {
                let reason = format!("is {id:?}, and no assistant's message before this has a call of that id");
                Err(self.error("tool_call_id", reason))
            }
            (None, None, None) => Err(self.error("tool_call_id", "is missing")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::template::Template;

    #[test]
    fn a_round_with_tools_renders_as_the_recorded_case() {
        let cases: Value = serde_json::from_str(include_str!("../tests/data/chat_template_cases.json")).unwrap();
        let function = json!({"name": "get_weather", "arguments": "{\"city\": \"X\"}"});
        let call = json!({"id": "1", "type": "function", "function": function});
        let read = messages(&[
            json!({"role": "user", "content": "W?"}),
            json!({"role": "assistant", "content": null, "tool_calls": [call]}),
            json!({"role": "tool", "tool_call_id": "1", "content": "25C"}),
            json!({"role": "tool", "name": "b", "content": [{"type": "text", "text": "2"}]}),
        ]);
        let template = Template::new(include_str!("../tests/data/chat_template.jinja")).unwrap();
        let rendered = template.render(&read.unwrap(), &[], true, false).unwrap();
        assert_eq!(rendered, cases["tool_result"]["rendered"]);
    }

    #[test]
    fn an_assistants_parts_become_its_text() {
        let message = |message: Value| messages(&[message]).unwrap()[0]["content"].as_str().unwrap().to_string();
        let assistant = |reasoning: Value, content: Value| {
            message(json!({"role": "assistant", "reasoning_content": reasoning, "content": content}))
        };
        assert_eq!(assistant(json!("x"), json!("42")), "<think>\nx\n</think>\n\n42");
        assert_eq!(assistant(json!(""), json!("42")), format!("{}42", crate::think::NO_THINKING));
        assert_eq!(assistant(json!(null), json!([{"type": "text", "text": "4"}, {"type": "text", "text": "2"}])), "42");
        let calls = json!([{"id": "1", "function": {"name": "f", "arguments": ""}}]);
        let text = message(json!({"role": "assistant", "content": "So:", "tool_calls": calls}));
        assert_eq!(text, "So:\n<tool_calls>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_calls>");
        assert_eq!(message(json!({"role": "developer", "content": "Be brief."})), "Be brief.");
    }

    #[test]
    fn the_name_is_that_of_the_latest_call_of_the_id() {
        let turn = |name: &str| json!({"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": name}}]});
        let result = json!({"role": "tool", "tool_call_id": "1", "content": "r"});
        let read = messages(&[turn("f"), result.clone(), turn("g"), result]).unwrap();
        let name = |i: usize| read[i]["content"][0]["name"].as_str().unwrap();
        assert_eq!((name(1), name(3)), ("f", "g"));
    }

    #[test]
    fn wrong_fields_are_named() {
        let wrong = [
            (json!("hi"), "messages[0] must be an object"),
            (json!({"content": "hi"}), "messages[0].role must be \"system\""),
            (json!({"role": "function", "content": "hi"}), "messages[0].role must be"),
            (json!({"role": 1}), "messages[0].role must be a string"),
            (json!({"role": "user"}), "messages[0].content is missing"),
            (json!({"role": "user", "content": 3}), "messages[0].content must be a string or"),
            (
                json!({"role": "user", "content": [{"type": "image_url"}]}),
                "messages[0].content[0].type is \"image_url\"",
            ),
            (json!({"role": "user", "content": [{"type": "text"}]}), "messages[0].content[0] must be"),
            (json!({"role": "user", "content": ["x"]}), "messages[0].content[0] must be"),
            (json!({"role": "assistant"}), "messages[0].content is missing"),
            (json!({"role": "assistant", "tool_calls": {}}), "messages[0].tool_calls must be a list"),
            (json!({"role": "assistant", "tool_calls": [{}]}), "messages[0].tool_calls[0].id must"),
            (json!({"role": "assistant", "tool_calls": [{"id": "1"}]}), "messages[0].tool_calls[0].function.name must"),
            (json!({"role": "tool", "content": "x"}), "messages[0].tool_call_id is missing"),
            (json!({"role": "tool", "content": "x", "tool_call_id": "9"}), "messages[0].tool_call_id is \"9\""),
        ];
        for (message, wanted) in wrong {
            let error = messages(&[message]).unwrap_err();
            assert!(error.to_string().starts_with(wanted), "{error}");
        }
    }
}
