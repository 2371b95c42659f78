//! Tokens that a request names: those whose log-probabilities it wants, and those that alone are allowed. Against an engine of
//! made-up answers.

use serde_json::{Value, json};
use spark_api::FinishReason;

use crate::chat::{PATH, hello};
use crate::fake::{EOS, Fake, Script};
use crate::{chat, chunks, complete, ids, server};

fn id(token: u32) -> String {
    format!("token_id:{token}")
}

#[tokio::test]
async fn named_tokens_come_in_place_of_the_most_likely_ones() {
    let engine = Fake::says("a");
    let server = server(&engine);
    let a = ids("a")[0];
    let wanted = json!({"logprobs": true, "top_logprobs": 5, "logprob_token_ids": [7, a, 7, 3],
        "return_tokens_as_token_ids": true});
    let (status, answer) = chat(&server, hello(wanted.clone())).await;
    assert_eq!(status, 200, "{answer}");
    engine.last(|request| {
        assert_eq!(
            (request.sampling.logprobs, &request.sampling.logprob_token_ids),
            (Some(0), &vec![7, a, 3])
        );
    });
    let shown = |entry: &Value| -> Vec<(Value, Value)> {
        let list = entry["top_logprobs"].as_array().unwrap().iter();
        list.map(|top| (top["token"].clone(), top["logprob"].clone())).collect()
    };
    let content = answer["choices"][0]["logprobs"]["content"].as_array().unwrap();
    let pair = |token: u32, logprob: f64| (json!(id(token)), json!(logprob));
    // The sampled token first, and none twice.
    assert_eq!(shown(&content[0]), [pair(a, -0.5), pair(7, -2.5), pair(3, -2.5)]);
    assert_eq!(shown(&content[1]), [pair(EOS, -0.5), pair(7, -2.5), pair(a, -2.5), pair(3, -2.5)]);

    let mut streamed = hello(wanted);
    streamed["stream"] = json!(true);
    let got = chunks(&server, PATH, streamed).await;
    let all = got.iter().filter_map(|chunk| chunk["choices"][0]["logprobs"]["content"].as_array()).flatten();
    assert_eq!(all.collect::<Vec<_>>(), content.iter().collect::<Vec<_>>());
}

#[tokio::test]
async fn completions_name_tokens_and_an_echo_keeps_its_most_likely_ones() {
    let engine = Fake::says("a");
    let server = server(&engine);
    let (a, p, q) = (ids("a")[0], ids("p")[0], ids("q")[0]);
    let body = json!({"prompt": "pq", "logprobs": 2, "logprob_token_ids": [7], "echo": true,
        "return_tokens_as_token_ids": true});
    let (_, answer) = complete(&server, body).await;
    let top = &answer["choices"][0]["logprobs"]["top_logprobs"];
    assert_eq!(top[0], Value::Null);
    assert_eq!(top[1], json!({id(q): -0.5, id(q + 1): -1.5}));
    assert_eq!(top[2], json!({id(a): -0.5, id(7): -2.5}));
    // An empty list asks for nothing.
    let body = json!({"prompt": [p], "logprobs": 1, "logprob_token_ids": []});
    assert_eq!(complete(&server, body).await.0, 200);
    engine.last(|request| assert_eq!(request.sampling.logprobs, Some(1)));
}

#[tokio::test]
async fn allowed_tokens_become_a_constraint() {
    let engine = Fake::new(Script::Tokens(vec![5, 9], FinishReason::Length));
    let (status, _) = complete(&server(&engine), json!({"prompt": "x", "allowed_token_ids": [5, 40]})).await;
    assert_eq!(status, 200);
    let mut constraint = engine.requests.lock().unwrap().pop().unwrap().constraint.unwrap();
    let mut mask = [u32::MAX; 3];
    constraint.mask(&mut mask).unwrap();
    assert_eq!(mask, [1 << 5, 1 << 8, 0]);
    assert!(matches!(constraint.commit(5), Ok(false)));
    assert!(constraint.commit(9).is_err());
}

#[tokio::test]
async fn what_cannot_be_is_refused_by_name() {
    let engine = Fake::says("x");
    let server = server(&engine);
    let many: Vec<u32> = (0..129).collect();
    let format = json!({"type": "json_object"});
    for (param, body) in [
        ("logprob_token_ids", json!({"logprob_token_ids": [1]})),
        ("logprob_token_ids", json!({"logprobs": true, "logprob_token_ids": [9_999_999]})),
        ("logprob_token_ids", json!({"logprobs": true, "logprob_token_ids": [-1]})),
        ("logprob_token_ids", json!({"logprobs": true, "logprob_token_ids": ["a"]})),
        ("logprob_token_ids", json!({"logprobs": true, "logprob_token_ids": 1})),
        ("logprob_token_ids", json!({"logprobs": true, "logprob_token_ids": many})),
        ("allowed_token_ids", json!({"allowed_token_ids": []})),
        ("allowed_token_ids", json!({"allowed_token_ids": [9_999_999]})),
        ("allowed_token_ids", json!({"allowed_token_ids": {"1": 1}})),
        ("allowed_token_ids", json!({"allowed_token_ids": [1], "response_format": format})),
    ] {
        let (status, answer) = chat(&server, hello(body.clone())).await;
        assert_eq!((status, &answer["error"]["param"]), (400, &json!(param)), "{body}: {answer}");
    }
    let echo = json!({"prompt": "x", "echo": true, "max_tokens": 0, "logprobs": 1, "logprob_token_ids": [1]});
    let (status, answer) = complete(&server, echo).await;
    assert_eq!((status, &answer["error"]["param"]), (400, &json!("logprob_token_ids")), "{answer}");
    assert_eq!(engine.num_requests(), 0);
}
