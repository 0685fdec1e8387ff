//! The session's promises, over both carriers: a port in the same process, and a socket.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use fabstir_plugin_api::abi::Port;
use fabstir_plugin_api::frame::Inbox;
use fabstir_plugin_api::instance::Author;
use fabstir_plugin_api::interface::Interface;
use fabstir_plugin_api::logging::Record;
use fabstir_plugin_api::plugin::{Configure, Plugin};
use fabstir_plugin_api::prelude::*;
use fabstir_plugin_api::session::{Incoming, Role, Serve, ServeFuture, Session};

/// Counts what happens to it; answers what the request's text says.
#[derive(Default)]
struct Probe {
    running: Arc<AtomicUsize>,
    sent: Arc<AtomicUsize>,
    stopped: Arc<AtomicUsize>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Config {}

struct Running(Arc<AtomicUsize>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[async_trait]
impl Inference for Probe {
    async fn models(&self, _: &Cx) -> Result<Vec<Model>> {
        let model = |id: &str, value: &AtomicUsize| Model {
            id: id.into(),
            loaded: true,
            context: Some(value.load(Ordering::SeqCst) as u32),
            bytes: None,
        };
        Ok(vec![model("running", &self.running), model("sent", &self.sent), model("stopped", &self.stopped)])
    }

    async fn load(&self, _: &Cx, model: String) -> Result<Loaded> {
        self.running.fetch_add(1, Ordering::SeqCst);
        let _running = Running(self.running.clone());
        match model.as_str() {
            "panic" => panic!("told to"),
            "hang" => std::future::pending().await,
            _ => Err(PluginError::new(Code::Full, "no").retry_after(Duration::from_millis(5))),
        }
    }

    async fn unload(&self, _: &Cx, _: String) -> Result<()> {
        Ok(())
    }

    async fn generate(&self, cx: &Cx, request: Generation) -> Result<Stream<Chunk>> {
        let (sender, stream) = cx.stream();
        let (sent, stopped, last) = (self.sent.clone(), self.stopped.clone(), request.max_tokens);
        tokio::spawn(async move {
            let mut index = 0;
            while last.is_none_or(|last| index < last) {
                if sender.send(Chunk::Text(Text { text: index.to_string(), tokens: 1, logprobs: vec![] })).await.is_err() {
                    stopped.fetch_add(1, Ordering::SeqCst);
                    return;
                }
                sent.fetch_add(1, Ordering::SeqCst);
                index += 1;
            }
        });
        Ok(stream)
    }
}

#[async_trait]
impl Storage for Probe {
    async fn put(&self, _: &Cx, expect: Expect, mut data: Stream<Blob>) -> Result<Entry> {
        let mut size = 0;
        while let Some(piece) = data.next().await {
            size += piece?.len() as u64;
            if expect.size.is_some_and(|limit| size > limit) {
                return Err(PluginError::new(Code::Full, "more than expected"));
            }
        }
        Ok(Entry { id: String::new(), size })
    }
    async fn get(&self, _: &Cx, _: String, range: Range) -> Result<Stream<Blob>> {
        let pieces = range.length.unwrap_or(0);
        Ok(Stream::from_items((0..pieces).map(|index| Blob::from(vec![index as u8; 1 << 20]))))
    }
    async fn head(&self, _: &Cx, id: String) -> Result<Entry> {
        Err(PluginError::not_found(id))
    }
    async fn delete(&self, _: &Cx, _: String) -> Result<bool> {
        Ok(false)
    }
    async fn list(&self, _: &Cx) -> Result<Stream<Entry>> {
        Err(PluginError::internal("not here"))
    }
}

/// Conversations with nobody: what the protocol's name says happens to both directions. The rest of the kind is not here.
#[async_trait]
impl Transport for Probe {
    async fn open(&self, _: &Cx, to: Destination, mut outgoing: Stream<Blob>) -> Result<Stream<Blob>> {
        let (sender, stream) = Stream::channel(4);
        let (sent, stopped) = (self.sent.clone(), self.stopped.clone());
        match to.protocol.as_str() {
            // Ends its own direction at once, and reads the other one to its end.
            "/answers-first" => drop(tokio::spawn(async move {
                drop(sender);
                while let Some(item) = outgoing.next().await {
                    match item {
                        Ok(_) => sent.fetch_add(1, Ordering::SeqCst),
                        Err(_) => return,
                    };
                }
                stopped.fetch_add(1, Ordering::SeqCst);
            })),
            // Reads to the end, and then answers.
            "/answers-last" => drop(tokio::spawn(async move {
                let mut count = 0_u8;
                while let Some(Ok(_)) = outgoing.next().await {
                    count += 1;
                }
                let _ = sender.send(Blob::from(vec![count])).await;
            })),
            // Ends its own direction, and lets go of the other.
            _ => {}
        }
        Ok(stream)
    }
    async fn join(&self, _: &Cx, _: Join) -> Result<Peer> {
        Err(PluginError::internal("not here"))
    }
    async fn peer_id(&self, _: &Cx, _: Vec<u8>) -> Result<PeerId> {
        Err(PluginError::internal("not here"))
    }
    async fn addresses(&self, _: &Cx) -> Result<Vec<Address>> {
        Ok(vec![])
    }
    async fn peers(&self, _: &Cx) -> Result<Vec<Peer>> {
        Ok(vec![])
    }
    async fn events(&self, _: &Cx) -> Result<Stream<Event>> {
        Err(PluginError::internal("not here"))
    }
    async fn dial(&self, _: &Cx, _: Address) -> Result<PeerId> {
        Err(PluginError::internal("not here"))
    }
    async fn advertise(&self, _: &Cx, _: Topic) -> Result<()> {
        Ok(())
    }
    async fn withdraw(&self, _: &Cx, _: Topic) -> Result<()> {
        Ok(())
    }
    async fn find(&self, _: &Cx, _: Topic) -> Result<Stream<Peer>> {
        Err(PluginError::internal("not here"))
    }
    async fn listen(&self, _: &Cx, _: Protocol) -> Result<Stream<Arrival>> {
        Err(PluginError::internal("not here"))
    }
    async fn accept(&self, _: &Cx, _: u64, _: Stream<Blob>) -> Result<Stream<Blob>> {
        Err(PluginError::internal("not here"))
    }
}

impl Lifecycle for Probe {}

#[plugin(provides = [Inference(tokenize), Storage, Transport], needs = ["nothing"])]
async fn init(_: Host, _: Config) -> Result<Probe> {
    Ok(Probe::default())
}

#[derive(Default)]
struct HostEnd {
    faults: AtomicUsize,
}

impl Serve for HostEnd {
    fn admit(&self, _: &str) -> Result<Option<Box<dyn std::any::Any + Send>>> {
        Ok(None)
    }
    fn serve(&self, call: Incoming) -> ServeFuture {
        let method = call.method().to_owned();
        Box::pin(async move { Err(PluginError::unimplemented(&method)) })
    }
    fn log(&self, _: Record) {}
    fn fault(&self, _: &PluginError) {
        self.faults.fetch_add(1, Ordering::SeqCst);
    }
    fn closed(&self, _: &str) {}
}

struct Node {
    session: Session,
    plugin: Arc<dyn Plugin>,
    inference: Arc<dyn Inference>,
    storage: Arc<dyn Storage>,
    transport: Arc<dyn Transport>,
}

fn host_session() -> Session {
    Session::new(Role::Host, Arc::new(HostEnd::default()), tokio::runtime::Handle::current())
}

/// Both carriers, each with a configured instance behind it.
async fn nodes() -> Vec<(&'static str, Node)> {
    let direct = host_session();
    direct.attach(Port::new(start(Port::new(direct.inbox()))));

    let (near, far) = std::os::unix::net::UnixStream::pair().expect("a socket pair");
    near.set_nonblocking(true).expect("a socket can be set so");
    let remote = host_session();
    fabstir_plugin_api::ipc::carry(tokio::net::UnixStream::from_std(near).expect("a socket"), &remote);
    fabstir_plugin_api::instance::connect_socket::<PluginAuthor>(far).expect("starts");

    let mut nodes = vec![];
    for (name, session) in [("in process", direct), ("socket", remote)] {
        let node = Node {
            plugin: <dyn Plugin as Interface>::client(session.clone()),
            inference: <dyn Inference as Interface>::client(session.clone()),
            storage: <dyn Storage as Interface>::client(session.clone()),
            transport: <dyn Transport as Interface>::client(session.clone()),
            session,
        };
        node.plugin.configure(&Cx::new(), configuration()).await.expect("configures");
        nodes.push((name, node));
    }
    nodes
}

fn configuration() -> Configure {
    Configure { instance: "probe".into(), state_dir: std::env::temp_dir(), config: "{}".into(), log_level: "error".into() }
}

fn start(host: Port) -> Arc<dyn Inbox> {
    connect(host).expect("starts")
}

fn generation(tokens: Option<u32>) -> Generation {
    Generation {
        model: "m".into(),
        input: Input::Text(String::new()),
        sampling: Sampling::default(),
        max_tokens: tokens,
        stop: vec![],
        format: Format::Text,
        logprobs: None,
        cache_salt: String::new(),
        priority: 0,
    }
}

async fn counter(node: &Node, name: &str) -> usize {
    let models = node.inference.models(&Cx::new()).await.expect("answers");
    models.iter().find(|model| model.id == name).and_then(|model| model.context).expect("is there") as usize
}

async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let start = Instant::now();
    while !holds().await {
        assert!(start.elapsed() < Duration::from_secs(10), "{what} did not happen");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_arrives_whole_and_in_order() {
    for (name, node) in nodes().await {
        let stream = node.inference.generate(&Cx::new(), generation(Some(10_000))).await.expect("begins");
        let items = stream.collect().await.expect("ends well");
        assert_eq!(items.len(), 10_000, "{name}");
        for (index, item) in items.iter().enumerate() {
            assert!(matches!(item, Chunk::Text(text) if text.text == index.to_string()), "{name}: item {index} is {item:?}");
        }
        node.session.close("the test is over");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_that_does_not_read_holds_the_producer_back() {
    for (name, node) in nodes().await {
        let mut stream = node.inference.generate(&Cx::new(), generation(None)).await.expect("begins");
        stream.next().await.expect("an item").expect("no error");
        let mut before = usize::MAX;
        until("the producer's pause", async || std::mem::replace(&mut before, counter(&node, "sent").await) == before).await;
        assert!(before < 1000, "{name}: {before} items were sent to a consumer that read one");
        drop(stream);
        until("the producer's end", async || counter(&node, "stopped").await == 1).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_call_drops_the_method() {
    for (_, node) in nodes().await {
        let call = node.inference.clone();
        let task = tokio::spawn(async move { call.load(&Cx::new(), "hang".into()).await });
        until("the call's start", async || counter(&node, "running").await == 1).await;
        task.abort();
        until("the call's end", async || counter(&node, "running").await == 0).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_ends_calls_and_streams() {
    for (name, node) in nodes().await {
        let cx = Cx::new().with_timeout(Duration::from_millis(50));
        let start = Instant::now();
        let error = node.inference.load(&cx, "hang".into()).await.expect_err("too late");
        assert_eq!(error.code, Code::DeadlineExceeded, "{name}");
        let cx = Cx::new().with_timeout(Duration::from_millis(500));
        let mut stream = node.inference.generate(&cx, generation(None)).await.expect("begins");
        let error = loop {
            match stream.next().await {
                Some(Ok(_)) => {}
                Some(Err(error)) => break error,
                None => panic!("{name}: the stream ended without an error"),
            }
        };
        assert_eq!(error.code, Code::DeadlineExceeded, "{name}");
        assert!(stream.next().await.is_none());
        assert!(start.elapsed() < Duration::from_secs(5), "{name}");
        until("the call's end", async || counter(&node, "running").await == 0).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_panic_ends_its_call_and_nothing_else() {
    for (name, node) in nodes().await {
        let other = node.inference.generate(&Cx::new(), generation(Some(5000))).await.expect("begins");
        let error = node.inference.load(&Cx::new(), "panic".into()).await.expect_err("panics");
        assert_eq!(error.code, Code::Panicked, "{name}");
        assert!(error.message.contains("told to"), "{name}: {error}");
        assert_eq!(other.collect().await.expect("is untouched").len(), 5000, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_keep_their_code_and_their_wait() {
    for (_, node) in nodes().await {
        let error = node.inference.load(&Cx::new(), "other".into()).await.expect_err("fails");
        assert_eq!((error.code, error.retry_after_ms, error.message.as_str()), (Code::Full, Some(5), "no"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_method_that_is_not_declared_is_unimplemented() {
    for (_, node) in nodes().await {
        let embed = Embed { model: "m".into(), inputs: vec![] };
        assert_eq!(node.inference.embed(&Cx::new(), embed).await.expect_err("undeclared").code, Code::Unimplemented);
        let unknown = node.session.request(&Cx::new(), "prover.prove").send::<fabstir_plugin_api::frame::Plain<()>>().await;
        assert_eq!(unknown.expect_err("no such kind").code, Code::Unimplemented);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_arrive_whole_and_stop_when_refused() {
    for (name, node) in nodes().await {
        let pieces = (0..100).map(|_| Blob::from(vec![7u8; 100_000]));
        let entry = node.storage.put(&Cx::new(), Expect::default(), Stream::from_items(pieces)).await.expect("stored");
        assert_eq!(entry.size, 10_000_000, "{name}");

        let (sender, endless) = Stream::channel(4);
        let produced = tokio::spawn(async move { while sender.send(Blob::from(vec![7u8; 100_000])).await.is_ok() {} });
        let limit = Expect { id: None, size: Some(1_000_000) };
        let error = node.storage.put(&Cx::new(), limit, endless).await.expect_err("too much");
        assert_eq!(error.code, Code::Full, "{name}");
        tokio::time::timeout(Duration::from_secs(5), produced).await.expect("the producer stops").expect("without a panic");
    }
}

fn to(protocol: &str) -> Destination {
    Destination { peer: PeerId("nobody".into()), addresses: vec![], protocol: protocol.into() }
}

#[tokio::test(flavor = "multi_thread")]
async fn either_stream_of_a_call_may_end_first() {
    for (name, node) in nodes().await {
        let cx = Cx::new();
        let (sender, outgoing) = Stream::channel(4);
        let mut incoming = node.transport.open(&cx, to("/answers-first"), outgoing).await.expect("opens");
        assert!(incoming.next().await.is_none(), "{name}: the answer ends at once");
        drop(incoming);
        let plugin = node.plugin.clone();
        let drained = tokio::spawn(async move { plugin.drain(&Cx::new()).await });
        // More than there was credit for before the answer ended.
        for _ in 0..100 {
            sender.send(Blob::from(vec![1])).await.expect("the other direction goes on");
        }
        assert!(!drained.is_finished(), "{name}: drained while a stream ran");
        drop(sender);
        tokio::time::timeout(Duration::from_secs(5), drained).await.expect("drains").expect("no panic").expect("no error");
    }
    for (name, node) in nodes().await {
        let outgoing = Stream::from_items((0..100).map(|_| Blob::from(vec![1])));
        let answer = node.transport.open(&Cx::new(), to("/answers-last"), outgoing).await.expect("opens").collect().await;
        assert_eq!(answer.expect("ends well"), [Blob::from(vec![100])], "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_whose_answer_has_ended_counts_what_still_comes() {
    for (name, node) in nodes().await {
        let outgoing = Stream::from_items((0..100).map(|_| Blob::from(vec![1])));
        let answer = node.transport.open(&Cx::new(), to("/answers-first"), outgoing).await.expect("opens").collect().await;
        assert_eq!(answer.expect("ends well"), [], "{name}");
        until("the end of the other direction", async || counter(&node, "stopped").await == 1).await;
        assert_eq!(counter(&node, "sent").await, 100, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_nobody_reads_stops_its_producer_though_the_answer_has_ended() {
    for (name, node) in nodes().await {
        let (sender, outgoing) = Stream::channel(1);
        let answer = node.transport.open(&Cx::new(), to("/lets-go"), outgoing).await.expect("opens").collect().await;
        assert_eq!(answer.expect("ends well"), [], "{name}");
        tokio::time::timeout(Duration::from_secs(5), sender.closed()).await.expect("the producer is told");
        node.plugin.drain(&Cx::new().with_timeout(Duration::from_secs(5))).await.expect("nothing runs");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn blobs_come_back_as_they_went() {
    for (name, node) in nodes().await {
        let payload: Vec<u8> = (0..3_000_000u32).map(|index| (index % 251) as u8).collect();
        let back = node.plugin.ping(&Cx::new(), Blob::from(payload.clone())).await.expect("answers");
        assert!(*back == payload[..], "{name}");
        let range = Range { offset: 0, length: Some(20) };
        let pieces = node.storage.get(&Cx::new(), String::new(), range).await.expect("begins").collect().await.expect("ends");
        assert!(pieces.iter().enumerate().all(|(index, piece)| piece.len() == 1 << 20 && piece[5] == index as u8), "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closed_session_fails_what_runs_and_what_comes() {
    for (name, node) in nodes().await {
        let mut stream = node.inference.generate(&Cx::new(), generation(None)).await.expect("begins");
        let inference = node.inference.clone();
        let call = tokio::spawn(async move { inference.load(&Cx::new(), "hang".into()).await });
        until("the call's start", async || counter(&node, "running").await == 1).await;
        node.session.close("pulled out");
        let error = call.await.expect("no panic").expect_err("gone");
        assert_eq!((error.code, error.message.as_str()), (Code::Unavailable, "pulled out"), "{name}");
        let last = loop {
            match stream.next().await {
                Some(Ok(_)) => {}
                Some(Err(error)) => break error,
                None => panic!("{name}: the stream ended as if it were whole"),
            }
        };
        assert_eq!(last.code, Code::Unavailable, "{name}");
        assert_eq!(node.inference.models(&Cx::new()).await.expect_err("gone").code, Code::Unavailable);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn drain_waits_for_streams_and_refuses_new_calls() {
    for (name, node) in nodes().await {
        let mut stream = node.inference.generate(&Cx::new(), generation(None)).await.expect("begins");
        stream.next().await.expect("an item").expect("no error");
        let plugin = node.plugin.clone();
        let drained = tokio::spawn(async move { plugin.drain(&Cx::new()).await });
        until("the refusal", async || node.inference.models(&Cx::new()).await.is_err_and(|e| e.code == Code::Unavailable)).await;
        assert!(!drained.is_finished(), "{name}: drained while a stream ran");
        drop(stream);
        tokio::time::timeout(Duration::from_secs(5), drained).await.expect("drains").expect("no panic").expect("no error");
        node.plugin.shutdown(&Cx::new()).await.expect("shuts down");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn configuration_is_checked_against_the_type() {
    let session = host_session();
    session.attach(Port::new(start(Port::new(session.inbox()))));
    let plugin = <dyn Plugin as Interface>::client(session);
    let wrong = Configure { config: r#"{"colour": "red"}"#.into(), ..configuration() };
    let error = plugin.configure(&Cx::new(), wrong).await.expect_err("unknown key");
    assert_eq!(error.code, Code::InvalidArgument);
    assert!(error.message.contains("colour"), "{error}");
    plugin.configure(&Cx::new(), configuration()).await.expect("a second try is allowed after a failure");
    let description = plugin.describe(&Cx::new()).await.expect("describes");
    assert_eq!(description.provides[0].methods, ["models", "load", "unload", "generate", "tokenize"]);
    assert_eq!(PluginAuthor::ABOUT.needs, ["nothing"]);
}

/// A peer that sends more than it was given credit for.
struct Flood(std::sync::OnceLock<Port>);

impl Inbox for Flood {
    fn deliver(&self, frame: fabstir_plugin_api::abi::Received) -> std::result::Result<(), fabstir_plugin_api::abi::Closed> {
        use fabstir_plugin_api::frame::{Head, Kind, Writer};
        let head = Head::read(frame.head()).expect("the host writes heads");
        if head.kind == Kind::Call {
            let port = self.0.get().expect("attached").clone();
            std::thread::spawn(move || {
                let _ = port.deliver(Writer::new(Kind::Reply, head.id).finish());
                for _ in 0..10_000 {
                    let mut writer = Writer::new(Kind::Item, head.id).count(1);
                    writer.value(&Chunk::Text(Text::default())).expect("encodes");
                    let _ = port.deliver(writer.finish());
                }
            });
        }
        Ok(())
    }
    fn close(&self, _: &str) {}
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_ends_its_stream_with_a_protocol_error() {
    let end = Arc::new(HostEnd::default());
    let session = Session::new(Role::Host, end.clone(), tokio::runtime::Handle::current());
    let flood = Arc::new(Flood(std::sync::OnceLock::new()));
    flood.0.set(Port::new(session.inbox())).ok().expect("set once");
    session.attach(Port::new(flood));
    let inference = <dyn Inference as Interface>::client(session);
    let stream = inference.generate(&Cx::new(), generation(None)).await.expect("begins");
    // Nothing is read until everything was sent.
    until("the fault", async || end.faults.load(Ordering::SeqCst) > 0).await;
    let error = stream.collect().await.expect_err("flooded");
    assert_eq!(error.code, Code::Protocol);
}

#[tokio::test(flavor = "multi_thread")]
async fn instances_leave_no_thread_behind() {
    let threads = || std::fs::read_dir("/proc/self/task").map(|tasks| tasks.count()).unwrap_or(0);
    let before = threads();
    for _ in 0..50 {
        let session = host_session();
        session.attach(Port::new(start(Port::new(session.inbox()))));
        let plugin = <dyn Plugin as Interface>::client(session.clone());
        plugin.configure(&Cx::new(), configuration()).await.expect("configures");
        plugin.shutdown(&Cx::new()).await.expect("shuts down");
        session.close("done");
    }
    until("the end of the threads", async || threads() <= before + 2).await;
}
