//! Connections: accepted up to a limit, each with timers that fire, and let finish when the server is to end.

use super::errors::ApiError;
use super::{Phase, ServerState, router};
use crate::{Error, Result};
use axum::Router;
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse, Response};
use futures_util::FutureExt;
use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use std::future::Future;
use std::io::{self, IoSlice};
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Instant, Sleep, sleep};

/// Bytes of the head of a request.
const MAX_HEAD: usize = 32 << 10;
const MAX_HEADERS: usize = 100;

/// How long clients are given to hear that there will be no more.
const FAREWELL: Duration = Duration::from_secs(2);
/// How long a connection that was let in is given to bring its first request when the server is to end.
const FIRST_REQUEST: Duration = Duration::from_millis(500);

/// Serves until `end` says so and what was accepted is done, or the engine fails.
///
/// # Errors
/// The engine has failed.
pub async fn serve(listener: TcpListener, state: Arc<ServerState>, end: impl Future<Output = ()>) -> Result<()> {
    let router = router(state.clone());
    serve_router(listener, state, router, end).await
}

/// The same with a router to which routes have been added.
///
/// # Errors
/// The engine has failed.
pub async fn serve_router(
    listener: TcpListener,
    state: Arc<ServerState>,
    router: Router,
    end: impl Future<Output = ()>,
) -> Result<()> {
    let router = router.layer(from_fn(contain));
    let permits = Arc::new(Semaphore::new(state.settings.max_connections));
    // Each connection has a receiver; all gone: all done.
    let (drain, draining) = watch::channel(false);
    let serve = |(stream, permit): (TcpStream, OwnedSemaphorePermit)| {
        let _ = stream.set_nodelay(true);
        let (begin, mut begun) = watch::channel(false);
        let router = TowerToHyperService::new(router.clone());
        let service = service_fn(move |request: Request<Incoming>| {
            begin.send_replace(true);
            router.call(request)
        });
        let io = TokioIo::new(Impatient::new(stream, state.settings.write_timeout));
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(state.settings.header_timeout)
            .max_buf_size(MAX_HEAD)
            .max_headers(MAX_HEADERS)
            .serve_connection(io, service);
        let mut draining = draining.clone();
        tokio::spawn(async move {
            let _permit = permit;
            let mut connection = std::pin::pin!(connection);
            tokio::select! {
                _ = connection.as_mut() => return,
                _ = draining.wait_for(|&draining| draining) => {}
            }
            // Told to end now, a connection would close on a request that is on its way.
            tokio::select! {
                _ = connection.as_mut() => return,
                _ = begun.wait_for(|&begun| begun) => {}
                () = sleep(FIRST_REQUEST) => {}
            }
            connection.as_mut().graceful_shutdown();
            // A client that breaks off is its own affair.
            let _ = connection.await;
        });
    };
    let mut end = std::pin::pin!(end);
    loop {
        tokio::select! {
            () = &mut end => break,
            () = state.failure() => break,
            accepted = accept(&listener, &permits) => accepted.into_iter().for_each(&serve),
        }
    }
    // Whoever the system has let in already is served, too.
    while let Some(accepted) = at_once(accept(&listener, &permits)).await {
        accepted.into_iter().for_each(&serve);
    }
    drop(listener);
    drop(draining);
    state.set_phase(Phase::Draining);
    let _ = drain.send(true);
    let patience = match state.phase() {
        Phase::Failed => FAREWELL,
        _ => state.settings.shutdown_timeout,
    };
    tokio::select! {
        () = drain.closed() => {}
        () = sleep(patience) => {
            tracing::warn!("requests are not done in {} s: they are cancelled", patience.as_secs());
            state.cancel_all();
            // They are told so.
            let _ = tokio::time::timeout(FAREWELL, drain.closed()).await;
        }
    }
    match state.phase() {
        Phase::Failed => Err(Error::Engine("every request was told so".into())),
        _ => Ok(()),
    }
}

/// A handler that panics has found a bug: its own request is told, and no other one hears of it.
async fn contain(request: axum::extract::Request, next: Next) -> Response {
    AssertUnwindSafe(next.run(request)).catch_unwind().await.unwrap_or_else(|_| ApiError::bug().into_response())
}

/// What is ready now.
async fn at_once<T>(future: impl Future<Output = T>) -> Option<T> {
    tokio::select! {
        biased;
        value = future => Some(value),
        () = std::future::ready(()) => None,
    }
}

/// The next connection, when there may be one more.
async fn accept(listener: &TcpListener, permits: &Arc<Semaphore>) -> Option<(TcpStream, OwnedSemaphorePermit)> {
    let permit = permits.clone().acquire_owned().await.expect("never closed");
    match listener.accept().await {
        Ok((stream, _)) => Some((stream, permit)),
        Err(error) => {
            // No file is left, perhaps: others must end first.
            tracing::warn!("a connection cannot be accepted: {error}");
            sleep(Duration::from_millis(100)).await;
            None
        }
    }
}

/// A connection whose client must take what it is sent: a write that waits too long is an error, and the request is cancelled.
struct Impatient {
    stream: TcpStream,
    patience: Duration,
    waiting: Option<Pin<Box<Sleep>>>,
}

impl Impatient {
    fn new(stream: TcpStream, patience: Duration) -> Impatient {
        Impatient { stream, patience, waiting: None }
    }

    fn judge<T>(&mut self, context: &mut Context<'_>, poll: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if poll.is_ready() {
            self.waiting = None;
            return poll;
        }
        let deadline = Instant::now() + self.patience;
        let waiting = self.waiting.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline)));
        waiting.as_mut().poll(context).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Impatient {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Impatient {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let poll = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.judge(context, poll)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let poll = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.judge(context, poll)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
