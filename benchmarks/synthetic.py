"""Checkpoints of a wanted size with random bytes, for benchmarks: a GLM-4.5-style MoE or a Qwen3-style dense model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from swiftlite.checkpoint.bind import bind_map
from swiftlite.weights.safetensors import create_shards, plan_shards, write_index
from swiftlite.weights.storage import TensorSpec

DENSE = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 2048, "intermediate_size": 6144,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "hidden_act": "silu", "vocab_size": 151936,
    "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "num_hidden_layers": 1,
}  # fmt: skip
MOE = {
    "architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "hidden_size": 1024, "intermediate_size": 2048,
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128, "hidden_act": "silu", "vocab_size": 32000,
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1000000, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "num_hidden_layers": 2, "attention_bias": True, "partial_rotary_factor": 0.5,
    "first_k_dense_replace": 1, "n_routed_experts": 64, "n_shared_experts": 1, "num_experts_per_tok": 8,
    "moe_intermediate_size": 512, "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0,
    "use_qk_norm": False,
}  # fmt: skip
KINDS = {"dense": DENSE, "moe": MOE}


def make_checkpoint(directory: Path, kind: str, gigabytes: float, sparse: bool = False) -> int:
    """Write a checkpoint of about that size. Returns: its bytes. An existing one of the same kind and size is kept.

    sparse: zeros that take no disk.
    """
    config = dict(KINDS[kind])

    def size(layers: int) -> int:
        config["num_hidden_layers"] = layers
        bound = bind_map(config)
        return sum(2 * torch.Size(s).numel() for e in bound.entries for s in e.hf_shapes)

    per_layer = size(3) - size(2)
    layers = max(2, round((gigabytes * 1e9 - size(2)) / per_layer) + 2)
    total = size(layers)
    mark = directory / "config.json"
    if mark.is_file() and json.loads(mark.read_text()) == config:
        return total
    directory.mkdir(parents=True, exist_ok=True)
    specs = {}
    for entry in bind_map(config).entries:
        for name, shape in zip(entry.hf, entry.hf_shapes, strict=True):
            specs[name] = TensorSpec(torch.float32 if entry.rule.keep_dtype else torch.bfloat16, shape)
    shards = plan_shards(specs, 1_000_000_000)
    create_shards(directory, shards)
    block = os.urandom(16 << 20)
    for shard in [] if sparse else shards:
        with (directory / shard.file).open("r+b") as file:
            start = min(shard.offsets.values())
            file.seek(start)
            while (left := shard.size - file.tell()) > 0:
                file.write(block[:left])
    write_index(directory, shards, total)
    mark.write_text(json.dumps(config))
    return total


if __name__ == "__main__":
    import sys

    print(make_checkpoint(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])))
