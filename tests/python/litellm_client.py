"""Drives a server of the demo model through `litellm`, in all three of its dialects.

    python litellm_client.py http://127.0.0.1:8000

Ends with status 0 if all of it worked.
"""

import json
import os
import sys

# Or it fetches its table of prices when it is imported.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm  # noqa: E402

SUM = [{"role": "user", "content": "What is 347 + 185?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city"],
        },
    },
}


def main() -> None:
    base_url = sys.argv[1].rstrip("/")
    litellm.telemetry = False
    litellm.suppress_debug_info = True
    # By the provider's prefix it picks its way: OpenAI's, vLLM's, Anthropic's.
    for provider, api_base in [
        ("openai", f"{base_url}/v1"),
        ("hosted_vllm", f"{base_url}/v1"),
        ("anthropic", base_url),
    ]:
        options = {"model": f"{provider}/spark-tiny-vl", "api_base": api_base, "api_key": "unused"}
        options |= {"temperature": 0, "max_tokens": 200, "num_retries": 0}
        answer(options)
        call_tools(options)
    refuse({"model": "hosted_vllm/spark-tiny-vl", "api_base": f"{base_url}/v1", "api_key": "unused"})
    print("litellm: all checks passed")


def answer(options: dict) -> None:
    """A question, whole and streamed."""
    whole = litellm.completion(messages=SUM, **options)
    assert whole.choices[0].message.content == "532", whole
    assert whole.usage.completion_tokens > 1, whole
    pieces = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(messages=SUM, stream=True, **options)]
    assert "".join(pieces) == "532", pieces


def call_tools(options: dict) -> None:
    """A call, its result, and the sentence made of it."""
    messages = [{"role": "user", "content": "What is the weather in Oslo in celsius?"}]
    asked = litellm.completion(messages=messages, tools=[WEATHER], **options).choices[0]
    (call,) = asked.message.tool_calls
    assert asked.finish_reason == "tool_calls" and call.function.name == "weather", asked
    assert json.loads(call.function.arguments) == {"city": "Oslo", "unit": "celsius"}, call
    result = json.dumps({"sky": "rainy", "temperature": 7, "unit": "celsius"})
    messages += [asked.message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": result}]
    told = litellm.completion(messages=messages, tools=[WEATHER], **options).choices[0]
    assert told.message.content == "It is rainy in Oslo, 7 degrees celsius.", told


def refuse(options: dict) -> None:
    """An error has the class for its status."""
    try:
        litellm.completion(messages=SUM, temperature=9, num_retries=0, **options)
    except litellm.BadRequestError as error:
        assert "temperature" in str(error), error
    else:
        raise AssertionError("temperature 9 was accepted")


if __name__ == "__main__":
    main()
