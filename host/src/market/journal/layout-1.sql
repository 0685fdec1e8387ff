-- How far the market's history was read, and other single values.
CREATE TABLE marks (
    name  TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT;

-- Paid sessions in which this node works: one row from the client's first voucher on.
CREATE TABLE sessions (
    id         TEXT PRIMARY KEY,
    -- Terms, as JSON.
    terms      TEXT NOT NULL,
    -- The peer that the last first voucher was from.
    peer       TEXT NOT NULL,
    deposit    TEXT NOT NULL,
    -- open, settling, settled, lost
    state      TEXT NOT NULL,
    -- The best voucher, as JSON, and the client's signature.
    voucher    TEXT NOT NULL,
    signature  BLOB NOT NULL,
    -- What was delivered a moment ago and no voucher promised.
    exposed    TEXT NOT NULL DEFAULT '0',
    -- What the contract has paid out, once the session is settled.
    paid       TEXT,
    why        TEXT,
    opened_ms  INTEGER NOT NULL,
    changed_ms INTEGER NOT NULL
) STRICT;
CREATE INDEX sessions_by_state ON sessions (state);

-- Posted jobs that this node has seen.
CREATE TABLE jobs (
    id               INTEGER PRIMARY KEY,
    client           TEXT NOT NULL,
    -- JobTerms, as JSON.
    terms            TEXT NOT NULL,
    input_commitment TEXT NOT NULL,
    input_ref        TEXT NOT NULL,
    block            INTEGER NOT NULL,
    -- seen, declined, missed, claiming, claimed, working, stored, submitting, proving, proved, submitted, abandoning, settled, failed
    state            TEXT NOT NULL,
    -- A word for the cause, and a sentence.
    cause            TEXT,
    why              TEXT,
    -- What the model is called here, once the job is taken.
    model            TEXT,
    -- The block of the event that ended it: when that is taken back, so is the end.
    ended_block      INTEGER,
    -- How often something was ordered for it that came to nothing: each time, orders have new keys.
    attempt          INTEGER NOT NULL DEFAULT 0,
    -- JobResult, as JSON, once it is stored.
    result           TEXT,
    -- The result's tokens, as a JSON list, where a proof needs them.
    tokens           TEXT,
    -- Proof, as JSON, once it is made.
    proof            TEXT,
    -- What the contract has paid out, once the job is settled.
    paid             TEXT,
    seen_ms          INTEGER NOT NULL,
    changed_ms       INTEGER NOT NULL
) STRICT;
CREATE INDEX jobs_by_state ON jobs (state);
CREATE INDEX jobs_by_result ON jobs (json_extract(result, '$.output_commitment'));

-- Sessions that this account has paid for, as a client.
CREATE TABLE purchases (
    id         TEXT PRIMARY KEY,
    -- Terms, as JSON, and the host's signature over them.
    terms      TEXT NOT NULL,
    offer      BLOB NOT NULL,
    -- The node, by its name in the network.
    peer       TEXT NOT NULL,
    model      TEXT NOT NULL,
    deposit    TEXT NOT NULL,
    -- opening, open, closing, over
    state      TEXT NOT NULL,
    -- The last voucher that was signed, as JSON, and the signature.
    voucher    TEXT NOT NULL,
    signature  BLOB NOT NULL,
    -- How the contract has divided the deposit, once it is over.
    to_host    TEXT,
    to_client  TEXT,
    why        TEXT,
    opened_ms  INTEGER NOT NULL,
    changed_ms INTEGER NOT NULL
) STRICT;
CREATE INDEX purchases_by_state ON purchases (state);

-- Jobs that this account has posted, as a client, by the key of their order.
CREATE TABLE posted (
    order_key        TEXT PRIMARY KEY,
    job              INTEGER,
    model            TEXT NOT NULL,
    terms            TEXT NOT NULL,
    input_commitment TEXT NOT NULL,
    input_ref        TEXT NOT NULL,
    posted_ms        INTEGER NOT NULL
) STRICT;
