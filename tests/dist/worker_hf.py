"""Runs a transformers-side training case inside one torchrun: [command, words, fault].

Faults: 'sigterm' sends one to the second rank in step 3, 'unreduced' leaves each rank with its own gradients,
'halved' weighs each rank's loss as if there were half as many, 'places' forgets which part of a sequence a rank has.
'measured' is none: it weighs a rank.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from swiftlite.llm.model.names import local_part
from swiftlite.llm.train.rlhf import rlhf_main
from swiftlite.llm.train.saving import whole
from swiftlite.llm.train.sft import sft_main
from swiftlite.llm.train.trainer import HfTrainer
from swiftlite.llm.train.ulysses import SequenceParts
from tests.dist.worker import replaced

COMMANDS = {"sft": sft_main, "dpo": rlhf_main}


def sigterm(original: Any) -> Any:
    def end_step(self: HfTrainer, *args: Any) -> Any:
        if self.state.global_step == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args)

    return end_step


def unreduced(original: Any) -> Any:
    def compute_loss(self: HfTrainer, model: Any, *args: Any, **kwargs: Any) -> Any:
        model.require_backward_grad_sync = False
        return original(self, model, *args, **kwargs)

    return compute_loss


def measured(original: Any) -> Any:
    """Leave the bytes of this rank's parameters and optimizer states in the output directory, the whole weights, and of how
    many groups the weights are gathered."""

    def release(self: HfTrainer) -> None:
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        held = sum(part.nbytes for tensor in (*self.model.parameters(), *states) for part in local_part(tensor)[:1])
        (Path(self.args.output_dir) / f"bytes-{os.environ.get('RANK', 0)}").write_text(str(held))
        groups = {id(part._get_fsdp_state()) for part in self.model.modules() if isinstance(part, FSDPModule)}
        (Path(self.args.output_dir) / "groups").write_text(str(len(groups)))
        weights = {name: whole(parameter) for name, parameter in self.model.named_parameters()}
        torch.save(weights, Path(self.args.output_dir) / "weights.pt")
        original(self)

    return release


def halved(original: Any) -> Any:
    return lambda *args, **kwargs: original(*args, **kwargs) / 2


def places(original: Any) -> Any:
    """Each rank counts its tokens from 0 on."""

    def divide(self: SequenceParts, batch: Any) -> Any:
        found = original(self, batch)
        found["position_ids"] = torch.arange(found["position_ids"].shape[1]).expand_as(found["position_ids"])
        return found

    return divide


FAULTS: dict[str | None, tuple[Any, str, Any]] = {
    "measured": (HfTrainer, "release", measured),
    "halved": (HfTrainer, "compute_loss", halved),
    "places": (SequenceParts, "divide", places),
    None: (HfTrainer, "end_step", lambda original: original),
    "sigterm": (HfTrainer, "end_step", sigterm),
    "unreduced": (HfTrainer, "compute_loss", unreduced),
}


def run_case(case: list[Any]) -> None:
    command, words, fault = case
    with replaced(*FAULTS[fault]):
        COMMANDS[command](words)
