"""Random checkpoints of the presets, in MiniMax's own format, and how to read them.

    python checkpoint.py small f32 models/small-f32

The same size has the same weights in every dtype (bf16 rounds them to nearest even; the router stays f32).
"""
import json, os, struct, sys

import numpy as np

#         hidden layers heads head_dim kv experts ffn vocab; the presets of model/src/config.rs
SIZES = {
    "nano": (128, 8, 4, 32, 2, 4, 256, 512),
    "small": (512, 16, 8, 64, 2, 8, 1024, 8192),
    "base": (1024, 16, 16, 64, 4, 8, 2048, 32000),
}


def config(size, dtype):
    hidden, layers, heads, head_dim, kv, experts, ffn, vocab = SIZES[size]
    residual = {}
    for kind in ("full_attention", "linear_attention", "mlp"):
        residual |= {f"layernorm_{kind}_alpha": (2 * layers) ** 0.25, f"layernorm_{kind}_beta": 1.0}
    return {
        "architectures": ["MiniMaxM1ForCausalLM"], "model_type": "minimax_m1", "vocab_size": vocab, "hidden_size": hidden,
        "num_hidden_layers": layers, "attn_type_list": [int(i % 8 == 7) for i in range(layers)],
        "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": head_dim, "rotary_dim": head_dim // 2,
        "rope_theta": 10000000, "num_local_experts": experts, "num_experts_per_tok": 2, "intermediate_size": ffn,
        "postnorm": True, "rms_norm_eps": 1e-5, "max_position_embeddings": 65536, "hidden_act": "silu",
        "initializer_range": 0.02, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0, "attention_dropout": 0.0,
        "shared_intermediate_size": 0, "shared_moe_mode": "sigmoid", "tie_word_embeddings": False, "use_cache": True,
        "bos_token_id": None, "eos_token_id": None, "torch_dtype": {"f32": "float32", "bf16": "bfloat16"}[dtype],
    } | residual


def shapes(c):
    """Names without `.weight`."""
    hidden, inner, kv = c["hidden_size"], c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
    lightning = {"qkv_proj": (3 * inner, hidden), "output_gate": (inner, hidden), "out_proj": (hidden, inner), "norm": (inner,)}
    softmax = {"q_proj": (inner, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, inner)}
    yield "model.embed_tokens", (c["vocab_size"], hidden)
    for i, kind in enumerate(c["attn_type_list"]):
        layer = f"model.layers.{i}."
        for name, shape in (softmax if kind else lightning).items():
            yield layer + "self_attn." + name, shape
        yield layer + "block_sparse_moe.gate", (c["num_local_experts"], hidden)
        for e in range(c["num_local_experts"]):
            for name, shape in {"w1": (c["intermediate_size"], hidden), "w2": (hidden, c["intermediate_size"]), "w3": (c["intermediate_size"], hidden)}.items():
                yield layer + f"block_sparse_moe.experts.{e}.{name}", shape
        yield layer + "input_layernorm", (hidden,)
        yield layer + "post_attention_layernorm", (hidden,)
    yield "model.norm", (hidden,)
    yield "lm_head", (c["vocab_size"], hidden)


def draw(rng, name, shape):
    """Wide enough that logits are not all alike and every expert is chosen."""
    x = rng.standard_normal(shape, dtype=np.float32)
    if len(shape) == 1:
        return 1 + np.float32(0.1) * x
    if name == "model.embed_tokens.weight":
        return x
    gain = 3.0 if ".gate." in name else 2.0 if name == "lm_head.weight" else 1.5
    return x * np.float32(gain / shape[1] ** 0.5)


def bf16_bits(x):
    bits = x.view("<u4")
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")


def write(size, dtype, out):
    os.makedirs(out, exist_ok=True)
    c = config(size, dtype)
    header, offset, plan = {"__metadata__": {"format": "pt"}}, 0, []
    for name, shape in shapes(c):
        name += ".weight"
        kind = "f32" if ".gate." in name else dtype
        end = offset + int(np.prod(shape)) * {"f32": 4, "bf16": 2}[kind]
        header[name] = {"dtype": kind.upper(), "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
        plan.append((name, shape, kind))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(0)
    path = os.path.join(out, "model.safetensors")
    with open(path + ".part", "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for name, shape, kind in plan:
            x = draw(rng, name, shape)
            f.write((x if kind == "f32" else bf16_bits(x)).tobytes())
    with open(os.path.join(out, "config.json"), "w") as f:
        json.dump(c, f, indent=1)
    os.rename(path + ".part", path)


class Checkpoint:
    """Tensors of a directory as f32, mapped from its files."""

    def __init__(self, path):
        self.config = json.load(open(os.path.join(path, "config.json")))
        self.places = {}
        for file in sorted(os.listdir(path)):
            if file.startswith("model") and file.endswith(".safetensors"):
                data = np.memmap(os.path.join(path, file), np.uint8, "r")
                (size,) = struct.unpack("<Q", data[:8].tobytes())
                for name, info in json.loads(data[8 : 8 + size].tobytes()).items():
                    if name != "__metadata__":
                        begin, end = info["data_offsets"]
                        self.places[name] = (data[8 + size + begin : 8 + size + end], info["dtype"], info["shape"])

    def __getitem__(self, name):
        data, dtype, shape = self.places[name]
        if dtype == "F32":
            return data.view("<f4").reshape(shape)
        assert dtype == "BF16", dtype
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)

    def shape(self, name):
        return self.places[name][2]


if __name__ == "__main__":
    write(*sys.argv[1:4])
