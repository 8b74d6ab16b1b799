"""The output directory of a run: new, to be resumed, or somebody else's. Imports no megatron-core."""

from __future__ import annotations

from pathlib import Path

from swiftlite.arguments.megatron_train import MegatronSftArguments
from swiftlite.train import run_directory
from swiftlite.train.checkpoints import Start, finished
from swiftlite.train.run_directory import versioned
from swiftlite.utils.directories import TRACKER, read_tracker
from swiftlite.utils.logger import get_logger

__all__ = ["prepare", "versioned"]

PREFIX = "iter_"


def prepare(args: MegatronSftArguments) -> Start | None:
    """Decide what happens with `args.output_dir`, see swiftlite.train.run_directory.prepare."""
    return run_directory.prepare(args, newest, PREFIX)


def newest(root: Path) -> Start | None:
    """The checkpoint that the tracker file names; where that was lost, the newest one that is there."""
    found, tracker = finished(root, PREFIX), root / TRACKER
    text, name = read_tracker(root)
    named = int(name.removeprefix(PREFIX)) if name and name.startswith(PREFIX) else None
    if named in found:
        assert named is not None
        if named < max(found):
            get_logger().warning(
                "%s says %d: resuming from there, although %s is there, too", tracker, named, found[max(found)].name
            )
        return Start.of(found, named)
    if not found:
        return None
    start = Start.of(found, max(found))
    what = "is missing" if text is None else f"says {text[:40]!r}, which is not there"
    get_logger().warning("%s %s: resuming from the newest checkpoint, %s", tracker, what, start.directory.name)
    return start
