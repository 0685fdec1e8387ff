//! What this instance knows of blobs, in files: which ones it has put and where, the trees of those that it has read, and the uploads that
//! have begun.
//!
//! ```text
//! blobs/ab/ab..      a blob that was put: a line of JSON, then the nodes of its tree
//! trees/ab/ab..      the same for a blob that was only read
//! uploads/ab..-NAME  where an upload to a portal goes on
//! ```
//!
//! Every file is written under another name and renamed, so several processes may share the folder, as a node and a command do.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use blob_folder::disk::write_durably;
use serde::{Deserialize, Serialize};

use crate::cid::Id;
use crate::error::S5Error;
use crate::tree::Tree;

/// The folders. Every method blocks on the disk.
#[derive(Debug)]
pub struct Ledger {
    root: PathBuf,
}

/// A blob that was put.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    pub tree: Tree,
    /// The addresses of the portals that have acknowledged it.
    pub portals: Vec<String>,
}

#[derive(Serialize, Deserialize)]
struct Head {
    size: u64,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    portals: Vec<String>,
}

const BLOBS: &str = "blobs";
const TREES: &str = "trees";
const UPLOADS: &str = "uploads";

/// How long it is remembered where an upload goes on. Portals forget unfinished ones much sooner.
const UPLOAD_LASTS: Duration = Duration::from_secs(30 * 24 * 3600);

impl Ledger {
    pub fn open(root: &Path) -> Result<Self, S5Error> {
        for folder in [BLOBS, TREES, UPLOADS] {
            let folder = root.join(folder);
            fs::create_dir_all(&folder).map_err(S5Error::io("make the folder", &folder))?;
        }
        let ledger = Self { root: root.to_owned() };
        ledger.forget_uploads(|file| {
            let changed = fs::metadata(file).and_then(|file| file.modified()).ok();
            changed.and_then(|changed| changed.elapsed().ok()).is_some_and(|age| age > UPLOAD_LASTS)
        })?;
        Ok(ledger)
    }

    /// A blob that was put.
    pub fn kept(&self, id: Id) -> Result<Option<Kept>, S5Error> {
        read(id, &self.path(BLOBS, id))
    }

    /// What a blob's parts are checked with, if it was put or read here.
    pub fn known(&self, id: Id) -> Result<Option<Kept>, S5Error> {
        match self.kept(id)? {
            Some(kept) => Ok(Some(kept)),
            None => read(id, &self.path(TREES, id)),
        }
    }

    /// Enters a blob that was put. When it returns, the entry survives a power cut.
    pub fn keep(&self, kept: &Kept) -> Result<(), S5Error> {
        write(kept, &self.path(BLOBS, kept.tree.id()))
    }

    /// Enters what was learnt of a blob by reading it.
    pub fn learn(&self, tree: Tree) -> Result<(), S5Error> {
        let path = self.path(TREES, tree.id());
        write(&Kept { tree, portals: Vec::new() }, &path)
    }

    /// Forgets all of a blob, and says whether it was put here.
    pub fn forget(&self, id: Id) -> Result<bool, S5Error> {
        self.forget_uploads_of(id)?;
        remove(&self.path(TREES, id))?;
        remove(&self.path(BLOBS, id))
    }

    /// The folders of all blobs that were put, in descending order of id.
    pub fn shards(&self) -> Result<Vec<PathBuf>, S5Error> {
        let mut shards: Vec<PathBuf> =
            names(&self.root.join(BLOBS))?.into_iter().map(|name| self.root.join(BLOBS).join(name)).collect();
        shards.sort_unstable_by(|a, b| b.cmp(a));
        Ok(shards)
    }

    /// The blobs of one of the folders, in order of id, with their sizes.
    pub fn blobs(&self, shard: &Path) -> Result<Vec<(Id, u64)>, S5Error> {
        let mut ids: Vec<Id> = names(shard)?.iter().filter_map(|name| Id::parse(name).ok()).collect();
        ids.sort_unstable();
        let known = ids.into_iter().map(|id| Ok(self.kept(id)?.map(|kept| (id, kept.tree.size()))));
        known.filter_map(Result::transpose).collect()
    }

    /// Where an upload of a blob to a portal goes on.
    pub fn upload(&self, id: Id, portal: &str) -> Result<Option<String>, S5Error> {
        let path = self.upload_path(id, portal);
        match fs::read_to_string(&path) {
            Ok(url) => Ok(Some(url)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(S5Error::io("read", &path)(error)),
        }
    }

    /// Remembers, or forgets, where an upload goes on. What was remembered survives a power cut.
    pub fn set_upload(&self, id: Id, portal: &str, url: Option<&str>) -> Result<(), S5Error> {
        let path = self.upload_path(id, portal);
        match url {
            Some(url) => write_durably(&path, url.as_bytes()).map_err(S5Error::io("write", &path)),
            None => remove(&path).map(|_| ()),
        }
    }

    /// Forgets where uploads of a blob go on, to any portal.
    pub fn forget_uploads_of(&self, id: Id) -> Result<(), S5Error> {
        let prefix = format!("{id}-");
        self.forget_uploads(|file| file.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&prefix)))
    }

    fn forget_uploads(&self, is_meant: impl Fn(&Path) -> bool) -> Result<(), S5Error> {
        let folder = self.root.join(UPLOADS);
        let files = names(&folder)?.into_iter().map(|name| folder.join(name));
        files.filter(|file| is_meant(file)).try_for_each(|file| remove(&file).map(|_| ()))
    }

    fn upload_path(&self, id: Id, portal: &str) -> PathBuf {
        let portal = blake3::hash(portal.as_bytes()).to_hex();
        self.root.join(UPLOADS).join(format!("{id}-{}", &portal[..16]))
    }

    fn path(&self, folder: &str, id: Id) -> PathBuf {
        let id = id.to_string();
        self.root.join(folder).join(&id[..2]).join(id)
    }
}

fn read(id: Id, path: &Path) -> Result<Option<Kept>, S5Error> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(S5Error::io("read", path)(error)),
    };
    let parsed = parse(id, &bytes);
    if parsed.is_none() {
        // As if it were not known: reading the blob, or putting it again, mends the file.
        tracing::warn!(path = %path.display(), "What was known of a blob is damaged on the disk, and is not used.");
    }
    Ok(parsed)
}

fn parse(id: Id, bytes: &[u8]) -> Option<Kept> {
    let end = bytes.iter().position(|&byte| byte == b'\n')?;
    let head: Head = serde_json::from_slice(&bytes[..end]).ok()?;
    let (nodes, rest) = bytes[end + 1..].as_chunks::<32>();
    let tree = Tree::of(id, head.size, nodes.to_vec()).filter(|_| rest.is_empty())?;
    Some(Kept { tree, portals: head.portals })
}

fn write(kept: &Kept, path: &Path) -> Result<(), S5Error> {
    let head = Head { size: kept.tree.size(), portals: kept.portals.clone() };
    let mut bytes = serde_json::to_vec(&head).map_err(|error| S5Error::io("write", path)(error.into()))?;
    bytes.push(b'\n');
    kept.tree.nodes().iter().for_each(|node| bytes.extend_from_slice(node));
    write_durably(path, &bytes).map_err(S5Error::io("write", path))
}

fn remove(path: &Path) -> Result<bool, S5Error> {
    match fs::remove_file(path) {
        Ok(()) => {
            if let Some(folder) = path.parent() {
                fs::File::open(folder).and_then(|folder| folder.sync_all()).map_err(S5Error::io("sync the folder", folder))?;
            }
            Ok(true)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(S5Error::io("remove", path)(error)),
    }
}

fn names(folder: &Path) -> Result<Vec<String>, S5Error> {
    let entries = fs::read_dir(folder).map_err(S5Error::io("list", folder))?;
    let names: io::Result<Vec<Option<String>>> =
        entries.map(|entry| entry.map(|entry| entry.file_name().into_string().ok())).collect();
    Ok(names.map_err(S5Error::io("list", folder))?.into_iter().flatten().collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::{GROUP, Growing};

    fn tree(size: u64) -> Tree {
        let mut growing = Growing::default();
        growing.update(&vec![size as u8; size as usize]);
        growing.finish()
    }

    #[test]
    fn what_is_kept_is_listed_in_order_and_can_be_forgotten() {
        let root = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(root.path()).unwrap();
        let kept: Vec<Kept> =
            [0, 5, 2 * GROUP + 1].map(|size| Kept { tree: tree(size), portals: vec!["http://a/".into()] }).into_iter().collect();
        for kept in &kept {
            ledger.keep(kept).unwrap();
            assert_eq!(ledger.kept(kept.tree.id()).unwrap().as_ref(), Some(kept));
        }
        let read = tree(3 * GROUP);
        ledger.learn(read.clone()).unwrap();
        assert_eq!(ledger.kept(read.id()).unwrap(), None, "what was only read is not kept");
        assert_eq!(ledger.known(read.id()).unwrap().unwrap().tree, read);

        let mut expected: Vec<(Id, u64)> = kept.iter().map(|kept| (kept.tree.id(), kept.tree.size())).collect();
        expected.sort_unstable();
        let again = Ledger::open(root.path()).unwrap();
        let listed: Vec<(Id, u64)> = again.shards().unwrap().iter().rev().flat_map(|shard| again.blobs(shard).unwrap()).collect();
        assert_eq!(listed, expected);
        assert_eq!((again.forget(expected[0].0).unwrap(), again.forget(expected[0].0).unwrap()), (true, false));
    }

    #[test]
    fn damaged_entry_is_no_entry() {
        let root = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(root.path()).unwrap();
        let tree = tree(3 * GROUP);
        ledger.keep(&Kept { tree: tree.clone(), portals: Vec::new() }).unwrap();
        let path = ledger.path(BLOBS, tree.id());
        let mut bytes = fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        for damaged in [&bytes[..], b"", b"{}\n", &bytes[..bytes.len() - 1]] {
            fs::write(&path, damaged).unwrap();
            assert_eq!(ledger.kept(tree.id()).unwrap(), None);
        }
    }

    #[test]
    fn place_of_an_upload_is_remembered_per_portal() {
        let root = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(root.path()).unwrap();
        let id = tree(1).id();
        ledger.set_upload(id, "http://a/", Some("http://a/tus/1")).unwrap();
        assert_eq!(Ledger::open(root.path()).unwrap().upload(id, "http://a/").unwrap().as_deref(), Some("http://a/tus/1"));
        assert_eq!(ledger.upload(id, "http://b/").unwrap(), None);
        ledger.set_upload(id, "http://a/", None).unwrap();
        assert_eq!(ledger.upload(id, "http://a/").unwrap(), None);
    }

    #[test]
    fn upload_that_nobody_goes_on_with_is_forgotten_in_the_end_or_with_its_blob() {
        let root = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(root.path()).unwrap();
        let (old, new) = (tree(1).id(), tree(2).id());
        for id in [old, new] {
            ledger.set_upload(id, "http://a/", Some("http://a/tus/1")).unwrap();
        }
        let file = fs::File::options().write(true).open(ledger.upload_path(old, "http://a/")).unwrap();
        file.set_modified(std::time::SystemTime::now() - UPLOAD_LASTS - Duration::from_secs(60)).unwrap();
        let ledger = Ledger::open(root.path()).unwrap();
        let is_known = |id| ledger.upload(id, "http://a/").unwrap().is_some();
        assert_eq!((is_known(old), is_known(new)), (false, true));
        ledger.forget(new).unwrap();
        assert!(!is_known(new));
    }
}
