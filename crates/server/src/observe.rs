//! What a program may learn of each request when it ends: what it took and how it ended, never what it said. Whom it is told
//! (traces, reports of crashes) is the program's.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

/// A request that reached the engine, at its end.
#[derive(Debug, Clone)]
pub struct RequestReport {
    /// Its name, without control characters: a client may have chosen it.
    pub id: String,
    /// The name of the model that it asked for.
    pub model: String,
    /// When its body was read.
    pub arrived: Instant,
    /// When the last of its sequences ended.
    pub ended: Instant,
    /// `n`.
    pub n: usize,
    /// `max_tokens` of a sequence.
    pub max_tokens: usize,
    /// Temperature.
    pub temperature: f32,
    /// `top_p`.
    pub top_p: f32,
    /// Images of all prompts.
    pub num_images: usize,
    /// Sequences: choices of all prompts.
    pub num_sequences: usize,
    /// Tokens of the prompts, once a sequence.
    pub num_prompt_tokens: usize,
    /// Those of them that came from the prefix cache.
    pub num_cached_tokens: usize,
    /// Generated tokens.
    pub num_output_tokens: usize,
    /// From arrival to the first token of any sequence.
    pub time_to_first_token: Option<Duration>,
    /// Where the time went, if the engine said so: of each the longest of all sequences.
    pub phases: Option<Phases>,
    /// How sequences ended, each word once: `stop`, `length`, `abort`, `error`.
    pub ends: Vec<&'static str>,
    /// The trace that it belongs to.
    pub trace: Option<TraceParent>,
}

/// Where the time of a request went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Phases {
    /// From arrival until first scheduled.
    pub queued: Duration,
    /// From first scheduled until the first token.
    pub prefill: Duration,
    /// From the first token until the end.
    pub decode: Duration,
    /// Times that a sequence was preempted.
    pub num_preemptions: usize,
}

impl Phases {
    /// The longer of each.
    pub(crate) fn or_longer(self, other: Self) -> Self {
        Self {
            queued: self.queued.max(other.queued),
            prefill: self.prefill.max(other.prefill),
            decode: self.decode.max(other.decode),
            num_preemptions: self.num_preemptions.max(other.num_preemptions),
        }
    }
}

/// The headers of W3C's trace context: who is above a request in a trace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceParent {
    /// Of the whole trace; not zero.
    pub trace_id: [u8; 16],
    /// Of the span above; not zero.
    pub span_id: [u8; 8],
    /// Whether that span is recorded.
    pub is_sampled: bool,
    /// `tracestate` as it came.
    pub state: Option<String>,
}

/// Most bytes of a `tracestate` that is passed on.
const MAX_STATE_BYTES: usize = 512;

impl TraceParent {
    /// Reads `traceparent` (`00-TRACE-SPAN-FLAGS` in lower-case hexadecimal digits) and `tracestate`. `None` if the first is none:
    /// a request is then the beginning of a trace.
    pub fn parse(parent: &str, state: Option<&str>) -> Option<Self> {
        let mut fields = parent.trim().split('-');
        let [version] = bytes(fields.next()?)?;
        let (trace_id, span_id) = (bytes::<16>(fields.next()?)?, bytes::<8>(fields.next()?)?);
        let [flags] = bytes(fields.next()?)?;
        // Later versions may have more fields; this one has not.
        let is_whole = version != 0xff && (version != 0 || fields.next().is_none());
        let state = state.filter(|state| state.len() <= MAX_STATE_BYTES && state.is_ascii());
        (is_whole && trace_id != [0; 16] && span_id != [0; 8]).then(|| Self {
            trace_id,
            span_id,
            is_sampled: flags & 1 == 1,
            state: state.map(str::to_owned),
        })
    }
}

/// Exactly `N` bytes of two lower-case digits each.
fn bytes<const N: usize>(text: &str) -> Option<[u8; N]> {
    let is_hex = |digit: &u8| matches!(digit, b'0'..=b'9' | b'a'..=b'f');
    if text.len() != 2 * N || !text.as_bytes().iter().all(is_hex) {
        return None;
    }
    let mut bytes = [0; N];
    for (i, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).ok()?;
    }
    Some(bytes)
}

tokio::task_local! {
    /// Of the request of this task.
    static TRACE: Option<TraceParent>;
}

/// Runs `work`, in which [`current_trace`] is `trace`.
pub(crate) async fn within_trace<T>(trace: Option<TraceParent>, work: impl Future<Output = T>) -> T {
    TRACE.scope(trace, work).await
}

/// The trace of the request that this task answers.
pub(crate) fn current_trace() -> Option<TraceParent> {
    TRACE.try_with(Clone::clone).ok().flatten()
}

/// Is told of every request that reached the engine, when it has ended. Called where answers are written: it has to be quick.
pub trait Observer: Send + Sync {
    /// `report` is of a request that has just ended.
    fn request(&self, report: &RequestReport);
}

/// Whom to tell.
#[derive(Clone, Default)]
pub struct Observers(Vec<Arc<dyn Observer>>);

impl Observers {
    /// One more.
    pub fn add(&mut self, observer: Arc<dyn Observer>) {
        self.0.push(observer);
    }

    pub(crate) fn tell(&self, report: &RequestReport) {
        self.0.iter().for_each(|observer| observer.request(report));
    }
}

impl fmt::Debug for Observers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Observers({})", self.0.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_parent_is_read_or_ignored() {
        let good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let parent = TraceParent::parse(good, Some("vendor=x")).unwrap();
        assert_eq!((parent.trace_id[0], parent.span_id[7], parent.is_sampled), (0x0a, 0x31, true));
        assert_eq!(parent.state.as_deref(), Some("vendor=x"));
        assert!(!TraceParent::parse(&good.replace("-01", "-00"), None).unwrap().is_sampled);
        assert!(TraceParent::parse(&format!("{}-more", good.replacen("00", "01", 1)), None).is_some());
        for bad in [
            "",
            "00",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
            "00-0af7651916cd43dd8448eb211c8031é-b7ad6b7169203331-01",
        ] {
            assert_eq!(TraceParent::parse(bad, None), None, "{bad}");
        }
        assert_eq!(TraceParent::parse(good, Some(&"x".repeat(600))).unwrap().state, None);
    }
}
