//! The promises of the shipped binary, with real plugins. One program, because linking is what costs.

#[path = "node/bad_models.rs"]
mod bad_models;
#[path = "node/cache.rs"]
mod cache;
#[path = "node/chat.rs"]
mod chat;
#[path = "node/clients.rs"]
mod clients;
#[path = "node/ezkl.rs"]
mod ezkl;
#[path = "node/faults.rs"]
mod faults;
#[path = "node/jobs.rs"]
mod jobs;
#[path = "node/keys.rs"]
mod keys;
#[path = "node/load.rs"]
mod load;
#[path = "node/loading.rs"]
mod loading;
#[path = "node/market.rs"]
mod market;
#[path = "node/network.rs"]
mod network;
#[path = "node/paying.rs"]
mod paying;
#[path = "node/posting.rs"]
mod posting;
#[path = "node/proofs.rs"]
mod proofs;
#[path = "node/s5_node.rs"]
mod s5_node;
#[path = "node/semantic.rs"]
mod semantic;
#[path = "node/serving.rs"]
mod serving;
#[path = "node/sharing.rs"]
mod sharing;
#[path = "node/storage.rs"]
mod storage;
#[path = "node/vouchers.rs"]
mod vouchers;
