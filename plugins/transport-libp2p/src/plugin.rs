//! The transport kind on top of the network: translation only.

use std::sync::Arc;

use fabstir_plugin_api::prelude::*;
use libp2p::Multiaddr;
use libp2p::identity::{PublicKey, ed25519};
use parking_lot::Mutex;

use crate::addresses::is_readable;
use crate::config::Settings;
use crate::error::NetworkError;
use crate::network::Network;
use crate::{arrivals, conversation};

/// A node of a libp2p network, as a transport plugin.
pub struct Libp2p {
    host: Host,
    settings: Settings,
    state: Mutex<State>,
}

enum State {
    Apart,
    Joining,
    Joined(Arc<Network>),
}

impl Libp2p {
    pub(crate) fn new(host: Host, settings: Settings) -> Self {
        Self { host, settings, state: Mutex::new(State::Apart) }
    }

    fn network(&self) -> Result<Arc<Network>, NetworkError> {
        match &*self.state.lock() {
            State::Joined(network) => Ok(network.clone()),
            State::Apart | State::Joining => Err(NetworkError::NotJoined),
        }
    }
}

/// Lets `join` be tried again after one that failed or was given up.
struct Attempt<'a>(&'a Libp2p);

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        if matches!(*state, State::Joining) {
            *state = State::Apart;
        }
    }
}

#[async_trait]
impl Lifecycle for Libp2p {
    async fn health(&self) -> Health {
        match self.network().ok().and_then(|network| network.lonely()) {
            Some(reason) => Health::Degraded { reason },
            None => Health::Ready,
        }
    }

    async fn shutdown(&self) {
        if let Ok(network) = self.network() {
            network.leave().await;
        }
    }
}

#[async_trait]
impl Transport for Libp2p {
    async fn join(&self, _: &Cx, join: Join) -> Result<Peer> {
        {
            let mut state = self.state.lock();
            match *state {
                State::Apart => *state = State::Joining,
                State::Joining | State::Joined(_) => return Err(NetworkError::JoinedAlready.into()),
            }
        }
        let _attempt = Attempt(self);
        let network = Network::join(join, self.settings.clone(), &self.host).await?;
        let addresses = network.addresses().await?;
        let id = PeerId(network.peer.to_string());
        *self.state.lock() = State::Joined(Arc::new(network));
        Ok(Peer { id, addresses, agent: None, rtt_ms: None })
    }

    async fn peer_id(&self, _: &Cx, public_key: Vec<u8>) -> Result<PeerId> {
        self.network()?;
        let key = ed25519::PublicKey::try_from_bytes(&public_key).map_err(|_| NetworkError::PublicKey)?;
        Ok(PeerId(PublicKey::from(key).to_peer_id().to_string()))
    }

    async fn addresses(&self, _: &Cx) -> Result<Vec<Address>> {
        Ok(self.network()?.addresses().await?)
    }

    async fn peers(&self, _: &Cx) -> Result<Vec<Peer>> {
        Ok(self.network()?.peers().await?)
    }

    async fn events(&self, _: &Cx) -> Result<Stream<Event>> {
        Ok(self.network()?.events())
    }

    async fn dial(&self, _: &Cx, address: Address) -> Result<PeerId> {
        let network = self.network()?;
        let address = readable(&address).ok_or(NetworkError::Address(address))?;
        Ok(PeerId(network.dial(address).await?.to_string()))
    }

    async fn advertise(&self, _: &Cx, topic: Topic) -> Result<()> {
        Ok(self.network()?.advertise(topic.try_into()?).await?)
    }

    async fn withdraw(&self, _: &Cx, topic: Topic) -> Result<()> {
        Ok(self.network()?.withdraw(topic.try_into()?).await?)
    }

    async fn find(&self, _: &Cx, topic: Topic) -> Result<Stream<Peer>> {
        Ok(self.network()?.find(topic.try_into()?).await?)
    }

    async fn listen(&self, _: &Cx, protocol: Protocol) -> Result<Stream<Arrival>> {
        Ok(self.network()?.arrivals.listen(&protocol)?)
    }

    async fn accept(&self, _: &Cx, arrival: u64, outgoing: Stream<Blob>) -> Result<Stream<Blob>> {
        let network = self.network()?;
        let line = network.arrivals.accept(arrival).await?;
        Ok(conversation::begin(line, outgoing, network.stall()))
    }

    async fn open(&self, _: &Cx, to: Destination, outgoing: Stream<Blob>) -> Result<Stream<Blob>> {
        let network = self.network()?;
        let peer: libp2p::PeerId = to.peer.0.parse().map_err(|_| NetworkError::PeerId(to.peer.0.clone()))?;
        let protocol = arrivals::named(&to.protocol)?;
        // What cannot be read may be of a newer form, and the others may do.
        let addresses = to.addresses.iter().filter_map(|address| readable(address)).collect();
        let line = network.open(peer, addresses, protocol).await?;
        Ok(conversation::begin(line, outgoing, network.stall()))
    }
}

fn readable(address: &str) -> Option<Multiaddr> {
    address.parse().ok().filter(is_readable)
}
