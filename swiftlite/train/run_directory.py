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
from swiftlite.train.checkpoints import Start, clear_unfinished, finished
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


def prepare(args: TrainArguments, newest: Callable[[Path], Start | None], prefix: str) -> Start | None:
    """Decide what happens with `args.output_dir`; nothing is written.

    Args: newest: finds the checkpoints of the run that is there; settings may differ where their field says so.
        prefix: how checkpoints' names begin.
    Returns: the checkpoint that the run resumes from, if there is one.
    Raises: UsageError if the directory belongs to another run, or holds something while --resume is false.
    """
    root = Path(args.output_dir)
    if root.is_file():
        raise UsageError(f"--output_dir {root}: is a file; name a directory")
    named = _named(args, newest, prefix)
    if not root.is_dir() or all(path.name == REJECTS_FILE for path in root.iterdir()):
        return named
    if not args.resume:
        raise UsageError(
            f"--output_dir {root}: is not empty and --resume is false; name another directory, or --add_version true"
        )
    _check_same_run(args, root, f"--output_dir {root}", "name another directory, or --add_version true")
    if named is not None and named.directory.parent.resolve() == root.resolve():
        return named
    return newest(root) or named


def _named(args: TrainArguments, newest: Callable[[Path], Start | None], prefix: str) -> Start | None:
    """--resume_from_checkpoint: a checkpoint, or the newest one of a run's directory."""
    if args.resume_from_checkpoint is None:
        return None
    given = Path(args.resume_from_checkpoint)
    flag = f"--resume_from_checkpoint {given}"
    is_one = given.name.startswith(prefix) and given.name.removeprefix(prefix).isdigit()
    root = given.parent if is_one else given
    found = finished(root, prefix)
    step = int(given.name.removeprefix(prefix)) if is_one else None
    start = newest(root) if step is None else Start.of(found, step) if step in found else None
    if start is None:
        there = ", ".join(path.name for path in found.values()) or "none"
        raise UsageError(
            f"{flag}: no such checkpoint; there are {there} in {root}; leave it out to resume from the newest"
        )
    _check_same_run(args, root, flag, "give it the same settings, or begin from its weights with --model")
    return start


def _check_same_run(args: TrainArguments, root: Path, flag: str, instead: str) -> None:
    """Raises: UsageError if the run in `root` had settings that must be the same."""
    before = load_args(root)
    if not before:
        raise UsageError(f"{flag}: is not empty and holds no run ({ARGS_FILE}); name another directory")
    now = _as_stored(args.to_dict())
    fixed = {spec.name for spec in specs(type(args)).values() if spec.resume == "must match"}
    changed = [name for name in sorted(fixed & set(before)) if before[name] != now[name]]
    only_longer = set(changed) <= _LENGTH
    if changed and not (args.extend and only_longer):
        shown = ", ".join(f"{name} {before[name]!r} -> {now[name]!r}" for name in changed[:3])
        longer = ", or --extend true to make it longer" if only_longer else ""
        raise UsageError(f"{flag}: holds a run with other settings ({shown}); {instead}{longer}")
