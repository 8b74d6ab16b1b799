"""Runs a transformers-side training case inside one torchrun: [command, words, fault].

Faults: 'sigterm' sends one to the second rank in step 3, 'unreduced' leaves each rank with its own gradients.
"""

from __future__ import annotations

import os
import signal
from typing import Any

from swiftlite.llm.train.dpo import dpo_main
from swiftlite.llm.train.sft import sft_main
from swiftlite.llm.train.trainer import HfTrainer
from tests.dist.worker import replaced

COMMANDS = {"sft": sft_main, "dpo": dpo_main}


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


FAULTS = {
    None: ("end_step", lambda original: original),
    "sigterm": ("end_step", sigterm),
    "unreduced": ("compute_loss", unreduced),
}


def run_case(case: list[Any]) -> None:
    command, words, fault = case
    with replaced(HfTrainer, *FAULTS[fault]):
        COMMANDS[command](words)
