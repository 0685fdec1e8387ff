//! Putting blobs on portals, and taking them back.

use tracing::{info, warn};

use super::{Portals, ROUNDS};
use crate::cid::{Cid, Id};
use crate::error::S5Error;
use crate::ledger::Kept;
use crate::portal::{Fault, UploadError};
use crate::spool::{Spooled, blocking};

impl Portals {
    /// Puts a blob on as many portals as the configuration says, and enters it. Portals that have it already are asked, and sent nothing.
    pub async fn keep(&self, blob: Spooled) -> Result<(), S5Error> {
        let id = blob.tree.id();
        let cid = Cid { id, size: Some(blob.tree.size()) };
        let turn = self.turn(id);
        let _turn = turn.lock().await;
        let ledger = self.ledger.clone();
        let before = blocking(move || ledger.kept(id)).await?.map(|kept| kept.portals);

        let mut portals = Vec::new();
        for portal in self.list.iter().filter(|portal| is_among(before.as_deref(), portal.name())) {
            match portal.holds(&cid).await {
                Ok(true) => portals.push(portal.name().to_owned()),
                Ok(false) => warn!(portal = portal.name(), blob = %id, "A portal has lost a blob."),
                // It has it as far as anybody knows, but what cannot be asked does not count.
                Err(why) => warn!(portal = portal.name(), blob = %id, %why, "A portal cannot be asked for a blob."),
            }
        }
        let mut faults = Vec::new();
        'rounds: for round in 0..ROUNDS {
            faults.clear();
            for (place, portal) in self.list.iter().enumerate() {
                if portals.len() >= self.copies {
                    break 'rounds;
                }
                if portals.iter().any(|name| name == portal.name()) {
                    continue;
                }
                match portal.store(&cid, &blob, &self.ledger).await {
                    Ok(()) => portals.push(portal.name().to_owned()),
                    Err(UploadError::Own(error)) => return Err(error),
                    Err(UploadError::Portal(fault)) => {
                        self.told(place, "taking a blob", id, &fault);
                        faults.push((place, fault));
                    }
                }
            }
            if portals.len() >= self.copies || !self.wait(round, &faults).await {
                break;
            }
        }
        if portals.len() < self.copies {
            return Err(self.failed("the upload", &faults));
        }
        // Those that the configuration does not name any more may still have it.
        let gone = before.iter().flatten().filter(|name| self.list.iter().all(|portal| portal.name() != *name));
        portals.extend(gone.cloned());
        if before.is_some_and(|before| before == portals) {
            return Ok(());
        }
        info!(blob = %id, s5 = cid.blob(), portals = portals.len(), "Stored a blob.");
        let (ledger, kept) = (self.ledger.clone(), Kept { tree: blob.tree.clone(), portals });
        blocking(move || ledger.keep(&kept)).await
    }

    /// Asks the portals to let go of a blob that was put here, forgets it, and says whether it was.
    pub async fn delete(&self, id: Id) -> Result<bool, S5Error> {
        let turn = self.turn(id);
        let _turn = turn.lock().await;
        let ledger = self.ledger.clone();
        let Some(kept) = blocking(move || ledger.kept(id)).await? else { return Ok(false) };
        let cid = Cid { id, size: Some(kept.tree.size()) };
        let mut faults = Vec::new();
        for (place, portal) in self.list.iter().enumerate().filter(|(_, portal)| is_among(Some(&kept.portals), portal.name())) {
            match portal.delete(&cid).await {
                Ok(_) => {}
                Err(why @ (Fault::Refused { .. } | Fault::Missing | Fault::Wrong(_))) => {
                    warn!(portal = portal.name(), blob = %id, %why, "A portal does not delete a blob: it is forgotten here, and stays there.");
                }
                Err(fault) => faults.push((place, fault)),
            }
        }
        // A portal that will never be asked again would keep the blob, and be paid for it.
        if !faults.is_empty() {
            return Err(self.failed("the deletion", &faults));
        }
        let ledger = self.ledger.clone();
        blocking(move || ledger.forget(id)).await
    }
}

fn is_among(names: Option<&[String]>, name: &str) -> bool {
    names.is_some_and(|names| names.iter().any(|known| known == name))
}
