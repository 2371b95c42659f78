//! The events of a response in the background, kept so that a client may come back for those that it has not seen. No JSON of its
//! own but for the word that events are gone.

use std::{collections::VecDeque, sync::Arc};

use futures_util::{Stream, stream};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::store::json_bytes;

/// Most bytes of one response's events; the oldest go first.
const MAX_BYTES: usize = 16 << 20;

/// Events in the order of their numbers, which begin with 0. Written by one, read by any number.
pub(crate) struct EventLog {
    state: Mutex<State>,
    /// How often the state has changed.
    changed: watch::Sender<u64>,
}

#[derive(Default)]
struct State {
    /// With their sizes.
    events: VecDeque<(Arc<Value>, usize)>,
    /// Number of the first that is still there.
    first: usize,
    num_bytes: usize,
    has_ended: bool,
}

/// The one who writes; the log ends when it is dropped.
pub(super) struct EventWriter(Arc<EventLog>);

/// What a reader finds.
enum Found {
    Event(Arc<Value>),
    NotYet,
    Gone,
    End,
}

impl EventLog {
    /// An empty log, and who writes it.
    pub(super) fn new() -> (Arc<Self>, EventWriter) {
        let log = Arc::new(Self { state: Mutex::default(), changed: watch::Sender::new(0) });
        (log.clone(), EventWriter(log))
    }

    /// About what it takes in memory.
    pub(super) fn num_bytes(&self) -> usize {
        self.state.lock().num_bytes
    }

    fn find(&self, number: usize) -> Found {
        let state = self.state.lock();
        let Some(place) = number.checked_sub(state.first) else { return Found::Gone };
        match state.events.get(place) {
            Some((event, _)) => Found::Event(event.clone()),
            None if state.has_ended => Found::End,
            None => Found::NotYet,
        }
    }

    /// Events from `number` on: those that are there, then those that come, until the end.
    pub(super) fn read(self: Arc<Self>, number: usize) -> impl Stream<Item = Value> + Send + 'static {
        let changed = self.changed.subscribe();
        stream::unfold(Some((self, changed, number)), |reader| async move {
            let (log, mut changed, number) = reader?;
            loop {
                match log.find(number) {
                    Found::Event(event) => {
                        return Some(((*event).clone(), Some((log, changed, number + 1))));
                    }
                    Found::End => return None,
                    Found::Gone => return Some((gone(number), None)),
                    // The sender is in the log, which is here.
                    Found::NotYet => changed.changed().await.ok()?,
                }
            }
        })
    }
}

/// Said to a reader who comes too late or is too slow.
fn gone(number: usize) -> Value {
    let message = format!("event {number} is not kept any more: ask for the response without stream");
    json!({"type": "error", "code": "events_gone", "message": message, "param": null, "sequence_number": number})
}

impl EventWriter {
    pub(super) fn push(&self, event: Value) {
        let num_bytes = json_bytes(&event);
        let mut state = self.0.state.lock();
        state.num_bytes += num_bytes;
        state.events.push_back((Arc::new(event), num_bytes));
        while state.num_bytes > MAX_BYTES && state.events.len() > 1 {
            if let Some((_, num_bytes)) = state.events.pop_front() {
                state.num_bytes -= num_bytes;
                state.first += 1;
            }
        }
        drop(state);
        self.0.changed.send_modify(|count| *count += 1);
    }
}

impl Drop for EventWriter {
    fn drop(&mut self) {
        self.0.state.lock().has_ended = true;
        self.0.changed.send_modify(|count| *count += 1);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt;

    use super::*;

    #[tokio::test]
    async fn readers_see_what_was_what_comes_and_the_end() {
        let (log, writer) = EventLog::new();
        writer.push(json!(0));
        writer.push(json!(1));
        let late = tokio::spawn(log.clone().read(1).collect::<Vec<_>>());
        let first = log.clone().read(0).take(2).collect::<Vec<_>>().await;
        assert_eq!(first, [json!(0), json!(1)]);
        writer.push(json!(2));
        drop(writer);
        assert_eq!(late.await.unwrap(), [json!(1), json!(2)]);
        assert_eq!(log.read(7).collect::<Vec<_>>().await, [] as [Value; 0]);
    }

    #[tokio::test]
    async fn old_events_of_a_long_answer_go_and_readers_are_told() {
        let (log, writer) = EventLog::new();
        for _ in 0..5 {
            writer.push(json!("x".repeat(MAX_BYTES / 3)));
        }
        drop(writer);
        assert!(log.num_bytes() <= MAX_BYTES);
        let read = log.clone().read(0).collect::<Vec<_>>().await;
        assert_eq!((read.len(), &read[0]["code"]), (1, &json!("events_gone")));
        assert_eq!(log.read(3).collect::<Vec<_>>().await.len(), 2);
    }
}
