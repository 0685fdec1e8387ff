//! The rows of posted jobs.

use rusqlite::OptionalExtension;

use super::{Journal, JournalError};

impl Journal {
    /// Whether this is the content id of a result that this node has stored for a job.
    pub async fn is_result(&self, id: &str) -> Result<bool, JournalError> {
        let commitment = format!("0x{id}");
        self.write(move |transaction| {
            let found = transaction
                .prepare("SELECT 1 FROM jobs WHERE json_extract(result, '$.output_commitment') = ?1")?
                .query_row([commitment], |_| Ok(()))
                .optional()?;
            Ok(found.is_some())
        })
        .await
    }
}
