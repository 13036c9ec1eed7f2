"""The rate of a 2048 x 2048 x 2048 product: PyTorch in f32 and bf16, NumPy's OpenBLAS in f32; lines of JSON."""
import json, os, time

import numpy as np
import torch

n, threads = 2048, os.cpu_count()
torch.set_num_threads(threads)


def rate(library, dtype, product):
    times = []
    for _ in range(12):
        start = time.perf_counter()
        product()
        times.append(time.perf_counter() - start)
    times = sorted(times[2:])
    best, median = (round(2 * n**3 / t / 1e9, 1) for t in (times[0], times[len(times) // 2]))
    line = {"engine": "machine", "test": f"{dtype} matrix, {library}", "n_threads": threads, "unit": "GFLOP/s"}
    print(json.dumps(line | {"best": best, "median": median}), flush=True)


for dtype in (torch.float32, torch.bfloat16):
    x, w = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    rate("PyTorch", {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype], lambda: torch.nn.functional.linear(x, w))
x, w = np.random.rand(n, n).astype(np.float32), np.random.rand(n, n).astype(np.float32)
rate("OpenBLAS", "f32", lambda: x @ w)
