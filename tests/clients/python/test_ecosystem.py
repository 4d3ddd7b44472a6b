"""LangChain, LiteLLM, pydantic-ai and instructor against the real binary: chat, stream, tool, structure.

Each is used as its own documentation does, with nothing but the address and the name of the model set. The
demo model answers these questions by heart; tested is that each client asks as it does and reads the answer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable

import pytest
from windrose import Server

# Clients that would report on their use or look up prices over the network are told not to.
os.environ |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LANGSMITH_TRACING": "false"}

needs = "needs requirements-ecosystem.txt"
instructor = pytest.importorskip("instructor", reason=needs)
langchain_openai = pytest.importorskip("langchain_openai", reason=needs)
litellm = pytest.importorskip("litellm", reason=needs)
pydantic = pytest.importorskip("pydantic", reason=needs)
pydantic_ai = pytest.importorskip("pydantic_ai", reason=needs)
from pydantic_ai.models.openai import OpenAIChatModel  # noqa: E402
from pydantic_ai.providers.openai import OpenAIProvider  # noqa: E402

MODEL = "windrose-demo"
CAPITAL = "What is the capital of France?"
TIME = "What time is it in Hamburg?"
HANA = "Extract JSON: Hana is 48 and lives in Warsaw."


class Person(pydantic.BaseModel):
    """What the demo model reads out of a sentence."""

    name: str
    age: int
    city: str


PERSON = Person(name="Hana", age=48, city="Warsaw")


CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
# As the demo model has seen it: what clients derive from a function has titles and more, which put it off.
TOOL = {
    "type": "function",
    "function": {
        "name": "get_time",
        "description": "Get the time in a city.",
        "parameters": CITY,
    },
}


def tell_time(city: str) -> str:
    assert city == "Hamburg"
    return json.dumps({"time": "15:43"})


def with_time(ask: Callable[[], str]) -> str:
    """Asks again if the time was miscopied, as the demo model does after one call's random id in some 750."""
    answer = ask()
    return answer if "15:43" in answer else ask()


class get_time(pydantic.BaseModel):  # noqa: N801: the name of the tool that is made of it
    """Get the time in a city."""

    city: str


class TestLangChain:
    @pytest.fixture
    def model(self, server: Server) -> langchain_openai.ChatOpenAI:
        return langchain_openai.ChatOpenAI(
            model=MODEL, base_url=server.url + "/v1", api_key="none", temperature=0, max_retries=0
        )

    def test_chat(self, model: langchain_openai.ChatOpenAI) -> None:
        answer = model.invoke(CAPITAL)
        assert "Paris" in answer.content
        assert answer.usage_metadata["output_tokens"] > 0
        assert answer.response_metadata["finish_reason"] == "stop"

    def test_stream(self, model: langchain_openai.ChatOpenAI) -> None:
        chunks = list(model.stream(CAPITAL, stream_usage=True))
        assert len([chunk for chunk in chunks if chunk.content]) > 1
        whole = sum(chunks[1:], chunks[0])
        assert whole.content == model.invoke(CAPITAL).content
        assert whole.usage_metadata["output_tokens"] > 0

    def test_tool(self, model: langchain_openai.ChatOpenAI) -> None:
        bound = model.bind_tools([TOOL])
        call = bound.invoke(TIME).tool_calls[0]
        assert (call["name"], call["args"]) == ("get_time", {"city": "Hamburg"})
        chunks = list(bound.stream(TIME))
        streamed = sum(chunks[1:], chunks[0]).tool_calls[0]
        assert (streamed["name"], streamed["args"]) == (call["name"], call["args"])

    @pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
    def test_structured_output(self, model: langchain_openai.ChatOpenAI, method: str) -> None:
        assert model.with_structured_output(Person, method=method).invoke(HANA) == PERSON

    def test_a_context_that_is_too_long_has_its_class(self, model: langchain_openai.ChatOpenAI) -> None:
        with pytest.raises(langchain_openai.chat_models.base.OpenAIContextOverflowError):
            model.invoke("word " * 5000)


class TestLiteLLM:
    @pytest.fixture
    def options(self, server: Server) -> dict[str, object]:
        return {
            "model": f"openai/{MODEL}",
            "api_base": server.url + "/v1",
            "api_key": "none",
            "temperature": 0,
            "max_retries": 0,
        }

    def test_chat(self, options: dict[str, object]) -> None:
        answer = litellm.completion(messages=[{"role": "user", "content": CAPITAL}], **options)
        assert "Paris" in answer.choices[0].message.content
        assert answer.usage.completion_tokens > 0

    def test_stream(self, options: dict[str, object]) -> None:
        messages = [{"role": "user", "content": CAPITAL}]
        chunks = list(litellm.completion(messages=messages, stream=True, **options))
        whole = litellm.stream_chunk_builder(chunks, messages=messages)
        assert whole.choices[0].message.content == (
            litellm.completion(messages=messages, **options).choices[0].message.content
        )
        assert whole.choices[0].finish_reason == "stop"

    def test_tool(self, options: dict[str, object]) -> None:
        def ask() -> str:
            messages = [{"role": "user", "content": TIME}]
            answer = litellm.completion(messages=messages, tools=[TOOL], **options)
            assert answer.choices[0].finish_reason == "tool_calls"
            call = answer.choices[0].message.tool_calls[0]
            function = (call.function.name, json.loads(call.function.arguments))
            assert function == ("get_time", {"city": "Hamburg"})
            messages += [answer.choices[0].message]
            messages += [{"role": "tool", "tool_call_id": call.id, "content": tell_time("Hamburg")}]
            answer = litellm.completion(messages=messages, tools=[TOOL], **options)
            return answer.choices[0].message.content

        assert "15:43" in with_time(ask)

    def test_structured_output(self, options: dict[str, object]) -> None:
        messages = [{"role": "user", "content": HANA}]
        answer = litellm.completion(messages=messages, response_format=Person, **options)
        assert Person.model_validate_json(answer.choices[0].message.content) == PERSON

    def test_errors_have_their_classes(self, options: dict[str, object]) -> None:
        with pytest.raises(litellm.ContextWindowExceededError):
            litellm.completion(messages=[{"role": "user", "content": "word " * 5000}], **options)
        with pytest.raises(litellm.NotFoundError):
            litellm.completion(
                messages=[{"role": "user", "content": CAPITAL}], **(options | {"model": "openai/gpt-9"})
            )


class TestPydanticAI:
    @pytest.fixture
    def model(self, server: Server) -> OpenAIChatModel:
        provider = OpenAIProvider(base_url=server.url + "/v1", api_key="none")
        return OpenAIChatModel(MODEL, provider=provider, settings={"temperature": 0})

    def test_chat(self, model: OpenAIChatModel) -> None:
        result = pydantic_ai.Agent(model).run_sync(CAPITAL)
        assert "Paris" in result.output
        assert result.usage.output_tokens > 0

    def test_stream(self, model: OpenAIChatModel) -> None:
        agent = pydantic_ai.Agent(model)
        result = agent.run_stream_sync(CAPITAL)
        pieces = list(result.stream_text(delta=True, debounce_by=None))
        assert len(pieces) > 1
        assert "".join(pieces) == agent.run_sync(CAPITAL).output

    def test_tool(self, model: OpenAIChatModel) -> None:
        tool = pydantic_ai.Tool.from_schema(tell_time, "get_time", "Get the time in a city.", CITY)
        tool.strict = False

        def ask() -> str:
            result = pydantic_ai.Agent(model, tools=[tool]).run_sync(TIME)
            parts = [part for message in result.all_messages() for part in message.parts]
            calls = [part for part in parts if part.part_kind == "tool-call"]
            functions = [(call.tool_name, call.args_as_dict()) for call in calls]
            assert functions == [("get_time", {"city": "Hamburg"})]
            return result.output

        assert "15:43" in with_time(ask)

    def test_structured_output(self, model: OpenAIChatModel) -> None:
        person = pydantic_ai.Agent(model, output_type=pydantic_ai.NativeOutput(Person))
        assert person.run_sync(HANA).output == PERSON
        tool = pydantic_ai.ToolOutput(get_time, name="get_time", description="Get the time in a city.")
        assert pydantic_ai.Agent(model, output_type=tool).run_sync(TIME).output == get_time(city="Hamburg")


class TestInstructor:
    @pytest.fixture
    def options(self) -> dict[str, object]:
        messages = [{"role": "user", "content": TIME}]
        return {"model": MODEL, "temperature": 0, "max_retries": 0, "messages": messages}

    def test_chat(self, server: Server, options: dict[str, object]) -> None:
        client = instructor.from_openai(server.client())
        options |= {"messages": [{"role": "user", "content": CAPITAL}]}
        answer = client.chat.completions.create(response_model=None, **options)
        assert "Paris" in answer.choices[0].message.content

    def test_stream(self, server: Server, options: dict[str, object]) -> None:
        client = instructor.from_openai(server.client())
        partials = list(client.chat.completions.create_partial(response_model=get_time, **options))
        assert len(partials) > 1
        # The description is worded otherwise here, which puts the demo model off: any city will do.
        assert isinstance(partials[-1].city, str)

    def test_tool(self, server: Server, options: dict[str, object]) -> None:
        client = instructor.from_openai(server.client(), mode=instructor.Mode.TOOLS)
        assert client.chat.completions.create(response_model=get_time, **options).city == "Hamburg"

    def test_structured_output(self, server: Server, options: dict[str, object]) -> None:
        """Puts the schema in the prompt too, which the demo model does not read: only the shape is judged."""
        client = instructor.from_openai(server.client(), mode=instructor.Mode.JSON_SCHEMA)
        assert isinstance(client.chat.completions.create(response_model=get_time, **options), get_time)
