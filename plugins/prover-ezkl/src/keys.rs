//! The folder with keys: what a set-up has made, under the hash of what it was made from.
//!
//! ```text
//! keys/<recipe>/      one circuit: record, circuit, settings, vk, pk, srs, vka
//! keys/<recipe>.bad/  what did not match its record
//! pace/<recipe>       how long things took
//! work/<random>/      what is being made, and witnesses; cleared when its owner has gone
//! ```
//!
//! A record holds the recipe, the BLAKE3 of every file and its own: a folder under the name of another circuit is none. A folder comes to its name whole, by a rename, and is never written again.

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tempfile::TempDir;
use tracing::{info, warn};

use crate::circuit::{Circuit, Output};
use crate::error::EzklError;

const RECORD: &str = "record";
const LOCK: &str = "lock";

/// The files of a circuit.
pub const CIRCUIT: &str = "circuit";
pub const SETTINGS: &str = "settings";
pub const VK: &str = "vk";
pub const PK: &str = "pk";
pub const SRS: &str = "srs";
pub const VKA: &str = "vka";
pub const ALL: [&str; 6] = [CIRCUIT, SETTINGS, VK, PK, SRS, VKA];

/// What is known about the keys of a circuit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The hash of what the keys were made from.
    pub recipe: String,
    /// BLAKE3 over the hashes of verifying key, contract's key and settings.
    pub program: String,
    pub k: u32,
    pub rows: u64,
    /// Binary places of the input.
    pub input_scale: u32,
    pub outputs: Vec<Output>,
    /// The length of every proof.
    pub proof_bytes: usize,
    /// BLAKE3 of each file.
    pub files: BTreeMap<String, String>,
}

/// The keys of one circuit.
#[derive(Debug, Clone)]
pub struct Keys {
    pub folder: PathBuf,
    pub record: Record,
}

impl Keys {
    pub fn path(&self, file: &str) -> PathBuf {
        self.folder.join(file)
    }
}

/// The folder itself. Its methods block on the disk.
#[derive(Debug, Clone)]
pub struct Cabinet {
    root: PathBuf,
}

/// A folder for work, gone when dropped.
#[derive(Debug)]
pub struct Workplace {
    folder: TempDir,
    /// Locked while the folder is in use.
    _lock: File,
}

impl Workplace {
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn path(&self, file: &str) -> PathBuf {
        self.folder.path().join(file)
    }
}

impl Cabinet {
    /// Opens a folder for state, and clears what a crash has left at work.
    pub fn open(root: &Path) -> Result<Self, EzklError> {
        for folder in ["keys", "pace", "work"] {
            let folder = root.join(folder);
            fs::create_dir_all(&folder).map_err(EzklError::io("make the folder", &folder))?;
        }
        let work = root.join("work");
        let cleared = clear(&work).map_err(EzklError::io("clear", &work))?;
        if cleared > 0 {
            info!(cleared, "Removed unfinished work that a crash had left.");
        }
        Ok(Self { root: root.to_owned() })
    }

    /// The keys of a circuit, if they were made. Only the record has been checked.
    pub fn find(&self, circuit: &Circuit) -> Result<Option<Keys>, EzklError> {
        let folder = self.folder(circuit);
        let read = || fs::read_to_string(folder.join(RECORD));
        let text = match read() {
            // They may have been put there after the first look.
            Err(error) if error.kind() == io::ErrorKind::NotFound && folder.exists() => read(),
            looked => looked,
        };
        let text = match text {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound && !folder.exists() => return Ok(None),
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidData) => {
                return Err(self.set_aside(circuit, RECORD));
            }
            Err(error) => return Err(EzklError::io("read", &folder)(error)),
        };
        let whole = text.split_once('\n').filter(|(hash, record)| blake3::hash(record.as_bytes()).to_hex().as_str() == *hash);
        let record: Option<Record> = whole.and_then(|(_, record)| serde_json::from_str(record).ok());
        match record.filter(|record| record.recipe == circuit.recipe) {
            Some(record) => Ok(Some(Keys { folder, record })),
            None => Err(self.set_aside(circuit, RECORD)),
        }
    }

    /// Checks files against the record.
    ///
    /// # Errors
    /// `Corrupt`, and the keys have been set aside.
    pub fn check(&self, circuit: &Circuit, keys: &Keys, files: &[&str]) -> Result<(), EzklError> {
        for file in files {
            match hash(&keys.path(file)) {
                Ok(found) if keys.record.files.get(*file) == Some(&found) => {}
                Ok(_) => return Err(self.set_aside(circuit, file)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(self.set_aside(circuit, file)),
                Err(error) => return Err(EzklError::io("read", &keys.path(file))(error)),
            }
        }
        Ok(())
    }

    /// A new folder for work.
    pub fn workplace(&self) -> Result<Workplace, EzklError> {
        let work = self.root.join("work");
        let folder = TempDir::new_in(&work).map_err(EzklError::io("make a folder in", &work))?;
        let path = folder.path().join(LOCK);
        let lock = File::create(&path).map_err(EzklError::io("make", &path))?;
        lock.lock().map_err(EzklError::io("lock", &path))?;
        Ok(Workplace { folder, _lock: lock })
    }

    /// Gives finished keys their name. `record` is told the hashes of the files and the program.
    pub fn install(&self, circuit: &Circuit, made: Workplace, mut record: Record) -> Result<Keys, EzklError> {
        let within = made.folder();
        for file in ALL {
            let path = made.path(file);
            File::open(&path).and_then(|file| file.sync_all()).map_err(EzklError::io("write", &path))?;
            record.files.insert(file.into(), hash(&path).map_err(EzklError::io("read", &path))?);
        }
        record.recipe = circuit.recipe.clone();
        record.program = program(&record);
        let path = made.path(RECORD);
        let text = serde_json::to_string(&record).unwrap_or_default();
        let written = File::create(&path).and_then(|mut file| {
            file.write_all(format!("{}\n{text}", blake3::hash(text.as_bytes())).as_bytes())?;
            file.sync_all()
        });
        written.and_then(|()| File::open(within)?.sync_all()).map_err(EzklError::io("write", &path))?;
        let folder = self.folder(circuit);
        if let Err(error) = fs::rename(within, &folder) {
            // Another instance on this folder was faster: its keys are as good.
            return match self.find(circuit)? {
                Some(keys) => Ok(keys),
                None => Err(EzklError::io("rename to", &folder)(error)),
            };
        }
        let _ = fs::remove_file(folder.join(LOCK));
        let keys = self.root.join("keys");
        File::open(&keys).and_then(|folder| folder.sync_all()).map_err(EzklError::io("sync the folder", &keys))?;
        Ok(Keys { folder, record })
    }

    /// What was measured of a circuit, as text; none where nothing can be read, as it is worth little.
    pub fn pace(&self, circuit: &Circuit) -> Option<String> {
        fs::read_to_string(self.root.join("pace").join(&circuit.recipe)).ok()
    }

    pub fn set_pace(&self, circuit: &Circuit, text: &str) {
        let path = self.root.join("pace").join(&circuit.recipe);
        if let Err(error) = fs::write(&path, text) {
            warn!(%error, path = %path.display(), "What a proof took could not be written down.");
        }
    }

    fn folder(&self, circuit: &Circuit) -> PathBuf {
        self.root.join("keys").join(&circuit.recipe)
    }

    fn set_aside(&self, circuit: &Circuit, what: &str) -> EzklError {
        let folder = self.folder(circuit);
        let aside = folder.with_extension("bad");
        // One is enough to look at; several would fill the disk.
        let _ = fs::remove_dir_all(&aside);
        if let Err(error) = fs::rename(&folder, &aside) {
            return EzklError::io("set aside", &folder)(error);
        }
        warn!(statement = circuit.id, file = what, aside = %aside.display(), "Keys are not what their hashes say, and were set aside.");
        EzklError::Corrupt { statement: circuit.id.clone(), what: what.into(), aside }
    }
}

fn program(record: &Record) -> String {
    let mut hash = blake3::Hasher::new();
    hash.update(b"fabstir prover-ezkl program");
    for file in [VK, VKA, SETTINGS] {
        hash.update(record.files[file].as_bytes());
    }
    format!("0x{}", hash.finalize().to_hex())
}

fn hash(path: &Path) -> io::Result<String> {
    let mut hash = blake3::Hasher::new();
    io::copy(&mut File::open(path)?, &mut hash)?;
    Ok(hash.finalize().to_hex().to_string())
}

/// Removes folders whose owner, this process or another, has gone: its lock went with it.
fn clear(work: &Path) -> io::Result<usize> {
    let mut cleared = 0;
    for entry in fs::read_dir(work)? {
        let folder = entry?.path();
        match File::open(folder.join(LOCK)) {
            Ok(lock) => match lock.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => continue,
                Err(TryLockError::Error(error)) => return Err(error),
            },
            // It is just being made, given its name, or removed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        }
        match fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => cleared += 1,
        }
    }
    Ok(cleared)
}
