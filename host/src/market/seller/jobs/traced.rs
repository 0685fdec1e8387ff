//! Inputs and answers as the model reads them: how long an input is, and the states that the tokens of an answer were chosen from.

use std::sync::Arc;
use std::time::Duration;

use fabstir_plugin_api::chain::JobTerms;
use fabstir_plugin_api::context::Cx;
use fabstir_plugin_api::error::{Code, PluginError};
use fabstir_plugin_api::inference::{Inference, Message, States, Template, Tokenize};
use fabstir_plugin_api::prover::ProofKind;

use super::Shared;
use super::verdict::{Cause, Counted};
use crate::market::journal::jobs::JobRow;
use crate::market::posting::JobInput;
use crate::market::proving::{self, Provable, Provables};
use crate::routes::{InFlightGuard, InferenceRoute};

/// How long reading an answer anew may take.
const READ: Duration = Duration::from_secs(600);
/// How long counting the tokens of an input may take.
const COUNT: Duration = Duration::from_secs(10);

/// Something that can be done, or will never be.
pub type Could<T> = Result<Result<T, (Cause, String)>, PluginError>;

/// Whether a job's proof is about the tokens of its result.
pub fn is_traced(terms: &JobTerms) -> bool {
    ProofKind::OutputHead.number() == Some(terms.proof_kind)
}

/// A conversation as the model reads it.
async fn tokens_of(inference: &dyn Inference, cx: &Cx, model: &str, messages: Vec<Message>) -> Result<Vec<u32>, PluginError> {
    let text = inference.apply_template(cx, Template { model: model.to_owned(), messages }).await?;
    inference.tokenize(cx, Tokenize { model: model.to_owned(), text, special: true }).await
}

impl Shared {
    /// The plugin that serves a model, the model's context, and what keeps the plugin from ending meanwhile.
    fn reader(&self, model: &str) -> Result<(Arc<InferenceRoute>, u32, InFlightGuard), PluginError> {
        let routes = self.seller.routes.borrow().clone();
        let served = |route: &Arc<InferenceRoute>| route.serves(model).map(|served| (route.clone(), served.context));
        let Some((route, context)) = routes.inference.iter().find_map(served) else {
            return Err(PluginError::unavailable(format!("the model {model} is not served at the moment")));
        };
        match route.in_flight.enter() {
            Some(inside) => Ok((route, context, inside)),
            None => Err(PluginError::unavailable(format!("the plugin {} takes no more calls at the moment", route.plugin))),
        }
    }

    /// How long a job's input is, as the model counts it, if the model takes it at all; `None` where its plugin does not count.
    pub async fn counted(&self, row: &JobRow, model: &str) -> Could<Option<Counted>> {
        let input = match JobInput::read(&row.input_ref, &row.input_commitment) {
            Ok(input) => input,
            Err(error) => return Ok(Err((Cause::Input, error.to_string()))),
        };
        let (route, context, _inside) = self.reader(model)?;
        match tokens_of(&*route.inference, &Cx::new().with_timeout(COUNT), model, input.messages).await {
            Ok(tokens) => Ok(Ok(Some(Counted { tokens: tokens.len() as u64, context }))),
            Err(error) if error.code == Code::Unimplemented => Ok(Ok(None)),
            Err(error) if matches!(error.code, Code::InvalidArgument | Code::TooLong) => {
                Ok(Err((Cause::Input, error.to_string())))
            }
            Err(error) => Err(error),
        }
    }

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
        let (route, _, _inside) = self.reader(&model)?;
        let cx = Cx::new().with_timeout(within.min(READ));
        let read = async {
            let mut read = tokens_of(&*route.inference, &cx, &model, input.messages).await?;
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
