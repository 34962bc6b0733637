//! `adit status`: the nodes, tunnels and traffic of a relay in the terminal.

use std::{
    io::{self, IsTerminal, Write},
    time::Duration,
};

use http::Method;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::{
    admin_api::{AdminApi, AdminArgs, ApiError},
    client::ago,
};
use crate::cluster::{letter::Traffic, now_ms};

/// Often enough to follow with the eye, and each look is one message to every node.
const WATCH_EVERY: Duration = Duration::from_secs(2);
/// What fits a screen; more would scroll the nodes away at every look.
const WATCHED_TUNNELS: usize = 40;
/// Homes the cursor and clears what is below it (ECMA-48).
const REDRAW: &str = "\x1b[H\x1b[J";

/// Show the nodes, tunnels and traffic of the whole relay
///
/// Any node's admin listener will do. Body bytes and requests are counted when a request has ended, by the node that it
/// came to, since that node started.
#[derive(clap::Args, Debug)]
#[command(after_long_help = "Examples:\n  \
    adit status --relay http://10.0.0.5:9090\n  \
    adit status --watch\n  \
    adit status --json | jq '.nodes[].traffic.tunnels'\n")]
pub struct StatusCommand {
    #[command(flatten)]
    admin: AdminArgs,
    /// Look again every 2 s, until Ctrl-C
    #[arg(long)]
    watch: bool,
    /// Print what the admin API says, a JSON object a line
    #[arg(long)]
    json: bool,
}

/// A node as the admin API lists it.
#[derive(Deserialize)]
struct Node {
    node_id: String,
    address: String,
    version: String,
    started_at: i64,
    heartbeat_age_ms: i64,
    draining: bool,
    traffic: Option<Traffic>,
}

/// A tunnel as the admin API lists it.
#[derive(Deserialize)]
struct Tunnel {
    tunnel_id: String,
    client_id: String,
    node_id: String,
    dialect: String,
    slot: Option<u32>,
    agent_version: Option<String>,
    remote_addr: String,
    connected_at: i64,
    exchanges_in_flight: Option<u64>,
    rtt_us: Option<u64>,
}

/// All of it at one time.
struct Look {
    at: Instant,
    nodes: Value,
    tunnels: Vec<Value>,
}

impl StatusCommand {
    /// Prints it, once or until nobody reads.
    pub async fn run(self) -> anyhow::Result<()> {
        let api = AdminApi::new(self.admin)?;
        let mut last = look(&api).await?;
        let mut page = show(&last, None, self.json, self.watch)?;
        let redraw = self.watch && !self.json && io::stdout().is_terminal();
        let mut looks = interval(WATCH_EVERY);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        looks.tick().await;
        loop {
            let head = if redraw { REDRAW } else { "" };
            let written = writeln!(io::stdout(), "{head}{page}");
            if !self.watch || written.is_err() {
                return Ok(());
            }
            looks.tick().await;
            // A node that is being replaced does not answer for a moment.
            page = match look(&api).await {
                Ok(next) => {
                    let page = show(&next, Some(&last), self.json, true)?;
                    last = next;
                    page
                }
                Err(error) if self.json => json!({ "error": error.to_string() }).to_string(),
                Err(error) => error.to_string(),
            };
        }
    }
}

async fn look(api: &AdminApi) -> Result<Look, ApiError> {
    let mut nodes = api.call(Method::GET, "/nodes", Value::Null).await?;
    let (mut tunnels, mut after) = (Vec::new(), String::new());
    loop {
        let path = format!("/tunnels?after={after}");
        let mut page = api.call(Method::GET, &path, Value::Null).await?;
        if let Value::Array(rows) = page["tunnels"].take() {
            tunnels.extend(rows);
        }
        match page["next"].as_str() {
            Some(next) => next.clone_into(&mut after),
            None => break,
        }
    }
    Ok(Look {
        at: Instant::now(),
        nodes: nodes["nodes"].take(),
        tunnels,
    })
}

fn show(look: &Look, before: Option<&Look>, as_json: bool, watched: bool) -> anyhow::Result<String> {
    if as_json {
        return Ok(json!({ "nodes": look.nodes, "tunnels": look.tunnels }).to_string());
    }
    let nodes = Vec::<Node>::deserialize(&look.nodes)?;
    let shown = if watched { WATCHED_TUNNELS } else { usize::MAX };
    let tunnels = look.tunnels.iter().take(shown).map(Tunnel::deserialize);
    let tunnels = tunnels.collect::<Result<Vec<Tunnel>, _>>()?;
    let now = now_ms();
    let mut lines = vec![summary(&nodes, look.tunnels.len())];
    if let Some(before) = before {
        let nodes_before = Vec::<Node>::deserialize(&before.nodes)?;
        lines.push(rates(&nodes, &nodes_before, look.at - before.at));
    }
    lines.push(String::new());
    lines.extend(table(
        &[
            "NODE",
            "ADDRESS",
            "VERSION",
            "STARTED",
            "HEARTBEAT",
            "STATE",
            "TUNNELS",
            "IN FLIGHT",
            "REQUESTS",
            "TO UPSTREAM",
            "FROM UPSTREAM",
        ],
        nodes.iter().map(|node| node.row(now)).collect(),
    ));
    if !tunnels.is_empty() {
        lines.push(String::new());
        lines.extend(table(
            &[
                "TUNNEL",
                "CLIENT",
                "NODE",
                "DIALECT",
                "SLOT",
                "AGENT",
                "FROM",
                "OPENED",
                "IN FLIGHT",
                "ROUND TRIP",
            ],
            tunnels.iter().map(|tunnel| tunnel.row(now)).collect(),
        ));
    }
    let more = look.tunnels.len() - tunnels.len();
    if more > 0 {
        lines.push(format!(
            "and {more} more tunnels: `adit status` without --watch lists them"
        ));
    }
    Ok(lines.join("\n"))
}

impl Node {
    fn row(&self, now: i64) -> Vec<String> {
        let count = |of: fn(&Traffic) -> String| self.traffic.as_ref().map_or_else(|| "-".to_owned(), of);
        let state = match (self.draining, &self.traffic) {
            (true, _) => "draining",
            (false, Some(_)) => "up",
            (false, None) => "no answer",
        };
        vec![
            self.node_id.clone(),
            self.address.clone(),
            self.version.clone(),
            ago(now - self.started_at),
            ago(self.heartbeat_age_ms),
            state.to_owned(),
            count(|traffic| traffic.tunnels.to_string()),
            count(|traffic| traffic.exchanges_in_flight.to_string()),
            count(|traffic| ended(traffic).to_string()),
            count(|traffic| bytes(traffic.to_upstream_bytes)),
            count(|traffic| bytes(traffic.from_upstream_bytes)),
        ]
    }
}

impl Tunnel {
    fn row(&self, now: i64) -> Vec<String> {
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        vec![
            self.tunnel_id.clone(),
            self.client_id.clone(),
            self.node_id.clone(),
            self.dialect.clone(),
            or_dash(self.slot.map(|slot| slot.to_string())),
            // An agent says this of itself, and a terminal obeys what it is sent.
            or_dash(
                self.agent_version
                    .as_ref()
                    .map(|version| version.replace(char::is_control, "?")),
            ),
            self.remote_addr.clone(),
            ago(now - self.connected_at),
            or_dash(self.exchanges_in_flight.map(|count| count.to_string())),
            or_dash(self.rtt_us.map(|us| format!("{:.1} ms", us as f64 / 1000.0))),
        ]
    }
}

fn ended(traffic: &Traffic) -> u64 {
    traffic.outcomes.values().sum()
}

fn summary(nodes: &[Node], tunnels: usize) -> String {
    let all = nodes.iter().filter_map(|node| node.traffic.as_ref());
    let (mut in_flight, mut requests, mut ok) = (0, 0, 0);
    for traffic in all {
        in_flight += traffic.exchanges_in_flight;
        requests += ended(traffic);
        ok += traffic.outcomes.get("ok").copied().unwrap_or(0);
    }
    format!(
        "{}, {}, {} in flight; {requests} ended, {ok} of them whole",
        counted(nodes.len() as u64, "node"),
        counted(tunnels as u64, "tunnel"),
        counted(in_flight, "request"),
    )
}

/// So many of them.
fn counted(count: u64, one: &str) -> String {
    let many = if count == 1 { "" } else { "s" };
    format!("{count} {one}{many}")
}

/// Of the nodes that answered both times: one that is new has its past, one that left took it along.
fn rates(nodes: &[Node], before: &[Node], time: Duration) -> String {
    let (mut requests, mut to, mut from) = (0, 0, 0);
    for node in nodes {
        let old = before.iter().find(|old| old.node_id == node.node_id);
        if let (Some(new), Some(old)) = (&node.traffic, old.and_then(|old| old.traffic.as_ref())) {
            requests += ended(new).saturating_sub(ended(old));
            to += new.to_upstream_bytes.saturating_sub(old.to_upstream_bytes);
            from += new.from_upstream_bytes.saturating_sub(old.from_upstream_bytes);
        }
    }
    let a_second = |count: u64| count as f64 / time.as_secs_f64().max(0.001);
    format!(
        "{:.1} requests/s, {}/s to upstreams, {}/s from upstreams",
        a_second(requests),
        bytes(a_second(to) as u64),
        bytes(a_second(from) as u64)
    )
}

/// As people read it: at most four digits, and a unit.
fn bytes(count: u64) -> String {
    let (mut value, mut unit) = (count as f64, "B");
    for next in ["KiB", "MiB", "GiB", "TiB"] {
        if value < 1024.0 {
            break;
        }
        (value, unit) = (value / 1024.0, next);
    }
    if unit == "B" {
        format!("{count} B")
    } else {
        format!("{value:.1} {unit}")
    }
}

/// Columns as wide as what is in them.
fn table(head: &[&str], rows: Vec<Vec<String>>) -> Vec<String> {
    let head = head.iter().map(|&name| name.to_owned()).collect();
    let rows: Vec<Vec<String>> = std::iter::once(head).chain(rows).collect();
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter()
            .filter_map(|row| row.get(column))
            .map(|cell| cell.chars().count())
            .max()
    };
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(requests: u64, from: u64) -> Look {
        let node = json!({
            "node_id": "n", "address": "10.0.0.1:9090", "version": "0.1.0", "started_at": 0, "heartbeat_age_ms": 1000,
            "draining": false,
            "traffic": {"tunnels": 1, "exchanges_in_flight": 2, "from_upstream_bytes": from, "outcomes": {"ok": requests}},
        });
        let silent = json!({
            "node_id": "m", "address": "10.0.0.2:9090", "version": "0.1.0", "started_at": 0, "heartbeat_age_ms": 19_000,
            "draining": false, "traffic": null,
        });
        let tunnel = json!({
            "tunnel_id": "t", "client_id": "home", "node_id": "n", "dialect": "adit", "slot": 0,
            "agent_version": "1\u{1b}[2J", "remote_addr": "192.0.2.1", "connected_at": 0, "exchanges_in_flight": 2,
            "rtt_us": 12_340,
        });
        Look {
            at: Instant::now(),
            nodes: json!([node, silent]),
            tunnels: vec![tunnel; 50],
        }
    }

    #[tokio::test(start_paused = true)]
    async fn tables_sum_up_and_say_what_is_not_known() {
        let before = at(10, 1000);
        let page = show(&before, None, false, false).expect("shown");
        for part in [
            "2 nodes, 50 tunnels, 2 requests in flight; 10 ended, 10 of them whole",
            "no answer",
            "1000 B",
            "12.3 ms",
            "1?[2J",
        ] {
            assert!(page.contains(part), "{part} is not in\n{page}");
        }
        assert!(!page.contains('\u{1b}') && !page.contains("/s "), "{page}");
        tokio::time::advance(Duration::from_secs(2)).await;
        let page = show(&at(30, 1000 + (4 << 20)), Some(&before), false, true).expect("shown");
        assert!(
            page.contains("10.0 requests/s, 0 B/s to upstreams, 2.0 MiB/s from upstreams"),
            "{page}"
        );
        assert!(page.contains("and 10 more tunnels"), "{page}");
    }

    #[test]
    fn json_is_what_the_api_says_on_one_line() {
        let look = at(1, 1);
        let page = show(&look, None, true, false).expect("shown");
        let parsed: Value = serde_json::from_str(&page).expect("JSON");
        assert_eq!((&parsed["nodes"], page.lines().count()), (&look.nodes, 1));
    }

    #[test]
    fn bytes_have_a_unit() {
        for (count, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1536, "1.5 KiB"),
            (5 << 40, "5.0 TiB"),
            (1 << 60, "1048576.0 TiB"),
        ] {
            assert_eq!(bytes(count), text);
        }
    }
}
