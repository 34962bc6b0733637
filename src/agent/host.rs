//! What an agent does with an exchange: calls the upstream, and tells whoever runs the agent.

use std::sync::Arc;

use http::HeaderMap;

use super::{
    Event, Listener,
    upstream::{Caller, Record},
};
use crate::{
    exchange::{Exchange, host::serve, hosting::Service},
    ids::ClientId,
    wire::fields,
};

/// Exchanges on one tunnel.
pub(super) const MAX_EXCHANGES: usize = 16 * 1024;

/// Serves exchanges from the upstream.
pub(super) struct Upstream {
    client_id: ClientId,
    caller: Caller,
    listener: Listener,
}

/// The agent's tunnels and exchanges.
pub(super) type Host = crate::exchange::hosting::Host<Upstream>;

impl Upstream {
    pub fn new(client_id: ClientId, caller: Caller, listener: Listener) -> Self {
        Self {
            client_id,
            caller,
            listener,
        }
    }

    pub fn tell(&self, event: Event) {
        (self.listener)(event);
    }
}

impl Service for Upstream {
    async fn serve(&self, exchange: Arc<Exchange>) {
        let (record, id) = (Record::default(), exchange.id);
        let summary = serve(
            exchange,
            fields::keep_trailers as fn(&mut HeaderMap),
            |mut head, body, interim| {
                record.begin(&self.client_id, id, self.caller.upstream(), &mut head);
                self.caller.call(head, body, interim, &record)
            },
        )
        .await;
        if let Some(event) = record.event(summary) {
            self.tell(event);
        }
    }
}
