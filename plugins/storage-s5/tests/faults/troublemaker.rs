//! A server between the plugin and a real portal, which does wrong what a test says.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures::StreamExt;

/// A portal of this crate, in a process of its own with a folder of its own.
pub struct Portal {
    child: Child,
    pub url: String,
    folder: tempfile::TempDir,
}

impl Portal {
    pub fn start(arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a folder can be made");
        let (child, url) = launch(folder.path(), arguments);
        Self { child, url, folder }
    }

    /// Changes a byte of a blob on the portal's disk.
    pub fn rot(&self, id: &str) {
        let path = self.folder.path().join("blobs").join(id);
        let mut bytes = std::fs::read(&path).expect("the portal has it");
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(path, bytes).expect("it can be written");
    }
}

fn launch(folder: &Path, arguments: &[&str]) -> (Child, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_s5-portal"));
    command.args(["--listen", "127.0.0.1:0", "--dir"]).arg(folder).args(arguments).stdout(Stdio::piped());
    let mut child = command.spawn().expect("the portal starts");
    let mut line = String::new();
    BufReader::new(child.stdout.take().expect("a pipe")).read_line(&mut line).expect("a line");
    let url = line.trim().strip_prefix("Listening on ").expect("an address").to_owned();
    (child, url)
}

impl Drop for Portal {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What is done wrong.
#[derive(Debug, Clone, PartialEq)]
pub enum Trouble {
    None,
    /// One bit of every blob is another one, from this byte on.
    OtherBytes {
        from: u64,
    },
    /// Blobs end after so many bytes, as if that were all.
    Truncated {
        after: u64,
    },
    /// The connection breaks after so many bytes of a blob, in either direction.
    Breaks {
        after: u64,
    },
    /// Nothing more comes after so many bytes of a blob.
    Stalls {
        after: u64,
    },
    /// Blobs come without an end.
    Endless,
    /// The same, so slowly that nobody would wait for it: a MiB, and then another one after so long.
    Trickles {
        pause: Duration,
    },
    /// Chunks break off, and each time one more byte has come, or none.
    Dribbles,
    /// Of each chunk one byte is taken.
    Nibbles,
    Status(u16),
    /// With `Retry-After` of so many seconds, for so many requests.
    TooMany {
        seconds: u64,
        times: u32,
    },
    /// The answer to an upload names another blob.
    OtherName,
    /// Every pointer is answered with this one.
    Pointer(serde_json::Value),
    /// Moves of pointers are answered well, and forgotten.
    ForgetsPointers,
}

struct Shared {
    portal: String,
    client: reqwest::Client,
    trouble: Mutex<Trouble>,
    seen: Mutex<Vec<(Method, String, u64)>>,
}

/// The server, with the portal behind it.
pub struct Troublemaker {
    shared: Arc<Shared>,
    pub url: String,
    _portal: Portal,
    server: tokio::task::JoinHandle<()>,
}

impl Drop for Troublemaker {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Troublemaker {
    pub async fn start() -> Self {
        Self::before(Portal::start(&[])).await
    }

    pub async fn before(portal: Portal) -> Self {
        let client = reqwest::Client::builder().no_proxy().build().expect("a client");
        let shared =
            Arc::new(Shared { portal: portal.url.clone(), client, trouble: Mutex::new(Trouble::None), seen: Mutex::default() });
        let router = Router::new().fallback(serve).with_state(shared.clone());
        let listener = tokio::net::TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let server = tokio::spawn(async move { axum::serve(listener, router).await.expect("serves") });
        Self { shared, url, _portal: portal, server }
    }

    pub fn makes(&self, trouble: Trouble) {
        *self.shared.trouble.lock().unwrap() = trouble;
    }

    /// How often it was asked, since this was last asked.
    pub fn requests(&self) -> usize {
        std::mem::take(&mut *self.shared.seen.lock().unwrap()).len()
    }

    /// The bytes of bodies that have come with this method.
    pub fn bytes(&self, method: &Method) -> u64 {
        self.shared.seen.lock().unwrap().iter().filter(|(seen, _, _)| seen == method).map(|(_, _, bytes)| bytes).sum()
    }
}

async fn serve(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let path = parts.uri.path_and_query().expect("a path").as_str().to_owned();
    let place = {
        let mut seen = shared.seen.lock().unwrap();
        seen.push((parts.method.clone(), path.clone(), 0));
        seen.len() - 1
    };
    let trouble = shared.trouble.lock().unwrap().clone();
    let is_blob = parts.method == Method::GET && !path.starts_with("/s5/");
    let is_pointer = path.starts_with("/s5/registry");
    match &trouble {
        Trouble::Status(status) => return StatusCode::from_u16(*status).expect("a status").into_response(),
        Trouble::TooMany { seconds, times } => {
            if *times > 0 {
                *shared.trouble.lock().unwrap() = Trouble::TooMany { seconds: *seconds, times: times - 1 };
                return (StatusCode::TOO_MANY_REQUESTS, [(header::RETRY_AFTER, seconds.to_string())]).into_response();
            }
        }
        Trouble::Pointer(entry) if is_pointer && parts.method == Method::GET => return axum::Json(entry.clone()).into_response(),
        Trouble::ForgetsPointers if is_pointer && parts.method == Method::POST => return StatusCode::NO_CONTENT.into_response(),
        Trouble::Endless if is_blob => {
            let piece = Bytes::from(vec![1; 1 << 16]);
            return Body::from_stream(futures::stream::repeat_with(move || std::io::Result::Ok(piece.clone()))).into_response();
        }
        Trouble::Trickles { pause } if is_blob => {
            let (piece, pause) = (Bytes::from(vec![1; 1 << 20]), *pause);
            let pieces = futures::stream::repeat(()).then(move |()| {
                let piece = piece.clone();
                async move {
                    tokio::time::sleep(pause).await;
                    std::io::Result::Ok(piece)
                }
            });
            return Body::from_stream(pieces).into_response();
        }
        Trouble::Dribbles if parts.method == Method::PATCH => return StatusCode::BAD_GATEWAY.into_response(),
        Trouble::Dribbles if parts.method == Method::HEAD => {
            let asked = shared.seen.lock().unwrap().iter().filter(|(method, _, _)| *method == Method::HEAD).count();
            return [("upload-offset", (asked % 3).to_string())].into_response();
        }
        Trouble::Nibbles if parts.method == Method::PATCH => {
            let offset = parts.headers["upload-offset"].to_str().ok().and_then(|offset| offset.parse::<u64>().ok());
            return (StatusCode::NO_CONTENT, [("upload-offset", (offset.expect("a number") + 1).to_string())]).into_response();
        }
        Trouble::OtherName if path == "/s5/upload" => {
            return axum::Json(serde_json::json!({ "cid": "z4odvyg7EbrxBZ5mJjwSJEr47rdfL4jbVDrBfQnzzwNUup8s6" })).into_response();
        }
        _ => {}
    }
    let seen = shared.clone();
    let breaks = match trouble {
        Trouble::Breaks { after } => after,
        _ => u64::MAX,
    };
    let mut came = 0;
    let body = body.into_data_stream().map(move |piece| {
        let piece = piece.map_err(std::io::Error::other)?;
        came += piece.len() as u64;
        if let Some(entry) = seen.seen.lock().unwrap().get_mut(place) {
            entry.2 = came;
        }
        if came > breaks { Err(std::io::Error::other("the troublemaker breaks it off")) } else { Ok(piece) }
    });
    let mut headers = parts.headers.clone();
    headers.remove(header::HOST);
    let request = shared.client.request(parts.method, format!("{}{path}", shared.portal)).headers(headers);
    let response = match request.body(reqwest::Body::wrap_stream(body)).send().await {
        Ok(response) => response,
        // As a proxy does whose portal is gone.
        Err(_) => return StatusCode::BAD_GATEWAY.into_response(),
    };
    let (status, headers) = (response.status(), response.headers().clone());
    let mut answer = (status, keep(&headers, &trouble)).into_response();
    *answer.body_mut() = match is_blob && status.is_success() {
        true => Body::from_stream(spoilt(response, trouble)),
        false => Body::from_stream(response.bytes_stream()),
    };
    answer
}

fn keep(headers: &HeaderMap, trouble: &Trouble) -> HeaderMap {
    let mut headers = headers.clone();
    headers.remove(header::TRANSFER_ENCODING);
    if matches!(trouble, Trouble::Truncated { .. }) {
        headers.remove(header::CONTENT_LENGTH);
    }
    headers
}

/// A blob as it does not leave the portal.
fn spoilt(response: reqwest::Response, trouble: Trouble) -> impl futures::Stream<Item = std::io::Result<Bytes>> + Send {
    let pieces = response.bytes_stream().map(|piece| piece.map_err(std::io::Error::other)).boxed();
    futures::stream::unfold((pieces, 0u64, trouble), |(mut pieces, sent, trouble)| async move {
        let mut piece = match pieces.next().await? {
            Ok(piece) => piece,
            Err(error) => return Some((Err(error), (pieces, sent, Trouble::None))),
        };
        let now = sent + piece.len() as u64;
        match trouble {
            Trouble::OtherBytes { from } if now > from => {
                let mut bytes = piece.to_vec();
                bytes[from.saturating_sub(sent) as usize] ^= 1;
                piece = bytes.into();
            }
            Trouble::Truncated { after } if now > after => {
                if sent >= after {
                    return None;
                }
                piece.truncate((after - sent) as usize);
            }
            Trouble::Breaks { after } if now > after => {
                return Some((Err(std::io::Error::other("the troublemaker breaks it off")), (pieces, now, trouble)));
            }
            Trouble::Stalls { after } if now > after => tokio::time::sleep(Duration::from_secs(60)).await,
            _ => {}
        }
        Some((Ok(piece), (pieces, now, trouble)))
    })
}
