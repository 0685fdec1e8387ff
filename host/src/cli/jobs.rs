//! `fabstir-node jobs` and `fabstir-node why`: what this node's journal says of posted jobs. Neither asks the chain.

use std::collections::BTreeMap;

use clap::Args;
use serde_json::{Value, json};

use super::{ConfigArgs, Failure, print, table};
use crate::market::coins;
use crate::market::journal::jobs::{JobRow, State, counts, last};
use crate::market::journal::look;
use crate::market::seller::jobs::Cause;

/// The coin of amounts in the journal, where the chain is not asked for its name.
const COIN: &str = "ETH";

/// Lists the posted jobs that this node has seen, and what has come of each.
///
/// It reads the node's journal, whether the node runs or not. The states: seen (it may still be taken), declined, missed, claiming,
/// claimed, working, stored, submitting, submitted (the client may object), abandoning, settled (paid), failed (claimed, and not paid).
#[derive(Debug, Args)]
pub struct Jobs {
    /// Shows only jobs in this state.
    #[arg(long, value_name = "STATE", value_parser = state)]
    state: Option<State>,

    /// How many are shown, the last posted ones.
    #[arg(long, value_name = "COUNT", default_value_t = 50)]
    last: usize,

    #[command(flatten)]
    config: ConfigArgs,
}

/// Says why posted jobs were not won, and what would change it.
///
/// Jobs that this node has seen are counted by what kept it from them. WAITING are those of which it may still get some. It reads the node's
/// journal, whether the node runs or not.
#[derive(Debug, Args)]
pub struct Why {
    #[command(flatten)]
    config: ConfigArgs,
}

fn state(word: &str) -> Result<State, String> {
    let known = || State::ALL.map(State::word).join(", ");
    State::of(word).ok_or_else(|| format!("the states are {}", known()))
}

impl Jobs {
    pub fn execute(self, json: bool) -> Result<(), Failure> {
        let config = self.config.load()?.config;
        let mut rows = match look(&config.node.data_dir)? {
            Some(journal) => last(&journal, self.state, self.last)?,
            None => Vec::new(),
        };
        rows.reverse();
        let mut shown = vec![["JOB", "STATE", "MODEL", "MOST", "PAID", "WHY"].map(str::to_owned)];
        shown.extend(rows.iter().map(line));
        let text = if rows.is_empty() { "no posted job was seen".to_owned() } else { table(&shown) };
        Ok(print(json, &json!({ "jobs": rows }), text)?)
    }
}

fn line(row: &JobRow) -> [String; 6] {
    let none = || "-".to_owned();
    let why = match (&row.cause, &row.why) {
        (Some(cause), Some(why)) => format!("{cause}: {why}"),
        _ => String::new(),
    };
    [
        row.id.to_string(),
        row.state.to_string(),
        row.model.clone().unwrap_or_else(none),
        coins(row.terms.max_amount, COIN),
        row.paid.map_or_else(none, |paid| coins(paid, COIN)),
        why,
    ]
}

/// What one cause has kept this node from.
#[derive(Default)]
struct Kept {
    over: u64,
    waiting: u64,
    failed: u64,
}

impl Why {
    pub fn execute(self, json: bool) -> Result<(), Failure> {
        let config = self.config.load()?.config;
        let counted = match look(&config.node.data_dir)? {
            Some(journal) => counts(&journal)?,
            None => Vec::new(),
        };
        let (value, text) = explain(&counted);
        Ok(print(json, &value, text)?)
    }
}

fn explain(counted: &[(State, Option<String>, u64)]) -> (Value, String) {
    let mut causes: BTreeMap<&str, Kept> = BTreeMap::new();
    let seen: u64 = counted.iter().map(|(.., count)| count).sum();
    for (state, cause, count) in counted {
        let Some(cause) = cause else { continue };
        let kept = causes.entry(cause).or_default();
        match state {
            State::Seen => kept.waiting += count,
            State::Failed | State::Abandoning => kept.failed += count,
            State::Declined | State::Missed => kept.over += count,
            _ => {}
        }
    }
    causes.retain(|_, kept| kept.over + kept.waiting + kept.failed > 0);
    let mut causes: Vec<(&str, Kept)> = causes.into_iter().collect();
    causes.sort_by_key(|(_, kept)| std::cmp::Reverse(kept.over + kept.waiting + kept.failed));
    let of =
        |wanted: &[State]| -> u64 { counted.iter().filter(|(state, ..)| wanted.contains(state)).map(|(.., count)| count).sum() };
    let not_won = of(&[State::Declined, State::Missed]);
    let waiting = of(&[State::Seen]);
    let won = seen - not_won - waiting;
    let advice = |cause: &str| Cause::of(cause).map_or("A cause that this program does not know: update it.", Cause::advice);
    let value = json!({
        "seen": seen, "won": won, "not_won": not_won, "waiting": waiting,
        "causes": causes.iter().map(|(cause, kept)| json!({
            "cause": cause, "not_won": kept.over, "waiting": kept.waiting, "failed": kept.failed, "advice": advice(cause),
        })).collect::<Vec<_>>(),
    });
    let mut text = format!("{seen} posted jobs were seen: {won} won, {not_won} not, {waiting} may still be.");
    if !causes.is_empty() {
        let mut rows = vec![["CAUSE", "NOT WON", "WAITING", "FAILED", "WHAT WOULD CHANGE IT"].map(str::to_owned)];
        rows.extend(causes.iter().map(|(cause, kept)| {
            let number = |count: u64| count.to_string();
            [(*cause).to_owned(), number(kept.over), number(kept.waiting), number(kept.failed), advice(cause).to_owned()]
        }));
        text = format!("{text}\n\n{}", table(&rows));
    }
    (value, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_are_counted_once_and_the_most_frequent_cause_comes_first() {
        let counted = [
            (State::Declined, Some("price".into()), 3),
            (State::Missed, Some("lost".into()), 4),
            (State::Missed, Some("price".into()), 2),
            (State::Seen, Some("room".into()), 1),
            (State::Seen, None, 1),
            (State::Settled, None, 7),
            (State::Failed, Some("time".into()), 1),
        ];
        let (value, text) = explain(&counted);
        assert_eq!((value["seen"].as_u64(), value["won"].as_u64(), value["waiting"].as_u64()), (Some(19), Some(8), Some(2)));
        let causes: Vec<&str> =
            value["causes"].as_array().expect("a list").iter().filter_map(|cause| cause["cause"].as_str()).collect();
        assert_eq!(causes, ["price", "lost", "room", "time"]);
        assert!(text.contains("network.price_input_wei_per_mtok"), "{text}");
    }
}
