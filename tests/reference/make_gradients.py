#!/usr/bin/env python3
"""Writes tests/goldens/gradients/: derivatives of the training loss by central differences in float64.

    pip install numpy safetensors
    python tests/reference/make_gradients.py

The loss is the mean cross entropy of the next token over all rows plus the router's auxiliary loss,
everything from reference.py's recurrence. golden.safetensors holds the rows (`tokens_0`, …),
`cross_entropy`, `auxiliary` (already multiplied by router_aux_loss_coef), and for each weight NAME
`index:NAME` (flat positions), `value:NAME` (the derivative there) and `along:NAME`, the derivative
along the direction cos(flat index), into which every entry of the weight enters.
A step that would change a choice of expert stops the script: the loss is not smooth there.
"""
import json, os, subprocess, sys

import numpy as np
from safetensors.numpy import load_file, save_file

import reference

HERE = os.path.dirname(os.path.abspath(__file__))
OUT = os.path.join(HERE, "..", "goldens", "gradients")
SET = {
    "attn_type_list": [0, 1, 0], "vocab_size": 24, "hidden_size": 16, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "rotary_dim": 4, "intermediate_size": 12, "num_local_experts": 4,
    "router_aux_loss_coef": 0.5,  # so large that its gradient is seen beside the cross entropy's
}
STEP = 1e-5
ENTRIES = 6


class Routed(reference.Model):
    """Keeps every token's router logits, of all layers, and the choices made of them."""

    def __init__(self, config, weights):
        super().__init__(config, weights)
        self.router_logits = []

    def mixture_of_experts(self, i, x):
        self.router_logits.append(self.weights[f"model.layers.{i}.block_sparse_moe.gate.weight"] @ x)
        return super().mixture_of_experts(i, x)


def loss(config, weights, rows):
    """Cross entropy, auxiliary loss and the experts chosen."""
    model = Routed(config, weights)
    terms = []
    for row in rows:
        logits, _ = model.run(row)
        shifted = logits - logits.max(-1, keepdims=True)
        log_probs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        terms += [-log_probs[t, row[t + 1]] for t in range(len(row) - 1)]
    router = np.stack(model.router_logits)
    prob = np.exp(router - router.max(-1, keepdims=True))
    prob /= prob.sum(-1, keepdims=True)
    experts = prob.shape[1]
    chosen = np.argsort(-prob, axis=-1, kind="stable")[:, : config["num_experts_per_tok"]]
    share = np.stack([(chosen == e).mean(0) for e in range(experts)], 1)  # [k, experts]: mean of the one-hot choices
    auxiliary = experts * (share * prob.mean(0)).sum() * config["router_aux_loss_coef"]
    return np.mean(terms), auxiliary, chosen


def main():
    settings = [f"--set={k}={json.dumps(v)}" for k, v in SET.items()]
    subprocess.run([sys.executable, os.path.join(HERE, "make_checkpoint.py"), OUT, "--seed=3", "--tokens=1"] + settings, check=True)
    config = json.load(open(f"{OUT}/config.json"))
    weights = {k: v.astype(np.float64) for k, v in load_file(f"{OUT}/model.safetensors").items()}
    rng = np.random.default_rng(7)
    rows = [rng.integers(0, config["vocab_size"], n) for n in (11, 7)]
    cross_entropy, auxiliary, choices = loss(config, weights, rows)
    golden = {f"tokens_{i}": row.astype(np.int32) for i, row in enumerate(rows)}
    golden["cross_entropy"], golden["auxiliary"] = np.array([cross_entropy]), np.array([auxiliary])

    def slope(name, direction):
        value = []
        for sign in (1, -1):
            moved = dict(weights)
            moved[name] = weights[name] + sign * STEP * direction
            ce, aux, chosen = loss(config, moved, rows)
            if not np.array_equal(chosen, choices):
                sys.exit(f"{name}: an expert's choice changes within the step; try another seed")
            value.append(ce + aux)
        return (value[0] - value[1]) / (2 * STEP)

    for name, w in weights.items():
        if "embed" in name:  # rows of ids that occur: the others have no gradient
            used = np.unique(np.concatenate(rows))
            index = rng.choice(used, ENTRIES) * w.shape[1] + rng.integers(0, w.shape[1], ENTRIES)
        else:
            index = rng.choice(w.size, ENTRIES, replace=False)
        values = []
        for at in index:
            direction = np.zeros(w.size)
            direction[at] = 1
            values.append(slope(name, direction.reshape(w.shape)))
        golden[f"index:{name}"], golden[f"value:{name}"] = index.astype(np.int32), np.array(values)
        along = np.cos(np.arange(w.size)).reshape(w.shape)
        golden[f"along:{name}"] = np.array([slope(name, along)])
    save_file(golden, f"{OUT}/golden.safetensors")
    size = sum(os.path.getsize(f"{OUT}/{f}") for f in os.listdir(OUT))
    print(f"gradients: cross entropy {cross_entropy:.6f}, auxiliary {auxiliary:.6f}, {len(weights)} weights, {size / 1024:.0f} KB")


main()
