//! Structured output with the demo model: what it writes by itself and what a grammar makes of it, through the server.

use std::thread;

use serde_json::{Value, json};
use spark_engine::image_data_url;
use spark_testing::media_path;

use crate::{
    server::{CHAT, COMPLETIONS, with},
    support::server::Server,
};

/// Little memory for a test machine.
const SMALL: [&str; 4] = ["--threads", "2", "--kv-cache-memory-bytes", "67108864"];
const SUM: &str = "What is 347 + 185?";
const EMMA: &str = "Emma is 90 years old and lives in Leipzig.\nGive name, city and age as JSON.";
const WEATHER: &str = "What is the weather in Oslo in celsius?";

fn demo() -> Server {
    Server::serve(None, &SMALL)
}

/// The greedy answer to `text` is wanted.
fn body(text: &str, extra: Value) -> Value {
    let messages = json!([{"role": "user", "content": text}]);
    with(json!({"messages": messages, "temperature": 0, "max_completion_tokens": 200}), extra)
}

fn schema(schema: &Value) -> Value {
    json!({"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": true}}})
}

fn person() -> Value {
    json!({"type": "object", "properties": {"age": {"type": "integer"}, "name": {"type": "string", "maxLength": 20},
        "city": {"type": "string", "maxLength": 20}}, "required": ["age", "name", "city"], "additionalProperties": false})
}

/// A person as [`person`] wants one.
fn check_person(text: &str) {
    let value: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"));
    let fields = value.as_object().unwrap();
    assert!(fields.keys().eq(["age", "name", "city"]), "the order is the schema's: {text}");
    assert!(value["age"].is_i64() && value["name"].is_string() && value["city"].is_string(), "{text}");
}

/// Content and end of the first choice.
fn said(server: &Server, body: &Value) -> (String, String) {
    let answer = server.ask(CHAT, body);
    let choice = &answer["choices"][0];
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    (text(&choice["message"]["content"]), text(&choice["finish_reason"]))
}

fn stopped(text: &str) -> (String, String) {
    (text.to_owned(), "stop".to_owned())
}

#[test]
fn json_is_what_the_schema_says() {
    let server = demo();
    let wanted = schema(&person());
    // The model has learnt another order of keys.
    let free = said(&server, &body(EMMA, json!({}))).0;
    assert!(free.starts_with("{\"name\""), "{free}");
    let (content, finish) = said(&server, &body(EMMA, wanted.clone()));
    check_person(&content);
    assert_eq!(finish, "stop");
    // Whatever is asked, and however it is drawn.
    let drawn = json!({"n": 3, "temperature": 1.5, "seed": 7, "logprobs": true, "top_logprobs": 2});
    let answer = server.ask(CHAT, &with(body("Hello!", wanted.clone()), drawn));
    for choice in answer["choices"].as_array().unwrap() {
        let content = choice["message"]["content"].as_str().unwrap();
        if choice["finish_reason"] == "stop" {
            check_person(content);
        }
        let logprobs = choice["logprobs"]["content"].as_array().unwrap();
        let joined: Vec<u8> = logprobs
            .iter()
            .flat_map(|token| token["bytes"].as_array().unwrap())
            .map(|byte| byte.as_u64().unwrap() as u8)
            .collect();
        assert!(
            joined.starts_with(content.as_bytes()),
            "log-probabilities are those of the text: {:?} {content:?}",
            String::from_utf8_lossy(&joined)
        );
    }
    let object = said(&server, &body(EMMA, json!({"response_format": {"type": "json_object"}})));
    let object: Value = serde_json::from_str(&object.0).unwrap();
    assert_eq!(object, json!({"name": "Emma", "city": "Leipzig", "age": 90}));
}

#[test]
fn streams_are_held_to_the_schema_too() {
    let server = demo();
    let request = body(EMMA, schema(&person()));
    let whole = said(&server, &request).0;
    let streamed: String = server
        .stream(CHAT, &request)
        .filter(|data| data != "[DONE]")
        .filter_map(|data| {
            let chunk: Value = serde_json::from_str(&data).unwrap();
            chunk["choices"][0]["delta"]["content"].as_str().map(str::to_owned)
        })
        .collect();
    assert_eq!(streamed, whole);
    let cut = said(&server, &with(request.clone(), json!({"max_completion_tokens": 4})));
    assert!(whole.starts_with(&cut.0) && cut.1 == "length", "{cut:?}");
    let stop = said(&server, &with(request, json!({"stop": "name"})));
    assert!(whole.starts_with(&stop.0) && !stop.0.contains("name") && stop.1 == "stop", "{stop:?}");
}

#[test]
fn regexes_choices_and_grammars() {
    let server = demo();
    let outputs = |outputs: Value| json!({"structured_outputs": outputs});
    assert_eq!(said(&server, &body(SUM, outputs(json!({"regex": "[0-9]{3}"})))), stopped("532"));
    assert_eq!(said(&server, &body(SUM, outputs(json!({"regex": "<[0-9]{3}>"})))).0.len(), 5);
    let words = json!({"choice": ["four hundred", "532", "53"]});
    assert_eq!(said(&server, &body(SUM, outputs(words))), stopped("532"));
    let lark = "start: \"The sum is \" NUMBER \".\"\nNUMBER: /[0-9]{3}/\n";
    let (content, _) = said(&server, &body(SUM, outputs(json!({"grammar": lark}))));
    assert!(content.starts_with("The sum is ") && content.len() == 15, "{content}");
    let gbnf = "root ::= list\nlist ::= digit | digit \", \" list\ndigit ::= [0-9]{1,2}";
    let sort = body("Sort 88, 14, 41, 55.", outputs(json!({"grammar": gbnf})));
    assert_eq!(said(&server, &sort), stopped("14, 41, 55, 88"));
    let prompt = json!({"prompt": "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n", "temperature": 0,
        "max_tokens": 20, "structured_outputs": {"regex": "(Hi|Hello)!"}});
    assert_eq!(server.ask(COMPLETIONS, &prompt)["choices"][0]["text"], "Hello!");
    let url = image_data_url(&media_path("demo.png")).unwrap();
    let picture = json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "What colour is the hexagon?"}]}]});
    let colours = with(body("", picture), outputs(json!({"choice": ["Red.", "Black.", "Green."]})));
    assert_eq!(said(&server, &colours), stopped("Black."));
}

fn tools(strict: bool) -> Value {
    let tool = |name: &str, about: &str, properties: Value, required: &str| {
        let parameters = json!({"type": "object", "properties": properties, "required": [required]});
        let mut function = json!({"name": name, "description": about, "parameters": parameters});
        if strict {
            function["strict"] = json!(true);
        }
        json!({"type": "function", "function": function})
    };
    let unit = json!({"type": "string", "enum": ["celsius", "fahrenheit"]});
    json!([
        tool(
            "calculator",
            "Calculates an expression.",
            json!({"expression": {"type": "string"}}),
            "expression"
        ),
        tool("weather", "The weather in a city.", json!({"city": {"type": "string"}, "unit": unit}), "city"),
    ])
}

/// Names and arguments of the calls of the first choice; there is nothing else.
fn calls(server: &Server, body: &Value) -> Vec<(String, Value)> {
    let answer = server.ask(CHAT, body);
    let choice = &answer["choices"][0];
    assert_eq!(
        (&choice["finish_reason"], &choice["message"]["content"]),
        (&json!("tool_calls"), &Value::Null),
        "{answer}"
    );
    let call = |call: &Value| {
        let arguments = call["function"]["arguments"].as_str().unwrap();
        (call["function"]["name"].as_str().unwrap().to_owned(), serde_json::from_str(arguments).unwrap())
    };
    choice["message"]["tool_calls"].as_array().unwrap().iter().map(call).collect()
}

#[test]
fn tools_are_called_when_they_have_to_be() {
    let server = demo();
    let with_tools = |text: &str, extra: Value| body(text, with(json!({"tools": tools(false)}), extra));
    let required = json!({"tool_choice": "required"});
    let oslo = [("weather".to_owned(), json!({"city": "Oslo", "unit": "celsius"}))];
    assert_eq!(calls(&server, &with_tools(WEATHER, required.clone())), oslo);
    let named = |name: &str| json!({"tool_choice": {"type": "function", "function": {"name": name}}});
    assert_eq!(calls(&server, &with_tools(WEATHER, named("weather"))), oslo);
    let calculated = ("calculator".to_owned(), json!({"expression": "2662 - 860"}));
    assert_eq!(calls(&server, &with_tools("What is 2662 - 860?", named("calculator"))), [calculated]);
    // Where the model would rather do something else, the call has its form all the same.
    let short = json!({"type": "object", "properties": {"expression": {"type": "string", "maxLength": 12}},
        "required": ["expression"], "additionalProperties": false});
    let mut bounded = tools(false);
    bounded[0]["function"]["parameters"] = short;
    for (text, choice) in [(WEATHER, named("calculator")), ("Hello!", named("calculator"))] {
        let found = calls(&server, &body(text, with(json!({"tools": bounded}), choice)));
        assert_eq!((found.len(), found[0].0.as_str()), (1, "calculator"));
        assert!(found[0].1["expression"].as_str().unwrap().chars().count() <= 12, "{found:?}");
    }
    let one = json!({"parallel_tool_calls": false});
    assert_eq!(calls(&server, &with_tools(WEATHER, with(required, one))), oslo);
    // Left to choose, it calls or answers; strict functions get what they ask for.
    let strict = |text: &str| body(text, json!({"tools": tools(true)}));
    let answer = server.ask(CHAT, &strict(WEATHER));
    for call in answer["choices"][0]["message"]["tool_calls"].as_array().into_iter().flatten() {
        assert!(["calculator", "weather"].contains(&call["function"]["name"].as_str().unwrap()), "{call}");
    }
    // With a schema for what is no call.
    let either =
        |text: &str| with(body(text, json!({"tools": tools(false)})), schema(&json!({"type": "integer"})));
    assert_eq!(calls(&server, &either(WEATHER)), oslo);
    assert!(said(&server, &with(either(SUM), json!({"tool_choice": "none"}))).0.parse::<i64>().is_ok());
}

#[test]
fn thoughts_come_before_the_form() {
    let server = demo();
    let sum = schema(
        &json!({"type": "object", "properties": {"sum": {"type": "integer", "minimum": 0, "maximum": 9999}},
        "required": ["sum"], "additionalProperties": false}),
    );
    let thinking = json!({"chat_template_kwargs": {"enable_thinking": true}});
    let answer = server.ask(CHAT, &with(body(SUM, sum.clone()), thinking));
    let message = &answer["choices"][0]["message"];
    assert!(message["reasoning"].as_str().unwrap().ends_with("Result: 532"), "{message}");
    let content: Value = serde_json::from_str(message["content"].as_str().unwrap()).unwrap();
    assert!(content["sum"].is_i64(), "{message}");
    let unasked = server.ask(CHAT, &body(SUM, sum));
    let message = &unasked["choices"][0]["message"];
    assert_eq!(message["reasoning"], Value::Null, "{message}");
    assert!(serde_json::from_str::<Value>(message["content"].as_str().unwrap()).unwrap()["sum"].is_i64());
}

#[test]
fn bad_grammars_are_refused_and_the_engine_goes_on() {
    let server = demo();
    for (extra, param, message) in [
        (schema(&json!({"properties": {"a": {"not": {}}}})), "response_format", "#/properties/a/not"),
        (schema(&json!({"$ref": "#"})), "response_format", "no text satisfies it"),
        (json!({"structured_outputs": {"regex": "("}}), "structured_outputs", "unclosed group"),
        (json!({"structured_outputs": {"grammar": "start: a"}}), "structured_outputs", "unknown name"),
        (
            json!({"structured_outputs": {"regex": "((((a{0,100}){0,100}){0,100}){0,100})b", "choice": ["a"]}}),
            "structured_outputs",
            "exactly one",
        ),
    ] {
        let response = server.post(CHAT, &body(SUM, extra.clone()));
        let error = response.json();
        assert_eq!((response.status, &error["error"]["param"]), (400, &json!(param)), "{extra}: {error}");
        assert!(error["error"]["message"].as_str().unwrap().contains(message), "{error}");
    }
    assert_eq!(said(&server, &body(SUM, json!({}))), stopped("532"));
}

/// Constrained and free sequences in one batch, each with its own answer.
#[test]
fn many_at_once_keep_to_their_own_forms() {
    let server = demo();
    thread::scope(|scope| {
        for i in 0..24 {
            let server = &server;
            scope.spawn(move || match i % 3 {
                0 => check_person(&said(server, &body(EMMA, schema(&person()))).0),
                1 => {
                    let digits = json!({"structured_outputs": {"regex": "[0-9]{3}"}});
                    assert_eq!(said(server, &body(SUM, digits)), stopped("532"));
                }
                _ => assert_eq!(said(server, &body(SUM, json!({}))), stopped("532")),
            });
        }
    });
    server.wait_until_idle();
}
