//! Answers that must have a form: JSON, JSON of a schema, tool calls; through llguidance, which computes from the bytes
//! of every id which of them may come next. What is decided here is what the crate leaves open: blanks between JSON's
//! tokens are bounded, so that no model can write them for ever; ids without text are never allowed but the end ids,
//! and of M1's tags only those of tool calls, where they belong; a `$ref` never leaves the schema.

use super::{Guide, GuideError, Next};
use crate::think;
use crate::tokenizer::Tokenizer;
use crate::tools::{self, Tool};
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{InferenceCapabilities, TokEnv, TokRxInfo, TokTrie, TokenId, TokenizerEnv};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};
use std::fmt::Write;
use std::sync::Arc;

/// Between the tokens of an answer in JSON: nothing, a blank, or a line break and some indentation.
const BLANKS: &str = r" |\n {0,16}";
/// Between those of a call, which is one line.
const BLANKS_OF_CALLS: &str = " ";
/// The most calls of one reply: a model that does not know how to end would call until its tokens are used up.
pub const MOST_CALLS: usize = 16;
/// Longer tokens don't fit into the crate's trie; they are never allowed.
const LONGEST: usize = 1000;
/// The tags that a vocabulary may have ids for.
const TAGS: [&str; 4] = [tools::OPEN, tools::CLOSE, think::OPEN, think::CLOSE];

/// Compiles grammars for one vocabulary. To be made once and shared.
#[derive(Clone)]
pub struct Grammars {
    factory: Arc<ParserFactory>,
    vocabulary: Arc<Vocabulary>,
}

/// What guides need to know of the ids.
#[derive(Debug)]
pub(super) struct Vocabulary {
    pub(super) tokenizer: Arc<Tokenizer>,
    /// The ids that may be drawn inside a thought which an answer has to follow: text, but nothing that closes the
    /// thought and begins the answer in one.
    pub(super) thought: Vec<bool>,
    /// The ids that open tool calls and go on in one.
    pub(super) past_calls: Vec<u32>,
    /// The ids that end a reply.
    pub(super) ends: Vec<bool>,
}

impl Vocabulary {
    fn new(tokenizer: &Arc<Tokenizer>, ends: Vec<bool>) -> Self {
        let bytes = |id: usize| tokenizer.bytes(id as u32).unwrap_or(&[]);
        let past = |id: usize, tag: &str| {
            let bytes = bytes(id);
            let at = bytes.windows(tag.len()).position(|window| window == tag.as_bytes())?;
            Some(&bytes[at + tag.len()..])
        };
        let in_thought =
            |id: usize| !ends[id] && !bytes(id).is_empty() && past(id, think::CLOSE).is_none_or(ends_thought);
        let past_calls = |&id: &usize| past(id, tools::OPEN).is_some_and(|rest| !rest.is_empty());
        Self {
            tokenizer: tokenizer.clone(),
            thought: (0..ends.len()).map(in_thought).collect(),
            past_calls: (0..ends.len()).filter(past_calls).map(|id| id as u32).collect(),
            ends,
        }
    }

    /// The ids that begin with `missing` and go on, with what they go on with.
    pub(super) fn past<'a>(&'a self, missing: &'a str) -> impl Iterator<Item = (usize, &'a [u8])> {
        (0..self.ends.len()).filter_map(move |id| {
            let rest = self.tokenizer.bytes(id as u32)?.strip_prefix(missing.as_bytes())?;
            (!rest.is_empty()).then_some((id, rest))
        })
    }
}

/// Whether this may follow `</think>` in the same id.
pub(super) fn ends_thought(rest: &[u8]) -> bool {
    rest.len() <= 2 && rest.iter().all(|&b| b == b'\n')
}

/// The tokenizer as the crate wants it.
struct Env {
    tokenizer: Arc<Tokenizer>,
    trie: TokTrie,
}

impl TokenizerEnv for Env {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    /// As the tokenizer does it: text that the grammar leaves no choice in should look to the model as it always does.
    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        let encoded = std::str::from_utf8(bytes).ok().and_then(|text| self.tokenizer.encode(text, false).ok());
        // Not where it sees one of its special tokens in the text, or a tag.
        let same = |ids: &Vec<u32>| ids.iter().flat_map(|&id| self.trie.token(id)).eq(bytes);
        encoded.filter(same).unwrap_or_else(|| self.trie.greedy_tokenize(bytes))
    }
}

impl Grammars {
    /// For a byte-level vocabulary and the ids that end a reply.
    pub fn new(tokenizer: &Arc<Tokenizer>, end_ids: &[u32]) -> Result<Self, GuideError> {
        let size = tokenizer.size();
        if tokenizer.bytes(0).is_none() {
            return Err(GuideError(
                "this model's tokenizer is not byte-level: its answers can't be constrained".into(),
            ));
        }
        if end_ids.is_empty() || end_ids.iter().any(|&id| id as usize >= size) {
            return Err(GuideError(
                "this model names no end id of its tokenizer: its answers can't be constrained".into(),
            ));
        }
        let mut ends = vec![false; size];
        end_ids.iter().for_each(|&id| ends[id as usize] = true);
        let word = |id: u32| match tokenizer.bytes(id).unwrap_or(&[]) {
            _ if ends[id as usize] => Vec::new(),
            // To the crate, what begins with 0xff is a special token, which only its name brings in; no text has that
            // byte.
            bytes if TAGS.iter().any(|tag| tag.as_bytes() == bytes) => {
                [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes].concat()
            }
            bytes if bytes.len() > LONGEST || bytes.first() == Some(&TokTrie::SPECIAL_TOKEN_MARKER) => Vec::new(),
            bytes => bytes.to_vec(),
        };
        let words: Vec<Vec<u8>> = (0..size as u32).map(word).collect();
        let vocabulary = Vocabulary::new(tokenizer, ends);
        let trie = TokTrie::from(&TokRxInfo::new(size as u32, end_ids[0]), &words).with_eos_tokens(end_ids);
        let env: TokEnv = Arc::new(Env { tokenizer: tokenizer.clone(), trie });
        let slices = llguidance::earley::SlicedBiasComputer::general_slices();
        let mut factory = ParserFactory::new(&env, InferenceCapabilities::default(), &slices)
            .map_err(|e| GuideError(format!("no grammars for this tokenizer: {}", reason(&e))))?;
        factory.quiet().limits_mut().verbose_errors = false;
        Ok(Self { factory: Arc::new(factory), vocabulary: Arc::new(vocabulary) })
    }

    /// Any JSON object.
    pub fn json_object(&self) -> Result<Grammar, GuideError> {
        self.json_schema(&json!({"type": "object"}))
    }

    /// JSON that satisfies `schema`, properties in the schema's order. A schema with a keyword that can't be honoured
    /// is refused. Numbers are JSON's: as long as the model likes, and not all of them doubles.
    pub fn json_schema(&self, schema: &Value) -> Result<Grammar, GuideError> {
        let refused = |e| GuideError(format!("the JSON schema can't be used: {e}"));
        let schema = with_options(schema, BLANKS, false).map_err(refused)?;
        self.compile(TopLevelGrammar::from_json_schema(schema)).map_err(refused)
    }

    /// One call or, if `parallel`, up to [`MOST_CALLS`] of any of `tools`, each with arguments as its `parameters` say. Where a
    /// schema can't be honoured a tool that is `strict` is refused; of others the keywords that can be are.
    pub fn tool_calls(&self, tools: &[Tool], parallel: bool) -> Result<Grammar, GuideError> {
        self.calls(tools, parallel, None)
    }

    /// Either an answer of `schema` or calls, as the model likes.
    pub fn json_schema_or_tool_calls(
        &self,
        schema: &Value,
        tools: &[Tool],
        parallel: bool,
    ) -> Result<Grammar, GuideError> {
        let answer = self.json_schema(schema).and_then(|_| with_options(schema, BLANKS, false).map_err(GuideError))?;
        self.calls(tools, parallel, Some(answer))
    }

    fn calls(&self, tools: &[Tool], parallel: bool, answer: Option<Value>) -> Result<Grammar, GuideError> {
        if tools.is_empty() {
            return Err(GuideError("there are no tools to call".into()));
        }
        let schemas = tools.iter().map(|tool| arguments(tool, false)).collect::<Result<Vec<_>, _>>();
        let first = schemas.clone().and_then(|s| self.compile(self.lark(tools, parallel, &s, answer.as_ref())));
        if let Ok(grammar) = first {
            return Ok(grammar);
        }
        // Something in one of the schemas: find it.
        let mut found = Vec::new();
        for (i, tool) in tools.iter().enumerate() {
            let check = |schema: Result<Value, String>| {
                schema.and_then(|s| self.compile(TopLevelGrammar::from_json_schema(s.clone())).map(|_| s))
            };
            let mut schema = check(arguments(tool, false));
            if !tool.strict {
                let any = Tool { parameters: Some(json!({"type": "object"})), ..tool.clone() };
                schema = schema.or_else(|_| check(arguments(tool, true))).or_else(|_| check(arguments(&any, false)));
            }
            let refused = |e| GuideError(format!("tools[{i}].function.parameters can't be used: {e}"));
            found.push(schema.map_err(refused)?);
        }
        let grammar = self.lark(tools, parallel, &found, answer.as_ref());
        self.compile(grammar).map_err(|e| GuideError(format!("the tools can't be used together: {e}")))
    }

    fn lark(&self, tools: &[Tool], parallel: bool, schemas: &[Value], answer: Option<&Value>) -> TopLevelGrammar {
        let tag = |tag: &str| {
            let is_id = self.factory.tok_env().tok_trie().get_special_token(tag).is_some();
            if is_id { tag.to_string() } else { format!("{tag:?}") }
        };
        let more = if parallel { format!(r#" ("\n" call){{0,{}}}"#, MOST_CALLS - 1) } else { String::new() };
        let mut lark = format!("calls: {} \"\\n\" call{more} \"\\n\" {}\ncall: ", tag(tools::OPEN), tag(tools::CLOSE));
        lark += &(0..tools.len()).map(|i| format!("call{i}")).collect::<Vec<_>>().join(" | ");
        for (i, (tool, schema)) in tools.iter().zip(schemas).enumerate() {
            let begin = format!("{{\"name\": {}, \"arguments\": ", Value::from(tool.name.as_str()));
            let begin = Value::from(begin);
            // Writing to a string can't fail.
            let _ = write!(lark, "\ncall{i}: {begin} arguments{i} \"}}\"\narguments{i}: %json {schema}");
        }
        match answer {
            Some(schema) => _ = write!(lark, "\nanswer: %json {schema}\nstart: answer | calls\n"),
            None => lark += "\nstart: calls\n",
        }
        TopLevelGrammar::from_lark(lark)
    }

    fn compile(&self, grammar: TopLevelGrammar) -> Result<Grammar, String> {
        let parser = self.factory.create_parser(grammar).map_err(|e| reason(&e))?;
        let mut matcher = Matcher::new(Ok(parser));
        // A grammar that no text satisfies shows at its first step only.
        matcher.compute_mask().map_err(|e| reason(&e))?;
        Ok(Grammar { matcher, vocabulary: self.vocabulary.clone(), mask: Vec::new() })
    }
}

impl std::fmt::Debug for Grammars {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Grammars of {} ids", self.vocabulary.ends.len())
    }
}

/// The schema of a tool's arguments, which are an object.
fn arguments(tool: &Tool, lenient: bool) -> Result<Value, String> {
    // OpenAI: no parameters, no arguments.
    let none = || json!({"type": "object", "properties": {}, "additionalProperties": false});
    let mut schema = tool.parameters.clone().unwrap_or_else(none);
    let is_object = match &schema["type"] {
        Value::Null => true,
        Value::String(kind) => kind == "object",
        Value::Array(kinds) => kinds.iter().any(|kind| kind == "object"),
        _ => false,
    };
    match schema.as_object_mut() {
        Some(schema) if is_object => _ = schema.insert("type".into(), "object".into()),
        _ => return Err("its type must be \"object\"".into()),
    }
    with_options(&schema, BLANKS_OF_CALLS, lenient)
}

/// The schema with the crate's options for it, instead of any that it brings.
fn with_options(schema: &Value, blanks: &str, lenient: bool) -> Result<Value, String> {
    let Value::Object(schema) = schema else { return Err("it must be an object".into()) };
    let mut schema = schema.clone();
    schema.insert("x-guidance".into(), json!({"whitespace_pattern": blanks, "lenient": lenient}));
    Ok(schema.into())
}

/// The crate's errors on one line, without the state and the grammar that they cite.
fn reason(error: &impl std::fmt::Display) -> String {
    let text = error.to_string();
    let text = text.split("\n<").next().unwrap_or("");
    // "at 4(13): …" is a place in a grammar that was made here; below it stands the grammar.
    if let Some((_, rest)) = text.strip_prefix("at ").and_then(|text| text.split_once("): ")) {
        return rest.lines().next().unwrap_or("").trim().to_string();
    }
    text.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ")
}

/// A compiled grammar, and how far a reply has come in it. A clone goes on by itself from the same place.
pub struct Grammar {
    matcher: Matcher,
    pub(super) vocabulary: Arc<Vocabulary>,
    mask: Vec<bool>,
}

impl Clone for Grammar {
    fn clone(&self) -> Self {
        // Deep: clones run on several threads.
        Self { matcher: self.matcher.deep_clone(), vocabulary: self.vocabulary.clone(), mask: Vec::new() }
    }
}

impl std::fmt::Debug for Grammar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grammar").field("stopped", &self.matcher.is_stopped()).finish_non_exhaustive()
    }
}

impl Grammar {
    /// The model has written `<tool_calls>` already, in whatever ids.
    pub(super) fn open_calls(&mut self) -> Result<(), GuideError> {
        let env = self.matcher.tok_env().map_err(|e| GuideError(reason(&e)))?;
        let ids = match env.tok_trie().get_special_token(tools::OPEN) {
            Some(id) => vec![id],
            None => env.tok_trie().greedy_tokenize(tools::OPEN.as_bytes()),
        };
        self.matcher.consume_tokens(&ids).map_err(|e| GuideError(reason(&e)))
    }

    fn is_over(&self) -> bool {
        self.matcher.is_stopped() && !self.matcher.is_error()
    }
}

impl Guide for Grammar {
    fn next(&mut self) -> Result<Next<'_>, GuideError> {
        if self.is_over() {
            return Ok(Next::Among(&self.vocabulary.ends));
        }
        let allowed = self.matcher.compute_mask().map_err(|e| GuideError(format!("the grammar: {}", reason(&e))))?;
        self.mask.clear();
        self.mask.resize(self.vocabulary.ends.len(), false);
        let (mut count, mut last) = (0, 0);
        allowed.iter_set_entries(|id| {
            if let Some(entry) = self.mask.get_mut(id) {
                *entry = true;
                (count, last) = (count + 1, id);
            }
        });
        Ok(if count == 1 { Next::Only(last as u32) } else { Next::Among(&self.mask) })
    }

    fn take(&mut self, id: u32) -> Result<(), GuideError> {
        if self.is_over() {
            let ends = self.vocabulary.ends.get(id as usize) == Some(&true);
            return if ends {
                Ok(())
            } else {
                Err(GuideError(format!("the grammar is complete, and id {id} is no end")))
            };
        }
        self.matcher.consume_token(id).map_err(|e| GuideError(format!("the grammar: {}", reason(&e))))
    }
}

#[cfg(test)]
pub(super) mod tests;
