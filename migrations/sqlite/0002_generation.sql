-- The agent's own count of its dials of a slot: of two tunnels of an instance's slot, the higher one is the newer.
ALTER TABLE connections ADD COLUMN generation BIGINT NOT NULL DEFAULT 0;
