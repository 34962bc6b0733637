//! A MoosicBox server as far as its tunnel goes: `moosicbox_tunnel_sender`, driven as that server drives it, in front of a
//! local service. Usage: `moosicbox-sender WS_URL SERVICE_PORT DIRECTORY`, with `TUNNEL_ACCESS_TOKEN` in the environment.
//! The client and its access token are kept in DIRECTORY; the track of every number is the file `track` there.
//!
//! It prints `client ID TOKEN`, then `text JSON` for each message of the relay, `error REQUEST_ID …` for one that the crate
//! gave up, `closed`. It reads `all JSON`, `to CONNECTION JSON` and `except CONNECTION JSON`: what it then says to apps.

mod library;

use std::{env, error::Error, path::Path, sync::Arc};

use moosicbox_tunnel::TunnelRequest;
use moosicbox_tunnel_sender::{
    TunnelMessage,
    sender::{TunnelSender, TunnelSenderHandle},
};
use moosicbox_ws::WebsocketSender;
use switchy_database::{Database, config::ConfigDatabase, rusqlite::RusqliteDatabase};
use tokio::io::{AsyncBufReadExt, BufReader};

/// The tables that the crate asks for credentials and connections of apps.
const TABLES: &str = "
    CREATE TABLE IF NOT EXISTS client_access_tokens (
        token TEXT NOT NULL, client_id TEXT NOT NULL, expires TEXT, updated TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP);
    CREATE TABLE IF NOT EXISTS connections (
        id TEXT PRIMARY KEY NOT NULL, name TEXT NOT NULL,
        created TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP, updated TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP);
    CREATE TABLE IF NOT EXISTS players (
        id INTEGER PRIMARY KEY NOT NULL, connection_id TEXT NOT NULL, name TEXT NOT NULL, audio_output_id TEXT NOT NULL,
        playing INTEGER NOT NULL DEFAULT 0,
        created TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP, updated TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP);";

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    env_logger::init();
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [ws_url, service_port, directory] = &arguments[..] else {
        return Err("usage: moosicbox-sender WS_URL SERVICE_PORT DIRECTORY".into());
    };
    let service_port: u16 = service_port.parse()?;
    let directory = Path::new(directory);
    let host = ws_url.replacen("ws", "http", 1).trim_end_matches("/ws").to_owned();

    let database = rusqlite::Connection::open(directory.join("config.db"))?;
    database.execute_batch(TABLES)?;
    let database = RusqliteDatabase::new(vec![Arc::new(switchy_async::sync::Mutex::new(database))]);
    let database: Arc<Box<dyn Database>> = Arc::new(Box::new(database));
    let database = ConfigDatabase::from(database);
    library::add_profile("default", directory.join("track"));

    let (client_id, access_token) = moosicbox_auth::get_client_id_and_access_token(&database, &host).await?;
    println!("client {client_id} {access_token}");
    let (tunnel, handle) = TunnelSender::new(host, ws_url.clone(), client_id, access_token, database);
    tokio::spawn(say(handle.clone()));
    let mut messages = tunnel.start();
    while let Some(message) = messages.recv().await {
        match message {
            TunnelMessage::Text(text) => {
                println!("text {text}");
                tokio::spawn(serve(tunnel.clone(), handle.clone(), service_port, text));
            }
            TunnelMessage::Ping(_) | TunnelMessage::Pong(_) => {}
            TunnelMessage::Close => println!("closed"),
            TunnelMessage::Binary(_) | TunnelMessage::Frame(_) => panic!("MoosicBox's server panics on a binary message"),
        }
    }
    Ok(())
}

async fn serve(tunnel: TunnelSender, apps: TunnelSenderHandle, service_port: u16, text: String) {
    let request = serde_json::from_str(&text).expect("MoosicBox's server panics on another text");
    let (id, done) = match request {
        TunnelRequest::Http(it) => (
            it.request_id,
            tunnel
                .tunnel_request(
                    service_port,
                    it.request_id,
                    it.method,
                    it.path,
                    it.query,
                    it.payload,
                    it.headers,
                    it.profile,
                    it.encoding,
                )
                .await,
        ),
        // MoosicBox passes its server for local apps, which passes all on to the tunnel's handle.
        TunnelRequest::Ws(it) => (
            it.request_id,
            tunnel.ws_request(it.conn_id, it.request_id, it.body, it.profile, apps).await,
        ),
        TunnelRequest::Abort(it) => {
            tunnel.abort_request(it.request_id);
            (it.request_id, Ok(()))
        }
    };
    if let Err(error) = done {
        println!("error {id} {error:?}");
    }
}

/// What the server says to apps unasked.
async fn say(apps: TunnelSenderHandle) {
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        let (word, rest) = line.split_once(' ').unwrap_or_default();
        let said = match (word, rest.split_once(' ')) {
            ("all", _) => apps.send_all(rest).await,
            ("to", Some((connection, json))) => apps.send(connection, json).await,
            ("except", Some((connection, json))) => apps.send_all_except(connection, json).await,
            _ => panic!("not understood: {line}"),
        };
        said.expect("said");
    }
}
