"""What a file of --external_plugins may add to training: a registry for each kind, which the trainers look in.

Loss weights, models, templates and datasets have registries where they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from swiftlite.arguments.parser import REGISTERED
from swiftlite.arguments.train import OPTIMIZERS as BUILT_IN
from swiftlite.arguments.train import SftArguments, TrainArguments
from swiftlite.utils.errors import UsageError
from swiftlite.utils.text import short

if TYPE_CHECKING:
    from swiftlite.train.loop import Run

T = TypeVar("T")

# Cross entropies of tokens [N], fp32, with gradients -> the losses that take their place, [N].
TokenLoss = Callable[[Tensor], Tensor]
# Groups of parameters as torch's optimizers take them (with their weight decay and learning rates), arguments -> optimizer.
MakeOptimizer = Callable[[Sequence[object], TrainArguments], Optimizer]


class Callback:
    """What a run does besides; override what is wanted. Called on all ranks, with the same values.

    To end the run, with a checkpoint of the next step, write into `run.stop.early` why.
    """

    def on_step(self, run: Run, step: int, values: Mapping[str, float]) -> None:
        """A step is done. values: `loss`, `lr`, `grad_norm` of this step alone."""

    def on_evaluate(self, run: Run, step: int, values: Mapping[str, float]) -> None:
        """values: `eval_loss` and the others."""

    def on_save(self, run: Run, step: int, paths: Sequence[Path]) -> None:
        """A checkpoint stands: its directory, and the others that were written with it."""


def by_probability(losses: Tensor) -> Tensor:
    """Each token's loss weighted by its probability (dynamic fine-tuning, arXiv 2508.05629)."""
    return losses * torch.exp(-losses.detach())


OBJECTIVES: dict[str, TokenLoss] = {"dft": by_probability}
OPTIMIZERS: dict[str, MakeOptimizer] = {}
CALLBACKS: list[Callback] = []


def register_objective(name: str, loss: TokenLoss) -> None:
    """What `--token_loss NAME` of sft and pt minimises, on both sides: a mean over the tokens of the global batch."""
    OBJECTIVES[name] = loss
    REGISTERED.add(name)


def register_optimizer(name: str, make: MakeOptimizer) -> None:
    """What `--optim NAME` is, with transformers."""
    OPTIMIZERS[name] = make
    REGISTERED.add(name)


def register_callback(callback: Callback) -> None:
    """Have every run of this process call it. Raises: UsageError for what is no object of a Callback class."""
    if not isinstance(callback, Callback):
        raise UsageError(f"callback {short(repr(callback))}: must be an object of a class made from swiftlite.Callback")
    CALLBACKS.append(callback)


def token_loss_of(args: SftArguments) -> TokenLoss | None:
    """What takes the place of tokens' cross entropies; None: nothing does. It raises UsageError where it gives others."""
    if not args.token_loss:
        return None
    name, loss = args.token_loss, registered(OBJECTIVES, args.token_loss, "token_loss")

    def checked(losses: Tensor) -> Tensor:
        found = loss(losses)
        if not isinstance(found, Tensor) or found.shape != losses.shape:
            what = f"shape {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise UsageError(
                f"--token_loss {name}: gave {what} for losses of shape {list(losses.shape)}; it must give as many"
            )
        return found

    return checked


def check_names(args: SftArguments) -> None:
    """After the plugins were read. Raises: UsageError for what is named and not there."""
    token_loss_of(args)
    if args.optim not in BUILT_IN:
        registered(OPTIMIZERS, args.optim, "optim")


def registered(kind: Mapping[str, T], name: str, flag: str) -> T:
    """Raises: UsageError for a name that no plugin has registered."""
    if name not in kind:
        known = f"they have {', '.join(kind)}" if kind else "they have none"
        raise UsageError(f"--{flag} {name}: neither built in nor registered by a file of --external_plugins; {known}")
    return kind[name]
