//! Whether a posted job is worth taking, from what it says and how this node stands. Nothing is asked here, and nothing is changed.

use std::time::Duration;

use fabstir_plugin_api::chain::{Account, Amount, Hash32, Job, JobState, JobTerms, ModelId, Quote};
use fabstir_plugin_api::inference::Input;
use fabstir_plugin_api::prover::ProofKind;

use crate::market::journal::jobs::{JobRow, State};
use crate::market::posting::{JobInput, PostingError};
use crate::market::proving::is_about;
use crate::market::{NATIVE, Prices};
use crate::scheduler::estimated_tokens;

/// What is left of a job's time must be at least this long for its work. Seconds.
pub const LEAST_DELIVER_S: u64 = 30;
/// What is left of a job's time for its proof, besides what making it takes. Seconds.
pub const LEAST_PROVE_S: u64 = 30;
/// How much longer a proof may take than its processor time says.
const PROVE_SHARE: u64 = 4;
/// A fee must not be more than one part in this many of what a job can pay.
pub const FEE_SHARE: u128 = 3;

/// Why a job was not taken, or did not work out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Cause {
    Model,
    Coin,
    Price,
    Proof,
    Arbiter,
    Bond,
    Input,
    TooLong,
    Time,
    Amount,
    Room,
    Fee,
    Storage,
    Network,
    Lost,
    Gone,
    Reorg,
    Refused,
    Failed,
}

impl Cause {
    pub const ALL: [Cause; 19] = [
        Cause::Model,
        Cause::Coin,
        Cause::Price,
        Cause::Proof,
        Cause::Arbiter,
        Cause::Bond,
        Cause::Input,
        Cause::TooLong,
        Cause::Time,
        Cause::Amount,
        Cause::Room,
        Cause::Fee,
        Cause::Storage,
        Cause::Network,
        Cause::Lost,
        Cause::Gone,
        Cause::Reorg,
        Cause::Refused,
        Cause::Failed,
    ];

    pub fn word(self) -> &'static str {
        match self {
            Cause::Model => "model",
            Cause::Coin => "coin",
            Cause::Price => "price",
            Cause::Proof => "proof",
            Cause::Arbiter => "arbiter",
            Cause::Bond => "bond",
            Cause::Input => "input",
            Cause::TooLong => "too_long",
            Cause::Time => "time",
            Cause::Amount => "amount",
            Cause::Room => "room",
            Cause::Fee => "fee",
            Cause::Storage => "storage",
            Cause::Network => "network",
            Cause::Lost => "lost",
            Cause::Gone => "gone",
            Cause::Reorg => "reorg",
            Cause::Refused => "refused",
            Cause::Failed => "failed",
        }
    }

    pub fn of(word: &str) -> Option<Cause> {
        Cause::ALL.into_iter().find(|cause| cause.word() == word)
    }

    /// What would change it.
    pub fn advice(self) -> &'static str {
        match self {
            Cause::Model => "They ask for a model that is not served here: add it to plugins.toml.",
            Cause::Coin => "They pay in another coin than the chain's own, and no other is taken.",
            Cause::Price => {
                "They pay less than network.price_input_wei_per_mtok or price_output_wei_per_mtok: lower them to get such jobs."
            }
            Cause::Proof => {
                "They ask for a proof that no prover plugin here makes for this chain and their model, or sooner than those that are promised allow: \
                 `fabstir-node proof ls` shows which are made, and how long each takes."
            }
            Cause::Arbiter => {
                "They name an arbiter, who may give amount and bond to the client, or leave it too little time: market.arbiters has those whose \
                 rulings are accepted, market.least_resolve_s the time."
            }
            Cause::Bond => {
                "They ask for a larger bond than market.max_bond_wei, or hold it longer than market.max_wait_s: raise these, with stake enough, to \
                 get such jobs."
            }
            Cause::Input => "Their input is not what its commitment says, or cannot be read: the client's doing.",
            Cause::TooLong => {
                "Their input and output are longer than their terms or the model's context allow: raise `context` of the model."
            }
            Cause::Time => {
                "There was not time enough to claim them or to deliver: seen too late, or the node was down or too slow."
            }
            Cause::Amount => {
                "The contract holds something else than was told: the client's doing, or the posting has been taken back."
            }
            Cause::Room => {
                "Every slot was taken until they could not be claimed any more: raise market.jobs, or serve more at a time."
            }
            Cause::Fee => {
                "Fees were more than a third of what they pay, or above market.max_fee_wei or daily_fee_wei: cheap jobs win when fees are low."
            }
            Cause::Storage => "Results could not be kept: add a storage plugin to plugins.toml, or see the log for why it fails.",
            Cause::Network => {
                "The node has no name in the network, so nobody could fetch results: add a transport plugin to plugins.toml."
            }
            Cause::Lost => {
                "Another node claimed them first: a nearer RPC endpoint, and a shorter poll_ms of the chain plugin, make this one faster."
            }
            Cause::Gone => "Their clients took them back, or have been refunded.",
            Cause::Reorg => "The chain has taken back the block that they were in.",
            Cause::Refused => {
                "The contract refused the claim: `fabstir-node market status` shows whether the stake is enough and free."
            }
            Cause::Failed => "The model failed on them: the log says how.",
        }
    }
}

/// A model that is served now.
#[derive(Debug, Clone)]
pub struct Served {
    pub name: String,
    /// What the chain calls it.
    pub id: ModelId,
    pub context: u32,
    /// Whether a generation would begin at once.
    pub is_free: bool,
}

/// A proof that this node can make.
#[derive(Debug, Clone)]
pub struct Proves {
    pub kind: u8,
    pub program: Hash32,
    /// What the chain calls the model that it is about, where it is about one.
    pub model: Option<ModelId>,
    /// Processor time that it takes, in milliseconds, where it was measured.
    pub takes_ms: Option<u64>,
    /// Whether its keys were looked through: a bond that is put up for a proof is lost where they turn out to be damaged.
    pub is_checked: bool,
}

impl Proves {
    fn is_asked(&self, terms: &JobTerms) -> bool {
        self.kind == terms.proof_kind && self.program == terms.program
    }
}

/// The proofs that this node has promised and not made yet. They are made one after the other, in whatever order their results are handed
/// in, so that each of them may come last.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Promised {
    takes_ms: u64,
    /// The shortest time that one of them is given. Seconds.
    least_s: Option<u64>,
}

impl Promised {
    pub fn add(&mut self, takes_ms: u64, prove_s: u64) {
        self.takes_ms = self.takes_ms.saturating_add(takes_ms);
        self.least_s = Some(self.least_s.map_or(prove_s, |least| least.min(prove_s)));
    }

    /// The seconds that all of them may take, and one more.
    fn needed_s(&self, takes_ms: u64) -> u64 {
        LEAST_PROVE_S + self.takes_ms.saturating_add(takes_ms).saturating_mul(PROVE_SHARE) / 1000
    }
}

/// How this node stands.
#[derive(Debug, Clone)]
pub struct Standing {
    pub models: Vec<Served>,
    /// Whether plugins are on their way to being ready.
    pub is_starting: bool,
    pub can_store: bool,
    pub proves: Vec<Proves>,
    pub promised: Promised,
    /// Whose rulings are accepted.
    pub arbiters: Vec<Account>,
    /// Whether peers can fetch what it has stored. `None`: not yet.
    pub is_in_network: Option<bool>,
    pub prices: Prices,
    pub max_bond_wei: u128,
    /// How long an arbiter must be given to rule, and how long pay may be out at the most. Seconds.
    pub least_resolve_s: u64,
    pub max_wait_s: u64,
    /// The contracts' clock, in seconds since 1970.
    pub now_s: u64,
}

impl Standing {
    /// Counts the proof of a job that is to be taken.
    pub fn promise(&mut self, terms: &JobTerms) {
        if let Some(takes_ms) = self.takes_ms(terms) {
            self.promised.add(takes_ms, terms.prove_s);
        }
    }

    /// How long the proof takes that a job asks for; `None` where none is asked for, or known.
    pub fn takes_ms(&self, terms: &JobTerms) -> Option<u64> {
        self.proves.iter().find(|proves| proves.is_asked(terms)).and_then(|proves| proves.takes_ms)
    }
}

/// What to do about a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// By the model that is called so here, once the chain confirms what was told.
    Take(String),
    /// Not now.
    Wait(Cause, String),
    Decline(Cause, String),
}

/// Looks at a job.
pub fn judge(row: &JobRow, node: &Standing) -> Verdict {
    let terms = &row.terms;
    let no = |cause, why: String| Verdict::Decline(cause, why);
    if terms.claim_by_s <= node.now_s {
        return no(Cause::Time, "its time to be claimed went by".into());
    }
    if terms.coin != NATIVE {
        return no(Cause::Coin, format!("it pays in {}", terms.coin));
    }
    let (input, output) = (terms.price_input_per_mtok.0, terms.price_output_per_mtok.0);
    if input < node.prices.input_per_mtok || output < node.prices.output_per_mtok {
        let Prices { input_per_mtok, output_per_mtok } = node.prices;
        let why =
            format!("it pays {input} and {output} wei for a million tokens, {input_per_mtok} and {output_per_mtok} are asked");
        return no(Cause::Price, why);
    }
    if terms.host_bond.0 > node.max_bond_wei {
        return no(Cause::Bond, format!("its bond is {} wei, {} are put up at most", terms.host_bond, node.max_bond_wei));
    }
    let is_accepted = |arbiter: &Account| node.arbiters.iter().any(|known| known.eq_ignore_ascii_case(arbiter));
    if terms.arbiter != NATIVE && !is_accepted(&terms.arbiter) {
        return no(Cause::Arbiter, format!("it names the arbiter {}, whose rulings are not accepted here", terms.arbiter));
    }
    // Who is not given time to rule gives the client its money back, and the node has worked for nothing.
    let resolve_s = if terms.arbiter == NATIVE { 0 } else { terms.resolve_s };
    if terms.arbiter != NATIVE && resolve_s < node.least_resolve_s {
        let least = node.least_resolve_s;
        return no(Cause::Arbiter, format!("it gives its arbiter {resolve_s} s to rule, {least} are needed"));
    }
    let wait_s = terms.challenge_s.saturating_add(resolve_s);
    if wait_s > node.max_wait_s {
        let why =
            format!("its pay and its bond may be out for {wait_s} s after the result, {} are waited at most", node.max_wait_s);
        return no(Cause::Bond, why);
    }
    if terms.deliver_s < LEAST_DELIVER_S {
        return no(Cause::Time, format!("it gives {} s to deliver, {LEAST_DELIVER_S} are needed", terms.deliver_s));
    }
    let input = match JobInput::read(&row.input_ref, &row.input_commitment) {
        Ok(input) => input,
        Err(error @ PostingError::TooLarge { .. }) => return no(Cause::TooLong, error.to_string()),
        Err(error) => return no(Cause::Input, error.to_string()),
    };
    if ProofKind::OutputHead.number() == Some(terms.proof_kind) {
        if input.temperature != Some(0.0) {
            return no(Cause::Input, "only what always takes the likeliest token can be proven: its temperature is not 0".into());
        }
        // Else its client could see to it that there is no token to prove, and has a tenth of the bond for the asking.
        if !input.stop.is_empty() {
            return no(Cause::Input, "it asks for a proof of an answer that its own stop texts may leave without a token".into());
        }
    }
    let tokens = estimated_tokens(&Input::Messages(input.messages));
    let needed = match paid(terms, tokens) {
        Ok(needed) => needed,
        Err((cause, why)) => return no(cause, why),
    };
    let later = |cause, why: String| if node.is_starting { Verdict::Wait(cause, why) } else { Verdict::Decline(cause, why) };
    let mut promise = None;
    if terms.proof_kind != 0 {
        let asked: Vec<&Proves> = node.proves.iter().filter(|proves| proves.is_asked(terms)).collect();
        if asked.is_empty() {
            return later(
                Cause::Proof,
                format!("it asks for a proof of kind {} by the program {}", terms.proof_kind, terms.program),
            );
        }
        let Some(known) = asked.iter().find(|proves| is_about(proves.kind, proves.model.as_ref(), &terms.model)) else {
            return no(Cause::Proof, format!("the program {} proves nothing about the model {}", terms.program, terms.model));
        };
        if !known.is_checked {
            return later(Cause::Proof, format!("the keys of the program {} are not known to be good", terms.program));
        }
        let Some(takes_ms) = known.takes_ms else {
            return later(Cause::Proof, format!("how long a proof by the program {} takes was never measured", terms.program));
        };
        let needed = Promised::default().needed_s(takes_ms);
        if terms.prove_s < needed {
            return no(Cause::Proof, format!("it gives {} s to prove, {needed} are needed", terms.prove_s));
        }
        promise = Some(takes_ms);
    }
    let models: Vec<&Served> = node.models.iter().filter(|model| model.id == terms.model).collect();
    if models.is_empty() {
        return later(Cause::Model, format!("the model {} is not served", terms.model));
    }
    let Some(first) = models.iter().find(|model| needed <= model.context.into()) else {
        let context = models.iter().map(|model| model.context).max().unwrap_or(0);
        return no(Cause::TooLong, too_long(needed, context));
    };
    if !node.can_store {
        return later(Cause::Storage, "no storage plugin is ready".into());
    }
    match node.is_in_network {
        Some(true) => {}
        Some(false) => return later(Cause::Network, "the node has no name in the network".into()),
        None => return Verdict::Wait(Cause::Network, "the node has not joined the network yet".into()),
    }
    if let Some(takes_ms) = promise {
        let (needed, least) = (node.promised.needed_s(takes_ms), node.promised.least_s.unwrap_or(u64::MAX).min(terms.prove_s));
        if needed > least {
            let why = format!("with the proofs that are promised it takes up to {needed} s, and one of them is given {least}");
            return Verdict::Wait(Cause::Proof, why);
        }
    }
    let free = models.iter().find(|model| model.is_free && needed <= model.context.into());
    match free {
        Some(model) => Verdict::Take(model.name.clone()),
        None => Verdict::Wait(Cause::Room, format!("no slot of {} is free", first.name)),
    }
}

/// The tokens that input and answer may have together, if the terms pay for an input of so many.
fn paid(terms: &JobTerms, tokens: u64) -> Result<u64, (Cause, String)> {
    if tokens > terms.max_input_tokens {
        return Err((Cause::TooLong, format!("its input has {tokens} tokens, its terms pay for {}", terms.max_input_tokens)));
    }
    match paid_output(terms, tokens) {
        0 => Err((Cause::Amount, "its terms pay for no token of an answer".into())),
        most => Ok(tokens.saturating_add(most)),
    }
}

fn too_long(needed: u64, context: u32) -> String {
    format!("it may have {needed} tokens in all, the model's context has {context}")
}

/// An input as the model reads it: its tokens, and the model's context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counted {
    pub tokens: u64,
    pub context: u32,
}

impl Counted {
    /// Whether a job's terms and the context have room for it and its answer.
    pub fn fits(self, terms: &JobTerms) -> Result<(), (Cause, String)> {
        let needed = paid(terms, self.tokens)?;
        if needed <= self.context.into() { Ok(()) } else { Err((Cause::TooLong, too_long(needed, self.context))) }
    }

    /// The most tokens of an answer that its terms pay for and the context holds.
    pub fn answer(self, terms: &JobTerms) -> u64 {
        paid_output(terms, self.tokens).min(u64::from(self.context).saturating_sub(self.tokens))
    }
}

/// What fees say about a job that is good otherwise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fees {
    Good,
    /// Not now.
    High(String),
    /// Not for this job.
    TooHigh(String),
}

/// The most that fees of the jobs in work may still come to: what was claimed must be handed in, and what was promised proven. `quotes` are those of
/// another job's claim, result and proof.
pub fn owed(rows: &[JobRow], quotes: &[(&str, Quote)], max_fee_wei: u128) -> u128 {
    let most = |number: usize| quotes.get(number).and_then(|(_, quote)| quote.most).map_or(max_fee_wei, |most| most.0);
    let of = |row: &JobRow| {
        let claim = if row.state == State::Claiming { most(0) } else { 0 };
        let result = if State::BEFORE_RESULT.contains(&row.state) { most(1) } else { 0 };
        let proof = if row.terms.proof_kind == 0 { 0 } else { most(2) };
        claim.saturating_add(result).saturating_add(proof)
    };
    rows.iter().fold(0u128, |sum, row| sum.saturating_add(of(row)))
}

/// What an account may sign for. Wei.
#[derive(Debug, Clone, Copy)]
pub struct Purse {
    /// In fees of one transaction.
    pub max_fee_wei: u128,
    /// In fees of this day, besides what is signed and what is owed.
    pub today_wei: u128,
}

/// Looks at the fees of all that a job takes: its claim, its result, and its proof where it asks for one.
pub fn fees(quotes: &[(&str, Quote)], pays: Amount, purse: Purse) -> Fees {
    let sum = |of: fn(&Quote) -> u128| quotes.iter().fold(0u128, |sum, (_, quote)| sum.saturating_add(of(quote)));
    let all = Amount(sum(|quote| quote.fee.0));
    if all > pays {
        return Fees::TooHigh(format!("it pays {pays} wei at most, and its fees are {all}"));
    }
    if all.0.saturating_mul(FEE_SHARE) > pays.0 {
        return Fees::High(format!("its fees are {all} wei, and it pays {pays} at most"));
    }
    // What is not signed after the claim is a bond that is lost.
    let Purse { max_fee_wei, today_wei } = purse;
    for (what, quote) in quotes {
        if let Some(most) = quote.most.filter(|most| most.0 > max_fee_wei) {
            return Fees::High(format!("{what} may cost up to {most} wei, and market.max_fee_wei is {max_fee_wei}"));
        }
    }
    let most = sum(|quote| quote.most.unwrap_or(quote.fee).0);
    if most > today_wei {
        return Fees::High(format!("its fees may come to {most} wei, and market.daily_fee_wei leaves {today_wei} for today"));
    }
    Fees::Good
}

/// How long an answer may take to be made, of the time that is left. Where its tokens are traced it is read once more from beginning to
/// end, which takes no longer than making it.
pub fn for_answer(is_traced: bool, left: Duration) -> Duration {
    if is_traced { left / 2 } else { left }
}

/// The most tokens of an answer that a job's terms pay for, after a prompt of so many tokens.
pub fn paid_output(terms: &JobTerms, prompt_tokens: u64) -> u64 {
    const MILLION: u128 = 1_000_000;
    let prompt = terms.price_input_per_mtok.0.saturating_mul(prompt_tokens.into());
    let left = terms.max_amount.0.saturating_mul(MILLION).saturating_sub(prompt);
    let paid = left.checked_div(terms.price_output_per_mtok.0).unwrap_or(u128::MAX);
    u64::try_from(paid).unwrap_or(u64::MAX).min(terms.max_output_tokens)
}

/// What the chain says of a job that the journal knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OnChain {
    /// Not there: its block is not that sure yet, or was taken back.
    Absent,
    /// Another job has this number.
    Another,
    /// Another job has this number, and this node has claimed it.
    ClaimedAnother,
    Open,
    /// This node's to do, until then.
    Ours {
        until_s: u64,
    },
    /// Another node's.
    Taken,
    /// Handed in by this node; its state is over then. `owes_proof`: it is not paid without one. `objected`: its arbiter rules.
    Delivered {
        until_s: u64,
        owes_proof: bool,
        objected: bool,
    },
    Settled,
    Refunded,
    /// In a state that this node does not know.
    Unknown,
}

/// Compares a job with what the contract has.
pub fn compare(row: &JobRow, job: Option<&Job>, account: &str) -> OnChain {
    let Some(job) = job else { return OnChain::Absent };
    let ours = job.host.as_ref().is_some_and(|host| host.eq_ignore_ascii_case(account));
    let until_s = job.until_s.unwrap_or(0);
    if !is_same(row, job) {
        return if ours && job.state == JobState::Claimed { OnChain::ClaimedAnother } else { OnChain::Another };
    }
    match job.state {
        JobState::Open => OnChain::Open,
        JobState::Refunded => OnChain::Refunded,
        JobState::Unknown => OnChain::Unknown,
        _ if !ours => OnChain::Taken,
        JobState::Claimed => OnChain::Ours { until_s },
        JobState::Delivered | JobState::Proven | JobState::Challenged => {
            let objected = job.state == JobState::Challenged;
            OnChain::Delivered { until_s, owes_proof: job.terms.proof_kind != 0 && !job.proven, objected }
        }
        JobState::Settled => OnChain::Settled,
    }
}

/// Whether the contract holds what the event told. Times that do not apply the contract does not keep.
fn is_same(row: &JobRow, job: &Job) -> bool {
    let mut told = row.terms.clone();
    if told.proof_kind == 0 {
        told.prove_s = 0;
    }
    if told.arbiter == NATIVE {
        told.resolve_s = 0;
    }
    job.client.eq_ignore_ascii_case(&row.client) && job.input_commitment == row.input_commitment && job.terms == told
}

#[cfg(test)]
pub(crate) mod tests {
    use fabstir_plugin_api::chain::JobTerms;
    use fabstir_plugin_api::inference::Message;

    use super::*;

    const NOW: u64 = 1_000_000;

    pub fn row(id: u64) -> JobRow {
        let message = Message { role: "user".into(), content: "What is the capital of France?".into(), name: None };
        let input = JobInput { messages: vec![message], temperature: Some(0.0), top_p: None, seed: None, stop: vec![] };
        let (input_commitment, input_ref) = input.carried().expect("fits");
        JobRow {
            id,
            client: format!("0x{}", "c1".repeat(20)),
            terms: JobTerms {
                model: format!("0x{}", "ab".repeat(32)),
                coin: NATIVE.into(),
                max_amount: Amount(1_000_000),
                price_input_per_mtok: Amount(10),
                price_output_per_mtok: Amount(20),
                max_input_tokens: 100,
                max_output_tokens: 50,
                claim_by_s: NOW + 60,
                deliver_s: 600,
                prove_s: 0,
                challenge_s: 60,
                resolve_s: 0,
                max_attempts: 1,
                host_bond: Amount(5),
                challenge_bond: Amount(0),
                proof_kind: 0,
                program: format!("0x{}", "00".repeat(32)),
                arbiter: NATIVE.into(),
            },
            input_commitment,
            input_ref,
            block: 1,
            state: State::Seen,
            cause: None,
            why: None,
            model: None,
            attempt: 0,
            result: None,
            tokens: Vec::new(),
            proof: None,
            paid: None,
            seen_ms: 0,
            changed_ms: 0,
        }
    }

    fn proves(kind: u8, program: &str, model: Option<ModelId>) -> Proves {
        Proves { kind, program: format!("0x{}", program.repeat(32)), model, takes_ms: Some(10_000), is_checked: true }
    }

    /// With a proof of 10 s, for which there is so much time.
    fn asks(prove_s: u64) -> JobRow {
        let mut row = row(1);
        (row.terms.proof_kind, row.terms.prove_s, row.terms.program) = (1, prove_s, format!("0x{}", "11".repeat(32)));
        row
    }

    fn node() -> Standing {
        Standing {
            models: vec![Served { name: "tiny".into(), id: row(1).terms.model, context: 200, is_free: true }],
            is_starting: false,
            can_store: true,
            proves: vec![proves(1, "11", None)],
            promised: Promised::default(),
            arbiters: vec![],
            is_in_network: Some(true),
            prices: Prices { input_per_mtok: 10, output_per_mtok: 20 },
            max_bond_wei: 5,
            least_resolve_s: 10,
            max_wait_s: 3600,
            now_s: NOW,
        }
    }

    #[track_caller]
    fn declined(change: impl FnOnce(&mut JobRow, &mut Standing)) -> Cause {
        let (mut row, mut node) = (row(1), node());
        change(&mut row, &mut node);
        match judge(&row, &node) {
            Verdict::Decline(cause, why) if !why.is_empty() => cause,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_job_that_pays_what_is_asked_is_taken_to_the_wei_and_to_the_second() {
        assert_eq!(judge(&row(1), &node()), Verdict::Take("tiny".into()));
        assert_eq!(declined(|row, _| row.terms.price_input_per_mtok = Amount(9)), Cause::Price);
        assert_eq!(declined(|row, _| row.terms.price_output_per_mtok = Amount(19)), Cause::Price);
        assert_eq!(declined(|row, _| row.terms.host_bond = Amount(6)), Cause::Bond);
        assert_eq!(declined(|_, node| node.now_s = NOW + 60), Cause::Time);
        assert_eq!(declined(|row, _| row.terms.deliver_s = LEAST_DELIVER_S - 1), Cause::Time);
    }

    #[test]
    fn what_cannot_be_honoured_is_declined_by_one_cause() {
        assert_eq!(declined(|row, _| row.terms.coin = "0x01".into()), Cause::Coin);
        assert_eq!(declined(|row, _| row.terms.proof_kind = 1), Cause::Proof);
        assert_eq!(declined(|row, _| row.input_commitment = "0x00".into()), Cause::Input);
        assert_eq!(declined(|row, _| row.input_ref = "ipfs://x".into()), Cause::Input);
        assert_eq!(declined(|row, _| row.input_ref.extend(std::iter::repeat_n('A', 40_000))), Cause::TooLong);
        assert_eq!(declined(|row, _| row.terms.max_input_tokens = 3), Cause::TooLong);
        assert_eq!(declined(|row, _| row.terms.max_output_tokens = 190), Cause::TooLong);
        assert_eq!(declined(|row, _| row.terms.max_output_tokens = u64::MAX), Cause::TooLong);
        assert_eq!(declined(|row, _| row.terms.max_output_tokens = 0), Cause::Amount);
        assert_eq!(declined(|row, _| row.terms.model = "0x01".into()), Cause::Model);
        assert_eq!(declined(|_, node| node.can_store = false), Cause::Storage);
        assert_eq!(declined(|_, node| node.is_in_network = Some(false)), Cause::Network);
    }

    #[test]
    fn a_proof_is_promised_only_where_it_can_be_made_in_time() {
        let judged = |prove_s, program: &str, is_starting| {
            let (mut row, mut node) = (row(1), node());
            (row.terms.proof_kind, row.terms.prove_s, row.terms.program) = (1, prove_s, format!("0x{}", program.repeat(32)));
            node.is_starting = is_starting;
            judge(&row, &node)
        };
        assert_eq!(judged(70, "11", false), Verdict::Take("tiny".into()));
        assert!(matches!(judged(69, "11", false), Verdict::Decline(Cause::Proof, _)));
        assert!(matches!(judged(70, "22", false), Verdict::Decline(Cause::Proof, _)));
        assert!(matches!(judged(70, "22", true), Verdict::Wait(Cause::Proof, _)));
    }

    #[test]
    fn a_proof_of_another_model_than_the_jobs_is_not_promised() {
        let head = |model: Option<String>| {
            let (mut row, mut node) = (asks(600), node());
            row.terms.proof_kind = 2;
            node.proves = vec![proves(2, "11", Some("0xother".into())), proves(2, "11", model)];
            judge(&row, &node)
        };
        assert_eq!(head(Some(row(1).terms.model)), Verdict::Take("tiny".into()));
        for model in [Some("0xother".into()), None] {
            assert!(matches!(head(model), Verdict::Decline(Cause::Proof, _)));
        }
        // A receipt is about any model.
        assert_eq!(judge(&asks(600), &node()), Verdict::Take("tiny".into()));
    }

    #[test]
    fn an_arbiter_that_is_not_accepted_is_declined() {
        let arbiter = format!("0x{}", "Ab".repeat(20));
        let judged = |known: &[&str]| {
            let (mut row, mut node) = (row(1), node());
            (row.terms.arbiter, row.terms.resolve_s) = (arbiter.clone(), 10);
            node.arbiters = known.iter().map(|known| known.to_string()).collect();
            judge(&row, &node)
        };
        assert!(matches!(judged(&[]), Verdict::Decline(Cause::Arbiter, _)));
        assert!(matches!(judged(&["0x0000000000000000000000000000000000000001"]), Verdict::Decline(Cause::Arbiter, _)));
        assert_eq!(judged(&[&arbiter.to_lowercase()]), Verdict::Take("tiny".into()));
    }

    #[test]
    fn neither_too_little_time_to_rule_nor_too_long_a_wait_for_pay_is_accepted() {
        let arbiter = |resolve_s| {
            let (mut row, mut node) = (row(1), node());
            (row.terms.arbiter, row.terms.resolve_s) = ("0xab".into(), resolve_s);
            node.arbiters = vec!["0xab".into()];
            judge(&row, &node)
        };
        assert!(matches!(arbiter(9), Verdict::Decline(Cause::Arbiter, _)));
        assert_eq!(arbiter(3540), Verdict::Take("tiny".into()));
        assert!(matches!(arbiter(3541), Verdict::Decline(Cause::Bond, _)), "with the 60 s of the client");
        assert_eq!(declined(|row, _| row.terms.challenge_s = 3601), Cause::Bond);
    }

    #[test]
    fn what_the_model_counts_must_fit_the_terms_and_the_context() {
        let terms = row(1).terms;
        let counted = |tokens, context| Counted { tokens, context };
        assert_eq!(counted(100, 150).fits(&terms), Ok(()));
        assert_eq!(counted(101, 500).fits(&terms).map_err(|(cause, _)| cause), Err(Cause::TooLong));
        assert_eq!(counted(100, 149).fits(&terms).map_err(|(cause, _)| cause), Err(Cause::TooLong));
        let poor = JobTerms { max_amount: Amount(0), ..terms.clone() };
        assert_eq!(counted(1, 500).fits(&poor).map_err(|(cause, _)| cause), Err(Cause::Amount));
        assert_eq!(
            (counted(100, 500).answer(&terms), counted(100, 120).answer(&terms), counted(9, 8).answer(&terms)),
            (50, 20, 0)
        );
    }

    #[test]
    fn no_more_proofs_are_promised_than_can_be_made_before_the_first_is_due() {
        // Each may take 40 s, and 30 are kept for handing it in.
        let mut node = node();
        let taken = |node: &mut Standing, prove_s| {
            let row = asks(prove_s);
            let verdict = judge(&row, node);
            if verdict == Verdict::Take("tiny".into()) {
                node.promise(&row.terms);
            }
            verdict
        };
        assert_eq!(taken(&mut node, 150), Verdict::Take("tiny".into()));
        assert_eq!(taken(&mut node, 3600), Verdict::Take("tiny".into()), "110 s for both");
        assert_eq!(taken(&mut node, 150), Verdict::Take("tiny".into()), "150 s for all three");
        assert!(matches!(taken(&mut node, 3600), Verdict::Wait(Cause::Proof, _)), "it may be made before one that then is late");
        let mut node = self::node();
        assert_eq!(taken(&mut node, 3600), Verdict::Take("tiny".into()));
        assert!(matches!(taken(&mut node, 109), Verdict::Wait(Cause::Proof, _)));
        assert_eq!(taken(&mut node, 110), Verdict::Take("tiny".into()));
    }

    #[test]
    fn a_proof_that_was_never_measured_is_not_promised() {
        let mut node = node();
        node.proves[0].is_checked = false;
        assert!(matches!(judge(&asks(3600), &node), Verdict::Decline(Cause::Proof, _)));
        (node.proves[0].is_checked, node.proves[0].takes_ms) = (true, None);
        assert!(matches!(judge(&asks(3600), &node), Verdict::Decline(Cause::Proof, _)));
        node.is_starting = true;
        assert!(matches!(judge(&asks(3600), &node), Verdict::Wait(Cause::Proof, _)));
    }

    #[test]
    fn an_answer_that_is_to_be_proven_has_no_stop_texts() {
        let head = |stop: &[&str]| {
            let (mut row, mut node) = (asks(600), node());
            row.terms.proof_kind = 2;
            node.proves = vec![proves(2, "11", Some(row.terms.model.clone()))];
            let input = JobInput::read(&row.input_ref, &row.input_commitment).expect("is one");
            let input = JobInput { stop: stop.iter().map(|stop| stop.to_string()).collect(), ..input };
            (row.input_commitment, row.input_ref) = input.carried().expect("fits");
            judge(&row, &node)
        };
        assert_eq!(head(&[]), Verdict::Take("tiny".into()));
        assert!(matches!(head(&["Paris"]), Verdict::Decline(Cause::Input, _)));
    }

    #[test]
    fn all_fees_of_a_job_count_before_its_claim() {
        let quote = |fee, most| Quote { fee: Amount(fee), most, refusal: Some("not yet".into()) };
        let purse = |today_wei| Purse { max_fee_wei: 100, today_wei };
        let judged = |quotes: &[Quote], pays| {
            let quotes: Vec<(&str, Quote)> = quotes.iter().map(|quote| ("it", quote.clone())).collect();
            fees(&quotes, Amount(pays), purse(1000))
        };
        let claim = || quote(10, None);
        assert_eq!(judged(&[claim()], 30), Fees::Good);
        assert!(matches!(judged(&[claim()], 29), Fees::High(_)));
        assert!(matches!(judged(&[claim()], 9), Fees::TooHigh(_)));
        assert_eq!(judged(&[claim(), quote(20, Some(Amount(100)))], 90), Fees::Good);
        assert!(matches!(judged(&[claim(), quote(21, None)], 90), Fees::High(_)));
        assert!(matches!(judged(&[claim(), quote(90, None)], 90), Fees::TooHigh(_)));
        assert!(matches!(judged(&[claim(), quote(20, Some(Amount(101)))], 90), Fees::High(_)));
        let rows = |state, proof_kind| {
            let mut row = row(1);
            (row.state, row.terms.proof_kind) = (state, proof_kind);
            [row]
        };
        let quotes = [("claim", quote(1, Some(Amount(7)))), ("result", quote(1, Some(Amount(20))))];
        assert_eq!(owed(&rows(State::Claiming, 0), &quotes, 100), 27);
        assert_eq!(owed(&rows(State::Working, 1), &quotes, 100), 120, "a proof whose price is not known takes what one may");
        assert_eq!(owed(&rows(State::Proving, 1), &quotes, 100), 100);
        let both = [("it", quote(1, Some(Amount(60)))), ("it", quote(1, Some(Amount(60))))];
        assert_eq!(fees(&both, Amount(90), purse(120)), Fees::Good);
        assert!(
            matches!(fees(&both, Amount(90), purse(119)), Fees::High(_)),
            "today's last claim would be signed, its result not"
        );
    }

    #[test]
    fn half_of_the_time_is_kept_for_reading_an_answer_that_is_traced() {
        let left = Duration::from_secs(60);
        assert_eq!((for_answer(false, left), for_answer(true, left)), (left, left / 2));
    }

    #[test]
    fn what_may_come_is_waited_for() {
        let waiting = |change: &dyn Fn(&mut Standing)| {
            let mut node = node();
            change(&mut node);
            match judge(&row(1), &node) {
                Verdict::Wait(cause, _) => cause,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(waiting(&|node| node.models[0].is_free = false), Cause::Room);
        assert_eq!(waiting(&|node| node.is_in_network = None), Cause::Network);
        assert_eq!(
            waiting(&|node| {
                node.is_starting = true;
                node.models.clear();
            }),
            Cause::Model
        );
        assert_eq!(
            waiting(&|node| {
                node.is_starting = true;
                node.can_store = false;
            }),
            Cause::Storage
        );
    }

    #[test]
    fn only_the_very_job_that_was_told_is_the_same() {
        let row = row(1);
        let account = "0xAb";
        let job = |state, host: Option<&str>| Job {
            client: row.client.clone(),
            terms: row.terms.clone(),
            input_commitment: row.input_commitment.clone(),
            state,
            host: host.map(str::to_owned),
            until_s: Some(9),
            attempts: 1,
            proven: false,
        };
        let delivered = |owes_proof| OnChain::Delivered { until_s: 9, owes_proof, objected: false };
        assert_eq!(compare(&row, None, account), OnChain::Absent);
        assert_eq!(compare(&row, Some(&job(JobState::Open, None)), account), OnChain::Open);
        assert_eq!(compare(&row, Some(&job(JobState::Claimed, Some("0xaB"))), account), OnChain::Ours { until_s: 9 });
        assert_eq!(compare(&row, Some(&job(JobState::Claimed, Some("0xcc"))), account), OnChain::Taken);
        assert_eq!(compare(&row, Some(&job(JobState::Delivered, Some("0xab"))), account), delivered(false));
        let asks = |proven| {
            let mut asks = row.clone();
            asks.terms.proof_kind = 1;
            let job = Job { terms: asks.terms.clone(), proven, ..job(JobState::Delivered, Some("0xab")) };
            compare(&asks, Some(&job), account)
        };
        assert_eq!((asks(false), asks(true)), (delivered(true), delivered(false)));
        let changed = |state| Job { input_commitment: "0x".into(), ..job(state, Some("0xab")) };
        assert_eq!(compare(&row, Some(&changed(JobState::Open)), account), OnChain::Another);
        assert_eq!(compare(&row, Some(&changed(JobState::Claimed)), account), OnChain::ClaimedAnother);
        let cheaper = Job { terms: JobTerms { max_amount: Amount(1), ..row.terms.clone() }, ..job(JobState::Open, None) };
        assert_eq!(compare(&row, Some(&cheaper), account), OnChain::Another);
        // The contract keeps no time for a proof that is not asked for.
        let mut told = row.clone();
        (told.terms.prove_s, told.terms.resolve_s) = (60, 60);
        assert_eq!(compare(&told, Some(&job(JobState::Open, None)), account), OnChain::Open);
    }

    #[test]
    fn every_cause_has_a_word_of_its_own_and_says_what_would_change_it() {
        for cause in Cause::ALL {
            assert_eq!(Cause::of(cause.word()), Some(cause));
            assert!(cause.advice().ends_with('.'), "{cause:?}");
        }
    }
}
