//! An agent driven by hand: the frames it gets, and whatever bytes a test wants it to send.
#![allow(dead_code, reason = "each story uses its part")]

use std::net::SocketAddr;

use adit::{
    ids::{InstanceId, RequestId},
    wire::{
        frame::{Frame, SUBPROTOCOL},
        hello::{self, AgentHello},
        socket::{FrameSocket, Side},
        stream::Chunk,
    },
};
use bytes::{BufMut, Bytes, BytesMut};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::{Error, client::IntoClientRequest};

/// One tunnel.
pub struct RawTunnel {
    socket: FrameSocket<TcpStream>,
    waiting: Bytes,
    pub instance_id: InstanceId,
}

pub fn knock(relay: SocketAddr, query: &str, authorization: Option<&str>) -> http::Request<()> {
    let mut request = format!("ws://{relay}/ws{query}")
        .into_client_request()
        .expect("a request");
    let headers = request.headers_mut();
    headers.insert("sec-websocket-protocol", http::HeaderValue::from_static(SUBPROTOCOL));
    if let Some(authorization) = authorization {
        headers.insert("authorization", authorization.parse().expect("a value"));
    }
    request
}

impl RawTunnel {
    /// Connects, and says hello as the first slot of an instance.
    pub async fn open(relay: SocketAddr, client: &str, token: &str, instance_id: InstanceId) -> Self {
        let mut tunnel = Self::connect(relay, client, token).await.expect("a tunnel");
        tunnel.instance_id = instance_id;
        let hello = AgentHello {
            generation: 1,
            instance_id,
            slot: 0,
            version: "raw".into(),
        };
        tunnel.send(&[hello::to_frame(&hello)]).await;
        assert!(
            matches!(tunnel.next().await, Some(Frame::Hello(_))),
            "the relay says hello first"
        );
        tunnel
    }

    /// Connects and says nothing.
    pub async fn connect(relay: SocketAddr, client: &str, token: &str) -> Result<Self, Box<Error>> {
        let stream = TcpStream::connect(relay).await.expect("the relay listens");
        let request = knock(relay, &format!("?clientId={client}"), Some(&format!("Bearer {token}")));
        let (ws, _) = tokio_tungstenite::client_async(request, stream).await?;
        Ok(Self {
            socket: FrameSocket::new(ws.into_inner(), Side::Agent).await,
            waiting: Bytes::new(),
            instance_id: InstanceId::new(),
        })
    }

    /// One message of these frames. It may be that the relay has closed.
    pub async fn send(&mut self, frames: &[Frame]) {
        let mut message = BytesMut::new();
        frames.iter().for_each(|frame| frame.encode(&mut message));
        self.send_bytes(message.freeze()).await;
    }

    pub async fn send_bytes(&mut self, message: Bytes) {
        self.socket.send(message).await.ok();
    }

    /// The next frame that is no ping; `None` when the relay has closed.
    pub async fn next(&mut self) -> Option<Frame> {
        loop {
            match Frame::decode(&mut self.waiting).expect("frames") {
                Some(Frame::Ping(_) | Frame::Pong(_)) => {}
                Some(frame) => return Some(frame),
                None => {
                    let message = tokio::time::timeout(std::time::Duration::from_secs(60), self.socket.message());
                    self.waiting = message.await.expect("a frame or the end").and_then(Result::ok)?;
                }
            }
        }
    }

    /// The id of the next exchange.
    pub async fn opened(&mut self) -> RequestId {
        loop {
            if let Frame::Open(id, _) = self.next().await.expect("an OPEN") {
                return id;
            }
        }
    }

    /// Waits until the relay has closed.
    pub async fn closed(&mut self) {
        while self.next().await.is_some() {}
    }

    /// The whole outgoing stream of an exchange in one frame.
    pub async fn answer(&mut self, id: RequestId, stream: Vec<u8>) {
        self.send(&[stream_frame(id, 0, stream, true)]).await;
    }
}

pub fn stream_frame(id: RequestId, offset: u64, data: Vec<u8>, fin: bool) -> Frame {
    Frame::Stream(
        id,
        Chunk {
            offset,
            fin,
            data: data.into(),
        },
    )
}

/// A RESPONSE record, of whatever status, names and values.
pub fn response(status: u16, headers: &[(&[u8], &[u8])]) -> Vec<u8> {
    let mut payload = Vec::new();
    payload.put_u16(status);
    record(2, payload, headers)
}

pub fn trailers(headers: &[(&[u8], &[u8])]) -> Vec<u8> {
    record(4, Vec::new(), headers)
}

fn record(kind: u8, mut payload: Vec<u8>, headers: &[(&[u8], &[u8])]) -> Vec<u8> {
    payload.put_u16(headers.len() as u16);
    for text in headers.iter().flat_map(|(name, value)| [name, value]) {
        payload.put_u16(text.len() as u16);
        payload.extend_from_slice(text);
    }
    let mut out = vec![kind];
    out.put_u32(payload.len() as u32);
    out.extend_from_slice(&payload);
    out
}

pub fn data(bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![3];
    out.put_u32(bytes.len() as u32);
    out.extend_from_slice(bytes);
    out
}
