//! A model of a remote node, as the kind inference: what the local scheduler sees of it.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use fabstir_plugin_api::chain::Amount;
use fabstir_plugin_api::context::Cx;
use fabstir_plugin_api::error::{Code, PluginError, Result};
use fabstir_plugin_api::inference::{Chunk, Generation, Inference, Loaded, Model};
use fabstir_plugin_api::stream::Stream;
use parking_lot::RwLock;

use super::link::Link;
use super::till::Till;
use crate::market::buyer::Request;
use crate::market::coins;
use crate::network::capability::Offer;
use crate::scheduler::estimated_tokens;

/// The time for a request that came without a deadline.
const LONGEST: Duration = Duration::from_secs(3600);

pub(super) struct Remote {
    pub link: Arc<Link>,
    /// What pays it, where money may be spent.
    pub till: Option<Arc<Till>>,
    /// What the model is called here; the node may call it otherwise.
    pub name: String,
    /// What the node last said of it.
    pub offer: RwLock<Offer>,
}

impl Remote {
    fn known(&self, model: &str) -> Result<Offer> {
        match model == self.name {
            true => Ok(self.offer.read().clone()),
            false => Err(PluginError::not_found(format!("the node is asked for `{}` only, not for `{model}`", self.name))),
        }
    }
}

#[async_trait]
impl Inference for Remote {
    async fn models(&self, _: &Cx) -> Result<Vec<Model>> {
        let context = Some(self.offer.read().context);
        Ok(vec![Model { id: self.name.clone(), loaded: true, context, bytes: None }])
    }

    async fn load(&self, _: &Cx, model: String) -> Result<Loaded> {
        let Offer { context, slots, digest, .. } = self.known(&model)?;
        Ok(Loaded { model, context, parallel: slots, memory: None, load_ms: 0, digest, generates: true })
    }

    /// What a node keeps loaded is its own affair.
    async fn unload(&self, _: &Cx, _: String) -> Result<()> {
        Ok(())
    }

    async fn generate(&self, cx: &Cx, request: Generation) -> Result<Stream<Chunk>> {
        let offer = self.known(&request.model)?;
        let most = u64::from(request.max_tokens.unwrap_or(offer.context).min(offer.context));
        let ticket = match &self.till {
            _ if is_free(&offer) => None,
            Some(till) => till.ready(&offer, Request { prompt_tokens: estimated_tokens(&request.input), most }).await?,
            None => return Err(costs(&offer)),
        };
        let model = offer.name;
        // What keeps local clients apart is no business of the node's, which keeps its peers apart itself.
        let request = Generation { model, cache_salt: String::new(), priority: 0, ..request };
        self.link.ask(request, cx.remaining().unwrap_or(LONGEST), ticket, most)
    }
}

/// Whether a node asks for no money.
pub(super) fn is_free(offer: &Offer) -> bool {
    offer.price_input_wei_per_mtok == 0 && offer.price_output_wei_per_mtok == 0
}

fn costs(offer: &Offer) -> PluginError {
    let eth = |wei: u128| coins(Amount(wei), "ETH");
    let message = format!(
        "nobody offers `{}` for free: {} for a million tokens read and {} for a million generated is the best price; allow it with          --max-spend, as in --max-spend 0.01eth",
        offer.name,
        eth(offer.price_input_wei_per_mtok),
        eth(offer.price_output_wei_per_mtok)
    );
    PluginError::new(Code::Denied, message)
}
