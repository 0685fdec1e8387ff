//! What this account has bought: one row per session that it has funded.

use std::str::FromStr;

use fabstir_plugin_api::chain::{Amount, SessionId, Signature, Terms, Voucher};
use fabstir_plugin_api::transport::PeerId;
use rusqlite::{Connection, Row, named_params};
use serde::{Deserialize, Serialize};

use super::{JournalError, text, value};

/// How far a purchase is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PurchaseState {
    /// Its order may be on its way, or not have been given.
    Opening,
    /// The deposit is in the contract.
    Open,
    /// The node has said that it settles, or the contract was told to close it.
    Closing,
    /// The deposit is divided, or was never paid in.
    Over,
}

impl PurchaseState {
    fn text(self) -> &'static str {
        match self {
            PurchaseState::Opening => "opening",
            PurchaseState::Open => "open",
            PurchaseState::Closing => "closing",
            PurchaseState::Over => "over",
        }
    }
}

impl FromStr for PurchaseState {
    type Err = JournalError;

    fn from_str(text: &str) -> Result<Self, JournalError> {
        let states = [PurchaseState::Opening, PurchaseState::Open, PurchaseState::Closing, PurchaseState::Over];
        let found = states.into_iter().find(|state| state.text() == text);
        found.ok_or_else(|| JournalError::Corrupt(format!("`{text}` is no state of a purchase")))
    }
}

/// A session that this account has funded, or meant to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Bought {
    pub session: SessionId,
    pub terms: Terms,
    /// The host's signature over the terms.
    #[serde(skip)]
    pub offer: Signature,
    /// The node, by its name in the network.
    pub peer: PeerId,
    pub model: String,
    pub deposit: Amount,
    pub state: PurchaseState,
    /// The last voucher that was signed; one of nothing before the first.
    pub voucher: Voucher,
    #[serde(skip)]
    pub signature: Signature,
    /// How the contract has divided the deposit, once it is over.
    pub to_host: Option<Amount>,
    pub to_client: Option<Amount>,
    pub why: Option<String>,
    pub opened_ms: u64,
    pub changed_ms: u64,
}

/// Notes a purchase before its order is given.
pub fn begin(connection: &Connection, bought: &Bought) -> Result<(), JournalError> {
    connection.execute(
        "INSERT INTO purchases (id, terms, offer, peer, model, deposit, state, voucher, signature, opened_ms, changed_ms)
         VALUES (:id, :terms, :offer, :peer, :model, :deposit, :state, :voucher, :signature, :opened, :changed)",
        named_params! {
            ":id": bought.session,
            ":terms": text(&bought.terms)?,
            ":offer": bought.offer,
            ":peer": bought.peer.0,
            ":model": bought.model,
            ":deposit": bought.deposit.to_string(),
            ":state": bought.state.text(),
            ":voucher": text(&bought.voucher)?,
            ":signature": bought.signature,
            ":opened": bought.opened_ms as i64,
            ":changed": bought.changed_ms as i64,
        },
    )?;
    Ok(())
}

/// Notes a voucher before it is sent.
pub fn promise(connection: &Connection, voucher: &Voucher, signature: &[u8], now_ms: u64) -> Result<(), JournalError> {
    let changed = connection.execute(
        "UPDATE purchases SET voucher = ?2, signature = ?3, changed_ms = ?4 WHERE id = ?1",
        (&voucher.session, text(voucher)?, signature, now_ms as i64),
    )?;
    known(changed, &voucher.session)
}

/// Notes how far a purchase is.
pub fn moved(
    connection: &Connection,
    session: &SessionId,
    state: PurchaseState,
    why: Option<&str>,
    now_ms: u64,
) -> Result<(), JournalError> {
    let changed = connection.execute(
        "UPDATE purchases SET state = ?2, why = coalesce(?3, why), changed_ms = ?4 WHERE id = ?1",
        (session, state.text(), why, now_ms as i64),
    )?;
    known(changed, session)
}

/// Notes how the deposit was divided.
pub fn over(
    connection: &Connection,
    session: &SessionId,
    to_host: Amount,
    to_client: Amount,
    now_ms: u64,
) -> Result<(), JournalError> {
    let changed = connection.execute(
        "UPDATE purchases SET state = 'over', to_host = ?2, to_client = ?3, changed_ms = ?4 WHERE id = ?1",
        (session, to_host.to_string(), to_client.to_string(), now_ms as i64),
    )?;
    known(changed, session)
}

fn known(changed: usize, session: &SessionId) -> Result<(), JournalError> {
    match changed {
        0 => Err(JournalError::Corrupt(format!("there is no purchase {session}"))),
        _ => Ok(()),
    }
}

/// Every purchase, the newest first.
pub fn all(connection: &Connection) -> Result<Vec<Bought>, JournalError> {
    let mut statement = connection.prepare("SELECT * FROM purchases ORDER BY opened_ms DESC, id")?;
    let rows = statement.query_and_then([], read)?;
    rows.collect()
}

fn read(row: &Row<'_>) -> Result<Bought, JournalError> {
    let amount = |text: String| text.parse().map_err(|error| JournalError::Corrupt(format!("`{text}` is no amount: {error}")));
    let divided = |column: &str| row.get::<_, Option<String>>(column)?.map(amount).transpose();
    Ok(Bought {
        session: row.get("id")?,
        terms: value(&row.get::<_, String>("terms")?)?,
        offer: row.get("offer")?,
        peer: PeerId(row.get("peer")?),
        model: row.get("model")?,
        deposit: amount(row.get("deposit")?)?,
        state: row.get::<_, String>("state")?.parse()?,
        voucher: value(&row.get::<_, String>("voucher")?)?,
        signature: row.get("signature")?,
        to_host: divided("to_host")?,
        to_client: divided("to_client")?,
        why: row.get("why")?,
        opened_ms: row.get::<_, i64>("opened_ms")? as u64,
        changed_ms: row.get::<_, i64>("changed_ms")? as u64,
    })
}

#[cfg(test)]
pub(in crate::market) mod tests {
    use super::*;
    use crate::market::{Journal, NATIVE, transcript};

    pub(in crate::market) fn bought(digit: &str, deposit: u128) -> Bought {
        let session = format!("0x{}", digit.repeat(64));
        let account = |digit: &str| format!("0x{}", digit.repeat(40));
        let terms = Terms {
            host: account("1"),
            client: account("2"),
            model: session.clone(),
            coin: NATIVE.into(),
            price_input_per_mtok: Amount(1_000_000),
            price_output_per_mtok: Amount(4_000_000),
            expires_s: 10,
            settle_window_s: 20,
            valid_until_s: 5,
            nonce: session.clone(),
        };
        let voucher = Voucher {
            session: session.clone(),
            host: account("1"),
            amount: Amount(0),
            input_tokens: 0,
            output_tokens: 0,
            transcript: transcript::nothing(),
        };
        Bought {
            session,
            terms,
            offer: vec![1; 65],
            peer: PeerId("node".into()),
            model: "m".into(),
            deposit: Amount(deposit),
            state: PurchaseState::Opening,
            voucher,
            signature: Vec::new(),
            to_host: None,
            to_client: None,
            why: None,
            opened_ms: 7,
            changed_ms: 7,
        }
    }

    #[tokio::test]
    async fn a_purchase_reads_back_as_it_was_written_through_its_whole_life() {
        let folder = tempfile::tempdir().expect("a folder");
        let journal = Journal::open(folder.path()).expect("opens");
        let mut wanted = bought("5", u128::MAX);
        let look = async || journal.write(|connection| all(connection)).await.expect("reads");
        let row = wanted.clone();
        journal.write(move |connection| begin(connection, &row)).await.expect("begins");
        assert_eq!(look().await, [wanted.clone()]);

        wanted.voucher.amount = Amount(1 << 100);
        (wanted.signature, wanted.state, wanted.changed_ms) = (vec![7; 65], PurchaseState::Open, 9);
        let row = wanted.clone();
        let changes = journal.write(move |connection| {
            promise(connection, &row.voucher, &row.signature, 8)?;
            moved(connection, &row.session, PurchaseState::Open, None, 9)
        });
        changes.await.expect("changes");
        assert_eq!(look().await, [wanted.clone()]);

        (wanted.state, wanted.changed_ms) = (PurchaseState::Over, 10);
        (wanted.to_host, wanted.to_client) = (Some(Amount(3)), Some(Amount(u128::MAX - 3)));
        let row = wanted.clone();
        let divided = journal.write(move |connection| over(connection, &row.session, Amount(3), Amount(u128::MAX - 3), 10));
        divided.await.expect("is over");
        assert_eq!(look().await, [wanted]);
    }

    #[tokio::test]
    async fn a_voucher_of_a_purchase_that_is_not_there_is_an_error() {
        let folder = tempfile::tempdir().expect("a folder");
        let journal = Journal::open(folder.path()).expect("opens");
        let voucher = bought("6", 1).voucher;
        let promised = journal.write(move |connection| promise(connection, &voucher, &[1], 1)).await;
        assert!(matches!(promised, Err(JournalError::Corrupt(_))), "{promised:?}");
    }
}
