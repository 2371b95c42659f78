//! The accept loop. Deadlines and signals are the program's.

use std::future::Future;
use std::io;

use axum::serve::ListenerExt;
use tokio::net::TcpListener;

use super::{HttpState, router};

/// Serves until `shutdown` completes; then takes no more connections and returns when all answers are finished.
///
/// # Errors
/// When the listener fails.
pub async fn serve(
    listener: TcpListener,
    state: HttpState,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    // A token must not wait for the acknowledgement of the one before.
    let listener = listener.tap_io(|stream| {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::warn!("cannot set TCP_NODELAY on a connection: {error}");
        }
    });
    axum::serve(listener, router(state)).with_graceful_shutdown(shutdown).await
}
