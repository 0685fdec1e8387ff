//! Faults that can strike anywhere.

use fabstir_plugin_api::prelude::*;

#[derive(Debug, Clone, Copy, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Fault {
    Panic,
    Abort,
    Exit,
    Hang,
    Allocate,
    Error,
}

impl Fault {
    pub fn named(name: &str) -> Option<Self> {
        Some(match name {
            "panic" => Fault::Panic,
            "abort" => Fault::Abort,
            "exit" => Fault::Exit,
            "hang" => Fault::Hang,
            "allocate" => Fault::Allocate,
            "error" => Fault::Error,
            _ => return None,
        })
    }

    /// Does not return, but for `Error`, which gives the error.
    pub async fn strike(self) -> PluginError {
        match self {
            Fault::Panic => panic!("a panic was asked for"),
            Fault::Abort => {
                eprintln!("an abort was asked for");
                std::process::abort()
            }
            Fault::Exit => std::process::exit(3),
            Fault::Hang => {
                // One task per thread of the runtime would do; more are sure to catch them all.
                for _ in 0..16 {
                    tokio::spawn(async { block() });
                }
                block()
            }
            Fault::Allocate => loop {
                // Written to, so that the pages are really taken.
                std::mem::forget(std::hint::black_box(vec![1_u8; 16 << 20]));
            },
            Fault::Error => PluginError::internal("an error was asked for"),
        }
    }
}

fn block() -> ! {
    loop {
        std::thread::park();
    }
}
