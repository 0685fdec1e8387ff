//! A question on the terminal whose answer is not shown.
//!
//! Crates for this ask first and silence the terminal then, so that the first letters of a quick answer are shown, and leave copies of
//! the answer in memory.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;

use zeroize::Zeroizing;

/// The most bytes of an answer; what is typed beyond them is dropped.
const MOST: usize = 1024;

/// Asks the terminal that the process was started from, wherever its standard input and output lead.
///
/// # Errors
/// `Interrupted` after Ctrl-C, and after Ctrl-D or the terminal's end.
pub(super) fn ask(question: &str) -> io::Result<Zeroizing<Vec<u8>>> {
    let terminal = OpenOptions::new().read(true).write(true).open("/dev/tty")?;
    let silence = Silence::of(&terminal)?;
    (&terminal).write_all(question.as_bytes())?;
    let answer = line(&terminal);
    (&terminal).write_all(b"\n")?;
    drop(silence);
    answer
}

/// A terminal that echoes nothing, and hands over every key at once; as it was before when this is dropped.
struct Silence<'a> {
    terminal: &'a File,
    before: libc::termios,
}

impl<'a> Silence<'a> {
    fn of(terminal: &'a File) -> io::Result<Self> {
        let mut before = std::mem::MaybeUninit::uninit();
        // SAFETY: the descriptor is open, and the place is as large as the call expects.
        if unsafe { libc::tcgetattr(terminal.as_raw_fd(), before.as_mut_ptr()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call has filled it.
        let before = unsafe { before.assume_init() };
        let mut silent = before;
        // Signals too: one that ended the process would leave the terminal silent. Ctrl-C comes as a key.
        silent.c_lflag &= !(libc::ECHO | libc::ECHONL | libc::ICANON | libc::ISIG);
        (silent.c_cc[libc::VMIN], silent.c_cc[libc::VTIME]) = (1, 0);
        set(terminal, &silent)?;
        Ok(Self { terminal, before })
    }
}

impl Drop for Silence<'_> {
    fn drop(&mut self) {
        // Where the terminal is gone, nothing is left to restore.
        let _ = set(self.terminal, &self.before);
    }
}

/// What was typed before is dropped: it was no answer, and it was shown.
fn set(terminal: &File, to: &libc::termios) -> io::Result<()> {
    // SAFETY: the descriptor is open, and the settings are valid for the call.
    match unsafe { libc::tcsetattr(terminal.as_raw_fd(), libc::TCSAFLUSH, to) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Reads keys up to Enter.
fn line(mut keys: impl Read) -> io::Result<Zeroizing<Vec<u8>>> {
    let mut line = Zeroizing::new(Vec::with_capacity(MOST));
    loop {
        let mut key = Zeroizing::new([0]);
        match keys.read(&mut *key) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
            Ok(0) => return Err(io::ErrorKind::Interrupted.into()),
            Ok(_) => {}
        }
        match key[0] {
            b'\n' | b'\r' => return Ok(line),
            // Ctrl-C, and Ctrl-D before anything was typed.
            3 => return Err(io::ErrorKind::Interrupted.into()),
            4 if line.is_empty() => return Err(io::ErrorKind::Interrupted.into()),
            // Backspace takes a whole character back, Ctrl-U all of them.
            8 | 127 => while line.pop().is_some_and(|byte| byte & 0xc0 == 0x80) {},
            21 => line.clear(),
            0..=8 | 10..=31 => {}
            byte if line.len() < MOST => line.push(byte),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mistyped_keys_are_taken_back() {
        let answer = |keys: &str| line(keys.as_bytes()).map(|line| String::from_utf8_lossy(&line).into_owned());
        assert_eq!(answer("word\nrest").expect("a line"), "word");
        assert_eq!(answer("wp\u{7f}ör\u{8}\u{8}ord\r").expect("a line"), "word");
        assert_eq!(answer("\u{7f}nothing\u{15}two words\n").expect("a line"), "two words");
        assert_eq!(answer(&format!("{}\n", "x".repeat(5000))).expect("a line").len(), MOST);
        for ended in ["", "wor", "wor\u{3}d\n", "\u{4}"] {
            assert_eq!(answer(ended).expect_err("has no line").kind(), io::ErrorKind::Interrupted, "{ended:?}");
        }
    }
}
