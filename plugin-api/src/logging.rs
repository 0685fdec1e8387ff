//! A plugin's `tracing` events, on their way to the host.
//!
//! A shared library has a `tracing` dispatcher and a panic hook of its own. `install` points both at the host: events become log
//! records of the instance on whose runtime they happen. Threads that an author starts by hand belong to the last started instance.

use std::cell::{Cell, RefCell};
use std::fmt::Write as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};

use crate::session::{Session, WeakSession};

/// One log event.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// 1 is error, 5 is trace.
    pub level: u8,
    pub target: String,
    pub message: String,
    /// Names and values, in the order they were written.
    #[serde(default)]
    pub fields: Vec<(String, String)>,
}

const PANICKED: &str = "Plugin code panicked.";

impl Record {
    /// Whether this is the hook's word that something panicked.
    pub fn is_panic(&self) -> bool {
        self.level == 1 && self.target == module_path!() && self.message == PANICKED
    }
}

/// Where one instance's events go.
#[derive(Default)]
pub(crate) struct Sink {
    /// Set once the session exists, which needs the threads that already know the sink.
    session: OnceLock<WeakSession>,
    level: AtomicUsize,
}

impl Sink {
    pub(crate) fn attach(&self, session: WeakSession) {
        // A sink is attached once, where an instance is made.
        let _ = self.session.set(session);
        self.level.store(level_number("info"), Ordering::Relaxed);
    }

    fn session(&self) -> Option<Session> {
        self.session.get().and_then(WeakSession::upgrade)
    }

    pub(crate) fn set_level(&self, name: &str) {
        self.level.store(level_number(name), Ordering::Relaxed);
    }
}

/// The number of a level's name; an unknown name counts as `info`.
pub fn level_number(name: &str) -> usize {
    match name {
        "off" => 0,
        "error" => 1,
        "warn" => 2,
        "debug" => 4,
        "trace" => 5,
        _ => 3,
    }
}

thread_local! {
    static CURRENT: RefCell<Option<Arc<Sink>>> = const { RefCell::new(None) };
    static PANIC_PLACE: Cell<Option<String>> = const { Cell::new(None) };
}

static LAST: Mutex<Option<Arc<Sink>>> = Mutex::new(None);

/// Makes the present thread's events those of an instance.
pub(crate) fn enter_thread(sink: Arc<Sink>) {
    CURRENT.with(|current| *current.borrow_mut() = Some(sink));
}

pub(crate) fn started(sink: Arc<Sink>) {
    *LAST.lock() = Some(sink);
}

/// Forgets an instance that has ended, so that nothing of it stays in memory.
pub(crate) fn ended(sink: &Arc<Sink>) {
    let mut last = LAST.lock();
    if last.as_ref().is_some_and(|last| Arc::ptr_eq(last, sink)) {
        *last = None;
    }
}

fn current() -> Option<Arc<Sink>> {
    CURRENT.try_with(|current| current.borrow().clone()).ok().flatten().or_else(|| LAST.lock().clone())
}

/// Where the last panic of this thread happened, for the error that answers the call.
pub(crate) fn take_panic_location() -> Option<String> {
    PANIC_PLACE.try_with(Cell::take).ok().flatten()
}

/// Sends this library's events and panics to the host. Called once per library by what `#[plugin]` exports.
#[doc(hidden)]
pub fn install() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        // Fails only if the author has set a subscriber; then the author's wish holds.
        let _ = tracing::subscriber::set_global_default(tracing_subscriber::registry().with(ToHost));
        std::panic::set_hook(Box::new(|panic| {
            let place = panic.location().map(|place| format!("{}:{}", place.file(), place.line()));
            // Past the level and the author's own subscriber, if any: the host counts panics.
            if let Some(session) = current().and_then(|sink| sink.session()) {
                let fields = vec![("place".to_owned(), place.clone().unwrap_or_else(|| "unknown".into()))];
                let target = module_path!().to_owned();
                session.log(&Record { level: 1, target, message: PANICKED.to_owned(), fields });
            }
            let _ = PANIC_PLACE.try_with(|cell| cell.set(place));
        }));
    });
}

struct ToHost;

impl<S: Subscriber> Layer<S> for ToHost {
    fn enabled(&self, metadata: &tracing::Metadata<'_>, _: Context<'_, S>) -> bool {
        let limit = current().map_or(0, |sink| sink.level.load(Ordering::Relaxed));
        number(*metadata.level()) as usize <= limit
    }

    fn register_callsite(&self, _: &'static tracing::Metadata<'static>) -> tracing::subscriber::Interest {
        // The level is an instance's own and may change, so nothing is decided once for all.
        tracing::subscriber::Interest::sometimes()
    }

    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let Some(sink) = current() else { return };
        let metadata = event.metadata();
        let mut record = Record {
            level: number(*metadata.level()),
            target: metadata.target().to_owned(),
            message: String::new(),
            fields: Vec::new(),
        };
        event.record(&mut Fields(&mut record));
        if let Some(session) = sink.session() {
            session.log(&record);
        }
    }
}

fn number(level: Level) -> u8 {
    match level {
        Level::ERROR => 1,
        Level::WARN => 2,
        Level::INFO => 3,
        Level::DEBUG => 4,
        Level::TRACE => 5,
    }
}

struct Fields<'a>(&'a mut Record);

impl Visit for Fields<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        let mut text = String::new();
        // Writing into a String cannot fail.
        let _ = write!(text, "{value:?}");
        self.record_str(field, &text);
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            value.clone_into(&mut self.0.message);
        } else {
            self.0.fields.push((field.name().to_owned(), value.to_owned()));
        }
    }
}
