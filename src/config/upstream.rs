//! What a tunnel leads to: the upstream's address and scheme, and the `Host` that it is told.

use std::{fmt, path::PathBuf, str::FromStr};

use http::{HeaderValue, uri::Authority};

use super::{url::authority, values::Invalid};

/// The longest path of a Unix socket: `sun_path` on Linux, without its NUL.
const SOCKET_PATH_MAX: usize = 107;

/// The local server that a tunnel leads to, and how it is spoken to.
///
/// Written as a port (`3000`, on localhost), `host:port`, `http://…`, `https://…`, `h2c://…` or `unix:/path/to.sock`.
/// It has no path: a tunnel forwards the request's own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UpstreamUrl {
    /// HTTP/1.1 in the clear.
    Http(Authority),
    /// TLS, with HTTP/2 if the server offers it.
    Https(Authority),
    /// HTTP/2 in the clear, with prior knowledge (gRPC).
    H2c(Authority),
    /// HTTP/1.1 over a Unix socket at an absolute path.
    Unix(PathBuf),
}

impl UpstreamUrl {
    /// Host and port as its `Host` header says them: without the scheme's default port; `localhost` for a Unix socket.
    pub fn authority(&self) -> Authority {
        match self {
            Self::Http(authority) | Self::Https(authority) | Self::H2c(authority) => authority.clone(),
            Self::Unix(_) => Authority::from_static("localhost"),
        }
    }

    fn from_port(text: &str) -> Result<Self, Invalid> {
        let wrong = |why: &str| Invalid(format!("`{text}` {why}: a port is a number from 1 to 65535"));
        authority(&format!("localhost:{text}"), Some(80))
            .map(Self::Http)
            .map_err(wrong)
    }

    fn unix(path: &str) -> Result<Self, Invalid> {
        let path = path.strip_prefix("//").unwrap_or(path);
        if !path.starts_with('/') || path.len() > SOCKET_PATH_MAX || path.contains('\0') {
            return Err(Invalid(format!(
                "`unix:{path}` is not a socket: write unix: and its absolute path, of at most {SOCKET_PATH_MAX} bytes"
            )));
        }
        Ok(Self::Unix(path.into()))
    }
}

impl FromStr for UpstreamUrl {
    type Err = Invalid;
    fn from_str(text: &str) -> Result<Self, Invalid> {
        let wrong = |why: &str| {
            Invalid(format!(
                "`{text}` {why}: write the upstream as 3000, host:port, http://host:port, https://host, h2c://host:port or unix:/path/to.sock"
            ))
        };
        if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) {
            return Self::from_port(text);
        }
        if let Some(path) = text.strip_prefix("unix:") {
            return Self::unix(path);
        }
        let Some((scheme, rest)) = text.split_once("://") else {
            return authority(text, None)
                .and_then(|found| drop_default(found, 80))
                .map(Self::Http)
                .map_err(wrong);
        };
        match scheme.to_ascii_lowercase().as_str() {
            "http" => authority(rest, Some(80)).map(Self::Http).map_err(wrong),
            "https" => authority(rest, Some(443)).map(Self::Https).map_err(wrong),
            "h2c" => authority(rest, Some(80)).map(Self::H2c).map_err(wrong),
            _ => Err(wrong("has a scheme that is not served")),
        }
    }
}

impl fmt::Display for UpstreamUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Http(authority) => write!(f, "http://{authority}"),
            Self::Https(authority) => write!(f, "https://{authority}"),
            Self::H2c(authority) => write!(f, "h2c://{authority}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// What the upstream is told as `Host`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum HostHeader {
    /// What the downstream asked for (`keep`).
    #[default]
    Keep,
    /// The upstream's own (`rewrite`): see [`UpstreamUrl::authority`].
    Rewrite,
    /// This text.
    Literal(HeaderValue),
}

impl FromStr for HostHeader {
    type Err = Invalid;
    fn from_str(text: &str) -> Result<Self, Invalid> {
        let wrong = |why: &str| {
            Invalid(format!(
                "`{text}` {why}: write \"keep\", \"rewrite\", or a host like app.example.org:8443"
            ))
        };
        match text {
            "keep" => Ok(Self::Keep),
            "rewrite" => Ok(Self::Rewrite),
            _ => {
                let host = authority(text, Some(0)).map_err(wrong)?;
                HeaderValue::try_from(host.as_str())
                    .map(Self::Literal)
                    .map_err(|_| wrong("is not a host"))
            }
        }
    }
}

fn drop_default(found: Authority, default_port: u16) -> Result<Authority, &'static str> {
    authority(found.as_str(), Some(default_port))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn upstreams_are_written_in_six_ways() {
        for (text, printed) in [
            ("3000", "http://localhost:3000"),
            ("80", "http://localhost"),
            ("127.0.0.1:3000", "http://127.0.0.1:3000"),
            ("Web:80", "http://web"),
            ("[::1]:3000", "http://[::1]:3000"),
            ("http://app_1:3000/", "http://app_1:3000"),
            ("HTTPS://Example.org", "https://example.org"),
            ("https://example.org:443", "https://example.org"),
            ("h2c://127.0.0.1:50051", "h2c://127.0.0.1:50051"),
            ("unix:/run/app.sock", "unix:/run/app.sock"),
            ("unix:///run/app.sock", "unix:/run/app.sock"),
        ] {
            let url: UpstreamUrl = text.parse().expect(text);
            assert_eq!(url.to_string(), printed);
            assert_eq!(url.to_string().parse(), Ok(url), "{text} survives printing");
        }
    }

    #[test]
    fn a_wrong_upstream_is_told_why() {
        for (text, why) in [
            ("", "no valid host"),
            ("0", "port"),
            ("65536", "port"),
            ("localhost", "has no port"),
            (":3000", "no valid host"),
            ("http://:3000", "no valid host"),
            ("http://localhost:3000/app", "has a path"),
            ("http://localhost?x", "has a path"),
            ("http://user:pass@localhost", "user name"),
            ("http://localhost:+80", "port"),
            ("http://localhost:", "port"),
            ("http://a:1:2", "port"),
            ("http://[::1", "no valid host"),
            ("http://[::1]x", "no valid host"),
            ("http://hömе", "no valid host"),
            ("ftp://localhost", "scheme"),
            ("unix:relative.sock", "absolute path"),
            ("unix:", "absolute path"),
        ] {
            let error = text.parse::<UpstreamUrl>().expect_err(text).to_string();
            assert!(error.contains(why), "{text}: {error}");
        }
    }

    #[test]
    fn a_host_header_is_a_word_or_a_host() {
        assert_eq!("rewrite".parse(), Ok(HostHeader::Rewrite));
        assert_eq!("keep".parse(), Ok(HostHeader::Keep));
        assert_eq!(
            "App.local:81".parse(),
            Ok(HostHeader::Literal(HeaderValue::from_static("app.local:81")))
        );
        for bad in ["", "a b", "a\r\nx: y", "http://a"] {
            assert!(bad.parse::<HostHeader>().is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text in ".*", tail in "[\\[\\]:/@a1]*") {
            for text in [text, format!("http://{tail}"), format!("unix:{tail}"), tail] {
                let _ = (text.parse::<UpstreamUrl>(), text.parse::<HostHeader>());
            }
        }
    }
}
