"""Losses that keep the experts of a mixture busy, the same on both sides; and their hooks in a Hugging Face model.

A step minimises its loss + the mean over its micro batches of the sum over layers of `RouterLoss`.
Shapes: T tokens of a micro batch, E experts, K experts of one token, G groups of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swiftlite.arguments.train import TrainArguments
from swiftlite.families import has_family
from swiftlite.families.blocks import EXPERT_KEYS, TOPK_KEYS
from swiftlite.families.hf_config import architecture_of, convert_hf_config
from swiftlite.utils.errors import UsageError
from swiftlite.utils.logger import get_logger
from swiftlite.utils.types import Config, Json

ROUTERS = (".mlp.gate", ".mlp.router", ".block_sparse_moe.gate")  # how names of routers end in models of transformers
PADDING = -1  # the sequence that padding belongs to


@dataclass(frozen=True)
class RouterLoss:
    """What one layer's router adds to a micro batch's loss.

    balance: weight of E * sum over experts of (share of the choices) * (mean score), over all tokens of the micro
        batch, or `by_sequence`: a mean over its sequences. z: weight of the mean square of the logits' log-sum-exp.
    Padding counts for nothing. Source: megatron-core 0.16-0.19, moe_utils.switch_load_balancing_loss_func, z_loss_func.
    """

    topk: int
    score_function: str
    balance: float = 0.0
    by_sequence: bool = False
    z: float = 0.0

    @classmethod
    def of(cls, args: TrainArguments, model: Config) -> RouterLoss | None:
        """From a command's arguments and the model's fields by Megatron's names; None where nothing is added."""
        kind = args.moe_router_load_balancing_type or model.get("moe_router_load_balancing_type") or "aux_loss"
        balance, z = args.moe_aux_loss_coeff, args.moe_z_loss_coeff or 0.0
        unused = None
        if not model.get("num_experts") and (balance or z):
            unused = "the model has no experts"
            balance, z = 0.0, 0.0
        elif balance and kind == "none":
            unused, balance = "--moe_router_load_balancing_type is none", 0.0
        if unused:
            get_logger().warning("--moe_aux_loss_coeff, --moe_z_loss_coeff: no effect, %s", unused)
        if not (balance or z):
            return None
        score_function = model.get("moe_router_score_function") or "softmax"
        return cls(model["moe_router_topk"], score_function, balance, kind == "seq_aux_loss", z)

    def __call__(
        self, logits: Tensor, sequences: Tensor, lengths: Tensor, add_up: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Logits [T, E] -> scalar.

        Args: sequences: int64 [T], the sequence of each token, PADDING for none. lengths: [G], tokens of each sequence,
            0 for one that is not there.
            add_up: where ranks hold parts of the same sequences, the sum of a tensor over them; the result is this
            rank's part then, and `lengths` are those of whole sequences.
        """
        logits = logits if logits.dtype == torch.float64 else logits.float()
        lengths = lengths.to(logits.dtype)
        loss = logits.new_zeros(())
        if self.balance:
            groups, sizes = (sequences, lengths) if self.by_sequence else (sequences.clamp(max=0), lengths.sum()[None])
            scores = logits.softmax(-1) if self.score_function == "softmax" else _shares(logits.sigmoid())
            chosen = torch.zeros_like(scores).scatter(1, scores.detach().topk(self.topk).indices, 1.0)
            rows = torch.where(groups == PADDING, len(sizes), groups)  # padding: a last row, which is cut off
            empty = logits.new_zeros(len(sizes) + 1, logits.shape[1])
            counts = empty.index_add(0, rows, chosen)[:-1]
            sums = empty.index_add(0, rows, scores)[:-1]
            if add_up is not None:
                counts = add_up(counts)
            shares = (counts * sums).sum(-1) / sizes.square().clamp(min=1)
            loss = loss + self.balance * logits.shape[1] / self.topk * shares.sum() / (sizes > 0).sum()
        if self.z:
            squares = logits.logsumexp(-1).square() * (sequences != PADDING)
            loss = loss + self.z * squares.sum() / lengths.sum()
        return loss


def _shares(scores: Tensor) -> Tensor:
    return scores / (scores.sum(-1, keepdim=True) + 1e-20)


def sequences_of(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(sequence of each token, int64 [B * S]; tokens of each sequence, [G]) of a batch that a data collator made.

    Rows are padded and have an `attention_mask` [B, S], or are joined: a sequence begins where position_ids are 0.
    """
    mask = batch.get("attention_mask")
    if mask is not None and mask.dim() == 2:
        rows = torch.arange(len(mask), device=mask.device)[:, None].expand_as(mask)
        return torch.where(mask != 0, rows, PADDING).flatten(), mask.sum(-1)
    sequences = (batch["position_ids"].flatten() == 0).cumsum(0) - 1
    return sequences, sequences.bincount()


def router_fields(config: Config) -> Json:
    """What RouterLoss.of asks for, of a config.json whose architecture has no family."""
    flat = {**config, **(config.get("text_config") or {})}
    fields = {
        "num_experts": next((flat[key] for key in EXPERT_KEYS if flat.get(key)), 0),
        "moe_router_topk": next((flat[key] for key in TOPK_KEYS if flat.get(key)), 1),
    }
    if flat.get("scoring_func"):
        fields["moe_router_score_function"] = flat["scoring_func"]
    return fields


class RouterWatch:
    """Computes a RouterLoss in every router of a Hugging Face model while it runs.

    Use: `begin(batch)`, the model's forward pass with gradients, `total()`.
    """

    def __init__(self, model: torch.nn.Module, loss: RouterLoss) -> None:
        self.loss = loss
        self.sequences, self.lengths = torch.empty(0), torch.empty(0)
        self.found: dict[str, Tensor] = {}
        routers = {name: module for name, module in model.named_modules() if name.endswith(ROUTERS)}
        if not routers or any(getattr(module, "weight", None) is None for module in routers.values()):
            raise UsageError(
                f"--moe_aux_loss_coeff, --moe_z_loss_coeff: {type(model).__name__} has no router named "
                f"{' or '.join(name[1:] for name in ROUTERS)} with a weight; leave them out"
            )
        for name, module in routers.items():
            module.register_forward_pre_hook(self._hook(name))

    @classmethod
    def of(cls, model: torch.nn.Module, args: TrainArguments) -> RouterWatch | None:
        """None where the arguments ask for no loss of this kind."""
        if not (args.moe_aux_loss_coeff or args.moe_z_loss_coeff):
            return None
        config = args.model_info.config
        known = has_family(architecture_of(config))
        loss = RouterLoss.of(args, convert_hf_config(config) if known else router_fields(config))
        return cls(model, loss) if loss else None

    def _hook(self, name: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def observe(router: Any, inputs: tuple[Tensor, ...]) -> None:
            if torch.is_grad_enabled():
                hidden, bias = inputs[0].flatten(0, -2), getattr(router, "bias", None)
                bias = None if bias is None else bias.float()
                with torch.autocast(hidden.device.type, enabled=False):
                    logits = torch.nn.functional.linear(hidden.float(), router.weight.float(), bias)
                    loss = self.loss(logits, self.sequences, self.lengths)
                self.found.setdefault(name, loss)  # a recomputed layer runs, and must do all of this, a second time

        return observe

    def begin(self, batch: Mapping[str, Tensor]) -> None:
        self.sequences, self.lengths = sequences_of(batch)
        self.found = {}

    def total(self) -> Tensor:
        """Sum over the layers, with gradients."""
        return torch.stack(list(self.found.values())).sum()
