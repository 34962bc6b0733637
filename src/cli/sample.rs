//! `adit sample`, which is also the upstream of `adit demo`: something to see at the far end of a tunnel.

use std::{convert::Infallible, io::Write, net::SocketAddr, time::Duration};

use axum::{
    Router,
    body::Body,
    extract::Request,
    http::{HeaderMap, Method, Uri},
    response::{Html, IntoResponse, Sse, sse::Event},
    routing::{any, get},
};
use clap::Args;
use tokio::net::TcpListener;
use tokio_stream::{StreamExt, wrappers::IntervalStream};

use super::serve::bind;
use crate::shutdown::Shutdown;

/// Run a small server to try tunnels with: /, /events (server-sent events) and /echo
#[derive(Debug, Args)]
pub struct SampleArgs {
    /// Where it listens
    #[arg(
        long,
        env = "ADIT_SAMPLE_LISTEN",
        value_name = "ADDRESS:PORT",
        default_value = "127.0.0.1:3000"
    )]
    pub(super) listen: SocketAddr,
}

/// Serves until told to end; what is in flight is cut, as of a server that is turned off.
pub(super) async fn run(listen: SocketAddr, shutdown: Shutdown) -> anyhow::Result<()> {
    let listener = bind(listen, "--listen").await?;
    let address = listener.local_addr()?;
    // A closed standard output is no reason to end.
    let _ = writeln!(
        std::io::stdout(),
        "A sample server listens on http://{address}. Ctrl-C ends it."
    );
    tokio::select! {
        ended = serve(listener) => Ok(ended?),
        () = shutdown.drain() => Ok(()),
    }
}

/// Serves until the task is dropped.
pub async fn serve(listener: TcpListener) -> std::io::Result<()> {
    let app = Router::new()
        .route("/events", get(events))
        .route("/echo", any(echo))
        .fallback(hello);
    axum::serve(listener, app).await
}

async fn hello(method: Method, uri: Uri, headers: HeaderMap) -> impl IntoResponse {
    let text = |name: &str| {
        headers
            .get(name)
            .and_then(|value| value.to_str().ok())
            .unwrap_or("-")
            .replace('<', "&lt;")
    };
    Html(format!(
        "<h1>Hello from behind the tunnel</h1>\n<p>{method} {uri}, for {forwarded}, host {host}</p>\n\
         <p>Try <code>/events</code> (server-sent events) and <code>POST /echo</code>.</p>\n",
        uri = uri.path().replace('<', "&lt;"),
        forwarded = text("x-forwarded-for"),
        host = text("host"),
    ))
}

async fn echo(request: Request) -> Body {
    request.into_body()
}

async fn events() -> impl IntoResponse {
    let ticks = IntervalStream::new(tokio::time::interval(Duration::from_secs(1)));
    let mut number = 0u64;
    Sse::new(ticks.map(move |_| {
        number += 1;
        Ok::<_, Infallible>(Event::default().data(format!("tick {number}")))
    }))
}
