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
    bytes     INTEGER NOT NULL,
    -- The pack that it went to other nodes in, or came from one in; NULL for what was not shared yet.
    pack      TEXT
);
CREATE INDEX entries_by_age ON entries (stored_ms);
CREATE INDEX entries_by_tenant ON entries (tenant);
CREATE INDEX entries_by_pack ON entries (pack);

CREATE TABLE answers (
    key   BLOB PRIMARY KEY REFERENCES entries ON DELETE CASCADE,
    -- The chunks as MessagePack, and BLAKE3 of it: SQLite does not notice a changed byte.
    chunks BLOB NOT NULL,
    hash   BLOB NOT NULL
);

-- The questions whose answers may be given to others that mean the same.
CREATE TABLE questions (
    key      BLOB PRIMARY KEY REFERENCES entries ON DELETE CASCADE,
    -- What of the request has to be the same beside the question.
    space    BLOB NOT NULL,
    question TEXT NOT NULL,
    -- Of length 1, as 32-bit floats, little-endian.
    vector   BLOB NOT NULL,
    -- Whether the storage plugin that looks for neighbours has it.
    placed   INTEGER NOT NULL
);
CREATE INDEX questions_to_place ON questions (key) WHERE placed = 0;

-- Vectors that the storage plugin is still to delete.
CREATE TABLE gone (
    space BLOB NOT NULL,
    key   BLOB NOT NULL,
    PRIMARY KEY (space, key)
) WITHOUT ROWID;
CREATE TRIGGER question_gone AFTER DELETE ON questions BEGIN
    INSERT OR IGNORE INTO gone VALUES (old.space, old.key);
END;

-- Packs of answers that nodes with the same key share, as far as this node has to do with them: its own, and those that it has read.
CREATE TABLE packs (
    -- The blob's content id.
    id       TEXT PRIMARY KEY,
    size     INTEGER NOT NULL,
    made_ms  INTEGER NOT NULL,
    until_ms INTEGER NOT NULL,
    -- Made by this node.
    own      INTEGER NOT NULL,
    -- Its blob is still to be deleted.
    dropped  INTEGER NOT NULL
);

-- What the operator has erased, for as long as it could come back from another node. No tenant: all of them.
CREATE TABLE erasures (
    tenant TEXT,
    at_ms  INTEGER NOT NULL
);

-- One row: the newest list of packs that this node has seen, and the one that it has made itself.
CREATE TABLE listed (
    revision INTEGER NOT NULL,
    own      TEXT
);
INSERT INTO listed VALUES (0, NULL);
