//! `fabstir-node keys`.

use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde_json::{Value, json};
use zeroize::Zeroizing;

use super::{ConfigArgs, Failure, print, table};
use crate::config::Config;
use crate::identity::{self, Account, Entry, KeyError, Keyring, Password, PasswordError};

mod prompt;

/// Makes, imports and lists account keys.
///
/// An account key owns money on a chain. Each is kept in an encrypted file in the keys folder of node.data_dir, in the format that geth,
/// foundry and most wallets read and write. There is no way to a key without its password: keep the password, and a copy of the file.
#[derive(Debug, Args)]
pub struct Keys {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Makes a new key and prints its address.
    New {
        /// What to call it: letters, digits, - and _.
        name: String,
        #[command(flatten)]
        password: PasswordArgs,
        #[command(flatten)]
        config: ConfigArgs,
    },
    /// Keeps a key that exists already and prints its address.
    ///
    /// Without --key-file and --keystore the key comes from standard input, as 64 hex digits; on a terminal it is asked for and not shown.
    /// It is never taken from the command line, which other users of the machine can read.
    Import {
        /// What to call it: letters, digits, - and _.
        name: String,
        /// A file that holds the key in plain, as 64 hex digits. Delete it afterwards.
        #[arg(long, value_name = "FILE", conflicts_with = "keystore")]
        key_file: Option<PathBuf>,
        /// An encrypted file of geth, foundry or another wallet. The key keeps its password.
        #[arg(long, value_name = "FILE")]
        keystore: Option<PathBuf>,
        #[command(flatten)]
        password: PasswordArgs,
        #[command(flatten)]
        config: ConfigArgs,
    },
    /// Lists the keys, each with the address that its file names.
    List(ConfigArgs),
    /// Prints the address of a key.
    ///
    /// It is what the file says; with --check, the address of the key itself.
    Show {
        /// The key's name.
        name: String,
        /// Opens the file: its password is right, and the address is that of its key.
        #[arg(long)]
        check: bool,
        #[command(flatten)]
        password: PasswordArgs,
        #[command(flatten)]
        config: ConfigArgs,
    },
}

#[derive(Debug, Clone, Args)]
pub(super) struct PasswordArgs {
    /// A file with the password in its only line, which nobody else can read.
    ///
    /// Without it: the file that keys.password_file of the configuration names, else the terminal is asked.
    #[arg(long, value_name = "FILE")]
    password_file: Option<PathBuf>,
}

impl From<KeyError> for Failure {
    fn from(error: KeyError) -> Self {
        let code = match &error {
            KeyError::Name(_) => return Failure::new(Failure::USAGE, "usage", error),
            KeyError::Unknown { .. } => "unknown_key",
            KeyError::Exists { .. } => "key_exists",
            KeyError::Exposed { .. } => "exposed",
            KeyError::Damaged { .. } | KeyError::NotAKey(_) => "damaged",
            KeyError::Password { .. } => "wrong_password",
            KeyError::Unreadable { .. } | KeyError::Unwritable { .. } | KeyError::Random(_) => "io",
        };
        Failure::new(Failure::FAILED, code, error)
    }
}

impl From<PasswordError> for Failure {
    fn from(error: PasswordError) -> Self {
        let code = if matches!(error, PasswordError::Exposed { .. }) { "exposed" } else { "password" };
        Failure::new(Failure::FAILED, code, error)
    }
}

impl Keys {
    pub fn execute(self, json: bool) -> Result<(), Failure> {
        match self.action {
            Action::New { name, password, config } => {
                let config = config.load()?.config;
                Keyring::of(&config.node.data_dir).vacant(&name)?;
                let password = password.chosen(&config, &name)?;
                let account = Account::random().map_err(KeyError::from)?;
                keep(&config, &name, &account, &password, json)
            }
            Action::Import { name, key_file, keystore, password, config } => {
                let config = config.load()?.config;
                Keyring::of(&config.node.data_dir).vacant(&name)?;
                let (account, password) = match (key_file, keystore) {
                    (None, Some(file)) => {
                        let password = password.known(&config, &file)?;
                        (identity::open(&file, &password)?, password)
                    }
                    (Some(file), _) => (identity::read_plain(&file)?, password.chosen(&config, &name)?),
                    (None, None) => (given()?, password.chosen(&config, &name)?),
                };
                keep(&config, &name, &account, &password, json)
            }
            Action::List(config) => list(&config.load()?.config, json),
            Action::Show { name, check, password, config } => show(&config.load()?.config, &name, check, &password, json),
        }
    }
}

fn keep(config: &Config, name: &str, account: &Account, password: &Password, json: bool) -> Result<(), Failure> {
    let path = Keyring::of(&config.node.data_dir).add(name, account, password)?;
    let address = account.address().to_string();
    Ok(print(json, &json!({ "name": name, "address": address, "file": path }), &address)?)
}

fn list(config: &Config, json: bool) -> Result<(), Failure> {
    let keyring = Keyring::of(&config.node.data_dir);
    let entries = keyring.list()?;
    let mut rows = vec![["NAME".to_string(), "ADDRESS".to_string(), String::new()]];
    rows.extend(entries.iter().map(|entry| {
        let problem = entry.problem.as_ref().map(ToString::to_string);
        [entry.name.clone(), entry.address.map_or("-".into(), |address| address.to_string()), problem.unwrap_or_default()]
    }));
    let text = match entries.is_empty() {
        true => "There are no keys: `fabstir-node keys new NAME` makes one.".into(),
        false => table(&rows),
    };
    let keys: Vec<Value> = entries.iter().map(value).collect();
    Ok(print(json, &json!({ "keys": keys }), text)?)
}

fn value(entry: &Entry) -> Value {
    json!({
        "name": entry.name,
        "address": entry.address.map(|address| address.to_string()),
        "file": entry.path,
        "problem": entry.problem.as_ref().map(ToString::to_string),
    })
}

fn show(config: &Config, name: &str, check: bool, password: &PasswordArgs, json: bool) -> Result<(), Failure> {
    let keyring = Keyring::of(&config.node.data_dir);
    let mut entry = keyring.find(name)?;
    if let Some(problem) = entry.problem.take() {
        return Err(problem.into());
    }
    if check {
        let password = password.known(config, &entry.path)?;
        entry.address = Some(keyring.open(name, &password)?.address());
    }
    let Some(address) = entry.address else {
        let message =
            format!("{} does not name its address: `fabstir-node keys show {name} --check` opens it", entry.path.display());
        return Err(Failure::new(Failure::FAILED, "no_address", message));
    };
    Ok(print(json, &value(&entry), address)?)
}

impl PasswordArgs {
    fn of_file(&self, config: &Config) -> Result<Option<Password>, Failure> {
        let file = self.password_file.as_ref().or(config.keys.password_file.as_ref());
        Ok(file.map(|file| Password::read(file)).transpose()?)
    }

    /// The password of a file that exists.
    pub(super) fn known(&self, config: &Config, file: &Path) -> Result<Password, Failure> {
        match self.of_file(config)? {
            Some(password) => Ok(password),
            None => Ok(Password::new(asked(&format!("Password of {}: ", file.display()), "password")?)?),
        }
    }

    /// A password for a new file; asked for twice, because a mistyped one would lock the key away for good.
    fn chosen(&self, config: &Config, name: &str) -> Result<Password, Failure> {
        if let Some(password) = self.of_file(config)? {
            return Ok(password);
        }
        let first = Password::new(asked(&format!("Password for the key `{name}`: "), "password")?)?;
        let second = Password::new(asked("The same again: ", "password")?)?;
        match first.is(&second) {
            true => Ok(first),
            false => Err(Failure::new(Failure::FAILED, "password", "the two passwords differ: nothing was kept")),
        }
    }
}

/// The key that standard input gives.
fn given() -> Result<Account, Failure> {
    let input = io::stdin();
    let account = match input.is_terminal() {
        true => Account::from_hex(&asked("Key, 64 hex digits: ", "key")?),
        false => Account::read_hex(input.lock()),
    };
    Ok(account.map_err(KeyError::from)?)
}

/// Asks the terminal, which does not show the answer.
fn asked(question: &str, what: &str) -> Result<Zeroizing<Vec<u8>>, Failure> {
    match prompt::ask(question) {
        Ok(answer) => Ok(answer),
        Err(error) if error.kind() == io::ErrorKind::Interrupted => {
            Err(Failure::new(Failure::FAILED, "interrupted", format!("no {what} was given: nothing was done")))
        }
        Err(error) => {
            let message =
                format!("there is no terminal to ask for the {what} ({error}): give --password-file, or set keys.password_file");
            Err(Failure::new(Failure::FAILED, "no_terminal", message))
        }
    }
}
