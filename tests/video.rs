//! Videos through the whole engine: the prompt, the positions and the answer of transformers 4.57.1, whose goldens are in
//! `tests/fixtures/video`; video files through ffmpeg in its sandbox; the limits on both.

use std::{process::Command, time::Duration};

use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::{Value, json};
use spark_engine::{Dtype, SparkEngine, image_data_url, server::VideoDecoder};
use spark_models::RopeIndex;
use spark_testing::{Tensors, fixtures_dir, media_path, read_json, tolerance::FLOAT32};

use crate::{
    server::{CHAT, MODEL},
    support::{self, answer, block_on, server::Server},
};

const FIXTURE: &str = "moe_vl_bf16";
/// `<|image_pad|>` and `<|video_pad|>` of its tokenizer.
const IMAGE: u32 = 268;
const VIDEO: u32 = 269;
/// Frames of the two clips of the fixture.
const CLIPS: [usize; 2] = [5, 4];

fn encoded(name: &str) -> String {
    BASE64_STANDARD.encode(std::fs::read(fixtures_dir().join("video").join(name)).unwrap())
}

fn frames_url(clip: usize) -> String {
    let frames: Vec<_> = (0..CLIPS[clip]).map(|i| encoded(&format!("clip{clip}_{i}.jpg"))).collect();
    format!("data:video/jpeg;base64,{}", frames.join(","))
}

fn file_url() -> String {
    format!("data:video/mp4;base64,{}", encoded("clip.mp4"))
}

fn video(url: &str) -> Value {
    json!({"type": "video_url", "video_url": {"url": url}})
}

/// A chat with these parts, which shows its tokens and says little.
#[expect(clippy::needless_pass_by_value, reason = "every caller has just made it")]
fn body(parts: Vec<Value>) -> Value {
    let messages = json!([{"role": "user", "content": parts}]);
    json!({"messages": messages, "max_tokens": 4, "temperature": 0, "ignore_eos": true, "return_token_ids": true})
}

/// A chat about one video.
fn about(url: &str) -> Value {
    body(vec![video(url), json!({"type": "text", "text": "What?"})])
}

/// The conversation of a golden case.
fn golden_body(case: &Value) -> Value {
    let mut messages = case["messages"].clone();
    for message in messages.as_array_mut().unwrap() {
        let Some(parts) = message["content"].as_array_mut() else { continue };
        for part in parts {
            if let Some(clip) = part["clip"].as_u64() {
                *part = video(&frames_url(clip as usize));
            } else if let Some(name) = part["image"].as_str() {
                let url = image_data_url(&media_path(name)).unwrap();
                *part = json!({"type": "image_url", "image_url": {"url": url}});
            }
        }
    }
    let num_tokens = case["greedy_ids"].as_array().unwrap().len();
    json!({"messages": messages, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": true, "return_token_ids": true,
        "media_io_kwargs": {"video": {"fps": case["fps"]}}, "logprobs": true, "top_logprobs": 5})
}

fn log_softmax(logits: &[f32]) -> Vec<f32> {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f32 = logits.iter().map(|logit| (logit - most).exp()).sum();
    logits.iter().map(|logit| logit - most - sum.ln()).collect()
}

/// The positions that the model gets for the prompt of a case: each temporal patch is a medium of its own.
fn check_positions(name: &str, case: &Value, tensors: &Tensors) {
    let grids = |key: &str| -> Vec<[usize; 3]> { serde_json::from_value(case[key].clone()).unwrap() };
    let (mut images, mut videos) = (grids("image_grid_thw").into_iter(), Vec::new());
    for [t, h, w] in grids("video_grid_thw") {
        videos.extend(std::iter::repeat_n([1, h, w], t));
    }
    let mut videos = videos.into_iter();
    let ids = support::ids(&case["prompt_ids"]);
    let mut media = Vec::new();
    for (i, &id) in ids.iter().enumerate() {
        if (id == IMAGE || id == VIDEO) && ids[i - 1] != id {
            media.push((i, if id == IMAGE { images.next().unwrap() } else { videos.next().unwrap() }));
        }
    }
    assert!(images.next().is_none() && videos.next().is_none(), "{name}: grids without placeholders");
    let rope = RopeIndex::new(ids.len(), &media, 2);
    let (expected, shape) = tensors.i32(&format!("{name}/position_ids")).unwrap();
    assert_eq!(shape, [3, ids.len()]);
    for (axis, expected) in expected.chunks(ids.len()).enumerate() {
        let got: Vec<i32> = (0..ids.len()).map(|i| rope.position(i)[axis] as i32).collect();
        assert_eq!(got, expected, "{name}: axis {axis}");
    }
    let next = ids.len() as i64 + case["rope_delta"].as_i64().unwrap();
    assert_eq!(i64::from(rope.position(ids.len())[0]), next, "{name}: the position after the prompt");
}

#[test]
fn prompts_positions_and_answers_equal_transformers() {
    let goldens: Value = read_json("video/video.json").unwrap();
    let tensors = Tensors::fixture("video/video.safetensors").unwrap();
    let engine = support::builder(FIXTURE, Dtype::F32).build().unwrap();
    for (name, case) in goldens["cases"].as_object().unwrap() {
        check_positions(name, case, &tensors);
        let answer = block_on(answer(&engine, golden_body(case)));
        let (prompt, output) = support::prompt_and_output(&answer);
        assert_eq!(prompt, support::ids(&case["prompt_ids"]), "{name}: prompt");
        assert_eq!(output, support::ids(&case["greedy_ids"]), "{name}: answer");
        assert_eq!(answer["usage"]["prompt_tokens"], prompt.len());
        let (logits, _) = tensors.f32(&format!("{name}/logits")).unwrap();
        let expected = log_softmax(logits);
        let first = &answer["choices"][0]["logprobs"]["content"][0];
        let got = first["logprob"].as_f64().unwrap();
        let want = f64::from(expected[output[0] as usize]);
        assert!((got - want).abs() < f64::from(FLOAT32.logprob), "{name}: {got} {want}");
        // The same from the caches of pictures, of the encoder and of the prefix.
        let again = block_on(support::answer(&engine, golden_body(case)));
        assert_eq!(again["choices"][0]["token_ids"], answer["choices"][0]["token_ids"], "{name}: again");
    }
}

#[test]
fn frames_in_another_order_are_another_video() {
    let engine = support::builder(FIXTURE, Dtype::F32).build().unwrap();
    let ask = |url: &str| {
        let mut body = about(url);
        (body["logprobs"], body["top_logprobs"]) = (json!(true), json!(3));
        block_on(answer(&engine, body))["choices"][0]["logprobs"].clone()
    };
    let forward = frames_url(0);
    let mut frames: Vec<_> = forward.split_once(',').unwrap().1.split(',').collect();
    frames.swap(0, 3);
    let swapped = format!("data:video/jpeg;base64,{}", frames.join(","));
    let first = ask(&forward);
    assert_ne!(first, ask(&swapped));
    assert_eq!(first, ask(&forward));
}

/// Two ranks: pixels go over the bulk connection, the temporal patches are divided, and their embeddings broadcast.
#[test]
fn two_ranks_answer_the_same_about_a_video() {
    let goldens: Value = read_json("video/video.json").unwrap();
    let case = &goldens["cases"]["mixed"];
    let server = Server::start(FIXTURE, &["--tp", "2"]);
    let answer = server.ask(CHAT, &golden_body(case));
    let (prompt, output) = support::prompt_and_output(&answer);
    assert_eq!(prompt, support::ids(&case["prompt_ids"]));
    assert_eq!(output, support::ids(&case["greedy_ids"]));
}

/// The tests of files need ffmpeg; README.md names it with what else they need.
fn require_ffmpeg() {
    let found = Command::new("ffprobe").arg("-version").output().is_ok_and(|output| output.status.success());
    assert!(found, "ffmpeg is not installed: apt-get install ffmpeg");
}

fn with_decoder() -> SparkEngine {
    let program = env!("CARGO_BIN_EXE_spark-engine");
    let sandbox = [program, "decode-video", "--cpu-seconds", "60"].map(Into::into).to_vec();
    let decoder = VideoDecoder { sandbox, timeout: Duration::from_secs(60) };
    let builder = support::builder(FIXTURE, Dtype::F32);
    builder.front_end(|options| options.video_decoder = Some(decoder)).build().unwrap()
}

#[test]
fn a_video_file_is_decoded_in_the_sandbox() {
    require_ffmpeg();
    let engine = with_decoder();
    // 30 frames at 10 a second: two a second are six, in three pairs.
    let num_parts = |body: Value| {
        let answer = block_on(answer(&engine, body));
        let ids = support::ids(&answer["prompt_token_ids"]);
        ids.windows(2).filter(|pair| pair[0] != VIDEO && pair[1] == VIDEO).count()
    };
    assert_eq!(num_parts(about(&file_url())), 3);
    let with = |settings: Value| {
        let mut body = about(&file_url());
        body["media_io_kwargs"] = json!({"video": settings});
        num_parts(body)
    };
    assert_eq!(with(json!({"fps": 4})), 6);
    assert_eq!(with(json!({"num_frames": 2})), 1);
}

/// What the sandbox leaves to a decoder that somebody has taken over.
#[test]
fn the_sandbox_writes_and_starts_nothing() {
    require_ffmpeg();
    let folder = tempfile::tempdir().unwrap();
    let run = |program: &str, args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_spark-engine"));
        command.args(["decode-video", "--cpu-seconds", "20", program]).args(args);
        command.output().unwrap()
    };
    let source = ["-v", "error", "-f", "lavfi", "-i", "testsrc=d=1:s=64x64"];
    let frames = run("ffmpeg", &[&source[..], &["-f", "image2pipe", "-c:v", "ppm", "pipe:1"]].concat());
    assert!(frames.status.success() && frames.stdout.starts_with(b"P6\n64 64\n"), "{frames:?}");
    let file = folder.path().join("out.ppm");
    let wrote = run("ffmpeg", &[&source[..], &["-y", "-frames:v", "1", file.to_str().unwrap()]].concat());
    assert!(!wrote.status.success(), "{wrote:?}");
    assert_eq!(std::fs::metadata(&file).map_or(0, |file| file.len()), 0);
    let other = run("sh", &["-c", "echo started"]);
    assert!(!other.status.success() && other.stdout.is_empty(), "{other:?}");
}

#[test]
fn videos_have_limits_and_say_so() {
    let server = Server::start(MODEL, &["--limit-mm-per-prompt", r#"{"image": 2, "video": 1}"#]);
    let refused = |body: &Value, rule: &str| {
        let response = server.post(CHAT, body);
        let text = String::from_utf8(response.body).unwrap();
        assert!(response.status == 400 && text.contains(rule), "{}: {text}", response.status);
    };
    let frames = frames_url(1);
    assert_eq!(server.post(CHAT, &about(&frames)).status, 200);
    refused(&body(vec![video(&frames), video(&frames)]), "2 videos in one prompt; the limit is 1");
    let many = format!("data:video/jpeg;base64,{}", vec![encoded("clip1_0.jpg"); 769].join(","));
    refused(&about(&many), "769 frames; the limit is 768");
    let mixed = format!("data:video/jpeg;base64,{},{}", encoded("clip0_0.jpg"), encoded("clip1_0.jpg"));
    refused(&about(&mixed), "all must have one size");
    refused(&about("data:video/mp4;base64,AAAA"), "format of the video is not supported");
    refused(&about("https://example.com/clip.mp4"), "only data: URLs");
    refused(&about("data:image/png;base64,AAAA"), "not declared as a video");
    refused(
        &body(vec![json!({"type": "image_url", "image_url": {"url": frames}})]),
        "not declared as an image",
    );
    require_ffmpeg();
    // Cut in half, the frame table is missing.
    let whole = std::fs::read(fixtures_dir().join("video/clip.mp4")).unwrap();
    let half = BASE64_STANDARD.encode(&whole[..whole.len() / 2]);
    refused(&about(&format!("data:video/mp4;base64,{half}")), "damaged");
    assert_eq!(server.post(CHAT, &about(&file_url())).status, 200);
}

/// Files below the named folder, and pictures from a host that may be asked, in every dialect.
#[test]
fn media_come_from_files_and_hosts_that_are_allowed() {
    let host = Host::start();
    let folder = fixtures_dir().join("media");
    let folder_flag = folder.display().to_string();
    let arguments = [
        "--allowed-local-media-path",
        &folder_flag,
        "--fetch-media",
        "--allowed-media-networks",
        "127.0.0.1/32",
    ];
    let server = Server::start(MODEL, &arguments);
    let file = format!("file://{folder_flag}/sky.png");
    let fetched = format!("http://127.0.0.1:{}/sky.png", host.port);
    let plain = image_data_url(&media_path("sky.png")).unwrap();
    let image = |url: &str| body(vec![json!({"type": "image_url", "image_url": {"url": url}})]);
    let answers: Vec<Value> = [&plain, &file, &fetched]
        .iter()
        .map(|url| server.ask(CHAT, &image(url))["choices"][0]["token_ids"].clone())
        .collect();
    assert!(answers.iter().all(|answer| *answer == answers[0]), "{answers:?}");
    let message = json!({"max_tokens": 2, "messages": [{"role": "user", "content": [
        {"type": "image", "source": {"type": "url", "url": fetched}}]}]});
    let response = json!({"max_output_tokens": 2, "input": [{"role": "user", "content": [
        {"type": "input_image", "image_url": fetched}]}]});
    for (path, body) in [("/v1/messages", &message), ("/v1/responses", &response)] {
        let answer = server.post(path, body);
        assert_eq!(answer.status, 200, "{path}: {}", String::from_utf8_lossy(&answer.body));
    }
    for (url, status) in [
        ("file:///etc/passwd".to_owned(), 422),
        (format!("file://{folder_flag}/../video/clip.mp4"), 422),
        (format!("http://127.0.0.2:{}/sky.png", host.port), 422),
        (format!("http://localhost.invalid:{}/", host.port), 422),
        (format!("http://127.0.0.1:{}/none", host.port), 422),
        (format!("http://127.0.0.1:{}/page", host.port), 422),
        (format!("http://127.0.0.1:{}/loop", host.port), 422),
        ("ftp://127.0.0.1/x".to_owned(), 400),
    ] {
        let answer = server.post(CHAT, &image(&url));
        let text = String::from_utf8(answer.body).unwrap();
        assert_eq!(answer.status, status, "{url}: {text}");
        assert!(!text.contains("127.0.0") && !text.contains("passwd"), "{text}");
    }
}

/// A host of one picture.
struct Host {
    port: u16,
}

impl Host {
    fn start() -> Self {
        use std::io::{Read, Write};
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let picture = std::fs::read(media_path("sky.png")).unwrap();
        // Ends with the process, as the server under test does with its test.
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let mut request = [0; 4096];
                let len = stream.read(&mut request).unwrap_or(0);
                let text = String::from_utf8_lossy(&request[..len]).into_owned();
                let head = |status: &str, more: &str| {
                    format!("HTTP/1.1 {status}\r\n{more}Connection: close\r\n\r\n").into_bytes()
                };
                let answer = match text.split(' ').nth(1) {
                    Some("/sky.png") => {
                        [head("200 OK", "Content-Type: image/png\r\n"), picture.clone()].concat()
                    }
                    Some("/page") => head("200 OK", "Content-Type: text/html\r\n"),
                    Some("/loop") => head("302 Found", "Location: /loop\r\n"),
                    _ => head("404 Not Found", ""),
                };
                drop(stream.write_all(&answer));
            }
        });
        Self { port }
    }
}
