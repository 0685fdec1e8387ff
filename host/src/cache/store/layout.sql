-- What is looked at to choose; the answers themselves lie apart, so that looking does not read them.
CREATE TABLE entries (
    key       BLOB PRIMARY KEY,
    -- The cache salt of the client, empty for those who send neither an API key nor a user.
    tenant    TEXT NOT NULL,
    model     TEXT NOT NULL,
    plugin    TEXT NOT NULL,
    stored_ms INTEGER NOT NULL,
    used_ms   INTEGER NOT NULL,
    hits      INTEGER NOT NULL,
    -- Tokens of the answer.
    tokens    INTEGER NOT NULL,
    bytes     INTEGER NOT NULL
);
CREATE INDEX entries_by_age ON entries (stored_ms);
CREATE INDEX entries_by_tenant ON entries (tenant);

-- The questions whose answers may be given to others that mean the same.
CREATE TABLE questions (
    key      BLOB PRIMARY KEY REFERENCES entries ON DELETE CASCADE,
    -- What of the request has to be the same beside the question.
    space    BLOB NOT NULL,
    question TEXT NOT NULL,
    -- Of length 1, as 32-bit floats, little-endian.
    vector   BLOB NOT NULL
);

CREATE TABLE answers (
    key   BLOB PRIMARY KEY REFERENCES entries ON DELETE CASCADE,
    -- The chunks as MessagePack, and BLAKE3 of it: SQLite does not notice a changed byte.
    chunks BLOB NOT NULL,
    hash   BLOB NOT NULL
);
