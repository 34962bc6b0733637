//! All exchanges that one process is the host of: the frames of its tunnels go to the exchanges they belong to, each new
//! exchange to whoever serves it, and exchanges follow the tunnels.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::sync::{Notify, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    Clock, Exchange, NotYours,
    link::{LinkEnd, Taker},
    path::{Owner, Path},
    table::{Accepted, Exchanges, TICK, Taken},
};
use crate::wire::frame::{Code, Frame};

/// How much longer than the relay the host keeps an exchange without a path: the relay gives up first, and says so.
const RESUME_GRACE: Duration = Duration::from_secs(15);
/// Exchanges on one tunnel; more are refused, and the relay tries elsewhere.
const MAX_EXCHANGES: usize = 16 * 1024;
/// What is in flight when the host is told to end gets this long.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a goodbye may take to leave.
const GOODBYE: Duration = Duration::from_millis(500);

/// What the relay said about a tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    /// Nothing.
    Stay,
    /// Open another, then leave.
    Drain,
    /// Another took over.
    Superseded,
}

/// Waits for what the relay says.
pub struct ToldWatch(watch::Receiver<Told>);

impl ToldWatch {
    /// Resolves when the tunnel is to be left.
    pub async fn changed_to_leave(&mut self) -> Told {
        let told = self.0.wait_for(|told| *told != Told::Stay).await.map(|told| *told);
        match told {
            Ok(told) => told,
            Err(_) => std::future::pending().await, // the link ended; its task tells
        }
    }
}

/// Serves exchanges.
pub trait Service: Send + Sync + 'static {
    /// Serves one to its end; dropped when the host stops.
    fn serve(&self, exchange: Arc<Exchange>) -> impl Future<Output = ()> + Send;
}

/// What the tunnels of one process share.
pub struct Host<S> {
    owner: Owner,
    exchanges: Exchanges,
    /// Who serves.
    pub service: S,
    /// The tunnels that are up; held to copy or change the list.
    links: Mutex<Vec<Arc<Path>>>,
    link_gone: Notify,
    tasks: TaskTracker,
    leaving: AtomicBool,
    stop: CancellationToken,
}

impl<S: Service> Host<S> {
    /// Without a tunnel yet.
    pub fn new(owner: Owner, service: S) -> Self {
        Self {
            owner,
            exchanges: Exchanges::new(Clock::default(), RESUME_GRACE),
            service,
            links: Mutex::default(),
            link_gone: Notify::new(),
            tasks: TaskTracker::new(),
            leaving: AtomicBool::new(false),
            stop: CancellationToken::new(),
        }
    }

    /// Whose the tunnels are.
    pub fn owner(&self) -> &Owner {
        &self.owner
    }

    fn links(&self) -> MutexGuard<'_, Vec<Arc<Path>>> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Exchanges that are being served, or wait for a tunnel.
    pub fn exchanges(&self) -> usize {
        self.exchanges.len()
    }

    /// A tunnel is up: exchanges that wait for one go on over it.
    pub fn link_up(self: &Arc<Self>, relay_waits: Duration) -> (Arc<Path>, LinkTaker<S>, ToldWatch) {
        self.exchanges.set_resume_timeout(relay_waits + RESUME_GRACE);
        let path = Path::new(self.owner.clone(), self.exchanges.clock());
        self.links().push(path.clone());
        let resumed = self.exchanges.path_found(&path);
        if resumed > 0 {
            tracing::info!(exchanges = resumed, "exchanges go on over the new tunnel");
        }
        let (told, watch) = watch::channel(Told::Stay);
        (
            path,
            LinkTaker {
                host: self.clone(),
                told,
            },
            ToldWatch(watch),
        )
    }

    /// A tunnel is gone: its exchanges go on over another, or wait.
    pub fn link_lost(&self, path: &Arc<Path>) {
        path.close();
        self.links().retain(|link| !Arc::ptr_eq(link, path));
        self.link_gone.notify_waiters();
        let other = self.other(Some(path));
        self.exchanges.path_lost(path, other.as_ref());
    }

    /// The relay does not take this agent any more: without a tunnel, nobody will hear what is in flight.
    pub fn turned_away(&self) {
        if self.links().is_empty() {
            self.exchanges.owner_left(&self.owner, Code::PathLost);
        }
    }

    fn other(&self, not: Option<&Arc<Path>>) -> Option<Arc<Path>> {
        let links = self.links();
        let others = links
            .iter()
            .filter(|link| !link.is_closed() && not.is_none_or(|not| !Arc::ptr_eq(link, not)));
        others.min_by_key(|link| link.in_flight()).cloned()
    }

    /// Lets time pass for the exchanges, for ever.
    pub async fn pass_time(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            self.exchanges.tick(|_, not| self.other(not));
        }
    }

    /// Whether the host is ending: no new tunnels.
    pub fn is_leaving(&self) -> bool {
        self.leaving.load(Ordering::Relaxed)
    }

    /// Asks the relay for no more requests, and waits until those that are here are answered.
    pub async fn drain(&self) {
        self.leaving.store(true, Ordering::Relaxed);
        self.links()
            .iter()
            .for_each(|link| link.send(Frame::Drain(DRAIN_TIMEOUT.as_millis() as u32)));
        let idle = async {
            // Without a tunnel nothing more can be answered: no new ones are opened now.
            while !self.exchanges.is_empty() && !self.links().is_empty() {
                tokio::time::sleep(TICK).await;
            }
        };
        tokio::time::timeout(DRAIN_TIMEOUT, idle).await.ok();
    }

    /// Says goodbye on every tunnel, so that the relay ends what is in flight at once, and stops serving.
    pub async fn leave(&self) {
        for link in self.links().iter() {
            link.send(Frame::Goodbye);
            link.close();
        }
        let gone = async {
            loop {
                let next = self.link_gone.notified();
                if self.links().is_empty() {
                    break;
                }
                next.await;
            }
        };
        tokio::time::timeout(GOODBYE, gone).await.ok();
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    fn serve(self: &Arc<Self>, exchange: Arc<Exchange>) {
        let host = self.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                biased;
                () = host.stop.cancelled() => {}
                () = host.service.serve(exchange) => {}
            }
        });
    }
}

/// Takes the frames of one tunnel.
pub struct LinkTaker<S> {
    host: Arc<Host<S>>,
    told: watch::Sender<Told>,
}

impl<S: Service> LinkTaker<S> {
    fn open(&self, frame: Frame, path: &Arc<Path>) -> Result<(), NotYours> {
        let Frame::Open(id, _) = &frame else { return Ok(()) };
        match self.host.exchanges.accept(*id, path, MAX_EXCHANGES) {
            Accepted::New(exchange) => {
                exchange.on_frame(frame, path)?;
                self.host.serve(exchange);
            }
            Accepted::Known(exchange) => {
                exchange.on_frame(frame, path)?;
            }
            Accepted::Over(code) => path.send(Frame::Reset(*id, code)),
        }
        Ok(())
    }
}

impl<S: Service> Taker for LinkTaker<S> {
    fn on_frame(&self, frame: Frame, path: &Arc<Path>) -> Result<(), LinkEnd> {
        match &frame {
            Frame::Open(..) => self.open(frame, path).map_err(|NotYours| LinkEnd::Foreign)?,
            Frame::Stream(id, _) | Frame::Ack(id, _) | Frame::Stop(id, _) | Frame::Reset(id, _) | Frame::Done(id) => {
                let id = *id;
                let taken = self.host.exchanges.on_frame(id, frame, path);
                if let Taken::Unknown(frame) = taken.map_err(|NotYours| LinkEnd::Foreign)? {
                    self.host.exchanges.refuse(id, &frame, path);
                }
            }
            Frame::Drain(_) => drop(self.told.send(Told::Drain)),
            Frame::Superseded => drop(self.told.send(Told::Superseded)),
            _ => {}
        }
        Ok(())
    }
}
