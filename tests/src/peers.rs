//! Nodes that find each other, on loopback.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::{LIMIT, Node, Place, eventually};

/// The entry of a transport on a free port of this machine, which finds nobody by itself.
pub const NET: &str = "[[plugin]]\nid = 'net'\nuse = 'transport-libp2p'\n\
                       config = { listen = ['/ip4/127.0.0.1/tcp/0'], mdns = false }\n";

/// A transport entry that begins with a node.
pub fn net_from(bootstrap: &str) -> String {
    NET.replace("mdns = false", &format!("mdns = false, bootstrap = ['{bootstrap}']"))
}

/// A node that peers can reach.
pub struct Provider {
    pub node: Node,
    /// `/ip4/127.0.0.1/tcp/PORT/p2p/ID`.
    pub address: String,
}

impl Provider {
    /// Starts a node with these entries and a transport.
    pub async fn start(entries: &str) -> Self {
        Self::of(Node::start(&format!("{NET}{entries}")).await).await
    }

    pub async fn of(node: Node) -> Self {
        let address = eventually("the node has joined", LIMIT, async || {
            let log = node.log();
            let line = log.lines().rev().find(|line| line.contains("Joined the network."))?;
            let mut words = line.split([' ', '"', '=']).filter(|word| word.starts_with("/ip4/127.0.0.1/tcp/"));
            let address = words.next()?;
            let peer = line.split_once("peer=")?.1.split_whitespace().next()?;
            Some(if address.contains("/p2p/") { address.to_owned() } else { format!("{address}/p2p/{peer}") })
        })
        .await;
        Self { node, address }
    }

    pub fn port(&self) -> u16 {
        let port = self.address.split('/').nth(4).and_then(|port| port.parse().ok());
        port.unwrap_or_else(|| panic!("no port in {}", self.address))
    }

    /// The same node's address behind another port.
    pub fn address_behind(&self, port: u16) -> String {
        self.address.replace(&format!("/tcp/{}/", self.port()), &format!("/tcp/{port}/"))
    }
}

/// Starts `connect` for a model, and waits until the model is served.
pub async fn connect(model: &str, bootstrap: &[&str]) -> Node {
    let mut arguments = vec!["connect", "--model", model, "--listen", "127.0.0.1:0", "--log", "info"];
    arguments.extend(bootstrap.iter().flat_map(|address| ["--bootstrap", address]));
    let node = Node::start_command(Place::new(NET), &arguments);
    node.healthy().await;
    node
}

/// A way to a port that can be cut: what runs through it breaks, and nothing new comes through until it is mended.
pub struct Wire {
    pub port: u16,
    open: Arc<AtomicBool>,
    cut: watch::Sender<u64>,
}

impl Wire {
    pub async fn to(port: u16) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let (open, (cut, cuts)) = (Arc::new(AtomicBool::new(true)), watch::channel(0));
        let wire = Self { port: listener.local_addr()?.port(), open: open.clone(), cut };
        tokio::spawn(async move {
            while let Ok((mut near, _)) = listener.accept().await {
                if !open.load(Ordering::SeqCst) {
                    continue;
                }
                let mut cuts = cuts.clone();
                cuts.mark_unchanged();
                tokio::spawn(async move {
                    let Ok(mut far) = TcpStream::connect(("127.0.0.1", port)).await else { return };
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
                        _ = cuts.changed() => {}
                    }
                });
            }
        });
        Ok(wire)
    }

    pub fn cut(&self) {
        self.open.store(false, Ordering::SeqCst);
        self.cut.send_modify(|cuts| *cuts += 1);
    }

    pub fn mend(&self) {
        self.open.store(true, Ordering::SeqCst);
    }

    pub async fn cut_for(&self, time: Duration) {
        self.cut();
        tokio::time::sleep(time).await;
        self.mend();
    }
}
