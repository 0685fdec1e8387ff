//! What other nodes may see and write.
//!
//! Whoever comes has proved its node id in the handshake, and is turned away there if it may not come in: until then it has cost a handshake,
//! of which only so many run at once. Inside, each has a few small windows, a few places, and so long for each step.

mod blobs;
mod checks;
mod entries;
mod places;
mod request;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use blob_folder::Store;
use iroh::Endpoint;
use iroh::endpoint::{Connection, Incoming, QuicTransportConfig, VarInt};
use parking_lot::Mutex;
use s5_blobs::{ALPN_ACL, ALPN_PUBLIC};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;

use crate::config::Settings;
use crate::registry::Registry;

use checks::Checks;
use places::Places;

/// With what a connection is closed.
pub mod code {
    /// There is no place.
    pub const BUSY: u32 = 1;
    /// Who has come may not come in.
    pub const NOT_ALLOWED: u32 = 2;
    /// What came is no request.
    pub const NO_REQUEST: u32 = 3;
    /// What was asked for cannot be read.
    pub const FAILED: u32 = 4;
}

/// Handshakes that run at once. When half of them run, whoever comes first shows that its address is its own.
const HANDSHAKES: usize = 256;

/// How long a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// How long a connection may have nothing to ask, or not take what it has asked for.
const PATIENCE: Duration = Duration::from_secs(60);

/// A stream of requests to this node may have so much on its way, and all of a connection four times as much.
const WINDOW: u32 = 64 << 10;

/// What may wait in memory for another node to take it.
const UNSENT: u64 = 2 << 20;

/// How this node lets others speak: in small requests, few at a time.
pub fn transport() -> QuicTransportConfig {
    QuicTransportConfig::builder()
        .max_concurrent_bidi_streams(VarInt::from_u32(4))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .stream_receive_window(VarInt::from_u32(WINDOW))
        .receive_window(VarInt::from_u32(4 * WINDOW))
        .send_window(UNSENT)
        .datagram_receive_buffer_size(None)
        .build()
}

/// A node that others reach. It ends when this goes.
#[derive(Debug)]
pub struct Serving {
    pub endpoint: Endpoint,
    doorman: Mutex<Option<JoinHandle<()>>>,
}

impl Serving {
    /// Opens the doors that the operator wants open. With none, whoever knocks is turned away.
    pub fn begin(endpoint: Endpoint, settings: &Settings, store: &Arc<Store>, registry: &Arc<Registry>) -> Self {
        let mut doors = Vec::new();
        if settings.serve_public {
            doors.push(ALPN_PUBLIC.to_vec());
        }
        if !settings.allow.is_empty() {
            doors.push(ALPN_ACL.to_vec());
        }
        if !doors.is_empty() {
            doors.push(s5_registry::ALPN.to_vec());
        }
        endpoint.set_alpns(doors);
        let house = House {
            me: *endpoint.id().as_bytes(),
            public: settings.serve_public,
            allow: settings.allow.clone(),
            checks: Checks::new(store.clone()),
            store: store.clone(),
            registry: registry.clone(),
            places: Default::default(),
        };
        let doorman = tokio::spawn(receive(endpoint.clone(), Arc::new(house)));
        Self { endpoint, doorman: Mutex::new(Some(doorman)) }
    }

    /// Lets nobody in any more, and says farewell to those who are here.
    pub async fn end(&self) {
        let doorman = self.doorman.lock().take();
        if let Some(doorman) = doorman {
            doorman.abort();
            let _ = doorman.await;
        }
        self.endpoint.close().await;
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        if let Some(doorman) = self.doorman.lock().take() {
            doorman.abort();
        }
    }
}

/// What there is to see, and for whom.
#[derive(Debug)]
struct House {
    me: [u8; 32],
    public: bool,
    allow: HashSet<[u8; 32]>,
    store: Arc<Store>,
    checks: Checks,
    registry: Arc<Registry>,
    /// Of each door.
    places: [Arc<Places>; 3],
}

async fn receive(endpoint: Endpoint, house: Arc<House>) {
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES));
    let mut guests = JoinSet::new();
    loop {
        tokio::select! {
            Some(_) = guests.join_next() => {}
            incoming = endpoint.accept() => {
                let Some(incoming) = incoming else { return };
                if handshakes.available_permits() < HANDSHAKES / 2 && !incoming.remote_addr_validated() {
                    // One that cannot be asked again is past this anyway.
                    let _ = incoming.retry();
                } else if let Ok(turn) = handshakes.clone().try_acquire_owned() {
                    guests.spawn(house.clone().let_in(incoming, turn));
                } else {
                    incoming.refuse();
                }
            }
        }
    }
}

impl House {
    async fn let_in(self: Arc<Self>, incoming: Incoming, turn: OwnedSemaphorePermit) {
        let Ok(accepting) = incoming.accept() else { return };
        let Ok(Ok(connection)) = timeout(HANDSHAKE, accepting).await else { return };
        drop(turn);
        let who = connection.remote_id();
        let friend = self.allow.contains(who.as_bytes());
        let door = connection.alpn().to_vec();
        if !friend && (!self.public || door == ALPN_ACL) {
            return connection.close(code::NOT_ALLOWED.into(), b"not allowed");
        }
        let door = [ALPN_PUBLIC, ALPN_ACL, s5_registry::ALPN].iter().position(|known| door == *known);
        let Some(door) = door else { return };
        let Some(_place) = self.places[door].take(who, friend) else {
            return connection.close(code::BUSY.into(), b"busy");
        };
        tokio::select! {
            () = self.serve(door, &connection, friend) => {}
            _ = connection.closed() => {}
        }
        connection.close(0u32.into(), b"");
    }

    async fn serve(&self, door: usize, connection: &Connection, friend: bool) {
        match door {
            0 | 1 => self.serve_blobs(connection).await,
            _ => self.serve_entries(connection, friend).await,
        }
    }
}
