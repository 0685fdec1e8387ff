//! The command line as others meet it.

use std::fs;
use std::path::Path;

use clap::CommandFactory;

use super::*;

#[test]
fn the_definition_of_the_command_line_is_sound() {
    Cli::command().debug_assert();
}

#[test]
fn the_reference_of_the_command_line_is_up_to_date() {
    let mut page = String::from(
        "# Command line\n\nThis page is what `--help` prints, for each command. It is made from the doc comments in \
         `host/src/cli.rs`;\n`UPDATE_GOLDEN=1 cargo test` writes it anew.\n",
    );
    let mut root = Cli::command().term_width(100).disable_help_subcommand(true);
    root.build();
    describe(&mut root, &mut page);
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the host lies in the repository").join("docs/cli.md");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::create_dir_all(file.parent().expect("a file lies in a folder")).expect("folder");
        return fs::write(&file, page).expect("write");
    }
    let committed = fs::read_to_string(&file).unwrap_or_default();
    assert!(committed == page, "docs/cli.md is not up to date: run the test again with UPDATE_GOLDEN=1");
}

fn describe(command: &mut clap::Command, page: &mut String) {
    let name = command.get_bin_name().unwrap_or(command.get_name()).to_string();
    let help = command.render_long_help().to_string();
    let help: Vec<&str> = help.trim_end().lines().map(str::trim_end).collect();
    page.push_str(&format!("\n## `{name}`\n\n```text\n{}\n```\n", help.join("\n")));
    for inner in command.get_subcommands_mut().filter(|inner| !inner.is_hide_set()) {
        describe(inner, page);
    }
}

#[test]
fn every_command_says_in_one_short_line_what_it_does() {
    fn walk(command: &clap::Command) {
        for inner in command.get_subcommands() {
            let about = inner.get_about().map(ToString::to_string).unwrap_or_default();
            assert!(!about.is_empty() && about.len() <= 90, "{}: {about:?}", inner.get_name());
            walk(inner);
        }
        for argument in command.get_arguments().filter(|argument| !argument.is_hide_set()) {
            assert!(argument.get_help().is_some(), "{} of {} says nothing", argument.get_id(), command.get_name());
        }
    }
    walk(&Cli::command());
}

#[test]
fn every_command_takes_json() {
    for line in [
        "run",
        "chat hi",
        "job post --model x --max 1eth hi",
        "job status",
        "job result 1",
        "job cancel 1",
        "job challenge 1",
        "job resolve 1",
        "job accept 1",
        "earnings",
        "purchases",
        "market reclaim",
        "storage put x",
        "storage get x",
        "storage ls",
        "storage verify",
        "storage rm x",
        "cache stats",
        "cache flush",
        "keys new x",
        "keys import x",
        "keys list",
        "keys show x",
        "plugin list",
        "plugin inspect x",
        "plugin check x",
        "plugin doctor",
        "plugin lock",
        "config check",
        "config show",
        "jobs",
        "why",
    ] {
        let words = ["fabstir-node"].into_iter().chain(line.split(' ')).chain(["--json"]);
        assert!(Cli::try_parse_from(words).expect(line).json, "{line}");
    }
}

#[test]
fn a_setting_without_a_value_is_refused() {
    for wrong in ["queue", "=16"] {
        let error = Cli::try_parse_from(["fabstir-node", "config", "check", "--set", wrong]).expect_err(wrong);
        assert!(error.to_string().contains("write KEY=VALUE"), "{error}");
    }
    let value = key_and_value("plugin.a.config.url=http://x/?a=b").expect("only the first = counts");
    assert_eq!(value, ("plugin.a.config.url".to_string(), "http://x/?a=b".to_string()));
}

#[test]
fn a_reader_who_has_seen_enough_is_no_failure() {
    assert_eq!(Failure::from(io::Error::from(io::ErrorKind::BrokenPipe)).exit, 0);
    assert_eq!(Failure::from(io::Error::from(io::ErrorKind::StorageFull)).exit, Failure::FAILED);
}

#[test]
fn what_strangers_have_written_commands_no_terminal() {
    let rows = [["says".to_owned(), "all is well\x1b[2J\nset-up  sound\u{9b}31m\r".to_owned()]];
    assert_eq!(table(&rows), "says  all is well\\u{1b}[2J\\nset-up  sound\\u{9b}31m\\r");
    assert_eq!(as_text("one\n\ttwo\x07"), "one\n\ttwo\\u{7}");
    let value = json!({ "says": "\u{1b}[2J \u{9b}2J" });
    let text = as_json(&value);
    assert!(!text.contains(['\u{1b}', '\u{9b}']), "{text}");
    assert_eq!(serde_json::from_str::<Value>(&text).expect("is JSON"), value, "and reads back as it was");
}
