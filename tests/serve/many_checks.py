"""Many requests at once: each is answered as if it were alone, and those who leave leave nothing behind."""

import json
import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor

from form_checks import NO_THINKING, SCHEMAS, TOOLS, schema_format
from harness import check, said, same, streamed

QUESTIONS = [
    "What is 23 + 45?",
    "What is 90 - 37?",
    "Sort these numbers: 5 3 9",
    "Hello!",
    "How many letters a are in banana?",
    "What time is it 2 hours after 3:15?",
]


def requests(seed):
    """So many different requests: greedy, sampled, in a form, with tools, long and short."""
    draw = random.Random(seed)
    made = []
    for i in range(32):
        options = {"max_tokens": draw.choice([5, 40, 120])}
        match i % 6:
            case 0 | 1:
                options |= {"temperature": 0}
            case 2 | 3:
                options |= {"temperature": draw.choice([1.0, 1.4]), "seed": draw.randrange(1000), "top_p": 0.95}
            case 4:
                options |= {"temperature": 1.2, "seed": i, "response_format": schema_format("code", SCHEMAS["code"])}
                options |= {"max_tokens": 200, "extra_body": NO_THINKING}
            case _:
                options |= {"temperature": 1.2, "seed": i, "tools": list(TOOLS.values()), "tool_choice": "required"}
                options |= {"max_tokens": 300, "extra_body": NO_THINKING, "n": 2}
        question = draw.choice(QUESTIONS)
        messages = [{"role": "user", "content": question}]
        if draw.random() < 0.3:
            messages.insert(0, {"role": "system", "content": "You are a helpful assistant. " * draw.choice([1, 30])})
        made.append((messages, options))
    return made


@check
def thirty_two_threads_get_what_each_gets_alone(server):
    asked = requests(1)
    alone = [said(server.chat(messages, **options)) for messages, options in asked]

    def ask(i):
        messages, options = asked[i]
        if i % 2:
            return streamed(server.chat(messages, stream=True, **options))
        return said(server.chat(messages, **options))

    with ThreadPoolExecutor(32) as pool:
        for i, found in enumerate(pool.map(ask, range(32))):
            same(found, alone[i], f"request {i} {asked[i][1]}")
    server.idle()


@check
def who_leaves_in_mid_stream_frees_the_place(server):
    server.idle()
    # Requests that would write for long, left after the first bytes.
    body = {
        "model": server.model,
        "messages": [{"role": "user", "content": "Hello!"}],
        "stream": True,
        "max_tokens": 3000,
        "temperature": 1.5,
        "n": 2,
        "response_format": {"type": "json_object"},
        "logit_bias": {str(t): -100 for t in server.post("/tokenize", {"prompt": '"}'})["tokens"]},
    }
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    if server.key:
        head += f"Authorization: Bearer {server.key}\r\n"
    sockets = []
    for _ in range(12):
        connection = socket.create_connection((server.parts.hostname, server.parts.port), timeout=30)
        connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        sockets.append(connection)
    for connection in sockets:
        assert connection.recv(64).startswith(b"HTTP/1.1 200"), "the stream begins"
    for connection in sockets:
        connection.close()
    server.idle(5)
    same(said(server.chat("What is 23 + 45?", temperature=0))[0][1].strip(), "68")


@check
def the_metrics_count_what_was_done(server):
    before = server.metrics()
    completion = server.chat("What is 23 + 45?", temperature=0)
    # Counted when the answer has gone out, which may be a moment after it has come in.
    time.sleep(0.2)
    after = server.metrics()
    grown = lambda name: after.get(name, 0) - before.get(name, 0)
    same(grown("m1_generated_tokens_total"), completion.usage.completion_tokens)
    same(grown("m1_prompt_tokens_total"), completion.usage.prompt_tokens)
    same(grown("m1_cached_tokens_total"), completion.usage.prompt_tokens_details.cached_tokens)
    same(grown('m1_requests_total{route="/v1/chat/completions",status="200"}'), 1)
    same(grown("m1_time_to_first_token_seconds_count"), 1)
    same(grown("m1_time_between_tokens_seconds_count"), completion.usage.completion_tokens - 1)
    for name in ("m1_time_to_first_token_seconds", "m1_time_between_tokens_seconds"):
        buckets = [value for key, value in after.items() if key.startswith(f"{name}_bucket")]
        same(buckets, sorted(buckets), "cumulative")
        same(buckets[-1], after[f"{name}_count"], "the last bucket holds all")
    status, headers, text = server.request("GET", "/metrics", key=True)
    assert b"# EOF" in text or headers["content-type"].startswith("text/plain"), headers
    status, _, body = server.request("GET", "/health")
    same(status, 200, repr(body))
