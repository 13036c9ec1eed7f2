"""What is wrong is told: OpenAI's exceptions and error bodies, and statuses of plain HTTP."""

import json
import socket

import openai

from harness import check, refused, same

HELLO = [{"role": "user", "content": "Hello!"}]


@check
def fields_with_wrong_values_are_named(server):
    for options, param in (
        ({"temperature": -1}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"seed": "x"}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": [7]}, "stop"),
        ({"presence_penalty": 9}, "presence_penalty"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"extra_body": {"top_k": -5}}, "top_k"),
        ({"extra_body": {"min_p": 2}}, "min_p"),
        ({"extra_body": {"thinking": {"type": "sometimes"}}}, "thinking.type"),
        ({"extra_body": {"thinking": {"type": "enabled", "budget_tokens": -1}}}, "thinking.budget_tokens"),
        ({"extra_body": {"no_such_field": 1}}, "no_such_field"),
    ):
        refused(lambda options=options: server.chat(HELLO, **options), openai.BadRequestError, param=param)
    # A field of OpenAI's that would change the answer is refused, not dropped.
    refused(lambda: server.chat(HELLO, modalities=["audio"]), openai.BadRequestError)


@check
def messages_that_are_none_are_refused(server):
    for messages in (
        [],
        [{"role": "wizard", "content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,x"}}]}],
        ["Hello!"],
    ):
        error = refused(lambda messages=messages: server.chat(messages), openai.BadRequestError)
        assert (error.body["param"] or "").startswith("messages"), error.body


@check
def other_models_and_paths_are_not_found(server):
    for call in (server.chat, server.complete):
        refused(lambda: call("x", model="gpt-4"), openai.NotFoundError, param="model", code="model_not_found")
    refused(lambda: server.client.embeddings.create(model=server.model, input="x"), openai.NotFoundError)
    status, headers, body = server.request("GET", "/v1/chat/completions")
    same((status, "message" in json.loads(body)["error"]), (405, True))
    same(server.request("GET", "/no/such/path")[0], 404)


@check
def a_prompt_beyond_the_context_is_refused_with_the_numbers(server):
    context = server.post("/tokenize", {"prompt": "x"}).get("max_model_len", 4096)
    error = refused(
        lambda: server.chat("a b c d e f g h " * context), openai.BadRequestError, code="context_length_exceeded"
    )
    assert str(context) in error.body["message"], error.body
    refused(
        lambda: server.complete([5] * context, max_tokens=5), openai.BadRequestError, code="context_length_exceeded"
    )


@check
def bodies_that_are_no_requests_are_refused(server):
    path = "/v1/chat/completions"
    good = json.dumps({"model": server.model, "messages": HELLO, "max_tokens": 1}).encode()
    for body, wanted in (
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b"null", 400),
        (b"\xff\xfe", 400),
        (b'{"messages": ' + b"[" * 5000, 400),
        (good[:-1] + b', "seed": 1e400}', 400),
    ):
        status, headers, text = server.request("POST", path, body)
        same(status, wanted, repr(body[:40]))
        same(headers["content-type"].split(";")[0], "application/json")
        assert json.loads(text)["error"]["message"], text
    same(server.request("POST", path, good)[0], 200)
    same(server.request("POST", path, good, headers={"content-type": "text/plain"})[0], 415)
    # Beyond the limit of a body, said before or found on the way.
    large = json.dumps({"model": server.model, "messages": [{"role": "user", "content": "x" * (64 << 20)}]}).encode()
    try:
        same(server.request("POST", path, large)[0], 413)
    except (BrokenPipeError, ConnectionResetError):
        pass  # the server hangs up in the middle of it
    same(server.request("POST", path, good)[0], 200)


@check
def what_is_no_http_ends_its_connection_alone(server):
    address = (server.parts.hostname, server.parts.port)
    for data in (b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"POST /v1/chat/completions HTTP/1.1\r\nContent-Le"):
        with socket.create_connection(address, timeout=10) as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            connection.recv(4096)
    same(server.request("GET", "/health")[0], 200)


@check
def a_key_is_asked_for_where_one_is_set(server):
    if not server.key:
        same(server.request("GET", "/v1/models", headers={"authorization": "Bearer whatever"})[0], 200)
        return
    for key in (None, "wrong", server.key + "x", server.key[:-1]):
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        for method, path in (("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("POST", "/tokenize")):
            status, _, text = server.request(method, path, {} if method == "POST" else None, headers, key=False)
            same((status, json.loads(text)["error"]["code"]), (401, "invalid_api_key"), f"{path} with {key!r}")
    other = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
    refused(lambda: other.models.list(), openai.AuthenticationError, code="invalid_api_key")
    same(server.request("GET", "/health", key=False)[0], 200)
