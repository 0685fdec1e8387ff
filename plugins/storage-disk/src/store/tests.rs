use std::thread;

use super::*;

fn open(root: &Path) -> Arc<Store> {
    Arc::new(Store::open(root, None).unwrap())
}

fn with_quota(root: &Path, max_bytes: u64) -> Arc<Store> {
    Arc::new(Store::open(root, Some(max_bytes)).unwrap())
}

fn put(store: &Arc<Store>, bytes: &[u8]) -> Result<Found> {
    let mut incoming = store.begin(None, None)?;
    for piece in bytes.chunks(1000) {
        incoming.write(piece)?;
    }
    incoming.commit(|| true)
}

fn get(store: &Store, id: &Id, offset: u64, length: Option<u64>) -> Result<Vec<u8>> {
    let mut reader = store.read(id, offset, length)?;
    let mut bytes = Vec::new();
    while let Some(piece) = reader.next_piece()? {
        assert!(piece.len() <= PIECE && !piece.is_empty());
        bytes.extend(piece);
    }
    Ok(bytes)
}

fn list(store: &Store) -> Vec<Found> {
    let mut shards = store.shards().unwrap();
    let mut all = Vec::new();
    while let Some(blobs) = shards.next_shard().unwrap() {
        all.extend(blobs);
    }
    all
}

fn id_of(bytes: &[u8]) -> Id {
    Id::from(blake3::hash(bytes))
}

fn unfinished(root: &Path) -> usize {
    fs::read_dir(root.join(INCOMING)).unwrap().count()
}

/// Bytes that look the same nowhere twice.
fn noise(size: usize, seed: u8) -> Vec<u8> {
    let mut bytes = vec![0; size];
    blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut bytes);
    bytes
}

#[test]
fn blob_comes_back_whole_and_lies_at_its_hash() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path());
    for bytes in [Vec::new(), b"a".to_vec(), noise(PIECE, 1), noise(2 * PIECE + 7, 2)] {
        let found = put(&store, &bytes).unwrap();
        assert_eq!(found, Found { id: id_of(&bytes), size: bytes.len() as u64 });
        let hex = found.id.as_str();
        assert_eq!(fs::read(root.path().join(&hex[..2]).join(&hex[2..4]).join(hex)).unwrap(), bytes);
        assert_eq!(get(&store, &found.id, 0, None).unwrap(), bytes);
        assert_eq!(store.size(&found.id).unwrap(), bytes.len() as u64);
    }
    assert_eq!(unfinished(root.path()), 0);
}

#[test]
fn ranges_are_cut_at_the_end_and_refused_past_it() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path());
    let bytes = noise(PIECE + 100, 3);
    let id = put(&store, &bytes).unwrap().id;
    let size = bytes.len();
    for (offset, length) in [(0, 10), (10, 10), (PIECE - 5, 10), (size - 1, 1), (size, 5), (5, 0)] {
        let end = (offset + length).min(size);
        assert_eq!(get(&store, &id, offset as u64, Some(length as u64)).unwrap(), bytes[offset..end], "{offset}+{length}");
    }
    assert_eq!(get(&store, &id, 7, None).unwrap(), bytes[7..]);
    assert_eq!(get(&store, &id, 7, Some(u64::MAX)).unwrap(), bytes[7..]);
    assert!(matches!(store.read(&id, size as u64 + 1, None), Err(StoreError::PastTheEnd { .. })));
}

#[test]
fn only_64_lower_case_digits_are_an_id() {
    let good = id_of(b"x");
    assert_eq!(Id::parse(good.as_str()).unwrap(), good);
    let upper = good.as_str().to_uppercase();
    let short = &good.as_str()[1..];
    let escape = format!("../../{}", &good.as_str()[6..]);
    for bad in ["", "..", "/etc/passwd", &upper, short, &escape, &format!("{}0", good.as_str())] {
        assert!(matches!(Id::parse(bad), Err(StoreError::InvalidId)), "{bad}");
    }
}

#[test]
fn wrong_expectation_stores_nothing() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path());
    let mut incoming = store.begin(Some(id_of(b"other")), None).unwrap();
    incoming.write(b"bytes").unwrap();
    assert!(matches!(incoming.commit(|| true), Err(StoreError::WrongId { .. })));

    let mut incoming = store.begin(None, Some(3)).unwrap();
    assert!(matches!(incoming.write(b"bytes"), Err(StoreError::TooMany { expected: 3, actual: 5 })));
    drop(incoming);
    let mut incoming = store.begin(None, Some(9)).unwrap();
    incoming.write(b"bytes").unwrap();
    assert!(matches!(incoming.commit(|| true), Err(StoreError::TooFew { expected: 9, actual: 5 })));

    let mut incoming = store.begin(None, None).unwrap();
    incoming.write(b"bytes").unwrap();
    assert!(matches!(incoming.commit(|| false), Err(StoreError::Cancelled)));
    assert_eq!((list(&store), unfinished(root.path())), (Vec::new(), 0));
}

#[test]
fn leftovers_of_a_crash_are_removed_at_start_and_running_puts_are_not() {
    let root = tempfile::tempdir().unwrap();
    let running = open(root.path());
    let mut incoming = running.begin(None, None).unwrap();
    incoming.write(b"half").unwrap();
    let leftover = root.path().join(INCOMING).join("put-left");
    fs::write(&leftover, b"half of what died").unwrap();
    assert_eq!(unfinished(root.path()), 2);

    let next_generation = open(root.path());
    assert!(!leftover.exists());
    let found = incoming.commit(|| true).unwrap();
    assert_eq!(get(&next_generation, &found.id, 0, None).unwrap(), b"half");
}

#[test]
fn damaged_blob_ends_as_corrupt_and_a_put_repairs_it() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path());
    let bytes = noise(PIECE + 1, 4);
    let id = put(&store, &bytes).unwrap().id;
    let path = store.path(&id);

    let mut flipped = bytes.clone();
    flipped[1000] ^= 1;
    for damaged in [&flipped[..], &bytes[..1000], b""] {
        fs::write(&path, damaged).unwrap();
        assert!(matches!(get(&store, &id, 0, None), Err(StoreError::Corrupt { .. })), "{} bytes", damaged.len());
        assert_eq!(put(&store, &bytes).unwrap().size, bytes.len() as u64);
        assert_eq!(get(&store, &id, 0, None).unwrap(), bytes);
    }
}

#[test]
fn file_cut_short_while_it_is_read_ends_as_corrupt() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path());
    let id = put(&store, &noise(3 * PIECE, 5)).unwrap().id;
    let mut reader = store.read(&id, 1, None).unwrap();
    reader.next_piece().unwrap();
    File::options().write(true).open(store.path(&id)).unwrap().set_len(PIECE as u64).unwrap();
    assert!(matches!(reader.next_piece(), Err(StoreError::Corrupt { .. })));
}

#[test]
fn put_of_a_stored_blob_stores_nothing() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path());
    let id = put(&store, b"twice").unwrap().id;
    let first = fs::metadata(store.path(&id)).unwrap().modified().unwrap();
    assert_eq!(put(&store, b"twice").unwrap().id, id);
    assert_eq!(fs::metadata(store.path(&id)).unwrap().modified().unwrap(), first);
    assert_eq!((list(&store).len(), unfinished(root.path())), (1, 0));
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
    let misplaced = store.shard_folder(&ids[0]).join(ids[499].as_str());
    fs::write(misplaced, b"").unwrap();
    assert_eq!(list(&store).into_iter().map(|blob| blob.id).collect::<Vec<_>>(), ids);
}

#[test]
fn delete_says_whether_it_was_there_and_a_read_that_has_begun_goes_on() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path());
    let bytes = noise(2 * PIECE, 6);
    let id = put(&store, &bytes).unwrap().id;
    let mut reader = store.read(&id, 0, None).unwrap();
    assert!(store.delete(&id).unwrap());
    assert!(!store.delete(&id).unwrap());
    assert!(matches!(store.size(&id), Err(StoreError::NotFound(_))));
    assert!(matches!(store.read(&id, 0, None), Err(StoreError::NotFound(_))));
    assert_eq!(reader.next_piece().unwrap().unwrap(), bytes[..PIECE]);
    assert_eq!(reader.next_piece().unwrap().unwrap(), bytes[PIECE..]);
    assert_eq!(reader.next_piece().unwrap(), None);
}

#[test]
fn quota_counts_what_is_stored_and_what_is_coming_in() {
    let root = tempfile::tempdir().unwrap();
    let store = with_quota(root.path(), 1000);
    let id = put(&store, &noise(400, 1)).unwrap().id;
    put(&store, &noise(400, 1)).unwrap();

    let full = store.begin(None, Some(601)).unwrap_err();
    assert!(matches!(full, StoreError::QuotaFull { needed: Needed::Exactly(601), used: 400, max_bytes: 1000 }), "{full}");
    let mut first = store.begin(None, None).unwrap();
    first.write(&noise(300, 2)).unwrap();
    let mut second = store.begin(None, None).unwrap();
    second.write(&noise(300, 3)).unwrap();
    let full = first.write(b"1").unwrap_err();
    assert!(matches!(full, StoreError::QuotaFull { needed: Needed::AtLeast(301), used: 700, .. }), "{full}");
    drop(first);
    second.commit(|| true).unwrap();
    assert_eq!(unfinished(root.path()), 0);

    assert!(put(&store, &noise(301, 4)).is_err());
    store.delete(&id).unwrap();
    put(&store, &noise(700, 4)).unwrap();
    assert!(put(&store, b"1").is_err());
    assert!(put(&with_quota(root.path(), 1000), b"1").is_err(), "what was stored before the start counts");
    assert!(put(&with_quota(root.path(), 1001), b"1").is_ok());
}

#[test]
fn concurrent_puts_of_one_blob_leave_one_and_count_it_once() {
    let root = tempfile::tempdir().unwrap();
    let bytes = noise(100_000, 7);
    let store = with_quota(root.path(), 8 * 100_000 + 1);
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| assert_eq!(put(&store, &bytes).unwrap().id, id_of(&bytes)));
        }
    });
    assert_eq!((list(&store).len(), unfinished(root.path())), (1, 0));
    assert_eq!(get(&store, &id_of(&bytes), 0, None).unwrap(), bytes);
    let used = store.quota.as_ref().unwrap().used.lock();
    assert_eq!((used.stored, used.incoming), (100_000, 0));
}

/// A disk of 2 MiB of this thread's own, where the kernel lets us mount one.
fn small_disk(at: &Path) -> io::Result<()> {
    let at = CString::new(at.as_os_str().as_bytes()).unwrap();
    let succeeded = |result: i32| if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) };
    // SAFETY: all strings end with NUL. The new mount namespace is this thread's alone, and nothing mounted in it spreads.
    unsafe {
        succeeded(libc::unshare(libc::CLONE_NEWNS))?;
        succeeded(libc::mount(
            c"none".as_ptr(),
            c"/".as_ptr(),
            std::ptr::null(),
            libc::MS_REC | libc::MS_PRIVATE,
            std::ptr::null(),
        ))?;
        succeeded(libc::mount(c"tmpfs".as_ptr(), at.as_ptr(), c"tmpfs".as_ptr(), 0, c"size=2m".as_ptr().cast()))
    }
}

#[test]
fn full_disk_is_told_with_what_is_free_and_loses_nothing() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().to_owned();
    // The namespace, and with it the mount, ends with the thread.
    let on_a_small_disk = thread::spawn(move || {
        if let Err(error) = small_disk(&path) {
            eprintln!("SKIPPED: cannot mount a small tmpfs here ({error}); run as root to test a full disk");
            return;
        }
        let store = open(&path);
        let kept = noise(1 << 20, 1);
        let id = put(&store, &kept).unwrap().id;

        let told_ahead = store.begin(None, Some(3 << 20)).unwrap_err();
        assert!(
            matches!(told_ahead, StoreError::DiskFull { needed: Needed::Exactly(3_145_728), free: Some(_), .. }),
            "{told_ahead}"
        );
        let told_on_the_way = put(&store, &noise(3 << 20, 2)).unwrap_err();
        let StoreError::DiskFull { needed: Needed::AtLeast(needed), free: Some(_), .. } = told_on_the_way else {
            panic!("{told_on_the_way}");
        };
        assert!(needed > 512 << 10 && needed < 2 << 20, "{needed}");
        println!("{told_ahead}\n{told_on_the_way}");

        assert_eq!(unfinished(&path), 0);
        assert_eq!(get(&store, &id, 0, None).unwrap(), kept);
        put(&store, &noise(512 << 10, 3)).expect("the room is free again");
    });
    on_a_small_disk.join().unwrap();
}
