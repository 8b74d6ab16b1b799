"""The output directory of a training run: new, to be resumed, or somebody else's. Shared by both sides."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from swiftlite.arguments.parser import specs
from swiftlite.arguments.train import SftArguments, TrainArguments
from swiftlite.checkpoint.info import ARGS_FILE, load_args
from swiftlite.train.checkpoints import Start, clear_unfinished
from swiftlite.utils.directories import REJECTS_FILE
from swiftlite.utils.dist import all_gather, barrier, is_main_process
from swiftlite.utils.errors import UsageError
from swiftlite.utils.io import writing
from swiftlite.utils.lock import output_lock
from swiftlite.utils.secrets import redacted
from swiftlite.utils.types import Json

A = TypeVar("A", bound=SftArguments)
_LENGTH = {"num_train_epochs", "train_iters"}


def versioned(output_dir: str) -> str:
    """`OUTPUT_DIR/v0-DATE`, counting on from the versions that are there."""
    root = Path(output_dir)
    taken = [int(p.name[1:].split("-")[0]) for p in root.glob("v*-*") if p.name[1:].split("-")[0].isdigit()]
    return str(root / f"v{max(taken, default=-1) + 1}-{time.strftime('%Y%m%d-%H%M%S')}")


def default_output_dir(args: SftArguments, parent: str) -> str:
    """`PARENT/NAME` for the model's name."""
    source = str(getattr(args, "mcore_model", None) or args.model).rstrip("/")
    return f"{parent}/{source.rsplit('/', 1)[-1]}"


def name_version(args: SftArguments) -> None:
    """Fill in what --add_version makes of --output_dir, and --logging_dir; the same on all ranks. Collective."""
    if args.add_version:
        args.output_dir = all_gather(versioned(str(args.output_dir)))[0]  # it holds the time
    if args.logging_dir is None or args.add_version:
        args.logging_dir = f"{args.output_dir}/runs"


def _as_stored(values: Mapping[str, object]) -> Json:
    """Values as args.json gives them back."""
    return json.loads(json.dumps(redacted(values), default=str))  # type: ignore[no-any-return]


@contextmanager
def held(args: A, decide: Callable[[A], Start | None]) -> Iterator[Start | None]:
    """`args.output_dir` for this run alone, until the block ends: the checkpoint that it resumes from, or None. Collective.

    Args: decide: says which, as `prepare` does. Raises: UsageError if another process is at work there.
    """
    root = Path(args.output_dir or "").expanduser()
    with ExitStack() as stack:
        if is_main_process() and not root.is_file():
            root.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(output_lock(root))
            if (root / ARGS_FILE).is_file():
                clear_unfinished(root)
        barrier()  # the others look when that is done, and all have looked before rank 0 writes
        start = decide(args)
        barrier()
        stack.enter_context(writing(root, "make room, and the same command resumes from the last checkpoint"))
        yield start


def prepare(args: TrainArguments, newest: Callable[[Path], Start | None]) -> Start | None:
    """Decide what happens with `args.output_dir`; nothing is written.

    Args: newest: finds the checkpoints of the run that is there; settings may differ where their field says so.
    Returns: the checkpoint that the run resumes from, if there is one.
    Raises: UsageError if the directory belongs to another run, or holds something while --resume is false.
    """
    root = Path(args.output_dir)
    if root.is_file():
        raise UsageError(f"--output_dir {root}: is a file; name a directory")
    if not root.is_dir() or all(path.name == REJECTS_FILE for path in root.iterdir()):
        return None
    if not args.resume:
        raise UsageError(
            f"--output_dir {root}: is not empty and --resume is false; name another directory, or --add_version true"
        )
    before = load_args(root)
    if not before:
        raise UsageError(f"--output_dir {root}: is not empty and holds no run ({ARGS_FILE}); name another directory")
    now = _as_stored(args.to_dict())
    fixed = {spec.name for spec in specs(type(args)).values() if spec.resume == "must match"}
    changed = [name for name in sorted(fixed & set(before)) if before[name] != now[name]]
    only_longer = set(changed) <= _LENGTH
    if args.extend and only_longer:
        return newest(root)
    if changed:
        shown = ", ".join(f"{name} {before[name]!r} -> {now[name]!r}" for name in changed[:3])
        longer = ", or --extend true to make it longer" if only_longer else ""
        raise UsageError(
            f"--output_dir {root}: holds a run with other settings ({shown}); name another directory, or "
            f"--add_version true{longer}"
        )
    return newest(root)
