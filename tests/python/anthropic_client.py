"""Drives `/v1/messages` of a server of the demo model with the official `anthropic` client.

    python anthropic_client.py http://127.0.0.1:8000 demo.png

Asks about a picture, streams, counts tokens, has a tool called, thinks, stops, and provokes errors. Ends with status 0 if
all of it worked.
"""

import base64
import json
import sys
from pathlib import Path

import anthropic

MODEL = "spark-tiny-vl"
SUM = [{"role": "user", "content": "What is 347 + 185?"}]
WEATHER = {
    "name": "weather",
    "description": "The weather in a city.",
    "input_schema": {
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
    client = anthropic.Anthropic(base_url=base_url, api_key="unused", max_retries=0, timeout=120)
    ask(client, image)
    stream(client)
    call_tool(client)
    think(client)
    stop(client)
    refuse(client)
    print("anthropic: all checks passed")


def greedy(client: anthropic.Anthropic, messages: list, **more) -> anthropic.types.Message:
    """One greedy answer."""
    # Newer clients leave the temperature to those who send it themselves.
    more.setdefault("max_tokens", 200)
    return client.messages.create(model=MODEL, messages=messages, extra_body={"temperature": 0}, **more)


def ask(client: anthropic.Anthropic, image: Path) -> None:
    """A question about a picture, and the count of its tokens."""
    data = base64.b64encode(image.read_bytes()).decode()
    source = {"type": "base64", "media_type": "image/png", "data": data}
    content = [{"type": "image", "source": source}, {"type": "text", "text": "How many rings are there?"}]
    question = [{"role": "user", "content": content}]
    message = greedy(client, question)
    assert [block.text for block in message.content] == ["Two."], message
    assert (message.stop_reason, message.role) == ("end_turn", "assistant"), message
    counted = client.messages.count_tokens(model=MODEL, messages=question)
    used = message.usage.input_tokens + message.usage.cache_read_input_tokens
    assert counted.input_tokens == used, (counted, message.usage)


def stream(client: anthropic.Anthropic) -> None:
    """The client's own accumulator checks the events."""
    with client.messages.stream(
        model=MODEL, max_tokens=50, messages=SUM, extra_body={"temperature": 0}
    ) as events:
        text = "".join(events.text_stream)
        final = events.get_final_message()
    assert text == final.content[0].text == "532", final
    assert final.stop_reason == "end_turn" and final.usage.output_tokens >= 2, final


def call_tool(client: anthropic.Anthropic) -> None:
    """A call, streamed; its result; the sentence made of it; a call that is forced."""
    messages = [{"role": "user", "content": "What is the weather in Oslo in celsius?"}]
    more = {"model": MODEL, "max_tokens": 100, "tools": [WEATHER], "extra_body": {"temperature": 0}}
    with client.messages.stream(messages=messages, **more) as events:
        pieces = [event.partial_json for event in events if event.type == "input_json"]
        message = events.get_final_message()
    (call,) = message.content
    assert (call.type, call.name, message.stop_reason) == ("tool_use", "weather", "tool_use"), message
    assert call.input == json.loads("".join(pieces)) == {"city": "Oslo", "unit": "celsius"}, call
    result = json.dumps({"sky": "rainy", "temperature": 7, "unit": "celsius"})
    messages += [
        {"role": "assistant", "content": message.content},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": result}]},
    ]
    told = client.messages.create(messages=messages, **more)
    assert told.content[0].text == "It is rainy in Oslo, 7 degrees celsius.", told
    forced = client.messages.create(messages=messages[:1], tool_choice={"type": "any"}, **more)
    assert forced.content[0].input["city"] == "Oslo", forced


def think(client: anthropic.Anthropic) -> None:
    """Thoughts are a block of their own, which the client sends back."""
    thinking = {"type": "enabled", "budget_tokens": 1024}
    message = client.messages.create(
        model=MODEL, max_tokens=2000, messages=SUM, thinking=thinking, extra_body={"temperature": 0}
    )
    thought, answer = message.content
    assert thought.type == "thinking" and "Result: 532" in thought.thinking, message
    assert answer.text == "532", message
    again = SUM + [{"role": "assistant", "content": message.content}, {"role": "user", "content": "Again."}]
    assert greedy(client, again, max_tokens=4).role == "assistant"


def stop(client: anthropic.Anthropic) -> None:
    """Why an answer ended."""
    message = greedy(client, SUM, stop_sequences=["3"])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "3"), message
    assert message.content[0].text == "5", message
    assert greedy(client, SUM, max_tokens=1).stop_reason == "max_tokens"


def refuse(client: anthropic.Anthropic) -> None:
    """Errors have the form that the client knows."""
    try:
        client.messages.create(model=MODEL, max_tokens=5, messages=SUM, extra_body={"temperature": 9})
    except anthropic.BadRequestError as error:
        assert error.body["error"]["type"] == "invalid_request_error", error.body
        assert "temperature" in error.body["error"]["message"] and error.request_id, error.body
    else:
        raise AssertionError("temperature 9 was accepted")
    try:
        client.messages.create(model="no-such-model", max_tokens=5, messages=SUM)
    except anthropic.NotFoundError:
        pass
    else:
        raise AssertionError("an unknown model was accepted")


if __name__ == "__main__":
    main()
