//! A folder with a configuration.

use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;
use toml::{Table, Value as Toml};

use crate::{artifact, built};

/// The longest that a command may take.
const LIMIT: Duration = Duration::from_secs(90);

/// A folder of its own with a `plugins.toml`; goes with the value.
pub struct Place(TempDir);

/// How a command ended.
#[derive(Debug)]
pub struct Ran {
    /// The exit code; minus the signal's number where one ended it.
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Ran {
    /// Standard output as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("no JSON ({error}): {self:#?}"))
    }
}

impl Place {
    pub fn new(config: &str) -> Self {
        let place = Self(tempfile::Builder::new().prefix("fabstir-node-").tempdir().expect("a folder can be made"));
        place.configure(config);
        place
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Writes `plugins.toml`. What is left out is set so that tests do not meet: a free port, a state folder within this one, the
    /// built plugins, and every file trusted.
    pub fn configure(&self, config: &str) {
        let mut config: Table = config.parse().unwrap_or_else(|error| panic!("the test's configuration: {error}\n{config}"));
        let mut default = |path: &[&str], value: Toml| {
            let (last, tables) = path.split_last().expect("a key has a name");
            let table = tables.iter().fold(&mut config, |table, name| {
                let next = table.entry(*name).or_insert_with(|| Toml::Table(Table::new()));
                next.as_table_mut().expect("a section is a table")
            });
            table.entry(*last).or_insert(value);
        };
        default(&["node", "data_dir"], "data".into());
        default(&["gateway", "listen"], "127.0.0.1:0".into());
        default(&["plugins", "dirs"], vec![built().display().to_string()].into());
        default(&["plugins", "trust", "policy"], "any".into());
        self.file("plugins.toml", toml::to_string(&config).expect("a table can be written"));
    }

    /// Writes a file into the folder.
    pub fn file(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path().join(name);
        std::fs::create_dir_all(path.parent().expect("a file has a folder")).expect("a folder can be made");
        std::fs::write(&path, bytes).expect("a file can be written");
        path
    }

    /// The binary, started in this folder and without the caller's own settings.
    pub fn command(&self) -> Command {
        let mut command = Command::new(artifact("fabstir-node"));
        command.current_dir(self.path()).env("HOME", self.path()).env("NO_PROXY", "127.0.0.1").stdin(Stdio::null());
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("FABSTIR_") || name.starts_with("XDG_")) {
            command.env_remove(name);
        }
        command
    }

    /// Runs a subcommand to its end; fails unless it worked.
    #[track_caller]
    pub fn ran(&self, arguments: &[&str]) -> Ran {
        let ran = self.run(arguments);
        assert_eq!(ran.code, 0, "{arguments:?}: {ran:#?}");
        ran
    }

    /// Runs a subcommand to its end.
    pub fn run(&self, arguments: &[&str]) -> Ran {
        self.run_with(arguments, "")
    }

    /// Runs a subcommand with something on its standard input.
    pub fn run_with(&self, arguments: &[&str], input: &str) -> Ran {
        let mut command = self.command();
        command.args(arguments);
        finish(command, input, LIMIT)
    }
}

/// Runs a command to its end; kills it, and fails, at the limit.
pub fn finish(mut command: Command, input: &str, limit: Duration) -> Ran {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let pid = child.id() as i32;
    let mut stdin = child.stdin.take().expect("its input is a pipe");
    // A command that does not read its input closes the pipe, which is no fault.
    let _ = stdin.write_all(input.as_bytes());
    drop(stdin);
    let (ended, end) = mpsc::channel();
    std::thread::spawn(move || ended.send(child.wait_with_output()));
    let output = end.recv_timeout(limit).unwrap_or_else(|_| {
        // SAFETY: the child was not waited for yet, so the number is still its own.
        unsafe { libc::kill(pid, libc::SIGKILL) };
        let output = end.recv().expect("a killed command ends").expect("and can be waited for");
        panic!("{command:?} did not end within {limit:?}: {output:#?}");
    });
    let output = output.expect("a command can be waited for");
    Ran {
        code: output.status.code().unwrap_or_else(|| -output.status.signal().unwrap_or(0)),
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}
