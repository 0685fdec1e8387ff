//! One JSON-RPC endpoint: what is known of its health, and one exchange with it.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ethers::providers::JsonRpcError;
use parking_lot::Mutex;
use reqwest::header::RETRY_AFTER;
use reqwest::{Client, Response, StatusCode, Url};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::time::{Instant, timeout};
use tracing::{error, info, warn};

use super::error::{Fault, Meaning, meaning};

/// After a failure the endpoint is used last for so long, and twice as long after each further one.
const FIRST_BACKOFF: Duration = Duration::from_millis(250);
const LONGEST_BACKOFF: Duration = Duration::from_secs(300);
/// How long an endpoint rests that wants fewer requests and does not say for how long; twice as long each further time.
const FIRST_REST: Duration = Duration::from_secs(1);
/// No endpoint is believed that wants to rest longer: a wrong header would take it away for good.
const LONGEST_REST: Duration = Duration::from_secs(600);
/// How often an endpoint of another chain is asked whether it still is: behind a name there may be another one tomorrow.
const WRONG_CHAIN_AGAIN: Duration = Duration::from_secs(60);

pub(super) struct Endpoint {
    /// Scheme and host: what may be shown, since the rest of a URL may be a secret.
    name: String,
    url: Url,
    client: Client,
    chain: u64,
    longest_answer: usize,
    ids: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// It has said that it is of the right chain, and has not failed since.
    checked: bool,
    /// It is of this other chain, and is asked again then.
    wrong: Option<(u64, Instant)>,
    /// Failures since it last answered.
    failures: u32,
    backoff_until: Option<Instant>,
    /// Times in a row that it wanted fewer requests.
    refusals: u32,
    rest_until: Option<Instant>,
    /// Its newest block when the endpoints were last compared, and how far the newest of all was ahead.
    head: Option<u64>,
    lag: u64,
}

/// How good a choice an endpoint is: the smallest first.
pub(super) type Rank = (bool, bool, bool);

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Endpoint").field("name", &self.name).field("state", &*self.state.lock()).finish_non_exhaustive()
    }
}

impl Endpoint {
    pub(super) fn new(url: Url, client: Client, chain: u64, longest_answer: usize) -> Self {
        let host = url.host_str().unwrap_or_default();
        let name = match url.port() {
            Some(port) => format!("{}://{host}:{port}", url.scheme()),
            None => format!("{}://{host}", url.scheme()),
        };
        Self { name, url, client, chain, longest_answer, ids: AtomicU64::new(1), state: Mutex::default() }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn rank(&self, most_lag: u64) -> Rank {
        let state = self.state.lock();
        let now = Instant::now();
        let away = state.wrong.is_some() || state.rest_until.is_some_and(|until| until > now);
        (away, state.failures > 0, state.lag > most_lag)
    }

    /// Whether it is worth asking only to learn how it is.
    pub(super) fn may_be_probed(&self) -> bool {
        let state = self.state.lock();
        let now = Instant::now();
        [state.rest_until, state.backoff_until].iter().flatten().all(|&until| until <= now)
    }

    pub(super) fn head(&self) -> Option<u64> {
        self.state.lock().head
    }

    pub(super) fn set_head(&self, head: Option<u64>) {
        self.state.lock().head = head;
    }

    pub(super) fn set_newest(&self, newest: u64) {
        let mut state = self.state.lock();
        // Of one that did not answer nothing is known; that it failed counts against it already.
        state.lag = state.head.map_or(0, |head| newest.saturating_sub(head));
    }

    /// Asks it once, if it may be asked. The answer, or what it says of the endpoint, is remembered.
    pub(super) async fn call<R: DeserializeOwned>(&self, method: &str, params: &Value, limit: Duration) -> Result<R, Fault> {
        self.may_be_asked()?;
        let answer = timeout(limit, async {
            self.check_chain().await?;
            decode(self.exchange(method, params).await?)
        });
        let answer =
            answer.await.unwrap_or_else(|_| Err(Fault::Unreachable(format!("no answer within {} s", limit.as_secs_f32()))));
        match self.remember(answer.as_ref().err()) {
            Some(rest) => Err(Fault::RateLimited(rest)),
            None => answer,
        }
    }

    /// Makes sure that it may be asked and is of the right chain. Asks nothing where that is known.
    pub(super) async fn ready(&self, limit: Duration) -> Result<(), Fault> {
        self.may_be_asked()?;
        if self.state.lock().checked {
            return Ok(());
        }
        self.call::<Value>("eth_chainId", &json!([]), limit).await.map(|_| ())
    }

    fn may_be_asked(&self) -> Result<(), Fault> {
        let state = self.state.lock();
        let now = Instant::now();
        if let Some(until) = state.rest_until.filter(|&until| until > now) {
            return Err(Fault::RateLimited(until - now));
        }
        match state.wrong {
            Some((found, again)) if again > now => Err(Fault::WrongChain(found)),
            _ => Ok(()),
        }
    }

    async fn check_chain(&self) -> Result<(), Fault> {
        if self.state.lock().checked {
            return Ok(());
        }
        let answer = self.exchange("eth_chainId", &json!([])).await.map_err(|fault| match fault {
            // Whatever it says instead, a missing key for example, is no answer to what the caller wants to know.
            Fault::Rpc(error) if meaning(&error) != Meaning::TooMany => {
                Fault::Unreachable(format!("it does not say its chain: {} ({})", error.message, error.code))
            }
            fault => fault,
        })?;
        let found = quantity(&answer)?;
        let mut state = self.state.lock();
        if found == self.chain {
            if state.wrong.take().is_some() {
                info!(endpoint = self.name, chain = found, "The endpoint is of the right chain now.");
            }
            state.checked = true;
            return Ok(());
        }
        if state.wrong.is_none_or(|(before, _)| before != found) {
            error!(
                endpoint = self.name,
                chain = found,
                expected = self.chain,
                "The endpoint is of another chain: it is not used."
            );
        }
        state.wrong = Some((found, Instant::now() + WRONG_CHAIN_AGAIN));
        Err(Fault::WrongChain(found))
    }

    /// Keeps what an answer says of the endpoint; returned is how long it wants to be left alone, if it does.
    fn remember(&self, fault: Option<&Fault>) -> Option<Duration> {
        let mut state = self.state.lock();
        let asked_for = match fault {
            Some(Fault::WrongChain(_)) => return None,
            Some(why @ (Fault::Unreachable(_) | Fault::Malformed { .. })) => {
                let backoff = doubled(FIRST_BACKOFF, state.failures).min(LONGEST_BACKOFF);
                state.failures = state.failures.saturating_add(1);
                state.backoff_until = Some(Instant::now() + backoff);
                // What answers next at this address may be another node.
                state.checked = false;
                if state.failures == 1 {
                    warn!(endpoint = self.name, %why, "The endpoint failed: others are used before it.");
                }
                return None;
            }
            Some(Fault::RateLimited(rest)) => *rest,
            Some(Fault::Rpc(error)) if meaning(error) == Meaning::TooMany => Duration::ZERO,
            None | Some(Fault::Rpc(_)) => {
                if state.failures > 0 {
                    info!(endpoint = self.name, failures = state.failures, "The endpoint answers again.");
                }
                (state.failures, state.backoff_until, state.refusals, state.rest_until) = (0, None, 0, None);
                return None;
            }
        };
        let rest = if asked_for.is_zero() { doubled(FIRST_REST, state.refusals) } else { asked_for }.min(LONGEST_REST);
        if state.refusals == 0 {
            warn!(
                endpoint = self.name,
                rest_s = rest.as_secs(),
                "The endpoint wants fewer requests: it is left alone for a while."
            );
        }
        state.refusals = state.refusals.saturating_add(1);
        state.rest_until = Some(Instant::now() + rest);
        Some(rest)
    }

    /// One request and its answer.
    async fn exchange(&self, method: &str, params: &Value) -> Result<Value, Fault> {
        let id = self.ids.fetch_add(1, Ordering::Relaxed);
        let request = json!({ "jsonrpc": "2.0", "id": id, "method": method, "params": params });
        let response = self.client.post(self.url.clone()).json(&request).send().await.map_err(unreachable)?;
        let status = response.status();
        let rest = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.trim().parse().ok());
        match (status, rest) {
            (StatusCode::TOO_MANY_REQUESTS, rest) => return Err(Fault::RateLimited(Duration::from_secs(rest.unwrap_or(0)))),
            (StatusCode::SERVICE_UNAVAILABLE, Some(rest)) => return Err(Fault::RateLimited(Duration::from_secs(rest))),
            _ => {}
        }
        let body = self.body(response).await?;
        let answer = result(&body, id);
        // Some endpoints put a JSON-RPC error into an HTTP error; where there is none, what HTTP says is the cause.
        match answer {
            Err(Fault::Malformed { .. }) if !status.is_success() => Err(Fault::Unreachable(format!("HTTP {status}"))),
            answer => answer,
        }
    }

    async fn body(&self, mut response: Response) -> Result<Vec<u8>, Fault> {
        let too_long = || malformed(format!("more than {} bytes", self.longest_answer));
        if response.content_length().is_some_and(|length| length > self.longest_answer as u64) {
            return Err(too_long());
        }
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(unreachable)? {
            if body.len() + chunk.len() > self.longest_answer {
                return Err(too_long());
            }
            body.extend_from_slice(&chunk);
        }
        Ok(body)
    }
}

fn doubled(first: Duration, times: u32) -> Duration {
    first.saturating_mul(1 << times.min(16))
}

fn malformed(why: impl Into<String>) -> Fault {
    Fault::Malformed { why: why.into(), source: None }
}

/// The causes of a failed exchange in one line, without the URL.
fn unreachable(error: reqwest::Error) -> Fault {
    let error = error.without_url();
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    Fault::Unreachable(text)
}

/// The result in the answer to request `id`. That it is `null` is a result, that it is missing is none.
fn result(body: &[u8], id: u64) -> Result<Value, Fault> {
    let answer = serde_json::from_slice(body);
    let answer = answer.map_err(|error| Fault::Malformed { why: "not JSON".into(), source: Some(error) })?;
    let Value::Object(mut answer) = answer else { return Err(malformed("JSON that is no object")) };
    let error = answer.remove("error").filter(|error| !error.is_null());
    match answer.get("id") {
        Some(Value::Number(found)) if found.as_u64() == Some(id) => {}
        // Whoever cannot read a request does not know its id.
        None | Some(Value::Null) if error.is_some() => {}
        found => return Err(malformed(format!("the id {} instead of {id}", found.map_or("(none)".into(), Value::to_string)))),
    }
    match (error, answer.remove("result")) {
        (Some(error), _) => Err(match serde_json::from_value::<JsonRpcError>(error) {
            Ok(error) => Fault::Rpc(error),
            Err(error) => Fault::Malformed { why: "an error without code and message".into(), source: Some(error) },
        }),
        (None, Some(result)) => Ok(result),
        (None, None) => Err(malformed("neither a result nor an error")),
    }
}

fn decode<R: DeserializeOwned>(result: Value) -> Result<R, Fault> {
    serde_json::from_value(result)
        .map_err(|error| Fault::Malformed { why: "a result of another form".into(), source: Some(error) })
}

/// A number as JSON-RPC writes it: `0x2105`.
pub(super) fn quantity(value: &Value) -> Result<u64, Fault> {
    let digits = value.as_str().and_then(|text| text.strip_prefix("0x"));
    digits
        .and_then(|digits| u64::from_str_radix(digits, 16).ok())
        .ok_or_else(|| malformed("a result that is no hexadecimal number"))
}
