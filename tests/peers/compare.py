"""Measures ours and the peers in turn, case by case, and appends lines of JSON to the results. Called by run.sh.

Each command waits until other programs leave the processor alone, and each line says which share of it they took (watch.py).
A command in M1_PEERS_PREFIX is put before each measuring command, to give it a machine of its own.
"""
import argparse, json, os, shlex, subprocess, sys

here = os.path.dirname(os.path.abspath(__file__))
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("sizes", nargs="+")
parser.add_argument("--m1", required=True, help="folder of the binaries m1 and m1-train")
parser.add_argument("--models", required=True)
parser.add_argument("--libraries", required=True, help="folder with llama.cpp's libraries")
parser.add_argument("--results", required=True)
parser.add_argument("--repetitions", default="3")
parser.add_argument("--only", default="", help="comma-separated words; a case must have one of them in its name (`small bf16 tg128 @ d4096`), or end with it if a $ follows")
parser.add_argument("--engines", default="m1,llama,hf")
a = parser.parse_args()

prefix = shlex.split(os.environ.get("M1_PEERS_PREFIX", ""))
environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": str(os.cpu_count())}
model = lambda name: os.path.join(a.models, name)
script = lambda name: [sys.executable, os.path.join(here, name)]


def run(command, extra):
    done = subprocess.run(prefix + script("watch.py") + command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    with open(a.results, "a") as out:
        for line in lines:
            out.write(json.dumps(line | extra) + "\n")
    for line in lines:
        print(f"{line.get('engine', 'm1')[:12]:12} {line.get('model', '')} {line.get('dtype', '')} {line['test']}: "
              f"{line.get('avg_ts', line.get('best')):.1f} (others {line['others']:.0%})", file=sys.stderr)
    if done.returncode:
        print(f"FAILED ({done.returncode}): {shlex.join(command)}\n{done.stderr[-500:]}", file=sys.stderr)
    return lines


ALL, LONG = ("f32,bf16,int8,int4", "m1,llama,hf"), ("bf16", "m1,llama")
#       tests, repetitions, formats and engines: a long context takes minutes to fill, transformers' longer still
CASES = {
    "nano": [],
    "small": [("pp512,pp2048", 0, *ALL), ("tg128", 0, *ALL), ("tg128 @ d4096", 0, *ALL), ("pp8192", 2, *ALL), ("tg128 @ d16384", 2, *ALL),
              ("tg128 @ d100000", 2, *LONG)],
    "base": [("pp512", 0, *ALL), ("tg128", 0, *ALL), ("pp2048", 2, *ALL), ("tg128 @ d4096", 2, *ALL), ("tg128 @ d16384", 2, *LONG),
             ("tg128 @ d100000", 2, *LONG)],
}
#         ours: directory and flags; llama.cpp; transformers
FORMATS = {
    "f32": (("f32", ["--dtype", "f32"]), "f32", "f32"),
    "bf16": (("bf16", ["--dtype", "bf16"]), "bf16", "bf16"),
    "int8": (("bf16", ["--quantize", "int8", "--quantize-all"]), "q8_0", None),
    "int4": (("bf16", ["--quantize", "int4", "--quantize-all"]), "q4_0", None),
}


def ours(tests):
    """As flags of `m1 bench`; a case's tests have one depth."""
    prompts = [t.split()[0][2:] for t in tests.split(",") if t.startswith("pp")]
    decodes = [t.split()[0][2:] for t in tests.split(",") if t.startswith("tg")]
    depth = tests.split("@ d")[1] if "@" in tests else "0"
    return ["-p", ",".join(prompts) or "0", "-n", ",".join(decodes) or "0", "-d", depth]


words = [word for word in a.only.split(",") if word]
matches = lambda word, name: name.endswith(word[:-1]) if word.endswith("$") else word in name
wanted = lambda name: not words or any(matches(word, name) for word in words)


def limits(tests):
    """What the machine can do now: on a shared host that changes from minute to minute."""
    lines = run([os.path.join(a.models, "machine")], {})
    if not tests.startswith("tg"):
        lines += run(script("matrix.py"), {})
    return {"limits": {line["test"]: line["best"] for line in lines}}


for size in a.sizes:
    for tests, repetitions, formats, engines in CASES[size]:
        for name, ((stored, flags), gguf, hf) in FORMATS.items():
            if name not in formats.split(",") or not wanted(f"{size} {name} {tests}"):
                continue
            r = str(repetitions or a.repetitions)
            measured = set(engines.split(",")) & set(a.engines.split(","))
            case = {"model": size, "format": name} | limits(tests)
            if "m1" in measured:
                run([os.path.join(a.m1, "m1"), "bench", "--model", model(f"{size}-{stored}"), "--device", "cpu", "-r", r, "-o", "jsonl"] + flags + ours(tests),
                    case | {"engine": "m1"})
            if "llama" in measured:
                run(script("llama.py") + ["bench", a.libraries, model(f"{size}-{gguf}.gguf"), tests, "--repetitions", r], case)
            if "hf" in measured and hf:
                run(script("hf.py") + ["bench", model(f"{size}-f32"), hf, tests, "--repetitions", r], case)
    if size != "base" and wanted(f"{size} train"):
        case = {"model": size, "format": "f32"} | limits("train")
        if "m1" in a.engines:
            run([os.path.join(a.m1, "m1-train"), "bench", "--model", model(f"{size}-f32"), "--batch", "4", "--tokens", "512", "-r", a.repetitions, "--json"],
                case | {"engine": "m1", "test": "train 4x512"})
        if "hf" in a.engines:
            run(script("hf.py") + ["train", model(f"{size}-f32"), "f32", "4x512", "--repetitions", a.repetitions], case)
