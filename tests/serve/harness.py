"""What the checks of a running server share: a client, plain requests, and a line for each check."""

import http.client
import json
import time
import traceback
from urllib.parse import urlsplit

import openai

CHECKS = []


def check(function):
    """A check is a function of the server, named as what it holds; it fails by raising."""
    CHECKS.append(function)
    return function


class Server:
    """The server under test, through OpenAI's package and by plain requests."""

    def __init__(self, url, key=None, model=None):
        self.url = url.rstrip("/")
        self.key = key
        self.parts = urlsplit(self.url)
        # No retries: an error is to be seen, and a timing to be what it is.
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key or "none", max_retries=0, timeout=120)
        self.model = model or self.client.models.list().data[0].id

    def request(self, method, path, body=None, headers=None, key=True):
        """One plain request: its status, headers (names in lower case) and body as bytes."""
        connection = http.client.HTTPConnection(self.parts.hostname, self.parts.port, timeout=120)
        try:
            head = {"content-type": "application/json"} if body is not None else {}
            if self.key and key:
                head["authorization"] = f"Bearer {self.key}"
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, data, {**head, **(headers or {})})
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def post(self, path, body, **more):
        """The JSON answer to a request that must succeed."""
        status, _, text = self.request("POST", path, body, **more)
        assert status == 200, f"{path}: status {status}: {text[:300]!r}"
        return json.loads(text)

    def chat(self, messages, **options):
        """A chat completion; `messages` may be one question."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        options.setdefault("model", self.model)
        return self.client.chat.completions.create(messages=messages, **options)

    def complete(self, prompt, **options):
        """A text completion."""
        options.setdefault("model", self.model)
        return self.client.completions.create(prompt=prompt, **options)

    def metrics(self):
        """Every sample of /metrics by its name with labels."""
        status, headers, text = self.request("GET", "/metrics")
        assert status == 200, status
        samples = {}
        for line in text.decode().splitlines():
            if line and not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                samples[name] = float(value)
        return samples

    def idle(self, seconds=10.0):
        """Waits until nothing runs and nothing waits; says what does if that takes too long."""
        end = time.monotonic() + seconds
        while True:
            samples = self.metrics()
            busy = {name: samples[name] for name, least in GAUGES.items() if samples[name] > least}
            if not busy:
                return
            assert time.monotonic() < end, f"not idle after {seconds} s: {busy}"
            time.sleep(0.05)


# What they show where nothing is being done; the request for the metrics is one itself.
GAUGES = {"m1_batch_size": 0, "m1_queue_size": 0, "m1_requests_in_flight": 1}


def reasoning(message):
    """The thinking of a message or delta, apart from its content."""
    return getattr(message, "reasoning_content", None) or ""


class Streamed:
    """A streamed chat completion put together again."""

    def __init__(self, chunks):
        self.chunks = list(chunks)
        self.usage = None
        self.content, self.thinking, self.finish, self.calls, self.entries = {}, {}, {}, {}, {}
        for chunk in self.chunks:
            if chunk.usage is not None:
                self.usage = chunk.usage
            for choice in chunk.choices:
                i, delta = choice.index, choice.delta
                assert i not in self.finish, f"choice {i} goes on after its finish_reason"
                self.content[i] = self.content.get(i, "") + (delta.content or "")
                self.thinking[i] = self.thinking.get(i, "") + reasoning(delta)
                if choice.logprobs is not None and choice.logprobs.content:
                    self.entries.setdefault(i, []).extend(choice.logprobs.content)
                for part in delta.tool_calls or []:
                    calls = self.calls.setdefault(i, {})
                    if part.index not in calls:
                        assert part.id and part.function.name, "a call begins with its id and name"
                        assert part.type == "function"
                        assert part.index == len(calls), "calls come in order"
                        calls[part.index] = [part.id, part.function.name, ""]
                    else:
                        assert not part.id and not part.function.name, "id and name come once"
                    calls[part.index][2] += part.function.arguments or ""
                if choice.finish_reason is not None:
                    self.finish[i] = choice.finish_reason


def said(completion):
    """What each choice of a whole completion says: thinking, content, calls without ids, why it ended."""
    return [
        (
            reasoning(choice.message),
            choice.message.content or "",
            [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or []],
            choice.finish_reason,
        )
        for choice in sorted(completion.choices, key=lambda choice: choice.index)
    ]


def streamed(chunks):
    """The same of a stream."""
    s = Streamed(chunks)
    return [
        (s.thinking[i], s.content[i], [(c[1], c[2]) for c in s.calls.get(i, {}).values()], s.finish.get(i))
        for i in sorted(s.content)
    ]


def is_json(text):
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def same(found, wanted, what=""):
    """Equality that shows both sides."""
    assert found == wanted, f"{what}{': ' if what else ''}{found!r} is not {wanted!r}"


def refused(call, error, param=None, code=None, text=None):
    """The exception of OpenAI's package that a call must raise, with an error body as OpenAI's."""
    try:
        call()
    except error as e:
        assert type(e) is error, f"{type(e).__name__} instead of {error.__name__}: {e}"
        body = e.body
        assert isinstance(body, dict) and {"message", "type", "param", "code"} <= body.keys(), f"the body is {body!r}"
        assert body["message"] and body["type"], body
        if param is not None:
            same(body["param"], param, f"param of {body['message']!r}")
        if code is not None:
            same(body["code"], code, f"code of {body['message']!r}")
        if text is not None:
            assert text in body["message"], f"{text!r} is not in {body['message']!r}"
        return e
    except openai.APIError as e:
        raise AssertionError(f"{type(e).__name__} instead of {error.__name__}: {e}") from e
    raise AssertionError(f"no {error.__name__}: the request was taken")


def run(server, only=None):
    """Runs the checks in order, a line for each; returns how many failed."""
    failed = 0
    for function in CHECKS:
        name = function.__name__.replace("_", " ")
        if only and not any(word in name for word in only):
            continue
        start = time.monotonic()
        try:
            function(server)
            print(f"ok    {name} ({time.monotonic() - start:.1f} s)", flush=True)
        except Exception as e:  # each check is told by its own line
            failed += 1
            frames = [f for f in traceback.extract_tb(e.__traceback__) if f.filename.endswith("checks.py")]
            place = f"{frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno}" if frames else "?"
            text = " ".join(f"{type(e).__name__}: {e}".split())
            print(f"FAIL  {name} at {place}: {text[:900]}", flush=True)
    return failed
