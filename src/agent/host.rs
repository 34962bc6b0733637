//! What an agent does with an exchange: calls the upstream, and tells whoever runs the agent.

use std::sync::Arc;

use http::HeaderMap;

use super::{
    Event, Listener,
    upstream::{Caller, Record},
};
use crate::{
    exchange::{Exchange, host::serve, hosting::Service},
    wire::fields,
};

/// Serves exchanges from the upstream.
pub(super) struct Upstream {
    caller: Caller,
    listener: Listener,
}

/// The agent's tunnels and exchanges.
pub(super) type Host = crate::exchange::hosting::Host<Upstream>;

impl Upstream {
    pub fn new(caller: Caller, listener: Listener) -> Self {
        Self { caller, listener }
    }

    pub fn tell(&self, event: Event) {
        (self.listener)(event);
    }
}

impl Service for Upstream {
    async fn serve(&self, exchange: Arc<Exchange>) {
        let record = Record::default();
        let summary = serve(
            exchange,
            fields::keep_trailers as fn(&mut HeaderMap),
            |head, body, interim| {
                record.begin(&head);
                self.caller.call(head, body, interim, &record)
            },
        )
        .await;
        if let Some(event) = record.event(summary) {
            self.tell(event);
        }
    }
}
