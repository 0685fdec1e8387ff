//! The chat in the terminal.

use fabstir_tests::place::finish;
use fabstir_tests::terminal::{CTRL_C, CTRL_D, ENTER, Terminal};
use fabstir_tests::{LIMIT, Node, Place, eventually, tiny_chat};

const ECHO: &str = "[[plugin]]\nid = 'echo'\nuse = 'inference-echo'\nconfig = { delay_ms = 30 }\n";

/// Runs `chat` without holding up the test's own runtime.
async fn chat(node: &Node, arguments: &[&str], input: &'static str) -> fabstir_tests::Ran {
    let mut command = node.place.command();
    command.args(["chat", "--url", &node.url]).args(arguments);
    tokio::task::spawn_blocking(move || finish(command, input, 2 * LIMIT)).await.expect("the command was run")
}

#[tokio::test(flavor = "multi_thread")]
async fn one_question_gets_one_answer() {
    let node = Node::start(&format!("{}{ECHO}", tiny_chat())).await;
    node.serves("tiny-chat").await;
    node.serves("echo").await;
    let ran = chat(&node, &["--model", "tiny-chat", "--temperature", "0", "What is the capital of France?"], "").await;
    assert!(ran.code == 0 && ran.out.contains("Paris") && ran.out.ends_with('\n') && ran.err.is_empty(), "{ran:#?}");
    let ran = chat(&node, &["--model", "echo"], "from a pipe\n").await;
    assert_eq!((ran.code, ran.out.as_str()), (0, "from a pipe\n"), "{ran:#?}");
    let ran = chat(&node, &["--model", "echo", "--json", "one two"], "").await;
    assert_eq!(
        (ran.code, ran.json()["answer"].as_str(), ran.json()["finish_reason"].as_str()),
        (0, Some("one two"), Some("stop")),
        "{ran:#?}"
    );
    let ran = chat(&node, &["--model", "echo", "--max-tokens", "1", "--verbose", "one two"], "").await;
    assert!(ran.code == 0 && ran.out == "one \n" && ran.err.contains("1 token in"), "{ran:#?}");

    let ran = chat(&node, &["--model", "gpt-9", "hello"], "").await;
    assert!(ran.code == 1 && ran.err.contains("does not serve `gpt-9`") && ran.err.contains("echo"), "{ran:#?}");
    let ran = chat(&node, &["--model", "echo"], "").await;
    assert!(ran.code == 2 && ran.err.contains("the prompt is empty"), "{ran:#?}");
}

#[test]
fn without_a_node_the_chat_says_how_to_start_one() {
    let place = Place::new("");
    // Port 9 is the discard service, which nobody runs.
    let ran = place.run(&["chat", "--url", "http://127.0.0.1:9", "hello"]);
    assert!(ran.code == 4 && ran.err.contains("fabstir-node run"), "{ran:#?}");
    let ran = place.run(&["chat", "--url", "nonsense://x", "hello"]);
    assert!(ran.code == 2 && ran.err.contains("is not the address of a node"), "{ran:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conversation_streams_stops_at_ctrl_c_and_leaves_at_ctrl_d() {
    let node = Node::start(ECHO).await;
    let mut command = node.place.command();
    command.args(["chat", "--url", &node.url]);
    let mut terminal = Terminal::open(command);
    terminal.shows(">>> ", LIMIT);
    terminal.type_in(&format!("hello there{ENTER}"));
    terminal.shows("hello there", LIMIT);
    terminal.shows("hello there", LIMIT);
    terminal.shows(">>> ", LIMIT);

    // Far longer than anyone waits: it comes word by word, and Ctrl-C ends it and not the program.
    let long = "word ".repeat(1000);
    terminal.type_in(&format!("\"\"\"start {long}\"\"\"{ENTER}"));
    eventually("it is being answered", LIMIT, async || (node.running("echo").await == 1.0).then_some(())).await;
    terminal.shows("start ", LIMIT);
    terminal.type_in(CTRL_C);
    terminal.shows("(stopped)", LIMIT);
    terminal.shows(">>> ", LIMIT);
    eventually("the slot is free", LIMIT, async || (node.running("echo").await == 0.0).then_some(())).await;

    // The next message is answered, in the same conversation.
    terminal.type_in(&format!("after that{ENTER}"));
    terminal.shows("after that", LIMIT);
    terminal.shows("after that", LIMIT);
    terminal.shows(">>> ", LIMIT);
    terminal.type_in(&format!("/model{ENTER}"));
    terminal.shows("echo", LIMIT);
    terminal.shows(">>> ", LIMIT);
    terminal.type_in(CTRL_D);
    assert_eq!(terminal.exit(LIMIT), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conversation_remembers_what_was_said() {
    let node = Node::start(&tiny_chat()).await;
    let mut command = node.place.command();
    command.args(["chat", "--url", &node.url, "--temperature", "0"]);
    let mut terminal = Terminal::open(command);
    terminal.shows(">>> ", LIMIT);
    terminal.type_in(&format!("What is the capital of France?{ENTER}"));
    terminal.shows("Paris", LIMIT);
    terminal.shows(">>> ", LIMIT);
    // Only with what was said before does this question have an answer.
    terminal.type_in(&format!("And of Peru?{ENTER}"));
    terminal.shows("Lima", LIMIT);
    terminal.shows(">>> ", LIMIT);
    terminal.type_in(CTRL_D);
    assert_eq!(terminal.exit(LIMIT), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_gives_the_terminal_no_commands() {
    let node = Node::start(ECHO).await;
    // A new title for the window, and letters that run the other way.
    let question = "before \u{1b}]0;taken over\u{7} between \u{202e} after";
    let mut command = node.place.command();
    command.args(["chat", "--url", &node.url, question]);
    let mut terminal = Terminal::open(command);
    let shown = terminal.shows("after", LIMIT);
    assert!(shown.contains("]0;taken over"), "what would be a command is text: {shown:?}");
    assert!(!shown.contains(['\u{7}', '\u{202e}']), "{shown:?}");
    assert_eq!(terminal.exit(LIMIT), 0);
    // A pipe gets what was said.
    let mut command = node.place.command();
    command.args(["chat", "--url", &node.url, question]);
    let ran = tokio::task::spawn_blocking(move || finish(command, "", LIMIT)).await.expect("the command was run");
    assert_eq!(ran.out.trim_end(), question);
}
