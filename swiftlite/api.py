"""Objects in place of command lines, for scripts and notebooks: `Checkpoint`, `convert`, `train` and the `Run` it gives.

    from swiftlite.api import Checkpoint, convert, train

A setting is a flag of the command without its dashes, under any of its names (`swiftlite sft --help all`); the same code
runs, and the same errors are raised. Not in the package's own namespace, where `swiftlite.convert` and `swiftlite.train`
are modules. torch is imported with `Checkpoint` or when something runs.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from signal import Signals
from types import UnionType
from typing import TYPE_CHECKING, cast

from swiftlite.arguments.parser import Arguments, from_dict
from swiftlite.cli.routes import ROUTES, Route
from swiftlite.train.plot import plot_runs, read_run, title_of
from swiftlite.utils.directories import Directory
from swiftlite.utils.errors import UsageError
from swiftlite.utils.quiet import without_remarks
from swiftlite.utils.types import Json

if TYPE_CHECKING:
    from swiftlite.checkpoint.checkpoint import Checkpoint as Checkpoint
    from swiftlite.train.plugins import Callback

Rows = Sequence[Mapping[str, object]]
Data = str | Path | Sequence[str | Path] | Rows


@dataclass(frozen=True)
class Run:
    """A training run on disk. directory: its --output_dir. summary: the last log line's values, `iteration`, `seconds`."""

    directory: Path
    summary: Json

    @property
    def stopped_by(self) -> Signals | None:
        """The signal that ended it before its last step, all saved: the same call resumes it. None: it is done."""
        return cast(Signals | None, self.summary.get("signal"))

    @property
    def history(self) -> list[Json]:
        """Lines of logging.jsonl, by step."""
        return read_run(self.directory)

    @property
    def checkpoint(self) -> Path:
        """The newest checkpoint, a model's or an adapter's directory. Raises: UsageError before the first one."""
        found = Directory(self.directory)
        if found.iteration is not None:
            return found.iteration
        if found.newest is None:
            raise UsageError(f"{self.directory}: has no checkpoint yet; is it the output of a training run?")
        return found.newest.path

    def plot(self, target: str | Path | None = None) -> Path | None:
        """Draw its curves. target: a PNG (default: loss.png in its directory). Returns: it, None without matplotlib."""
        return plot_runs({"": self.history}, Path(target or self.directory / "loss.png"), title_of(self.directory))


def train(
    objective: str, model: str | Path, dataset: Data, output_dir: str | Path, *, side: str = "transformers",
    callbacks: Sequence[Callback] = (), **settings: object,
) -> Run:  # fmt: skip
    """Train in this process; on several GPUs start the script with `torchrun --nproc_per_node N`.

    Args:
        objective: sft, pt, dpo, ...: a command that trains.
        model: directory or hub id; with side="megatron" also a directory that `convert` wrote.
        dataset: files, hub ids or registered names as --dataset takes them, or rows themselves.
        side: transformers or megatron. settings: flags of the command, without dashes.
        callbacks: called in this run beside those of `swiftlite.register_callback`.
    Returns: the run, also where SIGTERM, SIGHUP or Ctrl-C ended it early: ask `stopped_by`. The same call again resumes it.
    Raises: UsageError for a wrong setting; other SwiftliteErrors for what is wrong with model or data.
    """
    if side not in ("transformers", "megatron"):
        raise UsageError(f"side {side}: must be transformers or megatron")
    words = ("megatron", objective) if side == "megatron" else (objective,)
    trainable = sorted({words[-1] for words, route in ROUTES.items() if route.launch and ".train" in route.handler})
    if words not in ROUTES or objective not in trainable:
        raise UsageError(f"objective {objective}: must be one of {', '.join(trainable)}")
    _check_path("model", model)
    place = "mcore_model" if side == "megatron" and Directory(Path(model)).is_megatron else "model"
    given = {place: str(model), "dataset": _names(dataset), "output_dir": str(output_dir), **settings}
    from swiftlite.train.plugins import CALLBACKS, register_callback  # torch

    before = len(CALLBACKS)
    try:
        for callback in callbacks:
            register_callback(callback)
        summary = cast(Json, _run(ROUTES[words], given))
    finally:
        del CALLBACKS[before : before + len(callbacks)]
    return Run(Path(str(summary["output_dir"])), summary)


def convert(source: str | Path, output_dir: str | Path, *, to: str, **settings: object) -> Path:
    """Convert a checkpoint: `to="mcore"` from Hugging Face's format to Megatron-core's, `to="hf"` back.

    Args: settings: flags of `swiftlite export`, without dashes: `test_convert_precision=True`, `adapters=[DIR]`.
    Returns: the output directory, which appears under its name when it is complete.
    Raises: UsageError, CheckpointError, MapError, ShapeError; nothing is left then but a hidden sibling to resume from.
    """
    if to not in ("mcore", "hf"):
        raise UsageError(f"to {to}: must be mcore or hf")
    _check_path("source", source)
    place = "model" if to == "mcore" else "mcore_model"
    given = {place: str(source), f"to_{to}": True, "output_dir": str(output_dir), **settings}
    return cast(Path, _run(ROUTES[("export",)], given))


@cache
def _quiet() -> None:
    """Once for a process; a script's own progress bars stay as they are."""
    without_remarks()


def _run(route: Route, settings: Mapping[str, object]) -> object:
    _quiet()
    cls = cast(type[Arguments], _load(route.arguments))
    args = from_dict(cls, {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()})
    _load("swiftlite.checkpoint.preflight:check_command")(args)
    return _load(route.handler)(args)


def _load(path: str) -> Callable[..., object]:
    module, _, name = path.partition(":")
    return cast(Callable[..., object], getattr(importlib.import_module(module), name))


def _check_path(name: str, given: object) -> None:
    if not isinstance(given, str | Path):
        raise UsageError(f"{name}: must be a path or a hub's id, not a {type(given).__name__}")


def _names(dataset: Data) -> list[str]:
    """What --dataset takes. Rows get a name that follows from them, so that the same rows resume a run."""
    if isinstance(dataset, str | Path):
        return [str(dataset)]
    items = [] if isinstance(dataset, Mapping) or not isinstance(dataset, Iterable) else list(dataset)
    if not items or not (_all(items, Mapping) or _all(items, str | Path)):
        raise UsageError("dataset: must be a path, a hub's id, a list of these, or a list of rows like "
                         '{"messages": [...]}, at least one')  # fmt: skip
    if not _all(items, Mapping):
        return [str(item) for item in items]
    from swiftlite.llm.dataset.register import register_dataset

    rows = [dict(cast(Mapping[str, object], row)) for row in items]
    name = f"rows-{hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()[:12]}"
    register_dataset(name, exist_ok=True, load=lambda: rows)
    return [name]


def _all(items: Sequence[object], kind: type | UnionType) -> bool:
    return all(isinstance(item, kind) for item in items)


def __getattr__(name: str) -> object:
    if name == "Checkpoint":  # it imports torch
        return _load("swiftlite.checkpoint.checkpoint:Checkpoint")
    raise AttributeError(f"module 'swiftlite.api' has no attribute {name!r}; it has Checkpoint, Run, convert, train")
