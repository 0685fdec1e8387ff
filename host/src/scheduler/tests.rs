//! The scheduler's promises, kept against plugins that do what a script says.

use std::collections::VecDeque;

use async_trait::async_trait;
use fabstir_plugin_api::inference::{Done, Finish, Inference, Loaded, Model, Sampling, Text, Timings, Usage};

use super::*;
use crate::routes::{InFlight, ServedModel};

/// A plugin that follows its steps, one per call, and answers "ok" after `takes` when there are none left.
#[derive(Default)]
pub(crate) struct Script {
    pub takes: Duration,
    pub steps: Mutex<VecDeque<Step>>,
}

pub(crate) enum Step {
    /// The call itself fails.
    Refuse(PluginError),
    /// The stream gives these pieces and then fails.
    Break(&'static [&'static str], PluginError),
    /// The stream gives this piece and then nothing.
    Hang(&'static str),
}

impl Script {
    pub fn of(steps: impl IntoIterator<Item = Step>) -> Script {
        Script { takes: Duration::ZERO, steps: Mutex::new(steps.into_iter().collect()) }
    }
}

#[async_trait]
impl Inference for Script {
    async fn models(&self, _: &Cx) -> Result<Vec<Model>, PluginError> {
        Ok(Vec::new())
    }

    async fn load(&self, _: &Cx, model: String) -> Result<Loaded, PluginError> {
        Err(PluginError::not_found(model))
    }

    async fn unload(&self, _: &Cx, _: String) -> Result<(), PluginError> {
        Ok(())
    }

    async fn generate(&self, cx: &Cx, _: Generation) -> Result<Stream<Chunk>, PluginError> {
        let step = self.steps.lock().pop_front();
        let (sender, stream) = cx.stream();
        let takes = self.takes;
        if let Some(Step::Refuse(error)) = step {
            return Err(error);
        }
        tokio::spawn(async move {
            match step {
                Some(Step::Break(pieces, error)) => {
                    for piece in pieces {
                        sender.send(text(piece)).await?;
                    }
                    sender.fail(error).await;
                }
                Some(Step::Hang(piece)) => {
                    sender.send(text(piece)).await?;
                    sender.closed().await;
                }
                _ => {
                    tokio::time::sleep(takes).await;
                    sender.send(text("ok")).await?;
                    sender.send(Chunk::Done(done())).await?;
                }
            }
            Ok::<(), PluginError>(())
        });
        Ok(stream)
    }
}

pub(crate) fn text(text: &str) -> Chunk {
    Chunk::Text(Text { text: text.into(), tokens: 1, logprobs: Vec::new() })
}

pub(crate) fn done() -> Done {
    let usage = Usage { prompt_tokens: 3, completion_tokens: 1, cached_tokens: 0 };
    Done { finish: Finish::Stop, usage, timings: Timings::default() }
}

pub(crate) fn route(plugin: &str, generation: u64, model: &str, parallel: u32, script: Script) -> Arc<InferenceRoute> {
    Arc::new(InferenceRoute {
        plugin: plugin.into(),
        generation,
        setup: String::new(),
        models: vec![ServedModel {
            id: model.into(),
            context: 2048,
            parallel,
            digest: Some(format!("digest of {plugin}")),
            generates: true,
        }],
        inference: Arc::new(script),
        in_flight: InFlight::new(None),
    })
}

pub(crate) fn scheduler(
    queue: usize,
    inference: impl IntoIterator<Item = Arc<InferenceRoute>>,
) -> (Arc<Scheduler>, watch::Sender<Arc<Routes>>) {
    let routes = Routes { inference: inference.into_iter().collect(), ..Routes::default() };
    let (sender, receiver) = watch::channel(Arc::new(routes));
    let config = config::Scheduler { queue, queue_tokens: 1000, retries: 2 };
    (Scheduler::new(config, receiver), sender)
}

fn starting(plugin: &str) -> Vec<Starting> {
    vec![Starting { plugin: plugin.into(), doing: "loading m".into(), percent: None }]
}

pub(crate) fn request(prompt: &str) -> Generation {
    Generation {
        model: "m".into(),
        input: Input::Text(prompt.into()),
        sampling: Sampling::default(),
        max_tokens: None,
        stop: Vec::new(),
        format: Default::default(),
        logprobs: None,
        cache_salt: String::new(),
        priority: 0,
    }
}

async fn collect(mut answer: Answer) -> Result<String, Refused> {
    let mut all = String::new();
    while let Some(chunk) = answer.next().await {
        if let Chunk::Text(text) = chunk? {
            all.push_str(&text.text);
        }
    }
    Ok(all)
}

async fn ask(scheduler: &Arc<Scheduler>, prompt: &str) -> Result<String, Refused> {
    collect(scheduler.generate(Cx::new(), request(prompt)).await?).await
}

fn promises(scheduler: &Scheduler, outcome: &str) -> u64 {
    let mut registry = Registry::default();
    scheduler.register(&mut registry);
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).expect("metrics are text");
    let line = format!("fabstir_retry_after_promises_total{{outcome=\"{outcome}\"}} ");
    text.lines().find_map(|l| l.strip_prefix(&line)).map_or(0, |value| value.parse().expect("a number"))
}

#[tokio::test(start_paused = true)]
async fn who_comes_back_after_retry_after_is_let_in() {
    for takes in [20, 500, 4000, 12_000] {
        let script = Script { takes: Duration::from_millis(takes), ..Script::default() };
        let (scheduler, _routes) = scheduler(64, [route("a", 1, "m", 4, script)]);
        let clients = (0..200).map(|client: u64| {
            let scheduler = scheduler.clone();
            tokio::spawn(async move {
                let prompt = format!("client {client}");
                match ask(&scheduler, &prompt).await {
                    Ok(answer) => assert_eq!(answer, "ok"),
                    Err(refused) => {
                        assert_eq!(refused.code, Code::Overloaded);
                        let wait = refused.retry_after.expect("every refusal names a time");
                        assert_eq!(wait.subsec_nanos(), 0);
                        // A client is a little late, each in its own measure.
                        tokio::time::sleep(wait + Duration::from_millis(client % 40)).await;
                        assert_eq!(ask(&scheduler, &prompt).await.expect("the promise holds"), "ok");
                    }
                }
            })
        });
        for client in clients.collect::<Vec<_>>() {
            client.await.expect("no client was refused twice");
        }
        assert_eq!((promises(&scheduler, "made"), promises(&scheduler, "broken")), (132, 0), "{takes} ms each");
        assert_eq!(scheduler.state.lock().queue.waiting_tokens(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn promises_hold_against_a_stream_of_newcomers() {
    let script = Script { takes: Duration::from_millis(400), ..Script::default() };
    let (scheduler, _routes) = scheduler(16, [route("a", 1, "m", 4, script)]);
    let mut clients = Vec::new();
    // Twice what four slots can take, for a while.
    for client in 0..400u64 {
        let scheduler = scheduler.clone();
        clients.push(tokio::spawn(async move {
            let prompt = format!("client {client}");
            if let Err(refused) = ask(&scheduler, &prompt).await {
                tokio::time::sleep(refused.retry_after.expect("every refusal names a time")).await;
                ask(&scheduler, &prompt).await.expect("the promise holds");
            }
        }));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    for client in clients {
        client.await.expect("no client was refused twice");
    }
    assert!(promises(&scheduler, "made") > 50);
    assert_eq!(promises(&scheduler, "broken"), 0);
}

#[tokio::test(start_paused = true)]
async fn slots_do_not_idle_for_promises_that_nobody_redeems() {
    let script = Script { takes: Duration::from_millis(100), ..Script::default() };
    let (scheduler, _routes) = scheduler(4, [route("a", 1, "m", 1, script)]);
    let crowd = (0..50).map(|client| {
        let scheduler = scheduler.clone();
        tokio::spawn(async move { ask(&scheduler, &format!("client {client}")).await })
    });
    for client in crowd.collect::<Vec<_>>() {
        let _ = client.await.expect("no panic");
    }
    assert_eq!(promises(&scheduler, "made"), 45);
    // The queue is empty again: a newcomer is let in although many were promised a place.
    assert_eq!(ask(&scheduler, "newcomer").await.as_deref(), Ok("ok"));
}

#[tokio::test(start_paused = true)]
async fn the_queue_is_bounded_in_prompt_tokens_too() {
    let script = Script { takes: Duration::from_secs(1), ..Script::default() };
    let (scheduler, _routes) = scheduler(64, [route("a", 1, "m", 1, script)]);
    let long = "word ".repeat(600); // About 750 tokens; 1000 may wait.
    let mut futures: Vec<_> = Vec::new();
    for _ in 0..2 {
        let (scheduler, long) = (scheduler.clone(), long.clone());
        futures.push(tokio::spawn(async move { ask(&scheduler, &long).await }));
        tokio::task::yield_now().await;
    }
    let refused = ask(&scheduler, &long).await.expect_err("the tokens do not fit");
    assert_eq!(refused.code, Code::Overloaded);
    assert_eq!(ask(&scheduler, "short").await.as_deref(), Ok("ok"));
    for future in futures {
        assert!(future.await.expect("no panic").is_ok());
    }
}

#[tokio::test(start_paused = true)]
async fn a_deadline_in_the_queue_and_one_in_the_answer() {
    let (scheduler, _routes) = scheduler(4, [route("a", 1, "m", 1, Script::of([Step::Hang("one")]))]);
    let cx = Cx::new().with_timeout(Duration::from_secs(2));
    let mut first = scheduler.generate(cx, request("a")).await.expect("a free slot");
    assert_eq!(first.next().await, Some(Ok(text("one"))));

    let cx = Cx::new().with_timeout(Duration::from_secs(1));
    let queued = scheduler.generate(cx, request("b")).await.err().expect("no slot came free");
    assert_eq!(queued.code, Code::DeadlineExceeded);
    assert_eq!(scheduler.state.lock().queue.waiting(), 0);

    let late = first.next().await.expect("an error").expect_err("its time was over");
    assert_eq!(late.code, Code::DeadlineExceeded);
    assert!(first.next().await.is_none());
    // Its slot is free, though the answer was not dropped.
    assert_eq!(ask(&scheduler, "c").await.as_deref(), Ok("ok"));
}

#[tokio::test]
async fn leaving_frees_the_place_and_the_slot_at_once() {
    let route = route("a", 1, "m", 1, Script::of([Step::Hang("one")]));
    let (scheduler, _routes) = scheduler(1, [route.clone()]);
    let running = scheduler.generate(Cx::new(), request("a")).await.expect("a free slot");
    {
        let queued = scheduler.generate(Cx::new(), request("b"));
        tokio::pin!(queued);
        assert!(futures::poll!(queued.as_mut()).is_pending());
        assert_eq!(scheduler.state.lock().queue.waiting(), 1);
    }
    assert_eq!(scheduler.state.lock().queue.waiting(), 0);

    assert_eq!(route.in_flight.count(), 1);
    drop(running);
    assert_eq!(route.in_flight.count(), 0);
    assert_eq!(ask(&scheduler, "c").await.as_deref(), Ok("ok"));
    assert_eq!(route.in_flight.count(), 0);
}

#[tokio::test(start_paused = true)]
async fn overloaded_goes_back_to_the_front() {
    let overloaded = PluginError::new(Code::Overloaded, "busy").retry_after(Duration::from_millis(300));
    let script = Script { takes: Duration::from_millis(10), steps: Mutex::new([Step::Refuse(overloaded)].into()) };
    let (scheduler, _routes) = scheduler(8, [route("a", 1, "m", 1, script)]);
    let order = Arc::new(Mutex::new(Vec::new()));
    let start = Instant::now();
    let mut tasks = Vec::new();
    for name in ["first", "second"] {
        let (scheduler, order) = (scheduler.clone(), order.clone());
        tasks.push(tokio::spawn(async move {
            ask(&scheduler, name).await.expect("an answer");
            order.lock().push(name);
        }));
        tokio::task::yield_now().await;
    }
    for task in tasks {
        task.await.expect("no panic");
    }
    assert_eq!(*order.lock(), ["first", "second"]);
    assert!(start.elapsed() >= Duration::from_millis(300));
}

#[tokio::test]
async fn a_failure_before_output_moves_to_the_next_route() {
    for code in [Code::Unavailable, Code::Protocol] {
        for step in [Step::Refuse(PluginError::new(code, "gone")), Step::Break(&[], PluginError::new(code, "gone"))] {
            let (scheduler, _routes) =
                scheduler(4, [route("a", 1, "m", 1, Script::of([step])), route("b", 1, "m", 1, Script::default())]);
            assert_eq!(ask(&scheduler, "hello").await.as_deref(), Ok("ok"));
        }
    }
}

#[tokio::test]
async fn a_panic_is_told_and_not_tried_again() {
    let panic = Step::Refuse(PluginError::new(Code::Panicked, "gone"));
    let (scheduler, _routes) =
        scheduler(4, [route("a", 1, "m", 1, Script::of([panic])), route("b", 1, "m", 1, Script::default())]);
    assert_eq!(ask(&scheduler, "hello").await.expect_err("the same request would panic again").code, Code::Panicked);
}

#[tokio::test]
async fn a_failure_after_output_is_told() {
    let gone = PluginError::unavailable("secret path /models/x");
    let routes = [route("a", 1, "m", 1, Script::of([Step::Break(&["half"], gone)])), route("b", 1, "m", 1, Script::default())];
    let (scheduler, _routes) = scheduler(4, routes);
    let mut answer = scheduler.generate(Cx::new(), request("hello")).await.expect("a free slot");
    assert_eq!(answer.next().await, Some(Ok(text("half"))));
    let refused = answer.next().await.expect("an error").expect_err("an error");
    assert_eq!(refused.code, Code::Unavailable);
    assert!(!refused.message.contains("secret"));
    assert!(answer.next().await.is_none());
}

#[tokio::test(start_paused = true)]
async fn a_request_with_no_output_waits_for_the_next_generation() {
    let gone = PluginError::unavailable("the worker died");
    let (scheduler, routes) = scheduler(4, [route("a", 1, "m", 1, Script::of([Step::Break(&[], gone)]))]);
    let asking = tokio::spawn({
        let scheduler = scheduler.clone();
        async move { ask(&scheduler, "hello").await }
    });
    tokio::time::sleep(Duration::from_millis(10)).await;
    routes.send_replace(Arc::new(Routes { starting: starting("a"), ..Routes::default() }));
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(!asking.is_finished());
    let second = route("a", 2, "m", 1, Script::default());
    routes.send_replace(Arc::new(Routes { inference: vec![second], ..Routes::default() }));
    assert_eq!(asking.await.expect("no panic").as_deref(), Ok("ok"));
}

#[tokio::test(start_paused = true)]
async fn retries_end() {
    let steps = (0..9).map(|_| Step::Refuse(PluginError::unavailable("gone")));
    let (scheduler, _routes) = scheduler(4, [route("a", 1, "m", 1, Script::of(steps))]);
    assert_eq!(ask(&scheduler, "hello").await.expect_err("no end of failures").code, Code::Unavailable);
    assert_eq!(scheduler.state.lock().queue.running().count(), 0);
}

#[tokio::test]
async fn what_is_not_served_is_told_apart_from_what_is_loading() {
    let (scheduler, routes) = scheduler(4, [route("a", 1, "m", 1, Script::default()), route("b", 1, "n", 1, Script::default())]);
    let other = Generation { model: "x".into(), ..request("hello") };
    let refused = scheduler.generate(Cx::new(), other).await.err().expect("no such model");
    assert_eq!((refused.code, refused.message.as_str()), (Code::NotFound, "there is no model `x`; served here: m, n"));

    // One of two restarts: its model is loading, not unknown.
    let rest = vec![route("b", 1, "n", 1, Script::default())];
    scheduler.note_routes();
    routes.send_replace(Arc::new(Routes { inference: rest, starting: starting("a"), ..Routes::default() }));
    let refused = ask(&scheduler, "hello").await.expect_err("it is loading");
    assert_eq!((refused.code, refused.message.as_str()), (Code::Unavailable, "Loading model"));
    assert!(refused.retry_after.is_some());

    routes.send_replace(Arc::new(Routes { starting: starting("a"), ..Routes::default() }));
    assert_eq!(scheduler.readiness(), Readiness::Loading(starting("a")));
    assert_eq!(ask(&scheduler, "hello").await.expect_err("it is loading").message, "Loading model");
    routes.send_replace(Arc::default());
    assert_eq!(scheduler.readiness(), Readiness::Nothing);
}

#[tokio::test]
async fn an_undeclared_method_is_told() {
    let (scheduler, _routes) = scheduler(4, [route("a", 1, "m", 1, Script::default())]);
    let embed = Embed { model: "m".into(), inputs: vec![Input::Text("hello".into())] };
    assert_eq!(scheduler.embed(Cx::new(), embed).await.expect_err("not provided").code, Code::Unimplemented);
}

#[tokio::test]
async fn routes_to_one_model_are_one_model() {
    let (scheduler, _routes) = scheduler(4, [route("a", 1, "m", 4, Script::default()), route("b", 1, "m", 2, Script::default())]);
    let digest = Some("digest of a".into());
    let model = ServedModelInfo { id: "m".into(), plugin: "a".into(), context: 2048, parallel: 6, digest, generates: true };
    assert_eq!(scheduler.models(), [model]);
}
