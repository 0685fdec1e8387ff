//! Prover: evidence about work that a machine can check.

use async_trait::async_trait;
use fabstir_plugin_macros::interface;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::chain::Hash32;
use crate::context::Cx;
use crate::error::Result;
use crate::stream::Stream;

/// Proves statements about work, and checks such proofs.
///
/// A proof says what its [`Statement`] says in plain words, and nothing more: whoever relies on it reads `says`, `leaves_open` and
/// `trusts`. No method answers with a proof that it has not checked itself, and none takes for proven what it could not check.
///
/// Proving takes seconds to minutes and much memory, so a prover runs in a process of its own by default. What a set-up makes is kept in
/// the plugin's folder for state under the hash of what it was made from, and checked against that hash whenever it is read.
#[interface(kind = "prover", version = "1.0")]
#[async_trait]
pub trait Prover: Send + Sync {
    /// What this plugin can prove with its present configuration. Answers from memory.
    async fn statements(&self, cx: &Cx) -> Result<Vec<Statement>>;

    /// Makes what proofs of a statement need, its keys above all, and returns the statement with its `program`. What is there already is
    /// checked and not made again. Whoever promises proofs has to know how long they take: where none was made yet, one is made for
    /// [`Prover::estimate`]. A dropped stream ends the work, and leaves nothing half made.
    ///
    /// # Errors
    /// `NotFound` for a statement that is none of this plugin's. `Corrupt` when what was kept is not what its hash says: it is set aside,
    /// and the next call makes it again. `Full` when it needs more memory or disk than it may use: the message names both.
    async fn prepare(&self, cx: &Cx, statement: String) -> Result<Stream<Preparing>>;

    /// What a proof will take on this machine.
    ///
    /// # Errors
    /// `NotFound`.
    async fn estimate(&self, cx: &Cx, statement: String) -> Result<Estimate>;

    /// Proves. The stream ends with one [`Proving::Proof`], which was checked, after any number of [`Proving::Progress`], or with an
    /// error. Prepares first where that was not done. A dropped stream ends the work at the next place where it can be ended,
    /// which large circuits may take seconds to reach.
    ///
    /// # Errors
    /// `NotFound`. `InvalidArgument` when the task is not one of the statement's, or what it states is not true: there is no proof of it.
    /// `Full` as in `prepare`; `Unavailable` when the work was ended from outside.
    async fn prove(&self, cx: &Cx, task: Task) -> Result<Stream<Proving>>;

    /// The root over tokens and states of an output, one state before each token, that a proof of an output head is made under. It is
    /// handed in before anybody knows at which positions a proof will be asked for. Needs no keys.
    ///
    /// # Errors
    /// `NotFound`. `InvalidArgument` for a statement that is about no states, and where at some position there would be no proof: the
    /// message names it. `Cancelled` when the caller gave up.
    #[optional]
    async fn trace(&self, cx: &Cx, statement: String, tokens: Vec<u32>, states: Vec<Vec<f32>>) -> Result<Hash32>;

    /// Checks a proof. The public inputs are made anew from `proof.about` and `proof.claim`, so that what holds is what those say: a
    /// proof of something else does not hold.
    ///
    /// # Errors
    /// `NotFound` for a statement or a program that this plugin does not know, `Corrupt` for keys that cannot be trusted: then nothing
    /// is known about the proof. A proof that is wrong is no error but a [`Verdict`].
    async fn verify(&self, cx: &Cx, proof: Proof) -> Result<Verdict>;

    /// The contract that checks proofs of a statement on an Ethereum chain, ready to be deployed.
    ///
    /// # Errors
    /// `NotFound`. `Unavailable` before `prepare`.
    #[optional]
    async fn verifier(&self, cx: &Cx, statement: String) -> Result<Contract>;
}

/// What a proof can be about. The numbers are those of the market's contracts; 0 there is "no proof".
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ProofKind {
    /// 1: whoever made it knew the digests of model, input and output behind a commitment.
    Commitment,
    /// 2: a token is the likeliest that a model's output head gives for a committed state.
    OutputHead,
    /// 3: a small model of the ONNX format gives this output for this input.
    OnnxModel,
    #[serde(other)]
    Unknown,
}

impl ProofKind {
    pub fn number(self) -> Option<u8> {
        match self {
            ProofKind::Commitment => Some(1),
            ProofKind::OutputHead => Some(2),
            ProofKind::OnnxModel => Some(3),
            ProofKind::Unknown => None,
        }
    }
}

/// Something that can be proven.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Statement {
    /// Its name, unique within the plugin: `commitment`, `output-head:tiny-chat`.
    pub id: String,
    pub kind: ProofKind,
    /// The proof system and its version: `groth16-bn254`.
    pub system: String,
    /// Which circuit under which keys, and how it is used where that can differ: a hash of the verifying key and of that. `None` until it
    /// is prepared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub program: Option<Hash32>,
    /// The digest of the model that it is about, where it is about one: [`Loaded::digest`](crate::inference::Loaded::digest).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// What a proof says: one sentence for people.
    pub says: String,
    /// What it does not show.
    pub leaves_open: String,
    /// Whom or what one has to trust: the set-up above all.
    pub trusts: String,
    /// Whether somebody may know the secret of the set-up, and could forge proofs: not to be relied on for money that is worth anything.
    pub is_development: bool,
}

/// One step of [`Prover::prepare`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Preparing {
    Progress(Stage),
    /// The last item.
    Ready(Statement),
    #[serde(other)]
    Unknown,
}

/// One step of [`Prover::prove`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Proving {
    Progress(Stage),
    /// The last item.
    Proof(Proof),
    #[serde(other)]
    Unknown,
}

/// How far long work is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Stage {
    /// What is done now, in words: "making the keys".
    pub doing: String,
    /// How much of the whole work is done, 0 to 100, where it can be told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub percent: Option<u8>,
    /// What is left, in milliseconds, from how long it took before on this machine; `None` where it never ran.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub left_ms: Option<u64>,
}

/// What a proof takes. Measured on this machine, or `None`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Estimate {
    /// Processor time of `prepare`, in milliseconds; 0 where it is done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prepare_cpu_ms: Option<u64>,
    /// Processor time of `prove`, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prove_cpu_ms: Option<u64>,
    /// The most memory that `prove` takes, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<u64>,
    /// The size of a proof, in bytes; `None` where it depends on what is proven.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proof_bytes: Option<u64>,
}

/// What a proof is bound to: with another of these four it does not hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct About {
    /// The word under which the market knows the work: [`Chain::subject`](crate::chain::Chain::subject) of a posted job. As a number it is
    /// below 2^248, so that it is an element of every 254-bit field.
    pub subject: Hash32,
    /// The number of the posted job, where it is one: some contracts look it up by that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job: Option<u64>,
    /// The digest of the model: 64 hexadecimal digits.
    pub model: String,
    /// BLAKE3 of the input's bytes.
    pub input: Hash32,
    /// BLAKE3 of the output's bytes.
    pub output: Hash32,
}

/// What is to be proven.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Task {
    /// The id of a [`Statement`].
    pub statement: String,
    pub about: About,
    pub witness: Witness,
}

/// What only the prover has to know.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Witness {
    /// Of a commitment: what [`About`] has is all.
    None,
    /// Of an output head: the tokens of the output, and the model's last state before each, after the final norm and before the head.
    /// `draw` says at which positions the proof is made: for a posted job it is [`Chain::draw`](crate::chain::Chain::draw).
    Answer { tokens: Vec<u32>, states: Vec<Vec<f32>>, draw: Hash32 },
    /// Of an ONNX model: its inputs, each flattened in row-major order.
    Inputs(Vec<Vec<f32>>),
    #[serde(other)]
    Unknown,
}

/// What a proof says besides what it is bound to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Claim {
    /// Nothing more.
    None,
    /// At the positions that `draw` gives, of `tokens` ones, the head chooses the token for the state under the root `trace`.
    Answer { trace: Hash32, tokens: u32, draw: Hash32 },
    /// The model gives these outputs; `inputs` is their commitment.
    Outputs { inputs: Hash32, outputs: Vec<Vec<f32>> },
    #[serde(other)]
    Unknown,
}

/// A proof, with everything that is needed to check it but the keys.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Proof {
    /// The id of the [`Statement`].
    pub statement: String,
    /// The `system` and the `program` of the statement.
    pub system: String,
    pub program: Hash32,
    pub about: About,
    pub claim: Claim,
    /// As the contract takes them: words of 32 bytes, the subject first.
    pub public_inputs: Vec<u8>,
    /// As the contract takes it.
    pub proof: Vec<u8>,
}

/// What became of a check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Verdict {
    pub holds: bool,
    /// Why it does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

/// A contract that can be deployed. It answers `verify(bytes32 programId, bytes publicInputs, bytes proof) returns (bool)`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Contract {
    pub name: String,
    /// Creation code with its arguments, of each contract in the order of deployment. Where a later one needs the address of one before it,
    /// that address follows the code as its last argument, one word each.
    pub creation: Vec<Vec<u8>>,
}
