"""Runs cases in the processes of one group, which take jobs from a directory, see launch.py.

A job names a module with `run_case`; here a case is a command (default: Megatron's sft), its argv, and a fault to plant
or none.

Faults: 'double_layer' doubles one layer's gradients, 'skip_norm_reduce' leaves out the all-reduce of norm gradients,
'end_after_5' ends the run after that step as if it had been killed there, 'kill_in_save' kills the process after the second
checkpoint is written, before it is renamed, 'kill_in_background' from the process that begins to write the second
checkpoint, 'own_counts' weighs preference losses by the pairs and tokens of this rank alone, 'places_in_order' gives
ranks of context parallelism successive parts of a text, 'loss_of_one_rank' counts the tokens of the first of them only,
'own_scores' leaves the gradients of a score head to each rank's part of the sequence.
"""

from __future__ import annotations

import gc
import importlib
import itertools
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# What the process that all others are forked from imports.
IMPORTED = ["tests.dist.worker", "tests.dist.worker_hf", "tests.dist.worker_hf_io", "swiftlite.megatron.trainers.dpo",
            "swiftlite.megatron.trainers.kto"]  # fmt: skip


class Ended(Exception):
    """The run ends here; what is on disk is what a kill would leave."""


@contextmanager
def replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def fault(name: str | None) -> Iterator[None]:
    from megatron.core.distributed import finalize_model_grads as finalize

    from swiftlite.megatron import background
    from swiftlite.megatron import state as checkpoint
    from swiftlite.megatron.model.head import ScoreHead
    from swiftlite.megatron.trainers import base, batch
    from swiftlite.megatron.trainers.dpo import DpoTrainer
    from swiftlite.train.metrics import Metrics

    def double_layer(original: Any) -> Any:
        def changed(models: Any, *args: Any, **kwargs: Any) -> None:
            original(models, *args, **kwargs)
            for model in models:
                for parameter_name, parameter in model.named_parameters():
                    if "layers.1." in parameter_name.replace("/", ".") and parameter.requires_grad:
                        parameter.main_grad.mul_(2)

        return changed

    def end_after(original: Any) -> Any:
        last = int(str(name).rpartition("_")[2])

        def changed(self: Any, step: int, *args: Any) -> None:
            original(self, step, *args)
            if step == last:
                raise Ended

        return changed

    def kill_in_save(original: Any) -> Any:
        def changed(source: Path, target: Path) -> None:
            if target.name == "iter_0000006":
                os.killpg(0, signal.SIGKILL)  # with the helpers that saving starts
            original(source, target)

        return changed

    def own_counts(original: Any) -> Any:
        return lambda self, batches: sum(batch.counts() for batch in batches)

    def kill_in_background(original: Any) -> Any:
        calls = []

        def kill() -> None:
            time.sleep(1)
            os.killpg(0, signal.SIGKILL)

        def changed(self: Any, writes: list[Any], then: Any) -> None:
            calls.append(then)
            deadly = [background.Write(0, kill, lambda: kill)] if len(calls) == 2 else []
            original(self, [*deadly, *writes], then)

        return changed

    def places_in_order(_: Any) -> Any:
        return lambda total, bounds, size, rank: torch.arange(total).chunk(size)[rank]

    def loss_of_one_rank(original: Any) -> Any:
        def changed(self: Any, size: int, rank: int) -> Any:
            part = original(self, size, rank)
            part.loss_mask = part.loss_mask * (rank == 0)
            return part

        return changed

    def own_scores(original: Any) -> Any:
        def changed(self: Any, *args: Any) -> None:
            original(self, *args)
            self.weight.sequence_parallel = False

        return changed

    places = {
        "own_scores": (ScoreHead, "__init__", own_scores),
        "places_in_order": (batch, "places", places_in_order),
        "loss_of_one_rank": (batch.MicroBatch, "part", loss_of_one_rank),
        "double_layer": (base, "finalize_model_grads", double_layer),
        "skip_norm_reduce": (
            sys.modules[finalize.__module__],
            "_allreduce_non_tensor_model_parallel_grads",
            lambda _: lambda *args, **kwargs: None,
        ),
        **dict.fromkeys(("end_after_5", "end_after_6"), (Metrics, "advance", end_after)),
        "kill_in_save": (checkpoint, "replace_directory", kill_in_save),
        "own_counts": (DpoTrainer, "count", own_counts),
        "kill_in_background": (background.BackgroundWriter, "start", kill_in_background),
    }
    if name is None:
        yield
        return
    with replaced(*places[name]):
        yield


def run_case(case: dict[str, Any]) -> None:
    from swiftlite.cli.main import main as swiftlite_main
    from swiftlite.megatron.trainers.rlhf import megatron_rlhf_main
    from swiftlite.megatron.trainers.sft import megatron_sft_main

    def export(words: list[str]) -> None:
        assert swiftlite_main(["export", *words]) == 0

    commands = {"sft": megatron_sft_main, "dpo": megatron_rlhf_main, "export": export}
    with fault(case.get("fault")), suppress(Ended):
        commands[case.get("command", "sft")](case["argv"])


def jobs(directory: Path, giver: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Jobs in their order, waiting for the next one as long as `giver`, the process that gives them, lives."""
    for number in itertools.count():
        job = directory / f"job-{number}.json"
        while not job.exists():
            os.kill(giver, 0)  # an error when it is gone
            time.sleep(0.05)
        yield number, json.loads(job.read_text())


def main(directory: Path, giver: int) -> None:
    from swiftlite.train.metrics import Metrics

    torch.set_num_threads(1)
    dist.init_process_group("gloo")  # one group for all cases
    try:
        # Drawing takes as long as the steps, and what is drawn is what logging.jsonl holds.
        with replaced(Metrics, "plot", lambda _: lambda self: None):
            for number, job in jobs(directory, giver):
                module = importlib.import_module(job["module"])
                for case in job["cases"]:
                    module.run_case(case)
                sys.stdout.flush()
                (directory / f"done-{number}-{os.environ['RANK']}").touch()
    finally:
        dist.destroy_process_group()


def start(size: int, directory: Path, log: Path, giver: int) -> None:
    """Fork the ranks, with the environment that torchrun gives them, and wait; when one fails, all are killed."""
    os.setsid()  # a group of their own, which cases kill
    with log.open("a") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}  # fmt: skip
    gc.freeze()  # what is imported stays: no rank looks through it for garbage
    for rank in range(size):
        if os.fork() == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            try:
                main(directory, giver)
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(1)  # there is no other end than that of the giver
    os.wait()
    os.killpg(0, signal.SIGKILL)
