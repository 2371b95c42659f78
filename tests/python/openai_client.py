"""Drives a running server with the official `openai` client, as a user's program would.

    python openai_client.py http://127.0.0.1:8000 photo.png

Streams a chat about the image, reads log-probabilities, provokes a 400, lists the models, and goes away in the middle
of a stream. Ends with status 0 if all of it worked; otherwise the traceback says what did not. Uses nothing but the
client and the standard library, and no test framework: a Rust integration test starts it beside the server.
"""

import base64
import mimetypes
import sys
import time
import urllib.request
from pathlib import Path

import openai


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: openai_client.py BASE_URL IMAGE")
    base_url, image = sys.argv[1].rstrip("/"), Path(sys.argv[2])
    client = openai.OpenAI(base_url=f"{base_url}/v1", api_key="unused", max_retries=0, timeout=120)

    model, max_model_len = list_models(client)
    stream_chat_with_image(client, model, image)
    chat_logprobs(client, model)
    completion_logprobs(client, model)
    refuse_bad_request(client, model)
    cancel_midway(client, model, max_model_len, base_url)
    print("openai client: all checks passed")


def list_models(client: openai.OpenAI) -> tuple[str, int]:
    """Name and length of the one model that is served."""
    models = client.models.list().data
    assert len(models) == 1, f"one model is served, but {len(models)} are listed"
    assert models[0].object == "model", models[0]
    return models[0].id, models[0].model_extra["max_model_len"]


def stream_chat_with_image(client: openai.OpenAI, model: str, image: Path) -> None:
    """A streamed answer about a `data:` image, token by token, with its usage at the end."""
    media_type = mimetypes.guess_type(image.name)[0]
    assert media_type, f"unknown image type: {image.name}"
    url = f"data:{media_type};base64,{base64.b64encode(image.read_bytes()).decode()}"
    question = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "What is in the picture?"},
    ]
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_completion_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    chunks = list(stream)
    assert len({chunk.id for chunk in chunks}) == 1, "all chunks of a stream have one id"
    assert chunks[0].choices[0].delta.role == "assistant", chunks[0]
    finish = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert finish == ["length"], finish
    usage = chunks[-1].usage
    assert chunks[-1].choices == [] and usage is not None, "the last chunk has the usage and no choices"
    assert usage.completion_tokens == 12, usage
    assert usage.total_tokens == usage.prompt_tokens + 12, usage

    text_only = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": [question[1]]}],
        max_completion_tokens=1,
    )
    image_tokens = usage.prompt_tokens - text_only.usage.prompt_tokens
    assert image_tokens > 2, f"the image took {image_tokens} tokens of the prompt"


def chat_logprobs(client: openai.OpenAI, model: str) -> None:
    """Log-probabilities of a greedy answer: the token that was taken is the most likely one."""
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Name a colour."}],
        max_completion_tokens=5,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
        extra_body={"ignore_eos": True},
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 5, f"{len(content)} entries for 5 tokens"
    for entry in content:
        assert len(entry.top_logprobs) == 3, entry
        values = [top.logprob for top in entry.top_logprobs]
        assert values == sorted(values, reverse=True), values
        assert entry.logprob <= 0 and entry.logprob == values[0], entry


def completion_logprobs(client: openai.OpenAI, model: str) -> None:
    """The older form of log-probabilities: parallel lists."""
    answer = client.completions.create(
        model=model,
        prompt="The sky is",
        max_tokens=4,
        temperature=0,
        logprobs=2,
        extra_body={"ignore_eos": True},
    )
    logprobs = answer.choices[0].logprobs
    lengths = [len(logprobs.tokens), len(logprobs.token_logprobs), len(logprobs.top_logprobs), len(logprobs.text_offset)]
    assert lengths == [4, 4, 4, 4], lengths
    assert all(value <= 0 for value in logprobs.token_logprobs), logprobs.token_logprobs
    # Different tokens may have the same text, so that a dictionary by text can be one shorter.
    assert all(1 <= len(top) <= 3 for top in logprobs.top_logprobs), logprobs.top_logprobs


def refuse_bad_request(client: openai.OpenAI, model: str) -> None:
    """A value out of range is a 400 that names its field."""
    try:
        client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "Hello."}], temperature=9
        )
    except openai.BadRequestError as error:
        assert error.status_code == 400, error
        assert error.param == "temperature", f"the error names {error.param!r}, not the field"
        assert "temperature" in error.message, error.message
    else:
        raise AssertionError("temperature 9 was accepted")

    try:
        client.chat.completions.create(model="no-such-model", messages=[{"role": "user", "content": "Hello."}])
    except openai.NotFoundError:
        pass
    else:
        raise AssertionError("an unknown model was accepted")


def cancel_midway(client: openai.OpenAI, model: str, max_model_len: int, base_url: str) -> None:
    """Closing a stream frees its sequence long before the answer is complete."""
    before = metric(base_url, "vllm:generation_tokens_total")
    max_tokens = max_model_len - 64
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Count to a million."}],
        max_completion_tokens=max_tokens,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    for _, _ in zip(range(3), stream):
        pass
    assert metric(base_url, "vllm:num_requests_running") == 1, "the request is running while it streams"
    stream.close()

    deadline = time.monotonic() + 20
    while metric(base_url, "vllm:num_requests_running") > 0:
        assert time.monotonic() < deadline, "the sequence is still running 20 s after its client went away"
        time.sleep(0.05)
    generated = metric(base_url, "vllm:generation_tokens_total") - before
    assert generated < max_tokens, f"all {max_tokens} tokens were generated: nothing was cancelled"


def metric(base_url: str, name: str) -> float:
    """Sum of a Prometheus metric over its labels."""
    with urllib.request.urlopen(f"{base_url}/metrics", timeout=30) as response:
        lines = response.read().decode().splitlines()
    values = [float(line.split()[-1]) for line in lines if line.split("{")[0].split(" ")[0] == name]
    assert values, f"/metrics has no {name}"
    return sum(values)


if __name__ == "__main__":
    main()
