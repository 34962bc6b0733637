//! TLS on the public listener: the certificate out of its files, taken anew when they change; and one type for both kinds of
//! connection.

use std::{
    fs,
    io::{self, IoSlice},
    path::PathBuf,
    pin::Pin,
    sync::{Arc, PoisonError, RwLock},
    task::{Context, Poll},
    time::Duration,
};

use rustls::{
    ServerConfig,
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::{MissedTickBehavior, interval},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use super::io::Reset;
use crate::config::TlsConfig;

/// How often the files are read: they are short, and a comparison of what is in them misses no change.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// The content type of a TLS handshake record (RFC 8446 §5.1), with which every connection begins.
pub(super) const HANDSHAKE: u8 = 0x16;

/// Why files are no certificate. Never has what is in them.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// Not there, or not readable.
    #[error("cannot read `{}`: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Not what it should be.
    #[error("`{}` has no {what} in PEM", path.display())]
    Pem {
        /// The file.
        path: PathBuf,
        /// What was looked for.
        what: &'static str,
    },
    /// Each is something, but not together.
    #[error("`{}` is not the key of the certificate in `{}`, or of a kind that is not served: {why}", key.display(), cert.display())]
    Pair {
        /// The certificate's file.
        cert: PathBuf,
        /// The key's.
        key: PathBuf,
        /// What the library said.
        why: String,
    },
}

/// The public listener's certificate.
pub struct Tls {
    cert: PathBuf,
    key: PathBuf,
    provider: Arc<CryptoProvider>,
    current: Arc<Current>,
    acceptor: TlsAcceptor,
}

/// The certificate in force.
#[derive(Debug)]
struct Current {
    /// Guards a pointer; held to copy or to replace it.
    certified: RwLock<Arc<CertifiedKey>>,
}

impl ResolvesServerCert for Current {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.certified.read().unwrap_or_else(PoisonError::into_inner).clone())
    }
}

/// What is in the two files.
#[derive(PartialEq, Eq)]
struct Files {
    cert: Vec<u8>,
    key: Vec<u8>,
}

impl Tls {
    /// Reads the files that the configuration names, if it does.
    pub fn load(config: &TlsConfig) -> anyhow::Result<Option<Arc<Self>>> {
        let (Some(cert), Some(key)) = (config.cert.clone(), config.key.clone()) else {
            return Ok(None);
        };
        let provider = Arc::new(aws_lc_rs::default_provider());
        let certified = certified(&cert, &key, &read(&cert, &key)?, &provider)?;
        let current = Arc::new(Current {
            certified: RwLock::new(certified),
        });
        let mut config = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_cert_resolver(current.clone());
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let acceptor = TlsAcceptor::from(Arc::new(config));
        Ok(Some(Arc::new(Self {
            cert,
            key,
            provider,
            current,
            acceptor,
        })))
    }

    /// Takes changed files, until dropped. What is no good leaves the old certificate in force, and is said once.
    pub async fn follow_files(self: Arc<Self>) {
        let mut looks = interval(LOOK_EVERY);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut seen, mut failing) = (None, false);
        loop {
            looks.tick().await;
            let this = self.clone();
            let read = tokio::task::spawn_blocking(move || read(&this.cert, &this.key)).await;
            let done = match read {
                Ok(Ok(files)) if seen.as_ref() == Some(&files) => {
                    failing = false;
                    continue;
                }
                Ok(Ok(files)) => {
                    let done = certified(&self.cert, &self.key, &files, &self.provider);
                    seen = Some(files);
                    done
                }
                // Said again only when it has changed: a file may be away for days.
                Ok(Err(_)) if failing => continue,
                Ok(Err(error)) => Err(error),
                // The runtime is ending.
                Err(_) => continue,
            };
            failing = done.is_err();
            self.take(done);
        }
    }

    fn take(&self, done: Result<Arc<CertifiedKey>, TlsError>) {
        match done {
            Ok(new) => {
                let mut certified = self.current.certified.write().unwrap_or_else(PoisonError::into_inner);
                let changed = certified.cert != new.cert;
                *certified = new;
                drop(certified);
                if changed {
                    tracing::info!(file = %self.cert.display(), "the certificate was changed, and is in force");
                }
            }
            Err(error) => tracing::error!(%error, "the certificate's files are no good: the one before stays in force"),
        }
    }

    /// The handshake of one connection. The caller sets the deadline.
    pub(super) async fn accept(&self, io: TcpStream) -> io::Result<Transport> {
        Ok(Transport::Tls(Box::new(self.acceptor.accept(io).await?)))
    }
}

fn read(cert: &PathBuf, key: &PathBuf) -> Result<Files, TlsError> {
    let file = |path: &PathBuf| {
        fs::read(path).map_err(|source| TlsError::Read {
            path: path.clone(),
            source,
        })
    };
    Ok(Files {
        cert: file(cert)?,
        key: file(key)?,
    })
}

/// What the files say, if the two belong together.
fn certified(
    cert: &PathBuf,
    key: &PathBuf,
    files: &Files,
    provider: &CryptoProvider,
) -> Result<Arc<CertifiedKey>, TlsError> {
    let no = |path: &PathBuf, what| TlsError::Pem {
        path: path.clone(),
        what,
    };
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&files.cert).collect();
    let chain = chain.ok().filter(|chain| !chain.is_empty());
    let chain = chain.ok_or_else(|| no(cert, "certificate"))?;
    let private = PrivateKeyDer::from_pem_slice(&files.key).map_err(|_| no(key, "private key"))?;
    let pair = CertifiedKey::from_der(chain, private, provider).map_err(|why| TlsError::Pair {
        cert: cert.clone(),
        key: key.clone(),
        why: why.to_string(),
    })?;
    Ok(Arc::new(pair))
}

/// A downstream's connection, of either kind.
pub enum Transport {
    /// As it comes.
    Plain(TcpStream),
    /// Inside of TLS; apart, because it is thirty times as large.
    Tls(Box<TlsStream<TcpStream>>),
}

impl Reset for Transport {
    fn reset_on_close(&self) {
        match self {
            Transport::Plain(io) => io.reset_on_close(),
            Transport::Tls(io) => io.get_ref().0.reset_on_close(),
        }
    }
}

impl AsyncRead for Transport {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Transport::Plain(io) => Pin::new(io).poll_read(cx, buf),
            Transport::Tls(io) => Pin::new(io).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Transport {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Transport::Plain(io) => Pin::new(io).poll_write(cx, buf),
            Transport::Tls(io) => Pin::new(io).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Transport::Plain(io) => Pin::new(io).poll_write_vectored(cx, bufs),
            Transport::Tls(io) => Pin::new(io).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Transport::Plain(io) => io.is_write_vectored(),
            Transport::Tls(io) => io.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Transport::Plain(io) => Pin::new(io).poll_flush(cx),
            Transport::Tls(io) => Pin::new(io).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Transport::Plain(io) => Pin::new(io).poll_shutdown(cx),
            Transport::Tls(io) => Pin::new(io).poll_shutdown(cx),
        }
    }
}
