//! Tools: what a client says of them in OpenAI's form, what M1's template and text make of it, and back.

mod json;
mod parser;

pub use parser::{CLOSE, OPEN, ToolEvent, ToolParser, parse};

use serde_json::{Map, Value, json};

/// What is wrong with a field of a request. Fit for a client.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} {reason}")]
pub struct FieldError {
    /// The field's path, as `tools[0].function.name`.
    pub field: String,
    /// What is wrong with it and what would be right, to be read after the path.
    pub reason: String,
}

impl FieldError {
    pub(crate) fn new(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { field: field.into(), reason: reason.into() }
    }
}

/// The most characters of a tool's name.
const NAME: usize = 64;

/// A tool that the model may call.
#[derive(Debug, Clone, PartialEq)]
pub struct Tool {
    /// Its name: letters, digits, `_` and `-`.
    pub name: String,
    /// What it does.
    pub description: Option<String>,
    /// JSON schema of its arguments, an object; `None`: it says nothing of them.
    pub parameters: Option<Value>,
    /// Whether the schema must be kept to the letter, or be refused where that can't be done.
    pub strict: bool,
}

impl Tool {
    /// Reads the `tools` of a request: a list of `{"type": "function", "function": {"name", "description",
    /// "parameters", "strict"}}`, names all different; null is the empty list.
    pub fn list(tools: &Value) -> Result<Vec<Self>, FieldError> {
        let list = match tools {
            Value::Null => return Ok(Vec::new()),
            Value::Array(list) => list,
            _ => return Err(FieldError::new("tools", "must be a list")),
        };
        let mut tools: Vec<Self> = Vec::with_capacity(list.len());
        for (i, value) in list.iter().enumerate() {
            let tool = Self::read(value, &format!("tools[{i}]"))?;
            if tools.iter().any(|t| t.name == tool.name) {
                let reason = format!("is {:?} again; each tool needs its own name", tool.name);
                return Err(FieldError::new(format!("tools[{i}].function.name"), reason));
            }
            tools.push(tool);
        }
        Ok(tools)
    }

    fn read(value: &Value, path: &str) -> Result<Self, FieldError> {
        if value.get("type").and_then(Value::as_str) != Some("function") {
            return Err(FieldError::new(format!("{path}.type"), "must be \"function\": there are no other tools"));
        }
        let error = |key: &str, reason: String| FieldError::new(format!("{path}.function.{key}"), reason);
        let Some(function) = value.get("function").and_then(Value::as_object) else {
            return Err(FieldError::new(format!("{path}.function"), "must be an object with \"name\""));
        };
        let get = |key: &str| function.get(key).filter(|v| !v.is_null());
        let name = match get("name") {
            Some(Value::String(name)) if is_name(name) => name.clone(),
            _ => {
                let reason = format!("must be a string of 1 to {NAME} letters, digits, \"_\" and \"-\"");
                return Err(error("name", reason));
            }
        };
        let description = match get("description") {
            None => None,
            Some(Value::String(text)) => Some(text.clone()),
            Some(_) => return Err(error("description", "must be a string".into())),
        };
        let parameters = match get("parameters") {
            None => None,
            Some(schema @ Value::Object(_)) => Some(schema.clone()),
            Some(_) => return Err(error("parameters", "must be a JSON schema, an object".into())),
        };
        let strict = match get("strict") {
            None => false,
            Some(Value::Bool(strict)) => *strict,
            Some(_) => return Err(error("strict", "must be true or false".into())),
        };
        Ok(Self { name, description, parameters, strict })
    }

    /// What the chat template takes: name, description and parameters, in this order.
    pub fn schema(&self) -> Value {
        let mut schema = json!({"name": self.name});
        if let Some(description) = &self.description {
            schema["description"] = description.clone().into();
        }
        if let Some(parameters) = &self.parameters {
            schema["parameters"] = parameters.clone();
        }
        schema
    }
}

fn is_name(name: &str) -> bool {
    (1..=NAME).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
}

/// Which tools the model may or must call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToolChoice {
    /// None: the tools are not even named in the prompt.
    None,
    /// As the model likes.
    Auto,
    /// At least one.
    Required,
    /// This one.
    Named(String),
}

impl ToolChoice {
    /// Reads the `tool_choice` of a request: `"none"`, `"auto"`, `"required"` or `{"type": "function", "function":
    /// {"name"}}` with the name of one of `tools`. Absent or null: auto where there are tools.
    pub fn read(choice: Option<&Value>, tools: &[Tool]) -> Result<Self, FieldError> {
        let error = |reason: &str| Err(FieldError::new("tool_choice", reason));
        let choice = match choice {
            None | Some(Value::Null) if tools.is_empty() => return Ok(Self::None),
            None | Some(Value::Null) => return Ok(Self::Auto),
            Some(choice) => choice,
        };
        match choice.as_str() {
            Some("none") => return Ok(Self::None),
            _ if tools.is_empty() => return error("needs \"tools\" to choose from"),
            Some("auto") => return Ok(Self::Auto),
            Some("required") => return Ok(Self::Required),
            _ => (),
        }
        let name = choice.get("function").and_then(|f| f.get("name")).and_then(Value::as_str);
        match name {
            Some(name) if choice["type"] == "function" => match tools.iter().find(|t| t.name == name) {
                Some(tool) => Ok(Self::Named(tool.name.clone())),
                None => {
                    Err(FieldError::new("tool_choice.function.name", format!("is {name:?}, and no tool has that name")))
                }
            },
            _ => error(
                "must be \"none\", \"auto\", \"required\" or {\"type\": \"function\", \"function\": {\"name\": …}}",
            ),
        }
    }
}

/// A call as a message has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToolCall {
    /// Names the call, for its result.
    pub id: String,
    /// The tool.
    pub name: String,
    /// JSON of the arguments.
    pub arguments: String,
}

/// M1's text for calls, as it writes them itself; empty for no calls. Arguments that are a JSON object stay as they are
/// written (on one line); no text counts as no arguments, and anything else is put there as a string.
pub fn render(calls: &[ToolCall]) -> String {
    if calls.is_empty() {
        return String::new();
    }
    let mut text = format!("{OPEN}\n");
    for call in calls {
        let arguments = match serde_json::from_str::<Map<String, Value>>(&call.arguments) {
            // In JSON line breaks stand between tokens only.
            Ok(_) => call.arguments.trim().replace(['\n', '\r'], " "),
            Err(_) if call.arguments.trim().is_empty() => "{}".into(),
            Err(_) => Value::from(call.arguments.as_str()).to_string(),
        };
        let name = Value::from(call.name.as_str());
        text += &format!("{{\"name\": {name}, \"arguments\": {arguments}}}\n");
    }
    text + CLOSE
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tool(name: &str) -> Value {
        json!({"type": "function", "function": {"name": name}})
    }

    #[test]
    fn openais_tools_become_what_the_template_takes() {
        let cases: Value = serde_json::from_str(include_str!("../../tests/data/chat_template_cases.json")).unwrap();
        let schema = &cases["tools"]["input"]["tools"][0];
        // Whatever the order of its keys.
        let [name, description, parameters] = ["name", "description", "parameters"].map(|key| &schema[key]);
        let function = json!({"strict": true, "parameters": parameters, "description": description, "name": name});
        let tools = Tool::list(&json!([{"type": "function", "function": function}])).unwrap();
        assert_eq!(tools[0].schema().to_string(), schema.to_string());
        assert!(tools[0].strict);
        assert_eq!(Tool::list(&json!([tool("f")])).unwrap()[0].schema(), json!({"name": "f"}));
        assert_eq!(Tool::list(&Value::Null), Ok(vec![]));
    }

    #[test]
    fn wrong_tools_are_named() {
        let wrong = [
            (json!("x"), "tools must be a list"),
            (json!([{"type": "web_search"}]), "tools[0].type must be"),
            (json!([{"type": "function"}]), "tools[0].function must be"),
            (json!([tool("f"), tool("get weather")]), "tools[1].function.name must be"),
            (json!([tool("")]), "tools[0].function.name must be"),
            (json!([tool("f"), tool("f")]), "tools[1].function.name is \"f\" again"),
            (
                json!([{"type": "function", "function": {"name": "f", "parameters": []}}]),
                "tools[0].function.parameters must",
            ),
            (
                json!([{"type": "function", "function": {"name": "f", "description": 1}}]),
                "tools[0].function.description must",
            ),
        ];
        for (tools, message) in wrong {
            let error = Tool::list(&tools).unwrap_err().to_string();
            assert!(error.starts_with(message), "{error}");
        }
    }

    #[test]
    fn choices() {
        let tools = Tool::list(&json!([tool("f"), tool("g")])).unwrap();
        let read = |choice: Value| ToolChoice::read(Some(&choice), &tools);
        assert_eq!(ToolChoice::read(None, &tools), Ok(ToolChoice::Auto));
        assert_eq!(ToolChoice::read(None, &[]), Ok(ToolChoice::None));
        assert_eq!(read(json!("none")), Ok(ToolChoice::None));
        assert_eq!(read(json!("required")), Ok(ToolChoice::Required));
        assert_eq!(read(tool("g")), Ok(ToolChoice::Named("g".into())));
        assert_eq!(read(tool("h")).unwrap_err().field, "tool_choice.function.name");
        assert_eq!(read(json!("any")).unwrap_err().field, "tool_choice");
        assert_eq!(read(json!({"type": "allowed_tools"})).unwrap_err().field, "tool_choice");
        assert!(ToolChoice::read(Some(&json!("required")), &[]).is_err());
        assert_eq!(ToolChoice::read(Some(&json!("none")), &[]), Ok(ToolChoice::None));
    }

    #[test]
    fn rendered_calls_are_read_back() {
        let call =
            |name: &str, arguments: &str| ToolCall { id: "1".into(), name: name.into(), arguments: arguments.into() };
        let text = render(&[call("get_weather", "{\"city\": \"X\"}")]);
        assert_eq!(text, "<tool_calls>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"X\"}}\n</tool_calls>");
        let calls = [call("a", "{\"t\": \"上</tool_calls>\\n\"}"), call("b", "{\n  \"x\": 1.50\n}"), call("c", "")];
        let pairs = [("a", "{\"t\": \"上</tool_calls>\\n\"}"), ("b", "{   \"x\": 1.50 }"), ("c", "{}")];
        let wanted: Vec<_> = pairs.iter().map(|(n, a)| (n.to_string(), a.to_string())).collect();
        assert_eq!(parse(&render(&calls)), ("".into(), wanted));
        assert!(render(&[call("f", "{oops\n")]).contains("\"arguments\": \"{oops\\n\"}\n"));
        assert_eq!(render(&[]), "");
    }
}
