"""The official OpenAI client on /v1/responses, and Anthropic's on /v1/messages, against the real binary."""

from __future__ import annotations

import json

import anthropic
import openai
import pytest
from windrose import Server

CAPITAL = "What is the capital of France?"
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "get_weather", "description": "Current weather in a city", "parameters": PARAMETERS}


def respond(server: Server, **options: object) -> openai.types.responses.Response:
    settings = {"model": "windrose-demo", "input": CAPITAL, "temperature": 0}
    return server.client().responses.create(**(settings | options))


def claude(server: Server, **options: object) -> anthropic.types.Message:
    client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
    settings = {"model": "windrose-demo", "max_tokens": 60, "extra_body": {"temperature": 0}}
    settings["messages"] = [{"role": "user", "content": CAPITAL}]
    return client.messages.create(**(settings | options))


def test_a_response_is_what_a_chat_answers(server: Server) -> None:
    response = respond(server)
    question = [{"role": "user", "content": CAPITAL}]
    chat = server.client().chat.completions.create(model="windrose-demo", messages=question, temperature=0)
    assert response.output_text == chat.choices[0].message.content
    assert (response.status, response.error, response.incomplete_details) == ("completed", None, None)
    assert response.usage.output_tokens == chat.usage.completion_tokens
    assert response.model_validate(response.model_dump(), strict=False) == response


def test_a_streamed_response_is_the_same(server: Server) -> None:
    whole = respond(server)
    with server.client().responses.stream(model="windrose-demo", input=CAPITAL, temperature=0) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.output_text == whole.output_text
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    numbers = [event.sequence_number for event in events if hasattr(event, "sequence_number")]
    assert numbers == sorted(numbers)
    assert events[-1].type == "response.completed"


def test_responses_are_kept_and_gone_on_from(server: Server) -> None:
    client = server.client()
    first = respond(server)
    second = respond(server, input="And of Italy?", previous_response_id=first.id)
    assert second.previous_response_id == first.id
    assert client.responses.retrieve(second.id).output_text == second.output_text
    roles = [item.role for item in client.responses.input_items.list(second.id, order="asc", limit=2)]
    assert roles == ["user", "assistant", "user"]
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError) as refused:
        respond(server, previous_response_id=first.id)
    assert refused.value.code == "previous_response_not_found"


def test_a_response_calls_tools_and_reads_their_results(server: Server) -> None:
    question = {"role": "user", "content": "What is the weather in Oslo?"}
    options = {"input": [question], "tools": [{"type": "function", "strict": False} | WEATHER]}
    response = respond(server, **options)
    calls = [item for item in response.output if item.type == "function_call"]
    if not calls:
        pytest.skip("the demo model did not call the tool")
    assert (calls[0].name, json.loads(calls[0].arguments)["city"]) == ("get_weather", "Oslo")
    result = {"type": "function_call_output", "call_id": calls[0].call_id, "output": '{"degrees": 7}'}
    answer = respond(server, input=[result], previous_response_id=response.id, tools=options["tools"])
    assert answer.output_text
    sent_back = [question, *[item.model_dump(exclude_none=True) for item in response.output], result]
    assert respond(server, input=sent_back, tools=options["tools"]).output_text == answer.output_text


def test_a_cut_response_is_incomplete(server: Server) -> None:
    response = respond(server, max_output_tokens=2)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    with pytest.raises(openai.BadRequestError) as refused:
        respond(server, background=True)
    assert refused.value.body["param"] == "background"


def test_a_message_is_what_a_chat_answers(server: Server) -> None:
    message, response = claude(server), respond(server)
    assert message.content[0].text == response.output_text
    assert (message.stop_reason, message.usage.output_tokens) == ("end_turn", response.usage.output_tokens)
    assert claude(server, max_tokens=2).stop_reason == "max_tokens"


def test_a_streamed_message_is_the_same(server: Server) -> None:
    client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
    question = [{"role": "user", "content": CAPITAL}]
    settings = {"model": "windrose-demo", "max_tokens": 60, "messages": question}
    settings["extra_body"] = {"temperature": 0}
    whole = client.messages.create(**settings)
    with client.messages.stream(**settings) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[0].text == final.content[0].text
    assert final.stop_reason == whole.stop_reason
    counted = client.messages.count_tokens(model="windrose-demo", messages=question)
    usage = whole.usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


def test_a_message_calls_tools(server: Server) -> None:
    tool = {"name": "get_weather", "description": WEATHER["description"], "input_schema": PARAMETERS}
    question = [{"role": "user", "content": "What is the weather in Oslo?"}]
    message = claude(server, messages=question, tools=[tool])
    calls = [block for block in message.content if block.type == "tool_use"]
    if not calls:
        pytest.skip("the demo model did not call the tool")
    assert (message.stop_reason, calls[0].input["city"]) == ("tool_use", "Oslo")


def test_anthropics_errors_have_its_classes(server: Server, start, tmp_path) -> None:
    with pytest.raises(anthropic.BadRequestError) as refused:
        claude(server, extra_body={"temperature": 9})
    assert refused.value.body["error"]["type"] == "invalid_request_error"
    with pytest.raises(anthropic.NotFoundError):
        claude(server, model="gpt-9")
    keys = tmp_path / "keys"
    keys.write_text("a-key\n")
    with pytest.raises(anthropic.AuthenticationError):
        claude(start("--api-keys-file", str(keys)))
