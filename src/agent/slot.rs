//! Keeps one tunnel open for ever: dials, is driven, is told to leave, dials again.

use std::{sync::Arc, time::Duration};

use rand::RngExt;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use super::{
    Event,
    dial::{DialError, Dialed, Dialer},
    host::Host,
};
use crate::exchange::{
    hosting::{Told, ToldWatch},
    link::{KeepAlive, LinkEnd, Taker, drive},
    path::Path,
};

/// The first pause between attempts; each further one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// While an outage is young, attempts are at most this far apart, so that the agent is back within 2 s of the relay.
const SHORT_PAUSE: Duration = Duration::from_millis(1500);
/// How long an outage counts as young.
const YOUNG: Duration = Duration::from_secs(60);
/// Later attempts are at most this far apart.
const LONG_PAUSE: Duration = Duration::from_secs(15);
/// After a refusal that a person has to mend.
const REFUSED_PAUSE: Duration = Duration::from_secs(30);
/// After a newer tunnel took over, at least: two that fight would otherwise take turns for ever.
const SUPERSEDED_PAUSE: Duration = Duration::from_secs(30);

/// Holds the tunnel of `slot` until the task is dropped.
pub(super) async fn hold(slot: u32, host: Arc<Host>, dialer: Arc<Dialer>) {
    let mut outage = Outage::default();
    // Tunnels that were told to leave, and live until the relay closes them.
    let mut leaving: Vec<AbortOnDropHandle<LinkEnd>> = Vec::new();
    let mut generation = 0;
    while !host.is_leaving() {
        generation += 1;
        leaving.retain(|link| !link.is_finished());
        let (why, pause) = match dialer.dial(slot, generation).await {
            Ok(dialed) => {
                let Link {
                    path,
                    mut told,
                    mut task,
                } = start(&host, dialed, slot);
                outage = Outage::default();
                // What the relay said comes before how the link ended: it closes the link right after.
                tokio::select! {
                    biased;
                    told = told.changed_to_leave() => match told {
                        Told::Drain => {
                            tracing::info!(tunnel.slot = slot, "the relay node is leaving: opening a tunnel elsewhere");
                            leaving.push(task);
                            continue;
                        }
                        _ => {
                            host.link_lost(&path);
                            ("a newer tunnel of this agent took over".into(), superseded_pause())
                        }
                    },
                    end = &mut task => (why(end), outage.pause()),
                }
            }
            Err(error @ DialError::Unauthorized(..)) => {
                host.turned_away();
                (error.to_string(), jittered(REFUSED_PAUSE))
            }
            // The old tunnel still serves: no hurry.
            Err(error) if !leaving.is_empty() => (error.to_string(), outage.unhurried()),
            Err(error) => (error.to_string(), outage.pause()),
        };
        if host.is_leaving() {
            break;
        }
        host.service.tell(Event::Disconnected {
            slot,
            why,
            retry_in: pause,
        });
        tokio::time::sleep(pause).await;
    }
    // What still runs over the old tunnels ends with them.
    for link in leaving {
        link.await.ok();
    }
}

fn why(end: Result<LinkEnd, tokio::task::JoinError>) -> String {
    end.map_or_else(|error| error.to_string(), |end| end.to_string())
}

struct Link {
    path: Arc<Path>,
    told: ToldWatch,
    task: AbortOnDropHandle<LinkEnd>,
}

fn start(host: &Arc<Host>, dialed: Dialed, slot: u32) -> Link {
    let Dialed { socket, hello, first } = dialed;
    let keep_alive = KeepAlive {
        interval: Duration::from_millis(hello.ping_interval_ms.clamp(1000, 60_000)),
        timeout: Duration::from_millis(hello.ping_timeout_ms.clamp(1000, 60_000)),
    };
    let (path, taker, told) = host.link_up(Duration::from_millis(hello.resume_timeout_ms));
    host.service.tell(Event::Connected {
        slot,
        node_id: hello.node_id,
        public_url: hello.public_url,
    });
    let (host, link) = (host.clone(), path.clone());
    let task = tokio::spawn(async move {
        let taken = first.into_iter().try_for_each(|frame| taker.on_frame(frame, &link));
        let end = match taken {
            Ok(()) => drive(socket, link.clone(), &taker, keep_alive).await,
            Err(end) => end,
        };
        host.link_lost(&link);
        end
    });
    Link {
        path,
        told,
        task: AbortOnDropHandle::new(task),
    }
}

/// How long the relay has been away, and how patient to be.
struct Outage {
    since: Instant,
    next: Duration,
}

impl Default for Outage {
    fn default() -> Self {
        Self {
            since: Instant::now(),
            next: FIRST_PAUSE,
        }
    }
}

impl Outage {
    fn unhurried(&mut self) -> Duration {
        let pause = self.next.max(SHORT_PAUSE).min(LONG_PAUSE);
        self.next = (pause * 2).min(LONG_PAUSE);
        jittered(pause)
    }

    fn pause(&mut self) -> Duration {
        let most = if self.since.elapsed() < YOUNG {
            SHORT_PAUSE
        } else {
            LONG_PAUSE
        };
        let pause = self.next.min(most);
        self.next = (self.next * 2).min(LONG_PAUSE);
        jittered(pause)
    }
}

/// Never less than [`SUPERSEDED_PAUSE`].
fn superseded_pause() -> Duration {
    SUPERSEDED_PAUSE + jittered(SUPERSEDED_PAUSE)
}

/// Between half and all of it over one, so that many agents do not come back at once.
fn jittered(pause: Duration) -> Duration {
    pause
        .mul_f64(rand::rng().random_range(0.5..1.0))
        .max(Duration::from_millis(20))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_superseded_stays_away_for_half_a_minute() {
        assert!((0..100).all(|_| superseded_pause() >= Duration::from_secs(30)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_young_outage_is_retried_within_two_seconds() {
        let mut outage = Outage::default();
        for _ in 0..20 {
            assert!(outage.pause() <= SHORT_PAUSE);
        }
        tokio::time::advance(YOUNG).await;
        assert!((0..20).map(|_| outage.pause()).max() > Some(SHORT_PAUSE));
    }
}
