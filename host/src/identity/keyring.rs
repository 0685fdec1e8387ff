//! The folder of account keys: one keystore file for each, named for what the operator calls it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::account::{self, Account, Address, NotAKey};
use super::keystore::{self, OpenError, Password};
use super::private::{self, Unread};

const EXTENSION: &str = "json";

/// The most characters of a name.
const MOST: usize = 64;

/// Keys by name. Nothing is read before it is asked for, and no file is ever replaced or removed.
pub struct Keyring {
    folder: PathBuf,
}

/// A key as it can be listed without its password.
#[derive(Debug)]
pub struct Entry {
    pub name: String,
    /// As the file says it. `None` where it does not, as foundry's files do not, or cannot be read.
    pub address: Option<Address>,
    pub path: PathBuf,
    /// Why the key could not be used, even with its password.
    pub problem: Option<KeyError>,
}

/// Why there is no key, or none was kept.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error("`{0}` cannot be the name of a key: take up to 64 letters, digits, `-` and `_`")]
    Name(String),
    #[error("there is no key `{name}` in {}{}", folder.display(), known(near))]
    Unknown { name: String, folder: PathBuf, near: Vec<String> },
    /// It may be the only copy of a key, so nothing takes its place.
    #[error("there is a key `{name}` already, in {}: take another name, or move the file away", path.display())]
    Exists { name: String, path: PathBuf },
    /// Others have had the opportunity to copy the file. Whether they did, only the operator can judge.
    #[error(
        "{} has mode {mode:04o}: other users of this machine can read or change it. Run `chmod 600 {}` if none of them may have",
        path.display(), path.display()
    )]
    Exposed { path: PathBuf, mode: u32 },
    /// The file is there and gives no key. It is left as it is.
    #[error("{} gives no key: {reason}. Restore it from a copy", path.display())]
    Damaged { path: PathBuf, reason: String },
    /// Which of the two it is cannot be seen: the code covers both.
    #[error("the password does not open {}. If it is the right one, the file is damaged: restore it from a copy", path.display())]
    Password { path: PathBuf },
    #[error("{} cannot be read: {reason}", path.display())]
    Unreadable { path: PathBuf, reason: io::Error },
    #[error("no key can be kept in {}: {reason}", folder.display())]
    Unwritable { folder: PathBuf, reason: io::Error },
    #[error("the system gives no random numbers: {0}")]
    Random(#[from] getrandom::Error),
    #[error("what is given is no key: {0}")]
    NotAKey(#[from] NotAKey),
}

fn known(near: &[String]) -> String {
    match near {
        [] => ". `fabstir-node keys list` names those that are there".into(),
        near => format!(". Near it: {}", near.join(", ")),
    }
}

impl Keyring {
    /// The keys of the node whose state is in `data_dir`.
    pub fn of(data_dir: &Path) -> Keyring {
        Keyring { folder: data_dir.join("keys") }
    }

    /// Where a key of this name would be kept.
    ///
    /// # Errors
    /// `Name`, and `Exists`.
    pub fn vacant(&self, name: &str) -> Result<PathBuf, KeyError> {
        let path = self.path(name)?;
        match path.symlink_metadata() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(path),
            Err(reason) => Err(KeyError::Unreadable { path, reason }),
            Ok(_) => Err(KeyError::Exists { name: name.into(), path }),
        }
    }

    /// Keeps a key. The file appears whole or not at all. Blocks for about a second.
    pub fn add(&self, name: &str, account: &Account, password: &Password) -> Result<PathBuf, KeyError> {
        let path = self.vacant(name)?;
        let text = keystore::seal(account, password, keystore::STANDARD)?;
        match private::create(&self.folder, &path, text.as_bytes()) {
            Ok(()) => Ok(path),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(KeyError::Exists { name: name.into(), path }),
            Err(reason) => Err(KeyError::Unwritable { folder: self.folder.clone(), reason }),
        }
    }

    /// A key by its name. Blocks for about a second.
    pub fn open(&self, name: &str, password: &Password) -> Result<Account, KeyError> {
        open(&self.find(name)?.path, password)
    }

    /// What can be said of a key without its password.
    ///
    /// # Errors
    /// `Name` and `Unknown`; what is wrong with the file is its `problem`.
    pub fn find(&self, name: &str) -> Result<Entry, KeyError> {
        let path = self.path(name)?;
        let found = path.symlink_metadata().is_ok();
        if !found {
            let mut near: Vec<(f64, String)> =
                self.names()?.into_iter().map(|known| (strsim::jaro_winkler(name, &known), known)).collect();
            near.retain(|(likeness, _)| *likeness > 0.7);
            near.sort_by(|one, other| other.0.total_cmp(&one.0));
            let near = near.into_iter().take(3).map(|(_, name)| name).collect();
            return Err(KeyError::Unknown { name: name.into(), folder: self.folder.clone(), near });
        }
        let said = read(&path, keystore::MOST).and_then(|text| keystore::address(&text).map_err(|error| problem(&path, error)));
        let (address, problem) = match said {
            Ok(address) => (address, None),
            Err(problem) => (None, Some(problem)),
        };
        Ok(Entry { name: name.into(), address, path, problem })
    }

    /// All keys, by name.
    pub fn list(&self) -> Result<Vec<Entry>, KeyError> {
        self.names()?.iter().map(|name| self.find(name)).collect()
    }

    fn names(&self) -> Result<Vec<String>, KeyError> {
        let unreadable = |reason| KeyError::Unreadable { path: self.folder.clone(), reason };
        let files = match fs::read_dir(&self.folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            files => files.map_err(unreadable)?,
        };
        let mut names = Vec::new();
        for file in files {
            let path = file.map_err(unreadable)?.path();
            let name = path.file_stem().and_then(|stem| stem.to_str());
            names.extend(name.filter(|name| path.extension() == Some(EXTENSION.as_ref()) && is_name(name)).map(String::from));
        }
        names.sort();
        Ok(names)
    }

    fn path(&self, name: &str) -> Result<PathBuf, KeyError> {
        match is_name(name) {
            true => Ok(self.folder.join(format!("{name}.{EXTENSION}"))),
            false => Err(KeyError::Name(name.into())),
        }
    }
}

/// No dot and no slash, so that a name never leads out of the folder.
fn is_name(name: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    (1..=MOST).contains(&name.len()) && !name.starts_with('-') && name.bytes().all(fits)
}

/// The key in a keystore file, wherever it lies. Blocks for as long as the file says, usually about a second.
pub fn open(path: &Path, password: &Password) -> Result<Account, KeyError> {
    let text = read(path, keystore::MOST)?;
    keystore::open(&text, password).map_err(|error| problem(path, error))
}

/// The key in a file that holds it in plain: 64 hex digits.
pub fn read_plain(path: &Path) -> Result<Account, KeyError> {
    let text = read(path, account::MOST)?;
    let damaged = |error: NotAKey| KeyError::Damaged { path: path.to_owned(), reason: error.to_string() };
    Account::from_hex(&text).map_err(damaged)
}

fn read(path: &Path, most: usize) -> Result<zeroize::Zeroizing<Vec<u8>>, KeyError> {
    let damaged = |reason: String| KeyError::Damaged { path: path.to_owned(), reason };
    private::read(path, most).map_err(|error| match error {
        Unread::Exposed { mode } => KeyError::Exposed { path: path.to_owned(), mode },
        Unread::NotAFile => damaged("it is not a file".into()),
        Unread::TooLong => damaged(format!("it has more than {most} bytes")),
        Unread::Io(reason) => KeyError::Unreadable { path: path.to_owned(), reason },
    })
}

fn problem(path: &Path, error: OpenError) -> KeyError {
    match error {
        OpenError::Damaged(reason) => KeyError::Damaged { path: path.to_owned(), reason },
        OpenError::Password => KeyError::Password { path: path.to_owned() },
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use zeroize::Zeroizing;

    use super::*;

    fn password(text: &str) -> Password {
        Password::new(Zeroizing::new(text.into())).expect("a password")
    }

    fn random() -> Account {
        Account::random().expect("random numbers")
    }

    #[test]
    fn a_key_is_kept_and_found_again() {
        let place = tempfile::tempdir().expect("a folder");
        let keyring = Keyring::of(place.path());
        assert_eq!(keyring.list().expect("an empty list").len(), 0);
        let account = random();
        let path = keyring.add("payout", &account, &password("p")).expect("is kept");
        assert_eq!(path, place.path().join("keys/payout.json"));
        assert_eq!(fs::metadata(&path).expect("there").mode() & 0o7777, 0o600);
        assert_eq!(fs::metadata(place.path().join("keys")).expect("there").mode() & 0o7777, 0o700);
        assert_eq!(fs::read_dir(place.path().join("keys")).expect("there").count(), 1, "nothing is left beside the key");
        assert_eq!(keyring.open("payout", &password("p")).expect("opens").address(), account.address());
        assert!(matches!(keyring.open("payout", &password("q")).err(), Some(KeyError::Password { .. })));

        // Nothing takes the place of a key: no other key, and no key takes the place of a link to nowhere.
        let before = fs::read(&path).expect("read");
        assert!(matches!(keyring.add("payout", &random(), &password("p")), Err(KeyError::Exists { .. })));
        assert_eq!(fs::read(&path).expect("read"), before);
        std::os::unix::fs::symlink("/nowhere", place.path().join("keys/link.json")).expect("a link");
        assert!(matches!(keyring.add("link", &random(), &password("p")), Err(KeyError::Exists { .. })));
    }

    #[test]
    fn of_those_who_take_a_name_at_the_same_time_one_gets_it() {
        let place = tempfile::tempdir().expect("a folder");
        let (one, other) = (random(), random());
        let add = |account| Keyring::of(place.path()).add("name", account, &password("p")).is_ok();
        let kept = std::thread::scope(|scope| {
            let adds = [&one, &other].map(|account| scope.spawn(move || add(account)));
            adds.map(|add| add.join().expect("no panic"))
        });
        assert_eq!(kept.iter().filter(|kept| **kept).count(), 1);
        let winner = if kept[0] { one } else { other };
        let found = Keyring::of(place.path()).open("name", &password("p")).expect("opens");
        assert_eq!(found.address(), winner.address());
    }

    #[test]
    fn a_name_leads_nowhere_else() {
        let keyring = Keyring::of(Path::new("/nowhere"));
        for name in ["", ".", "..", "a/b", "../x", "a.b", "-a", "ä", "a b", "a\0", &"a".repeat(65)] {
            assert!(matches!(keyring.vacant(name), Err(KeyError::Name(_))), "{name:?}");
            assert!(matches!(keyring.find(name), Err(KeyError::Name(_))), "{name:?}");
        }
        for name in ["a", "A-1_b", &"a".repeat(64)] {
            assert!(keyring.vacant(name).is_ok(), "{name:?}");
        }
    }

    #[test]
    fn an_unknown_name_is_answered_with_those_near_it() {
        let place = tempfile::tempdir().expect("a folder");
        fs::create_dir(place.path().join("keys")).expect("a folder");
        for file in ["payout.json", "payouts.json", "other.json", "payout.txt", ".payin.json"] {
            fs::write(place.path().join("keys").join(file), "").expect("write");
        }
        let error = Keyring::of(place.path()).find("payuot").expect_err("is unknown").to_string();
        assert!(error.contains("Near it: payout, payouts") && !error.contains("other"), "{error}");
        let error = Keyring::of(place.path()).find("x").expect_err("is unknown").to_string();
        assert!(error.contains("keys list"), "{error}");
    }

    #[test]
    fn a_list_says_what_is_wrong_with_each() {
        let place = tempfile::tempdir().expect("a folder");
        let folder = place.path().join("keys");
        fs::create_dir(&folder).expect("a folder");
        let write = |name: &str, text: &str, mode| {
            fs::write(folder.join(name), text).expect("write");
            fs::set_permissions(folder.join(name), fs::Permissions::from_mode(mode)).expect("mode");
        };
        write("damaged.json", "{}", 0o600);
        write("exposed.json", "{}", 0o644);
        write("long.json", &"x".repeat(20_000), 0o600);
        fs::create_dir(folder.join("folder.json")).expect("a folder");
        let list = Keyring::of(place.path()).list().expect("a list");
        let problem = |name: &str| {
            let entry = list.iter().find(|entry| entry.name == name).expect(name);
            entry.problem.as_ref().expect("there is one").to_string()
        };
        assert_eq!(list.len(), 4);
        assert!(problem("damaged").contains("no keystore of version 3"), "{}", problem("damaged"));
        assert!(problem("exposed").contains("mode 0644") && problem("exposed").contains("chmod 600"), "{}", problem("exposed"));
        assert!(problem("long").contains("16384 bytes"), "{}", problem("long"));
        assert!(problem("folder").contains("not a file"), "{}", problem("folder"));
    }
}
