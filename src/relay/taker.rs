//! What comes by a tunnel that is here: frames of exchanges whose downstream is here, or at the node that has it; and
//! what the agent says of itself. The counterpart of [`inbox`](super::inbox), which takes what comes over the bus.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{switchboard::Switchboard, tunnels::Tunnel};
use crate::{
    cluster::{letter::News, peer::Parcel},
    exchange::{
        NotYours,
        link::{LinkEnd, Taker},
        path::{Owner, Path},
        table::Taken,
    },
    ids::{RequestId, TunnelId},
    telemetry::FrameDrop,
    wire::frame::Frame,
};

/// Takes the frames of one tunnel.
pub struct TunnelTaker {
    board: Arc<Switchboard>,
    tunnel_ws_id: TunnelId,
    /// What of the message at hand is for other nodes. Only the link's own task locks it.
    parcel: Mutex<Option<Parcel>>,
}

impl TunnelTaker {
    /// Of a tunnel that this node holds.
    pub fn new(board: Arc<Switchboard>, tunnel: &Tunnel) -> Self {
        Self {
            tunnel_ws_id: tunnel.id,
            parcel: Mutex::new(tunnel.card(board.node_id()).map(Parcel::new)),
            board,
        }
    }

    fn parcel(&self) -> MutexGuard<'_, Option<Parcel>> {
        self.parcel.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An exchange that is not known here is another node's, or nobody's.
    fn pass_on(&self, id: RequestId, frame: &Frame, path: &Path) {
        if self.board.peers.bus().is_alone() {
            self.board.metrics.frame_dropped(FrameDrop::UnknownExchange);
            return self.board.exchanges.refuse(id, frame, path);
        }
        if let Some(parcel) = self.parcel().as_mut() {
            parcel.add(id, frame, path, &self.board.peers);
        }
    }
}

impl Taker for TunnelTaker {
    fn on_frame(&self, frame: Frame, path: &Arc<Path>) -> Result<(), LinkEnd> {
        let board = &self.board;
        if path.is_closed() {
            board.metrics.frame_dropped(FrameDrop::Superseded);
            return Ok(());
        }
        match &frame {
            Frame::Stream(id, _) | Frame::Ack(id, _) | Frame::Stop(id, _) | Frame::Reset(id, _) => {
                let id = *id;
                let taken = board.exchanges.on_frame(id, frame, path);
                match taken.map_err(|NotYours| LinkEnd::Foreign)? {
                    Taken::Known => {}
                    Taken::Moved => board.metrics.exchanges_moved(1),
                    Taken::Unknown(frame) => self.pass_on(id, &frame, path),
                }
                Ok(())
            }
            Frame::Goodbye => {
                board.agent_left(&path.owner);
                let Owner { client_id, instance_id } = path.owner.clone();
                board.peers.tell(&client_id, News::AgentLeft { instance_id });
                Ok(())
            }
            Frame::Drain(_) => {
                path.set_leaving();
                let tunnel_ws_id = self.tunnel_ws_id;
                board.peers.tell(&path.owner.client_id, News::Leaving { tunnel_ws_id });
                Ok(())
            }
            Frame::Open(..) | Frame::Done(_) => Err(LinkEnd::Violation("it sent a frame that only a relay sends")),
            Frame::Hello(_) => Err(LinkEnd::Violation("it said hello twice")),
            _ => Ok(()),
        }
    }

    fn on_message_end(&self, _path: &Arc<Path>) {
        if let Some(parcel) = self.parcel().as_mut() {
            parcel.send(&self.board.peers);
        }
    }
}
