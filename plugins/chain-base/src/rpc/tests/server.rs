//! A JSON-RPC server that does what a test wants, right or wrong.

use std::net::SocketAddr;
use std::sync::Arc;

use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// What a server does with a request.
pub enum Reply {
    Result(Value),
    Error(i64, &'static str),
    /// A result under an id that nobody has used.
    WrongId,
    /// Status line, further headers and body, as they are.
    Http(&'static str, &'static str, String),
    /// An answer that is announced and then cut off.
    CutOff,
    /// So many bytes of an answer, of unknown length.
    Flood(usize),
    Never,
}

/// Serves until it is dropped.
pub struct Server {
    pub at: SocketAddr,
    /// The methods that were asked for.
    pub asked: Arc<Mutex<Vec<String>>>,
    _tasks: JoinSet<()>,
}

impl Server {
    pub async fn start(reply: impl Fn(&str) -> Reply + Send + Sync + 'static) -> Self {
        Self::start_at("127.0.0.1:0".parse().unwrap(), reply).await
    }

    pub async fn start_at(at: SocketAddr, reply: impl Fn(&str) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind(at).await.unwrap();
        let at = listener.local_addr().unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (reply, seen) = (Arc::new(reply), asked.clone());
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((connection, _)) = listener.accept().await {
                let (reply, seen) = (reply.clone(), seen.clone());
                connections.spawn(async move { serve(connection, &*reply, &seen).await });
            }
        });
        Self { at, asked, _tasks: tasks }
    }

    pub fn url(&self) -> String {
        format!("http://{}/v3/secret-key", self.at)
    }

    pub fn times(&self, method: &str) -> usize {
        self.asked.lock().iter().filter(|asked| *asked == method).count()
    }
}

/// Answers one request and closes the connection.
async fn serve(mut connection: TcpStream, reply: &(dyn Fn(&str) -> Reply + Send + Sync), asked: &Mutex<Vec<String>>) {
    let Some(request) = request(&mut connection).await else { return };
    let method = request["method"].as_str().unwrap().to_owned();
    asked.lock().push(method.clone());
    let id = &request["id"];
    let (status, headers, body) = match reply(&method) {
        Reply::Result(result) => ("200 OK", "", json!({ "jsonrpc": "2.0", "id": id, "result": result }).to_string()),
        Reply::Error(code, message) => {
            ("200 OK", "", json!({ "jsonrpc": "2.0", "id": id, "error": { "code": code, "message": message } }).to_string())
        }
        Reply::WrongId => ("200 OK", "", json!({ "jsonrpc": "2.0", "id": 999_999, "result": "0x1" }).to_string()),
        Reply::Http(status, headers, body) => (status, headers, body),
        Reply::CutOff => {
            connection.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{\"jsonrpc\"").await.ok();
            return;
        }
        Reply::Flood(bytes) => {
            connection.write_all(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n").await.ok();
            let some = vec![b' '; 1 << 16];
            for _ in 0..bytes.div_ceil(some.len()) {
                if connection.write_all(&some).await.is_err() {
                    return;
                }
            }
            return;
        }
        Reply::Never => {
            // Until the client gives up.
            connection.read_to_end(&mut Vec::new()).await.ok();
            return;
        }
    };
    let head = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n{headers}\r\n", body.len());
    connection.write_all(format!("{head}{body}").as_bytes()).await.ok();
}

async fn request(connection: &mut TcpStream) -> Option<Value> {
    let mut bytes = Vec::new();
    loop {
        if connection.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
        let text = String::from_utf8_lossy(&bytes);
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let length =
            head.lines().find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length:")?.trim().parse::<usize>().ok());
        if body.len() >= length.unwrap() {
            return serde_json::from_str(body).ok();
        }
    }
}
