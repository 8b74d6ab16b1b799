"""Rotary settings of their own in layers with a window (Gemma 3, OLMo 3).

The angles of both kinds travel together, [S, 2, 1, rotated width], and each attention takes its own. Nothing is kept
between passes, so recomputation and micro batches of different lengths are no matter.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from swiftlite.arguments.description import ModelDescription
from swiftlite.arguments.parallel import MegatronArguments
from swiftlite.megatron.model.rope import Rope, RotaryEmbedding
from swiftlite.utils.types import Settings

_FACTOR = ("yarn_rotary_scaling_factor", "yarn_mscale", "yarn_mscale_all_dim")


class TwoRotaryEmbeddings(RotaryEmbedding):
    """Angles of the layers that see the whole text, then those of layers with a window, in dimension 1."""

    def __init__(self, rope: Rope, window_rope: Rope, replaced: Any) -> None:
        super().__init__(rope, replaced)
        self.window = RotaryEmbedding(window_rope, replaced)

    def forward(self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, **_: object) -> Tensor:
        both = (super().forward(max_seq_len, offset, packed_seq), self.window(max_seq_len, offset, packed_seq))
        return torch.cat(both, 1)


def description_of_windows(model: ModelDescription) -> ModelDescription:
    """The model, all its layers rotated as those with a window."""
    settings = dict(model.window_rope or {})
    base = settings.pop("rope_theta", model.rotary_base)
    return replace(model, rotary_base=base, rope_scaling=settings or None)


def adapt(model: MegatronModule, args: MegatronArguments) -> None:
    if args.description.window_rope is None:
        return
    rope, window_rope = Rope(args.description), Rope(description_of_windows(args.description))
    if hasattr(model, "rotary_pos_emb"):
        model.rotary_pos_emb = TwoRotaryEmbeddings(rope, window_rope, model.rotary_pos_emb)
    config = model.config
    window_config = copy.copy(config)
    for name in _FACTOR:
        vars(window_config).pop(name, None)
    window_rope.set_attention_factor(window_config)
    differs = rope.attention_factor != window_rope.attention_factor
    for attention in model.modules():
        if isinstance(attention, SelfAttention):
            windowed = is_layer_window_attention(
                config.window_size, config.window_attn_skip_freq, attention.layer_number
            )
            if windowed and differs:
                attention.config = window_config
                # Read once, from megatron-core 0.19.
                attention._yarn_concentration_factor = window_rope.attention_factor
            attention.register_forward_pre_hook(_taking(int(windowed)), with_kwargs=True)


def _taking(kind: int) -> Callable[..., tuple[tuple[object, ...], Settings]]:
    def hook(_: object, args: tuple[object, ...], kwargs: Settings) -> tuple[tuple[object, ...], Settings]:
        return args, {**kwargs, "rotary_pos_emb": kwargs["rotary_pos_emb"][:, kind : kind + 1].contiguous()}

    return hook
