//! Why something on the network failed.

use std::time::Duration;

use fabstir_plugin_api::prelude::*;

/// How long to wait before a busy peer is asked again.
const RETRY_BUSY: Duration = Duration::from_secs(1);

/// Every way in which the network can fail.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    #[error("the node has not joined the network yet: call `join` first")]
    NotJoined,
    #[error("the node has joined the network already")]
    JoinedAlready,
    #[error("the secret key has {0} bytes, an ed25519 key has 32")]
    SecretKey(usize),
    #[error("the public key is no ed25519 key: 32 bytes that are a point of the curve")]
    PublicKey,
    #[error("{0:?} is no peer id")]
    PeerId(String),
    #[error("{0:?} is no multiaddress: write it as /ip4/192.0.2.1/tcp/4001")]
    Address(String),
    #[error("{0:?} is no name of a protocol: it begins with / and has at most 128 bytes")]
    Protocol(String),
    #[error("the protocol {0} belongs to the transport itself")]
    ReservedProtocol(String),
    #[error("somebody listens for {0} already")]
    ListenedFor(String),
    #[error("a topic has 32 bytes, this one has {0}")]
    Topic(usize),
    #[error("a visitor advertises nothing: nobody could reach it")]
    Visitor,
    #[error("{0} topics are advertised, which is the limit: withdraw one or raise `topics`")]
    TooManyTopics(usize),
    /// The operating system does not let us listen.
    #[error("cannot listen on {address}: {cause}")]
    Listen { address: String, cause: String, denied: bool },
    #[error("cannot start the network: {0}")]
    Start(String),
    #[error("the network has been shut down")]
    Gone,
    #[error("cannot reach {whom}: {cause}")]
    Unreachable { whom: String, cause: String },
    #[error("no address is known of {0}")]
    NoAddress(String),
    #[error("the peer does not speak {0}")]
    NotSpoken(String),
    #[error("the peer is busy: try again, or another peer")]
    Busy,
    #[error("{0} conversations that this node began with the peer are open, which is the limit of one connection")]
    TooManyConversations(usize),
    #[error("nothing that is waiting has the number {0}: it was accepted, refused after 10 seconds, or given up by its peer")]
    NoArrival(u64),
    /// The peer or the connection is gone, in the middle of a conversation.
    #[error("the conversation broke off: {0}")]
    Broken(String),
    #[error("the peer broke the protocol: {0}")]
    Garbage(&'static str),
    #[error("the peer took nothing of what was sent to it for {0:?}")]
    Stalled(Duration),
    #[error("a message has 1 byte to 1 MiB, this one has {0} bytes")]
    MessageSize(usize),
    /// The caller ended its own direction with an error.
    #[error("this side gave the conversation up: {0}")]
    GivenUp(String),
}

impl From<NetworkError> for PluginError {
    fn from(error: NetworkError) -> Self {
        let code = match &error {
            NetworkError::SecretKey(_)
            | NetworkError::PublicKey
            | NetworkError::PeerId(_)
            | NetworkError::Address(_)
            | NetworkError::Protocol(_)
            | NetworkError::ReservedProtocol(_)
            | NetworkError::ListenedFor(_)
            | NetworkError::Topic(_)
            | NetworkError::Visitor
            | NetworkError::JoinedAlready
            | NetworkError::MessageSize(_) => Code::InvalidArgument,
            NetworkError::TooManyTopics(_) => Code::Full,
            NetworkError::Listen { denied: true, .. } => Code::Denied,
            NetworkError::Listen { .. } | NetworkError::Start(_) => Code::Internal,
            NetworkError::NotSpoken(_) => Code::Unimplemented,
            NetworkError::Busy | NetworkError::TooManyConversations(_) => Code::Overloaded,
            NetworkError::NoArrival(_) => Code::NotFound,
            NetworkError::GivenUp(_) => Code::Cancelled,
            NetworkError::NotJoined
            | NetworkError::Gone
            | NetworkError::Unreachable { .. }
            | NetworkError::NoAddress(_)
            | NetworkError::Broken(_)
            | NetworkError::Garbage(_)
            | NetworkError::Stalled(_) => Code::Unavailable,
        };
        let told = PluginError::new(code, error.to_string());
        if code == Code::Overloaded { told.retry_after(RETRY_BUSY) } else { told }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn busy_peers_are_to_be_asked_again_and_strangers_to_the_protocol_are_not() {
        let busy = PluginError::from(NetworkError::Busy);
        assert_eq!((busy.code, busy.retry_after_ms), (Code::Overloaded, Some(1000)));
        let stranger = PluginError::from(NetworkError::NotSpoken("/a/1".into()));
        assert_eq!((stranger.code, stranger.retry_after_ms), (Code::Unimplemented, None));
        assert!(!stranger.code.is_retryable());
    }

    #[test]
    fn an_address_that_is_forbidden_is_not_one_that_is_taken() {
        let listen = |denied| NetworkError::Listen { address: "/ip4/0.0.0.0/tcp/80".into(), cause: "no".into(), denied };
        assert_eq!(PluginError::from(listen(true)).code, Code::Denied);
        assert_eq!(PluginError::from(listen(false)).code, Code::Internal);
        assert!(PluginError::from(listen(false)).message.contains("/ip4/0.0.0.0/tcp/80"));
    }
}
