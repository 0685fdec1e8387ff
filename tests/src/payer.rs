//! A client of the market that does what a test wants, honest or not: with the real plugins, opened in the test's own process.

use std::time::Duration;

use fabstir_host::identity::Account as Key;
use fabstir_host::market::posting::{JobOutput, ResultRef};
use fabstir_host::market::transcript::{self, AnswerHash};
use fabstir_host::market::{Desk, Limits, Prices};
use fabstir_host::network::session::wire::{self, Ask, Tell};
use fabstir_host::supervisor::Connected;
use fabstir_plugin_api::abi::Blob;
use fabstir_plugin_api::chain::{Act, Amount, Chain, Hash32, Signature, Terms, Voucher};
use fabstir_plugin_api::context::Cx;
use fabstir_plugin_api::error::PluginError;
use fabstir_plugin_api::inference::{Chunk, Done, Generation, Input, Message, Sampling};
use fabstir_plugin_api::interface::Interface;
use fabstir_plugin_api::plugin::{Configure, Plugin};
use fabstir_plugin_api::stream::{Sender, Stream};
use fabstir_plugin_api::transport::{Destination, Join, PeerId, Role, Transport};
use k256::ecdsa::SigningKey;
use serde_json::json;
use sha3::{Digest, Keccak256};
use tempfile::TempDir;

use crate::dev_chain::DevChain;
use crate::market::Account;
use crate::{LIMIT, library};

/// A client with an account and a name in the network.
pub struct Payer {
    pub desk: Desk,
    pub peer: PeerId,
    transport: std::sync::Arc<dyn Transport>,
    key: &'static str,
    _open: [Connected; 2],
    _folder: TempDir,
}

fn cx() -> Cx {
    Cx::new().with_timeout(LIMIT)
}

async fn open(plugin: &str, folder: &TempDir, config: serde_json::Value) -> Connected {
    let connected = Connected::in_process(&library(plugin), plugin).expect("the plugin opens");
    let state_dir = folder.path().join(plugin);
    std::fs::create_dir_all(&state_dir).expect("a folder can be made");
    let configure = Configure { instance: plugin.into(), state_dir, config: config.to_string(), log_level: "error".into() };
    let client = <dyn Plugin as Interface>::client(connected.session.clone());
    client.configure(&cx(), configure).await.expect("the plugin takes its configuration");
    connected
}

impl Payer {
    pub async fn start(chain: &DevChain, account: Account) -> Self {
        let folder = tempfile::tempdir().expect("a folder can be made");
        let net = open("transport-libp2p", &folder, json!({ "listen": [], "mdns": false })).await;
        let base = open("chain-base", &folder, chain.config()).await;
        let transport = <dyn Transport as Interface>::client(net.session.clone());
        let secret: [u8; 32] = rand::random();
        let joined = transport.join(&cx(), Join { secret_key: secret.to_vec(), role: Role::Visitor }).await;
        let peer = joined.expect("the network is joined").id;
        let key = Key::from_hex(account.key.as_bytes()).expect("a key");
        let limits = Limits { value_wei: u128::MAX, fee_wei: u128::MAX, daily_fee_wei: u128::MAX };
        let chain = <dyn Chain as Interface>::client(base.session.clone());
        let desk = Desk::begin(chain, key, limits).await.expect("the account acts");
        Self { desk, peer, transport, key: account.key, _open: [net, base], _folder: folder }
    }

    /// A conversation with a node, at its address.
    pub async fn talk(&self, address: &str) -> Talk {
        let peer = self.transport.dial(&cx(), address.to_owned()).await.expect("the node answers");
        let destination = Destination {
            peer: peer.clone(),
            addresses: vec![address.to_owned()],
            protocol: fabstir_host::network::session::PROTOCOL.into(),
        };
        let (outgoing, stream) = Stream::channel(64);
        let incoming = self.transport.open(&Cx::new(), destination, stream).await.expect("the node converses");
        let mut talk = Talk { peer, outgoing, incoming, ids: 0 };
        talk.say(&Ask::Hello { version: wire::VERSION }).await;
        assert!(matches!(talk.hear().await.0, Tell::Welcome { .. }));
        talk
    }

    /// What came of a posted job, from the node at an address.
    pub async fn result(&self, address: &str, result: &ResultRef, commitment: &Hash32) -> Result<JobOutput, PluginError> {
        fabstir_host::consumer::fetch(&self.transport, vec![address.to_owned()], result, commitment).await
    }

    /// The terms that the node offers for a model.
    pub async fn offer(&self, talk: &mut Talk, model: &str) -> Result<Offered, PluginError> {
        let id = talk.id();
        talk.say(&Ask::Price { id, model: model.into(), client: self.desk.account.clone() }).await;
        match talk.about(id).await {
            Tell::Offer { terms, signature, credit, .. } => Ok(Offered { terms: *terms, offer: signature, credit }),
            Tell::Failed { refusal, .. } => Err(refusal),
            other => panic!("{other:?}"),
        }
    }

    /// Puts the deposit down, and waits until it is in a block.
    pub async fn deposit(&self, offered: &Offered, deposit: u128) -> String {
        let act = Act::OpenSession { terms: offered.terms.clone(), deposit: Amount(deposit), offer: offered.offer.clone() };
        let progress = self.desk.follow(format!("open-{}", offered.terms.nonce), act, LIMIT).await.expect("the session opens");
        progress.made.expect("a session has an id")
    }

    /// The first voucher, which binds the session to the two peers.
    pub async fn first(&self, talk: &Talk, offered: &Offered) -> Voucher {
        let session = self.desk.chain.session_id(&cx(), offered.terms.clone()).await.expect("an id");
        let transcript = transcript::begin(&transcript::nothing(), &session, &talk.peer, &self.peer);
        let (host, amount) = (offered.terms.host.clone(), Amount(0));
        Voucher { session, host, amount, input_tokens: 0, output_tokens: 0, transcript }
    }

    pub async fn sign(&self, voucher: &Voucher) -> Signature {
        let payload = self.desk.chain.voucher_payload(&cx(), voucher.clone()).await.expect("a payload");
        self.desk.sign(&payload).expect("the policy knows a voucher")
    }

    /// A signature over a voucher as another contract or another chain would have it.
    pub async fn sign_for_elsewhere(&self, voucher: &Voucher) -> Signature {
        let mut payload = self.desk.chain.voucher_payload(&cx(), voucher.clone()).await.expect("a payload");
        payload[5] ^= 1;
        let key = SigningKey::from_slice(&hex::decode(self.key).expect("digits")).expect("a key");
        let (signature, id) = key.sign_prehash_recoverable(&Keccak256::digest(&payload)).expect("signs");
        [&signature.to_bytes()[..], &[27 + u8::from(id.is_y_odd())]].concat()
    }

    pub async fn fund(&self, talk: &mut Talk, offered: &Offered, voucher: &Voucher) -> Result<Amount, PluginError> {
        let signature = self.sign(voucher).await;
        let before = transcript::nothing();
        self.fund_with(talk, offered, before, voucher, signature).await
    }

    pub async fn fund_with(
        &self,
        talk: &mut Talk,
        offered: &Offered,
        before: Hash32,
        voucher: &Voucher,
        signature: Signature,
    ) -> Result<Amount, PluginError> {
        let id = talk.id();
        let (terms, offer) = (Box::new(offered.terms.clone()), offered.offer.clone());
        talk.say(&Ask::Fund { id, terms, offer, before, voucher: Box::new(voucher.clone()), signature }).await;
        match talk.about(id).await {
            Tell::Funded { deposit, .. } => Ok(deposit),
            Tell::Failed { refusal, .. } => Err(refusal),
            other => panic!("{other:?}"),
        }
    }

    /// A session that is open and funded, with its first voucher.
    pub async fn session(&self, talk: &mut Talk, model: &str, deposit: u128) -> (Offered, Voucher) {
        let offered = self.offer(talk, model).await.expect("an offer");
        self.deposit(&offered, deposit).await;
        let first = self.first(talk, &offered).await;
        self.fund(talk, &offered, &first).await.expect("the node sees the deposit");
        (offered, first)
    }
}

/// What a node offers.
#[derive(Debug, Clone)]
pub struct Offered {
    pub terms: Terms,
    pub offer: Signature,
    pub credit: Amount,
}

impl Offered {
    pub fn prices(&self) -> Prices {
        Prices { input_per_mtok: self.terms.price_input_per_mtok.0, output_per_mtok: self.terms.price_output_per_mtok.0 }
    }
}

/// A conversation under the session protocol.
pub struct Talk {
    pub peer: PeerId,
    outgoing: Sender<Blob>,
    incoming: Stream<Blob>,
    ids: u64,
}

/// What has arrived of an answer.
#[derive(Debug)]
pub struct Heard {
    pub output_tokens: u64,
    pub hash: AnswerHash,
    pub end: Option<Result<Done, PluginError>>,
}

impl Talk {
    pub fn id(&mut self) -> u64 {
        self.ids += 1;
        self.ids
    }

    pub async fn say(&self, ask: &Ask) -> Vec<u8> {
        let message = wire::encode(ask).expect("a message fits");
        let bytes = message.to_vec();
        // A node that was killed hears nothing; the test finds out when it listens.
        let _ = self.outgoing.send(message).await;
        bytes
    }

    /// The next message and its bytes.
    pub async fn try_hear(&mut self, limit: Duration) -> Option<(Tell, Vec<u8>)> {
        let message = tokio::time::timeout(limit, self.incoming.next()).await.ok()??.ok()?;
        Some((wire::decode(&message).expect("a message"), message.to_vec()))
    }

    pub async fn hear(&mut self) -> (Tell, Vec<u8>) {
        self.try_hear(LIMIT).await.expect("the node says something")
    }

    /// The next message about this id.
    pub async fn about(&mut self, wanted: u64) -> Tell {
        loop {
            let (tell, _) = self.hear().await;
            match &tell {
                Tell::Offer { id, .. } | Tell::Funded { id, .. } | Tell::Settling { id, .. } if *id == wanted => return tell,
                Tell::Failed { id, .. } | Tell::Chunk { id, .. } if *id == wanted => return tell,
                _ => {}
            }
        }
    }

    /// What the node says to a voucher: why it is not taken, or `None` where it has nothing to say within a moment.
    pub async fn pay(&mut self, voucher: &Voucher, signature: Signature) -> Option<PluginError> {
        self.say(&Ask::Pay { voucher: Box::new(voucher.clone()), signature, answers: vec![] }).await;
        // Messages are answered in order, so the answer to a question after it says that it was looked at.
        let id = self.id();
        self.say(&Ask::Settle { id, paid_by: "0x00".into() }).await;
        let mut why = None;
        loop {
            match self.hear().await.0 {
                Tell::Unpaid { why: refusal, .. } => why = Some(refusal),
                Tell::Failed { id: answered, .. } if answered == id => return why,
                _ => {}
            }
        }
    }

    /// Asks for an answer, paid by this session.
    pub async fn ask(&mut self, model: &str, prompt: &str, paid_by: Option<&str>) -> (u64, Heard) {
        let id = self.id();
        let request = Box::new(request(model, prompt));
        let infer =
            self.say(&Ask::Infer { id, request, window: 256, timeout_ms: 60_000, paid_by: paid_by.map(str::to_owned) }).await;
        (id, Heard { output_tokens: 0, hash: AnswerHash::new(&infer), end: None })
    }

    /// Reads one piece; `false` where nothing came in this time, or the answer has ended.
    pub async fn read(&mut self, id: u64, heard: &mut Heard, limit: Duration) -> bool {
        let until = tokio::time::Instant::now() + limit;
        loop {
            let Some((tell, bytes)) = self.try_hear(until - tokio::time::Instant::now()).await else { return false };
            match tell {
                Tell::Chunk { id: of, seq, chunk } if of == id => {
                    heard.hash.piece(&bytes);
                    self.say(&Ask::Read { id, next: seq + 1 }).await;
                    match chunk {
                        Chunk::Text(text) => heard.output_tokens += u64::from(text.tokens),
                        Chunk::Done(done) => {
                            heard.end = Some(Ok(done));
                            return false;
                        }
                    }
                    return true;
                }
                Tell::Failed { id: of, refusal, .. } if of == id => {
                    heard.end = Some(Err(refusal));
                    return false;
                }
                _ => {}
            }
        }
    }
}

/// A request for a long answer.
pub fn request(model: &str, prompt: &str) -> Generation {
    let message = Message { role: "user".into(), content: prompt.into(), name: None };
    Generation {
        model: model.into(),
        input: Input::Messages(vec![message]),
        sampling: Sampling { temperature: 0.0, ..Sampling::default() },
        max_tokens: None,
        stop: vec![],
        format: Default::default(),
        logprobs: None,
        cache_salt: String::new(),
        priority: 0,
    }
}
