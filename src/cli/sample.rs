//! The small upstream of `adit demo`: something to see at the far end of a tunnel.

use std::{convert::Infallible, time::Duration};

use axum::{
    Router,
    body::Body,
    extract::Request,
    http::{HeaderMap, Method, Uri},
    response::{Html, IntoResponse, Sse, sse::Event},
    routing::{any, get},
};
use tokio::net::TcpListener;
use tokio_stream::{StreamExt, wrappers::IntervalStream};

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
