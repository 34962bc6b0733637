-- The registry (docs: DESIGN §5). Times are UTC epoch milliseconds, hashes hex text, ids text.
-- No foreign keys: what belongs together is removed together, in one transaction of store/.

-- One row a relay process, kept alive by its heartbeat.
CREATE TABLE nodes (
    node_id      TEXT   NOT NULL PRIMARY KEY,
    address      TEXT   NOT NULL,
    version      TEXT   NOT NULL,
    started_at   BIGINT NOT NULL,
    heartbeat_at BIGINT NOT NULL,
    draining     BIGINT NOT NULL
);

-- One row a tunnel. Removed by tunnel_ws_id by the node that wrote it, or with its node by the reaper.
CREATE TABLE connections (
    tunnel_ws_id  TEXT    NOT NULL PRIMARY KEY,
    client_id     TEXT    NOT NULL,
    node_id       TEXT    NOT NULL,
    dialect       TEXT    NOT NULL,
    instance_id   TEXT    NULL,
    slot          INTEGER NULL,
    token_id      TEXT    NULL,
    agent_version TEXT    NULL,
    remote_addr   TEXT    NOT NULL,
    connected_at  BIGINT  NOT NULL
);
CREATE INDEX connections_client_id ON connections (client_id);
CREATE INDEX connections_node_id ON connections (node_id);

-- Who may have tunnels, and what a downstream must show to use them.
CREATE TABLE clients (
    client_id    TEXT   NOT NULL PRIMARY KEY,
    auth         TEXT   NOT NULL CHECK (auth IN ('token', 'basic', 'public')),
    basic_user   TEXT   NULL,
    basic_hash   TEXT   NULL,
    created_at   BIGINT NOT NULL,
    last_seen_at BIGINT NULL
);

-- A revoked token's row is gone.
CREATE TABLE client_access_tokens (
    token_id   TEXT   NOT NULL PRIMARY KEY,
    client_id  TEXT   NOT NULL,
    token_hash TEXT   NOT NULL,
    label      TEXT   NULL,
    created_at BIGINT NOT NULL
);
CREATE INDEX client_access_tokens_client_id ON client_access_tokens (client_id);

-- Short-lived credentials that fit in a URL.
CREATE TABLE signature_tokens (
    client_id  TEXT   NOT NULL,
    token_hash TEXT   NOT NULL,
    created_at BIGINT NOT NULL,
    expires_at BIGINT NOT NULL,
    PRIMARY KEY (client_id, token_hash)
);
CREATE INDEX signature_tokens_expires_at ON signature_tokens (expires_at);

CREATE TABLE magic_tokens (
    token_hash TEXT   NOT NULL PRIMARY KEY,
    client_id  TEXT   NOT NULL,
    created_at BIGINT NOT NULL
);
CREATE INDEX magic_tokens_client_id ON magic_tokens (client_id);

-- What the relay itself remembers, such as the hash of its admin token.
CREATE TABLE settings (
    name  TEXT NOT NULL PRIMARY KEY,
    value TEXT NOT NULL
);
