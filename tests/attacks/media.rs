//! Groups 17 to 21: pictures, their number, their spelling, their addresses and their identity. The decoder's own tests are in
//! `crates/vision`; here pictures come through the door.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::{Value, json};

use super::{answered, chat, post, refused, survives};
use crate::server::CHAT;

fn part(url: &str) -> Value {
    json!({"type": "image_url", "image_url": {"url": url}})
}

#[expect(clippy::needless_pass_by_value, reason = "every caller has just made it")]
fn body(parts: Vec<Value>) -> Value {
    chat("messages", json!([{"role": "user", "content": parts}]))
}

fn url(mime: &str, bytes: &[u8]) -> String {
    format!("data:{mime};base64,{}", BASE64_STANDARD.encode(bytes))
}

/// A grey PNG; `pixels` is left out where only the header is to claim a size.
fn png(width: u32, height: u32, depth: png::BitDepth, pixels: Option<Vec<u8>>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, width, height);
    encoder.set_color(png::ColorType::Grayscale);
    encoder.set_depth(depth);
    let mut writer = encoder.write_header().unwrap();
    if let Some(pixels) = pixels {
        writer.write_image_data(&pixels).unwrap();
    }
    drop(writer);
    bytes
}

fn small(width: u32, height: u32) -> Vec<u8> {
    png(width, height, png::BitDepth::Eight, Some(vec![128; (width * height) as usize]))
}

/// The address of a grey picture.
pub(super) fn grey(width: u32, height: u32) -> String {
    url("image/png", &small(width, height))
}

/// A JPEG that is only a header of a size.
fn jpeg_header(width: u16, height: u16) -> Vec<u8> {
    let mut bytes = vec![0xff, 0xd8, 0xff, 0xc0, 0, 17, 8];
    bytes.extend(height.to_be_bytes());
    bytes.extend(width.to_be_bytes());
    bytes.extend([3, 1, 0x11, 0, 2, 0x11, 0, 3, 0x11, 0]);
    bytes
}

#[test]
fn group_17_pictures_that_are_too_much_or_none() {
    survives(&[], |server| {
        // 30,000 by 30,000 pixels of one bit are 112 kB in the file and 900 MB as grey levels.
        let bomb = png(30_000, 30_000, png::BitDepth::One, Some(vec![0; 3750 * 30_000]));
        let mut torn = small(64, 64);
        torn.truncate(60);
        for (name, url) in [
            ("a bomb of one bit", url("image/png", &bomb)),
            ("a claim of a JPEG", url("image/jpeg", &jpeg_header(65_500, 65_500))),
            ("no width", url("image/jpeg", &jpeg_header(0, 10))),
            ("a torn file", url("image/png", &torn)),
            (
                "a drawing",
                url("image/svg+xml", b"<svg xmlns='http://www.w3.org/2000/svg'><script>1</script></svg>"),
            ),
            ("TIFF", url("image/tiff", b"II*\0\x08\0\0\0")),
            ("AVIF", url("image/avif", b"\0\0\0\x20ftypavif\0\0\0\0")),
            ("JPEG 2000", url("image/jp2", b"\0\0\0\x0cjP  \r\n\x87\n")),
            ("100,000 in a row", url("image/png", &small(100_000, 1))),
            ("100,000 in a column", url("image/png", &small(1, 100_000))),
            ("201 to 1", url("image/png", &small(2010, 10))),
        ] {
            refused(server, CHAT, name, &body(vec![part(&url)]));
        }
        let polyglot = [small(40, 40), b"<script>alert(1)</script>PK\x03\x04".to_vec()].concat();
        for (name, url) in [
            ("one pixel", url("image/png", &small(1, 1))),
            ("another name", url("image/jpeg", &small(40, 40))),
            ("two files in one", url("image/png", &polyglot)),
        ] {
            let status = post(server, CHAT, name, body(vec![part(&url)]).to_string().as_bytes());
            assert!(matches!(status, 200 | 400), "{name}: {status}");
        }
    });
}

#[test]
fn group_18_more_pictures_than_there_is_room_for() {
    survives(&[], |server| {
        let picture = part(&url("image/png", &small(28, 28)));
        refused(server, CHAT, "1,000 pictures", &body(vec![picture.clone(); 1000]));
        refused(server, CHAT, "100,000 pictures that are none", &body(vec![part("data:,"); 100_000]));
        let frames = format!("data:video/jpeg;base64,{}", vec!["AAAA"; 10_000].join(","));
        let playlist = url("video/mp4", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n");
        let concat =
            url("video/mp4", b"ffconcat version 1.0\nfile 'subfile,,start,0,end,99,,:/etc/passwd'\n");
        // A file of a known kind with a list of others in it, and one whose header claims all there is.
        let track =
            url("video/mp4", b"\0\0\0\x18ftypmp42\0\0\0\0isommp42\xff\xff\xff\xffmoov\xff\xff\xff\xfftrak");
        let endless = url("video/webm", &[b"\x1a\x45\xdf\xa3".as_slice(), &[0xff; 4096]].concat());
        let sound = url("video/ogg", &[b"OggS\0\x02".as_slice(), &[0; 600]].concat());
        for (kind, value) in [
            ("video_url", frames.as_str()),
            ("video_url", "data:video/mp4;base64,AAAA"),
            ("video_url", "data:video/jpeg;base64,"),
            ("video_url", &playlist),
            ("video_url", &concat),
            ("video_url", &track),
            ("video_url", &endless),
            ("video_url", &sound),
            ("audio_url", "data:audio/wav;base64,AAAA"),
        ] {
            refused(server, CHAT, kind, &body(vec![json!({"type": kind, kind: {"url": value}})]));
        }
    });
}

#[test]
fn group_19_base64_that_is_none() {
    survives(&[], |server| {
        let right = BASE64_STANDARD.encode(small(28, 28));
        for (name, url) in [
            ("another alphabet", format!("data:image/png;base64,{}", "@#$%".repeat(1000))),
            ("white space", format!("data:image/png;base64,{}", right.replace('A', "A \n"))),
            ("no padding", format!("data:image/png;base64,{}A", right.trim_end_matches('='))),
            ("no comma", "data:image/png;base64".to_owned()),
            ("nothing", "data:image/png;base64,".to_owned()),
            ("a word", "data".to_owned()),
            ("20 MB of one letter", format!("data:image/png;base64,{}", "A".repeat(20 << 20))),
        ] {
            refused(server, CHAT, name, &body(vec![part(&url)]));
        }
    });
}

#[test]
fn group_20_addresses_are_not_fetched() {
    // Nobody may be called: a listener that counts would be called at the first of these.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let port = listener.local_addr().unwrap().port();
    survives(&[], |server| {
        for host in [
            "127.0.0.1",
            "localhost",
            "0x7f000001",
            "2130706433",
            "0177.0.0.1",
            "127.1",
            "[::1]",
            "[::ffff:127.0.0.1]",
            "[64:ff9b::7f00:1]",
            "a@127.0.0.1",
            "127.0.0.1\\@example.com",
            "169.254.169.254",
            "0.0.0.0",
        ] {
            for scheme in ["http", "HTTP", "https", "ftp", "gopher"] {
                refused(server, CHAT, host, &body(vec![part(&format!("{scheme}://{host}:{port}/x.png"))]));
            }
        }
        for url in [
            "file:///etc/passwd",
            "FILE:/etc/passwd",
            "/etc/passwd",
            "//127.0.0.1/x",
            "blob:x",
            "data:text/html,<p>",
            "\u{0}http://127.0.0.1",
        ] {
            refused(server, CHAT, url, &body(vec![part(url)]));
        }
    });
    assert!(listener.accept().is_err(), "the server has called somebody");
}

/// With fetching on: inside stays closed, and a host that may be asked gets nothing more than its time.
#[test]
fn group_20_what_may_be_fetched_leads_nowhere_else() {
    // One host may be asked; another address of this machine, on the same port, may not.
    let open = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = open.local_addr().unwrap().port();
    let closed = TcpListener::bind(("127.0.0.2", port)).unwrap();
    closed.set_nonblocking(true).unwrap();
    std::thread::spawn(move || open.incoming().flatten().for_each(|stream| misbehave(stream, port)));
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("x.png"), small(28, 28)).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", folder.path().join("link.png")).unwrap();
    let local = folder.path().display().to_string();
    let arguments =
        ["--fetch-media", "--allowed-media-networks", "127.0.0.1", "--media-fetch-timeout", "0.5"];
    survives(
        &[&arguments[..], &["--max-media-file-size", "1", "--allowed-local-media-path", &local]].concat(),
        |server| {
            for path in [
                "inside", "loop", "slow", "silent", "endless", "claim", "gzip", "html", "nothing", "torn",
                "file",
            ] {
                refused(server, CHAT, path, &body(vec![part(&format!("http://127.0.0.1:{port}/{path}"))]));
            }
            for host in [
                "127.0.0.2",
                "0x7f.2",
                "2130706434",
                "0177.0.0.2",
                "[::ffff:127.0.0.2]",
                "[::1]",
                "localhost",
            ] {
                refused(server, CHAT, host, &body(vec![part(&format!("http://{host}:{port}/x.png"))]));
            }
            for path in ["link.png", "../x", "", "%2e%2e/x", "absent"] {
                refused(server, CHAT, path, &body(vec![part(&format!("file://{local}/{path}"))]));
            }
            let many = vec![part(&format!("http://127.0.0.1:{port}/silent")); 60];
            refused(server, CHAT, "60 at once", &body(many));
            answered(server, CHAT, "a picture", &body(vec![part(&format!("file://{local}/x.png"))]));
        },
    );
    assert!(closed.accept().is_err(), "the server has called somebody");
}

/// Answers one request as its path says, and ends.
fn misbehave(mut stream: TcpStream, port: u16) {
    std::thread::spawn(move || {
        let mut request = [0; 4096];
        let len = stream.read(&mut request).unwrap_or(0);
        let text = String::from_utf8_lossy(&request[..len]).into_owned();
        let path = text.split(' ').nth(1).unwrap_or_default();
        let head = |more: &str| format!("HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n{more}\r\n");
        let to = |url: String| format!("HTTP/1.1 302 Found\r\nLocation: {url}\r\n\r\n");
        let answer = match path {
            "/inside" => to(format!("http://127.0.0.2:{port}/x.png")),
            "/file" => to("file:///etc/passwd".into()),
            "/loop" => to("/loop".into()),
            "/claim" => head("Content-Length: 99999999999\r\n"),
            "/gzip" => head("Content-Encoding: gzip\r\n"),
            "/html" => "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<p>".into(),
            "/nothing" => head("Content-Length: 0\r\n"),
            "/torn" => head("Content-Length: 1000\r\n") + "x",
            "/silent" => String::new(),
            _ => head(""),
        };
        let mut is_open = stream.write_all(answer.as_bytes()).is_ok();
        // Until the client has had enough, which shows at the next byte.
        while is_open && matches!(path, "/endless" | "/slow") {
            let piece: &[u8] = if path == "/slow" { b"x" } else { &[0; 1 << 16] };
            is_open = stream.write_all(piece).is_ok();
            if path == "/slow" {
                is_open &= matches!(stream.read(&mut request), Ok(len) if len > 0);
            }
        }
        if path == "/silent" {
            drop(stream.read(&mut request));
        }
    });
}

/// The same bytes with other settings, and other bytes with the same look, are other pictures.
#[test]
fn group_21_pictures_are_told_apart() {
    survives(&[], |server| {
        let of = |level: u8, width: u32| {
            let pixels = vec![level; (width * 64) as usize];
            part(&url("image/png", &png(width, 64, png::BitDepth::Eight, Some(pixels))))
        };
        let (dark, light, wide) = (of(0, 64), of(255, 64), of(0, 128));
        let ask = |parts: Vec<Value>| {
            let mut body = body(parts);
            (body["max_tokens"], body["temperature"], body["logprobs"]) = (json!(4), json!(0), json!(true));
            body["top_logprobs"] = json!(3);
            server.ask(CHAT, &body)["choices"][0]["logprobs"].clone()
        };
        let first = ask(vec![dark.clone(), light.clone()]);
        let swapped = ask(vec![light.clone(), dark.clone()]);
        assert_ne!(first, swapped, "two pictures in the other order are another prompt");
        assert_eq!(first, ask(vec![dark.clone(), light.clone()]), "from the caches the answer is the same");
        assert_ne!(ask(vec![dark]), ask(vec![wide]), "another width is another picture");
        assert_ne!(ask(vec![light]), swapped);
    });
}
