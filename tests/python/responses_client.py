"""Drives `/v1/responses` of a server of the demo model with the official `openai` client.

    python responses_client.py http://127.0.0.1:8000 demo.png

Asks, streams, goes on from a stored answer, has a tool called, parses, thinks, works in the background, and provokes
errors. Ends with status 0 if all of it worked.
"""

import base64
import json
import sys
import time
from pathlib import Path

import openai
import pydantic

MODEL = "spark-tiny-vl"
SUM = "What is 347 + 185?"
WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "The weather in a city.",
    "strict": False,
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
        },
        "required": ["city"],
    },
}


def main() -> None:
    base_url, image = sys.argv[1].rstrip("/"), Path(sys.argv[2])
    client = openai.OpenAI(base_url=f"{base_url}/v1", api_key="unused", max_retries=0, timeout=120)
    ask(client, image)
    stream(client)
    go_on(client)
    call_tool(client)
    parse(client)
    think(client)
    work_in_background(client)
    refuse(client)
    print("responses: all checks passed")


def ask(client: openai.OpenAI, image: Path) -> None:
    """A question about a picture, and the count of its tokens."""
    url = f"data:image/png;base64,{base64.b64encode(image.read_bytes()).decode()}"
    content = [
        {"type": "input_image", "image_url": url, "detail": "auto"},
        {"type": "input_text", "text": "How many rings are there?"},
    ]
    question = [{"role": "user", "content": content}]
    response = client.responses.create(model=MODEL, input=question, temperature=0, max_output_tokens=32)
    assert response.output_text == "Two.", response
    assert response.status == "completed" and response.error is None, response
    counted = client.responses.input_tokens.count(model=MODEL, input=question)
    assert counted.input_tokens == response.usage.input_tokens, (counted, response.usage)


def stream(client: openai.OpenAI) -> None:
    """The client's own accumulator checks the order of the events; their text is that of the end."""
    with client.responses.stream(model=MODEL, input=SUM, temperature=0) as events:
        text, kinds = "", []
        for number, event in enumerate(events):
            assert event.sequence_number == number or event.type == "response.output_text.delta", event
            kinds.append(event.type)
            if event.type == "response.output_text.delta":
                text += event.delta
        final = events.get_final_response()
    assert text == final.output_text == "532", final
    assert kinds[:2] == ["response.created", "response.in_progress"], kinds
    assert kinds[-1] == "response.completed", kinds


def go_on(client: openai.OpenAI) -> None:
    """An answer is stored, is the beginning of the next, and is forgotten when that is asked for."""
    first = client.responses.create(model=MODEL, input=SUM, temperature=0)
    second = client.responses.create(
        model=MODEL, input="And 1 + 1?", previous_response_id=first.id, temperature=0, max_output_tokens=16
    )
    assert second.previous_response_id == first.id, second
    assert second.usage.input_tokens > first.usage.total_tokens, (first.usage, second.usage)
    assert client.responses.retrieve(first.id).output_text == first.output_text
    client.responses.delete(first.id)
    try:
        client.responses.retrieve(first.id)
    except openai.NotFoundError:
        pass
    else:
        raise AssertionError("a deleted response is still there")


def call_tool(client: openai.OpenAI) -> None:
    """A call, streamed; its result; the sentence made of it."""
    question = "What is the weather in Oslo in celsius?"
    with client.responses.stream(model=MODEL, input=question, tools=[WEATHER], temperature=0) as events:
        pieces = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
        response = events.get_final_response()
    (call,) = response.output
    assert (call.type, call.name) == ("function_call", "weather"), call
    assert "".join(pieces) == call.arguments, (pieces, call)
    assert json.loads(call.arguments) == {"city": "Oslo", "unit": "celsius"}, call
    result = {"sky": "rainy", "temperature": 7, "unit": "celsius"}
    told = client.responses.create(
        model=MODEL,
        input=[{"type": "function_call_output", "call_id": call.call_id, "output": json.dumps(result)}],
        previous_response_id=response.id,
        tools=[WEATHER],
        temperature=0,
    )
    assert told.output_text == "It is rainy in Oslo, 7 degrees celsius.", told


def parse(client: openai.OpenAI) -> None:
    """An answer as an object of a class."""

    class Person(pydantic.BaseModel):
        name: str
        city: str
        age: int

    text = "Emma is 90 years old and lives in Leipzig.\nGive name, city and age as JSON."
    response = client.responses.parse(model=MODEL, input=text, text_format=Person, temperature=0)
    assert response.output_parsed == Person(name="Emma", city="Leipzig", age=90), response


def think(client: openai.OpenAI) -> None:
    """Thoughts are an item of their own before the answer."""
    response = client.responses.create(model=MODEL, input=SUM, reasoning={"effort": "high"}, temperature=0)
    reasoning, message = response.output
    assert reasoning.type == "reasoning" and "Result: 532" in reasoning.content[0].text, response
    assert message.content[0].text == "532", response
    assert response.usage.output_tokens_details.reasoning_tokens > 50, response.usage


def work_in_background(client: openai.OpenAI) -> None:
    """Work goes on without a connection, and can be cancelled."""
    response = client.responses.create(model=MODEL, input=SUM, background=True, temperature=0)
    deadline = time.monotonic() + 60
    while response.status in ("queued", "in_progress"):
        assert time.monotonic() < deadline, response
        time.sleep(0.05)
        response = client.responses.retrieve(response.id)
    assert response.output_text == "532", response
    endless = client.responses.create(
        model=MODEL, input=SUM, background=True, max_output_tokens=3000, extra_body={"ignore_eos": True}
    )
    assert client.responses.cancel(endless.id).status == "cancelled"


def refuse(client: openai.OpenAI) -> None:
    """What is wrong is named."""
    for field, value in [("temperature", 9), ("truncation", "auto"), ("max_output_tokens", 0)]:
        try:
            client.responses.create(model=MODEL, input="x", **{field: value})
        except openai.BadRequestError as error:
            assert error.param == field, (field, error)
        else:
            raise AssertionError(f"{field}: {value} was accepted")


if __name__ == "__main__":
    main()
