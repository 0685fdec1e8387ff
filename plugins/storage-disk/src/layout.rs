//! Where blobs lie: `aa/bb/<id>` for an id that begins with `aabb`.

use blob_folder::{Id, Layout};

/// The layout of the folder.
#[derive(Debug)]
pub struct Shards;

impl Layout for Shards {
    // Not two hexadecimal digits, so never a shard.
    fn incoming(&self) -> &'static str {
        "incoming"
    }

    fn blobs(&self) -> &'static str {
        ""
    }

    fn path(&self, id: Id) -> String {
        let id = id.to_string();
        format!("{}/{}/{id}", &id[..2], &id[2..4])
    }

    fn blob(&self, path: &str) -> Option<Id> {
        let id = Id::parse(path.rsplit('/').next()?).ok()?;
        (self.path(id) == path).then_some(id)
    }

    fn is_folder(&self, path: &str) -> bool {
        let mut parts = path.split('/');
        parts.clone().count() <= 2 && parts.all(|part| part.len() == 2 && part.bytes().all(is_digit))
    }
}

fn is_digit(byte: u8) -> bool {
    matches!(byte, b'0'..=b'9' | b'a'..=b'f')
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;
    use std::sync::Arc;

    use blob_folder::{BlobError, Found, Result, Store};

    use super::*;
    use crate::small_disk::on_a_small_disk;

    fn open(root: &Path) -> Arc<Store> {
        Store::open(root, Shards, None).unwrap()
    }

    fn put(store: &Arc<Store>, bytes: &[u8]) -> Result<Found> {
        let mut incoming = store.begin(None, None)?;
        for piece in bytes.chunks(1000) {
            incoming.write(piece)?;
        }
        store.keep(incoming.finish()?, || true)
    }

    fn get(store: &Store, id: Id) -> Vec<u8> {
        let (mut reader, mut bytes) = (store.read(id, 0, None).unwrap(), Vec::new());
        while let Some(piece) = reader.next_piece().unwrap() {
            bytes.extend(piece);
        }
        bytes
    }

    fn unfinished(root: &Path) -> usize {
        fs::read_dir(root.join("incoming")).unwrap().count()
    }

    /// Bytes that look the same nowhere twice.
    fn noise(size: usize, seed: u8) -> Vec<u8> {
        let mut bytes = vec![0; size];
        blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut bytes);
        bytes
    }

    #[test]
    fn blob_lies_at_its_hash() {
        let root = tempfile::tempdir().unwrap();
        let id = put(&open(root.path()), b"bytes").unwrap().id.to_string();
        assert_eq!(id, blake3::hash(b"bytes").to_hex().as_str());
        assert_eq!(fs::read(root.path().join(&id[..2]).join(&id[2..4]).join(&id)).unwrap(), b"bytes");
    }

    #[test]
    fn list_is_in_order_of_id_and_skips_what_is_not_ours() {
        let root = tempfile::tempdir().unwrap();
        let store = open(root.path());
        let mut ids: Vec<Id> = (0..500u32).map(|n| put(&store, &n.to_le_bytes()).unwrap().id).collect();
        ids.sort();
        fs::write(root.path().join("notes.txt"), b"").unwrap();
        fs::write(root.path().join("zz"), b"").unwrap();
        fs::write(root.path().join("00"), b"").or_else(|_| fs::write(root.path().join("00").join("x"), b"")).unwrap();
        let misplaced = store.path(ids[0]).with_file_name(ids[499].to_string());
        fs::write(misplaced, b"").unwrap();
        let deeper = store.path(ids[0]).with_file_name("aa");
        fs::create_dir(&deeper).unwrap();
        fs::write(deeper.join(ids[0].to_string()), b"").unwrap();
        let (mut folders, mut listed) = (store.folders(), Vec::new());
        while let Some(blobs) = folders.next_blobs().unwrap() {
            listed.extend(blobs.into_iter().map(|blob| blob.id));
        }
        assert_eq!(listed, ids);
    }

    #[test]
    fn full_disk_is_told_with_what_is_free_and_loses_nothing() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path();
        on_a_small_disk(path, c"size=2m", || {
            let store = open(path);
            let kept = noise(1 << 20, 1);
            let id = put(&store, &kept).unwrap().id;

            let told_ahead = store.begin(None, Some(3 << 20)).unwrap_err();
            let BlobError::DiskFull { needed: 3_145_728, free: Some(free), stays, .. } = told_ahead else {
                panic!("{told_ahead}")
            };
            assert!((512 << 10..=1 << 20).contains(&free), "{free}");
            assert_eq!(stays, (2 << 20) / 10);
            let told_on_the_way = put(&store, &noise(3 << 20, 2)).unwrap_err();
            let BlobError::DiskFull { needed, .. } = told_on_the_way else { panic!("{told_on_the_way}") };
            assert!(needed > 512 << 10 && needed <= 1 << 20, "{needed}");
            println!("{told_ahead}\n{told_on_the_way}");

            // What others take meanwhile is no room of ours.
            let mut running = store.begin(None, Some(512 << 10)).unwrap();
            running.write(&noise(256 << 10, 3)).unwrap();
            let others = path.join("of others");
            fs::write(&others, noise(1 << 20, 4)).unwrap_err();
            let told = running.write(&noise(256 << 10, 5)).unwrap_err();
            assert!(matches!(told, BlobError::DiskFull { .. }), "{told}");
            drop(running);
            fs::remove_file(others).unwrap();

            assert_eq!(unfinished(path), 0);
            assert_eq!(get(&store, id), kept);
            put(&store, &noise(512 << 10, 6)).expect("the room is free again");
        });
    }
}
