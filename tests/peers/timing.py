"""The tests by their names in llama-bench (`pp512`, `tg128 @ d4096`), timed as `m1 bench` times them."""
import json, re, statistics, time


def parse(tests):
    """`pp512,tg128 @ d4096` as (name, tokens, decode, depth)."""
    for name in tests.split(","):
        kind, tokens, depth = re.fullmatch(r"(pp|tg)(\d+)(?: @ d(\d+))?", name.strip()).groups()
        yield name.strip(), int(tokens), kind == "tg", int(depth or 0)


def result(name, tokens, seconds, **more):
    rates = [tokens / s for s in seconds]
    deviation = statistics.stdev(rates) if len(rates) > 1 else 0.0
    return {"test": name, "avg_ts": statistics.mean(rates), "stddev_ts": deviation, "samples_ts": rates} | more


def measure(engine, tests, repetitions):
    """A depth is filled once and taken up again for every repetition, the first (not counted) for warming up."""
    for name, tokens, decode, depth in parse(tests):
        engine.fill(depth, tokens)
        seconds = []
        for repetition in range(repetitions + 1):
            engine.restore()
            start = time.perf_counter()
            engine.read(tokens if repetition else min(tokens, 8 if decode else 1024), decode)
            if repetition:
                seconds.append(time.perf_counter() - start)
        yield result(name, tokens, seconds)


def emit(about, results):
    for r in results:
        print(json.dumps(about | r), flush=True)
