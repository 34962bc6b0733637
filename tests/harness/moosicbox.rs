//! A MoosicBox server and its apps by hand: their WebSockets, as they speak on the wire.

use std::net::SocketAddr;

use futures_util::{SinkExt, StreamExt};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Error, Message, client::IntoClientRequest},
};

use super::{TestRelay, id, within};

/// A client of a relay, and the signature that its server and apps show.
pub struct Tenant {
    pub client_id: String,
    pub token: String,
    pub signature: String,
}

impl Tenant {
    pub async fn new(relay: &TestRelay, client_id: &str) -> Self {
        let token = relay.client(client_id, adit::cluster::registry::NewAuth::Token).await;
        let signature = relay.registry.create_signature(&id(client_id)).await;
        Self {
            client_id: client_id.into(),
            token,
            signature: signature.expect("a signature").expose().to_owned(),
        }
    }

    /// A request as an app sends it.
    pub fn ask(&self, method: &str, path: &str) -> http::request::Builder {
        let between = if path.contains('?') { '&' } else { '?' };
        http::Request::builder()
            .method(method)
            .uri(format!("{path}{between}clientId={}", self.client_id))
            .header("host", "relay.test")
            .header("authorization", self.token.as_str())
    }

    fn url(&self, relay: SocketAddr, more: &str) -> String {
        let (client, signature) = (&self.client_id, &self.signature);
        format!("ws://{relay}/ws?clientId={client}&signature={signature}{more}")
    }

    pub async fn sender(&self, relay: SocketAddr) -> Sender {
        let socket = connect(&self.url(relay, "&sender=true")).await;
        Sender(socket.expect("a tunnel"))
    }

    pub async fn app(&self, relay: SocketAddr) -> App {
        App(connect(&self.url(relay, "")).await.expect("a connection"))
    }
}

async fn connect(url: &str) -> Result<WebSocketStream<TcpStream>, Error> {
    let request = url.into_client_request()?;
    let address = request.uri().authority().expect("an address").to_string();
    let stream = TcpStream::connect(address).await.expect("the relay listens");
    let (socket, _) = within("a handshake", tokio_tungstenite::client_async(request, stream)).await?;
    Ok(socket)
}

/// What comes next that is neither ping nor pong; `None` when it is closed.
async fn next(socket: &mut WebSocketStream<TcpStream>) -> Option<Message> {
    loop {
        match within("a message", socket.next()).await? {
            Ok(Message::Ping(_) | Message::Pong(_)) => {}
            Ok(message) => return Some(message),
            Err(_) => return None,
        }
    }
}

/// A MoosicBox server's end of its tunnel.
pub struct Sender(pub WebSocketStream<TcpStream>);

impl Sender {
    /// The next text of the relay.
    pub async fn next(&mut self) -> Value {
        match next(&mut self.0).await {
            Some(Message::Text(text)) => serde_json::from_str(&text).expect("JSON"),
            other => panic!("no text: {other:?}"),
        }
    }

    /// The next HTTP request, and its id.
    pub async fn request(&mut self) -> (u64, Value) {
        let request = self.next().await;
        assert_eq!(request["type"], "HTTP", "{request}");
        (request["request_id"].as_u64().expect("a number"), request)
    }

    /// Waits until the relay has closed it.
    pub async fn closed(&mut self) {
        while !matches!(next(&mut self.0).await, None | Some(Message::Close(_))) {}
    }

    pub async fn packet(&mut self, request_id: u64, packet_id: u32, last: bool, body: &[u8]) {
        self.packet_of(request_id, packet_id, last, 200, "{}", body).await;
    }

    /// The status and headers are in packet 1 only.
    pub async fn packet_of(&mut self, id: u64, packet_id: u32, last: bool, status: u16, headers: &str, body: &[u8]) {
        let mut frame = Vec::new();
        frame.extend(id.to_be_bytes());
        frame.extend(packet_id.to_be_bytes());
        frame.push(last.into());
        if packet_id == 1 {
            frame.extend(status.to_be_bytes());
            frame.extend((headers.len() as u32).to_be_bytes());
            frame.extend(headers.as_bytes());
        }
        frame.extend(body);
        self.binary(frame).await;
    }

    pub async fn binary(&mut self, frame: Vec<u8>) {
        let sent = within("a write", self.0.send(Message::Binary(frame.into()))).await;
        sent.expect("the tunnel is open");
    }

    pub async fn text(&mut self, json: Value) {
        let sent = within("a write", self.0.send(Message::Text(json.to_string().into()))).await;
        sent.expect("the tunnel is open");
    }
}

/// An app's WebSocket.
pub struct App(pub WebSocketStream<TcpStream>);

impl App {
    pub async fn say(&mut self, text: &str) {
        let sent = within("a write", self.0.send(Message::Text(text.into()))).await;
        sent.expect("it is open");
    }

    /// The next message, as it is written.
    pub async fn hear(&mut self) -> String {
        match next(&mut self.0).await {
            Some(Message::Text(text)) => text.to_string(),
            other => panic!("no text: {other:?}"),
        }
    }

    /// The code that it is closed with.
    pub async fn close_code(&mut self) -> Option<u16> {
        loop {
            match next(&mut self.0).await {
                Some(Message::Close(frame)) => return frame.map(|frame| frame.code.into()),
                Some(_) => {}
                None => return None,
            }
        }
    }
}
