//! What the inference kind promises.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use fabstir_plugin_api::error::{Code, PluginError};
use fabstir_plugin_api::inference::*;

use super::streams::LongStream;
use crate::harness::{During, Harness, Instance, patient, refused, told};
use crate::report::Outcome;

/// A prompt that any chat or completion model can go on from.
const PROMPT: &str = "Tell me a story about a fox, a river and an old boat that nobody wanted any more.";

/// Loads the first model.
async fn loaded(instance: &Instance) -> Result<(Arc<dyn Inference>, Loaded)> {
    let inference = instance.client::<dyn Inference>();
    let models = inference.models(&patient()).await.during("models")?;
    let first = models.into_iter().next().context("the plugin offers no model with this configuration")?;
    let loaded = inference.load(&patient(), first.id).await.during("load")?;
    Ok((inference, loaded))
}

fn request(model: &Loaded, input: impl Into<String>, max_tokens: u32) -> Generation {
    Generation {
        model: model.model.clone(),
        input: Input::Text(input.into()),
        sampling: Sampling { temperature: 0.0, seed: Some(1), ..Sampling::default() },
        max_tokens: Some(max_tokens),
        stop: Vec::new(),
        format: Format::Text,
        logprobs: None,
        cache_salt: "check".into(),
        priority: 0,
    }
}

/// A whole answer.
#[derive(Debug)]
struct Answer {
    text: String,
    /// Tokens of the pieces, added up.
    tokens: u32,
    done: Done,
}

/// Generates to the end. An error of the call and one of its stream are the same here.
async fn generate(inference: &dyn Inference, request: Generation) -> Result<Result<Answer, PluginError>> {
    let mut stream = match inference.generate(&patient(), request).await {
        Ok(stream) => stream,
        Err(error) => return Ok(Err(error)),
    };
    let (mut text, mut tokens, mut done) = (String::new(), 0, None);
    while let Some(chunk) = stream.next().await {
        ensure!(done.is_none(), "the stream goes on after `Done`");
        match chunk {
            Ok(Chunk::Text(piece)) => {
                text.push_str(&piece.text);
                tokens += piece.tokens;
            }
            Ok(Chunk::Done(end)) => done = Some(end),
            Err(error) => return Ok(Err(error)),
        }
    }
    let done = done.context("the stream ended without `Done`")?;
    Ok(Ok(Answer { text, tokens, done }))
}

async fn answer(inference: &dyn Inference, request: Generation) -> Result<Answer> {
    generate(inference, request).await?.during("generate")
}

pub(super) async fn exercise(instance: &Instance) -> Result<()> {
    let (inference, model) = loaded(instance).await?;
    let deadline = Instant::now() + Duration::from_secs(2);
    loop {
        match generate(&*inference, request(&model, PROMPT, 4)).await? {
            Ok(_) => return Ok(()),
            // Slots of calls that have just been given up may take a moment.
            Err(error) if error.code == Code::Overloaded && Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            Err(error) => bail!("generate: {}", told(&error)),
        }
    }
}

pub(super) async fn long_stream(instance: &Instance) -> Result<LongStream> {
    let (_, model) = loaded(instance).await?;
    let parallel = model.parallel as usize;
    let request = request(&model, [PROMPT; 4].join(" "), 64);
    let arguments = Box::new(move |writer: &mut fabstir_plugin_api::frame::Writer| writer.value(&request));
    Ok(LongStream { method: "inference.generate", arguments, parallel, takes_stream: false, _partner: None })
}

pub(super) async fn hundred(instance: &Instance) -> Result<()> {
    let inference = instance.client::<dyn Inference>();
    let calls = (0..100).map(|_| {
        let inference = inference.clone();
        async move { inference.models(&patient()).await }
    });
    let answers = futures::future::try_join_all(calls).await.during("models")?;
    ensure!(answers.windows(2).all(|pair| pair[0] == pair[1]), "a hundred calls of `models` got different answers");
    Ok(())
}

/// Uses the optional methods that are declared.
pub(super) async fn optional_methods(instance: &Instance, declared: &[String]) -> Result<()> {
    let (inference, model) = loaded(instance).await?;
    let declares = |name: &str| declared.iter().any(|method| method == name);
    let id = || model.model.clone();
    if declares("embed") {
        let inputs =
            vec![Input::Text("a fox".into()), Input::Text("an old boat on the river".into()), Input::Text("a fox".into())];
        let embedded = inference.embed(&patient(), Embed { model: id(), inputs }).await.during("embed")?;
        let [first, second, third] = &embedded.vectors[..] else {
            bail!("embed: {} vectors for 3 texts", embedded.vectors.len())
        };
        ensure!(
            !first.is_empty() && first.len() == second.len(),
            "embed: vectors of {} and {} numbers",
            first.len(),
            second.len()
        );
        for vector in &embedded.vectors {
            let length = vector.iter().map(|number| f64::from(*number).powi(2)).sum::<f64>().sqrt();
            ensure!((length - 1.0).abs() < 1e-3, "embed: a vector of length {length}, not 1");
        }
        let distance = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        ensure!(distance(first, third) < 1e-2, "embed: the same text has two vectors");
        ensure!(distance(first, second) > 1e-4, "embed: different texts have the same vector");
        ensure!(embedded.prompt_tokens > 0, "embed: no tokens counted");
    }
    if declares("tokenize") {
        let tokenize = |text: &str| Tokenize { model: id(), text: text.into(), special: false };
        let tokens = inference.tokenize(&patient(), tokenize(PROMPT)).await.during("tokenize")?;
        ensure!(
            !tokens.is_empty() && tokens.len() <= PROMPT.len() + 1,
            "tokenize: {} tokens for {} bytes",
            tokens.len(),
            PROMPT.len()
        );
        let longer = inference.tokenize(&patient(), tokenize(&[PROMPT; 3].join(" "))).await.during("tokenize")?;
        ensure!(longer.len() > tokens.len(), "tokenize: a longer text has no more tokens");
        let from_tokens = Generation { input: Input::Tokens(tokens.clone()), ..request(&model, "", 2) };
        let prompt_tokens = answer(&*inference, from_tokens).await?.done.usage.prompt_tokens;
        ensure!(prompt_tokens as usize == tokens.len(), "a prompt of {} tokens is counted as {prompt_tokens}", tokens.len());
    }
    if declares("apply_template") {
        let messages = vec![Message { role: "user".into(), content: PROMPT.into(), name: None }];
        let text = inference.apply_template(&patient(), Template { model: id(), messages }).await.during("apply_template")?;
        ensure!(text.contains(PROMPT), "apply_template: the message is not in the text");
    }
    Ok(())
}

pub async fn models_and_load(harness: &Harness) -> Result<Outcome> {
    let instance = harness.start().await?;
    let (inference, model) = loaded(&instance).await?;
    ensure!(model.context > 0 && model.parallel > 0, "load says context {} and parallel {}", model.context, model.parallel);
    let models = inference.models(&patient()).await.during("models")?;
    let ids: BTreeSet<&str> = models.iter().map(|model| model.id.as_str()).collect();
    ensure!(ids.len() == models.len(), "two models have the same id");
    let listed =
        models.iter().find(|listed| listed.id == model.model).context("load answers with an id that `models` does not list")?;
    ensure!(listed.loaded, "`models` says that a loaded model is not loaded");

    let began = Instant::now();
    let again = inference.load(&patient(), model.model.clone()).await.during("a second load")?;
    let took = began.elapsed();
    ensure!(
        (again.context, again.parallel) == (model.context, model.parallel),
        "a second load says {again:?}, the first {model:?}"
    );
    ensure!(took < Duration::from_secs(1), "a second load took {took:?}: it should answer at once");
    exercise(&instance).await?;

    for what in ["unload", "a second unload"] {
        inference.unload(&patient(), model.model.clone()).await.during(what)?;
    }
    let models = inference.models(&patient()).await.during("models")?;
    let listed = models.iter().find(|listed| listed.id == model.model).context("unload removed the model from `models`")?;
    let answered = generate(&*inference, request(&model, PROMPT, 2)).await?;
    match listed.loaded {
        true => drop(answered.during("generate on a model that `models` calls loaded")?),
        false => drop(refused("generate on an unloaded model", answered, &[Code::NotFound])?),
    }
    exercise(&instance).await.context("after load, unload and load")?;
    Ok(Outcome::Pass)
}

pub async fn generate_ends_with_done(harness: &Harness) -> Result<Outcome> {
    let instance = harness.start().await?;
    let (inference, model) = loaded(&instance).await?;
    let messages = ["user", "assistant", "user"].map(|role| Message { role: role.into(), content: PROMPT.into(), name: None });
    for input in [Input::Text(PROMPT.into()), Input::Messages(messages.to_vec())] {
        let answer = answer(&*inference, Generation { input, ..request(&model, "", 24) }).await?;
        ensure!(answer.done.finish != Finish::Unknown, "the reason for the end is none that this suite knows");
        let timings = answer.done.timings;
        let times = [timings.queue_ms, timings.prompt_ms, timings.generate_ms];
        ensure!(times.iter().all(|time| time.is_finite() && *time >= 0.0), "timings that cannot be: {timings:?}");
        ensure!(answer.tokens > 0 || answer.text.is_empty(), "text without tokens");
    }
    Ok(Outcome::Pass)
}

pub async fn usage_adds_up(harness: &Harness) -> Result<Outcome> {
    let instance = harness.start().await?;
    let (inference, model) = loaded(&instance).await?;
    for (prompt, max_tokens) in [(PROMPT, 1), (PROMPT, 24), (&*[PROMPT; 3].join(" "), 24)] {
        let Answer { tokens, done: Done { finish, usage, .. }, .. } =
            answer(&*inference, request(&model, prompt, max_tokens)).await?;
        ensure!(usage.prompt_tokens > 0, "a prompt of {} words has no tokens", prompt.split(' ').count());
        ensure!(usage.cached_tokens <= usage.prompt_tokens, "more cached tokens than prompt tokens: {usage:?}");
        // The token that ends an answer has no text, and may count.
        let adds_up = match finish {
            Finish::Length => usage.completion_tokens == tokens,
            _ => usage.completion_tokens == tokens || usage.completion_tokens == tokens + 1,
        };
        ensure!(adds_up, "the pieces stand for {tokens} tokens, the usage says {}, finish {finish:?}", usage.completion_tokens);
    }
    Ok(Outcome::Pass)
}

pub async fn stop_strings(harness: &Harness) -> Result<Outcome> {
    let instance = harness.start().await?;
    let (inference, model) = loaded(&instance).await?;
    let whole = answer(&*inference, request(&model, PROMPT, 24)).await?.text;
    let letters: Vec<char> = whole.chars().collect();
    if letters.len() < 8 {
        return Ok(Outcome::skip(format!("the model's answer has {} characters: too few to stop within", letters.len())));
    }
    let middle = letters.len() / 2;
    for length in [1, 3] {
        let stop: String = letters[middle..middle + length].iter().collect();
        let stopping = Generation { stop: vec!["zz never said zz".into(), stop.clone()], ..request(&model, PROMPT, 24) };
        let answer = answer(&*inference, stopping).await?;
        ensure!(!answer.text.contains(&stop), "the stop text is part of the answer");
        ensure!(answer.done.finish == Finish::Stop, "the answer was stopped and says {:?}", answer.done.finish);
        let end = whole.find(&stop).unwrap_or(whole.len());
        ensure!(answer.text == whole[..end], "stopped after {} bytes, where the stop text begins after {end}", answer.text.len());
    }
    let unsaid = Generation { stop: vec!["zz never said zz".into()], ..request(&model, PROMPT, 24) };
    let unsaid = answer(&*inference, unsaid).await?;
    ensure!(unsaid.text == whole, "a stop text that never comes up changes the answer");
    for stop in [vec![String::new()], vec!["x".to_owned(); 17]] {
        let what = format!("{} stop texts of {} bytes", stop.len(), stop[0].len());
        refused(
            &what,
            generate(&*inference, Generation { stop, ..request(&model, PROMPT, 4) }).await?,
            &[Code::InvalidArgument],
        )?;
    }
    Ok(Outcome::Pass)
}

pub async fn max_tokens(harness: &Harness) -> Result<Outcome> {
    let instance = harness.start().await?;
    let (inference, model) = loaded(&instance).await?;
    let whole = answer(&*inference, request(&model, PROMPT, 24)).await?;
    for limit in [1, 2, 7] {
        let Answer { text, tokens, done } = answer(&*inference, request(&model, PROMPT, limit)).await?;
        let counted = done.usage.completion_tokens;
        ensure!(tokens <= limit && counted <= limit, "{tokens} tokens sent and {counted} counted, with max_tokens {limit}");
        if whole.tokens > limit {
            ensure!(done.finish == Finish::Length, "cut after {limit} tokens and says {:?}", done.finish);
            ensure!(tokens == limit, "cut after {tokens} tokens, with max_tokens {limit}");
            ensure!(whole.text.starts_with(&text), "max_tokens changes the text before the cut");
        }
    }
    Ok(Outcome::Pass)
}

pub async fn seed_repeats(harness: &Harness) -> Result<Outcome> {
    let instance = harness.start().await?;
    let (inference, model) = loaded(&instance).await?;
    let mut texts = BTreeSet::new();
    for seed in [1, 2, u32::MAX] {
        let sampling = Sampling { temperature: 1.0, top_p: 0.95, seed: Some(seed), ..Sampling::default() };
        let seeded = || Generation { sampling: sampling.clone(), ..request(&model, PROMPT, 24) };
        let first = answer(&*inference, seeded()).await?.text;
        for _ in 0..2 {
            let again = answer(&*inference, seeded()).await?.text;
            ensure!(again == first, "seed {seed} gave two answers: one of {} bytes, one of {}", first.len(), again.len());
        }
        texts.insert(first);
    }
    let other_instance = harness.start().await?;
    let (inference, _) = loaded(&other_instance).await?;
    let sampling = Sampling { temperature: 1.0, top_p: 0.95, seed: Some(2), ..Sampling::default() };
    let elsewhere = answer(&*inference, Generation { sampling, ..request(&model, PROMPT, 24) }).await?.text;
    ensure!(texts.contains(&elsewhere), "another instance gives another answer to the same seed");
    Ok(Outcome::Pass)
}

pub async fn too_long_is_refused(harness: &Harness) -> Result<Outcome> {
    let instance = harness.start().await?;
    let (inference, model) = loaded(&instance).await?;
    let long = "word ".repeat(model.context as usize + 16);
    let messages = vec![Message { role: "user".into(), content: long.clone(), name: None }];
    let cases = [
        ("a prompt over the context", request(&model, long.clone(), 1)),
        ("a prompt over the context, without max_tokens", Generation { max_tokens: None, ..request(&model, long, 1) }),
        ("a message over the context", Generation { input: Input::Messages(messages), ..request(&model, "", 1) }),
        ("a prompt and max_tokens over the context", request(&model, PROMPT, model.context)),
        ("max_tokens without end", request(&model, PROMPT, u32::MAX)),
    ];
    for (what, request) in cases {
        let error = refused(what, generate(&*inference, request).await?, &[Code::TooLong])?;
        ensure!(
            error.message.contains(&model.context.to_string()),
            "{what}: the message does not name the limit: {}",
            error.message
        );
    }
    exercise(&instance).await?;
    Ok(Outcome::Pass)
}

pub async fn unknown_model_is_not_found(harness: &Harness) -> Result<Outcome> {
    let instance = harness.start().await?;
    let (inference, model) = loaded(&instance).await?;
    let unknown = "zz-no-such-model";
    let not_found = &[Code::NotFound];
    refused("load of an unknown model", inference.load(&patient(), unknown.into()).await, not_found)?;
    let request = Generation { model: unknown.into(), ..request(&model, PROMPT, 2) };
    refused("generate on an unknown model", generate(&*inference, request).await?, not_found)?;
    let provided = harness.manifest.provides.iter().find(|provided| provided.kind == "inference");
    for method in provided.into_iter().flat_map(|provided| &provided.methods) {
        let what = format!("`{method}` on an unknown model");
        match method.as_str() {
            "embed" => {
                let embed = Embed { model: unknown.into(), inputs: vec![Input::Text("a".into())] };
                refused(&what, inference.embed(&patient(), embed).await, not_found)?;
            }
            "tokenize" => {
                let tokenize = Tokenize { model: unknown.into(), text: "a".into(), special: false };
                refused(&what, inference.tokenize(&patient(), tokenize).await, not_found)?;
            }
            "apply_template" => {
                let messages = vec![Message { role: "user".into(), content: "a".into(), name: None }];
                let template = Template { model: unknown.into(), messages };
                refused(&what, inference.apply_template(&patient(), template).await, not_found)?;
            }
            _ => {}
        }
    }
    exercise(&instance).await?;
    Ok(Outcome::Pass)
}

pub async fn parallel_generations(harness: &Harness) -> Result<Outcome> {
    let instance = harness.start().await?;
    let (inference, model) = loaded(&instance).await?;
    let many = |count: u32| {
        let calls = (0..count).map(|number| {
            let prompt = format!("Story number {number}. {PROMPT}");
            let (inference, request) = (inference.clone(), request(&model, prompt, 16));
            async move { generate(&*inference, request).await }
        });
        futures::future::try_join_all(calls)
    };
    let slots = model.parallel.min(64);
    for (number, answered) in many(slots).await?.into_iter().enumerate() {
        let answer = answered.during(&format!("generation {number} of {slots} at once"))?;
        ensure!(answer.done.usage.completion_tokens <= 16, "generation {number} has more than its 16 tokens");
    }

    let mut answered = 0;
    for answer in many(slots + 8).await? {
        match answer {
            Ok(_) => answered += 1,
            Err(error) if error.code == Code::Overloaded => {
                ensure!(error.retry_after_ms.is_some(), "`Overloaded` without a time to come back: {}", error.message);
            }
            Err(error) => bail!("one generation more than there are slots: {}", told(&error)),
        }
    }
    ensure!(answered >= slots, "{answered} of {} at once were answered, with {slots} slots", slots + 8);
    exercise(&instance).await?;
    Ok(Outcome::Pass)
}
