//! Groups 7 to 10, 13 and 21 at the doors that came later: llama-server's completions, batches of chats, pictures by name.

use serde_json::{Value, json};

use super::{answered, chat, post, refused, survives};
use crate::server::{CHAT, with};

const LLAMA: &str = "/completion";
const BATCH: &str = "/v1/chat/completions/batch";

/// A body of llama-server's with one field more.
fn goes_on(field: &str, value: Value) -> Value {
    let mut body = json!({"prompt": "x", "n_predict": 2});
    body[field] = value;
    body
}

fn batch(messages: &[Value]) -> Value {
    json!({"messages": messages, "max_tokens": 1})
}

fn says(text: &str) -> Value {
    json!([{"role": "user", "content": text}])
}

/// A conversation about a picture that is only named.
fn about(uuid: &str) -> Value {
    json!([{"role": "user", "content": [{"type": "image_url", "uuid": uuid}]}])
}

#[test]
fn group_07_values_of_any_type_in_fields_of_llama_server() {
    let fields = [
        "prompt",
        "n_predict",
        "n_cmpl",
        "temperature",
        "top_k",
        "repeat_penalty",
        "repeat_last_n",
        "samplers",
        "seed",
        "stop",
        "logit_bias",
        "n_probs",
        "json_schema",
        "response_fields",
        "stream",
    ];
    let values = [
        json!(true),
        json!(-1),
        json!(1e38),
        json!(u64::MAX),
        json!(i64::MIN),
        json!(1.5),
        json!("\u{0}"),
        json!([]),
        json!({}),
        json!([[]]),
        json!([null]),
        json!({"": 1}),
    ];
    survives(&[], |server| {
        for field in fields {
            for value in &values {
                let body = goes_on(field, value.clone()).to_string();
                let status = post(server, LLAMA, &body, body.as_bytes());
                assert!(matches!(status, 200 | 400), "{body}: {status}");
            }
        }
    });
}

#[test]
fn group_08_biases_samplers_and_paths_by_the_thousand() {
    survives(&[], |server| {
        let pairs = |count: usize, text: &str| vec![json!([text, 1]); count];
        for (name, field, value) in [
            ("4 million letters", "samplers", json!("k".repeat(4 << 20))),
            ("100,000 samplers", "samplers", json!(vec!["k"; 100_000])),
            ("100,000 biases", "logit_bias", json!(pairs(100_000, ""))),
            ("biases of 1 MB of text", "logit_bias", json!(pairs(1000, &"x".repeat(1000)))),
            ("100,000 paths", "response_fields", json!(vec!["prompt"; 100_000])),
        ] {
            refused(server, LLAMA, name, &goes_on(field, value));
        }
        answered(server, LLAMA, "biases that add up", &goes_on("logit_bias", json!(pairs(1000, "x"))));
        answered(server, LLAMA, "64 paths", &goes_on("response_fields", json!(vec!["prompt"; 64])));
    });
}

#[test]
fn group_09_prompts_of_ids_and_texts_at_every_limit() {
    survives(&[], |server| {
        let mixed: Vec<Value> = (0..1_000_000).map(|i| if i == 0 { json!("x") } else { json!(65) }).collect();
        for (name, prompt) in [
            ("1,025 prompts", json!(vec!["x"; 1025])),
            ("a million ids", json!(vec![65; 1_000_000])),
            ("a million ids after a text", json!(mixed)),
            ("4 MB of text", json!("7".repeat(4 << 20))),
            ("no room", json!(vec![65; 2048])),
            ("marks without pictures", json!({"prompt_string": "<__media__>".repeat(100_000)})),
            ("pictures that are none", json!({"prompt_string": "<__media__>", "multimodal_data": ["eA=="]})),
        ] {
            refused(server, LLAMA, name, &goes_on("prompt", prompt));
        }
        let schema = json!({"type": "string", "description": "y".repeat(100_000)});
        let shown = json!({"prompt": vec!["x"; 8], "n_cmpl": 128, "n_predict": 0, "json_schema": schema});
        refused(server, LLAMA, "answers that repeat 100 MB", &shown);
        // More than there is room for ends where the context does.
        answered(
            server,
            LLAMA,
            "as much as there is",
            &with(goes_on("n_predict", json!(-1)), json!({"prompt": vec![65; 2040]})),
        );
    });
}

#[test]
fn group_13_batches_of_conversations_of_any_shape() {
    survives(&[], |server| {
        let one = says("x");
        for (name, body) in [
            ("1,025 conversations", batch(&vec![one.clone(); 1025])),
            ("100,000 conversations", batch(&vec![json!([]); 100_000])),
            ("100,000 messages in one", batch(&[one.clone(), json!(vec![one[0].clone(); 100_000])])),
            ("one that is none", batch(&[one.clone(), json!(7)])),
            (
                "1,000 copies of 100 kB",
                with(
                    batch(&vec![one.clone(); 1000]),
                    json!({"chat_template_kwargs": {"x": "y".repeat(100_000)}}),
                ),
            ),
            ("a picture that nobody sent", batch(&vec![about("nobody"); 1000])),
            ("streams", with(batch(std::slice::from_ref(&one)), json!({"stream": true}))),
        ] {
            refused(server, BATCH, name, &body);
        }
        answered(server, BATCH, "1,024 conversations", &batch(&vec![one.clone(); 1024]));
    });
}

#[test]
fn group_21_names_of_pictures_are_the_clients_own() {
    let send = |url: &str, uuid: &str| {
        let part = json!({"type": "image_url", "image_url": {"url": url}, "uuid": uuid});
        chat("messages", json!([{"role": "user", "content": [part]}]))
    };
    let picture = super::media::grey(64, 64);
    // Little is remembered: names stay when what they lead to is forgotten.
    survives(&["--mm-processor-cache-gb", "0"], |server| {
        for i in 0..50 {
            let uuid = format!("{i}{}", "x".repeat(10_000));
            answered(server, CHAT, "a named picture", &send(&picture, &uuid));
            refused(server, CHAT, "the name of one that is gone", &chat("messages", about(&uuid)));
        }
        for uuid in [json!(""), json!(7), json!([]), json!({"x": 1})] {
            let part = json!({"type": "image_url", "image_url": {"url": picture}, "uuid": uuid});
            refused(
                server,
                CHAT,
                "a uuid that is none",
                &chat("messages", json!([{"role": "user", "content": [part]}])),
            );
        }
    });
    survives(&[], |server| {
        answered(server, CHAT, "a named picture", &send(&picture, "p"));
        answered(server, BATCH, "1,024 times its name", &batch(&vec![about("p"); 1024]));
        let mut torn = picture.clone();
        torn.truncate(picture.len() - 60);
        refused(server, CHAT, "a torn picture", &send(&torn, "torn"));
        refused(server, CHAT, "its name", &chat("messages", about("torn")));
    });
}
