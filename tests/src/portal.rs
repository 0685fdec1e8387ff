//! An S5 portal on this machine, in a folder and on a port of its own.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use crate::artifact;

/// A running portal. Dropped, it is killed, and its blobs go.
pub struct Portal {
    child: Child,
    pub url: String,
    folder: TempDir,
}

impl Portal {
    pub fn start() -> Self {
        let folder = tempfile::Builder::new().prefix("s5-portal-").tempdir().expect("a folder can be made");
        let mut command = Command::new(artifact("s5-portal"));
        command.args(["--listen", "127.0.0.1:0", "--dir"]).arg(folder.path()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("its output is a pipe"))
            .read_line(&mut line)
            .expect("it says where it listens");
        let url = line.trim().strip_prefix("Listening on ").unwrap_or_else(|| panic!("it printed {line:?}")).to_owned();
        Self { child, url, folder }
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Where a blob lies.
    pub fn blob(&self, id: &str) -> PathBuf {
        self.folder.path().join("blobs").join(id)
    }

    /// The bytes that have come of uploads that have not ended.
    pub fn unfinished(&self) -> u64 {
        sizes(&self.folder.path().join("tus"))
    }
}

impl Drop for Portal {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn sizes(folder: &Path) -> u64 {
    let files = std::fs::read_dir(folder).expect("the portal has made its folders").flatten();
    let bytes = files.filter(|file| file.path().extension().is_some_and(|extension| extension == "bytes"));
    // A file may go between the two looks.
    bytes.filter_map(|file| file.metadata().ok()).map(|file| file.len()).sum()
}
