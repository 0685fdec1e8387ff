//! What came of a posted job, from the node that has it.

use std::sync::Arc;
use std::time::Duration;

use fabstir_plugin_api::chain::Hash32;
use fabstir_plugin_api::context::Cx;
use fabstir_plugin_api::error::{Code, PluginError, Result};
use fabstir_plugin_api::stream::Stream;
use fabstir_plugin_api::transport::{Destination, Transport};

use crate::market::posting::{JobOutput, MAX_OUTPUT, ResultRef};
use crate::network::results::PROTOCOL;

/// How long it may take until a result is here, whole.
const WHOLE: Duration = Duration::from_secs(60);

/// Fetches a result and checks it against its commitment. `addresses` are where the node can be dialled, besides what the transport knows.
///
/// # Errors
/// `Corrupt` for bytes that are not what was committed to. `NotFound` where the node has no such result. `Unavailable` where it cannot be
/// reached, or broke off.
pub async fn fetch(
    transport: &Arc<dyn Transport>,
    addresses: Vec<String>,
    result: &ResultRef,
    commitment: &Hash32,
) -> Result<JobOutput> {
    let late = |_| PluginError::new(Code::DeadlineExceeded, format!("the result did not come within {} s", WHOLE.as_secs()));
    let bytes = tokio::time::timeout(WHOLE, ask(transport, addresses, result)).await.map_err(late)??;
    if bytes.is_empty() {
        let ResultRef { peer, id } = result;
        return Err(PluginError::not_found(format!("{peer} gives no result {id}: it has none, or has none any more")));
    }
    JobOutput::read(&bytes, commitment).map_err(|error| PluginError::new(Code::Corrupt, error.to_string()))
}

async fn ask(transport: &Arc<dyn Transport>, addresses: Vec<String>, result: &ResultRef) -> Result<Vec<u8>> {
    let (outgoing, stream) = Stream::channel(1);
    let destination = Destination { peer: result.peer.clone(), addresses, protocol: PROTOCOL.into() };
    outgoing.send(result.id.clone().into_bytes().into()).await?;
    drop(outgoing);
    let mut incoming = transport.open(&Cx::new().with_timeout(WHOLE), destination, stream).await?;
    let mut bytes = Vec::new();
    while let Some(piece) = incoming.next().await {
        bytes.extend_from_slice(&piece?);
        if bytes.len() > MAX_OUTPUT {
            return Err(PluginError::new(Code::Corrupt, format!("the node sends more than the {MAX_OUTPUT} bytes of a result")));
        }
    }
    Ok(bytes)
}
