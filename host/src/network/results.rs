//! Results of posted jobs, given to whoever asks for them by their content id.
//!
//! The asker sends one message, the 64 hexadecimal digits of the id. The node answers with the document's bytes, in messages of at most
//! [`PIECE`] bytes, and ends. What is no result of a job of this node is not given: then the conversation ends without a byte.

use std::sync::Arc;
use std::time::Duration;

use fabstir_plugin_api::abi::Blob;
use fabstir_plugin_api::context::Cx;
use fabstir_plugin_api::error::{Code, PluginError, Result};
use fabstir_plugin_api::storage::{self, Storage};
use fabstir_plugin_api::stream::{Sender, Stream};
use fabstir_plugin_api::transport::{Arrival, Transport};
use tokio::sync::watch;

use super::{QUESTION, until_read};
use crate::market::{Seller, posting};
use crate::routes::Routes;

/// The protocol's name.
pub const PROTOCOL: &str = "/fabstir/result/1";

/// The largest message of an answer.
pub const PIECE: usize = 256 << 10;

/// How long giving a result may take, from the question to the last byte.
const WHOLE: Duration = Duration::from_secs(120);

/// Gives one result to one peer.
pub(super) async fn give(seller: Arc<Seller>, transport: Arc<dyn Transport>, arrival: Arrival) -> Result<()> {
    let (outgoing, stream) = Stream::channel(2);
    let mut incoming = transport.accept(&Cx::new().with_timeout(WHOLE), arrival.id, stream).await?;
    let question = tokio::time::timeout(QUESTION, incoming.next()).await.ok().flatten().transpose()?;
    let Some(id) = question.and_then(|question| id_of(&question)) else { return Ok(()) };
    if seller.journal.is_result(&id).await? {
        // Dropped at the limit, or with an error: the asker hears of it, and asks again.
        tokio::time::timeout(WHOLE, send(seller.routes.clone(), id, &outgoing))
            .await
            .map_err(|_| PluginError::new(Code::DeadlineExceeded, "the peer did not take the result in time"))??;
    }
    // An end without a byte is an answer too: there is no such result.
    drop(outgoing);
    until_read(incoming).await;
    Ok(())
}

/// A content id, if this is one.
fn id_of(question: &[u8]) -> Option<String> {
    let is_id = question.len() == 64 && question.iter().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    is_id.then(|| String::from_utf8_lossy(question).into_owned())
}

/// Sends the bytes from the first place that has them. Another place is tried only as long as nothing was sent.
async fn send(routes: watch::Receiver<Arc<Routes>>, id: String, outgoing: &Sender<Blob>) -> Result<()> {
    let places: Vec<Arc<dyn Storage>> = routes.borrow().storage.iter().map(|route| route.client.clone()).collect();
    let mut missing = PluginError::unavailable("no storage plugin is ready");
    for place in places {
        match read_blob(&*place, id.clone()).await {
            Ok(bytes) => {
                for piece in bytes.chunks(PIECE) {
                    outgoing.send(piece.to_vec().into()).await?;
                }
                return Ok(());
            }
            Err(error) => missing = error,
        }
    }
    // The peer sees the conversation break off, which is what happened: the bytes are promised, and cannot be read.
    outgoing.try_fail(missing.clone());
    Err(missing)
}

/// The bytes of a blob that is no larger than results are, checked by the storage against their id.
pub async fn read_blob(place: &dyn Storage, id: String) -> Result<Vec<u8>> {
    let mut stream = place.get(&Cx::new().with_timeout(WHOLE), id, storage::Range::default()).await?;
    let mut bytes = Vec::new();
    while let Some(piece) = stream.next().await {
        bytes.extend_from_slice(&piece?);
        if bytes.len() > posting::MAX_OUTPUT {
            return Err(PluginError::new(Code::Corrupt, "a stored result is larger than results are"));
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_is_64_lower_case_digits_and_nothing_else() {
        let id = "0a".repeat(32);
        assert_eq!(id_of(id.as_bytes()), Some(id.clone()));
        for wrong in ["", "0a", &id.to_uppercase(), &id[1..], &format!("{id}0"), &"zz".repeat(32)] {
            assert_eq!(id_of(wrong.as_bytes()), None, "{wrong}");
        }
    }
}
