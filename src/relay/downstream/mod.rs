//! The public listener's connections, in the order bytes meet them: [`listener`] accepts within [`caps`], [`tls`] if it is on, `opening` tells
//! protocols apart, `connection` drives hyper over [`io`], whose deadlines hyper lacks, and [`handle`] is a service's hold
//! on its connection. What a request means is the service's.

pub mod caps;
mod connection;
mod deadline;
pub mod handle;
pub mod io;
pub mod listener;
mod opening;
mod own_words;
pub mod tls;
