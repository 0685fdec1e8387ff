//! Where blobs lie: as in S5's local store, `blob3/` and the hash in base32, cut into three levels of folders.
//!
//! S5's own way to write neither forces to the disk nor renames what comes as a stream; what it reads is the same.

use std::path::Path;

use blob_folder::{Id, Layout};
use s5_core::Hash;
use s5_core::blob::paths;
use s5_core::store::{Store as _, StoreFeatures};
use s5_store_local::LocalStore;

/// The layout of the folder.
#[derive(Debug)]
pub struct S5Layout(StoreFeatures);

impl S5Layout {
    pub fn of(root: &Path) -> Self {
        Self(LocalStore::new(root).features())
    }
}

impl Layout for S5Layout {
    // S5 lists nothing in it.
    fn incoming(&self) -> &'static str {
        ".tmp"
    }

    fn blobs(&self) -> &'static str {
        "blob3"
    }

    // In the order of the ids: the digits of base32 are in the order of their characters.
    fn path(&self, id: Id) -> String {
        paths::blob_path_for_hash(hash(id), &self.0)
    }

    fn blob(&self, path: &str) -> Option<Id> {
        let id = Id(*paths::hash_from_blob_path(path, &self.0).ok()??.as_bytes());
        (self.path(id) == path).then_some(id)
    }

    fn is_folder(&self, _: &str) -> bool {
        true
    }
}

/// An id as S5 has it.
pub fn hash(id: Id) -> Hash {
    Hash::from_bytes(id.0)
}

#[cfg(test)]
mod tests {
    use blob_folder::Store;

    use super::*;

    #[tokio::test]
    async fn blobs_lie_where_s5_looks_for_them_and_are_listed_in_order_of_id() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), S5Layout::of(dir.path()), None).unwrap();
        let s5 = LocalStore::new(dir.path()).to_blob_store();
        let mut ids = Vec::new();
        for number in 0..500 {
            let mut incoming = store.begin(None, None).unwrap();
            incoming.write(format!("Hello, {number}!").as_bytes()).unwrap();
            ids.push(store.keep(incoming.finish().unwrap(), || true).unwrap().id);
        }
        assert_eq!(s5.read_as_bytes(hash(ids[42]), 7, Some(2)).await.unwrap(), "42");
        ids.push(Id(*s5.import_bytes("theirs".into()).await.unwrap().hash.as_bytes()));
        ids.sort();
        std::fs::write(dir.path().join("blob3/notes.txt"), "somebody else's").unwrap();
        let (mut folders, mut listed) = (store.folders(), Vec::new());
        while let Some(blobs) = folders.next_blobs().unwrap() {
            listed.extend(blobs.into_iter().map(|blob| blob.id));
        }
        assert_eq!(listed, ids);
        let mut theirs: Vec<_> = s5.list_hashes().await.unwrap().iter().map(|hash| Id(*hash.as_bytes())).collect();
        theirs.sort();
        assert_eq!(theirs, ids);
    }
}
