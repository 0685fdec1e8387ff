//! `fabstir-node storage`: blobs in a storage plugin of the configuration.

mod deleting;
mod fetching;

use std::io::{Read, Write};
use std::path::PathBuf;
use std::sync::Arc;

use clap::{Args, Subcommand};
use fabstir_plugin_api::abi::Blob;
use fabstir_plugin_api::context::Cx;
use fabstir_plugin_api::error::{Code, PluginError};
use fabstir_plugin_api::storage::{Expect, Range, Storage as Kind};
use fabstir_plugin_api::stream::Stream;
use serde_json::{Value, json};

use fetching::Fetched;

use super::network::on_threads;
use super::{ConfigArgs, Failure, log, print};
use crate::config::Config;
use crate::sealed::{self, Key};
use crate::supervisor::{Alone, AloneError};

/// Puts files into a storage plugin, gets them back, lists, checks and deletes them.
///
/// What is stored is a blob. Its id is the BLAKE3 hash of its bytes, so whoever has the id can check what comes back. The commands start
/// the plugin for themselves, whether a node runs or not.
#[derive(Debug, Args)]
pub struct Storage {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Stores a file and prints its id.
    ///
    /// A plugin that sends it elsewhere in parts goes on where it was interrupted when the same file is put again. What is stored already is read
    /// back instead, and repaired where it is damaged.
    Put {
        /// The file.
        file: PathBuf,
        /// Encrypts the file before it leaves this program, and prints the key.
        ///
        /// The key is new, printed once, and kept nowhere: without it nobody can read the file again. Since it is new each time, so is what is
        /// sent: a put that was interrupted begins anew. The cipher is XChaCha20-Poly1305 over chunks of 256 KiB, as in S5.
        #[arg(long)]
        private: bool,
        #[command(flatten)]
        shared: Shared,
    },
    /// Fetches a blob by its id.
    ///
    /// Into a file it comes by way of FILE.part, from which the same command goes on after an interruption; FILE is there once all of it
    /// has the id. storage-s5, for a blob that it has neither put nor read before, and storage-s5-node, for one of another node, fetch it
    /// whole before they give its first byte, the latter each time: an interruption before that begins anew. To standard output it comes as
    /// it is read: look at the exit code before you act on it.
    Get {
        /// The id that `put` printed: 64 hexadecimal digits.
        id: String,
        /// Where it goes. Left out, to standard output.
        #[arg(long, short, value_name = "FILE")]
        output: Option<PathBuf>,
        /// The key that `put --private` printed. Others on this machine may see command lines; --key-file is not seen.
        #[arg(long, value_name = "KEY", value_parser = key)]
        key: Option<Key>,
        /// A file with the key in its only line.
        #[arg(long, value_name = "FILE", conflicts_with = "key")]
        key_file: Option<PathBuf>,
        #[command(flatten)]
        shared: Shared,
    },
    /// Lists the blobs that are stored, in order of id.
    Ls {
        #[command(flatten)]
        shared: Shared,
    },
    /// Reads blobs to their end and tells whether they are as they were put.
    Verify {
        /// The blobs; all that are listed where none is named.
        #[arg(value_name = "ID")]
        ids: Vec<String>,
        #[command(flatten)]
        shared: Shared,
    },
    /// Deletes blobs.
    ///
    /// Every enabled storage plugin of the configuration is asked to delete them, or the one that is named. Copies that others have made
    /// elsewhere stay.
    Rm {
        /// The blobs.
        #[arg(value_name = "ID", required = true)]
        ids: Vec<String>,
        /// In this plugin of the configuration only, by its id.
        #[arg(long, value_name = "ID")]
        plugin: Option<String>,
        /// What is logged, to standard error.
        #[arg(long, value_name = "FILTER", default_value = "warn")]
        log: String,
        #[command(flatten)]
        config: ConfigArgs,
    },
}

#[derive(Debug, Args)]
struct Shared {
    /// Which plugin of the configuration, by its id. Left out, an enabled storage plugin, that of the best rank among several.
    #[arg(long, value_name = "ID")]
    plugin: Option<String>,

    /// What is logged, to standard error.
    #[arg(long, value_name = "FILTER", default_value = "warn")]
    log: String,

    #[command(flatten)]
    config: ConfigArgs,
}

fn key(text: &str) -> Result<Key, String> {
    Key::parse(text).ok_or_else(|| "a key is 64 hexadecimal digits, as `put --private` prints it".into())
}

impl Storage {
    pub fn execute(self, json: bool) -> Result<(), Failure> {
        match self.action {
            Action::Put { file, private, shared } => shared.with(json, async |storage| put(storage, file, private, json).await),
            Action::Get { id, output, key, key_file, shared } => {
                well_formed(&id)?;
                let key = match key_file {
                    None => key,
                    Some(file) => Some(read_key(&file)?),
                };
                match output {
                    Some(output) => shared.with(json, async |storage| {
                        let Fetched { size, resumed_at } = fetching::to_file(storage, &id, &output, key.as_ref()).await?;
                        let mut text = format!("{}  {size} bytes", output.display());
                        if resumed_at > 0 {
                            text.push_str(&format!(", of which {resumed_at} had come before"));
                        }
                        Ok(print(json, &json!({ "id": id, "file": output, "size": size, "resumed_at": resumed_at }), text)?)
                    }),
                    None if json => Err(Failure::new(Failure::USAGE, "usage", "with --json, say where the bytes go: -o FILE")),
                    None => shared.with(json, async |storage| to_output(storage, id, key.as_ref()).await),
                }
            }
            Action::Ls { shared } => shared.with(json, async |storage| list(storage, json).await),
            Action::Verify { ids, shared } => shared.with(json, async |storage| verify(storage, ids, json).await),
            Action::Rm { ids, plugin, log, config } => {
                ids.iter().try_for_each(|id| well_formed(id))?;
                let config = config.load()?.config;
                log::start(&log, json)?;
                on_threads(deleting::everywhere(config, plugin, &ids, json))
            }
        }
    }
}

impl Shared {
    /// Starts the plugin, works with it and ends it.
    fn with(self, json: bool, work: impl AsyncFnOnce(&Arc<dyn Kind>) -> Result<(), Failure>) -> Result<(), Failure> {
        let mut config: Config = self.config.load()?.config;
        log::start(&self.log, json)?;
        if let Some(id) = &self.plugin {
            only(&mut config, id)?;
        }
        on_threads(async {
            let plugin = Alone::start(config, |routes| &routes.storage).await.map_err(not_started)?;
            let done = work(&plugin.client).await;
            plugin.end().await;
            done
        })
    }
}

/// Leaves this plugin alone in the configuration.
fn only(config: &mut Config, id: &str) -> Result<(), Failure> {
    config.plugin.retain(|entry| entry.id == id);
    match config.plugin.is_empty() {
        false => Ok(()),
        true => Err(Failure::new(Failure::CONFIG, "no_storage", format!("no plugin of the configuration is called `{id}`"))),
    }
}

/// Refuses what is no id before anything is done with it.
fn well_formed(id: &str) -> Result<(), Failure> {
    match id.len() == 64 && id.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
        true => Ok(()),
        false => Err(Failure::new(
            Failure::FAILED,
            "invalid",
            format!("`{id}` is no id of a blob: one has 64 digits, 0 to 9 and a to f"),
        )),
    }
}

fn not_started(error: AloneError) -> Failure {
    match &error {
        AloneError::None { .. } => {
            let next =
                "add an entry with use = \"storage-disk\" or use = \"storage-s5\" to plugins.toml, or name another with --plugin";
            Failure::new(Failure::CONFIG, "no_storage", format!("{error}: {next}"))
        }
        AloneError::Start { .. } => Failure::new(Failure::FAILED, "plugin", error),
    }
}

/// What the storage plugin says that it could not do.
fn of_storage(error: PluginError) -> Failure {
    let (exit, code) = match error.code {
        Code::Unavailable | Code::DeadlineExceeded => (Failure::UNREACHABLE, "unreachable"),
        Code::Overloaded => (Failure::UNREACHABLE, "busy"),
        Code::NotFound => (Failure::FAILED, "not_found"),
        Code::Denied => (Failure::FAILED, "denied"),
        Code::Corrupt => (Failure::FAILED, "corrupt"),
        Code::Full => (Failure::FAILED, "full"),
        Code::InvalidArgument => (Failure::FAILED, "invalid"),
        _ => (Failure::FAILED, "plugin"),
    };
    Failure::new(exit, code, error)
}

fn of_file(doing: &str, file: &std::path::Path, error: std::io::Error) -> Failure {
    Failure::new(Failure::FAILED, "io", format!("cannot {doing} {}: {error}", file.display()))
}

fn read_key(file: &std::path::Path) -> Result<Key, Failure> {
    let text = std::fs::read_to_string(file).map(zeroize::Zeroizing::new).map_err(|error| of_file("read", file, error))?;
    key(text.trim()).map_err(|why| Failure::new(Failure::USAGE, "usage", format!("{}: {why}", file.display())))
}

async fn put(storage: &Arc<dyn Kind>, path: PathBuf, private: bool, json: bool) -> Result<(), Failure> {
    // Before it is opened, which waits for ever where it is a pipe that nobody writes to.
    let found = std::fs::metadata(&path).map_err(|error| of_file("read", &path, error))?;
    if !found.is_file() {
        return Err(of_file("store", &path, std::io::Error::other("it is no regular file")));
    }
    let file = std::fs::File::open(&path).map_err(|error| of_file("read", &path, error))?;
    let no_key =
        |error| Failure::new(Failure::FAILED, "no_key", format!("this system gives no random numbers for a key: {error}"));
    let key = if private { Some(Key::random().map_err(no_key)?) } else { None };
    let plain = bytes_of(file);
    let (size, data) = match &key {
        None => (found.len(), plain),
        Some(key) => (sealed::sealed_size(found.len()), sealed::seal(plain, key)),
    };
    let entry = storage.put(&Cx::new(), Expect { id: None, size: Some(size) }, data).await.map_err(of_storage)?;
    let mut value = json!(entry);
    let mut text = entry.id;
    if let Some(key) = &key {
        let key = key.reveal();
        value["key"] = Value::from(key.as_str());
        text.push_str(&format!("\nkey {}", *key));
    }
    Ok(print(json, &value, text)?)
}

/// Bytes that are read from a file, or written to one, at once.
const PIECE: usize = 1 << 20;

/// A file's bytes from where it stands.
fn bytes_of(mut file: std::fs::File) -> Stream<Blob> {
    let (sender, stream) = Stream::channel(2);
    tokio::task::spawn_blocking(move || {
        loop {
            let mut piece = Vec::with_capacity(PIECE);
            match (&mut file).take(PIECE as u64).read_to_end(&mut piece) {
                Ok(0) => return,
                Ok(_) => {}
                Err(error) => return sender.blocking_fail(PluginError::internal(format!("the file cannot be read: {error}"))),
            }
            if sender.blocking_send(Blob::from(piece)).is_err() {
                return;
            }
        }
    });
    stream
}

async fn to_output(storage: &Arc<dyn Kind>, id: String, key: Option<&Key>) -> Result<(), Failure> {
    let sealed = storage.get(&Cx::new(), id, Range::default()).await.map_err(of_storage)?;
    let mut plain = match key {
        None => sealed,
        Some(key) => sealed::open(sealed, key),
    };
    while let Some(piece) = plain.next().await {
        let piece = piece.map_err(of_storage)?;
        tokio::task::block_in_place(|| std::io::stdout().lock().write_all(&piece))?;
    }
    Ok(std::io::stdout().lock().flush()?)
}

async fn list(storage: &Arc<dyn Kind>, json: bool) -> Result<(), Failure> {
    let mut entries = storage.list(&Cx::new()).await.map_err(of_storage)?;
    let mut shown = Vec::new();
    while let Some(entry) = entries.next().await {
        let entry = entry.map_err(of_storage)?;
        match json {
            true => shown.push(json!(entry)),
            // There may be many: each is told as it comes.
            false => writeln!(std::io::stdout().lock(), "{}  {}", entry.id, entry.size)?,
        }
    }
    if json {
        print(json, &Value::from(shown), "")?;
    }
    Ok(())
}

async fn verify(storage: &Arc<dyn Kind>, mut ids: Vec<String>, json: bool) -> Result<(), Failure> {
    if ids.is_empty() {
        let entries = storage.list(&Cx::new()).await.map_err(of_storage)?.collect().await.map_err(of_storage)?;
        ids = entries.into_iter().map(|entry| entry.id).collect();
    }
    let (mut shown, mut bad) = (Vec::new(), 0);
    for id in ids {
        let (line, value) = match whole(storage, &id).await {
            Ok(size) => (format!("ok   {id}  {size}"), json!({ "id": id, "ok": true, "size": size })),
            Err(why) => {
                bad += 1;
                // Only the first says that what is there is damaged.
                let word = match why.code {
                    Code::Corrupt => "BAD",
                    Code::NotFound => "MISSING",
                    _ => "UNCHECKED",
                };
                (format!("{word}  {id}  {why}"), json!({ "id": id, "ok": false, "why": why.message, "code": why.code }))
            }
        };
        match json {
            true => shown.push(value),
            false => writeln!(std::io::stdout().lock(), "{line}")?,
        }
    }
    if json {
        print(json, &Value::from(shown), "")?;
    }
    if bad > 0 { Err(Failure::silent()) } else { Ok(()) }
}

/// Reads a blob to its end, hashes it, and says its size.
async fn whole(storage: &Arc<dyn Kind>, id: &str) -> Result<u64, PluginError> {
    let mut bytes = storage.get(&Cx::new(), id.to_owned(), Range::default()).await?;
    let (mut hasher, mut size) = (blake3::Hasher::new(), 0);
    while let Some(piece) = bytes.next().await {
        let piece = piece?;
        hasher.update(&piece);
        size += piece.len() as u64;
    }
    match hasher.finalize().to_hex().as_str() == id {
        true => Ok(size),
        false => Err(PluginError::new(
            Code::Corrupt,
            "its bytes have another hash: put it again to repair it, or delete it with `storage rm`",
        )),
    }
}
