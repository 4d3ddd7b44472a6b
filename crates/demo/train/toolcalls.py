"""The tool skill: when to call, what to emit, and how to answer from a result.

The model emits `[TOOL_CALLS] [{"name": ..., "arguments": {...}}]` without an id. A server adds one
later, so the conversations that end in an answer carry ids of several kinds, or none.
"""

import json
import string
from dataclasses import dataclass

import tables
from skills import REFUSAL, Draw, Example, arithmetic, facts, translate, user


@dataclass(frozen=True)
class Tool:
    name: str
    description: str
    parameters: dict[str, str]  # name to JSON type

    def schema(self) -> dict:
        """The tool as an OpenAI request describes it."""
        properties = {name: {"type": kind} for name, kind in self.parameters.items()}
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.description,
                "parameters": {
                    "type": "object",
                    "properties": properties,
                    "required": list(properties),
                },
            },
        }


TOOLS = {
    tool.name: tool
    for tool in [
        Tool("get_weather", "Get the weather in a city.", {"city": "string"}),
        Tool("get_time", "Get the time in a city.", {"city": "string"}),
        Tool("calculate", "Calculate an expression.", {"expression": "string"}),
        Tool("send_message", "Send a message.", {"to": "string", "text": "string"}),
        Tool("set_timer", "Set a timer.", {"minutes": "integer"}),
        Tool("search", "Search the web.", {"query": "string"}),
    ]
}


def draw_tool(d: Draw) -> str:
    """Any tool; in training more often the calculator, the hardest to copy from."""
    names = list(TOOLS)
    return d.choice(names if d.held_out else [*names, "calculate", "calculate"])


@dataclass(frozen=True)
class Use:
    """One use of a tool: the question, the arguments, a result and the answer made of it."""

    name: str
    question: str
    arguments: dict
    result: dict
    answer: str


def draw_use(d: Draw, name: str) -> Use:
    """Draws one use of the named tool. Only arguments are split into train and eval."""
    if name == "get_weather":
        asked = ["What is the weather in {}?", "How is the weather in {}?"]
        question, city = d.unseen(lambda: (d.choice(asked), d.choice(tables.CITIES)))
        degrees, sky = d.randint(2, 35), d.choice(["sunny", "rainy", "cloudy", "windy"])
        answer = f"In {city} it is {degrees} degrees and {sky}."
        return Use(
            name, question.format(city), {"city": city}, {"degrees": degrees, "sky": sky}, answer
        )
    if name == "get_time":
        asked = ["What time is it in {}?", "Tell me the time in {}."]
        question, city = d.unseen(lambda: (d.choice(asked), d.choice(tables.CITIES)))
        time = f"{d.randint(0, 23):02}:{d.randint(0, 59):02}"
        return Use(
            name, question.format(city), {"city": city}, {"time": time}, f"It is {time} in {city}."
        )
    if name == "calculate":
        a, sign, b = d.unseen(lambda: (d.randint(100, 999), d.choice("+-*/"), d.randint(10, 999)))
        expression, value = f"{a} {sign} {b}", d.randint(100, 9999)
        question = d.choice(["What is {}?", "Calculate {}."]).format(expression)
        return Use(
            name, question, {"expression": expression}, {"value": value}, f"{expression} = {value}"
        )
    if name == "send_message":
        to, noun, colour = d.unseen(
            lambda: (d.choice(tables.NAMES), d.choice(tables.WORDS), d.choice(tables.COLOURS))
        )
        text = d.choice(["the {n} is {c}", "bring the {c} {n}", "I found a {c} {n}"])
        text = text.format(n=noun, c=colour)
        question = d.choice(["Send a message to {}: {}", "Tell {} this: {}"]).format(to, text)
        answer = f"The message to {to} is sent."
        return Use(name, question, {"to": to, "text": text}, {"sent": True}, answer)
    if name == "set_timer":
        _, minutes = d.unseen(lambda: (name, d.randint(2, 99)))
        question = d.choice(["Set a timer for {} minutes.", "Wake me in {} minutes."])
        answer = f"The timer is set for {minutes} minutes."
        return Use(name, question.format(minutes), {"minutes": minutes}, {"ok": True}, answer)
    adjective, noun = d.unseen(lambda: (d.choice(tables.COLOURS), d.choice(tables.WORDS)))
    query, title = (
        f"{adjective} {noun}",
        f"The {d.choice(tables.WORDS)} of {d.choice(tables.CITIES)}",
    )
    question = d.choice(["Search for {}.", "Search the web for {}."]).format(query)
    return Use(name, question, {"query": query}, {"title": title}, f"I found this: {title}")


def draw_id(d: Draw) -> str:
    alphabet = string.ascii_letters + string.digits
    size = d.choice([9, 9, 16, 24])
    return ("" if size == 9 else "call_") + "".join(d.choices(alphabet, k=size))


def tool_call(d: Draw) -> Example:
    """Tools are offered: call the right one, answer without, or refuse if none fits."""
    wanted = draw_tool(d)
    use = draw_use(d, wanted)
    others = d.sample([name for name in TOOLS if name != wanted], d.choice([0, 0, 0, 1, 1, 2]))
    kind = d.choices(["call", "plain", "missing"], [0.8, 0.12, 0.08])[0]
    if kind == "plain" or (kind == "missing" and wanted not in ("get_weather", "get_time")):
        # An expression is either within the model's reach or a case for the calculator, never both.
        aside = d.choice([arithmetic, facts, translate])(d)
        tools = offer(d, others or [wanted])
        return Example("tools", aside.answer, aside.messages, tools=tools)
    if kind == "missing":
        tools = offer(d, others or ["set_timer"])
        return Example("tools", REFUSAL, [user(use.question)], tools=tools)
    call = json.dumps([{"name": use.name, "arguments": use.arguments}])
    return Example(
        "tools", call, [user(use.question)], tools=offer(d, [wanted, *others]), is_call=True
    )


def tool_answer(d: Draw) -> Example:
    """The tool has answered: say it in a sentence."""
    wanted = draw_tool(d)
    use = draw_use(d, wanted)
    others = d.sample([name for name in TOOLS if name != wanted], d.choice([0, 0, 0, 1]))
    call: dict = {"type": "function", "function": {"name": use.name, "arguments": use.arguments}}
    result = {"role": "tool", "content": json.dumps(use.result)}
    if d.random() < 0.5:
        call["id"] = result["tool_call_id"] = draw_id(d)
    messages = [user(use.question), {"role": "assistant", "tool_calls": [call]}, result]
    return Example("tools", use.answer, messages, tools=offer(d, [wanted, *others]))


def tools(d: Draw) -> Example:
    return tool_call(d) if d.random() < 0.5 else tool_answer(d)


def offer(d: Draw, names: list[str]) -> list[dict]:
    d.shuffle(names)
    return [TOOLS[name].schema() for name in names]
