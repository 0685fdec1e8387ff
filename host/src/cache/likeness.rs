//! Questions that may mean the same: what of a request is the question, and what has to be equal beside it.

use fabstir_plugin_api::inference::{Generation, Input};
use serde::{Deserialize, Serialize};

use super::key::{Identity, Key};
use crate::scheduler::ServedModelInfo;

/// Longer questions are not compared: the more a text says, the more of it a vector leaves out. Bytes.
const LONGEST: usize = 600;

/// A question that an answer may be found for under other words.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Wording {
    /// Everything of the request but the question, and the model that made the vector.
    pub space: Key,
    pub text: String,
    /// Of length 1.
    pub vector: Vec<f32>,
}

/// The question of a request that may be answered with the answer to another: the only one of its conversation. With it, the space.
pub(super) fn question(
    identity: &Identity,
    model: &ServedModelInfo,
    embedder: &Identity,
    request: &Generation,
) -> Option<(Key, String)> {
    let Input::Messages(messages) = &request.input else { return None };
    let (last, before) = messages.split_last()?;
    // Log-probabilities belong to one wording.
    let alone = last.role == "user" && before.iter().all(|message| message.role == "system") && request.logprobs.is_none();
    if !alone || last.content.len() > LONGEST {
        return None;
    }
    let mut rest = messages.clone();
    rest.last_mut()?.content.clear();
    let rest = Generation { input: Input::Messages(rest), ..request.clone() };
    Some((Key::of_space(identity, model, embedder, &rest), last.content.clone()))
}

#[cfg(test)]
mod tests {
    use fabstir_plugin_api::inference::Message;

    use super::*;
    use crate::scheduler::tests::request;

    #[test]
    fn only_the_single_question_of_a_conversation_is_compared() {
        let model =
            ServedModelInfo { id: "m".into(), plugin: "p".into(), context: 9, parallel: 1, digest: None, generates: true };
        let identity = Identity::new(None, "p", "m", &crate::routes::Routes::default());
        let of = |turns: &[(&str, &str)]| {
            let turns =
                turns.iter().map(|(role, content)| Message { role: (*role).into(), content: (*content).into(), name: None });
            let request = Generation { input: Input::Messages(turns.collect()), ..request("") };
            question(&identity, &model, &identity, &request)
        };
        let (space, text) = of(&[("system", "Be brief."), ("user", "Why?")]).expect("a question");
        assert_eq!(text, "Why?");
        assert_eq!(of(&[("system", "Be brief."), ("user", "How?")]).expect("a question").0, space);
        assert_ne!(of(&[("system", "Be long."), ("user", "Why?")]).expect("a question").0, space);
        assert!(of(&[("user", "a"), ("assistant", "b"), ("user", "Why?")]).is_none());
        assert!(of(&[("user", &"a".repeat(LONGEST + 1))]).is_none());
        assert!(question(&identity, &model, &identity, &request("plain")).is_none());
    }
}
