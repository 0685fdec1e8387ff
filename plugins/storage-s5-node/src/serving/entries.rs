//! Pointers for others, by the protocol of S5's registry: they are read, and moved by those whom the operator has named.

use bytes::Bytes;
use iroh::endpoint::Connection;
use s5_core::{StreamKey, StreamMessage};
use s5_registry::{GetResponse, RegistryRpcMessage, RpcProto, SetRequest};
use tokio::time::timeout;

use super::{House, PATIENCE, code, request};

impl House {
    pub(super) async fn serve_entries(&self, connection: &Connection, friend: bool) {
        let guest = friend.then(|| *connection.remote_id().as_bytes());
        while let Some(message) = request::next::<RpcProto>(connection).await {
            let answered = timeout(PATIENCE, async {
                match message {
                    RegistryRpcMessage::Get(asked) => match self.entry(&asked.inner.key).await {
                        Ok(message) => drop(asked.tx.send(GetResponse { message }).await),
                        // An answer would say that there is none.
                        Err(()) => connection.close(code::FAILED.into(), b"cannot be read"),
                    },
                    RegistryRpcMessage::Set(asked) => drop(asked.tx.send(self.take_entry(asked.inner, guest).await).await),
                    RegistryRpcMessage::Delete(asked) => {
                        let why = "entries are not deleted here: a deleted one could be followed by an older one";
                        drop(asked.tx.send(Err(why.to_owned())).await);
                    }
                    // Nobody is told of what comes later.
                    RegistryRpcMessage::Subscribe(_) => {}
                }
            });
            if answered.await.is_err() {
                return;
            }
        }
    }

    async fn entry(&self, key: &[u8]) -> Result<Option<Vec<u8>>, ()> {
        let Ok(place) = StreamKey::from_storage_key(key) else { return Ok(None) };
        let entry = self.registry.entry(&place).await.map_err(|_| ())?;
        Ok(entry.map(|entry| entry.serialize().to_vec()))
    }

    async fn take_entry(&self, set: SetRequest, guest: Option<[u8; 32]>) -> Result<(), String> {
        let guest = guest.ok_or("this node takes no pointers of yours")?;
        // Reading it checks its signature.
        let entry = StreamMessage::deserialize(Bytes::from(set.message)).map_err(|why| why.to_string())?;
        self.registry.store_for(guest, entry).await.map_err(|why| why.to_string())
    }
}
