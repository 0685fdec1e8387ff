//! Chain: the market's ledger, where jobs are posted, sessions are funded and work is paid.

use std::fmt;
use std::num::ParseIntError;
use std::str::FromStr;

use async_trait::async_trait;
use fabstir_plugin_macros::interface;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::context::Cx;
use crate::error::Result;
use crate::stream::Stream;

/// Reads the market's contracts, and acts on them for one account.
///
/// A plugin holds no key. What must be signed it asks for on the stream of [`Chain::begin`], and the host's policy decides. What it
/// was asked to do it keeps on disk from before anything is sent until it can no longer be undone, through restarts of either side: the
/// same bytes are sent again, and no order is carried out twice.
///
/// What cannot be read is an error. No method answers from a guess because the chain is out of reach: a check of a payment that could
/// not be made has failed. A start does not need the chain: methods that do answer `Unavailable` until it is there.
///
/// # How sure something is
///
/// A block can be taken back. [`Sure`] says how unlikely that is, and the caller chooses by what it would lose.
#[interface(kind = "chain", version = "1.0")]
#[async_trait]
pub trait Chain: Send + Sync {
    /// Which chain this is, and where the market is on it. As configured: answers without asking the chain.
    async fn network(&self, cx: &Cx) -> Result<ChainNetwork>;

    /// The newest block of each [`Sure`].
    ///
    /// # Errors
    /// `Unavailable` when no endpoint answers, or those that answer are of another chain; so does every method below that reads.
    async fn heads(&self, cx: &Cx) -> Result<Heads>;

    /// What has happened in the market since then, and happens from now on.
    /// Never ends by itself.
    ///
    /// At least once, in the order of the chain, without a gap: blocks that cannot be read now are read later, and nothing after them
    /// comes before. Keep the cursor of the last notice together with what it led to. Where a block was taken back, a
    /// [`Notice::Back`] says up to which block the chain agrees with what was told; everything after it is to be undone, and what has
    /// happened instead follows.
    ///
    /// # Errors
    /// `InvalidArgument` for a cursor that is none of this plugin's.
    async fn events(&self, cx: &Cx, since: Since) -> Result<Stream<Notice>>;

    /// A posted job as it stands.
    ///
    /// # Errors
    /// `NotFound`.
    async fn job(&self, cx: &Cx, job: JobId, sure: Sure) -> Result<Job>;

    /// The word under which a proof of a delivered job names it: chain, contract, job, client, host, model, input, output, trace and
    /// counts in one. Below 2^248.
    ///
    /// # Errors
    /// `NotFound`, also before the job is delivered.
    async fn subject(&self, cx: &Cx, job: JobId, sure: Sure) -> Result<Hash32>;

    /// The statement that the market's contracts have for a kind of proof and a program: what an accepted proof says.
    ///
    /// # Errors
    /// `NotFound` when no contract checks such proofs.
    async fn proof_statement(&self, cx: &Cx, kind: u8, program: Hash32) -> Result<String>;

    /// Where the positions of a delivered job are drawn at which an output head is to be proven: the hash of the block after the one in
    /// which the result was handed in.
    ///
    /// # Errors
    /// `NotFound` for a job without a trace. `Unavailable` until that block is there.
    async fn draw(&self, cx: &Cx, job: JobId) -> Result<Hash32>;

    /// A session as it stands: whether it is funded is decided by this and by nothing that a peer says.
    ///
    /// # Errors
    /// `NotFound`.
    async fn session(&self, cx: &Cx, session: SessionId, sure: Sure) -> Result<Session>;

    /// What an account has, and what the market holds for it.
    async fn balances(&self, cx: &Cx, account: Account) -> Result<Balances>;

    /// The name on this chain of the model whose [`Loaded::digest`](crate::inference::Loaded::digest) is given. Asks nobody.
    ///
    /// # Errors
    /// `InvalidArgument` unless it is 64 hexadecimal digits.
    async fn model_id(&self, cx: &Cx, digest: String) -> Result<ModelId>;

    /// The bytes that a node signs to offer these terms to a client. Asks nobody.
    ///
    /// # Errors
    /// `InvalidArgument` for terms that the contract cannot hold.
    async fn offer_payload(&self, cx: &Cx, terms: Terms) -> Result<Payload>;

    /// The name of the session that these terms make when they are funded. Asks nobody.
    ///
    /// # Errors
    /// As `offer_payload`.
    async fn session_id(&self, cx: &Cx, terms: Terms) -> Result<SessionId>;

    /// The bytes that a client signs to promise what is in a voucher. Asks nobody.
    ///
    /// # Errors
    /// `InvalidArgument` for a voucher that the contract cannot hold.
    async fn voucher_payload(&self, cx: &Cx, voucher: Voucher) -> Result<Payload>;

    /// Who signed a payload of `offer_payload` or `voucher_payload`. Asks nobody: that this account is the right one, and that the session can pay, is the
    /// caller's to compare.
    ///
    /// # Errors
    /// `InvalidArgument` for what is no signature.
    async fn signer(&self, cx: &Cx, payload: Payload, signature: Signature) -> Result<Account>;

    /// Acts for this account from now on, until the stream is dropped; what was under way for it goes on. The stream is what must be
    /// signed: answer each with `signed`. One account at a time.
    ///
    /// # Errors
    /// `InvalidArgument` for what is no account, or while another one is acted for. `Unavailable` where another process acts for it with the same state.
    async fn begin(&self, cx: &Cx, account: Account) -> Result<Stream<Signing>>;

    /// Answers a [`Signing`], with a signature or with why there is none. An answer to one that is not waited for any more is ignored.
    ///
    /// # Errors
    /// `InvalidArgument` for a signature that is not the account's over that payload.
    async fn signed(&self, cx: &Cx, answer: Signed) -> Result<()>;

    /// Takes an order and returns once it is on disk; it is carried out from then on. An order that is known by its key already is not
    /// taken again: its progress is returned.
    ///
    /// # Errors
    /// `InvalidArgument` when the key is known for another act, or no account is acted for. `Full` when it cannot be kept: then nothing is done.
    async fn act(&self, cx: &Cx, order: Order) -> Result<Progress>;

    /// How far an order is.
    ///
    /// # Errors
    /// `NotFound` for a key that was never taken. `InvalidArgument` while no account is acted for; so do `progresses` and `quote`.
    async fn progress(&self, cx: &Cx, key: String) -> Result<Progress>;

    /// The progress of every order that is not final, and then each change. A reader that falls behind is told each order's newest
    /// state, not every one in between.
    async fn progresses(&self, cx: &Cx) -> Result<Stream<Progress>>;

    /// What an act would cost now, and whether it would be refused. Nothing is sent.
    async fn quote(&self, cx: &Cx, act: Act) -> Result<Quote>;
}

/// An amount of money in the smallest unit of its coin (wei). Text of decimal digits, since many formats have no number that large.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Amount(pub u128);

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for Amount {
    type Err = ParseIntError;

    fn from_str(text: &str) -> Result<Self, ParseIntError> {
        text.parse().map(Amount)
    }
}

impl Serialize for Amount {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Amount {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(|error| serde::de::Error::custom(format!("`{text}` is no amount: {error}")))
    }
}

impl JsonSchema for Amount {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Amount".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({ "type": "string", "pattern": "^[0-9]{1,39}$" })
    }
}

/// An account, in the chain's own form: `0x` and 40 hexadecimal digits. The one of 40 zeros stands for the chain's own coin where a
/// coin is named.
pub type Account = String;
/// 32 bytes as `0x` and 64 hexadecimal digits, in lower case.
pub type Hash32 = String;
/// The name of a model on the chain.
pub type ModelId = Hash32;
/// The name of a funded session.
pub type SessionId = Hash32;
/// The number of a posted job.
pub type JobId = u64;
/// What is signed: the signature is over the hash that the chain makes of it.
pub type Payload = Vec<u8>;
/// A signature: 65 bytes, r, s and 27 or 28.
pub type Signature = Vec<u8>;

/// Which chain, and where the market is on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ChainNetwork {
    /// Its name in CAIP-2: `eip155:8453`.
    pub chain: String,
    /// Its coin: `ETH`.
    pub coin: String,
    /// The market's contracts: nothing else is sent anything.
    pub contracts: Vec<Account>,
    /// What the EIP-712 payloads of this market begin with, after 0x19 0x01.
    pub domain: Hash32,
}

/// How sure it is that something stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Sure {
    /// In the newest block.
    Latest,
    /// In a block that its chain calls safe.
    Safe,
    /// In a block that is never taken back.
    Final,
}

/// A block.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Block {
    pub number: u64,
    pub hash: Hash32,
    /// Its time, in seconds since 1970: the clock of the contracts.
    pub time_s: u64,
}

/// The newest blocks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Heads {
    pub latest: Block,
    pub safe: Block,
    #[serde(rename = "final")]
    pub final_: Block,
}

/// A place in the market's history: text whose form is the plugin's own.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Cursor(pub String);

/// From where on events are told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Since {
    /// The first block of the market, as the plugin's configuration names it.
    Beginning,
    After(Cursor),
}

/// One item of [`Chain::events`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Notice {
    /// Something happened.
    Event { cursor: Cursor, block: Block, event: MarketEvent },
    /// Everything up to here has been told. Comes at least once per round of reading that found nothing else.
    UpTo { cursor: Cursor, block: Block },
    /// The chain has taken back every event of a block above this number; all of them where it is `None`. Reading goes on from the cursor,
    /// which may be one that was not told before.
    Back { cursor: Option<Cursor>, number: Option<u64> },
    #[serde(other)]
    Unknown,
}

/// Something that happened in the market.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum MarketEvent {
    JobPosted {
        job: JobId,
        client: Account,
        terms: JobTerms,
        input_commitment: Hash32,
        input_ref: String,
    },
    JobClaimed {
        job: JobId,
        host: Account,
        deliver_by_s: u64,
        attempt: u8,
    },
    /// The host gave the job up, or was late. `reopened`: others may claim it now.
    ClaimLost {
        job: JobId,
        host: Account,
        reopened: bool,
    },
    ResultSubmitted {
        job: JobId,
        host: Account,
        result: JobResult,
    },
    ProofAccepted {
        job: JobId,
        kind: u8,
        program: Hash32,
    },
    Challenged {
        job: JobId,
        by: Account,
    },
    JobSettled {
        job: JobId,
        host: Account,
        to_host: Amount,
        to_client: Amount,
    },
    JobRefunded {
        job: JobId,
        client: Account,
        amount: Amount,
    },
    SessionOpened {
        session: SessionId,
        terms: Terms,
        deposit: Amount,
    },
    SessionToppedUp {
        session: SessionId,
        deposit: Amount,
    },
    VoucherSettled {
        session: SessionId,
        host: Account,
        amount: Amount,
        paid_now: Amount,
    },
    SessionClosing {
        session: SessionId,
        settle_by_s: u64,
    },
    SessionSettled {
        session: SessionId,
        to_host: Amount,
        to_client: Amount,
    },
    #[serde(other)]
    Unknown,
}

/// The terms under which a node works for one client in a session. The node signs them, the client funds them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Terms {
    pub host: Account,
    pub client: Account,
    pub model: ModelId,
    /// The coin that is paid in.
    pub coin: Account,
    /// The price of a million tokens read.
    pub price_input_per_mtok: Amount,
    /// The price of a million tokens generated.
    pub price_output_per_mtok: Amount,
    /// When the session ends at the latest, in seconds since 1970.
    pub expires_s: u64,
    /// How long after its end the node may still hand vouchers in. Seconds.
    pub settle_window_s: u64,
    /// Until when a session can be opened under these terms, in seconds since 1970.
    pub valid_until_s: u64,
    /// Makes two sessions with the same terms different: random.
    pub nonce: Hash32,
}

/// A client's promise: so much in all, for so many tokens in all. Only the highest of a session counts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Voucher {
    pub session: SessionId,
    pub host: Account,
    pub amount: Amount,
    pub input_tokens: u64,
    pub output_tokens: u64,
    /// What both sides agree was said: the hash that they carry on from piece to piece.
    pub transcript: Hash32,
}

/// A session's money, as the contract has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Session {
    pub host: Account,
    pub client: Account,
    pub coin: Account,
    pub deposit: Amount,
    /// What vouchers have brought the host so far.
    pub paid: Amount,
    /// When it ends at the latest, in seconds since 1970.
    pub expires_s: u64,
    pub settle_window_s: u64,
    pub state: SessionState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SessionState {
    Active,
    /// The client has closed it: vouchers count until this time, in seconds since 1970.
    Closing {
        settle_by_s: u64,
    },
    Settled,
    #[serde(other)]
    Unknown,
}

/// What a client wants done, and for how much.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct JobTerms {
    pub model: ModelId,
    pub coin: Account,
    /// What the client has put down: nobody is paid more.
    pub max_amount: Amount,
    pub price_input_per_mtok: Amount,
    pub price_output_per_mtok: Amount,
    pub max_input_tokens: u64,
    pub max_output_tokens: u64,
    /// Until when it may be claimed, in seconds since 1970.
    pub claim_by_s: u64,
    /// How long the host has from its claim to its result, from there to its proof, and how long the client has to challenge, and the
    /// arbiter to decide. Seconds.
    pub deliver_s: u64,
    pub prove_s: u64,
    pub challenge_s: u64,
    pub resolve_s: u64,
    /// How many hosts may try.
    pub max_attempts: u8,
    /// What a host loses when it is late; what a challenger loses when it is wrong.
    pub host_bond: Amount,
    pub challenge_bond: Amount,
    /// The kind of proof that is asked for; 0: none.
    pub proof_kind: u8,
    pub program: Hash32,
    /// Who decides a challenge; 40 zeros: nobody, and nothing can be challenged.
    pub arbiter: Account,
}

/// What a host says that it has done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct JobResult {
    /// BLAKE3 of the result's bytes.
    pub output_commitment: Hash32,
    /// The root of what is proven at positions that are drawn later, where the terms ask for that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trace: Option<Hash32>,
    pub input_tokens: u64,
    pub output_tokens: u64,
    /// Where the result is.
    pub result_ref: String,
}

/// A posted job, as the contract has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Job {
    pub client: Account,
    pub terms: JobTerms,
    pub input_commitment: Hash32,
    pub state: JobState,
    /// Who has claimed it last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<Account>,
    /// When the state is over if nobody acts, in seconds since 1970; then anyone may send [`Act::ExpireJob`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until_s: Option<u64>,
    pub attempts: u8,
    /// Whether a proof was accepted.
    #[serde(default)]
    pub proven: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    Open,
    Claimed,
    Delivered,
    Proven,
    Challenged,
    Settled,
    Refunded,
    #[serde(other)]
    Unknown,
}

/// What an account has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Balances {
    /// In the chain's coin, to spend and for fees.
    pub coin: Amount,
    /// What the market owes it: [`Act::Withdraw`] fetches it.
    pub credit: Amount,
    /// A stake that came back and waits: [`Act::WithdrawStake`] fetches it.
    pub returned: Amount,
    /// What it has put down as a node, and how much of that stands for jobs now.
    pub stake: Amount,
    pub bonded: Amount,
    /// When its stake can come back, in seconds since 1970; `None` while it does not leave.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exits_at_s: Option<u64>,
    /// Where what it earns as a node goes; `None` where it is no node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub payout: Option<Account>,
}

/// Something to be signed for the account that is acted for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Signing {
    /// Names it in the answer.
    pub id: u64,
    /// The order that it is for.
    pub key: String,
    /// An unsigned transaction: what it does can be read from it.
    pub payload: Payload,
}

/// The answer to a [`Signing`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Signed {
    pub id: u64,
    /// `None`: it is not signed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signature: Option<Signature>,
    /// Why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refusal: Option<String>,
}

/// Something to be done once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Order {
    /// The caller's name for it, at most 200 bytes: the same key is the same order, for ever.
    pub key: String,
    pub act: Act,
}

/// What can be done in the market.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Act {
    /// Makes the account a node: `peer`, at most 64 bytes, is its public key in the network in hexadecimal digits, `payout` where all that it earns goes.
    Register {
        payout: Account,
        peer: String,
        stake: Amount,
    },
    BeginExit,
    FinishExit,
    /// Fetches what the market owes the account.
    Withdraw {
        coin: Account,
        to: Account,
    },
    /// Fetches a stake that came back.
    WithdrawStake {
        to: Account,
    },
    /// Funds a session. `offer` is the host's signature over `offer_payload(terms)`.
    OpenSession {
        terms: Terms,
        deposit: Amount,
        offer: Signature,
    },
    TopUp {
        session: SessionId,
        amount: Amount,
    },
    /// Hands a voucher in. `close`: and ends the session, which only its host may.
    Settle {
        voucher: Voucher,
        signature: Signature,
        close: bool,
    },
    CloseSession {
        session: SessionId,
    },
    FinalizeSession {
        session: SessionId,
    },
    PostJob {
        terms: JobTerms,
        input_commitment: Hash32,
        input_ref: String,
    },
    CancelJob {
        job: JobId,
    },
    ClaimJob {
        job: JobId,
    },
    AbandonJob {
        job: JobId,
    },
    SubmitResult {
        job: JobId,
        result: JobResult,
    },
    /// Proves a delivered job. `public_inputs` begin with its `subject`.
    SubmitProof {
        job: JobId,
        public_inputs: Vec<u8>,
        proof: Vec<u8>,
    },
    AcceptResult {
        job: JobId,
    },
    /// Objects to a result, with the challenge bond of the terms; only where they name an arbiter.
    Challenge {
        job: JobId,
        reason: u8,
        evidence: Hash32,
        bond: Amount,
    },
    /// Carries out the arbiter's ruling.
    Resolve {
        job: JobId,
    },
    ExpireJob {
        job: JobId,
    },
    #[serde(other)]
    Unknown,
}

/// How far an order is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Progress {
    pub key: String,
    pub state: ProgressState,
    /// The transaction that is in a block, or was sent last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transaction: Option<Hash32>,
    /// The block that it is in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block: Option<u64>,
    /// What it cost, once it is in a block: all fees together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fee: Option<Amount>,
    /// What came of it, where the act makes something: the session's id or the job's number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub made: Option<String>,
    /// What holds it up, or why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ProgressState {
    /// On disk, not sent yet.
    Planned,
    /// Sent; what was sent is not what has happened.
    Sent,
    /// In a block, and carried out.
    Mined,
    /// In a safe block.
    Safe,
    /// For ever.
    Final,
    /// In a block, and refused by the contract. May be taken back like any block until `final_` says so.
    Reverted {
        #[serde(rename = "final")]
        final_: bool,
    },
    /// Not sent, and will not be: a policy said no, or another transaction took its place. Look at the state of the chain before ordering anything again.
    Dead,
    #[serde(other)]
    Unknown,
}

/// What an act would cost, and whether it would be refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Quote {
    /// Fees at the current price, that of the layer below included. Where it would be refused, about what it takes when it is not.
    pub fee: Amount,
    /// What a signature to it would allow for fees now: what a limit on the fees of a transaction is held against.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub most: Option<Amount>,
    /// Why the contract would refuse it now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refusal: Option<String>,
}
