//! The chat at a prompt. Lines come from a terminal (with editing and history) or from a pipe; replies go to standard
//! output, everything else to standard error, so that what is piped out is what the model said.

use crate::chat::{Chat, ChatError, Message, Progress, Stats, Turn};
use crate::engine::{EngineError, Finish};
use crate::interrupt::Busy;
use crate::progress::ReadingBar;
use crate::render::{Look, Renderer};
use crate::sampler::SamplingOptions;
use rustyline::error::ReadlineError;
use rustyline::{Behavior, Config, DefaultEditor};
use std::io::{BufRead, IsTerminal, Write};
use std::path::PathBuf;

const HELP: &str = "\
/help                    this list
/system [TEXT|off]       show, set or remove the system prompt
/clear                   forget the conversation; the system prompt stays
/think on|off|hide|show  let the model think or not; show its thinking or not
/temperature [X]         randomness; 0 takes the likeliest token
/top_p [X]  /top_k [N]  /min_p [X]  /repetition_penalty [X]  /seed [N]
/stats [on|off]          figures of the last turn; on: after every turn
/save FILE  /load FILE   keep the conversation, go on with it later
/exit                    leave (Ctrl-D too)
\"\"\"                      begins and ends a message of several lines
Ctrl-C                   stops the reply; what was said of it stays";

/// How the chat behaves.
#[derive(Debug, Clone, Default)]
pub struct ReplOptions {
    /// Figures after every turn.
    pub stats: bool,
    /// Show the answer only.
    pub hide_thinking: bool,
}

/// Why the chat ended.
#[derive(Debug, thiserror::Error)]
pub enum ReplError {
    /// Reading or writing failed.
    #[error("the chat's input or output failed")]
    Io(#[from] std::io::Error),
    /// The terminal failed.
    #[error("the terminal cannot be read: {0}")]
    Terminal(ReadlineError),
    /// A turn failed in one-shot use.
    #[error(transparent)]
    Chat(#[from] ChatError),
    /// Turns failed whose lines came from a pipe; each was told when it did.
    #[error("{0} of the turns failed, as told above")]
    Turns(usize),
}

/// Says one thing and prints the reply to standard output. Returns false if Ctrl-C stopped it.
pub fn one_shot(chat: &mut Chat, prompt: &str, options: &ReplOptions) -> Result<bool, ReplError> {
    let (turn, stopped) = match turn(chat, prompt, Look::for_stdout(options.hide_thinking)) {
        Err(ReplError::Chat(ChatError::Engine(error @ EngineError::Interrupted))) => {
            note!("[{error}]");
            return Ok(false);
        }
        turn => turn?,
    };
    note_finish(chat, &turn);
    if options.stats {
        note!("{}", turn.stats);
    }
    Ok(!stopped)
}

/// Talks until `/exit` or the end of the input. In a pipe a turn that failed is an error, at the end.
pub fn run(chat: &mut Chat, options: ReplOptions) -> Result<(), ReplError> {
    let mut repl = Repl { options, last: None, failed: 0 };
    let mut input = Input::open()?;
    if input.is_terminal() {
        note!("/help lists the commands, Ctrl-C stops a reply, Ctrl-D leaves");
    }
    while let Some(text) = input.message()? {
        let text = text.trim();
        if text.is_empty() {
            continue;
        }
        let words = text.strip_prefix('/').filter(|_| !text.contains('\n'));
        match words {
            Some(words) => match repl.command(chat, words)? {
                Next::Leave => break,
                Next::Stay => {}
            },
            None => repl.say(chat, text)?,
        }
    }
    input.close();
    if repl.failed > 0 && !input.is_terminal() {
        return Err(ReplError::Turns(repl.failed));
    }
    Ok(())
}

/// One turn, streamed to standard output; and whether Ctrl-C stopped it.
fn turn(chat: &mut Chat, text: &str, look: Look) -> Result<(Turn, bool), ReplError> {
    let busy = Busy::begin();
    let out = std::io::stdout().lock();
    let terminal = out.is_terminal();
    let mut renderer = Renderer::new(out, look, terminal);
    let mut bar = ReadingBar::begin();
    let mut watch = |progress| {
        match progress {
            Progress::Reading { read, total } => bar.show(read, total),
            Progress::Replying => bar.clear(),
        }
        !busy.stopped()
    };
    let turn = chat.say(text, &mut watch, &mut |piece| renderer.push(piece))?;
    renderer.finish()?;
    Ok((turn, busy.stopped()))
}

/// Says why a reply ended, unless the model ended it.
fn note_finish(chat: &Chat, turn: &Turn) {
    match turn.finish {
        Finish::End(_) => {}
        Finish::Stopped => note!("[stopped]"),
        Finish::Length => note!("[cut after {} tokens]", turn.stats.made),
        Finish::Context => note!(
            "[the context of {} tokens is full: /clear starts over, --context raises it]",
            chat.assets().engine.context()
        ),
    }
}

enum Next {
    Stay,
    Leave,
}

struct Repl {
    options: ReplOptions,
    last: Option<Stats>,
    /// Turns that failed.
    failed: usize,
}

impl Repl {
    fn say(&mut self, chat: &mut Chat, text: &str) -> Result<(), ReplError> {
        match turn(chat, text, Look::for_stdout(self.options.hide_thinking)) {
            Ok((turn, _)) => {
                note_finish(chat, &turn);
                if self.options.stats {
                    note!("{}", turn.stats);
                }
                self.last = Some(turn.stats);
            }
            Err(error @ ReplError::Chat(ChatError::Output(_))) => return Err(error),
            Err(ReplError::Chat(ChatError::Engine(error @ EngineError::Context { .. }))) => {
                self.failed += 1;
                note!("{error}; the conversation is kept as it was: /clear starts over, --context raises the limit");
            }
            Err(ReplError::Chat(ChatError::Engine(error @ EngineError::Interrupted))) => note!("{error}"),
            Err(ReplError::Chat(error)) => {
                self.failed += 1;
                note!("{error}");
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn command(&mut self, chat: &mut Chat, words: &str) -> Result<Next, ReplError> {
        let (name, argument) = words.split_once(char::is_whitespace).unwrap_or((words, ""));
        let argument = argument.trim();
        match name {
            "exit" | "quit" | "bye" => return Ok(Next::Leave),
            "help" | "?" => note!("{HELP}"),
            "clear" => {
                chat.clear();
                note!("a new conversation");
            }
            "system" => {
                match argument {
                    "" => {}
                    "off" => chat.system = None,
                    text => chat.system = Some(text.to_string()),
                }
                note!("system prompt: {}", chat.system.as_deref().unwrap_or("none"));
            }
            "think" => {
                match argument {
                    "on" => chat.thinking = true,
                    "off" => chat.thinking = false,
                    "hide" => self.options.hide_thinking = true,
                    "show" => self.options.hide_thinking = false,
                    "" => {}
                    other => note!("/think {other}: on, off, hide or show is wanted"),
                }
                let word = |yes, a, b| if yes { a } else { b };
                let shown = word(self.options.hide_thinking, "hidden", "shown");
                note!("thinking is {} and {shown}", word(chat.thinking, "on", "off"));
            }
            "stats" => match argument {
                "on" | "off" => self.options.stats = argument == "on",
                _ => self.stats(chat),
            },
            "save" | "load" if argument.is_empty() => {
                note!("/{name}: the name of a file is wanted")
            }
            "save" => match save(chat, argument) {
                Ok(()) => note!("saved {} messages to {argument}", chat.messages().len()),
                Err(error) => note!("{argument}: {error}"),
            },
            "load" => match load(argument) {
                Ok((system, messages)) => {
                    chat.system = system;
                    chat.set_messages(messages);
                    note!("loaded {} messages", chat.messages().len());
                }
                Err(error) => note!("{argument}: {error}"),
            },
            _ => self.setting(chat, name, argument),
        }
        Ok(Next::Stay)
    }

    fn stats(&self, chat: &Chat) {
        match &self.last {
            Some(stats) => note!("{stats}"),
            None => note!("nothing was said yet"),
        }
        let (tokens, bytes) = chat.cache();
        let mib = bytes as f64 / (1024.0 * 1024.0);
        note!("context: {tokens} of {} tokens, cache {mib:.1} MiB", chat.assets().engine.context());
    }

    /// The commands that show or change a sampling setting.
    fn setting(&self, chat: &mut Chat, name: &str, argument: &str) {
        let mut options = chat.sampling().clone();
        let parsed = match set(&mut options, name, argument) {
            None => return note!("/{name}: no such command; /help lists them"),
            Some(parsed) => parsed,
        };
        match parsed {
            Err(wanted) => note!("/{name} {argument}: {wanted} is wanted"),
            Ok(()) if argument.is_empty() => {}
            Ok(()) => {
                let seed = options.seed.filter(|_| name == "seed");
                match chat.set_sampling(options) {
                    Ok(()) => seed.into_iter().for_each(|seed| chat.reseed(seed)),
                    Err(error) => note!("{error}"),
                }
            }
        }
        let o = chat.sampling();
        let seed = o.seed.map_or("random".to_string(), |s| s.to_string());
        note!(
            "temperature {}, top_p {}, top_k {}, min_p {}, repetition_penalty {}, seed {seed}",
            o.temperature,
            o.top_p,
            o.top_k,
            o.min_p,
            o.repetition_penalty
        );
    }
}

/// Sets the setting `name` from text; `None` if there is none of that name, an error says what is wanted.
fn set(options: &mut SamplingOptions, name: &str, text: &str) -> Option<Result<(), &'static str>> {
    fn put<T: std::str::FromStr>(place: &mut T, text: &str, wanted: &'static str) -> Result<(), &'static str> {
        if text.is_empty() {
            return Ok(());
        }
        *place = text.parse().map_err(|_| wanted)?;
        Ok(())
    }
    Some(match name {
        "temperature" | "temp" => put(&mut options.temperature, text, "a number"),
        "top_p" | "topp" => put(&mut options.top_p, text, "a number"),
        "min_p" | "minp" => put(&mut options.min_p, text, "a number"),
        "repetition_penalty" => put(&mut options.repetition_penalty, text, "a number"),
        "top_k" | "topk" => put(&mut options.top_k, text, "a whole number"),
        "seed" if text.is_empty() => Ok(()),
        "seed" => text.parse().map(|seed| options.seed = Some(seed)).map_err(|_| "a whole number"),
        _ => return None,
    })
}

#[derive(serde::Serialize, serde::Deserialize)]
struct Saved {
    system: Option<String>,
    messages: Vec<Message>,
}

fn save(chat: &Chat, path: &str) -> std::io::Result<()> {
    let saved = Saved { system: chat.system.clone(), messages: chat.messages().to_vec() };
    crate::files::write(std::path::Path::new(path), serde_json::to_string_pretty(&saved)?.as_bytes())
}

fn load(path: &str) -> std::io::Result<(Option<String>, Vec<Message>)> {
    let saved: Saved = serde_json::from_str(&std::fs::read_to_string(path)?)?;
    for (i, Message { role, .. }) in saved.messages.iter().enumerate() {
        if !["system", "user", "assistant"].contains(&role.as_str()) {
            let wanted = format!("message {i} has the role {role:?}, and must have system, user or assistant");
            return Err(std::io::Error::other(wanted));
        }
    }
    Ok((saved.system, saved.messages))
}

/// Where messages come from.
enum Input {
    Terminal(Box<DefaultEditor>, Option<PathBuf>),
    Pipe(std::io::StdinLock<'static>),
}

impl Input {
    fn open() -> Result<Self, ReplError> {
        if !std::io::stdin().is_terminal() {
            return Ok(Self::Pipe(std::io::stdin().lock()));
        }
        let mut config = Config::builder().auto_add_history(false);
        if !std::io::stdout().is_terminal() {
            config = config.behavior(Behavior::PreferTerm); // the prompt must not go where the replies go
        }
        let mut editor = DefaultEditor::with_config(config.build()).map_err(ReplError::Terminal)?;
        let history = history_file();
        if let Some(path) = &history {
            let _ = editor.load_history(path); // the first time there is none
        }
        Ok(Self::Terminal(Box::new(editor), history))
    }

    fn is_terminal(&self) -> bool {
        matches!(self, Self::Terminal(..))
    }

    /// The next message: one line, or several between `"""`. `None` at the end of the input.
    fn message(&mut self) -> Result<Option<String>, ReplError> {
        let Some(line) = self.line("> ")? else {
            return Ok(None);
        };
        let mut text = match line.trim_start().strip_prefix("\"\"\"") {
            None => {
                self.remember(&line);
                return Ok(Some(line));
            }
            Some(rest) => rest.to_string(),
        };
        while !text.trim_end().ends_with("\"\"\"") {
            match self.line(". ")? {
                Some(line) => text = text + "\n" + &line,
                None => break,
            }
        }
        let text = text.trim_end();
        let text = text.strip_suffix("\"\"\"").unwrap_or(text).trim_matches('\n').to_string();
        self.remember(&text);
        Ok(Some(text))
    }

    fn line(&mut self, prompt: &str) -> Result<Option<String>, ReplError> {
        match self {
            Self::Terminal(editor, _) => loop {
                match editor.readline(prompt) {
                    Ok(line) => return Ok(Some(line)),
                    Err(ReadlineError::Interrupted) => note!("Ctrl-D or /exit leaves"),
                    Err(ReadlineError::Eof) => return Ok(None),
                    Err(ReadlineError::Io(error)) => return Err(error.into()),
                    Err(error) => return Err(ReplError::Terminal(error)),
                }
            },
            Self::Pipe(stdin) => {
                // Bytes, not a String: a line that is not UTF-8 is no reason to stop.
                let mut line = Vec::new();
                if stdin.read_until(b'\n', &mut line)? == 0 {
                    return Ok(None);
                }
                let text = String::from_utf8_lossy(&line);
                Ok(Some(text.trim_end_matches(['\n', '\r']).to_string()))
            }
        }
    }

    fn remember(&mut self, text: &str) {
        if let Self::Terminal(editor, _) = self {
            let _ = editor.add_history_entry(text);
        }
    }

    fn close(&mut self) {
        if let Self::Terminal(editor, Some(path)) = self {
            let made = path.parent().map_or(Ok(()), std::fs::create_dir_all);
            if let Err(error) = made.map_err(ReadlineError::from).and_then(|()| editor.save_history(path)) {
                note!("{}: the history was not saved: {error}", path.display());
            }
        }
        let _ = std::io::stdout().flush();
    }
}

/// `$XDG_STATE_HOME/m1/history`, by default `~/.local/state/m1/history` (on Windows under `%LOCALAPPDATA%`).
fn history_file() -> Option<PathBuf> {
    let var = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let state = var("XDG_STATE_HOME")
        .or_else(|| var("LOCALAPPDATA").filter(|_| cfg!(windows)))
        .or_else(|| Some(std::env::home_dir()?.join(".local/state")))?;
    Some(state.join("m1").join("history"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_conversation_with_other_roles_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("talk.json");
        let text =
            r#"{"system": null, "messages": [{"role": "user", "content": "a"}, {"role": "me", "content": "b"}]}"#;
        std::fs::write(&path, text).unwrap();
        let error = load(path.to_str().unwrap()).unwrap_err().to_string();
        assert!(error.contains("message 1 has the role \"me\""), "{error}");
    }

    #[test]
    fn settings_are_read_by_either_name() {
        let mut options = SamplingOptions::default();
        for (name, text) in [("temperature", "0.5"), ("topp", "0.9"), ("top_k", "40"), ("min_p", "0.1"), ("seed", "9")]
        {
            assert_eq!(set(&mut options, name, text), Some(Ok(())));
        }
        let wanted = SamplingOptions {
            temperature: 0.5,
            top_p: 0.9,
            top_k: 40,
            min_p: 0.1,
            seed: Some(9),
            ..SamplingOptions::default()
        };
        assert_eq!(options, wanted);
        assert_eq!(set(&mut options, "top_k", "-1"), Some(Err("a whole number")));
        assert_eq!(set(&mut options, "temperature", ""), Some(Ok(())));
        assert_eq!(set(&mut options, "nonsense", "1"), None);
        assert_eq!(options, wanted);
    }
}
