"""Runs transformers-side training cases inside one torchrun: `worker_hf.py CASES.json`, a list of [command, words, fault].

Faults: 'sigterm' sends one to the second rank in step 3, 'unreduced' leaves each rank with its own gradients.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from swiftlite.llm.train.dpo import dpo_main
from swiftlite.llm.train.sft import sft_main
from swiftlite.llm.train.trainer import HfTrainer
from tests.dist.worker import replaced

COMMANDS = {"sft": sft_main, "dpo": dpo_main}


def sigterm(original: Any) -> Any:
    def end_step(self: HfTrainer) -> bool:
        if self.state.global_step == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

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


def main() -> None:
    dist.init_process_group("gloo")  # one group for all cases
    try:
        for command, words, fault in json.loads(Path(sys.argv[1]).read_text()):
            with replaced(HfTrainer, *FAULTS[fault]):
                COMMANDS[command](words)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
