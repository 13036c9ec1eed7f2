"""Measures transformers' MiniMaxForCausalLM (PyTorch, CPU), or writes its logits.

    python hf.py bench  models/small-f32 bf16 'pp512,tg128 @ d4096' --repetitions 3
    python hf.py train  models/small-f32 f32 4x512
    python hf.py logits models/nano-f32 f32 ids.json logits.npy

transformers 5.23 computes M1 only with three corrections, made here: rotary embedding on the first `rotary_dim`
dimensions of a head alone, the 1e-5 of the decay outside the bracket, and explicit positions while decoding.
"""
import argparse, copy, json, os, resource, time

import numpy as np
import torch
import transformers
import transformers.models.minimax.modeling_minimax as minimax
from checkpoint import Checkpoint
from timing import emit, measure, result

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def load(path, dtype):
    weights = Checkpoint(path)
    c = weights.config
    layers, heads, experts = c["num_hidden_layers"], c["num_attention_heads"], c["num_local_experts"]
    same = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"
        " max_position_embeddings rms_norm_eps num_experts_per_tok num_local_experts"
    )
    config = transformers.MiniMaxConfig(
        **{key: c[key] for key in same.split()},
        bos_token_id=None, eos_token_id=None, sliding_window=None, tie_word_embeddings=False,
        layer_types=["full_attention" if kind else "linear_attention" for kind in c["attn_type_list"]],
        rope_parameters={"rope_type": "default", "rope_theta": float(c["rope_theta"])},
        **{f"{k}_attn_{x}_factor": c[f"layernorm_{k}_attention_{x}"] for k in ("full", "linear") for x in ("alpha", "beta")},
        **{f"mlp_{x}_factor": c[f"layernorm_mlp_{x}"] for x in ("alpha", "beta")},
    )
    torch.set_default_dtype(DTYPES[dtype])
    model = transformers.MiniMaxForCausalLM._from_config(config, attn_implementation="sdpa")
    torch.set_default_dtype(torch.float32)

    parameters, here = dict(model.named_parameters()), lambda name: torch.from_numpy(np.array(weights[name]))
    missing = set(parameters)
    with torch.no_grad():
        for name in weights.places:
            if ".experts." not in name:
                parameters[name.replace("block_sparse_moe", "mlp")].copy_(here(name))
                missing.discard(name.replace("block_sparse_moe", "mlp"))
        for i in range(layers):
            into = f"model.layers.{i}.mlp.experts."
            gate_up, down = parameters[into + "gate_up_proj"], parameters[into + "down_proj"]
            missing -= {into + "gate_up_proj", into + "down_proj"}
            for e in range(experts):
                w = lambda n: here(f"model.layers.{i}.block_sparse_moe.experts.{e}.w{n}.weight")
                gate_up[e].copy_(torch.cat([w(1), w(3)]))
                down[e].copy_(w(2))
    assert not missing, missing

    for i, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        if hasattr(attention, "slope_rate"):
            slopes = 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads) * (1 - i / (layers - 1) + 1e-5)
            attention.slope_rate = slopes[:, None, None]
            decays = attention.decay_factors(attention.slope_rate)
            attention.query_decay, attention.key_decay, attention.diagonal_decay = decays
            for name in ("slope_rate", "query_decay", "key_decay", "diagonal_decay"):
                setattr(attention, name, getattr(attention, name).to(DTYPES[dtype]))
    turned = c["rotary_dim"]
    model.model.rotary_emb.inv_freq = float(c["rope_theta"]) ** -(torch.arange(0, turned, 2).float() / turned)

    def rotate(q, k, cos, sin, unsqueeze_dim=1):
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        one = lambda x: torch.cat([x[..., :turned] * cos + minimax.rotate_half(x[..., :turned]) * sin, x[..., turned:]], -1)
        return one(q), one(k)

    minimax.apply_rotary_pos_emb = rotate
    return model.eval(), c


def about(a):
    name = os.path.basename(os.path.normpath(a.model)).rsplit("-", 1)[0]
    return {"engine": f"transformers {transformers.__version__}, torch {torch.__version__}", "model": name, "dtype": a.dtype, "n_threads": a.threads}


def forward(model, ids, past, cache, keep=1):
    positions = torch.arange(past, past + ids.shape[1])[None]
    return model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=keep)


def bench(a):
    model, c = load(a.model, a.dtype)
    random = lambda n: torch.randint(0, c["vocab_size"], (1, n))

    class Engine:
        def fill(self, depth, room):
            self.depth = depth
            # Its cache of a decode is made by a prompt; an empty one would read the token as a prompt.
            self.filled = forward(model, random(max(depth, 1)), 0, None).past_key_values

        def restore(self):
            self.cache = copy.deepcopy(self.filled)

        def read(self, tokens, decode):
            if not decode:
                forward(model, random(tokens), self.depth, self.cache if self.depth else None)
                return
            for i, id in enumerate(random(tokens)[0]):
                forward(model, id.view(1, 1), max(self.depth, 1) + i, self.cache)

    with torch.inference_mode():
        emit(about(a), measure(Engine(), a.tests, a.repetitions))


def train(a):
    model, c = load(a.model, a.dtype)
    model.train()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), eps=1e-15, fused=True)
    batch, tokens = map(int, a.tests.split("x"))
    seconds, losses = [], []
    for _ in range(a.repetitions + 2):
        ids = torch.randint(0, c["vocab_size"], (batch, tokens))
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    emit(about(a), [result(f"train {a.tests}", batch * tokens, seconds[2:], losses=losses, peak_bytes=peak)])


def logits(a):
    model, _ = load(a.model, a.dtype)
    ids = torch.tensor(json.load(open(a.tests)))
    with torch.inference_mode():
        past = ids.shape[1] - 8
        out = forward(model, ids[:, :past], 0, None, 0)
        rows, cache = [out.logits[0]], out.past_key_values
        for i in range(8):
            rows.append(forward(model, ids[:, past + i : past + i + 1], past + i, cache).logits[0])
    np.save(a.out, torch.cat(rows).float().numpy())


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("what", choices=["bench", "train", "logits"])
parser.add_argument("model")
parser.add_argument("dtype", choices=DTYPES)
parser.add_argument("tests")
parser.add_argument("out", nargs="?")
parser.add_argument("--repetitions", type=int, default=3)
parser.add_argument("--threads", type=int, default=os.cpu_count())
a = parser.parse_args()
torch.set_num_threads(a.threads)
torch.manual_seed(1)
{"bench": bench, "train": train, "logits": logits}[a.what](a)
