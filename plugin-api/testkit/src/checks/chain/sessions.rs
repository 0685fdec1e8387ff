//! A session from its offer to its money: what nodes and clients sign is what the contract takes.

use anyhow::{Context, Result, ensure};
use fabstir_plugin_api::chain::*;

use super::actor::Actor;
use super::key::Key;
use super::{MILLI, hash_of, now_s, same_account, session_terms, unique};
use crate::harness::{During, Harness, patient};
use crate::report::Outcome;

/// What the node puts down: more than a development market asks for.
const STAKE: u128 = 10_000 * MILLI;

pub async fn vouchers_are_paid(harness: &Harness) -> Result<Outcome> {
    let host = match Actor::start(harness, "vouchers-are-paid, host").await? {
        Ok(actor) => actor,
        Err(skip) => return Ok(skip),
    };
    let client = match Actor::start(harness, "vouchers-are-paid, client").await? {
        Ok(actor) => actor,
        Err(skip) => return Ok(skip),
    };
    let (_signers, payout) = ((host.sign_all().await?, client.sign_all().await?), node(&host).await?);

    let now = host.heads.latest.time_s.max(now_s());
    let terms = Terms {
        host: host.key.account.clone(),
        client: client.key.account.clone(),
        expires_s: now + 86_400,
        settle_window_s: 3600,
        valid_until_s: now + 3600,
        nonce: hash_of(&unique("nonce")),
        ..session_terms()
    };
    let payload = client.chain.offer_payload(&patient(), terms.clone()).await.during("offer_payload")?;
    let opening = |offer: Signature| Act::OpenSession { terms: terms.clone(), deposit: Amount(MILLI), offer };
    is_refused(&client, "a session whose offer the client has signed itself", opening(client.key.sign(&payload))).await?;
    let opened = client.done(&unique("open"), &opening(host.key.sign(&payload))).await?;
    let session = opened.made.context("an order that has opened a session does not tell its id")?;
    let read = host.chain.session(&patient(), session.clone(), Sure::Latest).await.during("session")?;
    let named = client.chain.session_id(&patient(), terms.clone()).await.during("session_id")?;
    ensure!(session == named, "the terms are said to make the session {named}, they have made {session}");
    let alike = [(&read.host, &terms.host), (&read.client, &terms.client), (&read.coin, &terms.coin)];
    ensure!(alike.into_iter().all(|(one, other)| same_account(one, other)), "opened under {terms:?}, the session is {read:?}");
    let times = (read.expires_s, read.settle_window_s);
    ensure!(times == (terms.expires_s, terms.settle_window_s), "opened under {terms:?}, the session is {read:?}");
    let money = (read.deposit, read.paid, read.state);
    ensure!(money == (Amount(MILLI), Amount(0), SessionState::Active), "a session that was just opened is {read:?}");

    let promise = |amount: u128, tokens: u64| Voucher {
        session: session.clone(),
        host: terms.host.clone(),
        amount: Amount(amount),
        input_tokens: tokens,
        output_tokens: tokens,
        transcript: hash_of("transcript"),
    };
    let (quarter, half) = (promise(MILLI / 4, 100), promise(MILLI / 2, 200));
    let settling = async |voucher: &Voucher, key: &Key, close: bool| {
        let payload = host.chain.voucher_payload(&patient(), voucher.clone()).await.during("voucher_payload")?;
        Ok::<_, anyhow::Error>(Act::Settle { voucher: voucher.clone(), signature: key.sign(&payload), close })
    };
    is_refused(&host, "a voucher that the host has signed itself", settling(&quarter, &host.key, false).await?).await?;
    let too_much = settling(&promise(MILLI + 1, 100), &client.key, false).await?;
    is_refused(&host, "a voucher over the deposit", too_much).await?;

    let credit = |account: Account| {
        let chain = host.chain.clone();
        async move { Ok::<_, anyhow::Error>(chain.balances(&patient(), account).await.during("balances")?.credit.0) }
    };
    let (before, client_before) = (credit(payout.clone()).await?, credit(terms.client.clone()).await?);
    host.done(&unique("settle"), &settling(&quarter, &client.key, false).await?).await?;
    let read = host.chain.session(&patient(), session.clone(), Sure::Latest).await.during("session")?;
    ensure!(
        (read.paid, read.state) == (quarter.amount, SessionState::Active),
        "after a voucher of {}, it is {read:?}",
        quarter.amount
    );
    let between = credit(payout.clone()).await?;
    ensure!(between > before && between <= before + MILLI / 4, "a voucher of {} has made {between} of {before}", quarter.amount);
    is_refused(&host, "a voucher a second time", settling(&quarter, &client.key, false).await?).await?;

    host.done(&unique("settle and close"), &settling(&half, &client.key, true).await?).await?;
    let read = host.chain.session(&patient(), session.clone(), Sure::Latest).await.during("session")?;
    ensure!((read.paid, read.state) == (half.amount, SessionState::Settled), "after the last voucher, it is {read:?}");
    let (after, client_after) = (credit(payout).await?, credit(terms.client.clone()).await?);
    ensure!(after > between && after <= before + MILLI / 2, "vouchers of {} have made {after} of {before}", half.amount);
    ensure!(client_after == client_before + MILLI / 2, "half of {MILLI} came back: {client_before} became {client_after}");
    is_told(&host, &session).await?;
    Ok(Outcome::Pass)
}

/// Makes the account a node unless it is one, and says where its earnings go.
async fn node(host: &Actor) -> Result<Account> {
    if let Some(payout) = host.balances().await?.payout {
        return Ok(payout);
    }
    let payout = Key::made_of("payout").account;
    let peer = "12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA".into();
    host.done(&unique("register"), &Act::Register { payout: payout.clone(), peer, stake: Amount(STAKE) }).await?;
    let balances = host.balances().await?;
    ensure!(balances.stake == Amount(STAKE), "a node that put down {STAKE} has a stake of {}", balances.stake);
    let told = balances.payout.context("a node that has registered has no payout")?;
    ensure!(same_account(&told, &payout), "what a node earns goes to {told}, not to {payout}");
    Ok(told)
}

/// The contract would not do this, and the quote says so.
async fn is_refused(actor: &Actor, what: &str, act: Act) -> Result<()> {
    let quote = actor.chain.quote(&patient(), act).await.during(&format!("quote of {what}"))?;
    ensure!(quote.refusal.is_some(), "{what} is quoted without a refusal");
    Ok(())
}

/// The events tell the session's life: opened, paid in two parts, settled.
async fn is_told(actor: &Actor, session: &str) -> Result<()> {
    let reached = actor.chain.heads(&patient()).await.during("heads")?.latest.number;
    let notices = super::events::told_up_to(&actor.chain, None, reached).await?;
    let mut told = Vec::new();
    for notice in notices {
        let Notice::Event { event, .. } = notice else { continue };
        match event {
            MarketEvent::SessionOpened { session: id, deposit, .. } if id == session => told.push(("opened", deposit.0)),
            MarketEvent::VoucherSettled { session: id, paid_now, .. } if id == session => told.push(("paid", paid_now.0)),
            MarketEvent::SessionSettled { session: id, to_client, .. } if id == session => told.push(("settled", to_client.0)),
            _ => {}
        }
    }
    let due = [("opened", MILLI), ("paid", MILLI / 4), ("paid", MILLI / 4), ("settled", MILLI / 2)];
    ensure!(told == due, "the events tell {told:?}, due were {due:?}");
    Ok(())
}
