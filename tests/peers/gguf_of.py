"""Writes a checkpoint as GGUF for llama.cpp's `minimax-01`.

    python gguf_of.py models/small-f32 models/small-q8_0.gguf q8_0          # f32, bf16, q8_0 or q4_0

llama.cpp takes for granted that every eighth layer is softmax attention, that the number of heads is a power of two, that
every beta is 1 and that all alphas are one number; anything else is refused here. Norms and router stay f32; at
q4_0 embedding and head are q8_0, as llama.cpp's own quantizer has them.
"""
import os, sys

import gguf
import numpy as np
from checkpoint import Checkpoint
from gguf import GGMLQuantizationType as Type

ARCH = "minimax-01"
FILE_TYPE = {"f32": 0, "q4_0": 2, "q8_0": 7, "bf16": 32}


def main(path, out, kind):
    weights = Checkpoint(path)
    c = weights.config
    layers, heads = c["num_hidden_layers"], c["num_attention_heads"]
    alphas = {c[f"layernorm_{k}_alpha"] for k in ("full_attention", "linear_attention", "mlp")}
    betas = {c[f"layernorm_{k}_beta"] for k in ("full_attention", "linear_attention", "mlp")}
    assert len(alphas) == 1 and betas == {1.0} and c["postnorm"], "one alpha, beta 1 and postnorm are needed"
    assert c["attn_type_list"] == [int(i % 8 == 7) for i in range(layers)], "softmax attention in every eighth layer"
    assert heads & (heads - 1) == 0, "a power of two heads"

    w = gguf.GGUFWriter(out + ".part", ARCH)
    w.add_name(os.path.basename(os.path.normpath(path)))
    w.add_file_type(FILE_TYPE[kind])
    w.add_tokenizer_model("none")
    w.add_vocab_size(c["vocab_size"])
    w.add_context_length(c["max_position_embeddings"])
    w.add_embedding_length(c["hidden_size"])
    w.add_block_count(layers)
    w.add_feed_forward_length(c["intermediate_size"])
    w.add_head_count(heads)
    w.add_head_count_kv(c["num_key_value_heads"])
    w.add_key_length(c["head_dim"])
    w.add_value_length(c["head_dim"])
    w.add_rope_dimension_count(c["rotary_dim"])
    w.add_rope_freq_base(float(c["rope_theta"]))
    w.add_layer_norm_rms_eps(c["rms_norm_eps"])
    w.add_expert_count(c["num_local_experts"])
    w.add_expert_used_count(c["num_experts_per_tok"])
    w.add_float32(f"{ARCH}.residual_scale", alphas.pop())

    plan = []  # (name there, names here; several are stacked, type)

    def add(there, here, exact=False):
        names = [here] if isinstance(here, str) else here
        type_ = Type.F32 if exact or len(weights.shape(names[0])) == 1 else Type[kind.upper()]
        if type_ == Type.Q4_0 and there in ("token_embd.weight", "output.weight"):
            type_ = Type.Q8_0
        plan.append((there, names, isinstance(here, list), type_))

    add("token_embd.weight", "model.embed_tokens.weight")
    add("output_norm.weight", "model.norm.weight")
    add("output.weight", "lm_head.weight")
    lightning = {"qkv": "qkv_proj", "gate": "output_gate", "norm_2": "norm", "output": "out_proj"}
    softmax = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "output": "o_proj"}
    for i, softmaxes in enumerate(c["attn_type_list"]):
        here, there = f"model.layers.{i}.", f"blk.{i}."
        add(there + "attn_norm.weight", here + "input_layernorm.weight")
        for name, ours in (softmax if softmaxes else lightning).items():
            add(there + f"attn_{name}.weight", here + f"self_attn.{ours}.weight")
        add(there + "ffn_norm.weight", here + "post_attention_layernorm.weight")
        moe = here + "block_sparse_moe."
        add(there + "ffn_gate_inp.weight", moe + "gate.weight", exact=True)
        for name, ours in {"gate": "w1", "down": "w2", "up": "w3"}.items():
            add(there + f"ffn_{name}_exps.weight", [f"{moe}experts.{e}.{ours}.weight" for e in range(c["num_local_experts"])])

    for there, names, stacked, type_ in plan:
        shape = ([len(names)] if stacked else []) + list(weights.shape(names[0]))
        if type_ != Type.F32:
            shape[-1] = gguf.quants.quant_shape_to_byte_shape(tuple(shape), type_)[-1]
        item, raw = (np.float32, None) if type_ == Type.F32 else (np.uint8, type_)
        w.add_tensor_info(there, tuple(shape), np.dtype(item), int(np.prod(shape)) * np.dtype(item).itemsize, raw_dtype=raw)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_ti_data_to_file()
    for _, names, stacked, type_ in plan:
        x = np.stack([weights[n] for n in names]) if stacked else np.asarray(weights[names[0]], np.float32)
        w.write_tensor_data(x if type_ == Type.F32 else gguf.quants.quantize(x, type_))
    w.close()
    os.rename(out + ".part", out)


main(*sys.argv[1:4])
