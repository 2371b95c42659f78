//! What request bodies may cost before they are requests: how slowly they may come, and how much memory all of them together may
//! take. The size of a single one is the router's; what they mean is decided elsewhere.

use std::{
    cell::RefCell,
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::{
    body::{Body, Bytes, HttpBody},
    extract::{Request, State},
    middleware::Next,
    response::Response,
};
use hyper::body::{Frame, SizeHint};
use tokio::time::{Instant, Sleep, sleep_until};

/// What a body has to bring per second on average, once its first pause is used up: a byte now and then is no body.
const MIN_BYTES_PER_SECOND: u64 = 1024;

tokio::task_local! {
    /// What the request of this task holds; `None` once it is a request of the engine.
    static SHARE: RefCell<Option<Arc<Share>>>;
}

/// The memory of all bodies at work.
pub(super) struct Intake {
    limit: usize,
    held: AtomicUsize,
}

/// What one request holds of it; given back when dropped.
pub(crate) struct Share {
    intake: Arc<Intake>,
    held: AtomicUsize,
}

/// Why a body was not read to its end.
#[derive(Debug, thiserror::Error)]
pub(super) enum BodyError {
    #[error("the body came too slowly")]
    TooSlow,
    #[error("too many bodies at once")]
    Full { limit: usize },
    #[error(transparent)]
    Connection(axum::Error),
}

impl Intake {
    pub(super) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, held: AtomicUsize::new(0) })
    }
}

impl Share {
    /// Takes `bytes` more.
    pub(super) fn grow(&self, bytes: usize) -> Result<(), BodyError> {
        let Intake { limit, held } = &*self.intake;
        if held.fetch_add(bytes, Relaxed).saturating_add(bytes) > *limit {
            held.fetch_sub(bytes, Relaxed);
            return Err(BodyError::Full { limit: *limit });
        }
        self.held.fetch_add(bytes, Relaxed);
        Ok(())
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.intake.held.fetch_sub(*self.held.get_mut(), Relaxed);
    }
}

/// What the request of this task holds; `None` where no server is around it.
pub(super) fn share() -> Option<Arc<Share>> {
    SHARE.try_with(|share| share.borrow().clone()).ok().flatten()
}

/// The body of this task has become requests of the engine, which has limits of its own: its memory is given back.
pub(crate) fn settle() {
    // Outside of a server there is nothing to give back.
    let _ = SHARE.try_with(|share| share.borrow_mut().take());
}

/// Puts the limits around one request.
pub(super) async fn limit(
    State((intake, patience)): State<(Arc<Intake>, Duration)>,
    request: Request,
    next: Next,
) -> Response {
    let share = Arc::new(Share { intake, held: AtomicUsize::new(0) });
    let request = request.map(|body| Body::new(Paced::new(body, share.clone(), patience)));
    SHARE.scope(RefCell::new(Some(share)), next.run(request)).await
}

/// A body that has to keep a pace and to find room.
struct Paced {
    inner: Body,
    share: Arc<Share>,
    patience: Duration,
    started: Instant,
    /// When the last bytes came, and how many there are.
    last: Instant,
    received: u64,
    /// Made when there is something to wait for.
    timer: Option<Pin<Box<Sleep>>>,
}

impl Paced {
    fn new(inner: Body, share: Arc<Share>, patience: Duration) -> Self {
        let now = Instant::now();
        Self { inner, share, patience, started: now, last: now, received: 0, timer: None }
    }

    /// When the next bytes have to be there.
    fn deadline(&self) -> Instant {
        let earned = Duration::from_millis(self.received.saturating_mul(1000) / MIN_BYTES_PER_SECOND);
        (self.last + self.patience).min(self.started + self.patience + earned)
    }

    fn receive(&mut self, frame: Frame<Bytes>) -> Result<Frame<Bytes>, BodyError> {
        let bytes = frame.data_ref().map_or(0, Bytes::len);
        self.share.grow(bytes)?;
        self.received += bytes as u64;
        self.last = Instant::now();
        self.timer = None;
        Ok(frame)
    }
}

impl HttpBody for Paced {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        match Pin::new(&mut this.inner).poll_frame(context) {
            Poll::Ready(Some(Ok(frame))) => Poll::Ready(Some(this.receive(frame))),
            Poll::Ready(Some(Err(error))) => Poll::Ready(Some(Err(BodyError::Connection(error)))),
            Poll::Ready(None) => Poll::Ready(None),
            Poll::Pending => {
                let deadline = this.deadline();
                let timer = this.timer.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
                ready!(timer.as_mut().poll(context));
                Poll::Ready(Some(Err(BodyError::TooSlow)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paced(bytes: u64, silent_since: u64) -> Paced {
        let share = Arc::new(Share { intake: Intake::new(10), held: AtomicUsize::new(0) });
        let mut body = Paced::new(Body::empty(), share, Duration::from_secs(30));
        (body.received, body.last) = (bytes, body.started + Duration::from_secs(silent_since));
        body
    }

    #[test]
    fn a_body_has_to_keep_its_pace() {
        // A minute of single bytes is over; a minute of a photograph goes on until the next pause.
        for (bytes, silent_since, expected) in
            [(0, 0, 30), (60, 60, 30), (1 << 20, 60, 90), (45 * 1024, 60, 75)]
        {
            let body = paced(bytes, silent_since);
            assert_eq!(
                (body.deadline() - body.started).as_secs(),
                expected,
                "{bytes} bytes, silent since {silent_since}"
            );
        }
    }

    #[test]
    fn what_is_held_is_bounded_and_comes_back() {
        let intake = Intake::new(10);
        let share = || Share { intake: intake.clone(), held: AtomicUsize::new(0) };
        let (first, second) = (share(), share());
        first.grow(6).unwrap();
        assert!(matches!(second.grow(5), Err(BodyError::Full { limit: 10 })));
        second.grow(4).unwrap();
        drop(first);
        second.grow(6).unwrap();
        drop(second);
        assert_eq!(intake.held.load(Relaxed), 0);
    }
}
