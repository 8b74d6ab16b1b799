"""Rotary frequencies exactly as transformers computes them, in the form that megatron-core's layers ask for.

transformers' ROPE_INIT_FUNCTIONS are the source for every scaled type, so both sides cannot drift apart.
"""

from __future__ import annotations

import math
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding as CoreRotaryEmbedding
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from swiftlite.arguments.description import ModelDescription
from swiftlite.megatron.context import my_places, ranks
from swiftlite.utils.errors import ConfigError


class Rope:
    """Inverse frequencies of one model.

    inv_freq: [rotated width / 2], fp32. attention_factor: on cos and sin, so its square acts on the scores.
    """

    def __init__(self, model: ModelDescription) -> None:
        """Raises: ConfigError for a rope type that transformers does not know or cannot compute."""
        self.kind = model.rope_type
        self.base = float(model.rotary_base)
        self.max_length = model.max_position_embeddings
        mla = model.multi_latent_attention
        self.head_dim = (
            model.qk_pos_emb_head_dim if mla else model.kv_channels or model.hidden_size // model.num_attention_heads
        )
        self.partial = 1.0 if mla else (model.partial_rotary_factor or 1.0)
        self.scaling = dict(model.rope_scaling or {})
        self.original_length = model.original_max_position_embeddings
        self._sizes = (model.hidden_size, model.num_attention_heads)
        self._frequencies = lru_cache(maxsize=8)(self.frequencies)  # each MLA layer asks for them
        self.inv_freq, self.attention_factor = self.frequencies()

    def frequencies(self, seq_len: int | None = None) -> tuple[Tensor, float]:
        """(inv_freq, attention factor) for sequences of this length; only 'dynamic' and 'longrope' depend on it.

        Raises: ConfigError for what the installed transformers cannot compute.
        """
        if self.kind == "default":
            width = int(self.head_dim * self.partial)
            exponents = torch.arange(0, width, 2, dtype=torch.int64).float() / width
            return 1.0 / (self.base**exponents), 1.0
        from transformers import __version__
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        if self.kind not in ROPE_INIT_FUNCTIONS:
            raise ConfigError(
                f"rope type {self.kind!r}: transformers {__version__} knows {', '.join(sorted(ROPE_INIT_FUNCTIONS))}"
            )
        try:
            inv_freq, factor = ROPE_INIT_FUNCTIONS[self.kind](self._hf_config(), torch.device("cpu"), seq_len=seq_len)
        except (KeyError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
            raise ConfigError(
                f"rope type {self.kind!r}: transformers {__version__} cannot compute {self.scaling} "
                f"({type(error).__name__}: {error})"
            ) from error
        return inv_freq.float(), float(factor)

    def for_length(self, seq_len: int) -> Tensor:
        """inv_freq of a forward pass over `seq_len` positions."""
        if self.kind in ("dynamic", "longrope"):
            return self._frequencies(seq_len)[0]
        return self.inv_freq

    def _hf_config(self) -> Any:
        """What the functions of transformers 4.57 and 5.x read from a config."""
        hidden, heads = self._sizes
        scaling = {**self.scaling, "rope_type": self.kind}
        parameters = {**scaling, "rope_theta": self.base, "partial_rotary_factor": self.partial}
        parameters.setdefault("original_max_position_embeddings", self.original_length or self.max_length)
        config = SimpleNamespace(
            hidden_size=hidden,
            num_attention_heads=heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.max_length,
            rope_theta=self.base,
            rope_scaling=scaling,
            partial_rotary_factor=self.partial,
            rope_parameters=parameters,
            standardize_rope_params=lambda: None,
        )
        if self.original_length:  # 4.57 asks whether config.json has it at the top
            config.original_max_position_embeddings = self.original_length
        return config

    def set_attention_factor(self, config: TransformerConfig) -> None:
        """Put the factor into `config`, through the three attributes that GQA layers of megatron-core read.

        They compute 0.1 * mscale * ln(scaling) + 1, which is the factor for scaling = e, mscale = 10 (factor - 1).
        """
        if self.attention_factor != 1.0:
            config.yarn_rotary_scaling_factor = math.e
            config.yarn_mscale = 10 * (self.attention_factor - 1)
            config.yarn_mscale_all_dim = 0.0
            config.apply_rope_fusion = False  # the fused form has no factor


class RotaryEmbedding(CoreRotaryEmbedding):  # type: ignore[misc]
    """megatron-core's rotary embedding with the frequencies of `Rope`.

    with_factor: forward returns (angles, attention factor), as MLA layers of rope type 'yarn' expect.
    """

    def __init__(self, rope: Rope, replaced: Any, with_factor: bool = False) -> None:
        torch.nn.Module.__init__(self)
        self.rope = rope
        self.inv_freq = rope.inv_freq
        self.rotary_interleaved = getattr(replaced, "rotary_interleaved", False)
        self.seq_len_interpolation_factor = None
        self.cp_group = None  # a rank's share of the angles is taken below: megatron-core's way needs a GPU
        self.with_factor = with_factor

    def get_freqs_non_repeated(self, max_seq_len: int, offset: int = 0) -> Tensor:
        """Angles [S, rotated width / 2]."""
        inv_freq = self.rope.for_length(max_seq_len + offset).to(self.inv_freq.device)
        positions = torch.arange(max_seq_len, device=inv_freq.device, dtype=inv_freq.dtype) + offset
        return torch.outer(positions, inv_freq)

    def forward(self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, **_: object) -> Any:
        """Angles [S, 1, 1, rotated width]; of this rank's positions, unless sequences are packed."""
        angles = super().forward(max_seq_len, offset, packed_seq)
        if not packed_seq and ranks() > 1:
            angles = angles[my_places(len(angles), device=angles.device)]
        return (angles, self.rope.attention_factor) if self.with_factor else angles


def install(model: MegatronModule, rope: Rope) -> None:
    """Replace every rotary embedding of a GPTModel: its own one, or those of its MLA layers."""
    if hasattr(model, "rotary_pos_emb"):
        model.rotary_pos_emb = RotaryEmbedding(rope, model.rotary_pos_emb)
    for module in model.modules():
        if hasattr(module, "linear_kv_up_proj"):
            module.rotary_pos_emb = RotaryEmbedding(
                rope, module.rotary_pos_emb, with_factor=module.config.rope_type == "yarn"
            )
