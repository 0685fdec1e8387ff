//! What echo says to a prompt, and how it says it.
//!
//! A token is a word with the white space after it. Only one word can ever come next, so every sampling setting is honoured by doing
//! nothing, and so are seed, cache salt and priority. What echo has no means for is refused, never ignored.

use std::time::{Duration, Instant};

use fabstir_plugin_api::prelude::*;
use tokio::{sync::OwnedSemaphorePermit, time::timeout};

/// A whole answer, known before its first word is said.
#[derive(Debug, PartialEq)]
pub struct Answer {
    text: String,
    finish: Finish,
    prompt_tokens: u32,
}

/// Refuses every model but the one there is.
pub fn known(model: &str) -> Result<()> {
    match model {
        "echo" => Ok(()),
        other => Err(PluginError::not_found(format!("no model `{other}`: the only one here is `echo`"))),
    }
}

/// Every slot is taken: come back when a few words more have been said.
pub fn busy(delay: Duration) -> PluginError {
    let wait = (delay.saturating_mul(8)).clamp(Duration::from_millis(20), Duration::from_secs(10));
    PluginError::new(Code::Overloaded, "every slot is taken").retry_after(wait)
}

/// The answer to a request, or why it cannot be given.
pub fn to(request: Generation, context: u32) -> Result<Answer> {
    known(&request.model)?;
    if request.format != Format::Text || request.logprobs.is_some() || !request.sampling.logit_bias.is_empty() {
        return Err(PluginError::invalid("echo has no formats, log-probabilities or token ids: leave them out of the request"));
    }
    if request.stop.len() > 16 || request.stop.iter().any(String::is_empty) {
        return Err(PluginError::invalid("at most 16 stop texts, none of them empty"));
    }
    let prompt = match request.input {
        Input::Text(text) => text,
        Input::Messages(turns) => match turns.into_iter().rfind(|turn| turn.role == "user") {
            Some(turn) => turn.content,
            None => return Err(PluginError::invalid("echo repeats the last message of the role `user`, and there is none")),
        },
        Input::Tokens(_) => return Err(PluginError::invalid("echo reads words, not tokens: send text or messages")),
    };

    let prompt_tokens = u32::try_from(words(&prompt).count()).unwrap_or(u32::MAX);
    let limit = request.max_tokens.unwrap_or(context.saturating_sub(prompt_tokens));
    if prompt_tokens.saturating_add(limit) > context {
        return Err(PluginError::new(
            Code::TooLong,
            format!("prompt of {prompt_tokens} words and answer of up to {limit} exceed the context of {context}"),
        ));
    }
    let said: String = words(&prompt).take(limit as usize).collect();
    let stop = request.stop.iter().filter_map(|stop| said.find(stop.as_str())).min();
    let finish = if stop.is_none() && said.len() < prompt.len() { Finish::Length } else { Finish::Stop };
    Ok(Answer { text: said[..stop.unwrap_or(said.len())].to_owned(), finish, prompt_tokens })
}

/// Says an answer word by word, waiting `delay` before each. Ends early, and frees the slot, when the listener has gone.
pub async fn speak(answer: Answer, delay: Duration, sender: Sender<Chunk>, _slot: OwnedSemaphorePermit) -> Result<()> {
    let began = Instant::now();
    let mut usage = Usage { prompt_tokens: answer.prompt_tokens, ..Usage::default() };
    for word in words(&answer.text) {
        if !delay.is_zero() {
            // Either the pause passes or the listener leaves, which `send` then reports.
            let _ = timeout(delay, sender.closed()).await;
        }
        sender.send(Chunk::Text(Text { text: word.to_owned(), tokens: 1, logprobs: Vec::new() })).await?;
        usage.completion_tokens += 1;
    }
    let timings = Timings { generate_ms: began.elapsed().as_secs_f64() * 1e3, ..Timings::default() };
    sender.send(Chunk::Done(Done { finish: answer.finish, usage, timings })).await
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split_inclusive(char::is_whitespace)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(prompt: &str, max_tokens: Option<u32>, stop: &[&str]) -> Generation {
        Generation {
            model: "echo".into(),
            input: Input::Text(prompt.into()),
            sampling: Sampling::default(),
            max_tokens,
            stop: stop.iter().map(|&text| text.into()).collect(),
            format: Format::Text,
            logprobs: None,
            cache_salt: String::new(),
            priority: 0,
        }
    }

    fn answered(text: &str, finish: Finish, prompt_tokens: u32) -> Result<Answer> {
        Ok(Answer { text: text.into(), finish, prompt_tokens })
    }

    #[test]
    fn answer_is_the_prompt() {
        assert_eq!(to(request("one two  three\n", None, &[]), 100), answered("one two  three\n", Finish::Stop, 4));
        assert_eq!(to(request("", None, &[]), 100), answered("", Finish::Stop, 0));
    }

    #[test]
    fn max_tokens_and_the_end_of_the_context_cut_with_length() {
        assert_eq!(to(request("one two three", Some(2), &[]), 100), answered("one two ", Finish::Length, 3));
        assert_eq!(to(request("one two three", None, &[]), 5), answered("one two ", Finish::Length, 3));
        assert_eq!(to(request("one two three", Some(3), &[]), 6), answered("one two three", Finish::Stop, 3));
    }

    #[test]
    fn stop_text_ends_the_answer_and_is_not_part_of_it() {
        assert_eq!(to(request("one two three", None, &["zzz", "wo th"]), 100), answered("one t", Finish::Stop, 3));
        let cut_before_the_stop_is_whole = to(request("one two three", Some(2), &["two t"]), 100);
        assert_eq!(cut_before_the_stop_is_whole, answered("one two ", Finish::Length, 3));
    }

    #[test]
    fn prompt_and_max_tokens_over_the_context_are_too_long() {
        assert_eq!(to(request("one two three", Some(4), &[]), 6).unwrap_err().code, Code::TooLong);
        assert_eq!(to(request("one two three", None, &[]), 2).unwrap_err().code, Code::TooLong);
        assert_eq!(to(request("one", Some(u32::MAX), &[]), 100).unwrap_err().code, Code::TooLong);
    }

    #[test]
    fn what_echo_cannot_do_is_refused() {
        let refused = [
            Generation { format: Format::Json, ..request("a", None, &[]) },
            Generation { logprobs: Some(0), ..request("a", None, &[]) },
            Generation { input: Input::Tokens(vec![1]), ..request("a", None, &[]) },
            Generation { input: Input::Messages(Vec::new()), ..request("a", None, &[]) },
            request("a", None, &[""]),
        ];
        for request in refused {
            assert_eq!(to(request, 100).unwrap_err().code, Code::InvalidArgument);
        }
        assert_eq!(to(Generation { model: "gpt".into(), ..request("a", None, &[]) }, 9).unwrap_err().code, Code::NotFound);
    }

    #[test]
    fn last_user_message_is_echoed() {
        let turn = |role: &str, content: &str| Message { role: role.into(), content: content.into(), name: None };
        let turns = vec![turn("user", "first"), turn("assistant", "first"), turn("user", "second one"), turn("assistant", "x")];
        let request = Generation { input: Input::Messages(turns), ..request("", None, &[]) };
        assert_eq!(to(request, 100), answered("second one", Finish::Stop, 2));
    }

    #[tokio::test]
    async fn usage_counts_the_words_that_were_said_and_a_leaving_listener_frees_the_slot() {
        let slots = std::sync::Arc::new(tokio::sync::Semaphore::new(1));
        let (sender, stream) = Cx::new().stream();
        let answer = to(request("one two three", Some(2), &[]), 100).unwrap();
        speak(answer, Duration::ZERO, sender, slots.clone().acquire_owned().await.unwrap()).await.unwrap();
        let chunks = stream.collect().await.unwrap();
        assert_eq!(chunks.len(), 3);
        let Some(Chunk::Done(done)) = chunks.last() else { panic!("the last chunk is {:?}", chunks.last()) };
        assert_eq!(done.usage, Usage { prompt_tokens: 3, completion_tokens: 2, cached_tokens: 0 });

        let (sender, stream) = Cx::new().stream();
        drop(stream);
        let answer = to(request("one two three", None, &[]), 100).unwrap();
        let slot = slots.clone().acquire_owned().await.unwrap();
        assert_eq!(speak(answer, Duration::from_secs(3600), sender, slot).await.unwrap_err().code, Code::Cancelled);
        assert_eq!(slots.available_permits(), 1);
    }
}
