//! What crosses the boundary as memory: three types and two functions, frozen for the life of the major version.
//!
//! This is the only file that names abi_stable. Everything else speaks of frames, and could travel over another carrier.

use std::ops::Deref;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use abi_stable::StableAbi;
use abi_stable::library::{AbiHeaderRef, ROOT_MODULE_LOADER_NAME_WITH_NUL, RootModule};
use abi_stable::sabi_types::VersionStrings;
use abi_stable::std_types::{RBox, RResult, RStr, RString, RVec};

use crate::frame::Inbox;

use abi_stable::prefix_type::PrefixTypeTrait;

/// Bytes that move between host and plugin without a copy when both share a process.
///
/// A blob frees itself with the allocator that made it, so either side may drop it.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Blob(RVec<u8>);

impl Blob {
    pub fn new() -> Self {
        Self::default()
    }
}

impl Deref for Blob {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        self.0.as_slice()
    }
}

impl AsRef<[u8]> for Blob {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl From<Vec<u8>> for Blob {
    fn from(bytes: Vec<u8>) -> Self {
        Self(bytes.into())
    }
}

impl From<&[u8]> for Blob {
    fn from(bytes: &[u8]) -> Self {
        Self(bytes.into())
    }
}

impl std::fmt::Debug for Blob {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Blob({} bytes)", self.len())
    }
}

/// One message: a MessagePack head and the blobs it refers to.
#[doc(hidden)]
#[repr(C)]
#[derive(StableAbi)]
pub struct RawFrame {
    head: RVec<u8>,
    blobs: RVec<RVec<u8>>,
}

/// One end of a connection, as the other end sees it.
///
/// `deliver` returns 0 when the frame was taken and 1 when this end is closed. It never blocks, never runs code of the plugin's
/// author and never unwinds.
#[doc(hidden)]
#[abi_stable::sabi_trait]
pub trait RawPort: Send + Sync {
    fn deliver(&self, frame: RawFrame) -> u32;
    #[sabi(last_prefix_field)]
    fn close(&self, reason: RStr<'_>);
}

type RawPortBox = RawPort_TO<'static, RBox<()>>;

/// What a plugin library exports.
#[repr(C)]
#[derive(StableAbi)]
#[sabi(kind(Prefix(prefix_ref = PluginRootRef)), missing_field(option))]
pub struct PluginRoot {
    /// Starts one instance and connects it to the host's end. May be called several times: each call is an instance of its own.
    connect: extern "C" fn(host: RawPortBox) -> RResult<RawPortBox, RString>,
    /// Starts one instance whose host is at the other end of a stream socket, and speaks as `ipc` describes. The descriptor is the
    /// instance's from then on, also on an error.
    #[sabi(last_prefix_field)]
    connect_socket: extern "C" fn(socket: i32) -> RResult<(), RString>,
}

impl RootModule for PluginRootRef {
    abi_stable::declare_root_module_statics! { PluginRootRef }
    const BASE_NAME: &'static str = "fabstir_plugin";
    const NAME: &'static str = "fabstir_plugin";
    const VERSION_STRINGS: VersionStrings = VersionStrings::new(crate::manifest::PORT_VERSION);
}

/// An owned frame on this side of the boundary.
#[derive(Debug, Default)]
pub struct Frame {
    pub head: Vec<u8>,
    pub blobs: Vec<Blob>,
}

impl From<Frame> for RawFrame {
    fn from(frame: Frame) -> Self {
        let blobs: Vec<RVec<u8>> = frame.blobs.into_iter().map(|blob| blob.0).collect();
        RawFrame { head: frame.head.into(), blobs: blobs.into() }
    }
}

/// A received frame: readable in place, its blobs to be taken.
pub struct Received {
    head: RVec<u8>,
    blobs: RVec<RVec<u8>>,
}

impl Received {
    pub fn head(&self) -> &[u8] {
        self.head.as_slice()
    }

    pub fn blob_count(&self) -> usize {
        self.blobs.len()
    }

    /// Moves blob `index` out; a second take of the same index gives an empty blob.
    pub fn take_blob(&mut self, index: usize) -> Option<Blob> {
        self.blobs.get_mut(index).map(|blob| Blob(std::mem::take(blob)))
    }

    pub(crate) fn blobs(&self) -> impl Iterator<Item = &[u8]> {
        self.blobs.iter().map(|blob| blob.as_slice())
    }
}

impl From<Frame> for Received {
    fn from(frame: Frame) -> Self {
        let raw = RawFrame::from(frame);
        Received { head: raw.head, blobs: raw.blobs }
    }
}

/// Where frames for the other end go.
///
/// Cheap to call from any thread. `deliver` fails once the other end has closed.
#[derive(Clone)]
pub struct Port(Arc<RawPortBox>);

/// The other end of a port is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Closed;

impl Port {
    /// Makes a port that hands every frame to `inbox` on the caller's thread.
    pub fn new(inbox: Arc<dyn Inbox>) -> Self {
        Self(Arc::new(raw_port(inbox)))
    }

    pub fn deliver(&self, frame: Frame) -> std::result::Result<(), Closed> {
        match self.0.deliver(frame.into()) {
            0 => Ok(()),
            _ => Err(Closed),
        }
    }

    pub fn close(&self, reason: &str) {
        self.0.close(reason.into());
    }
}

struct InboxPort(Arc<dyn Inbox>);

// abi_stable answers an unwinding panic with `exit(1)`, so both bodies catch before it can.
impl RawPort for InboxPort {
    fn deliver(&self, frame: RawFrame) -> u32 {
        let received = Received { head: frame.head, blobs: frame.blobs };
        match catch_unwind(AssertUnwindSafe(|| self.0.deliver(received))) {
            Ok(Ok(())) => 0,
            Ok(Err(Closed)) => 1,
            Err(panic) => {
                // A panic payload's own destructor may panic as well.
                std::mem::forget(panic);
                1
            }
        }
    }

    fn close(&self, reason: RStr<'_>) {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.0.close(reason.as_str()))) {
            std::mem::forget(panic);
        }
    }
}

fn raw_port(inbox: Arc<dyn Inbox>) -> RawPortBox {
    RawPort_TO::from_value(InboxPort(inbox), abi_stable::erased_types::TD_Opaque)
}

/// The plugin's side of `connect`: given the host's port, start an instance and return its own.
pub type Connect = fn(Port) -> std::result::Result<Arc<dyn Inbox>, String>;
/// The plugin's side of `connect_socket`: given the socket that leads to the host, start an instance.
pub type ConnectSocket = fn(UnixStream) -> std::result::Result<(), String>;

#[doc(hidden)]
pub type HostPort = RawPortBox;
#[doc(hidden)]
pub type ConnectResult = RResult<RawPortBox, RString>;
#[doc(hidden)]
pub type ConnectSocketResult = RResult<(), RString>;
#[doc(hidden)]
pub use abi_stable::library::{
    __call_root_module_loader as call_root_module_loader, CheckTypeLayout, LibHeader, RootModuleResult,
};

/// Builds the root module around a plugin's connect functions. Called by code that `#[plugin]` generates.
#[doc(hidden)]
pub fn plugin_root(
    connect: extern "C" fn(HostPort) -> ConnectResult,
    connect_socket: extern "C" fn(i32) -> ConnectSocketResult,
) -> PluginRootRef {
    PluginRoot { connect, connect_socket }.leak_into_prefix()
}

/// The body of the exported `connect`. Called by code that `#[plugin]` generates.
#[doc(hidden)]
pub fn export_connect(host: HostPort, connect: Connect) -> ConnectResult {
    let port = Port(Arc::new(host));
    guarded(|| connect(port)).map(raw_port)
}

/// The body of the exported `connect_socket`. Called by code that `#[plugin]` generates.
#[doc(hidden)]
pub fn export_connect_socket(socket: i32, connect: ConnectSocket) -> ConnectSocketResult {
    // SAFETY: the caller gives the descriptor away.
    let socket = UnixStream::from(unsafe { OwnedFd::from_raw_fd(socket) });
    guarded(|| connect(socket))
}

fn guarded<T>(connect: impl FnOnce() -> std::result::Result<T, String>) -> RResult<T, RString> {
    match catch_unwind(AssertUnwindSafe(connect)) {
        Ok(result) => result.map_err(RString::from).into(),
        Err(panic) => {
            std::mem::forget(panic);
            RResult::RErr("the plugin panicked while connecting".into())
        }
    }
}

/// Exports the connect functions under the symbol that abi_stable looks for. Part of what `#[plugin]` generates: abi_stable's own
/// attribute would oblige every plugin to depend on abi_stable.
#[doc(hidden)]
#[macro_export]
macro_rules! export_plugin_root {
    ($connect:path, $connect_socket:path) => {
        const _: () = {
            extern "C" fn connect(host: $crate::abi::HostPort) -> $crate::abi::ConnectResult {
                $crate::abi::export_connect(host, $connect)
            }
            extern "C" fn connect_socket(socket: i32) -> $crate::abi::ConnectSocketResult {
                $crate::abi::export_connect_socket(socket, $connect_socket)
            }
            fn root() -> $crate::abi::PluginRootRef {
                $crate::abi::plugin_root(connect, connect_socket)
            }
            extern "C" fn load() -> $crate::abi::RootModuleResult {
                $crate::abi::call_root_module_loader(root)
            }
            // SAFETY: the name is abi_stable's own and a library has one root module.
            #[unsafe(export_name = "_1as_0lib_1header_0root_bmodule_bloader")]
            pub static ROOT: $crate::abi::LibHeader = {
                // SAFETY: `load` builds a `PluginRootRef`, the type given here.
                unsafe {
                    $crate::abi::LibHeader::from_constructor::<$crate::abi::PluginRootRef>(
                        load,
                        $crate::abi::CheckTypeLayout::Yes,
                    )
                }
            };
        };
    };
}

/// Why a file's root module cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RootError {
    #[error("the file does not export a plugin root (symbol `{0}`)")]
    NoRoot(String),
    /// Another layout of the port: built against an incompatible plugin-api or abi_stable.
    #[error("the plugin's port layout differs from this node's: {summary}")]
    Layout { summary: String, full: String },
    #[error("connect failed: {0}")]
    Connect(String),
}

/// The checked entry point of an opened library.
#[derive(Clone, Copy)]
pub struct Root(PluginRootRef);

impl Root {
    /// The exported symbol that marks a library as a plugin.
    pub const SYMBOL: &'static [u8] = ROOT_MODULE_LOADER_NAME_WITH_NUL.as_bytes();

    /// Checks the layout that the library was compiled with and builds its root module.
    ///
    /// abi_stable's own `load_from_*` is not used: it keeps one library per root type and would return the first plugin for the second.
    ///
    /// # Safety
    /// `header` is the value of [`Root::SYMBOL`] in a library that stays open for the rest of the process.
    pub unsafe fn from_symbol(header: *const std::ffi::c_void, file: &Path) -> std::result::Result<Self, RootError> {
        if header.is_null() {
            return Err(RootError::NoRoot(file.display().to_string()));
        }
        // SAFETY: the caller vouches that the symbol is what `export_root_module` emits: a static abi header.
        let header: AbiHeaderRef = unsafe { std::mem::transmute(header) };
        let layout = |error: abi_stable::library::LibraryError| {
            let full = error.to_string();
            RootError::Layout { summary: condense(&full), full }
        };
        let header = header.upgrade().map_err(layout)?;
        header.init_root_module::<PluginRootRef>().map(Root).map_err(layout)
    }

    /// Starts an instance whose messages for the host go to `host`, and returns the port that leads to it.
    pub fn connect(&self, host: Arc<dyn Inbox>) -> std::result::Result<Port, RootError> {
        let connect = self.0.connect();
        match connect(raw_port(host)) {
            RResult::ROk(port) => Ok(Port(Arc::new(port))),
            RResult::RErr(reason) => Err(RootError::Connect(reason.into())),
        }
    }

    /// Starts an instance whose host is at the other end of `socket`.
    pub fn connect_socket(&self, socket: UnixStream) -> std::result::Result<(), RootError> {
        let connect_socket = self.0.connect_socket();
        match connect_socket(socket.into_raw_fd()) {
            RResult::ROk(()) => Ok(()),
            RResult::RErr(reason) => Err(RootError::Connect(reason.into())),
        }
    }
}

/// Reduces abi_stable's layout dump, hundreds of lines long, to the lines that say what differs.
fn condense(full: &str) -> String {
    let mut lines: Vec<&str> = Vec::new();
    let mut keep = 0;
    for line in full.lines().map(str::trim) {
        if line.starts_with("Error:") {
            keep = 3;
        }
        if line.is_empty() {
            keep = 0;
        }
        if keep > 0 && lines.len() < 12 {
            lines.push(line);
            keep -= 1;
        }
    }
    if lines.is_empty() { full.lines().take(6).collect::<Vec<_>>().join(" ") } else { lines.join("; ") }
}
