//! Account keys: made, imported and listed, opened by others and opened from others, and never shown.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;

use fabstir_tests::place::finish;
use fabstir_tests::terminal::{CTRL_C, ENTER, Terminal};
use fabstir_tests::{LIMIT, Place, Ran};

/// Found nowhere but in these tests, so that it shows where it should not be.
const CANARY: &str = "c0ffee11c0ffee22c0ffee33c0ffee44c0ffee55c0ffee66c0ffee77c0ffee88";
const PASSWORD: &str = "canary-password-5713";

fn place() -> Place {
    let place = Place::new("");
    private(&place, "password", PASSWORD);
    place
}

fn private(place: &Place, name: &str, text: &str) -> PathBuf {
    let path = place.file(name, text);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("a mode can be set");
    path
}

/// Runs a subcommand with everything logged, and looks for the canaries in what it says.
fn keys(place: &Place, arguments: &str, input: &str) -> Ran {
    let mut command = place.command();
    command.arg("keys").args(arguments.split(' '));
    command.env("RUST_LOG", "trace").env("FABSTIR_NODE__LOG", "trace").env("RUST_BACKTRACE", "full");
    let ran = finish(command, input, LIMIT);
    for secret in [CANARY, PASSWORD] {
        let said = format!("{}{}", ran.out, ran.err).to_lowercase();
        assert!(!said.contains(&secret[..16]) && !said.contains(&secret[secret.len() - 8..]), "{arguments}: {ran:#?}");
    }
    ran
}

#[track_caller]
fn works(place: &Place, arguments: &str, input: &str) -> String {
    let ran = keys(place, arguments, input);
    assert_eq!(ran.code, 0, "{arguments}: {ran:#?}");
    ran.out.trim().to_owned()
}

#[track_caller]
fn refused(place: &Place, arguments: &str, input: &str, says: &[&str]) {
    let ran = keys(place, arguments, input);
    assert_eq!(ran.code, 1, "{arguments}: {ran:#?}");
    for text in says {
        assert!(ran.err.contains(text), "{arguments}: no {text:?} in {}", ran.err);
    }
}

#[test]
fn a_new_key_is_kept_listed_and_opened() {
    let place = place();
    assert!(works(&place, "list", "").contains("keys new"));
    let address = works(&place, "new payout --password-file password", "");
    assert!(address.starts_with("0x") && address.len() == 42, "{address}");
    let file = place.path().join("data/keys/payout.json");
    assert_eq!(fs::metadata(&file).expect("the key is there").mode() & 0o7777, 0o600);
    assert_eq!(fs::metadata(file.parent().expect("a folder")).expect("is there").mode() & 0o7777, 0o700);
    let list = works(&place, "list", "");
    assert!(list.contains("payout") && list.contains(&address), "{list}");
    assert_eq!(works(&place, "show payout", ""), address);
    assert_eq!(works(&place, "show payout --check --password-file password", ""), address);
    let shown = keys(&place, "show payout --json", "").json();
    assert_eq!((shown["name"].as_str(), shown["address"].as_str()), (Some("payout"), Some(address.as_str())), "{shown:#}");

    // A name that is taken keeps its key, whoever asks.
    let before = fs::read(&file).expect("read");
    refused(&place, "new payout --password-file password", "", &["there is a key `payout` already", "payout.json"]);
    refused(&place, "import payout --password-file password", CANARY, &["there is a key `payout` already"]);
    assert_eq!(fs::read(&file).expect("read"), before);
    assert_eq!(fs::read_dir(file.parent().expect("a folder")).expect("is there").count(), 1, "nothing is left beside the key");
}

#[test]
fn a_key_is_imported_from_a_pipe_and_from_a_file() {
    let place = place();
    private(&place, "plain", &format!("0x{CANARY}\n"));
    let address = works(&place, "import piped --password-file password", CANARY);
    assert_eq!(works(&place, "import filed --key-file plain --password-file password", ""), address);
    assert_eq!(works(&place, "import again --keystore data/keys/piped.json --password-file password", ""), address);
    let kept = fs::read_to_string(place.path().join("data/keys/piped.json")).expect("read");
    assert!(!kept.contains(CANARY), "{kept}");

    refused(&place, "import x --password-file password", &CANARY[1..], &["64 hex digits"]);
    refused(&place, "import x --password-file password", &"f".repeat(64), &["no account"]);
    fs::set_permissions(place.path().join("plain"), fs::Permissions::from_mode(0o644)).expect("a mode can be set");
    refused(&place, "import x --key-file plain --password-file password", "", &["mode 0644", "chmod 600"]);
    // Somebody takes a plain key for a keystore.
    private(&place, "plain", &format!("\"{CANARY}\""));
    refused(&place, "import x --keystore plain --password-file password", "", &["no keystore of version 3"]);
    assert!(!place.path().join("data/keys/x.json").exists());
}

#[test]
fn what_is_wrong_is_told_with_the_next_step() {
    let place = place();
    works(&place, "import payout --password-file password", CANARY);
    private(&place, "other", "something else");
    refused(&place, "show payout --check --password-file other", "", &["does not open", "payout.json"]);
    refused(&place, "show payuot", "", &["no key `payuot`", "Near it: payout"]);
    refused(&place, "show payout --check --password-file nowhere", "", &["nowhere", "cannot be read"]);
    // No terminal, and no file: nobody could give the password.
    refused(&place, "show payout --check", "", &["--password-file", "keys.password_file"]);
    let usage = keys(&place, "new ../payout --password-file password", "");
    assert_eq!(usage.code, 2, "{usage:#?}");
    assert!(usage.err.contains("letters, digits"), "{usage:#?}");

    let file = place.path().join("data/keys/payout.json");
    let good = fs::read_to_string(&file).expect("read");
    for (name, spoilt) in
        [("cut", good[..good.len() / 2].to_owned()), ("version", good.replace("\"version\":3", "\"version\":1"))]
    {
        private(&place, "data/keys/payout.json", &spoilt);
        let arguments = "show payout --check --password-file password";
        refused(&place, arguments, "", &["payout.json", "gives no key", "Restore it from a copy"]);
        assert_eq!(fs::read_to_string(&file).expect("read"), spoilt, "{name}");
    }
    private(&place, "data/keys/payout.json", &good);
    fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).expect("a mode can be set");
    refused(&place, "show payout --check --password-file password", "", &["mode 0640", "chmod 600"]);
    assert!(works(&place, "list", "").contains("mode 0640"));
    fs::set_permissions(place.path().join("password"), fs::Permissions::from_mode(0o604)).expect("a mode can be set");
    refused(&place, "new x --password-file password", "", &["password", "mode 0604"]);
}

#[test]
fn the_configuration_and_the_environment_name_the_password_file() {
    let place = place();
    place.configure("[keys]\npassword_file = 'password'");
    let address = works(&place, "new payout", "");
    assert_eq!(works(&place, "show payout --check", ""), address);
    private(&place, "other", "something else");
    let mut command = place.command();
    command.args(["keys", "show", "payout", "--check"]).env("FABSTIR_KEYS__PASSWORD_FILE", "other");
    let ran = finish(command, "", LIMIT);
    assert!(ran.code == 1 && ran.err.contains("does not open"), "{ran:#?}");
}

#[test]
fn the_terminal_is_asked_twice_and_shows_nothing() {
    let place = place();
    let open = |arguments: &str| {
        let mut command = place.command();
        command.arg("keys").args(arguments.split(' '));
        Terminal::open(command)
    };
    let mut terminal = open("import payout");
    let mut shown = terminal.shows("hex digits: ", LIMIT);
    terminal.type_in(&format!("{CANARY}{ENTER}"));
    for question in ["Password for the key `payout`: ", "The same again: "] {
        shown += &terminal.shows(question, LIMIT);
        terminal.type_in(&format!("{PASSWORD}{ENTER}"));
    }
    shown += &terminal.shows("0x", LIMIT);
    assert_eq!(terminal.exit(LIMIT), 0);
    assert!(!shown.contains(&CANARY[..8]) && !shown.contains(&PASSWORD[..8]), "{shown}");
    works(&place, "show payout --check --password-file password", "");

    let mut terminal = open("new other");
    terminal.shows("Password for the key `other`: ", LIMIT);
    terminal.type_in(&format!("one{ENTER}"));
    terminal.shows("The same again: ", LIMIT);
    terminal.type_in(&format!("two{ENTER}"));
    terminal.shows("the two passwords differ", LIMIT);
    assert_eq!(terminal.exit(LIMIT), 1);

    let mut terminal = open("new other");
    terminal.shows("Password for the key `other`: ", LIMIT);
    terminal.type_in(CTRL_C);
    terminal.shows("nothing was done", LIMIT);
    assert_eq!(terminal.exit(LIMIT), 1);
    assert!(!place.path().join("data/keys/other.json").exists());
}

#[test]
fn foundrys_implementation_opens_our_files_and_we_open_its() {
    let place = place();
    works(&place, "import ours --password-file password", CANARY);
    let secret = eth_keystore::decrypt_key(place.path().join("data/keys/ours.json"), PASSWORD).expect("it opens our file");
    assert_eq!(hex::encode(secret), CANARY);

    let secret = hex::decode(CANARY).expect("hex");
    eth_keystore::encrypt_key(place.path(), &mut rand::thread_rng(), &secret, PASSWORD, Some("theirs"))
        .expect("it writes a file");
    fs::set_permissions(place.path().join("theirs"), fs::Permissions::from_mode(0o600)).expect("a mode can be set");
    let address = works(&place, "import theirs --keystore theirs --password-file password", "");
    assert_eq!(works(&place, "show ours --check --password-file password", ""), address);

    // Put in its place by hand, it works as well; it names no address.
    fs::copy(place.path().join("theirs"), place.path().join("data/keys/copied.json")).expect("a copy");
    refused(&place, "show copied", "", &["--check"]);
    assert_eq!(works(&place, "show copied --check --password-file password", ""), address);
}
