//! Every answer is worked out a second time, from the question alone.

use std::collections::HashSet;

use serde_json::{Value, json};

use super::TASKS;
use super::phrase::{CITIES, COMMON, ITEMS, NAMES};
use crate::{Answer, Sample, Scoring, Split, Task, ToolCall};

const SAMPLES: u64 = 300;

fn samples(name: &str) -> Vec<Sample> {
    let task = TASKS.iter().find(|task| task.name == name).expect("the task exists");
    all_samples(task)
}

fn all_samples(task: &Task) -> Vec<Sample> {
    let of = |split| (0..SAMPLES).map(move |index| task.sample(split, index));
    of(Split::Train).chain(of(Split::HeldOut)).collect()
}

/// Text of the last message.
fn question(sample: &Sample) -> &str {
    sample.messages.last().and_then(|message| message["content"].as_str()).expect("a question has text")
}

fn answer(sample: &Sample) -> &str {
    sample.answer["content"].as_str().expect("an answer has text")
}

fn numbers(text: &str) -> Vec<u64> {
    text.split(|letter: char| !letter.is_ascii_digit())
        .filter(|digits| !digits.is_empty())
        .map(|digits| digits.parse().unwrap())
        .collect()
}

/// What stands after the colon of a question, or between its wordings: the longest run with commas.
fn list_in(question: &str) -> Vec<String> {
    let words: Vec<&str> = question.split(' ').collect();
    let is_inner = |index: usize| words[index].ends_with(',') && !words[index].ends_with("order,");
    let first = (0..words.len()).find(|index| is_inner(*index)).expect("a list has a comma");
    let count = (first..words.len()).take_while(|index| is_inner(*index)).count();
    words[first..=first + count]
        .iter()
        .map(|word| word.trim_matches(|letter: char| !letter.is_alphanumeric()).to_owned())
        .collect()
}

#[test]
fn samples_repeat_and_splits_share_no_content() {
    for task in TASKS {
        let contents = |split| -> HashSet<String> {
            (0..SAMPLES)
                .map(|index| {
                    let (first, second) = (task.sample(split, index), task.sample(split, index));
                    assert_eq!(first.messages, second.messages, "{}", task.name);
                    assert_eq!(first.answer, second.answer, "{}", task.name);
                    first.content
                })
                .collect()
        };
        let (train, held_out) = (contents(Split::Train), contents(Split::HeldOut));
        assert!(train.is_disjoint(&held_out), "{}", task.name);
        assert!(held_out.len() > 60, "{}: {} contents are held out", task.name, held_out.len());
    }
}

#[test]
fn an_answer_is_right_and_a_changed_one_is_wrong() {
    for task in TASKS {
        for sample in all_samples(task) {
            let right = Answer::of_message(&sample.answer);
            assert!(sample.is_right(&right), "{}", task.name);
            let wrong = match sample.scoring {
                Scoring::Text => Answer { content: format!("{}0", right.content), ..right.clone() },
                Scoring::Json => Answer { content: right.content.replace("\": ", "x\": "), ..right.clone() },
                Scoring::ToolCalls => Answer { tool_calls: right.tool_calls[1..].to_vec(), ..right.clone() },
            };
            assert!(!sample.is_right(&wrong), "{}: {wrong:?}", task.name);
            assert!(!sample.is_right(&Answer::default()), "{}: an empty answer is right", task.name);
        }
    }
}

#[test]
fn conversations_are_short_and_end_with_what_is_to_be_answered() {
    for task in TASKS {
        for sample in all_samples(task) {
            let last = sample.messages.last().unwrap()["role"].as_str().unwrap();
            assert!(matches!(last, "user" | "tool"), "{}: {last}", task.name);
            assert_eq!(sample.answer["role"], "assistant", "{}", task.name);
            let bytes: usize = sample.messages.iter().map(|message| message.to_string().len()).sum();
            assert!(bytes < 1200, "{}: {bytes} bytes", task.name);
            let text = json!([sample.messages, sample.answer]).to_string();
            let gap = text
                .find(['{'])
                .map(|_| text.contains("{a}") || text.contains("{x}") || text.contains("{list}"));
            assert_eq!(gap, Some(false), "{}: a gap is open in {text}", task.name);
        }
    }
}

#[test]
fn arithmetic_is_right_and_stays_in_its_range() {
    type Apply = fn(u64, u64) -> u64;
    let tasks: [(&str, Apply); 3] =
        [("add", |a, b| a + b), ("subtract", |a, b| a.max(b) - a.min(b)), ("multiply", |a, b| a * b)];
    for (name, apply) in tasks {
        let mut lengths = [0; 4];
        for sample in samples(name) {
            let given = numbers(question(&sample));
            assert_eq!(given.len(), 2, "{}", question(&sample));
            assert!(given.iter().all(|number| *number < 1000), "{}", question(&sample));
            assert_eq!(answer(&sample), apply(given[0], given[1]).to_string(), "{}", question(&sample));
            if name == "multiply" {
                assert!(given.iter().any(|number| *number < 10), "{}", question(&sample));
            }
            lengths[given[0].max(given[1]).to_string().len()] += 1;
        }
        assert!(lengths[1..].iter().all(|count| *count > 10) && lengths[3] > 200, "{name}: {lengths:?}");
    }
}

#[test]
fn a_difference_is_asked_the_right_way_round() {
    for sample in samples("subtract") {
        let (text, given) = (question(&sample), numbers(question(&sample)));
        let turned = text.starts_with("Subtract") || text.starts_with("Take");
        let (from, less) = if turned { (given[1], given[0]) } else { (given[0], given[1]) };
        assert!(from >= less, "{text}");
    }
}

#[test]
fn lists_are_sorted_as_asked() {
    let mut descending = 0;
    for sample in samples("sort") {
        let text = question(&sample);
        let down = ["large to small", "largest to", "largest first", "descending", "z to a", "reverse"]
            .iter()
            .any(|words| text.contains(words));
        let mut list = list_in(text);
        match list[0].parse::<u64>() {
            Ok(_) => list.sort_by_key(|number| number.parse::<u64>().unwrap()),
            Err(_) => list.sort(),
        }
        if down {
            list.reverse();
        }
        descending += usize::from(down);
        assert_eq!(answer(&sample), list.join(", "), "{text}");
    }
    assert!((120..320).contains(&descending), "{descending} of 600 are descending");
}

#[test]
fn lists_and_letters_are_reversed() {
    let mut letters = 0;
    for sample in samples("reverse") {
        assert!(question(&sample).contains(&sample.content), "{}", question(&sample));
        let separator = if sample.content.contains(", ") { ", " } else { " " };
        let mut entries: Vec<&str> = sample.content.split(separator).collect();
        letters += usize::from(separator == " ");
        assert!((3..=7).contains(&entries.len()), "{}", sample.content);
        entries.reverse();
        assert_eq!(answer(&sample), entries.join(separator));
    }
    assert!((150..350).contains(&letters), "{letters} of 600 are letters");
}

#[test]
fn letters_are_counted() {
    let mut counts = [0; 4];
    for sample in samples("count_letters") {
        let (letter, word) = sample.content.split_once(" in ").unwrap();
        let text = question(&sample);
        let spelled: Vec<String> = word.chars().map(String::from).collect();
        assert!(text.contains(word) || text.contains(&spelled.join(" ")), "{text}");
        assert!(text.contains(&format!(" {letter} ")), "{text}");
        let count = word.matches(letter).count();
        assert_eq!(answer(&sample), count.to_string(), "{text}");
        counts[count] += 1;
    }
    assert!(counts[0] > 40 && counts[1] > 120 && counts[2] > 120 && counts[3] > 10, "{counts:?}");
}

#[test]
fn extracted_fields_are_those_asked_and_stand_in_the_text() {
    for sample in samples("json_extract") {
        let text = question(&sample);
        let found: Value = serde_json::from_str(answer(&sample)).unwrap();
        let found = found.as_object().unwrap();
        assert!((2..=4).contains(&found.len()), "{text}");
        let keys: Vec<&str> = found.keys().map(String::as_str).collect();
        let (last, first) = keys.split_last().unwrap();
        assert!(text.contains(&format!("{} and {last}", first.join(", "))), "{text}: {keys:?}");
        for (key, value) in found {
            let shown = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            assert!(text.contains(&shown), "{key} {shown} is not in {text}");
            assert_eq!(value.is_u64(), shown.bytes().all(|byte| byte.is_ascii_digit()), "{key} {shown}");
        }
    }
}

/// Whether a call is of a defined tool and its arguments fit the schema.
fn assert_fits(call: &ToolCall, tools: &[Value]) {
    let tool = tools.iter().find(|tool| tool["function"]["name"] == call.name.as_str());
    let schema = &tool.expect("the tool is defined")["function"]["parameters"];
    let arguments = call.arguments.as_object().expect("arguments are an object");
    for required in schema["required"].as_array().unwrap() {
        assert!(arguments.contains_key(required.as_str().unwrap()), "{call:?}");
    }
    for (key, value) in arguments {
        let property = &schema["properties"][key];
        assert_eq!(property["type"], "string", "{call:?}");
        assert!(value.is_string(), "{call:?}");
        if let Some(values) = property["enum"].as_array() {
            assert!(values.contains(value), "{call:?}");
        }
    }
}

/// Whether a question says what a call needs, and no more than that.
fn assert_asked(call: &ToolCall, text: &str) {
    if call.name == "weather" {
        assert!(text.contains(call.arguments["city"].as_str().unwrap()), "{text}");
        if let Some(unit) = call.arguments["unit"].as_str() {
            assert!(text.contains(unit), "{text}");
        }
        return;
    }
    let expression = call.arguments["expression"].as_str().unwrap();
    let asked = numbers(text);
    assert!(numbers(expression).iter().all(|number| asked.contains(number)), "{expression}: {text}");
}

/// What an expression of two numbers is worth.
fn value_of(expression: &str) -> u64 {
    let parts: Vec<&str> = expression.split(' ').collect();
    let (a, b): (u64, u64) = (parts[0].parse().unwrap(), parts[2].parse().unwrap());
    match parts[1] {
        "+" => a + b,
        "-" => a - b,
        "*" => a * b,
        "/" => {
            assert_eq!(a % b, 0, "{expression}");
            a / b
        }
        other => panic!("{other} is no operator"),
    }
}

#[test]
fn calls_fit_their_tools_and_their_questions() {
    for (name, counts) in [("tool_call", 0..=1), ("tool_parallel", 2..=3)] {
        let mut without = 0;
        for sample in samples(name) {
            let calls = Answer::of_message(&sample.answer).tool_calls;
            assert!(counts.contains(&calls.len()), "{name}: {} calls", calls.len());
            assert!(!sample.tools.is_empty(), "{name}");
            assert_eq!(sample.scoring == Scoring::ToolCalls, !calls.is_empty(), "{name}");
            without += usize::from(calls.is_empty());
            for call in &calls {
                assert_fits(call, &sample.tools);
                assert_asked(call, question(&sample));
            }
            let units = calls.iter().filter(|call| call.arguments.get("unit").is_some()).count();
            let asked = question(&sample).matches("celsius").count()
                + question(&sample).matches("fahrenheit").count();
            assert!(calls.is_empty() || units == asked, "{}", question(&sample));
        }
        let range = if name == "tool_call" { 100..220 } else { 0..1 };
        assert!(range.contains(&without), "{name}: {without} of 600 need no call");
    }
}

#[test]
fn parallel_calls_are_in_the_order_of_the_question() {
    for sample in samples("tool_parallel") {
        let text = question(&sample);
        let cities: Vec<usize> = Answer::of_message(&sample.answer)
            .tool_calls
            .iter()
            .filter_map(|call| call.arguments["city"].as_str())
            .map(|city| text.find(city).unwrap())
            .collect();
        assert!(cities.is_sorted(), "{text}");
    }
}

#[test]
fn results_of_tools_are_in_the_answer() {
    for sample in samples("tool_result") {
        let calls = Answer::of_message(&sample.messages[1]).tool_calls;
        let results = &sample.messages[2..];
        assert_eq!(calls.len(), results.len());
        let mut sentences = Vec::new();
        for (index, (call, result)) in calls.iter().zip(results).enumerate() {
            assert_fits(call, &sample.tools);
            assert_asked(call, sample.messages[0]["content"].as_str().unwrap());
            assert_eq!(sample.messages[1]["tool_calls"][index]["id"], result["tool_call_id"]);
            let value: Value = serde_json::from_str(result["content"].as_str().unwrap()).unwrap();
            if let Some(expression) = call.arguments["expression"].as_str() {
                let number = value.get("result").unwrap_or(&value);
                assert_eq!(*number, value_of(expression));
                sentences.push(format!("{expression} is {number}."));
            } else {
                let unit = value["unit"].as_str().unwrap();
                assert_eq!(call.arguments["unit"].as_str().unwrap_or(unit), unit);
                let (sky, city) = (value["sky"].as_str().unwrap(), call.arguments["city"].as_str().unwrap());
                sentences.push(format!("It is {sky} in {city}, {} degrees {unit}.", value["temperature"]));
            }
        }
        assert_eq!(answer(&sample), sentences.join(" "));
    }
}

/// The answer to a question that is easy without its system prompt.
fn easy_answer(text: &str) -> String {
    if let Some((_, echo)) = text.split_once(": ") {
        return echo.to_owned();
    }
    let given = numbers(text);
    if given.len() == 2 {
        return (given[0] + given[1]).to_string();
    }
    let words: Vec<&str> = text.split([' ', '.']).collect();
    let color = super::phrase::COLORS.iter().find(|color| words.contains(*color));
    (*color.expect("the question names a color")).to_owned()
}

#[test]
fn system_prompts_are_followed() {
    let mut kinds = HashSet::new();
    for sample in samples("system_prompt") {
        let (system, text) = (sample.messages[0]["content"].as_str().unwrap(), question(&sample));
        assert_eq!(sample.messages[0]["role"], "system");
        let told = system.split_once(": ").map(|(_, told)| told).unwrap_or_default();
        let kind = sample.content.split([' ', ':']).next().unwrap().to_owned();
        let expected = match kind.as_str() {
            "capitals" => easy_answer(text).to_uppercase(),
            "begin" => format!("{told} {}", easy_answer(text)),
            "end" => format!("{} {told}", easy_answer(text)),
            "always" => told.to_owned(),
            "yes" => {
                kinds.insert(format!("yes or no: {}", answer(&sample)));
                yes_or_no(text).to_owned()
            }
            _ => {
                let topic = sample.content.split([' ', ':']).nth(1).unwrap();
                assert!(
                    system.contains(&format!("the {topic}")) || system.contains(&format!("The {topic}")),
                    "{system}"
                );
                let refused = text.split([' ', '.', '?']).any(|word| word == topic);
                kinds.insert(format!("refused: {refused}"));
                if refused { told.to_owned() } else { easy_answer(text) }
            }
        };
        assert_eq!(answer(&sample), expected, "{system} {text}");
        kinds.insert(kind);
    }
    assert_eq!(kinds.len(), 10, "{kinds:?}");
}

fn yes_or_no(text: &str) -> &'static str {
    let given = numbers(text);
    let words: Vec<&str> = text.split([' ', '.', '?']).filter(|word| !word.is_empty()).collect();
    let yes = match given.as_slice() {
        [a, b] if text.contains("larger") => a > b,
        [a, b] => a < b,
        _ => words[3] == *words.last().unwrap(),
    };
    if yes { "yes" } else { "no" }
}

#[test]
fn remembered_facts_were_told() {
    let mut noted = 0;
    for sample in samples("memory") {
        if answer(&sample) == "Noted." {
            noted += 1;
            continue;
        }
        let told = &sample.messages[..sample.messages.len() - 1];
        assert!((4..=8).contains(&told.len()));
        assert!(told.iter().skip(1).step_by(2).all(|message| message["content"] == "Noted."));
        let value = answer(&sample).trim_end_matches('.').replace(" years old", "");
        let value = value.split(' ').next_back().unwrap();
        let facts = told.iter().filter(|message| message["role"] == "user");
        let telling = facts.filter(|message| {
            let text = message["content"].as_str().unwrap();
            text.split(|letter: char| !letter.is_alphanumeric()).any(|word| word == value)
        });
        assert!(telling.count() >= 1, "{value}: {told:?}");
        let asked = question(&sample).split([' ', '?']).any(|word| word == value);
        assert!(!asked, "{}", question(&sample));
    }
    assert!((30..100).contains(&noted), "{noted} of 600 end with a fact");
}

#[test]
fn thinking_shows_its_steps_and_ends_with_the_answer() {
    let (mut sums, mut counts, mut lists) = (0, 0, 0);
    for sample in samples("thinking") {
        assert_eq!(sample.template_kwargs["enable_thinking"], true);
        let steps = sample.answer["reasoning_content"].as_str().unwrap();
        let last = steps.lines().next_back().unwrap();
        if let Some(result) = last.strip_prefix("Result: ") {
            sums += 1;
            assert_eq!(result, answer(&sample));
            assert_columns(steps, answer(&sample));
        } else if sample.content.contains(" in ") && steps.contains(", ") && !steps.contains(" from ") {
            counts += 1;
            let letters: String = steps.split(", ").map(|step| &step[..1]).collect();
            assert!(sample.content.ends_with(&letters), "{steps}");
            assert!(steps.ends_with(&format!(" {}", answer(&sample))), "{steps}");
        } else if steps.contains(" from ") {
            lists += 1;
            let picked: Vec<&str> = steps.lines().map(|line| line.split(' ').next().unwrap()).collect();
            assert_eq!(picked.join(", "), answer(&sample));
        }
    }
    assert!(sums > 250 && counts > 60 && lists > 70, "{sums} {counts} {lists}");
}

/// Every line of written arithmetic is true, and the written digits are those of the result.
fn assert_columns(steps: &str, result: &str) {
    let mut digits = String::new();
    let mut carry = 0;
    for line in steps.lines().filter(|line| !line.starts_with("Result")) {
        let (sum, written) = line.split_once(": ").unwrap();
        let (left, right) = sum.split_once(" = ").unwrap();
        let value = match left.split(' ').collect::<Vec<_>>()[..] {
            [a, "+", b, "+", c] => parse(a) + parse(b) + parse(c),
            [a, "-", b, "-", c] => parse(a) - parse(b) - parse(c),
            [a, "*", b, "+", c] => parse(a) * parse(b) + parse(c),
            _ => panic!("{line} is no step"),
        };
        assert_eq!(value, parse(right), "{line}");
        assert!(left.ends_with(&format!(" {carry}")), "{steps}");
        let (digit, next) = written.split_once(", carry ").unwrap();
        digits.insert_str(0, digit);
        carry = parse(next);
    }
    let all = if carry > 0 { format!("{carry}{digits}") } else { digits };
    assert_eq!(all.trim_start_matches('0'), result.trim_start_matches('0'), "{steps}");
}

fn parse(number: &str) -> i64 {
    number.parse().unwrap()
}

#[test]
fn greetings_of_one_wording_have_one_answer() {
    let mut answers = std::collections::HashMap::new();
    for sample in samples("greeting") {
        let before = answers.insert(sample.content.clone(), answer(&sample).to_owned());
        assert!(before.is_none_or(|before| before == answer(&sample)), "{}", sample.content);
    }
    let held_out: HashSet<String> = {
        let task = TASKS.iter().find(|task| task.name == "greeting").unwrap();
        (0..SAMPLES).map(|index| answer(&task.sample(Split::HeldOut, index)).to_owned()).collect()
    };
    assert_eq!(held_out.len(), 9, "{held_out:?}");
}

#[test]
fn word_lists_have_letters_only_and_no_word_twice() {
    for (list, least) in [(&COMMON, 800), (&NAMES, 100), (&CITIES, 100), (&ITEMS, 100)] {
        assert!(list.len() >= least);
        assert_eq!(list.iter().collect::<HashSet<_>>().len(), list.len());
        assert!(list.iter().all(|word| word.bytes().all(|byte| byte.is_ascii_alphabetic())));
    }
}
