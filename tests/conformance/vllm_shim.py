#!/usr/bin/env python3
"""Stands in for the command `vllm` when vLLM's own tests start a server: `spark-engine serve` of the demo model instead.

The model is whatever SPARK_SHIM_MODEL names, served under the name that was asked for. Flags that `serve` knows are handed
on, with values that it knows; the rest is dropped and written to SPARK_SHIM_LOG, so that the results can list it.
"""

import json
import os
import re
import subprocess
import sys
import tempfile

PROGRAM = os.environ["SPARK_SHIM_PROGRAM"]
MODEL = os.environ["SPARK_SHIM_MODEL"]
# Of the demo model.
LONGEST = 4096
# Values are another engine's business: memory of a GPU, formats of weights, ranks.
NOT_HANDED_ON = {
    "--dtype",
    "--gpu-memory-utilization",
    "--kv-cache-dtype",
    "--load-format",
    "--mm-processor-kwargs",
    "--quantization",
    "--tensor-parallel-size",
    "--tokenizer",
    "--trust-remote-code",
}
PARSERS = {"--tool-call-parser": {"hermes", "qwen3_xml"}, "--reasoning-parser": {"qwen3"}}


def known_flags():
    """Flags of `serve`, each with whether it takes a value."""
    text = subprocess.run([PROGRAM, "serve", "--help"], check=True, capture_output=True, text=True).stdout
    found = re.findall(r"^ +(?:-\w, )?(--[a-z0-9-]+)( <)?", text, re.MULTILINE)
    return {name: bool(value) for name, value in found}


def flags(arguments):
    """Pairs of a flag and its values."""
    pairs = []
    for argument in arguments:
        if argument.startswith("--"):
            name, has_value, value = argument.partition("=")
            pairs.append((name.replace("_", "-"), [value] if has_value else []))
        elif pairs:
            pairs[-1][1].append(argument)
    return pairs


def value_of(name, value):
    """What `serve` is given for a value of vLLM's."""
    if name == "--max-model-len":
        return str(min(int(value), LONGEST))
    if name in PARSERS and value not in PARSERS[name]:
        return "auto"
    if name == "--chat-template" and "{" in value:
        # vLLM takes a template in place of its file.
        with tempfile.NamedTemporaryFile("w", suffix=".jinja", delete=False) as file:
            file.write(value)
        return file.name
    return value


def main():
    command, *arguments = sys.argv[1:]
    if command != "serve":
        sys.exit(f"vllm {command}: not offered")
    model = arguments.pop(0) if not arguments[0].startswith("--") else None
    known = known_flags()
    given = {"--served-model-name": [model], "--kv-cache-memory-bytes": [str(128 << 20)], "--shutdown-timeout": ["0"]}
    if "--fetch-media" in known:
        # vLLM fetches from everywhere, and the tests serve pictures on this machine.
        given |= {"--fetch-media": [], "--allowed-media-networks": ["127.0.0.0/8"]}
    dropped = []
    for name, values in flags(arguments):
        if name == "--model":
            given["--served-model-name"] = values
        elif name == "--lora-modules":
            # Other names of the same model.
            given["--served-model-name"] += [value.partition("=")[0] for value in values]
        elif name == "--chat-template" and values[0].endswith(".jinja"):
            # Of another model, which this one does not understand.
            dropped.append([name, *values])
        elif name not in known or name in NOT_HANDED_ON:
            dropped.append([name, *values])
        else:
            given[name] = [value_of(name, value) for value in values] if known[name] else []
    if log := os.environ.get("SPARK_SHIM_LOG"):
        with open(log, "a") as file:
            file.write(json.dumps({"model": model, "dropped": dropped}) + "\n")
    if key := os.environ.get("VLLM_API_KEY"):
        os.environ["SPARK_API_KEY"] = key
    words = [word for name, values in given.items() for word in (name, *values)]
    os.execv(PROGRAM, [PROGRAM, "serve", "--threads", "2", *words, "--model", MODEL])


main()
