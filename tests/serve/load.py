"""Puts a running server under load, and holds it to what it gives each request alone.

python load.py --url http://127.0.0.1:8000 --pid PID [--seconds 20] [--streams 64] [--key KEY] [--term]

So many clients at once stream answers; some leave in the middle, some read slowly, some send bodies that are too large
or none at all. Checked: every answer is, to the letter, that of the same request alone, and what came of one that was
left is its beginning; nothing runs or waits afterwards; memory beyond the cache, open files and threads are those from
before. With --term the process gets SIGTERM while all clients stream, some of them answers that take longer than it may go on:
every stream ends as HTTP ends one, what came is a beginning, and the process ends (its status is for whoever started
it). Times to the first token and between tokens are printed. Exit status 1 if
anything fails.
"""

import argparse
import asyncio
import collections
import json
import os
import random
import re
import signal
import socket
import sys
import time

import harness

QUESTIONS = [
    "What is {a} + {b}?",
    "What is {c} - {a}?",
    "Sort these numbers: {a} {b} {c}",
    "Hello!",
    "Which is larger, {a} or {b}?",
    "Solve x + {a} = {c}.",
]
FORM = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 4},
    },
    "required": ["name", "sizes"],
    "additionalProperties": False,
}
MIB = 1 << 20
# A delta that is not empty.
SAYS = re.compile(rb'"(?:reasoning_)?content":\s*"[^"]')


def make_requests(model, count, draw):
    """Different requests, each with a text of its own: greedy or with a seed."""
    made = []
    for i in range(count):
        numbers = {"a": draw.randrange(10, 50), "b": draw.randrange(50, 90), "c": draw.randrange(90, 100)}
        messages = [{"role": "user", "content": draw.choice(QUESTIONS).format(**numbers)}]
        if i % 4 == 0:
            # Longer ones, several of which share their beginning.
            messages.insert(0, {"role": "system", "content": "Please reason step by step. " * draw.choice([5, 40])})
        body = {"model": model, "messages": messages, "max_tokens": draw.choice([16, 60, 150])}
        body |= {"temperature": 0} if i % 2 else {"temperature": draw.choice([1.0, 1.5]), "seed": draw.randrange(10**6)}
        if i % 7 == 0:
            body["response_format"] = {"type": "json_schema", "json_schema": {"name": "form", "schema": FORM}}
        made.append(body)
    return made


def make_endless(server, count):
    """Requests whose answers take long: the end of a turn is forbidden."""
    [end] = server.post("/tokenize", {"prompt": "<end_of_sentence>"})["tokens"]
    return [
        {
            "model": server.model,
            "messages": [{"role": "user", "content": f"What is {i} + {i}?"}],
            "max_tokens": 3900,
            "temperature": 1,
            "seed": i,
            "logit_bias": {str(end): -100},
        }
        for i in range(count)
    ]


def answer_of(server, body):
    """What a request gets where it is alone: thinking, content and why it ended."""
    choice = server.post("/v1/chat/completions", body)["choices"][0]
    message = choice["message"]
    return message.get("reasoning_content") or "", message["content"] or "", choice["finish_reason"]


class Failure(Exception):
    """Something that must not happen."""


class Client:
    """One connection after another, byte by byte under our control."""

    def __init__(self, server):
        self.host, self.port = server.parts.hostname, server.parts.port
        self.key = server.key

    def head(self, length, path="/v1/chat/completions"):
        """A request's head; without a length the body comes in chunks."""
        key = f"Authorization: Bearer {self.key}\r\n" if self.key else ""
        size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
        return (
            f"POST {path} HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: application/json\r\n{key}{size}\r\n"
            "Connection: close\r\n\r\n"
        ).encode()

    async def connect(self, small_buffer=False):
        connection = socket.socket()
        connection.setblocking(False)
        if small_buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await asyncio.get_running_loop().sock_connect(connection, (self.host, self.port))
        return await asyncio.open_connection(sock=connection, limit=4096 if small_buffer else 65536)

    async def answer(self, reader):
        """Status and a generator of the body's pieces, which raises where the body does not end as it should."""
        head = await reader.readuntil(b"\r\n\r\n")
        status = int(head.split(b" ", 2)[1])
        fields = dict(
            (name.strip().lower(), value.strip()) for name, value in (l.split(b":", 1) for l in head.split(b"\r\n")[1:-2])
        )

        async def body():
            if fields.get(b"transfer-encoding") == b"chunked":
                while size := int(await reader.readline(), 16):
                    yield await reader.readexactly(size)
                    await reader.readexactly(2)
                await reader.readexactly(2)
            else:
                yield await reader.readexactly(int(fields.get(b"content-length", b"0")))

        return status, body()


def put_together(data):
    """Thinking, content and the reason of the end of a stream's events; the last may be cut off."""
    thinking, content, finish, done = "", "", None, False
    for event in data.decode(errors="replace").split("\n\n")[:-1]:
        if event.startswith(":"):
            continue
        if not event.startswith("data: "):
            raise Failure(f"no event: {event[:100]!r}")
        if event == "data: [DONE]":
            done = True
            continue
        chunk = json.loads(event[6:])
        if "error" in chunk:
            finish = "error"
            continue
        for choice in chunk["choices"]:
            thinking += choice["delta"].get("reasoning_content") or ""
            content += choice["delta"].get("content") or ""
            finish = choice["finish_reason"] or finish
    return thinking, content, finish, done


class Load:
    """The clients and what they saw."""

    def __init__(self, server, requests, alone):
        self.client = Client(server)
        self.requests, self.alone = requests, alone
        self.first, self.between = [], []
        self.done = collections.Counter()
        self.failures = []
        self.ending = False
        self.active = 0

    def begins_as(self, index, found, whole):
        """What came must be the answer, or its beginning where it was left."""
        wanted, got = self.alone[index][:2], found[:2]
        if whole:
            if (*got, found[2]) != self.alone[index] or not found[3]:
                raise Failure(f"request {index}: {found!r} is not {self.alone[index]!r}")
        elif not (wanted[0].startswith(got[0]) and wanted[1].startswith(got[1])):
            raise Failure(f"request {index}: {got!r} is not the beginning of {wanted!r}")

    async def stream(self, index, draw, leave=False, slow=False):
        """Streams an answer; may leave after some bytes, or read slowly."""
        body = json.dumps({**self.requests[index], "stream": True}).encode()
        reader, writer = await self.client.connect(small_buffer=slow)
        try:
            start, last = time.monotonic(), None
            writer.write(self.client.head(len(body)) + body)
            await writer.drain()
            # Where the answer is awaited no longer: at once, or after some events.
            patience = draw.choice([0, 1, 3, 10, 30]) if leave else None
            if patience == 0:
                await asyncio.sleep(draw.random() * 0.05)
                return "left before the answer"
            status, pieces = await self.client.answer(reader)
            if status == 503 and self.ending:
                return "refused at the end"
            if status != 200:
                raise Failure(f"status {status}: {b''.join([p async for p in pieces])[:300]!r}")
            data, events = b"", 0
            async for piece in pieces:
                now = time.monotonic()
                count = piece.count(b"\n\n")
                if not slow and SAYS.search(piece):
                    if last is None:
                        self.first.append(now - start)
                    else:
                        self.between.append(now - last)
                    last = now
                events += count
                data += piece
                if patience is not None and events >= patience:
                    self.begins_as(index, put_together(data), whole=False)
                    return "left in the middle"
                if slow and events < 60:
                    await asyncio.sleep(draw.random() * 0.08)
            found = put_together(data)
            if self.ending and (found[2] in (None, "error") or not found[3]):
                self.begins_as(index, found, whole=False)
                return "ended early by the end"
            self.begins_as(index, found, whole=True)
            return "read slowly" if slow else "streamed"
        finally:
            writer.close()

    async def whole(self, index, draw):
        """An answer in one piece."""
        body = json.dumps(self.requests[index]).encode()
        reader, writer = await self.client.connect()
        try:
            writer.write(self.client.head(len(body)) + body)
            status, pieces = await self.client.answer(reader)
            data = b"".join([piece async for piece in pieces])
            if status == 503 and self.ending:
                return "refused at the end"
            if status != 200:
                raise Failure(f"status {status}: {data[:300]!r}")
            [choice] = json.loads(data)["choices"]
            message = choice["message"]
            found = (message.get("reasoning_content") or "", message["content"] or "", choice["finish_reason"])
            self.begins_as(index, (*found, True), whole=True)
            return "answered whole"
        finally:
            writer.close()

    async def wrong(self, index, draw):
        """What is no request: too large, malformed, or never finished."""
        good = json.dumps(self.requests[index]).encode()
        kind = draw.choice(["long", "longer", "json", "field", "half", "slow", "noise"])
        reader, writer = await self.client.connect()
        try:
            match kind:
                case "long":  # says so
                    writer.write(self.client.head(1 << 30) + good)
                    wanted = {413}
                case "longer":  # and one that does not
                    writer.write(self.client.head(None))
                    piece = b"%x\r\n%s\r\n" % (MIB, b" " * MIB)
                    for _ in range(64):
                        writer.write(piece)
                        await writer.drain()
                    wanted = {413}
                case "json":
                    body = draw.choice([b"", b"{", good[:-1], b"\x00" * 100, b"[" * 2000, b'"' + b"\\u0000" * 50])
                    writer.write(self.client.head(len(body)) + body)
                    wanted = {400}
                case "field":
                    body = json.dumps({**self.requests[index], draw.choice(["n", "stop", "top_p", "nonsense"]): -1}).encode()
                    writer.write(self.client.head(len(body)) + body)
                    wanted = {400}
                case "half":
                    writer.write(self.client.head(len(good)) + good[: len(good) // 2])
                    await writer.drain()
                    return "left in its own body"
                case "slow":
                    for byte in self.client.head(len(good))[:20]:
                        writer.write(bytes([byte]))
                        await writer.drain()
                        await asyncio.sleep(0.02)
                    return "left in its own head"
                case "noise":
                    writer.write(draw.randbytes(200) + b"\r\n\r\n")
                    await writer.drain()
                    await asyncio.wait_for(reader.read(1000), 30)
                    return "sent noise"
            status, pieces = await self.client.answer(reader)
            if status not in wanted and not (self.ending and status == 503):
                raise Failure(f"{kind}: status {status}, and not {wanted}")
            json.loads(b"".join([piece async for piece in pieces]))["error"]["message"]
            return f"refused: {status}"
        except (ConnectionResetError, BrokenPipeError, asyncio.IncompleteReadError):
            # The server need not read what it will not take.
            if kind in ("long", "longer", "noise"):
                return "hung up on"
            raise
        finally:
            writer.close()

    async def client_loop(self, number, until, seed, calm):
        """One client, one thing after another."""
        draw = random.Random(f"{seed} {number}")
        while time.monotonic() < until and not self.ending:
            index = draw.randrange(len(self.requests))
            roll = draw.random()
            self.active += 1
            try:
                if calm or roll < 0.6:
                    what = await asyncio.wait_for(self.stream(index, draw), 300)
                elif roll < 0.75:
                    what = await asyncio.wait_for(self.stream(index, draw, leave=True), 300)
                elif roll < 0.82:
                    what = await asyncio.wait_for(self.stream(index, draw, slow=True), 300)
                elif roll < 0.9:
                    what = await asyncio.wait_for(self.whole(index, draw), 300)
                else:
                    what = await asyncio.wait_for(self.wrong(index, draw), 300)
                self.done[what] += 1
            except Failure as e:
                self.failures.append(str(e))
            except (ConnectionError, asyncio.IncompleteReadError) as e:
                # After SIGTERM nobody listens, but a stream that was begun must end as HTTP ends one.
                if self.ending and isinstance(e, (ConnectionRefusedError, ConnectionResetError)):
                    self.done["refused at the end"] += 1
                elif self.ending and isinstance(e, asyncio.IncompleteReadError) and not e.partial and e.expected is None:
                    self.done["refused at the end"] += 1
                else:
                    self.failures.append(f"request {index}: {type(e).__name__}: {e}")
            except TimeoutError:
                self.failures.append(f"request {index}: stuck for 300 s")
            finally:
                self.active -= 1

    async def run(self, streams, seconds, seed, calm=False):
        until = time.monotonic() + seconds
        await asyncio.gather(*(self.client_loop(i, until, seed, calm) for i in range(streams)))

    async def terminate(self, streams, pid):
        """SIGTERM while all stream; returns the seconds until nobody is left."""
        clients = asyncio.gather(*(self.client_loop(i, time.monotonic() + 600, "end", True) for i in range(streams)))
        await asyncio.sleep(2)
        assert self.active == streams, f"{self.active} of {streams} are at it"
        start = time.monotonic()
        self.ending = True
        os.kill(pid, signal.SIGTERM)
        await clients
        while alive(pid):
            if time.monotonic() - start > 60:
                raise Failure("the process is there 60 s after SIGTERM")
            await asyncio.sleep(0.05)
        return time.monotonic() - start


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


class Process:
    """What the server's process holds."""

    def __init__(self, server, pid):
        with open(f"/proc/{pid}/status") as status:
            fields = dict(line.split(":", 1) for line in status)
        self.memory = int(fields["VmRSS"].split()[0]) * 1024
        self.threads = int(fields["Threads"])
        self.files = len(os.listdir(f"/proc/{pid}/fd"))
        self.cache = int(server.metrics()["m1_cache_bytes"])

    def __str__(self):
        return (
            f"{self.memory / MIB:.0f} MiB ({self.cache / MIB:.0f} MiB of them cached), {self.files} files, "
            f"{self.threads} threads"
        )


def tell(ok, line):
    print(f"{'ok   ' if ok else 'FAIL '} {line}", flush=True)
    return 0 if ok else 1


def milliseconds(seconds):
    """p50, p90, p99 and the largest."""
    if not seconds:
        return "none"
    ordered = sorted(seconds)
    at = lambda q: 1000 * ordered[min(len(ordered) - 1, int(q * len(ordered)))]
    return f"p50 {at(0.5):.1f}, p90 {at(0.9):.1f}, p99 {at(0.99):.1f}, most {at(1):.1f} ms"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", required=True)
    parser.add_argument("--pid", type=int, required=True, help="the server's process")
    parser.add_argument("--key", help="API key that the server asks for")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--requests", type=int, default=40, help="different ones, each answered alone first")
    parser.add_argument("--slack", type=int, default=48, metavar="MIB", help="memory that may stay beyond the cache")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--term", action="store_true", help="end with SIGTERM while all stream")
    args = parser.parse_args()

    server = harness.Server(args.url, args.key)
    requests = make_requests(server.model, args.requests, random.Random(args.seed))
    start = time.monotonic()
    alone = [answer_of(server, body) for body in requests]
    print(f"      {len(alone)} requests alone in {time.monotonic() - start:.1f} s", flush=True)

    failed = 0
    # The first part brings memory to where load takes it; what grows from one to the next after that is a leak.
    parts = [0.3, 0.7] if args.seconds < 60 else [0.1, 0.45, 0.45]
    server.idle()
    held = []
    for part, share in enumerate(parts):
        load = Load(server, requests, alone)
        asyncio.run(load.run(args.streams, args.seconds * share, args.seed + part))
        did = ", ".join(f"{count} {what}" for what, count in sorted(load.done.items()))
        failed += tell(not load.failures, f"{args.streams} clients for {args.seconds * share:.0f} s: {did}")
        for line in load.failures[:5]:
            print(f"        {line[:600]}", flush=True)
        print(f"      first token: {milliseconds(load.first)}; between tokens: {milliseconds(load.between)}", flush=True)
        try:
            server.idle(15)
            failed += tell(True, "nothing runs and nothing waits afterwards")
        except AssertionError as e:
            failed += tell(False, str(e))
        held.append(Process(server, args.pid))
        print(f"      the process holds {held[-1]}", flush=True)
    first, last = held[-2], held[-1]
    grown = (last.memory - last.cache) - (first.memory - first.cache)
    failed += tell(grown <= args.slack * MIB, f"memory beside the cache has grown by {grown / MIB:.1f} MiB")
    failed += tell(last.files <= first.files + 2, f"{first.files} open files before, {last.files} after")
    failed += tell(last.threads <= first.threads + 2, f"{first.threads} threads before, {last.threads} after")

    if args.term:
        endless = make_endless(server, 4)
        load = Load(server, requests[:12] + endless, alone[:12] + [answer_of(server, body) for body in endless])
        try:
            seconds = asyncio.run(load.terminate(args.streams, args.pid))
        except (Failure, AssertionError) as e:
            load.failures.append(str(e))
            seconds = float("nan")
        did = ", ".join(f"{count} {what}" for what, count in sorted(load.done.items()))
        failed += tell(not load.failures, f"SIGTERM with {args.streams} streams, gone after {seconds:.1f} s: {did}")
        for line in load.failures[:5]:
            print(f"        {line[:600]}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
