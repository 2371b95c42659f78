//! Ids, decodings and renderings equal to those of transformers, from `tests/fixtures/text`.

use std::fs;

use serde_json::{Map, Value, json};
use spark_text::{
    ChatTemplate, Detokenizer, RenderInput, Segment, TextError, TokenText, Tokenizer, expand_placeholders,
    prepare_messages,
};

use crate::{checkpoint, fixtures, read_json, template, tokenizer};

fn ids_of(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn text_of(segments: &[Segment]) -> String {
    segments.iter().map(Segment::text).collect()
}

#[test]
fn encodings_equal_the_goldens() {
    let (rows, mut num_checked) = (read_json("encode.json"), 0);
    for kind in ["bytes", "merges"] {
        let tokenizer = tokenizer(kind);
        for row in rows.as_array().unwrap().iter().filter(|row| !row[kind].is_null()) {
            let text = row["text"].as_str().unwrap();
            assert_eq!(tokenizer.encode_trusted(text).unwrap(), ids_of(&row[kind]), "{kind}: {text:?}");
            num_checked += 1;
        }
    }
    assert!(num_checked >= 2400, "only {num_checked} encodings in the fixture");
}

#[test]
fn decodings_equal_the_goldens() {
    let (rows, tokenizer) = (read_json("decode.json"), tokenizer("merges"));
    let rows = rows.as_array().unwrap();
    for (key, skip_special_tokens) in [("text", false), ("skip_special", true)] {
        for row in rows {
            let (ids, expected) = (ids_of(&row["ids"]), row[key].as_str().unwrap());
            assert_eq!(tokenizer.decode(&ids, skip_special_tokens), expected, "{ids:?}");
            let mut detokenizer = Detokenizer::new(tokenizer.clone(), skip_special_tokens);
            let mut streamed: String = ids.iter().map(|&id| detokenizer.push(id).to_owned()).collect();
            streamed += detokenizer.finish();
            assert_eq!(streamed, expected, "{ids:?} streamed");
        }
    }
    assert!(rows.len() >= 400);
}

#[test]
fn renderings_equal_the_goldens() {
    let (goldens, mut num_checked) = (read_json("templates.json"), 0);
    let tokenizer = tokenizer("merges");
    for (name, cases) in goldens["golden"].as_object().unwrap() {
        let template =
            template(&fs::read_to_string(fixtures().join(format!("{name}.jinja"))).unwrap()).unwrap();
        assert!(template.accepts_parts());
        for (case, expected) in cases.as_object().unwrap() {
            let mut kwargs = goldens["cases"][case].as_object().unwrap().clone();
            let messages = kwargs.shift_remove("messages").unwrap();
            let tools = kwargs.shift_remove("tools");
            for (key, add_generation_prompt) in [("with_prompt", true), ("without_prompt", false)] {
                let input = RenderInput {
                    messages: &messages,
                    tools: tools.as_ref(),
                    kwargs: &kwargs,
                    add_generation_prompt,
                };
                let segments = template.render(input).unwrap();
                let expected = expected[key].as_str().unwrap();
                assert_eq!(text_of(&segments), expected, "{name}, {case}, {key}");
                if case != "markup_in_text" {
                    let expected = tokenizer.encode_trusted(expected).unwrap();
                    assert_eq!(tokenizer.encode(&segments).unwrap(), expected, "{name}, {case}, {key}");
                }
                num_checked += 1;
            }
        }
    }
    assert!(num_checked >= 60, "only {num_checked} renderings in the fixture");
}

#[test]
fn special_tokens_of_a_user_are_plain_text() {
    let goldens = read_json("templates.json");
    let template = template(&fs::read_to_string(fixtures().join("chat_template.jinja")).unwrap()).unwrap();
    let tokenizer = tokenizer("merges");
    let messages = &goldens["cases"]["markup_in_text"]["messages"];
    let input = RenderInput { messages, tools: None, kwargs: &Map::new(), add_generation_prompt: true };
    let ids = tokenizer.encode(&template.render(input).unwrap()).unwrap();
    let special: Vec<_> = ids
        .iter()
        .filter(|&&id| tokenizer.is_special(id))
        .map(|&id| tokenizer.decode(&[id], false))
        .collect();
    assert_eq!(special, ["<|im_start|>", "<|im_end|>", "<|im_start|>"]);
    let expected = goldens["golden"]["chat_template"]["markup_in_text"]["with_prompt"].as_str().unwrap();
    assert_eq!(tokenizer.decode(&ids, false), expected);
}

/// The flags of the added tokens are those of the Qwen3-VL vocabulary.
#[test]
fn vocabulary() {
    let tokenizer = tokenizer("merges");
    let id = |token: &str| tokenizer.token_to_id(token).unwrap();
    assert!(tokenizer.is_special(id("<|image_pad|>")) && tokenizer.is_special(id("<|im_end|>")));
    for kept in ["<tool_call>", "</think>", "<tool_response>", "<|fim_prefix|>"] {
        assert!(!tokenizer.is_special(id(kept)), "{kept}");
        assert_eq!(tokenizer.decode(&[id("<|im_start|>"), id(kept)], true), kept);
    }
    assert_eq!(tokenizer.vocab_size(), 1282);
    assert_eq!(tokenizer.token_bytes(1282), b"");
    assert_eq!(tokenizer.max_token_bytes(), 3 * "<|object_ref_start|>".len());
    assert_eq!(tokenizer.token_to_id("no such token"), None);

    let newline = id("Ċ");
    assert_eq!(TokenText::new(&tokenizer, newline, false), TokenText { token: "\n".into(), bytes: vec![10] });
    assert_eq!(TokenText::new(&tokenizer, newline, true).token, format!("token_id:{newline}"));
    let half = tokenizer.encode_trusted("🦀").unwrap()[0];
    let shown = TokenText::new(&tokenizer, half, false);
    assert_eq!(
        (shown.token.as_str(), shown.bytes.as_slice()),
        ("\u{fffd}", &"🦀".as_bytes()[..shown.bytes.len()])
    );
}

#[test]
fn configured_tokens_are_added() {
    let config = json!({"added_tokens_decoder": {
        "1280": {"content": "<think>", "special": true, "lstrip": false, "rstrip": false, "normalized": false, "single_word": false},
        "1300": {"content": "<|new|>", "special": true, "lstrip": false, "rstrip": false, "normalized": false, "single_word": false},
    }});
    let dir = checkpoint("merges", &[("tokenizer_config.json", &config.to_string())]);
    let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
    assert_eq!(tokenizer.encode_trusted("<|new|>").unwrap(), [1300]);
    assert!(tokenizer.is_special(1280) && tokenizer.is_special(1300) && tokenizer.vocab_size() == 1301);
    assert!(!tokenizer.encode_ordinary("<|new|><think>").unwrap().iter().any(|&id| tokenizer.is_special(id)));
}

#[test]
fn templates_by_precedence() {
    let named = json!({"chat_template": [{"name": "default", "template": "D{{ eos_token }}"}, {"name": "tool_use", "template": "T"}],
        "eos_token": {"content": "<|im_end|>"}});
    let (config, json) = (named.to_string(), json!({"chat_template": "J"}).to_string());
    let mut files = vec![("tokenizer_config.json", config.as_str())];
    let tools = json!([{}]);
    let render = |files: &[(&str, &str)], tools: Option<&Value>| {
        let dir = checkpoint("merges", files);
        let template = ChatTemplate::from_dir(dir.path(), &tokenizer("merges")).unwrap();
        let input =
            RenderInput { messages: &json!([]), tools, kwargs: &Map::new(), add_generation_prompt: false };
        text_of(&template.render(input).unwrap())
    };
    assert_eq!((render(&files, None), render(&files, Some(&tools))), ("D<|im_end|>".into(), "T".into()));
    files.push(("chat_template.json", &json));
    assert_eq!(render(&files, None), "J");
    files.push(("chat_template.jinja", "F{{ bos_token }}"));
    assert_eq!(render(&files, None), "F");
    files.push(("additional_chat_templates/tool_use.jinja", "A"));
    assert_eq!((render(&files, None), render(&files, Some(&tools))), ("F".into(), "A".into()));

    let none = ChatTemplate::from_dir(checkpoint("merges", &[]).path(), &tokenizer("merges"));
    assert!(matches!(none.err(), Some(TextError::NoTemplate { .. })));
}

/// A text model's template takes strings; prepared messages fit both kinds.
#[test]
fn prepared_messages_fit_the_template() {
    let template = template("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}").unwrap();
    assert!(!template.accepts_parts());
    let messages =
        json!([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]);
    let prepared = prepare_messages(messages, template.accepts_parts()).unwrap();
    let input = RenderInput {
        messages: &prepared.messages,
        tools: None,
        kwargs: &Map::new(),
        add_generation_prompt: true,
    };
    assert_eq!(text_of(&template.render(input).unwrap()), "[user]a\nb");
}

/// The whole way from messages to prompt ids, for every model fixture: equal to what transformers' processor made.
#[test]
fn prompts_of_the_model_fixtures() {
    let mut num_checked = 0;
    for entry in fs::read_dir(fixtures().join("../models")).unwrap() {
        let dir = entry.unwrap().path();
        let oracle: Value =
            serde_json::from_str(&fs::read_to_string(dir.join("oracle.json")).unwrap()).unwrap();
        let tokenizer = Tokenizer::from_dir(&dir).unwrap();
        let template = ChatTemplate::from_dir(&dir, &tokenizer).unwrap();
        for (name, case) in oracle["cases"].as_object().unwrap() {
            let conversation = prepare_messages(case["messages"].clone(), template.accepts_parts()).unwrap();
            assert_eq!(conversation.media.len(), case["media"].as_array().unwrap().len());
            let messages = &conversation.messages;
            let input =
                RenderInput { messages, tools: None, kwargs: &Map::new(), add_generation_prompt: true };
            let ids = tokenizer.encode(&template.render(input).unwrap()).unwrap();
            let grids = case["grid_thw"].as_array().unwrap();
            let counts: Vec<usize> =
                grids.iter().map(|grid| ids_of(grid).iter().product::<u32>() as usize / 4).collect();
            let placeholder = tokenizer.token_to_id("<|image_pad|>").unwrap();
            let (ids, offsets) = expand_placeholders(&ids, placeholder, &counts).unwrap();
            assert_eq!(ids, ids_of(&case["prompt_ids"]), "{}: {name}", dir.display());
            assert!(
                offsets
                    .iter()
                    .zip(&counts)
                    .all(|(&offset, &n)| ids[offset..offset + n] == vec![placeholder; n])
            );
            num_checked += 1;
        }
    }
    assert!(num_checked >= 20, "only {num_checked} prompts in the fixtures");
}
