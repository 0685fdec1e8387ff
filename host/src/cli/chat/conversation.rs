//! What was said so far, and the commands that change it.

use serde_json::{Map, Value, json};

/// The messages that the next question is asked with.
#[derive(Debug, Default)]
pub struct Conversation {
    pub system: Option<String>,
    /// Role and text, the oldest first.
    pub messages: Vec<(&'static str, String)>,
    /// Keys of the request that stay the same: temperature, seed.
    pub settings: Map<String, Value>,
}

impl Conversation {
    pub fn ask(&mut self, text: String) {
        self.messages.push(("user", text));
    }

    /// Keeps what was answered, a stopped answer included. A question without any answer is taken back, so that the next one
    /// does not follow an unanswered one.
    pub fn answered(&mut self, text: String) {
        if text.is_empty() {
            self.messages.pop();
        } else {
            self.messages.push(("assistant", text));
        }
    }

    pub fn request(&self, model: &str) -> Value {
        let system = self.system.iter().map(|text| ("system", text));
        let said = self.messages.iter().map(|(role, text)| (*role, text));
        let messages: Vec<Value> = system.chain(said).map(|(role, text)| json!({ "role": role, "content": text })).collect();
        let mut request = self.settings.clone();
        request.insert("model".into(), model.into());
        request.insert("messages".into(), messages.into());
        request.insert("stream".into(), true.into());
        request.insert("stream_options".into(), json!({ "include_usage": true }));
        Value::Object(request)
    }
}

pub const HELP: &str = "\
/help         shows this
/clear        forgets the conversation
/model        lists the models that the node serves
/model NAME   asks another model from now on
/system TEXT  tells the model how to behave; without TEXT, nothing
/stats        shows how fast the last answer came
/quit         leaves, as Ctrl-D does
\"\"\"           begins and ends a message of several lines
Ctrl-C        stops an answer; at the prompt it leaves";

/// A line that starts with `/`.
#[derive(Debug, PartialEq)]
pub enum Command {
    Help,
    Clear,
    Model(Option<String>),
    System(Option<String>),
    Stats,
    Quit,
}

impl Command {
    /// `None` for a line that is no command: a message to the model.
    pub fn parse(line: &str) -> Option<Result<Self, String>> {
        let line = line.trim().strip_prefix('/')?;
        let (name, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let rest = Some(rest.trim()).filter(|rest| !rest.is_empty()).map(str::to_string);
        Some(Ok(match name {
            "help" | "?" => Command::Help,
            "clear" => Command::Clear,
            "model" => Command::Model(rest),
            "system" => Command::System(rest),
            "stats" => Command::Stats,
            "quit" | "exit" | "bye" => Command::Quit,
            // A path such as /etc/hosts starts like a command and is none.
            other if other.contains('/') => return None,
            other => return Some(Err(format!("There is no command /{other}; /help lists them."))),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_carries_the_system_text_first_and_the_settings() {
        let mut conversation = Conversation { system: Some("Be brief.".into()), ..Conversation::default() };
        conversation.settings.insert("seed".into(), 7.into());
        conversation.ask("Hi".into());
        conversation.answered("Hello.".into());
        conversation.ask("Bye".into());
        let request = conversation.request("tiny-chat");
        let roles: Vec<&str> =
            request["messages"].as_array().unwrap().iter().map(|message| message["role"].as_str().unwrap()).collect();
        assert_eq!(roles, ["system", "user", "assistant", "user"]);
        assert_eq!((&request["model"], &request["seed"], &request["stream"]), (&json!("tiny-chat"), &json!(7), &json!(true)));
    }

    #[test]
    fn a_question_without_an_answer_is_taken_back() {
        let mut conversation = Conversation::default();
        conversation.ask("Hi".into());
        conversation.answered(String::new());
        assert!(conversation.messages.is_empty());
    }

    #[test]
    fn lines_with_a_slash_are_commands_and_paths_are_not() {
        assert_eq!(Command::parse("hello"), None);
        assert_eq!(Command::parse("/etc/hosts holds what?"), None);
        assert_eq!(Command::parse(" /model  tiny-chat "), Some(Ok(Command::Model(Some("tiny-chat".into())))));
        assert_eq!(Command::parse("/system"), Some(Ok(Command::System(None))));
        assert_eq!(Command::parse("/quit"), Some(Ok(Command::Quit)));
        assert!(Command::parse("/modle x").unwrap().unwrap_err().contains("/modle"));
    }
}
