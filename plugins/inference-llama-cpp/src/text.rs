//! From token bytes to text that can be shown: whole characters, and nothing that may still turn out to be a stop text.

/// What one token brought.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Output {
    /// Text that can go out now.
    pub text: String,
    /// Whether a stop text is complete: the answer ends before it.
    pub stopped: bool,
}

/// Joins the bytes of successive tokens.
///
/// A token may end within a character, and a stop text may begin in one token and end in another; both are held back until it is
/// clear what they are.
#[derive(Debug, Default)]
pub struct TextStream {
    stops: Vec<String>,
    /// The first bytes of a character whose rest has not come yet: three at most.
    partial: Vec<u8>,
    /// Text that may be the beginning of a stop text: shorter than the longest of them.
    held: String,
}

impl TextStream {
    /// The stop texts are not empty.
    pub fn new(stops: Vec<String>) -> Self {
        Self { stops, ..Self::default() }
    }

    /// Takes the bytes of the next token.
    pub fn push(&mut self, bytes: &[u8]) -> Output {
        if self.stops.is_empty() && self.partial.is_empty() {
            // The common case: the token is whole characters.
            if let Ok(text) = std::str::from_utf8(bytes) {
                return Output { text: text.to_owned(), stopped: false };
            }
        }
        self.decode(bytes);
        if self.stops.is_empty() {
            return Output { text: std::mem::take(&mut self.held), stopped: false };
        }
        let found = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min();
        if let Some(place) = found {
            self.held.truncate(place);
            self.partial.clear();
            return Output { text: std::mem::take(&mut self.held), stopped: true };
        }
        let keep = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        Output { text: std::mem::replace(&mut self.held, rest), stopped: false }
    }

    /// The answer is over: what was held back is text after all. A character that never became whole is shown as U+FFFD.
    pub fn finish(&mut self) -> String {
        let mut text = std::mem::take(&mut self.held);
        if !self.partial.is_empty() {
            self.partial.clear();
            text.push(char::REPLACEMENT_CHARACTER);
        }
        text
    }

    /// Appends the whole characters of `partial` and `bytes` to `held`; bytes that can never become a character are shown as
    /// U+FFFD.
    fn decode(&mut self, bytes: &[u8]) {
        let joined;
        let mut rest = if self.partial.is_empty() {
            bytes
        } else {
            self.partial.extend_from_slice(bytes);
            joined = std::mem::take(&mut self.partial);
            &joined
        };
        loop {
            match std::str::from_utf8(rest) {
                Ok(text) => return self.held.push_str(text),
                Err(error) => {
                    let (whole, after) = rest.split_at(error.valid_up_to());
                    self.held.push_str(std::str::from_utf8(whole).expect("from_utf8 has just found these bytes valid"));
                    match error.error_len() {
                        None => {
                            self.partial = after.to_vec();
                            return;
                        }
                        Some(bad) => {
                            self.held.push(char::REPLACEMENT_CHARACTER);
                            rest = &after[bad..];
                        }
                    }
                }
            }
        }
    }
}

/// The length of the longest end of `text` that is a beginning of `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    let most = text.len().min(stop.len() - 1);
    (1..=most).rev().find(|&len| stop.is_char_boundary(len) && text.as_bytes().ends_with(&stop.as_bytes()[..len])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], tokens: &[&[u8]]) -> (Vec<String>, bool) {
        let mut stream = TextStream::new(stops.iter().map(|stop| stop.to_string()).collect());
        let mut pieces = Vec::new();
        for token in tokens {
            let output = stream.push(token);
            pieces.push(output.text);
            if output.stopped {
                return (pieces, true);
            }
        }
        pieces.push(stream.finish());
        (pieces, false)
    }

    #[test]
    fn whole_tokens_pass_at_once() {
        assert_eq!(run(&[], &[b"Hello", b" world"]).0, ["Hello", " world", ""]);
    }

    #[test]
    fn a_character_of_several_tokens_comes_out_whole() {
        let bytes = "é🦀".as_bytes();
        let tokens: Vec<&[u8]> = bytes.chunks(1).collect();
        assert_eq!(run(&[], &tokens).0, ["", "é", "", "", "", "🦀", ""]);
        assert_eq!(run(&["stop"], &tokens).0.concat(), "é🦀");
    }

    #[test]
    fn bytes_that_are_no_text_become_replacement_characters() {
        assert_eq!(run(&[], &[b"a\xff", b"b"]).0.concat(), "a\u{fffd}b");
        assert_eq!(run(&[], &[b"a\xf0\x9f", b"b"]).0.concat(), "a\u{fffd}b");
        assert_eq!(run(&[], &[b"a\xf0\x9f"]).0, ["a", "\u{fffd}"]);
    }

    #[test]
    fn a_stop_text_ends_the_answer_before_it() {
        assert_eq!(run(&["END"], &[b"one END two"]), (vec!["one ".into()], true));
    }

    #[test]
    fn a_stop_text_may_span_tokens() {
        let (pieces, stopped) = run(&["\n\nUser:"], &[b"hi", b"\n", b"\n", b"Us", b"er", b": x"]);
        assert!(stopped);
        assert_eq!(pieces, ["hi", "", "", "", "", ""]);
    }

    #[test]
    fn what_only_looked_like_a_stop_text_comes_out() {
        let (pieces, stopped) = run(&["<stop>"], &[b"a<st", b"a<stop", b"!"]);
        assert!(!stopped);
        assert_eq!(pieces, ["a", "<sta", "<stop!", ""]);
        assert_eq!(run(&["<stop>"], &[b"a<st"]).0, ["a", "<st"]);
    }

    #[test]
    fn the_first_of_several_stop_texts_wins() {
        assert_eq!(run(&["b", "ab"], &[b"xab"]), (vec!["x".into()], true));
        assert_eq!(run(&["c", "bcd"], &[b"ab", b"cd"]), (vec!["a".into(), String::new()], true));
    }

    #[test]
    fn a_stop_text_of_several_bytes_per_character_is_found() {
        let (pieces, stopped) = run(&["日本"], &["x日".as_bytes(), &"本".as_bytes()[..1], &"本".as_bytes()[1..]]);
        assert!(stopped);
        assert_eq!(pieces, ["x", "", ""]);
        assert_eq!(run(&["日本"], &["日日本".as_bytes()]), (vec!["日".into()], true));
    }
}
