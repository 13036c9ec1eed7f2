//! Conversations as text: who says what, in the form that M1's chat template gives it.
//!
//! The template is written out here because training renders many thousand conversations; what the chat renders through
//! Jinja must be the same text, and a test holds it to the released template's own output.

use serde::{Deserialize, Serialize};

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The system prompt, only as a conversation's first message.
    System,
    /// The user.
    User,
    /// The model.
    Assistant,
}

/// A message and who says it.
pub type Message = (Role, String);

/// The messages as M1's chat template renders them.
pub fn render(messages: &[Message]) -> String {
    segments(messages).into_iter().map(|(text, _)| text).collect()
}

/// The rendered text in pieces, each all assistant or not at all. Every cut is at a special token, so the pieces
/// encode to what the whole does.
pub(crate) fn segments(messages: &[Message]) -> Vec<(String, bool)> {
    let mut pieces = vec![("<begin_of_document>".to_string(), false)];
    for (role, text) in messages {
        match role {
            Role::System => pieces.push((
                format!("<beginning_of_sentence>system ai_setting=assistant\n{text}<end_of_sentence>\n"),
                false,
            )),
            Role::User => {
                pieces.push((format!("<beginning_of_sentence>user name=user\n{text}<end_of_sentence>\n"), false));
            }
            Role::Assistant => {
                pieces.push(("<beginning_of_sentence>ai name=assistant\n".to_string(), false));
                pieces.push((format!("{text}<end_of_sentence>"), true));
                pieces.push(("\n".to_string(), false));
            }
        }
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The cases are MiniMax's template rendered by Jinja (the released tokenizer_config.json, Apache-2.0).
    #[test]
    fn rendering_is_the_chat_template() {
        let user = |text: &str| (Role::User, text.to_string());
        let hello = render(&[user("Hello")]) + "<beginning_of_sentence>ai name=assistant\n";
        assert_eq!(
            hello,
            "<begin_of_document><beginning_of_sentence>user name=user\nHello<end_of_sentence>\n\
             <beginning_of_sentence>ai name=assistant\n"
        );
        let system = (Role::System, "You are a helpful assistant.".to_string());
        let reply = (Role::Assistant, "Hey <think>x</think>".to_string());
        assert_eq!(
            render(&[system, user("Hi"), reply, user("Again")]),
            "<begin_of_document><beginning_of_sentence>system ai_setting=assistant\nYou are a helpful assistant.\
             <end_of_sentence>\n<beginning_of_sentence>user name=user\nHi<end_of_sentence>\n<beginning_of_sentence>ai \
             name=assistant\nHey <think>x</think><end_of_sentence>\n<beginning_of_sentence>user name=user\nAgain\
             <end_of_sentence>\n"
        );
    }
}
