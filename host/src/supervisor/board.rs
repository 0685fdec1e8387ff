//! The present state of every plugin, and the routes that follow from it.

use std::collections::BTreeMap;
use std::sync::Arc;

use fabstir_plugin_api::chain::Chain;
use fabstir_plugin_api::prover::Prover;
use fabstir_plugin_api::storage::Storage;
use fabstir_plugin_api::transport::Transport;
use parking_lot::Mutex;
use tokio::sync::watch;

use super::start::Running;
use super::{Connected, State, Status};
use crate::config::PluginEntry;
use crate::routes::{InferenceRoute, Route, Routes, Starting};

pub(super) struct Board {
    posts: Mutex<BTreeMap<String, Post>>,
    routes: watch::Sender<Arc<Routes>>,
}

impl Default for Board {
    fn default() -> Self {
        Self { posts: Mutex::default(), routes: watch::Sender::new(Arc::default()) }
    }
}

struct Post {
    status: Status,
    rank: i32,
    route: Option<Arc<InferenceRoute>>,
    transport: Option<Arc<Route<dyn Transport>>>,
    chain: Option<Arc<Route<dyn Chain>>>,
    storage: Option<Arc<Route<dyn Storage>>>,
    prover: Option<Arc<Route<dyn Prover>>>,
    connected: Option<Arc<Connected>>,
}

/// The routes of one kind, best rank first. Equal ranks keep the order of their ids.
fn ranked<R>(posts: &BTreeMap<String, Post>, route: impl Fn(&Post) -> Option<&Arc<R>>) -> Vec<Arc<R>> {
    let mut ranked: Vec<(i32, Arc<R>)> =
        posts.values().filter_map(|post| route(post).map(|route| (post.rank, route.clone()))).collect();
    ranked.sort_by_key(|(rank, _)| std::cmp::Reverse(*rank));
    ranked.into_iter().map(|(_, route)| route).collect()
}

impl Board {
    pub fn subscribe(&self) -> watch::Receiver<Arc<Routes>> {
        self.routes.subscribe()
    }

    pub fn status(&self) -> Vec<Status> {
        self.posts.lock().values().map(|post| post.status.clone()).collect()
    }

    pub fn running(&self) -> Vec<(String, Arc<Connected>)> {
        let posts = self.posts.lock();
        posts.iter().filter_map(|(id, post)| post.connected.clone().map(|connected| (id.clone(), connected))).collect()
    }

    /// A plugin's new state; its routes stay as they are.
    pub fn post(&self, entry: &PluginEntry, state: State) {
        self.change(entry, |post| post.status.state = state);
    }

    /// A new generation takes over.
    pub fn publish(&self, entry: &PluginEntry, running: &Running) {
        self.change(entry, |post| {
            post.status.state = running.state();
            post.status.generation = running.generation;
            post.route = running.route.clone();
            post.transport = running.transport.clone();
            post.chain = running.chain.clone();
            post.storage = running.storage.clone();
            post.prover = running.prover.clone();
            post.connected = Some(running.connected.clone());
        });
    }

    /// The plugin takes no more requests.
    pub fn withdraw(&self, entry: &PluginEntry, state: State) {
        self.change(entry, |post| {
            post.status.state = state;
            post.route = None;
            post.transport = None;
            post.chain = None;
            post.storage = None;
            post.prover = None;
            post.connected = None;
        });
    }

    pub fn remove(&self, id: &str) {
        let mut posts = self.posts.lock();
        posts.remove(id);
        self.announce(&posts);
    }

    fn change(&self, entry: &PluginEntry, change: impl FnOnce(&mut Post)) {
        let mut posts = self.posts.lock();
        let post = posts.entry(entry.id.clone()).or_insert_with(|| Post {
            status: Status { id: entry.id.clone(), use_: entry.use_.clone(), state: State::Declared, generation: 0 },
            rank: entry.rank,
            route: None,
            transport: None,
            chain: None,
            storage: None,
            prover: None,
            connected: None,
        });
        post.rank = entry.rank;
        post.status.use_.clone_from(&entry.use_);
        change(post);
        self.announce(&posts);
    }

    fn announce(&self, posts: &BTreeMap<String, Post>) {
        let inference = ranked(posts, |post| post.route.as_ref());
        let transport = ranked(posts, |post| post.transport.as_ref());
        let chain = ranked(posts, |post| post.chain.as_ref());
        let storage = ranked(posts, |post| post.storage.as_ref());
        let prover = ranked(posts, |post| post.prover.as_ref());
        let starting = posts.values().filter_map(|post| Option::<Starting>::from(&post.status)).collect();
        self.routes.send_replace(Arc::new(Routes { inference, transport, chain, storage, prover, starting }));
    }
}
