//! The node's key: by it other nodes know this one, and with it the node signs what it says of itself.

use std::io;
use std::path::{Path, PathBuf};

use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};
use zeroize::Zeroizing;

use super::private::{self, Unread};

const FILE: &str = "node.key";

/// Hex digits in the file; a newline follows them.
const DIGITS: usize = 64;

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// Others have had the opportunity to read the key. Whether they did, only the operator can judge.
    #[error(
        "the key {} has mode {mode:04o}: other users of this machine can read it. Run `chmod 600 {}` if none of them may have",
        path.display(), path.display()
    )]
    Exposed { path: PathBuf, mode: u32 },
    /// The file is there and holds no key. It is left as it is: it may be the only copy of one.
    #[error("{} is no key: {reason}. Restore it from a copy, or move it away to get a new key and with it a new name", path.display())]
    Damaged { path: PathBuf, reason: &'static str },
    #[error("the key {} cannot be read: {reason}", path.display())]
    Unreadable { path: PathBuf, reason: io::Error },
    #[error("no key can be made in {}: {reason}", folder.display())]
    Unwritable { folder: PathBuf, reason: io::Error },
    #[error("the system gives no random numbers: {0}")]
    Random(getrandom::Error),
}

/// Why a signature was not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum VerifyError {
    #[error("the 32 bytes are no Ed25519 public key")]
    Key,
    /// The message or the signature was changed, or another key made it.
    #[error("the signature is not by this key over this message")]
    Signature,
}

/// An Ed25519 key. Its secret half is overwritten when it is dropped.
pub struct NodeKey(SigningKey);

impl NodeKey {
    /// The key in `folder`, which is made on the first call together with the folder. Blocks on the disk.
    ///
    /// The file `node.key` holds the seed of RFC 8032 as 64 hex digits and a newline. It appears whole or not at all, with mode 0600, in
    /// a folder that is made with mode 0700, and no file is ever replaced: of two nodes that start at the same time in one folder, both
    /// get the key that came first.
    pub fn load_or_create(folder: &Path) -> Result<NodeKey, IdentityError> {
        NodeKey::load_or_create_at(&folder.join(FILE))
    }

    /// The same for a key of another name.
    pub(super) fn load_or_create_at(path: &Path) -> Result<NodeKey, IdentityError> {
        match read(path) {
            Err(IdentityError::Unreadable { reason, .. }) if reason.kind() == io::ErrorKind::NotFound => {}
            found => return found,
        }
        let key = NodeKey::ephemeral()?;
        let folder = path.parent().unwrap_or(Path::new("."));
        match key.write(folder, path) {
            Ok(()) => Ok(key),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => read(path),
            Err(reason) => Err(IdentityError::Unwritable { folder: folder.to_owned(), reason }),
        }
    }

    pub(super) fn from_seed(seed: &[u8; 32]) -> NodeKey {
        NodeKey(SigningKey::from_bytes(seed))
    }

    /// A new key that nobody keeps: for those who come for a while to ask, and for tests.
    ///
    /// # Errors
    /// `Random`, and no other.
    pub fn ephemeral() -> Result<NodeKey, IdentityError> {
        let mut seed = Zeroizing::new([0; 32]);
        getrandom::fill(&mut *seed).map_err(IdentityError::Random)?;
        Ok(NodeKey(SigningKey::from_bytes(&seed)))
    }

    /// The seed, for the transport that proves to peers who this node is ([`Join::secret_key`]).
    ///
    /// [`Join::secret_key`]: fabstir_plugin_api::transport::Join::secret_key
    pub fn secret(&self) -> Zeroizing<[u8; 32]> {
        Zeroizing::new(self.0.to_bytes())
    }

    pub fn public_key(&self) -> [u8; 32] {
        self.0.verifying_key().to_bytes()
    }

    /// The same key and message give the same signature. The caller sees to it that no message can be taken for one of another
    /// purpose: it begins with a text that names the purpose.
    pub fn sign(&self, message: &[u8]) -> [u8; 64] {
        self.0.sign(message).to_bytes()
    }

    fn write(&self, folder: &Path, path: &Path) -> io::Result<()> {
        let mut text = Zeroizing::new([b'\n'; DIGITS + 1]);
        hex::encode_to_slice(*self.secret(), &mut text[..DIGITS]).expect("32 bytes have 64 digits");
        private::create(folder, path, &*text)
    }
}

fn read(path: &Path) -> Result<NodeKey, IdentityError> {
    let damaged = |reason: &'static str| IdentityError::Damaged { path: path.to_owned(), reason };
    let text = private::read(path, DIGITS + 1).map_err(|error| match error {
        Unread::Exposed { mode } => IdentityError::Exposed { path: path.to_owned(), mode },
        Unread::NotAFile => damaged("it is not a file"),
        Unread::TooLong => damaged("it does not hold 64 hex digits and a newline"),
        Unread::Io(reason) => IdentityError::Unreadable { path: path.to_owned(), reason },
    })?;
    let digits = text.strip_suffix(b"\n").unwrap_or(&text);
    if digits.len() != DIGITS {
        return Err(damaged("it does not hold 64 hex digits and a newline"));
    }
    let mut seed = Zeroizing::new([0; 32]);
    hex::decode_to_slice(digits, &mut *seed).map_err(|_| damaged("it holds something else than hex digits"))?;
    Ok(NodeKey(SigningKey::from_bytes(&seed)))
}

/// Whether the owner of `public_key` signed `message`. Strict: keys of small order and signatures in more than one form are refused, so
/// that all nodes come to the same answer.
pub fn verify(public_key: &[u8; 32], message: &[u8], signature: &[u8; 64]) -> Result<(), VerifyError> {
    let key = VerifyingKey::from_bytes(public_key).map_err(|_| VerifyError::Key)?;
    key.verify_strict(message, &Signature::from_bytes(signature)).map_err(|_| VerifyError::Signature)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use super::*;

    fn folder() -> tempfile::TempDir {
        tempfile::tempdir().unwrap()
    }

    fn keep(folder: &Path, text: impl AsRef<[u8]>, mode: u32) -> PathBuf {
        let path = folder.join(FILE);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        path
    }

    fn refusal(folder: &Path) -> IdentityError {
        NodeKey::load_or_create(folder).err().expect("is refused")
    }

    #[test]
    fn a_key_is_made_once_and_found_again() {
        let parent = folder();
        let folder = parent.path().join("identity");
        let made = NodeKey::load_or_create(&folder).unwrap();
        let found = NodeKey::load_or_create(&folder).unwrap();
        assert_eq!(made.public_key(), found.public_key());
        assert_eq!(fs::metadata(&folder).unwrap().mode() & 0o7777, 0o700);
        assert_eq!(fs::metadata(folder.join(FILE)).unwrap().mode() & 0o7777, 0o600);
        assert_eq!(fs::read_to_string(folder.join(FILE)).unwrap(), format!("{}\n", hex::encode(*made.secret())));
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1, "nothing is left beside the key");
    }

    #[test]
    fn those_who_start_at_the_same_time_get_the_same_key() {
        let folder = folder();
        let keys: Vec<_> = std::thread::scope(|scope| {
            let start = || NodeKey::load_or_create(folder.path()).unwrap().public_key();
            let starts: Vec<_> = (0..8).map(|_| scope.spawn(start)).collect();
            starts.into_iter().map(|start| start.join().unwrap()).collect()
        });
        assert!(keys.iter().all(|key| key == &keys[0]));
    }

    #[test]
    fn a_key_that_others_can_read_is_refused() {
        let folder = folder();
        let path = NodeKey::load_or_create(folder.path()).map(|_| folder.path().join(FILE)).unwrap();
        for mode in [0o640, 0o604, 0o620, 0o644, 0o666] {
            fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            let error = refusal(folder.path());
            assert!(matches!(error, IdentityError::Exposed { mode: found, .. } if found == mode), "{error}");
            let text = error.to_string();
            assert!(text.contains(&format!("{mode:04o}")) && text.contains("chmod 600"), "{text}");
        }
        fs::set_permissions(&path, Permissions::from_mode(0o400)).unwrap();
        assert!(NodeKey::load_or_create(folder.path()).is_ok());
    }

    #[test]
    fn a_damaged_key_is_refused_and_left_as_it_is() {
        let folder = folder();
        let good = "ab".repeat(32);
        let spoilt = [
            String::new(),
            good[1..].into(),
            format!("{good}0\n"),
            format!("{good}\n\n"),
            format!("{good}\r\n"),
            "xy".repeat(32),
        ];
        for text in spoilt {
            let path = keep(folder.path(), &text, 0o600);
            let error = refusal(folder.path());
            assert!(matches!(error, IdentityError::Damaged { .. }), "{text:?}: {error}");
            assert!(text.is_empty() || !error.to_string().contains(text.trim()), "the error tells the key");
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
        for text in [good.clone(), format!("{good}\n"), good.to_uppercase()] {
            keep(folder.path(), &text, 0o600);
            assert_eq!(*NodeKey::load_or_create(folder.path()).unwrap().secret(), [0xab; 32]);
        }
    }

    #[test]
    fn what_cannot_be_a_key_is_refused() {
        let other = folder();
        fs::create_dir(other.path().join(FILE)).unwrap();
        assert!(matches!(refusal(other.path()), IdentityError::Damaged { .. }));

        // A link to nowhere: what it stands for may come back, so no key takes its place.
        let link = folder();
        std::os::unix::fs::symlink("/nowhere/node.key", link.path().join(FILE)).unwrap();
        assert!(matches!(refusal(link.path()), IdentityError::Unreadable { .. }));
        assert!(link.path().join(FILE).is_symlink());

        let file = folder();
        fs::write(file.path().join("file"), "").unwrap();
        assert!(matches!(refusal(&file.path().join("file")), IdentityError::Unreadable { .. }));
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_named() {
        let error = refusal(Path::new("/proc/no-such-folder"));
        assert!(matches!(error, IdentityError::Unwritable { .. }), "{error}");
        assert!(error.to_string().contains("/proc/no-such-folder"), "{error}");
    }

    #[test]
    fn what_was_signed_is_verified_and_nothing_else() {
        let (one, other) = (NodeKey::ephemeral().unwrap(), NodeKey::ephemeral().unwrap());
        assert_ne!(one.public_key(), other.public_key());
        let signature = one.sign(b"message");
        assert_eq!(verify(&one.public_key(), b"message", &signature), Ok(()));
        assert_eq!(verify(&one.public_key(), b"massage", &signature), Err(VerifyError::Signature));
        assert_eq!(verify(&other.public_key(), b"message", &signature), Err(VerifyError::Signature));
        for place in 0..64 {
            let mut spoilt = signature;
            spoilt[place] ^= 1;
            assert_eq!(verify(&one.public_key(), b"message", &spoilt), Err(VerifyError::Signature), "{place}");
        }
    }

    #[test]
    fn keys_and_signatures_are_those_of_the_rfc() {
        // RFC 8032, section 7.1, test 2.
        let folder = folder();
        keep(folder.path(), "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb\n", 0o600);
        let key = NodeKey::load_or_create(folder.path()).unwrap();
        assert_eq!(hex::encode(key.public_key()), "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c");
        assert_eq!(
            hex::encode(key.sign(&[0x72])),
            "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
        );
    }

    #[test]
    fn weak_keys_sign_nothing() {
        // The neutral element: without the strict check, every message would verify under it with the signature (neutral, 0).
        let mut neutral = [0; 32];
        neutral[0] = 1;
        let mut signature = [0; 64];
        signature[0] = 1;
        assert_eq!(verify(&neutral, b"anything", &signature), Err(VerifyError::Signature));
        // No point of the curve has this y.
        let mut none = [0; 32];
        none[0] = 2;
        assert_eq!(verify(&none, b"anything", &signature), Err(VerifyError::Key));
    }
}
