-- The registry (docs: DESIGN §5). Times are UTC epoch milliseconds, hashes hex text, ids text.
-- Whatever is looked up is VARBINARY: every collation that both MySQL and MariaDB have takes `abc` for `abc ` or `ABC`.
-- No foreign keys: what belongs together is removed together, in one transaction of store/.
-- MySQL commits each statement by itself: each can be repeated, for a node that dies in between.

-- One row a relay process, kept alive by its heartbeat.
CREATE TABLE IF NOT EXISTS nodes (
    node_id      VARBINARY(36) NOT NULL PRIMARY KEY,
    address      TEXT          NOT NULL,
    version      TEXT          NOT NULL,
    started_at   BIGINT        NOT NULL,
    heartbeat_at BIGINT        NOT NULL,
    draining     BIGINT        NOT NULL
) ENGINE = InnoDB DEFAULT CHARACTER SET utf8mb4;

-- One row a tunnel. Removed by tunnel_ws_id by the node that wrote it, or with its node by the reaper.
-- generation: the agent's own count of its dials of a slot; of two tunnels of an instance's slot, the higher one is the
-- newer.
CREATE TABLE IF NOT EXISTS connections (
    tunnel_ws_id  VARBINARY(36) NOT NULL PRIMARY KEY,
    client_id     VARBINARY(63) NOT NULL,
    node_id       VARBINARY(36) NOT NULL,
    dialect       VARBINARY(64) NOT NULL,
    instance_id   VARBINARY(36) NULL,
    slot          BIGINT        NULL,
    token_id      VARBINARY(36) NULL,
    agent_version TEXT          NULL,
    remote_addr   TEXT          NOT NULL,
    connected_at  BIGINT        NOT NULL,
    generation    BIGINT        NOT NULL DEFAULT 0,
    INDEX connections_client_id (client_id),
    INDEX connections_node_id (node_id)
) ENGINE = InnoDB DEFAULT CHARACTER SET utf8mb4;

-- Who may have tunnels, and what a downstream must show to use them: auth is token, basic or public.
CREATE TABLE IF NOT EXISTS clients (
    client_id    VARBINARY(63) NOT NULL PRIMARY KEY,
    auth         VARBINARY(16) NOT NULL,
    basic_user   TEXT          NULL,
    basic_hash   TEXT          NULL,
    created_at   BIGINT        NOT NULL,
    last_seen_at BIGINT        NULL
) ENGINE = InnoDB DEFAULT CHARACTER SET utf8mb4;

-- A revoked token's row is gone.
CREATE TABLE IF NOT EXISTS client_access_tokens (
    token_id   VARBINARY(36) NOT NULL PRIMARY KEY,
    client_id  VARBINARY(63) NOT NULL,
    token_hash VARBINARY(64) NOT NULL,
    label      TEXT          NULL,
    created_at BIGINT        NOT NULL,
    INDEX client_access_tokens_client_id (client_id)
) ENGINE = InnoDB DEFAULT CHARACTER SET utf8mb4;

-- Short-lived credentials that fit in a URL.
CREATE TABLE IF NOT EXISTS signature_tokens (
    client_id  VARBINARY(63) NOT NULL,
    token_hash VARBINARY(64) NOT NULL,
    created_at BIGINT        NOT NULL,
    expires_at BIGINT        NOT NULL,
    PRIMARY KEY (client_id, token_hash),
    INDEX signature_tokens_expires_at (expires_at)
) ENGINE = InnoDB DEFAULT CHARACTER SET utf8mb4;

CREATE TABLE IF NOT EXISTS magic_tokens (
    token_hash VARBINARY(64) NOT NULL PRIMARY KEY,
    client_id  VARBINARY(63) NOT NULL,
    created_at BIGINT        NOT NULL,
    INDEX magic_tokens_client_id (client_id)
) ENGINE = InnoDB DEFAULT CHARACTER SET utf8mb4;

-- What the relay itself remembers, such as the hash of its admin token.
CREATE TABLE IF NOT EXISTS settings (
    name  VARBINARY(190) NOT NULL PRIMARY KEY,
    value TEXT           NOT NULL
) ENGINE = InnoDB DEFAULT CHARACTER SET utf8mb4;
