//! `pull` against a hub on the loopback interface: whole, interrupted, damaged and hostile downloads.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::files::{f32s, file};
use super::hub::{COMMIT, Files, MODEL, Reply, Seen, Stub, git_hash, name_of, sha256};
use crate::{Checkpoint, Error, OpenOptions, PullOptions, Pulled, Result, pull};

const SHARD_1: &str = "model-00001-of-00002.safetensors";
const SHARD_2: &str = "model-00002-of-00002.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// A model of two shards and everything around it that a repository may have.
fn model() -> Files {
    let values: Vec<f32> = (0..100_000).map(|value| value as f32).collect();
    let index = json!({ "metadata": {}, "weight_map": { "a.weight": SHARD_1, "b.weight": SHARD_2 } });
    Files(vec![
        (".gitattributes", b"x".to_vec(), false),
        ("README.md", b"# A model".to_vec(), false),
        ("config.json", br#"{"model_type": "test"}"#.to_vec(), false),
        ("generation_config.json", b"{}".to_vec(), false),
        ("tokenizer.json", br#"{"version": "1.0"}"#.to_vec(), true),
        ("chat_template.jinja", "{{ 'é' }}".as_bytes().to_vec(), false),
        (INDEX, index.to_string().into_bytes(), false),
        (SHARD_1, file(&[f32s("a.weight", &[100_000], &values)]), true),
        (SHARD_2, file(&[f32s("b.weight", &[2], &[1.0, 2.0])]), true),
        ("consolidated.safetensors", b"another form of the same".to_vec(), true),
        ("pytorch_model.bin", b"pickled".to_vec(), true),
        ("modeling.py", b"import os".to_vec(), false),
        ("onnx/model.onnx", b"graph".to_vec(), true),
    ])
}

fn options(stub: &Stub, cache: &TempDir) -> PullOptions {
    PullOptions {
        endpoint: stub.endpoint.clone(),
        cache_dir: Some(cache.path().to_owned()),
        retries: 0,
        ..PullOptions::default()
    }
}

fn run(stub: &Stub, cache: &TempDir) -> Result<Pulled> {
    pull(MODEL, &options(stub, cache))
}

fn open(cache: &TempDir) -> Result<Checkpoint> {
    let options = OpenOptions { cache_dir: Some(cache.path().to_owned()), ..OpenOptions::default() };
    Checkpoint::open(MODEL, &options)
}

/// The requests for files, by name.
fn names(stub: &Stub) -> Vec<String> {
    stub.seen().iter().map(|seen| name_of(seen).to_owned()).filter(|name| !name.is_empty()).collect()
}

/// Every file below `folder`, by its path from there.
fn tree(folder: &Path) -> Vec<PathBuf> {
    let (mut found, mut folders) = (Vec::new(), vec![folder.to_owned()]);
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.symlink_metadata().unwrap().is_dir() {
                folders.push(path);
            } else {
                found.push(path.strip_prefix(folder).unwrap().to_owned());
            }
        }
    }
    found.sort();
    found
}

fn blobs(cache: &TempDir) -> Vec<String> {
    let folder = cache.path().join("models--owner--name/blobs");
    tree(&folder).iter().map(|path| path.to_str().unwrap().to_owned()).collect()
}

#[test]
fn brings_what_is_needed_once() {
    let files = model();
    let stub = Stub::new({
        let files = files.clone();
        move |seen| files.answer(seen)
    });
    let cache = tempfile::tempdir().unwrap();
    let pulled = run(&stub, &cache).unwrap();

    let mut wanted = vec![
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        SHARD_1,
        SHARD_2,
        INDEX,
        "tokenizer.json",
    ];
    wanted.sort_unstable();
    let mut asked = names(&stub);
    asked.sort_unstable();
    assert_eq!(asked, wanted);
    assert_eq!(tree(&pulled.dir), wanted.iter().map(PathBuf::from).collect::<Vec<_>>());
    let bytes: usize = wanted.iter().map(|name| files.get(name).unwrap().len()).sum();
    assert_eq!(
        (pulled.files, pulled.bytes, pulled.bytes_downloaded),
        (wanted.len(), bytes as u64, bytes as u64)
    );
    for name in wanted {
        let path = pulled.dir.join(name);
        assert!(path.symlink_metadata().unwrap().is_symlink(), "{name}");
        assert_eq!(std::fs::read(&path).unwrap(), files.get(name).unwrap(), "{name}");
    }
    // Names of blobs as the Python tools give them.
    assert!(blobs(&cache).contains(&sha256(files.get(SHARD_1).unwrap())));
    assert!(blobs(&cache).contains(&git_hash(files.get("config.json").unwrap())));

    let checkpoint = open(&cache).unwrap();
    assert_eq!(checkpoint.dir(), pulled.dir);
    assert_eq!(checkpoint.tensors().count(), 2);

    let before = stub.seen().len();
    let again = run(&stub, &cache).unwrap();
    assert_eq!((again.bytes_downloaded, again.files), (0, pulled.files));
    assert_eq!(stub.seen().len(), before + 1, "one question for the model, none for its files");
}

#[test]
fn git_hash_is_that_of_git() {
    // `printf hello | git hash-object --stdin`
    assert_eq!(git_hash(b"hello"), "b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0");
}

#[test]
fn continues_a_connection_that_breaks() {
    let files = model();
    let size = files.get(SHARD_1).unwrap().len();
    let asked = AtomicUsize::new(0);
    let stub = Stub::new(move |seen| {
        let reply = files.answer(seen);
        if name_of(seen) == SHARD_1 && asked.fetch_add(1, Ordering::SeqCst) < 3 {
            let half = reply.body.len() / 2;
            return reply.cut(half);
        }
        reply
    });
    let cache = tempfile::tempdir().unwrap();
    let reported = std::sync::Arc::new(Mutex::new(Vec::new()));
    let progress = std::sync::Arc::clone(&reported);
    let options = PullOptions {
        progress: Some(std::sync::Arc::new(move |now| progress.lock().unwrap().push(now))),
        ..options(&stub, &cache)
    };
    let pulled = pull(MODEL, &options).unwrap();
    let ranges: Vec<_> =
        stub.seen().iter().filter(|seen| name_of(seen) == SHARD_1).map(|seen| seen.from).collect();
    let half = size / 2;
    let three_quarters = half + (size - half) / 2;
    let last = three_quarters + (size - three_quarters) / 2;
    assert_eq!(ranges, [None, Some(half), Some(three_quarters), Some(last)]);
    assert_eq!(pulled.bytes_downloaded, pulled.bytes, "no byte came twice");
    let reported = reported.lock().unwrap();
    assert_eq!(reported.iter().map(|now| now.bytes_done).max(), Some(pulled.bytes));
    assert_eq!(reported.last().map(|now| now.bytes_total), Some(pulled.bytes));
    open(&cache).unwrap();
}

#[test]
fn a_later_pull_continues() {
    let files = model();
    let shard = files.get(SHARD_1).unwrap().to_vec();
    let broken = Stub::new({
        let files = files.clone();
        move |seen| match name_of(seen) {
            SHARD_1 if seen.from.is_none() => files.answer(seen).cut(150_000),
            SHARD_1 => Reply::status(503),
            _ => files.answer(seen),
        }
    });
    let cache = tempfile::tempdir().unwrap();
    let error = run(&broken, &cache).unwrap_err();
    let Error::Interrupted { file, got, size, .. } = &error else { panic!("{error}") };
    assert_eq!((file.as_str(), *got, *size), (SHARD_1, 150_000, shard.len() as u64));
    assert!(error.to_string().contains("503"), "{error}");
    assert!(matches!(open(&cache), Err(Error::NotFound { .. })), "half a model is no model");

    let stub = Stub::new(move |seen| files.answer(seen));
    let pulled = run(&stub, &cache).unwrap();
    let request = stub.seen().into_iter().find(|seen| name_of(seen) == SHARD_1).unwrap();
    assert_eq!(request.from, Some(150_000));
    assert!(pulled.bytes_downloaded <= pulled.bytes - 150_000);
    assert_eq!(std::fs::read(pulled.dir.join(SHARD_1)).unwrap(), shard);
    assert!(!blobs(&cache).iter().any(|name| name.ends_with(".incomplete")));
}

#[test]
fn starts_over_where_the_server_cannot_continue() {
    for status in [200, 416] {
        let files = model();
        let asked = AtomicUsize::new(0);
        let stub = Stub::new(move |seen| {
            if name_of(seen) != SHARD_1 {
                return files.answer(seen);
            }
            let reply = Reply::ok(files.get(SHARD_1).unwrap());
            match asked.fetch_add(1, Ordering::SeqCst) {
                0 => reply.cut(1000),
                1 if status == 416 => Reply::status(416),
                _ => reply,
            }
        });
        let cache = tempfile::tempdir().unwrap();
        let pulled = run(&stub, &cache).unwrap();
        assert_eq!(pulled.bytes_downloaded, pulled.bytes + 1000, "{status}");
        open(&cache).unwrap();
    }
}

#[test]
fn damaged_files_are_refused_and_removed() {
    for (damaged, kind) in [(SHARD_1, "sha256"), ("config.json", "git hash")] {
        let files = model();
        let mut bytes = files.get(damaged).unwrap().to_vec();
        *bytes.last_mut().unwrap() ^= 1;
        let (right, wrong) = if kind == "sha256" {
            (sha256(files.get(damaged).unwrap()), sha256(&bytes))
        } else {
            (git_hash(files.get(damaged).unwrap()), git_hash(&bytes))
        };
        let stub = Stub::new(move |seen| match name_of(seen) {
            name if name == damaged => Reply::range(&bytes, seen),
            _ => files.answer(seen),
        });
        let cache = tempfile::tempdir().unwrap();
        let text = run(&stub, &cache).unwrap_err().to_string();
        for part in [damaged, kind, &right, &wrong] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(!blobs(&cache).iter().any(|name| name.starts_with(&right)), "{damaged} is in the cache");
        assert!(open(&cache).is_err());
    }
}

#[test]
fn a_damaged_beginning_is_found() {
    let files = model();
    let cache = tempfile::tempdir().unwrap();
    let digest = sha256(files.get(SHARD_1).unwrap());
    let part = cache.path().join(format!("models--owner--name/blobs/{digest}.incomplete"));
    std::fs::create_dir_all(part.parent().unwrap()).unwrap();
    std::fs::write(&part, vec![7; 5000]).unwrap();
    let stub = Stub::new(move |seen| files.answer(seen));
    assert!(matches!(run(&stub, &cache), Err(Error::Digest { .. })));
    assert!(!part.exists());
    // A longer one than the file cannot even be its beginning.
    std::fs::write(&part, vec![7; 1 << 20]).unwrap();
    run(&stub, &cache).unwrap();
    open(&cache).unwrap();
}

#[test]
fn the_token_stays_with_the_hub() {
    let files = model();
    let cdn = Stub::new({
        let files = files.clone();
        move |seen| Reply::range(files.get(seen.path.trim_start_matches('/')).unwrap(), seen)
    });
    let target = cdn.endpoint.clone();
    let stub = Stub::new(move |seen| match name_of(seen) {
        "" => files.answer(seen),
        // One file is first redirected within the hub.
        "config.json" if !seen.path.ends_with("?here") => {
            Reply::status(307).with("Location", &format!("/{MODEL}/resolve/{COMMIT}/config.json?here"))
        }
        name => Reply::status(302).with("Location", &format!("{target}/{}", name.trim_end_matches("?here"))),
    });
    let cache = tempfile::tempdir().unwrap();
    let options = PullOptions { token: Some("hf_secret".to_owned()), ..options(&stub, &cache) };
    let pulled = pull(MODEL, &options).unwrap();
    assert_eq!(pulled.bytes_downloaded, pulled.bytes);
    let hub = stub.seen();
    assert!(hub.iter().any(|seen| seen.path.ends_with("?here")));
    assert!(hub.iter().all(|seen| seen.authorization.as_deref() == Some("Bearer hf_secret")), "{hub:?}");
    let cdn = cdn.seen();
    assert_eq!(cdn.len(), pulled.files);
    assert!(cdn.iter().all(|seen| seen.authorization.is_none()), "{cdn:?}");
    assert!(!format!("{options:?}").contains("hf_secret"));
}

#[test]
fn redirects_end() {
    let stub = Stub::new(|seen: &Seen| Reply::status(302).with("Location", &seen.path));
    let cache = tempfile::tempdir().unwrap();
    let text = run(&stub, &cache).unwrap_err().to_string();
    assert!(text.contains("redirects"), "{text}");
    assert!(stub.seen().len() < 20);
}

/// The error of a hub that describes the model by `change`d words, and what then is in the cache's parent folder.
fn lie(change: impl Fn(&mut Value)) -> String {
    let files = model();
    let mut info = files.info();
    change(&mut info);
    let stub = Stub::new(move |seen| match name_of(seen) {
        "" => Reply::ok(info.to_string().as_bytes()),
        _ => files.answer(seen),
    });
    let outer = tempfile::tempdir().unwrap();
    let cache = tempfile::tempdir_in(outer.path()).unwrap();
    let error = run(&stub, &cache).unwrap_err();
    assert_eq!(names(&stub), [""; 0], "a lie is found before a file is asked for");
    for path in tree(outer.path()) {
        assert!(outer.path().join(path).starts_with(cache.path()));
    }
    error.to_string()
}

#[test]
fn nothing_leaves_the_model_folder() {
    for name in ["../evil.json", "/etc/evil", "a/../../evil", "", "a\\..\\evil", "a\0b", "a\nb", "."] {
        let text = lie(|info| info["siblings"][2]["rfilename"] = name.into());
        assert!(text.contains("refused"), "{name:?}: {text}");
    }
    for digest in ["../../../evil", "", &"A".repeat(40), &"a".repeat(41)] {
        let text = lie(|info| info["siblings"][2]["blobId"] = (*digest).into());
        assert!(text.contains("hexadecimal"), "{digest:?}: {text}");
        let text = lie(|info| info["siblings"][7]["lfs"]["sha256"] = (*digest).into());
        assert!(text.contains("hexadecimal"), "{digest:?}: {text}");
        let text = lie(|info| info["sha"] = format!("{digest}/").into());
        assert!(text.contains("commit"), "{digest:?}: {text}");
    }
}

#[test]
fn an_index_stays_inside() {
    for (shard, reason) in [
        ("../x.safetensors", "inside"),
        ("x.bin", "safetensors file"),
        ("x.safetensors", "not in the repository"),
    ] {
        let mut files = model();
        let at = files.0.iter().position(|file| file.0 == INDEX).unwrap();
        files.0[at].1 = json!({ "weight_map": { "a.weight": shard } }).to_string().into_bytes();
        let stub = Stub::new(move |seen| files.answer(seen));
        let cache = tempfile::tempdir().unwrap();
        let text = run(&stub, &cache).unwrap_err().to_string();
        assert!(text.contains(shard) && text.contains(reason), "{text}");
    }
}

#[test]
fn lies_about_sizes_are_found() {
    let text = lie(|info| info["siblings"][2]["size"] = u64::MAX.into());
    assert!(text.contains("64 bits"), "{text}");
    let text = lie(|info| info["siblings"][4]["lfs"]["size"] = (1_u64 << 62).into());
    assert!(text.contains("are free"), "{text}");
    let text = lie(|info| info["siblings"][2]["size"] = (-1).into());
    assert!(text.contains("cannot be read"), "{text}");
    let text = lie(|info| info["siblings"][2]["size"] = Value::Null);
    assert!(text.contains("missing"), "{text}");

    // A body that is shorter than announced, and not because the connection broke.
    let files = model();
    let mut info = files.info();
    info["siblings"][7]["lfs"]["size"] = (files.get(SHARD_1).unwrap().len() + 1).into();
    let stub = Stub::new(move |seen| match (name_of(seen), seen.from) {
        ("", _) => Reply::ok(info.to_string().as_bytes()),
        (SHARD_1, Some(from)) => Reply {
            status: 206,
            ..Reply::ok(b"").with("Content-Range", &format!("bytes {from}-{from}/{}", from + 1))
        },
        _ => files.answer(seen),
    });
    let cache = tempfile::tempdir().unwrap();
    let error = run(&stub, &cache).unwrap_err();
    assert!(matches!(&error, Error::Interrupted { file, .. } if file == SHARD_1), "{error}");
}

#[test]
fn refusals_say_what_to_do() {
    let error = |reply: Reply, token: Option<&str>| {
        let stub = Stub::new(move |_| reply.clone());
        let cache = tempfile::tempdir().unwrap();
        let options = PullOptions { token: token.map(str::to_owned), ..options(&stub, &cache) };
        pull(MODEL, &options).unwrap_err().to_string()
    };
    let gated = Reply::status(403).with("X-Error-Code", "GatedRepo").with("X-Error-Message", "Ask first.");
    let text = error(gated.clone(), None);
    assert!(text.contains("gated") && text.contains("set HF_TOKEN") && text.contains("Ask first."), "{text}");
    assert!(error(gated, Some("x")).contains("account of HF_TOKEN"));
    assert!(error(Reply::status(401), None).contains("set HF_TOKEN"));
    assert!(error(Reply::status(404), None).contains("no such model"));
    let text = error(Reply::status(404).with("X-Error-Code", "RevisionNotFound"), None);
    assert!(text.contains("no such revision"), "{text}");
    assert!(error(Reply::ok(b"<html>"), None).contains("cannot be read"));
    assert!(error(Reply::ok(b"{}").cut(1), None).contains("no answer"));
    // A gated model describes itself to everyone, but keeps its files.
    let files = model();
    let stub = Stub::new(move |seen| match name_of(seen) {
        "" => files.answer(seen),
        _ => Reply::status(401).with("X-Error-Code", "GatedRepo"),
    });
    let text = run(&stub, &tempfile::tempdir().unwrap()).unwrap_err().to_string();
    assert!(text.contains("gated") && text.contains("resolve"), "{text}");
}

#[test]
fn what_is_no_checkpoint_is_not_downloaded() {
    for (without, reason) in [("config.json", "config.json"), (INDEX, "only safetensors")] {
        let mut files = model();
        files.0.retain(|file| file.0 != without);
        let stub = Stub::new(move |seen| files.answer(seen));
        let text = run(&stub, &tempfile::tempdir().unwrap()).unwrap_err().to_string();
        assert!(text.contains(reason), "{text}");
        assert!(!names(&stub).iter().any(|name| name.ends_with(".safetensors")));
    }
    let stub = Stub::new(|_| Reply::status(500));
    for model in ["../x", "a/b/c", ""] {
        let options = options(&stub, &tempfile::tempdir().unwrap());
        assert!(matches!(pull(model, &options), Err(Error::BadModelId { .. })), "{model}");
    }
    assert!(stub.seen().is_empty());
}

#[test]
fn one_process_downloads_a_file() {
    let files = model();
    let digest = sha256(files.get(SHARD_1).unwrap());
    let cache = tempfile::tempdir().unwrap();
    let locks = cache.path().join(".locks/models--owner--name");
    std::fs::create_dir_all(&locks).unwrap();
    let lock = std::fs::File::create(locks.join(format!("{digest}.lock"))).unwrap();
    lock.lock().unwrap();
    let stub = Stub::new(move |seen| files.answer(seen));
    let text = run(&stub, &cache).unwrap_err().to_string();
    assert!(text.contains("another process"), "{text}");
    drop(lock);
    run(&stub, &cache).unwrap();
}
