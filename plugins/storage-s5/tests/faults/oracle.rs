//! Another implementation of S5 reads what we write, and writes what we read: @lumeweb/libs5, which `tests/clients/setup.sh` installs.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use ed25519_dalek::{Signer, SigningKey};
use serde_json::{Value, json};
use storage_s5::cid::{Cid, Id};
use storage_s5::pointer::{self, Entry, Key, MOST_DATA, REVISIONS};

fn installed() -> PathBuf {
    let variable = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let cache = variable("XDG_CACHE_HOME").or_else(|| variable("HOME").map(|home| home.join(".cache"))).unwrap_or_default();
    let folder = cache.join("fabstir-node/clients/s5");
    assert!(
        folder.join("node_modules/@lumeweb/libs5").is_dir(),
        "@lumeweb/libs5 is not in {}; `make clients` installs it",
        folder.display()
    );
    folder
}

#[test]
fn names_and_pointers_are_those_of_another_implementation() {
    let folder = installed();
    // It shifts sizes as 32 bits, so larger ones are no question for it.
    let blobs: Vec<Cid> = [0u64, 1, 13, 255, 256, 65_535, 1 << 20, (1 << 31) - 1]
        .map(|size| Cid { id: Id::from(blake3::hash(&size.to_le_bytes())), size: Some(size) })
        .to_vec();
    let signing = SigningKey::from_bytes(&[9; 32]);
    let key = Key::parse(&hex::encode(signing.verifying_key().to_bytes())).expect("a key");
    let pointers: Vec<Entry> = [(0u64, &b""[..]), (300, b"\x1f and more"), ((1 << 31) - 1, &[7; MOST_DATA])]
        .map(|(revision, data)| {
            let signature = signing.sign(&pointer::payload(revision, data)).to_bytes();
            Entry::new(key, revision, data.to_vec(), &signature, MOST_DATA).expect("is signed")
        })
        .to_vec();
    assert!(pointers.iter().all(|pointer| pointer.revision() < REVISIONS));
    let asked = json!({
        "blobs": blobs.iter().map(|cid| json!({ "id": cid.id.to_string(), "size": cid.size, "name": cid.legacy() })).collect::<Vec<_>>(),
        "pointers": pointers.iter().map(Entry::to_wire).collect::<Vec<_>>(),
    });

    let answer = ask(&folder, &asked);
    for (cid, theirs) in blobs.iter().zip(answer["names"].as_array().expect("a list")) {
        assert_eq!(theirs["base58"], cid.legacy().as_str(), "{cid:?}");
        assert_eq!(theirs["read"], json!({ "id": cid.id.to_string(), "size": cid.size }));
        for form in ["base58", "hex", "base32"] {
            assert_eq!(Cid::parse(theirs[form].as_str().expect("a text")), Ok(*cid), "{form} of {cid:?}");
        }
    }
    for (pointer, theirs) in pointers.iter().zip(answer["pointers"].as_array().expect("a list")) {
        assert_eq!(*theirs, json!({ "valid": true, "revision": pointer.revision(), "data": hex::encode(pointer.data()) }));
    }
    println!("{} names and {} pointers compared", blobs.len(), pointers.len());
}

fn ask(folder: &Path, asked: &Value) -> Value {
    // A script finds its packages from its own folder upwards.
    let script = folder.join("oracle.mjs");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/clients/s5/oracle.mjs");
    std::fs::copy(source, &script).expect("the script can be copied");
    let mut node = Command::new("node").arg(script).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("node runs");
    node.stdin.take().expect("a pipe").write_all(asked.to_string().as_bytes()).expect("it reads");
    let output = node.wait_with_output().expect("it ends");
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).expect("JSON")
}
