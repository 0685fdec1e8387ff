//! Blobs, through the shipped binary: on the disk, and on S5 portals that are killed, lie, and come back.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use fabstir_tests::portal::Portal;
use fabstir_tests::{Node, Place, Ran};
use serde_json::Value;

const MIB: u64 = 1 << 20;

/// A folder on the disk, and these portals.
fn config(portals: &[&Portal]) -> String {
    let portals: Vec<String> = portals.iter().map(|portal| format!("{{ url = '{}' }}", portal.url)).collect();
    format!(
        "[[plugin]]\nid = 'disk'\nuse = 'storage-disk'\n\n[[plugin]]\nid = 's5'\nuse = 'storage-s5'\nenabled = false\n\
         config = {{ portals = [{}], single_max_bytes = 1048576, chunk_bytes = 1048576 }}\n",
        portals.join(", ")
    )
}

/// A file of bytes that look the same nowhere twice.
fn file(place: &Place, name: &str, size: u64) -> (PathBuf, String) {
    let path = place.path().join(name);
    let file = fs::File::create(&path).expect("a file can be made");
    let mut bytes = blake3::Hasher::new().update(name.as_bytes()).finalize_xof();
    let (mut hasher, mut piece) = (blake3::Hasher::new(), vec![0; MIB as usize]);
    for at in (0..size).step_by(piece.len()) {
        let piece = &mut piece[..(size - at).min(MIB) as usize];
        bytes.fill(piece);
        file.write_all_at(piece, at).expect("there is room");
        hasher.update(piece);
    }
    (path, hasher.finalize().to_hex().to_string())
}

fn id_of(path: &Path) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(fs::File::open(path).expect("the file is there")).expect("and can be read");
    hasher.finalize().to_hex().to_string()
}

/// The message of an error with this code and exit code.
#[track_caller]
fn refusal(ran: Ran, exit: i32, code: &str) -> String {
    assert_eq!(ran.code, exit, "{ran:#?}");
    let error = &ran.json()["error"];
    assert_eq!(error["code"], code, "{error:#}");
    error["message"].as_str().expect("a message").to_owned()
}

#[test]
fn file_goes_to_a_plugin_and_comes_back() {
    let portal = Portal::start();
    let place = Place::new(&config(&[&portal]));
    let (_, id) = file(&place, "in", 3 * MIB + 5);
    for plugin in ["disk", "s5"] {
        let storage = |arguments: &[&str]| place.run(&[&["storage"], arguments, &["--plugin", plugin]].concat());
        let put = storage(&["put", "in", "--json"]);
        assert_eq!(
            (put.code, put.json()["id"].as_str(), put.json()["size"].as_u64()),
            (0, Some(&*id), Some(3 * MIB + 5)),
            "{put:#?}"
        );
        assert_eq!(storage(&["put", "in"]).out.trim(), id, "a second put is no fault");
        assert_eq!(storage(&["ls"]).out.trim(), format!("{id}  {}", 3 * MIB + 5));
        assert_eq!(storage(&["ls", "--json"]).json(), serde_json::json!([{ "id": id, "size": 3 * MIB + 5 }]));

        let got = storage(&["get", &id, "-o", "out", "--json"]);
        assert_eq!((got.code, id_of(&place.path().join("out"))), (0, id.clone()), "{got:#?}");
        assert!(!place.path().join("out.part").exists());
        let verified = storage(&["verify"]);
        assert_eq!((verified.code, verified.out.trim()), (0, &*format!("ok   {id}  {}", 3 * MIB + 5)), "{verified:#?}");
        assert_eq!(storage(&["verify", &id, "--json"]).json()[0]["ok"], true);

        place.file("word", "a word");
        let word = storage(&["put", "word"]).out.trim().to_owned();
        assert_eq!(storage(&["get", &word]).out, "a word", "without a file, the bytes are the output");
        assert_eq!(storage(&["ls"]).out.lines().count(), 2);
        fs::remove_file(place.path().join("out")).expect("it is there");
    }
    assert_eq!(fs::read(portal.blob(&id)).expect("the portal has it"), fs::read(place.path().join("in")).expect("it is there"));
}

#[test]
fn private_file_is_readable_with_its_key_alone() {
    let portal = Portal::start();
    let place = Place::new(&config(&[&portal]));
    let (_, plain_id) = file(&place, "secret", MIB + 5);
    let storage = |arguments: &[&str]| place.run(&[&["storage"], arguments, &["--plugin", "s5", "--json"]].concat());
    let put = storage(&["put", "secret", "--private"]).json();
    let (id, key) = (put["id"].as_str().expect("an id"), put["key"].as_str().expect("a key"));
    let sealed = fs::read(portal.blob(id)).expect("the portal has it");
    assert_eq!(sealed.len() as u64, MIB + 5 + 5 * 16, "a tag for each chunk of 256 KiB");
    let plain = fs::read(place.path().join("secret")).expect("it is there");
    assert!(!sealed.windows(64).any(|part| part == &plain[..64]));

    assert_eq!(storage(&["get", id, "-o", "open", "--key", key]).code, 0);
    assert_eq!(id_of(&place.path().join("open")), plain_id);
    place.file("key", format!("{key}\n"));
    fs::remove_file(place.path().join("open")).expect("it is there");
    assert_eq!(storage(&["get", id, "-o", "open", "--key-file", "key"]).code, 0);
    assert_eq!(id_of(&place.path().join("open")), plain_id);

    let again = storage(&["put", "secret", "--private"]).json();
    assert!(again["key"] != key && again["id"] != id, "each file has a key of its own");
    let other = storage(&["get", id, "-o", "wrong", "--key", again["key"].as_str().expect("a key")]);
    assert!(refusal(other, 1, "corrupt").contains("not sealed with this key"));
    assert!(!place.path().join("wrong").exists());
    assert_eq!(place.run(&["storage", "get", id, "--key", "x"]).code, 2);
}

#[test]
fn each_failure_names_its_cause() {
    let portal = Portal::start();
    let place = Place::new(&config(&[&portal]));
    place.file("in", "bytes");
    let nowhere = "0".repeat(64);
    for plugin in ["disk", "s5"] {
        let storage = |arguments: &[&str]| place.run(&[&["storage"], arguments, &["--plugin", plugin, "--json"]].concat());
        assert!(refusal(storage(&["get", &nowhere, "-o", "out"]), 1, "not_found").contains(&nowhere));
        assert!(refusal(storage(&["get", "no-id", "-o", "out"]), 1, "invalid").contains("64"));
        assert!(!place.path().join("out").exists() && !place.path().join("out.part").exists());
        assert!(refusal(storage(&["put", "nothing"]), 1, "io").contains("nothing"));
        assert!(refusal(storage(&["put", "."]), 1, "io").contains("regular file"));
        let verified = storage(&["verify", &nowhere]);
        assert_eq!((verified.code, &verified.json()[0]["ok"]), (1, &Value::Bool(false)), "{verified:#?}");
    }
    assert!(refusal(place.run(&["storage", "ls", "--plugin", "x", "--json"]), 3, "no_storage").contains("`x`"));
    assert!(refusal(Place::new("").run(&["storage", "ls", "--json"]), 3, "no_storage").contains("storage-s5"));
    drop(portal);
    let away = place.run(&["storage", "put", "in", "--plugin", "s5", "--json"]);
    assert!(refusal(away, 4, "unreachable").contains("127.0.0.1"));
}

#[test]
fn blob_is_deleted_wherever_it_is_and_the_command_says_where_that_was() {
    let portal = Portal::start();
    let place = Place::new(&config(&[&portal]).replace("enabled = false", "enabled = true"));
    let (_, id) = file(&place, "in", 3 * MIB);
    for plugin in ["disk", "s5"] {
        place.ran(&["storage", "put", "in", "--plugin", plugin]);
    }
    place.file("word", "a word");
    let word = place.ran(&["storage", "put", "word", "--plugin", "s5"]).out.trim().to_owned();
    let deleted = place.ran(&["storage", "rm", &id]).out;
    assert!(deleted.contains(&format!("deleted  {id}  disk")) && deleted.contains(&format!("deleted  {id}  s5")), "{deleted}");
    assert!(!portal.blob(&id).exists() && portal.blob(&word).exists());
    let again = place.run(&["storage", "rm", &id, &word, "--json"]);
    assert_eq!(again.code, 1, "{again:#?}");
    let is_deleted = |blob: &str, plugin: &str| {
        let outcomes = again.json();
        let told = outcomes.as_array().expect("a list").iter().find(|told| told["id"] == blob && told["plugin"] == plugin);
        told.expect("each is told")["deleted"].as_bool()
    };
    assert_eq!(
        (is_deleted(&id, "s5"), is_deleted(&word, "disk"), is_deleted(&word, "s5")),
        (Some(false), Some(false), Some(true))
    );
    assert!(place.run(&["storage", "rm", &id]).out.contains("nowhere"));

    place.ran(&["storage", "put", "in", "--plugin", "disk"]);
    drop(portal);
    let away = place.run(&["storage", "rm", &id, "--plugin", "disk"]);
    assert_eq!((away.code, away.out.trim()), (0, &*format!("deleted  {id}  disk")), "{away:#?}");
}

#[test]
fn mistyped_id_leaves_what_has_come_alone() {
    let place = Place::new(&config(&[]).replace("portals = []", "portals = [{ url = 'http://127.0.0.1:9' }]"));
    place.file("in", "all of the bytes");
    let id = place.ran(&["storage", "put", "in", "--plugin", "disk"]).out.trim().to_owned();
    place.file("out.part", "all of the");
    for wrong in [&id[1..], &id.to_uppercase(), "no-id"] {
        let got = place.run(&["storage", "get", wrong, "-o", "out", "--plugin", "disk", "--json"]);
        assert!(refusal(got, 1, "invalid").contains("64"));
        assert_eq!(fs::read(place.path().join("out.part")).expect("it is there"), b"all of the");
    }
    let got = place.ran(&["storage", "get", &id, "-o", "out", "--plugin", "disk", "--json"]).json();
    assert_eq!(got["resumed_at"], 10, "{got:#}");
}

/// Starts a command, and kills it as soon as there is something to see.
fn kill_when(place: &Place, arguments: &[&str], mut seen: impl FnMut() -> bool) -> bool {
    let mut child: Child = place.command().args(arguments).stdout(Stdio::null()).spawn().expect("it starts");
    let began = Instant::now();
    loop {
        if let Some(status) = child.try_wait().expect("a child can be waited for") {
            assert!(status.success(), "it failed before it was killed: {status}");
            return false;
        }
        if seen() {
            child.kill().expect("it runs");
            return child.wait().expect("a child can be waited for").code().is_none();
        }
        assert!(began.elapsed() < Duration::from_secs(60), "nothing to see within a minute");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn put_that_is_killed_goes_on_where_the_portal_is() {
    let portal = Portal::start();
    let place = Place::new(&config(&[&portal]));
    let put = ["storage", "put", "large", "--plugin", "s5"];
    // One that was done before it could be killed shows nothing: then another file is put.
    let killed = (200..205).find_map(|mib| {
        let (_, id) = file(&place, "large", mib * MIB);
        kill_when(&place, &put, || portal.unfinished() > 20 * MIB).then_some((id, mib * MIB))
    });
    let (id, whole) = killed.expect("one of them is killed on its way");
    let there = portal.unfinished();
    assert!(there > 20 * MIB && there < whole, "{there}");
    let ls = place.run(&["storage", "ls", "--plugin", "s5"]);
    assert!(ls.code == 0 && !ls.out.contains(&id), "what has not come whole is not listed: {ls:#?}");

    let again = place.run(&[&put[..], &["--log", "info"]].concat());
    assert_eq!((again.code, again.out.trim()), (0, &*id), "{again:#?}");
    let line = again.err.lines().find(|line| line.contains("goes on where it broke off")).unwrap_or_else(|| panic!("{again:#?}"));
    let offset =
        line.split("offset=").nth(1).and_then(|rest| rest.split(|c: char| !c.is_ascii_digit()).next()?.parse::<u64>().ok());
    assert!(offset.is_some_and(|offset| offset >= 20 * MIB), "{line}");
    println!("killed with {} MiB at the portal; the next put began at byte {offset:?}", there / MIB);
    assert_eq!(id_of(&portal.blob(&id)), id);
}

#[test]
fn get_that_is_killed_goes_on_from_its_part() {
    let portal = Portal::start();
    let place = Place::new(&config(&[&portal]));
    let (_, id) = file(&place, "large", 200 * MIB);
    place.ran(&["storage", "put", "large", "--plugin", "s5"]);
    let part = place.path().join("out.part");
    let size = || fs::metadata(&part).map_or(0, |file| file.len());
    let get = ["storage", "get", &id, "-o", "out", "--plugin", "s5", "--json"];
    // One that was done before it could be killed shows nothing.
    let killed = (0..5).any(|_| {
        // There is one only after such a one.
        let _ = fs::remove_file(place.path().join("out"));
        kill_when(&place, &get, || size() > 20 * MIB)
    });
    assert!(killed, "it was done each time before it could be killed");
    assert!(!place.path().join("out").exists(), "a file that has not come whole has another name");
    let there = size();
    let again = place.ran(&get).json();
    assert_eq!(again["resumed_at"], there, "{again:#}");
    assert_eq!(id_of(&place.path().join("out")), id);
    println!("killed with {} MiB in the file; the next get took the rest", there / MIB);

    // A part that is of another blob is found out at the end, and stands in nobody's way.
    fs::write(&part, vec![0; 1000]).expect("there is room");
    assert!(refusal(place.run(&get), 1, "corrupt").contains("not of this blob"));
    assert_eq!(place.ran(&get).json()["resumed_at"], 0);
    fs::write(&part, vec![0; 201 << 20]).expect("there is room");
    assert_eq!(place.ran(&get).json()["resumed_at"], 0, "one that is longer than the blob is found out at the start");
}

#[test]
fn portal_that_lies_is_found_out_and_another_one_read() {
    let (lying, good) = (Portal::start(), Portal::start());
    let place = Place::new(&config(&[&lying]));
    let (_, id) = file(&place, "in", 5 * MIB);
    place.ran(&["storage", "put", "in", "--plugin", "s5"]);
    let blob = fs::File::options().write(true).open(lying.blob(&id)).expect("the portal has it");
    blob.write_all_at(b"a lie", 3 * MIB).expect("it can be written");

    let verified = place.run(&["storage", "verify", "--plugin", "s5"]);
    assert_eq!(verified.code, 1, "{verified:#?}");
    assert!(verified.out.starts_with(&format!("BAD  {id}")) && verified.out.contains(&lying.url), "{verified:#?}");
    let got = place.run(&["storage", "get", &id, "-o", "out", "--plugin", "s5", "--json"]);
    assert!(refusal(got, 1, "corrupt").contains("goes on from there"));
    assert_eq!(
        fs::metadata(place.path().join("out.part")).expect("what came is kept").len(),
        3 * MIB,
        "and nothing that was not checked"
    );

    // The blob on a second portal, put there by somebody else: the same command goes on there.
    let other = Place::new(&config(&[&good]));
    file(&other, "in", 5 * MIB);
    other.ran(&["storage", "put", "in", "--plugin", "s5"]);
    place.configure(&config(&[&lying, &good]));
    let got = place.ran(&["storage", "get", &id, "-o", "out", "--plugin", "s5", "--json"]).json();
    assert_eq!(got["resumed_at"], 3 * MIB);
    assert_eq!(id_of(&place.path().join("out")), id);
    place.ran(&["storage", "verify", "--plugin", "s5"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_work_beside_a_running_node() {
    let portal = Portal::start();
    let config = config(&[&portal]).replace("enabled = false", "enabled = true");
    let node = Node::start(&format!("{config}\n[[plugin]]\nid = 'echo'\nuse = 'inference-echo'\n")).await;
    let (_, id) = file(&node.place, "in", 3 * MIB);
    for plugin in ["disk", "s5"] {
        let put = node.place.run(&["storage", "put", "in", "--plugin", plugin]);
        assert_eq!((put.code, put.out.trim()), (0, &*id), "{put:#?}");
        assert!(node.place.ran(&["storage", "ls", "--plugin", plugin]).out.contains(&id));
    }
    assert_eq!(node.get("/health").await.status, 200);
}

/// Runs a command to its end; what it has printed, and the most memory that it had.
fn peak(place: &Place, arguments: &[&str]) -> (String, u64) {
    let mut child = place.command().args(arguments).stdout(Stdio::piped()).spawn().expect("it starts");
    let status = format!("/proc/{}/status", child.id());
    let mut highest = 0;
    // The kernel's figure only ever rises, so that what is missed is what happens between the last look and the end.
    while child.try_wait().expect("a child can be waited for").is_none() {
        let text = fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
        highest = highest.max(kib.unwrap_or(0) * 1024);
        std::thread::sleep(Duration::from_millis(1));
    }
    let output = child.wait_with_output().expect("a child can be waited for");
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    (String::from_utf8_lossy(&output.stdout).into_owned(), highest)
}

/// A GiB up to a portal and down again, in no more memory than 64 MiB over that of a command that moves nothing.
#[test]
fn gigabyte_goes_up_and_down_in_little_memory() {
    const ALLOWED: u64 = 64 * MIB;
    let portal = Portal::start();
    // Chunks of the size that is the default.
    let place = Place::new(&config(&[&portal]).replace("chunk_bytes = 1048576", "chunk_bytes = 16777216"));
    let (_, id) = file(&place, "large", 1024 * MIB);
    let (_, idle) = peak(&place, &["storage", "ls", "--plugin", "s5"]);
    let portal_idle = fabstir_tests::process::memory(portal.pid());
    let began = Instant::now();
    let (out, up) = peak(&place, &["storage", "put", "large", "--plugin", "s5"]);
    let up_took = began.elapsed();
    assert_eq!(out.trim(), id);
    let began = Instant::now();
    let (_, down) = peak(&place, &["storage", "get", &id, "-o", "out", "--plugin", "s5"]);
    let down_took = began.elapsed();
    assert_eq!(id_of(&place.path().join("out")), id);
    let portal_grown = fabstir_tests::process::memory(portal.pid()).saturating_sub(portal_idle);
    let over = |peak: u64| peak.saturating_sub(idle);
    println!(
        "1 GiB: up in {:.1} s with {} MiB over the {} MiB of an idle command, down in {:.1} s with {} MiB; the portal grew by {} MiB",
        up_took.as_secs_f32(),
        over(up) / MIB,
        idle / MIB,
        down_took.as_secs_f32(),
        over(down) / MIB,
        portal_grown / MIB
    );
    assert!(over(up) <= ALLOWED && over(down) <= ALLOWED, "{up} and {down} bytes, {idle} idle");
}
