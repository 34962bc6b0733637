//! Where this machine is reached, as far as it can tell.

use std::net::{IpAddr, SocketAddr, UdpSocket};

/// Addresses of the internet that nobody has (RFC 5737, RFC 3849), and so the way to everybody.
const ELSEWHERE: [(&str, &str); 2] = [("0.0.0.0:0", "192.0.2.1:9"), ("[::]:0", "[2001:db8::1]:9")];

/// The address by which others reach a listener at `bound`: of one that listens on all of this machine's addresses, the one
/// that this machine goes out by, if it has a way out.
pub(super) fn of_machine(bound: SocketAddr) -> SocketAddr {
    let ip = match bound.ip().is_unspecified() {
        true => ELSEWHERE.iter().find_map(|(from, to)| way_out(from, to)),
        false => None,
    };
    SocketAddr::new(ip.unwrap_or(bound.ip()), bound.port())
}

/// Sends nothing: to connect a datagram socket only looks up the route.
fn way_out(from: &str, to: &str) -> Option<IpAddr> {
    let socket = UdpSocket::bind(from).ok()?;
    socket.connect(to).ok()?;
    let ip = socket.local_addr().ok()?.ip();
    (!ip.is_unspecified()).then_some(ip)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_that_was_chosen_is_kept_and_the_port_always() {
        let of = |text: &str| of_machine(text.parse().expect("an address"));
        assert_eq!(of("127.0.0.1:9090").to_string(), "127.0.0.1:9090");
        assert_eq!(of("0.0.0.0:9090").port(), 9090);
    }
}
