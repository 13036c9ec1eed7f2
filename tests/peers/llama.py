"""Measures llama.cpp, or writes its logits, through the prebuilt library of npm's @node-llama-cpp/linux-x64.

    python llama.py bench  LIBRARIES models/small-q8_0.gguf 'pp512,tg128 @ d4096' --repetitions 3
    python llama.py batch  LIBRARIES models/nano-bf16.gguf 1,4,16 --repetitions 3
    python llama.py turn   LIBRARIES models/nano-bf16.gguf 8144,23
    python llama.py first  LIBRARIES models/nano-bf16.gguf 16384,20
    python llama.py logits LIBRARIES models/nano-f32.gguf ids.json logits.npy

As llama-bench does it: f16 keys and values, flash attention as llama.cpp chooses, micro-batches of 512, a thread pool that
stays. The structures are those of the version that package.json pins; its own defaults are checked before use.
"""
import argparse, ctypes, glob, json, os, re, time
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int, c_int32, c_int8, c_size_t, c_uint32, c_void_p

import numpy as np
from timing import emit, measure


def fields(text):
    """`type name name, type name` as ctypes' list."""
    types = {"i": c_int32, "u": c_uint32, "f": c_float, "b": c_bool, "p": c_void_p, "z": c_size_t}
    return [(name, types[kind]) for part in text.split(",") for kind, *names in [part.split()] for name in names]


class ModelParams(Structure):
    _fields_ = fields(
        "p devices overrides, i n_gpu_layers split_mode load_mode lazy_mode main_gpu, p tensor_split progress progress_data"
        " kv_overrides, b vocab_only check_tensors use_extra_bufts no_host no_alloc load_mtp"
    )


class ContextParams(Structure):
    _fields_ = fields(
        "u n_ctx n_batch n_ubatch n_seq_max n_rs_seq n_outputs n_outputs_seq, i n_threads n_threads_batch ctx_type"
        " rope_scaling pooling attention flash_attn, f rope_base rope_scale yarn_ext yarn_attn yarn_fast yarn_slow,"
        " u yarn_ctx, f defrag, p eval eval_data, i type_k type_v, p abort abort_data,"
        " b embeddings offload_kqv no_perf op_offload swa_full kv_unified, p samplers, z n_samplers, p other"
    )


class Batch(Structure):
    _fields_ = [
        ("n_tokens", c_int32), ("token", POINTER(c_int32)), ("embd", c_void_p), ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)), ("seq_id", POINTER(POINTER(c_int32))), ("logits", POINTER(c_int8)),
    ]


class PoolParams(Structure):
    _fields_ = [("cpumask", c_bool * 512), ("n_threads", c_int)] + fields("i prio, u poll, b strict paused")


LOG = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)


class Llama:
    def __init__(self, libraries, path, threads):
        (main,) = {os.path.dirname(p) for p in glob.glob(libraries + "/**/libllama*.so*", recursive=True) if "common" not in p}
        find = lambda name: next(p for p in sorted(glob.glob(f"{main}/{name}")) if "common" not in p)
        base, ggml, self.lib = (ctypes.CDLL(find(n), ctypes.RTLD_GLOBAL) for n in ("libggml-base*", "libggml.*so*", "libllama.*so*"))
        lib, self.backend = self.lib, ""
        for name, result, arguments in [
            ("model_default_params", ModelParams, []), ("context_default_params", ContextParams, []),
            ("model_load_from_file", c_void_p, [c_char_p, ModelParams]), ("init_from_model", c_void_p, [c_void_p, ContextParams]),
            ("free", None, [c_void_p]), ("decode", c_int32, [c_void_p, Batch]), ("synchronize", None, [c_void_p]),
            ("get_logits_ith", POINTER(c_float), [c_void_p, c_int32]), ("get_memory", c_void_p, [c_void_p]),
            ("memory_clear", None, [c_void_p, c_bool]), ("memory_seq_rm", c_bool, [c_void_p] + [c_int32] * 3), ("batch_init", Batch, [c_int32] * 3), ("log_set", None, [LOG, c_void_p]),
            ("model_get_vocab", c_void_p, [c_void_p]), ("vocab_n_tokens", c_int32, [c_void_p]), ("version", c_char_p, []),
            ("attach_threadpool", None, [c_void_p] * 3),
            ("state_seq_get_size", c_size_t, [c_void_p, c_int32]), ("state_seq_get_data", c_size_t, [c_void_p, c_void_p, c_size_t, c_int32]),
            ("state_seq_set_data", c_size_t, [c_void_p, c_void_p, c_size_t, c_int32]),
        ]:
            function = getattr(lib, "llama_" + name)
            function.restype, function.argtypes = result, arguments
        self._log = LOG(self.log)
        lib.llama_log_set(self._log, None)
        ggml.ggml_backend_load_all_from_path(main.encode())

        params = lib.llama_model_default_params()
        assert (params.n_gpu_layers, params.split_mode, params.use_extra_bufts, params.vocab_only) == (-1, 1, True, False)
        params.n_gpu_layers = 0
        self.model = lib.llama_model_load_from_file(path.encode(), params)
        assert self.model, f"{path}: not loaded"
        self.vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.version = lib.llama_version().decode()

        # The pool is made by the CPU backend, which is found by its name.
        ggml.ggml_backend_reg_by_name.restype, ggml.ggml_backend_reg_by_name.argtypes = c_void_p, [c_char_p]
        address = getattr(base, "ggml_backend_reg_get_proc_address", None) or ggml.ggml_backend_reg_get_proc_address
        address.restype, address.argtypes = c_void_p, [c_void_p, c_char_p]
        new = address(ggml.ggml_backend_reg_by_name(b"CPU"), b"ggml_threadpool_new")
        pool = PoolParams()
        base.ggml_threadpool_params_init.restype, base.ggml_threadpool_params_init.argtypes = None, [c_void_p, c_int]
        base.ggml_threadpool_params_init(ctypes.byref(pool), threads)
        assert (pool.n_threads, pool.poll) == (threads, 50)
        self.pool = ctypes.CFUNCTYPE(c_void_p, c_void_p)(new)(ctypes.byref(pool))
        self.threads, self.context = threads, None

    def log(self, level, text, _):
        text = text.decode("utf-8", "replace")
        if found := re.search(r"libggml-cpu-(\w+)", text):
            self.backend = found[1]
        if level >= 4:
            print(text, end="", flush=True)

    def open(self, n_ctx, flash=-1, kv=1, sequences=1):
        """An empty context of so many tokens, for so many sequences."""
        lib = self.lib
        if self.context:
            lib.llama_free(self.context)
        params = lib.llama_context_default_params()
        seen = (params.n_ctx, params.n_batch, params.n_ubatch, params.n_threads, params.flash_attn, params.type_k, params.type_v, params.offload_kqv)
        assert seen == (512, 2048, 512, 4, -1, 1, 1, True), seen
        params.n_ctx, params.n_threads, params.n_threads_batch = n_ctx, self.threads, self.threads
        params.flash_attn, params.type_k, params.type_v, params.n_seq_max = flash, kv, kv, sequences
        self.context = lib.llama_init_from_model(self.model, params)
        assert self.context, "no context"
        lib.llama_attach_threadpool(self.context, self.pool, None)
        self.batch, self.position = lib.llama_batch_init(2048, 0, 1), 0

    def fill(self, texts):
        """Puts `texts` into the batch: sequence, position of its first id, ids, and whose logits are made: all, last, none."""
        b, n = self.batch, 0
        for sequence, position, ids, logits in texts:
            for at, id in enumerate(ids):
                b.token[n], b.pos[n], b.n_seq_id[n] = int(id), position + at, 1
                b.seq_id[n][0] = sequence
                b.logits[n] = logits == "all" or logits == "last" and at == len(ids) - 1
                n += 1
        b.n_tokens = n

    def decode(self):
        """Computes the batch."""
        assert self.lib.llama_decode(self.context, self.batch) == 0

    def feed(self, ids, all_logits=False):
        """Reads `ids`; logits of the last, or of all of them, are made."""
        out = []
        for start in range(0, len(ids), 2048):
            chunk = ids[start : start + 2048]
            last = start + len(chunk) == len(ids)
            self.fill([(0, self.position, chunk, "all" if all_logits else "last" if last else "none")])
            self.decode()
            self.position += len(chunk)
            if all_logits:
                row = lambda i: np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, i), (self.vocab,)).copy()
                out += [row(i) for i in range(len(chunk))]
        self.lib.llama_synchronize(self.context)
        return out or self.lib.llama_get_logits_ith(self.context, -1)

    def save(self):
        size = self.lib.llama_state_seq_get_size(self.context, 0)
        data = ctypes.create_string_buffer(size)
        assert self.lib.llama_state_seq_get_data(self.context, data, size, 0) == size
        return data, size, self.position

    def restore(self, saved):
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        data, size, self.position = saved
        if self.position:
            assert self.lib.llama_state_seq_set_data(self.context, data, size, 0) == size


def bench(a):
    llama = Llama(a.libraries, a.model, a.threads)
    name = os.path.basename(a.model).removesuffix(".gguf").rsplit("-", 1)
    about = {"engine": f"llama.cpp {llama.version} ({llama.backend})", "model": name[0], "dtype": name[1], "n_threads": a.threads}
    rng = np.random.default_rng(1)
    random = lambda n: rng.integers(0, llama.vocab, n).tolist()

    class Engine:
        def fill(self, depth, room):
            llama.open(depth + room + 32)
            if depth:
                llama.feed(random(depth))
            self.saved = llama.save() if depth else (None, 0, 0)

        def restore(self):
            llama.restore(self.saved)

        def read(self, tokens, decode):
            ids = random(tokens)
            for part in [[id] for id in ids] if decode else [ids]:
                llama.feed(part)

    emit(about, measure(Engine(), a.tests, a.repetitions))


def batch(a):
    """16 texts of 64 + 128 tokens, so many at once, as tests/serve/speed.py asks a server for them: tokens written a second."""
    llama = Llama(a.libraries, a.model, a.threads)
    rng = np.random.default_rng(1)

    def together(n):
        llama.open(n * 256, sequences=n)
        begin = time.perf_counter()
        for position, tokens in [(0, 64)] + [(64 + i, 1) for i in range(127)]:
            ids = rng.integers(0, llama.vocab, (n, tokens))
            llama.fill([(sequence, position, ids[sequence], "last") for sequence in range(n)])
            llama.decode()
            llama.lib.llama_synchronize(llama.context)
        return time.perf_counter() - begin

    for n in map(int, a.tests.split(",")):
        rates = [16 * 128 / sum(together(n) for _ in range(16 // n)) for _ in range(a.repetitions)]
        print(json.dumps({"engine": f"llama.cpp {llama.version}", "model": os.path.basename(a.model), "at_once": n, "tokens_per_second": round(np.median(rates), 1)}))


def turn(a):
    """The second turn of a conversation: all of it read, or only what is new, after a state that is there or was saved."""
    llama = Llama(a.libraries, a.model, a.threads)
    rng = np.random.default_rng(1)
    old, new = ([rng.integers(0, llama.vocab, n).tolist() for n in map(int, a.tests.split(","))])
    llama.open(len(old) + len(new) + 32)

    def seconds(*steps):
        begin = time.perf_counter()
        for step in steps:
            step()
        return time.perf_counter() - begin

    runs = []
    for _ in range(a.repetitions):
        llama.restore((None, 0, 0))
        cold = seconds(lambda: llama.feed(old + new))
        llama.restore((None, 0, 0))
        llama.feed(old)
        saved = llama.save()
        here = seconds(lambda: llama.feed(new))
        runs.append((cold, here, seconds(lambda: llama.restore(saved), lambda: llama.feed(new))))
    cold, here, restored = (1000 * np.median(times) for times in zip(*runs))
    print(json.dumps({"engine": f"llama.cpp {llama.version}", "model": os.path.basename(a.model), "tokens": len(old) + len(new), "new": len(new),
        "cold_ms": round(cold, 1), "state_there_ms": round(here, 1), "state_restored_ms": round(restored, 1), "state_bytes": saved[1]}))


def first(a):
    """Logits of a short prompt that comes while a long one is read, both in micro-batches of 512 tokens: it waits for the one under
    way and goes with the next, as a server over the library could do it at best."""
    llama = Llama(a.libraries, a.model, a.threads)
    rng = np.random.default_rng(1)
    long, short = map(int, a.tests.split(","))
    waits = []
    for _ in range(a.repetitions):
        llama.open(2 * (long + 512), sequences=2)
        times = []
        for start in range(0, long, 512 - short):
            random = lambda n: rng.integers(0, llama.vocab, n)
            llama.fill([(0, start, random(min(512 - short, long - start)), "last"), (1, 0, random(short), "last")])
            begin = time.perf_counter()
            llama.decode()
            llama.lib.llama_synchronize(llama.context)
            times.append(time.perf_counter() - begin)
            assert llama.lib.llama_memory_seq_rm(llama.lib.llama_get_memory(llama.context), 1, -1, -1)
        for now, then in zip(times, times[1:]):
            waits += [part / 20 * now + then for part in range(20)]
    p50, p99 = (1000 * np.quantile(waits, q) for q in (0.5, 0.99))
    print(json.dumps({"engine": f"llama.cpp {llama.version}", "model": os.path.basename(a.model), "beside": long, "p50_ms": round(p50, 1), "p99_ms": round(p99, 1)}))


def logits(a):
    llama = Llama(a.libraries, a.model, a.threads)
    ids = json.load(open(a.tests))[0]
    llama.open(len(ids) + 32, flash=0, kv=0)
    np.save(a.out, np.stack(llama.feed(ids[:-8], True) + [llama.feed([id], True)[0] for id in ids[-8:]]))


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("what", choices=["bench", "batch", "turn", "first", "logits"])
parser.add_argument("libraries")
parser.add_argument("model")
parser.add_argument("tests")
parser.add_argument("out", nargs="?")
parser.add_argument("--repetitions", type=int, default=3)
parser.add_argument("--threads", type=int, default=os.cpu_count())
a = parser.parse_args()
{"bench": bench, "batch": batch, "turn": turn, "first": first, "logits": logits}[a.what](a)
