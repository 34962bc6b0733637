//! What nodes say to each other over the bus, and its encoding. Frames of exchanges are carried as they are.
//!
//! A letter is `u8 version | u8 kind | body`, big-endian. One of an unknown version or kind is dropped by whoever gets it:
//! nodes of two versions run side by side while a cluster is brought up to date.

use std::collections::BTreeMap;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize};

use crate::{
    exchange::path::Owner,
    ids::{ClientId, InstanceId, NodeId, RequestId, TokenId, TunnelId},
    wire::Dialect,
};

mod said;

pub use self::said::{Audience, MAX_NAMED, Part, Standing};
use self::said::{part, put_part};

const VERSION: u8 = 1;
/// A letter holds about one message of a tunnel, bytes; more is nobody's.
const MAX_LETTER: usize = 64 * 1024;

mod kind {
    pub const TO_AGENT: u8 = 1;
    pub const TO_INGRESS: u8 = 2;
    pub const NOT_MINE: u8 = 3;
    pub const NEWS: u8 = 4;
    pub const FOREIGN: u8 = 5;
    pub const SAID: u8 = 6;
    pub const STANDS: u8 = 7;
    pub const ASKS: u8 = 8;
    // From 16: what operators ask for.
    pub const LEAVE: u8 = 16;
    pub const COUNT: u8 = 17;
    pub const COUNTED: u8 = 18;
}

/// A tunnel as nodes tell each other of it. The node that holds it vouches for every word.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Card {
    /// Who holds it.
    pub node_id: NodeId,
    /// Its name.
    pub tunnel_ws_id: TunnelId,
    /// The client it serves.
    pub client_id: ClientId,
    /// The agent's process.
    pub instance_id: InstanceId,
    /// Which of that process's tunnels it is.
    pub slot: u32,
    /// How often the agent had dialled for this slot: of two in a slot the higher is the newer. A MoosicBox server does
    /// not count: when it came, UTC epoch milliseconds.
    pub generation: u64,
    /// What is spoken in it.
    #[serde(default)]
    pub dialect: Dialect,
    /// The access token it was opened with: revoking that closes it.
    pub token_id: TokenId,
}

impl Card {
    /// Who speaks through it.
    pub fn owner(&self) -> Owner {
        Owner {
            client_id: self.client_id.clone(),
            instance_id: self.instance_id,
        }
    }
}

/// What a node has counted, as it is asked by an operator. JSON: what a later version adds is ignored, what an older one does
/// not say is zero.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Traffic {
    /// Requests that it holds the downstream of, now.
    pub exchanges_in_flight: u64,
    /// Tunnels that it holds, now.
    pub tunnels: u64,
    /// Body bytes of requests whose downstream it held and that ended, since its start.
    pub to_upstream_bytes: u64,
    /// Body bytes of their answers.
    pub from_upstream_bytes: u64,
    /// How many ended, by how.
    pub outcomes: BTreeMap<String, u64>,
}

/// What one client's nodes have to know, on the client's channel. JSON: what a later version adds is ignored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum News {
    /// A tunnel is up.
    Up(Card),
    /// A tunnel takes no more exchanges: its agent or its node is leaving.
    Leaving {
        /// Which.
        tunnel_ws_id: TunnelId,
    },
    /// A tunnel is gone.
    Down {
        /// Which.
        tunnel_ws_id: TunnelId,
    },
    /// An agent's process has ended: its exchanges end.
    AgentLeft {
        /// Which.
        instance_id: InstanceId,
    },
    /// An operator revoked a token.
    TokenRevoked {
        /// Which.
        token_id: TokenId,
    },
    /// An operator deleted the client.
    ClientDeleted,
    /// An operator changed what its downstreams must show.
    ClientChanged,
    /// An operator wants a tunnel closed; its agent may dial again.
    Disconnect {
        /// Which.
        tunnel_ws_id: TunnelId,
    },
    /// Something that this version does not know.
    #[serde(other)]
    Unknown,
}

/// One message of the bus.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Letter {
    /// Frames for the agent at the end of a tunnel that the receiver holds.
    ToAgent {
        /// The ingress's node.
        from: NodeId,
        /// The tunnel.
        tunnel_ws_id: TunnelId,
        /// The client that it serves.
        client_id: ClientId,
        /// The frames.
        frames: Bytes,
    },
    /// Frames of an agent, for the ingress of their exchange.
    ToIngress {
        /// The tunnel they came by.
        card: Card,
        /// That tunnel's round trip, microseconds.
        rtt_us: u32,
        /// The frames.
        frames: Bytes,
    },
    /// The receiver's frames for this tunnel went nowhere: it is not here.
    NotMine {
        /// Who says so.
        from: NodeId,
        /// Whose tunnel it was.
        client_id: ClientId,
        /// The tunnel.
        tunnel_ws_id: TunnelId,
        /// The exchanges that were to be opened.
        opens: Vec<RequestId>,
    },
    /// The agent at the end of a tunnel that the receiver holds spoke in somebody else's exchange.
    Foreign {
        /// Who says so.
        from: NodeId,
        /// Whose tunnel it is.
        client_id: ClientId,
        /// The tunnel.
        tunnel_ws_id: TunnelId,
    },
    /// Something that a client's nodes have to know.
    News {
        /// Who says so.
        from: NodeId,
        /// Of which client.
        client_id: ClientId,
        /// What.
        news: News,
    },
    /// Something that is said to a client's subscribers.
    Said {
        /// Who says so: parts are numbered for each node alone.
        from: NodeId,
        /// Whose subscribers.
        client_id: ClientId,
        /// What.
        part: Part,
    },
    /// Where its writer stands in what it says to a client's subscribers.
    Stands {
        /// Who.
        from: NodeId,
        /// Whose subscribers.
        client_id: ClientId,
        /// Where.
        standing: Standing,
    },
    /// Whoever says things to this client's subscribers is asked where it stands, and for what its asker misses.
    Asks {
        /// Who asks.
        from: NodeId,
        /// Whose subscribers.
        client_id: ClientId,
        /// The last part that the asker has of each node, by [`NodeId::short`].
        known: Vec<(u64, u64)>,
    },
    /// An operator wants the receiver to drain.
    Leave {
        /// Who says so.
        from: NodeId,
    },
    /// An operator wants to know what the receiver has counted.
    Count {
        /// Who asks, and is to be told.
        from: NodeId,
    },
    /// The answer.
    Counted {
        /// Who has counted.
        from: NodeId,
        /// What.
        traffic: Traffic,
    },
}

/// Why bytes are no letter of this version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a letter of this version")]
pub struct Unreadable;

impl Letter {
    /// The bytes of it.
    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::new();
        match self {
            Letter::ToAgent {
                from,
                tunnel_ws_id,
                client_id,
                frames,
            } => {
                out = to_agent(*from, *tunnel_ws_id, client_id);
                out.put_slice(frames);
            }
            Letter::ToIngress { card, rtt_us, frames } => {
                out = to_ingress(card, *rtt_us);
                out.put_slice(frames);
            }
            Letter::NotMine {
                from,
                client_id,
                tunnel_ws_id,
                opens,
            } => {
                begin(&mut out, kind::NOT_MINE, *from);
                out.put_slice(&tunnel_ws_id.to_bytes());
                put_client(&mut out, client_id);
                opens.iter().for_each(|id| out.put_slice(&id.to_bytes()));
            }
            Letter::Foreign {
                from,
                client_id,
                tunnel_ws_id,
            } => {
                begin(&mut out, kind::FOREIGN, *from);
                out.put_slice(&tunnel_ws_id.to_bytes());
                put_client(&mut out, client_id);
            }
            Letter::News { from, client_id, news } => {
                begin(&mut out, kind::NEWS, *from);
                put_client(&mut out, client_id);
                out.put_slice(&serde_json::to_vec(news).unwrap_or_default());
            }
            Letter::Said { from, client_id, part } => {
                begin(&mut out, kind::SAID, *from);
                put_client(&mut out, client_id);
                put_part(&mut out, part);
            }
            Letter::Stands {
                from,
                client_id,
                standing,
            } => {
                begin(&mut out, kind::STANDS, *from);
                put_client(&mut out, client_id);
                out.put_u64(standing.began);
                out.put_u64(standing.oldest);
                out.put_u64(standing.last);
            }
            Letter::Asks { from, client_id, known } => {
                begin(&mut out, kind::ASKS, *from);
                put_client(&mut out, client_id);
                for (source, seq) in known {
                    out.put_u64(*source);
                    out.put_u64(*seq);
                }
            }
            Letter::Leave { from } => begin(&mut out, kind::LEAVE, *from),
            Letter::Count { from } => begin(&mut out, kind::COUNT, *from),
            Letter::Counted { from, traffic } => {
                begin(&mut out, kind::COUNTED, *from);
                out.put_slice(&serde_json::to_vec(traffic).unwrap_or_default());
            }
        }
        out.freeze()
    }

    /// Reads one; whatever it is not is an error, never a panic.
    pub fn decode(mut bytes: Bytes) -> Result<Self, Unreadable> {
        if bytes.len() > MAX_LETTER || bytes.len() < 2 || bytes.get_u8() != VERSION {
            return Err(Unreadable);
        }
        match bytes.get_u8() {
            kind::TO_AGENT => Ok(Letter::ToAgent {
                from: NodeId::from_bytes(id(&mut bytes)?),
                tunnel_ws_id: TunnelId::from_bytes(id(&mut bytes)?),
                client_id: client(&mut bytes)?,
                frames: bytes,
            }),
            kind::TO_INGRESS => Ok(Letter::ToIngress {
                card: card(&mut bytes)?,
                rtt_us: bytes.try_get_u32().map_err(|_| Unreadable)?,
                frames: bytes,
            }),
            kind::NOT_MINE => Ok(Letter::NotMine {
                from: NodeId::from_bytes(id(&mut bytes)?),
                tunnel_ws_id: TunnelId::from_bytes(id(&mut bytes)?),
                client_id: client(&mut bytes)?,
                opens: ids(bytes)?,
            }),
            kind::FOREIGN => Ok(Letter::Foreign {
                from: NodeId::from_bytes(id(&mut bytes)?),
                tunnel_ws_id: TunnelId::from_bytes(id(&mut bytes)?),
                client_id: client(&mut bytes)?,
            }),
            kind::NEWS => Ok(Letter::News {
                from: NodeId::from_bytes(id(&mut bytes)?),
                client_id: client(&mut bytes)?,
                news: serde_json::from_slice(&bytes).map_err(|_| Unreadable)?,
            }),
            kind::SAID => Ok(Letter::Said {
                from: NodeId::from_bytes(id(&mut bytes)?),
                client_id: client(&mut bytes)?,
                part: part(bytes)?,
            }),
            kind::STANDS => Ok(Letter::Stands {
                from: NodeId::from_bytes(id(&mut bytes)?),
                client_id: client(&mut bytes)?,
                standing: Standing {
                    began: number(&mut bytes)?,
                    oldest: number(&mut bytes)?,
                    last: number(&mut bytes)?,
                },
            }),
            kind::ASKS => Ok(Letter::Asks {
                from: NodeId::from_bytes(id(&mut bytes)?),
                client_id: client(&mut bytes)?,
                known: pairs(bytes)?,
            }),
            kind::LEAVE => Ok(Letter::Leave {
                from: NodeId::from_bytes(id(&mut bytes)?),
            }),
            kind::COUNT => Ok(Letter::Count {
                from: NodeId::from_bytes(id(&mut bytes)?),
            }),
            kind::COUNTED => Ok(Letter::Counted {
                from: NodeId::from_bytes(id(&mut bytes)?),
                traffic: serde_json::from_slice(&bytes).map_err(|_| Unreadable)?,
            }),
            _ => Err(Unreadable),
        }
    }
}

/// The head of a [`Letter::ToAgent`]; the frames are appended to it.
pub fn to_agent(from: NodeId, tunnel_ws_id: TunnelId, client_id: &ClientId) -> BytesMut {
    let mut out = BytesMut::with_capacity(256);
    begin(&mut out, kind::TO_AGENT, from);
    out.put_slice(&tunnel_ws_id.to_bytes());
    put_client(&mut out, client_id);
    out
}

/// The head of a [`Letter::ToIngress`]; the frames are appended to it.
pub fn to_ingress(card: &Card, rtt_us: u32) -> BytesMut {
    let mut out = BytesMut::with_capacity(512);
    begin(&mut out, kind::TO_INGRESS, card.node_id);
    put_card(&mut out, card);
    out.put_u32(rtt_us);
    out
}

/// Every letter begins with who writes it.
fn begin(out: &mut BytesMut, kind: u8, from: NodeId) {
    out.put_u8(VERSION);
    out.put_u8(kind);
    out.put_slice(&from.to_bytes());
}

fn put_client(out: &mut BytesMut, client_id: &ClientId) {
    // A client id is one DNS label: 63 bytes at most.
    out.put_u8(client_id.as_str().len() as u8);
    out.put_slice(client_id.as_str().as_bytes());
}

fn put_card(out: &mut BytesMut, card: &Card) {
    out.put_slice(&card.tunnel_ws_id.to_bytes());
    out.put_slice(&card.instance_id.to_bytes());
    out.put_u32(card.slot);
    out.put_u64(card.generation);
    out.put_u8(u8::from(card.dialect == Dialect::MoosicBox));
    out.put_slice(&card.token_id.to_bytes());
    put_client(out, &card.client_id);
}

fn card(bytes: &mut Bytes) -> Result<Card, Unreadable> {
    Ok(Card {
        node_id: NodeId::from_bytes(id(bytes)?),
        tunnel_ws_id: TunnelId::from_bytes(id(bytes)?),
        instance_id: InstanceId::from_bytes(id(bytes)?),
        slot: bytes.try_get_u32().map_err(|_| Unreadable)?,
        generation: bytes.try_get_u64().map_err(|_| Unreadable)?,
        dialect: dialect(bytes)?,
        token_id: TokenId::from_bytes(id(bytes)?),
        client_id: client(bytes)?,
    })
}

fn dialect(bytes: &mut Bytes) -> Result<Dialect, Unreadable> {
    match bytes.try_get_u8() {
        Ok(0) => Ok(Dialect::Adit),
        Ok(1) => Ok(Dialect::MoosicBox),
        _ => Err(Unreadable),
    }
}

fn pairs(mut bytes: Bytes) -> Result<Vec<(u64, u64)>, Unreadable> {
    let mut pairs = Vec::new();
    while bytes.has_remaining() {
        pairs.push((number(&mut bytes)?, number(&mut bytes)?));
    }
    Ok(pairs)
}

fn number(bytes: &mut Bytes) -> Result<u64, Unreadable> {
    bytes.try_get_u64().map_err(|_| Unreadable)
}

fn id(bytes: &mut Bytes) -> Result<[u8; 16], Unreadable> {
    let mut id = [0; 16];
    bytes.try_copy_to_slice(&mut id).map_err(|_| Unreadable)?;
    Ok(id)
}

fn ids(mut bytes: Bytes) -> Result<Vec<RequestId>, Unreadable> {
    let mut ids = Vec::new();
    while bytes.has_remaining() {
        ids.push(RequestId::from_bytes(id(&mut bytes)?));
    }
    Ok(ids)
}

fn client(bytes: &mut Bytes) -> Result<ClientId, Unreadable> {
    let length = usize::from(bytes.try_get_u8().map_err(|_| Unreadable)?);
    if bytes.len() < length {
        return Err(Unreadable);
    }
    let text = bytes.split_to(length);
    let text = std::str::from_utf8(&text).map_err(|_| Unreadable)?;
    text.parse().map_err(|_| Unreadable)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;

    fn letters() -> Vec<Letter> {
        let card = Card {
            node_id: NodeId::from_bytes([1; 16]),
            tunnel_ws_id: TunnelId::from_bytes([2; 16]),
            client_id: "home".parse().expect("a client id"),
            instance_id: InstanceId::from_bytes([3; 16]),
            slot: 1,
            generation: 7,
            dialect: Dialect::Adit,
            token_id: TokenId::from_bytes([6; 16]),
        };
        let (from, tunnel_ws_id, client_id) = (card.node_id, card.tunnel_ws_id, card.client_id.clone());
        let frames = Bytes::from_static(b"frames");
        vec![
            Letter::ToAgent {
                from,
                tunnel_ws_id,
                client_id: client_id.clone(),
                frames: frames.clone(),
            },
            Letter::ToIngress {
                card: card.clone(),
                rtt_us: 250,
                frames,
            },
            Letter::NotMine {
                from,
                client_id,
                tunnel_ws_id,
                opens: vec![RequestId::from_bytes([4; 16]), RequestId::from_bytes([5; 16])],
            },
            Letter::Foreign {
                from,
                client_id: card.client_id.clone(),
                tunnel_ws_id,
            },
            Letter::News {
                from,
                client_id: card.client_id.clone(),
                news: News::Up(card.clone()),
            },
            Letter::News {
                from,
                client_id: card.client_id.clone(),
                news: News::ClientDeleted,
            },
            Letter::Said {
                from,
                client_id: card.client_id.clone(),
                part: Part {
                    seq: 9,
                    is_first: true,
                    is_last: false,
                    audience: Arc::new(Audience::AllBut(vec![7, 8])),
                    bytes: Bytes::from_static(b"said"),
                },
            },
            Letter::Said {
                from,
                client_id: card.client_id.clone(),
                part: Part {
                    seq: 10,
                    is_first: false,
                    is_last: true,
                    audience: Arc::new(Audience::All),
                    bytes: Bytes::from_static(b"said"),
                },
            },
            Letter::Stands {
                from,
                client_id: card.client_id.clone(),
                standing: Standing {
                    began: 1,
                    oldest: 2,
                    last: 3,
                },
            },
            Letter::Asks {
                from,
                client_id: card.client_id.clone(),
                known: vec![(4, 5)],
            },
            Letter::News {
                from,
                client_id: card.client_id,
                news: News::Disconnect { tunnel_ws_id },
            },
            Letter::Leave { from },
            Letter::Count { from },
            Letter::Counted {
                from,
                traffic: Traffic {
                    exchanges_in_flight: 1,
                    tunnels: 2,
                    to_upstream_bytes: 3,
                    from_upstream_bytes: 4,
                    outcomes: [("ok".to_owned(), 5)].into(),
                },
            },
        ]
    }

    #[test]
    fn letters_survive_the_bus_and_what_is_cut_short_is_none() {
        for letter in letters() {
            let bytes = letter.encode();
            assert_eq!(Letter::decode(bytes.clone()).as_ref(), Ok(&letter));
            for cut in 0..bytes.len() {
                // Frames have no length of their own here: cut among them it is a letter, but not this one.
                assert_ne!(Letter::decode(bytes.slice(..cut)).as_ref(), Ok(&letter));
            }
        }
    }

    /// Nodes of two versions run side by side.
    #[test]
    fn the_bytes_of_version_1_never_change() {
        let hex = |letter: &Letter| letter.encode().iter().map(|b| format!("{b:02x}")).collect::<String>();
        let (n, t, i) = ("01".repeat(16), "02".repeat(16), "03".repeat(16));
        let (four, five, k) = ("04".repeat(16), "05".repeat(16), "06".repeat(16));
        let expected = [
            format!("0101{n}{t}04686f6d656672616d6573"),
            format!("0102{n}{t}{i}00000001000000000000000700{k}04686f6d65000000fa6672616d6573"),
            format!("0103{n}{t}04686f6d65{four}{five}"),
            format!("0105{n}{t}04686f6d65"),
        ];
        for (letter, expected) in letters().iter().zip(expected) {
            assert_eq!(hex(letter), expected);
        }
        let u64s = |numbers: &[u64]| numbers.iter().map(|n| format!("{n:016x}")).collect::<String>();
        let expected = [
            format!("0106{n}04686f6d65{}01020002{}73616964", u64s(&[9]), u64s(&[7, 8])),
            format!("0106{n}04686f6d65{}0273616964", u64s(&[10])),
            format!("0107{n}04686f6d65{}", u64s(&[1, 2, 3])),
            format!("0108{n}04686f6d65{}", u64s(&[4, 5])),
        ];
        for (letter, expected) in letters()[6..].iter().zip(expected) {
            assert_eq!(hex(letter), expected);
        }
        assert_eq!(hex(&letters()[11]), format!("0110{n}"));
        assert_eq!(hex(&letters()[12]), format!("0111{n}"));
        assert!(hex(&letters()[13]).starts_with(&format!("0112{n}7b22")));
    }

    #[test]
    fn what_another_version_says_is_dropped_or_ignored() {
        let mut next = letters()[0].encode().to_vec();
        next[0] = 2;
        assert_eq!(Letter::decode(Bytes::from(next)), Err(Unreadable));
        let mut news = letters()[5].encode().to_vec();
        news.truncate(2 + 16 + 5);
        news.extend_from_slice(br#"{"type":"moved_to_mars","planet":4}"#);
        let decoded = Letter::decode(Bytes::from(news));
        assert!(matches!(
            decoded,
            Ok(Letter::News {
                news: News::Unknown,
                ..
            })
        ));
        assert_eq!(Letter::decode(Bytes::from(vec![1; 10 << 20])), Err(Unreadable));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(kind in 0u8..20, body in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Letter::decode(Bytes::from([&[VERSION, kind], &body[..]].concat()));
        }
    }
}
