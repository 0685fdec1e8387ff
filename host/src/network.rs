//! The peer edge: what nodes say to each other, over any transport plugin.
//!
//! A node advertises the topics of the models that it serves ([`topics`]). Whoever looks for a model finds peers under its topic, which
//! is no more than a hint, and asks each of them what it offers. The answer is a signed record ([`capability`]).

pub mod capability;
pub mod topics;
