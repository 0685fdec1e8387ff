//! Hands vouchers in, one transaction for a session: when its client has said that it is over, or has closed it on the chain, when nobody has
//! used it for a while, and before its time is over.
//!
//! The journal says `settling` before anything is ordered. From then on nothing is delivered in the session, and whatever happens, the
//! next look finds out from the chain what is left to do.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use fabstir_plugin_api::chain::{Act, Amount, Session, SessionId, SessionState as OnChain, Sure};
use fabstir_plugin_api::context::Cx;
use fabstir_plugin_api::error::{Code, PluginError, Result};
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::{Desk, DeskError, Seller};
use crate::market::journal::sessions::{self, SessionRow, SessionState};
use crate::network::now_ms;

/// How often it is looked what is to be settled, and how often the chain is asked about each session.
const LOOK: Duration = Duration::from_secs(1);
const ASK: Duration = Duration::from_secs(15);
/// How long the chain may take to answer, and how long a look waits for a transaction: the next one goes on with it.
const QUESTION: Duration = Duration::from_secs(10);
const WITHIN: Duration = Duration::from_secs(60);
/// The pause before a session is looked at again that could not be settled.
const LATER: Duration = Duration::from_secs(30);
/// Sessions that are settled at the same time.
const AT_ONCE: usize = 16;

/// What the loop is told from outside.
#[derive(Default)]
pub struct Settling {
    wanted: Mutex<HashSet<SessionId>>,
    woken: Notify,
}

impl Settling {
    /// This session is to be settled at once.
    pub fn now(&self, id: &SessionId) {
        self.wanted.lock().insert(id.clone());
        self.woken.notify_one();
    }
}

/// What is to be done about a session.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    Nothing,
    /// Hand the best voucher in.
    Settle,
    /// The contract has ended it, and paid this much.
    Over(Amount),
    /// No voucher counts any more.
    Lost,
}

/// What the chain says of a session decides, and how long nobody has used it.
fn step(row: &SessionRow, session: &Session, now_s: u64, leave: bool) -> Step {
    let settle_by_s = match session.state {
        OnChain::Settled => return Step::Over(session.paid),
        OnChain::Closing { settle_by_s } => settle_by_s,
        _ => session.expires_s + session.settle_window_s,
    };
    if now_s > settle_by_s {
        return Step::Lost;
    }
    // Nothing to gain, and the client can close it.
    if row.voucher.amount <= session.paid {
        return Step::Nothing;
    }
    let closing = matches!(session.state, OnChain::Closing { .. });
    match row.state == SessionState::Settling || leave || closing || now_s >= session.expires_s {
        true => Step::Settle,
        false => Step::Nothing,
    }
}

impl Seller {
    /// Looks again and again, for as long as there is this desk.
    pub(super) async fn settle(&self, desk: &Desk) {
        let mut asked: HashMap<SessionId, Instant> = HashMap::new();
        loop {
            if let Err(error) = self.look(desk, &mut asked).await {
                tracing::warn!(code = %error.code, %error, "It cannot be found out what is to be settled; trying again.");
            }
            // Whoever wakes it is looked for at once.
            let _ = tokio::time::timeout(LOOK, self.settling.woken.notified()).await;
        }
    }

    async fn look(&self, desk: &Desk, asked: &mut HashMap<SessionId, Instant>) -> Result<()> {
        let rows = self.journal.write(|transaction| sessions::list(transaction, &[SessionState::Open, SessionState::Settling]));
        let rows = rows.await?;
        let wanted = self.settling.wanted.lock().clone();
        asked.retain(|id, _| rows.iter().any(|row| row.voucher.session == *id));
        let now = Instant::now();
        let due: Vec<(SessionRow, bool)> = rows
            .into_iter()
            .map(|row| {
                let leave = wanted.contains(&row.voucher.session) || self.is_left(&row);
                (row, leave)
            })
            .filter(|(row, leave)| {
                let id = &row.voucher.session;
                let next = asked.get(id).is_none_or(|next| *next <= now);
                next || (wanted.contains(id) && *leave)
            })
            .take(AT_ONCE)
            .collect();
        let steps = due.into_iter().map(|(row, leave)| async move {
            let id = row.voucher.session.clone();
            let outcome = self.advance(desk, row, leave).await;
            (id, outcome)
        });
        for (id, outcome) in futures::future::join_all(steps).await {
            self.settling.wanted.lock().remove(&id);
            let pause = match outcome {
                Ok(()) => ASK.min(Duration::from_secs(self.config.settle_window_s / 3)),
                Err(error) => {
                    tracing::warn!(session = %id, %error, "A session is not settled yet.");
                    LATER.min(Duration::from_secs(self.config.settle_window_s / 3))
                }
            };
            asked.insert(id, Instant::now() + pause.max(LOOK));
        }
        Ok(())
    }

    /// Whether nobody has used it for so long that nobody is expected to.
    fn is_left(&self, row: &SessionRow) -> bool {
        let idle = Duration::from_secs(self.config.idle_settle_s);
        match self.tabs.get(&row.voucher.session) {
            Some(tab) => tab.is_idle(idle),
            // From before this start.
            None => now_ms().saturating_sub(row.changed_ms.max(self.started_ms)) >= idle.as_millis() as u64,
        }
    }

    async fn advance(&self, desk: &Desk, row: SessionRow, leave: bool) -> Result<(), DeskError> {
        let cx = || Cx::new().with_timeout(QUESTION);
        let id = row.voucher.session.clone();
        let session = match desk.chain.session(&cx(), id.clone(), Sure::Latest).await {
            // Its block was taken back, and may come again; the offer does not hold for ever.
            Err(error)
                if error.code == Code::NotFound && now_ms() / 1000 > row.terms.valid_until_s + self.config.settle_window_s =>
            {
                return self.close(&id, SessionState::Lost, None, Some("the chain has taken the deposit back")).await;
            }
            session => session?,
        };
        let now_s = desk.chain.heads(&cx()).await?.latest.time_s.max(now_ms() / 1000);
        match step(&row, &session, now_s, leave) {
            Step::Nothing => Ok(()),
            Step::Over(paid) => {
                tracing::info!(session = %id, %paid, "A session is settled.");
                self.close(&id, SessionState::Settled, Some(paid), None).await
            }
            Step::Lost => {
                self.close(&id, SessionState::Lost, Some(session.paid), Some("no voucher was worth handing in in time")).await
            }
            Step::Settle => self.hand_in(desk, &id, &session, leave).await,
        }
    }

    async fn hand_in(&self, desk: &Desk, id: &SessionId, session: &Session, leave: bool) -> Result<(), DeskError> {
        let known = self.journal.write({
            let id = id.clone();
            move |transaction| sessions::get(transaction, &id)
        });
        let Some(row) = known.await.map_err(PluginError::from)? else { return Ok(()) };
        let gain = row.voucher.amount.0.saturating_sub(session.paid.0);
        let quote = desk.quote(Act::Settle { voucher: row.voucher, signature: row.signature, close: true }).await?;
        if quote.fee.0 >= gain {
            return Err(DeskError::Refused(format!("handing it in would cost {} wei in fees for {gain} wei", quote.fee)));
        }
        // Nothing is delivered from here on; what is on disk after this is the best voucher there will be.
        if let Some(tab) = self.tabs.get(id) {
            tab.end(PluginError::new(Code::Denied, "the session is being settled: fund another one"));
        }
        let named = id.clone();
        let row = self.journal.write(move |transaction| {
            sessions::turn(transaction, &named, SessionState::Settling, None, None)?;
            sessions::get(transaction, &named)
        });
        let Some(row) = row.await.map_err(PluginError::from)? else { return Ok(()) };
        let gain = row.voucher.amount.0.saturating_sub(session.paid.0);
        let act = Act::Settle { voucher: row.voucher, signature: row.signature, close: true };
        let progress = desk.carry_out(&format!("settle-{id}"), act, WITHIN).await?;
        let transaction = progress.transaction.as_deref().unwrap_or("?");
        tracing::info!(session = %id, gain, transaction, leave, "A session is settled.");
        self.close(id, SessionState::Settled, Some(Amount(session.paid.0 + gain)), None).await
    }

    async fn close(
        &self,
        id: &SessionId,
        state: SessionState,
        paid: Option<Amount>,
        why: Option<&'static str>,
    ) -> Result<(), DeskError> {
        let named = id.clone();
        let turned = self.journal.write(move |transaction| sessions::turn(transaction, &named, state, paid, why));
        turned.await.map_err(PluginError::from)?;
        if let Some(tab) = self.tabs.get(id) {
            tab.end(PluginError::new(Code::Denied, "the session is over: fund another one"));
        }
        self.tabs.remove(id);
        Ok(())
    }
}
