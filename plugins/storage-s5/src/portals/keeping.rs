//! Putting blobs on portals, and taking them back.

use std::sync::Arc;

use blob_folder::blocking;
use tracing::{info, warn};

use super::reading::Groups;
use super::{Portals, ROUNDS};
use crate::cid::{Cid, Id};
use crate::error::S5Error;
use crate::ledger::Kept;
use crate::portal::{Fault, Portal, Stored, UploadError};
use crate::spool::Spooled;
use crate::tree::{GROUP, Tree};

impl Portals {
    /// Puts a blob on as many portals as the configuration says, and enters it. What they have of it already is read back, and sent only where
    /// it is not right.
    pub async fn keep(self: &Arc<Self>, blob: Spooled) -> Result<(), S5Error> {
        let id = blob.tree.id();
        let turn = self.turn(id);
        let _turn = turn.lock().await;
        let ledger = self.ledger.clone();
        let before = blocking(move || ledger.kept(id)).await?.map(|kept| kept.portals);

        // Places where it is right, where something else is under its name, and where it is no longer.
        let (mut good, mut damaged, mut lost) = (Vec::new(), Vec::new(), Vec::new());
        for (place, portal) in self.places(before.as_deref()) {
            if good.len() >= self.copies {
                break;
            }
            match self.check(place, &blob.tree).await {
                Ok(()) => good.push(place),
                Err(Fault::Missing) => {
                    warn!(portal = portal.name(), blob = %id, "A portal has lost a blob.");
                    lost.push(place);
                }
                Err(Fault::Wrong(why)) => {
                    warn!(portal = portal.name(), blob = %id, %why, "A portal's copy of a blob is damaged.");
                    damaged.push(place);
                }
                // It has it as far as anybody knows, but what cannot be asked does not count.
                Err(why) => warn!(portal = portal.name(), blob = %id, %why, "A portal cannot be asked for a blob."),
            }
        }
        let mut faults = Vec::new();
        'rounds: for round in 0..ROUNDS {
            faults.clear();
            for place in 0..self.list.len() {
                if good.len() >= self.copies {
                    break 'rounds;
                }
                if good.contains(&place) {
                    continue;
                }
                match self.bring(place, &blob, damaged.contains(&place)).await {
                    Ok(()) => good.push(place),
                    Err(UploadError::Own(error)) => return Err(error),
                    Err(UploadError::Portal(fault)) => {
                        self.told(place, "taking a blob", id, &fault);
                        faults.push((place, fault));
                    }
                }
            }
            if good.len() >= self.copies || !self.wait(round, &faults).await {
                break;
            }
        }
        if good.len() < self.copies {
            return Err(self.failed("the upload", &faults));
        }
        let name = |place: usize| self.list[place].name().to_owned();
        let mut portals: Vec<String> = good.iter().map(|&place| name(place)).collect();
        // Whoever may still have it is asked to let go of it one day: only a portal that has said that it has not is forgotten.
        let lost: Vec<String> = lost.into_iter().map(name).collect();
        let others = before.iter().flatten().filter(|known| !portals.contains(known) && !lost.contains(known));
        portals.extend(others.cloned().collect::<Vec<_>>());
        if before.is_some_and(|before| before == portals) {
            return Ok(());
        }
        let cid = Cid { id, size: Some(blob.tree.size()) };
        info!(blob = %id, s5 = cid.blob(), portals = portals.len(), "Stored a blob.");
        let (ledger, kept) = (self.ledger.clone(), Kept { tree: blob.tree.clone(), portals });
        blocking(move || ledger.keep(&kept)).await
    }

    /// Whether a portal's copy of a blob is right: all of it is read.
    async fn check(self: &Arc<Self>, place: usize, tree: &Tree) -> Result<(), Fault> {
        let mut groups = Groups::new(self.clone(), tree.clone(), vec![place]);
        for group in 0..tree.size().div_ceil(GROUP).max(1) {
            let read = groups.next(group, tree.size()).await;
            read.map_err(|mut faults| faults.pop().map_or(Fault::Missing, |(_, fault)| fault))?;
        }
        Ok(())
    }

    /// Brings a blob to a portal.
    async fn bring(self: &Arc<Self>, place: usize, blob: &Spooled, is_damaged: bool) -> Result<(), UploadError> {
        let portal = &self.list[place];
        let cid = Cid { id: blob.tree.id(), size: Some(blob.tree.size()) };
        if !is_damaged {
            if portal.store(&cid, blob, &self.ledger).await? == Stored::Sent {
                return Ok(());
            }
            match self.check(place, &blob.tree).await {
                Err(Fault::Wrong(_)) => {}
                checked => return Ok(checked?),
            }
        }
        // A portal may keep what it has under a name rather than take it again, so it has to let go of that first.
        match portal.delete(&cid).await {
            Ok(_) => {}
            Err(why @ (Fault::Unreachable(_) | Fault::Busy(_))) => return Err(why.into()),
            Err(why) => warn!(portal = portal.name(), blob = %cid.id, %why, "A portal does not let go of a damaged blob."),
        }
        portal.store(&cid, blob, &self.ledger).await?;
        Ok(self.check(place, &blob.tree).await?)
    }

    /// Asks the portals to let go of a blob that was put here, forgets it, and says whether it was.
    pub async fn delete(&self, id: Id) -> Result<bool, S5Error> {
        let turn = self.turn(id);
        let _turn = turn.lock().await;
        let ledger = self.ledger.clone();
        let Some(kept) = blocking(move || ledger.kept(id)).await? else {
            let ledger = self.ledger.clone();
            // It may be one whose put was never ended.
            return blocking(move || ledger.forget_uploads_of(id)).await.map(|()| false);
        };
        let cid = Cid { id, size: Some(kept.tree.size()) };
        let mut faults = Vec::new();
        for (place, portal) in self.places(Some(&kept.portals)) {
            match portal.delete(&cid).await {
                Ok(_) => {}
                // With another token it does.
                Err(fault @ Fault::Refused { status: 401 | 403, .. }) => faults.push((place, fault)),
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
        let strange = kept.portals.iter().filter(|name| self.list.iter().all(|portal| portal.name() != *name));
        let strange: Vec<&str> = strange.map(String::as_str).collect();
        if !strange.is_empty() {
            let why = format!("{} may have it and is not among `portals` any more: name it there again", strange.join(", "));
            return Err(S5Error::Refused { doing: "the deletion", why });
        }
        let ledger = self.ledger.clone();
        blocking(move || ledger.forget(id)).await
    }

    /// The portals with one of these names.
    fn places<'a>(&'a self, names: Option<&'a [String]>) -> impl Iterator<Item = (usize, &'a Portal)> {
        let is_named = move |portal: &Portal| names.is_some_and(|names| names.iter().any(|name| name == portal.name()));
        self.list.iter().enumerate().filter(move |(_, portal)| is_named(portal))
    }
}
