//! A terminal with a program in it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// A program that believes it talks to a person.
pub struct Terminal {
    child: Child,
    keyboard: File,
    screen: mpsc::Receiver<Vec<u8>>,
    /// What was shown and not yet looked at.
    shown: String,
}

pub const CTRL_C: &str = "\x03";
pub const CTRL_D: &str = "\x04";
pub const ENTER: &str = "\r";

impl Terminal {
    pub fn open(mut command: Command) -> Self {
        let (mut near, mut far) = (0, 0);
        let size = libc::winsize { ws_row: 40, ws_col: 200, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: the places for both numbers and the size are valid; name and settings may be left out.
        let opened = unsafe { libc::openpty(&mut near, &mut far, std::ptr::null_mut(), std::ptr::null(), &size) };
        assert_eq!(opened, 0, "no terminal: {}", std::io::Error::last_os_error());
        // SAFETY: both were just opened and belong to nobody else.
        let (near, far) = unsafe { (OwnedFd::from_raw_fd(near), OwnedFd::from_raw_fd(far)) };
        let end = || Stdio::from(far.try_clone().expect("a descriptor can be copied"));
        command.stdin(end()).stdout(end()).stderr(end()).env("TERM", "xterm");
        // SAFETY: between fork and exec only two system calls are made, which are allowed there.
        unsafe {
            command.pre_exec(|| {
                // A session of its own with this terminal in charge, so that Ctrl-C becomes a signal to it and to nobody else.
                if libc::setsid() < 0 || libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        drop(command);
        let keyboard = File::from(near.try_clone().expect("a descriptor can be copied"));
        let mut output = File::from(near);
        let (bytes, screen) = mpsc::channel();
        // The thread ends when the program has closed its end of the terminal.
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = output.read(&mut buffer) {
                if bytes.send(buffer[..count].to_vec()).is_err() {
                    break;
                }
            }
        });
        Self { child, keyboard, screen, shown: String::new() }
    }

    pub fn type_in(&mut self, keys: &str) {
        self.keyboard.write_all(keys.as_bytes()).expect("the terminal takes keys");
    }

    /// Waits until `text` is shown, and returns what was shown up to its end. The next look begins there.
    pub fn shows(&mut self, text: &str, limit: Duration) -> String {
        let began = Instant::now();
        loop {
            if let Some(at) = self.shown.find(text) {
                let rest = self.shown.split_off(at + text.len());
                return std::mem::replace(&mut self.shown, rest);
            }
            let left = limit.saturating_sub(began.elapsed());
            match self.screen.recv_timeout(left) {
                Ok(bytes) => self.shown.push_str(&plain(&bytes)),
                Err(why) => panic!("{text:?} was not shown ({why}); the screen says:\n{}", self.shown),
            }
        }
    }

    /// Waits until the program has ended: its exit code, or minus the signal's number.
    pub fn exit(&mut self, limit: Duration) -> i32 {
        let began = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                return status.code().unwrap_or_else(|| -status.signal().unwrap_or(0));
            }
            assert!(began.elapsed() < limit, "the program did not end; the screen says:\n{}", self.shown);
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What is left of the bytes when the commands to the terminal are taken out.
fn plain(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut out = String::new();
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        match character {
            // `ESC [ parameters letter`; other sequences are two characters long.
            '\x1b' => {
                if characters.next() == Some('[') {
                    for parameter in characters.by_ref() {
                        if parameter.is_ascii_alphabetic() {
                            break;
                        }
                    }
                }
            }
            '\r' => {}
            character => out.push(character),
        }
    }
    out
}
