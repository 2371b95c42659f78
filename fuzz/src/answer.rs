//! Outputs of models: however a text is cut, the parts join to what the whole gives, and no text is lost.

use std::sync::{Arc, LazyLock};

use serde_json::{Value, json};
use spark_text::{AnswerOptions, AnswerParser, ParsedAnswer, ReasoningStart, ToolFormat, parse_answer};

static TOOLS: LazyLock<Arc<Value>> = LazyLock::new(|| {
    let properties = json!({"text": {"type": "string"}, "count": {"type": "integer"}, "flag": {"type": "boolean"},
        "list": {"type": "array"}, "maybe": {"type": ["string", "null"]}});
    Arc::new(
        json!([{"type": "function", "function": {"name": "f", "parameters": {"properties": properties}}}]),
    )
});

/// Texts up to this are cut at every place.
const MAX_BYTES_CUT_EVERYWHERE: usize = 256;

/// Byte 0: what is looked for. Byte 1: where else it is cut. The rest is the text.
pub fn run(data: &[u8]) {
    let [kind, seed, text @ ..] = data else { return };
    let text = String::from_utf8_lossy(text);
    let options = AnswerOptions {
        tool_format: match kind & 3 {
            0 => None,
            1 => Some(ToolFormat::Xml),
            _ => Some(ToolFormat::Hermes),
        },
        reasoning: match kind >> 2 & 3 {
            0 => None,
            1 => Some(ReasoningStart::Inside),
            _ => Some(ReasoningStart::Outside),
        },
        tools: TOOLS.clone(),
    };
    let whole = parse_answer(&text, options.clone());
    let places: Vec<usize> = text.char_indices().map(|(place, _)| place).collect();
    let every = places.iter().map(|&place| vec![place]).chain([places.clone()]);
    if text.len() <= MAX_BYTES_CUT_EVERYWHERE {
        every.for_each(|cuts| assert_eq!(cut(&text, &cuts, &options), whole, "cut at {cuts:?}: {text:?}"));
    }
    let mut random = fastrand::Rng::with_seed(u64::from(*seed));
    let some: Vec<usize> = places.into_iter().filter(|_| random.u8(..8) == 0).collect();
    assert_eq!(cut(&text, &some, &options), whole, "cut at {some:?}: {text:?}");
    check_nothing_is_lost(&text, &whole, &options);
}

/// The answer of a text that comes in pieces.
fn cut(text: &str, cuts: &[usize], options: &AnswerOptions) -> ParsedAnswer {
    let mut parser = AnswerParser::new(options.clone());
    let mut answer = ParsedAnswer::default();
    let ends = cuts.iter().copied().chain([text.len()]);
    let mut start = 0;
    for end in ends {
        parser.push(&text[start..end]).into_iter().for_each(|event| answer.add(event));
        start = end;
    }
    parser.finish().into_iter().for_each(|event| answer.add(event));
    answer
}

/// Without calls, all that may be missing is white space and the marks of the thinking block.
fn check_nothing_is_lost(text: &str, whole: &ParsedAnswer, options: &AnswerOptions) {
    if !whole.tool_calls.is_empty() {
        return;
    }
    let strip = |text: &str| -> String { text.chars().filter(|char| !char.is_whitespace()).collect() };
    let kept = strip(whole.reasoning.as_deref().unwrap_or_default()) + &strip(&whole.content);
    let is_kept = |parts: [&str; 2]| strip(parts[0]) + &strip(parts[1]) == kept;
    let closed =
        |text| str::split_once(text, "</think>").is_some_and(|(thoughts, rest)| is_kept([thoughts, rest]));
    let opened = text.trim_start().strip_prefix("<think>").filter(|_| options.reasoning.is_some());
    let is_closed = options.reasoning.is_some() && closed(text);
    let is_opened = opened.is_some_and(|rest| is_kept([rest, ""]) || closed(rest));
    assert!(is_kept([text, ""]) || is_closed || is_opened, "{text:?} has become {whole:?}");
}
