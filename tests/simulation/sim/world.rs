//! The world: nodes, agents, what fails, and what must be true.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use adit::{
    cluster::bus::local::{Faults, Hub},
    exchange::path::Owner,
    ids::{ClientId, InstanceId, NodeId},
};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::{
    sync::oneshot,
    time::{Instant, sleep},
};

use super::{
    agent::Agent,
    load::{self, End, Ledger, Name},
    net::{self, Cable},
    node::{Hello, Node},
    registry::Rows,
};

const NODES: usize = 3;
/// How long things fail.
const FAULTS_FOR: Duration = Duration::from_secs(20);
const REQUESTS: u64 = 60;
/// Once nothing fails any more, all is whole within this.
const HEALED_WITHIN: Duration = Duration::from_secs(60);
/// What is left of broken exchanges goes within this: a host waits 15 s longer than its relay.
const FORGOTTEN_WITHIN: Duration = Duration::from_secs(240);

/// What a run did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// All that happened, in order.
    pub log: Vec<String>,
    /// Faults that happened.
    pub faults: u32,
    /// Requests that were answered whole.
    pub whole: usize,
}

pub struct World {
    pub ledger: Ledger,
    hub: Arc<Hub>,
    rows: Arc<Rows>,
    random: Mutex<StdRng>,
    began: Instant,
    /// Guards what lives now.
    parts: Mutex<Parts>,
}

#[derive(Default)]
struct Parts {
    nodes: Vec<Arc<Node>>,
    cables: Vec<Arc<Cable>>,
    log: Vec<String>,
    faults: u32,
}

impl World {
    fn new(seed: u64) -> Arc<Self> {
        let hub = Hub::shared();
        let world = Arc::new(Self {
            ledger: Ledger::default(),
            rows: Rows::new(seed),
            random: Mutex::new(StdRng::seed_from_u64(seed)),
            began: Instant::now(),
            parts: Mutex::default(),
            hub,
        });
        (0..NODES).for_each(|_| world.start_node());
        world
    }

    pub fn random<T>(&self, draw: impl FnOnce(&mut StdRng) -> T) -> T {
        draw(&mut self.random.lock().expect("no panic"))
    }

    fn parts(&self) -> MutexGuard<'_, Parts> {
        self.parts.lock().expect("no panic")
    }

    /// Writes down what happened, with the time since the world began.
    pub fn log(&self, what: String) {
        let line = format!("{:>9.3?} {what}", self.began.elapsed());
        self.parts().log.push(line);
    }

    fn one_of<T: Clone>(&self, of: &[T]) -> Option<T> {
        (!of.is_empty()).then(|| of[self.random(|random| random.random_range(0..of.len()))].clone())
    }

    fn start_node(&self) {
        let id = NodeId::from_bytes(self.random(|random| random.random()));
        self.parts().nodes.push(Node::start(id, &self.hub, &self.rows));
    }

    /// Nodes that are there; a load balancer sends nothing new to those that leave.
    fn nodes(&self, welcoming: bool) -> Vec<Arc<Node>> {
        let mut parts = self.parts();
        parts.nodes.retain(|node| node.is_alive());
        let nodes = parts.nodes.iter().filter(|node| !welcoming || !node.is_leaving());
        nodes.cloned().collect()
    }

    /// An agent dials the load balancer. `None` when there is no node.
    pub async fn dial(self: &Arc<Self>, hello: Hello) -> Option<net::End> {
        let node = self.one_of(&self.nodes(true))?;
        let latency = Duration::from_micros(self.random(|random| random.random_range(100..20_000)));
        let (cable, here, there) = Cable::new(latency);
        self.parts().cables.push(cable);
        let (accepted, hello_back) = oneshot::channel();
        node.accept(there, hello, accepted);
        hello_back.await.ok().map(|()| here)
    }

    fn cables(&self) -> Vec<Arc<Cable>> {
        let mut parts = self.parts();
        parts.cables.retain(|cable| !cable.is_over());
        parts.cables.clone()
    }

    // --- faults -----------------------------------------------------------------------------------------------------

    /// Something fails, or is mended.
    fn fail(self: &Arc<Self>) {
        let what = self.random(|random| random.random_range(0..100));
        let told: Option<String> = match what {
            0..20 => self.one_of(&self.cables()).map(|cable| {
                cable.cut();
                "a connection is cut".into()
            }),
            20..25 => self.one_of(&self.cables()).map(|cable| {
                cable.fall_silent();
                "a connection falls silent".into()
            }),
            25..40 => self.one_of(&self.cables()).map(|cable| {
                let time = self.millis(50, 4000);
                cable.stall(time);
                "a connection stalls".into()
            }),
            40..52 => self.one_of(&self.nodes(false)).map(|node| {
                node.freezer.freeze();
                self.later(self.millis(100, 6000), {
                    let node = node.clone();
                    move |_| node.freezer.thaw()
                });
                format!("{} freezes", node.name())
            }),
            52..64 => self.one_of(&self.nodes(false)).map(|node| {
                self.hub.cut_off(node.id);
                self.later(self.millis(50, 3000), {
                    let id = node.id;
                    move |world| world.hub.reconnect(id)
                });
                format!("{} loses the bus", node.name())
            }),
            64..72 => {
                self.rows.set_away(true);
                self.later(self.millis(100, 5000), |world| world.rows.set_away(false));
                Some("the registry is away".into())
            }
            72..80 => self.one_of(&self.nodes(true)).map(|node| {
                node.kill();
                let delay = self.millis(0, 2000);
                self.later(delay, |world| world.start_node());
                format!("{} is killed", node.name())
            }),
            80..86 => self
                .one_of(&self.nodes(true))
                .filter(|node| !node.freezer.is_frozen())
                .map(|node| {
                    self.start_node();
                    node.leave(&self.rows);
                    format!("{} leaves", node.name())
                }),
            86..90 => {
                self.hub.interrupt();
                Some("all subscribers are told that they missed something".into())
            }
            _ => {
                let faults = self.random(some_faults);
                self.hub.misbehave(faults, self.random(|random| random.random()));
                Some("the bus misbehaves otherwise".into())
            }
        };
        if let Some(told) = told {
            self.parts().faults += 1;
            self.log(told);
        }
    }

    fn millis(&self, least: u64, most: u64) -> Duration {
        Duration::from_millis(self.random(|random| random.random_range(least..most)))
    }

    fn later(self: &Arc<Self>, delay: Duration, act: impl FnOnce(&Arc<World>) + Send + 'static) {
        let world = self.clone();
        tokio::spawn(async move {
            sleep(delay).await;
            act(&world);
        });
    }

    fn heal(self: &Arc<Self>) {
        self.hub.behave();
        self.rows.set_away(false);
        for node in self.nodes(false) {
            node.freezer.thaw();
            self.hub.reconnect(node.id);
        }
        self.log("all is mended".into());
    }

    // --- what must be true ------------------------------------------------------------------------------------------

    /// Always.
    fn check(&self) -> Result<(), String> {
        for (name, end) in self.ledger.ends() {
            match end {
                End::Whole | End::NotBegun(_) => {}
                End::Broken(why) => return Err(format!("{name:?} broke: {why}")),
                End::Wrong(why) => return Err(format!("{name:?} is wrong: {why}")),
            }
        }
        if let Some((name, times)) = self.ledger.calls().into_iter().find(|(_, times)| *times > 1) {
            return Err(format!("{name:?} was called {times} times"));
        }
        for node in self.nodes(false) {
            if node.freezer.spins() {
                return Err(format!("{} spins", node.name()));
            }
            let known = node.board.tunnels.known();
            let slots: HashSet<_> = known
                .iter()
                .map(|tunnel| (tunnel.path.owner.clone(), tunnel.slot))
                .collect();
            if slots.len() != known.len() {
                return Err(format!("node {} knows two tunnels of one slot", node.id));
            }
        }
        Ok(())
    }

    fn ended(&self) -> usize {
        self.ledger.ends().len()
    }
}

fn some_faults(random: &mut StdRng) -> Faults {
    let mut share = |most: f64| {
        if random.random() {
            random.random_range(0.0..most)
        } else {
            0.0
        }
    };
    let (loss, duplicate, reorder) = (share(0.1), share(0.1), share(0.1));
    Faults {
        loss,
        duplicate,
        reorder,
        delay: Duration::from_millis(random.random_range(0..60)),
    }
}

fn owner(world: &World, client: &ClientId) -> Owner {
    Owner {
        client_id: client.clone(),
        instance_id: InstanceId::from_bytes(world.random(|random| random.random())),
    }
}

/// One seed: a cluster, two clients, requests, and faults; then no more faults, and everything that should end well does.
/// `Err` says what was not true.
pub async fn run(seed: u64) -> Result<Report, String> {
    let world = World::new(seed);
    let told = play(&world).await;
    told.map_err(|why| {
        let log = world.parts().log.join("\n  ");
        format!("seed {seed}: {why}\n  {log}")
    })
}

async fn play(world: &Arc<World>) -> Result<Report, String> {
    let clients: [ClientId; 2] = ["home", "other"].map(|name| name.parse().expect("a client id"));
    let agents = [
        Agent::start(world, owner(world, &clients[0]), false),
        Agent::start(world, owner(world, &clients[0]), false),
        Agent::start(world, owner(world, &clients[1]), true),
    ];
    sleep(Duration::from_secs(1)).await;
    let began = Instant::now();
    let mut names = (1..).map(Name);
    while began.elapsed() < FAULTS_FOR {
        sleep(world.millis(10, 250)).await;
        let left = REQUESTS.saturating_sub(names.clone().next().expect("endless").0 - 1);
        for _ in 0..world.random(|random| random.random_range(0..3)).min(left) {
            ask(world, &clients, names.next().expect("endless"));
        }
        if world.random(|random| random.random_bool(0.4)) {
            world.fail();
        }
        world.check()?;
    }
    world.heal();
    let asked = names.clone().next().expect("endless").0 - 1;
    settle(world, asked).await?;
    probe(world, &clients, &mut names).await?;
    forget(world, &agents).await?;
    let whole = world.ledger.ends().values().filter(|end| **end == End::Whole).count();
    let parts = world.parts();
    Ok(Report {
        log: parts.log.clone(),
        faults: parts.faults,
        whole,
    })
}

fn ask(world: &Arc<World>, clients: &[ClientId; 2], name: Name) {
    let client = world.one_of(clients).expect("two");
    if let Some(node) = world.one_of(&world.nodes(true)) {
        load::start(world, &node, &client, name);
    }
}

/// All that began, at a node that lives, ends well.
async fn settle(world: &Arc<World>, asked: u64) -> Result<(), String> {
    let healed = Instant::now();
    while healed.elapsed() < HEALED_WITHIN {
        sleep(Duration::from_millis(500)).await;
        world.reaped();
        world.check()?;
        let open: usize = world.nodes(false).iter().map(|node| node.board.exchanges.len()).sum();
        if open == 0 && world.ended() <= asked as usize && healed.elapsed() > Duration::from_secs(20) {
            return Ok(());
        }
    }
    let open: Vec<_> = world
        .nodes(false)
        .iter()
        .map(|node| {
            format!(
                "{}: {} open, {} tunnels",
                node.id,
                node.board.exchanges.len(),
                node.board.tunnels.len()
            )
        })
        .collect();
    Err(format!("it hangs: {open:?}"))
}

impl World {
    /// The reaper's work, once dead nodes have been dead for long enough.
    fn reaped(&self) {
        let living = self.nodes(false).iter().map(|node| node.id).collect();
        self.rows.reap(&living);
    }
}

/// Every client is reached through every node.
async fn probe(
    world: &Arc<World>,
    clients: &[ClientId; 2],
    names: &mut impl Iterator<Item = Name>,
) -> Result<(), String> {
    let mut asked = Vec::new();
    for node in world.nodes(true) {
        for client in clients {
            let name = names.next().ok_or("no names")?;
            load::start(world, &node, client, name);
            asked.push((name, node.id, client));
        }
    }
    sleep(Duration::from_secs(30)).await;
    world.check()?;
    let ends = world.ledger.ends();
    match asked.iter().find(|(name, ..)| ends.get(name) != Some(&End::Whole)) {
        Some((name, node, client)) => Err(format!("{client} through {node}: {name:?} {:?}", ends.get(name))),
        None => Ok(()),
    }
}

/// Nobody keeps what is over.
async fn forget(world: &Arc<World>, agents: &[Agent]) -> Result<(), String> {
    let began = Instant::now();
    loop {
        let at_nodes: usize = world.nodes(false).iter().map(|node| node.board.exchanges.len()).sum();
        let at_agents: usize = agents.iter().map(|agent| agent.host.exchanges()).sum();
        if at_nodes + at_agents == 0 {
            return Ok(());
        }
        if began.elapsed() >= FORGOTTEN_WITHIN {
            return Err(format!("nodes keep {at_nodes} exchanges, agents {at_agents}"));
        }
        sleep(Duration::from_secs(1)).await;
    }
}
