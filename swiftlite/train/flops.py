"""Floating point operations of training, from config.json; and what devices can do at best. Imports nothing heavy.

Counted is what the model needs: multiplications and additions of its matrices (2 per weight and token, of experts the
chosen ones), and attention over the tokens that a causal mask leaves. Not counted: recomputation, padding, norms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from swiftlite.families import family_of
from swiftlite.families.hf_config import architecture_of, convert_hf_config
from swiftlite.utils.types import Config
from swiftlite.weights.rule import WeightRule
from swiftlite.weights.shape import LayerKind, ModelShape, layer_pattern

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


def attention_pairs(lengths: Iterable[int], window: int | None = None) -> int:
    """(query, key) pairs that causal attention computes: n (n + 1) / 2 for each sample of n tokens, where a token sees
    no more than `window`.
    """

    def half_square(n: int) -> int:
        return n * (n + 1) // 2

    return sum(half_square(n) - (half_square(n - window) if window and n > window else 0) for n in lengths)


@dataclass(frozen=True)
class ModelFlops:
    """linear: forward operations of all matrices for one token. attention: forward operations for one (query, key) pair,
    over all layers and heads. expert_share: share of the routed experts that a token visits. window: tokens that one
    sees at most in `window_share` of the layers. recurrence: forward operations of linear attention for one token, besides
    its matrices.
    """

    linear: int
    attention: int
    expert_share: float = 1.0
    window: int | None = None
    window_share: float = 0.0
    recurrence: int = 0

    def pairs(self, lengths: Iterable[int]) -> float:
        """`attention_pairs` of samples of these lengths, the mean over the layers."""
        lengths = list(lengths)
        full, share = attention_pairs(lengths), self.window_share
        return full + share * (attention_pairs(lengths, self.window) - full) if share else full

    def forward(self, tokens: float, pairs: float) -> float:
        return (self.linear + self.recurrence) * tokens + self.attention * pairs

    def training(
        self, tokens: float, pairs: float, trained: float | None = None, adapters: float = 0.0, references: int = 0
    ) -> float:
        """Forward and backward operations.

        Args:
            tokens, pairs: of the step, without padding; see `ModelFlops.pairs`.
            trained: trained weights of the model's own matrices that a token meets; None: all of them.
            adapters: weights in adapters that a token meets. The matrices below them are only passed through.
            references: forward passes of other models of this size on the same tokens (preference training).
        """
        weights = self.linear if trained is None else 2 * trained
        per_token = 2 * self.linear + weights + 6 * adapters + 3 * self.recurrence
        return per_token * tokens + 3 * self.attention * pairs + references * self.forward(tokens, pairs)


def flops_of(config: Config | None, mtp_layers: int = 0) -> ModelFlops | None:
    """`model_flops`; None for a config that does not say what is needed."""
    try:
        return model_flops(config or {}, mtp_layers)
    except (AttributeError, KeyError, TypeError, ValueError):  # ConfigError is one: no family of ours
        return None


def pairs_of(config: Config | None) -> Callable[[Iterable[int]], float]:
    """How the pairs of a model's samples are counted: lengths -> `ModelFlops.pairs`."""
    flops = flops_of(config)
    return flops.pairs if flops else attention_pairs


def linear_attention(shape: ModelShape) -> int:
    """Multiplications of one token in a gated delta net besides its projections.

    Each head's state [key_dim, value_dim] is decayed, read for what it predicts of the value, corrected by an outer
    product, and read by the query; a convolution runs before it. Chunked kernels compute more than this recurrence.
    """
    return 4 * shape.key_dim * shape.linear_values + shape.conv_kernel * shape.linear_qkv


def model_flops(config: Config, mtp_layers: int = 0) -> ModelFlops:
    """Of a model with a family, by config.json: the matrices of its weight map, of experts those that a token visits.

    Args: mtp_layers: blocks that predict further tokens and are trained: each has a layer of the last one's kind, a
        projection of two hidden states to one, and its own pass through the head.
    """
    family = family_of(architecture_of(config))
    fields = convert_hf_config(config, family)
    shape, top_k = ModelShape.from_config(fields), int(fields.get("moe_router_topk") or 1)

    def weights(rules: Iterable[WeightRule], kind: LayerKind) -> int:
        """Elements of the matrices that one token meets."""
        tensors = {
            source.name: (top_k if rule.per_expert else 1, [shape.dim(dim) for dim in source.dims])
            for rule in rules if rule.when.test(shape, kind) and not rule.is_buffer for source in rule.hf
        }  # fmt: skip
        return sum(times * math.prod(dims) for times, dims in tensors.values() if len(dims) == 2)

    head = shape.hidden * (shape.vocab if shape.num_labels is None else shape.num_labels)
    layers = {kind: weights(family.weights.layer, kind) for kind in {*shape.layer_kinds, shape.mtp_kind}}
    total = sum(layers[kind] for kind in shape.layer_kinds) + head
    total += mtp_layers * (layers[shape.mtp_kind] + 2 * shape.hidden**2 + head)
    linear = sum(kind.linear for kind in shape.layer_kinds)
    count, window = shape.num_layers - linear + mtp_layers, fields.get("window_size")
    windows = layer_pattern(fields.get("window_attn_skip_freq"), shape.num_layers) if window is not None else ()
    return ModelFlops(
        linear=2 * total,
        attention=2 * count * (shape.q_rows + shape.attn_cols),
        recurrence=2 * linear * linear_attention(shape),
        expert_share=top_k / shape.experts if shape.experts else 1.0,
        window=None if window is None else window + 1,
        window_share=sum(windows) / count,
    )
