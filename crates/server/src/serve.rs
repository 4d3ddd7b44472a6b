//! Sockets: accepting connections within limits, giving up on clients that stall, and leaving without
//! dropping anyone.
//!
//! `axum::serve` would be shorter, and has neither a timeout for slow headers nor a limit on connections.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

use crate::app::app;
use crate::config::ServerConfig;
use crate::lifecycle::Phase;
use crate::state::AppState;

/// Time for last chunks to reach their clients once the engine has let go of them.
const FAREWELL: Duration = Duration::from_secs(2);
/// Pause after `accept` failed for want of something (files, memory) that others may give back.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// How a server is told to leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leave {
    /// By a supervisor: load balancers get `drain_grace` to notice.
    AfterGrace,
    /// By a person at a terminal, or because the engine has ended: nobody is waited for but running requests.
    AtOnce,
}

/// Serves until `shutdown` completes, then drains: not ready at once, still accepting for `drain_grace`, then
/// refusing while running requests finish, for `shutdown_timeout` at most; what still runs then ends early.
///
/// # Errors
/// If the listener cannot be used.
pub async fn serve(
    listener: TcpListener,
    state: AppState,
    shutdown: impl Future<Output = Leave>,
) -> io::Result<()> {
    listener.local_addr()?;
    let connections = GracefulShutdown::new();
    {
        let accepting = accept_all(&listener, &state, &connections);
        tokio::pin!(accepting);
        tokio::select! {
            () = &mut accepting => {}
            leave = shutdown => {
                tokio::select! {
                    () = &mut accepting => {}
                    () = drain(&state, leave) => {}
                }
            }
        }
    }
    drop(listener);
    // Idle connections close at once; a client that does not read its last chunk is left behind.
    let _ = timeout(FAREWELL, connections.shutdown()).await;
    Ok(())
}

/// Goes from serving to idle; new connections are accepted all the while, to be told.
async fn drain(state: &AppState, leave: Leave) {
    let grace = match leave {
        Leave::AfterGrace => state.config.drain_grace,
        Leave::AtOnce => Duration::ZERO,
    };
    tracing::info!(grace_s = grace.as_secs_f64(), "shutting down: no longer ready");
    state.lifecycle.advance(Phase::Leaving);
    sleep(grace).await;
    tracing::info!("draining: new requests are refused");
    state.lifecycle.advance(Phase::Draining);
    state.engine.drain();
    if timeout(state.config.shutdown_timeout, state.lifecycle.idle()).await.is_err() {
        tracing::warn!("requests still run at the shutdown timeout: ending them early");
        state.engine.abort();
        let _ = timeout(FAREWELL, state.lifecycle.idle()).await;
    }
}

/// Accepts connections for ever, as many at a time as the configuration allows.
async fn accept_all(listener: &TcpListener, state: &AppState, connections: &GracefulShutdown) {
    let builder = connection_builder(&state.config);
    let service = TowerToHyperService::new(app(state.clone()));
    let places = Arc::new(Semaphore::new(state.config.max_connections.max(1)));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!(%error, "a connection could not be accepted");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        set_options(&stream, &state.config);
        let connection = builder.serve_connection(TokioIo::new(stream), service.clone()).into_owned();
        let connection = connections.watch(connection);
        tokio::spawn(async move {
            // A client that leaves or stalls is no error of ours.
            let _ = connection.await;
            drop(place);
        });
    }
}

fn connection_builder(config: &ServerConfig) -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(config.header_read_timeout)
        .max_buf_size(config.max_header_bytes.max(8 << 10));
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_header_list_size(u32::try_from(config.max_header_bytes).unwrap_or(u32::MAX))
        .keep_alive_interval(config.header_read_timeout)
        .keep_alive_timeout(config.write_timeout);
    builder
}

/// Small chunks go out at once, and a peer that acknowledges nothing is given up.
fn set_options(stream: &TcpStream, config: &ServerConfig) {
    let _ = stream.set_nodelay(true);
    #[cfg(target_os = "linux")]
    let _ = socket2::SockRef::from(stream).set_tcp_user_timeout(Some(config.write_timeout));
    #[cfg(not(target_os = "linux"))]
    let _ = config;
}
