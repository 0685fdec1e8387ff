//! A development chain with the market's contracts on it: anvil, which puts each transaction into a block at once.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use crate::process;

/// The number that development chains have.
const CHAIN_ID: u64 = 31337;

/// How long the chain may take to start.
const PATIENCE: Duration = Duration::from_secs(30);

/// A running chain. It ends when this is dropped, or the program is killed.
pub struct DevChain {
    anvil: Anvil,
    url: String,
    config: serde_json::Value,
}

impl DevChain {
    /// Starts a chain on a port of the system's choice, and deploys the contracts.
    ///
    /// # Errors
    /// A sentence on what is missing or went wrong.
    pub fn start() -> Result<Self, String> {
        let contracts = Path::new(env!("CARGO_MANIFEST_DIR")).join("../plugins/chain-base/contracts");
        let (anvil, url) = Anvil::start(&anvil(&contracts)?)?;
        let deployed = deploy(&contracts, &url)?;
        let at = |name: &str| match deployed.get(name) {
            Some(value) => Ok(value.clone()),
            None => Err(format!("deploy.mjs tells no `{name}`: {deployed}")),
        };
        let config = serde_json::json!({
            "rpc": [&url],
            "chain_id": CHAIN_ID,
            "contracts": { "escrow": at("escrow")?, "nodes": at("nodes")?, "models": at("models")?, "proofs": at("proofs")? },
            "first_block": at("block")?,
            "poll_ms": 50,
        });
        Ok(Self { anvil, url, config })
    }

    /// Asks the chain something by JSON-RPC, as another program than a node would.
    ///
    /// # Errors
    /// What the connection or the chain says.
    pub async fn ask(&self, method: &str, params: serde_json::Value) -> Result<serde_json::Value, String> {
        let body = serde_json::json!({ "jsonrpc": "2.0", "id": 1, "method": method, "params": params });
        let client = reqwest::Client::builder().no_proxy().timeout(PATIENCE).build().map_err(|error| error.to_string())?;
        let answer = client.post(&self.url).json(&body).send().await.map_err(|error| error.to_string())?;
        let answer: serde_json::Value = answer.json().await.map_err(|error| error.to_string())?;
        match answer.get("error") {
            Some(error) => Err(format!("{method}: {error}")),
            None => Ok(answer["result"].clone()),
        }
    }

    /// Deploys the contract in a file of `proof contract`, and names it in ProofHub. Returns what `verifier.mjs` tells.
    ///
    /// # Errors
    /// What it says.
    pub fn name_verifier(&self, file: &Path) -> Result<serde_json::Value, String> {
        let contracts = Path::new(env!("CARGO_MANIFEST_DIR")).join("../plugins/chain-base/contracts");
        let proofs = self.config["contracts"]["proofs"].as_str().unwrap_or_default().to_owned();
        let mut command = Command::new("node");
        command.arg(contracts.join("verifier.mjs")).arg(file).args(["--rpc", &self.url, "--proofs", &proofs]);
        told(command.output())
    }

    /// Makes so many empty blocks.
    pub async fn mine(&self, blocks: u64) {
        self.ask("anvil_mine", serde_json::json!([format!("0x{blocks:x}")])).await.expect("the chain mines");
    }

    /// Stops the chain's process, so that nobody is answered until [`Self::resume`].
    pub fn pause(&mut self) {
        process::stop(self.anvil.0.id() as i32);
    }

    pub fn resume(&mut self) {
        process::send(self.anvil.0.id() as i32, libc::SIGCONT);
    }

    /// The plugin's configuration for this chain.
    pub fn config(&self) -> serde_json::Value {
        self.config.clone()
    }
}

/// The program, as npm has installed it for this machine.
fn anvil(contracts: &Path) -> Result<PathBuf, String> {
    let packages = contracts.join("node_modules/@foundry-rs");
    let found = packages.read_dir().into_iter().flatten().flatten().find_map(|package| {
        let program = package.path().join("bin/anvil");
        let is_native = package.file_name().to_string_lossy().starts_with("anvil-");
        (is_native && program.is_file()).then_some(program)
    });
    found.ok_or_else(|| format!("anvil is not installed in {}: run `make chain`", packages.display()))
}

fn deploy(contracts: &Path, url: &str) -> Result<serde_json::Value, String> {
    told(Command::new("node").arg(contracts.join("deploy.mjs")).args(["--rpc", url]).output())
}

/// The JSON that a script of the contracts has printed.
fn told(output: std::io::Result<Output>) -> Result<serde_json::Value, String> {
    let output = output.map_err(|error| format!("node cannot be started ({error}): run `make chain`"))?;
    let told = String::from_utf8_lossy(&output.stdout);
    match serde_json::from_str(told.trim()) {
        Ok(deployed) if output.status.success() => Ok(deployed),
        _ => Err(format!("the contracts cannot be deployed: {told}{}", String::from_utf8_lossy(&output.stderr))),
    }
}

/// The process of the chain.
struct Anvil(Child);

impl Anvil {
    fn start(program: &Path) -> Result<(Self, String), String> {
        let mut command = Command::new(program);
        command.args(["--host", "127.0.0.1", "--port", "0", "--chain-id", &CHAIN_ID.to_string()]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        die_with_parent(&mut command);
        let cannot = |error| format!("{} cannot be started: {error}", program.display());
        let mut anvil = Self(command.spawn().map_err(cannot)?);
        let output = anvil.0.stdout.take().expect("was asked for");
        let (sender, listening) = mpsc::channel();
        thread::spawn(move || {
            let mut output = BufReader::new(output);
            let mut line = String::new();
            while output.read_line(&mut line).is_ok_and(|read| read > 0) {
                if let Some(address) = line.trim().strip_prefix("Listening on ") {
                    // Whoever waits no longer has given up on the chain.
                    let _ = sender.send(format!("http://{address}"));
                    break;
                }
                line.clear();
            }
            // Read to its end, so that the chain never blocks on it.
            let mut rest = [0; 8192];
            while output.read(&mut rest).is_ok_and(|read| read > 0) {}
        });
        match listening.recv_timeout(PATIENCE) {
            Ok(url) => Ok((anvil, url)),
            Err(_) => Err(format!("{} does not say where it listens", program.display())),
        }
    }
}

impl Drop for Anvil {
    fn drop(&mut self) {
        // One that has ended by itself needs no end.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A killed test leaves no chain running.
#[cfg(target_os = "linux")]
fn die_with_parent(command: &mut Command) {
    use std::os::unix::process::CommandExt;

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
