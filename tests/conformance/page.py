"""docs/results/conformance.md, from what the suites said and from the reasons that are known.

A failed test needs a reason in reasons.toml: patterns of the test's name and of its message, the first that fits counts.
A test that fails without one is listed first, and is what a change has broken.
"""

import collections
import datetime
import json
import re
import subprocess
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
KINDS = {
    "model": "the demo model cannot do it",
    "absent": "not offered here",
    "differs": "answered otherwise on purpose",
    "environment": "no network, GPU or files of theirs",
}
# What a client prints is kept from the first line in which this is found.
PRINTED = {
    "vllm-rs bench serve": "Serving Benchmark Result",
    "vllm-rs bench serve, completions": "Serving Benchmark Result",
    "aiperf": r"AIPerf \| LLM Metrics *$",
    "guidellm": "Request Latency Statistics",
    "llama-benchy": r"^\| *model",
}
# And up to this, or so many lines.
ENDS = r"Warning:|Steady-State|Benchmarking complete|GPU Telemetry|^llama-benchy|CLI Command"
LINES = 30


def listed(name):
    """The lines of a file beside this one, without comments."""
    lines = (HERE / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def outcomes(report):
    """What became of each test: the worst that was said of it."""
    ranks = ["passed", "skipped", "failed"]
    said = {}
    for line in map(json.loads, report.read_text().splitlines()):
        before = said.get(line["test"])
        if before is None or ranks.index(before["outcome"]) < ranks.index(line["outcome"]):
            said[line["test"]] = line
    return list(said.values())


def reason(reasons, suite, line):
    """The first reason that fits a failure."""
    for entry in reasons[suite]:
        if re.search(entry.get("test", ""), line["test"]) and re.search(entry.get("says", ""), line["text"], re.DOTALL):
            return entry
    return None


def short(test):
    """A test without the folders and parameters that all of its kind share."""
    name = re.sub(r"^(tests/)?(entrypoints/|unit/)?", "", test)
    return name.split("[", 1)[0]


def explained(reasons, suite, lines):
    """Failures by reason, each with its tests and how many there are; and those without one."""
    groups, without = collections.defaultdict(collections.Counter), []
    for line in lines:
        if line["outcome"] != "failed":
            continue
        if entry := reason(reasons, suite, line):
            groups[entry["kind"], entry["why"]][short(line["test"])] += 1
        else:
            without.append(line)
    return groups, without


def table(counts):
    """The overview."""
    head = ["suite", "tests", "passed", "skipped by the suite", *(f"failed: {text}" for text in KINDS.values()), "unexplained"]
    if not any(count[-1] for count in counts):
        head, counts = head[:-1], [count[:-1] for count in counts]
    rows = [head, ["---"] * len(head), *counts]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def failures(groups):
    """One row a reason, the tests behind it."""
    rows = []
    for kind in KINDS:
        of_kind = [(why, tests) for (is_kind, why), tests in groups.items() if is_kind == kind]
        for why, tests in sorted(of_kind, key=lambda pair: -pair[1].total()):
            names = ", ".join(f"`{test}`" + (f" ({count})" if count > 1 else "") for test, count in sorted(tests.items()))
            rows.append(f"| {KINDS[kind]} | {why} | {tests.total()} | {names} |")
    return "\n".join(["| kind | why | tests | which |", "|---|---|---|---|", *rows])


def printed(outcome):
    """The table that a client printed."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", outcome["printed"]).splitlines()
    first = next((number for number, line in enumerate(lines) if re.search(PRINTED[outcome["client"]], line)), None)
    if first is None:
        return "(no table)"
    kept = [line.rstrip() for line in lines[first:] if line.strip()]
    last = next((number for number, line in enumerate(kept) if re.search(ENDS, line)), LINES)
    return "\n".join(kept[: min(last, LINES)])


def write(page, said, versions):
    """Writes the page and returns the tests that failed for no known reason."""
    reasons = tomllib.loads((HERE / "reasons.toml").read_text())
    names = {
        "vllm": f"vLLM {versions['vllm']}, its tests of a running server",
        "llama": f"llama.cpp of llama-cpp-python {versions['llama-cpp-python']}, server tests",
    }
    counts, parts, unexplained = [], [], []
    for suite, name in names.items():
        if suite not in said:
            continue
        lines = said[suite]
        groups, without = explained(reasons, suite, lines)
        unexplained += [line["test"] for line in without]
        by = collections.Counter(line["outcome"] for line in lines)
        failed = [sum(tests.total() for (of, _), tests in groups.items() if of == kind) for kind in KINDS]
        counts.append([name, len(lines), by["passed"], by["skipped"], *failed, len(without)])
        parts.append(f"## {name}\n\n{failures(groups)}")
        if without:
            listing = "\n".join(f"- `{line['test']}`: {line['text'].splitlines()[0][:200]}" for line in without)
            parts[-1] += f"\n\nWithout a reason:\n\n{listing}"
    clients = "\n\n".join(
        f"### {outcome['client']}\n\n"
        + ("It completed.\n\n" if outcome["status"] == 0 else f"It ended with status {outcome['status']}.\n\n")
        + f"```text\n{printed(outcome)}\n```"
        for outcome in said.get("clients", [])
    )
    commit = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, cwd=HERE, check=False)
    text = (HERE / "page.md").read_text()
    text = text.replace("{date}", datetime.date.today().isoformat()).replace("{commit}", commit.stdout.strip())
    build = "" if said["build"] == "release" else f"The program was a {said['build']} build. "
    text = text.replace("{build}", build)
    text = text.replace("{table}", table(counts)).replace("{suites}", "\n\n".join(parts)).replace("{clients}", clients)
    # Whose machine it was is nobody's business.
    page.write_text(text.replace(f"{HERE.parent.parent}/", ""))
    return unexplained
