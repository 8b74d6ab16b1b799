"""Sequences divided over ranks on the transformers side, as Ulysses (arXiv 2309.14509) does.

Each rank has a run of a sequence's tokens. For attention the ranks exchange: each gets all tokens of some of the heads,
so that any kernel computes them as it would alone.
Letters: N ranks, B rows, S tokens of a whole sequence, L = S / N of them on a rank, H heads, D numbers of a head.
"""

from __future__ import annotations

import copy
import inspect
import math
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface, masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from swiftlite.llm.template.collate import IGNORE_INDEX
from swiftlite.train.objective import Batch
from swiftlite.utils.dist import get_world_size
from swiftlite.utils.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "ulysses"  # of the attention implementation, as transformers counts them
# A position predicts the next token's label, which may be on the next rank: parts of these have one more at the end.
_OF_NEXT = ("labels", "loss_scale", "sequence_ids", "channels", "told")


class SequenceParts:
    """The ranks that share sequences, and what attention must know of the whole batch that is on its way."""

    def __init__(self, size: int, pads_right: bool) -> None:
        """Collective. pads_right: no token sees padding, which comes after it.

        Raises: UsageError if groups of `size` do not make up all processes.
        """
        if get_world_size() % size:
            raise UsageError(f"--sequence_parallel_size {size}: must divide the {get_world_size()} processes")
        self.size, self.pads_right = size, pads_right
        self.group: dist.ProcessGroup = dist.new_subgroups(size)[0]
        self.rank = self.group.rank()
        self.positions = torch.empty(0)
        self.mask: Tensor | None = None
        self.masks: dict[object, Tensor | None] = {}
        self.joined = False
        self.kernel = ""
        self.calls = -1

    def install(self, model: PreTrainedModel) -> None:
        """Let a model's attention exchange heads. Raises: UsageError for one whose layers cannot be divided so."""
        config = model.config.get_text_config()
        self.kernel = config._attn_implementation
        flag, heads = f"--sequence_parallel_size {self.size}", config.num_attention_heads
        if heads % self.size:
            raise UsageError(f"{flag}: the {heads} attention heads must be a multiple of it")
        if self.kernel not in ALL_ATTENTION_FUNCTIONS:
            raise UsageError(f"{flag}: not with attention {self.kernel}; use --attn_impl sdpa or flash_attn")
        kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        if kinds:
            raise UsageError(f"{flag}: layers of kind {sorted(kinds)[0]} read tokens in other ways than attention")
        rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        if any(f"'{kind}'" in str(rope) for kind in ("dynamic", "longrope")):
            raise UsageError(f"{flag}: this model's rotation depends on the length of the text, which no rank sees")
        AttentionInterface.register(NAME, self.attend)
        for module in model.modules():
            own: Any = getattr(module, "config", None)
            if getattr(own, "_attn_implementation", None) == self.kernel:
                own._attn_implementation = NAME

    def divide(self, batch: Batch) -> Batch:
        """This rank's tokens of a batch [B, S]; what attention needs of the whole is kept until the next one."""
        if self.calls == 0:
            raise UsageError("--sequence_parallel_size: this model's attention is its own; leave the flag out")
        self.calls, self.positions = 0, batch["position_ids"]
        self.masks, self.mask = {}, batch.get("attention_mask")
        self.joined = self.mask is None
        if self.mask is not None and self.mask.dim() == 2 and self.pads_right:
            self.mask = None  # without one, kernels need no S x S numbers
        count = self.positions.shape[1] // self.size  # templates make the length a multiple
        begin = self.rank * count
        parts = {name: value for name, value in batch.items() if name != "attention_mask"}
        for name, value in parts.items():
            if name in _OF_NEXT:
                longer = pad(value, (0, 1), value=IGNORE_INDEX if name == "labels" else 0)
                parts[name] = longer[:, begin : begin + count + 1]
            elif value.shape[:2] == self.positions.shape:
                parts[name] = value[:, begin : begin + count]
        return parts

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, _: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """As transformers calls attention: query [B, H, L, D], key and value with as many heads or fewer -> [B, L, H, D]."""
        self.calls += 1
        copies = math.lcm(key.shape[1], self.size) // key.shape[1]  # a head that several ranks need
        key, value = (tensor.repeat_interleave(copies, 1) for tensor in (key, value))
        query, key, value = (swap(tensor, self.group) for tensor in (query, key, value))
        if "position_ids" in kwargs:
            kwargs["position_ids"] = self.positions
        mask = self.whole_mask(module.config, query, kwargs.get("sliding_window"))
        groups = getattr(module, "num_key_value_groups", None)
        module.num_key_value_groups = query.shape[1] // key.shape[1]
        out, _ = ALL_ATTENTION_FUNCTIONS[self.kernel](module, query, key, value, mask, **kwargs)
        module.num_key_value_groups = groups
        return swap(out, self.group), None

    def whole_mask(self, config: Any, query: Tensor, window: int | None) -> Tensor | None:
        """What transformers' model would have made of the whole batch for its kernel."""
        if self.mask is not None and self.mask.dim() == 4:
            return self.mask
        if window not in self.masks:
            config = copy.copy(config)
            config._attn_implementation = self.kernel
            make = masking_utils.create_sliding_window_causal_mask if window else masking_utils.create_causal_mask
            rows = query.new_empty(*self.positions.shape, 1)
            values = {
                "config": config, "attention_mask": self.mask, "inputs_embeds": rows,
                "position_ids": self.positions if self.joined else None,
                "input_embeds": rows, "past_key_values": None, "cache": None,
                "cache_position": torch.arange(rows.shape[1], device=rows.device),
            }  # fmt: skip
            taken = inspect.signature(make).parameters  # which releases name differently
            self.masks[window] = make(**{name: value for name, value in values.items() if name in taken})
        return self.masks[window]

    def add_up(self, local: Tensor) -> Tensor:
        """The sum over the ranks. Each of them takes an N-th of what comes of it, so gradients count N times here."""
        total = local.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total + self.size * (local - local.detach())


def swap(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, A N, C, D] -> [B, A, C N, D]: what was divided along the third dimension comes to be along the second."""
    received: Tensor = _Exchange.apply(torch.stack(x.chunk(group.size(), 1)), group)
    return torch.cat(received.unbind(), 2)


class _Exchange(torch.autograd.Function):
    """[N, ...]: entry i goes to rank i. Its own inverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, out = group, torch.empty_like(x)
        dist.all_to_all_single(out, x, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Exchange.apply(gradient.contiguous(), ctx.group), None
