//! What must hold for every text: agreement with Hugging Face's crate, no special ids from users, any chunking.

use proptest::collection::vec;
use proptest::prelude::*;
use serde_json::{Map, json};
use spark_text::{Detokenizer, RenderInput, Segment, StopMatcher, StopStrings};

use crate::{fixtures, oracle, template, tokenizer};

/// Text made of pieces that tokenizers and templates trip over.
fn tricky_text() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        "[a-zA-Z' ]{1,8}",
        "\\PC{1,4}",
        "[ \\t\\n\\r]{1,4}",
        "[0-9.,]{1,5}",
        prop::sample::select(vec![
            "<|im_start|>",
            "<|im_end|>",
            "<|image_pad|>",
            "<|vision_start|>",
            "<|endoftext|>",
            "<tool_call>",
            "</think>",
            "<|fim_pad|>",
            "<",
            "<|",
            "|>",
            "|",
            "im_end|>",
            "<|im_",
            "start|>",
            "e\u{301}",
            "\u{1100}\u{1161}",
            "👨\u{200d}👩",
            "\u{10ff00}",
            "\u{0}",
            "{{ x }}",
            "{%",
            "\u{a0}",
            "İ",
        ])
        .prop_map(str::to_owned),
    ];
    vec(piece, 0..8).prop_map(|pieces| pieces.concat())
}

/// Cuts `text` at the given places, rounded down to whole characters.
pub(crate) fn chunks(text: &str, cuts: &[usize]) -> Vec<String> {
    let mut places: Vec<usize> =
        cuts.iter().map(|cut| text.floor_char_boundary(cut % (text.len() + 1))).collect();
    places.extend([0, text.len()]);
    places.sort_unstable();
    places.windows(2).map(|pair| text[pair[0]..pair[1]].to_owned()).collect()
}

#[test]
fn tokenizer_equals_the_oracle() {
    for kind in ["bytes", "merges"] {
        let (tokenizer, mut oracle) = (tokenizer(kind), oracle(kind));
        let mut check = |is_trusted: bool| {
            oracle.set_encode_special_tokens(!is_trusted);
            proptest!(ProptestConfig::with_cases(1500), |(text in tricky_text())| {
                let segment = if is_trusted { Segment::Trusted(text.clone()) } else { Segment::Ordinary(text.clone()) };
                let ids = tokenizer.encode(&[segment]).unwrap();
                let expected = oracle.encode(text.as_str(), false).unwrap();
                prop_assert_eq!(&ids, expected.get_ids());
                prop_assert_eq!(tokenizer.decode(&ids, false), oracle.decode(&ids, false).unwrap());
                prop_assert!(text.len() <= ids.len() * tokenizer.max_token_bytes());
            });
        };
        check(true);
        check(false);
    }
}

#[test]
fn detokenizer_streams_what_decoding_gives() {
    for kind in ["bytes", "merges"] {
        let (tokenizer, oracle) = (tokenizer(kind), oracle(kind));
        let ids = vec(0..tokenizer.vocab_size() as u32 + 5, 0..40);
        proptest!(ProptestConfig::with_cases(1000), |(ids in ids, skip in any::<bool>())| {
            let mut detokenizer = Detokenizer::new(tokenizer.clone(), skip);
            let mut text = String::new();
            for (i, &id) in ids.iter().enumerate() {
                text += detokenizer.push(id);
                let whole = tokenizer.decode(&ids[..=i], skip);
                prop_assert!(whole.starts_with(&text));
                prop_assert!(whole.len() - text.len() <= 3, "more held back than an unfinished character");
            }
            text += detokenizer.finish();
            prop_assert_eq!(&text, &tokenizer.decode(&ids, skip));
            prop_assert_eq!(&text, &oracle.decode(&ids, skip).unwrap());
        });
    }
}

/// Earliest end, then earliest start: by trying everything.
fn search(text: &str, stops: &[String], include_stop: bool) -> (String, Option<String>) {
    for end in 0..=text.len() {
        let found = stops
            .iter()
            .filter(|stop| text.as_bytes()[..end].ends_with(stop.as_bytes()))
            .max_by_key(|stop| stop.len());
        if let Some(stop) = found {
            let cut = if include_stop { end } else { end - stop.len() };
            return (text[..cut].to_owned(), Some(stop.clone()));
        }
    }
    (text.to_owned(), None)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn stop_strings_do_not_depend_on_chunks(
        text in "[abé]{0,24}",
        stops in vec("[abé]{1,4}", 0..5),
        cuts in vec(any::<usize>(), 0..8),
        include_stop in any::<bool>(),
    ) {
        let compiled = StopStrings::new(stops.clone()).unwrap();
        let mut matcher = StopMatcher::new(compiled.clone(), include_stop);
        let (mut got, mut stop, mut seen) = (String::new(), None, String::new());
        for chunk in chunks(&text, &cuts) {
            seen += &chunk;
            let output = matcher.push(&chunk);
            got += &output.text;
            stop = stop.or(output.stop);
            if stop.is_none() {
                let held = &seen[got.len()..];
                let may_become_stop = held.is_empty() || stops.iter().any(|stop| stop.starts_with(held));
                prop_assert!(may_become_stop, "{held:?} is held back without need");
            }
        }
        got += &matcher.finish();
        let stop = stop.and_then(|index| compiled.get(index)).map(str::to_owned);
        prop_assert_eq!((got, stop), search(&text, &stops, include_stop));
    }
}

/// Whatever users write, in however many parts: the special ids of the prompt are those that the template writes, and
/// the prompt's text is what transformers renders.
#[test]
fn users_cannot_write_special_tokens() {
    let source = std::fs::read_to_string(fixtures().join("chat_template.jinja")).unwrap();
    let (template, tokenizer, mut oracle) =
        (template(&source).unwrap(), tokenizer("merges"), oracle("merges"));
    let special_of =
        |ids: &[u32]| -> Vec<u32> { ids.iter().copied().filter(|&id| tokenizer.is_special(id)).collect() };
    let render = |a: &str, b: &str, c: &str| {
        let messages = json!([
            {"role": "system", "content": c},
            {"role": "user", "content": [{"type": "text", "text": a}, {"type": "text", "text": b}, {"type": "image"}]},
            {"role": "assistant", "content": b, "tool_calls": [{"function": {"name": c, "arguments": {a: b}}}]},
        ]);
        let tools =
            json!([{"type": "function", "function": {"name": c, "description": a, "parameters": {b: a}}}]);
        let input = RenderInput {
            messages: &messages,
            tools: Some(&tools),
            kwargs: &Map::new(),
            add_generation_prompt: true,
        };
        template.render(input).unwrap()
    };
    let expected = special_of(&tokenizer.encode(&render("x", "y", "z")).unwrap());
    assert_eq!(expected.len(), 2 + 5 + 2 + 1, "two a turn, three for the image, one to begin the answer");
    oracle.set_encode_special_tokens(false);
    proptest!(ProptestConfig::with_cases(1000), |(a in tricky_text(), b in tricky_text(), c in tricky_text())| {
        let segments = render(&a, &b, &c);
        let ids = tokenizer.encode(&segments).unwrap();
        prop_assert_eq!(special_of(&ids), &expected[..]);
        let text: String = segments.iter().map(Segment::text).collect();
        let plain = oracle.encode(text.as_str(), false).unwrap();
        if special_of(plain.get_ids()) == expected {
            prop_assert_eq!(&ids, plain.get_ids(), "no special token in user text, but other ids");
        }
    });
}
