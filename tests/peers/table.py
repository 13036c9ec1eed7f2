"""Results as Markdown: ours, the peers, the ratio to the better peer, and the share of what the machine allows.

    python table.py results.jsonl

The last line of a case stands. The bound of a decode is the rate of reading memory over the bytes that a token reads: its weights, and the
keys and values of all tokens before it (in f32, as m1 keeps them). That of prefill and training is the highest rate in that dtype, for bf16
in either, of PyTorch's and OpenBLAS's product of 2048 x 2048 matrices and of multiply-adds on registers alone, against the FLOPs that m1
counts (model/src/flops.rs). All rates are those measured right before the case (a shared host is not the same machine from minute to minute).
"""
import json, statistics, sys

from checkpoint import config

lines = [json.loads(line) for path in sys.argv[1:] for line in open(path)]
cells = {}
for x in lines:
    if x["engine"] != "machine":
        who = x["engine"].split()[0]
        cells.setdefault((x["model"], x["format"], x["test"]), {})[who] = x

rates = {}
for x in lines:
    if x["engine"] == "machine":
        rates.setdefault(f"{x['test']} ({x['n_threads']} threads, {x['unit']})", []).append(x["best"])
print("| limit of the machine | measured | lowest | median | highest |\n|---|--:|--:|--:|--:|")
for test, seen in rates.items():
    print(f"| {test} | {len(seen)} times | {min(seen):.0f} | {statistics.median(seen):.0f} | {max(seen):.0f} |")
print("\n| model | weights | test | m1 | llama.cpp | transformers | m1 / better peer | bound | m1 / bound |")
print("|---|---|---|--:|--:|--:|--:|--:|--:|")


def order(key):
    model, format, test = key
    kind, _, depth = test.partition(" @ d")
    return (test.startswith("train"), ["nano", "small", "base"].index(model), kind[:2] == "tg", int(depth or 0),
            int("".join(filter(str.isdigit, kind))), ["f32", "bf16", "int8", "int4"].index(format))


def kv_bytes(size):
    """Keys and values of a token, in f32."""
    c = config(size, "f32")
    return 2 * 4 * sum(c["attn_type_list"]) * c["num_key_value_heads"] * c["head_dim"]


for key in sorted(cells, key=order):
    model, format, test = key
    by = cells[key]
    rate = lambda who: by[who]["avg_ts"] if who in by else None
    m1, peers = rate("m1"), [r for r in (rate("llama.cpp"), rate("transformers")) if r]
    bound = None
    if "m1" in by:
        ours, limits = by["m1"], by["m1"]["limits"]
        if test.startswith("tg"):
            bytes_ = ours["weight_bytes_per_token"] + kv_bytes(model) * (ours["n_depth"] + ours["n_gen"] / 2)
            bound = limits.get("read", 0) * 1e9 / bytes_
        elif flops := ours.get("gflop_per_s"):
            # bf16 may be multiplied as f32, exactly; int8 and int4 weights have no rate of their own here.
            dtypes = {"f32": ["f32"], "bf16": ["f32", "bf16"]}.get(format, [])
            highest = [limits.get(f"{dtype} {what}", 0) for dtype in dtypes for what in ("matrix, PyTorch", "matrix, OpenBLAS", "multiply-adds")]
            bound = max(highest, default=0) / (flops / m1)
    show = lambda x, d=0: "" if not x else f"{x:,.{d}f}"
    digits = 1 if max([m1 or 0] + peers) < 100 else 0
    noise = " *" if any(x.get("others", 0) > 0.05 for x in by.values()) else ""
    print(f"| {model} | {format} | {test}{noise} | {show(m1, digits)} | {show(rate('llama.cpp'), digits)} | {show(rate('transformers'), digits)} | "
          f"{show(m1 and peers and m1 / max(peers), 2)} | {show(bound, digits)} | {f'{m1 / bound:.0%}' if m1 and bound else ''} |")
if any(x.get("others", 0) > 0.05 for x in lines):
    print("\n\\* other programs took more than 5 % of the processor meanwhile")
