//! Which files may run: the lock, signatures, and the private copy.

use std::io::Write;
use std::path::{Path, PathBuf};

use ed25519_dalek::{Signature, VerifyingKey};
use fabstir_plugin_api::manifest::Manifest;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::display;
use super::error::{LoadError, Step};
use crate::config::{Policy, Trust};

/// The SHA-256 of some bytes in lower-case hexadecimal.
pub fn sha256(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

/// The lock file: which builds of which plugins the operator has accepted.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lock {
    #[serde(default)]
    pub plugin: Vec<Locked>,
}

/// One accepted build.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Locked {
    pub name: String,
    pub version: String,
    pub sha256: String,
}

impl Lock {
    /// Reads the lock; `None` where there is none.
    pub fn read(path: &Path) -> Result<Option<Self>, LoadError> {
        let error = |why: String| {
            LoadError::new(Step::Trust, "P301", format!("the lock file {} cannot be read", display(path)))
                .note("found", why)
                .fix("write it again with `fabstir-node plugin lock`")
        };
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(why) if why.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(why) => return Err(error(why.to_string())),
        };
        toml::from_str(&text).map(Some).map_err(|why| error(why.to_string()))
    }

    pub fn set(&mut self, locked: Locked) {
        self.plugin.retain(|known| known.name != locked.name);
        self.plugin.push(locked);
        self.plugin.sort_by(|a, b| a.name.cmp(&b.name));
    }

    pub fn write(&self, path: &Path) -> Result<(), LoadError> {
        let failed = |why: String| {
            LoadError::new(Step::Trust, "P301", format!("the lock file {} cannot be written: {why}", display(path)))
        };
        let text = toml::to_string(self).map_err(|why| failed(why.to_string()))?;
        let text = format!("# Written by `fabstir-node plugin lock`: the plugin files that this node may load.\n\n{text}");
        replace(path, text.as_bytes(), 0o644).map_err(|why| failed(why.to_string()))
    }
}

/// Applies the operator's policy and returns the file's hash.
pub(super) fn check(trust: &Trust, file: &Path, bytes: &[u8], manifest: &Manifest) -> Result<String, LoadError> {
    let hash = sha256(bytes);
    match trust.policy {
        Policy::Any => {}
        Policy::Known => known(trust, file, manifest, &hash)?,
        Policy::Signed => signed(trust, file, bytes)?,
    }
    Ok(hash)
}

fn known(trust: &Trust, file: &Path, manifest: &Manifest, hash: &str) -> Result<(), LoadError> {
    let lock = Lock::read(&trust.lock)?.unwrap_or_default();
    let fix = format!("if you trust this file, run `fabstir-node plugin lock {}`", display(file));
    match lock.plugin.iter().find(|locked| locked.name == manifest.name) {
        Some(locked) if locked.sha256 == hash => Ok(()),
        Some(locked) => Err(LoadError::new(Step::Trust, "P302", format!("`{}` is not the file that was locked", manifest.name))
            .note("file", display(file))
            .note("locked", format!("{} {} in {}", locked.version, locked.sha256, display(&trust.lock)))
            .note("found", format!("{} {hash}", manifest.version))
            .fix(fix)),
        None => Err(LoadError::new(Step::Trust, "P303", format!("`{}` is not in the lock file", manifest.name))
            .note("file", display(file))
            .note("lock", display(&trust.lock))
            .fix(fix)),
    }
}

/// A signature lies beside the file as `FILE.sig`: 64 bytes of Ed25519 over the file's bytes, as
/// `openssl pkeyutl -sign -rawin -inkey KEY -in FILE -out FILE.sig` writes them.
fn signed(trust: &Trust, file: &Path, bytes: &[u8]) -> Result<(), LoadError> {
    let path = PathBuf::from(format!("{}.sig", display(file)));
    let error = |code, message: String| LoadError::new(Step::Trust, code, message).note("file", display(file));
    let signature = std::fs::read(&path).map_err(|why| {
        error("P304", "the plugin is not signed".into())
            .note("found", format!("{}: {why}", display(&path)))
            .fix("get the plugin with its signature, or set `plugins.trust.policy = \"known\"`")
    })?;
    let signature = Signature::from_slice(&signature)
        .map_err(|_| error("P305", format!("{} is not an Ed25519 signature of 64 bytes", display(&path))))?;
    let good = trust.keys.iter().filter_map(|key| public_key(key)).any(|key| key.verify_strict(bytes, &signature).is_ok());
    match good {
        true => Ok(()),
        false => Err(error("P306", "no trusted key made the plugin's signature".into())
            .note("trusted", format!("{} keys in `plugins.trust.keys`", trust.keys.len()))
            .fix("add the publisher's key if you trust it; otherwise the file was changed: install it again")),
    }
}

fn public_key(text: &str) -> Option<VerifyingKey> {
    let bytes = hex::decode(text.strip_prefix("ed25519:")?).ok()?;
    VerifyingKey::from_bytes(&bytes.try_into().ok()?).ok()
}

/// Writes the checked bytes to a file of this node's own, named by their hash, and returns its path.
pub(super) fn copy(copies: &Path, source: &Path, bytes: &[u8], hash: &str) -> Result<PathBuf, LoadError> {
    let failed = |why: std::io::Error| {
        LoadError::new(Step::Trust, "P307", format!("no private copy of {} can be made: {why}", display(source)))
            .note("folder", display(copies))
            .fix("free disk space, or choose another `node.data_dir`")
    };
    let folder = copies.join(hash);
    let path = folder.join(source.file_name().unwrap_or_default());
    if std::fs::read(&path).is_ok_and(|copied| sha256(&copied) == hash) {
        return Ok(path);
    }
    std::fs::create_dir_all(&folder).map_err(failed)?;
    replace(&path, bytes, 0o500).map_err(failed)?;
    Ok(path)
}

/// Writes a file so that it is there whole or not at all.
pub(super) fn replace(path: &Path, bytes: &[u8], mode: u32) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(bytes)?;
    file.as_file().set_permissions(std::fs::Permissions::from_mode(mode))?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    Ok(())
}
