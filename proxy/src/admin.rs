//! The admin endpoint: metrics, health and status over plain HTTP, read-only.
//!
//! | Path | Answer |
//! |---|---|
//! | `/metrics` | Prometheus text format |
//! | `/healthz` | 200 while the process answers |
//! | `/readyz` | 200 while new migrations are taken, else 503 and why |
//! | `/api/v1/status` | [`GatewayStatus`](crate::status::GatewayStatus) as JSON |
//! | `/api/v1/migrations` | its running and recent migrations |
//!
//! Nothing here changes anything, and nothing secret is shown. A client is bounded in what it may send
//! and how long it may take, and only so many are served at once.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use serde::{Deserialize, Serialize};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::metrics::{self, Registry};
use crate::status::{MigrationStatus, StatusSource};

/// Connections served at once; more wait in the listener's queue.
const MAX_CONNECTIONS: usize = 64;

/// Largest request head in bytes. hyper's smallest buffer is 8 KiB.
const MAX_HEAD_BYTES: usize = 16 * 1024;

/// How long a client may take to send a request, idle time between two included. Longer than the
/// usual scrape interval, so that Prometheus keeps its connection.
const HEAD_TIMEOUT: Duration = Duration::from_secs(75);

/// How long a client may take to begin its first request: connections that say nothing must not keep others
/// out for as long as those that have asked already may take to ask again.
const FIRST_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a connection may last in all; a client that reads nothing goes with it.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(3600);

/// How long answers in progress may take once the shutdown has begun.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(2);

/// Pause after a failed accept: most likely no file descriptors are left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// `/api/v1/migrations`.
#[derive(Debug, Serialize, Deserialize)]
pub struct MigrationList {
    /// Running, oldest first.
    pub migrations: Vec<MigrationStatus>,
    /// Finished, latest first.
    pub recent: Vec<MigrationStatus>,
}

#[derive(Clone)]
struct Admin {
    registry: Registry,
    source: Arc<dyn StatusSource>,
}

/// Serves until `shutdown` completes.
pub async fn serve(
    listener: TcpListener,
    registry: Registry,
    source: Arc<dyn StatusSource>,
    shutdown: impl Future<Output = ()>,
) {
    let router = router(Admin { registry, source });
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    let mut shutdown = pin!(shutdown);
    loop {
        // Reap what has finished, so the set stays as small as the number of open connections.
        while connections.try_join_next().is_some() {}
        let accepted = async {
            let slot = slots.clone().acquire_owned().await.ok()?;
            Some((listener.accept().await, slot))
        };
        let (stream, slot) = tokio::select! {
            () = &mut shutdown => break,
            accepted = accepted => match accepted {
                Some((Ok((stream, _)), slot)) => (stream, slot),
                Some((Err(error), _)) => {
                    tracing::warn!(%error, "admin endpoint cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
                None => break,
            },
        };
        let router = router.clone();
        connections.spawn(async move {
            serve_connection(stream, router).await;
            drop(slot);
        });
    }
    let finish = async { while connections.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(SHUTDOWN_TIMEOUT, finish).await;
}

async fn serve_connection(stream: TcpStream, router: Router) {
    // To be readable may be said of a socket that has nothing.
    let begun = tokio::time::timeout(FIRST_TIMEOUT, stream.peek(&mut [0])).await;
    if begun.is_err() {
        tracing::debug!("admin connection closed: no request");
        return;
    }
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(MAX_HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    if let Ok(Err(error)) = tokio::time::timeout(CONNECTION_TIMEOUT, connection).await {
        tracing::debug!(%error, "admin connection ended");
    }
}

fn router(admin: Admin) -> Router {
    Router::new()
        .route("/metrics", get(metrics_page))
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .route("/api/v1/status", get(status))
        .route("/api/v1/migrations", get(migrations))
        .fallback(not_found)
        .with_state(admin)
}

async fn metrics_page(State(admin): State<Admin>) -> Response {
    admin.source.refresh_metrics();
    match metrics::render(&admin.registry) {
        Ok(text) => {
            let content_type = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
            ([(header::CONTENT_TYPE, content_type)], text).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

async fn ready(State(admin): State<Admin>) -> Response {
    match admin.source.ready() {
        Ok(()) => "ready\n".into_response(),
        Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")).into_response(),
    }
}

async fn status(State(admin): State<Admin>) -> Response {
    uncached(Json(admin.source.status()))
}

async fn migrations(State(admin): State<Admin>) -> Response {
    let status = admin.source.status();
    uncached(Json(MigrationList {
        migrations: status.migrations,
        recent: status.recent,
    }))
}

fn uncached(answer: impl IntoResponse) -> Response {
    (
        [(header::CACHE_CONTROL, HeaderValue::from_static("no-store"))],
        answer,
    )
        .into_response()
}

async fn not_found() -> Response {
    let paths = "/metrics /healthz /readyz /api/v1/status /api/v1/migrations\n";
    (
        StatusCode::NOT_FOUND,
        format!("not found; there are: {paths}"),
    )
        .into_response()
}
