//! One tunnel's connection to a relay: TCP, TLS, the WebSocket handshake, and the hellos. Says in words what went wrong.

use std::{sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use http::{HeaderValue, header};
use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_tungstenite::tungstenite::{self, client::IntoClientRequest};

use super::Config;
use crate::{
    config::RelayUrl,
    ids::{ClientId, InstanceId},
    secret::Secret,
    wire::{
        frame::{Frame, SUBPROTOCOL},
        hello::{self, AgentHello, RelayHello},
        socket::{FrameSocket, Side},
    },
};

/// Connecting, TLS, handshake and hello together take no longer.
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);
/// Data that the kernel holds unsent, bytes: what comes later (a ping, a grant of credit) waits behind no more than this.
const NOT_SENT_LOWAT: u32 = 128 * 1024;
/// How much of a refusal's body is read for its explanation, bytes.
const MAX_EXPLANATION: usize = 2048;

/// Why there is no tunnel.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// TCP or TLS failed.
    #[error("cannot reach the relay at {0}: {1}; check the address, and that the relay runs")]
    Unreachable(RelayUrl, std::io::Error),
    /// It took too long.
    #[error("the relay at {0} did not answer within 10 s; check the address and what is in between")]
    Timeout(RelayUrl),
    /// The token or the client is not accepted.
    #[error(
        "the relay does not accept the token for client `{0}`: is it whole, of this client, and not revoked? `adit token create {0}` makes another"
    )]
    Unauthorized(ClientId),
    /// Any other refusal, with what it said.
    #[error("the relay refused the tunnel with status {0}: {1}")]
    Refused(u16, String),
    /// Whatever answers there is not a relay.
    #[error("what answers at {0} is not an adit relay: {1}")]
    NotARelay(RelayUrl, String),
}

/// A connection that may be encrypted.
pub(super) trait Connection: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Connection for T {}

/// A tunnel whose hellos are exchanged.
pub(super) struct Dialed {
    pub socket: FrameSocket<Box<dyn Connection>>,
    pub hello: RelayHello,
    /// What the relay said right behind its hello.
    pub first: Vec<Frame>,
}

/// Opens tunnels for one agent.
pub(super) struct Dialer {
    relay: RelayUrl,
    client_id: ClientId,
    token: Secret,
    tls: Arc<rustls::ClientConfig>,
    instance_id: InstanceId,
}

impl Dialer {
    pub fn new(config: &Config, tls: Arc<rustls::ClientConfig>, instance_id: InstanceId) -> Self {
        let Config {
            relay,
            client_id,
            token,
            ..
        } = config.clone();
        Self {
            relay,
            client_id,
            token,
            tls,
            instance_id,
        }
    }

    /// Opens the tunnel of a slot, for the `generation`th time.
    pub async fn dial(&self, slot: u32, generation: u64) -> Result<Dialed, DialError> {
        let dialing = self.dial_now(slot, generation);
        let timeout = |_| DialError::Timeout(self.relay.clone());
        tokio::time::timeout(DIAL_TIMEOUT, dialing).await.map_err(timeout)?
    }

    async fn dial_now(&self, slot: u32, generation: u64) -> Result<Dialed, DialError> {
        let io = self
            .connect()
            .await
            .map_err(|error| DialError::Unreachable(self.relay.clone(), error))?;
        let io = self.handshake(io).await?;
        let mut socket = FrameSocket::new(io, Side::Agent).await;
        let (hello, first) = self
            .greet(&mut socket, slot, generation)
            .await
            .map_err(|why| DialError::NotARelay(self.relay.clone(), why))?;
        Ok(Dialed { socket, hello, first })
    }

    async fn connect(&self) -> std::io::Result<Box<dyn Connection>> {
        let host = self
            .relay
            .authority
            .host()
            .trim_start_matches('[')
            .trim_end_matches(']');
        let tcp = TcpStream::connect((host, self.relay.port())).await?;
        tcp.set_nodelay(true)?;
        socket2::SockRef::from(&tcp).set_tcp_notsent_lowat(NOT_SENT_LOWAT).ok();
        if !self.relay.tls {
            return Ok(Box::new(tcp));
        }
        let name = ServerName::try_from(host.to_owned()).map_err(std::io::Error::other)?;
        let tls = tokio_rustls::TlsConnector::from(self.tls.clone())
            .connect(name, tcp)
            .await
            .map_err(explained)?;
        Ok(Box::new(tls))
    }

    async fn handshake(&self, io: Box<dyn Connection>) -> Result<Box<dyn Connection>, DialError> {
        let not_a_relay = |why: String| DialError::NotARelay(self.relay.clone(), why);
        let url = format!("ws://{}/ws?clientId={}", self.relay.authority, self.client_id);
        let mut request = url
            .into_client_request()
            .map_err(|error| not_a_relay(error.to_string()))?;
        let mut bearer = HeaderValue::try_from(format!("Bearer {}", self.token.expose()))
            .map_err(|_| DialError::Unauthorized(self.client_id.clone()))?;
        bearer.set_sensitive(true);
        request.headers_mut().insert(header::AUTHORIZATION, bearer);
        request
            .headers_mut()
            .insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(SUBPROTOCOL));
        match tokio_tungstenite::client_async(request, io).await {
            Ok((ws, _)) => Ok(ws.into_inner()),
            Err(tungstenite::Error::Http(response)) => Err(self.refusal(&response)),
            Err(error) => Err(not_a_relay(error.to_string())),
        }
    }

    fn refusal(&self, response: &http::Response<Option<Vec<u8>>>) -> DialError {
        let body = response.body().as_deref().unwrap_or_default();
        let body = &body[..body.len().min(MAX_EXPLANATION)];
        let problem: Option<serde_json::Value> = serde_json::from_slice(body).ok();
        let detail = problem.as_ref().and_then(|problem| problem["detail"].as_str());
        let detail = detail
            .unwrap_or("it gave no reason that an adit relay would give")
            .to_owned();
        match response.status().as_u16() {
            401 | 403 => DialError::Unauthorized(self.client_id.clone()),
            status if response.headers().contains_key(crate::error::ADIT_ERROR) => DialError::Refused(status, detail),
            status => DialError::NotARelay(self.relay.clone(), format!("it answered with status {status}")),
        }
    }

    /// The relay's hello, and the frames that came in one message with it.
    async fn greet(
        &self,
        socket: &mut FrameSocket<Box<dyn Connection>>,
        slot: u32,
        generation: u64,
    ) -> Result<(RelayHello, Vec<Frame>), String> {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        let mut message = BytesMut::new();
        hello::to_frame(&AgentHello {
            instance_id: self.instance_id,
            slot,
            generation,
            version,
        })
        .encode(&mut message);
        socket.send(message.freeze()).await.map_err(|error| error.to_string())?;
        let mut message: Bytes = match socket.message().await {
            Some(message) => message.map_err(|error| error.to_string())?,
            None => return Err("it closed the connection without a hello".into()),
        };
        let Ok(Some(Frame::Hello(json))) = Frame::decode(&mut message) else {
            return Err("its first message is no hello".into());
        };
        let rest: Result<Vec<Frame>, _> = std::iter::from_fn(|| Frame::decode(&mut message).transpose()).collect();
        Ok((hello::from_json(&json)?, rest.map_err(|error| error.to_string())?))
    }
}

/// TLS's own words for the most usual slip do not help.
fn explained(error: std::io::Error) -> std::io::Error {
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match tls {
        Some(rustls::Error::InvalidMessage(rustls::InvalidMessage::InvalidContentType)) => {
            std::io::Error::other("it does not speak TLS there: is it http:// instead of https://?")
        }
        _ => error,
    }
}
