//! Posting a job.

use std::time::Duration;

use clap::Args;
use fabstir_plugin_api::chain::{Act, Amount, Hash32, JobId, JobResult, JobTerms, MarketEvent, Progress, ProgressState, Sure};
use fabstir_plugin_api::error::Code;
use fabstir_plugin_api::inference::Message;
use fabstir_plugin_api::prover::ProofKind;
use serde_json::json;

use super::super::account::{AccountArgs, account, amount, at_desk, cx, done, of_plugin};
use super::super::network::{NetworkArgs, look, on_threads};
use super::super::{Failure, print};
use super::result::{fetched, shown};
use super::status::moment;
use super::{now_s, read, status};
use crate::clock::now_ms;
use crate::config::Config;
use crate::consumer::{Wanted, one_model};
use crate::market::history::{History, job_of};
use crate::market::journal::posted::Posted;
use crate::market::posting::JobInput;
use crate::market::{Desk, DeskError, Journal, NATIVE, Prices, coins};

/// How long nodes are looked for that offer the model.
const LOOK: Duration = Duration::from_secs(5);
/// How long the number of a job that was posted may take to be told.
const NUMBER: Duration = Duration::from_secs(10);
/// What a node has of a deadline until its word about it is here.
const SLACK_S: u64 = 60;
/// Tokens that a model's template adds to a message at most.
const TEMPLATE_TOKENS: u64 = 64;
/// Without --bond, it is one part in this many of what is put down.
const BOND_PART: u128 = 50;

/// Posts a job, and puts down what it may cost.
///
/// The prompt stands on the chain, for everybody to read. The prices decide what the node gets of the amount; the rest comes back. A
/// command that was cut off has posted or will post its job all the same: `job status` lists it.
#[derive(Debug, Args)]
pub struct Post {
    /// The model's name, or its digest: 64 hexadecimal digits, as `find --json` shows them.
    #[arg(long, short, value_name = "NAME")]
    model: String,

    /// What is put down, as in 0.01eth: the node is never paid more, and what it does not earn comes back.
    #[arg(long, value_name = "AMOUNT", value_parser = amount)]
    max: Amount,

    /// The longest answer that is paid for, in tokens.
    #[arg(long, value_name = "TOKENS", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    max_output_tokens: u32,

    /// The price of a million tokens read. Without prices, those of the cheapest node that is found.
    #[arg(long, value_name = "AMOUNT", value_parser = amount, requires = "price_output")]
    price_input: Option<Amount>,

    /// The price of a million tokens generated.
    #[arg(long, value_name = "AMOUNT", value_parser = amount, requires = "price_input")]
    price_output: Option<Amount>,

    /// Makes the choice of words repeatable.
    #[arg(long, value_name = "NUMBER")]
    seed: Option<u32>,

    /// How freely words are chosen: 0 always takes the likeliest, 1 follows the model's own odds.
    #[arg(long, value_name = "NUMBER")]
    temperature: Option<f32>,

    /// How long nodes may claim the job, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = seconds())]
    claim_within: u64,

    /// How long a node has from its claim to its result, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = seconds())]
    deliver_within: u64,

    /// How long the result waits to be accepted before its node is paid in any case, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = seconds())]
    challenge_within: u64,

    /// How many nodes may try, one after another.
    #[arg(long, value_name = "NUMBER", default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=8))]
    attempts: u8,

    /// What a node loses that claims the job and is late. Without it, 2 % of --max.
    #[arg(long, value_name = "AMOUNT", value_parser = amount)]
    bond: Option<Amount>,

    /// Pays only for a result with a proof: its kind, `:` and its program, as `commitment:0x..`.
    ///
    /// The program names a circuit and its keys; `proof ls` shows those of the provers here. The market's contracts must know a verifier
    /// for the two, and what an accepted proof says is printed.
    #[arg(long, value_name = "KIND:PROGRAM", value_parser = proof)]
    proof: Option<(ProofKind, Hash32)>,

    /// How long a node has from its result to its proof, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = seconds(), requires = "proof")]
    prove_within: u64,

    /// The contract that rules where the client objects to the result: without one, nobody can object.
    ///
    /// Nodes take the job only if their market.arbiters has it. It answers rule(uint256 jobId) with who wins and with how much of the
    /// loser's bond goes to the winner.
    #[arg(long, value_name = "ACCOUNT", value_parser = account)]
    arbiter: Option<String>,

    /// What the client puts down to object, and may lose to the node. Without it, nothing.
    #[arg(long, value_name = "AMOUNT", value_parser = amount, requires = "arbiter")]
    challenge_bond: Option<Amount>,

    /// How long the arbiter has from an objection to its ruling, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 3600, value_parser = seconds(), requires = "arbiter")]
    resolve_within: u64,

    /// Waits for the result, fetches it and prints it. Ctrl-C ends the waiting, not the job.
    #[arg(long)]
    wait: bool,

    /// How long to wait for the chain to take the job, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    within: u64,

    #[command(flatten)]
    account: AccountArgs,

    #[command(flatten)]
    network: NetworkArgs,

    /// What to ask.
    prompt: String,
}

/// A duration that the contract takes: 10 seconds to 30 days.
fn seconds() -> clap::builder::RangedU64ValueParser {
    clap::value_parser!(u64).range(10..=30 * 24 * 3600)
}

/// A kind of proof and its program.
fn proof(text: &str) -> Result<(ProofKind, Hash32), String> {
    let (kind, program) = text.split_once(':').ok_or("a kind, `:` and a program were expected, as in commitment:0x..")?;
    let kind =
        [ProofKind::Commitment, ProofKind::OutputHead, ProofKind::OnnxModel].into_iter().find(|known| json!(known) == kind);
    let kind = kind.ok_or("the kinds are commitment, output-head and onnx-model")?;
    let is_word =
        program.strip_prefix("0x").is_some_and(|digits| digits.len() == 64 && digits.bytes().all(|b| b.is_ascii_hexdigit()));
    match is_word {
        true => Ok((kind, program.to_lowercase())),
        false => Err("a program is 0x and 64 hexadecimal digits".into()),
    }
}

/// What the job is about, once that is known.
struct Draft {
    digest: String,
    prices: Prices,
    max_input_tokens: u64,
    input_commitment: String,
    input_ref: String,
}

/// A job that the chain has taken.
struct Taken {
    /// `None` where the chain did not tell in time.
    id: Option<JobId>,
    order: Progress,
    terms: JobTerms,
    /// What its proof will say, where one is asked for.
    says: Option<String>,
}

impl Post {
    pub fn execute(self, json: bool) -> Result<(), Failure> {
        let config = self.network.prepare(json)?;
        let input = self.input()?;
        let (input_commitment, input_ref) = input.carried()?;
        let account = self.account.open(&config)?;
        on_threads(async {
            let (digest, prices) = self.model(&config).await?;
            let max_input_tokens = bound(&input);
            let draft = Draft { digest, prices, max_input_tokens, input_commitment, input_ref };
            self.affordable(&draft)?;
            at_desk(&config, account, self.max, async |desk| {
                let taken = self.post(&config, desk, &draft).await?;
                match (self.wait, taken.id) {
                    (false, _) => self.tell(desk, &draft, &taken, json).await,
                    (true, Some(id)) => self.follow(&config, desk, &draft, taken, id, json).await,
                    (true, None) => {
                        let message = "the job is posted, and the chain does not tell its number: `fabstir-node job status` will";
                        Err(Failure::new(Failure::FAILED, "no_number", message))
                    }
                }
            })
            .await
        })
    }

    fn input(&self) -> Result<JobInput, Failure> {
        let usage = |message: &str| Failure::new(Failure::USAGE, "usage", message);
        if self.prompt.trim().is_empty() {
            return Err(usage("the prompt is empty: nothing to ask"));
        }
        if self.temperature.is_some_and(|temperature| !(0.0..=5.0).contains(&temperature)) {
            return Err(usage("--temperature is a number from 0 to 5"));
        }
        let message = Message { role: "user".into(), content: self.prompt.clone(), name: None };
        Ok(JobInput { messages: vec![message], temperature: self.temperature, top_p: None, seed: self.seed, stop: Vec::new() })
    }

    /// The digest of the model, and what its tokens are to cost.
    async fn model(&self, config: &Config) -> Result<(String, Prices), Failure> {
        let wanted = Wanted::parse(&self.model);
        let given = self.price_input.zip(self.price_output);
        let given = given.map(|(input, output)| Prices { input_per_mtok: input.0, output_per_mtok: output.0 });
        if let (Wanted::Digest(digest), Some(prices)) = (&wanted, given) {
            return Ok((digest.clone(), prices));
        }
        let visit = self.network.visit(config).await?;
        let found = look(&visit, Some(&wanted), LOOK).await;
        visit.end().await;
        let offers: Vec<_> = one_model(&wanted, found).into_iter().map(|(_, offer)| offer).collect();
        let failed = |code: &str, message: String| Failure::new(Failure::FAILED, code, message);
        let Some(first) = offers.first() else {
            let what = "name a node with --bootstrap, or the model's digest and both prices";
            return Err(failed("nobody", format!("nobody who offers `{wanted}` was found within {} s: {what}", LOOK.as_secs())));
        };
        let Some(digest) = first.digest.clone() else {
            return Err(failed(
                "no_digest",
                format!("`{wanted}` is no model from a file, so that no job can name it: it has no digest"),
            ));
        };
        let prices = offers.iter().map(|offer| Prices {
            input_per_mtok: offer.price_input_wei_per_mtok,
            output_per_mtok: offer.price_output_wei_per_mtok,
        });
        // They come with the cheapest first. Those who ask for nothing are no sellers.
        match given.or_else(|| prices.into_iter().find(|prices| !prices.is_free())) {
            Some(prices) => Ok((digest, prices)),
            None => {
                let message =
                    format!("the nodes that offer `{wanted}` ask for nothing: use `chat --network`, or give both prices");
                Err(failed("free", message))
            }
        }
    }

    /// Whether a node can earn anything within what is put down, however many tokens the prompt has.
    fn affordable(&self, draft: &Draft) -> Result<(), Failure> {
        let least = draft.prices.of(draft.max_input_tokens, 1);
        if self.max.0 > 0 && least <= self.max {
            return Ok(());
        }
        let message = format!(
            "--max is {} wei, and reading up to {} tokens and generating one costs up to {} wei at {} and {} wei per million: put down \
             more than that, or ask for less",
            self.max, draft.max_input_tokens, least, draft.prices.input_per_mtok, draft.prices.output_per_mtok
        );
        Err(Failure::new(Failure::FAILED, "max_too_low", message))
    }

    async fn terms(&self, desk: &Desk, draft: &Draft) -> Result<JobTerms, Failure> {
        let model = desk.chain.model_id(&cx(), draft.digest.clone()).await.map_err(|error| of_plugin(&error))?;
        Ok(JobTerms {
            model,
            coin: NATIVE.into(),
            max_amount: self.max,
            price_input_per_mtok: Amount(draft.prices.input_per_mtok),
            price_output_per_mtok: Amount(draft.prices.output_per_mtok),
            max_input_tokens: draft.max_input_tokens,
            max_output_tokens: self.max_output_tokens.into(),
            claim_by_s: now_s(&desk.chain).await? + self.claim_within,
            deliver_s: self.deliver_within,
            prove_s: if self.proof.is_some() { self.prove_within } else { 0 },
            challenge_s: self.challenge_within,
            resolve_s: if self.arbiter.is_some() { self.resolve_within } else { 0 },
            max_attempts: self.attempts,
            host_bond: self.bond.unwrap_or(Amount(self.max.0 / BOND_PART)),
            challenge_bond: self.challenge_bond.unwrap_or_default(),
            proof_kind: self.proof.as_ref().and_then(|(kind, _)| kind.number()).unwrap_or(0),
            program: self.proof.as_ref().map_or_else(|| format!("0x{}", "0".repeat(64)), |(_, program)| program.clone()),
            arbiter: self.arbiter.clone().unwrap_or_else(|| NATIVE.into()),
        })
    }

    /// Puts the job on the chain. It is in the journal first, and is forgotten only where it is certain that it was not ordered.
    async fn post(&self, config: &Config, desk: &Desk, draft: &Draft) -> Result<Taken, Failure> {
        let terms = self.terms(desk, draft).await?;
        let says = match terms.proof_kind {
            0 => None,
            kind => Some(proof_says(desk, kind, &terms.program).await?),
        };
        let Draft { input_commitment, input_ref, .. } = draft;
        let act = Act::PostJob { terms: terms.clone(), input_commitment: input_commitment.clone(), input_ref: input_ref.clone() };
        desk.quote(act.clone()).await?;
        let key = format!("post-{}", uuid::Uuid::new_v4());
        let journal = Journal::open(&config.node.data_dir)?;
        let row = Posted {
            order_key: key.clone(),
            job: None,
            model: draft.digest.clone(),
            terms: terms.clone(),
            input_commitment: input_commitment.clone(),
            input_ref: input_ref.clone(),
            posted_ms: now_ms(),
        };
        journal.keep_posted(row).await?;
        let order = match desk.follow(key.clone(), act, Duration::from_secs(self.within)).await {
            Ok(order) => order,
            Err(error) => {
                if is_void(desk, &key).await {
                    journal.forget_posted(&key).await?;
                }
                return Err(unposted(error));
            }
        };
        let id = number(desk, &order).await;
        if let Some(id) = id {
            journal.number_posted(&key, id).await?;
        }
        Ok(Taken { id, order, terms, says })
    }

    async fn tell(&self, desk: &Desk, draft: &Draft, taken: &Taken, json: bool) -> Result<(), Failure> {
        let value = json!({ "id": taken.id, "model": draft.digest, "terms": taken.terms, "order": taken.order, "proof_says": taken.says });
        Ok(print(json, &value, self.words(desk, draft, taken).await?)?)
    }

    async fn words(&self, desk: &Desk, draft: &Draft, Taken { id, order, terms, says }: &Taken) -> Result<String, Failure> {
        let coin = &desk.network.coin;
        let head = match id {
            Some(id) => format!("job {id} is posted: {}", done(order, coin)),
            None => format!(
                "the job is posted: {}; `fabstir-node job status` tells its number once the chain does",
                done(order, coin)
            ),
        };
        let price = |amount: Amount| coins(amount, coin);
        let mut lines = vec![
            head,
            format!(
                "{} are put down for it, at {} and {} for a million tokens read and generated; a node has to put down {}",
                price(terms.max_amount),
                price(terms.price_input_per_mtok),
                price(terms.price_output_per_mtok),
                price(terms.host_bond),
            ),
            format!("model {}, to be claimed until {}", draft.digest, moment(terms.claim_by_s, now_s(&desk.chain).await?)),
        ];
        lines.extend(says.iter().map(|says| format!("its node is paid only for a proof, which says: {says}")));
        if terms.arbiter != NATIVE {
            lines.push(format!(
                "{} rules where its result is objected to, which takes {} of its client",
                terms.arbiter,
                price(terms.challenge_bond)
            ));
        }
        if let Some(id) = id.filter(|_| !self.wait) {
            lines.push(format!(
                "`fabstir-node job status {id}` shows how far it is, `job result {id}` fetches the result, `job cancel {id}` takes it back \
                 while nobody has claimed it"
            ));
        }
        Ok(lines.join("\n"))
    }

    /// Follows the job to its result, and fetches it.
    async fn follow(
        &self,
        config: &Config,
        desk: &Desk,
        draft: &Draft,
        taken: Taken,
        id: JobId,
        json: bool,
    ) -> Result<(), Failure> {
        if !json {
            print(json, &json!(null), self.words(desk, draft, &taken).await?)?;
        }
        let mut awaited = Awaited::begin(desk, id, &taken.terms, json).await?;
        let result = awaited.result().await?;
        let output = fetched(&self.network, config, id, &result).await?;
        if taken.terms.proof_kind != 0 {
            awaited.proof().await?;
        }
        let Taken { order, terms, says, .. } = taken;
        let value = json!({
            "id": id, "model": draft.digest, "terms": terms, "order": order, "result": result, "output": output, "proof_says": says,
        });
        let next = format!("`fabstir-node job accept {id}` pays the node now; it is paid later in any case");
        Ok(print(json, &value, format!("\n{}\n\n{next}", shown(&output.text)))?)
    }
}

/// More tokens than this the prompt cannot have: a token stands for a byte at least, and a template adds some to each message.
fn bound(input: &JobInput) -> u64 {
    let tokens: u64 = input.messages.iter().map(|message| message.content.len() as u64 + TEMPLATE_TOKENS).sum();
    tokens.next_multiple_of(TEMPLATE_TOKENS)
}

/// Whether it is certain that an order is not carried out, now or later.
async fn is_void(desk: &Desk, key: &str) -> bool {
    match desk.chain.progress(&cx(), key.to_owned()).await {
        Ok(progress) => progress.state == ProgressState::Dead,
        Err(error) => error.code == Code::NotFound,
    }
}

fn unposted(error: DeskError) -> Failure {
    match &error {
        DeskError::Pending { .. } => {
            let message =
                format!("{error}. `fabstir-node job status` lists the job once it is posted; do not post it a second time");
            Failure::new(Failure::FAILED, "pending", message)
        }
        _ => error.into(),
    }
}

/// The number that the chain has given to the job.
async fn number(desk: &Desk, order: &Progress) -> Option<JobId> {
    let told = |progress: &Progress| progress.made.as_ref().and_then(|made| made.parse().ok());
    let ask = async {
        let mut told_now = told(order);
        while told_now.is_none() {
            tokio::time::sleep(Duration::from_millis(200)).await;
            told_now = desk.chain.progress(&cx(), order.key.clone()).await.ok().as_ref().and_then(told);
        }
        told_now
    };
    tokio::time::timeout(NUMBER, ask).await.ok().flatten()
}

/// What an accepted proof says, as the market's contracts have it.
async fn proof_says(desk: &Desk, kind: u8, program: &str) -> Result<String, Failure> {
    desk.chain.proof_statement(&cx(), kind, program.to_owned()).await.map_err(|error| match error.code {
        Code::NotFound => {
            let message = format!("no node could be paid for such a proof: {error}");
            Failure::new(Failure::FAILED, "no_verifier", message)
        }
        _ => of_plugin(&error),
    })
}

/// A posted job that is waited for.
struct Awaited<'a> {
    desk: &'a Desk,
    id: JobId,
    terms: &'a JobTerms,
    history: History,
    json: bool,
}

impl<'a> Awaited<'a> {
    async fn begin(desk: &'a Desk, id: JobId, terms: &'a JobTerms, json: bool) -> Result<Self, Failure> {
        let history = History::begin(&desk.chain, move |event| job_of(event) == Some(id)).await;
        Ok(Self { desk, id, terms, history: history.map_err(|error| of_plugin(&error))?, json })
    }

    fn tell(&self, text: String) -> Result<(), Failure> {
        if !self.json {
            print(false, &json!(null), text)?;
        }
        Ok(())
    }

    /// What happens next, if it does before this time of the contracts' clock.
    async fn next(&mut self, due_s: u64) -> Result<MarketEvent, Failure> {
        let left = (due_s + SLACK_S).saturating_sub(now_ms() / 1000);
        let id = self.id;
        match tokio::time::timeout(Duration::from_secs(left), self.history.next())
            .await
            .map(|event| event.map_err(|error| of_plugin(&error)))
        {
            Ok(Ok((_, MarketEvent::JobRefunded { .. }))) => {
                let message = format!("job {id} is over without what was asked for, and its amount came back as credit");
                Err(Failure::new(Failure::FAILED, "no_result", message))
            }
            Ok(event) => Ok(event?.1),
            Err(_) => {
                let job = read(&self.desk.chain, id, Sure::Latest).await?;
                let message =
                    format!("job {id} {}: `fabstir-node job cancel {id}` takes it back", status::state(&job, now_ms() / 1000));
                Err(Failure::new(Failure::FAILED, "no_result", message))
            }
        }
    }

    /// Waits until a node has handed in its result.
    async fn result(&mut self) -> Result<JobResult, Failure> {
        let mut due_s = self.terms.claim_by_s;
        loop {
            match self.next(due_s).await? {
                MarketEvent::JobClaimed { host, deliver_by_s, .. } => {
                    due_s = deliver_by_s;
                    self.tell(format!("claimed by {host}"))?;
                }
                MarketEvent::ClaimLost { host, .. } => {
                    due_s = self.terms.claim_by_s;
                    self.tell(format!("{host} has not kept its claim"))?;
                }
                MarketEvent::ResultSubmitted { result, .. } => {
                    let JobResult { input_tokens, output_tokens, .. } = &result;
                    self.tell(format!("handed in: {input_tokens} tokens read, {output_tokens} generated"))?;
                    return Ok(result);
                }
                _ => {}
            }
        }
    }

    /// Waits until the contract has accepted a proof of the result.
    async fn proof(&mut self) -> Result<(), Failure> {
        let due_s = now_s(&self.desk.chain).await? + self.terms.prove_s;
        loop {
            if let MarketEvent::ProofAccepted { .. } = self.next(due_s).await? {
                return self.tell("proven: the contract has accepted the proof".into());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_counts_bytes_and_the_template() {
        let message = |content: &str| Message { role: "user".into(), content: content.into(), name: None };
        let input = |messages| JobInput { messages, temperature: None, top_p: None, seed: None, stop: vec![] };
        assert_eq!(bound(&input(vec![message("")])), 64);
        assert_eq!(bound(&input(vec![message("ä")])), 128);
        assert_eq!(bound(&input(vec![message("x"), message("y")])), 192);
    }
}
