#!/usr/bin/env python3
"""Runs the test suites of vLLM and llama.cpp, and three load clients, against spark-engine.

`cargo xtask conformance` starts it. Everything is fetched from PyPI into --work; nothing of it is committed. What a suite
says of each test is in RESULTS.json there, and docs/results/conformance.md is written from all of them.
"""

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
import urllib.request
import zipfile
from pathlib import Path

import page

HERE = Path(__file__).resolve().parent
VLLM = "0.33.0"
LLAMA = "0.3.36"
# The demo model in the cache of the hub, for tools that take no folder.
LOCAL = "spark/tiny-vl"
# Longest time that one test may take; vLLM's wait for servers of minutes.
TEST_SECONDS = 120


def say(*words):
    print("conformance:", *words, flush=True)


class Suites:
    def __init__(self, options):
        self.options = options
        self.work = options.work.resolve()
        self.work.mkdir(parents=True, exist_ok=True)
        self.downloads = self.work / "downloads"

    def venv(self, name, requirements):
        """A venv with the packages of a file, made again when the file changes."""
        folder = self.work / name
        stamp = folder / "installed.txt"
        wanted = requirements.read_text()
        python = folder / "bin/python"
        if stamp.exists() and stamp.read_text() == wanted:
            return python
        say("installing", requirements.name)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        if self.options.torch and "\ntorch\n" in wanted:
            site = next((folder / "lib").glob("python*/site-packages"))
            (site / "lent.pth").write_text(f"{self.options.torch}\n")
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", requirements], check=True)
        stamp.write_text(wanted)
        return python

    def download(self, python, kind, package):
        """A file from PyPI: the wheel of a package, or its source."""
        name, version = package.split("==")
        stem = name.replace("-", "_")
        end = "*.whl" if kind == "wheel" else "*.tar.gz"
        found = list(self.downloads.glob(f"{stem}-{version}{end}"))
        if not found:
            say("fetching", package, kind)
            self.downloads.mkdir(exist_ok=True)
            words = ["--only-binary", ":all:"] if kind == "wheel" else ["--no-binary", name]
            if name == "vllm" and kind == "source":
                # Its build asks for torch before it says its name.
                words.append("--no-build-isolation")
            env = {**os.environ, "VLLM_TARGET_DEVICE": "empty", "VLLM_VERSION_OVERRIDE": version}
            env["PATH"] = f"{python.parent}:{env['PATH']}"
            command = [python, "-m", "pip", "download", "--quiet", "--no-deps", *words, package]
            subprocess.run(command, check=True, cwd=self.downloads, env=env)
            found = list(self.downloads.glob(f"{stem}-{version}{end}"))
        return found[0]

    def unpack_vllm(self, python):
        """The tests, and the Python files of the package that they import; nothing that computes."""
        tests, package = self.work / "vllm", self.work / "vllm-package"
        if not (tests / "tests").exists():
            with tarfile.open(self.download(python, "source", f"vllm=={VLLM}")) as archive:
                members = [entry for entry in archive if entry.name.startswith(f"vllm-{VLLM}/tests/")]
                for entry in members:
                    entry.name = entry.name.split("/", 1)[1]
                archive.extractall(tests, members, filter="data")
        if not package.exists():
            with zipfile.ZipFile(self.download(python, "wheel", f"vllm=={VLLM}")) as archive:
                kept = [name for name in archive.namelist() if not name.endswith((".so", ".hpp", ".h", ".cuh"))]
                archive.extractall(package, kept)
            # The package then takes this machine for one of its CPU platform, and asks for no GPU.
            meta = package / f"vllm-{VLLM}.dist-info/METADATA"
            meta.write_text(meta.read_text().replace(f"\nVersion: {VLLM}\n", f"\nVersion: {VLLM}+cpu\n", 1))
        (package / "vllm/vllm-rs").chmod(0o755)
        return tests, package

    def hub(self, tests):
        """A cache of the hub in which every model that a test names is the demo model."""
        names = set()
        for file in [*tests.glob("tests/entrypoints/**/*.py"), *tests.glob("tests/tool_use/**/*.py")]:
            names |= set(re.findall(r"""["']([\w-]+/[\w.-]+)["']""", file.read_text()))
        revision = "0" * 40
        for name in {*names, LOCAL}:
            folder = self.work / "hub/hub" / f"models--{name.replace('/', '--')}"
            snapshot = folder / "snapshots" / revision
            snapshot.mkdir(parents=True, exist_ok=True)
            (folder / "refs").mkdir(exist_ok=True)
            (folder / "refs/main").write_text(revision)
            for file in self.options.model.resolve().iterdir():
                link = snapshot / file.name
                if not link.exists():
                    # It may be there and lead to a checkout that is gone.
                    link.unlink(missing_ok=True)
                    link.symlink_to(file)
        return self.work / "hub"

    def pytest(self, suite, python, cwd, env, arguments):
        """Runs tests and keeps what became of each."""
        report = self.work / f"{suite}.jsonl"
        report.unlink(missing_ok=True)
        env = {
            **os.environ,
            **env,
            "PYTHONPATH": f"{env.get('PYTHONPATH', '')}:{HERE}",
            "SPARK_REPORT": str(report),
            "SPARK_SHIM_LOG": str(self.work / f"{suite}-flags.jsonl"),
            "SPARK_SHIM_MODEL": str(self.options.model.resolve()),
            "SPARK_SHIM_PROGRAM": str(self.options.program.resolve()),
            "OMP_NUM_THREADS": "1",
        }
        # Tracebacks as Python writes them: to show source, pytest parses whole files, which has failed within a test's recursion.
        command = [python, "-m", "pytest", "-q", "--tb=native", "-p", "no:cacheprovider", *arguments]
        log = self.work / f"{suite}.log"
        with open(log, "w") as file:
            ended = subprocess.run(command, cwd=cwd, env=env, stdout=file, stderr=subprocess.STDOUT, check=False)
        # 0: all passed; 1: some failed. Anything else is no whole run.
        if ended.returncode not in (0, 1):
            raise SystemExit(f"pytest ended with status {ended.returncode} before the end of {suite}: see {log}")
        return page.outcomes(report)

    def vllm(self):
        python = self.venv("venv-vllm", HERE / "requirements-vllm.txt")
        tests, package = self.unpack_vllm(python)
        shims = self.work / "bin"
        shims.mkdir(exist_ok=True)
        (shims / "vllm").unlink(missing_ok=True)
        (shims / "vllm").symlink_to(HERE / "vllm_shim.py")
        env = {
            "HF_HOME": str(self.hub(tests)),
            "HF_HUB_OFFLINE": "1",
            "PATH": f"{shims}:{python.parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(package),
            "VLLM_ASSETS_CACHE": str(self.work / "stand-ins"),
            "VLLM_NO_USAGE_STATS": "1",
        }
        files = self.options.only or page.listed("vllm-files.txt")
        # The same tests once more with features of theirs that are not offered; two that start a module of vLLM's own.
        left_out = ("watermarked", "zephyr-lora", "test_metrics_exist_run_batch", "test_shutdown_on_engine_failure")
        chosen = ["-k", " and ".join(f"not {name}" for name in left_out)]
        words = ["-p", "pytest_vllm", "--timeout", str(TEST_SECONDS), *chosen, *files]
        return self.pytest("vllm", python, tests, env, words)

    def llama(self):
        python = self.venv("venv-vllm", HERE / "requirements-vllm.txt")
        whole = self.work / "llama.cpp"
        inside = f"llama_cpp_python-{LLAMA}/vendor/llama.cpp/"
        # The tests, and the templates and the picture that they name by paths relative to themselves.
        wanted = tuple(inside + part for part in ("tools/server/tests/", "models/templates/", "tools/mtmd/test-1.jpeg"))
        if not whole.exists():
            with tarfile.open(self.download(python, "source", f"llama-cpp-python=={LLAMA}")) as archive:
                members = [entry for entry in archive if entry.name.startswith(wanted)]
                for entry in members:
                    entry.name = entry.name.removeprefix(inside)
                archive.extractall(whole, members, filter="data")
        tests = whole / "tools/server/tests"
        env = {"LLAMA_SERVER_BIN_PATH": str(HERE / "llama_shim.py"), "PORT": str(free_port()), "PYTHONPATH": str(tests)}
        files = self.options.only or page.listed("llama-files.txt")
        words = ["-p", "pytest_llama", "--timeout", str(TEST_SECONDS), *files]
        return self.pytest("llama", python, tests, env, words)

    def clients(self):
        """The load clients, each with what it printed."""
        python = self.venv("venv-clients", HERE / "requirements-clients.txt")
        tests, package = self.unpack_vllm(self.venv("venv-vllm", HERE / "requirements-vllm.txt"))
        model, name = str(self.options.model.resolve()), "spark-tiny-vl"
        outcomes = []
        with Server(self.options, name) as url:
            hub, corpus = self.hub(tests), f"{url}/openapi.json"
            # HOME: some keep what they fetched there.
            home = {**os.environ, "HF_HOME": str(hub), "HF_HUB_OFFLINE": "1", "HOME": str(self.work)}
            for client, command in {
                "vllm-rs bench serve": [
                    package / "vllm/vllm-rs", "bench", "serve", "--backend", "openai-chat", "--base-url", url,
                    "--endpoint", "/v1/chat/completions", "--model", name, "--tokenizer", model,
                    "--dataset-name", "random", "--random-input-len", "128", "--random-output-len", "32",
                    "--num-prompts", "32", "--max-concurrency", "4", "--ignore-eos",
                ],
                "vllm-rs bench serve, completions": [
                    package / "vllm/vllm-rs", "bench", "serve", "--base-url", url, "--model", name, "--tokenizer", model,
                    "--dataset-name", "random", "--random-input-len", "128", "--random-output-len", "32",
                    "--num-prompts", "32", "--max-concurrency", "4", "--ignore-eos",
                ],
                "aiperf": [
                    python.with_name("aiperf"), "profile", "--model", name, "--url", url, "--endpoint-type", "chat",
                    "--streaming", "--concurrency", "4", "--request-count", "32", "--isl", "128", "--osl", "32",
                    "--tokenizer", LOCAL, "--ui", "none", "--artifact-dir", self.work / "aiperf",
                    "--extra-inputs", "ignore_eos:true",
                ],
                "guidellm": [
                    python.with_name("guidellm"), "run", "--backend", f"kind=openai_http,target={url},model={name}",
                    "--tokenizer", f"kind=huggingface_auto,model={model}", "--profile", "kind=concurrent,streams=4",
                    "--constraint", "kind=max_requests,count=32", "--disable-console-interactive",
                    "--data", "kind=synthetic_text,prompt_tokens=128,output_tokens=32",
                ],
                "llama-benchy": [
                    python.with_name("llama-benchy"), "--base-url", f"{url}/v1", "--model", name, "--tokenizer", model,
                    "--book-url", corpus, "--pp", "128", "--tg", "32", "--runs", "1", "--no-cache", "--skip-coherence",
                ],
            }.items():
                if self.options.only and client not in self.options.only:
                    continue
                say("running", client)
                ended = subprocess.run(
                    [str(word) for word in command], capture_output=True, text=True, env=home, cwd=self.work, check=False
                )
                (self.work / f"{client.replace(' ', '-')}.log").write_text(ended.stdout + ended.stderr)
                outcomes.append({"client": client, "status": ended.returncode, "printed": ended.stdout})
        return outcomes


class Server:
    """`spark-engine serve` of the demo model, for as long as a `with` lasts."""

    def __init__(self, options, name):
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        words = ["--served-model-name", name, "--port", str(port), "--threads", "2"]
        self.command = [options.program.resolve(), "serve", "--model", options.model.resolve(), *words]

    def __enter__(self):
        self.process = subprocess.Popen(self.command, stderr=subprocess.DEVNULL)
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{self.url}/health").read()
                return self.url
            except OSError:
                if self.process.poll() is not None:
                    break
                time.sleep(0.1)
        raise SystemExit("the server has not started")

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suites", nargs="*", default=[], help="vllm, llama or clients; all by default")
    parser.add_argument("--program", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="where everything is fetched and unpacked")
    parser.add_argument("--page", type=Path, required=True, help="what is written from the results")
    parser.add_argument("--torch", type=Path, help="site-packages that have torch and torchvision")
    parser.add_argument("--only", action="append", help="these test files or clients; what the others said last is kept")
    parser.add_argument("--remove", action="store_true", help="remove what was fetched, at the end")
    options = parser.parse_args()
    suites = Suites(options)
    results = suites.work / "RESULTS.json"
    said = json.loads(results.read_text()) if results.exists() else {}
    for suite in options.suites or ["vllm", "llama", "clients"]:
        say("running", suite)
        before = said.get(suite, []) if options.only else []
        outcome = {of.get("test") or of["client"]: of for of in [*before, *getattr(suites, suite)()]}
        said[suite] = list(outcome.values())
        said["build"] = options.program.resolve().parent.name
        results.write_text(json.dumps(said, indent=1))
    unexplained = page.write(options.page, said, {"vllm": VLLM, "llama-cpp-python": LLAMA})
    if options.remove:
        for folder in suites.work.iterdir():
            if folder.is_dir():
                shutil.rmtree(folder)
    for test in unexplained:
        say("failed without a reason:", test)
    sys.exit(1 if unexplained else 0)


if __name__ == "__main__":
    main()
