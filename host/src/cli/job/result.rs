//! What came of a job.

use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use fabstir_plugin_api::chain::{Amount, Chain, JobId, JobResult, JobState, Sure};
use fabstir_plugin_api::error::{Code, PluginError};
use fabstir_plugin_api::storage::Storage;
use serde_json::json;

use super::super::account::{AccountArgs, at_desk, with_chain};
use super::super::network::{NetworkArgs, on_threads};
use super::super::{Failure, print};
use super::{accept, events, now_s, read, status};
use crate::config::Config;
use crate::consumer::fetch;
use crate::market::history::result_in;
use crate::market::posting::{JobOutput, PostingError, ResultRef};
use crate::network::results::read_blob;
use crate::supervisor::{Alone, entries};

/// How long a node is looked for that has a result.
const LOOK: Duration = Duration::from_secs(15);
const AGAIN: Duration = Duration::from_millis(500);

/// Fetches the result of a job from the node that has it, and checks it.
///
/// Where that node cannot give it, the enabled storage plugins of the configuration are asked: a node may keep results on S5, where others
/// can read them too.
///
/// The node has committed to the result on the chain: what it gives is compared with that, and what differs is an error and not printed.
#[derive(Debug, Args)]
pub struct ResultOf {
    /// The job's number.
    id: JobId,

    /// Accepts the result once it is here and right: its node is paid at once.
    #[arg(long)]
    accept: bool,

    /// How long to wait for the chain, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    wait: u64,

    #[command(flatten)]
    account: AccountArgs,

    #[command(flatten)]
    network: NetworkArgs,
}

impl From<PostingError> for Failure {
    fn from(error: PostingError) -> Self {
        let code = match &error {
            PostingError::TooLarge { what: "input", .. } => "input_too_large",
            _ => "bad_result",
        };
        Failure::new(Failure::FAILED, code, error)
    }
}

impl ResultOf {
    pub fn execute(self, json: bool) -> Result<(), Failure> {
        let config = self.network.prepare(json)?;
        let within = Duration::from_secs(self.wait);
        if !self.accept {
            let (result, output) = on_threads(with_chain(&config, async |chain| self.fetched(&config, chain, within).await))?;
            let value = json!({ "id": self.id, "result": result, "output": output });
            return Ok(print(json, &value, shown(&output.text))?);
        }
        let account = self.account.open(&config)?;
        let (result, output, paid, coin) = on_threads(at_desk(&config, account, Amount(0), async |desk| {
            let (result, output) = self.fetched(&config, &desk.chain, within).await?;
            let paid = accept(desk, self.id, within).await?;
            Ok((result, output, paid, desk.network.coin.clone()))
        }))?;
        let value = json!({
            "id": self.id, "result": result, "output": output, "order": paid.order, "division": paid.division,
        });
        Ok(print(json, &value, format!("{}\n\n{}", shown(&output.text), paid.words(&coin)))?)
    }

    async fn fetched(
        &self,
        config: &Config,
        chain: &Arc<dyn Chain>,
        within: Duration,
    ) -> Result<(JobResult, JobOutput), Failure> {
        let result = submitted(chain, self.id, within).await?;
        let output = fetched(&self.network, config, self.id, &result).await?;
        Ok((result, output))
    }
}

/// What a job's node has handed in on the chain.
async fn submitted(chain: &Arc<dyn Chain>, id: JobId, within: Duration) -> Result<JobResult, Failure> {
    let job = read(chain, id, Sure::Latest).await?;
    let result = match job.state {
        JobState::Open | JobState::Claimed => None,
        _ => result_in(events(chain, id, within).await?.events()).cloned(),
    };
    match result {
        Some(result) => Ok(result),
        None => {
            let message = format!("there is no result: job {id} {}", status::state(&job, now_s(chain).await?));
            Err(Failure::new(Failure::FAILED, "no_result", message))
        }
    }
}

/// The result itself, from the node that has it.
pub(super) async fn fetched(network: &NetworkArgs, config: &Config, id: JobId, result: &JobResult) -> Result<JobOutput, Failure> {
    let reference: ResultRef = result.result_ref.parse()?;
    let visit = network.visit(config).await?;
    let began = Instant::now();
    let output = loop {
        // Its name is enough: the transport asks the network where it is.
        match fetch(&visit.transport, Vec::new(), &reference, &result.output_commitment).await {
            Err(error) if error.code.is_retryable() && began.elapsed() < LOOK => tokio::time::sleep(AGAIN).await,
            output => break output,
        }
    };
    visit.end().await;
    let error = match output {
        Ok(output) => return Ok(output),
        Err(error) => error,
    };
    let unfetched = unfetched(id, &reference, &error);
    stored(config, &reference, result).await.ok_or(unfetched)
}

/// The result, if a storage plugin of the configuration has it.
async fn stored(config: &Config, reference: &ResultRef, result: &JobResult) -> Option<JobOutput> {
    for entry in entries::<dyn Storage>(config).into_iter().filter(|entry| entry.enabled) {
        let id = entry.id.clone();
        let read = async {
            let place =
                Alone::start_entry(config.clone(), entry, |routes| &routes.storage).await.map_err(|error| error.to_string())?;
            let bytes = read_blob(&*place.client, reference.id.clone()).await.map_err(|error| error.to_string());
            place.end().await;
            JobOutput::read(&bytes?, &result.output_commitment).map_err(|error| error.to_string())
        };
        match read.await {
            Ok(output) => return Some(output),
            Err(why) => tracing::warn!(plugin = id, why, "The result is not there either."),
        }
    }
    None
}

fn unfetched(id: JobId, reference: &ResultRef, error: &PluginError) -> Failure {
    let peer = &reference.peer;
    match error.code {
        Code::Corrupt => {
            let message = format!(
                "what {peer} gives as the result of job {id} is not what it has committed to: {error}. Nothing was accepted"
            );
            Failure::new(Failure::FAILED, "corrupt", message)
        }
        Code::NotFound => Failure::new(Failure::FAILED, "gone", error),
        _ => {
            let message = format!(
                "{peer}, which has the result of job {id}, cannot be asked: {error}. Try again, and name a node to begin with by --bootstrap"
            );
            Failure::new(Failure::UNREACHABLE, "unreachable", message)
        }
    }
}

/// A stranger's text, fit for a terminal.
pub(super) fn shown(text: &str) -> String {
    text.chars().filter(|letter| !letter.is_control() || matches!(letter, '\n' | '\t')).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_commands_no_terminal() {
        assert_eq!(shown("one\n\ttwo \x1b[31mred\x07"), "one\n\ttwo [31mred");
    }
}
