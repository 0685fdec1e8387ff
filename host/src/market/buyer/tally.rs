//! What a paid session has come to, as the one who pays counts it. No clock, no disk, no network: what arrives goes in, and what can be
//! promised comes out.

use std::collections::BTreeMap;

use fabstir_plugin_api::chain::{Amount, Hash32, Terms, Voucher};
use fabstir_plugin_api::error::{Code, PluginError, Result};
use fabstir_plugin_api::inference::Usage;

use crate::market::Prices;
use crate::market::transcript::{self, AnswerHash};

/// Tokens that a prompt may have beyond the bytes of the message that it came in: those of the model's template.
const TEMPLATE: u64 = 512;
/// Requests that were given up and may still have pieces under way.
const MOST_LEFT: usize = 64;

/// The count of one session.
pub(super) struct Tally {
    prices: Prices,
    deposit: Amount,
    /// What was promised before beyond the tokens that were named with it.
    before: Amount,
    /// What requests have used that came to their end.
    input: u64,
    output: u64,
    requests: BTreeMap<u64, Request>,
    /// Answers that came to their end since the last voucher, in this order.
    answers: Vec<(u64, [u8; 32])>,
    last: Voucher,
}

/// A request that pieces may still come for.
struct Request {
    hash: AnswerHash,
    /// What its prompt counts until the node has said how many tokens it had.
    estimate: u64,
    most_input: u64,
    most_output: u64,
    /// Whether a piece has arrived: before that, nothing is owed.
    begun: bool,
    output: u64,
    given_up: bool,
}

impl Request {
    fn input(&self) -> u64 {
        if self.begun { self.estimate } else { 0 }
    }
}

/// What could be promised now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Proposal {
    pub voucher: Voucher,
    /// The answers that its root is over.
    pub answers: Vec<u64>,
}

impl Tally {
    /// Goes on after a voucher: what arrived after it and was not promised is not known any more.
    pub fn new(terms: &Terms, deposit: Amount, last: Voucher) -> Self {
        let prices = Prices { input_per_mtok: terms.price_input_per_mtok.0, output_per_mtok: terms.price_output_per_mtok.0 };
        let named = prices.of(last.input_tokens, last.output_tokens);
        Self {
            prices,
            deposit,
            before: Amount(last.amount.0.saturating_sub(named.0)),
            input: last.input_tokens,
            output: last.output_tokens,
            requests: BTreeMap::new(),
            answers: Vec::new(),
            last,
        }
    }

    pub fn last(&self) -> &Voucher {
        &self.last
    }

    pub fn deposit(&self) -> Amount {
        self.deposit
    }

    /// A request goes out: `message` are its bytes.
    pub fn asked(&mut self, id: u64, message: &[u8], estimate: u64, most_output: u64) {
        let most_input = message.len() as u64 + TEMPLATE;
        let request = Request {
            hash: AnswerHash::new(message),
            estimate: estimate.min(most_input),
            most_input,
            most_output,
            begun: false,
            output: 0,
            given_up: false,
        };
        self.requests.insert(id, request);
    }

    /// A piece with text has arrived.
    ///
    /// # Errors
    /// `Protocol` where the answer would be longer than was asked for: the piece does not count.
    pub fn text(&mut self, id: u64, message: &[u8], tokens: u32) -> Result<()> {
        let Some(request) = self.requests.get_mut(&id) else { return Ok(()) };
        let output = request.output + u64::from(tokens);
        if output > request.most_output {
            return Err(broken(format!("charges {output} tokens for an answer of at most {}", request.most_output)));
        }
        request.hash.piece(message);
        (request.begun, request.output) = (true, output);
        Ok(())
    }

    /// The last piece of an answer has arrived.
    ///
    /// # Errors
    /// `Protocol` where the prompt would have more tokens than it can: it counts as it was estimated.
    pub fn done(&mut self, id: u64, message: &[u8], usage: &Usage) -> Result<()> {
        let Some(mut request) = self.requests.remove(&id) else { return Ok(()) };
        let input = u64::from(usage.prompt_tokens);
        if input > request.most_input {
            let why = format!("charges {input} tokens for a prompt that has at most {}", request.most_input);
            self.requests.insert(id, request);
            self.end(id);
            return Err(broken(why));
        }
        request.hash.piece(message);
        self.input += input;
        self.output += request.output.min(u64::from(usage.completion_tokens));
        self.answers.push((id, request.hash.end()));
        Ok(())
    }

    /// Nothing more will come for a request.
    pub fn end(&mut self, id: u64) {
        if let Some(request) = self.requests.remove(&id) {
            self.input += request.input();
            self.output += request.output;
        }
    }

    /// The answer is not wanted any more; pieces that are under way still count.
    pub fn give_up(&mut self, id: u64) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        request.given_up = true;
        let given_up: Vec<u64> = self.requests.iter().filter(|(_, request)| request.given_up).map(|(id, _)| *id).collect();
        for id in given_up.iter().take(given_up.len().saturating_sub(MOST_LEFT)) {
            self.end(*id);
        }
    }

    /// All tokens that have arrived: read and generated.
    fn tokens(&self) -> (u64, u64) {
        let requests = self.requests.values();
        requests.fold((self.input, self.output), |(input, output), request| (input + request.input(), output + request.output))
    }

    /// What all that has arrived costs.
    pub fn due(&self) -> Amount {
        let (input, output) = self.tokens();
        self.cost(input, output)
    }

    fn cost(&self, input: u64, output: u64) -> Amount {
        Amount(self.prices.of(input, output).0.saturating_add(self.before.0))
    }

    /// What is left of the deposit once the prompts of all requests are paid.
    pub fn room(&self) -> Amount {
        let (input, output) = self.tokens();
        let waiting: u64 = self.requests.values().filter(|request| !request.begun).map(|request| request.estimate).sum();
        Amount(self.deposit.0.saturating_sub(self.cost(input + waiting, output).max(self.last.amount).0))
    }

    /// The next voucher, where at least `step` would be promised with it, or an answer has come to its end. Never less than the last one
    /// promised, nor more than has arrived or is there.
    ///
    /// What is not certain yet, the prompts of answers that have not ended, is promised but for `lag`: a prompt that turns out to have fewer
    /// tokens than it was taken for is then not paid too dearly.
    pub fn next(&self, step: Amount, lag: Amount) -> Option<Proposal> {
        let (_, output) = self.tokens();
        let certain = self.cost(self.input, output);
        let due = Amount(self.due().0.saturating_sub(lag.0)).max(certain);
        let amount = due.min(self.deposit).max(self.last.amount);
        let enough = amount.0 - self.last.amount.0 >= step.0.max(1);
        if !enough && self.answers.is_empty() {
            return None;
        }
        let hashes: Vec<[u8; 32]> = self.answers.iter().map(|(_, hash)| *hash).collect();
        let voucher = Voucher {
            amount,
            input_tokens: self.input.max(self.last.input_tokens),
            output_tokens: output.max(self.last.output_tokens),
            transcript: transcript::after(&self.last.transcript, &hashes),
            ..self.last.clone()
        };
        Some(Proposal { voucher, answers: self.answers.iter().map(|(id, _)| *id).collect() })
    }

    /// What was promised so far, under another root.
    pub fn again(&self, transcript: Hash32) -> Proposal {
        Proposal { voucher: Voucher { transcript, ..self.last.clone() }, answers: Vec::new() }
    }

    /// The other side does not know any more what it has answered.
    pub fn forget_answers(&mut self) {
        self.answers.clear();
    }

    /// A proposal is signed and on disk.
    pub fn promised(&mut self, proposal: &Proposal) {
        self.answers.drain(..proposal.answers.len().min(self.answers.len()));
        self.last = proposal.voucher.clone();
    }
}

fn broken(why: String) -> PluginError {
    PluginError::new(Code::Protocol, format!("the node {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::market::journal::purchases::tests::bought;

    fn tally(deposit: u128) -> Tally {
        let bought = bought("5", deposit);
        Tally::new(&bought.terms, Amount(deposit), bought.voucher)
    }

    fn usage(prompt: u32, completion: u32) -> Usage {
        Usage { prompt_tokens: prompt, completion_tokens: completion, cached_tokens: 0 }
    }

    // A token read costs 1 wei, a token generated 4.

    #[test]
    fn a_prompt_is_owed_from_the_first_piece_on_and_exactly_at_the_end() {
        let mut tally = tally(1000);
        tally.asked(1, b"the prompt", 10, 100);
        assert_eq!((tally.due(), tally.room()), (Amount(0), Amount(990)));
        tally.text(1, b"a", 2).expect("counts");
        assert_eq!(tally.due(), Amount(10 + 8));
        tally.done(1, b"end", &usage(7, 2)).expect("counts");
        assert_eq!(tally.due(), Amount(7 + 8));
        let proposal = tally.next(Amount(1000), Amount(0)).expect("an answer has ended");
        assert_eq!((proposal.voucher.amount, proposal.answers.as_slice()), (Amount(15), &[1][..]));
        tally.promised(&proposal);
        assert_eq!(tally.next(Amount(1), Amount(0)), None);
    }

    #[test]
    fn a_prompt_that_was_taken_for_longer_than_it_is_costs_what_it_is() {
        let mut tally = tally(1000);
        tally.asked(1, b"the prompt", 30, 100);
        tally.text(1, b"a", 1).expect("counts");
        let proposal = tally.next(Amount(1), Amount(25)).expect("some of it is certain");
        assert_eq!((proposal.voucher.amount, proposal.voucher.input_tokens), (Amount(9), 0));
        tally.promised(&proposal);
        tally.done(1, b"end", &usage(7, 1)).expect("counts");
        let voucher = tally.next(Amount(1), Amount(25)).expect("has ended").voucher;
        assert_eq!((voucher.amount, voucher.input_tokens, voucher.output_tokens), (Amount(7 + 4), 7, 1));
    }

    #[test]
    fn what_was_promised_before_stays_due() {
        let mut bought = bought("5", 1000);
        // 90 wei for 20 tokens: the prompt of an answer that never ended was paid too.
        bought.voucher = Voucher { amount: Amount(90), input_tokens: 0, output_tokens: 20, ..bought.voucher };
        let mut tally = Tally::new(&bought.terms, bought.deposit, bought.voucher);
        assert_eq!((tally.due(), tally.next(Amount(1), Amount(0))), (Amount(90), None));
        tally.asked(1, b"m", 1, 100);
        tally.text(1, b"a", 1).expect("counts");
        assert_eq!(tally.next(Amount(1), Amount(0)).expect("is owed").voucher.amount, Amount(95));
    }

    #[test]
    fn a_node_that_counts_more_than_can_be_is_not_believed() {
        let mut tally = tally(1_000_000);
        tally.asked(1, b"0123456789", 3, 5);
        tally.text(1, b"a", 5).expect("as many as were asked for");
        assert_eq!(tally.text(1, b"b", 1).expect_err("one more").code, Code::Protocol);
        assert_eq!(tally.due(), Amount(3 + 20));
        assert_eq!(tally.done(1, b"end", &usage(10 + 512 + 1, 5)).expect_err("a prompt of more").code, Code::Protocol);
        assert_eq!(tally.due(), Amount(3 + 20));
        assert!(tally.next(Amount(1), Amount(0)).expect("what arrived is owed").answers.is_empty());

        // More generated than has arrived is not owed.
        tally.asked(2, b"0123456789", 3, 50);
        tally.text(2, b"a", 4).expect("counts");
        tally.done(2, b"end", &usage(1, 50)).expect("counts");
        assert_eq!(tally.due(), Amount(23 + 1 + 16));
    }

    #[test]
    fn pieces_of_an_answer_that_was_given_up_count_until_it_is_forgotten() {
        let mut tally = tally(1_000_000);
        for id in 0..=MOST_LEFT as u64 {
            tally.asked(id, b"m", 1, 100);
            tally.give_up(id);
        }
        // The oldest is forgotten.
        tally.text(0, b"late", 1).expect("is ignored");
        assert_eq!(tally.due(), Amount(0));
        tally.text(1, b"late", 1).expect("counts");
        assert_eq!(tally.due(), Amount(1 + 4));
    }

    #[test]
    fn nothing_is_promised_beyond_the_deposit() {
        let mut tally = tally(20);
        tally.asked(1, b"m", 1, 100);
        tally.text(1, b"a", 10).expect("counts");
        let proposal = tally.next(Amount(1), Amount(0)).expect("is owed");
        assert_eq!((tally.due(), proposal.voucher.amount, tally.room()), (Amount(41), Amount(20), Amount(0)));
        tally.promised(&proposal);
        tally.text(1, b"b", 10).expect("counts");
        assert_eq!(tally.next(Amount(1), Amount(0)), None);
    }

    #[test]
    fn whatever_happens_vouchers_only_grow_and_never_run_ahead() {
        let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = move |below: u64| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed % below
        };
        for round in 0..200 {
            let deposit = 200 + u128::from(random(20_000));
            let (mut tally, mut next_id) = (tally(deposit), 0);
            let (mut running, mut ended): (Vec<(u64, u64)>, Vec<u64>) = (Vec::new(), Vec::new());
            // The most that has been due at any time: a prompt can turn out to be shorter than it was taken for.
            let (mut most, mut root, mut promised) = (Amount(0), tally.last().transcript.clone(), tally.last().clone());
            let mut hashes: BTreeMap<u64, AnswerHash> = BTreeMap::new();
            for _ in 0..300 {
                match random(6) {
                    0 => {
                        let message = format!("request {next_id}");
                        tally.asked(next_id, message.as_bytes(), random(20), 1000);
                        hashes.insert(next_id, AnswerHash::new(message.as_bytes()));
                        running.push((next_id, 0));
                        next_id += 1;
                    }
                    1..=2 if !running.is_empty() => {
                        let at = random(running.len() as u64) as usize;
                        let (piece, tokens) = (format!("{}", random(1 << 20)), random(4) as u32);
                        tally.text(running[at].0, piece.as_bytes(), tokens).expect("counts");
                        hashes.get_mut(&running[at].0).expect("runs").piece(piece.as_bytes());
                        running[at].1 += u64::from(tokens);
                    }
                    3 if !running.is_empty() => {
                        let (id, output) = running.remove(random(running.len() as u64) as usize);
                        let usage = usage(random(20) as u32, (output + random(3)).saturating_sub(1) as u32);
                        tally.done(id, b"end", &usage).expect("counts");
                        hashes.get_mut(&id).expect("runs").piece(b"end");
                        ended.push(id);
                    }
                    4 if !running.is_empty() => tally.end(running.remove(random(running.len() as u64) as usize).0),
                    _ => {}
                }
                most = most.max(tally.due());
                let (step, lag) = (Amount(1 + u128::from(random(50))), Amount(random(30).into()));
                let Some(proposal) = tally.next(step, lag) else { continue };
                // One that could not be kept changes nothing.
                if random(4) == 0 {
                    continue;
                }
                let voucher = &proposal.voucher;
                assert!(voucher.amount >= promised.amount, "round {round}");
                assert!(voucher.input_tokens >= promised.input_tokens && voucher.output_tokens >= promised.output_tokens);
                assert!(voucher.amount <= most.min(Amount(deposit)), "round {round}: {voucher:?} and {most:?} was due");
                // The other side comes to the same root from what it has sent.
                assert_eq!(proposal.answers, ended);
                let answers: Vec<[u8; 32]> = ended.drain(..).map(|id| hashes.remove(&id).expect("ended").end()).collect();
                root = transcript::after(&root, &answers);
                assert_eq!(voucher.transcript, root);
                promised = voucher.clone();
                tally.promised(&proposal);
                assert_eq!(tally.last(), &promised);
            }
        }
    }
}
