//! Questions that mean the same: the vectors of those that were answered, and what of a request has to be equal beside them.

use fabstir_plugin_api::inference::{Generation, Input};

use super::key::{Identity, Key};
use super::veto::{Question, Veto};
use crate::scheduler::ServedModelInfo;

/// Longer questions are not compared: the more a text says, the more of it a vector leaves out. Bytes.
const LONGEST: usize = 600;

/// How many questions are remembered; past that the oldest are forgotten.
const MOST: usize = 10_000;

/// A question that an answer may be found for under other words.
#[derive(Debug, Clone)]
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

/// A question that was answered.
struct Known {
    space: Key,
    key: Key,
    question: Question,
    vector: Vec<f32>,
}

/// The questions that were answered, the oldest first. Searched from one end to the other: ten thousand take a few milliseconds.
#[derive(Default)]
pub(super) struct Questions(Vec<Known>);

impl Questions {
    pub fn add(&mut self, key: Key, wording: &Wording) {
        self.forget(key);
        if self.0.len() >= MOST {
            self.0.drain(..MOST / 10);
        }
        let Wording { space, text, vector } = wording;
        self.0.push(Known { space: *space, key, question: Question::new(text), vector: vector.clone() });
    }

    pub fn forget(&mut self, key: Key) {
        self.0.retain(|known| known.key != key);
    }

    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// The answers to questions that mean the same, the likest first, each with its similarity. `vetoed` hears of those that were near enough
    /// and ask something else.
    pub fn alike(&self, asked: &Wording, at_least: f32, mut vetoed: impl FnMut(Veto)) -> Vec<(Key, f32)> {
        let near = self.0.iter().filter(|known| known.space == asked.space).filter_map(|known| {
            let similarity = cosine(&known.vector, &asked.vector);
            (similarity >= at_least).then_some((known, similarity))
        });
        let mut near: Vec<(&Known, f32)> = near.collect();
        near.sort_by(|one, other| other.1.total_cmp(&one.1));
        if near.is_empty() {
            return Vec::new();
        }
        let question = Question::new(&asked.text);
        let alike = near.into_iter().filter_map(|(known, similarity)| match known.question.differs(&question) {
            None => Some((known.key, similarity)),
            Some(veto) => {
                vetoed(veto);
                None
            }
        });
        alike.collect()
    }
}

/// Of vectors of length 1.
fn cosine(one: &[f32], other: &[f32]) -> f32 {
    if one.len() != other.len() {
        return 0.0;
    }
    // Eight sums at a time, which the compiler makes one instruction of.
    let mut sums = [0.0f32; 8];
    let (ones, others) = (one.chunks_exact(8), other.chunks_exact(8));
    let rest: f32 = ones.remainder().iter().zip(others.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in ones.zip(others) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += a * b;
        }
    }
    rest + sums.iter().sum::<f32>()
}

#[cfg(test)]
mod tests {
    use fabstir_plugin_api::inference::Message;

    use super::*;
    use crate::scheduler::tests::request;

    fn wording(space: u8, text: &str, vector: [f32; 2]) -> Wording {
        Wording { space: Key([space; 32]), text: text.into(), vector: vector.into() }
    }

    #[test]
    fn the_likest_question_of_the_space_that_asks_the_same_is_found() {
        let mut questions = Questions::default();
        questions.add(Key([1; 32]), &wording(0, "What is the capital of Peru?", [1.0, 0.0]));
        questions.add(Key([2; 32]), &wording(0, "Which is the capital of Peru?", [0.96, 0.28]));
        questions.add(Key([3; 32]), &wording(0, "What is the capital of Chile?", [1.0, 0.0]));
        questions.add(Key([4; 32]), &wording(9, "What is the capital of Peru?", [1.0, 0.0]));
        let mut vetoes = Vec::new();
        let asked = wording(0, "Tell me the capital of Peru", [1.0, 0.0]);
        let alike: Vec<Key> = questions.alike(&asked, 0.9, |veto| vetoes.push(veto)).into_iter().map(|(key, _)| key).collect();
        assert_eq!((alike, vetoes), (vec![Key([1; 32]), Key([2; 32])], vec![Veto::Word]));
        questions.forget(Key([1; 32]));
        assert!(questions.alike(&asked, 0.97, |_| {}).is_empty());
    }

    #[test]
    fn memory_is_bounded() {
        let mut questions = Questions::default();
        for number in 0..MOST as u32 + 1 {
            let mut key = [0; 32];
            key[..4].copy_from_slice(&number.to_le_bytes());
            questions.0.push(Known { space: Key(key), key: Key(key), question: Question::new("x"), vector: Vec::new() });
        }
        questions.add(Key([255; 32]), &wording(0, "a", [1.0, 0.0]));
        assert!(questions.0.len() <= MOST);
    }

    #[test]
    fn only_the_single_question_of_a_conversation_is_compared() {
        let model =
            ServedModelInfo { id: "m".into(), plugin: "p".into(), context: 9, parallel: 1, digest: None, generates: true };
        let identity = Identity::new(None, "p", "m");
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
