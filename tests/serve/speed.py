"""How fast a server is: many requests at once, a first word while a long prompt is read, a second turn.

    m1 serve --model DIR --port 8000 --parallel 16 &
    python3 tests/serve/speed.py --url http://127.0.0.1:8000 [--only batch,prefill,turn]
    m1 serve --model DIR --port 8000 --context 131072 &
    python3 tests/serve/speed.py --url http://127.0.0.1:8000 --only long --pid $!

Only Python's standard library. Prompts are token ids, so that any server of the same vocabulary does the same work; ids that
end a text are forbidden by `logit_bias`, so that each reply has its full length. One line of JSON for each figure.
"""
import argparse, http.client, json, random, statistics, threading, time
from urllib.parse import urlparse

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--url", required=True)
parser.add_argument("--only", default="batch,prefill,turn")
parser.add_argument("--vocab", type=int, default=200, help="ids of the prompts are below this")
parser.add_argument("--end", default="", help="ids that end a text, comma-separated: forbidden")
parser.add_argument("--tokens", type=int, default=128, help="tokens of each reply of the batch")
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--pid", type=int, help="the server's process, whose memory is told in the long conversation")
a = parser.parse_args()
where = urlparse(a.url)
bias = {id: -100 for id in a.end.split(",") if id}


def connect():
    return http.client.HTTPConnection(where.hostname, where.port, timeout=600)


def post(path, body, connection=None):
    """The answer, whole."""
    connection = connection or connect()
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    data = json.loads(answer.read())
    assert answer.status == 200, data
    return data


def events(path, body):
    """The events of a stream, with the time at which each comes; the last one has the usage."""
    connection = connect()
    connection.request("POST", path, json.dumps(body | {"stream": True, "stream_options": {"include_usage": True}}), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    for line in answer:
        if line.startswith(b"data: {"):
            yield time.perf_counter(), json.loads(line[6:])


def first_token(path, body):
    """Seconds to the first event with something in it, and the usage at the end."""
    begin, first = time.perf_counter(), None
    for now, event in events(path, body):
        for choice in event["choices"]:
            delta = choice.get("delta") or {}
            if first is None and (choice.get("text") or delta.get("content") or delta.get("reasoning_content")):
                first = now - begin
    return first, event["usage"]


def tokens_of(body):
    """When each token of a completion comes, and how many come with it; the usage at the end."""
    for now, event in events("/v1/completions", body | {"logprobs": 0}):
        tokens = sum(len((choice.get("logprobs") or {}).get("tokens", [])) for choice in event["choices"])
        yield now, tokens, event.get("usage")


def gaps(body, enough):
    """Seconds between the tokens of a reply, until it is enough of it."""
    times = []
    for now, tokens, _ in tokens_of(body):
        times += [now] * min(tokens, 1)
        if enough():
            break
    return [b - a for a, b in zip(times, times[1:])]


def rate(body):
    """Tokens a second between the first and the last of a reply, and its usage."""
    told = list(tokens_of(body))
    come = [(now, tokens) for now, tokens, _ in told if tokens]
    return sum(tokens for _, tokens in come[1:]) / (come[-1][0] - come[0][0]), told[-1][2]


def prompt(n, seed):
    rng = random.Random(seed)
    return [rng.randrange(10, a.vocab) for _ in range(n)]


def completion(n, seed, tokens):
    return {"prompt": prompt(n, seed), "max_tokens": tokens, "seed": seed, "temperature": 1, "top_p": 1, "logit_bias": bias}


def tell(**figures):
    print(json.dumps(figures), flush=True)


def batch():
    """16 requests one after another, and so many at once, in turn: a machine's speed changes from minute to minute."""

    def run(at_once, round):
        todo, made, lock = [completion(64, 1000 * at_once + 100 * round + i, a.tokens) for i in range(16)], [], threading.Lock()

        def work():
            connection = connect()
            while True:
                with lock:
                    if not todo:
                        return
                    body = todo.pop()
                usage = post("/v1/completions", body, connection)["usage"]
                with lock:
                    made.append(usage["completion_tokens"])

        begin = time.perf_counter()
        threads = [threading.Thread(target=work) for _ in range(at_once)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert made == [a.tokens] * 16, made
        return sum(made) / (time.perf_counter() - begin)

    rounds = [{at_once: run(at_once, round) for at_once in [1, 4, 16]} for round in range(a.rounds)]
    for at_once in [1, 4, 16]:
        rate = statistics.median(round[at_once] for round in rounds)
        ratios = sorted(round[at_once] / round[1] for round in rounds)
        tell(test="batch", at_once=at_once, tokens_per_second=round_(rate), against_one=round_(statistics.median(ratios)), least=round_(ratios[0]), most=round_(ratios[-1]))


def prefill():
    """First words of short requests, and the gaps in a reply under way, alone and while a prompt of 16K tokens is read."""
    short = lambda i: first_token("/v1/completions", completion(20, i, 2))[0]
    alone = [short(i) for i in range(40)]
    gaps_alone = gaps(completion(20, 1, 200), lambda: False)
    times, waits, took = [], [], 0
    for round in range(a.rounds):
        done = threading.Event()

        def long():
            nonlocal took
            begin = time.perf_counter()
            post("/v1/completions", completion(16384, 5000 + round, 1))
            took = time.perf_counter() - begin
            done.set()

        thread = threading.Thread(target=long)
        reply = threading.Thread(target=lambda: waits.extend(gaps(completion(20, 3000 + round, 3000), done.is_set)))
        reply.start()
        time.sleep(0.3)
        thread.start()
        i = 0
        while not done.is_set():
            times.append(short(100 + 1000 * round + i))
            i += 1
            time.sleep(0.01)
        thread.join()
        reply.join()
    ms = lambda values, q: round_(1000 * sorted(values)[min(len(values) - 1, int(q * len(values)))])
    tell(test="first token", beside="nothing", requests=len(alone), p50_ms=ms(alone, 0.5), p99_ms=ms(alone, 0.99))
    tell(test="first token", beside="a prompt of 16384 tokens", requests=len(times), p50_ms=ms(times, 0.5), p99_ms=ms(times, 0.99), prompt_s=round_(took))
    for beside, values in [("nothing", gaps_alone), ("a prompt of 16384 tokens, and short ones", waits)]:
        tell(test="between tokens", beside=beside, tokens=len(values), p50_ms=ms(values, 0.5), p99_ms=ms(values, 0.99), most_ms=ms(values, 1))


def turn():
    """The second turn of a conversation of 8K tokens, read anew and from the cache."""
    cold, warm = [], []
    for round in range(a.rounds):
        rng = random.Random(9000 + round)
        text = " ".join(str(rng.randrange(10, 99)) for _ in range(2700))
        ask = lambda messages: {"messages": messages, "max_tokens": 24, "temperature": 0, "logit_bias": bias}
        first = [{"role": "user", "content": text}]
        seconds, usage = first_token("/v1/chat/completions", ask(first))
        assert usage["prompt_tokens_details"]["cached_tokens"] == 0, usage
        cold.append(seconds)
        said = post("/v1/chat/completions", ask(first))["choices"][0]["message"]
        second = first + [{k: said.get(k) for k in ("role", "content", "reasoning_content")}, {"role": "user", "content": f"What is {round} + 25?"}]
        seconds, usage = first_token("/v1/chat/completions", ask(second))
        warm.append(seconds)
        cached, tokens = usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens"]
    cold, warm = statistics.median(cold), statistics.median(warm)
    tell(test="second turn", prompt_tokens=tokens, cached_tokens=cached, cold_ms=round_(1000 * cold), cached_ms=round_(1000 * warm), ratio=round_(cold / warm))


def memory():
    """MiB of the server's process."""
    if a.pid:
        status = dict(line.split(":", 1) for line in open(f"/proc/{a.pid}/status"))
        return {"resident_mib": int(status["VmRSS"].split()[0]) // 1024, "most_mib": int(status["VmHWM"].split()[0]) // 1024}
    return {}


def long():
    """A conversation that grows to 100,000 tokens, 4,096 a turn; then as many at once, of another text."""
    text = prompt(100_000, 77)
    for tokens in [1000, *range(4096, 100_000, 4096), 100_000]:
        begin = time.perf_counter()
        speed, usage = rate(completion(0, 1, 65) | {"prompt": text[:tokens]})
        tell(test="long", prompt_tokens=tokens, cached_tokens=usage["prompt_tokens_details"]["cached_tokens"], tokens_per_second=round_(speed), seconds=round_(time.perf_counter() - begin), **memory())
    begin = time.perf_counter()
    speed, usage = rate(completion(100_000, 78, 65))
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0
    tell(test="long, read at once", prompt_tokens=100_000, tokens_per_second=round_(speed), seconds=round_(time.perf_counter() - begin), **memory())


def round_(x):
    return float(f"{x:.4g}")


for name in a.only.split(","):
    {"batch": batch, "prefill": prefill, "turn": turn, "long": long}[name]()
