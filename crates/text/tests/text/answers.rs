//! Outputs of models taken apart: cases by hand, and what must hold for every text however it is cut.

use std::sync::Arc;

use proptest::collection::vec;
use proptest::prelude::*;
use serde_json::{Value, json};
use spark_text::{
    AnswerEvent, AnswerOptions, AnswerParser, ParsedAnswer, ReasoningStart, ToolFormat, parse_answer,
};

use crate::properties::chunks;

fn hermes() -> AnswerOptions {
    AnswerOptions { tool_format: Some(ToolFormat::Hermes), ..AnswerOptions::default() }
}

/// The XML form with a tool whose parameters have all types.
fn xml() -> AnswerOptions {
    let properties = json!({"text": {"type": "string"}, "count": {"type": "integer"}, "flag": {"type": "boolean"},
        "list": {"type": "array"}, "maybe": {"type": ["string", "null"]}});
    let tools =
        json!([{"type": "function", "function": {"name": "f", "parameters": {"properties": properties}}}]);
    AnswerOptions { tool_format: Some(ToolFormat::Xml), tools: Arc::new(tools), ..AnswerOptions::default() }
}

fn thinks(start: ReasoningStart) -> AnswerOptions {
    AnswerOptions { reasoning: Some(start), ..hermes() }
}

/// Content, and calls as `name(arguments)`.
fn seen(text: &str, options: AnswerOptions) -> (String, Vec<String>) {
    let answer = parse_answer(text, options);
    let calls = answer.tool_calls.iter().map(|call| format!("{}({})", call.name, call.arguments));
    (answer.content, calls.collect())
}

fn check(options: &AnswerOptions, cases: &[(&str, &str, &[&str])]) {
    for (text, content, calls) in cases {
        let (got_content, got_calls) = seen(text, options.clone());
        assert_eq!(
            (got_content.as_str(), got_calls),
            (*content, calls.iter().map(ToString::to_string).collect()),
            "{text}"
        );
    }
}

#[test]
fn json_calls_are_read() {
    let call = "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": \"a}</tool_call>\"}}\n</tool_call>";
    check(
        &hermes(),
        &[
            (call, "", &["f({\"x\": \"a}</tool_call>\"})"]),
            (
                &format!("{call}\n{call}"),
                "",
                &["f({\"x\": \"a}</tool_call>\"})", "f({\"x\": \"a}</tool_call>\"})"],
            ),
            (&format!("Let me see.\n{call}\n"), "Let me see.", &["f({\"x\": \"a}</tool_call>\"})"]),
            (&format!("a\n{call}\nb"), "a\n\nb", &["f({\"x\": \"a}</tool_call>\"})"]),
            (
                "<tool_call>{\"arguments\": {\"n\": 12345678901234567890123}, \"name\": \"f\"}</tool_call>",
                "",
                &["f({\"n\": 12345678901234567890123})"],
            ),
            ("<tool_call>{\"name\": \"f\"}</tool_call>", "", &["f({})"]),
            ("<tool_call>{\"name\": \"f\", \"arguments\": null}</tool_call>", "", &["f({})"]),
            (
                "<tool_call>{\"name\": \"f\", \"arguments\": \"{\\\"x\\\": 1}\"}</tool_call>",
                "",
                &["f({\"x\": 1})"],
            ),
            (
                "<tool_call>{\"name\": \"\\u0066\", \"id\": [\"arguments\", {\"name\": 1}], \"arguments\": {}}</tool_call>",
                "",
                &["f({})"],
            ),
            ("<tool_call>{\"name\": \"f\", \"arguments\": {}, \"id\": \"x\"}</tool_call>", "", &["f({})"]),
            ("plain text", "plain text", &[]),
            ("  spaces stay \n", "  spaces stay \n", &[]),
            ("", "", &[]),
        ],
    );
}

#[test]
fn what_a_model_forgets_to_close_is_still_a_call() {
    let open = "<tool_call>{\"name\": \"f\", \"arguments\": {\"x\": 1}";
    check(
        &hermes(),
        &[
            (open, "", &["f({\"x\": 1})"]),
            (&format!("{open}}}"), "", &["f({\"x\": 1})"]),
            (&format!("{open}\n</tool_call> b"), " b", &["f({\"x\": 1})"]),
            (&format!("{open}}}}}\n</tool_call>"), "", &["f({\"x\": 1})"]),
            (&format!("{open}}}\n{open}}}"), "", &["f({\"x\": 1})", "f({\"x\": 1})"]),
            (&format!("{open}}} and more</tool_call>"), "} and more", &["f({\"x\": 1})"]),
        ],
    );
}

#[test]
fn an_unreadable_call_is_content() {
    for text in [
        "<tool_call>",
        "<tool_call>\n",
        "<tool_call>\nnot json\n</tool_call>\n",
        "<tool_call>{\"nam",
        "<tool_call>{\"name\": 5, \"arguments\": {}}</tool_call>",
        "<tool_call>{\"arguments\": {}}</tool_call>",
        "<tool_call>{\"name\": \"f\", arguments: {}}</tool_call>",
        "<tool_call>[1]</tool_call>",
        "<tool_call>{\"a\": 1} x</tool_call>",
        "so: <tool_call> is a marker, <tool_cal not",
        "</tool_call>",
        "<think>no parser</think>",
    ] {
        assert_eq!(seen(text, hermes()), (text.to_owned(), vec![]), "{text}");
    }
    // The next call is found all the same.
    check(&hermes(), &[("<tool_call>\n<tool_call>{\"name\": \"f\"}</tool_call>", "<tool_call>", &["f({})"])]);
}

#[test]
fn arguments_that_are_cut_or_broken_stay_as_written() {
    check(
        &hermes(),
        &[
            ("<tool_call>{\"name\": \"f\", \"arguments\": {\"x\": \"abc", "", &["f({\"x\": \"abc)"]),
            (
                "<tool_call>{\"name\": \"f\", \"arguments\": {\"x\": }}\n</tool_call> b",
                " b",
                &["f({\"x\": }}\n)"],
            ),
            (
                "<tool_call>{\"name\": \"f\", \"arguments\": {\"x\": \"a\nb\"}}</tool_call>",
                "",
                &["f({\"x\": \"a\nb\"}})"],
            ),
        ],
    );
}

#[test]
fn xml_calls_are_read_with_the_types_of_the_tool() {
    let parameter = |name: &str, value: &str| format!("<parameter={name}>\n{value}\n</parameter>\n");
    let call = |body: &str| format!("<tool_call>\n<function=f>\n{body}</function>\n</tool_call>");
    for (name, value, expected) in [
        ("text", "12", "\"12\""),
        ("text", "a \"b\"\n<c>\\", "\"a \\\"b\\\"\\n<c>\\\\\""),
        ("text", "", "\"\""),
        ("text", "\n\n", "\"\\n\\n\""),
        ("count", "12", "12"),
        ("count", "twelve", "\"twelve\""),
        ("flag", "True", "true"),
        ("list", "[1, \"a\"]", "[1, \"a\"]"),
        ("maybe", "None", "\"None\""),
        ("other", "x", "\"x\""),
        ("other", "{\"a\": 1}", "{\"a\": 1}"),
    ] {
        let text = call(&parameter(name, value));
        assert_eq!(
            seen(&text, xml()),
            (String::new(), vec![format!("f({{\"{name}\": {expected}}})")]),
            "{text}"
        );
    }
    let two = call(&(parameter("text", "a") + &parameter("count", "2")));
    let got = "f({\"text\": \"a\", \"count\": 2})";
    check(
        &xml(),
        &[
            (&call(""), "", &["f({})"]),
            (&format!("I look.\n\n{two}\n{two}"), "I look.", &[got, got]),
            ("<tool_call><function=f><parameter=text>a<parameter=count>2</function></tool_call>", "", &[got]),
            (
                "<tool_call><function=f><parameter=text>a</parameter></tool_call>b",
                "b",
                &["f({\"text\": \"a\"})"],
            ),
            (
                "<tool_call><function=f></function>\n<function=g></function></tool_call>",
                "",
                &["f({})", "g({})"],
            ),
            (
                "<tool_call><function=f> oops <parameter=text>a</parameter></function></tool_call>",
                " oops",
                &["f({\"text\": \"a\"})"],
            ),
            ("<tool_call><function=f><parameter=text>ab", "", &["f({\"text\": \"ab)"]),
            ("<tool_call><function=f><parameter=list>[1", "", &["f({\"list\": [1)"]),
            ("<tool_call>{\"name\": \"f\"}</tool_call>", "<tool_call>{\"name\": \"f\"}</tool_call>", &[]),
            ("<tool_call>\n<function=>\n</function>", "<tool_call>\n<function=>\n</function>", &[]),
            ("<tool_call><function=f", "<tool_call><function=f", &[]),
            ("<tool_call><function=f></function><function=<", "<function=<", &["f({})"]),
        ],
    );
}

#[test]
fn reasoning_is_told_from_content() {
    use ReasoningStart::{Inside, Outside};
    for (start, text, reasoning, content) in [
        (Outside, "<think>\nhm\n\nso\n</think>\n\nYes.", Some("hm\n\nso"), "Yes."),
        (Outside, "\n<think>hm</think>Yes.\n", Some("hm"), "Yes.\n"),
        (Outside, "<think>\n\n</think>\n\n    code", None, "    code"),
        (Outside, " <thin air", None, " <thin air"),
        (Outside, "I <think> so</think>", None, "I <think> so</think>"),
        (Outside, "<think>cut", Some("cut"), ""),
        (Inside, "hm <think>\n</think>\n\nYes </think>", Some("hm <think>"), "Yes </think>"),
        (Inside, "never closed </thin", Some("never closed </thin"), ""),
        (Inside, "\n</think>\n", None, ""),
        (Inside, "a <tool_call> b</think>c", Some("a <tool_call> b"), "c"),
    ] {
        let answer = parse_answer(text, thinks(start));
        assert_eq!((answer.reasoning.as_deref(), answer.content.as_str()), (reasoning, content), "{text}");
        assert_eq!(answer.tool_calls, []);
    }
    let answer = parse_answer("x\n</think>\n\n<tool_call>{\"name\": \"f\"}</tool_call>", thinks(Inside));
    assert_eq!(
        (answer.reasoning.as_deref(), answer.content.as_str(), answer.tool_calls.len()),
        (Some("x"), "", 1)
    );
}

#[test]
fn nothing_is_held_back_that_can_be_said() {
    let mut parser = AnswerParser::new(thinks(ReasoningStart::Outside));
    let mut push = |text: &str| parser.push(text);
    let content = |text: &str| vec![AnswerEvent::Content(text.to_owned())];
    let arguments = |text: &str| vec![AnswerEvent::ToolCallArguments { index: 0, delta: text.to_owned() }];
    assert_eq!(push("<thi"), []);
    assert_eq!(push("nk>\nwhy </"), [AnswerEvent::Reasoning("why".into())]);
    assert_eq!(push("x"), [AnswerEvent::Reasoning(" </x".into())]);
    assert_eq!(push("</think>\n\nOne"), content("One"));
    assert_eq!(push(" <tool"), []);
    assert_eq!(push("s two"), content(" <tools two"));
    assert_eq!(push("<tool_call>{\"name\": \"f\", \"argu"), []);
    let start = AnswerEvent::ToolCallStart { index: 0, name: "f".into() };
    assert_eq!(push("ments\": {\"x"), [vec![start], arguments("{\"x")].concat());
    assert_eq!(push("\": 1"), arguments("\": 1"));
    assert_eq!(push("}}"), arguments("}"));
    assert_eq!(push("</tool_call>"), [AnswerEvent::ToolCallEnd { index: 0 }]);
    assert_eq!(parser.finish(), []);
}

#[test]
fn long_outputs_take_linear_time() {
    // Quadratic work on any of these would take far longer than all other tests together.
    for piece in [
        "<tool_call>",
        "<tool_call>{\"a\":\"",
        " \n",
        "<",
        "<tool_call><function=f><parameter=p>\n",
        "\n</parameter",
        "{",
    ] {
        let text = piece.repeat(200_000 / piece.len());
        for options in [
            thinks(ReasoningStart::Outside),
            AnswerOptions { reasoning: Some(ReasoningStart::Inside), ..xml() },
            xml(),
        ] {
            for opening in
                ["", "<tool_call>{\"name\":\"f\",\"arguments\":{", "<tool_call><function=f><parameter=text>"]
            {
                let mut parser = AnswerParser::new(options.clone());
                let mut num_events = parser.push(opening).len();
                for chunk in text.as_bytes().chunks(7) {
                    num_events += parser.push(std::str::from_utf8(chunk).unwrap()).len();
                }
                assert!(num_events + parser.finish().len() <= text.len() + 10);
            }
        }
    }
}

/// Text made of the pieces of calls and reasoning, in any order.
fn tricky_output() -> impl Strategy<Value = String> {
    let pieces = vec![
        "<tool_call>",
        "</tool_call>",
        "<think>",
        "</think>",
        "{\"name\": \"f\", \"arguments\": {",
        "\"x\": 1",
        "}",
        "}}",
        ", ",
        "{",
        "\"",
        "\\",
        "\"name\": \"g\"",
        "\"arguments\": ",
        "<function=f>",
        "</function>",
        "<parameter=text>",
        "<parameter=count>",
        "</parameter>",
        "\n",
        " ",
        "a",
        "é",
        "<",
        "</",
        "12",
        "null",
        "<tool_call>\n",
        "\n</tool_call>",
        "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": \"y\"}}\n</tool_call>",
        "<tool_call>\n<function=f>\n<parameter=text>\nv\n</parameter>\n</function>\n</tool_call>",
    ];
    vec(prop::sample::select(pieces), 0..12).prop_map(|pieces| pieces.concat())
}

fn all_options() -> Vec<AnswerOptions> {
    let starts = [None, Some(ReasoningStart::Inside), Some(ReasoningStart::Outside)];
    let with =
        |options: AnswerOptions| starts.map(|reasoning| AnswerOptions { reasoning, ..options.clone() });
    [with(hermes()), with(xml()), with(AnswerOptions::default())].concat()
}

/// Everything that is visible in an answer, in no order.
fn visible(text: &str) -> Vec<char> {
    let mut chars: Vec<char> = text.chars().filter(|char| !char.is_whitespace()).collect();
    chars.sort_unstable();
    chars
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn cuts_change_nothing(text in tricky_output(), cuts in vec(any::<usize>(), 0..10)) {
        for options in all_options() {
            let whole = parse_answer(&text, options.clone());
            let mut parser = AnswerParser::new(options.clone());
            let mut events: Vec<_> = chunks(&text, &cuts).iter().flat_map(|chunk| parser.push(chunk)).collect();
            events.extend(parser.finish());
            let mut joined = ParsedAnswer::default();
            let (mut started, mut ended) = (0, 0);
            for event in events {
                match &event {
                    AnswerEvent::ToolCallStart { index, .. } => {
                        prop_assert_eq!((*index, started), (ended, ended), "calls come one after the other");
                        started += 1;
                    }
                    AnswerEvent::ToolCallArguments { index, delta } => {
                        prop_assert!(*index + 1 == started && started == ended + 1 && !delta.is_empty());
                    }
                    AnswerEvent::ToolCallEnd { index } => {
                        prop_assert_eq!(*index, ended);
                        ended += 1;
                    }
                    AnswerEvent::Reasoning(text) | AnswerEvent::Content(text) => prop_assert!(!text.is_empty()),
                }
                joined.add(event);
            }
            prop_assert_eq!(started, ended, "every call ends");
            prop_assert_eq!(&joined, &whole, "{:?}", options);
        }
    }

    #[test]
    fn a_text_without_a_call_is_untouched(text in tricky_output()) {
        for options in all_options().into_iter().filter(|options| options.reasoning.is_none()) {
            let answer = parse_answer(&text, options);
            if answer.tool_calls.is_empty() {
                prop_assert_eq!(&answer.content, &text);
            }
        }
    }

    #[test]
    fn no_word_is_lost(text in tricky_output()) {
        for start in [ReasoningStart::Inside, ReasoningStart::Outside] {
            let answer = parse_answer(&text, thinks(start));
            if answer.tool_calls.is_empty() {
                let opened = text.trim_start().strip_prefix("<think>");
                let rest = match (start, opened) {
                    (ReasoningStart::Inside, _) => text.replacen("</think>", "", 1),
                    (ReasoningStart::Outside, Some(rest)) => rest.replacen("</think>", "", 1),
                    (ReasoningStart::Outside, None) => text.clone(),
                };
                let got = answer.reasoning.unwrap_or_default() + &answer.content;
                prop_assert_eq!(visible(&got), visible(&rest));
            }
        }
    }

    #[test]
    fn written_calls_are_read_back(
        calls in vec(("[a-z_]{1,6}", "[\"\\\\<>/a-zé \n]{0,10}", any::<i64>()), 0..4),
        before in "[a-z]{0,5}",
    ) {
        let arguments: Vec<Value> = calls.iter().map(|(_, text, count)| json!({"text": text, "count": count})).collect();
        let mut hermes_text = before.clone();
        let mut xml_text = before.clone();
        for ((_, text, count), arguments) in calls.iter().zip(&arguments) {
            let call = json!({"name": "f", "arguments": arguments});
            hermes_text += &format!("\n<tool_call>\n{call}\n</tool_call>");
            xml_text += &format!("\n<tool_call>\n<function=f>\n<parameter=text>\n{text}\n</parameter>\n<parameter=count>\n{count}\n</parameter>\n</function>\n</tool_call>");
        }
        for (text, options) in [(hermes_text, hermes()), (xml_text, xml())] {
            let answer = parse_answer(&text, options);
            prop_assert_eq!(&answer.content, &before);
            let got: Vec<Value> =
                answer.tool_calls.iter().map(|call| serde_json::from_str(&call.arguments).unwrap()).collect();
            prop_assert_eq!(&got, &arguments);
        }
    }
}
