"""Drives a server of the demo model through `langchain-openai`.

    python langchain_client.py http://127.0.0.1:8000

A chat model answers, streams, calls tools, and fills a class. Ends with status 0 if all of it worked.
"""

import sys

import openai
import pydantic
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI


class Person(pydantic.BaseModel):
    """Somebody."""

    name: str
    city: str
    age: int


@tool
def weather(city: str, unit: str = "celsius") -> str:
    """The weather in a city."""
    return f'{{"sky": "rainy", "temperature": 7, "unit": "{unit}"}}'


def main() -> None:
    options = {"base_url": f"{sys.argv[1].rstrip('/')}/v1", "api_key": "unused", "max_retries": 0}
    model = ChatOpenAI(model="spark-tiny-vl", temperature=0, max_tokens=200, **options)
    answer(model)
    call_tools(model)
    fill_a_class(model)
    answer(ChatOpenAI(model="spark-tiny-vl", temperature=0, use_responses_api=True, **options))
    refuse(ChatOpenAI(model="spark-tiny-vl", temperature=9, **options))
    print("langchain-openai: all checks passed")


def answer(model: ChatOpenAI) -> None:
    """A question, whole and streamed, with its usage."""
    message = model.invoke("What is 347 + 185?")
    assert message.text == "532", message
    assert message.usage_metadata["output_tokens"] > 1, message
    pieces = [chunk.text for chunk in model.stream("What is 347 + 185?")]
    assert "".join(pieces) == "532" and len(pieces) > 1, pieces


def call_tools(model: ChatOpenAI) -> None:
    """A call, its result, and the sentence made of it."""
    with_tools = model.bind_tools([weather])
    messages = [HumanMessage("What is the weather in Oslo in celsius?")]
    asked = with_tools.invoke(messages)
    (call,) = asked.tool_calls
    assert (call["name"], call["args"]["city"]) == ("weather", "Oslo"), call
    messages += [asked, ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])]
    assert "rainy in Oslo" in with_tools.invoke(messages).text
    forced = model.bind_tools([weather], tool_choice="weather").invoke(messages[:1])
    assert forced.tool_calls[0]["args"]["city"] == "Oslo", forced


def fill_a_class(model: ChatOpenAI) -> None:
    """An answer that is held to a schema."""
    text = "Emma is 90 years old and lives in Leipzig.\nGive name, city and age as JSON."
    structured = model.with_structured_output(Person, method="json_schema")
    assert structured.invoke(text) == Person(name="Emma", city="Leipzig", age=90)


def refuse(model: ChatOpenAI) -> None:
    """An error arrives as the one of the client below."""
    try:
        model.invoke("x")
    except openai.BadRequestError as error:
        assert error.param == "temperature", error
    else:
        raise AssertionError("temperature 9 was accepted")


if __name__ == "__main__":
    main()
