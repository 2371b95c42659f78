//! How long a model may think: the constraint that a budget puts on a sequence, alone and before a grammar.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::fake::{EOS, Fake};
use crate::tools::{says, thinker};
use crate::{chat, ids};

/// What the last request's constraint allows next, of these texts' first tokens; all commit the first of them.
fn allowed(engine: &Arc<Fake>, texts: &[&str]) -> Vec<bool> {
    let mut requests = engine.requests.lock().unwrap();
    let constraint = requests.last_mut().unwrap().constraint.as_mut().unwrap();
    let mut mask = [u32::MAX; 9];
    constraint.mask(&mut mask).unwrap();
    let first = |text: &&str| if text.is_empty() { EOS } else { ids(text)[0] };
    let is_allowed = |id: u32| mask[id as usize / 32] & (1 << (id % 32)) != 0;
    let tokens: Vec<u32> = texts.iter().map(first).collect();
    assert!(!constraint.commit(tokens[0]).unwrap());
    tokens.into_iter().map(is_allowed).collect()
}

async fn ask(engine: &Arc<Fake>, extra: &Value) {
    let mut body = json!({"messages": [{"role": "user", "content": "x"}]});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    let (status, answer) = chat(&thinker(engine), body).await;
    assert_eq!(status, 200, "{answer}");
}

#[tokio::test]
async fn thoughts_end_when_their_budget_does() {
    let engine = says("x");
    let on = json!({"enable_thinking": true});
    ask(&engine, &json!({"thinking_token_budget": 2, "chat_template_kwargs": on})).await;
    for _ in 0..2 {
        assert_eq!(allowed(&engine, &["a", "</think>"]), [true, true]);
    }
    assert_eq!(allowed(&engine, &["</think>", "a", ""]), [true, false, false]);
    assert_eq!(allowed(&engine, &["a", "</think>", ""]), [true, true, true]);
}

#[tokio::test]
async fn a_budget_counts_from_the_opening_that_the_model_writes() {
    let engine = says("x");
    ask(&engine, &json!({"thinking_token_budget": 0})).await;
    assert_eq!(allowed(&engine, &["<think>", "a"]), [true, true]);
    assert_eq!(allowed(&engine, &["</think>", "a"]), [true, false]);

    ask(&engine, &json!({"thinking_token_budget": 0})).await;
    assert_eq!(allowed(&engine, &["a", "<think>"]), [true, true]);
    assert_eq!(allowed(&engine, &["<think>", "a"]), [true, true], "later it is text");
}

#[tokio::test]
async fn a_budget_goes_with_a_grammar() {
    let engine = says("x");
    let extra = json!({"thinking_token_budget": 1, "chat_template_kwargs": {"enable_thinking": true},
        "structured_outputs": {"choice": ["yes", "no"]}});
    ask(&engine, &extra).await;
    assert_eq!(allowed(&engine, &["a", "</think>", ""]), [true, true, false]);
    assert_eq!(allowed(&engine, &["</think>", "y", "a"]), [true, false, false]);
    assert_eq!(allowed(&engine, &["y", "n", "a"]), [true, true, false]);
}
