"""Drives a server of the demo model with the official `openai` client, as a user's program would.

    python openai_client.py http://127.0.0.1:8000 demo.png

Lists the models, asks about the picture, whole and streamed, has tools called and their results told, forces calls, has
answers parsed into objects, has the model think, reads log-probabilities, provokes a 400, and goes away in the middle of
a stream. What is answered is compared: `spark-engine serve` without MODEL answers so, about the picture in
tests/fixtures/media. Ends with status 0 if all of it worked; otherwise the traceback says what did not. Uses nothing but
the client (with its pydantic) and the standard library, and no test framework: a Rust integration test starts it beside
the server.
"""

import base64
import json
import mimetypes
import sys
import time
import urllib.request
from pathlib import Path

import openai
import pydantic

ABOUT_THE_PICTURE = {
    "Describe the picture.": (
        "There are four objects: a pink ring at the top left, a red rectangle at the top right, "
        "a green ring at the centre and a black hexagon at the bottom left."
    ),
    "How many rings are there?": "Two.",
    "What colour is the hexagon?": "Black.",
}


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: openai_client.py BASE_URL IMAGE")
    base_url, image = sys.argv[1].rstrip("/"), Path(sys.argv[2])
    client = openai.OpenAI(base_url=f"{base_url}/v1", api_key="unused", max_retries=0, timeout=120)

    model, max_model_len = list_models(client)
    chat_about_picture(client, model, image)
    stream_chat_with_image(client, model, image)
    chat_logprobs(client, model)
    completion_logprobs(client, model)
    call_tools(client, model)
    stream_tool_calls(client, model)
    force_calls(client, model)
    parse_answers(client, model)
    think(client, model)
    refuse_bad_request(client, model)
    cancel_midway(client, model, max_model_len, base_url)
    print("openai client: all checks passed")


def list_models(client: openai.OpenAI) -> tuple[str, int]:
    """Name and length of the one model that is served."""
    models = client.models.list().data
    assert len(models) == 1, f"one model is served, but {len(models)} are listed"
    assert models[0].object == "model", models[0]
    assert models[0].id == "spark-tiny-vl", models[0]
    return models[0].id, models[0].model_extra["max_model_len"]


def about(image: Path, question: str) -> list[dict]:
    """The parts of a question about a picture, which is sent as a `data:` URL."""
    media_type = mimetypes.guess_type(image.name)[0]
    assert media_type, f"unknown image type: {image.name}"
    url = f"data:{media_type};base64,{base64.b64encode(image.read_bytes()).decode()}"
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]


def chat_about_picture(client: openai.OpenAI, model: str, image: Path) -> None:
    """Answers in one piece: what is in the picture."""
    for question, answer in ABOUT_THE_PICTURE.items():
        chat = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": about(image, question)}],
            max_completion_tokens=64,
            temperature=0,
        )
        assert chat.choices[0].message.content == answer, f"{question} {chat.choices[0]}"
        assert chat.choices[0].finish_reason == "stop", chat.choices[0]


def stream_chat_with_image(client: openai.OpenAI, model: str, image: Path) -> None:
    """A streamed answer about the picture, token by token, with its usage at the end."""
    question, answer = next(iter(ABOUT_THE_PICTURE.items()))
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": about(image, question)}],
        max_completion_tokens=64,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert len({chunk.id for chunk in chunks}) == 1, "all chunks of a stream have one id"
    assert chunks[0].choices[0].delta.role == "assistant", chunks[0]
    finish = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert finish == ["stop"], finish
    texts = [choice.delta.content for chunk in chunks for choice in chunk.choices if choice.delta.content]
    assert "".join(texts) == answer, texts
    assert len(texts) > 10, f"the answer came in {len(texts)} pieces"
    usage = chunks[-1].usage
    assert chunks[-1].choices == [] and usage is not None, "the last chunk has the usage and no choices"
    assert len(texts) <= usage.completion_tokens <= 64, usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens, usage

    text_only = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_completion_tokens=1,
    )
    image_tokens = usage.prompt_tokens - text_only.usage.prompt_tokens
    assert image_tokens > 2, f"the image took {image_tokens} tokens of the prompt"


def chat_logprobs(client: openai.OpenAI, model: str) -> None:
    """Log-probabilities of a greedy answer: the token that was taken is the most likely one, and the model is sure."""
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "What is 347 + 185?"}],
        max_completion_tokens=8,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    )
    content = answer.choices[0].logprobs.content
    assert answer.choices[0].message.content == "532", answer.choices[0]
    spoken = "".join(entry.token for entry in content)
    assert spoken.startswith("532"), f"the tokens are {spoken!r}"
    for entry in content:
        assert len(entry.top_logprobs) == 3, entry
        values = [top.logprob for top in entry.top_logprobs]
        assert values == sorted(values, reverse=True), values
        assert -0.7 < entry.logprob <= 0 and entry.logprob == values[0], entry


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


def tool(name: str, description: str, properties: dict, required: str) -> dict:
    parameters = {"type": "object", "properties": properties, "required": [required]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS = [
    tool("calculator", "Calculates an expression.", {"expression": {"type": "string"}}, "expression"),
    tool(
        "weather",
        "The weather in a city.",
        {"city": {"type": "string"}, "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]}},
        "city",
    ),
]


def call_tools(client: openai.OpenAI, model: str) -> None:
    """A question, the call that it needs, the tool's result, and the sentence made of it."""
    messages = [{"role": "user", "content": "What is the weather in Oslo in celsius?"}]

    def ask() -> openai.types.chat.chat_completion.Choice:
        return client.chat.completions.create(
            model=model, messages=messages, tools=TOOLS, max_completion_tokens=64, temperature=0
        ).choices[0]

    asked = ask()
    assert asked.finish_reason == "tool_calls" and asked.message.content is None, asked
    (call,) = asked.message.tool_calls
    assert call.type == "function" and call.function.name == "weather", call
    assert json.loads(call.function.arguments) == {"city": "Oslo", "unit": "celsius"}, call

    # With the client's own object, as its documentation shows.
    messages.append(asked.message)
    result = {"sky": "rainy", "temperature": 7, "unit": "celsius"}
    messages.append({"role": "tool", "tool_call_id": call.id, "content": json.dumps(result)})
    told = ask()
    assert told.message.content == "It is rainy in Oslo, 7 degrees celsius.", told
    assert told.finish_reason == "stop" and not told.message.tool_calls, told


def stream_tool_calls(client: openai.OpenAI, model: str) -> None:
    """Two calls in a stream: each begins with its id and name, its arguments come in pieces."""
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Tell me the weather in Moscow in celsius and 82 - 28."}],
        tools=TOOLS,
        max_completion_tokens=100,
        temperature=0,
        stream=True,
    )
    calls, pieces, finish = [], 0, None
    for chunk in stream:
        choice = chunk.choices[0]
        assert not choice.delta.content, f"text beside the calls: {choice.delta.content!r}"
        finish = choice.finish_reason or finish
        for delta in choice.delta.tool_calls or []:
            if delta.index == len(calls):
                assert delta.id and delta.type == "function" and delta.function.name, delta
                calls.append({"id": delta.id, "name": delta.function.name, "arguments": ""})
            calls[delta.index]["arguments"] += delta.function.arguments or ""
            pieces += 1
    assert finish == "tool_calls", finish
    assert [(call["name"], json.loads(call["arguments"])) for call in calls] == [
        ("weather", {"city": "Moscow", "unit": "celsius"}),
        ("calculator", {"expression": "82 - 28"}),
    ], calls
    assert calls[0]["id"] != calls[1]["id"], calls
    assert pieces > 4, f"two calls came in {pieces} pieces"


def force_calls(client: openai.OpenAI, model: str) -> None:
    """A call that has to be made is made, of the function that was named."""
    question = [{"role": "user", "content": "What is the weather in Oslo in celsius?"}]
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        completion = client.chat.completions.create(
            model=model, messages=question, tools=TOOLS, tool_choice=choice, max_completion_tokens=64, temperature=0
        )
        [call] = completion.choices[0].message.tool_calls
        arguments = json.loads(call.function.arguments)
        assert (call.function.name, arguments["city"]) == ("weather", "Oslo"), completion


def parse_answers(client: openai.OpenAI, model: str) -> None:
    """`parse` makes a schema of a class and an object of the answer; a schema that cannot be enforced is refused."""

    class Person(pydantic.BaseModel):
        name: str
        city: str
        age: int

    question = [
        {"role": "user", "content": "Emma is 90 years old and lives in Leipzig.\nGive name, city and age as JSON."}
    ]
    completion = client.chat.completions.parse(
        model=model, messages=question, response_format=Person, max_completion_tokens=64, temperature=0
    )
    assert completion.choices[0].message.parsed == Person(name="Emma", city="Leipzig", age=90), completion
    schema = {"name": "odd", "schema": {"type": "object", "not": {}}, "strict": True}
    try:
        client.chat.completions.create(
            model=model, messages=question, response_format={"type": "json_schema", "json_schema": schema}
        )
    except openai.BadRequestError as error:
        assert error.param == "response_format" and "`not`" in error.message, error
    else:
        raise AssertionError("a schema was accepted that cannot be enforced")


def think(client: openai.OpenAI, model: str) -> None:
    """Thoughts come in a field of their own, whole and streamed; the client keeps it in `model_extra`."""
    steps = "7 + 5 + 0 = 12: 2, carry 1\n4 + 8 + 1 = 13: 3, carry 1\n3 + 1 + 1 = 5: 5, carry 0\nResult: 532"
    request = {
        "model": model,
        "messages": [{"role": "user", "content": "What is 347 + 185?"}],
        "max_completion_tokens": 128,
        "temperature": 0,
    }
    thinking = {"chat_template_kwargs": {"enable_thinking": True}}
    answer = client.chat.completions.create(**request, extra_body=thinking)
    message = answer.choices[0].message
    assert message.content == "532", message
    assert message.reasoning_content == message.model_extra["reasoning"] == steps, message
    assert answer.usage.completion_tokens_details.reasoning_tokens > 50, answer.usage

    stream = client.chat.completions.create(**request, extra_body=thinking, stream=True)
    deltas = [chunk.choices[0].delta for chunk in stream]
    thoughts = [delta.model_extra.get("reasoning_content") for delta in deltas]
    assert "".join(filter(None, thoughts)) == steps, thoughts
    assert "".join(delta.content or "" for delta in deltas) == "532", deltas
    first_text = next(i for i, delta in enumerate(deltas) if delta.content)
    assert not any(thoughts[first_text + 1 :]), "thoughts come before the answer"

    plain = client.chat.completions.create(**request).choices[0].message
    assert plain.content == "532" and not plain.model_extra.get("reasoning_content"), plain


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
