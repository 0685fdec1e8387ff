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
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::{Desk, DeskError, Seller};
use crate::clock::now_ms;
use crate::market::journal::sessions::{self, SessionRow, SessionState};

/// How often it is looked what is to be settled, and how often the chain is asked about each session.
const LOOK: Duration = Duration::from_secs(1);
const ASK: Duration = Duration::from_secs(15);
/// How long the chain may take to answer, and how long a look waits for a transaction: the next one goes on with it.
const QUESTION: Duration = Duration::from_secs(10);
const WITHIN: Duration = Duration::from_secs(60);
/// How often the journal is told what is delivered and not promised.
const TELL: Duration = Duration::from_secs(2);
/// The pause before a session is looked at again that could not be settled.
const LATER: Duration = Duration::from_secs(30);
/// Sessions that are settled at the same time.
const AT_ONCE: usize = 16;

/// What the loop is told from outside.
#[derive(Default)]
pub struct Settling {
    /// Sessions that their clients have left, until they are settled, and whether they have not been looked at since.
    wanted: Mutex<HashMap<SessionId, bool>>,
    woken: Notify,
}

impl Settling {
    /// This session is to be settled at once.
    pub fn now(&self, id: &SessionId) {
        self.wanted.lock().insert(id.clone(), true);
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

/// What the chain says of a session decides, and how long nobody has used it. `block_s` is the time of the newest block: what the contract
/// would say now; `now_s` is the time of this machine, where that is later.
fn step(row: &SessionRow, session: &Session, block_s: u64, now_s: u64, leave: bool) -> Step {
    let settle_by_s = match session.state {
        OnChain::Settled => return Step::Over(session.paid),
        OnChain::Closing { settle_by_s } => settle_by_s,
        _ => session.expires_s + session.settle_window_s,
    };
    // A clock that is ahead loses nothing.
    if block_s > settle_by_s {
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
        let mut busy: HashSet<SessionId> = HashSet::new();
        let mut steps = FuturesUnordered::new();
        let mut exposed: HashMap<SessionId, Amount> = HashMap::new();
        let mut tell = tokio::time::interval(TELL);
        loop {
            match self.due(&mut asked, &busy).await {
                Ok(due) => {
                    for (row, leave) in due.into_iter().take(AT_ONCE - steps.len()) {
                        busy.insert(row.voucher.session.clone());
                        steps.push(async move {
                            let id = row.voucher.session.clone();
                            (id, self.advance(desk, row, leave).await)
                        });
                    }
                }
                Err(error) => {
                    tracing::warn!(code = %error.code, %error, "It cannot be found out what is to be settled; trying again.")
                }
            }
            tokio::select! {
                Some((id, outcome)) = steps.next() => {
                    busy.remove(&id);
                    let rest = match outcome {
                        Ok(()) => ASK,
                        Err(error) => {
                            tracing::warn!(session = %id, %error, "A session is not settled yet.");
                            LATER
                        }
                    };
                    let rest = rest.min(Duration::from_secs(self.config.settle_window_s / 3)).max(LOOK);
                    asked.insert(id, Instant::now() + rest);
                }
                // Whoever wakes it is looked for at once.
                () = self.settling.woken.notified() => {}
                _ = tell.tick() => self.tell(&mut exposed).await,
                () = tokio::time::sleep(LOOK) => {}
            }
        }
    }

    /// Has the journal say how much is delivered and not promised, for those who read it while the node runs.
    async fn tell(&self, told: &mut HashMap<SessionId, Amount>) {
        let now: HashMap<SessionId, Amount> = self.tabs.all().iter().map(|tab| (tab.id.clone(), tab.exposure())).collect();
        let changed = |(id, exposed): &(&SessionId, &Amount)| told.get(*id).copied().unwrap_or_default() != **exposed;
        let news: Vec<(SessionId, Amount)> = now.iter().filter(changed).map(|(id, exposed)| (id.clone(), *exposed)).collect();
        *told = now;
        if news.is_empty() {
            return;
        }
        if let Err(error) = self.journal.write(move |transaction| sessions::expose(transaction, &news)).await {
            tracing::debug!(%error, "What is delivered and not promised is not noted.");
        }
    }

    /// The sessions to look at now, those first that were asked for or have waited the longest, and whether each is to be left.
    async fn due(&self, asked: &mut HashMap<SessionId, Instant>, busy: &HashSet<SessionId>) -> Result<Vec<(SessionRow, bool)>> {
        let rows = self.journal.write(|transaction| sessions::list(transaction, &[SessionState::Open, SessionState::Settling]));
        let rows = rows.await?;
        asked.retain(|id, _| rows.iter().any(|row| row.voucher.session == *id));
        let wanted = {
            let mut wanted = self.settling.wanted.lock();
            wanted.retain(|id, _| rows.iter().any(|row| row.voucher.session == *id));
            // The first look comes at once, the others when it is their turn.
            let now: HashSet<SessionId> = wanted.iter().filter(|(_, first)| **first).map(|(id, _)| id.clone()).collect();
            wanted.iter_mut().filter(|(id, _)| !busy.contains(*id)).for_each(|(_, first)| *first = false);
            wanted.keys().map(|id| (id.clone(), now.contains(id))).collect::<HashMap<SessionId, bool>>()
        };
        let now = Instant::now();
        let mut due: Vec<(SessionRow, bool)> = rows
            .into_iter()
            .filter(|row| {
                let id = &row.voucher.session;
                let at_once = wanted.get(id).is_some_and(|first| *first);
                !busy.contains(id) && (at_once || asked.get(id).is_none_or(|next| *next <= now))
            })
            .map(|row| {
                let leave = wanted.contains_key(&row.voucher.session) || self.is_left(&row);
                (row, leave)
            })
            .collect();
        due.sort_by_key(|(row, leave)| (!leave, asked.get(&row.voucher.session).copied()));
        Ok(due)
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
        let heads = desk.chain.heads(&cx()).await?;
        let session = match desk.chain.session(&cx(), id.clone(), Sure::Latest).await {
            // Its block was taken back, and comes again as long as the offer holds: only a safe block is the end of that.
            Err(error) if error.code == Code::NotFound && heads.safe.time_s > row.terms.valid_until_s => {
                return match desk.chain.session(&cx(), id.clone(), Sure::Safe).await {
                    Err(error) if error.code == Code::NotFound => {
                        self.close(&id, SessionState::Lost, None, Some("the chain has taken the deposit back")).await
                    }
                    _ => Err(error.into()),
                };
            }
            session => session?,
        };
        let block_s = heads.latest.time_s;
        match step(&row, &session, block_s, block_s.max(now_ms() / 1000), leave) {
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
