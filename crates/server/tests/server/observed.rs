//! What observers learn of requests, and that it is nothing of what they say.

use std::sync::{Arc, Mutex};

use axum::http::header;
use serde_json::json;
use spark_server::{ApiKeys, HttpState, Observer, RequestReport, router};

use crate::fake::Fake;
use crate::{ask, front_end, post, send, text};

#[derive(Default)]
struct Kept(Mutex<Vec<RequestReport>>);

impl Observer for Kept {
    fn request(&self, report: &RequestReport) {
        self.0.lock().unwrap().push(report.clone());
    }
}

#[tokio::test]
async fn every_request_that_reached_the_engine_is_told_of_once() {
    let engine = Fake::says("Hello");
    let kept = Arc::new(Kept::default());
    let front_end = front_end(&engine, |options| options.observers.add(kept.clone()));
    let server = router(HttpState { front_end, api_keys: ApiKeys::default(), max_body_bytes: 1 << 20 });
    let body =
        json!({"prompt": ["a secret", "b"], "n": 2, "max_tokens": 9, "temperature": 0.5, "top_p": 0.9});
    let mut request = post("/v1/completions", &body);
    let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    request.headers_mut().insert("traceparent", parent.parse().unwrap());
    request.headers_mut().insert(header::HeaderName::from_static("x-request-id"), "mine".parse().unwrap());
    let response = send(&server, request).await;
    assert_eq!(response.status(), 200);
    text(response).await;
    assert_eq!(ask(&server, "/v1/completions", json!({"prompt": 7})).await.0, 400);
    let reports = kept.0.lock().unwrap();
    let [report] = &reports[..] else { panic!("{reports:?}") };
    assert_eq!((report.id.as_str(), report.model.as_str()), ("cmpl-mine", "tiny"));
    assert_eq!((report.n, report.max_tokens, report.num_sequences), (2, 9, 4));
    assert_eq!((report.num_output_tokens, report.num_cached_tokens), (24, 16));
    assert_eq!(report.phases.unwrap().queued.as_millis(), 1);
    assert_eq!(report.trace.as_ref().unwrap().span_id[0], 0xb7);
    assert_eq!(report.ends, ["stop"]);
    assert!(!format!("{report:?}").contains("secret"));
}
