//! What is left of sessions that are over, and of those that a crash has left behind: looked up on the chain, and fetched back.

use std::time::{Duration, Instant};

use fabstir_plugin_api::chain::{Act, Amount, ProgressState, Session, SessionId, SessionState, Sure};
use fabstir_plugin_api::error::{Code, PluginError};

use super::{Buyer, cx, opening, order};
use crate::clock::now_ms;
use crate::market::DeskError;
use crate::market::journal::purchases::{self, Bought, PurchaseState};

/// How long one transaction is waited for; the next sweep goes on with it.
const WITHIN: Duration = Duration::from_secs(60);
/// How long a node that has said that it settles is waited for, and how often the chain is asked meanwhile.
const SETTLING: Duration = Duration::from_secs(20);
const LOOK: Duration = Duration::from_millis(500);
/// How long a node of an earlier run that has said so is left alone.
const LEFT_ALONE: Duration = Duration::from_secs(600);

/// Which sessions are closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sweep {
    /// Those that nothing more can be bought in.
    Start,
    /// Those that nobody uses, once their nodes had time to settle.
    End,
    /// All.
    All,
}

/// What is to be done about a session that is on the chain.
#[derive(Debug, PartialEq, Eq)]
enum Fate {
    /// It is divided like this.
    Over {
        to_host: Amount,
        to_client: Amount,
    },
    /// No voucher counts any more: whoever asks gets the rest back to the client.
    Finalize,
    /// Vouchers count until then.
    Closing,
    Active,
}

fn fate(session: &Session, now_s: u64) -> Fate {
    let settle_by_s = match session.state {
        SessionState::Settled => {
            return Fate::Over { to_host: session.paid, to_client: Amount(session.deposit.0.saturating_sub(session.paid.0)) };
        }
        SessionState::Closing { settle_by_s } => settle_by_s,
        _ => session.expires_s.saturating_add(session.settle_window_s),
    };
    match session.state {
        SessionState::Active | SessionState::Closing { .. } if now_s > settle_by_s => Fate::Finalize,
        SessionState::Active => Fate::Active,
        _ => Fate::Closing,
    }
}

impl Buyer {
    /// Looks after every session that is not known to be over. What cannot be read from the chain stays as it is.
    pub async fn sweep(&self, sweep: Sweep) {
        let unfinished = match self.unfinished().await {
            Ok(unfinished) => unfinished,
            Err(error) => return tracing::error!(%error, "It cannot be read what was bought."),
        };
        let until = Instant::now() + SETTLING;
        for bought in unfinished.into_iter().filter(|bought| !self.is_used(&bought.session)) {
            let session = bought.session.clone();
            if let Err(error) = self.look_after(bought, sweep, until).await {
                tracing::warn!(%session, %error, "What is left of a session is not fetched yet: `fabstir-node market reclaim` tries again.");
            }
        }
    }

    /// Notes which sessions of this run are over: what came back can be spent again.
    pub(super) async fn refresh(&self) {
        let Ok(unfinished) = self.unfinished().await else { return };
        for bought in unfinished.into_iter().filter(|bought| bought.state == PurchaseState::Closing) {
            if let Ok(session) = self.desk.chain.session(&cx(), bought.session.clone(), Sure::Latest).await
                && let Fate::Over { to_host, to_client } = fate(&session, 0)
            {
                self.over(&bought.session, to_host, to_client).await;
            }
        }
    }

    async fn look_after(&self, bought: Bought, sweep: Sweep, until: Instant) -> Result<(), DeskError> {
        if bought.state == PurchaseState::Opening && !self.was_opened(&bought).await? {
            return Ok(());
        }
        let id = &bought.session;
        loop {
            let session = self.desk.chain.session(&cx(), id.clone(), Sure::Latest).await?;
            let now_s = self.desk.chain.heads(&cx()).await?.latest.time_s.max(now_ms() / 1000);
            let promised = bought.state == PurchaseState::Closing;
            match fate(&session, now_s) {
                Fate::Over { to_host, to_client } => return Ok(self.over(id, to_host, to_client).await),
                Fate::Finalize => {
                    self.finalize(id).await?;
                    // An endpoint may be a little behind.
                    tokio::time::sleep(LOOK).await;
                }
                Fate::Closing => return Ok(self.note(id, PurchaseState::Closing, None).await),
                Fate::Active
                    if promised && sweep == Sweep::End && Instant::now() < until && self.is_worth_it(&bought).await? =>
                {
                    tokio::time::sleep(LOOK).await;
                }
                Fate::Active if !self.is_to_be_closed(&bought, sweep) => return Ok(()),
                Fate::Active => return self.close(id, session.settle_window_s).await,
            }
        }
    }

    /// Whether an order to open a session that was noted has come to something, or may yet.
    async fn was_opened(&self, bought: &Bought) -> Result<bool, DeskError> {
        let id = &bought.session;
        let progress = match self.desk.chain.progress(&cx(), order(id)).await {
            // It was noted, and never ordered.
            Err(error) if error.code == Code::NotFound => {
                self.note(id, PurchaseState::Over, Some("the deposit was never paid in")).await;
                return Ok(false);
            }
            progress => progress?,
        };
        match progress.state {
            ProgressState::Planned | ProgressState::Sent => {
                self.desk.follow(order(id), opening(bought), WITHIN).await?;
            }
            ProgressState::Reverted { final_: true } | ProgressState::Dead if self.is_absent(id).await => {
                let why = progress.why.as_deref().unwrap_or("the deposit was not paid in");
                self.note(id, PurchaseState::Over, Some(why)).await;
                return Ok(false);
            }
            // A block that is taken back may bring another end.
            ProgressState::Reverted { .. } => return Ok(false),
            _ => {}
        }
        self.note(id, PurchaseState::Open, None).await;
        Ok(true)
    }

    /// Whether a node gains something by settling: it pays at least the fee that closing costs this account.
    async fn is_worth_it(&self, bought: &Bought) -> Result<bool, DeskError> {
        let quote = self.desk.chain.quote(&cx(), Act::CloseSession { session: bought.session.clone() }).await?;
        // What cannot be closed any more is settled in this moment.
        Ok(quote.refusal.is_some() || bought.voucher.amount > quote.fee)
    }

    fn is_to_be_closed(&self, bought: &Bought, sweep: Sweep) -> bool {
        let now = now_ms();
        let promised = bought.state == PurchaseState::Closing;
        match sweep {
            Sweep::Start if promised => now.saturating_sub(bought.changed_ms) >= LEFT_ALONE.as_millis() as u64,
            Sweep::Start => now / 1000 >= bought.terms.expires_s || bought.voucher.amount >= bought.deposit,
            Sweep::End | Sweep::All => true,
        }
    }

    async fn close(&self, id: &SessionId, window_s: u64) -> Result<(), DeskError> {
        let act = Act::CloseSession { session: id.clone() };
        match self.desk.quote(act.clone()).await {
            Ok(_) => {}
            // The node was faster.
            Err(DeskError::Refused(_)) if self.settled(id).await => return Ok(()),
            Err(error) => return Err(error),
        }
        self.desk.carry_out(&format!("close-{id}"), act, WITHIN).await?;
        tracing::info!(session = %id, window_s, "A session is closed: its node may hand vouchers in until the window is over.");
        self.note(id, PurchaseState::Closing, Some("closed by this account")).await;
        Ok(())
    }

    async fn finalize(&self, id: &SessionId) -> Result<(), DeskError> {
        let act = Act::FinalizeSession { session: id.clone() };
        match self.desk.quote(act.clone()).await {
            Ok(_) => {}
            Err(DeskError::Refused(_)) if self.settled(id).await => return Ok(()),
            Err(error) => return Err(error),
        }
        self.desk.carry_out(&format!("finalize-{id}"), act, WITHIN).await?;
        Ok(())
    }

    /// Whether it is settled by now.
    async fn settled(&self, id: &SessionId) -> bool {
        match self.desk.chain.session(&cx(), id.clone(), Sure::Latest).await.map(|session| fate(&session, 0)) {
            Ok(Fate::Over { to_host, to_client }) => {
                self.over(id, to_host, to_client).await;
                true
            }
            _ => false,
        }
    }

    async fn over(&self, id: &SessionId, to_host: Amount, to_client: Amount) {
        let named = id.clone();
        let over =
            move |connection: &rusqlite::Transaction<'_>| purchases::over(connection, &named, to_host, to_client, now_ms());
        match self.journal.write(over).await.map_err(PluginError::from) {
            Ok(()) => tracing::info!(session = %id, %to_host, %to_client, "A session is settled."),
            Err(error) => tracing::error!(session = %id, %error, "What became of a session is not in the journal."),
        }
        self.spent(id, to_host);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::market::NATIVE;

    #[test]
    fn what_the_chain_says_of_a_session_decides_what_is_done() {
        let session = |state| Session {
            host: NATIVE.into(),
            client: NATIVE.into(),
            coin: NATIVE.into(),
            deposit: Amount(100),
            paid: Amount(30),
            expires_s: 1000,
            settle_window_s: 50,
            state,
        };
        let closing = SessionState::Closing { settle_by_s: 500 };
        for (state, now_s, expected) in [
            (SessionState::Settled, 0, Fate::Over { to_host: Amount(30), to_client: Amount(70) }),
            (SessionState::Active, 1050, Fate::Active),
            (SessionState::Active, 1051, Fate::Finalize),
            (closing, 500, Fate::Closing),
            (closing, 501, Fate::Finalize),
            // Nothing is done about what is not known.
            (SessionState::Unknown, u64::MAX, Fate::Closing),
        ] {
            assert_eq!(fate(&session(state), now_s), expected, "{state:?} at {now_s}");
        }
    }
}
