//! What a model is called everywhere: a hash of its files and of its chat template.
//!
//! The recipe is that of `Loaded::digest` in the inference interface. Reading a large model takes a minute, so the result is kept in
//! `digests.json` of the instance's state folder, and is good for as long as every file has the same path, size and time of change.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::UNIX_EPOCH;

use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::gguf::{GgufError, Header};

const BUFFER: usize = 1 << 20;

/// The files of a model as they were at one moment, with the template that they name.
pub struct Files {
    stamps: Vec<Stamp>,
    template: String,
}

/// A file, and what changes when it is written to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stamp {
    path: PathBuf,
    bytes: u64,
    /// Since 1970.
    modified_ns: u64,
}

/// What `digests.json` is a list of.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Noted {
    digest: String,
    files: Vec<Stamp>,
}

/// The digests that an instance has found out.
pub struct Digests {
    path: PathBuf,
    /// Held while the file is replaced: models are loaded at the same time.
    writing: Mutex<()>,
}

impl Files {
    /// The files of the model that begins in `path`, by their headers.
    ///
    /// # Errors
    /// `File` when one of them cannot be read, or is no GGUF file.
    pub fn of(path: &Path) -> Result<Self, Error> {
        let header = Header::read(path)?;
        let parts = [path.to_owned()].into_iter().chain(header.parts(path)?);
        let stamps = parts.map(|part| Stamp::of(&part)).collect::<Result<_, _>>()?;
        Ok(Self { stamps, template: header.text("tokenizer.chat_template").unwrap_or_default().to_owned() })
    }

    /// Reads everything. `progress` hears shares from 0 to 1, and gives up by answering `false`.
    fn hash(&self, mut progress: impl FnMut(f32) -> bool) -> Result<String, Error> {
        let total = self.stamps.iter().map(|stamp| stamp.bytes).sum::<u64>().max(1);
        let mut hasher = blake3::Hasher::new();
        let mut buffer = vec![0; BUFFER];
        let mut done = 0;
        for stamp in &self.stamps {
            let mut file = File::open(&stamp.path).map_err(|error| unreadable(&stamp.path, &error))?;
            hasher.update(&stamp.bytes.to_le_bytes());
            let mut left = stamp.bytes;
            while left > 0 {
                if !progress((done as f64 / total as f64) as f32) {
                    return Err(Error::Abandoned);
                }
                let most = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                let got = match file.read(&mut buffer[..most]) {
                    Ok(0) => return Err(changed(&stamp.path)),
                    Ok(got) => got,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(error) => return Err(unreadable(&stamp.path, &error)),
                };
                hasher.update(&buffer[..got]);
                left -= got as u64;
                done += got as u64;
            }
        }
        hasher.update(&(self.template.len() as u64).to_le_bytes());
        hasher.update(self.template.as_bytes());
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// An error if a file is not any more what it was.
    fn check_unchanged(&self) -> Result<(), Error> {
        match self.stamps.iter().find(|stamp| Stamp::of(&stamp.path).as_ref() != Ok(stamp)) {
            Some(stamp) => Err(changed(&stamp.path)),
            None => Ok(()),
        }
    }
}

impl Stamp {
    fn of(path: &Path) -> Result<Self, Error> {
        let stamp = || {
            let path = fs::canonicalize(path)?;
            let metadata = fs::metadata(&path)?;
            let modified = metadata.modified()?.duration_since(UNIX_EPOCH).unwrap_or_default();
            let modified_ns = u64::try_from(modified.as_nanos()).unwrap_or(u64::MAX);
            Ok(Self { path, bytes: metadata.len(), modified_ns })
        };
        stamp().map_err(|error: io::Error| unreadable(path, &error))
    }
}

impl Digests {
    pub fn new(state_dir: &Path) -> Self {
        Self { path: state_dir.join("digests.json"), writing: Mutex::new(()) }
    }

    /// The digest of a model, from the note or by reading its files. Blocks for as long as that takes.
    ///
    /// `progress` hears shares from 0 to 1, and gives up by answering `false`.
    ///
    /// # Errors
    /// `Abandoned` when `progress` gave up. `File` when a file cannot be read. `Failed` when a file was changed since `files` was made,
    /// so that nobody can say what was loaded.
    pub fn digest(&self, files: &Files, progress: impl FnMut(f32) -> bool) -> Result<String, Error> {
        let noted = self.read().into_iter().find(|noted| noted.files == files.stamps);
        let digest = match &noted {
            Some(noted) => noted.digest.clone(),
            None => files.hash(progress)?,
        };
        files.check_unchanged()?;
        if noted.is_none()
            && let Err(error) = self.note(files, &digest)
        {
            tracing::warn!(file = %self.path.display(), %error, "A model's digest could not be kept: the next start reads it again.");
        }
        Ok(digest)
    }

    fn read(&self) -> Vec<Noted> {
        let noted = match fs::read(&self.path) {
            Ok(bytes) => serde_json::from_slice::<Vec<Noted>>(&bytes).map_err(|error| error.to_string()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Vec::new(),
            Err(error) => Err(error.to_string()),
        };
        let noted = noted.and_then(|noted| match noted.iter().all(|noted| is_digest(&noted.digest)) {
            true => Ok(noted),
            false => Err("a digest has not 64 hex digits".to_owned()),
        });
        noted.unwrap_or_else(|error| {
            tracing::warn!(file = %self.path.display(), %error, "The noted digests are damaged and are not used.");
            Vec::new()
        })
    }

    fn note(&self, files: &Files, digest: &str) -> io::Result<()> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut noted = self.read();
        // What a file was before it was replaced is of no use to anybody, and neither is a file that has gone.
        noted.retain(|noted| {
            noted.files.iter().all(|known| known.path.exists() && files.stamps.iter().all(|new| new.path != known.path))
        });
        noted.push(Noted { digest: digest.to_owned(), files: files.stamps.clone() });
        let folder = self.path.parent().unwrap_or(Path::new("."));
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        file.write_all(&serde_json::to_vec_pretty(&noted)?)?;
        file.as_file().sync_all()?;
        file.persist(&self.path).map(|_| ()).map_err(|error| error.error)
    }
}

fn is_digest(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

fn unreadable(path: &Path, error: &io::Error) -> Error {
    Error::File(GgufError::Unreadable { path: path.to_owned(), reason: error.to_string() })
}

fn changed(path: &Path) -> Error {
    Error::Failed(format!("{} was changed while it was being loaded: load it again when it is complete", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(folder: &Path, parts: &[&[u8]], template: &str) -> Files {
        let stamp = |(number, bytes): (usize, &&[u8])| {
            let path = folder.join(format!("part-{number}"));
            fs::write(&path, bytes).unwrap();
            Stamp::of(&path).unwrap()
        };
        Files { stamps: parts.iter().enumerate().map(stamp).collect(), template: template.into() }
    }

    fn digest(parts: &[&[u8]], template: &str) -> String {
        files(tempfile::tempdir().unwrap().path(), parts, template).hash(|_| true).unwrap()
    }

    /// The recipe, written down a second time.
    fn by_hand(texts: &[&[u8]]) -> String {
        let mut bytes = Vec::new();
        for text in texts {
            bytes.extend((text.len() as u64).to_le_bytes());
            bytes.extend(*text);
        }
        blake3::hash(&bytes).to_hex().to_string()
    }

    #[test]
    fn the_digest_follows_the_recipe() {
        assert_eq!(digest(&[b"weights"], "{{ x }}"), by_hand(&[b"weights", b"{{ x }}"]));
        assert_eq!(digest(&[b"one", b"two"], ""), by_hand(&[b"one", b"two", b""]));
        let long: Vec<u8> = (0..BUFFER * 2 + 77).map(|place| (place % 251) as u8).collect();
        assert_eq!(digest(&[&long], "t"), by_hand(&[&long, b"t"]));
    }

    #[test]
    fn parts_and_template_are_not_confused() {
        let digests = [
            digest(&[b"ab"], "c"),
            digest(&[b"a"], "bc"),
            digest(&[b"a", b"b"], "c"),
            digest(&[b"abc"], ""),
            digest(&[b""], "abc"),
        ];
        for (place, one) in digests.iter().enumerate() {
            assert!(!digests[place + 1..].contains(one), "{place}");
        }
    }

    #[test]
    fn a_digest_is_noted_until_its_file_changes() {
        let folder = tempfile::tempdir().unwrap();
        let digests = Digests::new(folder.path());
        let first = files(folder.path(), &[b"one"], "");
        let digest = digests.digest(&first, |_| true).unwrap();
        // It is known now, and so nothing is read.
        assert_eq!(digests.digest(&first, |_| panic!("a noted digest needs no reading")), Ok(digest.clone()));
        let second = files(folder.path(), &[b"another"], "");
        assert_ne!(digests.digest(&second, |_| true).unwrap(), digest);
        assert_eq!(digests.read().len(), 1, "the old one is of no use");
    }

    #[test]
    fn a_damaged_note_is_ignored_and_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let digests = Digests::new(folder.path());
        let files = files(folder.path(), &[b"one"], "");
        let digest = digests.digest(&files, |_| true).unwrap();
        let good = fs::read_to_string(&digests.path).unwrap();
        for damaged in ["", "{", "[1]", &good[..good.len() / 2], &good.replace(&digest, "xyz")] {
            fs::write(&digests.path, damaged).unwrap();
            assert_eq!(digests.digest(&files, |_| true), Ok(digest.clone()), "{damaged}");
            assert_eq!(fs::read_to_string(&digests.path).unwrap(), good);
        }
    }

    #[test]
    fn a_folder_that_cannot_be_written_costs_only_the_note() {
        let folder = tempfile::tempdir().unwrap();
        let files = files(folder.path(), &[b"one"], "");
        assert!(Digests::new(&folder.path().join("missing")).digest(&files, |_| true).is_ok());
    }

    #[test]
    fn hashing_stops_when_nobody_waits() {
        let folder = tempfile::tempdir().unwrap();
        let digests = Digests::new(folder.path());
        let long = vec![0; BUFFER * 3];
        let files = files(folder.path(), &[&long], "");
        let mut steps = 0;
        let outcome = digests.digest(&files, |share| {
            assert!((0.0..=1.0).contains(&share));
            steps += 1;
            steps < 2
        });
        assert_eq!((outcome, steps), (Err(Error::Abandoned), 2));
        assert!(!digests.path.exists());
    }

    #[test]
    fn a_file_that_changes_meanwhile_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let digests = Digests::new(folder.path());
        let before = files(folder.path(), &[b"one"], "");
        files(folder.path(), &[b"longer than before"], "");
        assert!(matches!(digests.digest(&before, |_| true), Err(Error::Failed(_))));
        files(folder.path(), &[b""], "");
        assert!(matches!(digests.digest(&before, |_| true), Err(Error::Failed(_))));
        assert!(!digests.path.exists());
    }
}
