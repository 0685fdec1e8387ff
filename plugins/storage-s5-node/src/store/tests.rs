//! The folder alone.

use std::os::unix::fs::FileExt;

use super::*;

fn open(dir: &tempfile::TempDir, max: Option<u64>) -> Arc<Store> {
    Store::open(dir.path(), max).unwrap()
}

fn put(store: &Arc<Store>, bytes: &[u8], size: Option<u64>) -> Result<Found> {
    let mut incoming = store.begin(None, size)?;
    for piece in bytes.chunks(1000) {
        incoming.write(piece)?;
    }
    store.keep(incoming.finish()?, || true)
}

fn read(store: &Store, id: Id) -> (Vec<u8>, Option<NodeError>) {
    let (mut reader, mut bytes) = (store.read(id, 0, None).unwrap(), Vec::new());
    loop {
        match reader.next_piece() {
            Ok(Some(piece)) => bytes.extend(piece),
            Ok(None) => return (bytes, None),
            Err(error) => return (bytes, Some(error)),
        }
    }
}

#[tokio::test]
async fn blobs_lie_where_s5_looks_for_them() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, None);
    let s5 = LocalStore::new(dir.path()).to_blob_store();
    let found = put(&store, b"Hello, world!", None).unwrap();
    assert_eq!(s5.read_as_bytes(found.id.0, 7, Some(5)).await.unwrap(), "world");
    s5.import_bytes("theirs".into()).await.unwrap();
    let hashes = s5.list_hashes().await.unwrap();
    assert_eq!(hashes.len(), 2);
    let mut ours = Vec::new();
    let mut folders = store.folders().unwrap();
    while let Some(blobs) = folders.next_blobs().unwrap() {
        ours.extend(blobs);
    }
    assert!(ours.is_sorted_by_key(|blob| *blob.id.0.as_bytes()));
    assert_eq!(ours.iter().map(|blob| blob.size).sum::<u64>(), 13 + 6);
    assert!(ours.iter().all(|blob| hashes.contains(&blob.id.0)));
}

#[test]
fn order_is_that_of_ids() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, None);
    for number in 0..500 {
        put(&store, format!("{number}").as_bytes(), None).unwrap();
    }
    std::fs::write(dir.path().join("blob3/notes.txt"), "somebody else's").unwrap();
    let (mut folders, mut all) = (store.folders().unwrap(), Vec::new());
    while let Some(blobs) = folders.next_blobs().unwrap() {
        all.extend(blobs.iter().map(|blob| blob.id.to_string()));
    }
    assert_eq!(all.len(), 500);
    assert!(all.is_sorted());
}

#[test]
fn quota_counts_what_is_kept_and_what_is_on_its_way() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, Some(100));
    let kept = put(&store, &[1; 60], None).unwrap();
    assert!(matches!(put(&store, &[2; 41], None), Err(NodeError::QuotaFull { needed: 41, used: 60, max: 100 })));
    assert!(matches!(store.begin(None, Some(u64::MAX)), Err(NodeError::QuotaFull { .. })));
    put(&store, &[1; 10], None).unwrap();
    let waiting = store.begin(None, Some(30)).unwrap();
    assert!(matches!(put(&store, &[3; 1], None), Err(NodeError::QuotaFull { .. })));
    drop(waiting);
    // The same once more takes room only while it comes.
    assert!(matches!(put(&store, &[1; 60], None), Err(NodeError::QuotaFull { .. })));
    put(&store, &[1; 10], None).unwrap();
    let counted = |store: &Store| {
        let space = store.space.lock();
        (space.stored, space.coming)
    };
    assert_eq!(counted(&store), (70, 0));
    assert!(store.delete(kept.id).unwrap() && !store.delete(kept.id).unwrap());
    assert_eq!(open(&dir, Some(100)).space.lock().stored, 10, "what is there is counted at the start");
    assert_eq!(store.space.lock().stored, 10);
}

#[test]
fn damaged_blob_never_comes_to_its_end_and_is_repaired_by_a_put() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, Some(100 << 20));
    let bytes: Vec<u8> = (0..3_000_000u32).map(|number| (number % 251) as u8).collect();
    let id = put(&store, &bytes, None).unwrap().id;
    let file = std::fs::OpenOptions::new().write(true).open(store.path(id)).unwrap();
    for damage in [
        &(|| file.write_all_at(b"!", 5).unwrap()) as &dyn Fn(),
        &|| file.set_len(2_999_999).unwrap(),
        &|| file.set_len(0).unwrap(),
        &|| file.set_len(4_000_000).unwrap(),
    ] {
        damage();
        let (came, error) = read(&store, id);
        assert!(matches!(error, Some(NodeError::Corrupt { .. })), "{error:?}");
        assert!(came.len() < 4_000_000 && came.len() % PIECE == 0, "the last piece is held back: {}", came.len());
        assert!(!is_whole(&store.path(id), id).unwrap());
    }
    put(&store, &bytes, None).unwrap();
    assert_eq!(read(&store, id).0, bytes);
    drop(file);
}

#[test]
fn nothing_is_left_of_what_is_not_kept() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, None);
    let other = Id(Hash::EMPTY);
    let begin = |expect, size| store.begin(expect, size).unwrap();
    let mut wrong = begin(Some(other), None);
    wrong.write(b"x").unwrap();
    assert!(matches!(wrong.finish(), Err(NodeError::WrongId { .. })));
    let mut short = begin(None, Some(2));
    short.write(b"x").unwrap();
    assert!(matches!(short.finish(), Err(NodeError::TooFew { expected: 2, actual: 1 })));
    let mut long = begin(None, Some(2));
    assert!(matches!(long.write(b"xxx"), Err(NodeError::TooMany { expected: 2, actual: 3 })));
    drop(long);
    let mut unwanted = begin(None, None);
    unwanted.write(b"x").unwrap();
    assert!(matches!(store.keep(unwanted.finish().unwrap(), || false), Err(NodeError::Cancelled)));
    assert!(store.folders().unwrap().next_blobs().unwrap().is_none());
    assert_eq!(fs::read_dir(dir.path().join(INCOMING)).unwrap().count(), 0);
}

#[test]
fn leftovers_of_a_crash_go_and_running_puts_stay() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, None);
    let mut running = store.begin(None, None).unwrap();
    running.write(b"still coming").unwrap();
    fs::write(dir.path().join(INCOMING).join("put-crashed"), "half").unwrap();
    let other = open(&dir, None);
    assert_eq!(fs::read_dir(dir.path().join(INCOMING)).unwrap().count(), 1);
    let found = store.keep(running.finish().unwrap(), || true).unwrap();
    assert_eq!(other.size(found.id).unwrap(), 12);
}

#[test]
fn two_stores_on_a_folder_count_their_own_changes() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (open(&dir, Some(100)), open(&dir, Some(100)));
    let found = put(&first, &[1; 60], None).unwrap();
    let waiting = second.begin(None, Some(70)).unwrap();
    assert!(second.delete(found.id).unwrap());
    assert!(matches!(second.begin(None, Some(40)), Err(NodeError::QuotaFull { needed: 40, used: 70, max: 100 })));
    drop(waiting);
    assert!(matches!(put(&first, &[2; 60], None), Err(NodeError::QuotaFull { used: 60, .. })), "until the restart");
    put(&second, &[2; 60], None).unwrap();
}

#[test]
fn disk_that_cannot_hold_a_blob_is_told_before_a_byte_of_it_came() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, None);
    let full = store.begin(None, Some(1 << 60)).unwrap_err();
    assert!(matches!(full, NodeError::DiskFull { needed, .. } if needed == 1 << 60), "{full}");
    assert_eq!(fs::read_dir(dir.path().join(INCOMING)).unwrap().count(), 0);
    // Rooms that are not written yet count against each other.
    let free = space::free(dir.path());
    let waiting = store.begin(None, Some(free / 2)).unwrap();
    assert!(matches!(store.begin(None, Some(free / 2)), Err(NodeError::DiskFull { .. })));
    drop(waiting);
    store.begin(None, Some(free / 2)).unwrap();
}

#[test]
fn folders_go_with_the_last_blob_in_them_and_puts_make_them_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, None);
    let id = put(&store, b"x", None).unwrap().id;
    assert!(store.delete(id).unwrap());
    assert_eq!(fs::read_dir(dir.path().join(BLOBS)).unwrap().count(), 0);
    let puts = |store: Arc<Store>| {
        std::thread::spawn(move || {
            for _ in 0..200 {
                let id = put(&store, b"x", None).unwrap().id;
                store.delete(id).unwrap();
            }
        })
    };
    for thread in [puts(store.clone()), puts(store.clone()), puts(open(&dir, None))] {
        thread.join().unwrap();
    }
    assert_eq!(fs::read_dir(dir.path().join(BLOBS)).unwrap().count(), 0);
}

#[tokio::test]
async fn pieces_without_a_byte_are_not_gathered() {
    let dir = tempfile::tempdir().unwrap();
    let mut taking = Taking::<Vec<u8>>::begin(&open(&dir, None), None, Some(1)).await.unwrap();
    for _ in 0..1000 {
        taking = taking.write(Vec::new()).await.unwrap();
    }
    assert_eq!(taking.gathered(), 0);
    assert_eq!(taking.write(vec![1]).await.unwrap().finish().await.unwrap().size, 1);
}
