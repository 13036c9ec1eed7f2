//! What `/v1/chat/completions` is asked for: the fields of the request, checked, and the order for the engine made of them.

use super::error::ApiError;
use super::fields::Fields;
use super::generation::{Order, Voice};
use super::params::{MAX_TOP, Params};
use super::state::{Service, Shared};
use super::worker::{Choice, Job};
use crate::guide::{Answer, Grammars, Guide, GuideError, ReplyGuide, Thinking};
use crate::history;
use crate::prompt::{Line, Prompt, PromptError};
use crate::reply::{CallIds, Reply, ReplySettings};
use crate::sampler::SamplingOptions;
use crate::template::TemplateError;
use crate::think::Start;
use crate::tools::{Tool, ToolChoice};
use serde_json::{Value, json};

/// Ids at a prompt's end that tell whether the model begins inside a block of thought.
const TAIL: usize = 16;

/// Tokens of thought that `reasoning_effort` allows, as Gemini's compatible API has it.
const EFFORTS: [(&str, Option<usize>); 4] =
    [("none", Some(0)), ("low", Some(1024)), ("medium", Some(8192)), ("high", None)];

/// What the answer must look like.
#[derive(Debug, Clone, PartialEq)]
pub enum Format {
    /// As it comes.
    Text,
    /// Some JSON object.
    Object,
    /// JSON after this schema.
    Schema(Value),
}

/// A request, checked as far as it can be without a tokenizer.
#[derive(Debug, Clone, PartialEq)]
pub struct ChatRequest {
    /// What it shares with completions.
    pub params: Params,
    /// Log-probabilities, with so many of the likeliest ids; `None`: none.
    pub top_logprobs: Option<usize>,
    messages: Vec<Value>,
    tools: Vec<Tool>,
    choice: ToolChoice,
    parallel: bool,
    format: Format,
    max_new: Option<usize>,
    thinks: bool,
    budget: Option<usize>,
}

impl ChatRequest {
    /// Takes all fields.
    pub fn read(mut fields: Fields, shared: &Shared, service: &Service) -> Result<Self, ApiError> {
        shared.check_model(fields.text("model")?.as_deref())?;
        let assets = &service.assets;
        let vocab = assets.engine.config().vocab_size;
        let request = Self::take(&mut fields, assets.generation.sampling(), vocab, assets.generation.max_new_tokens)?;
        fields.finish()?;
        Ok(request)
    }

    fn take(
        fields: &mut Fields,
        defaults: SamplingOptions,
        vocab: usize,
        max_new: Option<usize>,
    ) -> Result<Self, ApiError> {
        refuse(fields)?;
        let messages = fields.list("messages")?;
        let messages = messages.ok_or_else(|| ApiError::field("messages", "messages is missing: a list is needed"))?;
        if messages.is_empty() {
            return Err(ApiError::field("messages", "messages is empty: at least one is needed"));
        }
        known_keys(&messages)?;
        let messages = history::messages(&messages)?;
        let tools = Tool::list(&fields.value("tools").unwrap_or(Value::Null))?;
        let choice = ToolChoice::read(fields.value("tool_choice").as_ref(), &tools)?;
        let parallel = fields.flag("parallel_tool_calls")?;
        let (thinks, budget) = thinking(fields)?;
        Ok(Self {
            top_logprobs: top_logprobs(fields)?,
            messages,
            choice,
            tools,
            parallel: parallel.unwrap_or(true),
            format: format(fields)?,
            max_new: max_new_tokens(fields)?.or(max_new),
            thinks,
            budget,
            params: Params::take(fields, defaults, vocab)?,
        })
    }

    /// The order for the engine. A long conversation takes its time to be tokenized.
    pub fn order(self, service: &Service) -> Result<Order, ApiError> {
        let tokenizer = &service.assets.tokenizer;
        let Prompt { ids: prompt, turns } = self.prompt(service)?;
        let start = if self.thinks {
            let tail = &prompt[prompt.len().saturating_sub(TAIL)..];
            Start::of_prompt(&tokenizer.decode(tail))
        } else {
            Start::After
        };
        let thinking = Thinking { start, open: false, budget: self.budget.filter(|_| self.thinks) };
        let answer = self.answer(service)?;
        let guide = if ReplyGuide::is_needed(&thinking, &answer) {
            let guide = ReplyGuide::new(tokenizer, thinking, answer);
            Some(guide.map_err(|error| ApiError::field(self.guided_by(), error.to_string()))?)
        } else {
            None
        };
        let mut choices = Vec::new();
        for i in 0..self.params.n {
            let guide = guide.clone().map(|guide| Box::new(guide) as Box<dyn Guide>);
            choices.push(Choice { sampler: self.params.sampler(&service.sampler, i)?, guide });
        }
        let tools = self.choice != ToolChoice::None;
        let voice = |_| {
            let stops = self.params.stops.clone();
            let settings = ReplySettings { start, tools, stops, call_ids: CallIds::random() };
            Voice::Chat(Box::new(Reply::new(tokenizer.clone(), settings)))
        };
        let voices = (0..self.params.n).map(voice).collect();
        let job = Job {
            prompt,
            turns,
            choices,
            end_ids: service.end_ids.clone(),
            max_new: self.max_new,
            top_log_probs: self.top_logprobs.unwrap_or(0),
            score_prompt: false,
        };
        Ok(Order { job, voices, stops: !self.params.stops.is_empty(), pace: self.params.pace(), param: "messages" })
    }

    /// The ids of the conversation. A model that may not call tools is not told of them.
    pub fn prompt(&self, service: &Service) -> Result<Prompt, ApiError> {
        let prompter = service.prompter.as_ref().map_err(|why| ApiError::unsupported("messages", why))?;
        let told = if self.choice == ToolChoice::None { &[] } else { &self.tools[..] };
        let schemas: Vec<Value> = told.iter().map(Tool::schema).collect();
        let lines: Vec<Line> = self.messages.iter().cloned().map(Line::from).collect();
        let prompt = prompter.build(&service.assets.tokenizer, &lines, &schemas, self.thinks);
        prompt.map_err(|error| match &error {
            PromptError::Template(TemplateError::Render(_)) => ApiError::field("messages", error.to_string()),
            _ => ApiError::internal(error.to_string()),
        })
    }

    /// What the answer is held to.
    fn answer(&self, service: &Service) -> Result<Answer, ApiError> {
        let grammars = || {
            let param = self.guided_by();
            service.grammars.as_ref().map_err(|why| ApiError::unsupported(param, why))
        };
        let compiled = |grammar: Result<_, GuideError>, param: &str| {
            grammar.map_err(|error| ApiError::field(param, format!("{param}: {error}")))
        };
        let tools =
            |grammars: &Grammars, tools: &[Tool], parallel| compiled(grammars.tool_calls(tools, parallel), "tools");
        Ok(match (&self.choice, &self.format) {
            (ToolChoice::None, Format::Text) => Answer::Free,
            (ToolChoice::None, Format::Object) => Answer::Only(compiled(grammars()?.json_object(), "response_format")?),
            (ToolChoice::None, Format::Schema(schema)) => {
                Answer::Only(compiled(grammars()?.json_schema(schema), "response_format.json_schema.schema")?)
            }
            (ToolChoice::Auto, Format::Text) => match &service.grammars {
                Ok(grammars) => Answer::Tools(tools(grammars, &self.tools, self.parallel)?),
                // Calls are found in the text all the same; they may be wrong, as the model makes them.
                Err(_) if self.parallel => Answer::Free,
                Err(why) => return Err(ApiError::unsupported("parallel_tool_calls", why)),
            },
            (ToolChoice::Auto, Format::Object) => self.either(grammars()?, &json!({"type": "object"}))?,
            (ToolChoice::Auto, Format::Schema(schema)) => self.either(grammars()?, schema)?,
            (ToolChoice::Required, _) => Answer::Only(tools(grammars()?, &self.tools, self.parallel)?),
            (ToolChoice::Named(name), _) => {
                let named: Vec<Tool> = self.tools.iter().filter(|tool| tool.name == *name).cloned().collect();
                Answer::Only(tools(grammars()?, &named, false)?)
            }
        })
    }

    fn either(&self, grammars: &Grammars, schema: &Value) -> Result<Answer, ApiError> {
        let grammar = grammars.json_schema_or_tool_calls(schema, &self.tools, self.parallel);
        let named = |error: GuideError| ApiError::field("response_format", format!("response_format: {error}"));
        grammar.map(Answer::Only).map_err(named)
    }

    /// The field that asks for a guide.
    fn guided_by(&self) -> &'static str {
        match (&self.format, &self.choice) {
            (Format::Object | Format::Schema(_), _) => "response_format",
            (Format::Text, ToolChoice::Required | ToolChoice::Named(_)) => "tool_choice",
            (Format::Text, ToolChoice::Auto) => "tools",
            (Format::Text, ToolChoice::None) => "thinking",
        }
    }
}

/// Refuses what a message has and nobody would read. What this server's own replies bring back is known.
fn known_keys(messages: &[Value]) -> Result<(), ApiError> {
    for (i, message) in messages.iter().enumerate() {
        let role = message["role"].as_str().unwrap_or_default();
        for (key, value) in message.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null()) {
            let name = || format!("messages[{i}].{key}");
            match (key.as_str(), role) {
                ("role" | "content", _) | ("name" | "tool_call_id", "tool") => (),
                ("tool_calls" | "reasoning_content", "assistant") => (),
                ("annotations", "assistant") if *value == json!([]) => (),
                ("name", _) => return Err(ApiError::unsupported(name(), "the chat template has no place for it")),
                ("refusal" | "audio" | "function_call" | "annotations", _) => {
                    return Err(ApiError::unsupported(name(), "this model's messages have no such thing"));
                }
                _ => return Err(ApiError::unknown(name())),
            }
        }
    }
    Ok(())
}

/// OpenAI's fields that this server cannot honour.
fn refuse(fields: &mut Fields) -> Result<(), ApiError> {
    let tools = "use tools and tool_choice";
    fields.refuse("functions", tools, |_| false)?;
    fields.refuse("function_call", tools, |_| false)?;
    let text = "this model reads and writes text";
    fields.refuse("audio", text, |_| false)?;
    fields.refuse("modalities", text, |v| *v == json!(["text"]))?;
    fields.refuse("prediction", "nothing is predicted here", |_| false)?;
    fields.refuse("verbosity", "the model has no such setting", |v| v == "medium")?;
    fields.refuse("web_search_options", "this server searches nothing", |_| false)?;
    fields.refuse("moderation", "nothing is moderated here", |_| false)
}

/// `logprobs` and `top_logprobs`.
fn top_logprobs(fields: &mut Fields) -> Result<Option<usize>, ApiError> {
    let wanted = fields.flag("logprobs")?.unwrap_or(false);
    let top = fields.whole("top_logprobs", 0..=MAX_TOP)?;
    match top {
        Some(1..) if !wanted => Err(ApiError::field("top_logprobs", "top_logprobs is only for `\"logprobs\": true`")),
        _ => Ok(wanted.then_some(top.unwrap_or(0))),
    }
}

/// `max_completion_tokens`, or `max_tokens`, its older name.
fn max_new_tokens(fields: &mut Fields) -> Result<Option<usize>, ApiError> {
    let old = fields.whole("max_tokens", 1..=usize::MAX)?;
    let new = fields.whole("max_completion_tokens", 1..=usize::MAX)?;
    match (old, new) {
        (Some(old), Some(new)) if old != new => {
            let message = format!("max_tokens is {old} and max_completion_tokens is {new}: give one of the two");
            Err(ApiError::field("max_tokens", message))
        }
        _ => Ok(new.or(old)),
    }
}

/// `response_format`.
fn format(fields: &mut Fields) -> Result<Format, ApiError> {
    let Some(mut format) = fields.object("response_format")? else { return Ok(Format::Text) };
    let expected = "\"text\", \"json_object\" or \"json_schema\"";
    let kinds = ["text", "json_object", "json_schema"];
    let kind = format.take("type", expected, |v| kinds.iter().copied().find(|kind| v == kind))?;
    let kind = kind.ok_or_else(|| {
        ApiError::field("response_format.type", format!("response_format.type is missing, and must be {expected}"))
    })?;
    let found = match kind {
        "text" => Format::Text,
        "json_object" => Format::Object,
        _ => {
            let field = "response_format.json_schema";
            let missing = |what: &str| ApiError::field(what, format!("{what} is missing: an object is needed"));
            let mut inner = format.object("json_schema")?.ok_or_else(|| missing(field))?;
            inner.text("name")?;
            inner.text("description")?;
            inner.flag("strict")?; // always strict here
            let schema = inner
                .take("schema", "an object, true or false", |v| (v.is_object() || v.is_boolean()).then(|| v.clone()))?;
            inner.finish()?;
            Format::Schema(schema.ok_or_else(|| missing("response_format.json_schema.schema"))?)
        }
    };
    format.finish()?;
    Ok(found)
}

/// Whether the model may think, and how many tokens: `thinking`, `chat_template_kwargs.enable_thinking` and
/// `reasoning_effort`, which must not contradict each other.
fn thinking(fields: &mut Fields) -> Result<(bool, Option<usize>), ApiError> {
    let mut wishes: Vec<(&str, bool)> = Vec::new();
    let mut budget = None;
    if let Some(mut inner) = fields.object("thinking")? {
        let kind = inner.take("type", "\"enabled\" or \"disabled\"", |v| match v.as_str()? {
            "enabled" => Some(true),
            "disabled" => Some(false),
            _ => None,
        })?;
        budget = inner.whole("budget_tokens", 0..=usize::MAX)?;
        inner.finish()?;
        if let (Some(false), Some(1..)) = (kind, budget) {
            let message = "thinking.budget_tokens is not for thinking that is disabled";
            return Err(ApiError::field("thinking.budget_tokens", message));
        }
        wishes.extend(kind.map(|on| ("thinking", on)));
    }
    if let Some(mut inner) = fields.object("chat_template_kwargs")? {
        wishes.extend(inner.flag("enable_thinking")?.map(|on| ("chat_template_kwargs.enable_thinking", on)));
        inner.finish()?;
    }
    let expected = "\"none\", \"low\", \"medium\" or \"high\"";
    let effort = |v: &Value| EFFORTS.iter().find(|(name, _)| v == name).copied();
    if let Some((name, most)) = fields.take("reasoning_effort", expected, effort)? {
        wishes.push(("reasoning_effort", name != "none"));
        budget = budget.or(most.filter(|&most| most > 0));
    }
    let on = wishes.first().is_none_or(|wish| wish.1);
    match wishes.iter().find(|wish| wish.1 != on) {
        None => Ok((on, budget)),
        Some((name, _)) => Err(ApiError::field(*name, format!("{name} contradicts {}", wishes[0].0))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<ChatRequest, ApiError> {
        let text = text.replacen('{', r#"{"messages": [{"role": "user", "content": "q"}], "#, 1).replace(", }", "}");
        raw(&text)
    }

    fn raw(text: &str) -> Result<ChatRequest, ApiError> {
        let mut fields = Fields::parse(text.as_bytes())?;
        let request = ChatRequest::take(&mut fields, SamplingOptions::default(), 320, Some(99))?;
        fields.finish()?;
        Ok(request)
    }

    const TOOL: &str =
        r#""tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]"#;

    #[test]
    fn defaults_are_those_of_the_checkpoint() {
        let got = read("{}").unwrap();
        assert_eq!((got.max_new, got.thinks, got.budget, got.top_logprobs), (Some(99), true, None, None));
        assert_eq!((got.format, got.choice, got.parallel), (Format::Text, ToolChoice::None, true));
        let got = read(r#"{"max_tokens": 5, "max_completion_tokens": 5, "logprobs": true}"#).unwrap();
        assert_eq!((got.max_new, got.top_logprobs), (Some(5), Some(0)));
        assert_eq!(read(r#"{"logprobs": true, "top_logprobs": 20}"#).unwrap().top_logprobs, Some(20));
        assert_eq!(read(r#"{"logprobs": false, "top_logprobs": 0}"#).unwrap().top_logprobs, None);
    }

    #[test]
    fn thinking_has_three_names_that_must_agree() {
        let thinks = |text: &str| read(text).map(|r| (r.thinks, r.budget)).map_err(|e| e.param.unwrap());
        assert_eq!(thinks(r#"{"thinking": {"type": "disabled"}}"#), Ok((false, None)));
        assert_eq!(thinks(r#"{"thinking": {"type": "enabled", "budget_tokens": 7}}"#), Ok((true, Some(7))));
        assert_eq!(thinks(r#"{"thinking": {"budget_tokens": 0}}"#), Ok((true, Some(0))));
        assert_eq!(thinks(r#"{"chat_template_kwargs": {"enable_thinking": false}}"#), Ok((false, None)));
        assert_eq!(thinks(r#"{"reasoning_effort": "none"}"#), Ok((false, None)));
        assert_eq!(thinks(r#"{"reasoning_effort": "low"}"#), Ok((true, Some(1024))));
        assert_eq!(thinks(r#"{"reasoning_effort": "high"}"#), Ok((true, None)));
        assert_eq!(thinks(r#"{"reasoning_effort": "low", "thinking": {"budget_tokens": 9}}"#), Ok((true, Some(9))));
        assert_eq!(
            thinks(r#"{"reasoning_effort": "none", "thinking": {"type": "enabled"}}"#),
            Err("reasoning_effort".into())
        );
        assert_eq!(thinks(r#"{"reasoning_effort": "huge"}"#), Err("reasoning_effort".into()));
        let off = r#"{"thinking": {"type": "disabled", "budget_tokens": 9}}"#;
        assert_eq!(thinks(off), Err("thinking.budget_tokens".into()));
    }

    #[test]
    fn formats_and_tools_are_read() {
        let schema = r#"{"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": true, "schema": {"type": "object"}}}}"#;
        assert_eq!(read(schema).unwrap().format, Format::Schema(json!({"type": "object"})));
        assert_eq!(read(r#"{"response_format": {"type": "json_object"}}"#).unwrap().format, Format::Object);
        let got = read(&format!("{{{TOOL}, \"parallel_tool_calls\": false}}")).unwrap();
        assert_eq!((got.choice, got.parallel, got.tools.len()), (ToolChoice::Auto, false, 1));
        let named = format!(r#"{{{TOOL}, "tool_choice": {{"type": "function", "function": {{"name": "f"}}}}}}"#);
        assert_eq!(read(&named).unwrap().choice, ToolChoice::Named("f".into()));
        assert_eq!(read(&format!(r#"{{{TOOL}, "tool_choice": "none"}}"#)).unwrap().choice, ToolChoice::None);
    }

    #[test]
    fn mistakes_and_what_is_not_here_name_the_field() {
        for (text, param) in [
            (r#"{"functions": []}"#, "functions"),
            (r#"{"function_call": "auto"}"#, "function_call"),
            (r#"{"modalities": ["text", "audio"]}"#, "modalities"),
            (r#"{"audio": {}}"#, "audio"),
            (r#"{"best_of": 2}"#, "best_of"),
            (r#"{"max_tokens": 0}"#, "max_tokens"),
            (r#"{"max_tokens": 1, "max_completion_tokens": 2}"#, "max_tokens"),
            (r#"{"top_logprobs": 3}"#, "top_logprobs"),
            (r#"{"logprobs": true, "top_logprobs": 21}"#, "top_logprobs"),
            (r#"{"logprobs": 3}"#, "logprobs"),
            (r#"{"response_format": "json"}"#, "response_format"),
            (r#"{"response_format": {}}"#, "response_format.type"),
            (r#"{"response_format": {"type": "xml"}}"#, "response_format.type"),
            (r#"{"response_format": {"type": "json_schema"}}"#, "response_format.json_schema"),
            (
                r#"{"response_format": {"type": "json_schema", "json_schema": {}}}"#,
                "response_format.json_schema.schema",
            ),
            (r#"{"response_format": {"type": "text", "schema": {}}}"#, "response_format.schema"),
            (r#"{"chat_template_kwargs": {"x": 1}}"#, "chat_template_kwargs.x"),
            (r#"{"tools": [{"type": "function"}]}"#, "tools[0].function"),
            (r#"{"tool_choice": "required"}"#, "tool_choice"),
        ] {
            let error = read(text).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param), "{text}: {}", error.message);
            assert!(
                error.status == 400 && error.message.starts_with(param) || error.code.is_some(),
                "{}",
                error.message
            );
        }
        for (text, param) in [
            (r#"{}"#, "messages"),
            (r#"{"messages": []}"#, "messages"),
            (r#"{"messages": "hi"}"#, "messages"),
            (r#"{"messages": [{"role": "wizard", "content": "q"}]}"#, "messages[0].role"),
            (r#"{"messages": [{"role": "user", "content": "q", "name": "Ann"}]}"#, "messages[0].name"),
            (r#"{"messages": [{"role": "user", "content": "q", "mood": 1}]}"#, "messages[0].mood"),
            (r#"{"messages": [{"role": "user", "content": "q", "tool_calls": []}]}"#, "messages[0].tool_calls"),
            (r#"{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}"#, "messages[0].content[0].type"),
        ] {
            assert_eq!(raw(text).unwrap_err().param.as_deref(), Some(param), "{text}");
        }
        // A reply of this server as the official client sends it back.
        let back = r#"{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "refusal": null,
            "annotations": [], "audio": null, "function_call": null, "tool_calls": null, "reasoning_content": "r"}]}"#;
        assert!(raw(back).is_ok());
    }
}
