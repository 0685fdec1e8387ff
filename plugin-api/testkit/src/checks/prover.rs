//! What the prover kind promises.

use anyhow::{Result, ensure};
use fabstir_plugin_api::prover::*;

use crate::harness::{During, Instance, patient};

pub(super) async fn exercise(instance: &Instance) -> Result<()> {
    let statements = instance.client::<dyn Prover>().statements(&patient()).await.during("statements")?;
    for statement in &statements {
        let Statement { id, says, leaves_open, trusts, .. } = statement;
        let words = [id, says, leaves_open, trusts];
        ensure!(words.iter().all(|text| !text.trim().is_empty()), "a statement leaves something unsaid: {statement:?}");
        let same = statements.iter().filter(|other| other.id == *id).count();
        ensure!(same == 1, "{same} statements are called `{id}`");
    }
    Ok(())
}

pub(super) async fn hundred(instance: &Instance) -> Result<()> {
    let prover = instance.client::<dyn Prover>();
    let alone = prover.statements(&patient()).await.during("statements")?;
    let calls = (0..100).map(|_| async {
        let told = prover.statements(&patient()).await.during("statements")?;
        ensure!(told == alone, "statements gives another answer among a hundred than alone");
        Ok(())
    });
    futures::future::try_join_all(calls).await.map(drop)
}
