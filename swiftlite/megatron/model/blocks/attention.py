"""Core attention on torch's kernels: sliding windows, learned sinks and capped scores, packed input.

megatron-core's own DotProductAttention knows neither `k_channels`/`v_channels` (MLA) nor packed sequences, and keeps all
scores in memory; Transformer Engine's has windows and sinks, but no cap.
Shapes: S sequence, B batch, N heads, G key/value heads, D head width, T packed tokens.
"""

from __future__ import annotations

import contextlib
from itertools import pairwise

import torch
from megatron.core import parallel_state as mpu
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from swiftlite.megatron import backend
from swiftlite.megatron.context import gather, my_places
from swiftlite.megatron.model.layers import Offsets
from swiftlite.utils.types import Json, Settings

# Queries whose scores are in memory at once, where they are computed without a fused kernel.
CHUNK = 1024
_masks: dict[tuple[torch.device, int | None, int | None], Tensor] = {}


def causal_mask(
    length: int, window: int | None, device: torch.device, rows: Tensor | None = None, chunk: int | None = None
) -> Tensor:
    """True where a token (row) sees another one (column): [length, length] of the one mask that is kept for all lengths.

    window: tokens that one sees, itself included; chunk: it sees those of its own chunk of so many; None: all before it.
    rows: those wanted, None: all.
    """
    mask = _masks.get((device, window, chunk))
    if mask is None or len(mask) < length:
        mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        mask = mask if window is None else mask.triu(1 - window)
        if chunk is not None:
            own = torch.arange(length, device=device) // chunk
            mask = mask & (own[:, None] == own)
        _masks[device, window, chunk] = mask
    mask = mask[:length, :length]
    return mask if rows is None else mask[rows]


class SdpaAttention(torch.nn.Module):
    """Causal core attention: GQA, unequal key and value widths, packed input.

    window: tokens that one sees in this layer, itself included; None: all before it. chunk: see causal_mask. cap: scores s
    are cap * tanh(s / cap); None: as they are. softmax_offset: [N / TP], a score of each head that takes part in the softmax
    and has no value.
    """

    cap: float | None = None
    chunk: int | None = None
    softmax_offset: torch.nn.Parameter | None

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: object,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        **_: object,
    ) -> None:
        super().__init__()
        self.config = config
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale if softmax_scale is not None else (k_channels or config.kv_channels) ** -0.5
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window: int | None = config.window_size[0] + 1 if windowed else None
        self.register_parameter("softmax_offset", self._sinks() if config.softmax_type == "learnable" else None)

    def _sinks(self) -> torch.nn.Parameter:
        """As Transformer Engine's attention and megatron-core's own one have them."""
        config = self.config
        sinks = torch.empty(config.num_attention_heads // config.tensor_model_parallel_size, dtype=config.params_dtype,
                            device=backend.setup().device)  # fmt: skip
        if config.perform_initialization:
            config.init_method(sinks)
        return torch.nn.Parameter(sinks)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: object = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: object,
    ) -> Tensor:
        """query [S, B, N, D], key [S, B, G, D], value [S, B, G, Dv] -> [S, B, N*Dv]; packed: [T, N, D] -> [T, N*Dv].

        The mask is causal by construction, so `attention_mask` is not read: padding stands after the real tokens.
        """
        assert attention_bias is None, "no model here passes an attention bias"
        ranks = self.config.context_parallel_size
        if packed_seq_params is None:
            return self._attend(query, *gather(None, key, value))
        key, value = gather(packed_seq_params.cu_seqlens_q, key, value)
        bounds = packed_seq_params.cu_seqlens_q.tolist()
        parts = [
            self._attend(
                query[start // ranks : end // ranks].unsqueeze(1), *(x[start:end].unsqueeze(1) for x in (key, value))
            ).squeeze(1)
            for start, end in pairwise(bounds)
            if end > start
        ]
        used = bounds[-1] // ranks
        if used < query.shape[0]:  # padding behind the last sample
            parts.append(query.new_zeros(query.shape[0] - used, parts[0].shape[-1]))
        return torch.cat(parts)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Of one sample's queries on this rank and all its keys and values."""
        length = len(key)
        window = self.window if self.window is not None and self.window < length else None
        rows = my_places(length, device=key.device) if len(query) < length else None
        chunk = self.chunk if self.chunk is not None and self.chunk < length else None
        plain = window is None and rows is None and chunk is None
        dropout = self.dropout if self.training else 0.0
        with self._dropout_generator(dropout):
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [B, heads, S, width]
            if self.cap is not None or self.softmax_offset is not None:
                out = self._by_scores(q, k, v, window, rows, dropout)
            else:
                out = torch.nn.functional.scaled_dot_product_attention(
                    q,
                    k,
                    v,
                    attn_mask=None if plain else causal_mask(length, window, q.device, rows, chunk),
                    dropout_p=dropout,
                    is_causal=plain,
                    scale=self.softmax_scale,
                    enable_gqa=query.shape[-2] != key.shape[-2],
                )
        return out.permute(2, 0, 1, 3).flatten(2)

    def _by_scores(
        self, q: Tensor, k: Tensor, v: Tensor, window: int | None, rows: Tensor | None, dropout: float
    ) -> Tensor:
        """[B, N, S, D] of queries, keys, values -> [B, N, S, Dv]. Of long texts, the scores of a chunk are computed anew in
        the backward pass. rows: places of the queries, None: those of the keys.
        """
        length, repeats = k.shape[2], q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
        mask = causal_mask(length, window, q.device, rows)
        if length <= CHUNK:
            return self._chunk(q, k, v, mask, dropout)
        parts = []
        for start in range(0, q.shape[2], CHUNK):
            end = min(start + CHUNK, q.shape[2])
            seen = slice(0, length)
            if rows is None:
                seen = slice(0 if window is None else max(start + 1 - window, 0), end)
            part = (q[:, :, start:end], k[:, :, seen], v[:, :, seen], mask[start:end, seen], dropout)
            parts.append(checkpoint(self._chunk, *part, use_reentrant=False, preserve_rng_state=bool(dropout)))
        return torch.cat(parts, 2)

    def _chunk(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float) -> Tensor:
        scores = (q @ k.transpose(2, 3) * self.softmax_scale).float()
        if self.cap is not None:
            scores = self.cap * torch.tanh(scores / self.cap)
        scores = scores.masked_fill(~mask, float("-inf"))
        if self.softmax_offset is not None:
            sinks = self.softmax_offset.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, sinks], -1)
        shares = torch.softmax(scores, -1)[..., : k.shape[2]].to(v.dtype)
        return torch.nn.functional.dropout(shares, dropout) @ v

    def _dropout_generator(self, dropout: float) -> contextlib.AbstractContextManager[object]:
        """Heads differ between TP ranks, so dropout there draws from the generator that differs too."""
        if not dropout or self.config.sequence_parallel:
            return contextlib.nullcontext()
        return get_cuda_rng_tracker().fork()  # type: ignore[no-any-return]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Offsets = (), metadata: Settings | None = None
    ) -> Json:
        """The sinks, divided as the heads are."""
        if self.softmax_offset is None:
            return {}
        return make_sharded_tensors_for_checkpoint(  # type: ignore[no-any-return]
            self.state_dict(keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=mpu.get_tensor_model_parallel_group(),
            dp_cp_group=mpu.get_data_parallel_group(with_context_parallel=True),
        )


def in_place_of_te() -> dict[object, object]:
    """Classes to replace where Transformer Engine is and its core attention lacks what a model needs."""
    if backend.setup().spec != "te":
        return {}
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    return {TEDotProductAttention: SdpaAttention}
