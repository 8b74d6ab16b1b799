"""How a run on the Hugging Face side begins: process group, output directory, the checkpoint that it resumes from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from swiftlite.arguments.train import SftArguments
from swiftlite.checkpoint.resolve import resolve
from swiftlite.llm.model import tuner
from swiftlite.llm.pipeline import load_model, prepare_template
from swiftlite.llm.train.saving import FP32_FILE, OPTIMIZER, PREFIX, SCHEDULER, SHARDED_OPTIMIZER, STATE, rng_file
from swiftlite.train import run_directory
from swiftlite.train.checkpoints import Start, finished
from swiftlite.train.order import Data
from swiftlite.train.plugins import check_names
from swiftlite.utils.dist import get_local_rank, get_world_size
from swiftlite.utils.errors import CheckpointError, UsageError
from swiftlite.utils.io import read_json
from swiftlite.utils.logger import get_logger
from swiftlite.weights.safetensors import read_header
from swiftlite.weights.unpickle import check_saved

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from swiftlite.llm.template.base import Template

logger = get_logger()
A = TypeVar("A", bound=SftArguments)

UNREAD = "training_args.bin"  # transformers' own arguments: objects, which nothing here reads


@contextmanager
def process_group(timeout: int, always: bool) -> Iterator[None]:
    """The group of all ranks, where there are several or `always`; ended also after an error.

    timeout: seconds of an exchange.
    """
    started = (always or get_world_size() > 1) and not torch.distributed.is_initialized()
    if torch.cuda.is_available():
        torch.cuda.set_device(get_local_rank())
    if started:
        backend, alone = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", get_world_size() == 1
        torch.distributed.init_process_group(
            backend, timeout=timedelta(seconds=timeout), store=torch.distributed.HashStore() if alone else None,
            rank=0 if alone else -1, world_size=1 if alone else -1,
        )  # fmt: skip
    try:
        yield
    finally:
        if started:
            torch.distributed.destroy_process_group()


@contextmanager
def started(
    args: A, load: Callable[[A, Template], Data]
) -> Iterator[tuple[PreTrainedModel, Template, Data, Start | None]]:
    """What every command does before it prepares the model: (model, template, data, checkpoint to resume from).

    Weights come last: everything else that can be wrong is known by then.

    Args: load: (args, template) -> training set, validation set. Raises: UsageError without --model.
    """
    if args.model is None:
        raise UsageError("give the model with --model DIR_OR_ID")
    with process_group(args.ddp_timeout, always=bool(args.fsdp)):
        resolve(args)
        check_names(args)
        template = prepare_template(args)
        if args.output_dir is None:
            args.output_dir = run_directory.default_output_dir(args, "output")
        run_directory.name_version(args)
        with run_directory.held(args, resolve_output) as start:
            data = load(args, template)
            tuner.check_settings(args)
            model = load_model(args)
            tuner.without_cache(model)
            yield model, template, data, start


def resolve_output(args: SftArguments) -> Start | None:
    """Decide what happens with the output directory, the same on all ranks.

    Returns: the checkpoint to resume from, or None. Raises: UsageError, see run_directory.prepare; CheckpointError if the
    checkpoint is damaged.
    """
    start = run_directory.prepare(args, newest, PREFIX)
    if start is None:
        return None
    check_start(start, args.save_weights_only)
    return start


def newest(root: Path) -> Start | None:
    """The newest checkpoint of a run."""
    found = finished(root, PREFIX)
    return Start.of(found, max(found)) if found else None


def check_start(start: Start, weights_only: bool) -> None:
    """Raises: CheckpointError for a checkpoint that nothing can resume from. What is missing otherwise is said.

    weights_only: the run saves no optimizer, so that none is missed.
    """
    directory = start.directory

    def check_file(path: Path) -> None:
        if path.suffix == ".safetensors":
            read_header(path)
        elif path.suffix in (".pt", ".pth", ".bin") and path.name != UNREAD:
            check_saved(path, path)

    start.check(check_file)
    with start.reading():
        step = read_json(directory / STATE).get("global_step")
        if step != start.step:
            raise CheckpointError(f"{directory / STATE} is of step {step}: a copy of another checkpoint")
    names = {path.name for path in directory.iterdir()}
    if not any(
        name.endswith((".safetensors", ".bin")) and name not in (FP32_FILE, SHARDED_OPTIMIZER, UNREAD) for name in names
    ):
        raise CheckpointError(
            f"{directory}: its weights (model or adapter_model .safetensors) are missing; {start.way_on}"
        )
    if SHARDED_OPTIMIZER in names:
        names.add(OPTIMIZER)
    if weights_only and OPTIMIZER not in names:
        logger.warning("%s holds weights only: the optimizer begins anew, at the step's learning rate", directory)
        return
    effects = {
        OPTIMIZER: "the optimizer begins anew, at the step's learning rate",
        SCHEDULER: "the learning rate is computed for the step",
        rng_file(): "random generators (dropout) start anew",
    }
    for name, effect in effects.items():
        if name not in names:
            logger.warning("%s is missing: %s; or %s", directory / name, effect, start.way_on)
