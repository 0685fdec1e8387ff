//! `fabstir-node chat`.

use std::io::{self, IsTerminal, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use clap::Args;
use rustyline::error::ReadlineError;
use rustyline::history::FileHistory;
use rustyline::{Config as EditorConfig, Editor};
use serde_json::{Value, json};

use super::account::SpendArgs;
use super::network::{Local, NetworkArgs, Paid, seconds, threads};
use super::{Failure, as_text};
use crate::config::Config;

mod client;
mod conversation;

use client::{Answer, ChatError, Client, Event};
use conversation::{Command, Conversation};

/// Talks to a running node in the terminal.
///
/// With a PROMPT, or with text piped in, it prints one answer and leaves. Otherwise it is a conversation: Ctrl-C stops an answer,
/// Ctrl-C or Ctrl-D at the prompt leaves, and lines between two `"""` make one message. /help lists the commands.
#[derive(Debug, Args)]
pub struct Chat {
    /// What to ask; without it, standard input is the prompt unless it is a terminal.
    prompt: Option<String>,

    /// The model to ask; without it the first one that the node serves.
    #[arg(long, short, value_name = "NAME")]
    model: Option<String>,

    /// The node's address; without it http:// and the configuration's gateway.listen.
    #[arg(long, value_name = "URL")]
    url: Option<String>,

    /// A text that tells the model how to behave.
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,

    /// How freely words are chosen: 0 always takes the likeliest, 1 follows the model's own odds.
    #[arg(long, value_name = "NUMBER")]
    temperature: Option<f32>,

    /// The longest answer, in tokens.
    #[arg(long, value_name = "TOKENS")]
    max_tokens: Option<u32>,

    /// Makes the choice of words repeatable.
    #[arg(long, value_name = "NUMBER")]
    seed: Option<u64>,

    /// Prints the time to the first token and the tokens per second after each answer.
    #[arg(long, short)]
    verbose: bool,

    /// Asks nodes of the network for the model, instead of a node that runs here; needs --model.
    #[arg(long, requires = "model", conflicts_with = "url")]
    network: bool,

    /// How long to look for a node of the network, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 60.0, requires = "network")]
    wait: f64,

    #[command(flatten)]
    spend: SpendArgs,

    #[command(flatten)]
    reach: NetworkArgs,
}

/// How long a busy or loading node is waited for.
const PATIENCE: Duration = Duration::from_secs(600);

impl Chat {
    pub fn execute(self, json: bool) -> Result<(), Failure> {
        // Where the address is given, a broken configuration does not stop a chat: only the history would lie in its data folder.
        let config = match (&self.url, self.reach.config.load()) {
            (_, Ok(loaded)) => Some(loaded.config),
            (None, Err(failure)) => return Err(failure),
            (Some(_), Err(_)) => None,
        };
        let mut url = self.url.clone().or_else(|| config.as_ref().map(address)).unwrap_or_default();
        // One thread drives connections all the time: a dropped answer must reach the node while this one waits for the keyboard.
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime =
            runtime.map_err(|error| Failure::new(Failure::FAILED, "runtime", format!("cannot start a thread: {error}")))?;
        let looks = self.network.then(|| seconds(self.wait)).transpose()?;
        let mut local = None;
        if let (true, Some(config), Some(model)) = (self.network, &config, &self.model) {
            let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
            self.reach.prepare(json)?;
            let purse = self.spend.purse(config)?;
            // On threads of its own, which go on while this one waits for the keyboard.
            let threads = threads()?;
            let opened = threads.block_on(Local::open(&self.reach, config, model, any, purse))?;
            url = format!("http://{}", opened.address);
            local = Some((threads, opened));
        }
        let client = Client::new(&url)?;
        let session = Session {
            pays: self.spend.is_some(),
            looks,
            client,
            runtime,
            model: String::new(),
            conversation: self.conversation(),
            verbose: self.verbose,
            last: None,
            tokens: 0,
        };
        let prompt = match self.prompt {
            Some(prompt) => Some(prompt),
            None if io::stdin().is_terminal() => None,
            None => Some(piped()?),
        };
        if json && prompt.is_none() {
            let message = "--json answers one prompt: give it as an argument, or pipe it in";
            return Err(Failure::new(Failure::USAGE, "usage", message));
        }
        let answer = session.talk(prompt, self.model, json, config.as_ref());
        let pays = self.spend.is_some();
        let paid = local.and_then(|(threads, local)| {
            let paid = threads.block_on(async {
                tokio::select! {
                    paid = local.close(Duration::from_secs(1)) => paid,
                    _ = tokio::signal::ctrl_c(), if pays => None,
                }
            });
            threads.shutdown_background();
            paid
        });
        tell(answer, paid, json)
    }

    fn conversation(&self) -> Conversation {
        let mut conversation = Conversation { system: self.system.clone(), ..Conversation::default() };
        conversation.settings = [
            ("temperature", self.temperature.map(|value| json!(value))),
            ("max_tokens", self.max_tokens.map(|value| json!(value))),
            ("seed", self.seed.map(|value| json!(value))),
        ]
        .into_iter()
        .filter_map(|(key, value)| Some((key.to_string(), value?)))
        .collect();
        conversation
    }
}

/// The address at which a node with this configuration is reached from its own machine.
fn address(config: &Config) -> String {
    let mut listen = config.gateway.listen;
    match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => listen.set_ip(Ipv4Addr::LOCALHOST.into()),
        IpAddr::V6(ip) if ip.is_unspecified() => listen.set_ip(Ipv6Addr::LOCALHOST.into()),
        _ => {}
    }
    format!("http://{listen}")
}

/// What a model says commands no terminal.
fn for_terminal(text: &str) -> String {
    as_text(&text.replace('\r', ""))
}

fn piped() -> Result<String, Failure> {
    let mut text = String::new();
    let read = io::stdin().lock().read_to_string(&mut text);
    read.map_err(|error| Failure::new(Failure::FAILED, "io", format!("cannot read the prompt from standard input: {error}")))?;
    match text.trim() {
        "" => Err(Failure::new(Failure::USAGE, "usage", "the prompt is empty: give it as an argument, or pipe it in")),
        prompt => Ok(prompt.to_string()),
    }
}

/// Prints what is left to say once everything is over: the answer for programs, and the receipts.
fn tell(answer: Result<Option<Value>, Failure>, paid: Option<Paid>, json: bool) -> Result<(), Failure> {
    // Also where there is no answer.
    if let (Some(paid), false) = (&paid, json) {
        paid.tell();
    }
    let Some(mut answer) = answer? else { return Ok(()) };
    if let (Some(paid), Some(answer)) = (paid, answer.as_object_mut()) {
        answer.insert("purchases".into(), json!(paid.receipts));
    }
    Ok(writeln!(io::stdout(), "{answer:#}")?)
}

/// A chat with one node.
struct Session {
    /// Whether sessions are to be given back when the chat is stopped.
    pays: bool,
    /// How long nodes of the network are looked for, where those are asked.
    looks: Option<Duration>,
    client: Client,
    runtime: tokio::runtime::Runtime,
    model: String,
    conversation: Conversation,
    verbose: bool,
    last: Option<Answer>,
    /// Tokens of all answers so far.
    tokens: u64,
}

impl Session {
    /// The model that was asked for, if the node serves it, or the first that it serves.
    fn pick_model(&self, wanted: Option<String>) -> Result<String, ChatError> {
        let mut ask = || self.runtime.block_on(self.client.models());
        let served = match self.looks {
            Some(within) => self.patiently(within, &mut ask).map_err(|error| match error {
                ChatError::GaveUp { .. } => ChatError::Nobody { within },
                error => error,
            }),
            None => self.patiently(PATIENCE, &mut ask),
        }?;
        match wanted {
            Some(wanted) if served.contains(&wanted) => Ok(wanted),
            Some(wanted) => Err(ChatError::UnknownModel { wanted, served }),
            None => served.first().cloned().ok_or(ChatError::NoModel),
        }
    }

    /// One answer, or a conversation. Returns the answer where a program is to read it.
    fn talk(
        mut self,
        prompt: Option<String>,
        model: Option<String>,
        json: bool,
        config: Option<&Config>,
    ) -> Result<Option<Value>, Failure> {
        self.model = self.pick_model(model)?;
        match prompt {
            Some(prompt) => self.one_shot(prompt, json),
            None => self.converse(config).map(|()| None),
        }
    }

    fn one_shot(&mut self, prompt: String, json: bool) -> Result<Option<Value>, Failure> {
        self.conversation.ask(prompt);
        let request = self.conversation.request(&self.model);
        let mut out = io::stdout();
        let is_terminal = out.is_terminal();
        let mut begun = false;
        // Nobody catches Ctrl-C here unless money is to be given back: it ends the process, and the node notices that the connection is
        // gone.
        let pays = self.pays;
        let answer = self.patiently(PATIENCE, &mut || {
            let show = |event: Event<'_>| match (event, json) {
                (Event::Text(text), false) => {
                    begun = true;
                    let text = if is_terminal { for_terminal(text) } else { text.to_owned() };
                    out.write_all(text.as_bytes()).and_then(|()| out.flush())
                }
                _ => Ok(()),
            };
            self.runtime.block_on(async {
                tokio::select! {
                    answer = self.client.answer(&request, show) => answer,
                    _ = tokio::signal::ctrl_c(), if pays => Err(ChatError::Stopped),
                }
            })
        });
        if begun || (answer.is_ok() && !json) {
            writeln!(out)?;
        }
        let answer = answer?;
        if json {
            return Ok(Some(answer.to_json(&self.model)));
        }
        self.tell_speed(&answer);
        Ok(None)
    }

    fn converse(mut self, config: Option<&Config>) -> Result<(), Failure> {
        let mut editor = editor()?;
        let history = config.map(|config| config.node.data_dir.join("chat_history"));
        if let Some(history) = &history {
            // The first chat has no history to load.
            let _ = editor.load_history(history);
        }
        println!("{} at {}. /help lists the commands, Ctrl-D leaves.", self.model, self.client.url());
        loop {
            let line = match read_message(&mut editor) {
                Ok(line) => line,
                Err(ReadlineError::Eof | ReadlineError::Interrupted) => break,
                Err(error) => return Err(Failure::new(Failure::FAILED, "io", format!("cannot read from the terminal: {error}"))),
            };
            if line.trim().is_empty() {
                continue;
            }
            let _ = editor.add_history_entry(line.as_str());
            match Command::parse(&line) {
                None => self.turn(line)?,
                Some(Ok(Command::Quit)) => break,
                Some(Ok(command)) => self.obey(command)?,
                Some(Err(reason)) => println!("{reason}"),
            }
        }
        if let Some(history) = &history {
            let saved = history
                .parent()
                .map_or(Ok(()), std::fs::create_dir_all)
                .map_err(ReadlineError::from)
                .and_then(|()| editor.save_history(history));
            if let Err(error) = saved {
                eprintln!("the history of this chat is not kept: cannot write {}: {error}", history.display());
            }
        }
        Ok(())
    }

    /// One question and its answer. An answer that fails or is stopped leaves the conversation usable.
    fn turn(&mut self, prompt: String) -> Result<(), Failure> {
        self.conversation.ask(prompt);
        let request = self.conversation.request(&self.model);
        let mut shown = String::new();
        let result = self.patiently(PATIENCE, &mut || {
            let show = |event: Event<'_>| {
                let Event::Text(text) = event;
                shown.push_str(text);
                let mut out = io::stdout().lock();
                out.write_all(for_terminal(text).as_bytes()).and_then(|()| out.flush())
            };
            self.runtime.block_on(async {
                tokio::select! {
                    answer = self.client.answer(&request, show) => answer,
                    // The answer's future is dropped, and with it the connection: the node stops within one step.
                    _ = tokio::signal::ctrl_c() => Err(ChatError::Stopped),
                }
            })
        });
        println!();
        self.conversation.answered(shown);
        match result {
            Ok(answer) => {
                self.tell_speed(&answer);
                self.tokens += answer.tokens.unwrap_or(0);
                self.last = Some(answer);
            }
            Err(ChatError::Stopped) => println!("(stopped)"),
            Err(ChatError::Output(error)) => return Err(error.into()),
            Err(error) => eprintln!("error: {error}"),
        }
        Ok(())
    }

    fn obey(&mut self, command: Command) -> Result<(), Failure> {
        match command {
            Command::Help => println!("{}", conversation::HELP),
            Command::Clear => {
                self.conversation.messages.clear();
                println!("The conversation starts anew.");
            }
            Command::System(text) => {
                println!(
                    "{}",
                    if text.is_some() { "The model is told so from now on." } else { "The model is told nothing from now on." }
                );
                self.conversation.system = text;
            }
            Command::Model(None) => match self.runtime.block_on(self.client.models()) {
                Ok(served) => println!("{}", served.join("\n")),
                Err(error) => eprintln!("error: {error}"),
            },
            Command::Model(wanted) => match self.pick_model(wanted) {
                Ok(model) => {
                    println!("{model} answers from now on.");
                    self.model = model;
                }
                Err(error) => eprintln!("error: {error}"),
            },
            Command::Stats => {
                let last = self.last.as_ref().map_or("There was no answer yet.".to_string(), Answer::speed);
                println!("last answer: {last}\nall answers: {} tokens", self.tokens);
            }
            Command::Quit => {}
        }
        Ok(())
    }

    fn tell_speed(&self, answer: &Answer) {
        if self.verbose {
            eprintln!("{}", answer.speed());
        }
    }

    /// Repeats `ask` while the node is busy or loading, at most for so long, and says what it waits for.
    fn patiently<T>(&self, limit: Duration, ask: &mut dyn FnMut() -> Result<T, ChatError>) -> Result<T, ChatError> {
        let started = Instant::now();
        let mut told = String::new();
        loop {
            let (reason, pause) = match ask() {
                Err(ChatError::Busy { retry_after, message }) => {
                    (format!("{message} Trying again in {} s.", retry_after.as_secs_f32()), retry_after)
                }
                Err(ChatError::Loading { message }) => (format!("{message} Waiting."), Duration::from_millis(500)),
                other => return other,
            };
            if started.elapsed() + pause > limit {
                return Err(ChatError::GaveUp { reason, after: started.elapsed() });
            }
            if told != reason {
                eprintln!("{reason}");
                told = reason;
            }
            let stopped = self.runtime.block_on(async {
                tokio::select! {
                    () = tokio::time::sleep(pause) => false,
                    // In a one-shot chat nobody listens for the signal before the first wait.
                    _ = tokio::signal::ctrl_c() => true,
                }
            });
            if stopped {
                return Err(ChatError::Stopped);
            }
        }
    }
}

fn editor() -> Result<Editor<(), FileHistory>, Failure> {
    let settings = EditorConfig::builder().max_history_size(1000).and_then(|settings| settings.history_ignore_dups(true));
    settings
        .and_then(|settings| Editor::with_config(settings.build()))
        .map_err(|error| Failure::new(Failure::FAILED, "io", format!("cannot use the terminal: {error}")))
}

/// One line, or all lines between two `"""`.
fn read_message(editor: &mut Editor<(), FileHistory>) -> Result<String, ReadlineError> {
    const QUOTES: &str = "\"\"\"";
    let first = editor.readline(">>> ")?;
    let Some(start) = first.trim_start().strip_prefix(QUOTES) else { return Ok(first) };
    let mut text = start.to_string();
    while !text.trim_end().ends_with(QUOTES) {
        let line = editor.readline("... ")?;
        text.push('\n');
        text.push_str(&line);
    }
    Ok(text.trim_end().trim_end_matches(QUOTES).trim_matches('\n').to_string())
}
