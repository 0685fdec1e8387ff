//! The process: prepares its environment, then hands over to the command line.

use std::process::ExitCode;

fn main() -> ExitCode {
    if std::env::var_os("OMP_WAIT_POLICY").is_none() {
        // OpenMP inside llama.cpp reads this when its library is opened. Without it idle threads spin at barriers, which costs 9
        // to 26 times the speed where cores are shared.
        // SAFETY: nothing has started a thread yet, so nobody can be reading the environment meanwhile.
        unsafe { std::env::set_var("OMP_WAIT_POLICY", "passive") };
    }
    // A worker must not carry what a command line needs: it starts often, and its memory counts per plugin.
    if std::env::args_os().nth(1).is_some_and(|argument| argument == "plugin-worker") {
        return fabstir_host::supervisor::worker::main();
    }
    fabstir_host::cli::main()
}
