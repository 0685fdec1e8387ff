//! Rules of the configuration: what each mistake is answered with, and which source wins.

use std::fs;
use std::path::Path;

use super::schema::Schema;
use super::*;

/// A folder with a `plugins.toml`, and the sources that read it.
fn sources(text: &str) -> (tempfile::TempDir, Sources) {
    let dir = tempfile::tempdir().expect("a folder");
    fs::write(dir.path().join("plugins.toml"), text).expect("write");
    let sources = Sources { current_dir: dir.path().into(), ..Sources::default() };
    (dir, sources)
}

fn problems(text: &str) -> Vec<Problem> {
    sources(text).1.load().expect_err("the text has a mistake").0
}

/// The only problem of a text, as it is printed.
fn printed(text: &str) -> String {
    let problems = problems(text);
    assert_eq!(problems.len(), 1, "{}", Problems(problems));
    problems[0].to_string()
}

fn flag(key: &str, value: &str) -> Flag {
    Flag { shown: format!("--set {key}={value}"), key: key.into(), value: value.into() }
}

#[test]
fn an_unknown_key_is_named_with_its_line_and_the_nearest_known_key() {
    assert_eq!(
        printed("# a comment\n[gateway]\nlissten = \"127.0.0.1:1\"\n"),
        "error[C102]: unknown key `lissten` in [gateway]\n  \
           plugins.toml:3:1  lissten = \"127.0.0.1:1\"\n  \
           nearest           listen\n  \
           fix               write `listen` instead of `lissten`"
    );
}

#[test]
fn a_key_in_the_wrong_section_is_sent_home() {
    let text = printed("[node]\nlisten = \"127.0.0.1:1\"\n");
    assert!(text.contains("unknown key `listen` in [node]") && text.contains("`listen` belongs in [gateway]"), "{text}");
}

#[test]
fn an_unknown_section_is_named() {
    let text = printed("[gatway]\nlisten = \"127.0.0.1:1\"\n");
    assert!(
        text.contains("unknown key `gatway` in the file's top level") && text.contains("nearest           gateway"),
        "{text}"
    );
    assert!(text.contains("plugins.toml:1:1"), "{text}");
}

#[test]
fn a_key_of_a_plugin_is_named_with_the_plugin() {
    let text =
        "[[plugin]]\nid = \"a\"\nuse = \"x\"\n\n[[plugin]]\nid = \"b\"\nuse = \"x\"\nrnk = 1\nlimits = { memry = \"1GiB\" }\n";
    let found = problems(text);
    assert_eq!(found[0].message, "unknown key `rnk` in [[plugin]] 2 (id `b`)");
    assert!(found[0].place.to_string() == "plugins.toml:8:1" && found[0].nearest.as_deref() == Some("rank"), "{}", found[0]);
    assert_eq!(found[1].message, "unknown key `memry` in `limits` of [[plugin]] 2 (id `b`)");
    assert!(found[1].place.to_string() == "plugins.toml:9:12" && found[1].nearest.as_deref() == Some("memory"), "{}", found[1]);
}

#[test]
fn a_wrong_type_says_what_is_expected_and_what_was_found() {
    assert_eq!(
        printed("[gateway]\nping_interval_ms = \"soon\"\n"),
        "error[C103]: `gateway.ping_interval_ms` must be a whole number\n  \
           plugins.toml:2:1  ping_interval_ms = \"soon\"\n  \
           found             the text \"soon\"\n  \
           fix               write something like `ping_interval_ms = 5000`"
    );
    for (text, expected) in [
        ("[node]\nlog = 3\n", "`node.log` must be text in quotes"),
        ("[node]\nsafe_mode = \"yes\"\n", "`node.safe_mode` must be true or false"),
        ("[scheduler]\nqueue = 1.5\n", "`scheduler.queue` must be a whole number"),
        ("[plugins]\ndirs = \"plugins\"\n", "`plugins.dirs` must be a list in square brackets"),
        ("[plugins]\ndirs = [\"a\", 1]\n", "`plugins.dirs.1` must be text in quotes"),
        ("gateway = 1\n", "`gateway` must be a table"),
        ("[gateway]\nmax_body = true\n", "`gateway.max_body` must be a size"),
        ("[plugins.trust]\npolicy = 1\n", "`plugins.trust.policy` must be one of \"signed\", \"known\", \"any\""),
        ("[[plugin]]\nid = \"a\"\nuse = \"x\"\nconfig = 3\n", "`config` of [[plugin]] 1 (id `a`) must be a table"),
        ("[scheduler]\nqueue = nan\n", "`scheduler.queue` is not a number that can be used"),
    ] {
        let printed = printed(text);
        assert!(printed.starts_with(&format!("error[C103]: {expected}")), "{printed}");
        let line = text.trim_end().lines().count();
        assert!(printed.contains(&format!("plugins.toml:{line}:")), "{printed}");
    }
}

#[test]
fn one_plugin_table_instead_of_a_list_is_explained() {
    let text = printed("[plugin]\nid = \"a\"\nuse = \"x\"\n");
    assert!(text.contains("start each plugin with a line [[plugin]]"), "{text}");
}

#[test]
fn a_wrong_value_says_why_and_what_to_write() {
    for (text, expected) in [
        ("[gateway]\nlisten = \"localhost:80\"\n", "write \"127.0.0.1:80\""),
        ("[gateway]\nlisten = \":80\"\n", "write \"0.0.0.0:80\""),
        ("[gateway]\nlisten = \"8080\"\n", "write \"127.0.0.1:8080\""),
        ("[gateway]\nlisten = \"example.org\"\n", "it is not an IP address with a port"),
        ("[gateway]\nmax_body = \"8 megs\"\n", "`megs` is not a unit"),
        ("[gateway]\nmax_body = 0\n", "`gateway.max_body` must be at least 1"),
        ("[gateway]\nrequest_timeout_ms = -1\n", "`gateway.request_timeout_ms` must be at least 1"),
        ("[gateway]\ncors_origins = [\"https://a.example/chat\"]\n", "write \"https://a.example\""),
        ("[gateway]\ncors_origins = [\"a.example\"]\n", "an origin starts with http:// or https://"),
        ("[scheduler]\nretries = 5000000000\n", "`scheduler.retries` must be at most 4294967295"),
        ("[node]\nlog = \"inof\"\n", "write `info` instead of `inof`"),
        ("[node]\nlog = \"info,plugin::llama=loud\"\n", "`loud` is not a level"),
        ("[node]\ndata_dir = \"\"\n", "it is empty"),
        ("[plugins.trust]\npolicy = \"none\"\n", "it is not one of \"signed\", \"known\", \"any\""),
        ("[plugins.trust]\nkeys = [\"ed25519:12\"]\n", "64 hexadecimal digits must follow"),
        ("[[plugin]]\nid = \"My Llama\"\nuse = \"x\"\n", "write \"my-llama\""),
        ("[[plugin]]\nid = \"a\"\nuse = \"x\"\nisolation = \"proces\"\n", "write \"process\""),
        ("[[plugin]]\nid = \"a\"\nuse = \"\"\n", "it is empty"),
        ("[[plugin]]\nid = \"a\"\nuse = \"x\"\n[plugin.limits]\nmemory = \"1KiB\"\n", "must be at least 1MiB"),
    ] {
        let printed = printed(text);
        assert!(printed.starts_with("error[C104]: ") && printed.contains(expected), "{printed}");
    }
}

#[test]
fn a_missing_key_is_an_error_at_its_table() {
    let text = printed("\n\n[[plugin]]\nid = \"a\"\n");
    assert!(text.starts_with("error[C105]: [[plugin]] 1 (id `a`) lacks `use`\n  plugins.toml:3:1"), "{text}");
    assert!(text.contains("add a line such as `use = \"inference-llama-cpp\"`"), "{text}");
}

#[test]
fn a_plugin_that_is_named_and_not_there_is_an_error_with_the_one_that_was_meant() {
    let text = printed(
        "[cache]\nenabled = true\n[cache.shared]\nstorage = \"s5-nod\"\n\n[[plugin]]\nid = \"s5-node\"\nuse = \"storage-s5-node\"\n",
    );
    assert!(text.starts_with("error[C105]: there is no plugin with the id `s5-nod`\n  plugins.toml:4:1"), "{text}");
    assert!(text.contains("nearest           s5-node"), "{text}");
}

#[test]
fn two_plugins_with_one_id_are_an_error_that_names_both() {
    assert_eq!(
        printed("[[plugin]]\nid = \"a\"\nuse = \"x\"\n\n[[plugin]]\nuse = \"y\"\nid = \"a\"\n"),
        "error[C106]: two plugins have the id `a`\n  \
           plugins.toml:7:1  id = \"a\"\n  \
           entries           [[plugin]] at plugins.toml:1 and at plugins.toml:5\n  \
           fix               give one of them another id"
    );
}

#[test]
fn a_policy_that_could_load_nothing_is_an_error() {
    let text = printed("[plugins]\ntrust = { policy = \"signed\" }\n");
    assert!(text.starts_with("error[C107]") && text.contains("plugins.toml:2:11"), "{text}");
}

#[test]
fn broken_toml_is_an_error_with_line_and_column() {
    let text = printed("[node]\nlog = \"info\n");
    assert!(text.starts_with("error[C101]: plugins.toml is not TOML: ") && text.contains("plugins.toml:2:"), "{text}");
    let text = printed("[node]\nlog = \"info\"\nlog = \"warn\"\n");
    assert!(text.contains("plugins.toml:3:1") && text.contains("duplicate key"), "{text}");
}

#[test]
fn every_mistake_is_reported_at_once() {
    let found = problems("[node]\nlogg = \"info\"\n[gateway]\nlisten = 3\nmax_body = \"x\"\n[[plugin]]\nid = \"A\"\n");
    let codes: Vec<&str> = found.iter().map(|problem| problem.code).collect();
    assert_eq!(codes, ["C102", "C103", "C104", "C104", "C105"]);
    assert!(Problems(found).to_string().ends_with("5 errors in the configuration"));
}

#[test]
fn a_file_that_is_named_must_exist() {
    let sources = Sources { file: Some("nowhere.toml".into()), current_dir: "/".into(), ..Sources::default() };
    let text = sources.load().expect_err("there is no such file").to_string();
    assert!(text.starts_with("error[C100]: cannot read the configuration file nowhere.toml: it does not exist"), "{text}");
}

#[test]
fn without_any_file_the_defaults_hold() {
    let dir = tempfile::tempdir().expect("a folder");
    let loaded = Sources { current_dir: dir.path().into(), ..Sources::default() }.load().expect("defaults are good");
    assert_eq!(loaded.file, None);
    assert_eq!(loaded.config.gateway.listen.to_string(), "127.0.0.1:8080");
    assert_eq!(loaded.config.plugins.dirs, [dir.path().join("plugins")]);
    assert!(loaded.settings.iter().all(|setting| setting.source == Place::Default));
}

#[test]
fn the_file_in_the_home_folder_is_used_when_there_is_none_here() {
    let (home, _) = sources("");
    fs::create_dir(home.path().join("fabstir-node")).expect("folder");
    fs::write(home.path().join("fabstir-node/plugins.toml"), "[scheduler]\nqueue = 7\n").expect("write");
    let elsewhere = tempfile::tempdir().expect("a folder");
    let environment = vec![("XDG_CONFIG_HOME".to_string(), home.path().display().to_string())];
    let loaded = Sources { current_dir: elsewhere.path().into(), environment, ..Sources::default() }.load().expect("good");
    assert_eq!(loaded.config.scheduler.queue, 7);
    assert_eq!(loaded.config.base_dir, home.path().join("fabstir-node"));
}

#[test]
fn flags_win_over_the_environment_and_the_environment_over_the_file() {
    let (_dir, mut sources) = sources("[scheduler]\nqueue = 1\nqueue_tokens = 1\nretries = 1\n");
    sources.environment =
        vec![("FABSTIR_SCHEDULER__QUEUE_TOKENS".into(), "2".into()), ("FABSTIR_SCHEDULER__RETRIES".into(), "2".into())];
    sources.flags = vec![flag("scheduler.retries", "3")];
    let loaded = sources.load().expect("good");
    let scheduler = &loaded.config.scheduler;
    assert_eq!((scheduler.queue, scheduler.queue_tokens, scheduler.retries), (1, 2, 3));
    let source = |key: &str| loaded.settings.iter().find(|setting| setting.key == key).expect(key).source.to_string();
    assert_eq!(source("scheduler.queue"), "plugins.toml:2:1");
    assert_eq!(source("scheduler.queue_tokens"), "environment FABSTIR_SCHEDULER__QUEUE_TOKENS");
    assert_eq!(source("scheduler.retries"), "flag --set scheduler.retries=3");
    assert_eq!(source("gateway.listen"), "default");
}

#[test]
fn plugins_are_overridden_by_id_and_keep_their_order() {
    let text = "[[plugin]]\nid = \"z-1\"\nuse = \"x\"\nconfig = { deep = { threads = 4, list = [1, 2.5, \"a\"] } }\n\
                [[plugin]]\nid = \"a\"\nuse = \"y\"\n";
    let (_dir, mut sources) = sources(text);
    sources.environment = vec![("FABSTIR_PLUGIN__Z_1__ENABLED".into(), "false".into())];
    sources.flags = vec![
        flag("plugin.z-1.config.deep.threads", "8"),
        flag("plugin.a.limits.memory", "2GiB"),
        flag("plugin.new.use", "inference-echo"),
    ];
    let loaded = sources.load().expect("good");
    let ids: Vec<&str> = loaded.config.plugin.iter().map(|entry| entry.id.as_str()).collect();
    assert_eq!(ids, ["z-1", "a", "new"]);
    let first = &loaded.config.plugin[0];
    assert!(!first.enabled && first.origin.to_string() == "plugins.toml:1");
    assert_eq!(
        serde_json::Value::from(first.config.clone()),
        serde_json::json!({ "deep": { "threads": 8, "list": [1, 2.5, "a"] } })
    );
    assert_eq!(loaded.config.plugin[1].limits.memory, Some(Bytes(2 << 30)));
    assert_eq!(loaded.config.plugin[1].limits.start_timeout_ms, 600_000);
    assert_eq!(loaded.config.plugin[2].origin.to_string(), "environment or flags");
    let source = |key: &str| loaded.settings.iter().find(|setting| setting.key == key).expect(key).source.to_string();
    assert_eq!(source("plugin.z-1.config.deep.list"), "plugins.toml:4:34");
    assert_eq!(source("plugin.a.use"), "plugins.toml:7:1");
    assert_eq!(source("plugin.a.rank"), "default");
}

#[test]
fn mistakes_in_variables_and_flags_name_them() {
    let (_dir, mut sources) = sources("[[plugin]]\nid = \"llama\"\nuse = \"x\"\n");
    sources.environment = vec![
        ("FABSTIR_GATEWAY__LISTN".into(), "127.0.0.1:1".into()),
        ("FABSTIR_GATEWY__LISTEN".into(), "127.0.0.1:1".into()),
        ("FABSTIR_SCHEDULER__QUEUE".into(), "many".into()),
        ("FABSTIR_LISTEN".into(), "127.0.0.1:1".into()),
        ("FABSTIR_UNRELATED".into(), "1".into()),
    ];
    sources.flags = vec![flag("node.logg", "info"), flag("gateway", "x")];
    let text = sources.load().expect_err("six mistakes").to_string();
    for expected in [
        "error[C102]: unknown key `listn` in [gateway]\n  environment FABSTIR_GATEWAY__LISTN",
        "write FABSTIR_GATEWAY__LISTEN instead of FABSTIR_GATEWAY__LISTN",
        "write FABSTIR_GATEWAY__LISTEN instead of FABSTIR_GATEWY__LISTEN",
        "error[C103]: `scheduler.queue` must be a whole number\n  environment FABSTIR_SCHEDULER__QUEUE",
        "error[C102]: the environment variable FABSTIR_LISTEN is not a setting",
        "error[C102]: unknown key `logg` in [node]\n  flag --set node.logg=info",
        "error[C103]: `gateway` is not a single value",
        "6 errors in the configuration",
    ] {
        assert!(text.contains(expected), "{expected}\n--- not in\n{text}");
    }
}

#[test]
fn a_plugin_that_only_a_flag_names_must_say_which_plugin_it_is() {
    let (_dir, mut sources) = sources("[[plugin]]\nid = \"llama\"\nuse = \"x\"\n");
    sources.flags = vec![flag("plugin.lama.rank", "1")];
    let text = sources.load().expect_err("no such plugin").to_string();
    assert!(text.contains("there is no plugin with the id `lama`") && text.contains("llama"), "{text}");
}

#[test]
fn paths_start_at_the_file_and_those_of_flags_where_the_process_started() {
    let (dir, _) = sources("[node]\ndata_dir = \"state\"\n[plugins]\ntrust = { lock = \"my.lock\" }\n");
    let elsewhere = tempfile::tempdir().expect("a folder");
    let sources = Sources {
        file: Some(dir.path().join("plugins.toml")),
        current_dir: elsewhere.path().into(),
        environment: vec![("HOME".into(), "/home/op".into()), ("FABSTIR_PLUGINS__DIRS".into(), "here,~/there".into())],
        flags: vec![flag("plugins.trust.lock", "other.lock")],
    };
    let config = sources.load().expect("good").config;
    assert_eq!(config.node.data_dir, dir.path().join("state"));
    assert_eq!(config.plugins.trust.lock, elsewhere.path().join("other.lock"));
    assert_eq!(config.plugins.dirs, [elsewhere.path().join("here"), "/home/op/there".into()]);
    assert_eq!(config.base_dir, dir.path());
}

#[test]
fn state_lies_in_the_data_home() {
    assert_eq!(data_home(Some("/d".into()), Some("/h".into())), Path::new("/d/fabstir-node"));
    assert_eq!(data_home(Some("relative".into()), Some("/h".into())), Path::new("/h/.local/share/fabstir-node"));
}

#[test]
fn the_shipped_file_is_good_and_names_every_key() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the host lies in the repository");
    let sources = Sources { file: Some(root.join("plugins.toml")), current_dir: root.into(), ..Sources::default() };
    let loaded = sources.load().unwrap_or_else(|problems| panic!("{problems}"));
    let ids: Vec<&str> = loaded.config.plugin.iter().map(|entry| entry.id.as_str()).collect();
    assert_eq!(ids, ["llama", "echo", "disk", "s5", "s5-node", "groth16", "ezkl", "net"]);
    let text = fs::read_to_string(root.join("plugins.toml")).expect("read");
    for_each_key(Schema::root(), String::new(), &mut |key, schema| {
        let name = key.rsplit('.').next().unwrap_or_default();
        assert!(text.contains(&format!("{name} = ")), "plugins.toml says nothing of `{key}`");
        if let Some(default) = schema.doc().default {
            let default = default.trim_matches('`').to_string();
            assert!(
                text.contains(&format!("{name} = {default}")) || default.starts_with('$'),
                "plugins.toml does not show `{name} = {default}`"
            );
        }
    });
}

#[test]
fn the_documented_defaults_are_the_defaults() {
    let defaults = serde_json::to_value(Config::default()).expect("json");
    let entry: PluginEntry = serde_json::from_str(r#"{ "id": "a", "use": "b" }"#).expect("an entry");
    let entry = serde_json::to_value(entry).expect("json");
    for_each_key(Schema::root(), String::new(), &mut |key, schema| {
        let pointer = format!("/{}", key.replace('.', "/"));
        let real = match pointer.strip_prefix("/plugin/ID") {
            Some(rest) => entry.pointer(rest),
            None => defaults.pointer(&pointer),
        };
        let documented = schema.doc().default;
        match (real, documented) {
            _ if key == "node.data_dir" || key == "plugin.ID.id" || key == "plugin.ID.use" => {}
            (None, documented) => assert_eq!(documented, None, "{key}"),
            (Some(real), documented) => assert_eq!(documented, Some(format!("`{real}`")), "{key}"),
        }
        let example = schema.doc().example.unwrap_or_else(|| panic!("{key} has no example"));
        let name = key.rsplit('.').next().unwrap_or_default();
        assert!(example.starts_with(&format!("{name} = ")), "the example of {key} sets another key: {example}");
    });
}

#[test]
fn every_example_in_the_documentation_is_good() {
    for_each_key(Schema::root(), String::new(), &mut |key, schema| {
        let example = schema.doc().example.unwrap_or_default();
        let table = key.rsplit_once('.').map_or("", |(table, _)| table);
        let mut text = match table.strip_prefix("plugin.ID") {
            None => format!("[{table}]\n{example}\n"),
            Some(rest) => {
                let required: String = ["id = \"x\"", "use = \"x\""]
                    .iter()
                    .filter(|line| !line.starts_with(&example[..3]))
                    .map(|line| format!("{line}\n"))
                    .collect();
                let rest = if rest.is_empty() { String::new() } else { format!("[plugin{rest}]\n") };
                format!("[[plugin]]\n{required}{rest}{example}\n")
            }
        };
        if key == "plugins.trust.policy" {
            text.push_str(&format!("keys = [\"ed25519:{}\"]\n", "0".repeat(64)));
        }
        let (_dir, sources) = sources(&text);
        sources.load().unwrap_or_else(|problems| panic!("{key}: {problems}"));
    });
}

#[test]
fn the_reference_page_is_up_to_date() {
    let mut page = String::from(
        "# Configuration\n\nOne file, `plugins.toml`: the one that `--config` names, else the one in the current folder, else \
         `$XDG_CONFIG_HOME/fabstir-node/plugins.toml`.\nLater sources win: defaults, the file, environment variables, flags. \
         `fabstir-node config show` prints every value with its source.\n\nThe variable of a key is `FABSTIR_`, the section, `__` and \
         the key, in capitals: `FABSTIR_GATEWAY__LISTEN`.\nFor a plugin its id stands between, with `_` for `-`: \
         `FABSTIR_PLUGIN__LLAMA__RANK`. The flag is `--set gateway.listen=127.0.0.1:0` or `--set plugin.llama.rank=5`.\n\n\
         This page is made from the doc comments in `host/src/config.rs`; `UPDATE_GOLDEN=1 cargo test` writes it anew.\n",
    );
    let mut table = None;
    for_each_key(Schema::root(), String::new(), &mut |key, schema| {
        let (section, name) = key.rsplit_once('.').unwrap_or(("", key));
        let header = match section.strip_prefix("plugin.ID") {
            Some("") => "[[plugin]]".to_string(),
            Some(rest) => format!("[plugin{rest}]"),
            None => format!("[{section}]"),
        };
        if table.as_ref() != Some(&header) {
            page.push_str(&format!("\n## `{header}`\n"));
            table = Some(header);
        }
        let doc = schema.doc();
        page.push_str(&format!("\n### `{name}`\n\n{}\n\n- Type: {}.", doc.meaning, schema.expects()));
        for (label, text) in [("Default", doc.default), ("Example", doc.example.map(|example| format!("`{example}`")))] {
            if let Some(text) = text {
                page.push_str(&format!("\n- {label}: {text}."));
            }
        }
        page.push('\n');
    });
    compare("docs/configuration.md", &page);
}

/// Calls `each` with the dotted name and the schema of every key that is not a table, in the order of the documentation.
fn for_each_key(schema: Schema, prefix: String, each: &mut dyn FnMut(&str, Schema)) {
    let mut tables = Vec::new();
    for name in schema.properties().into_iter().flatten().map(|(name, _)| name.as_str()) {
        let inner = schema.property(name).expect("a property of its own table");
        let key = if prefix.is_empty() { name.to_string() } else { format!("{prefix}.{name}") };
        match inner.items().filter(|entry| entry.properties().is_some()) {
            Some(entry) => tables.push((entry, format!("{key}.ID"))),
            None if inner.properties().is_some() => tables.push((inner, key)),
            None => each(&key, inner),
        }
    }
    for (inner, key) in tables {
        for_each_key(inner, key, each);
    }
}

/// Compares with a committed file, or rewrites it where `UPDATE_GOLDEN` is set.
fn compare(path: &str, text: &str) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the host lies in the repository").join(path);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::create_dir_all(file.parent().expect("a file lies in a folder")).expect("folder");
        return fs::write(&file, text).expect("write");
    }
    let committed = fs::read_to_string(&file).unwrap_or_default();
    assert!(committed == text, "{path} is not up to date: run the test again with UPDATE_GOLDEN=1");
}
