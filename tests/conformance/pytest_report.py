"""Writes the outcome of every test to the file SPARK_REPORT, one JSON line each. For the plugins beside it."""

import json
import os

import pytest


def write(line):
    with open(os.environ["SPARK_REPORT"], "a") as file:
        file.write(json.dumps(line) + "\n")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if report.when != "call" and report.passed:
        return
    text = ""
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        text = crash.message if crash else str(report.longrepr)
    elif report.skipped:
        text = str(report.longrepr[-1]) if isinstance(report.longrepr, tuple) else str(report.longrepr)
    write({"test": report.nodeid, "when": report.when, "outcome": report.outcome, "text": text[:2000]})


def pytest_collectreport(report):
    if report.failed:
        write({"test": report.nodeid, "when": "collect", "outcome": "failed", "text": str(report.longrepr)[-2000:]})
