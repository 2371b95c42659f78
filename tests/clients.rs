//! The clients that people use, from PyPI and npm, each in a script of its own beside a server of the demo model.
//!
//! The scripts are in `tests/python/` and `tests/node/`; what is compared is what they assert. Their packages are
//! installed once into folders under the target folder, by the content of the files that pin them.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use spark_testing::media_path;

use crate::support::server::Server;

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// A folder that lives as long as the target folder.
fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(name)
}

fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let shown = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
    assert!(output.status.success(), "{command:?} failed:\n{}{}", shown[0], shown[1]);
    output
}

/// Makes a folder with what `pinned` names, unless that was done before.
fn install(folder: &Path, pinned: &str, make: impl FnOnce()) {
    let stamp = folder.join("installed.txt");
    if std::fs::read_to_string(&stamp).is_ok_and(|installed| installed == pinned) {
        return;
    }
    make();
    std::fs::write(stamp, pinned).unwrap();
}

/// The Python of a venv with the packages of a file in `tests/python/`. One test a file: nothing guards the folder.
fn python(requirements: &str) -> PathBuf {
    let file = repository("tests/python").join(requirements);
    let pinned = std::fs::read_to_string(&file).unwrap();
    let folder = folder(requirements);
    let python = folder.join("bin/python");
    install(&folder, &pinned, || {
        run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&folder));
        run(Command::new(&python).args(["-m", "pip", "install", "--quiet", "-r"]).arg(&file));
    });
    python
}

fn demo() -> Server {
    Server::serve(None, &["--threads", "2", "--kv-cache-memory-bytes", "67108864"])
}

/// Runs scripts one after the other; each says at its end that it got there.
fn drive(program: &Path, scripts: &Path, names: &[&str], server: &Server) {
    for name in names {
        let mut command = Command::new(program);
        let output = run(command.arg(scripts.join(name)).arg(server.url()).arg(media_path("demo.png")));
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(text.contains("all checks passed"), "{name}: {text}");
    }
}

fn test_python() -> PathBuf {
    let python = std::env::var_os("SPARK_TEST_PYTHON").expect(
        "SPARK_TEST_PYTHON names a Python with tests/python/requirements.txt; `cargo xtask ci` sets it",
    );
    PathBuf::from(python)
}

#[test]
fn clients_of_the_other_dialects_work() {
    // `server.rs` has that of chat completions.
    let names = ["responses_client.py", "anthropic_client.py", "pydantic_ai_client.py"];
    drive(&test_python(), &repository("tests/python"), &names, &demo());
}

#[test]
fn clients_on_an_older_openai_work() {
    let names = ["langchain_client.py", "litellm_client.py"];
    drive(&python("requirements-openai2.txt"), &repository("tests/python"), &names, &demo());
}

#[test]
fn clients_for_node_work() {
    let (folder, source) = (folder("node-clients"), repository("tests/node"));
    let pinned = std::fs::read_to_string(source.join("package-lock.json")).unwrap();
    std::fs::create_dir_all(&folder).unwrap();
    // A script finds its packages beside itself.
    for entry in std::fs::read_dir(&source).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, folder.join(path.file_name().unwrap())).unwrap();
    }
    install(&folder, &pinned, || {
        run(Command::new("npm").args(["ci", "--no-audit", "--no-fund"]).current_dir(&folder));
    });
    drive(Path::new("node"), &folder, &["openai_client.mjs", "vercel_ai.mjs"], &demo());
}

/// Bodies made from the OpenAPI document, good and bad: no answer is a 5xx, and every one has the documented shape.
#[test]
fn answers_to_made_up_requests_are_as_documented() {
    let server = Server::start("moe_vl_bf16", &["--max-model-len", "256"]);
    let tool = test_python().with_file_name("schemathesis");
    let checks =
        "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance";
    let document = format!("{}/openapi.json", server.url());
    let arguments = [
        "run",
        &document,
        "--checks",
        checks,
        "--phases",
        "examples,coverage,fuzzing",
        "--max-examples",
        "20",
        "--seed",
        "1",
        "--generation-database",
        "none",
        "--request-timeout",
        "60",
        "--no-color",
    ];
    let mut command = Command::new(tool);
    command.env("SCHEMATHESIS_HOOKS", "schemathesis_hooks").env("PYTHONPATH", repository("tests/python"));
    // Not where it could leave files behind.
    run(command.args(arguments).current_dir(folder("")));
    assert_eq!(server.get("/health").status, 200);
}
