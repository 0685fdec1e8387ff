//! This machine's clock, as messages and rows have it.

use std::time::{SystemTime, UNIX_EPOCH};

/// Unix time in milliseconds.
pub fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

/// Days since 1970 by the calendar of this machine's time zone, as programs that ask for today's date have it.
pub fn local_day() -> i64 {
    // SAFETY: `tm` is plain data that localtime_r fills.
    unsafe {
        let now = libc::time(std::ptr::null_mut());
        let mut moment: libc::tm = std::mem::zeroed();
        let ahead = if libc::localtime_r(&now, &mut moment).is_null() { 0 } else { moment.tm_gmtoff };
        (now + ahead).div_euclid(86_400)
    }
}
