"""Answers in a form: JSON, schemas, tools. The model was trained for none of them, so what holds is held by force."""

import json
import uuid
from enum import Enum

import openai
from jsonschema import Draft202012Validator
from pydantic import BaseModel, Field

from harness import Streamed, check, is_json, refused, said, same, streamed

NO_THINKING = {"thinking": {"type": "disabled"}}

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 3},
        "home": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 8}, "owned": {"type": "boolean"}},
            "required": ["city", "owned"],
            "additionalProperties": False,
        },
        "note": {"anyOf": [{"type": "null"}, {"type": "string", "maxLength": 5}]},
    },
    "required": ["name", "age", "tags", "home", "note"],
    "additionalProperties": False,
}
SCHEMAS = {
    "person": PERSON,
    "code": {
        "type": "object",
        "properties": {
            "code": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{2,4}$"},
            "kind": {"const": "code"},
            "size": {"type": "number", "minimum": -1, "maximum": 1},
        },
        "required": ["code", "kind"],
        "additionalProperties": False,
    },
    "pair": {
        "$defs": {"digit": {"type": "integer", "minimum": 0, "maximum": 9}},
        "type": "object",
        "properties": {"left": {"$ref": "#/$defs/digit"}, "right": {"$ref": "#/$defs/digit"}},
        "required": ["left", "right"],
        "additionalProperties": False,
    },
    "choice": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2},
}


def schema_format(name, schema, strict=True):
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema, "strict": strict}}


@check
def every_json_object_is_one(server):
    finished = 0
    for temperature in (1.0, 1.25, 1.5):
        # What this model says it never ends by itself: a bias for the closing brace and the quote helps it along.
        completion = server.chat(
            "Give me an object.",
            response_format={"type": "json_object"},
            temperature=temperature,
            top_p=1,
            n=12,
            seed=int(temperature * 100),
            max_tokens=400,
            extra_body=NO_THINKING,
            logit_bias=closing(server),
        )
        for choice in completion.choices:
            if choice.finish_reason == "stop":
                finished += 1
                value = json.loads(choice.message.content)
                assert isinstance(value, dict), value
            else:
                same(choice.finish_reason, "length")
                assert choice.message.content.lstrip()[:1] == "{", choice.message.content[:40]
    assert finished >= 24, f"only {finished} of 36 came to an end"


def closing(server):
    """Token ids of what ends strings and objects, with a bias."""
    ids = {}
    for text, bias in (("}", 6), ('"', 6), ('"}', 6), (":", 3)):
        tokens = server.post("/tokenize", {"prompt": text})["tokens"]
        if len(tokens) == 1:
            ids[str(tokens[0])] = bias
    return ids


@check
def every_sample_is_valid_against_its_schema(server):
    for name, schema in SCHEMAS.items():
        Draft202012Validator.check_schema(schema)
        validator = Draft202012Validator(schema)
        for temperature in (1.0, 1.5):
            completion = server.chat(
                "Fill in the form.",
                response_format=schema_format(name, schema),
                temperature=temperature,
                top_p=1,
                n=10,
                seed=7,
                max_tokens=1000,
                extra_body=NO_THINKING,
            )
            texts = [choice.message.content for choice in completion.choices]
            for choice in completion.choices:
                same(choice.finish_reason, "stop", f"{name}: {choice.message.content[:200]}")
                validator.validate(json.loads(choice.message.content))
            assert len(set(texts)) > 1, f"{name}: {texts}"


@check
def schemas_that_hold_themselves_are_held_too(server):
    node = {
        "type": "object",
        "properties": {
            "value": {"type": "integer", "minimum": 0, "maximum": 9},
            "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
        },
        "required": ["value", "next"],
        "additionalProperties": False,
    }
    tree = {"$defs": {"node": node}, "$ref": "#/$defs/node"}
    [null] = server.post("/tokenize", {"prompt": "n"})["tokens"]
    completion = server.chat(
        "Fill in the form.",
        response_format=schema_format("tree", tree),
        temperature=1.5,
        n=8,
        seed=7,
        max_tokens=1000,
        extra_body=NO_THINKING,
        logit_bias={str(null): 4},  # a tree need not end by itself
    )
    ended = [choice.message.content for choice in completion.choices if choice.finish_reason == "stop"]
    for text in ended:
        Draft202012Validator(tree).validate(json.loads(text))
    assert len(ended) >= 4, [choice.finish_reason for choice in completion.choices]


@check
def thinking_comes_before_a_form_and_is_free(server):
    options = {"response_format": schema_format("code", SCHEMAS["code"]), "temperature": 0, "max_tokens": 600}
    whole = server.chat("What is 23 + 45?", **options)
    [(thought, content, _, finish)] = said(whole)
    same(finish, "stop")
    Draft202012Validator(SCHEMAS["code"]).validate(json.loads(content))
    assert "68" in thought, thought
    same(streamed(server.chat("What is 23 + 45?", stream=True, **options)), said(whole))


@check
def models_of_pydantic_are_parsed(server):
    class Colour(Enum):
        red = "red"
        blue = "blue"

    class Thing(BaseModel):
        colour: Colour
        count: int = Field(ge=0, le=99)
        heavy: bool

    for seed in range(3):
        parsed = server.client.chat.completions.parse(
            model=server.model,
            messages=[{"role": "user", "content": "Describe a thing."}],
            response_format=Thing,
            temperature=1.2,
            seed=seed,
            max_tokens=300,
            extra_body=NO_THINKING,
        )
        thing = parsed.choices[0].message.parsed
        assert isinstance(thing, Thing) and 0 <= thing.count <= 99, thing


@check
def forms_that_cannot_be_held_are_refused(server):
    ask = lambda form: server.chat("x", response_format=form, max_tokens=5)
    for form in (
        {"type": "yaml"},
        {"type": "json_schema"},
        schema_format("x", {"type": "nonsense"}),
        schema_format("x", {"type": "string", "pattern": "(unclosed"}),
        schema_format("x", {"$ref": "#/$defs/absent"}),
        schema_format("x", {"$ref": "https://example.com/schema.json"}),
        schema_format("x", {"type": "integer", "minimum": 5, "maximum": 4}),
    ):
        error = refused(lambda form=form: ask(form), openai.BadRequestError)
        assert "response_format" in (error.body["param"] or "") + error.body["message"], error.body


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 10},
                "unit": {"enum": ["celsius", "fahrenheit"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 7},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {
    "type": "function",
    "function": {
        "name": "set_alarm",
        "parameters": {
            "type": "object",
            "properties": {"hour": {"type": "integer", "minimum": 0, "maximum": 23}, "repeat": {"type": "boolean"}},
            "required": ["hour", "repeat"],
            "additionalProperties": False,
        },
    },
}
TOOLS = {tool["function"]["name"]: tool for tool in (WEATHER, CLOCK)}
LIMITS = {"max_tokens": 800, "extra_body": NO_THINKING}


def valid(calls):
    """Calls of known tools, with arguments that their schemas allow and ids of their own."""
    assert calls, "no call"
    same(len({call.id for call in calls}), len(calls), "ids of calls")
    for call in calls:
        same(call.type, "function")
        schema = TOOLS[call.function.name]["function"]["parameters"]
        Draft202012Validator(schema).validate(json.loads(call.function.arguments))


@check
def a_required_call_is_made_and_valid(server):
    names = set()
    for temperature in (1.0, 1.5):
        completion = server.chat(
            "What is the weather in Paris?",
            tools=list(TOOLS.values()),
            tool_choice="required",
            parallel_tool_calls=False,
            temperature=temperature,
            top_p=1,
            n=8,
            seed=3,
            **LIMITS,
        )
        for choice in completion.choices:
            same(choice.finish_reason, "tool_calls", str(choice.message))
            valid(choice.message.tool_calls)
            assert not choice.message.content, choice.message.content
            names |= {call.function.name for call in choice.message.tool_calls}
    same(names, set(TOOLS), "both tools are called by some")


@check
def a_named_call_is_the_one_made(server):
    for name in TOOLS:
        for seed in range(4):
            completion = server.chat(
                "Hello!",
                tools=list(TOOLS.values()),
                tool_choice={"type": "function", "function": {"name": name}},
                temperature=1.3,
                seed=seed,
                **LIMITS,
            )
            calls = completion.choices[0].message.tool_calls
            valid(calls)
            same({call.function.name for call in calls}, {name})


@check
def several_calls_are_all_valid(server):
    counts = set()
    for seed in range(4):
        options = {"tools": list(TOOLS.values()), "tool_choice": "required", "temperature": 1.5, "seed": seed, **LIMITS}
        choice = server.chat("Hello!", **options).choices[0]
        # Nothing taught this model to end: the limit may cut off the last one.
        assert choice.finish_reason in ("tool_calls", "length"), choice
        calls = choice.message.tool_calls
        if choice.finish_reason == "length" and not is_json(calls[-1].function.arguments):
            calls = calls[:-1]
        valid(calls)
        counts.add(len(calls))
    assert max(counts) > 1, counts


@check
def one_call_where_several_are_not_wanted(server):
    for seed in range(4):
        completion = server.chat(
            "Hello!",
            tools=list(TOOLS.values()),
            tool_choice="required",
            parallel_tool_calls=False,
            temperature=1.5,
            seed=seed,
            **LIMITS,
        )
        same(len(completion.choices[0].message.tool_calls), 1)


@check
def fragments_of_calls_put_together_are_the_calls(server):
    for seed in range(4):
        options = {
            "tools": list(TOOLS.values()),
            "tool_choice": "required",
            "temperature": 1.3,
            "seed": seed,
            **LIMITS,
        }
        whole = server.chat("Wake me at seven.", **options)
        chunks = list(server.chat("Wake me at seven.", stream=True, **options))
        same(streamed(chunks), said(whole), f"seed {seed}")
        fragments = [part for chunk in chunks for c in chunk.choices for part in c.delta.tool_calls or []]
        calls = whole.choices[0].message.tool_calls
        # More pieces than calls: arguments come as they are written.
        assert len(fragments) > 2 * len(calls), (len(fragments), len(calls))
    # Thinking goes before a call, and is apart from it.
    options = {"tools": [WEATHER], "tool_choice": "required", "temperature": 0, "max_tokens": 1200}
    whole = server.chat("What is 23 + 45?", **options)
    assert whole.choices[0].message.tool_calls and said(whole)[0][0], whole
    same(streamed(server.chat("What is 23 + 45?", stream=True, **options)), said(whole))


@check
def a_call_that_the_limit_cuts_off_is_told_as_far_as_it_came(server):
    named = {"type": "function", "function": {"name": "get_weather"}}
    options = {"tools": [WEATHER], "tool_choice": named, "temperature": 1.3, "seed": 5, "extra_body": NO_THINKING}
    full = server.chat("Hello!", max_tokens=800, **options)
    [(_, _, [(name, arguments)], finish)] = said(full)
    same(finish, "tool_calls")
    cut = 0
    for limit in range(1, full.usage.completion_tokens):
        whole = server.chat("Hello!", max_tokens=limit, **options)
        same(streamed(server.chat("Hello!", max_tokens=limit, stream=True, **options)), said(whole), f"at {limit}")
        [(_, content, calls, finish)] = said(whole)
        same((content, finish), ("", "length"))
        if calls:
            same(calls[0][0], name)
            said_so_far = calls[0][1].rstrip("\ufffd")  # half a character is one that is none
            assert arguments.startswith(said_so_far), (calls, arguments)
            cut += not is_json(calls[0][1])
    assert cut > 3, f"only {cut} limits fell into the arguments"


@check
def a_round_trip_with_a_tool(server):
    messages = [{"role": "user", "content": f"What is the weather in Paris? {uuid.uuid4()}"}]
    named = {"type": "function", "function": {"name": "get_weather"}}
    first = server.chat(messages, tools=[WEATHER], tool_choice=named, temperature=1, seed=1, **LIMITS)
    message = first.choices[0].message
    messages.append(message.model_dump(exclude_none=True))
    for call in message.tool_calls:
        messages.append({"role": "tool", "tool_call_id": call.id, "content": json.dumps({"degrees": 21})})
    second = server.chat(messages, tools=[WEATHER], temperature=0, max_tokens=40)
    assert second.usage.prompt_tokens > first.usage.prompt_tokens + 10, second.usage
    assert second.choices[0].finish_reason in ("stop", "length", "tool_calls"), second
    # The tools are part of the prompt; "none" calls none of them.
    bare = server.chat("Hello!", temperature=0, max_tokens=40).usage.prompt_tokens
    none = server.chat("Hello!", tools=[WEATHER], tool_choice="none", temperature=0, max_tokens=40)
    same(none.choices[0].message.tool_calls, None)
    auto = server.chat("Hello!", tools=[WEATHER], temperature=0, max_tokens=40)
    assert auto.usage.prompt_tokens > bare + 40, (auto.usage, bare)


@check
def tools_that_cannot_be_called_are_refused(server):
    tool = lambda **function: [{"type": "function", "function": {"name": "f", **function}}]
    for options, param in (
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": "maybe"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "absent"}}}, "tool_choice"),
        ({"tools": [{"type": "retrieval"}]}, "tools"),
        ({"tools": tool(name="has space")}, "tools"),
        ({"tools": tool(parameters={"type": "nonsense"}, strict=True), "tool_choice": "required"}, "tools"),
        ({"tools": tool(parameters=7)}, "tools"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
    ):
        error = refused(lambda options=options: server.chat("x", max_tokens=5, **options), openai.BadRequestError)
        assert (error.body["param"] or "").startswith(param), error.body
    orphan = [{"role": "user", "content": "x"}, {"role": "tool", "tool_call_id": "call_x", "content": "y"}]
    refused(lambda: server.chat(orphan, max_tokens=5), openai.BadRequestError, text="tool_call_id")


@check
def a_stream_of_a_form_is_valid_at_its_end(server):
    stream = server.chat(
        "Fill in the form.",
        response_format=schema_format("person", PERSON),
        temperature=1.5,
        top_p=1,
        n=4,
        seed=21,
        max_tokens=1000,
        extra_body=NO_THINKING,
        stream=True,
    )
    s = Streamed(stream)
    same(set(s.finish.values()), {"stop"})
    for text in s.content.values():
        Draft202012Validator(PERSON).validate(json.loads(text))
