//! A portal on this machine, with the part of S5's portal API that `storage-s5` uses: for trying and testing.
//!
//! It keeps blobs, unfinished uploads and pointers as files, and checks what it takes: hashes, offsets, signatures, revisions. It knows no
//! other nodes and no accounts; with a token, whoever changes something must bring it.

mod blobs;
mod registry;
mod reply;
mod tus;

use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::{delete, get, patch, post};
use clap::Parser;
use tokio::sync::Mutex;

use reply::Refusal;

/// A portal on this machine with the part of S5's portal API that storage-s5 uses, for trying and testing.
///
/// Its address is the only line on standard output. Ctrl-C ends it.
#[derive(Debug, Parser)]
#[command(name = "s5-portal", version)]
struct Arguments {
    /// The folder of the blobs and pointers; made if it is missing.
    #[arg(long, value_name = "FOLDER")]
    dir: PathBuf,

    /// Where clients connect. Port 0 takes a free one.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:5050")]
    listen: SocketAddr,

    /// A file with a token in its only line: uploads, deletions and pointers then need it.
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
}

/// What the handlers share.
struct Portal {
    dir: PathBuf,
    token: Option<String>,
    /// Held while a pointer is changed.
    changing: Mutex<()>,
}

type Shared = State<Arc<Portal>>;

fn main() -> ExitCode {
    let threads = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let result = threads
        .map_err(|error| format!("cannot start threads: {error}"))
        .and_then(|threads| threads.block_on(serve(Arguments::parse())));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("error: {why}");
            ExitCode::FAILURE
        }
    }
}

async fn serve(arguments: Arguments) -> Result<(), String> {
    for folder in ["blobs", "incoming", "tus", "registry"] {
        let folder = arguments.dir.join(folder);
        std::fs::create_dir_all(&folder).map_err(|error| format!("cannot make the folder {}: {error}", folder.display()))?;
    }
    let token = arguments.token_file.map(|file| {
        let text = std::fs::read_to_string(&file).map_err(|error| format!("cannot read {}: {error}", file.display()))?;
        match text.trim() {
            "" => Err(format!("{} holds no token", file.display())),
            token => Ok(token.to_owned()),
        }
    });
    let portal = Arc::new(Portal { dir: arguments.dir, token: token.transpose()?, changing: Mutex::new(()) });
    let guarded = Router::new()
        .route("/s5/upload", post(blobs::upload))
        .route("/s5/upload/tus", post(tus::create))
        .route("/s5/upload/tus/{upload}", patch(tus::append).head(tus::offset))
        .route("/s5/delete/{cid}", delete(blobs::delete))
        .route("/s5/registry", post(registry::set))
        .layer(middleware::from_fn_with_state(portal.clone(), with_token));
    let open = Router::new().route("/s5/registry", get(registry::get)).route("/{cid}", get(blobs::download));
    // Blobs go to the disk as they come; what is read into memory has limits of its own.
    let router = guarded.merge(open).layer(DefaultBodyLimit::disable()).with_state(portal);
    let failed = |error| format!("cannot listen on {}: {error}", arguments.listen);
    let listener = tokio::net::TcpListener::bind(arguments.listen).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    let said = writeln!(std::io::stdout().lock(), "Listening on http://{address}");
    said.map_err(|error| format!("cannot say where it listens: {error}"))?;
    let end = async {
        // Where signals cannot be heard, the default action of Ctrl-C ends the process.
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending().await
        }
    };
    axum::serve(listener, router).with_graceful_shutdown(end).await.map_err(|error| format!("cannot serve: {error}"))
}

/// Lets a request through that brings the token, in the header or the address.
async fn with_token(State(portal): Shared, request: Request, next: Next) -> Result<Response, Refusal> {
    let Some(token) = &portal.token else { return Ok(next.run(request).await) };
    let header = request.headers().get("authorization").and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
    let query = request.uri().query().and_then(|query| query.split('&').find_map(|part| part.strip_prefix("auth_token=")));
    match header.or(query) {
        // Hashes are compared, so that the time it takes says nothing about the token.
        Some(brought) if blake3::hash(brought.as_bytes()) == blake3::hash(token.as_bytes()) => Ok(next.run(request).await),
        _ => Err(Refusal::new(401, "a token is needed: send Authorization: Bearer TOKEN")),
    }
}
