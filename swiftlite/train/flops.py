"""Floating point operations of training, from config.json; and what devices can do at best. Imports nothing heavy.

Counted is what the model needs: multiplications and additions of its matrices (2 per weight and token, of experts the
chosen ones), and attention over the tokens that a causal mask leaves. Not counted: recomputation, padding, norms.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from swiftlite.utils.logger import get_logger

# Dense bf16 operations per second by what the driver calls the device; the first name that is part of it counts.
PEAK_FLOPS: dict[str, float] = {
    "GB200": 2.5e15, "B200": 2.25e15, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "GH200": 989e12,
    "H100": 989e12, "H800 PCIe": 756e12, "H800": 989e12, "H20": 148e12, "A100": 312e12, "A800": 312e12, "A30": 165e12,
    "A10G": 70e12, "A10": 125e12, "A40": 149.7e12, "L40S": 362e12, "L40": 181e12, "L20": 119.5e12, "L4": 121e12,
    "RTX 6000 Ada": 364e12, "RTX A6000": 154.8e12, "RTX 5090": 209.5e12, "RTX 4090": 165.2e12, "RTX 3090": 71e12,
    "MI325X": 1307e12, "MI300X": 1307e12, "MI250X": 383e12, "MI250": 362e12,
}  # fmt: skip


def peak_flops(device_name: str) -> float | None:
    """Operations per second in bf16 without sparsity; None for a device that is not in the table."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)


def attention_pairs(lengths: Iterable[int]) -> int:
    """(query, key) pairs that causal attention computes: n (n + 1) / 2 for each sample of n tokens."""
    return sum(n * (n + 1) // 2 for n in lengths)


@dataclass(frozen=True)
class ModelFlops:
    """linear: forward operations of all matrices for one token. attention: forward operations for one (query, key) pair,
    over all layers and heads. expert_share: share of the routed experts that a token visits.
    """

    linear: int
    attention: int
    expert_share: float = 1.0

    def forward(self, tokens: float, pairs: float) -> float:
        return self.linear * tokens + self.attention * pairs

    def training(
        self, tokens: float, pairs: float, trained: float | None = None, adapters: float = 0.0, references: int = 0
    ) -> float:
        """Forward and backward operations.

        Args:
            tokens, pairs: of the step, without padding; see `attention_pairs`.
            trained: trained weights of the model's own matrices that a token meets; None: all of them.
            adapters: weights in adapters that a token meets. The matrices below them are only passed through.
            references: forward passes of other models of this size on the same tokens (preference training).
        """
        weights = self.linear if trained is None else 2 * trained
        per_token = 2 * self.linear + weights + 6 * adapters
        return per_token * tokens + 3 * self.attention * pairs + references * self.forward(tokens, pairs)


def _first(config: Mapping[str, Any], *keys: str, default: Any = None) -> Any:
    return next((config[key] for key in keys if config.get(key) is not None), default)


def num_experts(config: Mapping[str, Any]) -> int:
    """Routed experts of a layer that has some, 0 for a dense model."""
    return int(_first(config, "n_routed_experts", "num_experts", "moe_num_experts", "num_local_experts", default=0))


def moe_layers(config: Mapping[str, Any]) -> list[bool]:
    """For each layer: does it route tokens to experts?"""
    layers = range(int(config["num_hidden_layers"]))
    if not num_experts(config):
        return [False for _ in layers]
    if config.get("moe_layer_start_index") is not None or config.get("moe_layer_interval") is not None:
        start, end = config.get("moe_layer_start_index") or 0, _first(config, "moe_layer_end_index", default=-1)
        end = len(layers) - 1 if end < 0 else end
        every = config.get("moe_layer_interval") or 1
        return [start <= i <= end and (i + 1) % every == 0 for i in layers]
    first_dense = config.get("first_k_dense_replace") or 0
    step = config.get("decoder_sparse_step") or 1
    dense = config.get("mlp_only_layers") or []
    every = config.get("moe_layer_freq") or 1
    return [i >= first_dense and (i + 1) % step == 0 and i not in dense and i % every == 0 for i in layers]


def flops_of(config: Mapping[str, Any] | None, mtp_layers: int = 0) -> ModelFlops | None:
    """`model_flops`; None, and a remark, for a config that does not say what is needed."""
    try:
        return model_flops(config or {}, mtp_layers)
    except (AttributeError, KeyError, TypeError, ValueError):
        get_logger().info("config.json does not tell the model's operations, so TFLOP/s are not shown")
        return None


def model_flops(config: Mapping[str, Any], mtp_layers: int = 0) -> ModelFlops:
    """Of a decoder with gated feed-forward layers, by its config.json: GQA or MLA, dense or with experts.

    Args: mtp_layers: blocks that predict further tokens and are trained: each has a layer of the last one's kind, a
        projection of two hidden states to one, and its own pass through the head.
    """
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    if config.get("kv_lora_rank"):
        rope, value = config["qk_rope_head_dim"], config["v_head_dim"]
        key, rank, query_rank = config["qk_nope_head_dim"] + rope, config["kv_lora_rank"], config.get("q_lora_rank")
        query = hidden * query_rank + query_rank * heads * key if query_rank else hidden * heads * key
        attention = query + hidden * (rank + rope) + rank * heads * (key - rope + value) + heads * value * hidden
    else:
        key = value = int(_first(config, "head_dim", default=hidden // heads))
        groups = int(_first(config, "num_key_value_heads", default=heads))
        attention = hidden * key * (2 * heads + 2 * groups)
    experts = num_experts(config)
    top_k = int(_first(config, "num_experts_per_tok", "moe_k", "moe_topk", default=1))
    width = int(_first(config, "moe_intermediate_size", "intermediate_size"))
    shared = config.get("shared_expert_intermediate_size")
    gate = hidden if shared else 0  # Qwen2-MoE weighs its shared expert
    if not shared:
        shared = width * int(_first(config, "n_shared_experts", "moe_num_shared_experts", default=0))
    sparse = 3 * hidden * (top_k * width + shared) + hidden * experts + gate
    dense = 3 * hidden * int(config["intermediate_size"])
    layers = [attention + (sparse if is_moe else dense) for is_moe in moe_layers(config)]
    head = hidden * int(config["vocab_size"])
    weights = sum(layers) + head + mtp_layers * (layers[-1] + 2 * hidden * hidden + head)
    return ModelFlops(
        linear=2 * weights,
        attention=2 * (len(layers) + mtp_layers) * heads * (key + value),
        expert_share=top_k / experts if experts else 1.0,
    )
