//! A prompt as plain completions and embeddings take it.

use std::fmt;

use fabstir_plugin_api::inference::Input;
use serde::de::{self, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

/// A text, a list of texts, a list of tokens, or a list of lists of tokens: one input each, but for the plain list of tokens.
///
/// Read element by element into its own type: a detour over generic JSON would take 32 bytes per token.
#[derive(Debug, PartialEq)]
pub(super) struct Prompts(pub Vec<Input>);

impl<'de> Deserialize<'de> for Prompts {
    fn deserialize<D: Deserializer<'de>>(json: D) -> Result<Self, D::Error> {
        json.deserialize_any(Whole)
    }
}

struct Whole;

impl<'de> Visitor<'de> for Whole {
    type Value = Prompts;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a text, a list of texts, a list of tokens or a list of lists of tokens")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Prompts, E> {
        Ok(Prompts(vec![Input::Text(text.to_owned())]))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Prompts, A::Error> {
        let mut inputs = Vec::new();
        let mut tokens = Vec::new();
        while let Some(element) = elements.next_element()? {
            match element {
                Element::Token(token) if inputs.is_empty() => tokens.push(token),
                Element::Input(input) if tokens.is_empty() => inputs.push(input),
                _ => return Err(de::Error::custom("tokens and texts are mixed")),
            }
        }
        if !tokens.is_empty() {
            inputs.push(Input::Tokens(tokens));
        }
        Ok(Prompts(inputs))
    }
}

enum Element {
    Token(u32),
    Input(Input),
}

impl<'de> Deserialize<'de> for Element {
    fn deserialize<D: Deserializer<'de>>(json: D) -> Result<Self, D::Error> {
        struct One;
        impl<'de> Visitor<'de> for One {
            type Value = Element;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a text, a token or a list of tokens")
            }

            fn visit_u64<E: de::Error>(self, token: u64) -> Result<Element, E> {
                let token = u32::try_from(token).map_err(|_| E::custom(format_args!("{token} is no token")))?;
                Ok(Element::Token(token))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Element, E> {
                Ok(Element::Input(Input::Text(text.to_owned())))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Element, A::Error> {
                let mut tokens = Vec::new();
                while let Some(token) = elements.next_element()? {
                    tokens.push(token);
                }
                Ok(Element::Input(Input::Tokens(tokens)))
            }
        }
        json.deserialize_any(One)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_is_read() {
        let read = |json: &str| serde_json::from_str::<Prompts>(json).map(|prompts| prompts.0);
        let text = |text: &str| Input::Text(text.into());
        assert_eq!(read(r#""a""#).expect("good"), [text("a")]);
        assert_eq!(read(r#"["a", "b"]"#).expect("good"), [text("a"), text("b")]);
        assert_eq!(read("[1, 2]").expect("good"), [Input::Tokens(vec![1, 2])]);
        assert_eq!(read("[[1], [2, 3]]").expect("good"), [Input::Tokens(vec![1]), Input::Tokens(vec![2, 3])]);
        assert_eq!(read("[]").expect("good"), []);
        for wrong in [r#"["a", 1]"#, r#"[1, "a"]"#, "[-1]", "[4294967296]", "[1.5]", "7", "[[\"a\"]]", "[{}]"] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }
}
