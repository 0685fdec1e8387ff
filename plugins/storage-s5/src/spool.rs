//! Blobs on their way: on the disk, hashed as they come, so that memory does not grow with them.
//!
//! A file of the spool has no name. Whatever ends the process, the disk is free again.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use blob_folder::disk::is_full;
use blob_folder::space::{Room, Space};
use bytes::Bytes;
use futures::Stream;
use futures::stream::try_unfold;
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, spawn_blocking};

use crate::error::S5Error;
use crate::tree::{Growing, Tree};

/// Bytes that are read from a file at once.
const PIECE: u64 = 256 << 10;

/// Pieces that wait for the disk.
const WAITING: usize = 4;

/// Where blobs wait.
#[derive(Debug)]
pub struct Spool {
    space: Arc<Space>,
}

/// A blob that has come whole.
#[derive(Debug)]
pub struct Spooled {
    pub tree: Tree,
    file: Arc<File>,
    _room: Room,
}

impl Spool {
    pub fn open(dir: PathBuf, max: Option<u64>) -> Result<Arc<Self>, S5Error> {
        fs::create_dir_all(&dir).map_err(S5Error::io("make the folder", &dir))?;
        Ok(Arc::new(Self { space: Space::new(dir, max) }))
    }

    /// Begins to take a blob: pieces go into the sender, and once that is dropped the blob comes out of the task. Where the task has failed,
    /// the sender is closed. `size` is what was announced.
    pub fn receive<B: AsRef<[u8]> + Send + 'static>(
        self: &Arc<Self>,
        size: Option<u64>,
    ) -> (mpsc::Sender<B>, JoinHandle<Result<Spooled, S5Error>>) {
        let (sender, mut pieces) = mpsc::channel::<B>(WAITING);
        let spool = self.clone();
        let task = spawn_blocking(move || {
            let mut room = Room::new(&spool.space);
            room.reach(size.unwrap_or(0))?;
            let mut file = tempfile::tempfile_in(spool.space.dir()).map_err(|error| spool.failed(size.unwrap_or(0), error))?;
            let (mut growing, mut came) = (Growing::default(), 0);
            while let Some(piece) = pieces.blocking_recv() {
                let piece = piece.as_ref();
                came += piece.len() as u64;
                if let Some(expected) = size.filter(|&size| came > size) {
                    return Err(S5Error::TooMany { expected, actual: came });
                }
                room.reach(came)?;
                file.write_all(piece).map_err(|error| spool.failed(size.unwrap_or(came), error))?;
                room.wrote(piece.len() as u64);
                growing.update(piece);
            }
            if let Some(expected) = size.filter(|&size| came < size) {
                return Err(S5Error::TooFew { expected, actual: came });
            }
            Ok(Spooled { tree: growing.finish(), file: Arc::new(file), _room: room })
        });
        (sender, task)
    }

    fn failed(&self, needed: u64, error: io::Error) -> S5Error {
        if is_full(&error) { self.space.full(needed).into() } else { S5Error::io("write in", self.space.dir())(error) }
    }
}

impl Spooled {
    /// The bytes from one place to another, in pieces.
    pub fn read(&self, from: u64, to: u64) -> impl Stream<Item = io::Result<Bytes>> + Send + use<> {
        let file = self.file.clone();
        try_unfold(from, move |at| {
            let file = file.clone();
            async move {
                if at >= to {
                    return Ok(None);
                }
                let read = spawn_blocking(move || {
                    let mut piece = vec![0; PIECE.min(to - at) as usize];
                    file.read_exact_at(&mut piece, at).map(|()| piece)
                });
                let piece = read.await.map_err(io::Error::other)??;
                let next = at + piece.len() as u64;
                Ok(Some((Bytes::from(piece), next)))
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use blob_folder::finished;
    use futures::TryStreamExt;

    use super::*;

    async fn put(spool: &Arc<Spool>, pieces: &[&[u8]], size: Option<u64>) -> Result<Spooled, S5Error> {
        let (sender, task) = spool.receive::<Vec<u8>>(size);
        for piece in pieces {
            // The task says why it takes no more.
            if sender.send(piece.to_vec()).await.is_err() {
                break;
            }
        }
        drop(sender);
        finished(task).await
    }

    #[tokio::test]
    async fn blob_comes_out_as_it_went_in_and_its_room_is_given_back() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::open(dir.path().into(), Some(600_000)).unwrap();
        let bytes = vec![7; 500_000];
        let spooled = put(&spool, &[&bytes[..1], &bytes[1..]], None).await.unwrap();
        let read: Vec<Bytes> = spooled.read(3, 499_999).try_collect().await.unwrap();
        assert_eq!(read.concat(), &bytes[3..499_999]);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "a file of the spool has no name");

        let full = put(&spool, &[&bytes], None).await.unwrap_err();
        assert!(matches!(full, S5Error::SpoolFull { needed: 500_000, used: 500_000, max: 600_000 }), "{full}");
        drop(spooled);
        put(&spool, &[&bytes], Some(500_000)).await.unwrap();
        assert_eq!(spool.space.taken().coming, 0);
        let ahead = put(&spool, &[], Some(u64::MAX)).await.unwrap_err();
        assert!(matches!(ahead, S5Error::SpoolFull { .. }), "a size that cannot fit is refused before the first byte: {ahead}");
    }

    #[tokio::test]
    async fn disk_is_not_filled_to_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::open(dir.path().into(), None).unwrap();
        let full = put(&spool, &[b"a"], Some(1 << 60)).await.unwrap_err();
        assert!(matches!(full, S5Error::DiskFull { needed, .. } if needed == 1 << 60), "also without a limit of its own: {full}");
    }

    #[tokio::test]
    async fn other_sizes_than_announced_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::open(dir.path().into(), None).unwrap();
        assert!(matches!(put(&spool, &[b"ab", b"c"], Some(2)).await, Err(S5Error::TooMany { expected: 2, actual: 3 })));
        assert!(matches!(put(&spool, &[b"ab"], Some(3)).await, Err(S5Error::TooFew { expected: 3, actual: 2 })));
    }
}
