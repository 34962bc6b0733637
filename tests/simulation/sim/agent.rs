//! An agent and its upstream: holds two tunnels, answers requests, and keeps count of them.

use std::{sync::Arc, time::Duration};

use adit::{
    exchange::{
        Exchange,
        host::{RequestBody, Served, serve},
        hosting::{Host, Service},
        link::{Taker, drive},
        path::Owner,
    },
    ids::RequestId,
    wire::{
        fields::keep_trailers,
        frame::{Code, Frame},
        head::{RequestHead, ResponseHead},
        socket::{FrameSocket, Side},
        stream::Chunk,
    },
};
use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use http_body_util::BodyExt;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::task::JoinSet;

use super::{
    load::{self, Body, Name},
    node::{Hello, KEEP_ALIVE, RESUME_TIMEOUT},
    world::World,
};

const SLOTS: u32 = 2;
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);
/// How often a hostile agent speaks in an exchange that is not its own.
const LIE_EVERY: Duration = Duration::from_millis(700);

pub struct Agent {
    pub host: Arc<Host<Upstream>>,
    /// All that runs in this process: killed when dropped.
    _tasks: JoinSet<()>,
}

/// Calls no upstream: is one.
pub struct Upstream {
    world: Arc<World>,
    owner: Owner,
}

impl Agent {
    pub fn start(world: &Arc<World>, owner: Owner, hostile: bool) -> Self {
        let upstream = Upstream {
            world: world.clone(),
            owner: owner.clone(),
        };
        let host = Arc::new(Host::new(owner, upstream));
        let mut tasks = JoinSet::new();
        for slot in 0..SLOTS {
            let random = StdRng::seed_from_u64(world.random(|random| random.random()));
            tasks.spawn(hold(slot, world.clone(), host.clone(), random, hostile));
        }
        let time = host.clone();
        tasks.spawn(async move { time.pass_time().await });
        Self { host, _tasks: tasks }
    }
}

/// Holds a tunnel open, as an agent's slot does.
async fn hold(slot: u32, world: Arc<World>, host: Arc<Host<Upstream>>, mut random: StdRng, hostile: bool) {
    let mut leaving = JoinSet::new();
    let mut generation = 0;
    loop {
        generation += 1;
        let hello = Hello {
            owner: host.owner().clone(),
            slot,
            generation,
        };
        if let Ok(Some(io)) = tokio::time::timeout(DIAL_TIMEOUT, world.dial(hello)).await {
            let (path, taker, mut told) = host.link_up(RESUME_TIMEOUT);
            let mut link = JoinSet::new();
            link.spawn({
                let (host, path) = (host.clone(), path.clone());
                async move {
                    let socket = FrameSocket::new(io, Side::Agent).await;
                    drive(socket, path.clone(), &taker as &(dyn Taker + Send + Sync), KEEP_ALIVE).await;
                    host.link_lost(&path);
                }
            });
            let lies = async {
                loop {
                    tokio::time::sleep(LIE_EVERY).await;
                    if let Some(frame) = world
                        .random(|random| lie(&world, host.owner(), random))
                        .filter(|_| hostile)
                    {
                        path.send(frame);
                    }
                }
            };
            tokio::select! {
                biased;
                told = told.changed_to_leave() => match told {
                    adit::exchange::hosting::Told::Drain => {
                        leaving.spawn(async move { while link.join_next().await.is_some() {} });
                        continue;
                    }
                    _ => host.link_lost(&path),
                },
                _ = link.join_next() => {}
                () = lies => {}
            }
        }
        tokio::time::sleep(Duration::from_millis(random.random_range(100..1500))).await;
    }
}

/// A frame in somebody else's exchange.
fn lie(world: &World, liar: &Owner, random: &mut StdRng) -> Option<Frame> {
    let id: RequestId = world.ledger.any_of_others(&liar.client_id, random)?;
    Some(match random.random_range(0..3) {
        0 => Frame::Reset(id, Code::Cancelled),
        1 => Frame::Stop(id, Code::Cancelled),
        _ => {
            let data = Bytes::from(vec![random.random(); 64]);
            let chunk = Chunk {
                offset: 0,
                data,
                fin: random.random(),
            };
            Frame::Stream(id, chunk)
        }
    })
}

impl Service for Upstream {
    async fn serve(&self, exchange: Arc<Exchange>) {
        self.world
            .log(format!("{} is opened at {:?}", exchange.id, self.owner.instance_id));
        serve(
            exchange,
            keep_trailers as fn(&mut HeaderMap),
            |head, body, _| async move { self.answer(head, body).await },
        )
        .await;
    }
}

impl Upstream {
    /// What came, and then what the request's name says, in pieces.
    async fn answer(&self, head: RequestHead, body: Option<RequestBody>) -> Result<Served<Body, End>, Code> {
        let name = Name::of(&head.headers).ok_or(Code::Protocol)?;
        self.world
            .log(format!("{name:?} is served by {:?}", self.owner.instance_id));
        self.world.ledger.called(name);
        let echo = match body {
            Some(body) => body.collect().await.map_err(|_| Code::RequestBroken)?.to_bytes(),
            None => Bytes::new(),
        };
        let answer = ResponseHead {
            status: StatusCode::OK,
            headers: head.headers,
        };
        Ok(Served::Response(answer, load::in_pieces(name, name.answer(&echo))))
    }
}

type End = super::net::End;
