//! Blobs for others, by S5's protocol. They change nothing here, and what is damaged is not there.

use blob_folder::{BlobError, Id, Opened, blocking};
use bytes::Bytes;
use ed25519_dalek::{Signature, VerifyingKey};
use iroh::endpoint::Connection;
use irpc::channel::mpsc;
use s5_blobs::rpc::{AuthChallengeResponse, AuthProve, DownloadBlob, Query, QueryResponse, RpcMessage, RpcProto};
use tokio::time::timeout;

use super::checks::{SMALL, found};
use super::{House, PATIENCE, code, request};

/// Bytes of one message.
const MESSAGE: usize = 64 << 10;

impl House {
    pub(super) async fn serve_blobs(&self, connection: &Connection) {
        let mut nonce = None;
        while let Some(message) = request::next::<RpcProto>(connection).await {
            let answered = timeout(PATIENCE, async {
                match message {
                    RpcMessage::AuthChallenge(asked) => {
                        let fresh = iroh::SecretKey::generate().to_bytes();
                        nonce = Some(fresh);
                        let _ = asked.tx.send(AuthChallengeResponse { nonce: fresh }).await;
                    }
                    RpcMessage::AuthProve(asked) => {
                        let _ = asked.tx.send(self.proved(connection, nonce.take(), &asked.inner)).await;
                    }
                    RpcMessage::Query(asked) => match self.look(&asked.inner).await {
                        Ok(answer) => drop(asked.tx.send(answer).await),
                        Err(_) => connection.close(code::FAILED.into(), b"cannot be read"),
                    },
                    RpcMessage::DownloadBlob(asked) => return Some(asked),
                    RpcMessage::UploadBlob(asked) => drop(asked.tx.send(Err(read_only())).await),
                    RpcMessage::DeleteBlob(asked) => drop(asked.tx.send(Err(read_only())).await),
                    RpcMessage::PinBlob(asked) => drop(asked.tx.send(Err(read_only())).await),
                }
                None
            });
            match answered.await {
                Ok(Some(download)) if self.send(&download.inner, &download.tx).await.is_err() => {
                    // A stream that ends early is no different from one of a shorter blob; a connection that fails is.
                    return connection.close(code::FAILED.into(), b"broken off");
                }
                Ok(_) => {}
                Err(_) => return,
            }
        }
    }

    /// Who has come this far may read already: the handshake has told who it is. S5's clients prove it once more.
    fn proved(&self, connection: &Connection, nonce: Option<[u8; 32]>, proof: &AuthProve) -> Result<(), String> {
        let nonce = nonce.ok_or("there was no challenge")?;
        let binding = s5_blobs::Client::f02_binding(&nonce, connection.remote_id().as_bytes(), &self.me);
        let signed = s5_blobs::Client::f02_signed_message(&binding);
        let key = VerifyingKey::from_bytes(&proof.acl_pubkey).map_err(|_| "no key")?;
        key.verify_strict(&signed, &Signature::from_bytes(&proof.sig_bytes())).map_err(|_| "a wrong signature".to_owned())
    }

    /// Whether a blob is here. It says so of one that is too large to be read through first, too.
    async fn look(&self, query: &Query) -> Result<QueryResponse, BlobError> {
        let id = Id(query.hash);
        if query.blinded {
            return Ok(QueryResponse::default());
        }
        let Some(opened) = self.open(id).await? else { return Ok(QueryResponse::default()) };
        let exists = match self.store.verdict(id, opened.stamp) {
            Some(sound) => sound,
            None if opened.size <= SMALL => self.checks.is_sound(id, opened.stamp).await,
            None => true,
        };
        Ok(QueryResponse { exists, size: exists.then_some(opened.size), ..QueryResponse::default() })
    }

    async fn open(&self, id: Id) -> Result<Option<Opened>, BlobError> {
        let store = self.store.clone();
        blocking(move || store.open_file(id)).await
    }

    /// Sends a blob or a part of it. What is not here ends without a byte; an error means that what was sent is not all.
    async fn send(&self, asked: &DownloadBlob, to: &mpsc::Sender<Bytes>) -> Result<(), BlobError> {
        let id = Id(asked.hash);
        let Some(opened) = self.open(id).await? else { return Ok(()) };
        let (stamp, size) = (opened.stamp, opened.size);
        let is_part = asked.offset > 0 || asked.max_len.is_some_and(|most| most < size);
        let mut verdict = self.store.verdict(id, stamp);
        if verdict.is_none() && (is_part || size <= SMALL) {
            verdict = Some(self.checks.is_sound(id, stamp).await);
        }
        if verdict == Some(false) || asked.offset > size {
            return Ok(());
        }
        let (offset, length) = (asked.offset, asked.max_len);
        let mut reader = blocking(move || opened.read(offset, length)).await?;
        if verdict == Some(true) {
            reader = reader.trusting();
        }
        loop {
            let (piece, rest) = blocking(move || Ok::<_, BlobError>((reader.next_piece(), reader))).await?;
            reader = rest;
            match piece {
                Ok(Some(piece)) => send_piece(piece.into(), to).await?,
                Ok(None) => break,
                Err(error) => {
                    if matches!(error, BlobError::Corrupt { .. }) {
                        found(&self.store, id, stamp, false);
                    }
                    return Err(error);
                }
            }
        }
        if verdict.is_none() {
            found(&self.store, id, stamp, true);
        }
        Ok(())
    }
}

async fn send_piece(mut piece: Bytes, to: &mpsc::Sender<Bytes>) -> Result<(), BlobError> {
    while !piece.is_empty() {
        let message = piece.split_to(piece.len().min(MESSAGE));
        match timeout(PATIENCE, to.send(message)).await {
            Ok(Ok(())) => {}
            _ => return Err(BlobError::Cancelled),
        }
    }
    Ok(())
}

fn read_only() -> String {
    "blobs come in by the node alone".to_owned()
}
