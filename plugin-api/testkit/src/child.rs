//! One check in one process: started, watched, and its end understood.

use std::io::Read;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::report::Outcome;

/// Begins the line in which a child reports; whatever else a plugin prints is not taken for it.
const REPORT: &str = "fabstir-check-outcome ";

/// What is kept of a child's output, from its end.
const KEPT: usize = 64 << 10;

/// Lines of a dead child's stderr that a report quotes.
const QUOTED: usize = 12;

/// Runs a command that ends with [`report`], and says how it ended.
pub fn watch(mut command: Command, limit: Duration) -> Outcome {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    // Spinning barriers of OpenMP cost a small machine many times its speed, and are read when the library is opened.
    command.env("OMP_WAIT_POLICY", "passive");
    die_with_parent(&mut command);
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => return Outcome::crash(format!("the process of the check cannot be started: {error}")),
    };
    let (stdout, stderr) = (Tail::of(child.stdout.take()), Tail::of(child.stderr.take()));
    let ended = wait(&mut child, limit);
    let (stdout, stderr) = (stdout.read(), stderr.read());
    let reported = stdout.lines().rev().find_map(|line| serde_json::from_str::<Outcome>(line.strip_prefix(REPORT)?).ok());

    match (ended, reported) {
        (Some(status), Some(outcome)) if status.success() => outcome,
        (Some(status), Some(_)) => crashed(format!("{}, after the check itself had ended", describe(status)), &stderr),
        (Some(status), None) => crashed(format!("{} without a report", describe(status)), &stderr),
        (None, Some(_)) => crashed("the check ended, its process did not: something in the library blocks exit".into(), &stderr),
        (None, None) => crashed(format!("not over after {} s", limit.as_secs_f64()), &stderr),
    }
}

/// Tells the parent, from the child, how its check ended.
pub fn report(outcome: &Outcome) {
    let json = serde_json::to_string(outcome).expect("an outcome is a struct of strings");
    // The library may have left a line unfinished.
    println!("\n{REPORT}{json}");
}

/// Waits until the child ends; kills it and all it started when the time is over.
fn wait(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let deadline = Instant::now() + limit;
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) if Instant::now() < deadline => thread::sleep(Duration::from_millis(5)),
            Ok(None) | Err(_) => break,
        }
    }
    // SAFETY: the child leads a group of its own and has not been waited for, so the number still means that group.
    unsafe { libc::kill(-(child.id() as i32), libc::SIGKILL) };
    // Killed, it ends; there is no other status to report.
    let _ = child.wait();
    None
}

/// The last of an output. It is read as it comes, so that the child never blocks on it.
struct Tail {
    kept: Arc<Mutex<Vec<u8>>>,
    reader: thread::JoinHandle<()>,
}

impl Tail {
    fn of(output: Option<impl Read + Send + 'static>) -> Self {
        let kept = Arc::new(Mutex::new(Vec::new()));
        let shared = kept.clone();
        let reader = thread::spawn(move || {
            let Some(mut output) = output else { return };
            let mut buffer = [0; 8192];
            while let Ok(count @ 1..) = output.read(&mut buffer) {
                let mut kept = shared.lock();
                kept.extend_from_slice(&buffer[..count]);
                if kept.len() > 2 * KEPT {
                    let surplus = kept.len() - KEPT;
                    kept.drain(..surplus);
                }
            }
        });
        Self { kept, reader }
    }

    /// What there is. A process that the child has left behind may hold the output open, and is not waited for.
    fn read(self) -> String {
        let deadline = Instant::now() + Duration::from_secs(3);
        while !self.reader.is_finished() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
        String::from_utf8_lossy(&self.kept.lock()).into_owned()
    }
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (_, Some(signal)) => format!("died of signal {signal}{}", signal_name(signal)),
        (Some(code), None) => format!("exited with {code}"),
        (None, None) => "ended in an unknown way".into(),
    }
}

fn signal_name(signal: i32) -> &'static str {
    match signal {
        libc::SIGABRT => " (SIGABRT: abort, a failed assertion of C or C++)",
        libc::SIGSEGV => " (SIGSEGV: a bad memory access)",
        libc::SIGBUS => " (SIGBUS: a bad memory access)",
        libc::SIGILL => " (SIGILL: an instruction that this CPU lacks)",
        libc::SIGFPE => " (SIGFPE: a division by zero)",
        libc::SIGKILL => " (SIGKILL: perhaps out of memory)",
        _ => "",
    }
}

fn crashed(how: String, stderr: &str) -> Outcome {
    let lines: Vec<&str> = stderr.lines().filter(|line| !line.trim().is_empty()).collect();
    let quoted = lines[lines.len().saturating_sub(QUOTED)..].join("\n");
    Outcome::crash(if quoted.is_empty() { how } else { format!("{how}; its last words:\n{quoted}") })
}

/// A stopped suite leaves no check running.
#[cfg(target_os = "linux")]
fn die_with_parent(command: &mut Command) {
    let ask = || {
        // SAFETY: a system call without pointers.
        match unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    };
    // SAFETY: between fork and exec the closure makes one system call and allocates nothing.
    unsafe { command.pre_exec(ask) };
}

#[cfg(not(target_os = "linux"))]
fn die_with_parent(_: &mut Command) {}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Outcome {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        watch(command, Duration::from_secs(2))
    }

    fn reason(outcome: &Outcome) -> &str {
        assert_eq!(outcome.status(), "crash", "{outcome:?}");
        outcome.reason().unwrap()
    }

    #[test]
    fn report_is_found_among_what_the_library_prints() {
        let outcome = shell(r#"echo noise; printf half; echo; echo 'fabstir-check-outcome {"status":"pass"}'; echo more"#);
        assert_eq!(outcome, Outcome::Pass);
    }

    #[test]
    fn signal_exit_without_report_and_timeout_are_crashes() {
        assert!(reason(&shell("echo GGML_ASSERT >&2; kill -ABRT $$")).starts_with("died of signal 6 (SIGABRT"));
        assert!(reason(&shell("echo GGML_ASSERT >&2; kill -ABRT $$")).ends_with("GGML_ASSERT"));
        assert_eq!(reason(&shell("exit 3")), "exited with 3 without a report");
        assert_eq!(reason(&shell("exit 0")), "exited with 0 without a report");
        assert_eq!(reason(&shell("sleep 60 & sleep 60")), "not over after 2 s");
        assert_eq!(reason(&shell("sleep 5 & exit 4")), "exited with 4 without a report");
        let late = shell(r#"echo 'fabstir-check-outcome {"status":"pass"}'; kill -SEGV $$"#);
        assert!(reason(&late).contains("after the check itself had ended"), "{late:?}");
    }

    #[test]
    fn endless_output_does_not_fill_memory_or_block() {
        let outcome = shell(r#"head -c 3000000 /dev/zero | tr '\0' x; echo; echo 'fabstir-check-outcome {"status":"pass"}'"#);
        assert_eq!(outcome, Outcome::Pass);
    }
}
