//! `eval`: what it asks, whom, and what it makes of the answers; and which model commands use that are given none.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::{Command, Output, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use spark_engine::{Dtype, EngineOptions};
use spark_suite::{Picture, Sample, Split, tasks};
use spark_testing::model_dir;
use spark_text::{ChatTemplate, RenderInput, Tokenizer};

use crate::{
    server::MODEL,
    support::{
        self,
        server::{DEADLINE, SMALL, program, wait_for_exit},
    },
};

const SAMPLES: u64 = 3;

/// What a fake server answers to a sample; the second number counts its requests from 0.
type Respond = dyn Fn(Option<&Sample>, usize) -> Reply + Send + Sync;

enum Reply {
    /// With this status and body.
    Now(u16, Value),
    /// Never: the connection stays open.
    Never,
}

/// An OpenAI endpoint on loopback that knows the first held-out samples. It ends with the test's process.
struct Fake {
    address: SocketAddr,
    num_requests: Arc<AtomicUsize>,
    /// The bodies that asked for a known sample.
    asked: Arc<Mutex<Vec<(Sample, Value)>>>,
}

impl Fake {
    fn start(respond: impl Fn(Option<&Sample>, usize) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let num_requests = Arc::new(AtomicUsize::new(0));
        let known: Arc<Vec<Sample>> = Arc::new(
            (0..SAMPLES).flat_map(|i| tasks().map(move |task| task.sample(Split::HeldOut, i))).collect(),
        );
        let (respond, counter): (Arc<Respond>, _) = (Arc::new(respond), num_requests.clone());
        let asked = Arc::new(Mutex::new(Vec::new()));
        let bodies = asked.clone();
        std::thread::spawn(move || {
            for connection in listener.incoming().map_while(Result::ok) {
                let (known, respond, counter) = (known.clone(), respond.clone(), counter.clone());
                let bodies = bodies.clone();
                std::thread::spawn(move || serve(connection, &known, &*respond, &counter, &bodies));
            }
        });
        Self { address, num_requests, asked }
    }

    fn url(&self) -> String {
        format!("http://{}/v1", self.address)
    }
}

/// Answers the requests of a connection until it ends.
fn serve(
    connection: TcpStream,
    known: &[Sample],
    respond: &Respond,
    counter: &AtomicUsize,
    asked: &Mutex<Vec<(Sample, Value)>>,
) {
    let mut connection = BufReader::new(connection);
    while let Some((head, body)) = read_request(&mut connection) {
        assert!(
            head.contains("authorization: Bearer sesame") || head.contains("Authorization: Bearer sesame")
        );
        let (status, answer) = if head.starts_with("GET /v1/models ") {
            (200, json!({"data": [{"id": "fake"}]}))
        } else {
            assert!(head.starts_with("POST /v1/chat/completions "), "{head}");
            let body: Value = serde_json::from_slice(&body).unwrap();
            assert_eq!((&body["model"], &body["temperature"]), (&json!("fake"), &json!(0)));
            let sample = known.iter().find(|sample| is_asked(sample, &body));
            asked.lock().unwrap().extend(sample.map(|sample| (sample.clone(), body.clone())));
            match respond(sample, counter.fetch_add(1, Ordering::SeqCst)) {
                Reply::Now(status, answer) => (status, answer),
                Reply::Never => continue,
            }
        };
        let answer = answer.to_string();
        let head = format!(
            "HTTP/1.1 {status} x\r\nContent-Type: application/json\r\nContent-Length: {}",
            answer.len()
        );
        if write!(connection.get_mut(), "{head}\r\n\r\n{answer}").is_err() {
            return;
        }
    }
}

fn read_request(connection: &mut BufReader<TcpStream>) -> Option<(String, Vec<u8>)> {
    let mut head = String::new();
    while connection.read_line(&mut head).ok()? > 2 {}
    let length = head.to_lowercase().split("content-length: ").nth(1).map_or(0, |rest| {
        rest.split("\r\n").next().and_then(|number| number.parse().ok()).expect("a length is a number")
    });
    let mut body = vec![0; length];
    connection.read_exact(&mut body).ok()?;
    (!head.trim().is_empty()).then_some((head, body))
}

/// Whether a body asks exactly this sample: texts, pixels, tools and template variables.
fn is_asked(sample: &Sample, body: &Value) -> bool {
    let messages = body["messages"].as_array().unwrap();
    let texts = |messages: &[Value]| -> Vec<String> {
        let parts = |message: &Value| match &message["content"] {
            Value::Array(parts) => {
                parts.iter().filter_map(|part| part["text"].as_str().map(str::to_owned)).collect()
            }
            content => vec![format!("{}: {content}", message["role"])],
        };
        messages.iter().flat_map(parts).collect()
    };
    texts(messages) == texts(&sample.messages)
        && pictures(messages) == sample.pictures
        && body.get("tools").cloned().unwrap_or(json!([])) == json!(sample.tools)
        && body.get("chat_template_kwargs").cloned().unwrap_or(json!({})) == json!(sample.template_kwargs)
}

fn pictures(messages: &[Value]) -> Vec<Picture> {
    let parts = messages.iter().filter_map(|message| message["content"].as_array()).flatten();
    let urls = parts.filter_map(|part| part["image_url"]["url"].as_str());
    urls.map(|url| {
        let png = STANDARD.decode(url.strip_prefix("data:image/png;base64,").unwrap()).unwrap();
        let mut reader = png::Decoder::new(std::io::Cursor::new(png)).read_info().unwrap();
        let mut rgb = vec![0; reader.output_buffer_size().unwrap()];
        reader.next_frame(&mut rgb).unwrap();
        let (width, height) = (reader.info().width as usize, reader.info().height as usize);
        Picture { width, height, rgb }
    })
    .collect()
}

/// The right answer, as a server that parses tool calls gives it.
fn right(sample: &Sample) -> Value {
    let mut message = sample.answer.clone();
    for call in message["tool_calls"].as_array_mut().into_iter().flatten() {
        let function = call.get("function").unwrap_or(call).clone();
        let arguments = function["arguments"].to_string();
        let function = json!({"name": function["name"], "arguments": arguments});
        *call = json!({"id": "x", "type": "function", "function": function});
    }
    completion(&message)
}

fn completion(message: &Value) -> Value {
    json!({"choices": [{"message": message, "finish_reason": "stop"}],
           "usage": {"prompt_tokens": 10, "completion_tokens": 2}})
}

fn eval(arguments: &[&str]) -> Command {
    let mut command = program(&["eval", "--suite", "tiny-vl", "--json", "--samples", "3"]);
    command.args(arguments).env("OPENAI_API_KEY", "sesame").env_remove("SPARK_MODEL");
    command
}

/// The table and the object of a run that ends well, and its messages.
fn results(arguments: &[&str]) -> (String, Value, String) {
    let Output { status, stdout, stderr } = eval(arguments).output().unwrap();
    let (stdout, stderr) = (String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap());
    assert!(status.success(), "{stderr}");
    let last = stdout.lines().last().unwrap();
    (stdout.clone(), serde_json::from_str(last).unwrap_or_else(|error| panic!("{error}: {last}")), stderr)
}

#[test]
fn right_answers_of_an_endpoint_are_right() {
    let fake =
        Fake::start(|sample, _| Reply::Now(200, right(sample.expect("only held-out samples are asked"))));
    let folder = tempfile::tempdir().unwrap();
    let saved = folder.path().join("answers.jsonl");
    let (table, json, stderr) = results(&["--url", &fake.url(), "--save", &saved.display().to_string()]);
    let num_tasks = tasks().count() as u64;
    assert_eq!(json["mean"], 1.0, "{table}{stderr}");
    assert_eq!((&json["suite"], &json["model"]), (&json!("tiny-vl"), &json!("fake")));
    assert_eq!((&json["samples"], &json["errors"]), (&json!(SAMPLES * num_tasks), &json!(0)));
    assert_eq!(json["output_tokens"], 2 * SAMPLES * num_tasks);
    assert_eq!(json["complete"], true);
    for task in tasks() {
        let result = &json["tasks"][task.name];
        assert_eq!(
            (&result["accuracy"], &result["high"], &result["samples"]),
            (&json!(1.0), &json!(1.0), &json!(3))
        );
        let low = result["low"].as_f64().unwrap();
        assert!((low - 0.4385).abs() < 1e-3, "{low}");
        assert!(table.lines().any(|line| line.starts_with(task.name) && line.contains("100.0 %")), "{table}");
    }
    let lines = std::fs::read_to_string(&saved).unwrap();
    let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let ids: Vec<_> =
        lines.iter().map(|line| (line["task"].as_str().unwrap(), line["index"].as_u64().unwrap())).collect();
    let expected: Vec<_> = tasks().flat_map(|task| (0..SAMPLES).map(move |i| (task.name, i))).collect();
    assert_eq!(ids, expected, "in the order of the suite");
    assert!(lines.iter().all(|line| line["right"] == true && line["answer"].is_object()));
}

#[test]
fn wrong_answers_are_wrong() {
    let fake = Fake::start(|_, _| Reply::Now(200, completion(&json!({"content": "I will not say."}))));
    let (table, json, _) = results(&["--url", &fake.url()]);
    assert_eq!((&json["mean"], &json["errors"]), (&json!(0.0), &json!(0)), "{table}");
}

#[test]
fn errors_count_as_wrong_and_are_reported() {
    let fake = Fake::start(|sample, number| match number % 2 {
        0 => Reply::Now(500, json!({"error": {"message": "out of order"}})),
        _ => Reply::Now(200, right(sample.unwrap())),
    });
    let name = tasks().next().unwrap().name;
    let (table, json, stderr) =
        results(&["--url", &fake.url(), "--tasks", name, "--samples", "2", "--concurrency", "1"]);
    assert_eq!((&json["mean"], &json["errors"]), (&json!(0.5), &json!(1)), "{table}");
    assert!(stderr.contains("HTTP 500: out of order"), "{stderr}");
    assert_eq!(fake.num_requests.load(Ordering::SeqCst), 2);

    let broken = Fake::start(|_, _| Reply::Now(503, json!("closed")));
    let Output { status, stderr, .. } = eval(&["--url", &broken.url()]).output().unwrap();
    let stderr = String::from_utf8(stderr).unwrap();
    assert_eq!(status.code(), Some(1), "nothing could be run: {stderr}");
    assert!(stderr.contains("HTTP 503: closed"), "{stderr}");
}

#[test]
fn ctrl_c_prints_what_is_done() {
    let fake = Fake::start(|sample, number| match number {
        0..4 => Reply::Now(200, right(sample.unwrap())),
        _ => Reply::Never,
    });
    let arguments = ["--url", &fake.url(), "--samples", "1", "--concurrency", "1"];
    let mut child = eval(&arguments).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    while fake.num_requests.load(Ordering::SeqCst) < 5 {
        assert!(child.try_wait().unwrap().is_none(), "it ended before it was stopped");
        std::thread::yield_now();
    }
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    assert_eq!(wait_for_exit(&mut child, DEADLINE).code(), Some(130));
    let mut stdout = String::new();
    child.stdout.take().unwrap().read_to_string(&mut stdout).unwrap();
    let json: Value = serde_json::from_str(stdout.lines().last().unwrap()).unwrap();
    assert_eq!((&json["samples"], &json["right"], &json["complete"]), (&json!(4), &json!(4), &json!(false)));
}

/// What a server makes of the bodies is what training renders from the samples themselves, token by token.
#[test]
fn prompts_are_those_of_training() {
    let fake = Fake::start(|sample, _| Reply::Now(200, right(sample.unwrap())));
    results(&["--url", &fake.url()]);
    let folder = model_dir(MODEL);
    let tokenizer = Tokenizer::from_dir(&folder).unwrap();
    let template = ChatTemplate::from_dir(&folder, &tokenizer).unwrap();
    let longer = |options: &mut EngineOptions| options.max_model_len = Some(4096);
    let engine = support::builder(MODEL, Dtype::F32).engine(longer).build().unwrap();
    let placeholder = engine.info().limits.image_token_id.unwrap();
    // A picture is one placeholder before it is processed.
    let collapsed = |mut ids: Vec<u32>| {
        ids.dedup_by(|a, b| a == b && *a == placeholder);
        ids
    };
    let asked = fake.asked.lock().unwrap();
    assert_eq!(asked.len() as u64, SAMPLES * tasks().count() as u64);
    for (sample, body) in asked.iter() {
        let (messages, tools) = (json!(sample.messages), json!(sample.tools));
        let segments = template.render(RenderInput {
            messages: &messages,
            tools: Some(&tools).filter(|_| !sample.tools.is_empty()),
            kwargs: &sample.template_kwargs,
            add_generation_prompt: true,
        });
        let expected = tokenizer.encode(&segments.unwrap()).unwrap();
        let mut body = body.clone();
        body["return_token_ids"] = true.into();
        body["max_tokens"] = 1.into();
        body.as_object_mut().unwrap().remove("model");
        let answer = support::block_on(support::answer(&engine, body));
        let (prompt, _) = support::prompt_and_output(&answer);
        assert_eq!(collapsed(prompt), collapsed(expected), "{messages}");
    }
}

/// Flags for a fixture in this process: few and short answers, which are noise.
fn in_process(model: &Path) -> Vec<String> {
    let mut flags = vec!["--model".to_owned(), model.display().to_string()];
    flags.extend(SMALL.map(String::from));
    flags.extend(["--max-model-len", "4096", "--max-tokens", "4", "--samples", "1"].map(String::from));
    flags
}

#[test]
fn an_engine_in_this_process_answers_everything() {
    let flags = in_process(&model_dir(MODEL));
    let (table, json, stderr) = results(&flags.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(json["errors"], 0, "{stderr}");
    assert_eq!(json["samples"], tasks().count() as u64);
    assert!(json["output_tokens"].as_u64().unwrap() > 0, "{json}");
    assert!(json["mean"].as_f64().unwrap() < 0.5, "random weights know nothing: {table}");
    assert_eq!(json["model"], model_dir(MODEL).display().to_string());
}

#[test]
fn a_gallery_has_pictures_and_answers() {
    let folder = tempfile::tempdir().unwrap();
    let mut flags = in_process(&model_dir(MODEL));
    flags.extend(["--gallery".to_owned(), folder.path().display().to_string()]);
    let Output { status, stderr, .. } =
        eval(&flags.iter().map(String::as_str).collect::<Vec<_>>()).output().unwrap();
    assert!(status.success(), "{}", String::from_utf8_lossy(&stderr));
    let page = std::fs::read_to_string(folder.path().join("demo.md")).unwrap();
    assert_eq!(page.matches("\n## ").count(), 10.min(tasks().count()), "{page}");
    assert_eq!(page.matches("answer: ").count(), page.matches("\n## ").count(), "{page}");
    let images: Vec<_> =
        page.split("](images/").skip(1).map(|rest| rest.split(')').next().unwrap()).collect();
    assert!(!images.is_empty(), "{page}");
    for image in images {
        let bytes = std::fs::read(folder.path().join("images").join(image)).unwrap();
        assert!(bytes.starts_with(b"\x89PNG"), "{image}");
    }
}

#[test]
fn results_are_compared_and_plotted() {
    let fake = Fake::start(|sample, number| match number % 2 {
        0 => Reply::Now(200, right(sample.unwrap())),
        _ => Reply::Now(200, completion(&json!({"content": "I will not say."}))),
    });
    let folder = tempfile::tempdir().unwrap();
    let [half, plot] = ["half.json", "plot.svg"].map(|name| folder.path().join(name));
    let (stdout, json, _) = results(&["--url", &fake.url()]);
    std::fs::write(&half, stdout).unwrap();
    let [half, plot] = [half, plot].map(|path| path.display().to_string());
    let Output { status, stdout, stderr } =
        program(&["eval", "--compare", &half, &half, "--plot", &plot]).output().unwrap();
    assert!(status.success(), "{}", String::from_utf8_lossy(&stderr));
    let table = String::from_utf8(stdout).unwrap();
    let mean = format!("{:.1}", json["mean"].as_f64().unwrap() * 100.0);
    assert!(table.contains(&format!("| mean | {mean} | {mean} |")), "{table}");
    let svg = std::fs::read_to_string(plot).unwrap();
    assert!(svg.contains(&format!("half (mean {mean} %)")), "{svg}");
}

#[test]
fn commands_without_a_model_take_that_of_the_environment() {
    let folder = model_dir(MODEL).display().to_string();
    let command = |arguments: &[&str]| {
        let mut command = program(arguments);
        command.env("SPARK_MODEL", &folder);
        command
    };
    let Output { status, stdout, stderr } = command(&["inspect", "--json"]).output().unwrap();
    let stderr = String::from_utf8(stderr).unwrap();
    assert!(status.success(), "{stderr}");
    assert!(stderr.contains("no MODEL given: using") && stderr.contains(&folder), "{stderr}");
    let report: Value = serde_json::from_slice(&stdout).unwrap();
    assert_eq!(report["folder"], folder);

    let flags = ["--temperature", "0", "--ignore-eos", "-n", "5"];
    let generate = |mut command: Command| {
        let Output { status, stdout, stderr } = command.args(SMALL).args(flags).output().unwrap();
        assert!(status.success(), "{}", String::from_utf8_lossy(&stderr));
        String::from_utf8(stdout).unwrap()
    };
    let expected = generate(program(&["generate", &folder, "Hello!"]));
    assert!(expected.len() > 1);
    for same in [
        command(&["generate", "Hello!"]),
        command(&["generate", "--prompt", "Hello!"]),
        program(&["generate", "--model", &folder, "Hello!"]),
        program(&["generate", "Hello!", "-m", &folder]),
        program(&["generate", &folder, "-p", "Hello!"]),
    ] {
        assert_eq!(generate(same), expected);
    }
}

#[test]
fn a_program_alone_says_where_it_has_looked() {
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("spark-engine");
    std::fs::copy(program(&[]).get_program(), &copy).unwrap();
    let Output { status, stderr, .. } =
        Command::new(&copy).args(["inspect"]).env_remove("SPARK_MODEL").output().unwrap();
    let stderr = String::from_utf8(stderr).unwrap();
    assert_eq!(status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("no MODEL given") && stderr.contains("models/spark-tiny-vl/awq"), "{stderr}");

    // Put beside it, the model is found.
    let place = folder.path().join("models/spark-tiny-vl/awq");
    std::fs::create_dir_all(&place).unwrap();
    for entry in std::fs::read_dir(model_dir(MODEL)).unwrap() {
        let from = entry.unwrap().path();
        std::fs::copy(&from, place.join(from.file_name().unwrap())).unwrap();
    }
    let Output { status, stdout, stderr } = Command::new(&copy)
        .args(["eval", "--tasks", "add", "--samples", "1", "--max-tokens", "2", "--json"])
        .args(SMALL)
        .env_remove("SPARK_MODEL")
        .output()
        .unwrap();
    let stderr = String::from_utf8(stderr).unwrap();
    assert!(status.success(), "{stderr}");
    assert!(stderr.contains("using the demo model spark-tiny-vl (AWQ) at"), "{stderr}");
    assert_eq!(last_line(&stdout)["model"], "spark-tiny-vl", "its name for clients is not its path");
}

fn last_line(stdout: &[u8]) -> Value {
    let text = std::str::from_utf8(stdout).unwrap();
    serde_json::from_str(text.lines().last().unwrap()).unwrap()
}
