//! Several JSON-RPC endpoints that serve as one.
//!
//! What an endpoint does wrong is that endpoint's matter: another one is asked, within the time that the call has. What the chain
//! answers, an error included, is passed on as it is. A start needs no endpoint; a call that finds none says so.

mod endpoint;
mod error;
#[cfg(test)]
mod tests;

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use ethers::providers::{JsonRpcClient, JsonRpcError};
use futures::StreamExt;
use futures::future::join_all;
use futures::stream::FuturesUnordered;
use parking_lot::Mutex;
use reqwest::redirect::Policy;
use reqwest::{Client, Url};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::time::{Instant, timeout_at};
use tracing::debug;

use endpoint::{Endpoint, quantity};
pub use error::{CallError, UrlError, range_too_large};
use error::{Fault, Meaning, known_already, meaning};

/// How long endpoints are waited for, and what is taken from them.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// How long one endpoint has to answer.
    pub per_try: Duration,
    /// How long a call takes at most, with all endpoints that it tries.
    pub total: Duration,
    /// An endpoint that is more blocks behind the newest is used last.
    pub most_lag: u64,
    /// How often the endpoints' newest blocks are compared, where there are several. Done by the next call after that time.
    pub compare_every: Duration,
    /// How many bytes an answer has at most.
    pub longest_answer: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            per_try: Duration::from_secs(5),
            total: Duration::from_secs(15),
            most_lag: 5,
            compare_every: Duration::from_secs(30),
            longest_answer: 16 << 20,
        }
    }
}

/// How long an endpoint has to say its newest block: whoever compares is waited for by a call.
const COMPARISON: Duration = Duration::from_secs(2);
/// How long the other endpoints have to take a transaction once one has it.
const BROADCAST_GRACE: Duration = Duration::from_secs(1);

/// Several endpoints of one chain, as one client of ethers. Clones share what they know.
///
/// A read goes to the best endpoint, and to the next where that one fails; two reads in a row may be answered by different ones. Where
/// they must agree, use [`Pool::pinned`]. A signed transaction goes to all.
#[derive(Debug, Clone)]
pub struct Pool {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// In the order of the configuration, which decides between equals.
    endpoints: Vec<Endpoint>,
    chain: u64,
    limits: Limits,
    compared: Mutex<Option<Instant>>,
}

impl Pool {
    /// Takes the endpoints of chain `chain_id`, the preferred one first. Asks nothing.
    pub fn new<U: AsRef<str>>(urls: &[U], chain_id: u64, limits: Limits) -> Result<Self, UrlError> {
        // The environment is read in one place, so no proxy is taken from it. A redirect would carry a transaction to who knows whom.
        let client = Client::builder().no_proxy().redirect(Policy::none()).connect_timeout(limits.per_try);
        let client = client.user_agent(concat!(env!("CARGO_PKG_NAME"), "/", env!("CARGO_PKG_VERSION"))).build();
        let client = client.map_err(|error| UrlError::Client(error.to_string()))?;
        let mut endpoints = Vec::with_capacity(urls.len());
        for (place, url) in (1..).zip(urls) {
            let url: Url = url.as_ref().parse().map_err(|error| UrlError::Url { place, why: format!("{error}") })?;
            if !matches!(url.scheme(), "http" | "https") {
                return Err(UrlError::Scheme { place, scheme: url.scheme().into() });
            }
            endpoints.push(Endpoint::new(url, client.clone(), chain_id, limits.longest_answer));
        }
        if endpoints.is_empty() {
            return Err(UrlError::None);
        }
        Ok(Self { shared: Arc::new(Shared { endpoints, chain: chain_id, limits, compared: Mutex::new(None) }) })
    }

    /// The best endpoint of now, for reads that must agree with each other. It stays with it, also when it fails: then begin anew.
    ///
    /// # Errors
    /// As those of a call: no endpoint is of the right chain and may be asked.
    pub async fn pinned(&self) -> Result<Pinned, CallError> {
        let deadline = Instant::now() + self.shared.limits.total;
        self.compare().await;
        let mut faults = Vec::new();
        for place in self.by_health() {
            let Some(limit) = self.limit(deadline) else { break };
            match self.shared.endpoints[place].ready(limit).await {
                Ok(()) => return Ok(Pinned { pool: self.clone(), place }),
                Err(fault) => faults.push((place, fault)),
            }
        }
        Err(self.failed(faults))
    }

    /// The endpoints' places, the healthiest first.
    fn by_health(&self) -> Vec<usize> {
        let mut places: Vec<usize> = (0..self.shared.endpoints.len()).collect();
        places.sort_by_cached_key(|&place| self.shared.endpoints[place].rank(self.shared.limits.most_lag));
        places
    }

    /// How long the next try may take.
    fn limit(&self, deadline: Instant) -> Option<Duration> {
        let left = deadline.saturating_duration_since(Instant::now());
        (!left.is_zero()).then(|| left.min(self.shared.limits.per_try))
    }

    /// Asks all endpoints for their newest block at the same moment, if that is due. Numbers of different moments say nothing about who
    /// lags, and an endpoint that is not used would never be seen to be well again.
    async fn compare(&self) {
        let limits = &self.shared.limits;
        if self.shared.endpoints.len() < 2 {
            return;
        }
        {
            let mut compared = self.shared.compared.lock();
            if compared.is_some_and(|at| at.elapsed() < limits.compare_every) {
                return;
            }
            *compared = Some(Instant::now());
        }
        let params = json!([]);
        self.shared.endpoints.iter().for_each(|endpoint| endpoint.set_head(None));
        let probed = self.shared.endpoints.iter().filter(|endpoint| endpoint.may_be_probed());
        join_all(probed.map(|endpoint| async {
            let head = endpoint.call::<Value>("eth_blockNumber", &params, limits.per_try.min(COMPARISON)).await;
            endpoint.set_head(head.and_then(|head| quantity(&head)).ok());
        }))
        .await;
        let newest = self.shared.endpoints.iter().filter_map(Endpoint::head).max().unwrap_or(0);
        self.shared.endpoints.iter().for_each(|endpoint| endpoint.set_newest(newest));
    }

    async fn read<R: DeserializeOwned>(&self, method: &str, params: &Value) -> Result<R, CallError> {
        let deadline = Instant::now() + self.shared.limits.total;
        self.compare().await;
        let mut faults = Vec::new();
        for place in self.by_health() {
            let Some(limit) = self.limit(deadline) else { break };
            match self.shared.endpoints[place].call(method, params, limit).await {
                Ok(result) => return Ok(result),
                Err(Fault::Rpc(error)) if meaning(&error) == Meaning::Answer => return Err(CallError::Rpc(error)),
                Err(fault) => {
                    debug!(endpoint = self.shared.endpoints[place].name(), method, why = %fault, "A call is tried elsewhere.");
                    faults.push((place, fault));
                }
            }
        }
        Err(self.failed(faults))
    }

    /// Sends a transaction to all endpoints. One that takes it is enough; the others get a moment more, since dropping their requests
    /// could mean that only one node of the network has it.
    async fn broadcast<R: DeserializeOwned>(&self, method: &str, params: &Value) -> Result<R, CallError> {
        let limits = &self.shared.limits;
        let mut deadline = Instant::now() + limits.total;
        let endpoints = self.shared.endpoints.iter().enumerate();
        let mut calls: FuturesUnordered<_> = endpoints
            .map(|(place, endpoint)| async move { (place, endpoint.call(method, params, limits.per_try).await) })
            .collect();
        let mut accepted = None;
        let mut faults = Vec::new();
        while let Ok(Some((place, answer))) = timeout_at(deadline, calls.next()).await {
            match answer {
                Ok(result) if accepted.is_none() => {
                    accepted = Some(result);
                    deadline = deadline.min(Instant::now() + BROADCAST_GRACE);
                }
                Ok(_) => {}
                Err(fault) => {
                    debug!(endpoint = self.shared.endpoints[place].name(), why = %fault, "An endpoint did not take a transaction.");
                    faults.push((place, fault));
                }
            }
        }
        accepted.ok_or_else(|| self.failed(faults))
    }

    /// One error for all faults: the one that says most about the call itself.
    fn failed(&self, faults: Vec<(usize, Fault)>) -> CallError {
        let name = |place: usize| self.shared.endpoints[place].name();
        let why = || faults.iter().map(|(place, fault)| format!("{}: {fault}", name(*place))).collect::<Vec<_>>().join("; ");
        let mut answers: Vec<&JsonRpcError> = Vec::new();
        let mut rests = Vec::new();
        let mut wrong = Vec::new();
        for (_, fault) in &faults {
            match fault {
                Fault::Rpc(error) => answers.push(error),
                Fault::RateLimited(rest) => rests.push(*rest),
                Fault::WrongChain(found) => wrong.push(*found),
                Fault::Unreachable(_) | Fault::Malformed { .. } => {}
            }
        }
        // Of several refusals of a transaction, that one endpoint has it already is what its sender must know.
        answers.sort_by_key(|error| (!known_already(error), meaning(error) != Meaning::Answer));
        if let Some(&error) = answers.first() {
            return CallError::Rpc(error.clone());
        }
        if let Some(&retry_after) = rests.iter().min() {
            return CallError::RateLimited { retry_after };
        }
        if let Some(&found) = wrong.first().filter(|_| wrong.len() == faults.len()) {
            return CallError::WrongChain { expected: self.shared.chain, found };
        }
        if faults.is_empty() {
            return CallError::Unreachable { why: "the time was over before one was asked".into() };
        }
        let text = why();
        match faults.into_iter().find_map(|(place, fault)| match fault {
            Fault::Malformed { why, source } => Some((place, why, source)),
            _ => None,
        }) {
            Some((place, why, source)) => {
                CallError::Malformed { endpoint: self.shared.endpoints[place].name().into(), why, source }
            }
            None => CallError::Unreachable { why: text },
        }
    }
}

#[async_trait]
impl JsonRpcClient for Pool {
    type Error = CallError;

    /// A transaction that is sent while no endpoint answers may have been taken all the same: only the chain can say.
    async fn request<T, R>(&self, method: &str, params: T) -> Result<R, CallError>
    where
        T: Debug + Serialize + Send + Sync,
        R: DeserializeOwned + Send,
    {
        let params = written(params)?;
        match method {
            "eth_sendRawTransaction" => self.broadcast(method, &params).await,
            _ => self.read(method, &params).await,
        }
    }
}

/// One endpoint of a pool, for a round of reading. Everything that it is asked goes there, and nothing is tried elsewhere.
#[derive(Debug, Clone)]
pub struct Pinned {
    pool: Pool,
    place: usize,
}

impl Pinned {
    /// Scheme and host of the endpoint.
    #[cfg(test)]
    fn endpoint(&self) -> &str {
        self.pool.shared.endpoints[self.place].name()
    }
}

#[async_trait]
impl JsonRpcClient for Pinned {
    type Error = CallError;

    async fn request<T, R>(&self, method: &str, params: T) -> Result<R, CallError>
    where
        T: Debug + Serialize + Send + Sync,
        R: DeserializeOwned + Send,
    {
        let params = written(params)?;
        let shared = &self.pool.shared;
        let answer = shared.endpoints[self.place].call(method, &params, shared.limits.per_try).await;
        answer.map_err(|fault| self.pool.failed(vec![(self.place, fault)]))
    }
}

/// Parameters as JSON-RPC wants them: ethers writes none as `()`.
fn written(params: impl Serialize) -> Result<Value, CallError> {
    match serde_json::to_value(params) {
        Ok(Value::Null) => Ok(json!([])),
        Ok(params) => Ok(params),
        // The code of JSON-RPC for it, which an endpoint would have answered.
        Err(error) => Err(CallError::Rpc(JsonRpcError { code: -32602, message: format!("invalid params: {error}"), data: None })),
    }
}
