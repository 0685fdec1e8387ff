//! The keys on the disk, and what was measured with them.
//!
//! Keys lie in `keys/<circuit>/`: `verifying` is small and is read at every start, `proving` is large and is read for every proof. Each
//! begins with a hash of what follows, which names the circuit first, so that a folder under another name is none; and the proving key names
//! the verifying key that it belongs to. The folder comes into being in one step, whole.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use ark_serialize::{CanonicalDeserialize, CanonicalSerialize};
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::groth16::{self, ProvingKey, VerifyingKey};
use crate::wire::{self, Word};

const MAGIC: &[u8; 16] = b"groth16 bn254 1\n";
const HASH: usize = 32;
const VERIFYING: &str = "verifying";
const PROVING: &str = "proving";

/// The folder for state of an instance.
#[derive(Debug)]
pub struct Store {
    keys: PathBuf,
    measured: PathBuf,
}

/// What work took on this machine when it last ran.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Measured {
    pub prepare: Option<Took>,
    /// One proof of the circuit.
    pub prove: Option<Took>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Took {
    pub cpu_ms: u64,
    pub wall_ms: u64,
    /// How much more memory the process had at most than before, in bytes, where the system tells.
    pub memory: Option<u64>,
}

impl Took {
    /// What so much of it takes, one after the other.
    pub fn times(self, count: u64) -> Self {
        Self { cpu_ms: self.cpu_ms.saturating_mul(count), wall_ms: self.wall_ms.saturating_mul(count), ..self }
    }

    /// What one of so many took.
    pub fn shared(self, count: u64) -> Self {
        Self { cpu_ms: self.cpu_ms.div_ceil(count.max(1)), wall_ms: self.wall_ms.div_ceil(count.max(1)), ..self }
    }
}

impl Store {
    /// Makes the folders where they are missing.
    pub fn open(state_dir: &Path) -> Result<Self, Error> {
        let store = Self { keys: state_dir.join("keys"), measured: state_dir.join("measured") };
        for folder in [&store.keys, &store.measured] {
            fs::create_dir_all(folder).map_err(Error::io("make the folder", folder))?;
        }
        Ok(store)
    }

    fn folder(&self, circuit: &Word) -> PathBuf {
        self.keys.join(hex::encode(circuit))
    }

    /// The verifying key of a circuit, if there are keys.
    ///
    /// # Errors
    /// `Damaged`.
    pub fn verifying(&self, circuit: &Word) -> Result<Option<VerifyingKey>, Error> {
        let folder = self.folder(circuit);
        if !folder.exists() {
            return Ok(None);
        }
        let path = folder.join(VERIFYING);
        let body = read(&path, circuit)?;
        let key = VerifyingKey::deserialize_uncompressed(&body[..]).map_err(|error| damaged(&path, error.to_string()))?;
        if !groth16::is_sound(&key) {
            return Err(damaged(&path, "points that no set-up makes"));
        }
        Ok(Some(key))
    }

    /// The proving key of a circuit that belongs to this program.
    ///
    /// # Errors
    /// `Damaged`, also when there is none.
    pub fn proving(&self, circuit: &Word, program: &Word) -> Result<ProvingKey, Error> {
        let path = self.folder(circuit).join(PROVING);
        let body = read(&path, circuit)?;
        let rest = body.strip_prefix(program).ok_or_else(|| damaged(&path, "it belongs to other keys"))?;
        ProvingKey::deserialize_uncompressed_unchecked(rest).map_err(|error| damaged(&path, error.to_string()))
    }

    /// Keeps new keys. Where another process was faster, its keys stay and these are dropped.
    pub fn keep(&self, circuit: &Word, key: &ProvingKey) -> Result<(), Error> {
        let io = |error| Error::io("write keys in", &self.keys)(error);
        let coming = tempfile::Builder::new().prefix("coming-").tempdir_in(&self.keys).map_err(io)?;
        let program = wire::program(&key.vk);
        let bytes = |write: &dyn Fn(&mut Vec<u8>) -> Result<(), ark_serialize::SerializationError>| {
            let mut bytes = Vec::new();
            write(&mut bytes).map(|()| bytes).map_err(|error| Error::Internal(format!("keys cannot be written: {error}")))
        };
        write(&coming.path().join(VERIFYING), circuit, &bytes(&|bytes| key.vk.serialize_uncompressed(bytes))?)?;
        let proving = bytes(&|bytes| {
            bytes.extend(program);
            key.serialize_uncompressed(bytes)
        })?;
        write(&coming.path().join(PROVING), circuit, &proving)?;
        sync(coming.path())?;
        let folder = self.folder(circuit);
        let coming = coming.keep();
        if let Err(error) = fs::rename(&coming, &folder) {
            // What is left of ours is of no use, and says nothing more than the error.
            let _ = fs::remove_dir_all(&coming);
            if !folder.exists() {
                return Err(Error::io("make the folder", &folder)(error));
            }
        }
        sync(&self.keys)
    }

    /// Puts damaged keys out of the way, and says in the error where they are.
    pub fn set_aside(&self, circuit: &Word, error: Error) -> Error {
        let Error::Damaged { path, reason, .. } = error else { return error };
        let folder = self.folder(circuit);
        let free = (1..).map(|number| folder.with_extension(format!("damaged-{number}"))).find(|aside| !aside.exists());
        let Some(aside) = free else { return Error::Internal("numbers have an end after all".into()) };
        match fs::rename(&folder, &aside) {
            Ok(()) => Error::Damaged { path, reason, set_aside: Some(aside) },
            Err(error) => Error::io("set aside", &folder)(error),
        }
    }

    /// What work with a circuit took; nothing where it never ran, or the note cannot be read.
    pub fn measured(&self, circuit: &Word) -> Measured {
        let note = fs::read(self.note(circuit)).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        note.unwrap_or_default()
    }

    pub fn measure(&self, circuit: &Word, measured: &Measured) -> io::Result<()> {
        let mut file = tempfile::NamedTempFile::new_in(&self.measured)?;
        file.write_all(&serde_json::to_vec_pretty(measured)?)?;
        file.persist(self.note(circuit)).map(drop).map_err(|error| error.error)
    }

    fn note(&self, circuit: &Word) -> PathBuf {
        self.measured.join(format!("{}.json", hex::encode(circuit)))
    }
}

fn damaged(path: &Path, reason: impl Into<String>) -> Error {
    Error::Damaged { path: path.to_owned(), reason: reason.into(), set_aside: None }
}

/// Reads a file that [`write`] has written for this circuit.
fn read(path: &Path, circuit: &Word) -> Result<Vec<u8>, Error> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(damaged(path, "it is missing")),
        Err(error) => return Err(Error::io("read", path)(error)),
    };
    let mut head = [0; MAGIC.len() + HASH];
    let mut body = Vec::new();
    match file.read_exact(&mut head).and_then(|()| file.read_to_end(&mut body)) {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(damaged(path, "it is too short")),
        Err(error) => return Err(Error::io("read", path)(error)),
    }
    let (magic, hash) = head.split_at(MAGIC.len());
    if magic != MAGIC {
        return Err(damaged(path, "it does not begin as keys do"));
    }
    if blake3::hash(&body).as_bytes() != hash {
        return Err(damaged(path, "its bytes are not those that were written"));
    }
    match body.strip_prefix(circuit) {
        Some(body) => Ok(body.to_vec()),
        None => Err(damaged(path, "it belongs to another circuit")),
    }
}

fn write(path: &Path, circuit: &Word, body: &[u8]) -> Result<(), Error> {
    let write = || {
        let mut file = File::create(path)?;
        file.write_all(MAGIC)?;
        file.write_all(blake3::Hasher::new().update(circuit).update(body).finalize().as_bytes())?;
        file.write_all(circuit)?;
        file.write_all(body)?;
        file.sync_all()
    };
    write().map_err(Error::io("write", path))
}

fn sync(folder: &Path) -> Result<(), Error> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(Error::io("sync the folder", folder))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commitment::Receipt;
    use crate::work::Work;

    const CIRCUIT: Word = [7; 32];

    fn keys() -> ProvingKey {
        let receipt = Receipt::new(0u8.into(), &[0; 32], &[0; 32], &[0; 32]);
        groth16::set_up(&receipt, &Work::new(1, &|| false, &|_, _| {})).unwrap()
    }

    #[test]
    fn keys_come_back_and_every_damage_is_found_and_set_aside() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        assert!(store.verifying(&CIRCUIT).unwrap().is_none());
        let key = keys();
        let program = wire::program(&key.vk);
        store.keep(&CIRCUIT, &key).unwrap();
        assert_eq!(store.verifying(&CIRCUIT).unwrap(), Some(key.vk.clone()));
        assert!(store.proving(&CIRCUIT, &program).unwrap() == key);
        assert!(matches!(store.proving(&CIRCUIT, &[0; 32]), Err(Error::Damaged { .. })), "of another program");

        for name in [VERIFYING, PROVING] {
            let path = store.folder(&CIRCUIT).join(name);
            let good = fs::read(&path).unwrap();
            let damages: [Option<Vec<u8>>; 6] = [
                None,
                Some(Vec::new()),
                Some(good[..good.len() / 2].to_vec()),
                Some([&good[..], &[0]].concat()),
                Some([&good[..good.len() - 1], &[good[good.len() - 1] ^ 1]].concat()),
                Some([&b"x"[..], &good[1..]].concat()),
            ];
            for damage in damages {
                match &damage {
                    None => fs::remove_file(&path).unwrap(),
                    Some(bytes) => fs::write(&path, bytes).unwrap(),
                }
                let outcome = match name {
                    VERIFYING => store.verifying(&CIRCUIT).map(drop),
                    _ => store.proving(&CIRCUIT, &program).map(drop),
                };
                assert!(matches!(outcome, Err(Error::Damaged { .. })), "{name} {:?}", damage.map(|bytes| bytes.len()));
            }
            fs::write(&path, good).unwrap();
        }

        // The whole folder under the name of another circuit.
        let other = [8; 32];
        let copied = store.folder(&other);
        fs::create_dir(&copied).unwrap();
        for name in [VERIFYING, PROVING] {
            fs::copy(store.folder(&CIRCUIT).join(name), copied.join(name)).unwrap();
        }
        assert!(matches!(store.verifying(&other), Err(Error::Damaged { .. })), "keys of another circuit");
        assert!(matches!(store.proving(&other, &program), Err(Error::Damaged { .. })), "keys of another circuit");

        let aside = store.set_aside(&CIRCUIT, damaged(Path::new("x"), "a test"));
        assert!(matches!(aside, Error::Damaged { set_aside: Some(path), .. } if path.exists()));
        assert!(store.verifying(&CIRCUIT).unwrap().is_none(), "and new ones can be made");
    }

    #[test]
    fn keys_of_a_faster_process_stay() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        let (first, second) = (keys(), keys());
        assert_ne!(first.vk, second.vk, "made from the randomness of the system");
        store.keep(&CIRCUIT, &first).unwrap();
        store.keep(&CIRCUIT, &second).unwrap();
        assert_eq!(store.verifying(&CIRCUIT).unwrap(), Some(first.vk));
        assert_eq!(fs::read_dir(&store.keys).unwrap().count(), 1);
    }

    #[test]
    fn what_was_measured_outlives_the_instance() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        assert_eq!(store.measured(&CIRCUIT), Measured::default());
        let measured = Measured { prepare: None, prove: Some(Took { cpu_ms: 5, wall_ms: 6, memory: Some(7) }) };
        store.measure(&CIRCUIT, &measured).unwrap();
        assert_eq!(Store::open(folder.path()).unwrap().measured(&CIRCUIT), measured);
    }
}
