//! What apps say to their server and are answered, at the node that holds the server's tunnel. An app's WebSocket may be at
//! any node: what it says comes here as the body of one exchange, and what it alone is answered goes back as that
//! exchange's response, message by message. What the server says to all goes by the fan-out.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http::{HeaderMap, HeaderName};
use http_body::Frame as BodyFrame;
use http_body_util::{BodyExt, StreamBody};
use tokio::sync::mpsc;

use super::serve::{Body, Outbox};
use crate::{
    exchange::{body::Broken, host::RequestBody},
    wire::{frame::Code, head::RequestHead, moosicbox::ws_request},
};

/// Between nodes: the exchange is an app's connection, of this number. No downstream can say it: `adit-*` is stripped.
pub(super) const CONNECTION: HeaderName = HeaderName::from_static("adit-app-connection");
/// The profile that an app connected with.
pub(super) const PROFILE: HeaderName = HeaderName::from_static("moosicbox-profile");
/// The longest message of an app or to one, bytes.
pub(super) const MAX_MESSAGE: usize = 1024 * 1024;
/// Answers that wait for one app's node. An app that is behind by more is closed.
const MAX_ANSWERS: usize = 64;
/// Questions of one app that may yet be answered, any number of times each. Older ones are forgotten.
const MAX_ASKED: usize = 1024;

/// The apps that have spoken to one sender.
#[derive(Default)]
pub(super) struct Apps {
    /// Guards who asked what; held for a look-up.
    asked: Mutex<HashMap<u64, mpsc::Sender<Bytes>>>,
}

/// The number of an app's connection, if the exchange is one's.
pub(super) fn conn_id(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONNECTION)?.to_str().ok()?.parse().ok()
}

impl Apps {
    fn asked(&self) -> MutexGuard<'_, HashMap<u64, mpsc::Sender<Bytes>>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An answer for whoever asked this. One whose app is gone is nobody's; one that reads too slowly loses its
    /// connection, never a message of it.
    pub fn answer(&self, request_id: u64, body: Bytes) {
        let mut asked = self.asked();
        let full = asked
            .get(&request_id)
            .is_some_and(|answers| answers.try_send(body).is_err());
        if full {
            asked.remove(&request_id);
        }
    }

    /// An app's connection: what it says goes to the sender, what it is answered is the body that this returns.
    pub fn serve(
        self: &Arc<Self>,
        conn_id: u64,
        head: &RequestHead,
        body: Option<RequestBody>,
        outbox: &Outbox,
    ) -> Body {
        let (answers_tx, answers) = mpsc::channel(MAX_ANSWERS);
        let app = App {
            conn_id,
            profile: head
                .headers
                .get(PROFILE)
                .and_then(|profile| profile.to_str().ok().map(str::to_owned)),
            says: body.map(Messages::new),
            outbox: outbox.clone(),
            answers,
            answers_tx,
            asked: VecDeque::new(),
            apps: self.clone(),
        };
        let stream = futures_util::stream::try_unfold(app, |mut app| async move {
            let answer = app.next_answer().await?;
            Ok(Some((BodyFrame::data(framed(&answer)), app)))
        });
        StreamBody::new(Box::pin(stream)).boxed_unsync()
    }
}

/// One app's connection.
struct App {
    conn_id: u64,
    profile: Option<String>,
    says: Option<Messages<RequestBody>>,
    outbox: Outbox,
    answers: mpsc::Receiver<Bytes>,
    answers_tx: mpsc::Sender<Bytes>,
    asked: VecDeque<u64>,
    apps: Arc<Apps>,
}

impl App {
    /// Passes on what the app says until there is an answer for it. An error when it has left, or was too slow.
    async fn next_answer(&mut self) -> Result<Bytes, Broken> {
        loop {
            let Some(says) = &mut self.says else {
                return Err(Broken(Code::Protocol));
            };
            tokio::select! {
                biased;
                answer = self.answers.recv() => return answer.ok_or(Broken(Code::Cancelled)),
                said = says.next() => match said {
                    Some(said) => self.ask(&said).await?,
                    None => return Err(Broken(Code::Cancelled)),
                },
            }
        }
    }

    async fn ask(&mut self, said: &[u8]) -> Result<(), Broken> {
        let request_id = rand::random::<u64>().max(1);
        let text = std::str::from_utf8(said).map_err(|_| Broken(Code::Protocol))?;
        let text = ws_request(request_id, self.conn_id, text, self.profile.as_deref());
        let text = text.map_err(|_| Broken(Code::Protocol))?;
        let forgotten = (self.asked.len() >= MAX_ASKED)
            .then(|| self.asked.pop_front())
            .flatten();
        self.asked.push_back(request_id);
        {
            let mut asked = self.apps.asked();
            forgotten.and_then(|id| asked.remove(&id));
            asked.insert(request_id, self.answers_tx.clone());
        }
        self.outbox.send(text).await.map_err(|_| Broken(Code::PathLost))
    }
}

impl Drop for App {
    fn drop(&mut self) {
        let mut asked = self.apps.asked();
        self.asked.iter().for_each(|id| drop(asked.remove(id)));
    }
}

/// A message with its length before it.
pub(super) fn framed(message: &[u8]) -> Bytes {
    let mut out = BytesMut::with_capacity(4 + message.len());
    out.put_u32(message.len() as u32);
    out.put_slice(message);
    out.freeze()
}

/// The messages of a body.
pub(super) struct Messages<B> {
    body: B,
    came: BytesMut,
}

impl<B: http_body::Body<Data = Bytes> + Unpin> Messages<B> {
    pub fn new(body: B) -> Self {
        Self {
            body,
            came: BytesMut::new(),
        }
    }

    /// The next one; `None` when the body ends or breaks off, or a message is longer than may be. Safe to drop and call
    /// again.
    pub async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(length) = self
                .came
                .first_chunk::<4>()
                .map(|bytes| u32::from_be_bytes(*bytes) as usize)
            {
                if length > MAX_MESSAGE {
                    return None;
                }
                if self.came.len() >= 4 + length {
                    self.came.advance(4);
                    return Some(self.came.split_to(length).freeze());
                }
            }
            let data = self.body.frame().await?.ok()?.into_data().unwrap_or_default();
            self.came.extend_from_slice(&data);
        }
    }
}
