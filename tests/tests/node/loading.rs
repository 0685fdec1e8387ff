//! What lies in the plugin folder may be anything; the node says what, and serves the rest.

use std::path::Path;
use std::time::{Duration, Instant};

use ed25519_dalek::{Signer, SigningKey};
use fabstir_tests::rogue::Rogue;
use fabstir_tests::{LIMIT, Node, Place, library};
use serde_json::json;

const ECHO: &str = "[[plugin]]\nid = 'echo'\nuse = 'inference-echo'\n";

fn entry(id: &str, file: &Path) -> String {
    format!("[[plugin]]\nid = '{id}'\nuse = '{}'\n", file.display())
}

/// An entry for the plugin that goes wrong on demand.
fn faulty(id: &str, keys: &str, config: &str) -> String {
    format!("[[plugin]]\nid = '{id}'\nuse = 'inference-faulty'\n{keys}\n[plugin.config]\n{config}\n")
}

/// Files that must not be loaded: an id, the error's code, and words of its sentence.
fn bad_files(folder: &Path) -> (String, Vec<(&'static str, &'static str, &'static str)>) {
    let good = std::fs::read(library("inference-echo")).expect("the plugin can be read");
    std::fs::write(folder.join("truncated.so"), &good[..good.len() / 2]).expect("a file can be written");
    std::fs::write(folder.join("text.so"), "hello").expect("a file can be written");
    std::fs::write(folder.join("empty.so"), "").expect("a file can be written");
    let rogues = [
        ("no-plugin", Rogue { manifest: None, ..Rogue::default() }),
        ("damaged", Rogue { manifest: Some(b"{\"format\":1,".to_vec()), ..Rogue::default() }),
        ("later-format", Rogue::claiming(|manifest| manifest["format"] = json!(2))),
        (
            "wrong-kind",
            Rogue::claiming(|manifest| manifest["provides"] = json!([{ "kind": "toaster", "version": "1.0", "methods": [] }])),
        ),
        ("wrong-version", Rogue::claiming(|manifest| manifest["provides"][0]["version"] = json!("7.0"))),
        ("wrong-port", Rogue::claiming(|manifest| manifest["port"] = json!("2.0"))),
        ("wrong-machine", Rogue::claiming(|manifest| manifest["arch"] = json!("pdp11"))),
        ("panic-abort", Rogue::claiming(|manifest| manifest["panic"] = json!("abort"))),
        ("no-root", Rogue::default()),
        (
            "odd-root",
            Rogue { declarations: "char _1as_0lib_1header_0root_bmodule_bloader[4096] = {1, 2, 3};", ..Rogue::default() },
        ),
        (
            "missing-symbol",
            Rogue { declarations: "extern void nowhere(void); void (*needed)(void) = nowhere;", ..Rogue::default() },
        ),
        ("aborts", Rogue { initialiser: "write(2, \"no further\\n\", 11); abort();", ..Rogue::default() }),
        ("exits", Rogue { initialiser: "_exit(0);", ..Rogue::default() }),
    ];
    let mut config = format!(
        "{}{}{}{}",
        entry("missing", &folder.join("nowhere.so")),
        entry("truncated", &folder.join("truncated.so")),
        entry("text", &folder.join("text.so")),
        entry("empty", &folder.join("empty.so")),
    );
    for (id, rogue) in rogues {
        config += &entry(id, &rogue.build(folder, id));
    }
    config += "[[plugin]]\nid = 'unknown'\nuse = 'inference-ecko'\n";
    let expected = vec![
        ("missing", "P101", "there is no file"),
        ("truncated", "P104", "the library is truncated or damaged"),
        ("text", "P103", "the file is not a shared library"),
        ("empty", "P103", "the file is not a shared library"),
        ("no-plugin", "P105", "the library is not a fabstir-node plugin"),
        ("damaged", "P104", "its manifest is not JSON"),
        ("later-format", "P201", "this node reads format 1"),
        ("wrong-kind", "P206", "provides no kind that this node uses"),
        ("wrong-version", "P203", "speaks another version of inference"),
        ("wrong-port", "P205", "was built for another plugin port"),
        ("wrong-machine", "P202", "was built for another machine"),
        ("panic-abort", "P204", "was built with `panic = \"abort\"`"),
        ("no-root", "P404", "exports no plugin root"),
        ("odd-root", "P404", "the plugin cannot be opened"),
        ("missing-symbol", "P404", "undefined symbol: nowhere"),
        ("aborts", "P403", "no further"),
        ("exits", "P405", "the plugin's description cannot be read"),
        ("unknown", "P101", "inference-echo"),
    ];
    (config, expected)
}

/// The part of the log that is about one plugin's failed start: an error with its rows, of which the last line names the plugin.
fn said_of(log: &str, id: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    let starts = (0..lines.len()).filter(|at| lines[*at].contains("error[P"));
    let mut blocks = starts.map(|at| {
        let rows = lines[at + 1..].iter().take_while(|line| line.starts_with("  "));
        std::iter::once(&lines[at]).chain(rows).copied().collect::<Vec<_>>().join("\n")
    });
    let field = format!("plugin={id}");
    blocks.find(|block| block.split_whitespace().any(|word| word == field)).unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_files_are_told_apart_and_the_good_plugin_serves() {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let (bad, expected) = bad_files(folder.path());
    let node = Node::launch(Place::new(&format!("{ECHO}{bad}")), &[]);
    node.healthy().await;
    assert_eq!(node.ask("echo", "still here").await, "still here");
    for (id, code, words) in expected {
        let found = async || (!said_of(&node.log(), id).is_empty()).then_some(());
        fabstir_tests::eventually(&format!("an error about {id} is logged"), LIMIT, found).await;
        let said = said_of(&node.log(), id);
        assert!(
            said.contains(&format!("error[{code}]")) && said.contains(words),
            "{id}: {code} and {words:?} were expected in\n{said}"
        );
    }
    assert_eq!(node.models().await, ["echo"]);
    assert!(node.workers().len() == 1, "{:?}", node.workers());
}

#[test]
fn doctor_names_the_step_and_the_code_of_every_bad_file() {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let (bad, expected) = bad_files(folder.path());
    let place = Place::new(&format!("{ECHO}{bad}"));
    let ran = place.run(&["plugin", "doctor"]);
    assert_eq!(ran.code, 1, "{ran:#?}");
    for (id, code, words) in &expected {
        let verdict = ran.out.split("\n\n").find(|verdict| verdict.split_whitespace().next() == Some(id));
        let verdict = verdict.unwrap_or_else(|| panic!("nothing is said of {id}:\n{}", ran.out));
        assert!(
            verdict.contains("FAILED") && verdict.contains(&format!("error[{code}]")),
            "{id}: {code} was expected in\n{verdict}"
        );
        // The file's own name says nothing of what is wrong with it.
        let said: String = verdict.lines().filter(|line| !line.trim_start().starts_with("file ")).collect();
        assert!(said.contains(words), "{id}: {words:?} was expected in\n{verdict}");
    }
    let ran = place.run(&["plugin", "doctor", "echo"]);
    assert_eq!(ran.code, 0, "{ran:#?}");
    let ran = place.run(&["plugin", "doctor", "wrong-kind", "--json"]);
    assert_eq!(ran.code, 1, "{ran:#?}");
    assert!(ran.json().to_string().contains("P206"), "{}", ran.out);
    let ran = place.run(&["plugin", "doctor", "nobody"]);
    assert!(ran.code != 0 && ran.err.contains("nobody"), "{ran:#?}");
}

#[test]
fn inspect_reads_a_manifest_without_running_anything() {
    let place = Place::new(ECHO);
    let echo = library("inference-echo");
    let ran = place.run(&["plugin", "inspect", &echo.display().to_string()]);
    assert_eq!(ran.code, 0, "{ran:#?}");
    for words in ["inference-echo", "inference 1.0", "generate", "delay_ms"] {
        assert!(ran.out.contains(words), "{words} is missing in\n{}", ran.out);
    }
    let by_name = place.run(&["plugin", "inspect", "inference-echo", "--json"]);
    assert_eq!(by_name.code, 0, "{by_name:#?}");
    assert!(by_name.json().to_string().contains("\"inference-echo\""), "{}", by_name.out);
    // It would abort if it were opened. Without --probe, and not trusted, nothing opens it.
    let aborts = Rogue { initialiser: "abort();", ..Rogue::default() }.build(place.path(), "aborts");
    let untrusted = Place::new(&format!("{ECHO}\n[plugins.trust]\npolicy = 'known'\n"));
    let ran = untrusted.run(&["plugin", "inspect", &aborts.display().to_string()]);
    assert_eq!(ran.code, 0, "{ran:#?}");
    assert!(ran.out.contains("rogue") && ran.out.contains("a rogue"), "{}", ran.out);
    let ran = untrusted.run(&["plugin", "inspect", "/etc/hostname"]);
    assert_eq!(ran.code, 1, "{ran:#?}");
    assert!(ran.err.contains("P103"), "{ran:#?}");
}

#[test]
fn list_names_the_configured_and_the_installed() {
    let place = Place::new(&format!("{ECHO}[[plugin]]\nid = 'off'\nuse = 'storage-disk'\nenabled = false\n"));
    let ran = place.run(&["plugin", "list"]);
    assert_eq!(ran.code, 0, "{ran:#?}");
    for words in ["echo", "inference-echo", "off", "storage-disk", "inference-llama-cpp"] {
        assert!(ran.out.contains(words), "{words} is missing in\n{}", ran.out);
    }
    let json = place.run(&["plugin", "list", "--json"]);
    assert!(json.json().to_string().contains("inference-llama-cpp"), "{}", json.out);
}

#[test]
fn check_runs_the_conformance_suite_on_a_file() {
    let place = Place::new(ECHO);
    let echo = library("inference-echo").display().to_string();
    let ran = place.run(&["plugin", "check", &echo, "--only", "describe-is-stable"]);
    let names = place.run(&["plugin", "check", &echo, "--only", "no-such-check"]);
    assert!(ran.code == 0 && ran.out.to_lowercase().contains("pass"), "{ran:#?}\n{names:#?}");
    assert!(names.code != 0, "{names:#?}");
    let text = place.file("libtext.so", "hello").display().to_string();
    let ran = place.run(&["plugin", "check", &text]);
    assert_eq!(ran.code, 1, "{ran:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn locked_files_are_loaded_and_changed_ones_are_not() {
    let place = Place::new(
        "[plugins]\ndirs = ['own']\ntrust.policy = 'known'\n[[plugin]]\nid = 'echo'\nuse = 'own/libinference_echo.so'\n",
    );
    let bytes = std::fs::read(library("inference-echo")).expect("the plugin can be read");
    let file = place.file("own/libinference_echo.so", &bytes);
    let ran = place.run(&["plugin", "doctor", "echo"]);
    assert!(ran.code == 1 && ran.out.contains("P303") && ran.out.contains("plugin lock"), "{ran:#?}");
    let ran = place.run(&["plugin", "lock"]);
    assert_eq!(ran.code, 0, "{ran:#?}");
    let lock = std::fs::read_to_string(place.path().join("plugins.lock")).expect("the lock was written");
    assert!(lock.contains("inference-echo") && lock.contains("sha256"), "{lock}");

    let node = Node::launch(place, &[]);
    node.healthy().await;
    assert_eq!(node.ask("echo", "locked").await, "locked");
    // One bit of the code, far behind the headers. A running node goes on with its own copy.
    let mut tampered = bytes;
    let middle = tampered.len() / 2;
    tampered[middle] ^= 1;
    std::fs::write(&file, &tampered).expect("the file can be changed");
    assert_eq!(node.ask("echo", "still locked").await, "still locked");

    let node = node.relaunch(&[]);
    node.logged(&["error[P302]", "`inference-echo` is not the file that was locked", "fabstir-node plugin lock"]).await;
    node.logged(&["The plugin is quarantined"]).await;
    let health = node.get("/health").await;
    assert_eq!((health.status, health.body["error"]["message"].as_str()), (503, Some("No model is served")), "{health:#?}");
    let ran = node.place.run(&["plugin", "doctor", "echo"]);
    assert!(ran.code == 1 && ran.out.contains("P302"), "{ran:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn only_files_signed_by_a_trusted_key_are_loaded() {
    let key = SigningKey::from_bytes(&[7; 32]);
    let stranger = SigningKey::from_bytes(&[8; 32]);
    let trusted = format!("ed25519:{}", hex::encode(key.verifying_key().as_bytes()));
    let mut config = format!("[plugins.trust]\npolicy = 'signed'\nkeys = ['{trusted}']\n");
    for id in ["signed", "unsigned", "foreign", "broken", "changed"] {
        config += &format!("[[plugin]]\nid = '{id}'\nuse = 'own/{id}.so'\n");
    }
    let place = Place::new(&config);
    let bytes = std::fs::read(library("inference-echo")).expect("the plugin can be read");
    for id in ["signed", "unsigned", "foreign", "broken"] {
        place.file(&format!("own/{id}.so"), &bytes);
    }
    let mut changed = bytes.clone();
    let middle = changed.len() / 2;
    changed[middle] ^= 1;
    place.file("own/changed.so", &changed);
    place.file("own/signed.so.sig", key.sign(&bytes).to_bytes());
    place.file("own/changed.so.sig", key.sign(&bytes).to_bytes());
    place.file("own/foreign.so.sig", stranger.sign(&bytes).to_bytes());
    place.file("own/broken.so.sig", "short");
    let node = Node::launch(place, &[]);
    node.healthy().await;
    assert_eq!(node.ask("echo", "signed").await, "signed");
    for (id, code, words) in [
        ("unsigned", "P304", "the plugin is not signed"),
        ("broken", "P305", "is not an Ed25519 signature"),
        ("foreign", "P306", "no trusted key made the plugin's signature"),
        ("changed", "P306", "no trusted key made the plugin's signature"),
    ] {
        fabstir_tests::eventually(id, LIMIT, async || (!said_of(&node.log(), id).is_empty()).then_some(())).await;
        let said = said_of(&node.log(), id);
        assert!(said.contains(&format!("error[{code}]")) && said.contains(words), "{id}:\n{said}");
    }
    assert_eq!(node.workers().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_library_that_hangs_when_opened_is_given_up_and_holds_nobody_up() {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let hangs = Rogue { initialiser: "for (;;) pause();", ..Rogue::default() }.build(folder.path(), "hangs");
    let began = Instant::now();
    let node = Node::start(&format!("{}{ECHO}", entry("hangs", &hangs))).await;
    assert_eq!(node.ask("echo", "at once").await, "at once");
    assert!(began.elapsed() < Duration::from_secs(15), "the good plugin waited for the bad one");
    node.logged(&["error[P402]", "the plugin did not answer within 20 s of being opened"]).await;
    assert_eq!(node.ask("echo", "and after").await, "and after");
}

#[tokio::test(flavor = "multi_thread")]
async fn plugins_that_go_wrong_while_they_start_are_told_and_the_good_one_serves() {
    let config = [
        ECHO.to_owned(),
        faulty("panics", "", "init = 'panic'"),
        faulty("errs", "", "init = 'error'"),
        faulty("hangs", "limits = { start_timeout_ms = 700 }", "init = 'hang'"),
        faulty("aborts", "", "init = 'abort'"),
        faulty("exits-in-load", "", "load = 'exit'"),
        faulty("panics-in-load", "", "load = 'panic'"),
        faulty("hangs-in-load", "limits = { start_timeout_ms = 700 }", "load = 'hang'"),
        faulty("allocates", "limits = { memory = '256MiB' }", "init = 'allocate'"),
        faulty("in-process", "isolation = 'in-process'", "init = 'panic'"),
    ]
    .concat();
    let node = Node::start(&config).await;
    for (id, code, words) in [
        ("panics", "P503", "panic"),
        ("errs", "P503", "an error was asked for"),
        ("hangs", "P607", "was not ready within 700 ms"),
        ("aborts", "P604", "SIGABRT"),
        ("exits-in-load", "P604", "status 3"),
        ("panics-in-load", "P606", "panic"),
        ("hangs-in-load", "P60", "700 ms"),
        ("allocates", "P604", "memory allocation"),
        ("in-process", "P503", "panic"),
    ] {
        fabstir_tests::eventually(id, LIMIT, async || (!said_of(&node.log(), id).is_empty()).then_some(())).await;
        let said = said_of(&node.log(), id);
        assert!(
            said.contains(&format!("error[{code}")) && said.contains(words),
            "{id}: {code} and {words:?} were expected in\n{said}"
        );
        assert_eq!(node.ask("echo", "one two").await, "one two");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plugin_that_takes_the_node_along_is_not_started_again_by_the_next_one() {
    let bad = faulty("bad", "isolation = 'in-process'", "init = 'abort'");
    let mut node = Node::launch(Place::new(&format!("{ECHO}{bad}")), &[]);
    assert_eq!(node.exit(LIMIT).await, -libc::SIGABRT);
    let node = node.relaunch(&[]);
    node.healthy().await;
    assert_eq!(node.ask("echo", "without it").await, "without it");
    node.logged(&["error[P608]", "the node ended last time while plugin `bad` was being started", "isolation = \"process\""])
        .await;
    assert_eq!(node.models().await, ["echo"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_key_of_a_plugin_is_named_with_the_nearest_one() {
    let node = Node::start(&format!("{ECHO}[[plugin]]\nid = 'other'\nuse = 'inference-echo'\nconfig = {{ delay = 3 }}\n")).await;
    node.logged(&["error[P502]", "unknown key `config.delay`", "config.delay_ms", "plugins.toml:"]).await;
    assert_eq!(node.ask("echo", "one").await, "one");
    let ran = node.place.run(&["plugin", "doctor", "other"]);
    assert!(ran.code == 1 && ran.out.contains("P502") && ran.out.contains("config.delay_ms"), "{ran:#?}");
}

#[test]
fn a_wrong_configuration_ends_with_code_3_and_names_file_line_and_key() {
    let place = Place::new("");
    for (text, code, words) in [
        ("[gateway]\nlisen = '127.0.0.1:0'\n", "C102", "plugins.toml:2:1"),
        ("[gateway]\nlisen = '127.0.0.1:0'\n", "C102", "write `listen` instead of `lisen`"),
        ("[gateway\n", "C101", "plugins.toml:1"),
        ("[gateway]\nmax_body = 'much'\n", "C10", "gateway.max_body"),
        ("[[plugin]]\nid = 'a'\nuse = 'x'\n[[plugin]]\nid = 'a'\nuse = 'y'\n", "C106", "`a`"),
        ("[[plugin]]\nid = 'a'\n", "C105", "use"),
    ] {
        place.file("plugins.toml", text);
        for command in [&["run"][..], &["config", "check"][..]] {
            let ran = place.run(command);
            assert_eq!(ran.code, 3, "{text}{ran:#?}");
            assert!(ran.err.contains(code) && ran.err.contains(words), "{text}{code} and {words} were expected in\n{}", ran.err);
        }
    }
    let ran = place.run(&["run", "--config", "nowhere.toml"]);
    assert!(ran.code == 3 && ran.err.contains("nowhere.toml"), "{ran:#?}");
    let ran = place.run(&["run", "--lisen", "x"]);
    assert_eq!(ran.code, 2, "{ran:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn safe_mode_starts_bundled_plugins_and_no_others() {
    let place = Place::new(&format!("{ECHO}[[plugin]]\nid = 'own'\nuse = 'own/libinference_faulty.so'\n"));
    place.file("own/libinference_faulty.so", std::fs::read(library("inference-faulty")).expect("the plugin can be read"));
    let node = Node::launch(place, &["--safe-mode"]);
    node.healthy().await;
    node.logged(&["error[P101]", "is not a bundled plugin", "the node runs in safe mode"]).await;
    assert_eq!(node.models().await, ["echo"]);
    let node = node.relaunch(&[]);
    node.serves("faulty").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_plugins_that_serve_one_model_share_it_by_rank() {
    let slow = "[[plugin]]\nid = 'second'\nuse = 'inference-faulty'\nrank = -1\nconfig = { model = 'echo' }\n";
    let node = Node::start(&format!("{ECHO}{slow}")).await;
    node.logged(&["Plugin ready. plugin=second", "Plugin ready. plugin=echo"]).await;
    // The first would say the word back; the second would take it for a command.
    assert_eq!(node.ask("echo", "!error").await, "!error");
    let before = node.worker("inference-echo", None).await;
    fabstir_tests::process::send(before, libc::SIGKILL);
    // While the first restarts the second takes over: nobody notices.
    for _ in 0..20 {
        assert_eq!(node.ask("echo", "one two").await, "one two");
    }
    node.worker("inference-echo", Some(before)).await;
}
