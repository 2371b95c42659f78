//! Who asks: which API key a request came with, for what belongs to one client. Admits nobody; `http/auth.rs` does.

tokio::task_local! {
    static CLIENT: Option<[u8; 32]>;
}

/// Runs `work`, in which [`current_client`] is `client`, the hash of a key.
pub(crate) async fn within_client<T>(client: Option<[u8; 32]>, work: impl Future<Output = T>) -> T {
    CLIENT.scope(client, work).await
}

/// The hash of the API key of the request that this task answers; `None` without one.
pub(crate) fn current_client() -> Option<[u8; 32]> {
    CLIENT.try_with(|client| *client).ok().flatten()
}
