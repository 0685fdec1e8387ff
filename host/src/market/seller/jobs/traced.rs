//! Answers whose tokens are to be proven: the states that the model has chosen them from.

use std::time::Duration;

use fabstir_plugin_api::chain::JobTerms;
use fabstir_plugin_api::context::Cx;
use fabstir_plugin_api::error::{Code, PluginError};
use fabstir_plugin_api::inference::{States, Template, Tokenize};
use fabstir_plugin_api::prover::ProofKind;

use super::Shared;
use super::verdict::Cause;
use crate::market::journal::jobs::JobRow;
use crate::market::posting::JobInput;
use crate::market::proving::{self, Provable, Provables};

/// How long reading an answer anew may take.
const READ: Duration = Duration::from_secs(600);

/// Something that can be done, or will never be.
pub type Could<T> = Result<Result<T, (Cause, String)>, PluginError>;

/// Whether a job's proof is about the tokens of its result.
pub fn is_traced(terms: &JobTerms) -> bool {
    ProofKind::OutputHead.number() == Some(terms.proof_kind)
}

impl Shared {
    /// Who proves what these terms ask for.
    pub async fn provable(&self, terms: &JobTerms) -> Option<Provable> {
        self.provables().await.ready.into_iter().find(|provable| provable.is_of(terms))
    }

    pub async fn provables(&self) -> Provables {
        let routes = self.seller.routes.borrow().clone();
        proving::provable(&routes, &*self.desk.chain, &self.desk.network, &self.seller.prepared).await
    }

    /// The model's state before each token of an answer, read anew.
    pub async fn states(&self, row: &JobRow, tokens: &[u32], within: Duration) -> Could<Vec<Vec<f32>>> {
        let no = |why: String| Ok(Err((Cause::Proof, why)));
        let input = match JobInput::read(&row.input_ref, &row.input_commitment) {
            Ok(input) => input,
            Err(error) => return no(error.to_string()),
        };
        let Some((_, before)) = tokens.split_last() else { return no("the answer has no token that could be proven".into()) };
        let model = row.model.clone().unwrap_or_default();
        let routes = self.seller.routes.borrow().clone();
        let Some(route) = routes.inference.iter().find(|route| route.serves(&model).is_some()) else {
            return Err(PluginError::unavailable(format!("the model {model} is not served at the moment")));
        };
        let Some(_inside) = route.in_flight.enter() else {
            return Err(PluginError::unavailable(format!("the plugin {} takes no more calls at the moment", route.plugin)));
        };
        let cx = Cx::new().with_timeout(within.min(READ));
        let read = async {
            let text = route.inference.apply_template(&cx, Template { model: model.clone(), messages: input.messages }).await?;
            let mut read = route.inference.tokenize(&cx, Tokenize { model: model.clone(), text, special: true }).await?;
            read.extend(before);
            let last = u32::try_from(tokens.len()).unwrap_or(u32::MAX);
            route.inference.states(&cx, States { model: model.clone(), tokens: read, last }).await
        };
        match read.await {
            Ok(states) => Ok(Ok(states)),
            Err(error) if error.code == Code::Unimplemented => no(format!(
                "the plugin {} does not tell the states of its models, which a proof of this kind needs",
                route.plugin
            )),
            Err(error) if error.code == Code::InvalidArgument => no(error.to_string()),
            Err(error) => Err(error),
        }
    }
}
