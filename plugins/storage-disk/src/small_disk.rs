//! A disk that is soon full.

use std::ffi::{CStr, CString};
use std::io;
use std::path::Path;
use std::thread;

/// Does something with a disk of its own, where the kernel lets us mount one. `size` is an option of tmpfs.
pub fn on_a_small_disk(at: &Path, size: &CStr, test: impl FnOnce() + Send) {
    // The namespace, and with it the mount, ends with the thread.
    thread::scope(|scope| {
        scope.spawn(|| match mount(at, size) {
            Ok(()) => test(),
            Err(error) => eprintln!("SKIPPED: cannot mount a small tmpfs here ({error}); run as root to test a full disk"),
        });
    });
}

fn mount(at: &Path, size: &CStr) -> io::Result<()> {
    let at = CString::new(at.as_os_str().as_encoded_bytes())?;
    let succeeded = |result: i32| if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) };
    let (none, flags) = (std::ptr::null(), libc::MS_REC | libc::MS_PRIVATE);
    // SAFETY: all strings end with NUL. The new mount namespace is this thread's alone, and nothing mounted in it spreads.
    unsafe {
        succeeded(libc::unshare(libc::CLONE_NEWNS))?;
        succeeded(libc::mount(c"none".as_ptr(), c"/".as_ptr(), none, flags, none.cast()))?;
        succeeded(libc::mount(c"tmpfs".as_ptr(), at.as_ptr(), c"tmpfs".as_ptr(), 0, size.as_ptr().cast()))
    }
}
