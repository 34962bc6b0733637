//! Requests through the cluster, and what must be true of them.

use std::{
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
    sync::{Arc, Mutex},
    time::Duration,
};

use adit::{
    cluster::registry::{Client, DownstreamAuth},
    exchange::ingress::Ingress,
    ids::{ClientId, RequestId},
    relay::router,
    wire::{
        fields::keep_trailers,
        head::{RequestFlags, RequestHead},
    },
};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody, combinators::BoxBody};
use rand::{
    RngExt, SeedableRng,
    rngs::{SmallRng, StdRng},
};

use super::{node::Node, world::World};

pub type Body = BoxBody<Bytes, Infallible>;

const NAME: &str = "x-name";

/// A request's own number: says what it sends and what it is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Name(pub u64);

impl Name {
    pub fn of(headers: &HeaderMap) -> Option<Self> {
        headers.get(NAME)?.to_str().ok()?.parse().ok().map(Self)
    }

    fn random(self, what: u64) -> SmallRng {
        SmallRng::seed_from_u64(self.0 ^ (what << 56))
    }

    /// What goes up: a third of them nothing.
    fn request(self) -> Bytes {
        bytes(&mut self.random(1), &[0, 0, 1, 300, 5_000, 0, 20_000, 100_000])
    }

    /// The answer to `echo`.
    pub fn answer(self, echo: &Bytes) -> Bytes {
        let tail = bytes(&mut self.random(2), &[0, 20, 3_000, 3_000, 30_000, 30_000, 200_000]);
        [echo.as_ref(), tail.as_ref()].concat().into()
    }
}

fn bytes(random: &mut SmallRng, sizes: &[usize]) -> Bytes {
    let size = sizes[random.random_range(0..sizes.len())];
    let mut bytes = vec![0; size];
    random.fill(bytes.as_mut_slice());
    bytes.into()
}

/// A body that comes piece by piece, with pauses.
pub fn in_pieces(name: Name, bytes: Bytes) -> Body {
    let stream = futures_util::stream::unfold((bytes, name.random(3)), |(mut rest, mut random)| async move {
        if rest.is_empty() {
            return None;
        }
        tokio::time::sleep(Duration::from_millis(random.random_range(0..200))).await;
        let piece = rest.split_to(random.random_range(1..=40_000).min(rest.len()));
        Some((Ok(Frame::data(piece)), (rest, random)))
    });
    StreamBody::new(Box::pin(stream)).boxed()
}

/// What became of requests, and how often the upstream was called for them.
#[derive(Default)]
pub struct Ledger {
    calls: Mutex<BTreeMap<Name, u32>>,
    in_flight: Mutex<BTreeSet<(ClientId, RequestId)>>,
    ended: Mutex<BTreeMap<Name, End>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    Whole,
    /// It was refused before anything of it went out.
    NotBegun(String),
    Broken(String),
    /// What came is not what was sent.
    Wrong(String),
}

impl Ledger {
    pub fn called(&self, name: Name) {
        *self.calls.lock().expect("no panic").entry(name).or_default() += 1;
    }

    pub fn calls(&self) -> BTreeMap<Name, u32> {
        self.calls.lock().expect("no panic").clone()
    }

    pub fn ends(&self) -> BTreeMap<Name, End> {
        self.ended.lock().expect("no panic").clone()
    }

    fn ended(&self, name: Name, end: End) {
        self.ended.lock().expect("no panic").insert(name, end);
    }

    /// An exchange in flight that is not this client's.
    pub fn any_of_others(&self, client_id: &ClientId, random: &mut StdRng) -> Option<RequestId> {
        let in_flight = self.in_flight.lock().expect("no panic");
        let ids: Vec<_> = in_flight.iter().filter(|(client, _)| client != client_id).collect();
        (!ids.is_empty()).then(|| ids[random.random_range(0..ids.len())].1)
    }
}

/// Notes that an exchange is in flight while it lives.
struct InFlight<'a>(&'a Ledger, (ClientId, RequestId));

impl<'a> InFlight<'a> {
    fn begin(ledger: &'a Ledger, client_id: &ClientId, id: RequestId) -> Self {
        let one = (client_id.clone(), id);
        ledger.in_flight.lock().expect("no panic").insert(one.clone());
        Self(ledger, one)
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.in_flight.lock().expect("no panic").remove(&self.1);
    }
}

/// Starts a request at a node; what becomes of it is in the ledger, unless the node dies.
pub fn start(world: &Arc<World>, node: &Arc<Node>, client_id: &ClientId, name: Name) {
    let client = Client {
        client_id: client_id.clone(),
        auth: DownstreamAuth::Public,
        tokens: Vec::new(),
        last_seen_at_ms: Some(i64::MAX), // a moment ago, whatever the time
    };
    let (world, board) = (world.clone(), node.board.clone());
    node.spawn(async move {
        let end = request(&world, &board, &client, name).await;
        world.log(format!("{name:?} ends: {end:?}"));
        world.ledger.ended(name, end);
    });
}

/// One request, as `relay::ingress` serves it; not repeated, whatever it is.
async fn request(world: &World, board: &adit::relay::switchboard::Switchboard, client: &Client, name: Name) -> End {
    let tunnel = match router::route(board, client, None).await {
        Ok(tunnel) => tunnel,
        Err(cause) => return End::NotBegun(cause.to_string()),
    };
    let id = RequestId::from_bytes(world.random(|random| random.random()));
    let _in_flight = InFlight::begin(&world.ledger, &client.client_id, id);
    world.log(format!(
        "{name:?} {id} begins at {:02x} to {:?} of {:?}",
        board.node_id().to_bytes()[0],
        tunnel.place,
        tunnel.path.owner.instance_id
    ));
    let open = board.exchanges.open(id, &tunnel.path);
    let exchange = open.exchange.clone();
    let up = name.request();
    let head = RequestHead {
        method: Method::POST,
        target: Bytes::from_static(b"/"),
        flags: RequestFlags {
            empty: up.is_empty(),
            upgrade: false,
        },
        headers: HeaderMap::from_iter([(http::HeaderName::from_static(NAME), HeaderValue::from(name.0))]),
    };
    let body = (!up.is_empty()).then(|| in_pieces(name, up.clone()));
    let ingress = Ingress {
        response_timeout: Duration::from_secs(120),
        body_idle: Duration::from_secs(60),
        keep_trailers,
    };
    let answer = tokio::select! {
        biased;
        answer = ingress.call(open, &head, body, |_| {}) => answer,
        failed = router::follow(board, client, false, &exchange) => return End::NotBegun(format!("{failed:?}")),
    };
    let answer = match answer {
        Ok(answer) => answer,
        Err(failure) => return End::Broken(format!("{failure:?}")),
    };
    if Name::of(&answer.head.headers) != Some(name) {
        return End::Wrong("the head is another's".into());
    }
    compare(answer.into_body(None, keep_trailers), &name.answer(&up)).await
}

async fn compare<B: http_body::Body<Data = Bytes> + Unpin>(mut body: B, expected: &Bytes) -> End
where
    B::Error: std::fmt::Display,
{
    let mut at = 0;
    while let Some(frame) = body.frame().await {
        let piece = match frame.map(Frame::into_data) {
            Ok(Ok(piece)) => piece,
            Ok(Err(_)) => continue,
            Err(error) => return End::Broken(error.to_string()),
        };
        if expected.get(at..at + piece.len()) != Some(&piece[..]) {
            return End::Wrong(format!("other bytes after {at}"));
        }
        at += piece.len();
    }
    match at == expected.len() {
        true => End::Whole,
        false => End::Wrong(format!(
            "it ends after {at} of {} bytes as if that were all",
            expected.len()
        )),
    }
}
