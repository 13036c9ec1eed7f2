//! `m1 chat`: a conversation at a prompt, from a pipe, or one question.

use super::common::{ModelArgs, SamplingArgs, whole};
use crate::chat::Chat;
use crate::interrupt;
use crate::repl::{self, ReplOptions};

/// Flags of `m1 chat`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  m1 chat --model examples/m1-nano
  m1 chat --model DIR --prompt 'What is 17 + 25?'
  m1 chat --model DIR --system 'You are a helpful assistant.' --temperature 0
  printf 'Hello\\nWhat is 3 + 4?\\n' | m1 chat --model DIR --hide-thinking

Lines piped in are turns of one conversation, commands included. On a terminal the model's thinking is dimmed
(not with NO_COLOR); in a pipe the reply comes as it is, with its <think> tags. Special tokens written in a message or a
system prompt are plain text. /help lists the commands. If a turn of a pipe fails the rest is said all the same, and the
exit status is 1.")]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Ask this, print the reply, leave
    #[arg(long, short, value_name = "TEXT")]
    prompt: Option<String>,
    /// System prompt
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// The most tokens of a reply [default: as the context allows]
    #[arg(long, short = 'n', value_name = "N", allow_negative_numbers = true, value_parser = whole::<usize>)]
    max_tokens: Option<usize>,
    /// The most tokens of the conversation [default: max_position_embeddings]
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = whole::<usize>)]
    context: Option<usize>,
    /// Let the model answer at once: its turn begins with an empty block of thought
    #[arg(long)]
    no_think: bool,
    /// Show the answer only
    #[arg(long)]
    hide_thinking: bool,
    /// After every turn: time to first token, tokens/s, cached tokens
    #[arg(long)]
    stats: bool,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    args.sampling.check()?;
    if args.prompt.as_deref().is_some_and(|p| p.trim().is_empty()) {
        anyhow::bail!("--prompt: the text is empty");
    }
    let assets = args.model.load(args.context)?;
    let mut chat = Chat::new(&assets, args.sampling.over(assets.generation.sampling())?)?;
    chat.system = args.system;
    chat.thinking = !args.no_think;
    chat.max_new = args.max_tokens.or(chat.max_new);
    let options = ReplOptions { stats: args.stats, hide_thinking: args.hide_thinking };
    match args.prompt {
        None => repl::run(&mut chat, options)?,
        Some(prompt) => {
            if !repl::one_shot(&mut chat, &prompt, &options)? {
                std::process::exit(interrupt::EXIT_STATUS);
            }
        }
    }
    Ok(())
}
