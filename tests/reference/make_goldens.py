#!/usr/bin/env python3
"""Writes tests/goldens/: small random checkpoints with what `reference.py` gives for them in float64.

    pip install numpy safetensors
    python tests/reference/make_goldens.py            # all of them
    python tests/reference/make_goldens.py top3 wide  # some

Each golden is a directory that `make_checkpoint.py` wrote, with two additions in golden.safetensors:
`f32_error`, the largest absolute error of the logits when reference.py itself runs in float32, and
`router_gap`, the smallest distance between the last probability chosen and the first one left out.
Seeds are tried until that gap is so wide that rounding in f32 cannot change a choice: otherwise the
bound would measure the luck of the routing and not the arithmetic.
"""
import json, os, subprocess, sys

import numpy as np
from safetensors.numpy import load_file, save_file

import reference

HERE = os.path.dirname(os.path.abspath(__file__))
OUT = os.path.join(HERE, "..", "goldens")

SMALL = {
    "attn_type_list": [0, 1, 0], "vocab_size": 64, "hidden_size": 24, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "rotary_dim": 4, "intermediate_size": 20, "num_local_experts": 4,
    "max_position_embeddings": 8192,
}
# name: (tokens, what differs from SMALL)
GOLDENS = {
    # long enough for chunks of 256 and 300 and for paths through the cache
    "hybrid": (640, {"attn_type_list": [0, 0, 0, 1], "num_local_experts": 6}),
    "heads6": (48, {"num_attention_heads": 6, "num_key_value_heads": 3}),
    "heads3": (48, {"num_attention_heads": 3, "num_key_value_heads": 1}),
    "one_lightning": (40, {"attn_type_list": [0]}),
    "one_softmax": (40, {"attn_type_list": [1]}),
    "all_lightning": (48, {"attn_type_list": [0, 0, 0, 0]}),
    "all_softmax": (48, {"attn_type_list": [1, 1, 1]}),
    "kv_one": (48, {"num_key_value_heads": 1}),
    "kv_all": (48, {"num_key_value_heads": 4}),
    "top1": (48, {"num_experts_per_tok": 1}),
    "top3": (48, {"num_experts_per_tok": 3, "num_local_experts": 5}),
    "prenorm": (48, {"postnorm": False}),
    "unequal": (48, {
        "layernorm_full_attention_alpha": 1.7, "layernorm_full_attention_beta": 0.6,
        "layernorm_linear_attention_alpha": 0.8, "layernorm_linear_attention_beta": 1.9,
        "layernorm_mlp_alpha": 2.3, "layernorm_mlp_beta": 0.4,
    }),
    "rotary_full": (48, {"rotary_dim": 8}),
    "wide": (48, {"head_dim": 16, "hidden_size": 20}),
    "length1": (1, {}),
    "long": (4000, {"num_local_experts": 3}),
}


class Probed(reference.Model):
    """Notes how narrowly each expert was chosen."""

    gap = np.inf

    def mixture_of_experts(self, i, x):
        logits = self.weights[f"model.layers.{i}.block_sparse_moe.gate.weight"] @ x
        prob = np.exp(logits - logits.max())
        prob = np.sort(prob / prob.sum())[::-1]
        k = self.config["num_experts_per_tok"]
        if k < len(prob):
            self.gap = min(self.gap, prob[k - 1] - prob[k])
        return super().mixture_of_experts(i, x)


def write(name, tokens, changes):
    out = os.path.join(OUT, name)
    settings = [f"--set={k}={json.dumps(v)}" for k, v in {**SMALL, **changes}.items()]
    for seed in range(1, 100):
        command = [sys.executable, os.path.join(HERE, "make_checkpoint.py"), out, f"--seed={seed}", f"--tokens={tokens}"]
        subprocess.run(command + settings, check=True, stdout=subprocess.DEVNULL)
        config = json.load(open(f"{out}/config.json"))
        weights = load_file(f"{out}/model.safetensors")
        golden = load_file(f"{out}/golden.safetensors")
        exact = Probed(config, weights)
        exact.run(golden["tokens"])
        if exact.gap > 0.02 / (tokens + 100):
            break
    else:
        sys.exit(f"{name}: no seed keeps the routing clear of ties")
    single, _ = reference.Model(config, weights, np.float32).run(golden["tokens"])
    golden["router_gap"] = np.array([exact.gap])
    golden["logit_std"] = np.array([golden["logits"].std()])
    if tokens > 1000:  # the end of a long text depends on all of it; the rest would only weigh
        golden["logits"], single = golden["logits"][-16:], single[-16:]
        golden = {k: v for k, v in golden.items() if k[:2] not in ("k_", "v_")}
    golden["f32_error"] = np.array([np.abs(single - golden["logits"]).max()])
    save_file({k: np.ascontiguousarray(v) for k, v in golden.items()}, f"{out}/golden.safetensors")
    size = sum(os.path.getsize(f"{out}/{f}") for f in os.listdir(out))
    print(f"{name:14} seed {seed:2}  logit std {golden['logit_std'][0]:5.2f}  f32 error {golden['f32_error'][0]:.1e}"
          f"  router gap {exact.gap:.1e}  {size / 1024:5.0f} KB", flush=True)


if __name__ == "__main__":
    for name in sys.argv[1:] or GOLDENS:
        write(name, *GOLDENS[name])
