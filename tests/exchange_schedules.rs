//! Exchanges between two ends over simulated paths that lose, repeat, reorder, stall and are cut, under a printed seed.
//!
//! What must hold: a body arrives byte for byte or visibly breaks, the upstream sees each request at most once, and once
//! the paths are good again everything that is still alive ends whole.
//! `ADIT_SEED=n` replays one seed.

use std::{
    collections::{HashMap, VecDeque},
    convert::Infallible,
    sync::{Arc, Mutex},
    time::Duration,
};

use adit::{
    exchange::{
        Clock,
        host::{RequestBody, Served, serve},
        ingress::Ingress,
        path::{Owner, Path},
        table::{Accepted, Exchanges, TICK, Taken},
    },
    ids::{InstanceId, RequestId, TunnelId},
    wire::{
        fields::keep_trailers,
        frame::{Code, Frame},
        head::{RequestFlags, RequestHead, ResponseHead},
    },
};
use bytes::{Bytes, BytesMut};
use http::{HeaderMap, Method, StatusCode};
use http_body_util::{BodyExt, Full};
use rand::{RngExt, SeedableRng, rngs::StdRng};

const SEEDS: u64 = 20;
const REQUESTS: usize = 12;

#[derive(Clone, Copy)]
struct Faults {
    lose: f64,
    repeat: f64,
    reorder: f64,
    cut: f64,
}

const GOOD: Faults = Faults {
    lose: 0.0,
    repeat: 0.0,
    reorder: 0.0,
    cut: 0.0,
};

/// Two ends of one simulated tunnel.
struct Tunnel {
    ingress: Arc<Path>,
    host: Arc<Path>,
    to_host: VecDeque<Frame>,
    to_ingress: VecDeque<Frame>,
}

struct World {
    ingress: Arc<Exchanges>,
    host: Arc<Exchanges>,
    owner: Owner,
    tunnels: Vec<Tunnel>,
    faults: Faults,
    random: StdRng,
    /// How often the upstream was called, by request.
    calls: Arc<Mutex<HashMap<RequestId, u32>>>,
    cuts: u32,
    lost: u32,
}

impl World {
    fn new(seed: u64) -> Self {
        let clock = Clock::default();
        let owner = Owner {
            client_id: "home".parse().expect("a client id"),
            instance_id: InstanceId::new(),
        };
        let table = || Arc::new(Exchanges::new(clock, Duration::from_secs(30)));
        let mut random = StdRng::seed_from_u64(seed);
        let faults = Faults {
            lose: random.random_range(0.0..0.05),
            repeat: random.random_range(0.0..0.05),
            reorder: random.random_range(0.0..0.1),
            cut: random.random_range(0.0..0.01),
        };
        let mut world = Self {
            ingress: table(),
            host: table(),
            owner,
            tunnels: Vec::new(),
            faults,
            random,
            calls: Arc::default(),
            cuts: 0,
            lost: 0,
        };
        world.connect();
        world.connect();
        world
    }

    fn connect(&mut self) {
        let path = |table: &Exchanges| Path::new(self.owner.clone(), table.clock());
        let (ingress, host) = (path(&self.ingress), path(&self.host));
        self.ingress.path_found(&ingress);
        self.host.path_found(&host);
        self.tunnels.push(Tunnel {
            ingress,
            host,
            to_host: VecDeque::new(),
            to_ingress: VecDeque::new(),
        });
    }

    fn disconnect(&mut self, at: usize) {
        let gone = self.tunnels.swap_remove(at);
        self.cuts += 1;
        gone.ingress.close();
        gone.host.close();
        let left = self.tunnels.first();
        self.ingress
            .path_lost(&gone.ingress, left.map(|tunnel| &tunnel.ingress));
        self.host.path_lost(&gone.host, left.map(|tunnel| &tunnel.host));
    }

    /// One step of the schedule.
    fn step(&mut self) {
        if !self.tunnels.is_empty() && self.random.random_bool(self.faults.cut) {
            let at = self.random.random_range(0..self.tunnels.len());
            self.disconnect(at);
        }
        if self.tunnels.len() < 2 && self.random.random_bool(0.02) {
            self.connect();
        }
        for at in 0..self.tunnels.len() {
            self.carry(at);
        }
    }

    fn carry(&mut self, at: usize) {
        let tunnel = &mut self.tunnels[at];
        for (path, queue) in [
            (&tunnel.ingress, &mut tunnel.to_host),
            (&tunnel.host, &mut tunnel.to_ingress),
        ] {
            let mut message = BytesMut::new();
            path.fill(&mut message);
            let mut message = message.freeze();
            while let Some(frame) = Frame::decode(&mut message).expect("our own frames") {
                if self.random.random_bool(self.faults.lose) {
                    self.lost += 1;
                    continue;
                }
                if self.random.random_bool(self.faults.repeat) {
                    queue.push_back(frame.clone());
                }
                queue.push_back(frame);
                let last = queue.len() - 1;
                if last > 0 && self.random.random_bool(self.faults.reorder) {
                    queue.swap(last, last - 1);
                }
            }
        }
        let frames = self.random.random_range(0..8);
        let (ingress, host) = (tunnel.ingress.clone(), tunnel.host.clone());
        let to_host: Vec<_> = (0..frames).filter_map(|_| tunnel.to_host.pop_front()).collect();
        let to_ingress: Vec<_> = (0..frames).filter_map(|_| tunnel.to_ingress.pop_front()).collect();
        to_host.into_iter().for_each(|frame| self.arrive_at_host(frame, &host));
        for frame in to_ingress {
            if let Some(id) = id_of(&frame) {
                let taken = self.ingress.on_frame(id, frame, &ingress).expect("the owner speaks");
                refuse(&self.ingress, id, taken, &ingress);
            }
        }
    }

    fn arrive_at_host(&mut self, frame: Frame, path: &Arc<Path>) {
        let Some(id) = id_of(&frame) else { return };
        if !matches!(frame, Frame::Open(..)) {
            let taken = self.host.on_frame(id, frame, path).expect("the owner speaks");
            return refuse(&self.host, id, taken, path);
        }
        match self.host.accept(id, path, 1000) {
            Accepted::New(exchange) => {
                exchange.on_frame(frame, path).expect("its own frame");
                let calls = self.calls.clone();
                tokio::spawn(serve(
                    exchange,
                    keep_trailers as fn(&mut HeaderMap),
                    move |head, body, _| {
                        *calls.lock().expect("no panic").entry(id).or_default() += 1;
                        echo(head, body)
                    },
                ));
            }
            Accepted::Known(exchange) => {
                exchange.on_frame(frame, path).expect("its own frame");
            }
            Accepted::Over(code) => path.send(Frame::Reset(id, code)),
        }
    }

    fn tick(&self) {
        let other = |paths: Vec<&Arc<Path>>, not: Option<&Arc<Path>>| {
            paths
                .into_iter()
                .find(|path| not.is_none_or(|not| !Arc::ptr_eq(path, not)))
                .cloned()
        };
        self.ingress
            .tick(|_, not| other(self.tunnels.iter().map(|tunnel| &tunnel.ingress).collect(), not));
        self.host
            .tick(|_, not| other(self.tunnels.iter().map(|tunnel| &tunnel.host).collect(), not));
    }
}

/// What nobody knows is answered, as relay and agent do.
fn refuse(table: &Exchanges, id: RequestId, taken: Taken, path: &Path) {
    if let Taken::Unknown(frame) = taken {
        table.refuse(id, &frame, path);
    }
}

fn id_of(frame: &Frame) -> Option<RequestId> {
    match frame {
        Frame::Open(id, _) | Frame::Stream(id, _) | Frame::Ack(id, _) => Some(*id),
        Frame::Stop(id, _) | Frame::Reset(id, _) | Frame::Done(id) => Some(*id),
        _ => None,
    }
}

type Answered = Served<http_body_util::combinators::BoxBody<Bytes, Infallible>, tokio::io::DuplexStream>;

/// The upstream: answers with what it got, as it comes.
async fn echo(head: RequestHead, body: Option<RequestBody>) -> Result<Answered, Code> {
    let answer = ResponseHead {
        status: StatusCode::OK,
        headers: head.headers,
    };
    let body = match body {
        Some(body) => body.collect().await.map_err(|_| Code::RequestBroken)?.to_bytes(),
        None => Bytes::from_static(b"nothing"),
    };
    Ok(Served::Response(answer, Full::new(body).boxed()))
}

/// One request; `Ok` when what came back is what went out.
async fn request(table: Arc<Exchanges>, path: Arc<Path>, body: Bytes) -> Result<(), String> {
    let ingress = Ingress {
        response_timeout: Duration::from_secs(120),
        body_idle: Duration::from_secs(60),
        keep_trailers,
    };
    let flags = RequestFlags {
        empty: body.is_empty(),
        upgrade: false,
    };
    let target = Bytes::from_static(b"/");
    let head = RequestHead {
        method: Method::POST,
        target,
        flags,
        headers: HeaderMap::new(),
    };
    let sent = (!body.is_empty()).then(|| Full::new(body.clone()));
    let answer = ingress
        .call(table.open(RequestId::new(), &path), &head, sent, |_| {})
        .await
        .map_err(|failure| format!("{failure:?}"))?;
    let got = answer
        .into_body(None, keep_trailers)
        .collect()
        .await
        .map_err(|error| error.to_string())?
        .to_bytes();
    let expected = if body.is_empty() {
        Bytes::from_static(b"nothing")
    } else {
        body
    };
    assert_eq!(got, expected, "whole and exact, never anything else");
    Ok(())
}

/// Returns how many tunnels were cut and frames lost.
async fn run(seed: u64) -> (u32, u32) {
    let mut world = World::new(seed);
    let mut requests = tokio::task::JoinSet::new();
    for _ in 0..REQUESTS {
        let size = [0, 1, 40, 5_000, 70_000, 400_000][world.random.random_range(0..6)];
        let body: Bytes = (0..size).map(|_| world.random.random::<u8>()).collect();
        let path = world.tunnels[world.random.random_range(0..world.tunnels.len())]
            .ingress
            .clone();
        requests.spawn(request(world.ingress.clone(), path, body));
    }
    let mut ticks = tokio::time::interval(TICK);
    let mut steps = tokio::time::interval(Duration::from_millis(5));
    let (mut done, mut failed, mut step) = (0, Vec::new(), 0u32);
    while done < REQUESTS {
        tokio::select! {
            _ = ticks.tick() => world.tick(),
            _ = steps.tick() => {
                step += 1;
                if step == 3000 {
                    world.faults = GOOD;
                }
                assert!(step < 60_000, "seed {seed}: it hangs with {done} of {REQUESTS} done");
                world.step();
            }
            Some(ended) = requests.join_next() => {
                done += 1;
                failed.extend(ended.expect("no panic").err());
            }
        }
    }
    assert!(
        failed.is_empty(),
        "seed {seed}: {failed:?} after {} cuts and {} lost frames",
        world.cuts,
        world.lost
    );
    assert!(
        world.calls.lock().expect("no panic").values().all(|calls| *calls == 1),
        "seed {seed}: called twice"
    );
    assert!(world.ingress.is_empty(), "seed {seed}: nothing is left at the ingress");
    (world.cuts, world.lost)
}

#[test]
fn exchanges_survive_every_schedule() {
    let seeds = match std::env::var("ADIT_SEED") {
        Ok(seed) => vec![seed.parse().expect("ADIT_SEED is a number")],
        Err(_) => (0..SEEDS).collect(),
    };
    let (mut faults, all) = ((0, 0), seeds.len() > 1);
    for seed in seeds {
        println!("ADIT_SEED={seed}");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build();
        let (cuts, lost) = runtime.expect("a runtime").block_on(run(seed));
        faults = (faults.0 + cuts, faults.1 + lost);
    }
    assert!(
        !all || (faults.0 > 0 && faults.1 > 0),
        "the schedules cut tunnels and lost frames: {faults:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_host_that_nobody_answers_gives_up_also_with_two_tunnels_to_try() {
    const PATIENCE: Duration = Duration::from_secs(45);
    let clock = Clock::default();
    let owner = Owner {
        client_id: "home".parse().expect("a client id"),
        instance_id: InstanceId::new(),
    };
    let host = Exchanges::new(clock, PATIENCE);
    let paths = [Path::new(owner.clone(), clock), Path::new(owner, clock)];
    let Accepted::New(exchange) = host.accept(RequestId::new(), &paths[0], 1) else {
        panic!("it is new")
    };
    exchange.write([Bytes::from_static(b"an answer")]);
    exchange.flush();
    let moves = std::cell::Cell::new(0);
    let started = clock.now();
    while !host.is_empty() && clock.now() - started < 2 * PATIENCE {
        for path in &paths {
            path.fill(&mut BytesMut::new());
        }
        tokio::time::advance(TICK).await;
        let other = |not: Option<&Arc<Path>>| {
            let mut others = paths.iter();
            others
                .find(|path| not.is_none_or(|not| !Arc::ptr_eq(path, not)))
                .cloned()
        };
        moves.set(moves.get() + host.tick(|_, not| other(not)));
    }
    assert!(moves.get() > 1, "it tried both");
    assert_eq!(exchange.ended(), Some(Code::PathLost));
}

/// What ended while it was on its way back is nobody's to send elsewhere: who waits for that would try for ever.
#[tokio::test(start_paused = true)]
async fn an_exchange_that_reached_nobody_and_has_ended_goes_nowhere() {
    use futures_util::FutureExt;
    let (clock, id) = (Clock::default(), RequestId::new());
    let owner = Owner {
        client_id: "home".parse().expect("a client id"),
        instance_id: InstanceId::new(),
    };
    let ingress = Arc::new(Exchanges::new(clock, Duration::from_secs(30)));
    let tunnel = TunnelId::new();
    let path = Path::over_bus(owner, clock, tunnel, Arc::default());
    let open = ingress.open(id, &path);
    open.exchange.write([Bytes::from_static(b"a request")]);
    open.exchange.flush();
    path.fill(&mut BytesMut::new());
    assert!(
        open.exchange.unreached().now_or_never().is_none(),
        "it may have arrived"
    );
    ingress.open_returned(id, tunnel);
    assert!(open.exchange.unreached().now_or_never().is_some(), "it did not");
    open.exchange.reset(Code::Timeout);
    assert!(open.exchange.unreached().now_or_never().is_none(), "it is over");
}
