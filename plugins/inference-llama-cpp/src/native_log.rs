//! llama.cpp's log: into `tracing`, and the part about a failed load into the error.
//!
//! Its functions answer with a null pointer and log the reason, on the thread that called them. So a load listens on its own
//! thread, and loads at the same time do not hear each other.

use std::cell::RefCell;
use std::ffi::{CStr, c_char, c_void};
use std::sync::Once;

use llama_cpp_sys_2 as sys;

/// What llama.cpp said while something ran.
#[derive(Debug, Default)]
pub struct Heard {
    errors: Vec<String>,
    /// Bytes of the buffers that it reported to have allocated.
    pub allocated: u64,
}

impl Heard {
    /// The reason of a failure in llama.cpp's words.
    pub fn reason(&self) -> String {
        if self.errors.is_empty() { "llama.cpp gives no reason".to_owned() } else { self.errors.join("; ") }
    }
}

thread_local! {
    static LISTENING: RefCell<Option<Heard>> = const { RefCell::new(None) };
    /// The beginning of a line whose end has not been logged yet.
    static LINE: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Runs `work` and returns what llama.cpp logged on this thread meanwhile.
pub fn listen<T>(work: impl FnOnce() -> T) -> (T, Heard) {
    LISTENING.set(Some(Heard::default()));
    let result = work();
    (result, LISTENING.take().unwrap_or_default())
}

/// Sends llama.cpp's log to `tracing` from now on.
pub fn install() {
    static ONCE: Once = Once::new();
    // SAFETY: the callback is a plain function without data, so it is valid for ever.
    ONCE.call_once(|| unsafe {
        sys::llama_log_set(Some(on_log), std::ptr::null_mut());
        sys::ggml_log_set(Some(on_log), std::ptr::null_mut());
    });
}

unsafe extern "C" fn on_log(level: sys::ggml_log_level, text: *const c_char, _: *mut c_void) {
    if text.is_null() || (level == sys::GGML_LOG_LEVEL_DEBUG && !tracing::enabled!(target: "llama.cpp", tracing::Level::TRACE)) {
        return;
    }
    // SAFETY: llama.cpp passes a terminated string that lives during the call.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    LINE.with_borrow_mut(|line| {
        line.push_str(&text);
        if line.ends_with('\n') {
            on_line(level, line.trim_end());
            line.clear();
        } else if line.len() > 1 << 16 {
            line.clear();
        }
    });
}

fn on_line(level: sys::ggml_log_level, line: &str) {
    LISTENING.with_borrow_mut(|heard| {
        let Some(heard) = heard else { return };
        if level == sys::GGML_LOG_LEVEL_ERROR
            && let Some(reason) = reason(line)
            && heard.errors.len() < 8
        {
            heard.errors.push(reason.to_owned());
        }
        heard.allocated += allocated(line).unwrap_or(0);
    });
    match level {
        sys::GGML_LOG_LEVEL_ERROR => tracing::error!(target: "llama.cpp", "{line}"),
        sys::GGML_LOG_LEVEL_WARN => tracing::warn!(target: "llama.cpp", "{line}"),
        sys::GGML_LOG_LEVEL_DEBUG => tracing::trace!(target: "llama.cpp", "{line}"),
        // What llama.cpp calls information is a page of detail for each model.
        _ => tracing::debug!(target: "llama.cpp", "{line}"),
    }
}

/// The part of an error line that says something: without the C++ function, and nothing for lines that only say that it failed.
fn reason(line: &str) -> Option<&str> {
    let mut text = line;
    while let Some((head, rest)) = text.split_once(": ") {
        let is_prefix = head.ends_with("error loading model") || head.chars().all(|c| c.is_ascii_lowercase() || c == '_');
        if !is_prefix {
            break;
        }
        text = rest;
    }
    (!text.is_empty() && text != "failed to load model").then_some(text)
}

/// The size in a line such as `load_tensors:   CPU_Mapped model buffer size =     3.42 MiB`.
fn allocated(line: &str) -> Option<u64> {
    let (_, size) = line.split_once("buffer size =")?;
    let mebibytes: f64 = size.trim().strip_suffix("MiB")?.trim().parse().ok()?;
    Some((mebibytes * f64::from(1 << 20)) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_is_what_is_left_of_an_error_line() {
        assert_eq!(
            reason("llama_model_load: error loading model: unknown model architecture: 'x'"),
            Some("unknown model architecture: 'x'")
        );
        assert_eq!(reason("llama_model_load_from_file_impl: failed to load model"), None);
    }

    #[test]
    fn buffer_sizes_are_read() {
        assert_eq!(allocated("llama_kv_cache:        CPU KV buffer size =     8.00 MiB"), Some(8 << 20));
        assert_eq!(allocated("print_info: n_ctx = 12"), None);
    }

    #[test]
    fn only_the_listening_thread_hears() {
        let ((), heard) = listen(|| {
            on_line(sys::GGML_LOG_LEVEL_ERROR, "f: broken");
            std::thread::spawn(|| on_line(sys::GGML_LOG_LEVEL_ERROR, "f: elsewhere")).join().unwrap();
        });
        assert_eq!(heard.reason(), "broken");
    }
}
