use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::thread;

use super::disk::Disk;
use super::*;

/// Two levels of folders below `blobs`.
#[derive(Debug)]
struct Nested;

impl Layout for Nested {
    fn incoming(&self) -> &'static str {
        "incoming"
    }

    fn blobs(&self) -> &'static str {
        "blobs"
    }

    fn path(&self, id: Id) -> String {
        let id = id.to_string();
        format!("blobs/{}/{}/{id}", &id[..1], &id[1..2])
    }

    fn blob(&self, path: &str) -> Option<Id> {
        Id::parse(path.rsplit('/').next()?).ok().filter(|&id| self.path(id) == path)
    }

    fn is_folder(&self, _: &str) -> bool {
        true
    }
}

fn open(dir: &tempfile::TempDir, max: Option<u64>) -> Arc<Store> {
    Store::open(dir.path(), Nested, max).unwrap()
}

fn count(folder: &Path) -> usize {
    fs::read_dir(folder).unwrap().count()
}

fn list(store: &Store) -> Vec<Found> {
    let (mut folders, mut all) = (store.folders(), Vec::new());
    while let Some(blobs) = folders.next_blobs().unwrap() {
        all.extend(blobs);
    }
    all
}

/// Bytes that look the same nowhere twice.
fn noise(size: usize, seed: u8) -> Vec<u8> {
    let mut bytes = vec![0; size];
    blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut bytes);
    bytes
}

#[test]
fn only_64_lower_case_digits_are_an_id() {
    let good = Id::from(blake3::hash(b"x")).to_string();
    assert_eq!(Id::parse(&good).unwrap().to_string(), good);
    let escape = format!("../../{}", &good[6..]);
    for bad in ["", "..", "/etc/passwd", &good.to_uppercase(), &good[1..], &escape, &format!("{good}0")] {
        assert!(matches!(Id::parse(bad), Err(BlobError::InvalidId)), "{bad}");
    }
}

#[test]
fn ranges_are_cut_at_the_end_and_refused_past_it() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, None);
    let bytes = noise(PIECE + 100, 3);
    let found = put(&store, &bytes, None).unwrap();
    let (id, size) = (found.id, bytes.len());
    assert_eq!(found, Found { id: Id::from(blake3::hash(&bytes)), size: size as u64 });
    let part = |offset: usize, length: Option<usize>| {
        let (mut reader, mut bytes) = (store.read(id, offset as u64, length.map(|length| length as u64)).unwrap(), Vec::new());
        while let Some(piece) = reader.next_piece().unwrap() {
            assert!(piece.len() <= PIECE && !piece.is_empty());
            bytes.extend(piece);
        }
        bytes
    };
    for (offset, length) in [(0, 10), (10, 10), (PIECE - 5, 10), (size - 1, 1), (size, 5), (5, 0)] {
        assert_eq!(part(offset, Some(length)), bytes[offset..(offset + length).min(size)], "{offset}+{length}");
    }
    assert_eq!(part(7, None), bytes[7..]);
    assert_eq!(part(7, Some(usize::MAX)), bytes[7..]);
    assert!(matches!(store.read(id, size as u64 + 1, None), Err(BlobError::PastTheEnd { .. })));
}

#[test]
fn a_read_that_has_begun_goes_on_after_a_delete_and_finds_a_file_that_is_cut_short() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, None);
    let bytes = noise(2 * PIECE, 6);
    let id = put(&store, &bytes, None).unwrap().id;
    let mut reader = store.read(id, 0, None).unwrap();
    assert!(store.delete(id).unwrap());
    assert!(matches!(store.size(id), Err(BlobError::NotFound(_))));
    assert!(matches!(store.read(id, 0, None), Err(BlobError::NotFound(_))));
    assert_eq!(reader.next_piece().unwrap().unwrap(), bytes[..PIECE]);
    assert_eq!(reader.next_piece().unwrap().unwrap(), bytes[PIECE..]);
    assert_eq!(reader.next_piece().unwrap(), None);

    put(&store, &bytes, None).unwrap();
    let mut reader = store.read(id, 1, None).unwrap();
    reader.next_piece().unwrap();
    File::options().write(true).open(store.path(id)).unwrap().set_len(PIECE as u64).unwrap();
    assert!(matches!(reader.next_piece(), Err(BlobError::Corrupt { .. })));
}

#[test]
fn put_of_a_stored_blob_stores_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, None);
    let id = put(&store, b"twice", None).unwrap().id;
    let first = Stamp::of(&fs::metadata(store.path(id)).unwrap());
    assert_eq!(put(&store, b"twice", None).unwrap().id, id);
    assert_eq!(Stamp::of(&fs::metadata(store.path(id)).unwrap()), first);
    assert_eq!((list(&store).len(), count(&dir.path().join("incoming"))), (1, 0));
}

#[test]
fn puts_of_one_blob_at_once_leave_one_and_count_it_once() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = noise(100_000, 7);
    let store = open(&dir, Some(8 * 100_000 + 1));
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| put(&store, &bytes, None).unwrap());
        }
    });
    assert_eq!(list(&store), [Found { id: Id::from(blake3::hash(&bytes)), size: 100_000 }]);
    assert_eq!(count(&dir.path().join("incoming")), 0);
    let taken = store.space.taken();
    assert_eq!((taken.stored, taken.coming), (100_000, 0));
}

fn put(store: &Arc<Store>, bytes: &[u8], size: Option<u64>) -> Result<Found> {
    let mut incoming = store.begin(None, size)?;
    for piece in bytes.chunks(1000) {
        incoming.write(piece)?;
    }
    store.keep(incoming.finish()?, || true)
}

fn read(store: &Store, id: Id) -> (Vec<u8>, Option<BlobError>) {
    let (mut reader, mut bytes) = (store.read(id, 0, None).unwrap(), Vec::new());
    loop {
        match reader.next_piece() {
            Ok(Some(piece)) => bytes.extend(piece),
            Ok(None) => return (bytes, None),
            Err(error) => return (bytes, Some(error)),
        }
    }
}

#[test]
fn quota_counts_what_is_kept_and_what_is_on_its_way() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, Some(100));
    let kept = put(&store, &[1; 60], None).unwrap();
    assert!(matches!(put(&store, &[2; 41], None), Err(BlobError::QuotaFull { needed: 41, used: 60, max: 100 })));
    assert!(matches!(store.begin(None, Some(u64::MAX)), Err(BlobError::QuotaFull { .. })));
    put(&store, &[1; 10], None).unwrap();
    let waiting = store.begin(None, Some(30)).unwrap();
    assert!(matches!(put(&store, &[3; 1], None), Err(BlobError::QuotaFull { .. })));
    drop(waiting);
    // Two of unknown sizes meet at the end.
    let (mut one, mut other) = (store.begin(None, None).unwrap(), store.begin(None, None).unwrap());
    one.write(&[4; 20]).unwrap();
    other.write(&[5; 10]).unwrap();
    assert!(matches!(other.write(&[5; 1]), Err(BlobError::QuotaFull { needed: 11, used: 90, max: 100 })));
    drop((one, other));
    // The same once more takes room only while it comes.
    assert!(matches!(put(&store, &[1; 60], None), Err(BlobError::QuotaFull { .. })));
    put(&store, &[1; 10], None).unwrap();
    let counted = |store: &Store| {
        let taken = store.space.taken();
        (taken.stored, taken.coming)
    };
    assert_eq!(counted(&store), (70, 0));
    assert!(store.delete(kept.id).unwrap() && !store.delete(kept.id).unwrap());
    assert_eq!(open(&dir, Some(100)).space.taken().stored, 10, "what is there is counted at the start");
    assert_eq!(store.space.taken().stored, 10);
}

#[test]
fn damaged_blob_never_comes_to_its_end_and_is_repaired_by_a_put() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, Some(100 << 20));
    let bytes: Vec<u8> = (0..3_000_000u32).map(|number| (number % 251) as u8).collect();
    let id = put(&store, &bytes, None).unwrap().id;
    let file = fs::OpenOptions::new().write(true).open(store.path(id)).unwrap();
    for damage in [
        &(|| file.write_all_at(b"!", 5).unwrap()) as &dyn Fn(),
        &|| file.set_len(2_999_999).unwrap(),
        &|| file.set_len(0).unwrap(),
        &|| file.set_len(4_000_000).unwrap(),
    ] {
        damage();
        let (came, error) = read(&store, id);
        assert!(matches!(error, Some(BlobError::Corrupt { .. })), "{error:?}");
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
    let other = Id::from(blake3::hash(b""));
    let begin = |expect, size| store.begin(expect, size).unwrap();
    let mut wrong = begin(Some(other), None);
    wrong.write(b"x").unwrap();
    assert!(matches!(wrong.finish(), Err(BlobError::WrongId { .. })));
    let mut short = begin(None, Some(2));
    short.write(b"x").unwrap();
    assert!(matches!(short.finish(), Err(BlobError::TooFew { expected: 2, actual: 1 })));
    let mut long = begin(None, Some(2));
    assert!(matches!(long.write(b"xxx"), Err(BlobError::TooMany { expected: 2, actual: 3 })));
    drop(long);
    let mut unwanted = begin(None, None);
    unwanted.write(b"x").unwrap();
    assert!(matches!(store.keep(unwanted.finish().unwrap(), || false), Err(BlobError::Cancelled)));
    assert!(list(&store).is_empty());
    assert_eq!(count(&dir.path().join("incoming")), 0);
}

#[test]
fn leftovers_of_a_crash_go_and_running_puts_stay() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, None);
    let mut running = store.begin(None, None).unwrap();
    running.write(b"still coming").unwrap();
    fs::write(dir.path().join("incoming").join("put-crashed"), "half").unwrap();
    let other = open(&dir, None);
    assert_eq!(count(&dir.path().join("incoming")), 1);
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
    assert!(matches!(second.begin(None, Some(40)), Err(BlobError::QuotaFull { needed: 40, used: 70, max: 100 })));
    drop(waiting);
    assert!(matches!(put(&first, &[2; 60], None), Err(BlobError::QuotaFull { used: 60, .. })), "until the restart");
    put(&second, &[2; 60], None).unwrap();
}

#[test]
fn disk_that_cannot_hold_a_blob_is_told_before_a_byte_of_it_came() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, None);
    let full = store.begin(None, Some(1 << 60)).unwrap_err();
    assert!(matches!(full, BlobError::DiskFull { needed, .. } if needed == 1 << 60), "{full}");
    assert_eq!(count(&dir.path().join("incoming")), 0);
    // Rooms that are not written yet count against each other.
    let most = Disk::of(dir.path()).unwrap().for_blobs() / 3 * 2;
    let waiting = store.begin(None, Some(most)).unwrap();
    let full = store.begin(None, Some(most)).unwrap_err();
    assert!(matches!(full, BlobError::DiskFull { promised, .. } if promised == most), "{full}");
    drop(waiting);
    store.begin(None, Some(most)).unwrap();
}

#[test]
fn folders_go_with_the_last_blob_in_them_and_puts_make_them_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, None);
    let id = put(&store, b"x", None).unwrap().id;
    assert!(store.delete(id).unwrap());
    assert_eq!(count(&dir.path().join("blobs")), 0);
    let puts = |store: Arc<Store>| {
        thread::spawn(move || {
            for _ in 0..200 {
                let id = put(&store, b"x", None).unwrap().id;
                store.delete(id).unwrap();
            }
        })
    };
    for thread in [puts(store.clone()), puts(store.clone()), puts(open(&dir, None))] {
        thread.join().unwrap();
    }
    assert_eq!(count(&dir.path().join("blobs")), 0);
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
