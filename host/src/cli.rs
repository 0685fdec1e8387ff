//! The command line. The doc comments here are the manual: `-h` prints their first lines, `--help` and `docs/cli.md` all of them.

use std::ffi::OsString;
use std::fmt;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use serde_json::{Value, json};

use crate::config::{Flag, Loaded, Problems, Sources};

mod account;
mod cache;
mod chat;
mod config;
mod earnings;
mod job;
mod jobs;
mod keys;
mod log;
mod market;
mod network;
mod plugin;
mod proof;
mod purchases;
mod run;
mod storage;
#[cfg(test)]
mod tests;

/// A node of a peer-to-peer marketplace for LLM inference.
///
/// The node loads backends as plugins, named in plugins.toml, and serves them to any client that speaks the OpenAI API.
///
/// Start with `fabstir-node run`, and talk to it with `fabstir-node chat`.
#[derive(Debug, Parser)]
#[command(name = "fabstir-node", version, propagate_version = true, max_term_width = 100, after_long_help = EXIT_CODES)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,

    /// Prints one JSON value instead of text; with `run`, the log as JSON lines.
    ///
    /// Errors come as JSON too, on standard output: {"error": {"code": .., "message": ..}}.
    #[arg(long, global = true, display_order = 900)]
    json: bool,
}

const EXIT_CODES: &str = "\
Exit codes:
  0  it worked
  1  it did not: the message says why
  2  the command line is wrong
  3  the configuration is wrong
  4  the node cannot be reached";

#[derive(Debug, Subcommand)]
enum Command {
    Run(run::Run),
    Chat(chat::Chat),
    Find(network::Find),
    Peers(network::Peers),
    Connect(network::Connect),
    Job(job::Job),
    Earnings(earnings::Earnings),
    Market(market::Market),
    Jobs(jobs::Jobs),
    Why(jobs::Why),
    Purchases(purchases::Purchases),
    Prove(proof::Prove),
    Verify(proof::Verify),
    Proof(proof::ProofCommand),
    Storage(storage::Storage),
    Cache(cache::Cache),
    Keys(keys::Keys),
    Plugin(plugin::Plugin),
    Config(config::ConfigCommand),
}

/// Which configuration a command reads.
#[derive(Debug, Clone, Default, Args)]
struct ConfigArgs {
    /// The configuration file.
    ///
    /// Without it: ./plugins.toml, else $XDG_CONFIG_HOME/fabstir-node/plugins.toml.
    #[arg(long, short, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Sets a key of the configuration; may be repeated.
    ///
    /// Keys are written with dots, plugins by their id. It wins over the file and the environment.
    /// Examples: --set scheduler.queue=16, --set plugin.llama.enabled=false.
    #[arg(long, value_name = "KEY=VALUE", value_parser = key_and_value)]
    set: Vec<(String, String)>,
}

impl ConfigArgs {
    fn flags(&self) -> Vec<Flag> {
        self.set.iter().map(|(key, value)| flag(&format!("--set {key}={value}"), key, value)).collect()
    }

    fn load(&self) -> Result<Loaded, Failure> {
        Ok(Sources::of_process(self.config.clone(), self.flags()).load()?)
    }
}

fn flag(shown: &str, key: &str, value: &str) -> Flag {
    Flag { shown: shown.into(), key: key.into(), value: value.into() }
}

fn key_and_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.trim().to_string(), value.to_string())),
        _ => Err("write KEY=VALUE, as in scheduler.queue=16".into()),
    }
}

/// Why a command did not work: what a person reads, what a program reads, and the exit code.
#[derive(Debug)]
pub struct Failure {
    exit: u8,
    message: String,
    json: Value,
}

impl Failure {
    const FAILED: u8 = 1;
    const USAGE: u8 = 2;
    const CONFIG: u8 = 3;
    const UNREACHABLE: u8 = 4;

    /// `code` is a word for programs, `message` a sentence for people.
    fn new(exit: u8, code: &str, message: impl fmt::Display) -> Self {
        let message = message.to_string();
        Self { exit, json: json!({ "error": { "code": code, "message": message } }), message: format!("error: {message}") }
    }

    /// What a person reads of it.
    fn text(&self) -> &str {
        self.message.trim_start_matches("error: ")
    }

    /// A failure of which the output has told everything, so that only the exit code is left to say.
    fn silent() -> Self {
        Self { exit: Self::FAILED, message: String::new(), json: Value::Null }
    }
}

impl From<Problems> for Failure {
    fn from(problems: Problems) -> Self {
        let error = json!({ "code": "config", "message": "the configuration is wrong", "problems": problems });
        Self { exit: Self::CONFIG, message: problems.to_string(), json: json!({ "error": error }) }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        // Whoever read our output has seen enough, as in `fabstir-node config show | head -1`.
        let exit = if error.kind() == io::ErrorKind::BrokenPipe { 0 } else { Self::FAILED };
        Self { exit, ..Self::new(exit, "io", format!("cannot write: {error}")) }
    }
}

/// Prints `text`, or `value` where the operator asked for JSON. Much of both was written by strangers, and none of it commands a terminal.
fn print(json: bool, value: &Value, text: impl fmt::Display) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{}", if json { as_json(value) } else { as_text(&text.to_string()) })
}

fn as_text(text: &str) -> String {
    without_controls(text, |letter| letter.escape_default().to_string())
}

/// Control characters below the space are escaped in JSON in any case; these are the others, which stand in texts alone.
fn as_json(value: &Value) -> String {
    without_controls(&format!("{value:#}"), |letter| format!("\\u{:04x}", letter as u32))
}

fn without_controls(text: &str, escaped: impl Fn(char) -> String) -> String {
    // Those that turn the direction of what is written can make a line look like another one.
    let turns = |letter| matches!(letter, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    let kept = |letter: char| matches!(letter, '\n' | '\t') || !letter.is_control() && !turns(letter);
    text.chars().map(|letter| if kept(letter) { letter.to_string() } else { escaped(letter) }).collect()
}

/// Rows as a table: every column but the last as wide as its widest cell. A line of a stranger's that goes on in the next is no row.
fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let one_line = |cell: &String| as_text(cell).replace('\n', "\\n");
    let rows: Vec<[String; N]> = rows.iter().map(|row| std::array::from_fn(|column| one_line(&row[column]))).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; N] = std::array::from_fn(width);
    let line = |row: &[String; N]| {
        let cells: Vec<String> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        cells.join("  ").trim_end().to_string()
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// Runs the command that the process was started with.
pub fn main() -> ExitCode {
    start(std::env::args_os())
}

fn start(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and the version are answers on standard output; the rest goes to standard error with code 2.
            let code = error.exit_code();
            let _ = error.print();
            return ExitCode::from(u8::try_from(code).unwrap_or(Failure::USAGE));
        }
    };
    let json = cli.json;
    let result = match cli.command {
        Command::Run(run) => run.execute(json),
        Command::Chat(chat) => chat.execute(json),
        Command::Find(find) => find.execute(json),
        Command::Peers(peers) => peers.execute(json),
        Command::Connect(connect) => connect.execute(json),
        Command::Job(job) => job.execute(json),
        Command::Earnings(earnings) => earnings.execute(json),
        Command::Market(market) => market.execute(json),
        Command::Jobs(jobs) => jobs.execute(json),
        Command::Why(why) => why.execute(json),
        Command::Purchases(purchases) => purchases.execute(json),
        Command::Prove(prove) => prove.execute(json),
        Command::Verify(verify) => verify.execute(json),
        Command::Proof(proof) => proof.execute(json),
        Command::Storage(storage) => storage.execute(json),
        Command::Cache(cache) => cache.execute(json),
        Command::Keys(keys) => keys.execute(json),
        Command::Plugin(plugin) => plugin.execute(json),
        Command::Config(config) => config.execute(json),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // Where even the error cannot be written, the exit code remains.
            let _ = match json {
                _ if failure.exit == 0 || failure.message.is_empty() => Ok(()),
                true => writeln!(io::stdout(), "{}", as_json(&failure.json)),
                false => writeln!(io::stderr(), "{}", as_text(&failure.message)),
            };
            ExitCode::from(failure.exit)
        }
    }
}
