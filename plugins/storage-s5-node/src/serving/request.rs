//! Requests as they come from a connection. Each is small, whatever it claims.

use iroh::endpoint::{Connection, RecvStream};
use irpc::rpc::RemoteService;
use tokio::time::timeout;

use super::{PATIENCE, code};

/// The most bytes of a request: the largest that is answered here is an entry of the registry.
const LARGEST: u64 = 4 << 10;

/// The next request; `None` when there is none to come. A connection that sends something else is closed.
pub async fn next<S: RemoteService>(connection: &Connection) -> Option<S::Message> {
    let came = timeout(PATIENCE, async {
        let (tx, mut rx) = connection.accept_bi().await.ok()?;
        let request = read::<S>(&mut rx).await;
        if request.is_none() {
            connection.close(code::NO_REQUEST.into(), b"no request");
        }
        Some((request?, rx, tx))
    });
    let (request, rx, tx) = came.await.ok()??;
    Some(request.with_remote_channels(rx, tx))
}

/// A request is its length in groups of seven bits, lowest first, and then itself.
async fn read<S: RemoteService>(rx: &mut RecvStream) -> Option<S> {
    let mut length = 0;
    for shift in [0, 7] {
        let mut byte = [0];
        rx.read_exact(&mut byte).await.ok()?;
        length |= u64::from(byte[0] & 0x7f) << shift;
        if byte[0] & 0x80 == 0 {
            break;
        }
        if shift == 7 {
            return None;
        }
    }
    if length > LARGEST {
        return None;
    }
    let mut bytes = vec![0; length as usize];
    rx.read_exact(&mut bytes).await.ok()?;
    postcard::from_bytes(&bytes).ok()
}
