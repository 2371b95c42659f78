"""Drives a server of the demo model through `pydantic-ai`, as an agent's author would.

    python pydantic_ai_client.py http://127.0.0.1:8000

An agent answers, streams, calls a Python function, and fills a class. Ends with status 0 if all of it worked.
"""

import json
import sys

import pydantic
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

GREEDY = {"temperature": 0, "max_tokens": 200}


class Person(pydantic.BaseModel):
    """Somebody."""

    name: str
    city: str
    age: int


def main() -> None:
    provider = OpenAIProvider(base_url=f"{sys.argv[1].rstrip('/')}/v1", api_key="unused")
    for kind in (OpenAIChatModel, OpenAIResponsesModel):
        model = kind("spark-tiny-vl", provider=provider)
        answer(model)
        call_a_function(model)
    fill_a_class(OpenAIChatModel("spark-tiny-vl", provider=provider))
    print("pydantic-ai: all checks passed")


def answer(model) -> None:
    """A question, whole and streamed."""
    agent = Agent(model, model_settings=GREEDY)
    assert agent.run_sync("What is 347 + 185?").output == "532"
    stream = agent.run_stream_sync("What is 347 + 185?")
    pieces = list(stream.stream_text(delta=True, debounce_by=None))
    assert "".join(pieces) == "532" and len(pieces) > 1, pieces


def call_a_function(model) -> None:
    """The model calls a function and makes a sentence of what it returns."""
    agent = Agent(model, model_settings=GREEDY)
    asked = []

    @agent.tool_plain
    def weather(city: str, unit: str = "celsius") -> str:
        """The weather in a city."""
        asked.append((city, unit))
        return json.dumps({"sky": "rainy", "temperature": 7, "unit": unit})

    result = agent.run_sync("What is the weather in Oslo in celsius?")
    assert asked == [("Oslo", "celsius")], asked
    assert "rainy in Oslo" in result.output, result.output


def fill_a_class(model) -> None:
    """An answer that is held to a schema."""
    agent = Agent(model, output_type=NativeOutput(Person), model_settings=GREEDY)
    text = "Emma is 90 years old and lives in Leipzig.\nGive name, city and age as JSON."
    assert agent.run_sync(text).output == Person(name="Emma", city="Leipzig", age=90)


if __name__ == "__main__":
    main()
