//! A cluster in one process and on one thread, with time of its own: real switchboards, exchanges, links and the bus of
//! one process, and a registry, connections and processes that fail as a seed says. See [`world::run`].

mod agent;
mod freeze;
mod load;
mod net;
mod node;
mod registry;
pub mod world;
